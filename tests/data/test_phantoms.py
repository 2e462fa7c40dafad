"""Phantoms: reproducible, told as drawn, drawn where said, and a mix that must be looked at."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from threadpoolctl import threadpool_limits

from emrrg.data.dataset import PhantomStudies
from emrrg.data.phantom_cases import DOMAINS, RATES, Case, sample_cases, write_report
from emrrg.data.phantom_images import SIGN, Chest, Picture, View, draw
from emrrg.data.phantom_sheet import choose
from emrrg.data.phantoms import draw_phantom, main, phantom_split
from emrrg.data.r2gen import read_annotation
from emrrg.data.reports import clean_report
from emrrg.errors import InputError

# CheXpert's order, written out: the package takes it from its own table.
OBSERVATIONS = [
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
]  # fmt: skip
# Every form of every finding, alone.
FORMS = [
    Case("Enlarged Cardiomediastinum", "mediastinum", "central", "", ""),
    *(Case("Cardiomegaly", "heart", "central", "", s) for s in ("mild", "moderate", "severe")),
    *(
        Case("Lung Opacity", "opacity", side, zone, "")
        for side in ("right", "left")
        for zone in ("upper", "mid", "lower")
    ),
    Case("Lung Lesion", "nodule", "right", "mid", ""),
    Case("Lung Lesion", "nodule", "left", "lower", ""),
    Case("Lung Lesion", "mass", "left", "upper", ""),
    *(Case("Edema", "edema", "bilateral", "", s) for s in ("mild", "severe")),
    Case("Consolidation", "consolidation", "right", "lower", ""),
    Case("Consolidation", "consolidation", "left", "mid", ""),
    Case("Pneumonia", "pneumonia", "bilateral", "lower", ""),
    *(Case("Atelectasis", "atelectasis", s, "lower", "") for s in ("right", "left", "bilateral")),
    *(
        Case("Pneumothorax", "pneumothorax", side, "upper", s)
        for side, s in (("right", "small"), ("left", "moderate"), ("left", "large"))
    ),
    *(
        Case("Pleural Effusion", "effusion", side, "lower", s)
        for side, s in (("right", "small"), ("left", "large"), ("bilateral", "moderate"))
    ),
    *(Case("Pleural Other", "thickening", s, "upper", "") for s in ("right", "left")),
    *(Case("Fracture", kind, s, "", "") for kind in ("rib", "clavicle") for s in ("right", "left")),
    *(Case("Support Devices", "pacemaker", s, "", "") for s in ("right", "left")),
    *(Case("Support Devices", "catheter", s, "", "") for s in ("right", "left")),
    *(Case("Support Devices", kind, "central", "", "") for kind in ("tube", "feeding", "tubes")),
]


def form_name(case: Case) -> str:
    return "-".join(part for part in (case.kind, case.side, case.zone, case.severity) if part)


def cases_and_report(index: int, domain: str) -> tuple[list[Case], str]:
    """What a phantom has and says, without the drawing."""
    key = np.random.SeedSequence([42, DOMAINS.index(domain), index])
    chances = [np.random.default_rng(part) for part in key.spawn(2)]
    cases = sample_cases(chances[0], domain)
    return cases, write_report(cases, chances[1], domain)[0]


@pytest.fixture(scope="module")
def told() -> dict[str, list[tuple[list[Case], str]]]:
    return {domain: [cases_and_report(i, domain) for i in range(3000)] for domain in DOMAINS}


@pytest.fixture(scope="module")
def phantoms() -> list[object]:
    return [
        (domain, i, draw_phantom(i, domain=domain, size=96))
        for domain in DOMAINS
        for i in range(100)
    ]


def test_splits_share_nothing_and_grow():
    splits = [
        set(phantom_split(split, 500, domain="target", seed=1))
        for split in ("train", "val", "test")
    ]
    assert [len(s) for s in splits] == [500] * 3
    assert len(set.union(*splits)) == 1500
    short = phantom_split("val", 7, domain="source", seed=1)
    assert list(phantom_split("val", 30, domain="source", seed=1))[:7] == list(short)


def test_seed_domain_and_number_each_make_another_phantom():
    base = draw_phantom(3, domain="source", size=64, seed=1)
    for other in (
        draw_phantom(4, domain="source", size=64, seed=1),
        draw_phantom(3, domain="target", size=64, seed=1),
        draw_phantom(3, domain="source", size=64, seed=2),
    ):
        assert np.abs(other.image.astype(int) - base.image).mean() > 5


def fingerprint() -> str:
    digest = hashlib.sha256()
    for domain in DOMAINS:
        for i in range(6):
            phantom = draw_phantom(i, domain=domain, size=80, seed=7)
            digest.update(phantom.image.tobytes())
            digest.update(repr((phantom.report, phantom.labels, phantom.findings)).encode())
    return digest.hexdigest()


def test_another_process_draws_the_same():
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_phantoms; print(test_phantoms.fingerprint())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "2"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == fingerprint()


PINNED = {
    ("source", 0): (
        "the heart size is within normal limits . there is severe pulmonary edema . there is "
        "linear atelectasis at both bases . no pneumothorax or pleural effusion . the bones are "
        "intact .",
        ["Edema", "Atelectasis"],
        123.23,
    ),
    ("source", 7): (
        "the heart is normal in size . the lungs are clear . no pneumothorax or pleural effusion .",
        ["No Finding"],
        109.90,
    ),
    ("target", 1): (
        "heart size is normal . bilateral multifocal pneumonia . no pneumothorax or pleural "
        "effusion .",
        ["Pneumonia"],
        134.77,
    ),
    ("target", 12): (
        "heart size is normal . right basilar atelectasis . left pleural effusion which is large "
        "in size . no pneumothorax . displaced left clavicle fracture . right chest wall pacemaker "
        "with intact leads .",
        ["Atelectasis", "Pleural Effusion", "Fracture", "Support Devices"],
        121.71,
    ),
}


def test_phantoms_stay_what_they_were():
    """Figures in the documents were measured on these: a change here is a change of data."""
    for (domain, index), (report, positive, grey) in PINNED.items():
        phantom = draw_phantom(index, domain=domain, size=128)
        assert phantom.report == report
        assert [name for name, value in phantom.labels.items() if value] == positive
        assert phantom.image.mean() == pytest.approx(grey, abs=0.5)


def test_reports_are_in_r2gens_form(told):
    for domain in DOMAINS:
        for _, report in told[domain]:
            dictated = ". ".join(s.capitalize() for s in report[:-2].split(" . ")) + "."
            assert clean_report(dictated, "iu_xray") == report
            assert clean_report(dictated, "mimic_cxr") == report


def test_reports_are_short_varied_and_of_few_words(told):
    for domain in DOMAINS:
        reports = [report for _, report in told[domain]]
        lengths = [len(report.split()) for report in reports]
        assert min(lengths) >= 10 and max(lengths) <= 64
        assert 25 <= np.mean(lengths) <= 35
        sentences = Counter(report.count(" .") for report in reports)
        assert set(sentences) <= set(range(3, 9))
        assert sum(sentences[n] for n in range(3, 7)) > 0.95 * len(reports)
        assert len(set(reports)) > 0.6 * len(reports)
        assert len({word for report in reports for word in report.split()}) < 200


# A labeler by key words and simple negation, written for this test alone.
KEYS = {
    "Enlarged Cardiomediastinum": r"mediastin",
    "Cardiomegaly": r"\bheart\b|cardiomegaly|cardiac silhouette",
    "Lung Opacity": r"opacity",
    "Lung Lesion": r"nodule|mass",
    "Edema": r"edema",
    "Consolidation": r"consolidation",
    "Pneumonia": r"pneumonia",
    "Atelectasis": r"atelectasis",
    "Pneumothorax": r"pneumothorax",
    "Pleural Effusion": r"effusion",
    "Pleural Other": r"pleural thickening",
    "Fracture": r"fracture",
    "Support Devices": r"pacemaker|tube|catheter",
}
NEGATIVE = re.compile(r"^(no|there is no)\b|\bnormal\b|\bclear\b|\bbones are intact\b")


def read_labels(report: str) -> dict[str, int]:
    labels = dict.fromkeys(OBSERVATIONS, 0)
    for sentence in report.removesuffix(" .").split(" . "):
        found = [name for name, key in KEYS.items() if re.search(key, sentence)]
        if not NEGATIVE.search(sentence):
            assert len(found) == 1, f"{sentence!r} tells {found}"
            assert labels[found[0]] == 0, f"{found[0]} is told twice: {report}"
            labels[found[0]] = 1
        for name in found:
            assert NEGATIVE.search(sentence) is None or labels[name] == 0, (
                f"contradiction: {report}"
            )
    pathology = set(OBSERVATIONS[1:-1])
    labels["No Finding"] = int(not any(labels[name] for name in pathology))
    return labels


def test_labels_are_what_the_report_says(phantoms):
    for domain, index, phantom in phantoms:
        assert list(phantom.labels) == OBSERVATIONS
        assert phantom.labels == read_labels(phantom.report), (domain, index, phantom.report)
        assert {f.observation for f in phantom.findings} == {
            name for name, value in phantom.labels.items() if value and name != "No Finding"
        }


def test_every_form_is_told_by_one_sentence_of_its_own():
    for case in FORMS:
        for domain in DOMAINS:
            for seed in range(30):
                report, told = write_report([case], np.random.default_rng(seed), domain)
                sentence = told[case.observation]
                assert f". {sentence} ." in f". {report}"
                assert "{" not in report and "  " not in report
                labels = read_labels(report)
                assert [n for n in OBSERVATIONS[1:] if labels[n]] == [case.observation]
                if case.side != "central":
                    sides = {"bilateral": "bilateral|both|bibasilar|perihilar|pulmonary edema"}
                    assert re.search(sides.get(case.side, case.side), sentence)
                if case.zone in ("mid", "lower") and case.kind in ("opacity", "nodule", "mass"):
                    assert case.zone in sentence
                if case.severity:
                    assert case.severity in sentence


def f1_of_constant(truth: np.ndarray, constant: np.ndarray) -> float:
    """Micro F1 over the observations."""
    both = (truth & constant).sum()
    return 2 * both / (truth.sum() + constant.sum() * len(truth))


def test_mix_of_findings(told):
    rates = {}
    for domain in DOMAINS:
        found = [{case.observation for case in cases} for cases, _ in told[domain]]
        truth = np.array([[name in names for name in RATES] for names in found])
        rates[domain] = truth.mean(0)
        assert 1.5 <= truth.sum(1).mean() <= 2.5
        assert truth.sum(1).max() <= 4
        assert rates[domain].max() <= 0.45
        assert rates[domain].min() >= 0.04
        assert 0.1 <= (truth.sum(1) == 0).mean() <= 0.25
        # No report that is the same for all comes near one that looks.
        best = max(f1_of_constant(truth, row) for row in np.unique(truth, axis=0))
        assert best < 0.42
    assert np.abs(rates["source"] - rates["target"]).sum() > 0.4


def test_hospitals_write_differently(told):
    """Half the phrases of a hospital are rare in the other; no word is foreign to it."""
    counts = {
        domain: Counter(s for _, report in told[domain] for s in report.split(" . "))
        for domain in DOMAINS
    }
    share = sum(min(counts["source"][s], counts["target"][s]) for s in counts["source"])
    assert 0.1 < share / sum(counts["source"].values()) < 0.6
    words = [{w for s in counts[domain] for w in s.split()} for domain in DOMAINS]
    assert words[0] == words[1]


def pair(case: Case, domain: str, size: int, seed: int):
    """The same patient with and without a finding, and the boxes of the finding."""

    def chances() -> list[np.random.Generator]:
        return [np.random.default_rng([seed, k]) for k in range(3)]

    image, boxes = draw([case], domain, size, *chances())
    healthy, none = draw([], domain, size, *chances())
    assert none == {}
    return image.astype(int), healthy.astype(int), boxes[case.observation]


def inside(boxes, size: int) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        mask[round(top * size) : round(bottom * size), round(left * size) : round(right * size)] = 1
    return mask


@pytest.mark.parametrize("case", FORMS, ids=form_name)
def test_a_finding_is_seen_where_it_is_said_to_be(case):
    for domain, size, seed in (("source", 224, 1), ("target", 128, 2), ("target", 128, 3)):
        image, healthy, boxes = pair(case, domain, size, seed)
        assert len(boxes) == (2 if case.side == "bilateral" or case.kind == "tubes" else 1)
        change = np.abs(image - healthy)
        where = inside(boxes, size)
        assert change[where].mean() > 4 * change[~where].mean()
        strong = np.quantile(change[where], 0.97)  # a wire covers little of its box
        assert strong > 12, f"{domain} {size}: hardly seen"  # noise is about 5 grey levels
        assert where.mean() < 0.35
        # The patient's left is at the image's right.
        if case.side in SIGN and case.kind != "catheter":
            middle = np.mean([(left + right) / 2 for left, _, right, _ in boxes])
            assert (middle - 0.5) * SIGN[case.side] > 0.03
        heights = {"upper": (0, 0.45), "mid": (0.38, 0.6), "lower": (0.5, 0.85)}
        if case.zone and case.kind not in ("pneumothorax", "effusion", "pneumonia"):
            middle = np.mean([(top + bottom) / 2 for _, top, _, bottom in boxes])
            low, high = heights[case.zone]
            assert low < middle < high


def test_signs_have_the_right_shade():
    """Fluid, masses and bone are brighter than lung; free air is darker, its line brighter."""
    for kind, sign in (("effusion", 1), ("mass", 1), ("pneumothorax", -1)):
        case = next(c for c in FORMS if c.kind == kind)
        image, healthy, boxes = pair(case, "source", 224, 5)
        change = (image - healthy)[inside(boxes, 224)]
        assert np.sign(np.median(change[np.abs(change) > 12])) == sign
    assert (change > 20).sum() > 50  # the pleural line


@pytest.mark.parametrize("severity", [None, "mild", "moderate", "severe"])
def test_cardiothoracic_ratio(severity):
    low, high = {
        None: (0.38, 0.49), "mild": (0.54, 0.61), "moderate": (0.6, 0.68), "severe": (0.67, 0.76)
    }[severity]  # fmt: skip
    for seed in range(10):
        rng = np.random.default_rng(seed)
        cases = {}
        if severity:
            cases["Cardiomegaly"] = Case("Cardiomegaly", "heart", "central", "", severity)
        view, chest = View(256, np.random.default_rng(seed)), Chest(cases, rng)
        heart = Picture(view, chest, rng).heart > 0.5
        ratio = np.ptp(view.x[heart]) / (chest.half["left"] + chest.half["right"])
        assert low < ratio < high
        assert ratio == pytest.approx(chest.ratio, abs=0.015)
        assert view.x[heart].max() > -1.5 * view.x[heart].min()  # most of it lies on the left


@pytest.mark.parametrize("size", [16, 64, 130, 448])
def test_size_changes_nothing_but_the_pixels(size):
    for index in range(6):
        base, other = draw_phantom(index, size=224), draw_phantom(index, size=size)
        assert other.image.shape == (size, size) and other.image.dtype == np.uint8
        assert other.report == base.report and other.labels == base.labels
        if size < 64:
            continue
        coarse = [
            np.asarray(Image.fromarray(p.image).resize((16, 16), Image.Resampling.BOX)).ravel()
            for p in (base, other)
        ]
        assert np.corrcoef(coarse)[0, 1] > 0.99
        for a, b in zip(base.findings, other.findings, strict=True):
            np.testing.assert_allclose(a.boxes, b.boxes, atol=3 / min(size, 224))


def test_images_use_the_scale_and_hospitals_differ(phantoms):
    noise = {}
    for domain in DOMAINS:
        images = np.stack([p.image for d, _, p in phantoms if d == domain]).astype(float)
        assert 70 < images.mean() < 150
        assert (images == 255).mean() < 0.03
        # A patch of plain soft tissue below the diaphragm, its slow part removed.
        patch = images[:, 82:90, 14:26]
        noise[domain] = (patch - patch.mean((1, 2), keepdims=True)).std()
    assert noise["target"] > 1.2 * noise["source"]


def test_data_set_hands_out_the_same_phantoms():
    studies = PhantomStudies("val", 3, domain="source", size=64, seed=9)
    numbers = phantom_split("val", 3, domain="source", seed=9)
    for k, number in enumerate(numbers):
        expected = draw_phantom(number, domain="source", size=64, seed=9)
        assert (studies[k].images.numpy() == expected.image).all()
        assert studies[k].report == expected.report
        assert studies[k].findings == expected.findings


@pytest.mark.slow
def test_hundred_images_a_second():
    draw_phantom(0)
    rates = []
    with threadpool_limits(1, "blas"):  # as the processes that draw have it
        for _ in range(5):
            started = time.process_time()
            for i in range(50):
                draw_phantom(i)
            rates.append(50 / (time.process_time() - started))
    assert max(rates) >= 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: phantom_split("training", 1, domain="source", seed=1), "split 'training'"),
        (lambda: phantom_split("train", -1, domain="source", seed=1), "count: -1"),
        (lambda: phantom_split("train", 1, domain="home", seed=1), "domain 'home'"),
        (lambda: phantom_split("train", 1, domain="source", seed=-1), "seed: -1"),
        (lambda: draw_phantom(-1), "index: -1"),
        (lambda: draw_phantom(0, size=8), "size: 8"),
        (lambda: main([]), "give either --contact-sheet"),
        (lambda: main(["--contact-sheet", "a.jpg"]), "does not end in .png"),
        (lambda: main(["--export", "x", "--studies", "0"]), "--studies: 0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=re.escape(message)):
        call()


def test_export_is_a_data_set(tmp_path):
    assert main(["--export", str(tmp_path), "--studies", "2", "--size", "64", "--seed", "3"]) == 0
    records = read_annotation(tmp_path / "annotation.json", tmp_path / "images")
    assert {split: len(rows) for split, rows in records.items()} == dict.fromkeys(records, 2)
    record = records["test"][1]
    phantom = draw_phantom(5, size=64, seed=3)
    assert record.report == phantom.report and record.labels == phantom.labels
    assert record.attributes["synthetic"] is True
    with Image.open(record.images[0]) as image:
        assert (np.asarray(image) == phantom.image).all()
        assert "Synthetic" in image.info["Comment"]


def test_contact_sheet_shows_every_finding(tmp_path):
    for domain in DOMAINS:
        shown = {f.observation for _, p in choose(domain, 8, 32, 42) for f in p.findings}
        assert shown == set(RATES)
    path = tmp_path / "sheet.png"
    assert main(["--contact-sheet", str(path), "--studies", "4", "--size", "64"]) == 0
    with Image.open(path) as image:
        assert min(image.size) > 500


def test_command_ends_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    found = subprocess.run(
        [sys.executable, "-m", "emrrg.data.phantoms", "--export", str(tmp_path / "file")],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2
    assert len(found.stderr.strip().splitlines()) == 1 and "file" in found.stderr
