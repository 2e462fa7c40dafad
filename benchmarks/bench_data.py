"""The way of an image from its file to the model: images a second, by kind of file.

Radiographs of 2048 x 2496 pixels (smooth shapes with noise, as compressible as real ones), read at
224 x 224. `peer` is what the released models do (Pillow to RGB, then resize) and is compared pixel
by pixel where it can read the file rightly; `cached` is a hit in `ImageCache`. An epoch goes
through two reading processes, the first one decoding, the second one not.

    pytest benchmarks/bench_data.py --benchmark-only
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pydicom
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from emrrg.data.image_cache import ImageCache
from emrrg.data.images import load_image, normalize

SIDE = 224
PIXELS = {"smoke": (256, 312), "default": (2048, 2496), "full": (2048, 2496)}
ROUNDS = {"smoke": 1, "default": 5, "full": 20}
EPOCH = {"smoke": 4, "default": 24, "full": 64}
KINDS = ("png8", "png16", "jpeg8", "dicom16")


def radiograph(height: int, width: int, seed: int) -> np.ndarray:
    """(H, W) uint16, 12 bits used: a bright middle on a dark ground, with grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    smooth = 2200 * np.exp(-3 * x**2) + 900 * np.exp(-8 * (y - 0.3) ** 2) + 200
    return np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 4095).astype(np.uint16)


def save(kind: str, pixels: np.ndarray, folder: Path, name: str) -> Path:
    """Write one image of a kind."""
    if kind == "dicom16":
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
        meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        dataset = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
        dataset.PixelRepresentation = 0
        dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
        dataset.PixelData = pixels.tobytes()
        dataset.save_as(folder / f"{name}.dcm", enforce_file_format=True)
        return folder / f"{name}.dcm"
    suffix = "jpg" if kind == "jpeg8" else "png"
    picture = Image.fromarray(pixels if kind == "png16" else (pixels >> 4).astype(np.uint8))
    picture.save(folder / f"{name}.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))
    return folder / f"{name}.{suffix}"


def peer(path: Path) -> np.ndarray:
    """As the released models read an image."""
    with Image.open(path) as picture:
        resized = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return np.asarray(resized)


def describe(benchmark: Any, images: int, **more: Any) -> None:
    """Rate and machine beside the times."""
    benchmark.extra_info.update(
        images_per_second=images / benchmark.stats.stats.min if benchmark.stats else None,
        device=platform.processor() or platform.machine(),
        python=platform.python_version(),
        pillow=PIL.__version__,
        pydicom=pydicom.__version__,
        torch=torch.__version__,
        **more,
    )


@pytest.fixture(scope="module", params=KINDS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One large image of each kind."""
    height, width = PIXELS[request.config.getoption("--size")]
    folder = tmp_path_factory.mktemp(request.param)
    return save(request.param, radiograph(height, width, 0), folder, request.param)


@pytest.mark.parametrize("way", ["load_image", "cached", "peer"])
def test_one_image(way: str, file: Path, size: str, benchmark: Any) -> None:
    """File to (224, 224, 3) uint8."""
    benchmark.group = f"load-{file.stem}-{PIXELS[size][0]}x{PIXELS[size][1]}"
    ways: dict[str, Callable[[], np.ndarray]] = {
        "load_image": lambda: load_image(file, SIDE),
        "peer": lambda: peer(file),
    }
    if way == "peer" and file.stem in ("dicom16", "png16"):
        pytest.skip("the peer reads no DICOM, and clips 16 bits to white")
    if way == "cached":
        cache = ImageCache(SIDE, 2**24)
        cache.load(file)
        ways["cached"] = lambda: cache.load(file)
    result = ways[way]()
    assert result.shape == (SIDE, SIDE, 3) and result.std() > 10
    np.testing.assert_array_equal(result, load_image(file, SIDE))
    benchmark.pedantic(ways[way], rounds=ROUNDS[size], warmup_rounds=1)
    describe(benchmark, 1, file_bytes=file.stat().st_size)


class Images(Dataset[torch.Tensor]):
    """Pixels through the cache."""

    def __init__(self, files: list[Path], cache: ImageCache) -> None:
        self.files, self.cache = files, cache

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.cache.load(self.files[index]))


@pytest.mark.parametrize("epoch", ["first", "later"])
def test_epoch(epoch: str, size: str, tmp_path: Path, benchmark: Any) -> None:
    """An epoch of JPEG files through two reading processes, normalised."""
    benchmark.group = f"epoch-jpeg8-{EPOCH[size]}"
    height, width = PIXELS[size]
    files = [
        save("jpeg8", radiograph(height, width, k), tmp_path, str(k)) for k in range(EPOCH[size])
    ]
    caches: list[ImageCache] = []

    def prepare() -> None:
        if not caches or epoch == "first":
            caches.append(ImageCache(SIDE, 2**28))
            if epoch == "later":
                run()

    def run() -> None:
        for batch in DataLoader(Images(files, caches[-1]), batch_size=8, num_workers=2):
            normalize(batch.permute(0, 3, 1, 2))

    benchmark.pedantic(run, setup=prepare, rounds=ROUNDS[size])
    describe(benchmark, len(files), workers=2)
