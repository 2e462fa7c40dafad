"""The annotation file of R2Gen, which every other source is turned into.

    {"train": [{"id": "CXR1", "report": "...", "image_path": ["CXR1/0.png", ...],
                "split": "train"}, ...], "val": [...], "test": [...]}

``image_path`` is relative to the images folder; a study may have any number of views. ``split``
inside a record may be left out. ``labels`` (CheXpert observation to 1, 0, -1 or null) is known
here; any further field is kept as an attribute of the record.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emrrg.data.records import POSITIONS, SPLITS, Dropped, Record, SourceStudy, View
from emrrg.errors import InputError

KNOWN = {"id", "report", "image_path", "split", "labels"}
PATIENT_FIELDS = ("patient", "patientid", "patient_id", "subject_id")
TEXTS = ("findings", "impression", "indication", "comparison")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
SHOWN = 5  # bad records spelled out in an error message; the rest are counted


def read_annotation(
    path: str | Path,
    images_dir: str | Path,
    *,
    check_files: bool = True,
    allow_empty_reports: bool = False,
) -> dict[str, list[Record]]:
    """Read an annotation file, and refuse it as a whole if any record is wrong.

    Args:
        path: the JSON file.
        images_dir: folder that the image paths are relative to.
        check_files: also see that every image file is there (it is not opened).
        allow_empty_reports: accept records without text (a list of images to describe).
    Returns:
        ``train``, ``val`` and ``test`` to their records, in the order of the file; a split that
        the file lacks is an empty list.
    Raises:
        InputError: the file cannot be read, or records are wrong; the message names each of the
            first five by split, index and id, and says how many more there are.
    """
    path, images_dir = Path(path), Path(images_dir)
    if check_files and not images_dir.is_dir():
        raise InputError(f"images folder {images_dir}: no such folder")
    splits: dict[str, list[Record]] = {split: [] for split in SPLITS}
    bad: list[str] = []
    for where, problems, record in scan_annotation(path, images_dir):
        if record is not None and check_files:
            problems = problems + [f"image {p}: no such file" for p in missing_images(record)]
        if record is not None and not record.report.strip() and not allow_empty_reports:
            problems = [*problems, "empty report"]
        if problems:
            bad.append(f"{where}: {', '.join(problems)}")
        elif record is not None:
            splits[record.split].append(record)
    if bad:
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        count = "1 bad record" if len(bad) == 1 else f"{len(bad)} bad records"
        raise InputError(f"{path}: {count}: {'; '.join(bad[:SHOWN])}{more}")
    return splits


def scan_annotation(path: Path, images_dir: Path) -> Iterator[tuple[str, list[str], Record | None]]:
    """Go through an annotation file without stopping at what is wrong.

    Args:
        path: the JSON file.
        images_dir: folder that the image paths are relative to.
    Yields:
        For each record: where it stands (``train[3] (CXR12)``), what is wrong with its form, and
        the record, or None if it cannot be made into one. Files are not looked at.
    Raises:
        InputError: the file is no annotation at all.
    """
    content = load_json(path)
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: an annotation is an object with the keys train, val and test, "
            f"not {_kind(content)}"
        )
    unknown = sorted(set(content) - set(SPLITS))
    if unknown:
        raise InputError(
            f"{path}: unknown split {unknown[0]!r}; the splits are train, val and test"
        )
    if not content:
        raise InputError(f"{path}: no split in it; expected train, val and test")
    seen: dict[str, str] = {}
    for split in SPLITS:
        entries = content.get(split, [])
        if not isinstance(entries, list):
            raise InputError(f"{path}: {split!r} must be a list of records, not {_kind(entries)}")
        for index, entry in enumerate(entries):
            where = f"{split}[{index}]"
            if not isinstance(entry, dict):
                yield where, [f"must be an object, not {_kind(entry)}"], None
                continue
            if isinstance(entry.get("id"), str | int):
                where = f"{where} ({entry['id']})"
            form = _form(entry, split)
            problems = list(form)
            identity = str(entry.get("id"))
            if "id" in entry and identity in seen:
                problems.append(f"id {identity!r} is also that of {seen[identity]}")
            seen.setdefault(identity, f"{split}[{index}]")
            yield where, problems, None if form else _record(entry, split, images_dir)


def studies(path: Path, images_dir: Path | None = None) -> Iterator[SourceStudy | Dropped]:
    """Read an annotation file as a source, to drop what is wrong in it or to divide it anew.

    Args:
        path: the JSON file.
        images_dir: not looked at here.
    Yields:
        One study a record, in the order of the file; `Dropped` with the reason for a bad one.
    Raises:
        InputError: the file is no annotation at all.
    """
    for where, problems, record in scan_annotation(path, Path()):
        if problems or record is None:
            yield Dropped(where, problems[0])
            continue
        attributes = dict(record.attributes)
        patient = next((attributes.pop(n) for n in PATIENT_FIELDS if attributes.get(n)), None)
        position = attributes.pop("view", [])
        given = position if isinstance(position, list) else [position]
        if len(given) != len(record.images):
            given = [""] * len(record.images)
        known = {str(p).upper(): str(p).upper() for p in POSITIONS} | {"L": "LATERAL"}
        texts = {name: attributes.pop(name) for name in TEXTS if name in attributes}
        yield SourceStudy(
            id=record.id,
            sections={
                **{k: v for k, v in texts.items() if isinstance(v, str)},
                "full": record.report,
            },
            views=tuple(
                View(image.as_posix(), known.get(str(name).upper(), ""))
                for image, name in zip(record.images, given, strict=True)
            ),
            patient=None if patient is None else str(patient),
            split=record.split,
            labels=record.labels,
            attributes=attributes,
        )


def missing_images(record: Record) -> list[Path]:
    """The images of a record that are not there."""
    return [path for path in record.images if not os.path.isfile(path)]


def parse_json(text: str) -> Any:
    """JSON as programs write it: NaN (pandas, for what is missing) is None, and half a character
    (an escaped surrogate without its other half), which no file can hold, a question mark."""
    content = json.loads(text, parse_constant=lambda _: None)
    if _SURROGATE.search(text):
        content = json.loads(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"))
    return content


def load_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: it is missing, no UTF-8 text or no JSON (the message says at which line).
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON: line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{path}: not an annotation: nested too deeply") from None


def _form(entry: dict[str, Any], split: str) -> list[str]:
    """What is wrong with one record's fields."""
    problems = []
    for key in ("id", "report", "image_path"):
        if key not in entry:
            problems.append(f"no {key!r}")
    if "id" in entry and (not isinstance(entry["id"], str | int) or entry["id"] in ("", True)):
        problems.append(f"'id' must be a non-empty string, not {_kind(entry['id'])}")
    if "report" in entry and not isinstance(entry["report"], str):
        problems.append(f"'report' must be a string, not {_kind(entry['report'])}")
    images = entry.get("image_path", [""])
    if not isinstance(images, list | str):
        problems.append(f"'image_path' must be a list of strings, not {_kind(images)}")
    elif not images:
        problems.append("'image_path' is empty: a study needs at least one image")
    elif isinstance(images, list):
        wrong = [i for i in images if not isinstance(i, str) or ("image_path" in entry and not i)]
        if wrong:
            problems.append(f"'image_path' holds {_kind(wrong[0])}: paths are non-empty strings")
    own = entry.get("split", split)
    if own not in SPLITS:
        problems.append(f"unknown split {own!r}; the splits are train, val and test")
    elif own != split:
        problems.append(f"its 'split' is {own!r}, but it stands under {split!r}")
    labels = entry.get("labels")
    if labels is not None:
        if not isinstance(labels, dict):
            problems.append(f"'labels' must be an object, not {_kind(labels)}")
        elif any(v not in (1, 0, -1, None) for v in labels.values()):
            problems.append("'labels' must be 1, 0, -1 or null")
    return problems


def _record(entry: dict[str, Any], split: str, images_dir: Path) -> Record:
    images = entry["image_path"]
    names = [images] if isinstance(images, str) else images
    labels = entry.get("labels")
    return Record(
        id=str(entry["id"]),
        report=entry["report"],
        images=tuple(images_dir / name for name in names),
        split=split,
        labels=labels and {k: None if v is None else int(v) for k, v in labels.items()},
        attributes={k: v for k, v in entry.items() if k not in KNOWN},
    )


def _kind(value: object) -> str:
    """A JSON value's kind in words."""
    if value is None:
        return "null"
    if value == "":
        return "an empty string"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
    return {**names, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
