"""Phantoms: synthetic chest radiographs with reports, findings and their places.

No clinical picture may ship with this project, so it draws its own. A phantom is a procedurally
drawn frontal radiograph of a patient who never was, the report that a radiologist would dictate,
the 14 CheXpert observations, and where on the image each finding lies. Phantoms prove that a
model looks at the image; they say nothing about real X-rays.

    python -m emrrg.data.phantoms --contact-sheet docs/phantoms.png
    python -m emrrg.data.phantoms --export phantoms/ --studies 100
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from emrrg.config import parse_config, run_command
from emrrg.data.phantom_cases import DOMAINS, RATES, Domain, sample_cases, write_report
from emrrg.data.phantom_images import Box, draw
from emrrg.data.records import SPLITS
from emrrg.errors import InputError

log = logging.getLogger("emrrg.data.phantoms")

NOTICE = "Synthetic: procedurally drawn, not an X-ray of any patient."


@dataclass(frozen=True)
class Finding:
    """Something drawn on a phantom and told in its report."""

    observation: str
    """CheXpert's name."""
    side: str
    """``right`` or ``left`` (the patient's), ``bilateral`` or ``central``."""
    zone: str
    """``upper``, ``mid``, ``lower``, or ``""`` where zones do not apply."""
    severity: str
    """``mild``, ``moderate``, ``severe``; ``small``, ``moderate``, ``large``; or ``""``."""
    boxes: tuple[Box, ...]
    """Where it is: (left, top, right, bottom) as fractions of the image, one box a side."""
    sentence: str
    """The report's sentence that tells it, without the stop."""


@dataclass(frozen=True)
class Phantom:
    """One synthetic study."""

    image: NDArray[np.uint8]
    """(size, size) uint8, bone white."""
    report: str
    """Lower case, sentences joined by " . ", a final " ."."""
    labels: dict[str, int]
    """The 14 CheXpert observations in their order, 1 or 0, as a faithful labeler reads them in
    the report; devices alone leave No Finding at 1, as CheXpert's labeler does."""
    findings: tuple[Finding, ...]
    """What was drawn, in CheXpert's order."""


def phantom_split(split: str, count: int, *, domain: str, seed: int) -> range:
    """Numbers of the phantoms of a split.

    Args:
        split: ``train``, ``val`` or ``test``; no two of them share a number.
        count: studies; more of them extend the fewer.
        domain: ``source`` or ``target``.
        seed: as for `draw_phantom`.
    Returns:
        `count` numbers for `draw_phantom`.
    Raises:
        InputError: an unknown split or domain, or a negative count or seed.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    _check(domain, seed)
    if count < 0:
        raise InputError(f"count: {count} is below 0")
    first = SPLITS.index(split)
    return range(first, first + len(SPLITS) * count, len(SPLITS))


def draw_phantom(
    index: int, *, domain: Domain = "target", size: int = 224, seed: int = 42
) -> Phantom:
    """Draw one phantom.

    Index, domain and seed determine the patient, the report and the labels, on every platform; the
    size only how finely the image is drawn. Pixels are the same from run to run, and within one
    grey level where another platform's exponential function rounds otherwise.

    Args:
        index: its number, at least 0.
        domain: the hospital: scanner, mix of findings, and manner of reporting.
        size: pixels a side, at least 16.
        seed: phantoms of different seeds differ.
    Raises:
        InputError: an unknown domain, a negative number or seed, or too small a size.
    """
    _check(domain, seed)
    if index < 0:
        raise InputError(f"index: {index} is below 0")
    if size < 16:
        raise InputError(f"size: {size} pixels a side; expected at least 16")
    key = np.random.SeedSequence([seed, DOMAINS.index(domain), index])
    chances = [np.random.default_rng(part) for part in key.spawn(5)]
    cases = sample_cases(chances[0], domain)
    report, told = write_report(cases, chances[1], domain)
    image, boxes = draw(cases, domain, size, *chances[2:])
    findings = tuple(
        Finding(
            c.observation, c.side, c.zone, c.severity, boxes[c.observation], told[c.observation]
        )
        for c in cases
    )
    return Phantom(image, report, _labels(told), findings)


def _labels(told: dict[str, str]) -> dict[str, int]:
    pathology = set(told) - {"Support Devices"}
    return {"No Finding": int(not pathology), **{name: int(name in told) for name in RATES}}


def _check(domain: str, seed: int) -> None:
    if domain not in DOMAINS:
        raise InputError(f"domain {domain!r}: expected one of {', '.join(DOMAINS)}")
    if seed < 0:
        raise InputError(f"seed: {seed} is below 0")


@dataclass(frozen=True)
class PhantomConfig:
    """Draw synthetic studies: a sheet to look at, or a data set in R2Gen's format."""

    contact_sheet: str | None = None
    """Write a PNG that shows phantoms of both hospitals with their findings and reports."""
    export: str | None = None
    """Write PNG files and an annotation.json for `emrrg.train --dataset custom` to this folder."""
    domain: Domain = "target"
    """Which synthetic hospital (--export)."""
    studies: int = 8
    """Studies a hospital (--contact-sheet), or a split (--export)."""
    size: int = 224
    """Pixels a side."""
    seed: int = 42
    """Phantoms of different seeds differ."""

    def __post_init__(self) -> None:
        if (self.contact_sheet is None) == (self.export is None):
            raise InputError("give either --contact-sheet FILE.png or --export FOLDER")
        if self.contact_sheet is not None and Path(self.contact_sheet).suffix.lower() != ".png":
            raise InputError(f"--contact-sheet: {self.contact_sheet} does not end in .png")
        if self.studies < 1:
            raise InputError(f"--studies: {self.studies} is not at least 1")
        if self.size < 16:
            raise InputError(f"--size: {self.size} is not at least 16")
        if self.seed < 0:
            raise InputError(f"--seed: {self.seed} is below 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; arguments and errors as `emrrg.train.main`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    config, _ = parse_config(PhantomConfig, argv, "emrrg.data.phantoms")
    if config.contact_sheet is not None:
        from emrrg.data.phantom_sheet import draw_sheet

        draw_sheet(Path(config.contact_sheet), config.studies, config.size, config.seed)
        log.info("%s: phantoms of both hospitals (synthetic)", config.contact_sheet)
    if config.export is not None:
        export(Path(config.export), config)
        log.info("%s: annotation.json and images/ (synthetic)", config.export)
    return 0


def export(folder: Path, config: PhantomConfig) -> None:
    """Write phantoms as files: ``images/<split>/<id>.png`` and ``annotation.json``.

    Args:
        folder: made where it does not exist; files of the same names are replaced.
        config: domain, studies a split, size, seed.
    Raises:
        OSError: a file cannot be written.
    """
    note = PngInfo()
    note.add_text("Comment", NOTICE)
    annotation: dict[str, list[dict[str, object]]] = {}
    for split in SPLITS:
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        annotation[split] = []
        for i in phantom_split(split, config.studies, domain=config.domain, seed=config.seed):
            phantom = draw_phantom(i, domain=config.domain, size=config.size, seed=config.seed)
            name = f"phantom-{config.domain}-{config.seed}-{i}"
            Image.fromarray(phantom.image).save(
                folder / "images" / split / f"{name}.png", pnginfo=note
            )
            annotation[split].append(
                {
                    "id": name,
                    "report": phantom.report,
                    "image_path": [f"{split}/{name}.png"],
                    "split": split,
                    "labels": phantom.labels,
                    "synthetic": True,
                }
            )
    text = json.dumps(annotation, indent=1)
    (folder / "annotation.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
