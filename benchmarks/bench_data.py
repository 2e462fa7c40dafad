"""Everything around the model: images from their files, labels and scores of reports.

Radiographs of 2048 x 2496 pixels (smooth shapes with noise, as compressible as real ones), read at
224 x 224. "Pillow" is what the released models do (to RGB, then resize), where that reads the file
rightly. "cached" is a hit in `ImageCache`. An epoch goes through two reading processes. Reports are
the phantoms'; whatever was remembered of earlier ones is forgotten before each call.

    pytest benchmarks/bench_data.py --benchmark-only
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.work import Case, Contender, Work
from emrrg.data.image_cache import ImageCache
from emrrg.data.images import load_image, normalize
from emrrg.data.phantoms import draw_phantom
from emrrg.metrics import labeler, score_reports

SIDE = 224
PIXELS = {"smoke": (256, 312), "default": (2048, 2496), "full": (2048, 2496)}
EPOCH = {"smoke": 4, "default": 24, "full": 64}
REPORTS = {"smoke": 20, "default": 2000, "full": 10000}
KINDS = ("png8", "png16", "jpeg8", "dicom16")
SCORES = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "ROUGE_L", "CIDEr")

LOAD, CACHED, PILLOW = "load_image", "cached", "Pillow"
FIRST, LATER = "first epoch", "later epochs"


@cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """Where files are written; it goes when this process ends."""
    return tempfile.TemporaryDirectory()


def radiograph(height: int, width: int, seed: int) -> np.ndarray:
    """(H, W) uint16, 12 bits used: a bright middle on a dark ground, with grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    smooth = 2200 * np.exp(-3 * x**2) + 900 * np.exp(-8 * (y - 0.3) ** 2) + 200
    return np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 4095).astype(np.uint16)


@cache
def file(kind: str, height: int, width: int, seed: int = 0) -> Path:
    """Write one image of a kind."""
    path = Path(folder().name) / f"{kind}-{height}x{width}-{seed}"
    pixels = radiograph(height, width, seed)
    if kind == "dicom16":
        path = path.with_suffix(".dcm")
        save_dicom(pixels, path)
        return path
    path = path.with_suffix(".jpg" if kind == "jpeg8" else ".png")
    picture = Image.fromarray(pixels if kind == "png16" else (pixels >> 4).astype(np.uint8))
    if kind == "jpeg8":
        picture.save(path, quality=95)
    else:
        picture.save(path)
    return path


def save_dicom(pixels: np.ndarray, path: Path) -> None:
    """12 of 16 bits, with a window over all of them."""
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
    dataset.save_as(path, enforce_file_format=True)


def by_pillow(path: Path) -> np.ndarray:
    """As the released models read an image."""
    with Image.open(path) as picture:
        resized = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return np.asarray(resized)


def build_image(contender: str, kind: str, height: int, width: int) -> Work:
    """File to (224, 224, 3) uint8."""
    path = file(kind, height, width)
    ways: dict[str, Callable[[], np.ndarray]] = {
        LOAD: lambda: load_image(path, SIDE),
        PILLOW: lambda: by_pillow(path),
    }
    if contender == CACHED:
        images = ImageCache(SIDE, 2**24)
        images.load(path)
        ways[CACHED] = lambda: images.load(path)
    run = ways[contender]
    return Work(run, results=lambda: {"pixels": torch.from_numpy(np.array(run())).double()})


def image_truth(kind: str, height: int, width: int) -> dict[str, Tensor]:
    """Grey values by their definition, resized in floating point."""
    values = radiograph(height, width, 0).astype(np.float64)
    if kind == "png16":
        grey = np.rint((values - values.min()) / (values.max() - values.min()) * 255)
    elif kind == "dicom16":  # DICOM PS3.3 C.11.2.1.2, window centre 2048, width 4096
        grey = np.rint(np.clip(((values - 2047.5) / 4095 + 0.5) * 255, 0, 255))
    else:
        with Image.open(file(kind, height, width)) as picture:
            grey = np.asarray(picture).astype(np.float64)
    exact = Image.fromarray(grey.astype(np.float32))
    resized = np.array(exact.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return {"pixels": torch.from_numpy(resized).double()[..., None].expand(-1, -1, 3)}


class Images(Dataset[Tensor]):
    """Pixels of files."""

    def __init__(self, files: Sequence[Path], load: Callable[[Path], np.ndarray]) -> None:
        self.files, self.load = files, load

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.load(self.files[index])))


def build_epoch(contender: str, count: int, height: int, width: int) -> Work:
    """An epoch of JPEG files through two reading processes, normalised."""
    files = [file("jpeg8", height, width, seed) for seed in range(count)]
    caches: list[ImageCache] = []

    def run() -> None:
        load = by_pillow if contender == PILLOW else caches[-1].load
        for batch in DataLoader(Images(files, load), batch_size=8, num_workers=2):
            normalize(batch.permute(0, 3, 1, 2))

    def prepare() -> tuple[()]:
        if contender == FIRST or not caches:
            caches.append(ImageCache(SIDE, 2**28))
            if contender == LATER:
                run()
        return ()

    return Work(run, prepare=prepare)


@cache
def reports(count: int) -> tuple[str, ...]:
    """Reports of phantoms."""
    return tuple(draw_phantom(i, size=16).report for i in range(count))


def forget() -> tuple[()]:
    """Empty what the labeler remembers of earlier sentences."""
    for value in vars(labeler).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    return ()


def build_labels(contender: str, count: int) -> Work:
    """Reports to the 14 observations."""
    texts = reports(count)
    return Work(lambda: [labeler.label_report(text) for text in texts], prepare=forget)


def build_scores(contender: str, count: int) -> Work:
    """BLEU, ROUGE-L and CIDEr of reports against others of the same kind."""
    references = reports(count)
    hypotheses = [*references[1:], references[0]]
    function = by_pycocoevalcap if contender == "pycocoevalcap" else by_emrrg
    run = partial(function, hypotheses, references)
    return Work(
        run, results=lambda: {n: torch.tensor(v, dtype=torch.float64) for n, v in run().items()}
    )


def by_emrrg(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """This project's scores, of which METEOR is left out: a Java program."""
    scores = score_reports(hypotheses, references, meteor="off")
    return {name: scores[name] for name in SCORES}


def by_pycocoevalcap(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The package itself."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth = {i: [text] for i, text in enumerate(references)}
    given = {i: [text] for i, text in enumerate(hypotheses)}
    with redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(truth, given, verbose=0)
        rouge, _ = Rouge().compute_score(truth, given)
        cider, _ = Cider().compute_score(truth, given)
    return dict(zip(SCORES, (*map(float, bleu), float(rouge), float(cider)), strict=True))


def scores_truth(count: int) -> dict[str, Tensor]:
    """The package's, which computes in float64."""
    references = reports(count)
    found = by_pycocoevalcap([*references[1:], references[0]], references)
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}


def cases(size: str) -> list[tuple[Case, Contender]]:
    """Everything that a size measures."""
    height, width = PIXELS[size]
    pairs = []
    for kind in KINDS:
        reason = {"png16": "clips 16 bits to white", "dicom16": "reads no DICOM"}.get(kind)
        case = Case(
            suite="data",
            group=f"image-{kind}-{height}x{width}",
            build=build_image,
            arguments={"kind": kind, "height": height, "width": width},
            truth=image_truth,
            tolerance=0.0075,  # two grey levels: the 8-bit filter rounds twice
            items=(1, "images"),
            memory=False,
        )
        contenders = [
            Contender(LOAD, ours=True),
            Contender(CACHED, ours=True),
            Contender(PILLOW, missing=lambda reason=reason: reason),  # type: ignore[misc]
        ]
        pairs += [(case, contender) for contender in contenders]
    case = Case(
        suite="data",
        group=f"epoch-jpeg8-{EPOCH[size]}-images",
        build=build_epoch,
        arguments={"count": EPOCH[size], "height": height, "width": width},
        items=(EPOCH[size], "images"),
        memory=False,
    )
    contenders = [Contender(FIRST, ours=True), Contender(LATER, ours=True), Contender(PILLOW)]
    pairs += [(case, contender) for contender in contenders]
    count = REPORTS[size]
    shared: dict[str, Any] = {
        "suite": "data",
        "arguments": {"count": count},
        "items": (count, "reports"),
        "memory": False,
    }
    labels = Case(group=f"labels-{count}-reports", build=build_labels, **shared)
    scores = Case(
        group=f"scores-{count}-reports",
        build=build_scores,
        truth=scores_truth,
        tolerance=1e-9,
        **shared,
    )
    ours = Contender("emrrg", ours=True)
    return [*pairs, (labels, ours), (scores, ours), (scores, Contender("pycocoevalcap"))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case and contender."""
    pairs = cases(metafunc.config.getoption("--size"))
    names = [f"{case.group}-{contender.name}" for case, contender in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=names)


def test_data(case: Case, contender: Contender, measure: Any) -> None:
    """One contender of one case."""
    measure(case, contender)
