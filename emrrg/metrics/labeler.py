"""A rule-based labeler: from the words of a report to the 14 observations of CheXpert.

A report is read sentence by sentence. Phrases of `emrrg.metrics.lexicon` name observations; cues
around a phrase say that it is denied or doubtful. A cue reaches over the words on its side up to
the end of the clause, as in NegEx (Chapman et al. 2001, doi:10.1006/jbin.2001.1029) and ConText
(Harkema et al. 2009, doi:10.1016/j.jbi.2009.05.002), and the nearest cue before a phrase counts. Of
several mentions of an observation one that affirms outweighs one that doubts, and that outweighs
one that denies (CheXpert, Irvin et al. 2019, arXiv 1901.07031, section 3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from emrrg.metrics import lexicon

OBSERVATIONS: tuple[str, ...] = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
"""The observations of CheXpert, in the order of its tables."""

LABELER = "emrrg rules 1"
"""Name and version of the rules, for results."""

POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1
_STRONGER = {NEGATIVE: 0, UNCERTAIN: 1, POSITIVE: 2}


class Mention(NamedTuple):
    """An observation named in a text.

    Attributes:
        observation: one of `OBSERVATIONS`, never "No Finding".
        status: 1 affirmed, 0 denied, -1 doubtful.
        start, end: characters of the phrase in `tidy(text)`.
    """

    observation: str
    status: int
    start: int
    end: int


def label_report(text: str) -> dict[str, int | None]:
    """Label one report.

    Args:
        text: a report, or sections of one; only what it finds should be in it (an indication
            "rule out pneumonia" reads as a doubtful finding).
    Returns:
        Each of `OBSERVATIONS` to 1 (positive), 0 (negative), -1 (uncertain) or None (not
        mentioned). "No Finding" is 1 where no other observation is positive or uncertain, support
        devices aside, and None otherwise or where the text has no word.
    """
    labels: dict[str, int | None] = dict.fromkeys(OBSERVATIONS)
    for mention in find_mentions(text):
        known = labels[mention.observation]
        if known is None or _STRONGER[mention.status] > _STRONGER[known]:
            labels[mention.observation] = mention.status
    found = any(v in (1, -1) for name, v in labels.items() if name != "Support Devices")
    labels["No Finding"] = 1 if not found and any(c.isalpha() for c in text) else None
    return labels


def find_mentions(text: str) -> list[Mention]:
    """Every mention of an observation, in the order of the text.

    Args:
        text: a report.
    Returns:
        Mentions with their place in `tidy(text)`.
    """
    return [
        Mention(m.observation, m.status, m.start + start, m.end + start)
        for start, sentence in sentences(tidy(text))
        for m in _sentence_mentions(sentence)
    ]


_PARAGRAPH = re.compile(r"(?<![.!?:,;])[ \t]*\n\s*(?:\n|(?=[-*•] |\(?\d{1,2}[.)] ))")
_SENTENCE_END = re.compile(r"[.!?]+(?= |$)")


def tidy(text: str) -> str:
    """The text on one line with single blanks; a blank line or list item ends a sentence."""
    return " ".join(_PARAGRAPH.sub(" . ", text).split())


def sentences(tidied: str) -> Iterator[tuple[int, str]]:
    """The sentences of a tidied text, each with its first character's place, in lower case."""
    lower = tidied.lower()
    if len(lower) != len(tidied):  # "İ" becomes two
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in tidied)
    start = 0
    for end in [m.end() for m in _SENTENCE_END.finditer(lower)] + [len(lower)]:
        if end > start:
            yield start, lower[start:end]
        start = end


def _any(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{p})" for p in patterns).replace("~", lexicon.GAP))


_MASKS = _any(lexicon.MASKS)
_MENTIONS = {name: _any(patterns) for name, patterns in lexicon.MENTIONS.items()}
_ABSENT = {name: _any(patterns) for name, patterns in lexicon.ABSENT.items()}
_NEGATION_BEFORE = _any(lexicon.NEGATION_BEFORE)
_NEGATION_AFTER = _any(lexicon.NEGATION_AFTER)
_UNCERTAIN_BEFORE = _any(lexicon.UNCERTAIN_BEFORE)
_UNCERTAIN_AFTER = _any(lexicon.UNCERTAIN_AFTER)
_BARRIERS = _any(lexicon.BARRIERS)
_VERB = _any(lexicon.VERBS)


@lru_cache(maxsize=1 << 16)
def _sentence_mentions(sentence: str) -> tuple[Mention, ...]:
    """Mentions of one sentence in lower case; reports repeat sentences, hence the cache."""
    text = _MASKS.sub(lambda m: "\0" * len(m[0]), sentence)
    found: list[Mention] = []
    for observation, pattern in _MENTIONS.items():
        absent = (
            [m.span() for m in _ABSENT[observation].finditer(text)]
            if (observation in _ABSENT)
            else []
        )
        found += [Mention(observation, NEGATIVE, *span) for span in absent]
        found += [
            Mention(observation, POSITIVE, *m.span())
            for m in pattern.finditer(text)
            if not any(start < m.end() and m.start() < end for start, end in absent)
        ]
    if not found:
        return ()
    limits = [0, *(m.start() for m in _BARRIERS.finditer(text)), len(text)]
    uncertain_before = [m.span() for m in _UNCERTAIN_BEFORE.finditer(text)]
    uncertain_after = [m.span() for m in _UNCERTAIN_AFTER.finditer(text)]
    doubts = uncertain_before + uncertain_after
    negations_before = _outside(_NEGATION_BEFORE, text, doubts)
    negations_after = _outside(_NEGATION_AFTER, text, doubts)
    mentions = []
    for m in sorted(found, key=lambda m: (m.start, m.end)):
        status = m.status
        if status == POSITIVE:
            low = max(x for x in limits if x <= m.start)
            high = min(x for x in limits if x >= m.end)
            status = _status(
                text, m, low, high,
                uncertain_before, uncertain_after, negations_before, negations_after,
            )  # fmt: skip
        mentions.append(m._replace(status=status))
    return tuple(mentions)


Spans = list[tuple[int, int]]


def _outside(pattern: re.Pattern[str], text: str, taken: Spans) -> Spans:
    return [
        m.span()
        for m in pattern.finditer(text)
        if not any(start < m.end() and m.start() < end for start, end in taken)
    ]


def _status(
    text: str,
    mention: Mention,
    low: int,
    high: int,
    uncertain_before: Spans,
    uncertain_after: Spans,
    negations_before: Spans,
    negations_after: Spans,
) -> int:
    """What the cues of the clause `text[low:high]` say of a phrase in it."""

    def reaches_forward(cue: tuple[int, int]) -> bool:
        start, end = cue
        return low <= start and end <= mention.start and not _VERB.search(text, end, mention.start)

    def reaches_back(cue: tuple[int, int]) -> bool:
        start, end = cue
        return mention.end <= start and end <= high and not _VERB.search(text, mention.end, start)

    if any(map(reaches_back, uncertain_after)):
        return UNCERTAIN
    if any(map(reaches_back, negations_after)):
        return NEGATIVE
    doubt = max((end for start, end in filter(reaches_forward, uncertain_before)), default=-1)
    denial = max((end for start, end in filter(reaches_forward, negations_before)), default=-1)
    if max(doubt, denial) < 0:
        return POSITIVE
    return UNCERTAIN if doubt > denial else NEGATIVE
