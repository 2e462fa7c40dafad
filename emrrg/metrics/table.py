"""Scores as text: one table for every command that prints them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emrrg.metrics.clinical import FINDINGS
from emrrg.metrics.nlg import SCORES

LONGEST = 40  # characters of a group's name that are shown


def score_table(result: Mapping[str, Any]) -> str:
    """The scores as text."""
    columns = ["", "score", "95 % interval", *result["baselines"]]
    rows = [
        [
            name,
            _number(result[name]),
            _range(result["intervals"].get(name)),
            *(_number(other[name]) for other in result["baselines"].values()),
        ]
        for name in SCORES
    ]
    found = result.get("clinical")
    titles = {"all": "14 observations", "five": "the usual 5", "findings": "13 findings"}
    for chosen, title in titles.items():
        for average in ("micro", "macro", "example") if found else ():
            others = [
                _number(o["clinical"][chosen][average]["f1"]) if "clinical" in o else ""
                for o in result["baselines"].values()
            ]
            limits = found["intervals"].get(chosen, {}).get(average, {}) if found else {}
            value = found[chosen][average]["f1"] if found else None
            rows.append(
                [f"F1 {average}, {title}", _number(value), _range(limits.get("f1")), *others]
            )
    sides, prior = result["sides"], result["comparisons"]
    rows.append(["wrong side", _number(sides["rate"]), _range(sides["interval"])])
    rows.append(["invented comparisons", _number(prior["rate"]), _range(prior["interval"])])
    for name, one in result["extra"].items():
        rows.append([name, _number(one["value"]), _range(one["interval"])])
    parts = [
        f"{result['pairs']} pairs; protocol {result['protocol']}, tokenization "
        f"{result['tokenization']}, {result['truncated_references']:.1%} of references cut"
        + (
            f" at {result['max_tokens']} {result['truncation_unit']}"
            if result["max_tokens"]
            else ""
        ),
        _aligned_rows([columns, *rows]),
    ]
    if found:
        parts += [
            f"labels: {found['labeler']}; uncertain as {found['uncertain']}",
            _per_finding(found),
        ]
    parts += [
        f"wrong side: {sides['wrong']} of {sides['compared']} findings whose side both texts say "
        f"({sides['partial']} more are partly right); invented comparisons: {prior['invented']} of "
        f"{prior['without_prior']} studies without an earlier one",
        *(f"{name}: not computed: {why}" for name, why in result["missing"].items()),
        *result["notes"],
    ]
    for column, groups in result["groups"].items():
        parts.append(_group_rows(column, groups, (found or {}).get("groups", {}).get(column)))
    if "comparison" in result:
        parts.append(_comparison_rows(result["comparison"]))
    return "\n\n".join(parts)


def _per_finding(found: Mapping[str, Any]) -> str:
    rows = [["observation", "precision", "recall", "F1", "95 % interval", "tp", "fp", "fn"]]
    limits = found["intervals"].get("observations", {})
    for name, one in found["observations"].items():
        rates = [_number(one[measure]) for measure in ("precision", "recall", "f1")]
        counts = [str(one[kind]) for kind in ("tp", "fp", "fn")]
        rows.append([name, *rates, _range(limits.get(name, {}).get("f1")), *counts])
    return _aligned_rows(rows)


def _group_rows(column: str, groups: Mapping[str, Any], found: Mapping[str, Any] | None) -> str:
    rows = [[column, "studies", "BLEU_4", "CIDEr", f"F1 micro, {len(FINDINGS)} findings", ""]]
    for value, one in groups.items():
        own = (found or {}).get(value)
        f1 = own["findings"]["micro"]["f1"] if own else None
        limits = own["intervals"].get("findings", {}).get("micro", {}) if own else {}
        rows.append(
            [
                value if len(value) <= LONGEST else f"{value[: LONGEST - 3]}...",
                str(one["pairs"]),
                _number(one["BLEU_4"]),
                _number(one["CIDEr"]),
                _number(f1),
                _range(limits.get("f1")),
            ]
        )
    return _aligned_rows(rows)


def _comparison_rows(comparison: Mapping[str, Any]) -> str:
    files = comparison["files"]
    tests = dict(comparison["language"])
    for name, averages in comparison.get("clinical", {}).items():
        for average, measures in averages.items():
            tests[f"F1 {average}, {name}"] = measures["f1"]
    rows = [["", "first", "second", "difference", "95 % interval", "p"]]
    for name, test in tests.items():
        numbers = [_number(test["first"]), _number(test["second"]), f"{test['difference']:+.4f}"]
        rows.append([name, *numbers, _range(test["interval"]), f"{test['p_value']:.4f}"])
    title = f"first: {files['first']}; second: {files['second']}; paired bootstrap"
    return f"{title}\n{_aligned_rows(rows)}"


def _aligned_rows(rows: Sequence[Sequence[str]]) -> str:
    width = max(map(len, rows))
    full = [[*row, *[""] * (width - len(row))] for row in rows]
    widths = [max(len(row[i]) for row in full) for i in range(width)]
    return "\n".join(
        "  ".join(
            cell.ljust(size) if i == 0 else cell.rjust(size)
            for i, (cell, size) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in full
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _range(limits: Sequence[float | None] | None) -> str:
    if not limits or limits[0] is None:
        return ""
    return f"{limits[0]:.4f} to {limits[1]:.4f}"
