"""Generate reports for a data set, score them, and show some of them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from emrrg.config import TrainConfig
from emrrg.data.dataset import Studies, batches
from emrrg.data.images import normalize
from emrrg.metrics import score_reports
from emrrg.metrics.clinical import label_report, score_labels
from emrrg.model import ReportGenerator
from emrrg.runs import generation_of, write_json


@dataclass(frozen=True)
class Evaluation:
    """Reports generated for a data set, and their scores."""

    scores: dict[str, Any]
    ids: list[str]
    hypotheses: list[str]
    references: list[str]

    def brief(self) -> dict[str, float | None]:
        """The scores that curves are drawn of."""
        return headline(self.scores)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast in the type asked for; ``auto`` is bf16 on CUDA and none on the CPU."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "fp32":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype=dtype)


def write_reports(
    model: ReportGenerator,
    studies: Studies,
    config: TrainConfig,
    device: torch.device,
    label: str = "generating",
) -> tuple[list[str], list[str]]:
    """Generate a report for every study.

    Returns:
        The ids and the reports, in the data set's order.
    """
    model.eval()
    ids: list[str] = []
    reports: list[str] = []
    bar = tqdm(total=len(studies), desc=label, leave=False, disable=not sys.stderr.isatty())
    with bar:
        for batch in batches(studies, config.eval_batch_size, workers=config.workers or 0):
            images = normalize(batch.images.to(device))
            with autocast(device, config.precision):
                reports += model.generate_batch(
                    images, batch.view_mask.to(device), generation_of(config)
                )
            ids += batch.ids
            bar.update(len(batch.ids))
    return ids, reports


def evaluate_model(
    model: ReportGenerator,
    studies: Studies,
    config: TrainConfig,
    device: torch.device,
    *,
    train_reports: Sequence[str] | None = None,
    meteor: bool = True,
    bootstrap: int = 0,
    label: str = "generating",
) -> Evaluation:
    """Generate reports for a data set and score them.

    Args:
        model: the system.
        studies: what to write reports for.
        config: generation settings, batch size, precision, protocol, seed.
        device: where the model is.
        train_reports: for the baselines that a score must be read against.
        meteor: whether METEOR (a Java process of some seconds) is wanted.
        bootstrap: resamples for the intervals; 0 for none.
        label: what the progress bar says.
    """
    started = time.perf_counter()
    ids, hypotheses = write_reports(model, studies, config, device, label)
    seconds = time.perf_counter() - started
    references = studies.reports()
    scores = score_reports(
        hypotheses,
        references,
        protocol=config.protocol,
        max_tokens=config.max_report_tokens,
        bootstrap=bootstrap,
        seed=config.seed,
        meteor="auto" if meteor else "off",
        train_reports=train_reports,
    )
    truth = [true_labels(studies, i) for i in range(len(references))]
    source = "drawn" if config.dataset == "phantoms" else "labeler, on the references"
    scores["clinical"] = clinical_scores(hypotheses, truth, source, bootstrap, config.seed)
    scores["reports_per_second"] = len(hypotheses) / max(seconds, 1e-9)
    if train_reports is not None:
        constant = scores["baselines"]["constant"]
        same = [constant["report"]] * len(references)
        constant["clinical"] = clinical_scores(same, truth, source, bootstrap, config.seed)
    return Evaluation(scores, ids, hypotheses, references)
