"""The weight files of a Hugging Face folder: where each tensor is, its shape, its values.

``model.safetensors`` or the shards that ``model.safetensors.index.json`` names; without either
``pytorch_model.bin`` or the shards of ``pytorch_model.bin.index.json``, read by `emrrg.unpickling`,
which runs nothing of theirs. Names and shapes are known before any tensor is read; then the tensors
come one by one, file by file: safetensors from a memory map, those of a ``.bin`` storage by
storage. This module knows no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from emrrg.config import read_json
from emrrg.errors import InputError
from emrrg.unpickling import PickledFile, TensorRecord

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read


class WeightFolder:
    """The tensors of a folder.

    Args:
        folder: the folder.
    Raises:
        InputError: no weights, a shard that is missing, cut short or hostile, or a tensor that the
            index promises and its shard lacks (the message names the file).

    Attributes:
        paths: tensor name to the file that holds it.
        shapes: tensor name to its shape.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path, promised in shards(folder).items():
            shapes = read_shapes(path)
            self.shapes |= shapes
            self.paths |= dict.fromkeys(shapes, path)
            for name in promised or ():
                if name not in shapes:
                    raise InputError(f"{path}: lacks tensor {name}, which the index places in it")

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Read tensors one by one, on the CPU in their stored dtype, file by file.

        A tensor may lie in the mapped file: copy what is to be kept.
        """
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.paths[name], []).append(name)
        for path, here in wanted.items():
            if _is_pickled(path):
                pickled = PickledFile(path)
                for name in here:
                    yield name, pickled.tensor(pickled.content[name])
                continue
            with safe_open(path, framework="pt") as file:
                for name in here:
                    yield name, file.get_tensor(name)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a weight file, without their values.

    Raises:
        InputError: it is missing, cut short, hostile, or no file of tensors.
    """
    if not path.exists():
        raise InputError(f"{path}: is missing; the model needs every shard")
    if _is_pickled(path):
        content = PickledFile(path).content
        if not isinstance(content, dict):
            raise InputError(f"{path}: holds a {type(content).__name__}, not tensors by name")
        return {n: t.shape for n, t in content.items() if isinstance(t, TensorRecord)}
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be read as safetensors, perhaps cut short ({error})"
        ) from error


def shards(folder: Path) -> Mapping[Path, list[str] | None]:
    """Weight files of a folder, each with the tensors that the index places in it.

    Raises:
        InputError: there are none.
    """
    for name in WEIGHTS:
        whole, index = folder / name, folder / f"{name}.index.json"
        if whole.exists():
            return {whole: None}
        if index.exists():
            break
    else:
        raise InputError(
            f"{folder}: holds no weights: no {' and no '.join(WEIGHTS)}, whole or with an index"
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{index}: holds no weight_map")
    files: dict[Path, list[str]] = {}
    for name, file in places.items():
        files.setdefault(folder / str(file), []).append(name)
    return files


def _is_pickled(path: Path) -> bool:
    return path.suffix != ".safetensors"


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
