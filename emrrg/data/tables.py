"""CSV, TSV, JSON and JSON Lines files, plain or gzipped, as rows; and labels in their columns."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from emrrg.errors import InputError
from emrrg.metrics.clinical import OBSERVATIONS

LARGEST_FIELD = 2**20
"""Characters in one field; more is a broken file (an open quotation mark)."""


def read_rows(
    path: Path, needed: tuple[str, ...] = (), kind: str | None = None
) -> Iterator[dict[str, Any]]:
    """Read a table row by row.

    Args:
        path: ``.csv``, ``.tsv``, ``.json`` (a list of objects) or ``.jsonl``, or one of these
            with ``.gz`` behind it.
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
        raise InputError(f"{path}: not a text file in UTF-8") from None
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
        file.seek(0)
        delimiter = max(",;\t", key=first.count)
    csv.field_size_limit(max(csv.field_size_limit(), LARGEST_FIELD))
    reader = csv.DictReader(file, delimiter=delimiter, restkey="")
    try:
        columns = reader.fieldnames or []
        for name in needed:
            if name not in columns:
                shown = ", ".join(columns[:12])
                raise InputError(f"{path}: no column {name!r}; it has {shown or 'none'}")
        for row in reader:
            if "" in row and isinstance(row[""], list):
                raise InputError(
                    f"{path}: line {reader.line_num}: more fields than columns "
                    "(a comma in a field without quotation marks?)"
                )
            yield {k: v.strip() for k, v in row.items() if k and v is not None}
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.line_num}: {error}") from None


def _json_lines(file: IO[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number}: must be an object")
        yield row


def _json_list(file: IO[str], path: Path) -> Iterator[dict[str, Any]]:
    try:
        rows = json.load(file)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: must be a list of objects")
    yield from rows
