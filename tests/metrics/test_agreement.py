"""Kappas and alphas: equal to scikit-learn and to the worked examples of their authors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from emrrg.errors import InputError
from emrrg.metrics.agreement import (
    agreement_table,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
)

NAN = float("nan")

# Fleiss 1971, table 1 (30 patients, 6 psychiatrists, 5 diagnoses); the paper finds 0.430.
DIAGNOSES = [
    "444444", "222555", "233335", "555555", "222444", "113333", "333355", "113334", "114444",
    "555555", "144444", "124444", "222333", "144444", "224445", "333335", "111455", "111112",
    "224444", "133555", "555555", "244444", "224555", "114444", "144445", "222224", "111155",
    "224444", "133333", "555555",
]  # fmt: skip

# The worked example of en.wikipedia.org/wiki/Fleiss'_kappa: 10 subjects, 14 raters, kappa 0.210.
WIKIPEDIA = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C (four observers,
# twelve units, "." missing): alpha nominal 0.743, ordinal 0.815.
RELIABILITY = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]


def ratings(rows: list[str]) -> np.ndarray[Any, Any]:
    """Strings of digits, one an annotator, to (items, annotators)."""
    return np.array([[NAN if c == "." else float(c) for c in row] for row in rows]).T


def from_table(table: list[list[int]]) -> tuple[list[int], list[int]]:
    """The two annotators' values of a table of counts."""
    pairs = [
        (i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)
    ]
    return [i for i, _ in pairs], [j for _, j in pairs]


@pytest.mark.parametrize("weights", [None, "linear", "quadratic"])
@pytest.mark.parametrize("seed", range(5))
def test_cohen_equals_scikit_learn(weights: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 4, 80)
    second = np.where(rng.random(80) < 0.6, first, rng.integers(0, 4, 80))
    expected = cohen_kappa_score(first, second, weights=weights)
    assert cohen_kappa(first, second, weights=weights) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("table", "weights", "expected"),
    [
        # en.wikipedia.org/wiki/Cohen's_kappa, three worked examples
        ([[20, 5], [10, 15]], None, 0.4),
        ([[45, 15], [25, 15]], None, 0.1304),
        ([[25, 35], [5, 35]], None, 0.2593),
        # SAS's printed output in statsmodels' tests of cohens_kappa
        ([[0, 4, 1], [0, 8, 0], [0, 1, 5]], None, 0.4842),
        # john-uebersax.com/stat/saskappa.htm
        ([[0, 0, 0], [5, 16, 3], [8, 12, 28]], None, 0.3333),
        ([[0, 0, 0], [5, 16, 3], [8, 12, 28]], "linear", 0.2895),
    ],
)
def test_cohen_equals_published_examples(table: Any, weights: Any, expected: float) -> None:
    first, second = from_table(table)
    kappa = cohen_kappa(first, second, weights=weights, categories=range(len(table)))
    assert kappa == pytest.approx(expected, abs=5e-5)


def test_fleiss_equals_published_examples() -> None:
    assert fleiss_kappa(ratings(DIAGNOSES).T) == pytest.approx(0.430, abs=5e-4)
    rows = [[c for c, n in enumerate(counts) for _ in range(n)] for counts in WIKIPEDIA]
    assert fleiss_kappa(rows) == pytest.approx(0.210, abs=5e-4)
    # Randolph's online calculator, as in statsmodels' tests: counts [[7, 1], [3, 5]].
    assert fleiss_kappa([[0] * 7 + [1], [0] * 3 + [1] * 5]) == pytest.approx(0.161905, abs=5e-7)


def test_krippendorff_equals_published_examples() -> None:
    data = ratings(RELIABILITY)
    assert krippendorff_alpha(data) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(data, metric="ordinal") == pytest.approx(0.815, abs=5e-4)
    # section A, binary: 0.095; section B, nominal: 0.692
    assert krippendorff_alpha(ratings(["0100000010", "1110010000"])) == pytest.approx(
        0.095, abs=5e-4
    )
    letters = ["aabbdcccedda", "babbbccceddd"]
    coded = [[float("abcde".index(c)) for c in row] for row in letters]
    assert krippendorff_alpha(np.array(coded).T) == pytest.approx(0.692, abs=5e-4)


def test_known_limits() -> None:
    same = [[1, 1], [0, 0], [1, 1]]
    assert cohen_kappa([1, 0, 1], [1, 0, 1]) == fleiss_kappa(same) == krippendorff_alpha(same) == 1
    opposite = [1, 0, 1, 0], [0, 1, 0, 1]
    assert cohen_kappa(*opposite) == pytest.approx(-1)
    # Chance explains everything: no coefficient is defined, and none is invented.
    constant = [[2, 2], [2, 2]]
    assert np.isnan(cohen_kappa([2, 2], [2, 2]))
    assert np.isnan(fleiss_kappa(constant)) and np.isnan(krippendorff_alpha(constant))


def test_missing_values_are_left_out() -> None:
    full = cohen_kappa([1, 0, 1, 0], [1, 0, 0, 0])
    assert cohen_kappa([1, 0, NAN, 1, 0, 1], [1, 0, 1, 0, 0, NAN]) == pytest.approx(full)
    rows = [[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]]
    assert fleiss_kappa([*rows, [1, NAN, 0]]) == pytest.approx(fleiss_kappa(rows))
    # An item with a single value says nothing; one with two of three values does.
    alone = krippendorff_alpha([*rows, [1, NAN, NAN]])
    assert alone == pytest.approx(krippendorff_alpha(rows))
    assert krippendorff_alpha([*rows, [1, NAN, 0]]) != pytest.approx(alone)


def test_table_of_sources() -> None:
    rng = np.random.default_rng(0)
    names = ("Edema", "Pneumonia")
    draws = rng.choice([1, 0, -1], (3, 50, 2), p=[0.4, 0.4, 0.2])
    draws[1, :40], draws[2, :30] = draws[0, :40], draws[0, :30]
    sources = {
        who: [dict(zip(names, map(int, row), strict=True)) for row in block]
        for who, block in zip("abc", draws, strict=True)
    }
    result = agreement_table(sources, observations=names, bootstrap=200)
    for j, name in enumerate(names):
        one = result["observations"][name]
        columns = draws[:, :, j]
        kappas = {
            f"{x} / {y}": cohen_kappa_score(columns[a], columns[b])
            for a, x in enumerate("abc")
            for b, y in list(enumerate("abc"))[a + 1 :]
        }
        for pair, kappa in kappas.items():
            assert one["pairs"][pair]["value"] == pytest.approx(kappa), (name, pair)
        assert one["cohen"]["value"] == pytest.approx(np.mean(list(kappas.values())))
        ranks = np.select([columns == 0, columns == -1], [0, 1], 2)
        weighted = [
            cohen_kappa_score(ranks[a], ranks[b], weights="quadratic")
            for a, b in ((0, 1), (0, 2), (1, 2))
        ]
        assert one["cohen_quadratic"]["value"] == pytest.approx(np.mean(weighted))
        assert one["fleiss"]["value"] == pytest.approx(fleiss_kappa(columns.T))
        ordinal = krippendorff_alpha(ranks.T, metric="ordinal")
        assert one["alpha_ordinal"]["value"] == pytest.approx(ordinal)
        assert one["positive"]["a"] == pytest.approx((columns[0] == 1).mean())
        low, high = one["cohen"]["interval"]
        assert low < one["cohen"]["value"] < high
    pooled = result["pooled"]
    assert pooled["items"] == 100
    both = draws.transpose(0, 2, 1).reshape(3, -1)
    assert pooled["fleiss"]["value"] == pytest.approx(fleiss_kappa(both.T))
    # Pooled intervals resample studies, whose two entries are drawn together.
    assert pooled["alpha_nominal"]["interval"][0] < pooled["alpha_nominal"]["value"]


def test_what_no_label_counts_as() -> None:
    sources = {
        "a": [{"Edema": 1}, {"Edema": None}, {"Edema": 0}, {}],
        "b": [{"Edema": 1}, {"Edema": 0}, {"Edema": 0}, None],
    }

    def table(blank: Any) -> dict[str, Any]:
        found = agreement_table(sources, observations=("Edema",), blank=blank, bootstrap=0)
        return found["observations"]["Edema"]

    assert (table("negative")["items"], table("negative")["observed"]["value"]) == (3, 1.0)
    assert (table("missing")["items"], table("missing")["observed"]["value"]) == (2, 1.0)
    category = table("category")
    assert (category["items"], category["observed"]["value"]) == (3, pytest.approx(2 / 3))
    assert category["alpha_ordinal"]["value"] is None and category["alpha_nominal"]["value"] < 1


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: cohen_kappa([1, 2], [1]), "same length"),
        (lambda: cohen_kappa([1, 2], [1, 3], categories=[1, 2]), "3 is none"),
        (lambda: fleiss_kappa([1, 2]), "annotators"),
        (lambda: agreement_table({"a": [{}]}), "at least two"),
        (lambda: agreement_table({"a": [{}], "b": []}), "b: 0 studies"),
        (lambda: agreement_table({"a": [{"Edema": 3}], "b": [{}]}), "Edema: 3"),
        (lambda: agreement_table({"a": [{}], "b": [{}]}, blank="no"), "blank"),  # type: ignore
    ],
)
def test_errors_say_what_is_wrong(call: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        call()
