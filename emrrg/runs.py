"""Run folders: what training leaves, and how it is read back.

    runs/x/config.json               every flag of the run, resolved
    runs/x/base/model.json           what the model is built from
    runs/x/base/weights.safetensors  what did not train (but not the weights of an --llm folder)
    runs/x/base/tokenizer.model
    runs/x/checkpoints/step-000200/  weights.safetensors (what trains), optimizer.safetensors,
                                     state.json, checksums.json
    runs/x/checkpoints/index.json    which of them are `last` and `best`; replaced atomically
    runs/x/metrics.jsonl  curves.png  samples.md  scores.json  predictions.json

A checkpoint is written under a temporary name, flushed to disk, and renamed; the index names it
only then. A kill at any moment, or a full disk, leaves the previous checkpoint whole. Only the last
and the best are kept. Checksums (SHA-256) are compared when a folder is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emrrg.checkpoint import sync_folder, write_safetensors
from emrrg.config import ModelConfig, TrainConfig, from_dict, read_json, to_dict
from emrrg.decoder import Decoder
from emrrg.errors import InputError
from emrrg.generation import GenerationConfig
from emrrg.model import ReportGenerator
from emrrg.tokenizer import load_tokenizer

Which = Literal["best", "last"]
CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Checkpoint:
    """A point to go on from."""

    folder: Path
    state: dict[str, Any]
    """Step, epoch, batches done in the epoch, best score, ..."""
    weights: dict[str, Tensor]
    """The parameters that train."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_base(run: Path, model: ReportGenerator, trained: Iterable[str]) -> None:
    """Write `run`/base: the model's configuration, its tokenizer, and the weights that stay."""
    base = run / "base"
    base.mkdir(parents=True, exist_ok=True)
    trained = set(trained)
    frozen = {
        name: tensor
        for name, tensor in state_of(model).items()
        if name not in trained and not _stays_in_llm_folder(model, name)
    }
    write_safetensors(base / "weights.safetensors", frozen, {"format": "emrrg"})
    tokenizer = model.tokenizer.save(base)
    write_checksums(base, ["weights.safetensors", tokenizer.name])
    config = dataclasses.replace(model.config, decoder=model.llama_model.config.to_dict())
    write_json(base / "model.json", to_dict(config))  # last: it says that the rest is there


def save_checkpoint(
    run: Path,
    step: int,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    best: bool,
) -> None:
    """Write a checkpoint, make it the last (and the best), and prune what neither names.

    Raises:
        InputError: it cannot be written, the disk being full for instance; the checkpoint before it
            is whole, and still the last.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_safetensors(temporary / "weights.safetensors", dict(weights), {"format": "emrrg"})
        write_safetensors(temporary / "optimizer.safetensors", dict(optimizer), {"format": "emrrg"})
        write_json(temporary / "state.json", dict(state))
        write_checksums(temporary, ["weights.safetensors", "optimizer.safetensors", "state.json"])
        index = read_index(run)
        if folder.exists():  # the same step again, after a resume: its weights are the same
            aside = folder.with_name(f".{folder.name}.old")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
        index["last"] = folder.name
        if best or "best" not in index:
            index["best"] = folder.name
        write_json(run / "checkpoints" / "index.json", index)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"{folder}: cannot be written ({error.strerror or error}); the checkpoint before it is "
            f"whole; make room and go on with --resume {run}"
        ) from error
    for other in folder.parent.iterdir():
        if other.is_dir() and other.name not in (index["last"], index["best"]):
            shutil.rmtree(other, ignore_errors=True)


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Write SHA-256 sums of files beside them."""
    write_json(folder / CHECKSUMS, {name: _sha256(folder / name) for name in names})


def verify_checksums(folder: Path) -> None:
    """Compare the files of a folder with their checksums, where there are any.

    Raises:
        InputError: a file is missing or has changed (the message names it).
    """
    if not (folder / CHECKSUMS).exists():
        return
    for name, expected in read_json(folder / CHECKSUMS).items():
        if not (folder / name).exists():
            raise InputError(f"{folder / name}: is missing, though {CHECKSUMS} names it")
        if _sha256(folder / name) != expected:
            raise InputError(f"{folder / name}: is damaged, its checksum differs from {CHECKSUMS}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def mark_finished(run: Path) -> None:
    """Note in the index that the run went to its end."""
    write_json(run / "checkpoints" / "index.json", {**read_index(run), "finished": True})


def read_index(run: Path) -> dict[str, Any]:
    """The index of a run's checkpoints; empty where there is none yet."""
    path = run / "checkpoints" / "index.json"
    return read_json(path) if path.exists() else {}


def read_checkpoint(run: Path, which: Which) -> Checkpoint:
    """Read the last or the best checkpoint of a run.

    Raises:
        InputError: there is none, or a file of it is damaged (the message names it).
    """
    index = read_index(run)
    if which not in index:
        raise InputError(f"{run}: holds no checkpoint (no checkpoints/index.json); train first")
    folder = run / "checkpoints" / index[which]
    if not folder.is_dir():
        # Killed between the two renames of a repeated step: the old one still stands aside.
        aside = folder.with_name(f".{folder.name}.old")
        if not aside.is_dir():
            raise InputError(f"{folder}: is missing, though checkpoints/index.json names it")
        folder = aside
    verify_checksums(folder)
    return Checkpoint(
        folder, read_json(folder / "state.json"), read_tensors(folder / "weights.safetensors")
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        InputError: it is missing, cut short or not a safetensors file (the message names it).
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from error


def load_run(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    which: Which = "best",
) -> ReportGenerator:
    """Read a trained model from a run folder.

    Args:
        path: the run folder.
        device: where the weights go.
        which: the ``best`` checkpoint by the validation score, or the ``last``.
    Returns:
        The model in evaluation mode, its generation settings as the run's configuration says.
    Raises:
        InputError: not a run folder, or weights that do not fit the model (the message names the
            file and the first tensor).
    """
    run = Path(path)
    config = read_model_config(run)
    checkpoint = read_checkpoint(run, which)
    verify_checksums(run / "base")
    tokenizer = load_tokenizer(run / "base")
    decoder = None
    if config.llm is not None:
        decoder = Decoder.from_pretrained(
            config.llm,
            hybrid_layers=config.decoder.get("hybrid_layers", ()),
            hybrid_gate=config.decoder.get("hybrid_gate", "token"),
            dtype=llm_dtype(device),
            device=device,
            int8=config.llm_int8,
        )
    model = ReportGenerator(config, tokenizer, decoder)
    base_file = run / "base" / "weights.safetensors"
    sources = {
        **dict.fromkeys(base := read_tensors(base_file), base_file),
        **dict.fromkeys(checkpoint.weights, checkpoint.folder / "weights.safetensors"),
    }
    load_state(model, {**base, **checkpoint.weights}, sources)
    model.generation = generation_of(read_run_config(run))
    return model.to(device).eval()


def read_model_config(run: Path) -> ModelConfig:
    """What a run's model is built from.

    Raises:
        InputError: not a run folder, or one that was stopped before its model was built.
    """
    path = run / "base" / "model.json"
    if not path.exists():
        hint = "no such folder" if not run.exists() else "holds no base/model.json"
        raise InputError(f"{run}: is not a run folder ({hint})")
    return from_dict(ModelConfig, read_json(path), str(path))


def load_state(
    model: ReportGenerator, tensors: Mapping[str, Tensor], sources: Mapping[str, Path]
) -> None:
    """Load weights, every one of which must have its place, and every place its weight.

    Raises:
        InputError: the first tensor that does not fit, with its file.
    """
    state = state_of(model)
    for name, tensor in tensors.items():
        if name not in state:
            raise InputError(f"{sources[name]}: tensor {name} has no place in this model")
        if state[name].shape != tensor.shape:
            raise InputError(
                f"{sources[name]}: tensor {name} has shape {tuple(tensor.shape)}, the model "
                f"expects {tuple(state[name].shape)}"
            )
    where = next(iter(sources.values()), "the run folder")
    for name in state:
        if name not in tensors and not _stays_in_llm_folder(model, name):
            raise InputError(f"{where}: tensor {name} of the model is missing")
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def read_run_config(run: Path) -> TrainConfig:
    """The configuration that a run was trained with."""
    path = run / "config.json"
    return from_dict(TrainConfig, read_json(path), str(path))


def generation_of(config: TrainConfig) -> GenerationConfig:
    """The generation settings among the training flags."""
    return GenerationConfig(
        num_beams=config.beams,
        min_new_tokens=config.min_new_tokens,
        max_new_tokens=config.max_new_tokens,
        repetition_penalty=config.repetition_penalty,
        length_penalty=config.length_penalty,
    )


def state_of(model: ReportGenerator) -> dict[str, Tensor]:
    """Parameters (a tied one once) and buffers that belong to a checkpoint, by name."""
    kept = set(model.state_dict(keep_vars=True))
    buffers = {name: b for name, b in model.named_buffers() if name in kept}
    return {**dict(model.named_parameters()), **buffers}


def _stays_in_llm_folder(model: ReportGenerator, name: str) -> bool:
    """Whether a frozen tensor is read from the --llm folder rather than from the run."""
    if model.config.llm is None or not name.startswith("llama_model."):
        return False
    return ".cross_attn." not in name and ".lora_" not in name


def llm_dtype(device: str | torch.device) -> torch.dtype:
    """The type that a frozen language model is held in: bf16 on CUDA, fp32 on the CPU."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
