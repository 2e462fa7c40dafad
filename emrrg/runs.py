"""Run folders: what training leaves, and how it is read back.

    runs/x/config.json               every flag of the run, resolved
    runs/x/base/model.json           what the model is built from
    runs/x/base/weights.safetensors  what did not train (but not the weights of an --llm folder)
    runs/x/base/tokenizer.model
    runs/x/checkpoints/step-000200/  weights.safetensors (what trains), optimizer.safetensors,
                                     state.json, checksums.json
    runs/x/checkpoints/index.json    which of them are `last` and `best`; replaced atomically
    runs/x/metrics.jsonl  curves.png  samples.md  scores.json  predictions.json
    runs/x/.lock                     held by the process that trains here

A checkpoint is written under a temporary name, flushed to disk, and renamed; the index names it
only then. A kill at any moment, or a full disk, leaves the previous checkpoint whole. The last ones
(``--keep-last``) and the best are kept. Checksums (SHA-256) are compared when a folder is read.

A folder that `emrrg.export` wrote is read like a run: ``config.json`` says what the model is built
from, ``weights.safetensors`` holds all of it, adapters merged, and ``tokenizer.model`` lies beside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from emrrg.checkpoint import FORMAT, sync_folder, write_safetensors
from emrrg.config import ModelConfig, TrainConfig, from_dict, read_json, to_dict
from emrrg.decoder import Decoder
from emrrg.decoder_config import DecoderConfig
from emrrg.errors import InputError
from emrrg.generation import GenerationConfig
from emrrg.jsonl import replaced
from emrrg.model import ReportGenerator
from emrrg.tokenizer import load_tokenizer

Which = Literal["best", "last"]
CHECKSUMS = "checksums.json"
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
_WHOLE = re.compile(r"step-\d{6,}")
_HALF = re.compile(r"\.step-\d{6,}\.(tmp|old)")


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
    with replaced(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn what the system says when something cannot be written into a line for people.

    Raises:
        InputError: the disk is full, for instance.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{what}: cannot be written ({error.strerror or error}); what was saved before is "
            "whole: make room and go on with --resume"
        ) from error


@contextlib.contextmanager
def sole_writer(run: Path) -> Iterator[None]:
    """Keep other processes from training in a run's folder as long as this one does.

    The lock on ``.lock`` ends with the process, however that ends; what it forks has no part in it.
    On Windows, and on file systems without locks, nothing happens.

    Raises:
        InputError: one does already.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(run / ".lock", "w", encoding="ascii") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(
                f"{run}: another process is training there; wait for it, or end it (on SIGTERM it "
                "saves first)"
            ) from error
        except OSError:
            pass
        yield


def save_base(run: Path, model: ReportGenerator, trained: Iterable[str]) -> None:
    """Write `run`/base: the model's configuration, its tokenizer, and the weights that stay."""
    base = run / "base"
    trained = set(trained)
    frozen = {
        name: tensor
        for name, tensor in state_of(model).items()
        if name not in trained and not stays_in_llm_folder(model, name)
    }
    config = dataclasses.replace(model.config, decoder=model.llama_model.config.to_dict())
    with writing(base):
        base.mkdir(parents=True, exist_ok=True)
        write_safetensors(base / WEIGHTS, frozen, {"format": "emrrg"})
        tokenizer = model.tokenizer.save(base)
        write_checksums(base, [WEIGHTS, tokenizer.name])
        write_json(base / "model.json", to_dict(config))  # last: it says that the rest is there


def save_checkpoint(
    run: Path,
    step: int,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    best: bool,
    keep: int = 1,
) -> None:
    """Write a checkpoint, make it the last (and the best), and prune older ones.

    Args:
        run: the run's folder.
        step: optimizer steps taken; numbers the checkpoint.
        weights: what trains.
        optimizer: its moments, and the states of the random generators.
        state: what else a resumed run needs, for JSON.
        best: whether these are the best weights so far.
        keep: how many of the last checkpoints stay, beside the best.
    Raises:
        InputError: it cannot be written, the disk being full for instance; the checkpoint before it
            is whole, and still the last.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    with writing(folder):
        _prune(run, read_index(run), keep)
        try:
            temporary.mkdir(parents=True)
            write_safetensors(temporary / WEIGHTS, dict(weights), {"format": "emrrg"})
            write_safetensors(temporary / OPTIMIZER, dict(optimizer), {"format": "emrrg"})
            write_json(temporary / "state.json", dict(state))
            write_checksums(temporary, [WEIGHTS, OPTIMIZER, "state.json"])
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        index = read_index(run)
        if folder.exists():  # the same step again, validated meanwhile
            os.rename(folder, _aside(folder))
        os.rename(temporary, folder)
        sync_folder(folder.parent)
        index["last"] = folder.name
        if best or "best" not in index:
            index["best"] = folder.name
        write_json(run / "checkpoints" / "index.json", index)
    _prune(run, index, keep)


def _aside(folder: Path) -> Path:
    """Where a checkpoint stands while another takes its place."""
    return folder.with_name(f".{folder.name}.old")


def _prune(run: Path, index: Mapping[str, Any], keep: int) -> None:
    """Remove the checkpoints that the rule does not keep, and what a kill left half done.

    What else people put beside them (a copy under another name) stays.
    """
    parent = run / "checkpoints"
    if not parent.is_dir():
        return
    named = {index[which] for which in ("last", "best") if which in index}
    for name in named:  # killed between the two renames of a repeated step
        if not (parent / name).exists() and _aside(parent / name).exists():
            os.rename(_aside(parent / name), parent / name)
    names = [path.name for path in parent.iterdir() if path.is_dir()]
    whole = {int(name.removeprefix("step-")): name for name in names if _WHOLE.fullmatch(name)}
    newest = int(index["last"].removeprefix("step-")) if "last" in index else -1
    named |= {whole[step] for step in sorted(step for step in whole if step <= newest)[-keep:]}
    for name in names:
        if (_WHOLE.fullmatch(name) or _HALF.fullmatch(name)) and name not in named:
            shutil.rmtree(parent / name, ignore_errors=True)


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


def mark_finished(run: Path, finished: bool = True) -> None:
    """Note in the index whether the run went to its end."""
    write_json(run / "checkpoints" / "index.json", {**read_index(run), "finished": finished})


def resume_hint(run: Path) -> str:
    """How a run that was stopped goes on."""
    return f"unless it is still training, go on with: python -m emrrg.train --resume {run}"


def tell_if_unfinished(run: Path, log: logging.Logger) -> None:
    """Say of a run that is used that its training has not come to its end, where it has not."""
    index = {} if is_export(run) else read_index(run)
    if "last" in index and not index.get("finished"):
        log.warning(
            "%s is unfinished (last checkpoint: %s); %s", run, index["last"], resume_hint(run)
        )


def read_index(run: Path) -> dict[str, Any]:
    """The index of a run's checkpoints; empty where there is none yet."""
    path = run / "checkpoints" / "index.json"
    return read_json(path) if path.exists() else {}


def find_checkpoint(run: Path, which: Which) -> Path:
    """The folder of the last or the best checkpoint of a run.

    Raises:
        InputError: there is none.
    """
    index = read_index(run)
    if which not in index:
        raise InputError(f"{run}: has no checkpoint yet; {resume_hint(run)}")
    folder = run / "checkpoints" / index[which]
    if folder.is_dir():
        return folder
    if _aside(folder).is_dir():  # killed between the two renames of a repeated step
        return _aside(folder)
    raise InputError(f"{folder}: is missing, though checkpoints/index.json names it")


def read_checkpoint(run: Path, which: Which) -> Checkpoint:
    """Read the last or the best checkpoint of a run.

    Raises:
        InputError: there is none, or a file of it is damaged (the message names it).
    """
    folder = find_checkpoint(run, which)
    verify_checksums(folder)
    return Checkpoint(folder, read_state(folder), read_tensors(folder / WEIGHTS))


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors."""
    return read_json(folder / "state.json")


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
    place: str | torch.device | None = None,
) -> ReportGenerator:
    """Read a trained model from a run folder, or from one that `emrrg.export` wrote.

    Args:
        path: the folder.
        device: where the model will work; a frozen language model is held in bf16 for CUDA.
        which: the ``best`` checkpoint by the validation score, or the ``last``.
        place: where the weights go for now; None: to the device.
    Returns:
        The model in evaluation mode, its generation settings as the run's configuration says.
    Raises:
        InputError: not a run folder, or weights that do not fit the model (the message names the
            file and the first tensor).
    """
    run = Path(path)
    config = read_model_config(run)
    if is_export(run):
        verify_checksums(run)
        tensors, home = read_tensors(run / WEIGHTS), run
        sources = dict.fromkeys(tensors, run / WEIGHTS)
    else:
        checkpoint, home = read_checkpoint(run, which), run / "base"
        verify_checksums(home)
        base = read_tensors(home / WEIGHTS)
        tensors = {**base, **checkpoint.weights}
        sources = {
            **dict.fromkeys(base, home / WEIGHTS),
            **dict.fromkeys(checkpoint.weights, checkpoint.folder / WEIGHTS),
        }
    model = ReportGenerator(
        config, load_tokenizer(home), _decoder(config, tensors, device, place or device)
    )
    load_state(model, tensors, sources)
    model.generation = generation_of(read_run_config(run))
    return model.to(place or device).eval()


def _decoder(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    device: str | torch.device,
    place: str | torch.device,
) -> Decoder:
    """The decoder that a run's tensors go into: of an --llm folder, or bare."""
    own = [t for n, t in tensors.items() if n.startswith("llama_model.") and _is_llm(n)]
    if config.llm is None:
        decoder = Decoder(DecoderConfig(**config.decoder))
        half = {t.dtype for t in own if t.dtype in (torch.bfloat16, torch.float16)}
        if half and torch.device(device).type == "cuda":  # stored so
            hold_frozen(decoder, next(iter(half)))
        return decoder.to_int8() if config.llm_int8 else decoder
    return Decoder.from_pretrained(
        config.llm,
        hybrid_layers=config.decoder.get("hybrid_layers", ()),
        hybrid_gate=config.decoder.get("hybrid_gate", "token"),
        # One that trained is not rounded.
        dtype=torch.float32 if own else llm_dtype(device),
        device=place,
        int8=config.llm_int8,
    )


def is_export(folder: Path) -> bool:
    """Whether `emrrg.export` wrote a folder."""
    path = folder / "config.json"
    return (
        path.exists()
        and not (folder / "base").exists()
        and (values := read_json(path)).get("format") == FORMAT
        and "model" in values
    )


def trains_llm(run: Path) -> bool:
    """Whether the best checkpoint of a run holds the language model's own weights."""
    if is_export(run):
        return False
    path = find_checkpoint(run, "best") / WEIGHTS
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    return any(n.startswith("llama_model.") and _is_llm(n) for n in names)


def read_model_config(run: Path) -> ModelConfig:
    """What a run's model is built from.

    Raises:
        InputError: not a run folder, or one that was stopped before its model was built.
    """
    if is_export(run):
        path = run / "config.json"
        return _model_config(read_json(path)["model"], path)
    path = run / "base" / "model.json"
    if not path.exists():
        raise InputError(f"{run}: {_why_no_run(run)}")
    return _model_config(read_json(path), path)


def _model_config(values: dict[str, Any], path: Path) -> ModelConfig:
    config = from_dict(ModelConfig, values, str(path))
    from_dict(DecoderConfig, config.decoder, f"{path}: decoder")
    return config


def _why_no_run(folder: Path) -> str:
    """What a folder without a model is instead."""
    if not folder.exists():
        return "is not a run folder (no such folder)"
    path = folder / "config.json"
    values = read_json(path) if path.exists() else {}
    if values.get("format") == FORMAT:
        return (
            "holds converted weights alone, no tokenizer; python -m emrrg.train "
            f"--vision-checkpoint {folder} starts from them, and python -m emrrg.export RUN OUT "
            "writes a folder that can write reports"
        )
    if "epochs" in values:
        return f"has no checkpoint yet; {resume_hint(folder)}"
    return "is not a run folder (holds no base/model.json)"


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
        if name not in tensors and not stays_in_llm_folder(model, name):
            raise InputError(f"{where}: tensor {name} of the model is missing")
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)


def read_run_config(run: Path) -> TrainConfig:
    """The configuration that a run was trained with."""
    path = run / "config.json"
    values = read_json(path)
    return from_dict(TrainConfig, values["run"] if is_export(run) else values, str(path))


def generation_of(config: TrainConfig) -> GenerationConfig:
    """The generation settings among the training flags."""
    return GenerationConfig(
        num_beams=config.num_beams,
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


def stays_in_llm_folder(model: ReportGenerator, name: str) -> bool:
    """Whether a frozen tensor is read from the --llm folder rather than from the run."""
    if model.config.llm is None or not name.startswith("llama_model."):
        return False
    return _is_llm(name)


def _is_llm(name: str) -> bool:
    """Whether a decoder's tensor is the language model's own, not added to it."""
    return ".cross_attn." not in name and ".lora_" not in name


def hold_frozen(decoder: Decoder, dtype: torch.dtype) -> None:
    """Bring a language model's own weights to a type; what was added to it stays as it is."""
    for name, parameter in decoder.named_parameters():
        if _is_llm(name):
            parameter.data = parameter.data.to(dtype)


def llm_dtype(device: str | torch.device) -> torch.dtype:
    """The type that a frozen language model is held in: bf16 on CUDA, fp32 on the CPU."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
