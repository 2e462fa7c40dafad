"""Bootstrap intervals and paired tests from statistics of single studies.

A study's share in a score is computed once; a resample only weighs the studies anew. Weights are
the counts of a draw of n studies with replacement, so `weights @ statistics` are the sums over
the resampled studies, and any score that is a function of such sums (corpus BLEU, a mean, micro
F1) follows without touching a report again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
_WEIGHTS_A_CHUNK = 4_000_000


def resample_weights(count: int, resamples: int, seed: int) -> Iterator[Array]:
    """Draw how often each study stands in each resample.

    Args:
        count: studies, at least 1.
        resamples: draws in all.
        seed: the same seed gives the same draws, whatever is scored with them.
    Yields:
        (at most resamples, count) fp64, a chunk of the draws; each row sums to `count`.
    """
    rng = np.random.default_rng(seed)
    share = np.full(count, 1.0 / count)
    step = max(1, _WEIGHTS_A_CHUNK // count)
    for start in range(0, resamples, step):
        yield rng.multinomial(count, share, size=min(step, resamples - start)).astype(np.float64)


def resample(
    statistics: Array, score: Callable[[Array], Array], resamples: int, seed: int
) -> Array:
    """Score every resample.

    Args:
        statistics: (n, m) fp64. What each study adds to the sums that `score` needs.
        score: maps sums (r, m) to scores (r,) or (r, k).
        resamples: draws.
        seed: of the draws.
    Returns:
        (resamples,) or (resamples, k) fp64.
    """
    draws = resample_weights(len(statistics), resamples, seed)
    return np.concatenate([score(weights @ statistics) for weights in draws])


def interval(values: Array, level: float = LEVEL) -> list[float | None]:
    """The percentile interval [low, high] of the values of one score over the resamples.

    Args:
        values: (resamples,) fp64; resamples where the score is not defined are nan, left out.
        level: share of the resamples inside.
    Returns:
        Two numbers, or two None where no resample has a score.
    """
    defined = values[np.isfinite(values)]
    if not len(defined):
        return [None, None]
    tail = (1 - level) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return [float(low), float(high)]


def paired_p_value(differences: Array) -> float:
    """Two-sided p-value of "no difference" from differences of two systems over shared resamples.

    Twice the share of the resamples on the far side of 0 (Koehn 2004 counts one side), each count
    plus one so that it is never 0, at most 1.

    Args:
        differences: (resamples,) fp64, score of one system minus the other's on the same draw.
    """
    below = int(np.count_nonzero(differences <= 0))
    above = int(np.count_nonzero(differences >= 0))
    return min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1))
