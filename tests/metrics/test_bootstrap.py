"""Resampling: the draws, the intervals and the paired test, against what they must be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from emrrg.metrics import bootstrap
from emrrg.metrics.bootstrap import interval, paired_p_value, resample, resample_weights


def test_draws_are_counts_with_replacement() -> None:
    chunks = list(resample_weights(5, 4000, seed=3))
    weights = np.concatenate(chunks)
    assert weights.shape == (4000, 5)
    assert np.all(weights.sum(1) == 5)
    # A study is left out of a draw with probability (1 - 1/5)^5.
    assert abs((weights == 0).mean() - (4 / 5) ** 5) < 0.01
    assert abs(weights.mean() - 1) < 1e-12


def test_chunks_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resample_weights(7, 100, seed=1)))
    monkeypatch.setattr(bootstrap, "_WEIGHTS_A_CHUNK", 7 * 9)
    chunks = list(resample_weights(7, 100, seed=1))
    assert [len(c) for c in chunks] == [9] * 11 + [1]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)


def test_the_exact_distribution_of_a_small_mean() -> None:
    """All 27 draws of 3 values are equally likely: the resampled means must follow them."""
    values = np.array([0.0, 1.0, 4.0])
    rows = np.stack([values, np.ones(3)], axis=1)
    means = resample(rows, lambda sums: sums[:, 0] / sums[:, 1], 40000, seed=0)
    exact = np.array([np.mean(draw) for draw in itertools.product(values, repeat=3)])
    for mean in np.unique(np.round(exact, 9)):
        share = np.isclose(exact, mean).mean()
        assert abs(np.isclose(means, mean).mean() - share) < 0.012, mean


def test_interval_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 900)
    rows = np.stack([values, np.ones(900)], axis=1)
    low, high = interval(resample(rows, lambda s: s[:, 0] / s[:, 1], 4000, seed=0))
    half = 1.96 * values.std() / 30
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_interval_leaves_undefined_resamples_out() -> None:
    assert interval(np.array([np.nan, 1.0, np.nan])) == [1.0, 1.0]
    assert interval(np.array([np.nan, np.inf])) == [None, None]
    assert interval(np.arange(101.0), level=0.9) == pytest.approx([5.0, 95.0])


@pytest.mark.parametrize(
    ("below", "zero", "above", "expected"),
    [
        (0, 0, 99, 2 * 1 / 100),  # one system always better: the smallest value there is
        (99, 0, 0, 2 * 1 / 100),
        (4, 0, 95, 2 * 5 / 100),
        (50, 0, 49, 1.0),
        (0, 99, 0, 1.0),  # the same system twice
    ],
)
def test_paired_p_value(below: int, zero: int, above: int, expected: float) -> None:
    differences = np.array([-1.0] * below + [0.0] * zero + [1.0] * above)
    assert paired_p_value(differences) == pytest.approx(expected)


def test_p_values_of_equal_systems_are_spread_evenly() -> None:
    """Two systems of equal quality: about one test in ten says p < 0.1."""
    rng = np.random.default_rng(5)
    small = 0
    for seed in range(300):
        scores = rng.normal(size=(60, 2))
        rows = np.column_stack([scores, np.ones(60)])
        draws = resample(rows, lambda s: s[:, :2] / s[:, 2:], 400, seed=seed)
        small += paired_p_value(draws[:, 0] - draws[:, 1]) < 0.1
    assert 15 <= small <= 50
