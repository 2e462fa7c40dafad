"""How reports that a model wrote are scored: whose labels, which columns, which baselines.

What `emrrg.score` reads from files comes here from the data set: labels, and the columns that
scores are broken down by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from emrrg.data.dataset import Studies
from emrrg.errors import InputError
from emrrg.metrics.chexbert import NAME as CHEXBERT
from emrrg.metrics.chexbert import label_reports
from emrrg.metrics.clinical import LABELER, Labels, Policy, label_report
from emrrg.metrics.files import IDS, read_table
from emrrg.metrics.groups import Groups, group_studies, known_priors

PRIORS = "earlier_studies"  # the column that `emrrg.data prepare` writes


@dataclass(frozen=True)
class Labeler:
    """Who labels texts."""

    name: str
    label: Callable[[Sequence[str]], list[Labels]]

    def __call__(self, texts: Sequence[str]) -> list[Labels]:
        """The labels of each text; equal texts (constant reports) are labelled once."""
        distinct = list(dict.fromkeys(texts))
        known = dict(zip(distinct, self.label(distinct), strict=True))
        return [known[text] for text in texts]


RULES = Labeler(LABELER, lambda texts: [label_report(text) for text in texts])


def chexbert(checkpoint: Path, vocabulary: Path, device: torch.device) -> Labeler:
    """CheXbert as a labeler; arguments as `emrrg.metrics.chexbert.label_reports`."""
    return Labeler(
        CHEXBERT,
        lambda texts: list(label_reports(texts, checkpoint, vocabulary, device=str(device))),
    )


@dataclass(frozen=True)
class Scoring:
    """What is scored beside the language scores, and how. Lists stand in the data set's order."""

    tokenization: Literal["split", "ptb"] = "split"
    """As in `emrrg.metrics.score_reports`."""
    uncertain: Policy = "negative"
    """As in `emrrg.metrics.clinical.score_labels`."""
    labeler: Labeler = RULES
    """Of the generated reports, and of the references where nothing else has their labels."""
    reference_labels: Sequence[Labels] | None = None
    """Labels of the references, if they are known."""
    reference_source: str = ""
    """Where those come from."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """What scores are broken down by: name to one value a study."""
    priors: Sequence[bool | None] | None = None
    """Whether each study has an earlier one; None: not known of any."""
    neighbours: Sequence[str] | None = None
    """The report of the training image nearest to each study."""
    per_report: bool = False
    """Keep the scores of every study."""

    def of(self, indices: Sequence[int]) -> Scoring:
        """The same for some of the studies."""

        def some(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in indices]

        columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        return dataclasses.replace(
            self,
            columns=columns,
            reference_labels=some(self.reference_labels),
            priors=some(self.priors),
            neighbours=some(self.neighbours),
        )

    def truth(self, references: Sequence[str]) -> tuple[list[Labels], str]:
        """The labels to score against, and whose labels the scores are made of."""
        if self.reference_labels is None:
            return self.labeler(references), f"{self.labeler.name}; references: the same"
        source = f"{self.labeler.name}; references: {self.reference_source}"
        return list(self.reference_labels), source

    def groups(self) -> Groups:
        """The studies by the columns."""
        return group_studies(self.columns)


def known_labels(studies: Studies) -> tuple[list[Labels], str] | None:
    """The labels that a data set has of every study, and their name; None where one has none."""
    labels = studies.labels()
    if not labels or any(one is None for one in labels):
        return None
    return [one or {} for one in labels], "the data set's labels"


def file_labels(path: Path, studies: Studies) -> list[Labels]:
    """Labels of a data set's studies from a file, by id.

    Raises:
        InputError: the file has no ids or labels, or none for a study.
    """
    table = read_table(path)
    if table.ids is None:
        raise InputError(f"--labels: {path}: no ids in it (a column {', '.join(IDS[:3])}, ...)")
    known = dict(zip(table.ids, table.labels(), strict=True))
    missing = [name for name in studies.ids() if name not in known]
    if missing:
        raise InputError(
            f"--labels: {path}: no labels of {len(missing)} of {len(studies)} studies, for "
            f"instance {missing[0]}"
        )
    return [known[name] for name in studies.ids()]


def study_columns(studies: Studies, names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of the annotation, one value a study.

    Raises:
        InputError: no study has such a column, or it has too many values to break scores down by.
    """
    rows = studies.attributes()
    there = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        if name not in there:
            raise InputError(
                f"--by: no study has {name!r}; the annotation has {', '.join(there) or 'nothing'}"
            )
    columns = {name: [row.get(name) for row in rows] for name in names}
    group_studies(columns)  # refuses now what it would refuse after every report is written
    return columns


def study_priors(studies: Studies) -> list[bool | None] | None:
    """Whether each study has an earlier one, where the annotation says so."""
    values = [row.get(PRIORS) for row in studies.attributes()]
    if all(value is None for value in values):
        return None
    return known_priors(values, studies.ids(), f"the annotation's {PRIORS}")
