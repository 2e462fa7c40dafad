"""The pointing game: regions, shares, chance and intervals by hand; the command on a run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from emrrg import pointing
from emrrg.config import ModelConfig, TrainConfig, to_dict
from emrrg.data.dataset import PhantomStudies
from emrrg.data.phantoms import draw_phantom
from emrrg.decoder import DecoderConfig
from emrrg.errors import InputError
from emrrg.heatmap import SentenceMap
from emrrg.model import ReportGenerator, set_regime
from emrrg.pointing import Pointed, main, measure, point, region
from emrrg.runs import save_base, save_checkpoint, write_json
from emrrg.tokenizer import train_tokenizer


def test_region_is_the_covered_share_of_each_patch():
    got = region([(0.25, 0.0, 0.625, 0.5)], 4)
    expected = np.zeros((4, 4))
    expected[:2, 1] = 1
    expected[:2, 2] = 0.5
    np.testing.assert_allclose(got, expected)
    # Two boxes together; where they overlap counts once.
    got = region([(0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75)], 2)
    np.testing.assert_allclose(got, [[1, 0.25], [0.25, 0.25]])


def pointed(study: int, kind: str, share: list[float], covered: list[float]) -> Pointed:
    return Pointed(study, kind, np.array([share, share]), 0.1, np.array(covered, float))


FOUND = [
    pointed(0, "Edema", [0.7, 0.1, 0.1, 0.1], [1, 0, 0, 0]),
    pointed(0, "Fracture", [0.1, 0.2, 0.3, 0.4], [0, 0, 0.4, 1]),
    pointed(1, "Edema", [0.2, 0.2, 0.2, 0.4], [0, 0.6, 0, 1]),
    pointed(2, "Edema", [0.25, 0.25, 0.25, 0.25], [0, 0, 1, 0]),
    pointed(4, "Pneumonia", [0.0, 0.0, 0.0, 1.0], [1, 1, 0, 0]),
]


def test_measures_by_hand():
    got = measure(FOUND, -1, 0, seed=1)
    attention = [0.7, 0.3 * 0.4 + 0.4, 0.2 * 0.6 + 0.4, 0.25, 0.0]
    area = [1 / 4, 1.4 / 4, 1.6 / 4, 1 / 4, 2 / 4]
    assert got["findings"] == 5
    assert got["attention"] == pytest.approx(np.mean(attention))
    assert got["area"] == pytest.approx(np.mean(area))
    assert got["ratio"] == pytest.approx(np.sum(attention) / np.sum(area))
    # Each edema's map on the regions of the two others; the other kinds have no other study.
    elsewhere = [(0.06 + 0.1 + 0.1) / 2, (0.2 + 0.2) / 2, (0.25 + 0.25 * 1.6) / 2]
    assert got["elsewhere"] == pytest.approx(np.mean(elsewhere))
    assert got["gain"] == pytest.approx(np.mean([0.7, 0.52, 0.25]) - np.mean(elsewhere))
    assert got["hits"] == pytest.approx(np.mean([1, 1, 1, 0, 0]))
    assert got["hits by chance"] == pytest.approx(np.mean([1, 2, 2, 1, 2]) / 4)
    assert "intervals" not in got


def test_permutations_give_the_share_that_reaches_the_attention():
    edema = [p for p in FOUND if p.observation == "Edema"]
    sums = [
        sum(float(p.maps[-1] @ edema[k].region) for p, k in zip(edema, order, strict=True))
        for order in itertools.permutations(range(3))
    ]
    expected = np.mean(np.array(sums) >= sums[0] - 1e-12)
    for found in (edema, FOUND):  # kinds of one study cannot be exchanged, and change nothing
        assert measure(found, -1, 0, seed=2)["p"] == pytest.approx(expected, abs=0.06)
    alone = measure([FOUND[1]], -1, 0, seed=2)
    assert alone["p"] is None and alone["elsewhere"] is None and alone["gain"] is None


def test_intervals_draw_studies_and_not_findings():
    """Two studies with two findings each: a resample has both findings of a study or neither."""
    found = [
        pointed(0, "Edema", [1.0, 0.0], [1, 0]),
        pointed(0, "Fracture", [1.0, 0.0], [1, 0]),
        pointed(1, "Edema", [0.0, 1.0], [1, 0]),
        pointed(1, "Fracture", [0.0, 1.0], [1, 0]),
    ]
    got = measure(found, -1, 2000, seed=3)
    assert got["attention"] == 0.5
    assert got["intervals"]["attention"] == [0.0, 1.0]
    assert got["intervals"]["area"] == [0.5, 0.5]
    many = [dataclasses.replace(p, study=4 * k + p.study) for k in range(50) for p in FOUND]
    low, high = measure(many, -1, 1000, seed=3)["intervals"]["attention"]
    assert low < np.mean([0.7, 0.52, 0.52, 0.25, 0.0]) < high < low + 0.2


def test_even_and_perfect_maps():
    rng = np.random.default_rng(0)
    regions = [region([(a, b, a + 0.4, b + 0.3)], 8).ravel() for a, b in rng.random((30, 2)) * 0.6]
    even = [pointed(k, "Edema", [1 / 64] * 64, r.tolist()) for k, r in enumerate(regions)]
    got = measure(even, -1, 0, seed=0)
    assert got["ratio"] == pytest.approx(1) and got["gain"] == pytest.approx(0, abs=1e-9)
    assert got["p"] == pytest.approx(1)
    perfect = [
        pointed(k, "Edema", ((r == 1) / (r == 1).sum()).tolist(), r.tolist())
        for k, r in enumerate(regions)
    ]
    got = measure(perfect, -1, 0, seed=0)
    assert got["attention"] == pytest.approx(1) and got["hits"] == 1
    assert got["gain"] > 0.3 and got["p"] == pytest.approx(0.001)


class Oracle:
    """Stands for `sentence_maps`: looks exactly where the findings are."""

    def __init__(self, studies: PhantomStudies) -> None:
        self.studies, self.seen = studies, 0

    def __call__(self, model, images, report):
        number = next(
            k for k, p in enumerate(self.studies.phantoms)
            if (images[0, 0].numpy() == p.image).all() and p.report == report
        )  # fmt: skip
        self.seen += 1
        told = {f.sentence: f for f in self.studies.phantoms[number].findings}
        maps = []
        for text in report.removesuffix(" .").split(" . "):
            grid = region(told[text].boxes, 8) if text in told else np.ones((8, 8))
            layers = np.stack([np.full((8, 8), 1 / 80), 0.8 * grid / grid.sum()])
            maps.append(SentenceMap(text, layers, np.array([0.2, 0.2])))
        return maps


def test_findings_meet_the_maps_of_their_sentences(monkeypatch):
    studies = PhantomStudies("test", 40, domain="target", size=64, seed=1)
    oracle = Oracle(studies)
    monkeypatch.setattr(pointing, "sentence_maps", oracle)
    found, unread = point(None, studies)  # type: ignore[arg-type]
    findings = [f for p in studies.phantoms for f in p.findings]
    assert unread == sum(not f.boxes for f in findings) and unread < 3
    assert len(found) == len(findings) - unread
    assert oracle.seen == sum(bool(p.findings) for p in studies.phantoms)
    for p in found:
        np.testing.assert_allclose(p.maps.sum(1), 1)
        np.testing.assert_allclose(p.maps[0], 1 / 64)
        np.testing.assert_allclose(p.maps[1], p.region / p.region.sum())
        np.testing.assert_allclose(p.maps[2], (p.maps[0] + p.maps[1]) / 2)
        assert p.class_token == pytest.approx(0.2)
    even, seeing, both = (measure(found, k, 0, seed=0) for k in range(3))
    assert even["ratio"] == pytest.approx(1)
    assert seeing["hits"] == 1 and seeing["gain"] > 0.2 and seeing["p"] == 0.001
    assert both["attention"] == pytest.approx((even["attention"] + seeing["attention"]) / 2)


def make_run(folder, hybrid_layers=(0, 2), **flags):
    """A run folder of a tiny model that was never trained."""
    reports = [draw_phantom(i, size=16).report for i in range(60)]
    tokenizer = train_tokenizer(reports, 200, folder / "tokenizer.model")
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        hybrid_layers=hybrid_layers,
    )
    torch.manual_seed(0)
    config = ModelConfig(image_size=64, dim=32, depth=1, decoder=decoder.to_dict())
    model = ReportGenerator(config, tokenizer)
    run = folder / "run"
    run.mkdir()
    settings = {"recipe": "phantoms", "dataset": "phantoms", "test_studies": 12, **flags}
    write_json(run / "config.json", to_dict(TrainConfig(**settings)))
    trained = set_regime(model, "full")
    save_base(run, model, trained)
    weights = {n: p.detach() for n, p in model.named_parameters() if n in trained}
    save_checkpoint(run, 1, weights, {}, {"step": 1}, best=True)
    return run


def test_command_on_a_run(tmp_path, capsys):
    run = make_run(tmp_path)
    target = tmp_path / "pointing.json"
    assert main([str(run), "--json", str(target), "--bootstrap", "50"]) == 0
    said = capsys.readouterr().out
    result = json.loads(target.read_text())
    phantoms = PhantomStudies("test", 12, domain="target", size=64, seed=42).phantoms
    findings = [f for p in phantoms for f in p.findings if f.boxes]
    assert result["studies"] == 12 and result["findings"] == len(findings)
    assert result["sentences not found"] == sum(not f.boxes for p in phantoms for f in p.findings)
    assert set(result["by layer"]) == {"layer 0", "layer 2", "all layers"}
    assert set(result["by observation"]) == {f.observation for f in findings}
    whole = result["by layer"]["all layers"]
    expected = np.mean([region(f.boxes, 4).mean() for f in findings])
    assert whole["area"] == pytest.approx(expected)
    assert whole["ratio"] == pytest.approx(1, abs=0.25)  # it never learned to look
    low, high = whole["intervals"]["ratio"]
    assert low <= whole["ratio"] <= high
    counted = sum(figures["findings"] for figures in result["by observation"].values())
    assert counted == len(findings)
    assert "teacher forcing" in said and "synthetic" in said and "all layers" in said
    line = next(row for row in said.splitlines() if row.startswith("all layers"))
    assert line.split()[2:4] == [str(len(findings)), f"{whole['attention']:.3f}"]


def test_number_of_studies_can_be_asked_for(tmp_path):
    run = make_run(tmp_path)
    for asked in ("3", "5"):
        target = tmp_path / f"{asked}.json"
        main([str(run), "--studies", asked, "--json", str(target), "--bootstrap", "0"])
        assert json.loads(target.read_text())["studies"] == int(asked)


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"hybrid_layers": ()}, [], "has no hybrid layers"),
        ({"dataset": "custom", "annotation": "a.json", "images": "x"}, [], "trained on custom"),
        ({}, ["--studies", "0"], "--studies: 0"),
        ({}, ["--bootstrap", "-1"], "--bootstrap: -1"),
    ],
)
def test_what_cannot_be_played_is_refused(tmp_path, changes, flags, message):
    run = make_run(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        main([str(run), *flags])


def test_a_wrong_folder_is_one_line_and_status_two(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "emrrg.pointing", str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert len(found.stderr.strip().splitlines()) == 1
    assert "nothing" in found.stderr and "Traceback" not in found.stderr
