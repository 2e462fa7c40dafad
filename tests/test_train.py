"""The training command: what it leaves, exactness, regimes, chains of runs, recipes, errors."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import emrrg
from emrrg import convert
from emrrg import train as command
from emrrg.config import TrainConfig, flag, parse_config, run_command
from emrrg.data.loading import load_studies
from emrrg.distributed import World
from emrrg.errors import InputError
from emrrg.evaluation import StoppedError, selection_score, write_reports
from emrrg.jsonl import read_rows
from emrrg.metrics import java
from emrrg.optim import build_optimizer, decays, learning_rate
from emrrg.recipes import suggest
from emrrg.runs import (
    load_run,
    mark_finished,
    read_index,
    read_json,
    read_run_config,
    state_of,
)

Train = Callable[..., int]
Folder = Callable[[Path], Path]
SAMPLE = Path(__file__).parents[1] / "../shared/data/xray-sample"
# LoRA with dropout, and drop path (0.1 by default) in an encoder that trains.
# A line of the log is of four steps, so that a stop comes in the middle of one.
ADAPT = shlex.split(
    "--regime peft --lora-targets X,Z,llm --lora-dropout 0.3 --peft bias --seed 7 --log-every 4"
)


def weights(run: Path, which: str = "last") -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / read_index(run)[which] / "weights.safetensors")


def moments(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / read_index(run)["last"] / "optimizer.safetensors")


def numbers(run: Path) -> list[dict[str, Any]]:
    """What the log says, but for what the clock decides."""
    clocks = ("studies_per_second", "tokens_per_second", "memory_gib")
    rows = read_rows(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in numbers(run) if "loss" in row]


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different[:5]


def assert_same_run(first: Path, second: Path) -> None:
    """Every loss, rate and score, every weight and every moment, bit for bit."""
    assert numbers(first) == numbers(second)
    for which in ("last", "best"):
        assert_same_bits(weights(first, which), weights(second, which))
    assert_same_bits(moments(first), moments(second))
    assert (first / "predictions.json").read_text() == (second / "predictions.json").read_text()


def stop_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int, number: int) -> None:
    """A signal while `emrrg.train.<name>` runs for the n-th time."""
    real, calls = getattr(command, name), [0]

    def called(*args: Any, **settings: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            signal.raise_signal(number)
        return real(*args, **settings)

    monkeypatch.setattr(command, name, called)


@pytest.fixture(scope="module")
def adapted(
    train: Train, trained: Path, brief: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An adaptation that was never stopped; not to be written to."""
    run = tmp_path_factory.mktemp("adapted") / "run"
    assert train(*brief, *ADAPT, "--init", trained, "--output", run) == 0
    return run


# --- What a run leaves ---


def test_the_default_run_in_small(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, source = tmp_path / "run", tmp_path / "run" / "source"
    flags = (
        "--source-studies 12 --source-epochs 1 --train-studies 12 --val-studies 3 --test-studies 4 "
        "--image-size 32 --decoder-dim 32 --decoder-layers 2 --decoder-heads 2 --vocab-size 300 "
        "--epochs 1 --batch-size 2 --num-beams 1 --max-new-tokens 8 --log-every 1"
    )
    assert train(*flags.split(), "--output", run, pictures=True) == 0
    said = capsys.readouterr().out
    assert (read_run_config(source).regime, read_run_config(run).regime) == ("full", "peft")
    for folder in (run, source):
        for name in ("metrics.jsonl", "curves.png", "samples.md", "scores.json", "config.json"):
            assert (folder / name).stat().st_size > 0, name
        assert read_index(folder)["finished"]
    scores = read_json(run / "scores.json")
    assert scores["synthetic"] and 0 < scores["parameters"]["share"] < 0.2
    for part in ("before", "after"):
        assert {"BLEU_1", "BLEU_4", "ROUGE_L", "CIDEr", "METEOR", "clinical"} <= set(scores[part])
    assert scores["after"]["baselines"]["constant"]["report"]
    # Where the time went: the parts are counted apart, and are no more than the whole.
    spent = scores["seconds_by"]
    assert set(spent) == {"network", "data", "scoring", "files"} and min(spent.values()) > 0
    assert sum(spent.values()) < scores["seconds"]
    outside = scores["seconds"] - spent["network"]
    assert scores["seconds_outside_network"] == pytest.approx(outside)
    assert len(json.loads((run / "predictions.json").read_text())) == 4
    # The checkpoint holds what the paper's regime trains, and the base is the source's best.
    new = (".lora_X.", ".cross_attn.", "llama_proj.", "layer_norm.")
    assert all(any(part in name for part in new) for name in weights(run))
    base, before = load_file(run / "base" / "weights.safetensors"), weights(source, "best")
    assert_same_bits(base, {name: before[name] for name in base})
    for text in (
        "CPU with", "kernels: ", "from random weights, language model of", "hybrid layers ",
        f"parameters from {source}", "trains: ", "adapters X", "12 train, 3 val, 4 test studies",
        "an epoch of 6 steps takes about", "ETA", "studies/s", "tokens/s", "GiB", "lr ",
        "before adaptation", "constant report", "nearest training image", "outside the network",
        f"python -m emrrg.evaluate {run}",
    ):  # fmt: skip
        assert text in said, text


def test_java_is_started_once_for_before_and_after(
    trained: Path, brief: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """METEOR's table takes seconds to read; its scores are those of either set of reports."""
    starts = []

    def counted(sets: Any, **_: Any) -> list[java.Meteor]:
        starts.append(sets)
        return [
            java.Meteor(
                len(" ".join(texts)) / 1e4, np.zeros(len(texts)), np.zeros((len(texts), 23))
            )
            for texts, _ in sets
        ]

    monkeypatch.setattr(java, "meteor", counted)
    for module in ("evaluation", "train"):
        monkeypatch.setattr(f"emrrg.{module}.meteor_ahead", contextlib.nullcontext)
    monkeypatch.setattr(command, "plot_curves", lambda *_: None)
    run = tmp_path / "run"
    flags = [*brief, "--init", trained, "--lr", 0.1, "--output", run]
    assert command.main([str(flag) for flag in flags]) == 0
    assert len(starts) == 1
    scores = read_json(run / "scores.json")
    for part, name in (("before", "predictions_before.json"), ("after", "predictions.json")):
        texts = [row["hypothesis"] for row in json.loads((run / name).read_text())]
        assert scores[part]["METEOR"] == len(" ".join(texts)) / 1e4
        assert {"METEOR", "CIDEr"} <= set(scores[part]["intervals"])
        assert not scores[part]["missing"]
    assert scores["before"]["METEOR"] != scores["after"]["METEOR"]
    assert f"test before: BLEU-4 0.000  METEOR {scores['before']['METEOR']:.3f}" in (
        capsys.readouterr().out
    )


def test_the_bar_on_a_terminal(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert train(*small, "--output", tmp_path / "run") == 0
    captured = capsys.readouterr()
    last = captured.err.replace("\n", "\r").split("6/6")[-1].split("\r")[0]
    for text in ("00:00", "loss ", "lr 1.47e-04", "studies/s", "tokens/s", "GiB"):
        assert text in last, (text, last)
    assert "step 3/6" not in captured.out  # no plain lines beside it
    assert "epoch 2: validation BLEU-4" in captured.out


def test_what_was_saved_is_what_was_scored(trained: Path, brief: list[str]) -> None:
    predictions = json.loads((trained / "predictions.json").read_text())
    config = read_run_config(trained)
    model = emrrg.load(trained)
    studies = load_studies(config, 32, ("test",))["test"]
    again = write_reports(model, studies, config, torch.device("cpu"))
    assert [row["hypothesis"] for row in predictions] == again.reports
    assert [row["id"] for row in predictions] == again.ids == studies.ids()


def test_rows_of_the_log_count_up(trained: Path) -> None:
    rows = [row for row in numbers(trained) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1]
    config = read_run_config(trained)
    assert [row["lr"] for row in rows] == [learning_rate(config, k, 6, k // 3) for k in range(6)]


# --- Exactness ---


def test_same_seed_same_bits_another_seed_others(
    train: Train, adapted: Path, trained: Path, brief: list[str], tmp_path: Path
) -> None:
    flags = [*brief, *ADAPT, "--init", trained]
    assert train(*flags, "--output", tmp_path / "same") == 0
    assert_same_run(adapted, tmp_path / "same")
    assert train(*flags, "--seed", "8", "--output", tmp_path / "other") == 0
    assert numbers(adapted) != numbers(tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "call", "number"),
    [
        ("training_step", 1, signal.SIGINT),
        ("training_step", 3, signal.SIGTERM),  # the last one of its epoch
        ("training_step", 5, signal.SIGINT),
        ("evaluate_model", 1, signal.SIGTERM),  # before adaptation
        ("evaluate_model", 2, signal.SIGTERM),  # the first validation
        ("evaluate_model", 4, signal.SIGINT),  # the test
    ],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    train: Train,
    adapted: Path,
    trained: Path,
    brief: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    name: str,
    call: int,
    number: int,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, name, call, number)
        assert train(*brief, *ADAPT, "--init", trained, "--output", run) == 130
    assert "stopping after this step" in capfd.readouterr().err
    if name == "training_step":
        assert read_index(run)["last"] == f"step-{call:06d}"
    assert not (run / "scores.json").exists()
    assert train("--resume", run) == 0
    assert_same_run(adapted, run)


def test_a_run_that_was_stopped_at_every_step(
    train: Train, adapted: Path, trained: Path, brief: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    for k in range(6):
        with monkeypatch.context() as patch:
            stop_at(patch, "training_step", 1, signal.SIGINT)
            start = ["--resume", run] if k else [*brief, *ADAPT, "--init", trained, "--output", run]
            assert train(*start) == 130
    assert train("--resume", run) == 0
    assert_same_run(adapted, run)


def test_a_validation_that_is_not_saved_comes_again(
    train: Train, adapted: Path, trained: Path, brief: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run, real = tmp_path / "run", command.save

    def save(*args: Any, **settings: Any) -> None:
        if settings:  # what follows a validation, whose line is in the log already
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command, "save", save)
        train(*brief, *ADAPT, "--init", trained, "--save-every", 1, "--output", run)
    assert any("val" in row for row in numbers(run))
    assert train("--resume", run) == 0
    assert_same_run(adapted, run)


def test_a_second_interrupt_ends_at_once(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = command.training_step, signal.getsignal(signal.SIGINT)

    def step(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun hands on what the terminal sent already
        monkeypatch.setattr(command, "AGAIN", -1.0)
        signal.raise_signal(signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(command, "training_step", step)
    with pytest.raises(KeyboardInterrupt):
        train(*small, "--output", tmp_path / "run")
    assert not read_index(tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_run_forked_leaves_the_message_to_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C reaches the processes that draw phantoms too, and they have its handler."""
    with command.stop_on_signals(World()), monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        signal.raise_signal(signal.SIGINT)
    assert not capfd.readouterr().err
    with command.stop_on_signals(World()) as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped()
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_a_finished_run_can_go_on_for_more_epochs(
    train: Train, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert train("--resume", run, "--epochs", "3") == 0
    rows = [row for row in numbers(run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert read_index(run)["last"] == "step-000009"
    assert read_run_config(run).epochs == 3 and read_index(run)["finished"]


def test_a_run_that_stopped_early_can_go_on(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    monkeypatch.setattr(command, "selection_score", lambda *_: 0.5)
    assert train(*small, "--epochs", 4, "--patience", 1, "--output", run) == 0
    assert read_index(run)["last"] == "step-000006"
    assert train("--resume", run) == 0
    assert "a larger --epochs, with another --patience, trains on" in capsys.readouterr().out
    assert train("--resume", run, "--patience", 0) == 0
    assert read_index(run)["last"] == "step-000012" and read_index(run)["finished"]
    assert read_run_config(run).patience == 0


def test_a_longer_run_that_is_stopped_keeps_its_new_end(
    train: Train, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with monkeypatch.context() as patch:
        stop_at(patch, "training_step", 1, signal.SIGINT)
        assert train("--resume", run, "--epochs", "3") == 130
    assert not read_index(run)["finished"]
    assert train("--resume", run) == 0
    assert read_index(run)["last"] == "step-000009" and read_index(run)["finished"]


def test_a_finished_run_says_that_it_is(
    train: Train, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = (run / "scores.json").read_bytes()
    monkeypatch.setattr(command, "prepare", lambda *_: pytest.fail("nothing is left to do"))
    assert train("--resume", run) == train("--resume", run, "--epochs", 1, "--threads", 1) == 0
    out = capsys.readouterr().out
    assert (
        f"{run} is finished and scored (--epochs 2), nothing is" in out
        and "a larger --epochs trains on" in out
    )
    assert (run / "scores.json").read_bytes() == before and read_run_config(run).epochs == 2


def test_what_may_change_when_a_run_goes_on_is_told(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(["--resume", trained, "--batch-size", 3], monkeypatch, capsys)
    with pytest.raises(SystemExit):
        command.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split("--resume PATH")[-1].split())
    shown = shown.replace("- ", "-")  # lines break behind a hyphen too
    for name in command.MAY_CHANGE:
        assert flag(name) in line and flag(name) in shown.split("may be given beside it")[0]


def test_a_default_folder_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "emrrg.train")
    config = TrainConfig(recipe="phantoms", dataset="phantoms")

    def told() -> list[str]:
        caplog.clear()
        command.run_folder(config)
        return caplog.messages

    assert told() == []
    (first := Path("runs/phantoms")).joinpath("config.json").write_text("{}")
    second, hint = told()
    assert second == "runs/phantoms exists already: this run goes to runs/phantoms-2"
    assert "runs/phantoms is unfinished; " in hint and "--resume runs/phantoms" in hint
    (first / "checkpoints").mkdir()
    mark_finished(first)
    assert told() == ["runs/phantoms exists already: this run goes to runs/phantoms-3"]
    # Another run may take the name between the look and the making.
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda _self, **_: False)
        assert "this run goes to runs/phantoms-4" in told()[0]


def test_accumulated_batches_equal_one_batch(
    train: Train, small: list[str], tmp_path: Path
) -> None:
    ways = {"one": (4, 1), "two": (2, 2), "uneven": (3, 2)}  # 4 = 2 + 2; 6 = 3 + 3; 6 in one
    for name, (size, count) in {**ways, "six": (6, 1)}.items():
        flags = ["--drop-path", "0", "--batch-size", size, "--accumulate", count]
        assert train(*small, *flags, "--output", tmp_path / name) == 0
    for first, second in (("two", "one"), ("uneven", "six")):
        expected = weights(tmp_path / second)
        for name, got in weights(tmp_path / first).items():
            torch.testing.assert_close(got, expected[name], atol=2e-5, rtol=1e-4, msg=name)
        losses = [
            [r["loss"] for r in numbers(tmp_path / n) if "loss" in r] for n in (first, second)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- Regimes, and chains of runs ---

PROJECTOR = {"llama_proj.weight", "llama_proj.bias", "layer_norm.weight", "layer_norm.bias"}


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        ("--regime encoder", ("visual_encoder.", ".cross_attn.")),
        ("--regime linear-probe", ()),
        ("--regime full", ("visual_encoder.", "llama_model.")),
        ("--regime peft --lora-targets none", (".cross_attn.",)),
        ("--regime peft --lora-targets llm", (".lora_llm.", ".cross_attn.")),
        (
            "--regime peft --lora-targets dt_in,B --peft delta-A,affix,additional-scan",
            (".lora_dt_in.", ".lora_B.", ".peft_delta_A", ".peft_affix.", ".peft_scan.",
             ".cross_attn."),
        ),
    ],
    ids=["encoder", "linear-probe", "full", "no adapters", "llm", "peft"],
)  # fmt: skip
def test_what_trains_in_a_regime(
    train: Train,
    trained: Path,
    brief: list[str],
    tmp_path: Path,
    flags: str,
    kinds: tuple[str, ...],
) -> None:
    run = tmp_path / "run"
    assert train(*brief, *flags.split(), "--epochs", 1, "--init", trained, "--output", run) == 0
    after, base = weights(run), load_file(run / "base" / "weights.safetensors")
    before = state_of(emrrg.load(trained))
    assert not set(after) & set(base)
    # Nothing else trains, and everything of the regime does.
    assert all(n in PROJECTOR or any(kind in n for kind in kinds) for n in after)
    assert after.keys() >= PROJECTOR
    for kind in kinds:
        assert any(kind in name for name in after), kind
    assert_same_bits(base, {name: before[name] for name in base})
    moved = [n for n in after if n not in before or not torch.equal(after[n], before[n])]
    still = set(after) - set(moved)
    # Without a hybrid layer's alpha its K and V have no gradient in the first steps.
    assert all("kv_proj" in n or "gate" in n for n in still), still


@pytest.mark.parametrize("stop", [2, 4])
def test_cached_features_change_nothing(
    train: Train, trained: Path, brief: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, stop: int, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = [*brief, "--regime", "linear-probe", "--init", trained]
    assert train(*flags, "--output", tmp_path / "whole") == 0
    assert "image features are computed once" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        stop_at(patch, "training_step", stop, signal.SIGINT)
        assert train(*flags, "--output", tmp_path / "stopped") == 130
    assert train("--resume", tmp_path / "stopped") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert train(*flags, "--no-cache-features", "--output", tmp_path / "plain") == 0
    plain = weights(tmp_path / "plain")
    for name, got in weights(tmp_path / "whole").items():
        torch.testing.assert_close(got, plain[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_run_on_a_run_on_a_run(
    train: Train, trained: Path, brief: list[str], tmp_path: Path
) -> None:
    one, two, blind = tmp_path / "one", tmp_path / "two", tmp_path / "blind"
    methods = "--lora-targets X,out_proj,llm --peft delta-D,delta-bias,prompt-projected,bias"
    assert train(*brief, *methods.split(), "--init", trained, "--output", one) == 0
    assert train(*brief, "--peft", "affix", "--init", one, "--output", two, "--max-steps", 1) == 0
    # Before its first step the second run is the first one, adapters merged.
    scores = [read_json(one / "scores.json")["after"], read_json(two / "scores.json")["before"]]
    assert scores[0]["BLEU_1"] == pytest.approx(scores[1]["BLEU_1"])
    model = load_run(two)
    assert model.config.lora_targets == ("X",) and model.config.peft == ("prompt", "affix")
    first = load_run(one)
    merged = first.visual_encoder.layers[0].mixer
    dim = merged.out_proj.weight.shape[0]
    expected = {
        "in_proj": merged.in_proj.weight.clone(), "out_proj": merged.out_proj.weight.clone()
    }  # fmt: skip
    lora = merged.in_proj.lora_X
    expected["in_proj"][:dim] += lora.scale * lora.B @ lora.A
    lora = merged.out_proj.lora_out_proj
    expected["out_proj"] += lora.scale * lora.B @ lora.A
    mixer = model.visual_encoder.layers[0].mixer
    for name, weight in expected.items():
        torch.testing.assert_close(getattr(mixer, name).weight, weight, msg=name)
    torch.testing.assert_close(mixer.D_c, merged.D_c + merged.peft_delta_D[2])
    q = model.llama_model.model.layers[1].self_attn.q_proj.weight
    before = first.llama_model.model.layers[1].self_attn.q_proj
    torch.testing.assert_close(q, before.weight + before.lora_llm.B @ before.lora_llm.A)
    # A blind control of it sees one picture in every image.
    assert train(*brief, "--blind", "--init", two, "--output", blind) == 0
    reports = [r["hypothesis"] for r in json.loads((blind / "predictions.json").read_text())]
    assert len(set(reports)) == 1
    assert not any(n.startswith("visual_encoder.") for n in weights(blind))


@pytest.mark.parametrize("form", ["pth", "folder"])
@pytest.mark.parametrize("int8", [False, True], ids=["fp32", "int8"])
def test_released_weights(
    train: Train, brief: list[str], tmp_path: Path, form: str, int8: bool,
    monkeypatch: pytest.MonkeyPatch, llama_folder: Folder, encoder_file: Folder,
) -> None:  # fmt: skip
    encoder_file(tmp_path / "encoder.pth")
    state = torch.load(tmp_path / "encoder.pth", weights_only=True)["model"]
    vision = tmp_path / "encoder.pth"
    if form == "folder":
        convert.main([str(vision), str(tmp_path / "converted")])
        vision = tmp_path / "converted"
    llm = llama_folder(tmp_path / "llama")
    flags = [*brief, "--vision-checkpoint", vision, "--llm", llm, "--image-size", 32,
             "--hybrid-every", 2, *(["--llm-int8"] if int8 else [])]  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(*flags, "--output", whole) == 0
    assert read_run_config(whole).regime == "peft"
    with monkeypatch.context() as patch:
        stop_at(patch, "training_step", 4, signal.SIGTERM)
        assert train(*flags, "--output", run) == 130
    assert train("--resume", run) == 0
    assert_same_run(whole, run)
    base = load_file(run / "base" / "weights.safetensors")
    assert not any(name.startswith("llama_model.") for name in base)  # it stays in its folder
    assert_same_bits(base, state)
    model = emrrg.load(run)
    assert model.llama_model.config.hybrid_layers == (0, 2)
    total = read_json(run / "scores.json")["parameters"]["total"]
    assert total == sum(t.numel() for n, t in state_of(model).items() if "weight_scale" not in n)
    kind = model.llama_model.model.layers[0].mlp.up_proj.weight.dtype
    assert kind == (torch.int8 if int8 else torch.float32)
    # A run on top of it, with the language model adapted, no longer needs the folder.
    if not int8:
        adapters = ["--lora-targets", "llm", "--max-steps", 2]
        assert train(*brief, *adapters, "--init", run, "--output", tmp_path / "llm") == 0
        assert (
            train(*brief, *adapters, "--init", tmp_path / "llm", "--output", tmp_path / "on") == 0
        )
        shutil.rmtree(llm)
        assert emrrg.load(tmp_path / "on").config.llm is None


def test_a_language_model_trained_whole_is_saved_whole(
    train: Train, brief: list[str], tmp_path: Path, llama_folder: Folder, encoder_file: Folder
) -> None:
    encoder_file(tmp_path / "encoder.pth")
    llm = llama_folder(tmp_path / "llama")
    given = [*brief, "--vision-checkpoint", tmp_path / "encoder.pth", "--llm", llm]
    given += ["--image-size", 32]
    assert train(*given, "--regime", "full", "--output", tmp_path / "run") == 0
    own = weights(tmp_path / "run")
    assert "llama_model.model.embed_tokens.weight" in own
    assert_same_bits(state_of(emrrg.load(tmp_path / "run", checkpoint="last")), own)


# --- Recipes, schedule, optimizer, selection ---


def parse(*flags: str) -> TrainConfig:
    return parse_config(TrainConfig, flags, "emrrg.train", suggest)[0]


@pytest.mark.parametrize(
    ("recipe", "batch", "epochs", "tokens", "beams", "least", "most"),
    [
        ("iu_xray", 4, 21, 60, 5, 40, 100),
        ("mimic_cxr", 6, 5, 100, 3, 80, 120),
        ("chexpert_plus", 6, 11, 100, 3, 80, 120),
    ],
)
def test_the_papers_recipes(
    recipe: str, batch: int, epochs: int, tokens: int, beams: int, least: int, most: int
) -> None:
    config = parse("--recipe", recipe, "--annotation", "a.json", "--images", "d")
    assert (config.batch_size, config.epochs, config.max_report_tokens) == (batch, epochs, tokens)
    assert (config.num_beams, config.min_new_tokens, config.max_new_tokens) == (beams, least, most)
    assert (config.lr, config.min_lr, config.weight_decay, config.seed) == (1e-4, 1e-6, 0.01, 42)
    assert (config.warmup_steps, config.grad_clip, config.accumulate) == (0, 0, 1)
    assert (config.repetition_penalty, config.length_penalty) == (2.0, 2.0)
    assert (config.select_bleu4, config.select_cider) == (0.8, 0.2)
    assert config.decay_all and not config.bucket and config.dataset == recipe
    assert (config.beta2, config.precision, config.schedule) == (0.999, "bf16", "epoch-cosine")
    assert (config.lora_targets, config.lora_rank, config.lora_scale) == (("X",), 16, 1.0)
    with_llm = ("--annotation", "a.json", "--images", "d", "--vision-checkpoint", "e", "--llm", "l")
    adapted = parse("--recipe", recipe, *with_llm)
    assert (adapted.regime, adapted.hybrid_every) == ("peft", 8)


def test_the_papers_cosine_by_hand() -> None:
    config = parse("--recipe", "mimic_cxr", "--annotation", "a.json", "--images", "d")
    # Five epochs: 1e-6 + 0.99e-4 / 2 (1 + cos(pi e / 5)); cos 36 = 0.809017, cos 72 = 0.309017.
    by_hand = [1e-4, 9.05463e-5, 6.57963e-5, 3.52037e-5, 1.04537e-5]
    for epoch, value in enumerate(by_hand):
        for step in (epoch * 1000, epoch * 1000 + 999):  # every step of an epoch alike
            assert learning_rate(config, step, 5000, epoch) == pytest.approx(value, rel=1e-5)
    # Torch's own schedule, as the release calls it.
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5, eta_min=1e-6)
    for epoch in range(5):
        got = learning_rate(config, epoch * 7, 35, epoch)
        assert got == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()
    # A run that --max-steps cuts short keeps the schedule of its epochs.
    assert learning_rate(config, 1000, 1500, 1) == pytest.approx(by_hand[1], rel=1e-5)


def test_our_cosine_by_hand() -> None:
    config = TrainConfig(lr=1e-3, min_lr=1e-5, warmup_steps=4)
    rates = [learning_rate(config, k, 12, 0) for k in range(13)]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert rates[4] == pytest.approx(1e-3)
    assert rates[6] == pytest.approx(1e-5 + 9.9e-4 * 0.5 * (1 + math.sqrt(0.5)))  # a quarter
    assert rates[8] == pytest.approx(1e-5 + 9.9e-4 * 0.5)  # half of the way
    assert rates[12] == pytest.approx(1e-5)


def test_what_decays(trained: Path) -> None:
    model = emrrg.load(trained)
    parameters = dict(model.named_parameters())
    never = ("norm", ".bias", "A_log", "A_b_log", "A_c_log", "A_c_b_log", ".D", ".D_b", ".D_c",
             ".D_c_b", "pos_embed", "cls_token", "alpha")  # fmt: skip

    def decayed(config: TrainConfig) -> set[str]:
        groups = build_optimizer(config, parameters).param_groups
        names = {id(p): n for n, p in parameters.items()}
        assert sum(len(group["params"]) for group in groups) == len(parameters)
        assert {group["weight_decay"] for group in groups} <= {0.0, 0.05}
        return {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}

    expected = {n for n in parameters if not any(part in f".{n}" for part in never)}
    assert decayed(TrainConfig(weight_decay=0.05)) == expected
    assert any("in_proj" in n for n in expected) and any("conv1d" in n for n in expected)
    assert decayed(TrainConfig(weight_decay=0.05, decay_all=True)) == set(parameters)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("visual_encoder.layers.0.mixer.in_proj.lora_X.A", (4, 8), True),
        ("visual_encoder.layers.0.mixer.in_proj.lora_X.B", (8, 4), True),
        ("visual_encoder.layers.0.mixer.conv1d_c.weight", (8, 1, 4), True),
        ("visual_encoder.layers.0.mixer.A_c_b_log", (8, 16), False),
        ("visual_encoder.layers.0.mixer.D_c", (8,), False),
        ("visual_encoder.layers.0.mixer.dt_proj_b.bias", (8,), False),
        ("visual_encoder.layers.0.norm1.weight", (8,), False),
        ("visual_encoder.cls_token", (1, 1, 8), False),
        ("visual_encoder.pos_embed", (1, 5, 8), False),
        ("visual_encoder.peft_affix.tokens", (2, 3, 8), False),
        ("visual_encoder.layers.0.mixer.peft_delta_A", (4, 8, 16), True),
        ("llama_model.model.layers.0.cross_attn.kv_proj.weight", (8, 8), True),
        ("llama_model.model.layers.0.cross_attn.gate.scale", (8,), False),
        ("llama_model.model.norm.weight", (8,), False),
    ],
)
def test_decay_by_name(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert decays(name, torch.zeros(shape)) == expected
    groups = build_optimizer(TrainConfig(), {name: torch.zeros(shape)}).param_groups
    assert (groups[0]["weight_decay"] > 0) == expected


def test_selection_and_early_stopping(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    scores = {"BLEU_4": 0.5, "CIDEr": 0.1}
    assert selection_score(scores, TrainConfig()) == pytest.approx(0.8 * 0.5 + 0.2 * 0.1)
    weighed = TrainConfig(select_bleu4=0.0, select_cider=3.0)
    assert selection_score(scores, weighed) == pytest.approx(0.3)
    # The scores of the validations; the second one is the best.
    run, told = tmp_path / "run", iter([0.1, 0.4, 0.3, 0.2, 0.9, 0.9])
    monkeypatch.setattr(command, "selection_score", lambda *_: next(told))
    flags = [*small, "--epochs", 6, "--patience", 2]
    with monkeypatch.context() as patch:  # stopped in between, it counts on
        stop_at(patch, "training_step", 8, signal.SIGINT)
        assert train(*flags, "--output", run) == 130
    assert train("--resume", run) == 0
    assert "stopped: no better score in 2 validations" in capsys.readouterr().out
    assert read_index(run)["last"] == "step-000012"  # after the fourth epoch of three steps
    assert read_index(run)["best"] == "step-000006"
    assert {p.name for p in (run / "checkpoints").glob("step-*")} == {"step-000006", "step-000012"}
    # And once stopped it does not train on.
    assert train("--resume", run) == 0
    assert read_index(run)["last"] == "step-000012"


def test_validation_on_a_part_and_now_and_then(
    train: Train, small: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ["--epochs", 5, "--eval-every", 2, "--val-studies", 2, "--keep-last", 3]
    assert train(*small, *flags, "--output", run) == 0
    assert [row["epoch"] for row in numbers(run) if "val" in row] == [2, 4, 5]
    kept = {p.name for p in (run / "checkpoints").glob("step-*")}
    assert kept >= {"step-000009", "step-000012", "step-000015"} and len(kept) <= 4


# --- Options of the engine ---


def test_half_precision_trains(train: Train, small: list[str], tmp_path: Path) -> None:
    told = {}
    for precision in ("fp32", "bf16", "fp16"):
        run = tmp_path / precision
        flags = ["--precision", precision, "--drop-path", 0, "--epochs", 4]
        assert train(*small, *flags, "--output", run) == 0
        told[precision] = losses(run)
        assert all(t.dtype == torch.float32 for t in weights(run).values())
    assert told["bf16"] != told["fp32"] != told["fp16"]
    for precision in ("bf16", "fp16"):
        assert told[precision] == pytest.approx(told["fp32"], rel=5e-3)
        assert told[precision][-1] < told[precision][0] - 0.2


def test_a_scaler_comes_back(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*small, "--precision", "fp16"]
    assert train(*flags, "--output", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, "training_step", 4, signal.SIGINT)
        assert train(*flags, "--output", tmp_path / "run") == 130
    assert train("--resume", tmp_path / "run") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_checkpointing_changes_no_number(
    train: Train, trained: Path, adapted: Path, brief: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = [*brief, *ADAPT, "--init", trained, "--checkpointing"]
    assert train(*flags, "--output", run) == 0
    expected = weights(adapted)
    for name, got in weights(run).items():  # dropout included: its stream is played again
        torch.testing.assert_close(got, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_deterministic(train: Train, small: list[str], trained: Path, tmp_path: Path) -> None:
    try:
        assert train(*small, "--deterministic", "--output", tmp_path / "run") == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(weights(tmp_path / "run"), weights(trained))


@pytest.mark.gpu
def test_same_bits_on_a_gpu(train: Train, small: list[str], tmp_path: Path) -> None:
    try:
        for name in ("one", "two"):
            flags = ["--device", "cuda", "--deterministic", "--output", tmp_path / name]
            assert train(*small, *flags) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_compiled(train: Train, small: list[str], trained: Path, tmp_path: Path) -> None:
    flags = [*small, "--compile", "--drop-path", 0]
    assert train(*flags, "--output", tmp_path / "compiled") == 0
    assert train(*small, "--drop-path", 0, "--output", tmp_path / "plain") == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)


def test_a_dry_run_leaves_nothing(
    train: Train, small: list[str], trained: Path, brief: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert train(*small, "--dry-run") == 0
    assert train(*brief, "--init", trained, "--dry-run") == 0
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    for text in ("dry run: loss", "GiB", "reports/s; the first:", "adapters X"):
        assert text in said, text
    # The time is that of the second step: the first one also builds what is built once.
    real, wait = command.training_step, iter([0.5, 0.2])

    def step(*args: Any) -> Any:
        time.sleep(next(wait))
        return real(*args)

    monkeypatch.setattr(command, "training_step", step)
    assert train(*small, "--train-studies", 200, "--epochs", 3, "--dry-run") == 0
    said = capsys.readouterr().out
    found = re.search(
        r"a step takes ([\d.]+) s \(the first ([\d.]+) s\)\n"
        r"an epoch of 50 steps takes about (\d+):(\d+), 3 epochs (\d+):(\d+) ",
        said,
    )
    assert found, said
    seconds, first, *clocks = map(float, found.groups())
    epoch, whole = (60 * clocks[k] + clocks[k + 1] for k in (0, 2))
    assert seconds >= 0.2 and first >= 0.5
    assert epoch == pytest.approx(50 * seconds, abs=1.1) and whole == pytest.approx(
        3 * epoch, abs=2
    )


def test_curves_are_drawn_as_it_goes(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, steps = tmp_path / "run", []

    def draw(metrics: Path, path: Path) -> None:
        assert path == run / "curves.png"
        steps.append(max(row["step"] for row in read_rows(metrics)))

    monkeypatch.setattr(command, "plot_curves", draw)
    flags = [*small, "--save-every", 2]
    monkeypatch.setattr("emrrg.progress.PICTURES", 0.0)
    assert train(*flags, "--output", run, pictures=True) == 0
    assert steps == [2, 3, 4, 6, 6, 6]  # at each checkpoint, and when all is done
    # A picture takes half a second, so a minute passes before the next.
    run, steps = tmp_path / "other", []
    monkeypatch.setattr("emrrg.progress.PICTURES", 60.0)
    assert train(*flags, "--output", run, pictures=True) == 0
    assert steps == [2, 6]


def test_samples_show_what_was_written(trained: Path) -> None:
    text = (trained / "samples.md").read_text()
    predictions = json.loads((trained / "predictions.json").read_text())
    assert text.startswith("# Samples: test") and text.count("**generated**") == 4
    for k, row in enumerate(predictions, 1):
        assert f"## {row['id']} (synthetic)" in text
        assert f"**reference**: {row['reference']}\n" in text
        assert f"**generated**: {row['hypothesis']}\n" in text
        with Image.open(trained / "samples" / f"test-{k}.png") as image:
            assert image.size == (32, 32)


def test_auto_batch(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("emrrg.engine.LARGEST_BATCH", 6)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, "training_step", 3, signal.SIGINT)
        assert train(*small, "--auto-batch", "--output", run) == 130
    assert "--auto-batch: 6 studies fit" in capsys.readouterr().out
    assert (read_run_config(run).batch_size, read_run_config(run).auto_batch) == (6, False)
    assert train("--resume", run) == 0
    assert [row["step"] for row in numbers(run) if "loss" in row] == [1, 2, 3, 4]


def test_auto_batch_in_the_first_stage(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on takes the batches that were found, not those of --batch-size."""
    monkeypatch.setattr("emrrg.engine.LARGEST_BATCH", 6)
    flags = [*small, "--recipe", "phantoms", "--source-studies", 12, "--auto-batch"]
    with monkeypatch.context() as patch:
        stop_at(patch, "training_step", 1, signal.SIGINT)
        assert train(*flags, "--output", tmp_path / "run") == 130
    seen = []

    def prepare(config: TrainConfig, *_: Any, **__: Any) -> None:
        seen.append((config.batch_size, config.auto_batch))
        raise StoppedError

    monkeypatch.setattr(command, "prepare", prepare)
    assert train("--resume", tmp_path / "run") == 130
    assert seen == [(6, False)]


def test_tensorboard(train: Train, small: list[str], tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs the extra emrrg[tensorboard]",
    )
    run = tmp_path / "run"
    assert train(*small, "--tensorboard", "--output", run) == 0
    events = reader.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    points = {event.step: event.value for event in events.Scalars("loss")}
    rows = {row["step"]: row["loss"] for row in numbers(run) if "loss" in row}
    assert points == pytest.approx(rows)
    assert "val/BLEU-4" in events.Tags()["scalars"]


# --- What a person did wrong: one line that names it, exit status 2 ---


def said(
    flags: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """The line of `python -m emrrg.train FLAGS`, which must be the only one."""
    monkeypatch.setattr(sys, "argv", ["emrrg/train.py", *map(str, flags)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(command.main)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--epochs many", "--epochs: invalid int value: 'many'"),
        ("--presets tiny", "unrecognized arguments: --presets tiny"),
        ("--resume {tmp}/nothing", "--resume: {tmp}/nothing holds no config.json"),
        ("--resume {trained} --lr 1", "--lr: cannot change in a run that goes on"),
        ("--output {trained}", "--output: {trained} exists already"),
        ("--output {file}", "--output: {file} exists already"),
        ("--output {file}/under", "--output: cannot write in {file}/under (Not a directory)"),
        ("--init {tmp}/nothing", "{tmp}/nothing: is not a run folder (no such folder)"),
        ("--init {trained} --image-size 64", "--image-size: comes with --init already"),
        ("--dataset phantoms --regime peft", "--regime peft: adapts trained weights"),
        ("--dataset phantoms --regime linear-probe", "--regime linear-probe: trains the projector"),
        ("--dataset phantoms --peft bias", "--peft: its methods train under --regime peft"),
        ("--init {trained} --regime full --llm-int8", "--llm-int8: int8 weights cannot train"),
        ("--init {trained} --shard-llm", "--shard-llm: there is one process"),
        ("--init {trained} --regime full --shard-llm", "--shard-llm: shards frozen weights"),
        ("--init {trained} --max-report-tokens 400", "more than the language model's 256 pos"),
        ("--init {trained} --hybrid-layers 5 --regime peft", "--hybrid-layers: 5 is not a layer"),
        ("--vision-checkpoint {file} --llm {tmp}", "{file}: "),
        ("--dataset custom --annotation {file} --images {tmp}", "{file}: not JSON: line 1"),
        ("--dataset custom --annotation {tmp}/a --images {tmp}", "{tmp}/a: no such file"),
        ("--device cuda:77", "--device: cuda:77 is not there"),
        ("--device tpu", "--device: 'tpu' is not auto, cpu, cuda or cuda:N"),
        ("--drop-path 1.5", "--drop-path: 1.5 is not in [0, 1)"),
    ],
)
def test_a_wrong_flag(
    trained: Path, brief: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], flags: str, says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("{")
    names = {"tmp": tmp_path, "trained": trained, "file": tmp_path / "file"}
    given = flags.format(**names).split()
    few = [] if "--resume" in given else brief
    if "custom" in given:
        few = flags_without(brief, "--dataset")
    line = said([*few, *given], monkeypatch, capsys)
    assert line.startswith("emrrg.train: error: ") and says.format(**names) in line


def flags_without(flags: list[str], name: str) -> list[str]:
    at = flags.index(name)
    return flags[:at] + flags[at + 2 :]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("broken", "3-1.png: "),
        ("missing", "train[3] (study-3): image {data}/3-1.png: no such file"),
        ("record", "train[2] (study-2): no 'report'"),
        ("empty", "has no 'test' studies"),
    ],
)
def test_wrong_data(
    annotated: Callable[[], Path], brief: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str, says: str,
) -> None:  # fmt: skip
    path = annotated()
    content = json.loads(path.read_text())
    if damage == "broken":
        (path.parent / "3-1.png").write_bytes((path.parent / "3-1.png").read_bytes()[:60])
    elif damage == "missing":
        (path.parent / "3-1.png").unlink()
    elif damage == "record":
        del content["train"][2]["report"]
    else:
        content["test"] = []
    path.write_text(json.dumps(content))
    data = ["--dataset", "custom", "--annotation", path, "--images", path.parent]
    sizes = shlex.split("--image-size 32 --decoder-dim 32 --decoder-layers 1 --vocab-size 100")
    run = ["--output", tmp_path / "run"]
    line = said([*flags_without(brief, "--dataset"), *sizes, *data, *run], monkeypatch, capsys)
    assert says.format(data=path.parent) in line


def test_tensorboard_that_is_not_installed(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = said([*small, "--tensorboard", "--output", tmp_path / "run"], monkeypatch, capsys)
    assert "pip install 'emrrg[tensorboard]'" in line


def test_a_real_process_ends_with_status_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "emrrg.train", "--resume", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        f"emrrg.train: error: --resume: {tmp_path} holds no config.json, it is not a run folder\n"
    )
    assert not done.stdout


def test_a_refused_start_leaves_the_folder_free(
    train: Train, brief: list[str], tmp_path: Path
) -> None:
    """What a first attempt asked for is not asked for by the second."""
    run = tmp_path / "run"
    with pytest.raises(InputError, match="is not a layer"):
        train(*brief, "--hybrid-layers", 9, "--epochs", 1, "--output", run)
    assert train(*brief, "--epochs", 1, "--output", run) == 0
    assert read_run_config(run).hybrid_layers is None
    with pytest.raises(InputError, match="exists already"):
        train(*brief, "--epochs", 1, "--output", run)


# --- Real studies ---


@pytest.mark.skipif(not SAMPLE.exists(), reason="needs ../shared/data/xray-sample")
def test_real_studies(tmp_path: Path) -> None:
    """Train, evaluate and write on real images of one to three views, as a person would."""
    run, image = tmp_path / "run", SAMPLE / "images"
    data = ["--annotation", SAMPLE / "annotation.json", "--images", image]
    records = json.loads((SAMPLE / "annotation.json").read_text())
    views = [len(r["image_path"]) for split in records.values() for r in split]
    assert max(views) > 1
    flags = shlex.split(
        "--dataset iu_xray --image-size 32 --decoder-dim 32 --decoder-layers 2 --decoder-heads 2 "
        "--vocab-size 300 --epochs 1 --batch-size 8 --num-beams 1 --max-new-tokens 8 --log-every 1"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": "/nowhere"}  # without Java

    def call(name: str, *words: Any) -> str:
        done = subprocess.run(
            [sys.executable, "-m", f"emrrg.{name}", *map(str, words)],
            capture_output=True, text=True, env=environment, timeout=250, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = call("train", *data, *flags, "--output", run)
    assert "17 train, 4 val, 3 test studies (iu_xray)" in said
    said = call("evaluate", run, "--split", "val", "--bootstrap", 10)
    assert "4 pairs" in said
    study = next(r for r in records["test"] if len(r["image_path"]) > 1)
    said = call("generate", run, *(image / name for name in study["image_path"]), "--json")
    assert json.loads(said)["report"] is not None
