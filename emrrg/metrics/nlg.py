"""Language metrics of generated reports: BLEU-1..4, METEOR, ROUGE-L and CIDEr by pycocoevalcap.

A score of a report generator says nothing without how it was counted, so a result carries its
protocol (are references cut?), tokenizer, number of pairs, package versions, an interval for each
score, and the scores of systems that never look at the image.

Intervals resample studies (`emrrg.metrics.bootstrap`): BLEU and METEOR are functions of counts
summed over the corpus, which are summed anew; ROUGE-L and CIDEr are means over studies. CIDEr's
document frequencies stay those of all references of the set.

Protocols:
    full      references as they are.
    r2gen     as R2Gen (arXiv 2010.16056) scores: `max_tokens` - 1 words of each reference, since
              its begin mark takes one place; words rarer than `min_count` in the training
              reports read "<unk>" (where training reports are given).
    r2gengpt  as R2GenGPT (arXiv 2309.09812) and its heirs score: `max_tokens` tokens of the
              language model's tokenizer, decoded; whole words where no tokenizer is given, which
              cuts less.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, Protocol

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.rouge.rouge import Rouge
from scipy.sparse import csr_matrix

from emrrg.errors import InputError
from emrrg.metrics import java
from emrrg.metrics.bootstrap import LEVEL, Array, interval, paired_p_value, resample
from emrrg.metrics.groups import Groups

log = logging.getLogger("emrrg.metrics")

SCORES = ("BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "METEOR", "ROUGE_L", "CIDEr")
PROTOCOLS = ("full", "r2gen", "r2gengpt")
TOKENIZATIONS = ("split", "ptb")
METEOR_CHOICES = ("auto", "require", "off")

# Columns of the statistics of a study: BLEU's, ROUGE-L, CIDEr, 1 (a study), METEOR's.
_BLEU = slice(0, 10)  # length, reference length, 4 n-gram counts, 4 counts of those matched
_ROUGE, _CIDER, _ONE = 10, 11, 12
_METEOR = slice(13, None)

_CANDIDATES = 10
_JUDGES = 200


class SubwordTokenizer(Protocol):
    """What the r2gengpt protocol needs of a language model's tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids without begin and end marks."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        ...


@dataclass(frozen=True)
class _Statistics:
    """What each study adds to the scores of one system, and METEOR's own answer.

    Attributes:
        columns: (n, 13), or (n, 36) with METEOR.
        meteor: the score of the set as METEOR gave it, None without.
    """

    columns: Array
    meteor: float | None

    @property
    def names(self) -> list[str]:
        return [name for name in SCORES if name != "METEOR" or self.meteor is not None]

    def scores(self) -> dict[str, float]:
        values = dict(
            zip(self.names, _score_sums(self.columns.sum(0, keepdims=True))[0], strict=True)
        )
        if self.meteor is not None:
            values["METEOR"] = self.meteor
        return {name: float(value) for name, value in values.items()}

    def of(self, rows: Sequence[int]) -> _Statistics:
        """Some of the studies, METEOR from their summed counts."""
        columns = self.columns[rows]
        if self.meteor is None:
            return _Statistics(columns, None)
        meteor = java.meteor_score(columns[:, _METEOR].sum(0, keepdims=True))
        return _Statistics(columns, float(meteor[0]))


def score_reports(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    protocol: Literal["full", "r2gen", "r2gengpt"] = "full",
    tokenization: Literal["split", "ptb"] = "split",
    max_tokens: int | None = None,
    bootstrap: int = 0,
    seed: int = 42,
    meteor: Literal["auto", "require", "off"] = "auto",
    train_reports: Sequence[str] | None = None,
    neighbour_reports: Sequence[str] | None = None,
    others: Mapping[str, Sequence[str]] | None = None,
    tokenizer: SubwordTokenizer | None = None,
    min_count: int = 3,
    per_report: bool = False,
    groups: Groups | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Score generated reports against the radiologists'.

    Args:
        hypotheses: generated reports, one a study.
        references: reports in the same order.
        protocol: which references are scored against, see the module.
        tokenization: `split`, at white space, as every peer of this family scores; or `ptb`, as
            image captions are scored (lower case, punctuation dropped; needs Java), which lowers
            BLEU-4 by a quarter because the easy " . " is gone.
        max_tokens: where the r2gen and r2gengpt protocols cut a reference (60 for IU X-ray, 100
            for MIMIC-CXR and CheXpert Plus). The full protocol cuts nothing.
        bootstrap: resamples for 95 % intervals; 0 for none.
        seed: of the resamples.
        meteor: `auto` computes METEOR where Java is and says loudly where not; `require` makes
            its absence an error; `off` leaves it out.
        train_reports: reports of the training part, for the constant-report baselines.
        neighbour_reports: for each study the report of the training image nearest to its own,
            for the nearest-neighbour baseline.
        others: reports of further systems, by name, one a study. METEOR's Java program, which
            takes seconds to start, is started once for all.
        tokenizer: of the language model, for the r2gengpt protocol.
        min_count: r2gen protocol: rarer words are unknown (3 for IU X-ray, 10 for MIMIC-CXR).
        per_report: add the scores of every study, under "per_report".
        groups: studies by columns (`emrrg.metrics.groups.group_studies`), each scored on its own;
            CIDEr's document frequencies stay those of the whole set.
        timeout: seconds granted to a Java program; None: by the number of pairs.
    Returns:
        BLEU_1, BLEU_2, BLEU_3, BLEU_4, METEOR, ROUGE_L, CIDEr: floats; METEOR None where it was
        not computed, with the reason under "missing".
        protocol, tokenization, max_tokens, truncation_unit, truncated_references (share), pairs,
        distinct_hypotheses, empty_hypotheses (shares), versions, notes.
        intervals: name to [low, high]; bootstrap: how they were drawn. Empty without.
        baselines: constant (the better of the training reports that are most frequent or most
        central, chosen on training reports), most_frequent, nearest_neighbour: each "report"
        (not the last) with the same scores and intervals. others: name to the same,
        where there are any.
    Raises:
        InputError: no pairs, unequal numbers, an unknown option, max_tokens missing, or Java
            missing where it is required.
    """
    _check_options(protocol, tokenization, max_tokens, bootstrap, meteor)
    truth = check_pairs(hypotheses, references)
    cut, unit, shortened = _cut_references(
        truth, protocol, max_tokens, tokenizer, train_reports, min_count
    )
    systems: dict[str, list[str]] = {"": [_collapse(text) for text in hypotheses]}
    if train_reports:
        constant, frequent = constant_reports(train_reports)
        systems["constant"] = [constant] * len(cut)
        systems["most_frequent"] = [frequent] * len(cut)
    if neighbour_reports is not None:
        check_pairs(neighbour_reports, references, "neighbour_reports")
        systems["nearest_neighbour"] = [_collapse(text) for text in neighbour_reports]
    beside = {f"other {name}": name for name in others or {}}
    for key, name in beside.items():
        check_pairs((others or {})[name], references, f"others[{name!r}]")
        systems[key] = [_collapse(text) for text in (others or {})[name]]

    statistics, reason = _statistics(systems, cut, tokenization, meteor, timeout)
    result: dict[str, Any] = {"METEOR": None, **_scored(statistics[""], bootstrap, seed)}
    result = {name: result[name] for name in (*SCORES, "intervals")}
    baselines = {}
    for name, own in statistics.items():
        if name and name not in beside:
            text = {} if name == "nearest_neighbour" else {"report": systems[name][0]}
            baselines[name] = {**text, "METEOR": None, **_scored(own, bootstrap, seed)}
    result["bootstrap"] = _describe_bootstrap(bootstrap, seed)
    result["baselines"] = baselines
    if beside:
        result["others"] = {
            name: {"METEOR": None, **_scored(statistics[key], bootstrap, seed)}
            for key, name in beside.items()
        }
    result["groups"] = {
        column: {
            value: {"pairs": len(rows), "METEOR": None}
            | _scored(statistics[""].of(rows), bootstrap, seed)
            for value, rows in values.items()
        }
        for column, values in (groups or {}).items()
    }
    result |= {
        "protocol": protocol,
        "tokenization": tokenization,
        "max_tokens": None if protocol == "full" else max_tokens,
        "truncation_unit": unit,
        "truncated_references": shortened / len(cut),
        "pairs": len(cut),
        "distinct_hypotheses": len(set(systems[""])) / len(cut),
        "empty_hypotheses": systems[""].count("") / len(cut),
        "missing": {"METEOR": reason} if reason else {},
        "versions": versions(),
        "notes": _notes(len(cut), protocol, unit),
    }
    if per_report:
        rows = _score_sums(statistics[""].columns)
        names = statistics[""].names
        result["per_report"] = {name: rows[:, i].tolist() for i, name in enumerate(names)}
    return result


def compare_reports(
    first: Sequence[str],
    second: Sequence[str],
    references: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 42,
    protocol: Literal["full", "r2gen", "r2gengpt"] = "full",
    tokenization: Literal["split", "ptb"] = "split",
    max_tokens: int | None = None,
    meteor: Literal["auto", "require", "off"] = "auto",
    train_reports: Sequence[str] | None = None,
    tokenizer: SubwordTokenizer | None = None,
    min_count: int = 3,
    timeout: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Paired bootstrap test between two systems that wrote reports for the same studies.

    Both are scored on the same resampled studies (Koehn, EMNLP 2004).

    Args:
        first: reports of one system.
        second: reports of the other, same order.
        references: the radiologists' reports.
        bootstrap: resamples, at least 1.
        seed: of the resamples.
        protocol, tokenization, max_tokens, meteor, train_reports, tokenizer, min_count, timeout:
            as in `score_reports`; training reports serve the r2gen protocol's vocabulary only.
    Returns:
        For each score "first", "second", "difference" (first minus second), "interval" of the
        difference, and the two-sided "p_value" of no difference.
    Raises:
        InputError: as `score_reports`.
    """
    _check_options(protocol, tokenization, max_tokens, bootstrap, meteor)
    if bootstrap < 1:
        raise InputError("bootstrap: a comparison needs at least 1 resample")
    truth = check_pairs(first, references)
    check_pairs(second, references, "second system")
    cut, _, _ = _cut_references(truth, protocol, max_tokens, tokenizer, train_reports, min_count)
    systems = {"first": [_collapse(t) for t in first], "second": [_collapse(t) for t in second]}
    statistics, _ = _statistics(systems, cut, tokenization, meteor, timeout)
    points = {name: own.scores() for name, own in statistics.items()}
    draws = {
        name: resample(own.columns, _score_sums, bootstrap, seed)
        for name, own in statistics.items()
    }
    differences = draws["first"] - draws["second"]
    return {
        name: {
            "first": points["first"][name],
            "second": points["second"][name],
            "difference": points["first"][name] - points["second"][name],
            "interval": interval(differences[:, i]),
            "p_value": paired_p_value(differences[:, i]),
        }
        for i, name in enumerate(statistics["first"].names)
    }


def constant_reports(train_reports: Sequence[str]) -> tuple[str, str]:
    """The training reports that do best when they are given for every image.

    The most frequent reports and the most central ones (highest mean cosine similarity of 1- and
    2-gram counts to all training reports) are tried by corpus BLEU-4 against up to 200 training
    reports, evenly taken; no test report is looked at.

    Args:
        train_reports: reports of the training part, at least one.
    Returns:
        The best constant report, and the most frequent report (the first of equals).
    Raises:
        InputError: no training report has a word in it.
    """
    reports = [text for report in train_reports if (text := _collapse(report))]
    if not reports:
        raise InputError("train_reports: no report has a word in it")
    counts = Counter(reports)
    frequent = [text for text, _ in counts.most_common(_CANDIDATES)]
    candidates = list(dict.fromkeys([*frequent, *_central(counts)]))
    judges = [reports[i] for i in np.linspace(0, len(reports) - 1, _JUDGES).astype(int)]
    judges = judges if len(reports) > _JUDGES else reports
    best = max(candidates, key=lambda text: _bleu(_bleu_rows([text] * len(judges), judges))[3])
    return best, frequent[0]


def versions() -> dict[str, str]:
    """Versions of the packages that a score depends on."""
    found = {"meteor": java.METEOR_JAR.removeprefix("meteor-").removesuffix(".jar")}
    for package in ("emrrg", "pycocoevalcap", "numpy", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def check_pairs(
    hypotheses: Sequence[str], references: Sequence[str], name: str = "hypotheses"
) -> list[str]:
    """Check that there is one text for each reference.

    Returns:
        The references, white space collapsed.
    Raises:
        InputError: a string instead of a list, unequal numbers, no pairs, something that is no
            text, or no word in any reference.
    """
    if isinstance(hypotheses, str) or isinstance(references, str):
        raise InputError(f"{name} and references: give lists of reports, not one string")
    if len(hypotheses) != len(references):
        raise InputError(
            f"{name}: {len(hypotheses)} reports for {len(references)} references; give one each"
        )
    if not len(references):
        raise InputError("no pairs to score: both lists are empty")
    for kind, texts in ((name, hypotheses), ("references", references)):
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"{kind}[{i}] is {type(text).__name__}, not text")
    truth = [_collapse(text) for text in references]
    if not any(truth):
        raise InputError("references: every reference is empty")
    return truth


def _check_options(
    protocol: str, tokenization: str, max_tokens: int | None, bootstrap: int, meteor: str
) -> None:
    for name, value, choices in (
        ("protocol", protocol, PROTOCOLS),
        ("tokenization", tokenization, TOKENIZATIONS),
        ("meteor", meteor, METEOR_CHOICES),
    ):
        if value not in choices:
            raise InputError(f"{name}: {value!r} is not one of {', '.join(choices)}")
    if protocol != "full" and (max_tokens is None or max_tokens < 2):
        raise InputError(
            f"max_tokens: protocol {protocol} cuts references, give where, at least 2"
            " (60 for IU X-ray, 100 for MIMIC-CXR and CheXpert Plus)"
        )
    if bootstrap < 0:
        raise InputError(f"bootstrap: {bootstrap} resamples; give 0 or more")


def _collapse(text: str) -> str:
    """Single blanks, nothing at the ends: a newline in a report would break METEOR."""
    return " ".join(text.split())


def _cut_references(
    truth: list[str],
    protocol: str,
    max_tokens: int | None,
    tokenizer: SubwordTokenizer | None,
    train_reports: Sequence[str] | None,
    min_count: int,
) -> tuple[list[str], str | None, int]:
    """The references that the protocol scores against, the unit of the cut, how many were cut."""
    if protocol == "full" or max_tokens is None:
        return truth, None, 0
    if protocol == "r2gengpt" and tokenizer is not None:
        ids = [tokenizer.encode(text) for text in truth]
        shortened = sum(len(one) > max_tokens for one in ids)
        texts = [_collapse(tokenizer.decode(one[:max_tokens])) for one in ids]
        return texts, "subword tokens", shortened
    limit = max_tokens - 1 if protocol == "r2gen" else max_tokens
    words = [text.split() for text in truth]
    shortened = sum(len(one) > limit for one in words)
    cut = [one[:limit] for one in words]
    if protocol == "r2gen" and train_reports:
        seen = Counter(word for report in train_reports for word in report.split())
        cut = [[word if seen[word] >= min_count else "<unk>" for word in one] for one in cut]
    return [" ".join(one) for one in cut], "words", shortened


def _statistics(
    systems: dict[str, list[str]],
    references: list[str],
    tokenization: str,
    meteor: str,
    timeout: float | None,
) -> tuple[dict[str, _Statistics], str | None]:
    """Every study's share in every score, a system at a time, and why METEOR is missing."""
    if tokenization == "ptb":
        systems, references = _ptb(systems, references, timeout)
    answers: list[java.Meteor | None] = [None] * len(systems)
    reason = None
    with ThreadPoolExecutor(1) as beside:  # METEOR's program counts while the others are computed
        sets = [(texts, references) for texts in systems.values()]
        asked = None if meteor == "off" else beside.submit(java.meteor, sets, timeout=timeout)
        lengths: dict[tuple[str, str], float] = {}
        columns = [
            [
                _bleu_rows(texts, references),
                _rouge(texts, references, lengths)[:, None],
                _cider(texts, references)[:, None],
                np.ones((len(texts), 1)),
            ]
            for texts in systems.values()
        ]
        if asked is None:
            reason = "not asked for"
        else:
            try:
                answers = [*asked.result()]
            except java.JavaError as error:
                reason = str(error)
                if meteor == "require":
                    raise InputError(f"METEOR: {reason}") from None
                log.warning("METEOR IS NOT COMPUTED: %s. The other scores are complete.", reason)
    found = {}
    for name, own, answer in zip(systems, columns, answers, strict=True):
        if answer is not None:
            own.append(answer.statistics)
        found[name] = _Statistics(np.hstack(own), answer.score if answer else None)
    return found, reason


def _ptb(
    systems: dict[str, list[str]], references: list[str], timeout: float | None
) -> tuple[dict[str, list[str]], list[str]]:
    """Every text in PTB tokens, by one process."""
    texts = list(dict.fromkeys(t for own in (*systems.values(), references) for t in own))
    try:
        tokens = dict(zip(texts, java.ptb_tokenize(texts, timeout=timeout), strict=True))
    except java.JavaError as error:
        raise InputError(f"tokenization ptb: {error}; tokenization split needs no Java") from None
    return {name: [tokens[t] for t in own] for name, own in systems.items()}, [
        tokens[t] for t in references
    ]


def _bleu_rows(hypotheses: Sequence[str], references: Sequence[str]) -> Array:
    """BLEU's counts of each pair: (n, 10)."""
    scorer = BleuScorer(n=4)
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        scorer += (hypothesis, [reference])
    return np.array(
        [
            [one["testlen"], one["reflen"][0], *one["guess"], *one["correct"]]
            for one in scorer.ctest
        ],
        dtype=np.float64,
    )


def _bleu(rows: Array) -> Array:
    """BLEU-1..4 of a corpus from the counts of its pairs: (4,)."""
    return _bleu_sums(rows.sum(0, keepdims=True))[0]


def _bleu_sums(sums: Array) -> Array:
    """BLEU-1..4 from summed counts, (r, 10) to (r, 4), with pycocoevalcap's two small numbers."""
    tiny, small = 1e-15, 1e-9
    length, reference_length = sums[:, 0], sums[:, 1]
    precision = (sums[:, 6:10] + tiny) / (sums[:, 2:6] + small)
    orders = np.arange(1, 5)
    bleu = np.cumprod(precision, axis=1) ** (1 / orders)
    ratio = (length + tiny) / (reference_length + small)
    brevity = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return bleu * brevity[:, None]


def _rouge(
    hypotheses: Sequence[str], references: Sequence[str], known: dict[tuple[str, str], float]
) -> Array:
    """ROUGE-L of each pair; pairs that came before are taken from `known`."""
    rouge = Rouge()
    values = []
    for pair in zip(hypotheses, references, strict=True):
        if pair not in known:
            known[pair] = float(rouge.calc_score([pair[0]], [pair[1]]))
        values.append(known[pair])
    return np.array(values)


def _cider(hypotheses: Sequence[str], references: Sequence[str]) -> Array:
    """CIDEr of each pair, document frequencies from all references."""
    scorer = CiderScorer(n=4, sigma=6.0)
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        scorer += (hypothesis, [reference])
    return np.asarray(scorer.compute_score()[1], dtype=np.float64)


def _score_sums(sums: Array) -> Array:
    """Every score from summed columns: (r, 13 or 36) to (r, 6 or 7), in the order of `SCORES`."""
    meteor = [java.meteor_score(sums[:, _METEOR])] if sums.shape[1] > _METEOR.start else []
    means = sums[:, [_ROUGE, _CIDER]] / sums[:, [_ONE]]
    return np.column_stack([_bleu_sums(sums[:, _BLEU]), *meteor, means])


def _scored(statistics: _Statistics, bootstrap: int, seed: int) -> dict[str, Any]:
    """The scores of one system and their intervals."""
    intervals = {}
    if bootstrap:
        draws = resample(statistics.columns, _score_sums, bootstrap, seed)
        intervals = {name: interval(draws[:, i]) for i, name in enumerate(statistics.names)}
    return {**statistics.scores(), "intervals": intervals}


def _central(counts: Counter[str]) -> list[str]:
    """The reports with the highest mean cosine similarity of 1- and 2-grams to all reports."""
    texts = list(counts)
    vocabulary: dict[tuple[str, ...], int] = {}
    rows, columns = [], []
    for i, text in enumerate(texts):
        words = text.split()
        for gram in [*zip(words, strict=True), *itertools.pairwise(words)]:
            rows.append(i)
            columns.append(vocabulary.setdefault(gram, len(vocabulary)))
    grams = csr_matrix((np.ones(len(rows)), (rows, columns)), (len(texts), len(vocabulary)))
    norms = np.sqrt(np.asarray(grams.multiply(grams).sum(1)).ravel())
    repeats = np.array([counts[text] for text in texts], dtype=np.float64)
    centre = grams.T @ (repeats / norms)
    closeness = (grams @ centre) / norms
    return [texts[i] for i in np.argsort(-closeness, kind="stable")[:_CANDIDATES]]


def _describe_bootstrap(resamples: int, seed: int) -> dict[str, Any]:
    if not resamples:
        return {}
    return {
        "resamples": resamples,
        "seed": seed,
        "level": LEVEL,
        "method": "percentiles over resampled studies; counts of BLEU and METEOR summed anew;"
        " CIDEr's document frequencies held fixed",
    }


def _notes(pairs: int, protocol: str, unit: str | None) -> list[str]:
    notes = []
    if pairs == 1:
        notes.append("one pair alone has CIDEr 0, whatever the texts: no document frequencies")
    elif pairs < 50:
        notes.append(f"only {pairs} pairs: CIDEr depends on the set's document frequencies")
    if protocol == "r2gengpt" and unit == "words":
        notes.append("no tokenizer given: references were cut in words, not in its tokens")
    return notes
