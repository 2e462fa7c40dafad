"""C++ that is compiled on first use by the system's compiler and kept for the user.

    library = load(source, functions)       # library.functions or library.error

A build is a shared library with a plain C interface, called through ctypes: no headers but the
compiler's, a few seconds once. It is kept in ``$XDG_CACHE_HOME/emrrg-kernels`` (``~/.cache`` by
default), or in the temporary folder where that cannot be written. Its name holds what it depends
on, the source, the processor, the compiler and its flags, and last a digest of what the file holds.
So a damaged file is noticed and built anew, and builds at the same time do not disturb each other.

The variable ``CXX`` names the compiler (else c++, g++, clang++ are looked for); ``CXXFLAGS`` are
added last, so that ``-march=x86-64-v3``, say, makes a build for several kinds of processors.
"""

from __future__ import annotations

import array
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FLAGS = ("-std=c++17", "-O2", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
# Tried in this order: a compiler may know no OpenMP (then threads are the source's own), or no
# -march=native.
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
SECONDS = 300  # of a build, at most


@dataclass(frozen=True)
class Library:
    """Compiled functions, or why there are none.

    Attributes:
        functions: by name; each takes the address of a structure and returns 0, or else failed.
        error: one line, where `functions` is empty.
    """

    functions: dict[str, Any]
    error: str | None = None

    def call(self, name: str, fields: Sequence[int]) -> int:
        """Call a function.

        Args:
            name: of the function.
            fields: its structure, a list of 8-byte numbers.
        Returns:
            What the function returns.
        Raises:
            RuntimeError: there are no compiled functions.
        """
        if self.error is not None:
            raise RuntimeError(f"compiled CPU code: {self.error}")
        structure = array.array("q", fields)
        return self.functions[name](structure.buffer_info()[0])


def load(source: Path, functions: Sequence[str]) -> Library:
    """Find a build of a source for this processor, or build one.

    Args:
        source: a C++ file.
        functions: what it exports, with C linkage.
    Returns:
        The functions, or why there are none.
    """
    if struct.calcsize("P") != 8:
        return Library({}, "needs a 64-bit system")
    if not source.is_file():
        return Library({}, f"{source} is missing: install the package again")
    compiler = _compiler()
    name = f"{source.stem}-{_digest(source.read_bytes(), _processor().encode())}"
    if compiler:  # without one, any other's build of this source for this processor serves as well
        how = repr((compiler, FLAGS, VARIANTS, os.environ.get("CXXFLAGS", "")))
        name += f"-{_digest(how.encode())}"
    error = "no C++ compiler: neither CXX nor c++, g++, clang++ is one"
    if compiler:
        error = "no folder to keep a build: neither the cache nor the temporary one is private"
    for folder in _folders():
        for path in sorted(folder.glob(f"{name}-*.so")):
            found = _open(path, functions)
            if found is not None:
                logger.debug("compiled CPU code: %s", path)
                return Library(found)
        if not compiler:
            continue
        begin = time.perf_counter()
        try:
            built = _build(source, compiler, folder, name)
            found = _open(built, functions)
        except (OSError, subprocess.SubprocessError) as failure:
            error = f"{compiler[0]} does not compile {source.name}: {failure}"
            continue
        if found is not None:
            seconds = time.perf_counter() - begin
            logger.info("compiled CPU code: built in %.1f s, kept as %s", seconds, built)
            return Library(found)
        error = f"{built} was built but cannot be loaded"
    return Library({}, error)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.platform()} {platform.processor()}"
    names = ("flags", "Features", "vendor_id", "model name", "CPU implementer", "CPU part")
    pairs = (line.partition(":") for line in lines)
    kept = sorted({(name.strip(), value) for name, _, value in pairs if name.strip() in names})
    return f"{platform.machine()} {kept}"


def _compiler() -> list[str]:
    """The compiler's program, its arguments, and which file it is; [] where there is none."""
    for command in (_words("CXX"), ["c++"], ["g++"], ["clang++"]):
        program = shutil.which(command[0]) if command else None
        if program is not None:
            real = Path(program).resolve()
            state = real.stat()
            return [program, *command[1:], f"{real} {state.st_size} {state.st_mtime_ns}"]
    return []


def _words(variable: str) -> list[str]:
    """What a variable of the environment lists."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as failure:
        logger.warning("compiled CPU code: %s is not used: %s", variable, failure)
        return []


def _folders() -> Iterator[Path]:
    """Folders that only this user can write, made where they are missing."""
    user = os.getuid() if hasattr(os, "getuid") else None
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    temporary = Path(tempfile.gettempdir(), f"emrrg-kernels-{user}")
    for folder in (Path(cache, "emrrg-kernels"), temporary):
        try:
            if not folder.is_absolute():
                continue
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            state = folder.stat()
        except OSError:
            continue
        if user is None or (state.st_uid == user and not state.st_mode & 0o022):
            yield folder


def _build(source: Path, compiler: list[str], folder: Path, name: str) -> Path:
    """Compile into `folder`, at once under the final name: others may do the same meanwhile.

    Raises:
        OSError, subprocess.SubprocessError: the compiler fails, or the folder cannot be written.
    """
    handle, temporary = tempfile.mkstemp(dir=folder, prefix="building-", suffix=".so")
    os.close(handle)
    built = Path(temporary)
    extra = _words("CXXFLAGS")
    message = ""
    try:
        for variant in VARIANTS:
            command = [*compiler[:-1], *FLAGS, *variant, *extra, str(source), "-o", temporary]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, check=False
            )
            if done.returncode == 0:
                return built.replace(folder / f"{name}-{_digest(built.read_bytes())}.so")
            message = message or (done.stderr.strip().splitlines() or ["no message"])[0]
        raise OSError(message)
    finally:
        built.unlink(missing_ok=True)


def _open(path: Path, functions: Sequence[str]) -> dict[str, Any] | None:
    """The functions of a build; None where it is damaged, which removes it, or does not load."""
    try:
        if _digest(path.read_bytes()) != path.stem.rpartition("-")[2]:
            path.unlink(missing_ok=True)
            return None
        library = ctypes.CDLL(str(path))
        found = {name: getattr(library, name) for name in functions}
    except (OSError, AttributeError):
        return None
    for function in found.values():
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
    return found
