"""A rule-based labeler: from the words of a report to the 14 observations of CheXpert.

A report is read sentence by sentence. Phrases of `emrrg.metrics.lexicon` name observations; cues
around a phrase say that it is denied or doubtful. A cue reaches over the words on its side up to
the end of the clause, as in NegEx (Chapman et al. 2001, doi:10.1006/jbin.2001.1029) and ConText
(Harkema et al. 2009, doi:10.1016/j.jbi.2009.05.002), unless a verb shows that it belongs to
something else; the nearest cue in front of a phrase counts. Of several mentions of an observation
one that affirms outweighs one that doubts, and that outweighs one that denies (CheXpert, Irvin et
al. 2019, arXiv 1901.07031, section 3).
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
_LONGEST_SENTENCE = 600  # characters; a model that repeats itself without a full stop is cut there


class Mention(NamedTuple):
    """An observation named in a text.

    Attributes:
        observation: one of `OBSERVATIONS`, never "No Finding".
        status: 1 affirmed, 0 denied, -1 doubtful.
        start, end: characters of the phrase in `tidy(text)`.
        side: "left", "right", "both", or None where none is said.
    """

    observation: str
    status: int
    start: int
    end: int
    side: str | None


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
        mention._replace(start=mention.start + start, end=mention.end + start)
        for start, sentence in sentences(tidy(text))
        for mention in _sentence_mentions(sentence)
    ]


def find_comparisons(text: str) -> list[tuple[int, int]]:
    """Every phrase that compares with an earlier study ("unchanged", "interval increase").

    Args:
        text: a report.
    Returns:
        First and last (exclusive) character of each phrase in `tidy(text)`.
    """
    return [
        (start + first, start + last)
        for start, sentence in sentences(tidy(text))
        for first, last in _sentence_comparisons(sentence)
    ]


_PARAGRAPH = re.compile(r"(?<![.!?:,;])[ \t]*\n\s*(?:\n|(?=[-*•] |\(?\d{1,2}[.)] ))")
_SENTENCE_END = re.compile(r"[.!?]+(?= |$)")


def tidy(text: str) -> str:
    """The text on one line with single blanks; a blank line or list item ends a sentence."""
    return " ".join(_PARAGRAPH.sub(" . ", text).split())


def sentences(tidied: str) -> Iterator[tuple[int, str]]:
    """The sentences of a tidied text in lower case, each with the place of its first character."""
    lower = tidied.lower()
    if len(lower) != len(tidied):  # "İ" becomes two characters
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in tidied)
    start = 0
    for end in [*(m.end() for m in _SENTENCE_END.finditer(lower)), len(lower)]:
        while end - start > _LONGEST_SENTENCE:
            cut = lower.rfind(" ", start + 1, start + _LONGEST_SENTENCE)
            cut = cut if cut > 0 else start + _LONGEST_SENTENCE
            yield start, lower[start:cut]
            start = cut
        if end > start:
            yield start, lower[start:end]
            start = end


def _any(patterns: Iterable[str], edge: str = "") -> re.Pattern[str]:
    joined = "|".join(patterns).replace("~", lexicon.GAP)
    return re.compile(rf"{edge}(?:{joined}){edge}")


_MASKS = _any(lexicon.MASKS)
_MENTIONS = {name: _any(patterns, r"\b") for name, patterns in lexicon.MENTIONS.items()}
_ABSENT = {name: _any(patterns, r"\b") for name, patterns in lexicon.ABSENT.items()}
_NEGATION_BEFORE = _any(lexicon.NEGATION_BEFORE)
_NEGATION_AFTER = _any(lexicon.NEGATION_AFTER)
_UNCERTAIN_BEFORE = _any(lexicon.UNCERTAIN_BEFORE)
_UNCERTAIN_AFTER = _any(lexicon.UNCERTAIN_AFTER)
_BARRIERS = _any(lexicon.BARRIERS)
_DENIAL_BARRIERS = _any(lexicon.DENIAL_BARRIERS)
_RESUMES = re.compile(lexicon.RESUMES)
_VERBS = _any(lexicon.VERBS)
_CONCERNING = re.compile(lexicon.CONCERNING)
_SIDE_PAIR = re.compile(lexicon.SIDE_PAIR)
_SIDE = re.compile("|".join(f"(?P<{name}>{words})" for name, words in lexicon.SIDES.items()))
_COMPARISONS = _any(lexicon.COMPARISONS)
_NO_COMPARISON = _any(lexicon.NO_COMPARISON)
_JOINED = re.compile(r"^(?:,|,? ?(?:and|or|and/or|/|with|versus)|[ /])*$")

Span = tuple[int, int]


@lru_cache(maxsize=1 << 16)
def _sentence_mentions(sentence: str) -> tuple[Mention, ...]:
    """Mentions of one sentence in lower case; reports repeat sentences, hence the cache."""
    text = _MASKS.sub(_blank, sentence)
    found = sorted(_phrases(text))
    if not found:
        return ()
    spans = [(start, end) for start, end, *_ in found]
    cues, sides = _Cues(text, spans), _sides(text, spans)
    return tuple(
        Mention(
            observation, cues.status(start, end) if affirmed else NEGATIVE, start, end, sides[i]
        )
        for i, (start, end, observation, affirmed) in enumerate(found)
    )


def _phrases(text: str) -> Iterator[tuple[int, int, str, bool]]:
    """Start, end, observation, and whether the phrase affirms it unless a cue objects."""
    for observation, pattern in _MENTIONS.items():
        denied = (
            [m.span() for m in _ABSENT[observation].finditer(text)]
            if observation in _ABSENT
            else []
        )
        for start, end in denied:
            yield start, end, observation, False
        for match in pattern.finditer(text):
            if not _touches(match.span(), denied):
                yield *match.span(), observation, True


class _Cues:
    """The cues of a sentence, and what they make of a phrase in it."""

    def __init__(self, text: str, phrases: list[Span]) -> None:
        self._text = text
        self._doubts_before = _spans(_UNCERTAIN_BEFORE, text)
        self._doubts_after = _spans(_UNCERTAIN_AFTER, text)
        doubts = self._doubts_before + self._doubts_after  # "cannot be excluded" denies nothing
        self._denials_before = [
            s for s in _spans(_NEGATION_BEFORE, text) if not _touches(s, doubts)
        ]
        self._denials_after = [s for s in _spans(_NEGATION_AFTER, text) if not _touches(s, doubts)]
        self._barriers = [start for start, _ in _spans(_BARRIERS, text)]
        self._denial_barriers = [start for start, _ in _spans(_DENIAL_BARRIERS, text)]
        self._denial_barriers += [end for _, end in phrases if _RESUMES.match(text, end)]
        self._doubts_before = [s for s in self._doubts_before if not self._is_denied(s)]

    def _is_denied(self, doubt: Span) -> bool:
        return bool(_CONCERNING.match(self._text, doubt[0])) and any(
            self._reaches_on(denial, doubt[0]) and "," not in self._text[denial[1] : doubt[0]]
            for denial in self._denials_before
        )

    def status(self, start: int, end: int) -> int:
        """1, 0 or -1 for the phrase `text[start:end]`."""
        if any(self._reaches_back(cue, end) for cue in self._doubts_after):
            return UNCERTAIN
        if any(self._reaches_back(cue, end) for cue in self._denials_after):
            return NEGATIVE
        doubt = max((c[1] for c in self._doubts_before if self._reaches_on(c, start)), default=-1)
        denial = max(
            (
                c[1]
                for c in self._denials_before
                if self._reaches_on(c, start) and not _between(self._denial_barriers, c[1], start)
            ),
            default=-1,
        )
        if max(doubt, denial) < 0:
            return POSITIVE
        return UNCERTAIN if doubt > denial else NEGATIVE

    def _reaches_on(self, cue: Span, start: int) -> bool:
        """Whether a cue in front of a phrase reaches it."""
        return (
            cue[1] <= start
            and not _between(self._barriers, cue[1], start)
            and not _VERBS.search(self._text, cue[1], start)
        )

    def _reaches_back(self, cue: Span, end: int) -> bool:
        """Whether a cue behind a phrase reaches it."""
        return (
            cue[0] >= end
            and not _between(self._barriers, end, cue[0])
            and not _VERBS.search(self._text, end, cue[0])
        )


def _sides(text: str, phrases: list[Span]) -> list[str | None]:
    """The side of each phrase: said inside it, in front of it, behind it, or shared by a list."""
    words = [(*m.span(), str(m.lastgroup)) for m in _SIDE.finditer(text)]
    words = [(s, e, side) for s, e, side in words if not text.startswith(" ventric", e)]
    for match in _SIDE_PAIR.finditer(text):
        in_front = (text[e : match.start()] for _, e in phrases if e <= match.start())
        if all(re.search("[,;:]", between) for between in in_front):
            words = [word for word in words if not _touches(word[:2], [match.span()])]
            words.append((*match.span(), "both"))
    words.sort()
    sides: list[str | None] = []
    for i, (start, end) in enumerate(phrases):
        before = max((e for _, e in phrases[:i] if e <= start), default=0)
        after = min((s for s, _ in phrases[i + 1 :] if s >= end), default=len(text))
        inside = [side for s, e, side in words if start <= s and e <= end]
        front = [(e, side) for s, e, side in words if before <= s and e <= start]
        close = [side for e, side in front if "," not in text[e:start]]
        behind = [
            side
            for s, e, side in words
            if end <= s
            and e <= after
            and not re.search(r"[;:]|\b(?:but|and)\b", text[end:s])
            and ("," not in text[end:s] or " than " in text[s:e])  # ", left greater than right"
        ]
        said = inside or close[::-1] or behind or [side for _, side in front[::-1]]
        if said:
            sides.append(said[0])
        elif i and _JOINED.match(text[phrases[i - 1][1] : start]):
            sides.append(sides[-1])
        else:
            sides.append(None)
    return sides


@lru_cache(maxsize=1 << 16)
def _sentence_comparisons(sentence: str) -> tuple[Span, ...]:
    return tuple(_spans(_COMPARISONS, _NO_COMPARISON.sub(_blank, sentence)))


def _blank(match: re.Match[str]) -> str:
    """As many characters as were matched, none of which any pattern matches."""
    return "\0" * len(match[0])


def _spans(pattern: re.Pattern[str], text: str) -> list[Span]:
    return [match.span() for match in pattern.finditer(text)]


def _touches(span: Span, others: list[Span]) -> bool:
    return any(start < span[1] and span[0] < end for start, end in others)


def _between(places: list[int], start: int, end: int) -> bool:
    return any(start <= place < end for place in places)
