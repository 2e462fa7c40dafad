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
from difflib import get_close_matches
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


_HEADING = re.compile(
    r"^[ \t]*(?P<name>[A-ZÁÉÍÓÚÑ][A-ZÁÉÍÓÚÑ0-9 ()/,&.\-]{1,60}?)[ \t]*:(?=\s|$)", re.MULTILINE
)
_TITLE = re.compile(
    r"^[ \t]*(?P<name>FINAL (?:REPORT|ADDENDUM)|FINDINGS?|Findings?|IMPRESSIONS?|Impressions?"
    r"|CONCLUSIONS?|Conclusions?|INDICATIONS?|COMPARISONS?|TECHNIQUE|HALLAZGOS|Hallazgos"
    r"|IMPRESIÓN|Impresión)[ \t]*$",
    re.MULTILINE,
)
_RULE = re.compile(r"^[ \t]*_{10,}[ \t]*$", re.MULTILINE)
_SECTION_NAMES = {
    "findings": ("finding", "findings", "reference findings", "hallazgos", "radiological findings"),
    "impression": (
        "impression", "impressions", "conclusion", "conclusions", "opinion", "assessment",
        "findings and impression", "findings/impression", "findings / impression",
        "impression and recommendation", "impresion", "impresión", "conclusión",
    ),
    "indication": (
        "indication", "indications", "clinical indication", "reason for exam",
        "reason for examination", "reason for study", "reason for this examination", "motivo",
    ),
    "history": (
        "history", "clinical history", "clinical information", "patient history",
        "medical history", "clinical data",
    ),
    "comparison": (
        "comparison", "comparisons", "comparison exam", "comparison film", "comparison study",
        "comparison studies", "reference exam", "prior studies",
    ),
    "technique": ("technique", "techniques", "procedure", "procedure comments", "técnica"),
    "examination": ("examination", "exam", "type of examination", "study", "procedure name"),
    "recommendation": ("recommendation", "recommendations", "recommendation(s)"),
    "notification": ("notification", "notifications"),
    "addendum": ("addendum", "addenda"),
    "wet read": ("wet read", "wetread", "preliminary report", "provisional findings impression"),
}  # fmt: skip
_CANONICAL = {variant: name for name, variants in _SECTION_NAMES.items() for variant in variants}
_ANY_CASE = re.compile(
    r"^[ \t]*(?P<name>" + "|".join(map(re.escape, _CANONICAL)) + r")[ \t]*:",
    re.MULTILINE | re.IGNORECASE,
)
_INLINE = re.compile(
    r"(?:^|(?<=[.!?;]))\s*(?P<name>" + "|".join(map(re.escape, _CANONICAL)) + r")\s*:",
    re.IGNORECASE,
)
# A heading that only says what was photographed opens the findings (MIMIC: "CHEST, TWO VIEWS:").
_ABOUT_THE_STUDY = re.compile(
    r"\b(chest|portable|(pa|ap|frontal|lateral|two|one|single|upright)\b.*\b(views?|lat|lateral|pa|ap"
    r"|upright|radiographs?))\b"
)


def parse_sections(text: str) -> dict[str, str]:
    """Divide a free-text report by its headings.

    A heading stands at the beginning of a line and ends in a colon: any in capitals, and the
    usual ones in any case (these also behind a full stop, where the text is all on one line).
    The commonest (FINDINGS, IMPRESSION, ...) may also have a line of their own without a colon.
    Names are brought to common ones (``findings``, ``impression``, ``indication``, ``history``,
    ``comparison``, ``technique``, ``examination``, ...); "CHEST, TWO VIEWS:" and its like open
    findings; misspelt ones (IMPRESSOIN) are recognised. Where findings or impression come more
    than once, the last that has text counts, as with MIMIC-CXR's own parser
    (github.com/MIT-LCP/mimic-cxr); other sections are joined.

    Args:
        text: the report.
    Returns:
        Section name to its text on one line, in the report's order, without empty ones.
        ``preamble`` is what comes before the first heading. Where there are neither findings nor
        impression, ``last_paragraph`` is what follows the last section's first blank line (the
        whole text, where it has no headings).
    """
    text = _RULE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = re.sub(r"\n[ \t]+\n", "\n\n", text)
    if "\n" not in text.strip():  # from a table whose fields hold no line breaks
        text = _INLINE.sub(r"\n\g<name>:", text)
    found = {m.start("name"): m for m in _HEADING.finditer(text) if _is_heading(m["name"])}
    found |= {m.start("name"): m for p in (_ANY_CASE, _TITLE) for m in p.finditer(text)}
    headings = [found[start] for start in sorted(found)]
    starts = [mark.start("name") for mark in headings]
    parts = [("preamble", text[: starts[0]] if starts else "")]
    for mark, end in zip(headings, [*starts[1:], len(text)], strict=False):
        parts.append((_section_name(mark["name"]), text[mark.end() : end]))
    told = [name for name, body in parts if name in ("findings", "impression") and _says(body)]
    if not told:
        name, body = parts.pop()
        if headings:
            first, _, body = body.strip().partition("\n\n")
            parts.append((name, first))
        parts.append(("last_paragraph", body if headings else text))
    sections: dict[str, str] = {}
    for name, body in parts:
        line = " ".join(body.split())
        if name in ("findings", "impression"):
            if _says(body):
                sections[name] = line
        elif line:
            sections[name] = f"{sections[name]} {line}" if name in sections else line
    return sections


def _is_heading(name: str) -> bool:
    """Not "T11:" or "L:"."""
    return sum(c.isalpha() for c in name) >= 4


def _says(body: str) -> bool:
    """Whether there is any text besides de-identification marks."""
    return any(c.isalnum() for c in replace_marks(body))


def _section_name(heading: str) -> str:
    """The common name of a heading."""
    name = " ".join(heading.lower().split())
    if name == "final report":
        return "preamble"
    if name in _CANONICAL:
        return _CANONICAL[name]
    close = get_close_matches(name, ("impression", "findings", "indication", "comparison"), 1, 0.84)
    if close:
        return close[0]
    for main in ("impression", "findings", "history", "comparison", "addendum"):
        if re.search(rf"\b{main}\b", name):
            return main
    return "findings" if _ABOUT_THE_STUDY.search(name) else name
