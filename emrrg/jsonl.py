"""JSON Lines that survive a kill: complete rows are read, a torn last line is left out."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every complete row of the file; none where it does not exist."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name to write a file under, which then takes the place of `path` whole.

    A reader, or a kill, finds the old file or the new one; a full disk leaves the old one alone.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file's content; a reader finds the old rows or the new ones."""
    with replaced(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
