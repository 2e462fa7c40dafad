"""From what a source holds to one validated annotation file.

Each source (`emrrg.data.openi`, `mimic`, `chexpert_plus`, `padchest`, `tabular`, `r2gen`) yields
its studies as `SourceStudy`, or `Dropped` where it can make none. What follows is the same for
all: choose the section that is the report, choose the views, look for the files, split by
patient, count what was dropped and why, write the file, read it back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from emrrg.data.r2gen import read_annotation
from emrrg.data.records import POSITIONS, SPLITS, Dropped, SourceStudy, View
from emrrg.errors import InputError

Section = Literal["findings", "impression", "both", "either", "full"]
Views = Literal["all", "frontal", "one", "each"]
SplitBy = Literal["source", "patient"]

WITHOUT = {
    "train": "so nothing can be trained on it",
    "val": "so training will keep its last weights, not its best",
    "test": "which training needs for its scores",
}
KEPT_SECTIONS = ("findings", "impression", "indication", "comparison")


@dataclass
class Prepared:
    """Records to write, and what became of the rest."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    lost_views: int = 0
    """Images that the source names and the folder lacks, of studies that were kept."""

    def summary(self) -> str:
        """What was kept and dropped, and why, in lines for a person."""
        splits = Counter(entry["split"] for entry in self.entries)
        images = sum(len(entry["image_path"]) for entry in self.entries)
        shown = ", ".join(f"{split} {splits[split]:,}" for split in SPLITS)
        lines = [f"kept     {len(self.entries):,} records with {images:,} images ({shown})"]
        patients = {entry["patient"] for entry in self.entries if entry.get("patient")}
        if patients:
            lines.append(f"         of {len(patients):,} patients")
        lines.append(f"dropped  {len(self.dropped):,}")
        lines += [f"         {reason}" for reason in self.reasons()]
        if self.lost_views:
            lines.append(f"note     {self.lost_views:,} images of kept records are not there")
        for split in SPLITS:
            if self.entries and not splits[split]:
                lines.append(
                    f"note     no {split} records, {WITHOUT[split]}; more studies, "
                    "--split-by patient or other --fractions may give some"
                )
        return "\n".join(lines)

    def reasons(self, most: int | None = None) -> list[str]:
        """Why studies were dropped, the commonest reason first, with the first detail of each."""
        details = {d.reason: d.detail for d in reversed(self.dropped)}
        counts = Counter(d.reason for d in self.dropped).most_common(most)
        return [
            f"{count:,}: {reason}" + (details[reason] and f", the first: {details[reason]}")
            for reason, count in counts
        ]


def prepare(
    studies: Iterable[SourceStudy | Dropped],
    *,
    images: Path | None = None,
    section: Section = "findings",
    views: Views = "all",
    min_views: int = 1,
    max_views: int | None = None,
    min_words: int = 1,
    split_by: SplitBy = "patient",
    fractions: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    split_from: Mapping[str, str] | None = None,
) -> Prepared:
    """Choose from each study what becomes its record.

    Args:
        studies: what a source yields.
        images: folder in which every image must be found; None: not looked for.
        section: which text is the report: ``findings``, ``impression``, ``both`` (one after the
            other; a study needs both), ``either`` (findings, else impression, else the last
            paragraph) or ``full``.
        views: ``all`` of a study, ``frontal`` ones, the best ``one`` (by `POSITIONS`), or a
            record of its own for ``each``.
        min_views: drop studies with fewer images.
        max_views: take no more than so many, in the source's order.
        min_words: drop shorter reports.
        split_by: ``source`` keeps the source's split where it names one (studies without one are
            then split by patient), ``patient`` splits all anew.
        fractions: of train, val and test for what is split by patient.
        seed: of that split.
        split_from: record id to split; a record that it lacks is dropped.
    Returns:
        Records in the source's order, and what was dropped.
    Raises:
        InputError: an option is wrong.
    """
    _check_options(section, views, fractions)
    prepared = Prepared()
    seen: set[str] = set()
    to_split: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for study in studies:
        if isinstance(study, Dropped):
            prepared.dropped.append(study)
            continue
        for entry in _entries(study, images, section, views, min_views, max_views, min_words):
            if isinstance(entry, Dropped):
                prepared.dropped.append(entry)
            else:
                found.append(entry)
    if views == "each":
        _make_ids_unique(found)
    for entry in found:
        if entry["id"] in seen:
            prepared.dropped.append(Dropped(entry["id"], "its id was there before"))
            continue
        seen.add(entry["id"])
        if split_from is not None:
            if entry["id"] not in split_from:
                prepared.dropped.append(Dropped(entry["id"], "not in the file of splits"))
                continue
            entry["split"] = split_from[entry["id"]]
        elif split_by == "patient" or not entry["split"]:
            to_split.append(entry)
        prepared.lost_views += entry.pop("_lost")
        prepared.entries.append(entry)
    groups = [entry.get("patient") or entry["study"] for entry in to_split]
    for entry, split in zip(to_split, split_by_group(groups, fractions, seed), strict=True):
        entry["split"] = split
    for entry in prepared.entries:
        if entry.get("study") == entry["id"]:
            del entry["study"]
    return prepared


def split_by_group(groups: Sequence[str], fractions: Sequence[float], seed: int) -> list[str]:
    """Divide items among train, val and test so that no group is divided.

    Groups are put in an order that depends on the seed and their names alone, and the list is cut
    where the shares are reached, so the shares are met to within one group. Where groups are so few
    that a split would be empty, it takes one of another: test before val, which training can do
    without.

    Args:
        groups: the group (patient) of each item.
        fractions: of train, val and test, by items.
        seed: another seed, another order.
    Returns:
        The split of each item.
    """
    sizes = Counter(groups)
    order = sorted(sizes, key=lambda g: hashlib.sha256(f"{seed}:{g}".encode()).digest())
    bounds = [sum(fractions[:k]) / sum(fractions) * len(groups) for k in (1, 2, 3)]
    chosen: dict[str, str] = {}
    before = 0
    for group in order:
        middle = before + sizes[group] / 2
        chosen[group] = next((s for s, b in zip(SPLITS, bounds, strict=True) if middle < b), "test")
        before += sizes[group]
    for k in (0, 2, 1):
        split, held = SPLITS[k], Counter(chosen.values())
        givers = [s for s in SPLITS if held[s] > 1] or (["val"] if held["val"] else [])
        if fractions[k] and not held[split] and givers:
            giver = max(givers, key=held.__getitem__)
            chosen[next(group for group in reversed(order) if chosen[group] == giver)] = split
    return [chosen[group] for group in groups]


def write_annotation(prepared: Prepared, output: Path, images: Path | None) -> None:
    """Write the records, read them back, and only then give the file its name.

    Args:
        prepared: what to write.
        output: the annotation file; an existing one is replaced.
        images: the images folder, for the check; None: images are not looked for.
    Raises:
        InputError: nothing was kept, the folder cannot be written to, or what was written does
            not pass `emrrg.data.r2gen.read_annotation`.
    """
    if not prepared.entries:
        why = ", ".join(prepared.reasons(5)) or "the source is empty"
        raise InputError(f"{output}: not written: no record was kept ({why})")
    content: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for entry in prepared.entries:
        content[entry["split"]].append(entry)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.write("\n")
        read_annotation(temporary, images or output.parent, check_files=images is not None)
        os.replace(temporary, output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_splits(path: Path) -> dict[str, str]:
    """Record id to split, from an annotation file.

    Raises:
        InputError: the file is no annotation.
    """
    records = read_annotation(path, path.parent, check_files=False, allow_empty_reports=True)
    return {record.id: split for split, group in records.items() for record in group}


def choose_section(sections: Mapping[str, str], section: Section) -> str:
    """The text that becomes the report, or "" where the study has none.

    Args:
        sections: section name to text.
        section: as in `prepare`.
    """
    texts = {name: text for name, text in sections.items() if text.strip()}
    findings, impression = texts.get("findings", ""), texts.get("impression", "")
    if section == "both":
        return f"{findings} {impression}" if findings and impression else ""
    if section == "either":
        return findings or impression or texts.get("last_paragraph", "") or texts.get("full", "")
    return texts.get(section, "")


class FileIndex:
    """Which files are under a folder; one listing instead of a question a file."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"--images: {folder}: no such folder")
        self.folder = folder
        self.by_stem: dict[str, list[str]] = defaultdict(list)
        """File name without folder and endings to the paths relative to the folder."""
        visited: set[str] = set()
        for root, folders, files in os.walk(folder, followlinks=True):
            if (real := os.path.realpath(root)) in visited:  # a link that leads back up
                folders.clear()
                continue
            visited.add(real)
            folders.sort()
            prefix = Path(root).relative_to(folder)
            for name in sorted(files):
                path = (prefix / name).as_posix()
                self.by_stem[name.split(".", 1)[0]].append(path)

    def find(self, stem: str) -> str | None:
        """The first file of this name, whatever its ending and folder."""
        return next(iter(self.by_stem.get(stem, ())), None)


def _entries(
    study: SourceStudy,
    images: Path | None,
    section: Section,
    views: Views,
    min_views: int,
    max_views: int | None,
    min_words: int,
) -> Iterator[dict[str, Any] | Dropped]:
    report = choose_section(study.sections, section)
    if not report:
        yield Dropped(study.id, f"no text in section {section!r}")
        return
    if len(report.split()) < min_words:
        yield Dropped(study.id, f"report of fewer than {min_words} words")
        return
    if not study.views:
        yield Dropped(study.id, "no images")
        return
    if len(study.views) < min_views:
        yield Dropped(study.id, f"fewer than {min_views} images")
        return
    there = [v for v in study.views if images is None or os.path.isfile(images / v.path)]
    if len(there) < min_views:
        reason = "image files not found" if not there else "image files missing"
        lost_file = next(v.path for v in study.views if v not in there)
        yield Dropped(study.id, reason, str((images or Path()) / lost_file))
        return
    chosen = _choose_views(there, views)[:max_views]
    if not chosen:
        yield Dropped(study.id, "no frontal view")
        return
    lost = len(study.views) - len(there)
    if views != "each":
        yield _entry(study, study.id, report, chosen, lost)
        return
    names = [Path(view.path).stem for view in chosen]
    if len(set(names)) < len(names):
        names = [str(number) for number in range(len(names))]
    for name, view in zip(names, chosen, strict=True):
        yield _entry(study, name, report, [view], lost)
        lost = 0


def _make_ids_unique(entries: Sequence[dict[str, Any]]) -> None:
    """Put the study before the names of images that several studies have, or that are numbers."""
    studies = defaultdict(set)
    for entry in entries:
        studies[entry["id"]].add(entry["study"])
    shared = any(len(names) > 1 for names in studies.values())
    for entry in entries:
        name, study = entry["id"], entry["study"]
        if (shared or name.isdecimal()) and not name.startswith(study):
            entry["id"] = f"{study}_{name}"


def _entry(
    study: SourceStudy, name: str, report: str, group: Sequence[View], lost: int
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": name,
        "report": report,
        "image_path": [view.path for view in group],
        "split": study.split or "",
        "study": study.id,
        "_lost": lost,
    }
    if any(view.position for view in group):
        entry["view"] = [view.position or "unknown" for view in group]
    if study.patient:
        entry["patient"] = study.patient
    if study.labels is not None:
        entry["labels"] = study.labels
    for name in KEPT_SECTIONS:
        if study.sections.get(name, "").strip() and study.sections[name] != report:
            entry[name] = study.sections[name]
    for key, value in study.attributes.items():
        if value not in (None, "", [], {}):
            entry.setdefault(key, value)
    return entry


def _choose_views(there: list[View], views: Views) -> list[View]:
    if views == "frontal":
        known = any(v.position for v in there)
        return [v for v in there if not known or v.position in ("PA", "AP", "FRONTAL")]
    if views == "one":
        return [min(there, key=lambda v: POSITIONS.index(v.position))]
    return there


def _check_options(section: str, views: str, fractions: Sequence[float]) -> None:
    if section not in get_args(Section):
        raise InputError(f"--section {section}: expected one of {', '.join(get_args(Section))}")
    if views not in get_args(Views):
        raise InputError(f"--views {views}: expected one of {', '.join(get_args(Views))}")
    if len(fractions) != 3 or min(fractions) < 0 or sum(fractions) <= 0:
        raise InputError(
            f"--fractions {','.join(map(str, fractions))}: expected three, such as 0.7,0.1,0.2"
        )
