"""Building, keeping and finding compiled code, with a source that compiles in an instant."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import native

ROOT = Path(__file__).parents[2]
SOURCE = """#include <cstdint>
extern "C" int add(const int64_t* x) { return int(x[0] + x[1] + NUMBER); }
"""
NO_COMPILER = "no C++ compiler: neither CXX nor c++, g++, clang++ is one"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to compile, an empty cache, and a compiler."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("CXXFLAGS", "-DNUMBER=0")
    if not native._compiler():
        pytest.skip(NO_COMPILER)
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE)
    return path


def builds(source: Path) -> list[Path]:
    """What the cache holds."""
    return sorted((source.parent / "cache").rglob("*.so"))


def load(source: Path) -> native.Library:
    """The library, which must be there."""
    library = native.load(source, ["add"])
    assert library.error is None
    return library


def test_built_once_then_found(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second load finds the file; the first alone says so to all."""
    with caplog.at_level(logging.DEBUG, "kernels.native"):
        assert load(source).call("add", [40, 2]) == 42
        (built,) = builds(source)
        written = built.stat().st_mtime_ns
        assert load(source).call("add", [1, 2]) == 3
    assert builds(source) == [built] and built.stat().st_mtime_ns == written
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("compiled CPU code: built in ") and first.endswith(str(built))
    assert second == f"compiled CPU code: {built}"
    assert [r.levelno for r in caplog.records] == [logging.INFO, logging.DEBUG]
    assert built.parent.stat().st_mode & 0o077 == 0  # the user's alone


def test_depends_on_source_and_flags(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another source, or another flag, is another build."""
    load(source)
    monkeypatch.setenv("CXXFLAGS", "-DNUMBER=5")
    assert load(source).call("add", [1, 2]) == 8
    source.write_text(SOURCE.replace("x[1]", "2 * x[1]"))
    assert load(source).call("add", [1, 2]) == 10
    assert len(builds(source)) == 3


def test_depends_on_processor(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home that several machines share: a build for one processor does not serve another."""
    load(source)
    monkeypatch.setattr(native, "_processor", lambda: "another")
    load(source)
    assert len(builds(source)) == 2


@pytest.mark.parametrize("damage", ["shorter", "changed", "empty"])
def test_damaged_build_is_built_anew(source: Path, damage: str) -> None:
    """A file cut short by a full disk would kill the process that loads it."""
    load(source)
    (built,) = builds(source)
    whole = built.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    built.unlink()  # this process has it mapped: only a new file may differ
    built.write_bytes({"shorter": whole[:-100], "changed": bytes(changed), "empty": b""}[damage])
    assert load(source).call("add", [1, 2]) == 3
    assert [path.read_bytes() for path in builds(source)] == [whole]


def test_found_without_a_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that is there needs no compiler any more; without it the reason is given."""
    load(source)
    monkeypatch.setenv("PATH", str(source.parent))
    assert load(source).call("add", [1, 2]) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / "empty"))
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(source.parent))
    library = native.load(source, ["add"])
    assert library.error == NO_COMPILER
    with pytest.raises(RuntimeError, match="compiled CPU code: no C"):
        library.call("add", [1, 2])


def test_error_of_the_compiler(source: Path) -> None:
    """Its first line is in the reason, and nothing is left behind."""
    source.write_text("int broken(;")
    library = native.load(source, ["add"])
    assert library.error is not None and library.error.count("\n") == 0
    assert "small.cpp:1:12: error" in library.error
    assert builds(source) == []


def test_a_variable_that_cannot_be_read_is_not_used(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in ("CXX", "CXXFLAGS"):
        monkeypatch.setenv(variable, "'-O1")
    source.write_text(f"#define NUMBER 0\n{SOURCE}")
    assert load(source).call("add", [40, 2]) == 42
    assert {r.getMessage() for r in caplog.records if r.levelname == "WARNING"} == {
        f"compiled CPU code: {v} is not used: No closing quotation" for v in ("CXX", "CXXFLAGS")
    }


def test_compiler_without_openmp(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Apple's clang: the next set of flags is tried."""
    monkeypatch.setenv("CXXFLAGS", "-DNUMBER=0")
    real = (
        native.shutil.which("c++") or native.shutil.which("g++") or native.shutil.which("clang++")
    )
    wrapper = source.parent / "compiler"
    wrapper.write_text(
        '#!/bin/sh\ncase "$*" in *fopenmp*) echo "no -fopenmp" >&2; exit 1;; esac\n'
        f'exec {real} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    assert load(source).call("add", [1, 2]) == 3


def test_two_processes_at_once(source: Path) -> None:
    """Both build into the empty cache, both run, one file remains."""
    code = (
        "import sys; from pathlib import Path; from kernels.native import load\n"
        "sys.stdin.readline()\n"
        f"library = load(Path({str(source)!r}), ['add'])\n"
        "print(library.error, library.call('add', [40, 2]))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(4)
    ]
    for process in processes:  # all are waiting to begin
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate(timeout=120)[0] for process in processes] == ["None 42\n"] * 4
    assert len(builds(source)) == 1


def test_folder_of_others_is_not_used(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others may write is not loaded: the temporary folder serves if it is private."""
    temporary = source.parent / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(temporary))
    open_to_all = source.parent / "cache" / "emrrg-kernels"
    open_to_all.mkdir(parents=True)
    open_to_all.chmod(0o777)
    load(source)
    assert builds(source) == []
    (private,) = temporary.iterdir()
    assert len(list(private.glob("small-*.so"))) == 1
    private.chmod(0o777)
    library = native.load(source, ["add"])
    assert library.error is not None and "private" in library.error
