"""What every source of data becomes: one record a study.

A record holds its images as paths, never as pixels, so a list of 370,000 of them is small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Record:
    """One study: its images, its report and what else the source says of it."""

    id: str
    """Unique in the annotation file."""
    report: str
    """As the source has it; `emrrg.data.reports.clean_report` prepares it for a model."""
    images: tuple[Path, ...]
    """One path a view, at least one."""
    split: str
    """``train``, ``val`` or ``test``."""
    labels: dict[str, int | None] | None = None
    """CheXpert observation to 1 (positive), 0 (negative), -1 (uncertain) or None (not mentioned);
    None where the source has no labels at all."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Every other field of the source's record: patient, view, sex, age, sections, licence..."""
