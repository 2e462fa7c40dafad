"""Report text: R2Gen's cleaning, exactly, and one without its accidents.

Every peer of this family trains on and scores against the text that R2Gen's two cleaners leave
(github.com/zhjohnchan/R2Gen, modules/tokenizers.py, one for IU X-ray, one for MIMIC-CXR): lower
case, sentences joined by " . ", a final " .". Their results are reproduced to the letter, with
what they do by accident:

* the set of deleted characters was written with ``:-\\[`` in it, a range: ``< = > @`` are deleted
  too, and the hyphen, which was meant, is kept;
* list numbers are deleted wherever they stand, so "T11. No" becomes "T1No";
* decimal points and slashes are deleted: "2.5 cm" becomes "25 cm", "and/or" becomes "andor";
* a sentence of which nothing is left stays as an empty one.

``style="plain"`` is our own cleaner, which does none of these.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from emrrg.errors import InputError

Style = Literal["iu_xray", "mimic_cxr", "plain", "none"]
Marks = Literal["keep", "drop", "mask"]

_LIST_NUMBERS = (
    ("1. ", ""),
    *((f". {n}. ", ". ") for n in "2345"),
    *((f" {n}. ", ". ") for n in "2345"),
)
_IU_STEPS = (("..", "."),) * 3 + _LIST_NUMBERS
_MIMIC_STEPS = (
    (("\n", " "),) + (("__", "_"),) * 7 + (("  ", " "),) * 6 + (("..", "."),) * 8 + _LIST_NUMBERS
)
# What the range in R2Gen's expression comes to on lower-case text.
_DELETED = str.maketrans("", "", "\"/\\'" + ".,?;*!%^&_+()" + ":;<=>?@[" + "]{}")


def clean_report(text: str, style: Style = "iu_xray", *, marks: Marks = "keep") -> str:
    """Prepare a report for training and scoring.

    Args:
        text: as the source has it.
        style: ``iu_xray`` or ``mimic_cxr`` (R2Gen's cleaners, to the letter), ``plain`` (the same
            form without their accidents), or ``none`` (white space collapsed, nothing else).
        marks: what becomes of de-identification marks (XXXX, ___, [** **]): ``keep`` them to the
            style, ``drop`` them, or ``mask`` each by one ``xxxx``.
    Returns:
        One line.
    Raises:
        InputError: an unknown style or treatment of marks.
    """
    if marks not in get_args(Marks):
        raise InputError(f"marks {marks!r}: expected keep, drop or mask")
    if marks != "keep":
        text = replace_marks(text, "" if marks == "drop" else "xxxx")
    if style == "iu_xray":
        return _r2gen(text, _IU_STEPS)
    if style == "mimic_cxr":
        return _r2gen(text, _MIMIC_STEPS)
    if style == "plain":
        return _plain(text)
    if style == "none":
        return " ".join(text.split())
    raise InputError(f"report style {style!r}: expected one of {', '.join(get_args(Style))}")


def _r2gen(text: str, steps: tuple[tuple[str, str], ...]) -> str:
    for old, new in steps:
        text = text.replace(old, new)
    sentences = text.strip().lower().split(". ")
    return " . ".join(_bare(sentence) for sentence in sentences) + " ."


def _bare(sentence: str) -> str:
    for quote in "\"/\\'":
        sentence = sentence.replace(quote, "")
    return sentence.strip().translate(_DELETED)


_MARK = re.compile(r"\[\*\*.*?\*\*\]|\b[xX]{3,}\b|_{2,}", re.DOTALL)
_LIST_NUMBER = re.compile(r"(?:^|(?<=[.!?:;\n]))\s*\(?\d{1,2}[.)](?=\s)", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$|[A-Z])|\n\s*\n")
_PLAIN_DELETED = re.compile(r"[^\w\s.%+\-]|_+")
_LOOSE_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")


def replace_marks(text: str, by: str = "") -> str:
    """Replace de-identification marks (XXXX, ___, [** **]), and tidy the white space left."""
    replaced = _MARK.sub(f" {by} " if by else " ", text)
    replaced = re.sub(r"[ \t]+(?=[.,;:])", "", re.sub(r"[ \t]{2,}", " ", replaced))
    return replaced.strip()


def _plain(text: str) -> str:
    text = _LIST_NUMBER.sub(" ", text)
    sentences = []
    for sentence in _SENTENCE_END.split(text):
        words = sentence.lower().replace("/", " ").replace("'", "")
        words = _LOOSE_POINT.sub("", _PLAIN_DELETED.sub(" ", words))
        if words := " ".join(words.split()):
            sentences.append(words)
    return " . ".join(sentences) + " ." if sentences else ""
