"""A bounded cache of resized images that all reading processes share.

Decoding a radiograph takes tens of milliseconds, reading its 224 x 224 pixels back some tenth of
one, so every epoch after the first is free of decoding. The pixels lie in one file of a fixed
number of slots, which the operating system keeps in memory as far as there is room: forked and
spawned workers see what any of them has stored, and it survives them (a data loader ends its
workers after each epoch).

    slot = 16 bytes of key | 8 bytes of length and checksum | pixels

A key may lie in any of 8 neighbouring slots, the first one by its hash. Slots are never taken
back: where visits are in random order, a full cache that keeps what it has hits as often as one
that evicts. No locks: a slot that two processes write at once, or that one was killed in, fails
its checksum and counts as empty.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emrrg.data.images import Fit, Window, load_image

PREFIX = "emrrg-images-"
HEADER = 24
PROBES = 8


class ImageCache:
    """Loads images as `emrrg.data.images.load_image` does, and remembers the pixels.

    May be handed to worker processes by fork or by pickling. A file that has changed on disk
    (size or time) is read again.

    Args:
        size: side in pixels, or (height, width).
        max_bytes: of the cache file; 0 switches the cache off.
        directory: keep the cache here, for the next run too; None: a temporary file, gone when
            the process that made it ends.
        fit: as in `load_image`.
        window: as in `load_image`.
        invert: as in `load_image`.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        max_bytes: int = 2**30,
        *,
        directory: str | Path | None = None,
        fit: Fit = "stretch",
        window: Window = "file",
        invert: Any = False,
    ) -> None:
        height, width = (size, size) if isinstance(size, int) else size
        self.shape = (height, width, 3)
        self.options: dict[str, Any] = {"fit": fit, "window": window, "invert": invert}
        self.slot_bytes = HEADER + height * width * 3
        self.slots = max_bytes // self.slot_bytes
        self.hits = 0
        """Images found in the cache, by this process."""
        self.misses = 0
        """Images decoded, by this process."""
        self._file: int | None = None
        self._owner = 0
        self._lock = threading.Lock()
        if directory is None:
            _remove_orphans(Path(tempfile.gettempdir()))
            handle, name = tempfile.mkstemp(prefix=f"{PREFIX}{os.getpid()}-", suffix=".cache")
            os.close(handle)
            self.path = Path(name)
            self._finalizer = weakref.finalize(self, _remove, self.path, os.getpid())
        else:
            Path(directory).mkdir(parents=True, exist_ok=True)
            self.path = Path(directory) / f"images-{height}x{width}.cache"

    def load(self, path: str | Path) -> NDArray[np.uint8]:
        """The image's pixels, from the cache where they are there.

        Args:
            path: an image file.
        Returns:
            (H, W, 3) uint8, writable, the caller's own.
        Raises:
            InputError: as in `load_image`.
        """
        key = self._key(path) if self.slots else None
        if key is not None and (found := self._get(key)) is not None:
            self.hits += 1
            return found
        self.misses += 1
        height, width, _ = self.shape
        pixels = load_image(path, (height, width), **self.options)
        if key is not None:
            self._put(key, pixels)
        return pixels

    def close(self) -> None:
        """Close the file, and remove it if it is a temporary one of this process."""
        with self._lock:
            if self._file is not None and self._owner == os.getpid():
                os.close(self._file)
            self._file = None
        if hasattr(self, "_finalizer"):
            self._finalizer()
        self.slots = 0

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("_file", "_owner", "_lock", "_finalizer")
        return {k: v for k, v in self.__dict__.items() if k not in hidden}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file, self._owner, self._lock = None, 0, threading.Lock()
        self.hits = self.misses = 0

    def _key(self, path: str | Path) -> bytes | None:
        try:
            facts = os.stat(path)
        except OSError:
            return None  # load_image says what is wrong
        text = f"{os.path.abspath(path)}|{facts.st_size}|{facts.st_mtime_ns}|{self.shape}"
        return blake2b(f"{text}|{self.options}".encode(), digest_size=16).digest()

    def _get(self, key: bytes) -> NDArray[np.uint8] | None:
        for slot in self._candidates(key):
            head = self._read(slot, HEADER)
            if head[:16] == key:
                body = self._read(slot, self.slot_bytes)[HEADER:]
                if len(body) == self.slot_bytes - HEADER and head[16:] == _checksum(body):
                    return np.frombuffer(bytearray(body), np.uint8).reshape(self.shape)
        return None

    def _put(self, key: bytes, pixels: NDArray[np.uint8]) -> None:
        body = pixels.tobytes()
        for slot in self._candidates(key):
            head = self._read(slot, HEADER)
            if head[:16] in (b"", bytes(16), key) or len(head) < HEADER:
                self._write(slot, key + _checksum(body) + body)
                return

    def _candidates(self, key: bytes) -> list[int]:
        first = int.from_bytes(key[:8], "little")
        return [(first + k) % self.slots for k in range(min(PROBES, self.slots))]

    def _read(self, slot: int, count: int) -> bytes:
        return self._at(slot, lambda file: os.read(file, count), b"")

    def _write(self, slot: int, content: bytes) -> None:
        self._at(slot, lambda file: os.write(file, content), 0)

    def _at(self, slot: int, action: Callable[[int], Any], otherwise: Any) -> Any:
        """Do something at a slot; a full disk or a vanished file only makes the cache useless."""
        with self._lock, contextlib.suppress(OSError):
            if self._file is None or self._owner != os.getpid():  # not a parent's file position
                flags = os.O_RDWR | os.O_CREAT
                flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
                self._file, self._owner = os.open(self.path, flags, 0o600), os.getpid()
            os.lseek(self._file, slot * self.slot_bytes, os.SEEK_SET)
            return action(self._file)
        return otherwise


def _checksum(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little")


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        path.unlink(missing_ok=True)


def _remove_orphans(folder: Path) -> None:
    """Remove the temporary caches of processes that were killed."""
    if os.name != "posix":  # elsewhere signal 0 is not a mere question
        return
    for path in folder.glob(f"{PREFIX}*.cache"):
        owner = path.name.removeprefix(PREFIX).split("-")[0]
        with contextlib.suppress(OSError):
            if owner.isdecimal():
                try:
                    os.kill(int(owner), 0)
                except ProcessLookupError:
                    path.unlink()
