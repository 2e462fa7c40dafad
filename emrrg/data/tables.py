"""CSV, TSV, JSON and JSON Lines files, plain or gzipped, as rows; and labels in their columns."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from emrrg.data.r2gen import parse_json
from emrrg.data.records import SPLITS
from emrrg.errors import InputError
from emrrg.metrics.clinical import OBSERVATIONS

LARGEST_FIELD = 2**20
"""Characters in one field; more is a broken file (an open quotation mark)."""
_END = "\x1ethe end\x1e"
"""Put behind a file: where it lands inside a field, a quotation mark was never closed."""


def read_rows(
    path: Path, needed: tuple[str, ...] = (), kind: str | None = None
) -> Iterator[dict[str, Any]]:
    """Read a table row by row.

    Args:
        path: ``.csv``, ``.tsv``, ``.json`` (a list of objects, or an annotation file, of which
            ``split`` becomes a column) or ``.jsonl``, or one of these with ``.gz`` behind it.
        needed: columns that must be there.
        kind: ``csv``, ``tsv``, ``json`` or ``jsonl``; None: as the name says.
    Yields:
        Column name to value; text from CSV, anything from JSON. White space around is removed.
    Raises:
        InputError: the file is missing, broken or lacks a column (the message names file and
            line).
    """
    kind = kind or path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        with _open_text(path) as file:
            if kind == "jsonl":
                rows = _json_lines(file, path)
            elif kind == "json":
                rows = _json_list(file, path)
            else:
                rows = _delimited(file, path, "\t" if kind == "tsv" else None, needed)
            for number, row in enumerate(rows, 1):
                missing = [name for name in needed if name not in row]
                if missing:
                    raise InputError(f"{path}: record {number}: no {missing[0]!r}")
                yield row
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: not a text file in UTF-8 (in Excel: save as CSV UTF-8)"
        ) from None
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None


def find_table(folder: Path, pattern: str, flag: str) -> Path:
    """The one file in a folder that fits a pattern, with ``.csv`` or ``.csv.gz`` behind it.

    Raises:
        InputError: there is none.
    """
    for ending in (".csv.gz", ".csv"):
        if found := sorted(folder.glob(pattern + ending)):
            return found[-1]
    raise InputError(f"{flag}: {folder}: no {pattern}.csv(.gz) in it")


def read_labels(row: Mapping[str, Any], where: str) -> dict[str, int | None]:
    """The CheXpert columns of a row.

    Args:
        row: 1 (positive), 0 (negative), -1 (uncertain), and nothing (not mentioned), as text or
            numbers; other columns are ignored.
        where: file and record, for messages.
    Returns:
        Observation to 1, 0, -1 or None; empty if the row has none of the columns.
    Raises:
        InputError: another value.
    """
    return {
        name: _label(row[name], f"{where}: label {name!r}") for name in OBSERVATIONS if name in row
    }


def _label(value: Any, where: str) -> int | None:
    if value is None or value == "" or value != value or str(value).lower() == "nan":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 2.0
    if number not in (1.0, 0.0, -1.0):
        raise InputError(f"{where}: {value!r}: expected 1, 0, -1 or nothing")
    return int(number)


def _open_text(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _delimited(
    file: IO[str], path: Path, delimiter: str | None, needed: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    if delimiter is None:
        first = file.readline()
        if re.fullmatch(r"sep=.\s*", first):  # Excel's own first line
            delimiter = first[4]
        else:
            file.seek(0)
            delimiter = max(",;\t", key=first.count)
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_FIELD))
    lines = itertools.chain(file, [_END])
    reader = csv.DictReader(lines, delimiter=delimiter, restkey="")
    try:
        columns = reader.fieldnames or []
        if columns == [_END]:
            return
        if not columns:
            raise InputError(f"{path}: line 1 is empty; it must name the columns")
        _check_closed(columns, path, 1)
        for name in needed:
            if name not in columns:
                shown = ", ".join(columns[:12])
                raise InputError(f"{path}: no column {name!r}; it has {shown or 'none'}")
        begun = reader.line_num
        for row in reader:
            extra = row[""] if isinstance(row.get(""), list) else []
            if row[columns[0]] == _END:
                return
            _check_closed([*row.values(), *extra], path, begun + 1)
            begun = reader.line_num
            if any(map(str.strip, extra)):
                raise InputError(
                    f"{path}: line {reader.line_num}: more fields than columns "
                    "(a comma in a field without quotation marks?)"
                )
            yield {k: v.strip() for k, v in row.items() if k and v is not None}
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}") from None


def _check_closed(fields: Iterable[Any], path: Path, line: int) -> None:
    if any(isinstance(field, str) and _END in field for field in fields):
        raise InputError(f"{path}: line {line}: a quotation mark opened there is never closed")


def _json_lines(file: IO[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number}: must be an object")
        yield row


def _json_list(file: IO[str], path: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = parse_json(file.read())
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if isinstance(rows, dict) and rows and set(rows) <= set(SPLITS):
        rows = [
            {"split": split, **row} if isinstance(row, dict) else row
            for split, part in rows.items()
            for row in (part if isinstance(part, list) else [part])
        ]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(
            f"{path}: must be a list of objects, or an annotation file (train, val and test to "
            "such lists)"
        )
    yield from rows
