"""Files of rows and their replacement."""

from __future__ import annotations

from pathlib import Path

import pytest

from emrrg.jsonl import read_rows, replaced, write_rows


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "lo', b"\xff\xfe\x00", b"7\n", b"[1]\n", b"\x00" * 9]
)
def test_rows_are_read_up_to_what_is_torn(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [{"step": 1}, {"step": 2}])
    with open(path, "ab") as file:
        file.write(torn)
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


def test_what_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replaced(path) as temporary:
        temporary.write_text("ne")
        raise OSError("full")
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    assert path.read_text() == "old"
