"""Agreement of annotators or label sources: ``python -m emrrg.agreement a.csv b.csv ...``.

Each file holds the labels of one annotator under the names of the CheXpert observations (1, 0, -1,
nothing); studies are matched by id where the files have ids, else by order. Printed are the kappas
and alphas of `emrrg.metrics.agreement` for each observation and pooled, with bootstrap intervals,
and the guideline that the annotators worked from, if it is given.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emrrg.config import parse_config, run_command
from emrrg.errors import InputError
from emrrg.metrics.agreement import agreement_table
from emrrg.metrics.clinical import LABELER, OBSERVATIONS, label_report
from emrrg.metrics.files import REFERENCES, Table, match, read_table

log = logging.getLogger("emrrg.agreement")

COEFFICIENTS = {
    "cohen": "Cohen",
    "cohen_linear": "weighted (linear)",
    "cohen_quadratic": "weighted (quadratic)",
    "fleiss": "Fleiss",
    "alpha_nominal": "alpha nominal",
    "alpha_ordinal": "alpha ordinal",
}


@dataclass(frozen=True)
class AgreementConfig:
    """Agreement of two or more annotators' labels, with the guideline they worked from."""

    files: tuple[str, ...]
    """One file of labels an annotator (CSV, JSON, JSONL)."""
    reports: str | None = None
    """File of reports of the same studies: this project's labeler joins as one more annotator."""
    report_column: str | None = None
    """Field of the reports [default: report, text, findings, ...]."""
    id_column: str | None = None
    """Field of the studies' ids [default: id, study_id, ... where there]."""
    observations: tuple[str, ...] = ()
    """Only these observations [default: those that every file has]."""
    blank: Literal["negative", "missing", "category"] = "negative"
    """What an observation without a label is: denied, not rated, or a value of its own."""
    guideline: str | None = None
    """Text file of the annotation guideline, printed and kept with the result."""
    bootstrap: int = 1000
    """Resamples of the studies for the intervals; 0 for none."""
    seed: int = 42
    """Seed of the resamples."""
    output: str | None = None
    """Write everything to this JSON file."""

    def __post_init__(self) -> None:
        if len(self.files) + (self.reports is not None) < 2:
            raise InputError("files: give at least two files of labels (or one, and --reports)")
        for name in self.observations:
            if name not in OBSERVATIONS:
                raise InputError(
                    f"--observations: {name!r} is not one of {', '.join(OBSERVATIONS)}"
                )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None: `sys.argv`.
    Returns:
        Exit status 0.
    Raises:
        InputError: a file or flag cannot be used.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    config, _ = parse_config(AgreementConfig, argv, "emrrg.agreement", positional=("files",))
    guideline = _read_text(config.guideline) if config.guideline else None
    tables = {_unique(i, config.files): read_table(f, id_column=config.id_column)
              for i, f in enumerate(config.files)}  # fmt: skip
    labels: dict[str, list[dict[str, int | None]]] = {
        name: read.labels() for name, read in tables.items()
    }
    if config.reports:
        read = read_table(config.reports, id_column=config.id_column)
        tables[LABELER] = read
        labels[LABELER] = [label_report(t) for t in read.texts(REFERENCES, config.report_column)]
    observations = config.observations or _common(tables, labels)
    result = agreement_table(
        _align(tables, labels),
        observations=observations,
        blank=config.blank,
        bootstrap=config.bootstrap,
        seed=config.seed,
    )
    result["files"] = {name: str(read.path) for name, read in tables.items()}
    result["guideline"] = guideline
    log.info("%s", table(result))
    if config.output:
        path = Path(config.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        log.info("\neverything is in %s", path)
    return 0


def table(result: Mapping[str, Any]) -> str:
    """The coefficients as Markdown, and the guideline."""
    names = result["sources"]
    lines = [
        f"{len(names)} label sources: {', '.join(names)}; {result['studies']} studies; "
        f"no label counts as: {result['blank']}",
        "",
        "| observation | items | " + " | ".join(f"positive: {name}" for name in names)
        + " | agree | " + " | ".join(COEFFICIENTS.values()) + " |",
        "|---|" + "---|" * (2 + len(names) + len(COEFFICIENTS)),
    ]  # fmt: skip
    for name, one in [*result["observations"].items(), ("**pooled**", result["pooled"])]:
        shares = [_share(one["positive"][source]) for source in names]
        cells = [
            name,
            str(one["items"]),
            *shares,
            _share(one["observed"]["value"]),
            *(_coefficient(one[key]) for key in COEFFICIENTS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if len(names) > 2:
        lines += ["", "Cohen's kappa of each pair, pooled (above: their mean):"]
        lines += [f"- {pair}: {_coefficient(k)}" for pair, k in result["pooled"]["pairs"].items()]
    if result["bootstrap"]:
        lines += [
            "",
            f"In brackets: {result['bootstrap']['level']:.0%} intervals over "
            f"{result['bootstrap']['resamples']} resamples of the studies. - is not defined (all "
            "values are the same, or values without an order).",
        ]
    if result.get("guideline"):
        lines += ["", "Guideline that the annotators worked from:", "", result["guideline"].strip()]
    return "\n".join(lines)


def _align(
    tables: Mapping[str, Table], labels: Mapping[str, list[dict[str, int | None]]]
) -> dict[str, list[dict[str, int | None] | None]]:
    """Every source's labels of every study that at least two sources have, in one order."""
    names = list(tables)
    if any(read.ids is None for read in tables.values()):
        first = tables[names[0]]
        match(first, [tables[name] for name in names[1:]])
        return {name: list(labels[name]) for name in names}
    places = {
        name: {identity: i for i, identity in enumerate(read.ids or [])}
        for name, read in tables.items()
    }
    every = dict.fromkeys(identity for name in names for identity in places[name])
    kept = [x for x in every if sum(x in places[name] for name in names) >= 2]
    if not kept:
        raise InputError("no study is in two of the files; are their ids of the same kind?")
    for name in names:
        if alone := len(places[name]) - sum(x in places[name] for x in kept):
            log.info("%s: %d studies that no other source has are left out", name, alone)
    return {
        name: [labels[name][places[name][x]] if x in places[name] else None for x in kept]
        for name in names
    }


def _common(
    tables: Mapping[str, Table], labels: Mapping[str, list[dict[str, int | None]]]
) -> list[str]:
    """The observations that every source has a field for."""
    fields = [{key for row in rows for key in row} for rows in labels.values()]
    common = [name for name in OBSERVATIONS if all(name in one for one in fields)]
    if not common:
        paths = ", ".join(str(read.path) for read in tables.values())
        raise InputError(f"{paths}: no observation is in all of them")
    return common


def _unique(i: int, files: Sequence[str]) -> str:
    """A short name of a file that no other file has."""
    stem = Path(files[i]).stem
    if sum(Path(file).stem == stem for file in files) == 1:
        return stem
    again = files[:i].count(files[i])
    return f"{files[i]} ({again + 1})" if again else files[i]


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"--guideline: {path}: not a text file in UTF-8") from None
    except OSError as error:
        raise InputError(f"--guideline: {path}: {error.strerror or error}") from None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _coefficient(one: Mapping[str, Any]) -> str:
    if one["value"] is None:
        return "-"
    limits = one["interval"]
    known = limits and limits[0] is not None
    return f"{one['value']:.3f}" + (f" ({limits[0]:.3f} to {limits[1]:.3f})" if known else "")


if __name__ == "__main__":
    run_command(main)
