"""Prepare and check data sets.

python -m emrrg.data prepare openi NLMCXR_reports.tgz --images DIR --output A.json
python -m emrrg.data prepare mimic_cxr DIR --output A.json
python -m emrrg.data prepare tabular studies.csv --images DIR --output A.json
python -m emrrg.data check A.json --images DIR --output check/
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from emrrg.config import parse_config, run_command
from emrrg.data import chexpert_plus, mimic, openi, padchest, r2gen, tabular
from emrrg.data.check_page import check_page
from emrrg.data.checking import check
from emrrg.data.preparing import (
    Prepared,
    Section,
    SplitBy,
    Views,
    prepare,
    read_splits,
    write_annotation,
)
from emrrg.errors import InputError

NEEDED = {
    "r2gen": "annotation", "openi": "reports", "mimic_cxr": "root", "chexpert_plus": "table",
    "padchest": "table", "tabular": "table",
}  # fmt: skip
"""Source to the flag that it cannot do without, which may also be given by position."""
SECTIONS = {"r2gen": "full", "padchest": "full", "tabular": "full"}
SPLIT_BY = {"chexpert_plus": "patient", "padchest": "patient", "openi": "patient"}
USED = {
    "projections": ("openi",), "reports": ("openi", "mimic_cxr"), "root": ("mimic_cxr",),
    "annotation": ("r2gen",), "table": ("chexpert_plus", "padchest", "tabular"),
    "labels": ("mimic_cxr", "chexpert_plus"), "parse_sections": ("tabular",),
    "image_column": ("tabular",), "text_column": ("tabular",), "id_column": ("tabular",),
    "split_column": ("tabular",), "patient_column": ("tabular",), "view_column": ("tabular",),
}  # fmt: skip
"""Flag to the sources that know it; all others know every source."""


@dataclass(frozen=True)
class PrepareConfig:
    """Turn a data set as it was downloaded into one validated annotation file."""

    source: Literal["r2gen", "openi", "mimic_cxr", "chexpert_plus", "padchest", "tabular"]
    """What the data is: r2gen (an annotation file), openi (IU X-ray's official reports),
    mimic_cxr (MIMIC-CXR-JPG and reports), chexpert_plus, padchest, tabular (CSV, TSV, JSON, JSON
    Lines of image paths and texts)."""
    path: tuple[str, ...] = ()
    """The source's file or folder: --annotation, --reports, --root or --table, whichever it has."""
    output: str | None = None
    """The annotation file to write."""
    images: str | None = None
    """Folder of the images; every file is looked for in it. Without it they are not looked for."""
    annotation: str | None = None
    """r2gen: the annotation file."""
    reports: str | None = None
    """openi: NLMCXR_reports.tgz or its folder. mimic_cxr: folder, zip or sectioned CSV of reports
    [default: looked for in --root]."""
    projections: str | None = None
    """openi: CSV with filename and projection (frontal, lateral), if there is one."""
    root: str | None = None
    """mimic_cxr: folder of the split, metadata and chexpert tables."""
    table: str | None = None
    """chexpert_plus, padchest, tabular: the table."""
    labels: str | None = None
    """mimic_cxr: chexpert, negbio or none [default: chexpert]. chexpert_plus: file of CheXbert
    labels."""
    section: Literal["findings", "impression", "both", "either", "full"] | None = None
    """Which text is the report; both needs both, either takes the impression where there are no
    findings [default: findings; full for r2gen, padchest, tabular]."""
    views: Views = "all"
    """Which images of a study: all, frontal ones, the best one (PA before AP before lateral), or
    a record of its own for each."""
    min_views: int | None = None
    """Drop studies with fewer images [default: 1; openi: 2, as R2Gen does]."""
    max_views: int | None = None
    """Take at most this many images of a study."""
    min_words: int = 1
    """Drop shorter reports."""
    split_by: SplitBy | None = None
    """source keeps the source's own split, patient makes a new one that divides no patient
    [default: source where it has train, val and test, else patient]."""
    fractions: tuple[float, ...] = (0.7, 0.1, 0.2)
    """Shares of train, val and test of a new split."""
    seed: int = 0
    """Of a new split."""
    split_from: str | None = None
    """Take the split of each id from this annotation file, and drop records that it lacks."""
    dropped: str | None = None
    """Write a CSV of everything that was dropped, with the reason."""
    parse_sections: bool = False
    """tabular: divide the texts by their headings, as --section findings does too."""
    image_column: str | None = None
    """tabular: column of image paths; several views as a.png;b.png, or in columns of their own as
    --image-column frontal,lateral [default: guessed]."""
    text_column: str | None = None
    """tabular: column of the report [default: guessed]."""
    id_column: str | None = None
    """tabular: column of study ids; rows of one id are one study [default: guessed]."""
    split_column: str | None = None
    """tabular: column of splits [default: guessed]."""
    patient_column: str | None = None
    """tabular: column of patients [default: guessed]."""
    view_column: str | None = None
    """tabular: column of projections (PA, AP, LATERAL) [default: guessed]."""

    def __post_init__(self) -> None:
        main = NEEDED[self.source]
        if len(self.path) > 1 or (self.path and getattr(self, main) is not None):
            raise InputError(f"{self.path[-1]}: {self.source} takes one file or folder (--{main})")
        if self.path:
            object.__setattr__(self, main, self.path[0])
        for needed in (main, "output"):
            if getattr(self, needed) is None:
                raise InputError(f"--{needed}: needed with {self.source}")
        for name, sources in USED.items():
            if getattr(self, name) and self.source not in sources:
                raise InputError(
                    f"--{name.replace('_', '-')}: not used with {self.source}, "
                    f"only with {', '.join(sources)}"
                )
        if self.source == "mimic_cxr" and self.labels not in (None, "chexpert", "negbio", "none"):
            raise InputError(f"--labels {self.labels}: expected chexpert, negbio or none")
        for name in ("min_views", "max_views", "min_words"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')}: {value} is below 1")


@dataclass(frozen=True)
class CheckConfig:
    """Read every record and image of a data set and list what is wrong."""

    annotation: str
    """Annotation file."""
    images: str | None = None
    """Folder that its image paths start from [default: the annotation's own folder]."""
    output: str | None = None
    """Folder for check.html (with small pictures) and problems.json."""
    workers: int | None = None
    """Processes that read images [default: one a CPU core, at most 16]."""
    pictures: int = 240
    """Pictures on the page."""

    def __post_init__(self) -> None:
        for name in ("workers", "pictures"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InputError(f"--{name}: {value} is below 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: ``prepare SOURCE ...`` or ``check ANNOTATION ...``; None: `sys.argv`.
    Returns:
        Exit status: 0, or 1 if ``check`` found errors.
    Raises:
        InputError: something that the user gave cannot be used.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {"prepare": _prepare, "check": _check}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        print("\nMore: python -m emrrg.data prepare --help, python -m emrrg.data check --help")
        return 0
    if arguments[0] not in commands:
        raise InputError(f"{arguments[0]!r}: expected prepare or check")
    return commands[arguments[0]](arguments[1:])


def _prepare(argv: list[str]) -> int:
    config, _ = parse_config(
        PrepareConfig, argv, "emrrg.data prepare", positional=("source", "path")
    )
    images = _path(config.images)
    if images is not None and not images.is_dir():
        raise InputError(f"--images: {images}: no such folder")
    section: Section = config.section or SECTIONS.get(config.source, "findings")  # type: ignore[assignment]
    split_by: SplitBy = config.split_by or SPLIT_BY.get(config.source, "source")  # type: ignore[assignment]
    prepared = prepare(
        _studies(config, images),
        images=images,
        section=section,
        views=config.views,
        min_views=config.min_views or (2 if config.source == "openi" else 1),
        max_views=config.max_views,
        min_words=config.min_words,
        split_by=split_by,
        fractions=config.fractions,
        seed=config.seed,
        split_from=read_splits(Path(config.split_from)) if config.split_from else None,
    )
    if config.dropped:
        _write_dropped(prepared, Path(config.dropped))
    write_annotation(prepared, Path(config.output or ""), images)
    print(prepared.summary())
    if images is None:
        print("note     no --images: the image files were not looked for")
    print(f"wrote    {config.output}")
    print(f"next     python -m emrrg.data check {config.output} --images {images or 'DIR'}")
    return 0


def _studies(config: PrepareConfig, images: Path | None) -> Iterable[Any]:
    if config.source == "r2gen":
        return r2gen.studies(Path(config.annotation or ""), images)
    if config.source == "openi":
        return openi.studies(Path(config.reports or ""), images, _path(config.projections))
    if config.source == "mimic_cxr":
        return mimic.studies(
            Path(config.root or ""), _path(config.reports), images, config.labels or "chexpert"
        )
    if config.source == "chexpert_plus":
        return chexpert_plus.studies(Path(config.table or ""), images, _path(config.labels))
    if config.source == "padchest":
        return padchest.studies(Path(config.table or ""), images)
    kinds = ("image", "text", "id", "split", "patient", "view")
    columns = {k: c for k in kinds if (c := getattr(config, f"{k}_column"))}
    divide = config.parse_sections or config.section not in (None, "full")
    return tabular.studies(Path(config.table or ""), columns, divide)


def _check(argv: list[str]) -> int:
    config, _ = parse_config(CheckConfig, argv, "emrrg.data check", positional=("annotation",))
    workers = min(16, os.cpu_count() or 1) if config.workers is None else config.workers

    def bar(images: Iterable[Any], total: int) -> Iterable[Any]:
        return tqdm(images, total=total, unit="image", disable=None)

    annotation = Path(config.annotation)
    images = Path(config.images) if config.images else annotation.parent
    output = Path(config.output) if config.output else None
    if output:
        output.mkdir(parents=True, exist_ok=True)  # before hours of reading
    findings = check(annotation, images, workers=workers, pictures=config.pictures, progress=bar)
    print(findings.summary())
    if output:
        page = check_page(findings, annotation.name, config.pictures)
        (output / "check.html").write_text(page, encoding="utf-8")
        problems = [dataclasses.asdict(problem) for problem in findings.problems]
        text = json.dumps(problems, ensure_ascii=False, indent=1)
        (output / "problems.json").write_text(text + "\n", encoding="utf-8")
        print(f"wrote {output / 'check.html'} and {output / 'problems.json'}")
    return 1 if findings.errors else 0


def _write_dropped(prepared: Prepared, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "reason", "detail"))
        writer.writerows((d.id, d.reason, d.detail) for d in prepared.dropped)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


if __name__ == "__main__":
    run_command(main)
