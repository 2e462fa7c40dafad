"""Studies of several trainings: their cells, their table, and that done cells stay done."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from emrrg import ablate
from emrrg.ablate import STUDIES, AblateConfig, cells_of, main, markdown, run_cell, summarise
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
    with pytest.raises(
        InputError, match=r"cell\.log: the training ended with status 2: .*--epochs"
    ):
        run_cell(tmp_path / "cell", ["--epochs", "0"], None)


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
    monkeypatch.setattr(ablate.subprocess, "run", lambda *_, **__: pytest.fail("it was run again"))
    assert main(["--study", "sight", "--seeds", "5", "--output", str(tmp_path)]) == 0
    assert "done already" in capsys.readouterr().out
    assert (tmp_path / "figure.png").stat().st_size > 1000
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["cells"]["blind"]["finding F1"]["values"] == [0.1]
    assert "apart" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
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
