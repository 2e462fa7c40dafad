"""Read PyTorch ``.pth`` files without running anything that they hold.

A pickle is a program: it names functions and classes, and reading it calls them. Here every name is
looked up in a short table of inert stand-ins: tensors become `TensorRecord`s whose bytes are read
later, a `Namespace` or another holder of settings becomes a plain dictionary, and any other name
ends the reading with an error that says it. Both of PyTorch's formats are read: the archive (since
1.6) and the older stream.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from emrrg.errors import InputError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "UntypedStorage": torch.uint8,
}  # fmt: skip


class StorageRecord(NamedTuple):
    """A storage that a file holds."""

    key: str
    dtype: torch.dtype
    elements: int


class TensorRecord(NamedTuple):
    """A tensor that a file holds, before its bytes are read."""

    storage: StorageRecord
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Settings(dict[str, Any]):
    """A dictionary in place of a holder of settings, whatever its class was."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.update(state)


class _Plain(dict[Any, Any]):
    """An OrderedDict; attributes such as a state dict's `_metadata` are ignored."""

    def __setstate__(self, state: Any) -> None:
        pass


class _NumpyType:
    """A numpy.dtype: its code alone."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


class _Call:
    """A function of our own that a pickle may call, and do nothing else with."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("a function has no state")


def _tensor(storage: StorageRecord, offset: int, shape: Any, stride: Any, *_: Any) -> TensorRecord:
    sizes: tuple[int, ...] = tuple(map(int, shape))
    steps: tuple[int, ...] = tuple(map(int, stride))
    if not isinstance(storage, StorageRecord) or len(sizes) != len(steps):
        raise ValueError("a tensor without storage")
    last = offset + sum((n - 1) * s for n, s in zip(sizes, steps, strict=True))
    negative = offset < 0 or min((*sizes, *steps), default=0) < 0
    if negative or (0 not in sizes and last >= storage.elements):
        raise ValueError("a tensor that reaches beyond its storage")
    return TensorRecord(storage, int(offset), sizes, steps)


def _tensor_of_type(function: Any, _kind: Any, arguments: Any, _state: Any) -> Any:
    if not isinstance(function, _Call):
        raise ValueError("a tensor built by something else")
    return function(*arguments)


def _number(kind: Any, data: Any) -> Any:
    code = np.dtype(str(kind.code))
    if code.kind not in "iufb" or not isinstance(data, bytes):
        raise ValueError("a numpy scalar that is not a number")
    return np.frombuffer(data, code)[0].item()


def _bytes(text: str, _codec: str = "latin1") -> bytes:
    return text.encode("latin1")


_FUNCTIONS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Call(_tensor),
    ("torch._utils", "_rebuild_tensor"): _Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Call(lambda data, *_: data),
    ("torch._tensor", "_rebuild_from_type_v2"): _Call(_tensor_of_type),
    ("torch.nn.parameter", "Parameter"): "Parameter",
    ("torch", "Tensor"): "Tensor",
    ("torch", "device"): _Call(lambda *parts: ":".join(map(str, parts))),
    ("torch", "Size"): _Call(lambda sizes=(): tuple(sizes)),
    ("collections", "OrderedDict"): _Plain,
    ("collections", "defaultdict"): _Call(lambda *_: _Plain()),
    ("argparse", "Namespace"): Settings,
    ("types", "SimpleNamespace"): Settings,
    ("builtins", "set"): _Call(lambda items=(): list(items)),
    ("builtins", "frozenset"): _Call(lambda items=(): list(items)),
    ("numpy", "dtype"): _NumpyType,
    ("_codecs", "encode"): _Call(_bytes),
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _FUNCTIONS[_module, "scalar"] = _Call(_number)
for _module in ("pathlib", "pathlib._local"):
    for _name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        _FUNCTIONS[_module, _name] = _Call(lambda *parts: "/".join(map(str, parts)))
for _name in (
    "float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool",
):  # fmt: skip
    _FUNCTIONS["torch", _name] = f"torch.{_name}"


class _Unpickler(pickle.Unpickler):
    """Calls nothing but what the table above holds."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, encoding="utf-8")
        self._path = path
        self.storages: dict[str, StorageRecord] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name.

        Raises:
            InputError: it has none.
        """
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        if module in ("torch", "torch.storage", "torch.cuda") and name in DTYPES:
            return DTYPES[name]
        if name == "AttributeDict" and module.split(".")[0] in ("lightning", "pytorch_lightning"):
            return Settings
        raise InputError(
            f"{self._path}: its pickle asks for {module}.{name}, which is neither tensors nor "
            "settings; refused, and nothing of it was run"
        )

    def persistent_load(self, pid: Any) -> StorageRecord:
        """A storage by the description in the file."""
        kind, dtype, key, _location, count, *_view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or int(count) < 0:
            raise ValueError("something that is not a storage")
        if _view and _view[0] is not None:
            raise ValueError("a view of a storage, which only PyTorch before 0.4 wrote")
        record = StorageRecord(str(key), dtype, int(count))
        return self.storages.setdefault(record.key, record)


class PickledFile:
    """A ``.pth`` file: its structure, and its tensors' bytes on demand.

    Args:
        path: the file.
    Raises:
        InputError: it is missing, cut short, no PyTorch file, or asks for anything that is neither
            tensors nor settings (the message names what).

    Attributes:
        content: what the file holds: dictionaries, lists, numbers, text, `TensorRecord`s.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._legacy: dict[str, tuple[int, int]] = {}  # storage key: place and bytes in the file
        self._prefix = ""
        try:
            with open(self.path, "rb") as file:
                self._archive = file.read(2) == b"PK"
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        try:
            self.content = self._read_archive() if self._archive else self._read_stream()
        except InputError:
            raise
        # A damaged or hostile pickle fails in any way that it likes.
        except Exception as error:
            raise InputError(
                f"{self.path}: cannot be read as a PyTorch file, perhaps cut short ({error})"
            ) from error

    def tensor(self, record: TensorRecord) -> Tensor:
        """Read a tensor, in the dtype that it was stored in.

        Raises:
            InputError: its bytes are missing or cut short.
        """
        return self.tensors({"": record})[""]

    def tensors(self, records: Mapping[str, TensorRecord]) -> dict[str, Tensor]:
        """Read tensors by name, each storage once; each tensor has memory of its own."""
        found: dict[str, Tensor] = {}
        by_storage: dict[str, list[str]] = {}
        for name, record in records.items():
            by_storage.setdefault(record.storage.key, []).append(name)
        with open(self.path, "rb") as file:
            source: Any = zipfile.ZipFile(file) if self._archive else file
            for names in by_storage.values():
                flat = self._storage(source, records[names[0]].storage)
                for name in names:
                    _, offset, shape, stride = records[name]
                    view = flat.as_strided(shape, stride, offset)
                    whole = len(names) == 1 and view.is_contiguous() and view.numel() == len(flat)
                    found[name] = view if whole else view.clone()
        return {name: found[name] for name in records}

    def _storage(self, source: Any, record: StorageRecord) -> Tensor:
        size = record.elements * record.dtype.itemsize
        try:
            if self._archive:
                data = source.read(f"{self._prefix}data/{record.key}")
            else:
                place, _ = self._legacy[record.key]
                source.seek(place)
                data = source.read(size)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path}: storage {record.key} is damaged ({error})") from error
        if len(data) != size:
            raise InputError(
                f"{self.path}: storage {record.key} has {len(data)} bytes of {size}; cut short"
            )
        return torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[:size].view(
            record.dtype
        )

    def _read_archive(self) -> Any:
        with zipfile.ZipFile(self.path) as archive:
            names = archive.namelist()
            pickles = [
                name for name in names if name.endswith("/data.pkl") and name.count("/") == 1
            ]
            if not pickles:
                raise InputError(f"{self.path}: is a zip file, but PyTorch did not write it")
            self._prefix = pickles[0].removesuffix("data.pkl")
            order = f"{self._prefix}byteorder"
            if order in names and archive.read(order) != b"little":
                raise InputError(f"{self.path}: was written on a big-endian machine")
            unpickler = _Unpickler(io.BytesIO(archive.read(pickles[0])), self.path)
            content = unpickler.load()
            sizes = {item.filename: item.file_size for item in archive.infolist()}
            for key, record in unpickler.storages.items():
                self._expect(record, sizes.get(f"{self._prefix}data/{key}", 0))
            return content

    def _read_stream(self) -> Any:
        whole = self.path.stat().st_size
        with open(self.path, "rb") as file:
            if _Unpickler(file, self.path).load() != LEGACY_MAGIC:
                raise InputError(f"{self.path}: is not a PyTorch file")
            for _ in ("protocol", "machine"):
                _Unpickler(file, self.path).load()
            unpickler = _Unpickler(file, self.path)
            content = unpickler.load()
            for key in _Unpickler(file, self.path).load():
                count = int.from_bytes(file.read(8), "little")
                record = unpickler.storages[str(key)]
                if count != record.elements:
                    raise ValueError(f"storage {key} has {count} elements of {record.elements}")
                size = count * record.dtype.itemsize
                self._legacy[str(key)] = (file.tell(), size)
                file.seek(size, io.SEEK_CUR)
                self._expect(record, size - max(0, file.tell() - whole))
            return content

    def _expect(self, record: StorageRecord, found: int) -> None:
        """Refuse a storage of another length than the pickle says, before any is read."""
        size = record.elements * record.dtype.itemsize
        if found != size:
            raise InputError(
                f"{self.path}: storage {record.key} has {max(0, found)} bytes of {size}; cut short"
            )
