"""Generate reports for a data set, score them, and show some of them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from emrrg.config import TrainConfig
from emrrg.data.dataset import Labels, Studies, batches, even_batches
from emrrg.data.images import normalize
from emrrg.data.loading import data_workers
from emrrg.distributed import World
from emrrg.errors import InputError
from emrrg.metrics import score_reports
from emrrg.metrics.clinical import LABELER, label_report, score_labels
from emrrg.model import ReportGenerator
from emrrg.runs import generation_of, write_json

SAMPLES = 8  # studies shown in samples.md


@dataclass(frozen=True)
class Evaluation:
    """Reports generated for a data set, and their scores."""

    scores: dict[str, Any]
    ids: list[str]
    hypotheses: list[str]
    references: list[str]
    seconds: float = 0.0
    """That the network took to write them, in this process."""

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


class StoppedError(Exception):
    """A signal came while reports were written; every process of the run raises it."""


@dataclass(frozen=True)
class _Written:
    """What `write_reports` returns; see there."""

    indices: list[int]
    ids: list[str]
    reports: list[str]
    failures: list[str]
    seconds: float


def write_reports(
    model: ReportGenerator,
    studies: Studies,
    config: TrainConfig,
    device: torch.device,
    *,
    label: str = "generating",
    world: World | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> _Written:
    """Generate a report for every study, each in exactly one process.

    Returns:
        ``indices``, ``ids`` and ``reports`` of the studies that could be read, in the data set's
        order and the same in every process; ``failures``, one line for each that could not (with
        ``bad_images`` "skip"); and the ``seconds`` in the network, of this process.
    Raises:
        StoppedError: `stopped` said so in some process.
    """
    world = world or World()
    model.eval()
    mine = list(range(len(studies)))[world.rank :: world.size]
    plan = [[mine[i] for i in part] for part in even_batches(len(mine), config.eval_batch_size)]
    written: dict[int, tuple[str, str]] = {}
    failures: list[str] = []
    busy = 0.0
    workers, skip = data_workers(config, device), config.bad_images == "skip"
    hidden = not sys.stderr.isatty() or not world.is_main
    with tqdm(total=len(mine), desc=label, leave=False, disable=hidden) as bar:
        for batch in batches(studies, plan, workers=workers, skip_bad=skip):
            if stopped():
                break
            failures += batch.failures
            started = time.perf_counter()
            if batch.ids:
                images = normalize(batch.images.to(device))
                with autocast(device, config.precision):
                    reports = model.generate_batch(
                        images, batch.view_mask.to(device), generation_of(config)
                    )
                for index, name, report in zip(batch.indices, batch.ids, reports, strict=True):
                    written[index] = (name, report)
            busy += time.perf_counter() - started
            bar.update(len(batch.ids) + len(batch.failures))
    everything: dict[int, tuple[str, str]] = {}
    unread: list[str] = []
    stop = False
    for part, lines, told in world.gather((written, failures, stopped())):
        everything |= part
        unread += lines
        stop |= told
    if stop:
        raise StoppedError
    indices = sorted(everything)
    ids, texts = ([everything[i][k] for i in indices] for k in (0, 1))
    return _Written(indices, ids, texts, unread, busy)


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
    world: World | None = None,
    stopped: Callable[[], bool] = lambda: False,
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
        world: the processes that share the work; None: this one alone.
        stopped: whether a signal came; asked after every batch.
    Returns:
        The same in every process. The scores of `emrrg.metrics.score_reports`, and "clinical" of
        `emrrg.metrics.clinical.score_labels`: the project's labeler on the reports, against the
        labels that the data set knows, or else against the labeler's on the references.
    Raises:
        InputError: no study could be read.
        StoppedError: as `write_reports`.
    """
    world = world or World()
    started = time.perf_counter()
    written = write_reports(
        model, studies, config, device, label=label, world=world, stopped=stopped
    )
    seconds = time.perf_counter() - started
    if not written.ids:
        raise InputError(f"no study of this split could be read; the first: {written.failures[0]}")
    reports, labels = studies.reports(), studies.labels()
    references = [reports[i] for i in written.indices]

    def score() -> dict[str, Any]:
        truth, source = true_labels(references, [labels[i] for i in written.indices])
        scores = score_reports(
            written.reports,
            references,
            protocol=config.protocol,
            max_tokens=config.max_report_tokens,
            bootstrap=bootstrap,
            seed=config.seed,
            meteor="auto" if meteor else "off",
            train_reports=train_reports,
        )
        settings = (truth, source, bootstrap, config.seed)
        scores["clinical"] = clinical_scores(written.reports, *settings)
        scores["reports_per_second"] = len(written.reports) / max(seconds, 1e-9)
        scores["unreadable"] = written.failures
        if train_reports is not None:
            constant = scores["baselines"]["constant"]
            same = [constant["report"]] * len(references)
            constant["clinical"] = clinical_scores(same, *settings)
        return scores

    return Evaluation(world.once(score), written.ids, written.reports, references, written.seconds)


def true_labels(
    references: Sequence[str], known: Sequence[Labels | None]
) -> tuple[list[Labels], str]:
    """The labels to score against, and where they come from."""
    if all(labels is not None for labels in known):
        return [labels or {} for labels in known], f"{LABELER}; references: the data set's labels"
    return [label_report(report) for report in references], f"{LABELER}; references: the same"


def clinical_scores(
    hypotheses: Sequence[str], truth: Sequence[Labels], source: str, bootstrap: int, seed: int
) -> dict[str, Any]:
    """Findings of generated reports against the true ones."""
    labels = [label_report(report) for report in hypotheses]
    return score_labels(labels, truth, bootstrap=bootstrap, seed=seed, source=source)


def headline(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """The few scores of a line or a curve, under the names that people read."""
    names = {"BLEU_4": "BLEU-4", "METEOR": "METEOR", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr"}
    line = {shown: scores.get(name) for name, shown in names.items()}
    return {**line, "finding F1": scores["clinical"]["findings"]["micro"]["f1"]}


def format_scores(scores: Mapping[str, Any]) -> str:
    """Scores on one line."""
    return "  ".join(f"{n} {v:.3f}" for n, v in headline(scores).items() if v is not None)


def score_table(scores: Mapping[str, Any]) -> str:
    """All scores as a table: value, 95 % interval, and the constant report's beside it."""
    rows: list[tuple[str, float | None, Sequence[float] | None, float | None]] = []
    constant = scores["baselines"].get("constant", {})
    for name in ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "METEOR", "ROUGE_L", "CIDEr"):
        interval = scores["intervals"].get(name)
        rows.append((name.replace("_", "-"), scores[name], interval, constant.get(name)))
    for title, kind in (("finding", "findings"), ("14 observations", "all"), ("5", "five")):
        for average in ("micro", "macro", "example"):
            interval = scores["clinical"]["intervals"].get(kind, {}).get(average, {}).get("f1")
            value = scores["clinical"][kind][average]["f1"]
            base = constant.get("clinical")
            rows.append(
                (f"{title} F1, {average}", value, interval, base and base[kind][average]["f1"])
            )
    lines = [f"{'':<26}{'score':>8}   {'95 % interval':<18}{'constant report':>16}"]
    for name, value, interval, base in rows:
        score = f"{value:8.3f}" if value is not None else f"{'-':>8}"
        span = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        other = f"{base:16.3f}" if base is not None else ""
        lines.append(f"{name:<26}{score}   {span:<18}{other}".rstrip())
    lines.append(
        f"{scores['pairs']} studies, protocol {scores['protocol']}, tokenization "
        f"{scores['tokenization']}; uncertain counts as {scores['clinical']['uncertain']}; "
        f"labels: {scores['clinical']['labeler']}"
    )
    lines += [f"{name}: not computed ({why})" for name, why in scores["missing"].items()]
    if scores["unreadable"]:
        lines.append(f"{len(scores['unreadable'])} studies could not be read and were left out")
    return "\n".join(lines)


def selection_score(scores: Mapping[str, Any], config: TrainConfig) -> float:
    """What the best weights are chosen by (SPEC section 4: 0.8 BLEU-4 + 0.2 CIDEr)."""
    return config.select_bleu4 * scores["BLEU_4"] + config.select_cider * scores["CIDEr"]


def write_predictions(path: Path, result: Evaluation) -> None:
    """One object a study: id, generated report, reference."""
    rows = [
        {"id": name, "hypothesis": hypothesis, "reference": reference}
        for name, hypothesis, reference in zip(
            result.ids, result.hypotheses, result.references, strict=True
        )
    ]
    write_json(path, rows)


def write_samples(folder: Path, result: Evaluation, studies: Studies, title: str) -> None:
    """Write ``samples.md``: some studies with image, reference and generated report.

    The pictures lie in ``samples/``; studies are taken evenly over the data set.
    """
    (folder / "samples").mkdir(exist_ok=True)
    count = min(SAMPLES, len(result.ids))
    by_id = {name: i for i, name in enumerate(result.ids)}
    lines = [f"# Samples: {title}", ""]
    shown = 0
    for index in range(0, len(studies), max(1, len(studies) // count)):
        try:
            study = studies[index]
        except InputError:
            continue
        if study.id not in by_id or shown == count:
            continue
        shown += 1
        i = by_id[study.id]
        name = f"samples/{title}-{shown}.png"
        views = torch.cat(list(study.images), dim=2).permute(1, 2, 0).numpy()
        Image.fromarray(views).save(folder / name)
        synthetic = " (synthetic)" if study.findings or study.id.startswith("phantom") else ""
        lines += [
            f"## {study.id}{synthetic}", "", f"![{study.id}]({name})", "",
            f"**reference**: {result.references[i]}", "",
            f"**generated**: {result.hypotheses[i]}", "",
        ]  # fmt: skip
    lines.append("Generated text, for research only: not a diagnosis.")
    (folder / "samples.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
