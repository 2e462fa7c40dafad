"""The annotation file: what is read, and how each kind of mistake is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from emrrg.data.r2gen import read_annotation
from emrrg.errors import InputError

SHARED = Path(__file__).parents[2] / "../shared/data"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images a.png and b.png."""
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    return tmp_path


def write(folder: Path, content: Any) -> Path:
    file = folder / "annotation.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def record(**changes: Any) -> dict[str, Any]:
    """A good record, changed; None takes a field away."""
    entry = {"id": "s1", "report": "Clear.", "image_path": ["a.png"], "split": "train", **changes}
    return {k: v for k, v in entry.items() if v is not None}


def test_every_field_arrives(folder: Path) -> None:
    content = {
        "train": [record(image_path=["a.png", "b.png"], view=["PA", "L"], age=61)],
        "test": [record(id=7, split=None, labels={"Edema": 1, "Fracture": -1, "No Finding": None})],
    }
    splits = read_annotation(write(folder, content), folder)
    (train,), val, (test,) = splits["train"], splits["val"], splits["test"]
    assert (train.id, train.report, train.split) == ("s1", "Clear.", "train")
    assert train.images == (folder / "a.png", folder / "b.png")
    assert train.labels is None and train.attributes == {"view": ["PA", "L"], "age": 61}
    assert val == []
    assert (test.id, test.split) == ("7", "test")
    assert test.labels == {"Edema": 1, "Fracture": -1, "No Finding": None}


@pytest.mark.skipif(not SHARED.exists(), reason="the sample data is not there")
def test_the_sample_is_read() -> None:
    sample = SHARED / "xray-sample"
    splits = read_annotation(sample / "annotation.json", sample / "images")
    assert {k: len(v) for k, v in splits.items()} == {"train": 17, "val": 4, "test": 3}
    assert sorted({len(r.images) for r in splits["train"]}) == [1, 2, 3]


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (record(id=None), "no 'id'"),
        (record(report=None), "no 'report'"),
        (record(image_path=None), "no 'image_path'"),
        (record(id=""), "'id' must be a non-empty string, not an empty string"),
        (record(id=["s1"]), "'id' must be a non-empty string, not a list"),
        (record(report=3), "'report' must be a string, not a number"),
        (record(report=" \n"), "empty report"),
        (record(image_path=[]), "'image_path' is empty"),
        (
            record(image_path={"0": "a.png"}),
            "'image_path' must be a list of strings, not an object",
        ),
        (record(image_path=["a.png", 4]), "'image_path' holds a number"),
        (record(image_path=["a.png", ""]), "'image_path' holds an empty string"),
        (record(image_path=["a.png", "missing.png"]), "missing.png: no such file"),
        (record(split="validate"), "unknown split 'validate'"),
        (record(split="test"), "its 'split' is 'test', but it stands under 'train'"),
        (record(labels=["Edema"]), "'labels' must be an object"),
        (record(labels={"Edema": 2}), "'labels' must be 1, 0, -1 or null"),
        (record(id="good"), "id 'good' is also that of train[0]"),
        ("s1", "must be an object, not a string"),
        (None, "must be an object, not null"),
    ],
)
def test_a_bad_record_is_named(bad: Any, says: str, folder: Path) -> None:
    content = {"train": [record(id="good"), bad]}
    with pytest.raises(InputError) as caught:
        read_annotation(write(folder, content), folder)
    message = str(caught.value)
    assert says in message and "annotation.json" in message and "train[1]" in message
    if isinstance(bad, dict) and bad.get("id") == "s1":
        assert "(s1)" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([record()], "an annotation is an object with the keys train, val and test, not a list"),
        ({"train": {"s1": {}}}, "'train' must be a list of records, not an object"),
        ({"train": [], "valid": []}, "unknown split 'valid'"),
        ({}, "no split"),
        ('{"train": [', "not JSON: line 1"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_annotation_is_refused(content: Any, says: str, folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_annotation(write(folder, content), folder)
    assert says in str(caught.value) and "annotation.json" in str(caught.value)


def test_missing_file_and_folder_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        read_annotation(folder / "none.json", folder)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        read_annotation(write(folder, {"train": [record()]}), folder / "nowhere")
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="UTF-8"):
        read_annotation(folder / "binary.json", folder)


def test_many_bad_records_are_counted(folder: Path) -> None:
    content = {"train": [record(id=f"s{i}", report=None) for i in range(12)]}
    with pytest.raises(InputError, match=r"12 bad records: .*train\[4\].*; and 7 more"):
        read_annotation(write(folder, content), folder)


def test_checks_can_be_left_out(folder: Path) -> None:
    content = {"test": [record(split="test", report="", image_path=["x.png"])]}
    file = write(folder, content)
    splits = read_annotation(file, folder, check_files=False, allow_empty_reports=True)
    assert splits["test"][0].images == (folder / "x.png",)
