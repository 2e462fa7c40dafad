"""Run folders: what is refused and how it is named, and what the disk holds when."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import emrrg
from emrrg.checkpoint import FORMAT
from emrrg.errors import InputError
from emrrg.runs import (
    find_checkpoint,
    hold_frozen,
    load_run,
    read_checkpoint,
    read_index,
    save_checkpoint,
    stays_in_llm_folder,
    trains_llm,
    verify_checksums,
    write_checksums,
    write_json,
)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, to be damaged."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def change(run: Path, which: str, **tensors: Tensor | None) -> Path:
    """Change tensors of a checkpoint, checksums and all; None takes one away."""
    folder = find_checkpoint(run, which)
    state = load_file(folder / "weights.safetensors")
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, folder / "weights.safetensors")
    write_checksums(folder, json.loads((folder / "checksums.json").read_text()))
    return folder / "weights.safetensors"


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("llama_proj__weight", torch.zeros(2, 3), "has shape (2, 3), the model expects (32, 128)"),
        ("llama_proj__weight", None, "tensor llama_proj.weight of the model is missing"),
        ("llama_proj__extra", torch.zeros(1), "tensor llama_proj.extra has no place in this model"),
    ],
    ids=["shape", "missing", "unknown"],
)
def test_weights_that_do_not_fit(run: Path, name: str, tensor: Tensor | None, says: str) -> None:
    file = change(run, "best", **{name: tensor})
    with pytest.raises(InputError) as error:
        emrrg.load(run)
    assert str(file) in str(error.value) or tensor is None
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file",
    ["base/weights.safetensors", "base/tokenizer.model", "checkpoints/{best}/weights.safetensors",
     "checkpoints/{best}/state.json", "checkpoints/{best}/optimizer.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["a byte", "half", "gone"])
def test_a_damaged_file_is_named(run: Path, file: str, damage: str) -> None:
    path = run / file.format(best=read_index(run)["best"])
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        emrrg.load(run)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"coming": 1}, "unknown key 'coming'"),
        ({"hidden_size": None}, "key 'hidden_size' is missing"),
        ({"rope_scaling": 3}, "rope_scaling: 3 is not"),
    ],
)
def test_a_decoder_of_another_version_is_named(
    run: Path, change: dict[str, int | None], says: str
) -> None:
    path = run / "base" / "model.json"
    values = json.loads(path.read_text())
    decoder = {**values["decoder"], **change}
    values["decoder"] = {key: value for key, value in decoder.items() if key not in change or value}
    path.write_text(json.dumps(values))
    with pytest.raises(InputError) as error:
        emrrg.load(run)
    assert f"{path}: decoder: {says}" in str(error.value)


def test_folders_that_are_no_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run folder .no such folder"):
        emrrg.load(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"is not a run folder .holds no base/model\.json"):
        emrrg.load(tmp_path)
    shutil.rmtree(run / "checkpoints")
    goes_on = rf"{run}: has no checkpoint yet; .*go on with: python -m emrrg.train --resume {run}"
    with pytest.raises(InputError, match=goes_on):
        emrrg.load(run)
    shutil.rmtree(run / "base")  # stopped before its model was built, or in the source stage
    with pytest.raises(InputError, match=goes_on):
        emrrg.load(run)
    (tmp_path / "config.json").write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(InputError, match=r"converted weights alone.*--vision-checkpoint .*export"):
        emrrg.load(tmp_path)


def checkpoint(run: Path, step: int, *, best: bool = False, keep: int = 1) -> None:
    tensors = {"w": torch.tensor([float(step)])}
    save_checkpoint(run, step, tensors, tensors, {"step": step}, best=best, keep=keep)


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir() if path.is_dir()}


def test_a_checkpoint_is_on_the_disk_before_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file flushed, then the folder renamed, then that flushed, and only then the index."""
    said: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def flushed(descriptor: int) -> None:
        said.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        said.append(f"name {Path(new).name}")
        rename(old, new)

    def replaced(old: Path, new: Path) -> None:
        said.append(f"name {Path(new).name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "replace", replaced)
    checkpoint(tmp_path, 1)
    named, indexed = said.index("name step-000001"), said.index("name index.json")
    for file in (".weights.safetensors.tmp", ".optimizer.safetensors.tmp", ".state.json.tmp",
                 ".checksums.json.tmp", ".step-000001.tmp"):  # fmt: skip
        assert f"flush {file}" in said[:named], (file, said)
    assert "flush checkpoints" in said[named:indexed] and "flush .index.json.tmp" in said[:indexed]
    assert "flush checkpoints" in said[indexed:]


def test_which_checkpoints_stay(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    assert read_index(tmp_path) == {"last": "step-000001", "best": "step-000001"}
    checkpoint(tmp_path, 2, best=True)
    assert names(tmp_path) == {"step-000002"}
    checkpoint(tmp_path, 3)
    assert names(tmp_path) == {"step-000002", "step-000003"}
    for step in (4, 5, 6):
        checkpoint(tmp_path, step, keep=3)
    assert names(tmp_path) == {f"step-{n:06d}" for n in (2, 4, 5, 6)}
    # A million steps take a seventh digit; order is by number.
    for step in (999_999, 1_000_000, 1_000_001):
        checkpoint(tmp_path, step, keep=2)
    assert names(tmp_path) == {"step-000002", "step-1000000", "step-1000001"}
    assert read_checkpoint(tmp_path, "best").weights["w"].tolist() == [2.0]


def test_what_a_kill_leaves_is_cleared_away(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    # Half a checkpoint, one that the index does not name yet, and one of a future that is gone.
    (folder / ".step-000002.tmp").mkdir()
    (folder / ".step-000002.tmp" / "weights.safetensors").write_text("half")
    shutil.copytree(folder / "step-000001", folder / "step-000002")
    assert read_checkpoint(tmp_path, "last").state["step"] == 1
    checkpoint(tmp_path, 3)
    assert names(tmp_path) == {"step-000001", "step-000003"}
    # Killed between the two renames of a step that is saved again: the old one stands aside.
    (folder / "step-000003").rename(folder / ".step-000003.old")
    assert read_checkpoint(tmp_path, "last").state["step"] == 3
    checkpoint(tmp_path, 3, best=True)
    assert names(tmp_path) == {"step-000003"}


def test_what_people_keep_beside_the_checkpoints_stays(tmp_path: Path) -> None:
    checkpoint(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    for name in ("step-000001-mine", "step-", "mine", ".mine.tmp"):
        shutil.copytree(folder / "step-000001", folder / name)
    for step in (2, 3):
        checkpoint(tmp_path, step, best=True)
    assert names(tmp_path) == {"step-000003", "step-000001-mine", "step-", "mine", ".mine.tmp"}


def test_json_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_checksums(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hello")
    write_checksums(tmp_path, ["a"])
    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    assert json.loads((tmp_path / "checksums.json").read_text()) == {"a": digest}
    verify_checksums(tmp_path)
    (tmp_path / "a").write_text("hullo")
    with pytest.raises(InputError, match="a: is damaged"):
        verify_checksums(tmp_path)


def test_adapters_alone_are_saved_in_megabytes(trained: Path) -> None:
    """What does not train is in the base, once."""
    model = load_run(trained, which="last")
    parameters = sum(p.numel() for p in model.parameters())
    size = (find_checkpoint(trained, "last") / "weights.safetensors").stat().st_size
    assert size < 4 * parameters + 100_000
    assert not load_file(trained / "base" / "weights.safetensors")
    assert trains_llm(trained)


def test_what_is_held_in_half_precision(trained: Path) -> None:
    decoder = load_run(trained).llama_model
    hold_frozen(decoder, torch.bfloat16)
    kinds = {n: p.dtype for n, p in decoder.named_parameters()}
    assert all((kind == torch.float32) == (".cross_attn." in n) for n, kind in kinds.items())
    assert any(".cross_attn." in n for n in kinds)


def test_what_stays_in_the_folder_of_a_language_model(trained: Path) -> None:
    model = load_run(trained)
    layer = "llama_model.model.layers.0"
    names = ["llama_model.model.norm.weight", f"{layer}.cross_attn.alpha",
             f"{layer}.self_attn.q_proj.lora_llm.A", "llama_proj.bias"]  # fmt: skip
    assert not any(stays_in_llm_folder(model, name) for name in names)
    object.__setattr__(model.config, "llm", "somewhere")
    assert [stays_in_llm_folder(model, name) for name in names] == [True, False, False, False]
