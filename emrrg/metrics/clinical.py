"""Clinical scores of generated reports: are the findings of the reference in it, and no others?

Reports are labelled with the 14 observations of CheXpert, by the rules of `emrrg.metrics.labeler`
or from elsewhere, and the labels of a generated report are held against those of its reference.
Published figures follow incompatible conventions, so a result names all of its own:

    labeler      whose labels they are, `source`.
    uncertain    what -1 counts as: `negative`, `positive`, or `ignore`: entries whose reference is
                 uncertain are left out (an uncertain prediction is then one not made).
    averaging    micro (all entries of all studies in one), macro (mean over observations), example
                 (mean over studies), each over three sets of observations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from emrrg.errors import InputError
from emrrg.metrics.bootstrap import LEVEL, Array, interval, resample
from emrrg.metrics.labeler import (
    LABELER,
    OBSERVATIONS,
    Mention,
    find_mentions,
    label_report,
)

__all__ = [
    "FINDINGS",
    "FIVE",
    "LABELER",
    "OBSERVATIONS",
    "OBSERVATION_SETS",
    "Mention",
    "find_mentions",
    "label_report",
    "score_labels",
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
POLICIES = ("negative", "positive", "ignore")

Labels = Mapping[str, int | None]


def score_labels(
    predicted: Sequence[Labels],
    reference: Sequence[Labels],
    *,
    uncertain: Literal["negative", "positive", "ignore"] = "negative",
    bootstrap: int = 0,
    seed: int = 42,
    source: str = LABELER,
    zero_division: Literal[0, 1] = 0,
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
    Returns:
        all (14 observations), five, findings (13, without "No Finding"): each
            {"micro" | "macro" | "example": {"precision", "recall", "f1"}}, floats.
            The finding micro F1 is result["findings"]["micro"]["f1"].
        observations: name to {"precision", "recall", "f1", "tp", "fp", "fn", "tn", "support"
            (positive references), "predicted" (positive predictions), "left_out" (ignored)}.
        intervals: {"all" | "five" | "findings": {average: {measure: [low, high]}}} and
            {"observations": {name: {measure: [low, high]}}}; {} without bootstrap.
        labeler, uncertain, averaging, zero_division, studies, bootstrap: how it was counted.
    Raises:
        InputError: no studies, unequal numbers, a label that is none of 1, 0, -1 and None, or an
            unknown option.
    """
    if uncertain not in POLICIES:
        raise InputError(f"uncertain: {uncertain!r} is not one of {', '.join(POLICIES)}")
    if bootstrap < 0:
        raise InputError(f"bootstrap: {bootstrap} resamples; give 0 or more")
    if len(predicted) != len(reference):
        raise InputError(
            f"{len(predicted)} predicted labels for {len(reference)} references; give one each"
        )
    if not len(reference):
        raise InputError("no labels to score: both lists are empty")
    guess, truth = label_matrix(predicted, "predicted"), label_matrix(reference, "reference")
    counted = truth != -1 if uncertain == "ignore" else np.ones(truth.shape, dtype=bool)
    as_positive = (1, -1) if uncertain == "positive" else (1,)
    said, true = np.isin(guess, as_positive) & counted, np.isin(truth, as_positive) & counted
    # (n, 3, 14): true positives, false positives, false negatives.
    outcomes = np.stack([said & true, said & ~true, ~said & true], axis=1).astype(np.float64)
    examples = [_rates(outcomes[:, :, _columns(name)].sum(2), zero_division) for name in _SETS]
    statistics = np.hstack(
        [outcomes.reshape(len(outcomes), -1), *examples, np.ones((len(outcomes), 1))]
    )

    def score(sums: Array) -> Array:
        return _score_sums(sums, zero_division)

    values = score(statistics.sum(0, keepdims=True))[0]
    result = _named(values.tolist())
    tp, fp, fn = outcomes.sum(0)
    for i, name in enumerate(OBSERVATIONS):
        kept = int(counted[:, i].sum())
        result["observations"][name] |= {
            "tp": int(tp[i]),
            "fp": int(fp[i]),
            "fn": int(fn[i]),
            "tn": kept - int(tp[i] + fp[i] + fn[i]),
            "support": int(tp[i] + fn[i]),
            "predicted": int(tp[i] + fp[i]),
            "left_out": len(counted) - kept,
        }
    result["intervals"] = {}
    if bootstrap:
        draws = resample(statistics, score, bootstrap, seed)
        result["intervals"] = _named([interval(draws[:, i]) for i in range(draws.shape[1])])
    return result | {
        "labeler": source,
        "uncertain": uncertain,
        "averaging": list(AVERAGES),
        "zero_division": zero_division,
        "studies": len(outcomes),
        "bootstrap": {"resamples": bootstrap, "seed": seed, "level": LEVEL} if bootstrap else {},
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
_OUTCOMES = 3 * len(OBSERVATIONS)


def _columns(name: str) -> list[int]:
    return [OBSERVATIONS.index(observation) for observation in OBSERVATION_SETS[name]]


def _rates(counts: Array, zero_division: float) -> Array:
    """Precision, recall and F1 of counts (..., 3): true positives, false ones, false negatives."""
    tp, fp, fn = np.moveaxis(counts, -1, 0)
    below = np.stack([tp + fp, tp + fn, tp + (fp + fn) / 2], axis=-1)
    empty = np.full(below.shape, float(zero_division))
    return np.divide(tp[..., None], below, out=empty, where=below > 0)


def _score_sums(sums: Array, zero_division: float) -> Array:
    """All rates from sums over studies: (r, 3 * 14 + 3 * 3 + 1) to (r, 27 + 42)."""
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
    """The columns of `_score_sums` under their names."""
    left = iter(values)
    named: dict[str, Any] = {
        one: {average: {measure: next(left) for measure in MEASURES} for average in AVERAGES}
        for one in _SETS
    }
    named["observations"] = {
        observation: {measure: next(left) for measure in MEASURES} for observation in OBSERVATIONS
    }
    return named
