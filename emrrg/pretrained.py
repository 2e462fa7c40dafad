"""The weight files of a Hugging Face folder: where each tensor is, its shape, its values.

``model.safetensors`` or the shards that ``model.safetensors.index.json`` names. Files are
memory-mapped; names and shapes are known from their headers before any tensor is read. This module
knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from emrrg.config import read_json
from emrrg.errors import InputError

SAFETENSORS = "model.safetensors"


class WeightFolder:
    """Tensors of a folder by name; a context manager that keeps the files open.

    Args:
        folder: the folder.
    Raises:
        InputError: no weights, a shard that is missing or cut short, or a tensor that the index
            promises and its shard lacks (the message names the file).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        self.paths: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        try:
            for path, promised in shards(folder).items():
                self._read_header(path, promised)
        except BaseException:
            self._open.close()
            raise

    def _read_header(self, path: Path, promised: list[str] | None) -> None:
        if not path.exists():
            raise InputError(f"{path}: is missing; copy every shard of the model")
        try:
            file = self._open.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}: cannot be read as safetensors, perhaps cut short ({error})"
            ) from error
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            self._files[name] = file
            self.paths[name] = path
            self.shapes[name] = tuple(file.get_slice(name).get_shape())
        for name in promised or ():
            if self.paths.get(name) != path:
                raise InputError(f"{path}: lacks tensor {name}, which the index places in it")

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, on the CPU in its stored dtype."""
        return self._files[name].get_tensor(name)

    def __enter__(self) -> WeightFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()


def shards(folder: Path) -> Mapping[Path, list[str] | None]:
    """Weight files of a folder, each with the tensors that the index places in it.

    Raises:
        InputError: there are none.
    """
    index = folder / f"{SAFETENSORS}.index.json"
    if (folder / SAFETENSORS).exists() or not index.exists():
        if not (folder / SAFETENSORS).exists():
            raise InputError(f"{folder}: holds no {SAFETENSORS} and no {index.name}")
        return {folder / SAFETENSORS: None}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index}: holds no weight_map")
    files: dict[Path, list[str] | None] = {}
    for name, file in places.items():
        names = files.setdefault(folder / str(file), [])
        assert names is not None
        names.append(name)
    return files


def read_folder_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face folder.

    Raises:
        InputError: no such folder, no such file in it, or not JSON.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; give the folder of a Hugging Face model")
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: holds no config.json; give the folder of a Hugging Face model")
    return read_json(folder / "config.json")
