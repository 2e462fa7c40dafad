"""Language scores: equal to pycocoevalcap, resampled rightly, and honest about how they count."""

from __future__ import annotations

import logging
import random
import shutil
from typing import Any

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from emrrg.errors import InputError
from emrrg.metrics import compare_reports, java, score_reports
from emrrg.metrics.groups import group_studies
from emrrg.metrics.java import Meteor, meteor_score
from emrrg.metrics.nlg import SCORES, constant_reports

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java on the PATH")

PHRASES = [
    "the heart is normal in size", "the lungs are clear", "no pleural effusion",
    "there is a small left effusion", "no pneumothorax", "mild cardiomegaly", "no acute disease",
    "degenerative changes of the spine", "right basilar opacity", "stable mediastinal contours",
]  # fmt: skip
BLEU = SCORES[:4]


def write(seed: int, count: int, sentences: int = 4) -> list[str]:
    rng = random.Random(seed)
    return [" . ".join(rng.sample(PHRASES, sentences)) + " ." for _ in range(count)]


def peers(hypotheses: list[str], references: list[str]) -> dict[str, float]:
    """pycocoevalcap's own corpus scores."""
    ids = range(len(references))
    truth, said = {i: [references[i]] for i in ids}, {i: [hypotheses[i]] for i in ids}
    values = dict(zip(BLEU, Bleu(4).compute_score(truth, said, verbose=0)[0], strict=True))
    values["ROUGE_L"] = float(Rouge().compute_score(truth, said)[0])
    values["CIDEr"] = float(Cider().compute_score(truth, said)[0])
    return values


REFERENCES = write(0, 40)
HYPOTHESES = [r if i % 3 else h for i, (h, r) in enumerate(zip(write(1, 40), REFERENCES))]  # noqa: B905


def off(*args: Any, **options: Any) -> dict[str, Any]:
    return score_reports(*args, meteor="off", **options)


def test_scores_equal_pycocoevalcap() -> None:
    for hypotheses in (HYPOTHESES, write(2, 40, 2), ["", *write(3, 39)]):
        found, expected = off(hypotheses, REFERENCES), peers(hypotheses, REFERENCES)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-12), name
    assert found["METEOR"] is None and found["missing"] == {"METEOR": "not asked for"}


def test_bleu_by_hand() -> None:
    """3 of 4 words, 1 of 3 pairs, no triple; one word too few: exp(1 - 5/4)."""
    found = off(["no left effusion seen"], ["no left pleural effusion ."])
    brevity = np.exp(1 - 5 / 4)
    assert found["BLEU_1"] == pytest.approx(3 / 4 * brevity)
    assert found["BLEU_2"] == pytest.approx((3 / 4 * 1 / 3) ** 0.5 * brevity)
    assert found["BLEU_3"] < 1e-4


def test_white_space_counts_for_nothing() -> None:
    wild = [" " + text.replace(" ", "\n\t ") + "\r\n" for text in HYPOTHESES]
    wild_references = [text.replace(" . ", " .\n\n") for text in REFERENCES]
    assert off(wild, wild_references)["BLEU_4"] == off(HYPOTHESES, REFERENCES)["BLEU_4"]


def test_scores_per_report() -> None:
    found = off(HYPOTHESES, REFERENCES, per_report=True)["per_report"]
    ids = range(40)
    truth, said = {i: [REFERENCES[i]] for i in ids}, {i: [HYPOTHESES[i]] for i in ids}
    np.testing.assert_allclose(found["ROUGE_L"], Rouge().compute_score(truth, said)[1])
    np.testing.assert_allclose(found["CIDEr"], Cider().compute_score(truth, said)[1])
    np.testing.assert_allclose(found["BLEU_2"], Bleu(4).compute_score(truth, said, verbose=0)[1][1])


def test_intervals_are_of_resampled_studies() -> None:
    """BLEU and ROUGE of each draw, scored anew by pycocoevalcap, give the same intervals."""
    found = off(HYPOTHESES, REFERENCES, bootstrap=60, seed=4)
    weights = np.random.default_rng(4).multinomial(40, np.full(40, 1 / 40), size=60)
    draws = []
    for row in weights:
        drawn = np.repeat(np.arange(40), row)
        draws.append(peers([HYPOTHESES[i] for i in drawn], [REFERENCES[i] for i in drawn]))
    for name in (*BLEU, "ROUGE_L"):
        expected = np.quantile([d[name] for d in draws], [0.025, 0.975])
        np.testing.assert_allclose(found["intervals"][name], expected, rtol=1e-9, err_msg=name)
    # CIDEr keeps the document frequencies of the whole set: a mean of fixed numbers.
    each = np.array(off(HYPOTHESES, REFERENCES, per_report=True)["per_report"]["CIDEr"])
    expected = np.quantile(weights @ each / 40, [0.025, 0.975])
    np.testing.assert_allclose(found["intervals"]["CIDEr"], expected)
    assert found["bootstrap"]["resamples"] == 60 and found["bootstrap"]["seed"] == 4


@needs_java
def test_with_meteor() -> None:
    found = score_reports(
        HYPOTHESES, REFERENCES, bootstrap=100, per_report=True, train_reports=write(5, 30)
    )
    assert found["missing"] == {} and found["versions"]["meteor"] == "1.5"
    low, high = found["intervals"]["METEOR"]
    assert 0 < low < found["METEOR"] < high < 1
    assert len(found["per_report"]["METEOR"]) == 40
    assert 0 < found["baselines"]["constant"]["METEOR"] < found["METEOR"]
    for name in SCORES:
        assert found["intervals"][name][0] <= found[name] <= found["intervals"][name][1], name


def test_no_java_is_said_loudly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING, "emrrg.metrics"):
        found = score_reports(HYPOTHESES, REFERENCES)
    assert "METEOR IS NOT COMPUTED: no Java on the PATH" in caplog.text
    assert found["METEOR"] is None and "no Java" in found["missing"]["METEOR"]
    assert found["BLEU_4"] > 0
    with pytest.raises(InputError, match="METEOR: no Java"):
        score_reports(HYPOTHESES, REFERENCES, meteor="require")
    with pytest.raises(InputError, match="tokenization ptb: no Java"):
        off(HYPOTHESES, REFERENCES, tokenization="ptb")


@needs_java
def test_ptb_tokens_lower_bleu() -> None:
    """The easy " . " is gone, as is the case of letters."""
    upper = [text.upper() for text in HYPOTHESES]
    found = off(upper, REFERENCES, tokenization="ptb")
    assert found["BLEU_4"] < off(HYPOTHESES, REFERENCES)["BLEU_4"]
    bare = [" ".join(w for w in text.split() if w != ".") for text in HYPOTHESES]
    bare_references = [" ".join(w for w in text.split() if w != ".") for text in REFERENCES]
    assert found["BLEU_4"] == pytest.approx(off(bare, bare_references)["BLEU_4"], rel=1e-12)
    assert found["tokenization"] == "ptb"


class Characters:
    """A tokenizer of the shape that language models have: a token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("options", "cut", "unit", "share"),
    [
        ({}, None, None, 0),
        ({"protocol": "r2gen", "max_tokens": 4}, "no left pleural", "words", 1 / 2),
        ({"protocol": "r2gengpt", "max_tokens": 4}, "no left pleural effusion", "words", 1 / 2),
        ({"protocol": "r2gengpt", "max_tokens": 7, "tokenizer": Characters()}, "no left",
         "subword tokens", 1 / 2),
        # a word that three training reports do not have is unknown
        ({"protocol": "r2gen", "max_tokens": 4, "train_reports": ["no left"] * 3},
         "no left <unk>", "words", 1 / 2),
    ],
)  # fmt: skip
def test_protocols_cut_references(
    options: dict[str, Any], cut: str | None, unit: str | None, share: float
) -> None:
    references = ["no left pleural effusion seen", "no left"]
    hypotheses = ["no left pleural effusion seen .", "no left"]
    found = off(hypotheses, references, **options)
    expected = peers(hypotheses, [cut or references[0], references[1]])
    assert found["BLEU_2"] == pytest.approx(expected["BLEU_2"], rel=1e-9)
    assert found["truncated_references"] == share and found["truncation_unit"] == unit
    assert found["protocol"] == options.get("protocol", "full")
    assert found["max_tokens"] == options.get("max_tokens")


def test_the_constant_baseline_is_chosen_on_training_reports() -> None:
    """The report that stands nearest to the others wins over a frequent outlier."""
    outlier = "portable film of the abdomen"
    train = [outlier] * 3 + [f"{a} . the lungs are clear ." for a in PHRASES]
    train += ["the heart is normal in size . the lungs are clear ."] * 2
    best, frequent = constant_reports(train)
    assert frequent == outlier
    quality = {text: peers([text] * len(train), train)["BLEU_4"] for text in set(train)}
    assert quality[best] == max(quality.values()) > quality[outlier]
    found = off(HYPOTHESES, REFERENCES, train_reports=train, bootstrap=20)
    for name, text in (("constant", best), ("most_frequent", outlier)):
        one = found["baselines"][name]
        assert one["report"] == text
        assert one["BLEU_1"] == pytest.approx(peers([text] * 40, REFERENCES)["BLEU_1"])
        assert one["intervals"]["BLEU_1"][0] <= one["BLEU_1"]


def test_a_report_that_came_once_may_be_the_best_constant() -> None:
    outliers = [f"view {chr(97 + i)} of another part of the body" for i in range(10)]
    alike = [f"the heart is normal in size . lungs are clear . number {i} ." for i in range(40)]
    best, frequent = constant_reports(outliers * 2 + alike)
    assert best in alike and frequent == outliers[0]


def test_the_nearest_neighbour_baseline() -> None:
    neighbours = write(7, 40)
    found = off(HYPOTHESES, REFERENCES, neighbour_reports=neighbours)
    one = found["baselines"]["nearest_neighbour"]
    assert one["CIDEr"] == pytest.approx(peers(neighbours, REFERENCES)["CIDEr"])
    assert "report" not in one


def test_other_systems_are_scored_beside() -> None:
    more, options = write(5, 40), {"bootstrap": 20, "seed": 3}
    found = off(HYPOTHESES, REFERENCES, others={"constant": more}, train_reports=more, **options)
    alone = off(more, REFERENCES, **options)
    (name,) = found["others"]
    assert name == "constant" and found["others"][name] != found["baselines"][name]
    for score, value in found["others"][name].items():
        assert value == alone[score], score
    assert {*SCORES, "intervals"} == set(found["others"][name])
    assert "others" not in alone
    with pytest.raises(InputError, match="39 reports for 40 references"):
        off(HYPOTHESES, REFERENCES, others={"x": more[1:]})


def test_groups() -> None:
    groups = group_studies({"view": ["PA"] * 15 + ["AP"] * 25})
    found = off(HYPOTHESES, REFERENCES, groups=groups, bootstrap=20)["groups"]["view"]
    assert list(found) == ["AP", "PA"] and found["PA"]["pairs"] == 15
    expected = peers(HYPOTHESES[:15], REFERENCES[:15])
    for name in (*BLEU, "ROUGE_L"):
        assert found["PA"][name] == pytest.approx(expected[name], rel=1e-12), name
    each = off(HYPOTHESES, REFERENCES, per_report=True)["per_report"]["CIDEr"]
    assert found["PA"]["CIDEr"] == pytest.approx(np.mean(each[:15]))
    assert found["PA"]["METEOR"] is None and "BLEU_4" in found["AP"]["intervals"]


def test_comparison_of_two_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(sets: Any, **_: Any) -> list[Meteor]:
        """METEOR's answer with made-up counts: matches of the first module, one chunk each."""
        answers = []
        for hypotheses, references in sets:
            rows = np.zeros((len(references), 23))
            for row, h, r in zip(rows, hypotheses, references, strict=True):
                row[:2] = len(h.split()), len(r.split())
                row[4:6] = len(set(h.split()) & set(r.split()))
                row[20] = 2
                row[21:] = row[4:6]
            answers.append(Meteor(float(meteor_score(rows.sum(0)[None])[0]), rows[:, 0], rows))
        return answers

    monkeypatch.setattr(java, "meteor", counts)
    worse = write(8, 40)
    found = compare_reports(HYPOTHESES, worse, REFERENCES, bootstrap=200)
    one, two = peers(HYPOTHESES, REFERENCES), peers(worse, REFERENCES)
    meteors = counts([(HYPOTHESES, REFERENCES), (worse, REFERENCES)])
    one["METEOR"], two["METEOR"] = meteors[0].score, meteors[1].score
    assert list(found) == list(SCORES)
    for name in SCORES:
        test = found[name]
        assert (test["first"], test["second"]) == pytest.approx((one[name], two[name])), name
        assert test["difference"] == pytest.approx(one[name] - two[name])
        assert test["interval"][0] > 0 and test["p_value"] == pytest.approx(2 / 201), name


def test_a_system_does_not_differ_from_itself() -> None:
    found = compare_reports(HYPOTHESES, HYPOTHESES, REFERENCES, bootstrap=50, meteor="off")
    assert "METEOR" not in found
    for name, test in found.items():
        assert (test["difference"], test["interval"], test["p_value"]) == (0, [0, 0], 1), name


def test_what_a_result_says_of_itself() -> None:
    found = off(["a b", "a b", "", "c"], ["a b", "a", "b", "c"])
    assert found["pairs"] == 4
    assert found["distinct_hypotheses"] == 3 / 4 and found["empty_hypotheses"] == 1 / 4
    assert set(found["versions"]) == {"meteor", "emrrg", "pycocoevalcap", "numpy", "scipy"}
    assert "only 4 pairs" in found["notes"][0]
    alone = off(["a b"], ["a b"])
    assert alone["CIDEr"] == 0 and "CIDEr 0" in alone["notes"][0]


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: off([], []), "no pairs"),
        (lambda: off(["a"], ["a", "b"]), "hypotheses: 1 reports for 2"),
        (lambda: off("a", "a"), "not one string"),
        (lambda: off(["a", None], ["a", "b"]), r"hypotheses\[1\] is NoneType"),
        (lambda: off(["a"], [" \n"]), "every reference is empty"),
        (lambda: off(["a"], ["a"], protocol="r2gem"), "'r2gem' is not one of full, r2gen"),
        (lambda: off(["a"], ["a"], protocol="r2gen"), "max_tokens"),
        (lambda: off(["a"], ["a"], bootstrap=-1), "bootstrap"),
        (lambda: off(["a"], ["a"], tokenization="bpe"), "tokenization"),
        (lambda: off(["a"], ["a"], train_reports=[" "]), "no report has a word"),
        (lambda: off(["a"], ["a"], neighbour_reports=[]), "neighbour_reports: 0 reports"),
        (lambda: compare_reports(["a"], [], ["a"]), "second system: 0 reports"),
        (lambda: compare_reports(["a"], ["a"], ["a"], bootstrap=0), "at least 1 resample"),
    ],
)
def test_errors_say_what_is_wrong(call: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        call()
