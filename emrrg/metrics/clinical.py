"""Clinical scores of generated reports: are the findings of the reference in it, and no others?

Reports are labelled with the 14 observations of CheXpert, by the rules of `emrrg.metrics.labeler`
or from elsewhere, and the labels of a generated report are held against those of its reference.
Published figures follow incompatible conventions, so a result names all of its own:

    labeler      whose labels they are.
    uncertain    what -1 counts as: `negative`, `positive`, or `ignore`: entries whose reference is
                 uncertain are left out (an uncertain prediction is then one not made, so that
                 hedging hides no error).
    averaging    micro (all entries of all studies in one), macro (mean over observations), example
                 (mean over studies), each over three sets of observations.

Two errors that labels cannot show are counted from the texts: a finding on the wrong side, and
comparisons with an earlier study where there is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from emrrg.errors import InputError
from emrrg.metrics.bootstrap import LEVEL, Array, interval, paired_p_value, resample
from emrrg.metrics.groups import Groups
from emrrg.metrics.labeler import (
    LABELER,
    OBSERVATIONS,
    Mention,
    find_comparisons,
    find_mentions,
    label_report,
    tidy,
)

__all__ = [
    "FINDINGS",
    "FIVE",
    "LABELER",
    "OBSERVATIONS",
    "OBSERVATION_SETS",
    "Mention",
    "compare_labels",
    "find_comparisons",
    "find_mentions",
    "label_matrix",
    "label_report",
    "score_comparisons",
    "score_labels",
    "score_policies",
    "score_sides",
]

FINDINGS: tuple[str, ...] = OBSERVATIONS[1:]
"""The 13 observations other than "No Finding"."""

FIVE: tuple[str, ...] = (
    "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion",
)  # fmt: skip
"""The five that CheXpert's competition and most papers score."""

OBSERVATION_SETS: dict[str, tuple[str, ...]] = {
    "all": OBSERVATIONS,
    "five": FIVE,
    "findings": FINDINGS,
}
AVERAGES = ("micro", "macro", "example")
MEASURES = ("precision", "recall", "f1")

SIDED: tuple[str, ...] = tuple(
    name for name in FINDINGS if name not in ("Enlarged Cardiomediastinum", "Cardiomegaly")
)
"""Observations that have a side."""

Labels = Mapping[str, int | None]
Policy = Literal["negative", "positive", "ignore"]
POLICIES: tuple[Policy, ...] = ("negative", "positive", "ignore")


def score_labels(
    predicted: Sequence[Labels],
    reference: Sequence[Labels],
    *,
    uncertain: Policy = "negative",
    bootstrap: int = 0,
    seed: int = 42,
    source: str = LABELER,
    zero_division: Literal[0, 1] = 0,
    groups: Groups | None = None,
) -> dict[str, Any]:
    """Precision, recall and F1 of predicted labels.

        P = tp / (tp + fp),  R = tp / (tp + fn),  F1 = 2 tp / (2 tp + fp + fn)

    Args:
        predicted: for each study, observation to 1, 0, -1 (uncertain) or None (not mentioned,
            counts as 0); observations that are not there count as None.
        reference: the same for the references, in the same order.
        uncertain: what -1 counts as, see the module.
        bootstrap: resamples of the studies for 95 % intervals; 0 for none.
        seed: of the resamples.
        source: where the labels come from, for the result.
        zero_division: the value of a measure whose denominator is 0: 0 as scikit-learn has it (a
            normal study with nothing predicted then counts 0 in the example-based mean), or 1.
        groups: studies by columns (`emrrg.metrics.groups.group_studies`), each scored on its own.
    Returns:
        all (14 observations), five, findings (13, without "No Finding"): each
            {"micro" | "macro" | "example": {"precision", "recall", "f1"}}, floats.
            The finding micro F1 is result["findings"]["micro"]["f1"].
        observations: name to {"precision", "recall", "f1", "tp", "fp", "fn", "tn", "support"
            (positive references), "predicted" (positive predictions), "left_out" (ignored)}.
        intervals: {"all" | "five" | "findings": {average: {measure: [low, high]}},
            "observations": {name: {measure: [low, high]}}}; {} without bootstrap.
        groups: column to value to {"studies", and the four of above, with "intervals"}.
        labeler, uncertain, averaging, zero_division, studies, bootstrap: how it was counted.
    Raises:
        InputError: no studies, unequal numbers, a label that is none of 1, 0, -1 and None, or an
            unknown option.
    """
    _check_options(uncertain, bootstrap)
    statistics, counted = _label_statistics(predicted, reference, uncertain, zero_division)
    everyone = list(range(len(statistics)))
    return {
        **_score_rows(statistics, counted, everyone, zero_division, bootstrap, seed),
        "groups": {
            column: {
                value: _score_rows(statistics, counted, rows, zero_division, bootstrap, seed)
                for value, rows in values.items()
            }
            for column, values in (groups or {}).items()
        },
        "labeler": source,
        "uncertain": uncertain,
        "averaging": list(AVERAGES),
        "zero_division": zero_division,
        "bootstrap": {"resamples": bootstrap, "seed": seed, "level": LEVEL} if bootstrap else {},
    }


def score_policies(
    predicted: Sequence[Labels],
    reference: Sequence[Labels],
    *,
    uncertain: Policy = "negative",
    **settings: Any,
) -> dict[str, Any]:
    """`score_labels`, and the F1 of every uncertainty policy beside it.

    Args:
        predicted, reference, uncertain: as in `score_labels`.
        **settings: its others.
    Returns:
        As `score_labels`; policies: each policy to "all" | "five" | "findings" to average to F1.
    Raises:
        InputError: as `score_labels`.
    """
    result = score_labels(predicted, reference, uncertain=uncertain, **settings)
    result["policies"] = {}
    for policy in POLICIES:
        other = score_labels(predicted, reference, uncertain=policy)
        result["policies"][policy] = {
            name: {average: rates["f1"] for average, rates in other[name].items()}
            for name in OBSERVATION_SETS
        }
    return result


def compare_labels(
    first: Sequence[Labels],
    second: Sequence[Labels],
    reference: Sequence[Labels],
    *,
    uncertain: Policy = "negative",
    bootstrap: int = 1000,
    seed: int = 42,
    zero_division: Literal[0, 1] = 0,
) -> dict[str, Any]:
    """Paired bootstrap test between two systems' labels of the same studies.

    Args:
        first: labels of one system's reports.
        second: labels of the other's, same order.
        reference: labels of the references.
        uncertain, seed, zero_division: as in `score_labels`.
        bootstrap: resamples, at least 1.
    Returns:
        "all", "five" and "findings", each average to measure to {"first", "second", "difference"
        (first minus second), "interval" of the difference, two-sided "p_value"}.
    Raises:
        InputError: as `score_labels`.
    """
    _check_options(uncertain, bootstrap)
    if bootstrap < 1:
        raise InputError("bootstrap: a comparison needs at least 1 resample")
    points, draws = [], []
    for labels in (first, second):
        rows, _ = _label_statistics(labels, reference, uncertain, zero_division)
        points.append(_rates_of_sums(rows.sum(0, keepdims=True), zero_division)[0])
        draws.append(
            resample(rows, lambda sums: _rates_of_sums(sums, zero_division), bootstrap, seed)
        )
    differences = draws[0] - draws[1]
    named = _named(
        [
            {
                "first": float(points[0][i]),
                "second": float(points[1][i]),
                "difference": float(points[0][i] - points[1][i]),
                "interval": interval(differences[:, i]),
                "p_value": paired_p_value(differences[:, i]),
            }
            for i in range(differences.shape[1])
        ]
    )
    return {name: named[name] for name in OBSERVATION_SETS}


def score_sides(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    bootstrap: int = 0,
    seed: int = 42,
) -> dict[str, Any]:
    """Findings that the generated report puts on the wrong side.

    A finding of a study is compared where both texts affirm (or suspect) it and both say its side.
    It is wrong where they have no side in common; where one says both sides and the other one of
    them, it is partial.

    Args:
        hypotheses: generated reports, one a study.
        references: reports in the same order.
        bootstrap: resamples of the studies for the interval; 0 for none.
        seed: of the resamples.
    Returns:
        compared, wrong, partial: numbers of findings; rate: wrong / compared, None where nothing
        is compared; interval: [low, high] or None; studies; observations: name to {"compared",
        "wrong", "partial"}, those that were compared only; labeler.
    Raises:
        InputError: unequal numbers, or no pairs.
    """
    _check_lengths(hypotheses, references)
    counts = np.zeros((len(references), len(SIDED), 3))  # compared, wrong, partial
    for i, texts in enumerate(zip(hypotheses, references, strict=True)):
        said, true = (_sides(text) for text in texts)
        for j, name in enumerate(SIDED):
            ours, theirs = said.get(name, set()), true.get(name, set())
            if ours and theirs:
                wrong = not ours & theirs
                counts[i, j] += (1, wrong, not wrong and ours != theirs)
    totals = counts.sum((0, 1))
    each = counts.sum(0).astype(int)
    return {
        **_rate(counts[:, :, 1].sum(1), counts[:, :, 0].sum(1), bootstrap, seed),
        "compared": int(totals[0]),
        "wrong": int(totals[1]),
        "partial": int(totals[2]),
        "studies": len(references),
        "observations": {
            name: dict(zip(("compared", "wrong", "partial"), row.tolist(), strict=True))
            for name, row in zip(SIDED, each, strict=True)
            if row[0]
        },
        "labeler": LABELER,
    }


def score_comparisons(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    has_prior: Sequence[bool | None] | None = None,
    bootstrap: int = 0,
    seed: int = 42,
) -> dict[str, Any]:
    """Comparisons with an earlier study ("unchanged", "interval increase") that were made up.

    A system that sees one study cannot know how it changed. A comparison is counted as invented
    where the study has no earlier one: as `has_prior` says, or, where that does not say, where the
    reference compares nothing.

    Args:
        hypotheses: generated reports, one a study.
        references: reports in the same order.
        has_prior: for each study whether there is an earlier one; None where unknown.
        bootstrap: resamples of the studies for the interval; 0 for none.
        seed: of the resamples.
    Returns:
        without_prior: studies that count; invented: those of them whose generated report compares;
        rate: invented / without_prior, None where none counts; interval; known: studies where
        `has_prior` says; hypotheses, references: shares of all texts that compare; phrases: the
        ten most frequent invented phrases with their numbers; studies.
    Raises:
        InputError: unequal numbers, or no pairs.
    """
    _check_lengths(hypotheses, references)
    prior = list(has_prior) if has_prior is not None else [None] * len(references)
    _check_lengths(prior, references, "has_prior")
    said = [find_comparisons(text) for text in hypotheses]
    true = [bool(find_comparisons(text)) for text in references]
    alone = [not compares if known is None else not known
             for known, compares in zip(prior, true, strict=True)]  # fmt: skip
    phrases = Counter(
        tidy(text)[start:end].lower()
        for text, spans, counts in zip(hypotheses, said, alone, strict=True)
        if counts
        for start, end in spans
    )
    invented = np.array([bool(x) and y for x, y in zip(said, alone, strict=True)], dtype=float)
    return {
        **_rate(invented, np.array(alone, dtype=float), bootstrap, seed),
        "without_prior": sum(alone),
        "invented": int(invented.sum()),
        "known": sum(known is not None for known in prior),
        "hypotheses": sum(map(bool, said)) / len(said),
        "references": sum(true) / len(true),
        "phrases": dict(phrases.most_common(10)),
        "studies": len(references),
    }


def label_matrix(labels: Sequence[Labels], name: str = "labels") -> Array:
    """Labels as numbers.

    Returns:
        (n, 14) fp64 of 1, 0, -1, and nan for not mentioned.
    Raises:
        InputError: another value (the message names study and observation).
    """
    table = np.full((len(labels), len(OBSERVATIONS)), np.nan)
    for i, row in enumerate(labels):
        for j, observation in enumerate(OBSERVATIONS):
            value = row.get(observation)
            if value is None:
                continue
            if value not in (1, 0, -1):
                raise InputError(
                    f"{name}[{i}]: {observation}: {value!r} is not 1, 0, -1 or nothing"
                )
            table[i, j] = value
    return table


_SETS = tuple(OBSERVATION_SETS)
_OUTCOMES = 3 * len(OBSERVATIONS)  # columns: true positives, false positives, false negatives


def _check_options(uncertain: str, bootstrap: int) -> None:
    if uncertain not in POLICIES:
        raise InputError(f"uncertain: {uncertain!r} is not one of {', '.join(POLICIES)}")
    if bootstrap < 0:
        raise InputError(f"bootstrap: {bootstrap} resamples; give 0 or more")


def _check_lengths(
    predicted: Sequence[object], reference: Sequence[object], name: str = "hypotheses"
) -> None:
    if len(predicted) != len(reference):
        raise InputError(f"{name}: {len(predicted)} for {len(reference)} references; one each")
    if not len(reference):
        raise InputError("nothing to score: both lists are empty")


def _label_statistics(
    predicted: Sequence[Labels], reference: Sequence[Labels], uncertain: str, zero_division: float
) -> tuple[Array, Array]:
    """What each study adds to the sums, (n, 3 * 14 + 3 * 3 + 1), and which entries count."""
    _check_lengths(predicted, reference, "predicted labels")
    guess, truth = label_matrix(predicted, "predicted"), label_matrix(reference, "reference")
    counted = truth != -1 if uncertain == "ignore" else np.ones(truth.shape, dtype=bool)
    positive = (1, -1) if uncertain == "positive" else (1,)
    said, true = np.isin(guess, positive) & counted, np.isin(truth, positive) & counted
    outcomes = np.stack([said & true, said & ~true, ~said & true], axis=1).astype(np.float64)
    examples = [_rates(outcomes[:, :, _columns(name)].sum(2), zero_division) for name in _SETS]
    ones = np.ones((len(outcomes), 1))
    return np.hstack([outcomes.reshape(len(outcomes), -1), *examples, ones]), counted


def _score_rows(
    statistics: Array,
    counted: Array,
    rows: Sequence[int],
    zero_division: float,
    bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Scores, counts and intervals of some of the studies."""
    chosen = statistics[rows]
    sums = chosen.sum(0, keepdims=True)
    result = _named(_rates_of_sums(sums, zero_division)[0].tolist())
    tp, fp, fn = sums[0, :_OUTCOMES].reshape(3, -1).astype(int)
    kept = counted[rows].sum(0).astype(int)
    for i, name in enumerate(OBSERVATIONS):
        result["observations"][name] |= {
            "tp": int(tp[i]),
            "fp": int(fp[i]),
            "fn": int(fn[i]),
            "tn": int(kept[i] - tp[i] - fp[i] - fn[i]),
            "support": int(tp[i] + fn[i]),
            "predicted": int(tp[i] + fp[i]),
            "left_out": int(len(rows) - kept[i]),
        }
    result["intervals"] = {}
    if bootstrap:
        draws = resample(chosen, lambda s: _rates_of_sums(s, zero_division), bootstrap, seed)
        result["intervals"] = _named([interval(draws[:, i]) for i in range(draws.shape[1])])
    return {**result, "studies": len(rows)}


def _columns(name: str) -> list[int]:
    return [OBSERVATIONS.index(observation) for observation in OBSERVATION_SETS[name]]


def _rates(counts: Array, zero_division: float) -> Array:
    """Precision, recall and F1 of counts (..., 3): true positives, false ones, false negatives."""
    tp, fp, fn = np.moveaxis(counts, -1, 0)
    below = np.stack([tp + fp, tp + fn, tp + (fp + fn) / 2], axis=-1)
    empty = np.full(below.shape, float(zero_division))
    return np.divide(tp[..., None], below, out=empty, where=below > 0)


def _rates_of_sums(sums: Array, zero_division: float) -> Array:
    """All rates from sums over studies: (r, 3 * 14 + 3 * 3 + 1) to (r, 3 * 9 + 14 * 3)."""
    outcomes = sums[:, :_OUTCOMES].reshape(len(sums), 3, -1)  # (r, 3, 14)
    each = _rates(np.moveaxis(outcomes, 1, 2), zero_division)  # (r, 14, 3)
    columns = []
    for i, name in enumerate(_SETS):
        chosen = _columns(name)
        first = _OUTCOMES + 3 * i
        columns += [
            _rates(outcomes[:, :, chosen].sum(2), zero_division),
            each[:, chosen].mean(1),
            sums[:, first : first + 3] / sums[:, -1:],
        ]
    return np.hstack([*columns, each.reshape(len(sums), -1)])


def _named(values: list[Any]) -> dict[str, Any]:
    """The columns of `_rates_of_sums` under their names."""
    left = iter(values)
    named: dict[str, Any] = {
        one: {average: {measure: next(left) for measure in MEASURES} for average in AVERAGES}
        for one in _SETS
    }
    named["observations"] = {
        observation: {measure: next(left) for measure in MEASURES} for observation in OBSERVATIONS
    }
    return named


def _sides(text: str) -> dict[str, set[str]]:
    """Observation to the sides on which a text affirms or suspects it."""
    found: dict[str, set[str]] = {}
    for mention in find_mentions(text):
        if mention.status and mention.side:
            both = {"left", "right"} if mention.side == "both" else {mention.side}
            found.setdefault(mention.observation, set()).update(both)
    return found


def _rate(part: Array, whole: Array, bootstrap: int, seed: int) -> dict[str, Any]:
    """A share of sums over studies, and its interval."""

    def share(sums: Array) -> Array:
        none = np.full(len(sums), np.nan)
        return np.divide(sums[:, 0], sums[:, 1], out=none, where=sums[:, 1] > 0)

    statistics = np.stack([part, whole], axis=1)
    value = float(share(statistics.sum(0, keepdims=True))[0])
    draws = interval(resample(statistics, share, bootstrap, seed)) if bootstrap else None
    return {"rate": None if np.isnan(value) else value, "interval": draws}
