"""`python -m emrrg.data check`: every kind of fault is found, and nothing else."""

from __future__ import annotations

import html.parser
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emrrg.data.__main__ import main
from emrrg.data.check_page import check_page
from emrrg.data.checking import Findings, check
from emrrg.errors import InputError

SHARED = Path(__file__).parents[2] / "../shared/data"


def chest(seed: int, height: int = 90, width: int = 80) -> np.ndarray:
    """(H, W): dark beside, bright in the middle, noisy."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(10, 60, (height, width))
    pixels[:, width // 3 : width * 2 // 3] += 150
    return pixels.astype(np.uint8)


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """A data set with one fault of each kind."""
    folder = tmp_path / "images"
    folder.mkdir()
    for k in range(4):
        Image.fromarray(chest(k)).save(folder / f"good{k}.png")
    Image.fromarray(255 - chest(5)).save(folder / "inverted.png")
    Image.fromarray(chest(6, 30, 30)).save(folder / "tiny.png")
    Image.fromarray(chest(7, 70, 400)).save(folder / "long.png")
    Image.fromarray(np.full((80, 80), 128, np.uint8)).save(folder / "blank.png")
    colour = np.stack([chest(8), chest(8) // 2, chest(8) // 4], axis=-1)
    Image.fromarray(colour).save(folder / "colour.png")
    Image.fromarray(chest(9)).convert("CMYK").save(folder / "print.jpg")
    Image.fromarray(chest(0)).save(folder / "twin.bmp")
    whole = (folder / "good1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])

    def record(name: str, *images: str, **fields: Any) -> dict[str, Any]:
        report = f"Report of {name}."
        return {"id": name, "report": report, "image_path": list(images), **fields}

    content = {
        "train": [
            record("a", "good0.png", patient="p1"),
            record("b", "good1.png", "cut.png"),
            record("c", "inverted.png"),
            record("d", "tiny.png"),
            record("e", "long.png"),
            record("f", "blank.png"),
            record("g", "colour.png"),
            record("h", "print.jpg"),
            record("i", "missing.png"),
            record("k", "good2.png", report=" "),
            record("l", "good2.png", report="Normal."),
            {"id": "m", "report": "No images."},
        ],
        "test": [
            record("a", "good3.png", patient="p1"),
            record("n", "twin.bmp", report="report of  A."),
            record("o", "good1.png"),
        ],
    }
    (tmp_path / "annotation.json").write_text(json.dumps(content))
    return tmp_path


EXPECTED = {
    ("error", "malformed record", "train[11] (m)"),
    ("error", "duplicate id", "test[0] (a)"),
    ("error", "missing image", "train[8] (i)"),
    ("error", "unreadable image", "train[1] (b)"),
    ("error", "empty report", "train[9] (k)"),
    ("warning", "report of one or two words", "train[10] (l)"),
    ("warning", "image used twice", "train[10] (l)"),
    ("warning", "looks inverted (air white)", "train[2] (c)"),
    ("warning", "absurd size: a side of less than 64 pixels", "train[3] (d)"),
    ("warning", "absurd size: one side more than 3 times the other", "train[4] (e)"),
    ("warning", "blank: hardly any contrast", "train[5] (f)"),
    ("warning", "wrong mode: a coloured picture", "train[6] (g)"),
    ("warning", "wrong mode: for print (CMYK)", "train[7] (h)"),
    ("warning", "same patient across splits", "train and test"),
    ("warning", "same report across splits", "train and test"),
    ("warning", "same picture across splits", "test[1] (n)"),
    ("warning", "same picture across splits", "test[2] (o)"),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_every_fault_is_found_and_no_other(workers: int, faulty: Path) -> None:
    findings = check(faulty / "annotation.json", faulty / "images", workers=workers)
    assert {(p.severity, p.kind, p.where) for p in findings.problems} == EXPECTED
    assert len(findings.problems) == len(EXPECTED)
    assert findings.records == {"train": 12, "val": 0, "test": 3}
    assert findings.errors == 5


@pytest.mark.skipif(not SHARED.exists(), reason="the sample data is not there")
def test_the_sample_has_two_blue_photographs(tmp_path: Path) -> None:
    sample = SHARED / "xray-sample"
    findings = check(sample / "annotation.json", sample / "images", workers=2)
    assert [(p.severity, p.kind, Path(p.path).name) for p in findings.problems] == [
        ("warning", "wrong mode: a coloured picture", "000005-5-a.jpg"),
        ("warning", "wrong mode: a coloured picture", "000005-5-b.jpg"),
    ]


@pytest.mark.skipif(not SHARED.exists(), reason="the IU X-ray split is not there")
def test_r2gens_split_repeats_reports(tmp_path: Path) -> None:
    file = SHARED / "openi/r2gen_iu_xray_annotation.json"
    findings = check(file, tmp_path)
    said = [p.detail for p in findings.problems if p.kind == "same report across splits"]
    assert "274 of 590 reports of test (46%) stand word for word in train" in said
    assert sum(p.kind == "missing image" for p in findings.problems) == 5910


class Tags(html.parser.HTMLParser):
    """Counts elements and collects what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_command_writes_page_and_list(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(
        ["check", str(faulty / "annotation.json"), "--images", str(faulty / "images"),
         "--output", str(tmp_path / "out"), "--workers", "2"]
    )  # fmt: skip
    assert status == 1
    said = capsys.readouterr().out
    assert "5 errors, 12 warnings" in said and "train[8] (i)" in said
    problems = json.loads((tmp_path / "out/problems.json").read_text())
    assert {(p["severity"], p["kind"], p["where"]) for p in problems} == EXPECTED
    tags = Tags()
    tags.feed((tmp_path / "out/check.html").read_text())
    assert tags.count["figure"] == 13 and tags.count["img"] == 11  # all but missing and cut
    assert all(source.startswith("data:image/jpeg;base64,") for source in tags.sources)
    assert "script" not in tags.count


def test_page_escapes_what_the_data_says(tmp_path: Path) -> None:
    findings = Findings(records={"train": 1})
    page = check_page(findings, "<script>alert(1)</script>")
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_page_says_the_shortest_and_longest_report() -> None:
    page = check_page(Findings(records={"train": 3}, words=[3, 54, 7]), "x")
    assert "Length of reports: 3 to 54 words, median 7" in page


def test_nothing_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(chest(1)).save(tmp_path / "a.png")
    content = {"val": [{"id": "a", "report": "All is well.", "image_path": ["a.png"]}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert main(["check", str(tmp_path / "a.json"), "--images", str(tmp_path)]) == 0
    assert "0 errors, 0 warnings" in capsys.readouterr().out


def test_unusable_input_is_one_line_and_status_2(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        main(["check", "a.json", "--images", str(tmp_path / "none")])
    with pytest.raises(InputError, match="expected prepare or check"):
        main(["chek"])
    result = subprocess.run(
        [sys.executable, "-m", "emrrg.data", "check", "none.json", "--images", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 2
    assert result.stderr == "emrrg.data: error: none.json: no such file\n"
