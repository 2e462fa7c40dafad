"""Score a trained run on a split of its data: ``python -m emrrg.evaluate runs/x --split test``.

With ``--html report.html`` also as one page to look at (`emrrg.result_page`).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from emrrg.config import TrainConfig, check_writable, parse_config, read_json, run_command
from emrrg.data.dataset import Studies
from emrrg.data.loading import load_studies
from emrrg.errors import InputError
from emrrg.evaluation import Evaluation, evaluate_model, write_predictions, write_samples
from emrrg.heatmap import sentence_maps
from emrrg.metrics.java import meteor_ahead
from emrrg.metrics.table import score_table
from emrrg.model import ReportGenerator
from emrrg.neighbours import by_default, nearest_reports
from emrrg.result_page import PATIENT_NOTICE, write_result_page
from emrrg.runs import (
    CHECKSUMS,
    WEIGHTS,
    find_checkpoint,
    is_export,
    load_run,
    read_run_config,
    tell_if_unfinished,
    write_json,
)
from emrrg.scoring import (
    RULES,
    Scoring,
    chexbert,
    file_labels,
    known_labels,
    study_columns,
    study_priors,
)
from emrrg.system import pick_device

log = logging.getLogger("emrrg.evaluate")


@dataclass(frozen=True)
class EvaluateConfig:
    """Generate a report for every study of a split, and score them."""

    run: str
    """Run folder that training left."""
    split: Literal["train", "val", "test"] = "test"
    """Which studies."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights."""
    annotation: str | None = None
    """Score on this annotation file instead of the run's own data (with --images)."""
    images: str | None = None
    """Folder that the annotation's image paths start from."""
    studies: int | None = None
    """At most this many studies."""
    num_beams: int | None = None
    """Beams of the search [default: as in training]."""
    min_new_tokens: int | None = None
    """Shortest report, in tokens [default: as in training]."""
    max_new_tokens: int | None = None
    """Longest report, in tokens [default: as in training]."""
    repetition_penalty: float | None = None
    """Repetition penalty [default: as in training]."""
    length_penalty: float | None = None
    """Length penalty [default: as in training]."""
    protocol: Literal["full", "r2gen", "r2gengpt"] | None = None
    """Scoring protocol [default: as in training]."""
    batch_size: int | None = None
    """Studies a generation batch [default: as in training]."""
    tokenization: Literal["split", "ptb"] = "split"
    """split at white space, as every peer does, or as image captions are scored (needs Java)."""
    meteor: Literal["auto", "off"] = "auto"
    """METEOR needs Java: where there is (auto), or not (off)."""
    bootstrap: int = 1000
    """Resamples for the intervals; 0 for none."""
    neighbours: bool | None = None
    """Also score the report of the training image nearest to each study, as a baseline [default:
    where at most 20,000 training studies must be read for it]."""
    by: tuple[str, ...] = ()
    """Break scores down by these columns of the annotation (view, sex, age, ...)."""
    labels: str | None = None
    """File of labels of the references, by id [default: the data set's own, else the labeler's]."""
    chexbert: str | None = None
    """Label reports, and references without --labels, by this CheXbert checkpoint."""
    vocabulary: str | None = None
    """BERT's vocab.txt, or the folder that holds it, for CheXbert."""
    uncertain: Literal["negative", "positive", "ignore"] = "negative"
    """What an uncertain label counts as."""
    html: str | None = None
    """Also write one page with scores, histograms and a browser of studies to this file."""
    html_studies: int = 60
    """Studies that the page holds, pictures included: the best, the worst, and some at random."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    output: str | None = None
    """Folder for scores.json, predictions.json and samples.md [default: RUN/evaluation-SPLIT, with
    the --annotation's name behind it; numbered where another evaluation's scores are there]."""

    def __post_init__(self) -> None:
        for name in ("studies", "batch_size", "html_studies"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')}: {value} is below 1")
        if self.bootstrap < 0:
            raise InputError(f"--bootstrap: {self.bootstrap} is below 0")
        if (self.chexbert is None) != (self.vocabulary is None):
            raise InputError("--chexbert and --vocabulary: give both, or neither")
        if self.html is not None and Path(self.html).suffix.lower() not in (".html", ".htm"):
            raise InputError(f"--html: {self.html} does not end in .html")
        if (self.annotation is None) != (self.images is None):
            raise InputError("--annotation and --images: give both, or neither")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; arguments and errors as `emrrg.train.main`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    asked, _ = parse_config(EvaluateConfig, argv, "emrrg.evaluate", positional=("run",))
    run = Path(asked.run)
    device = pick_device(asked.device)
    model = load_run(run, device=device, which=asked.checkpoint)
    tell_if_unfinished(run, log)
    trained = read_run_config(run)
    config = settings(asked, trained)
    evaluated = evaluated_by(asked, config, run)
    output = output_folder(asked, run, evaluated)
    studies = load_studies(config, model.config.image_size, (asked.split,))[asked.split]
    # The baselines come from the studies that the run was trained on.
    training = load_studies(trained, model.config.image_size, ("train",))["train"]
    check_writable(output / "scores.json", "--output")
    if asked.html is not None:
        check_writable(Path(asked.html), "--html")
    with meteor_ahead(asked.meteor == "auto"):
        scoring = scoring_of(asked, model, studies, training, config, device)
        result = evaluate_model(
            model,
            studies,
            config,
            device,
            train_reports=training.reports(),
            meteor=asked.meteor == "auto",
            bootstrap=asked.bootstrap,
            scoring=scoring,
            label=asked.split,
        )
    write_json(output / "scores.json", {**result.scores, "evaluated": evaluated})
    write_predictions(output / "predictions.json", result)
    write_samples(output, result, studies, asked.split)
    log.info("%s", score_table(result.scores))
    if result.scores["unreadable"]:
        count = len(result.scores["unreadable"])
        log.info("%d studies could not be read and were left out (see scores.json)", count)
    log.info("scores.json, predictions.json and samples.md are in %s", output)
    if asked.html is not None:
        page(asked, model, result, studies)
    return 0


def evaluated_by(asked: EvaluateConfig, config: TrainConfig, run: Path) -> dict[str, Any]:
    """What decides the scores: the weights, the data and the flags, as ``scores.json`` keeps it."""
    exported = is_export(run)
    checkpoint = run if exported else find_checkpoint(run, asked.checkpoint)
    sums = checkpoint / CHECKSUMS
    digest = read_json(sums)[WEIGHTS][:12] if sums.exists() else ""
    flags = (
        "split", "tokenization", "meteor", "bootstrap", "neighbours", "by", "labels", "chexbert",
        "vocabulary", "uncertain",
    )  # fmt: skip
    settings = (
        "dataset", "num_beams", "min_new_tokens", "max_new_tokens", "repetition_penalty",
        "length_penalty", "protocol", "clean", "marks",
    )  # fmt: skip
    return {
        "weights": f"{'exported' if exported else checkpoint.name} {digest}",
        # Those of the run stay as they are there, wherever it is moved.
        "annotation": os.path.abspath(asked.annotation) if asked.annotation else config.annotation,
        "images": os.path.abspath(asked.images) if asked.images else config.images,
        "studies": getattr(config, f"{asked.split}_studies"),
        **{name: getattr(asked, name) for name in flags} | {"by": list(asked.by)},
        **{name: getattr(config, name) for name in settings},
    }


def output_folder(asked: EvaluateConfig, run: Path, evaluated: Mapping[str, Any]) -> Path:
    """Where the results go, never in the place of another evaluation's.

    Raises:
        InputError: --output holds the scores of another evaluation.
    """
    if asked.output is not None:
        folder = Path(asked.output)
        if other := difference(folder, evaluated):
            raise InputError(f"--output: {folder} {other}; choose another folder")
        return folder
    name = f"evaluation-{asked.split}"
    if asked.annotation is not None:
        name += f"-{Path(asked.annotation).stem}"
    folder, number = run / name, 1
    while other := difference(folder, evaluated):
        number += 1
        log.info("%s %s", folder, other)
        folder = run / f"{name}-{number}"
    return folder


def difference(folder: Path, evaluated: Mapping[str, Any]) -> str:
    """In what the scores of a folder are another evaluation's; "" where they are not."""
    file = folder / "scores.json"
    if not file.exists():
        return ""
    before = read_json(file).get("evaluated", {})
    for name, now in evaluated.items():
        if name not in before:
            return "holds other scores"
        if before[name] != now:
            return f"holds the scores of another evaluation ({name} {before[name]!r}, not {now!r})"
    return ""


def scoring_of(
    asked: EvaluateConfig,
    model: ReportGenerator,
    studies: Studies,
    training: Studies,
    config: TrainConfig,
    device: torch.device,
) -> Scoring:
    """What the flags say of labels, columns and baselines."""
    labeler = RULES
    if asked.chexbert is not None and asked.vocabulary is not None:
        labeler = chexbert(Path(asked.chexbert), Path(asked.vocabulary), device)
    known = None if asked.chexbert is not None else known_labels(studies)
    if asked.labels is not None:
        known = file_labels(Path(asked.labels), studies), f"file {asked.labels}"
    neighbours = None
    if asked.neighbours or (asked.neighbours is None and by_default(model, training)):
        neighbours = nearest_reports(model, studies, training, config, device)
    return Scoring(
        tokenization=asked.tokenization,
        uncertain=asked.uncertain,
        labeler=labeler,
        reference_labels=known and known[0],
        reference_source=known[1] if known else "",
        columns=study_columns(studies, asked.by),
        priors=study_priors(studies),
        neighbours=neighbours,
        per_report=asked.html is not None,
    )


def page(
    asked: EvaluateConfig, model: ReportGenerator, result: Evaluation, studies: Studies
) -> None:
    """Write the result page, and say whether it may be passed on."""
    assert asked.html is not None
    maps = partial(sentence_maps, model) if model.llama_model.config.hybrid_layers else None
    synthetic = write_result_page(
        Path(asked.html),
        result,
        studies,
        title=", ".join(
            [Path(asked.run).resolve().name, asked.split]
            + ([Path(asked.annotation).name] if asked.annotation else [])
        ),
        columns=asked.by,
        count=asked.html_studies,
        maps=maps,
    )
    log.info("the result page is %s", asked.html)
    if not synthetic:
        log.warning("%s", PATIENT_NOTICE)


def settings(asked: EvaluateConfig, trained: TrainConfig) -> TrainConfig:
    """The run's own settings with what was asked for in their place."""
    changes = {
        name: value
        for name in (
            "num_beams", "min_new_tokens", "max_new_tokens", "repetition_penalty", "length_penalty",
            "protocol", "annotation", "images",
        )
        if (value := getattr(asked, name)) is not None
    }  # fmt: skip
    if asked.annotation is not None:
        changes["dataset"] = "custom"
    if asked.batch_size is not None:
        changes["eval_batch_size"] = asked.batch_size
    if asked.studies is not None:
        changes[f"{asked.split}_studies"] = asked.studies
    return dataclasses.replace(trained, **changes)


if __name__ == "__main__":
    run_command(main)
