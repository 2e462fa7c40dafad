"""Score generated reports from files: ``python -m emrrg.score hypotheses.json references.json``.

The reports may come from any system; JSON, JSONL and CSV in their usual forms are read, and studies
are matched by id where both files have ids (`emrrg.metrics.files`). Printed are language scores,
clinical scores and baselines with their intervals and with how they were counted; ``--output``
keeps everything, ``--compare`` tests a second system against the first on the same studies.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emrrg.config import check_writable, flag, parse_config, run_command
from emrrg.data.reports import clean_report
from emrrg.errors import InputError
from emrrg.metrics.chexbert import NAME as CHEXBERT
from emrrg.metrics.chexbert import label_reports
from emrrg.metrics.clinical import (
    LABELER,
    Labels,
    compare_labels,
    label_report,
    score_comparisons,
    score_policies,
    score_sides,
)
from emrrg.metrics.external import EXTERNAL, external_score
from emrrg.metrics.files import HYPOTHESES, REFERENCES, Table, match, read_table
from emrrg.metrics.groups import Groups, group_studies, known_priors
from emrrg.metrics.nlg import compare_reports, score_reports
from emrrg.metrics.table import score_table
from emrrg.tokenizer import load_tokenizer

log = logging.getLogger("emrrg.score")

SHOWN_IDS = 3


@dataclass(frozen=True)
class ScoreConfig:
    """Score generated reports, from files of any system, against reference reports."""

    hypotheses: str
    """File of generated reports (JSON, JSONL, CSV)."""
    references: tuple[str, ...] = ()
    """File of reference reports, for instance an annotation file [default: the field "reference"
    of the first file]."""
    compare: str | None = None
    """File of a second system's reports: a paired bootstrap test between the two."""
    split: str | None = None
    """Only references of this split, where their file has splits."""
    id_column: str | None = None
    """Field of the studies' ids [default: id, study_id, ... where there]."""
    hypothesis_column: str | None = None
    """Field of the generated reports [default: hypothesis, prediction, report, ...]."""
    reference_column: str | None = None
    """Field of the reference reports [default: reference, report, text, ...]."""
    clean: Literal["none", "iu_xray", "mimic_cxr", "plain"] = "none"
    """Clean both sides for the language scores: iu_xray and mimic_cxr as R2Gen does."""

    protocol: Literal["full", "r2gen", "r2gengpt"] = "full"
    """full references, or a peer's truncation of them."""
    max_tokens: int | None = None
    """Where r2gen and r2gengpt cut a reference (60 for IU X-ray, 100 for MIMIC-CXR)."""
    tokenization: Literal["split", "ptb"] = "split"
    """split at white space, as every peer does, or as image captions are scored (needs Java)."""
    tokenizer: str | None = None
    """Tokenizer file or model folder, for r2gengpt."""
    train_reports: str | None = None
    """File of training reports (of an annotation, its training part): constant-report baselines."""
    neighbours: str | None = None
    """File with, for each study, the report of its nearest training image: a baseline."""
    min_count: int = 3
    """r2gen: words rarer than this in the training reports are unknown."""
    meteor: Literal["auto", "require", "off"] = "auto"
    """METEOR needs Java: where there is (auto), as a must (require), or not (off)."""
    bootstrap: int = 1000
    """Resamples for the intervals and tests; 0 for none."""
    seed: int = 42
    """Seed of the resamples."""

    labeler: Literal["rules", "chexbert", "off"] = "rules"
    """Who labels the 14 observations: this project's rules, or a CheXbert checkpoint."""
    chexbert: str | None = None
    """CheXbert checkpoint (chexbert.pth); needs the package transformers."""
    vocabulary: str | None = None
    """BERT's vocab.txt, or the folder that holds it, for CheXbert."""
    hypothesis_labels: str | None = None
    """File of labels of the generated reports, instead of the labeler's."""
    reference_labels: str | None = None
    """File of labels of the references, instead of the labeler's."""
    compare_labels: str | None = None
    """File of labels of the second system's reports, instead of the labeler's."""
    uncertain: Literal["negative", "positive", "ignore"] = "negative"
    """What an uncertain label counts as."""
    by: tuple[str, ...] = ()
    """Break scores down by these fields of the references (view, sex, age, ...)."""
    prior_column: str | None = None
    """Field of the references that says whether the patient has an earlier study."""
    extra: tuple[str, ...] = ()
    """Further scores by their authors' packages, if installed: radgraph, ratescore, green."""
    device: str = "cpu"
    """Where CheXbert and the further scores run."""

    output: str | None = None
    """Write everything to this JSON file."""
    per_report: str | None = None
    """Write the scores and labels of every study to this JSONL file."""

    def __post_init__(self) -> None:
        if len(self.references) > 1:
            raise InputError("references: give one file of hypotheses and one of references")
        for name in self.extra:
            if name not in EXTERNAL:
                raise InputError(f"--extra: {name!r} is not one of {', '.join(EXTERNAL)}")
        if self.labeler == "chexbert" and not (self.chexbert and self.vocabulary):
            raise InputError("--labeler chexbert: needs --chexbert and --vocabulary")
        if self.compare and not self.bootstrap:
            raise InputError("--compare: needs --bootstrap of at least 1")
        if self.compare_labels and not self.compare:
            raise InputError("--compare-labels: needs --compare")


@dataclass(frozen=True)
class _System:
    """One system's reports in the order of the references.

    Attributes:
        texts: as they are; labels are read in these.
        reports: cleaned, for the language scores.
        labels: None without a labeler.
        labeler: whose labels they are.
    """

    texts: list[str]
    reports: list[str]
    labels: list[Labels] | None
    labeler: str | None


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
    config, _ = parse_config(
        ScoreConfig, argv, "emrrg.score", positional=("hypotheses", "references")
    )
    for name in ("output", "per_report"):
        if path := getattr(config, name):
            check_writable(Path(path), flag(name))
    own = config.hypotheses
    truth = read_table(
        config.references[0] if config.references else own,
        id_column=config.id_column,
        split=config.split,
    )
    names = REFERENCES if config.references else REFERENCES[:4]
    texts = truth.texts(names, config.reference_column)
    rows = range(len(texts))
    labels, labeler = _labels(config, texts, truth, rows, config.reference_labels)
    reference = _System(texts, _clean(texts, config), labels, labeler)
    first = _read_system(config, own, truth, config.hypothesis_labels)
    result = score(config, first, reference, truth)
    if config.compare:
        second = _read_system(config, config.compare, truth, config.compare_labels)
        result["comparison"] = compare(config, first, second, reference)
    studies = _per_report(result, truth, first, reference)
    log.info("%s", score_table(result))
    if config.output:
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        Path(config.output).write_text(text, encoding="utf-8")
        log.info("everything is in %s", config.output)
    if config.per_report:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in studies)
        Path(config.per_report).write_text(lines, encoding="utf-8")
        log.info("the scores of every study are in %s", config.per_report)
    return 0


def score(config: ScoreConfig, system: _System, reference: _System, truth: Table) -> dict[str, Any]:
    """Every score of one system."""
    groups = _groups(config, truth)
    neighbours = None
    if config.neighbours:
        neighbours = _clean(_aligned(config, config.neighbours, truth)[0], config)
    result = score_reports(
        system.reports,
        reference.reports,
        train_reports=_training_reports(config),
        neighbour_reports=neighbours,
        groups=groups,
        per_report=config.per_report is not None,
        **_language_options(config),
        bootstrap=config.bootstrap,
    )
    result["files"] = {"hypotheses": config.hypotheses, "references": str(truth.path)}
    result["clean"] = config.clean
    if system.labels is not None and reference.labels is not None:
        source = str(system.labeler)
        if system.labeler != reference.labeler:
            source = f"hypotheses: {system.labeler}; references: {reference.labeler}"
        settings = _clinical_options(config) | {"source": source}
        result["clinical"] = score_policies(
            system.labels, reference.labels, groups=groups, **settings
        )
        constant = result["baselines"].get("constant")
        if constant and system.labeler == LABELER:
            labels = [label_report(constant["report"])] * len(reference.labels)
            constant["clinical"] = score_policies(labels, reference.labels, **settings)
    settings = {"bootstrap": config.bootstrap, "seed": config.seed}
    result["sides"] = score_sides(system.texts, reference.texts, **settings)
    result["comparisons"] = score_comparisons(
        system.texts, reference.texts, has_prior=_priors(config, truth), **settings
    )
    result["extra"] = {
        name: external_score(
            name, system.reports, reference.reports, **settings, device=config.device
        )
        for name in config.extra
    }
    return result


def compare(
    config: ScoreConfig, first: _System, second: _System, reference: _System
) -> dict[str, Any]:
    """Paired tests between two systems, first minus second."""
    result: dict[str, Any] = {
        "files": {"first": config.hypotheses, "second": config.compare},
        "bootstrap": {"resamples": config.bootstrap, "seed": config.seed},
        "language": compare_reports(
            first.reports,
            second.reports,
            reference.reports,
            train_reports=_training_reports(config),
            bootstrap=config.bootstrap,
            **_language_options(config),
        ),
    }
    if None not in (first.labels, second.labels, reference.labels):
        result["clinical"] = compare_labels(
            first.labels or [],
            second.labels or [],
            reference.labels or [],
            **_clinical_options(config),
        )
    return result


def _read_system(config: ScoreConfig, path: str, truth: Table, labels_file: str | None) -> _System:
    texts, own, rows = _aligned(config, path, truth)
    labels, labeler = _labels(config, texts, own, rows, labels_file)
    return _System(texts, _clean(texts, config), labels, labeler)


def _aligned(config: ScoreConfig, path: str, truth: Table) -> tuple[list[str], Table, list[int]]:
    """The reports of a file in the order of the references, the file, and where they are in it;
    every reference must have one."""
    other = _written(read_table(path, id_column=config.id_column))
    (places,) = match(truth, [other])
    texts = other.texts(HYPOTHESES, config.hypothesis_column)
    missing = [truth.name(i) for i, place in enumerate(places) if place is None]
    if missing:
        shown = ", ".join(missing[:SHOWN_IDS]) + (", ..." if len(missing) > SHOWN_IDS else "")
        raise InputError(
            f"{path}: {len(missing)} of {len(places)} references have no report in it ({shown}); "
            "a score of the rest would not compare with others"
        )
    if left := len(texts) - len(places):
        log.info("%s: %d reports have no reference in %s and are left out", path, left, truth.path)
    rows = [place for place in places if place is not None]
    return [texts[row] for row in rows], other, rows


def _written(table: Table) -> Table:
    """A table without the rows in which `emrrg.generate` says why there is no report."""
    kept = [i for i, row in enumerate(table.rows) if set(row) != {"id", "error"}]
    if not kept:
        raise InputError(f"{table.path}: no study has a report, the first: {table.rows[0]}")
    ids = table.ids and [table.ids[i] for i in kept]
    return Table(table.path, ids, [table.rows[i] for i in kept])


def _labels(
    config: ScoreConfig, texts: list[str], table: Table, rows: Sequence[int], path: str | None
) -> tuple[list[Labels] | None, str | None]:
    """Labels of reports in the order of the references, and whose they are.

    A file of labels without ids has the order of the file that the reports came from.

    Args:
        config: the flags.
        texts: the reports.
        table: where they came from.
        rows: where they are in it.
        path: file of labels, if they are not to be read from the texts.
    """
    if path is not None:
        other = read_table(path, id_column=config.id_column)
        (places,) = match(table, [other])
        labels = other.labels()
        for row in rows:
            if places[row] is None:
                raise InputError(f"{path}: no labels of study {table.name(row)}")
        chosen = [place for row in rows if (place := places[row]) is not None]
        return [labels[place] for place in chosen], f"file {path}"
    if config.labeler == "off":
        return None, None
    if config.labeler == "chexbert":
        assert config.chexbert and config.vocabulary  # __post_init__
        found = label_reports(texts, config.chexbert, config.vocabulary, device=config.device)
        return list(found), CHEXBERT
    return [label_report(text) for text in texts], LABELER


def _clean(texts: list[str], config: ScoreConfig) -> list[str]:
    return [clean_report(" ".join(text.split()), config.clean) for text in texts]


def _training_reports(config: ScoreConfig) -> list[str] | None:
    if config.train_reports is None:
        return None
    read = read_table(config.train_reports)
    rows = [row for row in read.rows if row.get("split", "train") == "train"]
    if not rows:
        raise InputError(f"--train-reports: {read.path}: no study of split 'train' in it")
    training = Table(read.path, None, rows)
    return _clean(training.texts(REFERENCES, config.reference_column), config)


def _language_options(config: ScoreConfig) -> dict[str, Any]:
    return {
        "protocol": config.protocol,
        "tokenization": config.tokenization,
        "max_tokens": config.max_tokens,
        "meteor": config.meteor,
        "min_count": config.min_count,
        "tokenizer": load_tokenizer(config.tokenizer) if config.tokenizer else None,
        "seed": config.seed,
    }


def _clinical_options(config: ScoreConfig) -> dict[str, Any]:
    return {"uncertain": config.uncertain, "bootstrap": config.bootstrap, "seed": config.seed}


def _groups(config: ScoreConfig, truth: Table) -> Groups:
    for name in config.by:
        truth.column((), name)
    return group_studies({name: [row.get(name) for row in truth.rows] for name in config.by})


def _priors(config: ScoreConfig, truth: Table) -> list[bool | None] | None:
    if config.prior_column is None:
        return None
    name = truth.column((), config.prior_column)
    names = [truth.name(i) for i in range(len(truth.rows))]
    return known_priors([row.get(name) for row in truth.rows], names, f"{truth.path}: {name}")


def _per_report(
    result: dict[str, Any], truth: Table, system: _System, reference: _System
) -> list[dict[str, Any]]:
    """One object a study; its scores are moved out of the result."""
    scores = result.pop("per_report", {})
    rows = []
    for i in range(len(reference.reports)):
        row: dict[str, Any] = {
            "id": truth.name(i),
            "hypothesis": system.reports[i],
            "reference": reference.reports[i],
            **{name: values[i] for name, values in scores.items()},
        }
        if system.labels is not None and reference.labels is not None:
            row["predicted_labels"] = system.labels[i]
            row["reference_labels"] = reference.labels[i]
        rows.append(row)
    return rows


if __name__ == "__main__":
    run_command(main)
