"""From flags to data sets: the three splits of a run."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from emrrg.config import TrainConfig
from emrrg.data.dataset import PhantomStudies, RecordStudies, Studies
from emrrg.data.r2gen import read_annotation
from emrrg.data.reports import Style, clean_report
from emrrg.errors import InputError

SPLITS = ("train", "val", "test")
STYLES: dict[str, Style] = {
    "iu_xray": "iu_xray",
    "mimic_cxr": "mimic_cxr",
    "chexpert_plus": "mimic_cxr",
}
PHANTOM_COUNTS = {"train": 1000, "val": 64, "test": 300}


def load_studies(
    config: TrainConfig, image_size: int, splits: tuple[str, ...] = SPLITS
) -> dict[str, Studies]:
    """The data that the flags describe.

    Args:
        config: training flags; ``dataset``, ``annotation``, ``images``, ``fit``, ``clean``,
            ``marks``, ``*_studies``, ``domain``.
        image_size: pixels a side.
        splits: which of train, val and test to load.
    Returns:
        Split name to data set.
    Raises:
        InputError: the annotation or an image it names is missing or wrong, or a split that is
            needed is empty.
    """
    counts = {split: getattr(config, f"{split}_studies") for split in SPLITS}
    studies: dict[str, Studies] = {}
    if config.dataset == "phantoms":
        for split in splits:
            studies[split] = PhantomStudies(
                split,
                counts[split] or PHANTOM_COUNTS[split],
                domain=config.domain,
                size=image_size,
                seed=config.seed,
                processes=_processes(),
            )
        return studies
    if config.annotation is None or config.images is None:
        raise InputError("--annotation and --images: needed for a data set of your own")
    records = read_annotation(
        Path(config.annotation),
        Path(config.images),
        check_files=config.bad_images == "fail",  # else they are left out when they are read
    )
    style = config.clean if config.clean != "auto" else STYLES.get(config.dataset or "", "plain")
    for split in splits:
        chosen = [
            dataclasses.replace(
                record, report=clean_report(record.report, style, marks=config.marks)
            )
            for record in list(records.get(split, ()))[: counts[split]]
        ]
        if not chosen and split != "val":
            raise InputError(f"--annotation: {config.annotation} has no {split!r} studies")
        studies[split] = RecordStudies(chosen, image_size, fit=config.fit)
    return studies


def data_workers(config: TrainConfig, device: torch.device) -> int:
    """Processes that read images: as asked; none for phantoms (they are in memory) or the CPU."""
    if config.workers is not None:
        return config.workers
    return 0 if config.dataset == "phantoms" or device.type == "cpu" else _processes()


def _processes() -> int:
    """At most 8, and no more than this process's share of the machine (torchrun starts several)."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // here))
