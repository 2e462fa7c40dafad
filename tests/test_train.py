"""The training command: what it leaves, exactness, regimes, chains of runs, recipes, errors."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import emrrg
from emrrg import convert
from emrrg import train as command
from emrrg.config import TrainConfig, parse_config, run_command
from emrrg.decoder import Decoder, DecoderConfig
from emrrg.evaluation import selection_score
from emrrg.jsonl import read_rows
from emrrg.model import ReportGenerator
from emrrg.optim import build_optimizer, learning_rate
from emrrg.recipes import suggest
from emrrg.runs import load_run, read_index, read_json, read_run_config, state_of
from emrrg.tokenizer import train_tokenizer
from emrrg.vision import VisionMamba

Train = Callable[..., int]
SAMPLE = Path(__file__).parents[1] / "../shared/data/xray-sample"
TINY_LLAMA = Path(__file__).parents[1] / "../shared/data/tiny-llama"
# LoRA with dropout, and drop path (0.1 by default) in an encoder that trains.
ADAPT = shlex.split("--regime peft --lora-targets X,Z,llm --lora-dropout 0.3 --peft bias --seed 7")


def weights(run: Path, which: str = "last") -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / read_index(run)[which] / "weights.safetensors")


def moments(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / read_index(run)["last"] / "optimizer.safetensors")


def numbers(run: Path) -> list[dict[str, Any]]:
    """What the log says, but for what the clock decides."""
    clocks = ("studies_per_second", "tokens_per_second", "memory_gib")
    rows = read_rows(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in clocks} for row in rows]


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
        "--epochs 1 --batch-size 2 --beams 1 --max-new-tokens 8 --log-every 1"
    )
    assert train(*flags.split(), "--output", run) == 0
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
    assert 0 < scores["seconds_outside_network"] < scores["seconds"]
    assert len(json.loads((run / "predictions.json").read_text())) == 4
    # The checkpoint holds what the paper's regime trains, and the base is the source's best.
    new = (".lora_X.", ".cross_attn.", "llama_proj.", "layer_norm.")
    assert all(any(part in name for part in new) for name in weights(run))
    base, before = load_file(run / "base" / "weights.safetensors"), weights(source, "best")
    assert_same_bits(base, {name: before[name] for name in base})
    for text in (
        "CPU with", "kernels: ", "trains: ", "adapters X", "12 train, 3 val, 4 test studies",
        "an epoch of 6 steps takes about", "ETA", "studies/s", "tokens/s", "GiB", "lr ",
        "before adaptation", "constant report", "outside the network",
        f"python -m emrrg.evaluate {run}",
    ):  # fmt: skip
        assert text in said, text


def test_what_was_saved_is_what_was_scored(trained: Path, brief: list[str]) -> None:
    predictions = json.loads((trained / "predictions.json").read_text())
    config = read_run_config(trained)
    from emrrg.data.loading import load_studies
    from emrrg.evaluation import write_reports

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


def test_a_second_interrupt_ends_at_once(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = command.training_step

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
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_can_go_on_for_more_epochs(
    train: Train, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    assert train("--resume", run, "--epochs", "3") == 0
    rows = [row for row in numbers(run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert read_index(run)["last"] == "step-000009"


def test_accumulated_batches_equal_one_batch(
    train: Train, small: list[str], tmp_path: Path
) -> None:
    plain = [*small, "--drop-path", "0"]
    for name, flags in (("one", []), ("two", ["--batch-size", "2", "--accumulate", "2"]),
                        ("uneven", ["--batch-size", "3"])):  # fmt: skip
        extra = ["--accumulate", "1"] if name == "uneven" else []
        assert train(*plain, *flags, *extra, "--output", tmp_path / name) == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=1e-4, msg=name)
    assert len(numbers(tmp_path / "uneven")) > len(numbers(tmp_path / "one"))
