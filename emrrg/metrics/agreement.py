"""Agreement between annotators, or between label sources: kappas and alpha with intervals.

    Cohen 1960, 1968     two annotators; kappa = 1 - sum(w O) / sum(w E), O the table of their pairs
                         of values, E the one that its margins make by chance; w = 1 off the
                         diagonal, or |i - j|, or (i - j)^2 over the ranks of ordered values.
    Fleiss 1971          any number of annotators, each value of every item known;
                         kappa = (P - P_e) / (1 - P_e).
    Krippendorff 2011    any number, values may be missing (Computing Krippendorff's
                         Alpha-Reliability); alpha = 1 - D_o / D_e over the coincidences of values
                         within items; nominal and ordinal differences.

Every one of them is a function of sums over items, so intervals resample items (or the studies that
they belong to) without counting anew (`emrrg.metrics.bootstrap`). Where chance explains everything
(all values are the same) a coefficient is not defined: nan here, None in results.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from emrrg.errors import InputError
from emrrg.metrics.bootstrap import LEVEL, Array, interval, resample
from emrrg.metrics.labeler import OBSERVATIONS

Weights = Literal["linear", "quadratic"]
Blank = Literal["negative", "missing", "category"]

BLANKS = ("negative", "missing", "category")
RANKS = (0, -1, 1)
"""Label values in their order: negative, uncertain, positive."""


def cohen_kappa(
    first: ArrayLike,
    second: ArrayLike,
    *,
    categories: Sequence[float] | None = None,
    weights: Weights | None = None,
) -> float:
    """Cohen's kappa of two annotators.

    Args:
        first: (n,) values of one annotator; nan for missing (the item is left out).
        second: (n,) values of the other, same items.
        categories: all values, in their order; None: those that occur, sorted.
        weights: how far apart two ordered values are; None: all alike.
    Returns:
        The coefficient; nan where it is not defined.
    Raises:
        InputError: unequal lengths, or a value that is no category.
    """
    codes, count = _codes(np.stack(_equal(first, second), axis=1), categories)
    return float(_cohen_of(_pair_table(codes, count).sum(0, keepdims=True), count, weights)[0])


def fleiss_kappa(ratings: ArrayLike, *, categories: Sequence[float] | None = None) -> float:
    """Fleiss' kappa of any number of annotators.

    Args:
        ratings: (n, annotators) values; an item with a nan is left out.
        categories: all values; None: those that occur.
    Returns:
        The coefficient; nan where it is not defined.
    Raises:
        InputError: fewer than two annotators, or a value that is no category.
    """
    codes, count = _codes(_matrix(ratings), categories)
    return float(_fleiss_of(_fleiss_rows(codes, count).sum(0, keepdims=True), count)[0])


def krippendorff_alpha(
    ratings: ArrayLike,
    *,
    categories: Sequence[float] | None = None,
    metric: Literal["nominal", "ordinal"] = "nominal",
) -> float:
    """Krippendorff's alpha of any number of annotators, some values of whom may be missing.

    Args:
        ratings: (n, annotators) values, nan for missing; an item with fewer than two values
            says nothing.
        categories: all values, in their order; None: those that occur, sorted.
        metric: whether values have an order.
    Returns:
        The coefficient; nan where it is not defined.
    Raises:
        InputError: fewer than two annotators, or a value that is no category.
    """
    codes, count = _codes(_matrix(ratings), categories)
    return float(_alpha_of(_coincidences(codes, count).sum(0, keepdims=True), count, metric)[0])


def agreement_table(
    sources: Mapping[str, Sequence[Mapping[str, int | None] | None]],
    *,
    observations: Sequence[str] = OBSERVATIONS,
    blank: Blank = "negative",
    bootstrap: int = 1000,
    seed: int = 42,
) -> dict[str, Any]:
    """Agreement of label sources on each observation, and on all of them pooled.

    Args:
        sources: at least two names, each to the labels of the same studies: observation to 1, 0,
            -1 or None (not mentioned); None where the source does not have the study.
        observations: which.
        blank: what "not mentioned" is: `negative`, as scores count it; `missing`; or a `category`
            of its own, which has no rank (weighted and ordinal coefficients are then None).
        bootstrap: resamples of the studies for 95 % intervals; 0 for none.
        seed: of the resamples.
    Returns:
        observations: name to, and pooled:
            {"items": values compared (studies, or study-observation entries, that two sources
            have), "complete": those that all have, "positive": each source's share of positives,
            "observed": share of pairs of values that agree,
            "cohen", "cohen_linear", "cohen_quadratic": means over the pairs of sources,
            "fleiss": of the complete items, "alpha_nominal", "alpha_ordinal": of all,
            each {"value", "interval"}; "pairs": "a / b" to its "cohen"}.
        sources, studies, blank, bootstrap: how it was counted.
    Raises:
        InputError: fewer than two sources, unequal numbers of studies, or an unknown option.
    """
    names = list(sources)
    if len(names) < 2:
        raise InputError("agreement needs at least two label sources")
    if blank not in BLANKS:
        raise InputError(f"blank: {blank!r} is not one of {', '.join(BLANKS)}")
    if bootstrap < 0:
        raise InputError(f"bootstrap: {bootstrap} resamples; give 0 or more")
    studies = len(sources[names[0]])
    for name in names:
        if len(sources[name]) != studies:
            raise InputError(f"{name}: {len(sources[name])} studies, {names[0]} has {studies}")
    if not studies:
        raise InputError("no study in common")
    codes = np.stack([_label_codes(sources[n], observations, blank) for n in names], axis=2)

    def describe(some: Array) -> dict[str, Any]:
        return _describe(some, names, blank, bootstrap, seed)

    return {
        "observations": {o: describe(codes[:, [j]]) for j, o in enumerate(observations)},
        "pooled": describe(codes),
        "sources": names,
        "studies": studies,
        "blank": blank,
        "bootstrap": {"resamples": bootstrap, "seed": seed, "level": LEVEL} if bootstrap else {},
    }


def _describe(
    codes: Array, names: list[str], blank: str, bootstrap: int, seed: int
) -> dict[str, Any]:
    """The coefficients of codes (studies, observations, sources)."""
    count = len(RANKS) + (blank == "category")
    ranked = blank != "category"
    items = codes.reshape(-1, codes.shape[2])
    known = np.isfinite(items)

    def value_of(rows: Callable[[Array], Array], score: Callable[[Array], Array]) -> dict[str, Any]:
        statistics = rows(items).reshape(len(codes), codes.shape[1], -1).sum(1)
        value = float(score(statistics.sum(0, keepdims=True))[0])
        draws = interval(resample(statistics, score, bootstrap, seed)) if bootstrap else None
        return {"value": value if np.isfinite(value) else None, "interval": draws}

    pairs = list(itertools.combinations(range(len(names)), 2))

    def pair_rows(some: Array) -> Array:
        return np.stack([_pair_table(some[:, list(pair)], count) for pair in pairs], axis=1)

    def cohen(weights: Weights | None) -> dict[str, Any]:
        def score(sums: Array) -> Array:
            tables = sums.reshape(len(sums) * len(pairs), -1)
            return _mean(_cohen_of(tables, count, weights).reshape(len(sums), len(pairs)))

        return value_of(pair_rows, score)

    def alpha(metric: str) -> dict[str, Any]:
        return value_of(
            lambda some: _coincidences(some, count), lambda sums: _alpha_of(sums, count, metric)
        )

    def observed(sums: Array) -> Array:
        tables = sums.reshape(len(sums), len(pairs), count, count).sum(1)
        return _divide(np.trace(tables, axis1=1, axis2=2), tables.sum((1, 2)))

    nothing = {"value": None, "interval": None}
    shares = [items[known[:, i], i] == RANKS.index(1) for i in range(len(names))]
    return {
        "items": int((known.sum(1) >= 2).sum()),
        "complete": int(known.all(1).sum()),
        "positive": {
            name: float(share.mean()) if len(share) else None
            for name, share in zip(names, shares, strict=True)
        },
        "observed": value_of(pair_rows, observed),
        "cohen": cohen(None),
        "cohen_linear": cohen("linear") if ranked else nothing,
        "cohen_quadratic": cohen("quadratic") if ranked else nothing,
        "fleiss": value_of(
            lambda some: _fleiss_rows(some, count), lambda sums: _fleiss_of(sums, count)
        ),
        "alpha_nominal": alpha("nominal"),
        "alpha_ordinal": alpha("ordinal") if ranked else nothing,
        "pairs": {
            f"{names[i]} / {names[j]}": value_of(
                lambda some, i=i, j=j: _pair_table(some[:, [i, j]], count),  # type: ignore[misc]
                lambda sums: _cohen_of(sums, count, None),
            )
            for i, j in pairs
        },
    }


def _label_codes(
    labels: Sequence[Mapping[str, int | None] | None], observations: Sequence[str], blank: str
) -> Array:
    """(studies, observations) places in `RANKS`; nan for missing."""
    blanks = {"negative": RANKS.index(0), "missing": np.nan, "category": len(RANKS)}
    codes = np.full((len(labels), len(observations)), np.nan)
    for i, row in enumerate(labels):
        if row is None:
            continue
        for j, name in enumerate(observations):
            value = row.get(name)
            if value is not None and value not in RANKS:
                raise InputError(f"study {i}: {name}: {value!r} is not 1, 0, -1 or nothing")
            codes[i, j] = blanks[blank] if value is None else RANKS.index(value)
    return codes


def _equal(first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    one, two = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.ndim != 1 or one.shape != two.shape:
        raise InputError(f"two lists of the same length are compared, not {one.shape}, {two.shape}")
    return one, two


def _matrix(ratings: ArrayLike) -> Array:
    values = np.asarray(ratings, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise InputError(f"ratings: (items, at least two annotators) expected, not {values.shape}")
    return values


def _codes(values: Array, categories: Sequence[float] | None) -> tuple[Array, int]:
    """Values as places among the categories, nan kept, and the number of categories."""
    known = np.isfinite(values)
    present = np.unique(values[known])
    order = present if categories is None else np.asarray(categories, dtype=np.float64)
    strange = sorted(set(present) - set(order))
    if strange:
        raise InputError(f"{strange[0]:g} is none of the categories {[f'{c:g}' for c in order]}")
    codes = np.full(values.shape, np.nan)
    for place, category in enumerate(order):
        codes[values == category] = place
    return codes, len(order)


def _pair_table(codes: Array, count: int) -> Array:
    """(n, 2) codes to (n, count^2): one at the pair of values, nothing where one is missing."""
    known = np.isfinite(codes).all(1)
    rows = np.zeros((len(codes), count * count))
    places = codes[known].astype(int)
    rows[np.flatnonzero(known), places[:, 0] * count + places[:, 1]] = 1
    return rows


def _cohen_of(sums: Array, count: int, weights: Weights | None) -> Array:
    """Kappa from tables (r, count^2) of pairs of values."""
    tables = sums.reshape(len(sums), count, count)
    ranks = np.arange(count)
    apart = np.abs(ranks[:, None] - ranks[None, :]).astype(np.float64)
    power = {None: 0.0, "linear": 1.0, "quadratic": 2.0}[weights]
    cost = np.where(apart > 0, apart**power, 0.0)
    chance = tables.sum(2)[:, :, None] * tables.sum(1)[:, None, :]
    total = tables.sum((1, 2))
    expected = _divide((cost * chance).sum((1, 2)), total)
    return 1 - _divide((cost * tables).sum((1, 2)), expected)


def _fleiss_rows(codes: Array, count: int) -> Array:
    """(n, annotators) codes to (n, count + 2): values given, agreeing share of pairs, one."""
    annotators = codes.shape[1]
    known = np.asarray(np.isfinite(codes).all(1))
    given = _given(codes, count)
    agreeing = (given * (given - 1)).sum(1) / (annotators * (annotators - 1))
    return np.column_stack([given, agreeing, np.ones(len(codes))]) * known[:, None]


def _fleiss_of(sums: Array, count: int) -> Array:
    given, agreeing, items = sums[:, :count], sums[:, count], sums[:, count + 1]
    observed = _divide(agreeing, items)
    shares = _divide(given, given.sum(1, keepdims=True))
    expected = (shares**2).sum(1)
    return _divide(observed - expected, 1 - expected)


def _coincidences(codes: Array, count: int) -> Array:
    """(n, annotators) codes to (n, count^2): pairs of values within an item over its values - 1."""
    given = _given(codes, count)
    values = given.sum(1)
    pairs = given[:, :, None] * given[:, None, :] - given[:, :, None] * np.eye(count)
    weight = np.where(values >= 2, 1 / np.maximum(values - 1, 1), 0.0)
    return (pairs * weight[:, None, None]).reshape(len(codes), -1)


def _given(codes: Array, count: int) -> Array:
    """How often each value was given to each item: (n, annotators) to (n, count)."""
    return np.stack([(codes == place).sum(1) for place in range(count)], 1).astype(np.float64)


def _alpha_of(sums: Array, count: int, metric: str) -> Array:
    """Alpha from coincidences (r, count^2)."""
    tables = sums.reshape(len(sums), count, count)
    totals = tables.sum(2)  # (r, count)
    if metric == "ordinal":
        # delta_ck = (sum of totals from c to k, less half of both ends)^2
        middle = np.cumsum(totals, axis=1) - totals / 2
        delta = (middle[:, :, None] - middle[:, None, :]) ** 2
    else:
        delta = np.broadcast_to(1 - np.eye(count), tables.shape)
    everything = totals.sum(1)
    chance = totals[:, :, None] * totals[:, None, :]
    expected = _divide((delta * chance).sum((1, 2)), everything - 1)
    return 1 - _divide((delta * tables).sum((1, 2)), expected)


def _divide(above: Array, below: Array) -> Array:
    """The quotient, nan where it is not defined."""
    small = np.abs(below) < 1e-12
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=~small)


def _mean(values: Array) -> Array:
    """Mean over the second axis of what is defined; nan where nothing is."""
    defined = np.isfinite(values)
    return _divide(np.where(defined, values, 0.0).sum(1), defined.sum(1).astype(np.float64))
