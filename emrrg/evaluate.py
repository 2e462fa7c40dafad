"""Score a trained run on a split of its data: ``python -m emrrg.evaluate runs/x --split test``."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emrrg.config import TrainConfig, parse_config, run_command
from emrrg.data.loading import load_studies
from emrrg.errors import InputError
from emrrg.evaluation import evaluate_model, score_table, write_predictions, write_samples
from emrrg.runs import load_run, read_run_config, write_json
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
    beams: int | None = None
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
    bootstrap: int = 1000
    """Resamples for the intervals; 0 for none."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    output: str | None = None
    """Folder for scores.json, predictions.json and samples.md [default: RUN/evaluation-SPLIT]."""

    def __post_init__(self) -> None:
        if (self.annotation is None) != (self.images is None):
            raise InputError("--annotation and --images: give both, or neither")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; arguments and errors as `emrrg.train.main`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    asked, _ = parse_config(EvaluateConfig, argv, "emrrg.evaluate", positional=("run",))
    run = Path(asked.run)
    device = pick_device(asked.device)
    model = load_run(run, device=device, which=asked.checkpoint)
    config = settings(asked, read_run_config(run))
    studies = load_studies(config, model.config.image_size, (asked.split,))[asked.split]
    # The baselines come from the reports that the run was trained on.
    training = load_studies(read_run_config(run), model.config.image_size, ("train",))["train"]
    result = evaluate_model(
        model,
        studies,
        config,
        device,
        train_reports=training.reports(),
        bootstrap=asked.bootstrap,
        label=asked.split,
    )
    output = Path(asked.output) if asked.output else run / f"evaluation-{asked.split}"
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "scores.json", result.scores)
    write_predictions(output / "predictions.json", result)
    write_samples(output, result, studies, asked.split)
    log.info("%s", score_table(result.scores))
    log.info("scores.json, predictions.json and samples.md are in %s", output)
    return 0


def settings(asked: EvaluateConfig, trained: TrainConfig) -> TrainConfig:
    """The run's own settings with what was asked for in their place."""
    changes = {
        name: value
        for name in (
            "beams", "min_new_tokens", "max_new_tokens", "repetition_penalty", "length_penalty",
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
