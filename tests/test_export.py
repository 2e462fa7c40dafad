"""The export command: merged weights, their types and sizes, who reads the folder."""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import emrrg
from emrrg import convert, evaluate, generate
from emrrg.checkpoint import read_released_checkpoint
from emrrg.config import to_dict
from emrrg.data.dataset import PhantomStudies, batches
from emrrg.data.images import normalize
from emrrg.errors import InputError
from emrrg.export import main
from emrrg.int8 import Int8Linear
from emrrg.lora import adaptable_layers
from emrrg.model import ReportGenerator
from emrrg.runs import load_run, read_index, read_json, state_of

Train = Callable[..., int]
Folder = Callable[[Path], Path]
METHODS = shlex.split(
    "--regime peft --lora-targets X,dt_in,llm --peft delta-D,affix-projected,bias --lr 3e-2"
)


def answer(model: ReportGenerator) -> tuple[torch.Tensor, list[str]]:
    """The loss of some studies, and what the model writes of them."""
    size = model.config.image_size
    studies = PhantomStudies("test", 3, domain="target", size=size, seed=5)
    batch = next(batches(studies, [[0, 1, 2]]))
    images = normalize(batch.images)
    with torch.no_grad():
        loss = model(images, batch.view_mask, model.report_ids(batch.reports))
    return loss, model.generate_batch(images, batch.view_mask)


@pytest.fixture(scope="module")
def adapted(
    train: Train, trained: Path, brief: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("adapted") / "run"
    assert train(*brief, *METHODS, "--init", trained, "--output", run) == 0
    return run


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_the_folder_is_the_run_merged(
    adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    out = tmp_path / "out"
    assert main([str(adapted), str(out), "--dtype", dtype]) == 0
    said = capsys.readouterr().out
    assert "merged: X, dt_in, llm, delta-D, affix-projected, bias" in said
    assert "beside the weights: affix" in said
    before, after = load_run(adapted), emrrg.load(out)
    moved = load_run(adapted).visual_encoder.layers[0].mixer.in_proj.lora_X.B
    assert moved.abs().max() > 0.01  # else there is nothing to merge
    assert not [name for name, layer in adaptable_layers(after) if layer.adapters()]
    assert after.config.peft == ("affix",) and after.generation == before.generation
    (expected, reports), (got, texts) = answer(before), answer(after)
    tolerance = {"fp32": 1e-6, "bf16": 5e-3, "int8": 2e-2}[dtype]
    assert abs(got - expected) < tolerance * expected
    assert got != expected or dtype == "fp32"
    if dtype == "fp32":
        assert texts == reports
    # Types: what is stored, and what must not be rounded.
    tensors = load_file(out / "weights.safetensors")
    kinds = {name: tensor.dtype for name, tensor in tensors.items()}
    half = torch.float32 if dtype == "fp32" else torch.bfloat16
    assert kinds["visual_encoder.layers.0.mixer.in_proj.weight"] == half
    assert kinds["llama_model.model.embed_tokens.weight"] == half
    up = kinds["llama_model.model.layers.0.mlp.up_proj.weight"]
    assert up == (torch.int8 if dtype == "int8" else half)
    for name in ("visual_encoder.layers.0.mixer.A_c_log", "visual_encoder.pos_embed",
                 "visual_encoder.layers.1.mixer.dt_proj_b.bias", "visual_encoder.norm_f.weight",
                 "visual_encoder.peft_affix.tokens"):  # fmt: skip
        assert kinds[name] == torch.float32, name
    sizes = {d: 4 if d == "fp32" else 2 for d in ("fp32", "bf16")}
    if dtype in sizes:
        count = sum(t.numel() for t in tensors.values())
        total = (out / "weights.safetensors").stat().st_size
        assert total < 1.2 * sizes[dtype] * count + 50_000


def test_int8_is_the_merged_weights_quantised(adapted: Path, tmp_path: Path) -> None:
    main([str(adapted), str(tmp_path / "fp32")])
    main([str(adapted), str(tmp_path / "int8"), "--dtype", "int8"])
    plain, small = emrrg.load(tmp_path / "fp32"), emrrg.load(tmp_path / "int8")
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        full = plain.llama_model.model.layers[1].get_submodule(name)
        got = small.llama_model.model.layers[1].get_submodule(name)
        expected = Int8Linear.from_linear(full)
        assert isinstance(got, Int8Linear)
        assert torch.equal(got.weight, expected.weight), name
        torch.testing.assert_close(got.weight_scale, expected.weight_scale)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_the_converter_reads_small_folders(adapted: Path, tmp_path: Path, dtype: str) -> None:
    main([str(adapted), str(tmp_path / "out"), "--dtype", dtype])
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "converted")]) == 0
    before, after = (
        load_file(tmp_path / name / "weights.safetensors") for name in ("out", "converted")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name


def test_other_commands_read_the_folder(
    train: Train, adapted: Path, brief: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    main([str(adapted), str(out)])
    # The converter: the same tensors under the same names.
    assert convert.main([str(out), str(tmp_path / "converted"), "--dtype", "bf16"]) == 0
    found = read_released_checkpoint(tmp_path / "converted")
    assert found.tensors.keys() == load_file(out / "weights.safetensors").keys()
    assert found.vision["dim"] == 128 and found.lora is None
    capsys.readouterr()
    # Writing and scoring, with the run's own settings and data.
    picture = next((adapted / "samples").glob("*.png"))
    assert generate.main([str(out), str(picture)]) == 0
    assert capsys.readouterr().out.strip() == load_run(adapted).generate([[picture]])[0]
    assert evaluate.main([str(out), "--bootstrap", "0"]) == 0
    scores = read_json(out / "evaluation-test" / "scores.json")
    after = read_json(adapted / "scores.json")["after"]
    assert scores["BLEU_1"] == pytest.approx(after["BLEU_1"])
    # And training goes on from it.
    run = tmp_path / "on"
    assert train(*brief, "--init", out, "--max-steps", 1, "--output", run) == 0
    assert read_json(run / "scores.json")["before"]["BLEU_1"] == pytest.approx(after["BLEU_1"])


@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_a_language_model_from_a_folder(
    train: Train, brief: list[str], tmp_path: Path, llama_folder: Folder, encoder_file: Folder,
    int8: bool,
) -> None:  # fmt: skip
    llm = llama_folder(tmp_path / "llama")
    given = ["--vision-checkpoint", encoder_file(tmp_path / "e.pth"), "--llm", llm]
    given += ["--image-size", 32, "--lr", 3e-2, *(["--llm-int8"] if int8 else [])]
    runs = {"X": tmp_path / "x", "X,llm": tmp_path / "llm"}
    for targets, run in runs.items():
        assert train(*brief, *given, "--lora-targets", targets, "--output", run) == 0
        expected = answer(load_run(run))
        out = tmp_path / f"{run.name}-out"
        assert main([str(run), str(out)]) == 0
        loaded = emrrg.load(out)
        assert loaded.config.llm is None
        # Held in int8 it stays so, unless an adapter of it was merged.
        assert loaded.config.llm_int8 == (int8 and targets == "X")
        got = answer(loaded)
        torch.testing.assert_close(got[0], expected[0], atol=1e-5, rtol=1e-5)
        assert got[1] == expected[1]
    linked = tmp_path / "linked"
    assert main([str(runs["X"]), str(linked), "--link-llm"]) == 0
    assert not [n for n in load_file(linked / "weights.safetensors") if "embed_tokens" in n]
    assert torch.equal(answer(emrrg.load(linked))[0], answer(emrrg.load(tmp_path / "x-out"))[0])
    with pytest.raises(InputError, match="changed its language model"):
        main([str(runs["X,llm"]), str(tmp_path / "no"), "--link-llm"])


def test_what_cannot_be_exported(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="is not a run folder"):
        main([str(tmp_path), str(out)])
    with pytest.raises(InputError, match=r"--link-llm: .* its decoder is its own"):
        main([str(trained), str(out), "--link-llm"])
    assert main([str(trained), str(out)]) == 0
    with pytest.raises(InputError, match="exists already"):
        main([str(trained), str(out)])
    with pytest.raises(InputError, match="is exported already"):
        main([str(out), str(tmp_path / "again")])

    # A full disk leaves nothing half done.
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"cannot be written .No space left on device"):
            main([str(trained), str(tmp_path / "full")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_damage_is_named(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main([str(trained), str(out)])
    content = bytearray((out / "weights.safetensors").read_bytes())
    content[-3] ^= 1
    (out / "weights.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.safetensors: is damaged"):
        emrrg.load(out)


def test_the_export_of_a_whole_training_holds_its_best_weights(
    trained: Path, tmp_path: Path
) -> None:
    main([str(trained), str(tmp_path / "best")])
    main([str(trained), str(tmp_path / "last"), "--checkpoint", "last"])
    for which in ("best", "last"):
        folder = trained / "checkpoints" / read_index(trained)[which]
        tensors = load_file(folder / "weights.safetensors")
        state = state_of(emrrg.load(tmp_path / which))
        assert tensors.keys() == state.keys()
        for name, tensor in tensors.items():
            assert torch.equal(state[name], tensor), name
    settings = json.loads((tmp_path / "best" / "config.json").read_text())
    assert settings["run"] == read_json(trained / "config.json")
    assert settings["model"]["lora_targets"] == []
    assert settings["model"] == to_dict(emrrg.load(tmp_path / "best").config)
