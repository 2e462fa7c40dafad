"""The result page of ``python -m emrrg.evaluate --html``: one file to look at and to hand on.

Scores with intervals and baselines, histograms, the findings one by one, and a browser of studies
with images, reference and generated report side by side, findings and differences marked. The file
needs no network and asks for none: style, script and pictures are inside, and a content security
policy lets nothing else run or load. All text of the data set is escaped.

How a study's two reports are marked is for the eye only; the scores are those of `emrrg.metrics`.
"""

from __future__ import annotations

import base64
import contextlib
import difflib
import hashlib
import io
import itertools
import math
import random
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from emrrg.data.dataset import PhantomStudies, RecordStudies, Studies
from emrrg.data.images import open_image
from emrrg.errors import InputError
from emrrg.evaluation import Evaluation
from emrrg.heatmap import SentenceMap
from emrrg.metrics.clinical import (
    FINDINGS,
    OBSERVATIONS,
    Labels,
    find_comparisons,
    find_mentions,
    label_report,
    score_comparisons,
    score_sides,
)
from emrrg.metrics.groups import group_studies, known_priors
from emrrg.metrics.labeler import sentences, tidy
from emrrg.scoring import PRIORS

PATIENT_NOTICE = (
    "The result page holds images and reports of patients: keep it where the data set itself may "
    "be, and pass it on only as the terms of the data allow."
)

TEMPLATES = Path(__file__).parent / "templates"
PIXELS = 480  # of a picture in the page, the longer side
VIEWS = 4  # pictures of a study
ALIKE = 0.5  # sentences that share less of their words are not held against each other
BINS = 20
SHOWN_COLUMNS = ("view", "sex", "age")  # beside those that scores are broken down by

LANGUAGE = {
    "BLEU_1": "BLEU-1", "BLEU_2": "BLEU-2", "BLEU_3": "BLEU-3", "BLEU_4": "BLEU-4",
    "METEOR": "METEOR", "ROUGE_L": "ROUGE-L", "CIDEr": "CIDEr",
}  # fmt: skip
PER_STUDY = ("BLEU_4", "METEOR", "ROUGE_L", "CIDEr")
FINDING_F1 = "finding F1"
BASELINES = {
    "constant": "constant report", "most_frequent": "most frequent report",
    "nearest_neighbour": "nearest neighbour",
}  # fmt: skip
SETS = {"findings": "13 findings", "five": "the usual 5", "all": "14 observations"}

Maps = Callable[[Tensor, str], Sequence[SentenceMap]]


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is marked alike."""

    text: str
    kind: str = ""
    """``agree``, ``alone``, ``against``, ``denied`` (findings), ``comparison``, or nothing."""
    note: str = ""
    """What the mark means, in words."""
    beside: str = ""
    """``differs``: words that the nearest sentence of the other text has not; ``new``: no sentence
    of it is like this one; else nothing."""


@dataclass(frozen=True)
class Stretch:
    """Pieces that share an attention map, or have none."""

    pieces: tuple[Piece, ...]
    map: str | None = None
    """A PNG as a data URI."""


@dataclass(frozen=True)
class Picture:
    """A view; the page keeps its place before it is drawn, hence the size."""

    source: str
    """A JPEG as a data URI."""
    width: int
    height: int
    """Pixels."""


@dataclass(frozen=True)
class Case:
    """One study, ready for the template."""

    id: str
    pictures: list[Picture]
    left_out: int
    """Further views of the study."""
    reference: list[Stretch]
    generated: list[Stretch]
    scores: dict[str, float]
    right: list[str]
    missed: list[str]
    invented: list[str]
    wrong_sides: list[str]
    comparison: bool
    """Whether the generated report compares with an earlier study that there is not."""
    attributes: dict[str, str]
    groups: dict[str, str]
    highest: float | None
    """Top of the attention maps' scale, in multiples of an even spread."""
    kinds: list[str] = field(default_factory=list)
    """``best``, ``worst``, ``random``."""


def write_result_page(
    path: Path,
    result: Evaluation,
    studies: Studies,
    *,
    title: str,
    columns: Sequence[str] = (),
    count: int = 60,
    maps: Maps | None = None,
) -> bool:
    """Write the page.

    Args:
        path: the file; its folder is made where it does not exist.
        result: from `emrrg.evaluation.evaluate_model` with ``Scoring(per_report=True)``.
        studies: the data set that was scored.
        title: what was scored: run and split.
        columns: columns of the annotation to filter studies by.
        count: studies that the page holds: the best, the worst, and some at random.
        maps: image (V, 3, S, S) uint8 and report to the attention of each sentence
            (`emrrg.heatmap.sentence_maps`); None: no overlay.
    Returns:
        Whether all of the data set is synthetic. If not, the page says that it holds patient data.
    Raises:
        OSError: the file cannot be written.
    """
    synthetic = is_synthetic(studies)
    values = study_scores(result)
    groups = _group_of_each(result, studies, columns)
    kinds = choose_cases(values, count)
    style = (TEMPLATES / "result_page.css").read_text(encoding="utf-8")
    script = (TEMPLATES / "result_page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    page = environment.get_template("result_page.html").render(
        title=title,
        synthetic=synthetic,
        notice=PATIENT_NOTICE,
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        scores=result.scores,
        rows=score_rows(result.scores),
        baselines=[BASELINES[name] for name in BASELINES if name in result.scores["baselines"]],
        histograms=[histogram(name, list(column)) for name, column in values.items()],
        observations=observation_rows(result.scores["clinical"]),
        groups=group_rows(result.scores),
        cases=[_case(i, result, studies, values, groups[i], maps, kinds[i]) for i in sorted(kinds)],
        measures=list(values),
        findings=FINDINGS,
        columns=list(columns),
        total=len(result.ids),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # A report may hold half a character; and the policy's hashes know one kind of line end.
    path.write_text(page, encoding="utf-8", errors="replace", newline="\n")
    return synthetic


def is_synthetic(studies: Studies) -> bool:
    """Whether every study of a data set is drawn, not taken of a patient."""
    if isinstance(studies, PhantomStudies):
        return True
    return all(row.get("synthetic") is True for row in studies.attributes())


def study_scores(result: Evaluation) -> dict[str, list[float]]:
    """Score to its value for every study: language scores and the F1 of the findings."""
    values = {
        LANGUAGE[name]: list(result.per_report[name])
        for name in PER_STUDY
        if name in result.per_report
    }
    policy = result.scores["clinical"]["uncertain"]
    f1 = []
    for predicted, truth in zip(result.predicted, result.truth, strict=True):
        right, missed, invented = compare_findings(predicted, truth, policy)
        wrong = len(missed) + len(invented)
        f1.append(2 * len(right) / (2 * len(right) + wrong) if right or wrong else 1.0)
    return {**values, FINDING_F1: f1}


def compare_findings(
    predicted: Labels, truth: Labels, uncertain: str
) -> tuple[list[str], list[str], list[str]]:
    """The findings of a study that were predicted rightly, missed, and invented.

    Args:
        predicted: labels of the generated report.
        truth: labels of the reference.
        uncertain: what -1 counts as (`emrrg.metrics.clinical`).
    """
    positive = (1, -1) if uncertain == "positive" else (1,)
    counted = [n for n in FINDINGS if not (uncertain == "ignore" and truth.get(n) == -1)]
    said = {name for name in counted if predicted.get(name) in positive}
    true = {name for name in counted if truth.get(name) in positive}
    return (
        [name for name in counted if name in said & true],
        [name for name in counted if name in true - said],
        [name for name in counted if name in said - true],
    )


def choose_cases(values: Mapping[str, Sequence[float]], count: int) -> dict[int, list[str]]:
    """Choose the studies that the page holds.

    A third of them are the best and a third the worst by the F1 of their findings, ties broken by
    ROUGE-L; the rest is drawn at random from all, the same ones every time. Where there are no
    more studies than asked for, the page holds all.

    Args:
        values: score to its value for every study.
        count: at most so many.
    Returns:
        Place of the study to its kinds: "best", "worst", "random"; a study may be several.
    """
    f1, rouge = values[FINDING_F1], values[LANGUAGE["ROUGE_L"]]
    order = sorted(range(len(f1)), key=lambda i: (f1[i], rouge[i], -i))
    count = min(count, len(order))
    third = max(1, count // 3)
    kinds: dict[int, list[str]] = {}
    for kind, places in (("best", order[::-1]), ("worst", order if count > 1 else [])):
        for i in places[:third]:
            kinds.setdefault(i, []).append(kind)
    everything = count == len(order)
    for i in random.Random(0).sample(range(len(order)), third if everything else len(order)):
        if len(kinds) == count and not everything:
            break
        kinds.setdefault(i, []).append("random")
    return kinds if not everything else {i: kinds.get(i, []) for i in order}


def mark_report(
    text: str, other: str, other_name: str, maps: Sequence[tuple[str, str]] = ()
) -> list[Stretch]:
    """Mark what one report says beside another.

    Args:
        text: the report that is marked.
        other: the one that it is held against.
        other_name: what notes call that one.
        maps: sentences of the text, without their stops, each with its attention map.
    Returns:
        The text in stretches of one line, without anything left out.
    """
    line = tidy(text)
    kinds: list[tuple[str, str]] = [("", "")] * len(line)
    for start, end in find_comparisons(text):
        kinds[start:end] = [("comparison", "compares with an earlier study")] * (end - start)
    labels = label_report(other)
    marks = []
    for mention in find_mentions(text):
        theirs = labels[mention.observation]
        if mention.status:
            kind = "agree" if theirs in (1, -1) else "alone"
        else:
            kind = "against" if theirs in (1, -1) else "denied"
        marks.append((_STRENGTH.index(kind), kind, mention, theirs))
    for _, kind, mention, theirs in sorted(
        marks, key=lambda mark: mark[0]
    ):  # the strongest is seen where they overlap
        side = f" ({mention.side})" if mention.side else ""
        note = (
            f"{mention.observation}{side}: {_WORDS[mention.status]} here; "
            f"{other_name}: {_WORDS[theirs]}"
        )
        marked = [(kind, note)] * (mention.end - mention.start)
        kinds[mention.start : mention.end] = marked
    beside = _compare_words(line, tidy(other))
    stretches: list[Stretch] = []
    done = 0

    def add(end: int, picture: str | None) -> None:
        nonlocal done
        if end > done:
            stretches.append(Stretch(tuple(_pieces(line, kinds, beside, done, end)), picture))
            done = end

    for sentence, picture in maps:
        start = line.find(sentence, done)
        if start >= 0:
            add(start, None)
            add(start + len(sentence), picture)
    add(len(line), None)
    return stretches


_STRENGTH = ("denied", "agree", "alone", "against")
_WORDS = {1: "affirmed", 0: "denied", -1: "doubtful", None: "not mentioned"}
_EDGES = re.compile(r"^\W+|\W+$")


def _pieces(
    line: str, kinds: Sequence[tuple[str, str]], beside: Sequence[str], start: int, end: int
) -> list[Piece]:
    groups = itertools.groupby(range(start, end), key=lambda i: (*kinds[i], beside[i]))
    return [
        Piece("".join(line[i] for i in places), kind, note, state)
        for (kind, note, state), places in groups
    ]


def _compare_words(line: str, other: str) -> list[str]:
    """What `Piece.beside` says, for each character of a line."""
    theirs = [[word for word, _, _ in _words(s, 0)] for _, s in sentences(other)]
    beside = [""] * len(line)
    for start, sentence in sentences(line):
        words = _words(sentence, start)
        own = [word for word, _, _ in words]
        best, shared = ALIKE, set[int]()
        for candidate in theirs:
            matcher = difflib.SequenceMatcher(None, own, candidate, autojunk=False)
            if (ratio := matcher.ratio()) > best:
                best = ratio
                shared = {i for a, _, n in matcher.get_matching_blocks() for i in range(a, a + n)}
        state = "differs" if shared else "new"
        for k, (_, first, last) in enumerate(words):
            if k not in shared:
                if k > 0 and k - 1 not in shared:  # with the blank between two such words
                    first = words[k - 1][2]
                beside[first:last] = [state] * (last - first)
    return beside


def _words(sentence: str, start: int) -> list[tuple[str, int, int]]:
    """Words of a sentence, bare and in lower case, with their places; signs alone are none."""
    return [
        (bare.lower(), start + match.start(), start + match.end())
        for match in re.finditer(r"\S+", sentence)
        if (bare := _EDGES.sub("", match.group()))
    ]


def score_rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of scores: name, value, interval, each baseline's value, and the
    picture of the interval."""
    baselines = [scores["baselines"][name] for name in BASELINES if name in scores["baselines"]]
    clinical = scores["clinical"]
    rows = []
    for name, shown in LANGUAGE.items():
        limits = scores["intervals"].get(name)
        rows.append(_row(shown, scores[name], limits, [one[name] for one in baselines]))
    for kind, title in SETS.items():
        for average in ("micro", "macro", "example"):
            limits = clinical["intervals"].get(kind, {}).get(average, {}).get("f1")
            others = [one["clinical"][kind][average]["f1"] for one in baselines]
            value = clinical[kind][average]["f1"]
            rows.append(_row(f"F1 {average}, {title}", value, limits, others))
    for name, title in (("sides", "wrong side"), ("comparisons", "invented comparisons")):
        rate = scores[name]
        rows.append(_row(f"{title} (less is better)", rate["rate"], rate["interval"], []))
    return rows


def observation_rows(clinical: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table of observations, each with what `emrrg.metrics.clinical` counts."""
    intervals = clinical["intervals"].get("observations", {})
    return [
        {
            "name": name,
            **clinical["observations"][name],
            "limits": _limits(intervals.get(name, {}).get("f1")),
        }
        for name in OBSERVATIONS
    ]


def group_rows(scores: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Column of the annotation to a row for each of its values."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for column, values in scores["groups"].items():
        rows[column] = []
        for value, one in values.items():
            found = scores["clinical"]["groups"][column][value]
            limits = found["intervals"].get("findings", {}).get("micro", {}).get("f1")
            rows[column].append(
                {
                    "value": value,
                    "studies": one["pairs"],
                    "scores": [one[name] for name in PER_STUDY],
                    "f1": found["findings"]["micro"]["f1"],
                    "limits": _limits(limits),
                }
            )
    return rows


def histogram(name: str, values: Sequence[float]) -> dict[str, Any]:
    """How a score is spread over the studies.

    Returns:
        name, top (of the axis), bars (low, high, count, and height of 0 to 100), median.
    """
    top = max(1, math.ceil(max(values)))
    counts, edges = np.histogram(values, bins=BINS, range=(0, top))
    bars = [
        {"low": low, "high": high, "count": int(n), "height": round(100 * n / counts.max(), 1)}
        for low, high, n in zip(edges[:-1], edges[1:], counts, strict=True)
    ]
    return {"name": name, "top": top, "bars": bars, "median": statistics.median(values)}


def _case(
    i: int,
    result: Evaluation,
    studies: Studies,
    values: Mapping[str, Sequence[float]],
    groups: dict[str, str],
    maps: Maps | None,
    kinds: list[str],
) -> Case:
    place = result.indices[i]
    attributes = studies.attributes()[place]
    hypothesis, reference = result.hypotheses[i], result.references[i]
    scored = result.scores["clinical"]["uncertain"]
    right, missed, invented = compare_findings(result.predicted[i], result.truth[i], scored)
    sides = score_sides([hypothesis], [reference])["observations"]
    shown = [n for n in dict.fromkeys((*groups, *SHOWN_COLUMNS)) if attributes.get(n)]
    prior = known_priors([attributes.get(PRIORS)], [result.ids[i]], PRIORS)
    looks: Sequence[SentenceMap] = ()
    if maps:
        with contextlib.suppress(InputError):  # longer than the decoder's positions
            looks = maps(studies[place].images, hypothesis)
    pictures, left_out = _pictures(studies, place)
    overlays, highest = _overlays(looks)
    return Case(
        id=result.ids[i],
        pictures=pictures,
        left_out=left_out,
        reference=mark_report(reference, hypothesis, "generated report"),
        generated=mark_report(
            hypothesis,
            reference,
            "reference",
            [(look.text, png) for look, png in zip(looks, overlays, strict=True)],
        ),
        scores={name: float(column[i]) for name, column in values.items()},
        right=right,
        missed=missed,
        invented=invented,
        wrong_sides=[name for name, one in sides.items() if one["wrong"]],
        comparison=score_comparisons([hypothesis], [reference], has_prior=prior)["invented"] > 0,
        attributes={name: _text(attributes[name]) for name in shown},
        groups=groups,
        highest=highest,
        kinds=kinds,
    )


def _group_of_each(
    result: Evaluation, studies: Studies, columns: Sequence[str]
) -> list[dict[str, str]]:
    """For each scored study column to the value (or band) that it belongs to."""
    rows = studies.attributes()
    members: list[dict[str, str]] = [{} for _ in result.ids]
    groups = group_studies({n: [rows[i].get(n) for i in result.indices] for n in columns})
    for column, values in groups.items():
        for value, places in values.items():
            for i in places:
                members[i][column] = value
    return members


def _pictures(studies: Studies, place: int) -> tuple[list[Picture], int]:
    """The views of a study, in the files' own proportions where there are files, and how many are
    left out."""
    if isinstance(studies, RecordStudies):
        paths = studies.records[place].images
        views = [open_image(path) for path in paths[:VIEWS]]
        return [_jpeg(view) for view in views], len(paths) - len(views)
    images = studies[place].images
    views = [Image.fromarray(v.permute(1, 2, 0).contiguous().numpy()) for v in images[:VIEWS]]
    return [_jpeg(view) for view in views], len(images) - len(views)


def _jpeg(picture: Image.Image) -> Picture:
    small = picture.copy()
    small.thumbnail((PIXELS, PIXELS), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return Picture(_uri("image/jpeg", buffer.getvalue()), *small.size)


def _overlays(looks: Sequence[SentenceMap]) -> tuple[list[str], float | None]:
    """The attention maps as PNG files with one scale, and its top, at least 2 (an all but even map
    looks it), in multiples of an even spread."""
    grids = [look.grid * look.grid.size for look in looks]
    if not grids:
        return [], None
    highest = max(2.0, *(float(grid.max()) for grid in grids))
    return [_overlay(grid / highest) for grid in grids], highest


def _overlay(shares: NDArray[np.float64]) -> str:
    """A map with values in [0, 1]: the more, the brighter and the less transparent."""
    from matplotlib import colormaps

    pixels = colormaps["inferno"](shares)  # (G, G, 4) in [0, 1]
    pixels[..., 3] = 0.25 + 0.5 * shares
    buffer = io.BytesIO()
    Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(buffer, "PNG")
    return _uri("image/png", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _row(
    name: str,
    value: float | None,
    limits: Sequence[float | None] | None,
    baselines: Sequence[float | None],
) -> dict[str, Any]:
    numbers = [value, *(limits or []), *baselines]
    top = max(1, math.ceil(max((x for x in numbers if x is not None), default=1)))

    def place(number: float | None) -> float | None:
        return None if number is None else round(100 * number / top, 2)

    return {
        "name": name,
        "value": value,
        "limits": _limits(limits),
        "baselines": list(baselines),
        "top": top,
        "places": {
            "value": place(value),
            "limits": [place(x) for x in _limits(limits) or []],
            "baselines": [place(x) for x in baselines],
        },
    }


def _limits(limits: Sequence[float | None] | None) -> tuple[float, float] | None:
    if not limits or limits[0] is None or limits[1] is None:
        return None
    return limits[0], limits[1]


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _hash(text: str) -> str:
    """As a content security policy names an inline style or script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
