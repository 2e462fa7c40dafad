"""The summary page of `python -m emrrg.data check`: one HTML file with small pictures."""

from __future__ import annotations

import base64
import html
from collections import Counter, defaultdict

from emrrg.data.checking import Findings, Problem
from emrrg.data.records import SPLITS

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c0392b; --odd: #b9770e; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 78rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
td.error, td.warning { overflow-wrap: break-word; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.error { color: var(--bad); } .warning { color: var(--odd); }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: .5rem; }
figure { margin: 0; font-size: .7rem; overflow-wrap: anywhere; border-top: 3px solid transparent; }
figure.error { border-color: var(--bad); } figure.warning { border-color: var(--odd); }
img, .none { width: 100%; aspect-ratio: 1; object-fit: contain; background: #000; }
.none { display: grid; place-items: center; color: #ccc; }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 5rem; }
.bars i { flex: 1; background: #4a90a4; min-height: 1px; }
"""


def check_page(findings: Findings, title: str, pictures: int = 240) -> str:
    """Write the page.

    Args:
        findings: of `emrrg.data.checking.check`.
        title: what was checked.
        pictures: at most so many; those with problems first, then others at random (the same
            ones every time).
    Returns:
        A self-contained HTML document, readable on a phone, without scripts or network.
    """
    by_path: dict[str, list[Problem]] = defaultdict(list)
    for problem in findings.problems:
        if problem.path:
            by_path[problem.path].append(problem)
    troubled = [path for path in findings.images if path in by_path]
    calm = [p for p, fact in findings.images.items() if p not in by_path and fact.thumbnail]
    shown = [*troubled, *calm][:pictures]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>Check of {html.escape(title)}</h1>",
        "<p>This page holds pictures and identifiers of the data set: do not pass it on where "
        "the data itself may not go.</p>",
        _counts(findings),
        _kinds(findings),
        _lengths(findings.words),
        f"<h2>Pictures: {len(shown):,} of {len(findings.images):,}, those with problems first</h2>",
        "<div class='sheet'>",
        *(_figure(findings, path, by_path[path]) for path in shown),
        "</div>",
        _list(findings.problems),
        "</html>\n",
    ]
    return "\n".join(parts)


def _counts(findings: Findings) -> str:
    total = sum(findings.records.values())
    splits = ", ".join(f"{split} {findings.records.get(split, 0):,}" for split in SPLITS)
    warnings = len(findings.problems) - findings.errors
    return (
        f"<p><b>{total:,}</b> records ({splits}), <b>{len(findings.images):,}</b> image files. "
        f"<b class='error'>{findings.errors:,} errors</b>, "
        f"<b class='warning'>{warnings:,} warnings</b>.</p>"
    )


def _kinds(findings: Findings) -> str:
    counts = Counter((p.severity, p.kind) for p in findings.problems)
    if not counts:
        return "<p>Nothing is wrong.</p>"
    rows = "".join(
        f"<tr><td class='{severity}'>{severity}<td>{html.escape(kind)}<td class='n'>{count:,}"
        for (severity, kind), count in sorted(counts.items())
    )
    return f"<table>{rows}</table>"


def _lengths(words: list[int], bins: int = 40) -> str:
    if not words:
        return ""
    top = max(max(words), 1)
    counts = Counter(min(w * bins // (top + 1), bins - 1) for w in words)
    highest = max(counts.values())
    bars = "".join(
        f"<i style='height:{counts[b] / highest:.0%}' "
        f"title='from {-(-b * (top + 1) // bins):,} words: {counts[b]:,} reports'></i>"
        for b in range(bins)
    )
    middle = sorted(words)[len(words) // 2]
    return (
        f"<h2>Length of reports: {min(words):,} to {max(words):,} words, median {middle:,}</h2>"
        f"<div class='bars'>{bars}</div><p>Bars: from 0 to {top:,} words.</p>"
    )


def _figure(findings: Findings, path: str, problems: list[Problem]) -> str:
    fact = findings.images[path]
    worst = min((p.severity for p in problems), default="")
    if fact.thumbnail:
        encoded = base64.b64encode(fact.thumbnail).decode("ascii")
        picture = f"<img loading='lazy' alt='' src='data:image/jpeg;base64,{encoded}'>"
    else:
        picture = "<div class='none'>no picture</div>"
    said = "; ".join(dict.fromkeys(p.kind for p in problems))
    size = f"{fact.width} x {fact.height} {fact.mode}" if fact.width else ""
    caption = "<br>".join(
        html.escape(text) for text in (findings.used_by[path], fact.path.name, size, said) if text
    )
    return f"<figure class='{worst}'>{picture}<figcaption>{caption}</figcaption></figure>"


def _list(problems: list[Problem], most: int = 1000) -> str:
    if not problems:
        return ""
    ordered = sorted(problems, key=lambda p: (p.severity, p.kind))
    rows = "".join(
        f"<tr><td class='{p.severity}'>{html.escape(p.kind)}<td>{html.escape(p.where)}"
        f"<td>{html.escape(p.detail)}"
        for p in ordered[:most]
    )
    more = f"<p>and {len(problems) - most:,} more</p>" if len(problems) > most else ""
    return f"<h2>Problems</h2><table><tr><th>kind<th>where<th>what{rows}</table>{more}"
