"""A plain table of image paths and texts: CSV, TSV, JSON or JSON Lines.

    image,report,split,id,patient
    a/1.png;a/2.png,"Heart normal. Lungs clear.",train,s1,p1

Column names are guessed from the usual ones, or named by flags. Several views of a study stand in
one field (``a.png;b.png``, ``a.png|b.png``, a JSON list), or on lines of their own with the same
id. Columns named findings, impression, indication or comparison are those sections. Columns named
like CheXpert observations become labels, all others attributes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from emrrg.data.r2gen import TEXTS
from emrrg.data.records import POSITIONS, Dropped, SourceStudy, View
from emrrg.data.reports import parse_sections
from emrrg.data.tables import read_labels, read_rows
from emrrg.errors import InputError
from emrrg.metrics.clinical import OBSERVATIONS

USUAL = {
    "image": (
        "image", "images", "image_path", "image_paths", "path", "paths", "file", "filename",
        "file_name", "img", "dicom", "path_to_image",
    ),
    "text": ("report", "text", "findings", "caption", "description", "impression"),
    "id": ("id", "study_id", "study", "uid", "study_instance_uid", "accession"),
    "split": ("split", "set", "partition", "fold"),
    "patient": ("patient", "patient_id", "patientid", "subject_id", "subject"),
    "view": ("view", "views", "view_position", "projection", "viewposition"),
}  # fmt: skip
"""What a column is to the names that are tried for it, in this order, in any case."""
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validate": "val",
    "validation": "val", "dev": "val", "test": "test", "testing": "test",
}  # fmt: skip
LATERAL = {"L": "LATERAL", "LL": "LATERAL", "LATERAL": "LATERAL", "LAT": "LATERAL"}


def studies(
    table: Path,
    columns: Mapping[str, str] | None = None,
    sections: bool = False,
    *,
    texts: bool = True,
) -> Iterator[SourceStudy | Dropped]:
    """Read the table.

    Args:
        table: the file.
        columns: which column is the ``image`` (also several, ``a,b``), ``text``, ``id``, ``split``,
            ``patient``, ``view``; those not named are guessed.
        sections: divide the texts by their headings (`parse_sections`).
        texts: whether there must be a column of texts.
    Yields:
        One study for each id, in the table's order; without an id column, one a row.
    Raises:
        InputError: the file is broken, or no column can be found for images or text.
    """
    rows = list(read_rows(table))
    if not rows:
        raise InputError(f"{table}: no rows")
    role = _columns(table, rows, columns or {}, ("image", "text") if texts else ("image",))
    grouped: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(rows, 1):
        given = row.get(role["id"]) if "id" in role else f"row{number}"
        identity = "" if given is None else str(given)
        if not identity:
            yield Dropped(f"row {number}", "no id")
            continue
        grouped.setdefault(identity, []).append(row)
    for identity, group in grouped.items():
        yield _study(identity, group, role, table, sections)


def _study(
    identity: str, rows: list[dict[str, Any]], role: dict[str, str], table: Path, sections: bool
) -> SourceStudy | Dropped:
    def value(name: str, row: dict[str, Any]) -> Any:
        return row.get(role[name]) if name in role else None

    first = rows[0]
    texts = {str(value("text", row) or "").strip() for row in rows} - {""}
    if len(texts) > 1:
        return Dropped(identity, "rows of the same id have different texts")
    for name in ("split", "patient"):
        if len({str(value(name, row) or "") for row in rows}) > 1:
            return Dropped(identity, f"rows of the same id name different {name}s")
    split = str(value("split", first) or "").lower()
    if split and split not in SPLIT_NAMES:
        return Dropped(identity, f"unknown split {split!r}")
    paths, positions = [], []
    for row in rows:
        fields = [row.get(name) for name in _names(role["image"], row)]
        own = [p.replace("\\", "/") for field in fields for p in _list(field)]  # Windows
        paths += own
        given = [_position(v) for v in _list(value("view", row))]
        positions += given if len(given) == len(own) else [""] * len(own)
    text = texts.pop() if texts else ""
    labels = read_labels(first, f"{table}: {identity}")
    used = {*role.values(), *_names(role["image"], first), *OBSERVATIONS}
    return SourceStudy(
        id=identity,
        sections={**(parse_sections(text) if sections else {}), **_sections(first), "full": text},
        views=tuple(View(p, v) for p, v in dict(zip(paths, positions, strict=True)).items()),
        patient=str(value("patient", first) or "") or None,
        split=SPLIT_NAMES.get(split),
        labels=labels or None,
        attributes={k: v for k, v in first.items() if k not in used},
    )


def _sections(row: Mapping[str, Any]) -> dict[str, str]:
    """The sections that have columns of their own."""
    named = {str(key).lower(): value for key, value in row.items()}
    return {n: v for n in TEXTS if isinstance(v := named.get(n), str) and v.strip()}


def _names(asked: str, have: Iterable[str]) -> list[str]:
    """One column, or several (``frontal,lateral``)."""
    return [asked] if asked in have else [name.strip() for name in asked.split(",")]


def _columns(
    table: Path, rows: list[dict[str, Any]], named: Mapping[str, str], needed: tuple[str, ...]
) -> dict[str, str]:
    have = list(dict.fromkeys(name for row in rows[:100] for name in row))
    lower = {name.lower().strip(): name for name in reversed(have)}
    role: dict[str, str] = {}
    for kind, usual in USUAL.items():
        if kind in named:
            wanted = _names(named[kind], have) if kind == "image" else [named[kind]]
            if strange := [name for name in wanted if name not in have]:
                raise InputError(
                    f"--{kind}-column {strange[0]}: {table} has no such column; "
                    f"it has {', '.join(have[:12])}"
                )
            role[kind] = named[kind]
        elif found := next((lower[name] for name in usual if name in lower), None):
            role[kind] = found
    for kind in needed:
        if kind not in role:
            raise InputError(
                f"{table}: no column found for the {kind}; it has {', '.join(have[:12])}: "
                f"call it {USUAL[kind][0]!r} (emrrg.data prepare also takes --{kind}-column)"
            )
    return role


def _list(value: Any) -> list[str]:
    """Several paths in one field."""
    if isinstance(value, list):
        return [str(v) for v in value]
    text = str(value or "").strip()
    if text.startswith("["):
        try:
            parsed = json.loads(text.replace("'", '"'))
        except json.JSONDecodeError:
            parsed = None
        if isinstance(parsed, list):
            return [str(v) for v in parsed]
    for mark in (";", "|"):
        if mark in text:
            return [part.strip() for part in text.split(mark) if part.strip()]
    return [text] if text else []


def _position(value: str) -> str:
    upper = value.strip().upper()
    return upper if upper in POSITIONS else LATERAL.get(upper, "")
