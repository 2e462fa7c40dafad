"""Write a trained run as a plain folder for use: ``python -m emrrg.export RUN OUT``.

Adapters and deltas are merged into the weights in fp32; what has no place in them (learned tokens,
extra states, the parallel adapter) stays beside them. OUT holds

    weights.safetensors   the whole model
    config.json           what it is built from, how it writes, what it was trained with
    tokenizer.model       (or tokenizer.json)
    checksums.json

and is read by `emrrg.load`, by every command that takes a run, and by `emrrg.convert`.

With --dtype bf16 the matrices are stored in half the bytes; norms, biases, position embeddings and
the scan's A, D and dt stay in fp32, which they need and which cost little. With --dtype int8 the
linear maps of the language model's layers are stored in a byte a weight beside that.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from emrrg.checkpoint import (
    CONVERTED_CONFIG,
    ReleasedCheckpoint,
    converted_config,
    size_of,
    write_safetensors,
)
from emrrg.config import parse_config, run_command, to_dict
from emrrg.decoder import Decoder
from emrrg.errors import InputError
from emrrg.int8 import Int8Linear
from emrrg.lora import AdaptableInt8Linear, AdaptableLinear, merge_lora
from emrrg.model import ReportGenerator
from emrrg.peft import active_methods, merge_peft
from emrrg.runs import (
    WEIGHTS,
    is_export,
    load_run,
    read_run_config,
    state_of,
    stays_in_llm_folder,
    tell_if_unfinished,
    trains_llm,
    write_checksums,
    write_json,
)

log = logging.getLogger("emrrg.export")

FULL_PRECISION = ("_log", "pos_embed", "cls_token", ".tokens", "feature_mean", "weight_scale")


@dataclass(frozen=True)
class ExportConfig:
    """Merge a run's adapters and write it as a plain folder for use."""

    run: str
    """Run folder that training left."""
    output: str
    """Folder to write; it must not exist."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights."""
    dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """Type of the stored matrices; int8: of the language model's layers, the others in bf16."""
    link_llm: bool = False
    """Name the --llm folder of the run instead of copying its weights; only where the run did not
    change them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; arguments and errors as `emrrg.train.main`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    config, _ = parse_config(ExportConfig, argv, "emrrg.export", positional=("run", "output"))
    run, output = Path(config.run), Path(config.output)
    if output.exists():
        raise InputError(f"{output}: exists already; choose another folder")
    if is_export(run):
        raise InputError(f"{run}: is exported already")
    model = load_run(run, which=config.checkpoint)
    tell_if_unfinished(run, log)
    adapted = "llm" in model.config.lora_targets
    if config.link_llm:
        if model.config.llm is None:
            raise InputError(f"--link-llm: {run} has no --llm folder, its decoder is its own")
        if adapted or trains_llm(run):
            raise InputError(f"--link-llm: {run} changed its language model; leave it out")
    methods = [*model.config.lora_targets, *model.config.peft]
    plain = merged(model, int8=config.dtype == "int8", link=config.link_llm)
    half = config.dtype != "fp32"
    tensors = {
        name: stored(name, tensor, half)
        for name, tensor in state_of(plain).items()
        if not stays_in_llm_folder(plain, name)
    }
    write(run, output, plain, tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    count = sum(tensor.numel() for tensor in tensors.values())
    log.info("%s: %s parameters, %.1f MB -> %s", run, f"{count:,}", size / 1e6, output)
    log.info("merged: %s", ", ".join(m for m in methods if m not in plain.config.peft) or "nothing")
    if plain.config.peft:
        log.info("beside the weights: %s", ", ".join(plain.config.peft))
    if plain.config.llm is not None:
        log.info("the language model's own weights stay in %s", plain.config.llm)
    return 0


def merged(model: ReportGenerator, *, int8: bool = False, link: bool = False) -> ReportGenerator:
    """Fold a model's adapters into its weights, in place; its configuration says what it is now.

    Args:
        model: in fp32, from `emrrg.runs.load_run`.
        int8: hold the decoder's linear maps in int8 afterwards.
        link: the language model's own weights stay in its folder.
    """
    if model.config.llm_int8 and "llm" in model.config.lora_targets:
        to_float(model.llama_model)  # int8 would round the adapters away
        model.config = dataclasses.replace(model.config, llm_int8=False)
    merge_lora(model, reversible=False)
    merge_peft(model, reversible=False)
    model.visual_encoder.peft_bias = False  # the biases are the base's again
    if int8 and not model.config.llm_int8:
        model.llama_model.to_int8()
    model.config = dataclasses.replace(
        model.config,
        decoder=model.llama_model.config.to_dict(),
        llm=model.config.llm if link else None,
        llm_int8=int8 or model.config.llm_int8,
        lora_targets=(),
        peft=tuple(active_methods(model)),
    )
    return model


def to_float(decoder: Decoder) -> None:
    """Bring int8 layers back to fp32, with the values that they compute with; adapters stay."""
    for parent in list(decoder.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Int8Linear):
                plain = AdaptableLinear(
                    layer.in_features, layer.out_features, bias=layer.bias is not None
                )
                plain.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
                if layer.bias is not None:
                    plain.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
                if isinstance(layer, AdaptableInt8Linear):
                    for target, adapter in layer.adapters().items():
                        plain.add_module(target, adapter)
                setattr(parent, name, plain.train(layer.training))


def stored(name: str, tensor: Tensor, half: bool) -> Tensor:
    """A tensor in the type that it is stored in."""
    matrix = tensor.is_floating_point() and tensor.ndim > 1 and not name.endswith(FULL_PRECISION)
    return tensor.detach().to(torch.bfloat16 if half and matrix else tensor.dtype)


def write(run: Path, output: Path, model: ReportGenerator, tensors: Mapping[str, Tensor]) -> None:
    """Write the folder under a temporary name, then rename it.

    Raises:
        InputError: it cannot be written.
    """
    vision = {
        name: getattr(model.config, name)
        for name in ("dim", "depth", "state_dim", "patch_size", "image_size")
    }
    described = ReleasedCheckpoint(
        path=run,
        kind="run",
        size=size_of(vision),
        vision=vision,
        tensors=dict(tensors),
        hybrid_layers=tuple(model.llama_model.config.hybrid_layers),
    )
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_safetensors(temporary / WEIGHTS, tensors, {"format": "emrrg"})
        tokenizer = model.tokenizer.save(temporary)
        write_json(
            temporary / CONVERTED_CONFIG,
            {
                **converted_config(described),
                "model": to_dict(model.config),
                "run": to_dict(read_run_config(run)),
            },
        )
        write_checksums(temporary, [WEIGHTS, tokenizer.name, CONVERTED_CONFIG])
        temporary.rename(output)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"{output}: cannot be written ({error.strerror or error})") from error


if __name__ == "__main__":
    run_command(main)
