"""What every source of data becomes: one record a study; and what a source holds before that.

A record holds its images as paths, never as pixels, so a list of 370,000 of them is small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLITS = ("train", "val", "test")
POSITIONS = ("PA", "AP", "FRONTAL", "", "LATERAL")
"""Projections in order of preference where one is to be chosen; "" is an unknown one."""


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


@dataclass(frozen=True)
class View:
    """One image of a study."""

    path: str
    """Relative to the images folder, with forward slashes."""
    position: str = ""
    """One of `POSITIONS`."""


@dataclass(frozen=True)
class SourceStudy:
    """One study as its source has it, before anything is chosen."""

    id: str
    sections: Mapping[str, str]
    """Section name to text, under the names of `emrrg.data.reports.parse_sections`; ``full`` is
    the whole report where the source has one."""
    views: tuple[View, ...]
    patient: str | None = None
    """None where the source does not say."""
    split: str | None = None
    """``train``, ``val``, ``test`` or None."""
    labels: dict[str, int | None] | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dropped:
    """Something in the source of which no record is made."""

    id: str
    reason: str
    """A few words, the same for all of its kind."""
    detail: str = ""
    """Of this one."""
