"""Generate reports for a data set, score them, and show some of them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from emrrg.config import TrainConfig
from emrrg.data.dataset import Studies, batches, even_batches, readers_may_die
from emrrg.data.images import normalize
from emrrg.data.loading import data_workers
from emrrg.distributed import World, in_step
from emrrg.errors import InputError
from emrrg.jsonl import replaced
from emrrg.metrics import score_reports
from emrrg.metrics.clinical import Labels, score_comparisons, score_policies, score_sides
from emrrg.metrics.java import meteor_ahead
from emrrg.model import ReportGenerator
from emrrg.runs import generation_of, write_json
from emrrg.scoring import Scoring, known_labels
from emrrg.system import out_of_memory

SAMPLES = 8  # studies shown in samples.md
MIN_COUNTS = {"mimic_cxr": 10}
"""R2Gen's protocol: words rarer than this are unknown; 3 elsewhere."""


@dataclass(frozen=True)
class Evaluation:
    """Reports generated for a data set, and their scores."""

    scores: dict[str, Any]
    ids: list[str]
    hypotheses: list[str]
    references: list[str]
    seconds: float = 0.0
    """That the network took to write them, in this process."""
    scoring_seconds: float = 0.0
    """That the scores took."""
    indices: list[int] = field(default_factory=list)
    """Where the studies stand in the data set."""
    predicted: list[Labels] = field(default_factory=list)
    """The labels of the hypotheses."""
    truth: list[Labels] = field(default_factory=list)
    """The labels of the references."""
    per_report: dict[str, list[float]] = field(default_factory=dict)
    """Score to its value for every study, where that was asked for."""

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
    bar = tqdm(total=len(mine), desc=label, leave=False, disable=hidden)
    with bar, readers_may_die(), in_step(model.llama_model, world, device):
        for batch in batches(studies, plan, workers=workers, skip_bad=skip):
            if stopped():
                break
            failures += batch.failures
            started = time.perf_counter()
            if batch.ids:
                try:
                    images = normalize(batch.images.to(device))
                    with autocast(device, config.precision):
                        reports = model.generate_batch(
                            images, batch.view_mask.to(device), generation_of(config)
                        )
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    raise InputError(
                        f"--eval-batch-size: reports of {len(batch.ids)} studies "
                        f"({', '.join(batch.ids[:4])}, ...) do not fit into the memory of {device} "
                        f"with {config.num_beams} beams; try a smaller --eval-batch-size, fewer "
                        "--num-beams, --precision bf16, or --llm-int8"
                    ) from error
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
    others: Mapping[str, Mapping[str, str]] | None = None,
    meteor: bool = True,
    bootstrap: int = 0,
    scoring: Scoring | None = None,
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
        others: further systems' reports of the same studies, by system and id, to be scored beside.
        meteor: whether METEOR (a Java process of some seconds) is wanted.
        bootstrap: resamples for the intervals; 0 for none.
        scoring: what else is scored, and how; None: labels by this project's rules, or the data
            set's own where it knows those of every study.
        label: what the progress bar says.
        world: the processes that share the work; None: this one alone.
        stopped: whether a signal came; asked after every batch.
    Returns:
        The same in every process. The scores of `emrrg.metrics.score_reports`, and those of
        `emrrg.metrics.clinical`: "clinical" (of `score_policies`; the baselines have it too),
        "sides" and "comparisons".
    Raises:
        InputError: no study could be read.
        StoppedError: as `write_reports`.
    """
    world = world or World()
    with meteor_ahead(meteor and world.is_main):
        started = time.perf_counter()
        written = write_reports(
            model, studies, config, device, label=label, world=world, stopped=stopped
        )
        seconds = time.perf_counter() - started
        if not written.ids:
            raise InputError(
                f"no study of this split could be read; the first: {written.failures[0]}"
            )
        known = studies.reports()
        references = [known[i] for i in written.indices]
        options = (scoring or default_scoring(studies)).of(written.indices)
        groups = options.groups()

        def score() -> tuple[dict[str, Any], dict[str, Any]]:
            truth, source = options.truth(references)
            predicted = options.labeler(written.reports)
            drawn: dict[str, Any] = {"bootstrap": bootstrap, "seed": config.seed}
            scores = score_reports(
                written.reports,
                references,
                protocol=config.protocol,
                tokenization=options.tokenization,
                max_tokens=config.max_report_tokens,
                min_count=MIN_COUNTS.get(config.dataset or "", 3),
                tokenizer=model.tokenizer,
                meteor="auto" if meteor else "off",
                train_reports=train_reports,
                neighbour_reports=options.neighbours,
                others={
                    name: [texts.get(study, "") for study in written.ids]
                    for name, texts in (others or {}).items()
                },
                groups=groups,
                per_report=options.per_report,
                **drawn,
            )

            def clinical(labels: Sequence[Labels], **others: Any) -> dict[str, Any]:
                settings = {"uncertain": options.uncertain, "source": source, **drawn, **others}
                return score_policies(labels, truth, **settings)

            scores["clinical"] = clinical(predicted, groups=groups)
            for name, baseline in scores["baselines"].items():
                same = [baseline.get("report", "")] * len(references)
                texts = options.neighbours if name == "nearest_neighbour" else same
                baseline["clinical"] = clinical(options.labeler(texts or []))
            scores["sides"] = score_sides(written.reports, references, **drawn)
            scores["comparisons"] = score_comparisons(
                written.reports, references, has_prior=options.priors, **drawn
            )
            scores["extra"] = {}
            scores["reports_per_second"] = len(written.reports) / max(seconds, 1e-9)
            scores["unreadable"] = written.failures
            per_report = scores.pop("per_report", {})
            return scores, {"predicted": predicted, "truth": truth, "per_report": per_report}

        started = time.perf_counter()
        scores, details = world.once(score)
        scoring_seconds = time.perf_counter() - started
    return Evaluation(
        scores,
        written.ids,
        written.reports,
        references,
        written.seconds,
        scoring_seconds,
        indices=written.indices,
        **details,
    )


def default_scoring(studies: Studies) -> Scoring:
    """Labels by this project's rules, but a data set's own where it knows those of every study."""
    if (labels := known_labels(studies)) is None:
        return Scoring()
    return Scoring(reference_labels=labels[0], reference_source=labels[1])


def headline(scores: Mapping[str, Any]) -> dict[str, float | None]:
    """The few scores of a line or a curve, under the names that people read."""
    names = {"BLEU_4": "BLEU-4", "METEOR": "METEOR", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr"}
    line = {shown: scores.get(name) for name, shown in names.items()}
    return {**line, "finding F1": scores["clinical"]["findings"]["micro"]["f1"]}


def format_scores(scores: Mapping[str, Any]) -> str:
    """Scores on one line."""
    return "  ".join(f"{n} {v:.3f}" for n, v in headline(scores).items() if v is not None)


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
    with replaced(folder / "samples.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
