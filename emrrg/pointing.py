"""The pointing game on phantoms: ``python -m emrrg.pointing runs/x``.

How much of the attention map of a finding's sentence falls where the finding was drawn? The
reference reports are read (teacher forcing), so that the sentence is known to speak of the
finding whatever the model would have written. Against chance twice: the region's share of the
image, which an even spread gives; and the regions of the same kind of finding in other studies,
which a map gives that knows where such findings lie but not where this one does.

Whatever comes out is reported: a vision Mamba mixes its tokens along four scans, so what a model
knows of a place need not be kept in the tokens of that place.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from emrrg.config import check_writable, parse_config, run_command
from emrrg.data.dataset import Studies
from emrrg.data.loading import load_studies
from emrrg.data.phantoms import Box
from emrrg.errors import InputError
from emrrg.heatmap import sentence_maps
from emrrg.metrics.bootstrap import interval, resample
from emrrg.model import ReportGenerator
from emrrg.runs import load_run, read_run_config, tell_if_unfinished, write_json
from emrrg.system import pick_device

log = logging.getLogger("emrrg.pointing")

Array = NDArray[np.float64]

PERMUTATIONS = 999


@dataclass(frozen=True)
class PointingConfig:
    """Measure on phantoms how much of the attention of a finding's sentence is on the finding."""

    run: str
    """Run folder that training on phantoms left."""
    split: Literal["val", "test"] = "test"
    """Which studies."""
    studies: int | None = None
    """This many studies [default: as the run has]."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights."""
    bootstrap: int = 1000
    """Resamples of the studies for the intervals; 0 for none."""
    json: str | None = None
    """Write the figures to this file, too."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""

    def __post_init__(self) -> None:
        if self.studies is not None and self.studies < 1:
            raise InputError(f"--studies: {self.studies} is not at least 1")
        if self.bootstrap < 0:
            raise InputError(f"--bootstrap: {self.bootstrap} is below 0")


@dataclass(frozen=True)
class Pointed:
    """A finding's region and the map of its sentence, on the patches of one image."""

    study: int
    observation: str
    maps: Array
    """(L + 1, G*G): each hybrid layer's and their mean, each scaled to sum to 1."""
    class_token: float
    """Share of the attention that the class token had, mean over the layers."""
    region: Array
    """(G*G,): share of each patch that lies in the region, 0 to 1."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; arguments and errors as `emrrg.train.main`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    asked, _ = parse_config(PointingConfig, argv, "emrrg.pointing", positional=("run",))
    run = Path(asked.run)
    if asked.json is not None:
        check_writable(Path(asked.json), "--json")
    model = load_run(run, device=pick_device(asked.device), which=asked.checkpoint)
    tell_if_unfinished(run, log)
    config = read_run_config(run)
    if config.dataset != "phantoms":
        raise InputError(
            f"{run}: was trained on {config.dataset}; where findings lie is known of phantoms only"
        )
    layers = model.llama_model.config.hybrid_layers
    if not layers:
        raise InputError(f"{run}: has no hybrid layers, so nothing looks anywhere")
    if asked.studies is not None:
        count: dict[str, Any] = {f"{asked.split}_studies": asked.studies}
        config = dataclasses.replace(config, **count)
    studies = load_studies(config, model.config.image_size, (asked.split,))[asked.split]
    pointed, unread = point(model, studies)
    if not pointed:
        raise InputError(f"{run}: no sentence of a finding was found among {len(studies)} studies")
    names = [*(f"layer {k}" for k in layers), "all layers"]
    result = {
        "run": str(run),
        "domain": config.domain,
        "split": asked.split,
        "studies": len(studies),
        "protocol": "reference reports read (teacher forcing); synthetic images",
        "blind": model.config.blind,
        "findings": len(pointed),
        "sentences not found": unread,
        "class token": float(np.mean([p.class_token for p in pointed])),
        "by layer": {
            name: measure(pointed, k, asked.bootstrap, config.seed) for k, name in enumerate(names)
        },
        "by observation": {
            name: measure(
                [p for p in pointed if p.observation == name], -1, asked.bootstrap, config.seed
            )
            for name in dict.fromkeys(sorted(p.observation for p in pointed))
        },
    }
    log.info("%s", pointing_table(result))
    if asked.json is not None:
        write_json(Path(asked.json), result)
        log.info("written to %s", asked.json)
    return 0


def point(model: ReportGenerator, studies: Studies) -> tuple[list[Pointed], int]:
    """Read every reference report and keep the maps of the sentences that tell findings.

    Args:
        model: a system with hybrid layers.
        studies: phantoms.
    Returns:
        The findings with maps, and how many had no sentence of their own in what the tokenizer
        makes of the report, or no region in the image.
    """
    pointed: list[Pointed] = []
    unread = 0
    for number in tqdm(range(len(studies)), desc="reading", leave=False, disable=_quiet()):
        study = studies[number]
        if not study.findings:
            continue
        read = sentence_maps(model, study.images, study.report)
        sentences = {sentence.text: sentence for sentence in read}
        for finding in study.findings:
            sentence = sentences.get(" ".join(finding.sentence.split()))
            if sentence is None or not finding.boxes:
                unread += 1
                continue
            side = sentence.grid.shape[0]
            layers = sentence.layers / sentence.layers.sum((1, 2), keepdims=True)
            pointed.append(
                Pointed(
                    number,
                    finding.observation,
                    np.concatenate([layers, sentence.grid[None]]).reshape(-1, side * side),
                    float(sentence.class_token.mean()),
                    region(finding.boxes, side).ravel(),
                )
            )
    return pointed, unread


def region(boxes: Sequence[Box], side: int) -> Array:
    """How much of each patch the boxes cover together.

    Args:
        boxes: (left, top, right, bottom) as fractions of the image.
        side: G, patches a side.
    Returns:
        (G, G) fp64 from 0 to 1.
    """
    fine = 16  # samples a patch's side
    at = (np.arange(side * fine) + 0.5) / (side * fine)
    covered = np.zeros((side * fine, side * fine), bool)
    for left, top, right, bottom in boxes:
        rows, columns = (at > top) & (at < bottom), (at > left) & (at < right)
        covered |= rows[:, None] & columns[None, :]
    return covered.reshape(side, fine, side, fine).mean((1, 3))


def measure(pointed: Sequence[Pointed], layer: int, resamples: int, seed: int) -> dict[str, Any]:
    """How much attention falls on the regions, and how much would by chance.

    Args:
        pointed: findings.
        layer: index into `Pointed.maps`.
        resamples: bootstrap resamples of the studies; 0 for no intervals.
        seed: of resamples and permutations.
    Returns:
        ``findings``; ``attention``, the mean share of the attention in the region; ``area``, what
        an even spread gives; ``ratio`` of the two means; ``elsewhere``, the mean share in the
        regions of the same observation in other studies (None where there are no two), ``gain``,
        attention minus elsewhere over the findings that have one, and ``p``, the share of
        permutations of the regions among studies, within each observation, that reach the
        attention; ``hits``, how often the patch with most attention touches the region, and
        ``hits by chance``. ``intervals``: 95 % bootstrap intervals.
    """
    rng = np.random.default_rng(seed)
    maps = np.stack([p.maps[layer] for p in pointed])  # (n, patches)
    regions = np.stack([p.region for p in pointed])
    study = np.array([p.study for p in pointed])
    kinds = np.array([p.observation for p in pointed])
    attention = (maps * regions).sum(1)
    elsewhere = np.full(len(pointed), np.nan)
    shuffled = np.zeros(PERMUTATIONS)
    for kind in dict.fromkeys(kinds):
        own = np.flatnonzero(kinds == kind)
        if len(own) < 2:
            continue
        shares = maps[own] @ regions[own].T  # (map, region)
        elsewhere[own] = (shares.sum(1) - np.diag(shares)) / (len(own) - 1)
        for k in range(PERMUTATIONS):
            shuffled[k] += shares[np.arange(len(own)), rng.permutation(len(own))].sum()
    paired = np.isfinite(elsewhere)
    best = maps.argmax(1)
    hits = regions[np.arange(len(best)), best] > 0
    columns = {
        "attention": attention,
        "area": regions.mean(1),
        "hits": hits.astype(float),
        "hits by chance": (regions > 0).mean(1),
        "paired": paired.astype(float),
        "elsewhere": np.where(paired, elsewhere, 0.0),
        "attention of paired": np.where(paired, attention, 0.0),
    }
    by_study = np.zeros((study.max() + 1, 1 + len(columns)))
    np.add.at(by_study, study, np.column_stack([np.ones(len(pointed)), *columns.values()]))
    by_study = by_study[by_study[:, 0] > 0]
    scores = _scores(by_study.sum(0, keepdims=True))[0]
    result: dict[str, Any] = {"findings": len(pointed)}
    result |= {
        name: float(v) if np.isfinite(v) else None for name, v in zip(SCORES, scores, strict=True)
    }
    reached = np.count_nonzero(shuffled >= attention[paired].sum() * (1 - 1e-12))
    result["p"] = (reached + 1) / (PERMUTATIONS + 1) if paired.any() else None
    if resamples:
        draws = resample(by_study, _scores, resamples, seed)
        result["intervals"] = {name: interval(draws[:, k]) for k, name in enumerate(SCORES)}
    return result


SCORES = ("attention", "area", "ratio", "elsewhere", "gain", "hits", "hits by chance")


def _scores(sums: Array) -> Array:
    """(r, 8) sums over findings to (r, 7) scores in the order of `SCORES`."""
    count, attention, area, hits, by_chance, paired, elsewhere, of_paired = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.column_stack(
            [
                attention / count,
                area / count,
                attention / area,
                elsewhere / paired,
                (of_paired - elsewhere) / paired,
                hits / count,
                by_chance / count,
            ]
        )


def pointing_table(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"Pointing game, {result['run']}: {result['findings']} findings in {result['studies']} "
        f"{result['split']} phantoms of the {result['domain']} hospital (synthetic images).",
        "The reference reports are read (teacher forcing). Share of the attention of a finding's "
        "sentence",
        "that falls on the finding; even: what an even spread gives; others: on the regions of "
        "that kind of",
        "finding in other studies; gain: attention minus others; hits: the patch with most "
        "attention touches the",
        "region (and by chance). In brackets: 95 % bootstrap intervals over studies.",
    ]
    if result["blind"]:
        lines.append("This run is blind: its image features are the same for every study.")
    head = ("", "n", "attention", "even", "ratio", "others", "gain", "p", "hits", "chance")
    rows = [
        _row(name, figures)
        for group in ("by observation", "by layer")
        for name, figures in result[group].items()
    ]
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.append(f"The class token, which has no place, had {result['class token']:.1%}.")
    if result["sentences not found"]:
        lines.append(f"Left out, no sentence or region: {result['sentences not found']} findings.")
    return "\n".join(lines)


def _row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    intervals = figures.get("intervals", {})

    def cell(key: str, form: str = ".3f") -> str:
        if figures[key] is None:
            return "-"
        text = format(figures[key], form)
        low, high = intervals.get(key, (None, None))
        return text if low is None else f"{text} [{low:{form}}, {high:{form}}]"

    def plain(key: str, form: str = ".3f") -> str:
        return "-" if figures[key] is None else format(figures[key], form)

    return (
        name,
        str(figures["findings"]),
        cell("attention"),
        plain("area"),
        cell("ratio", ".2f"),
        plain("elsewhere"),
        cell("gain", "+.3f"),
        plain("p"),
        cell("hits", ".2f"),
        plain("hits by chance", ".2f"),
    )


def _quiet() -> bool:
    return not sys.stderr.isatty()


if __name__ == "__main__":
    run_command(main)
