"""Convert weight files: ``python -m emrrg.convert IN OUT``.

IN is a released ``.pth`` (MambaXray-VL stage 1, 2 or 3, or EMRRG), a ``.safetensors``, a folder
that this command wrote, or the folder of a run. OUT becomes a folder:

    weights.safetensors   the tensors under this project's names
    config.json           what they are, what the file lacked, what stayed behind and why
    peft/<component>/     with --adapter-format peft: the adapters as Hugging Face PEFT reads them

OUT is a ``--vision-checkpoint`` for `emrrg.train`, and an IN of this command. It holds no tokenizer
and writes no reports: a folder that does is made by `emrrg.export`.

Nothing of a ``.pth`` is ever run; a file that asks for anything but tensors and settings is
refused.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from emrrg.checkpoint import (
    CONVERTED_CONFIG,
    ENCODER,
    WEIGHTS,
    ReleasedCheckpoint,
    converted_config,
    read_released_checkpoint,
    size_of,
    write_safetensors,
)
from emrrg.config import parse_config, run_command
from emrrg.decoder_config import read_decoder_config
from emrrg.errors import InputError
from emrrg.huggingface_adapter import huggingface_adapters
from emrrg.runs import load_run, state_of, tell_if_unfinished, write_json
from emrrg.vision import interpolate_pos_embed

log = logging.getLogger("emrrg.convert")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DOWNSTREAM_SIZE = 224  # pixels a side, to which the autoregressive files are brought


@dataclass(frozen=True)
class ConvertConfig:
    """Turn a weight file into safetensors and JSON. Nothing that it holds is ever run."""

    input: str
    """Released .pth, .safetensors, converted folder, or the folder of a run."""
    output: str
    """Folder to write."""
    base: str | None = None
    """Weight file of the stage before: what IN lacks is taken from there (a downstream file holds
    only what trained)."""
    image_size: int | None = None
    """Interpolate the position embedding to images of this side, in pixels [default: 224 for stage
    1 files, else as it is]."""
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    """Convert the tensors to this type."""
    adapter_format: Literal["emrrg", "peft"] = "emrrg"
    """peft: also write the LoRA adapters as Hugging Face PEFT folders."""
    lora_scale: float | None = None
    """Scale of the adapters, for a file that does not say it."""
    llm: str | None = None
    """Hugging Face folder of the language model, for the width of its attention heads; needed for
    hybrid layers where it is not 128."""
    drop_misplaced_lora: bool = False
    """Leave the release's misplaced lora_X behind instead of refusing the file."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise InputError(f"--image-size: {self.image_size} is not above 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: flags; None: `sys.argv`.
    Returns:
        0.
    Raises:
        InputError: a file that cannot be read or has no meaning here.
        OSError: the output cannot be written.
    """
    config, _ = parse_config(ConvertConfig, argv, "emrrg.convert", positional=("input", "output"))
    dropout = 0.0
    if (Path(config.input) / "base" / "model.json").exists():
        released, dropout = read_run(Path(config.input))
    else:
        released = read_file(config, config.input)
    if config.base is not None:
        fill_from(released, read_file(config, config.base))
    bring_to_size(released, config.image_size)
    if config.dtype != "keep":
        released.tensors = {
            n: t.to(DTYPES[config.dtype]) if t.is_floating_point() else t
            for n, t in released.tensors.items()
        }
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give a folder to write")
    folder.mkdir(parents=True, exist_ok=True)
    if config.adapter_format == "peft":
        write_peft(folder, released, dropout)
    write_safetensors(folder / WEIGHTS, released.tensors, {"format": "emrrg"})
    write_json(folder / CONVERTED_CONFIG, converted_config(released))
    sys.stdout.write(describe(released, folder))
    if released.vision:
        sys.stdout.write(f"  next: python -m emrrg.train --vision-checkpoint {folder} ...\n")
    return 0


def read_file(config: ConvertConfig, path: str) -> ReleasedCheckpoint:
    """Read a weight file with the flags' help."""
    head_dim = None
    if config.llm is not None:
        head_dim = read_decoder_config(config.llm).width_of_head
    return read_released_checkpoint(
        path,
        lora_scale=config.lora_scale,
        head_dim=head_dim,
        drop_misplaced_lora=config.drop_misplaced_lora,
    )


def read_run(run: Path) -> tuple[ReleasedCheckpoint, float]:
    """The best weights of a run, and the dropout of its adapters."""
    model = load_run(run)
    tell_if_unfinished(run, log)
    settings = model.config
    vision = {
        name: getattr(settings, name)
        for name in ("dim", "depth", "state_dim", "patch_size", "image_size")
    }
    lora = None
    if settings.lora_targets:
        lora = {
            "targets": list(settings.lora_targets),
            "rank": settings.lora_rank,
            "scale": settings.lora_scale,
        }
    released = ReleasedCheckpoint(
        path=run,
        kind="run",
        size=size_of(vision),
        vision=vision,
        tensors=state_of(model),
        lora=lora,
        hybrid_layers=tuple(model.llama_model.config.hybrid_layers),
        settings=dataclasses.asdict(settings),
    )
    if settings.llm is not None:
        frozen = set(model.llama_model.state_dict()) - set(
            model.llama_model.hybrid_parameter_names()
        )
        for name in frozen:
            full = f"llama_model.{name}"
            if full in released.tensors and ".lora_" not in full:
                del released.tensors[full]
        released.notes.append(f"the language model's own weights stay in {settings.llm}")
    return released, settings.lora_dropout


def fill_from(released: ReleasedCheckpoint, base: ReleasedCheckpoint) -> None:
    """Take what a file lacks from the file of the stage before.

    Raises:
        InputError: the two are of different sizes.
    """
    if released.vision.get("dim") not in (None, base.vision.get("dim")):
        raise InputError(
            f"--base {base.path}: is {base.vision.get('dim')} wide, but {released.path} is "
            f"{released.vision['dim']}"
        )
    taken = [name for name in base.tensors if name not in released.tensors]
    released.tensors |= {name: base.tensors[name] for name in taken}
    released.vision = {**base.vision, **released.vision}
    released.size = size_of(released.vision)
    released.missing = [
        name
        for name in (base.missing if f"{ENCODER}*" in released.missing else released.missing)
        if name not in released.tensors
    ]
    released.notes.append(f"{len(taken)} tensors taken from {base.path.name}")
    released.unused |= {f"{base.path.name}: {name}": why for name, why in base.unused.items()}


def bring_to_size(released: ReleasedCheckpoint, image_size: int | None) -> None:
    """Interpolate the position embedding, where asked for or where the stage asks for it."""
    name = f"{ENCODER}pos_embed"
    if name not in released.tensors:
        if image_size is not None:
            raise InputError(f"--image-size: {released.path} holds no position embedding")
        return
    patch = released.vision["patch_size"]
    if image_size is None:
        if released.kind != "stage1":
            return
        image_size = DOWNSTREAM_SIZE
    if image_size % patch:
        raise InputError(f"--image-size: {image_size} is not a multiple of {patch}")
    old = released.tensors[name]
    side = image_size // patch
    new = interpolate_pos_embed(old, (side, side))
    released.tensors[name] = new
    released.vision["image_size"] = image_size
    if new.shape != old.shape:
        released.notes.append(
            f"pos_embed: {old.shape[1]} rows interpolated to {side} x {side} patches and the class "
            "token's row" + ("" if old.shape[1] % 2 else ", which is zero")
        )


def write_peft(folder: Path, released: ReleasedCheckpoint, dropout: float) -> None:
    """Write the adapters as Hugging Face PEFT folders."""
    if released.lora is None:
        raise InputError(f"--adapter-format peft: {released.path} holds no LoRA adapters")
    found = huggingface_adapters(
        released.tensors, released.vision, scale=released.lora["scale"], dropout=dropout
    )
    for component, (config, tensors) in found.items():
        target = folder / "peft" / component
        target.mkdir(parents=True, exist_ok=True)
        write_safetensors(target / "adapter_model.safetensors", tensors, {"format": "pt"})
        write_json(target / "adapter_config.json", config)
    others = sorted(
        {n for n in released.tensors if any(p.startswith("peft_") for p in n.split("."))}
    )
    if others:
        released.notes.append(
            "no form in Hugging Face PEFT, so not written there: " + ", ".join(patterns(others))
        )


def describe(released: ReleasedCheckpoint, folder: Path) -> str:
    """What was read and written, for the terminal."""
    count = sum(t.numel() for t in released.tensors.values())
    size = sum(t.numel() * t.element_size() for t in released.tensors.values())
    vision = ", ".join(f"{key} {value}" for key, value in released.vision.items())
    size_name = released.size or "no preset"
    lines = [
        f"{released.path}: {released.kind}, {size_name} ({vision or 'no encoder'})",
        f"  {len(released.tensors)} tensors, {count:,} parameters, {size:,} bytes -> {folder}",
    ]
    if released.lora:
        targets = ", ".join(released.lora["targets"])
        lines.append(
            f"  adapters: {targets}; rank {released.lora['rank']}, scale {released.lora['scale']}"
        )
    if released.hybrid_layers:
        lines.append(f"  hybrid layers: {', '.join(map(str, released.hybrid_layers))}")
    lines += [f"  note: {note}" for note in released.notes]
    lines += [f"  missing: {name}" for name in patterns(released.missing)]
    by_reason: dict[str, list[str]] = {}
    for name, why in released.unused.items():
        by_reason.setdefault(why, []).append(name)
    for why, names in by_reason.items():
        lines += [f"  left behind ({why}): {name}" for name in patterns(names)]
    return "\n".join(lines) + "\n"


def patterns(names: Iterable[str]) -> list[str]:
    """Names with their numbers replaced by ``*``, once each, with the number of names."""
    counts: dict[str, list[str]] = {}
    for name in names:
        counts.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return [
        found[0] if len(found) == 1 else f"{pattern} ({len(found)})"
        for pattern, found in counts.items()
    ]


if __name__ == "__main__":
    run_command(main)
