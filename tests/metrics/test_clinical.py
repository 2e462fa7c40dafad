"""Clinical scores: equal to scikit-learn's, resampled rightly, and each convention as it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from emrrg.errors import InputError
from emrrg.metrics.clinical import (
    FINDINGS,
    FIVE,
    LABELER,
    OBSERVATION_SETS,
    OBSERVATIONS,
    compare_labels,
    score_comparisons,
    score_labels,
    score_sides,
)
from emrrg.metrics.groups import group_studies

Rows = list[dict[str, int | None]]
MEASURES = ("precision", "recall", "f1")


def draw(seed: int, studies: int = 60) -> tuple[Rows, Rows, np.ndarray[Any, Any], Any]:
    """Labels of every kind, and the same as numbers with 2 for not mentioned."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([1, 0, -1, 2], (studies, 14), p=[0.2, 0.3, 0.15, 0.35])
    other = rng.choice([1, 0, -1, 2], (studies, 14), p=[0.2, 0.3, 0.15, 0.35])
    guess = np.where(rng.random((studies, 14)) < 0.6, truth, other)
    truth[:, OBSERVATIONS.index("Fracture")] = 0  # an observation that never occurs
    guess[:, OBSERVATIONS.index("Fracture")] = 0
    return named(guess), named(truth), guess, truth


def named(numbers: np.ndarray[Any, Any]) -> Rows:
    return [
        {name: None if v == 2 else int(v) for name, v in zip(OBSERVATIONS, row, strict=True)}
        for row in numbers
    ]


def columns(names: tuple[str, ...]) -> list[int]:
    return [OBSERVATIONS.index(name) for name in names]


@pytest.mark.parametrize("zero_division", [0, 1])
@pytest.mark.parametrize("uncertain", ["negative", "positive"])
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_scikit_learn(seed: int, uncertain: Any, zero_division: Any) -> None:
    predicted, reference, guess, truth = draw(seed)
    result = score_labels(predicted, reference, uncertain=uncertain, zero_division=zero_division)
    counts = [1] if uncertain == "negative" else [1, -1]
    said, true = np.isin(guess, counts), np.isin(truth, counts)
    for name, observations in OBSERVATION_SETS.items():
        chosen = columns(observations)
        for average, theirs in (("micro", "micro"), ("macro", "macro"), ("example", "samples")):
            expected = precision_recall_fscore_support(
                true[:, chosen], said[:, chosen], average=theirs, zero_division=zero_division
            )[:3]
            for measure, value in zip(MEASURES, expected, strict=True):
                ours = result[name][average][measure]
                assert ours == pytest.approx(value, abs=1e-12), (name, average, measure)
    each = precision_recall_fscore_support(true, said, zero_division=zero_division)
    for i, observation in enumerate(OBSERVATIONS):
        one = result["observations"][observation]
        for measure, values in zip(MEASURES, each, strict=False):
            assert one[measure] == pytest.approx(values[i], abs=1e-12), (observation, measure)
        assert one["support"] == true[:, i].sum() and one["predicted"] == said[:, i].sum()
        assert one["tp"] + one["fp"] + one["fn"] + one["tn"] == len(true)


def test_ignored_entries_are_those_of_uncertain_references() -> None:
    predicted, reference, guess, truth = draw(0)
    result = score_labels(predicted, reference, uncertain="ignore")
    chosen = columns(FINDINGS)
    kept = truth[:, chosen] != -1
    said, true = guess[:, chosen] == 1, truth[:, chosen] == 1
    tp, fp, fn = (said & true & kept).sum(), (said & ~true & kept).sum(), (~said & true).sum()
    assert result["findings"]["micro"]["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    left = result["observations"]["Edema"]["left_out"]
    assert left == (truth[:, OBSERVATIONS.index("Edema")] == -1).sum() > 0
    # A system that hedges every finding gets no credit for it.
    hedged: Rows = [dict.fromkeys(OBSERVATIONS, -1) for _ in reference]
    assert score_labels(hedged, reference, uncertain="ignore")["all"]["micro"]["recall"] == 0


def test_by_hand() -> None:
    predicted: Rows = [{"Edema": 1, "Pneumonia": 1}, {"Edema": 0}, {"No Finding": 1}]
    reference: Rows = [{"Edema": 1, "Fracture": 1}, {"Edema": 1}, {"No Finding": 1}]
    result = score_labels(predicted, reference)
    assert result["all"]["micro"] == {"precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7}
    assert result["findings"]["micro"] == {"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5}
    assert result["five"]["micro"] == {"precision": 1.0, "recall": 1 / 2, "f1": 2 / 3}
    assert result["five"]["macro"]["f1"] == pytest.approx(2 / 3 / 5)
    assert result["all"]["example"]["f1"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert result["labeler"] == LABELER and result["uncertain"] == "negative"
    assert result["averaging"] == ["micro", "macro", "example"] and result["studies"] == 3
    assert result["intervals"] == {} and result["groups"] == {}


def test_intervals_are_of_resampled_studies() -> None:
    """The same draws, scored anew by scikit-learn, give the same intervals."""
    predicted, reference, guess, truth = draw(1, studies=40)
    result = score_labels(predicted, reference, bootstrap=120, seed=9)
    share = np.full(40, 1 / 40)
    weights = np.random.default_rng(9).multinomial(40, share, size=120)
    chosen = columns(FIVE)
    for average, theirs in (("micro", "micro"), ("macro", "macro"), ("example", "samples")):
        scores = []
        for row in weights:
            drawn = np.repeat(np.arange(40), row)
            scores.append(
                precision_recall_fscore_support(
                    truth[drawn][:, chosen] == 1,
                    guess[drawn][:, chosen] == 1,
                    average=theirs,
                    zero_division=0,
                )[2]
            )
        expected = np.quantile(scores, [0.025, 0.975])
        found = result["intervals"]["five"][average]["f1"]
        np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=average)
    low, high = result["intervals"]["observations"]["Edema"]["recall"]
    assert low < result["observations"]["Edema"]["recall"] < high
    assert result["bootstrap"] == {"resamples": 120, "seed": 9, "level": 0.95}


def test_paired_comparison() -> None:
    predicted, reference, _, _ = draw(2, studies=200)
    worse: Rows = [{**row, "Edema": 1, "Pneumonia": 1, "Atelectasis": 0} for row in predicted]
    found = compare_labels(predicted, worse, reference, bootstrap=200)
    test = found["findings"]["micro"]["f1"]
    both = [score_labels(x, reference)["findings"]["micro"]["f1"] for x in (predicted, worse)]
    assert (test["first"], test["second"]) == pytest.approx(both)
    assert test["difference"] > 0 and test["interval"][0] > 0
    assert test["p_value"] == pytest.approx(2 / 201)
    same = compare_labels(predicted, predicted, reference, bootstrap=50)
    assert same["all"]["example"]["recall"]["p_value"] == 1
    assert same["all"]["example"]["recall"]["interval"] == [0, 0]


def test_groups_are_scored_as_if_alone() -> None:
    predicted, reference, _, _ = draw(3)
    groups = group_studies({"sex": ["F", "M", "M"] * 20})
    result = score_labels(predicted, reference, groups=groups, bootstrap=30)
    rows = groups["sex"]["M"]
    alone = score_labels([predicted[i] for i in rows], [reference[i] for i in rows], bootstrap=30)
    group = result["groups"]["sex"]["M"]
    for key in ("all", "five", "findings", "observations", "intervals", "studies"):
        assert group[key] == alone[key], key


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("view", [["PA", "LATERAL"], ["LATERAL", "PA"], "AP", None],
         {"AP": [2], "LATERAL+PA": [0, 1], "unknown": [3]}),
        ("PatientAge", ["063Y", "17", 90, "6M"],
         {"063Y": [0], "17": [1], "6M": [3], "90": [2]}),  # no column named age: as they are
        ("age", ["063Y", "17", 90, "6M", ""],
         {"under 18": [1, 3], "60 to under 80": [0], "80 and over": [2], "unknown": [4]}),
        ("patient_age", [18, 39.5, 40], {"18 to under 40": [0, 1], "40 to under 60": [2]}),
        ("dose", list(range(16)), {"under 3.75": [0, 1, 2, 3], "3.75 to under 7.5": [4, 5, 6, 7],
         "7.5 to under 11.25": [8, 9, 10, 11], "11.25 and over": [12, 13, 14, 15]}),
        ("rooms", [2, 1, 2], {"1": [1], "2": [0, 2]}),
        ("empty", [None, "nan"], {"unknown": [0, 1]}),
    ],
)  # fmt: skip
def test_columns_become_groups(column: str, values: list[Any], expected: Any) -> None:
    groups = group_studies({column: values})[column]
    assert groups == expected
    assert list(groups) == list(expected)


def test_too_many_groups_are_refused() -> None:
    with pytest.raises(InputError, match=r"'id': 30 different values"):
        group_studies({"id": [f"s{i}" for i in range(30)]})


def test_wrong_sides() -> None:
    pairs = [
        ("Left effusion.", "Right pleural effusion."),  # wrong
        ("Right effusion.", "Right effusion."),  # right
        ("Bilateral effusions.", "Left effusion."),  # partial
        ("Effusion.", "Left effusion."),  # says no side
        ("Left effusion.", "No left effusion."),  # not affirmed in the reference
        ("Left nodule. Right effusion.", "Right nodule. Right effusion."),  # one wrong, one right
        ("Left ventricular enlargement.", "Enlarged heart on the right."),  # a heart has no side
    ]
    hypotheses, references = zip(*pairs, strict=True)
    found = score_sides(hypotheses, references, bootstrap=500)
    assert (found["compared"], found["wrong"], found["partial"]) == (5, 2, 1)
    assert found["rate"] == pytest.approx(2 / 5)
    assert found["observations"] == {
        "Lung Lesion": {"compared": 1, "wrong": 1, "partial": 0},
        "Pleural Effusion": {"compared": 4, "wrong": 1, "partial": 1},
    }
    assert found["interval"][0] < 2 / 5 < found["interval"][1]
    assert score_sides(["Normal."], ["Left effusion."])["rate"] is None


def test_invented_comparisons() -> None:
    hypotheses = ["Unchanged effusion.", "Stable heart.", "Effusion.", "Stable heart. Unchanged."]
    references = ["Effusion.", "Stable cardiac silhouette.", "Effusion.", "Heart is normal."]
    found = score_comparisons(hypotheses, references, bootstrap=500)
    assert (found["without_prior"], found["invented"], found["known"]) == (3, 2, 0)
    assert found["rate"] == pytest.approx(2 / 3)
    assert found["phrases"] == {"unchanged": 2, "stable": 1}
    assert (found["hypotheses"], found["references"]) == (3 / 4, 1 / 4)
    # What the data set says of earlier studies goes before what the reference shows.
    known = score_comparisons(hypotheses, references, has_prior=[True, False, None, None])
    assert (known["without_prior"], known["invented"], known["known"]) == (3, 2, 2)
    everyone = score_comparisons(hypotheses, references, has_prior=[True] * 4)
    assert everyone["rate"] is None and everyone["invented"] == 0


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: score_labels([], []), "nothing to score"),
        (lambda: score_labels([{}], [{}, {}]), "1 for 2 references"),
        (lambda: score_labels([{"Edema": 2}], [{}]), r"predicted\[0\]: Edema: 2"),
        (lambda: score_labels([{}], [{"Edema": 0.5}]), r"reference\[0\]"),  # type: ignore
        (lambda: score_labels([{}], [{}], uncertain="maybe"), "uncertain"),  # type: ignore
        (lambda: score_labels([{}], [{}], bootstrap=-1), "bootstrap"),
        (lambda: compare_labels([{}], [{}], [{}], bootstrap=0), "at least 1"),
        (lambda: score_sides(["a"], []), "1 for 0"),
        (lambda: score_comparisons(["a"], ["b"], has_prior=[]), "has_prior: 0 for 1"),
    ],
)
def test_errors_say_what_is_wrong(call: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        call()
