"""Studies of several trainings: their cells, their table, and that done cells stay done."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emrrg import ablate
from emrrg.ablate import (
    STUDIES,
    AblateConfig,
    cells_of,
    main,
    markdown,
    run_cell,
    run_cells,
    stopped_by_signals,
    summarise,
)
from emrrg.config import TrainConfig, parse_config
from emrrg.errors import InputError
from emrrg.recipes import suggest

REFERENCES = ["there is cardiomegaly .", "there is a left pleural effusion .", "lungs are clear ."]
HIT = [*REFERENCES]
MISS = ["lungs are clear .", "lungs are clear .", "there is cardiomegaly ."]


def cell(reports: list[str], f1: float) -> dict[str, Any]:
    """What `read_cell` gives of a finished run."""
    rows = zip(reports, REFERENCES, strict=True)
    return {
        "scores": {"finding F1": f1, "BLEU-4": f1 / 2, "ROUGE-L": f1, "CIDEr": 2 * f1},
        "finding_interval": [f1 - 0.05, f1 + 0.05],
        "share": 0.05,
        "trainable": 1000,
        "seconds": 1.0,
        "predictions": [{"id": "x", "hypothesis": h, "reference": r} for h, r in rows],
    }


@pytest.mark.parametrize("study", list(STUDIES))
def test_every_cell_is_a_command_that_training_accepts(study: str) -> None:
    names = [c.name for c in STUDIES[study]]
    assert len(set(map(ablate.slug, names))) == len(names), "two cells share a folder"
    for setting in STUDIES[study]:
        flags = ["--recipe", "phantoms", *setting.flags]
        if study != "sight":
            flags += ["--init", "runs/base"]
        config, _ = parse_config(TrainConfig, flags, "emrrg.train", suggest)
        assert config.dataset == "phantoms"


def test_the_square_turns_one_thing_at_a_time() -> None:
    square = {}
    for setting in STUDIES["cross-attention"]:
        flags = ["--recipe", "phantoms", "--init", "runs/base", *setting.flags]
        config, _ = parse_config(TrainConfig, flags, "emrrg.train", suggest)
        square[setting.name] = (bool(config.lora_targets), bool(config.hybrid_every))
    assert square == {
        "both": (True, True),
        "Partial LoRA only": (True, False),
        "cross-attention only": (False, True),
        "neither": (False, False),
    }


def test_means_deviations_and_the_paired_test() -> None:
    summary = summarise({"a": [cell(HIT, 0.8), cell(HIT, 0.6)], "b": [cell(MISS, 0.2)] * 2})
    assert summary["a"]["finding F1"]["mean"] == pytest.approx(0.7)
    deviation = statistics.stdev([0.8, 0.6])
    assert summary["a"]["finding F1"]["deviation"] == pytest.approx(deviation)
    assert summary["a"]["against_first"] is None
    test = summary["b"]["against_first"]["finding F1"]
    assert test["difference"] == pytest.approx(-1.0)  # all findings right against none
    assert test["p_value"] < 0.05 and test["interval"][1] < 0
    text = markdown("rank", summary, [1, 2])
    assert "| a | 1,000 (5.00 %) | 0.700 ± 0.141 |" in text and "-1.000 (" in text
    assert "seeds 1, 2" in text


def test_other_test_studies_are_not_compared() -> None:
    other = cell(HIT, 0.5)
    other["predictions"] = other["predictions"][::-1]
    summary = summarise({"a": [cell(HIT, 0.8)], "b": [other]})
    assert summary["b"]["against_first"] is None
    assert summary["b"]["finding F1"]["deviation"] is None


def test_sight_says_whether_the_intervals_are_apart() -> None:
    apart = summarise({"seeing": [cell(HIT, 0.8)], "blind": [cell(MISS, 0.3)]})
    assert "0.750 to 0.850, 0.250 to 0.350: apart." in markdown("sight", apart, [42])
    near = summarise({"seeing": [cell(HIT, 0.8)], "blind": [cell(MISS, 0.75)]})
    assert "overlapping." in markdown("sight", near, [42])


def test_the_users_own_data_sets_are_cells() -> None:
    config = AblateConfig(study="dataset", data=("iu=a.json:images/iu",))
    assert cells_of(config)[-1].name == "iu"
    assert cells_of(config)[-1].flags[-4:] == ("--annotation", "a.json", "--images", "images/iu")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"train_flags": "--seed 3"}, "--train-flags: --seed"),
        ({"train_flags": "--output=x"}, "--train-flags: --output"),
        ({"jobs": 0}, "--jobs: 0"),
        ({"seeds": (1, 1)}, "--seeds"),
        ({"data": ("iu=a.json:b",)}, "--data: goes with --study dataset"),
        ({"study": "dataset", "data": ("iu",)}, "NAME=ANNOTATION:IMAGES"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        AblateConfig(**values)


def test_a_failed_cell_names_its_log(tmp_path: Path) -> None:
    with (
        stopped_by_signals() as train,
        pytest.raises(InputError, match=r"cell\.log: the training ended with status 2: .*--epochs"),
    ):
        run_cell(tmp_path / "cell", ["--epochs", "0"], None, train)


def commands(folder: Path) -> list[list[str]]:
    """What `fake_training` was called with."""
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.fixture
def fake_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let a short program stand for `emrrg.train`; it has `flags`, its `run`, and `done()`."""

    def use(body: str) -> None:
        program = tmp_path / "program.py"
        program.write_text(
            f"""import json, pathlib, signal, sys, time
flags = sys.argv[1:]
with open({str(tmp_path / "calls")!r}, "a") as file:
    print(json.dumps(flags), file=file)
run = pathlib.Path(flags[flags.index("--output" if "--output" in flags else "--resume") + 1])
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "config.json").write_text("{{}}")
def done():
    (run / "checkpoints" / "index.json").write_text(json.dumps({{"finished": True}}))
{body}
"""
        )
        launch = subprocess.Popen
        monkeypatch.setattr(
            ablate.subprocess,
            "Popen",
            lambda command, **kw: launch([sys.executable, str(program), *command[3:]], **kw),
        )

    return use


def test_a_cell_that_fails_stops_no_other(
    tmp_path: Path, fake_training: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fake_training("if 'blind' in run.name: sys.exit('no room')\ndone()")
    study = tmp_path / "study"
    flags = ["--study", "sight", "--seeds", "5", "--output", str(study)]
    with pytest.raises(
        InputError, match=r"blind-5\.log: the training ended with status 1: no room"
    ):
        main(flags)
    assert [Path(c[1]).name for c in commands(tmp_path)] == ["seeing-5", "blind-5"]
    # It left nothing to go on with, so that it starts anew, and with what is said now.
    with pytest.raises(InputError, match="no room"):
        main([*flags, "--train-flags", "--threads 1"])
    assert [c[0] for c in commands(tmp_path)] == ["--output"] * 3
    assert commands(tmp_path)[2][-3:] == ["--blind", "--seed", "5"]
    with pytest.raises(
        InputError, match=r"study holds cells with train_flags \[\], not \['--epochs"
    ):
        main([*flags, "--train-flags", "--epochs 1"])


def test_flags_of_the_base_are_not_given_to_cells(
    tmp_path: Path, fake_training: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_training("done()")
    monkeypatch.setattr(ablate, "read_cell", lambda run: cell(HIT, 0.5))
    monkeypatch.setattr(ablate, "summarise", lambda results: {})
    monkeypatch.setattr(ablate, "plot_ablation", lambda *_: None)
    flags = "--image-size 64 --epochs 1 --preset=base --drop-path 0"
    arguments = ["--study", "rank", "--seeds", "1", "--output", str(tmp_path / "study")]
    assert main([*arguments, "--train-flags", flags]) == 0
    base, first = commands(tmp_path)[:2]
    config = json.loads(Path(base[base.index("--config") + 1]).read_text())
    assert (config["image_size"], config["preset"], config["drop_path"]) == (64, "base", 0)
    assert first[2:] == [
        "--recipe", "phantoms", "--init", str(tmp_path / "study" / "base"), "--epochs", "1",
        "--lora-rank", "16", "--seed", "1",
    ]  # fmt: skip
    parse_config(TrainConfig, first, "emrrg.train", suggest)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_trainings_and_starts_no_more(
    tmp_path: Path,
    fake_training: Callable[[str], None],
    number: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="emrrg.ablate")
    fake_training(
        "def saved(*_):\n"
        "    (run / 'checkpoints' / 'index.json').write_text('{\"last\": \"step-1\"}')\n"
        "    sys.exit(130)\n"
        "if '--resume' in flags: done(); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, saved)\n"
        "(run / 'ready').touch()\n"
        "time.sleep(60)"
    )
    runs = [tmp_path / name for name in ("a", "b", "c", "d")]

    def wait_and_send() -> None:
        while not all((run / "ready").exists() for run in runs[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait_and_send)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), stopped_by_signals() as train:
        thread.start()
        run_cells([(run, []) for run in runs], 2, None, train)
    thread.join()
    assert time.monotonic() - start < 40
    assert [Path(c[1]).name for c in commands(tmp_path)] in (["a", "b"], ["b", "a"])
    assert sorted(m.partition(":")[0] for m in caplog.messages) == [str(r) for r in runs[:2]]
    assert all((run / "checkpoints" / "index.json").exists() for run in runs[:2])
    with stopped_by_signals() as train:
        run_cells([(run, ["--x"]) for run in runs[:2]], 1, None, train)
    assert [c[:2] for c in commands(tmp_path)[2:]] == [["--resume", str(r)] for r in runs[:2]]


def test_what_is_left_is_told_after_each_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Three cells of 90, 0 (done already) and 150 seconds, one that fails, and two to go."""
    caplog.set_level("INFO", logger="emrrg.ablate")
    now = [0.0]
    monkeypatch.setattr(ablate.time, "monotonic", lambda: now[0])

    def train_one(run: Path, *_: Any) -> bool:
        if run.name == "bad":
            raise InputError("bad: no room")
        now[0] += {"a": 90, "c": 150}.get(run.name, 120)
        return run.name != "b"

    monkeypatch.setattr(ablate, "run_cell", train_one)
    tasks: list[Any] = [(tmp_path / name, []) for name in ("a", "b", "bad", "c", "d", "e")]
    with pytest.raises(InputError, match="no room"):
        run_cells(tasks, 1, None, lambda *_: 0)
    assert caplog.messages == [
        "5 trainings left, about 7:30",
        "4 trainings left, about 6:00",
        "bad: no room",
        "2 trainings left, about 4:00",
        "1 trainings left, about 2:00",
    ]


def test_finished_cells_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("seeing-5", "blind-5"):
        checkpoints = tmp_path / name / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / "index.json").write_text(json.dumps({"finished": True}))
    monkeypatch.setattr(
        ablate, "read_cell", lambda run: cell(HIT, 0.9 if "see" in run.name else 0.1)
    )
    monkeypatch.setattr(
        ablate.subprocess, "Popen", lambda *_, **__: pytest.fail("it was run again")
    )
    assert main(["--study", "sight", "--seeds", "5", "--output", str(tmp_path)]) == 0
    assert "done already" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 1000
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["cells"]["blind"]["finding F1"]["values"] == [0.1]
    assert "apart" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_small_square_is_trained_and_resumed(tmp_path: Path) -> None:
    small = (
        "--source-studies 32 --train-studies 32 --val-studies 4 --test-studies 8 --source-epochs 1 "
        "--epochs 1 --image-size 64 --decoder-dim 32 --vocab-size 200 --max-new-tokens 8"
    )
    flags = ["--study", "cross-attention", "--seeds", "1,2", "--output", str(tmp_path)]
    assert main([*flags, "--train-flags", small, "--jobs", "2"]) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/scores.json")}
    assert len(before) == 9
    assert main([*flags, "--train-flags", small]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/scores.json")}
