"""Files of reports or labels, in the forms that systems leave them in.

    JSON    a list of texts, or of objects; an object of id to text or to object; R2Gen's annotation
            (`train`, `val` and `test` to lists of objects). A list of one text (or of one object
            with a `caption`) may stand for a text, as R2GenGPT and pycocoevalcap have it.
    JSONL   an object a line.
    CSV     (also TSV; JSONL and these also with ``.gz``) a row a study. A single column without
            a name, as R2Gen's descendants have it (`res.csv`), holds texts.

An id, a text or a label is found under its usual names, or under the one that the user says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emrrg.data.r2gen import load_json
from emrrg.data.records import SPLITS
from emrrg.data.tables import read_labels, read_rows
from emrrg.errors import InputError
from emrrg.metrics.labeler import OBSERVATIONS

FORMS = (".json", ".jsonl", ".csv", ".tsv")
TEXT = "text"  # the name of the field where a file has texts alone
IDS = ("id", "study_id", "study", "uid", "image_id", "dicom_id", "filename")
HYPOTHESES = (
    "hypothesis", "prediction", "pred", "generated", "generated_report", "candidate", "report",
    "caption", TEXT, "findings", "impression", "Report Impression",
)  # fmt: skip
REFERENCES = (
    "reference", "ground_truth", "gt", "target", "report", "caption", TEXT, "findings",
    "impression", "Report Impression",
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The studies of a file.

    Attributes:
        path: the file.
        ids: one a study, or None where the file has none; then the order counts.
        rows: field to value, one a study; a nested ``labels`` object is brought up.
    """

    path: Path
    ids: list[str] | None
    rows: list[Mapping[str, Any]]

    def texts(self, names: Sequence[str], column: str | None = None) -> list[str]:
        """The texts of the studies.

        Args:
            names: usual names of the field, the first that is there counts.
            column: its name, if the user says it.
        Raises:
            InputError: no such field, or something in it that is no text.
        """
        name = self.column(names, column)
        texts = []
        for i, row in enumerate(self.rows):
            value = _sole(row.get(name))
            if not isinstance(value, str):
                kind = "nothing" if value is None else type(value).__name__
                raise InputError(f"{self.path}: record {self.name(i)}: {name}: {kind}, not a text")
            texts.append(value)
        return texts

    def column(self, names: Sequence[str], column: str | None = None) -> str:
        """The field among some names.

        Raises:
            InputError: it is not there.
        """
        fields = self.fields()
        for name in [column] if column else names:
            if name in fields:
                return name
        wanted = repr(column) if column else f"named {', '.join(names)}"
        raise InputError(
            f"{self.path}: no field {wanted}; it has {', '.join(fields[:12]) or 'none'}"
        )

    def fields(self) -> list[str]:
        """Names of the fields, of all studies together."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def name(self, i: int) -> str:
        """How a message names a study: its id, or its number from 1."""
        return self.ids[i] if self.ids else str(i + 1)

    def has_labels(self) -> bool:
        """Whether there are fields of the CheXpert observations."""
        return any(name in OBSERVATIONS for name in self.fields())

    def labels(self) -> list[dict[str, int | None]]:
        """The labels of the studies (1, 0, -1 or nothing under the names of CheXpert).

        Raises:
            InputError: there are none, or another value.
        """
        if not self.has_labels():
            raise InputError(
                f"{self.path}: no field has the name of an observation ({OBSERVATIONS[2]}, ...); "
                f"it has {', '.join(self.fields()[:12]) or 'none'}"
            )
        return [
            read_labels(row, f"{self.path}: record {self.name(i)}")
            for i, row in enumerate(self.rows)
        ]


def read_table(
    path: str | Path, *, id_column: str | None = None, split: str | None = None
) -> Table:
    """Read a file of studies.

    Args:
        path: JSON, JSONL, CSV or TSV, see the module.
        id_column: field of the ids; None: the first usual one that is there.
        split: only studies of this split, where the file has splits.
    Raises:
        InputError: the file is missing, broken or empty, an id comes twice, or is missing.
    """
    path = Path(path)
    _check_form(path)
    if path.name.lower().removesuffix(".gz").endswith(".json"):
        rows = _json_rows(path)
    else:
        rows = _name_the_only_column(list(read_rows(path)))
    rows = [_raise_labels(row) for row in rows]
    if split is not None:
        if not any("split" in row for row in rows):
            raise InputError(f"--split: {path} has no splits")
        rows = [row for row in rows if str(row.get("split")) == split]
    if not rows:
        raise InputError(f"{path}: no study" + (f" of split {split!r}" if split else "") + " in it")
    fields = {name for row in rows for name in row}
    if id_column is not None and id_column not in fields:
        raise InputError(f"--id-column: {path} has no field {id_column!r}")
    name = id_column or next((name for name in IDS if name in fields), None)
    return Table(path, _ids(path, rows, name) if name else None, rows)


def match(first: Table, others: Iterable[Table]) -> list[list[int | None]]:
    """Find the studies of one file in others.

    Args:
        first: whose studies, and whose order.
        others: by id where both files have ids, else by order.
    Returns:
        For each other file the place of each study in it, None where it is not.
    Raises:
        InputError: no ids and unequal numbers, or no study in common.
    """
    places: list[list[int | None]] = []
    for other in others:
        if first.ids is not None and other.ids is not None:
            known = {name: i for i, name in enumerate(other.ids)}
            found = [known.get(name) for name in first.ids]
            if all(place is None for place in found):
                raise InputError(
                    f"{other.path} and {first.path} have no id in common "
                    f"(for instance {other.ids[0]!r} and {first.ids[0]!r})"
                )
            places.append(found)
            continue
        if len(first.rows) != len(other.rows):
            raise InputError(
                f"{other.path} has {len(other.rows)} records and {first.path} "
                f"{len(first.rows)}; without ids in both they must be equally many"
            )
        places.append(list(range(len(first.rows))))
    return places


def _check_form(path: Path) -> None:
    """Refuse what is no table by its name, and say what is read."""
    if path.is_dir():
        inside = path / "predictions.json"
        instead = f"give {inside}" if inside.exists() else f"give a file ({', '.join(FORMS)})"
        raise InputError(f"{path}: is a folder; {instead}")
    if path.exists() and not path.name.lower().removesuffix(".gz").endswith(FORMS):
        raise InputError(
            f"{path}: only {', '.join(FORMS)} are read; plain texts can go into a .csv with the "
            "columns id and report"
        )


def _json_rows(path: Path) -> list[Mapping[str, Any]]:
    content = load_json(path)
    if isinstance(content, dict) and content and set(content) <= set(SPLITS):
        if not all(isinstance(entries, list) for entries in content.values()):
            raise InputError(f"{path}: train, val and test must be lists of objects")
        content = [
            {"split": split, **entry} if isinstance(entry, dict) else entry
            for split, entries in content.items()
            for entry in entries
        ]
    elif isinstance(content, dict):
        content = [
            {"id": name, **(only if isinstance(only := _sole(entry), dict) else {TEXT: only})}
            for name, entry in content.items()
        ]
    if not isinstance(content, list):
        raise InputError(f"{path}: expected a list or an object, not {type(content).__name__}")
    rows: list[Mapping[str, Any]] = []
    for i, entry in enumerate(content):
        if isinstance(entry, str):
            entry = {TEXT: entry}
        if not isinstance(entry, dict):
            raise InputError(
                f"{path}: record {i + 1}: {type(entry).__name__}, not a text or object"
            )
        rows.append(entry)
    return rows


def _name_the_only_column(rows: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Where a table of one column has a report for a header, that is its first text."""
    fields = list(dict.fromkeys(name for row in rows for name in row))
    if len(fields) != 1 or len(fields[0].split()) < 3:
        return rows
    return [{TEXT: fields[0]}, *({TEXT: row[fields[0]]} for row in rows)]


def _sole(value: Any) -> Any:
    """What a list of one text or one caption holds; anything else as it is."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
        if isinstance(value, dict) and set(value) == {"caption"}:
            return value["caption"]
    return value


def _raise_labels(row: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = row.get("labels")
    return {**nested, **row} if isinstance(nested, dict) else row


def _ids(path: Path, rows: list[Mapping[str, Any]], name: str) -> list[str]:
    ids: dict[str, int] = {}
    for i, row in enumerate(rows):
        value = row.get(name)
        if value is None or value == "" or isinstance(value, bool | float | list | dict):
            raise InputError(f"{path}: record {i + 1}: no {name!r}")
        text = str(value)
        if text in ids:
            raise InputError(
                f"{path}: records {ids[text] + 1} and {i + 1} have the {name} {text!r}"
            )
        ids[text] = i
    return list(ids)
