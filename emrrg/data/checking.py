"""Look at every record and every image of a data set, and say what is wrong.

Errors stop a training (missing or broken image, empty report, duplicate id, malformed record);
warnings are for a person to judge (an inverted or coloured picture, an absurd size, a patient or
a report on both sides of a split).
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emrrg.data.images import looks_inverted, open_image
from emrrg.data.r2gen import PATIENT_FIELDS, scan_annotation
from emrrg.data.records import SPLITS, Record
from emrrg.errors import InputError

SMALLEST_SIDE = 64  # pixels
WIDEST = 3.0  # longer side over shorter side
COLOURED = 12.0  # mean difference between the channels, of 255; burnt-in arrows stay below it
THUMBNAIL = 112  # pixels, the longer side
FLAT = 3.0  # standard deviation of the grey values, of 255


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    severity: Literal["error", "warning"]
    kind: str
    """A few words, the same for all of its kind."""
    where: str
    """``train[3] (CXR12)``, or the splits concerned."""
    detail: str = ""
    path: str = ""
    """The image concerned, if there is one."""


@dataclass(frozen=True)
class ImageFacts:
    """What one image file turned out to be."""

    path: Path
    error: str = ""
    width: int = 0
    height: int = 0
    mode: str = ""
    """Pillow's mode, or DICOM."""
    warnings: tuple[str, ...] = ()
    fingerprint: str = ""
    """Equal for equal pixels."""
    thumbnail: bytes = b""
    """JPEG."""


@dataclass
class Findings:
    """The result of `check`."""

    records: dict[str, int] = field(default_factory=dict)
    """Split to number of records."""
    problems: list[Problem] = field(default_factory=list)
    images: dict[str, ImageFacts] = field(default_factory=dict)
    """Path to facts, each file once."""
    used_by: dict[str, str] = field(default_factory=dict)
    """Path to the first record that uses it."""
    words: list[int] = field(default_factory=list)
    """Length of each report, in words."""

    @property
    def errors(self) -> int:
        return sum(p.severity == "error" for p in self.problems)

    def summary(self, shown: int = 5) -> str:
        """Problems by kind, with examples, in lines for a person.

        Args:
            shown: examples of each kind.
        """
        splits = ", ".join(f"{s} {self.records.get(s, 0):,}" for s in SPLITS)
        total = sum(self.records.values())
        lines = [f"{total:,} records ({splits}), {len(self.images):,} image files"]
        grouped: dict[tuple[str, str], list[Problem]] = defaultdict(list)
        for problem in self.problems:
            grouped[problem.severity, problem.kind].append(problem)
        for (severity, kind), group in sorted(grouped.items()):
            lines.append(f"{severity}: {kind}: {len(group):,}")
            for problem in group[:shown]:
                lines.append(f"    {problem.where}{problem.detail and ': ' + problem.detail}")
            if len(group) > shown:
                lines.append(f"    and {len(group) - shown:,} more")
        warnings = len(self.problems) - self.errors
        lines.append(f"{self.errors:,} errors, {warnings:,} warnings")
        return "\n".join(lines)


def check(
    annotation: Path,
    images: Path,
    *,
    workers: int = 0,
    pictures: int = 240,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> Findings:
    """Read every record and image.

    Args:
        annotation: annotation file.
        images: folder that its paths start from.
        workers: processes; 0: read in this one.
        pictures: keep small pictures of so many images at random, and of as many with problems.
        progress: wraps the images as they come, given how many there are (a progress bar).
    Returns:
        What was found.
    Raises:
        InputError: the file is no annotation, the folder is missing, or a reading process died.
    """
    if not images.is_dir():
        raise InputError(f"--images: {images}: no such folder")
    findings = Findings(records=dict.fromkeys(SPLITS, 0))
    records: list[tuple[str, Record]] = []
    for where, wrong, record in scan_annotation(annotation, images):
        findings.problems += [Problem("error", *_kind(text, where)) for text in wrong]
        split = where.split("[")[0]
        findings.records[split] += 1
        if record is not None:
            records.append((where, record))
    for where, record in records:
        _check_record(findings, where, record)
    _check_patients(findings, records)
    _check_reports(findings, records)

    paths = list(findings.used_by)
    sample = set(random.Random(0).sample(paths, min(pictures, len(paths))))
    wanted = [(path, path in sample) for path in paths]
    facts: Iterable[ImageFacts] = _read_all(wanted, workers)
    kept = 0
    for fact in progress(facts, len(paths)) if progress else facts:
        path = str(fact.path)
        if fact.thumbnail and path not in sample:
            kept += 1
            if kept > pictures:
                fact = replace(fact, thumbnail=b"")
        findings.images[path] = fact
        where = findings.used_by[path]
        if fact.error:
            kind = "missing image" if fact.error == "no such file" else "unreadable image"
            findings.problems.append(Problem("error", kind, where, f"{path}: {fact.error}", path))
        for kind in fact.warnings:
            size = f"{path}: {fact.width} x {fact.height}, {fact.mode}"
            findings.problems.append(Problem("warning", kind, where, size, path))
    _check_twins(findings)
    return findings


def inspect_image(path: str | Path, picture_wanted: bool = True) -> ImageFacts:
    """Decode one image and judge it; never raises for a bad file.

    Args:
        path: the file.
        picture_wanted: make a small picture even if nothing is wrong.
    """
    path = Path(path)
    try:
        picture = open_image(path)
        mode = _stored_mode(path)
    except InputError as error:
        return ImageFacts(path, error=str(error).removeprefix(f"{path}: "))
    except MemoryError:
        return ImageFacts(path, error="not enough memory to decode it")
    pixels = np.asarray(picture)
    grey = np.asarray(picture.convert("L"))
    warnings = tuple(_judge(pixels, grey, mode))
    return ImageFacts(
        path,
        width=picture.width,
        height=picture.height,
        mode=mode,
        warnings=warnings,
        fingerprint=blake2b(grey.tobytes(), digest_size=12).hexdigest(),
        thumbnail=_thumbnail(picture) if picture_wanted or warnings else b"",
    )


def _judge(pixels: NDArray[np.uint8], grey: NDArray[np.uint8], mode: str) -> Iterator[str]:
    height, width = grey.shape
    if min(height, width) < SMALLEST_SIDE:
        yield f"absurd size: a side of less than {SMALLEST_SIDE} pixels"
    if max(height, width) > WIDEST * min(height, width):
        yield f"absurd size: one side more than {WIDEST:g} times the other"
    if grey.std() < FLAT:
        yield "blank: hardly any contrast"
    elif looks_inverted(grey):
        yield "looks inverted (air white)"
    if pixels.ndim == 3:
        few = pixels[:: max(height // 256, 1), :: max(width // 256, 1)].astype(np.int16)
        if np.abs(few - few.mean(axis=-1, keepdims=True)).mean() * 1.5 > COLOURED:
            yield "wrong mode: a coloured picture"
    if mode in ("CMYK", "1"):
        yield f"wrong mode: {'for print (CMYK)' if mode == 'CMYK' else 'two values only'}"


def _stored_mode(path: Path) -> str:
    try:
        with Image.open(path) as picture:
            return picture.mode
    except OSError:
        return "DICOM"


def _thumbnail(picture: Image.Image) -> bytes:
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _read_all(wanted: Sequence[tuple[str, bool]], workers: int) -> Iterator[ImageFacts]:
    if workers < 1 or len(wanted) < 2:
        yield from map(_inspect, wanted)
        return
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    done = 0
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            for fact in pool.map(_inspect, wanted, chunksize=min(16, -(-len(wanted) // workers))):
                yield fact
                done += 1
        except BrokenProcessPool:
            raise InputError(
                f"a reading process died at or soon after {wanted[min(done, len(wanted) - 1)][0]} "
                "(out of memory?): try --workers 1"
            ) from None


def _inspect(wanted: tuple[str, bool]) -> ImageFacts:
    return inspect_image(*wanted)


def _kind(text: str, where: str) -> tuple[str, str, str]:
    if text.startswith("id "):
        return "duplicate id", where, text
    return "malformed record", where, text


def _check_record(findings: Findings, where: str, record: Record) -> None:
    findings.words.append(len(record.report.split()))
    if not record.report.strip():
        findings.problems.append(Problem("error", "empty report", where))
    elif len(record.report.split()) < 3:
        detail = repr(record.report.strip())
        findings.problems.append(Problem("warning", "report of one or two words", where, detail))
    for path in map(str, record.images):
        if other := findings.used_by.get(path):
            kind = "image used twice"
            if other.split("[")[0] != record.split:
                kind = "same picture across splits"
            detail = f"{path}, also {other}"
            findings.problems.append(Problem("warning", kind, where, detail, path))
        else:
            findings.used_by[path] = where


def _check_patients(findings: Findings, records: Sequence[tuple[str, Record]]) -> None:
    splits: dict[str, dict[str, str]] = defaultdict(dict)
    for where, record in records:
        name = next((n for n in PATIENT_FIELDS if record.attributes.get(n)), None)
        if name:
            splits[str(record.attributes[name])].setdefault(record.split, where)
    for patient, held in splits.items():
        if len(held) > 1:
            detail = f"patient {patient}: {', '.join(held.values())}"
            where = " and ".join(held)
            findings.problems.append(
                Problem("warning", "same patient across splits", where, detail)
            )


def _check_reports(findings: Findings, records: Sequence[tuple[str, Record]]) -> None:
    """One line a pair of splits: in normal studies many reports are the same word for word."""
    texts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for _, record in records:
        texts[record.split][" ".join(record.report.lower().split())] += 1
    for earlier, later in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = sum(n for text, n in texts[later].items() if text and text in texts[earlier])
        if shared:
            total = sum(texts[later].values())
            detail = (
                f"{shared:,} of {total:,} reports of {later} ({shared / total:.0%}) "
                f"stand word for word in {earlier}"
            )
            findings.problems.append(
                Problem("warning", "same report across splits", f"{earlier} and {later}", detail)
            )


def _check_twins(findings: Findings) -> None:
    first: dict[str, str] = {}
    for path, fact in findings.images.items():
        if not fact.fingerprint or any(w.startswith("blank") for w in fact.warnings):
            continue
        twin = first.setdefault(fact.fingerprint, path)
        if twin != path:
            where, other = findings.used_by[path], findings.used_by[twin]
            across = where.split("[")[0] != other.split("[")[0]
            kind = "same picture across splits" if across else "same picture twice"
            detail = f"{path} and {twin} ({other})"
            findings.problems.append(Problem("warning", kind, where, detail, path))
