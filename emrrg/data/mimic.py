"""MIMIC-CXR: the tables and images of MIMIC-CXR-JPG and the report files of MIMIC-CXR.

    root/mimic-cxr-2.0.0-split.csv.gz     dicom_id, study_id, subject_id, split
    root/mimic-cxr-2.0.0-metadata.csv.gz  dicom_id, ViewPosition, StudyDate, StudyTime, ...
    root/mimic-cxr-2.0.0-chexpert.csv.gz  subject_id, study_id, 14 observations
    images  files/p10/p10000032/s50414267/<dicom_id>.jpg (or .png, .dcm)
    reports files/p10/p10000032/s50414267.txt, in a folder or in mimic-cxr-reports.zip; or
            mimic_cxr_sectioned.csv, which MIMIC's own tools write

https://physionet.org/content/mimic-cxr-jpg/ (credentialed access).
"""

from __future__ import annotations

import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emrrg.data.records import Dropped, SourceStudy, View
from emrrg.data.reports import parse_sections
from emrrg.data.tables import find_table, read_labels, read_rows
from emrrg.errors import InputError

SPLIT_NAMES = {"train": "train", "validate": "val", "test": "test"}
VIEW_POSITIONS = {"PA": "PA", "AP": "AP", "LATERAL": "LATERAL", "LL": "LATERAL"}
LARGEST = 2**20  # bytes of one report


def studies(
    root: Path, reports: Path | None = None, images: Path | None = None, labels: str = "chexpert"
) -> Iterator[SourceStudy | Dropped]:
    """Join the tables by study.

    Args:
        root: folder of the tables.
        reports: folder, ``.zip`` or sectioned CSV of reports; None: looked for in root.
        images: folder of images (that which holds ``files``, or ``files`` itself); None: not
            looked for.
        labels: ``chexpert`` or ``negbio`` (the table of that name), or ``none``.
    Yields:
        One study each, in the order of the split table.
    Raises:
        InputError: a table, the reports or a column is missing.
    """
    split_rows = read_rows(
        find_table(root, "mimic-cxr-2*-split", "--root"),
        ("dicom_id", "study_id", "subject_id", "split"),
    )
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in split_rows:
        grouped[row["subject_id"], row["study_id"]].append(row)
    metadata = {
        row["dicom_id"]: row
        for row in read_rows(find_table(root, "mimic-cxr-2*-metadata", "--root"), ("dicom_id",))
    }
    observations: dict[str, dict[str, int | None]] = {}
    if labels != "none":
        try:
            table = find_table(root, f"mimic-cxr-2*-{labels}", "--root")
        except InputError as error:
            raise InputError(f"{error}; --labels none goes without") from None
        for row in read_rows(table, ("study_id",)):
            observations[row["study_id"]] = read_labels(row, f"{table}: {row['study_id']}")
    earlier = _earlier_studies(grouped, metadata)
    read_report = _report_reader(reports or _find_reports(root))
    prefix, ending = _image_layout(images, grouped)

    for (subject, study), rows in grouped.items():
        identity = f"s{study}"
        splits = {row["split"] for row in rows}
        if len(splits) > 1 or not splits <= SPLIT_NAMES.keys():
            yield Dropped(identity, f"split {' and '.join(sorted(splits))!r}")
            continue
        sections = read_report(subject, study)
        if sections is None:
            yield Dropped(identity, "no report file")
            continue
        folder = f"{prefix}p{subject[:2]}/p{subject}/s{study}/"
        first = metadata.get(rows[0]["dicom_id"], {})
        yield SourceStudy(
            id=identity,
            sections=sections,
            views=tuple(
                View(
                    f"{folder}{row['dicom_id']}{ending}",
                    VIEW_POSITIONS.get(
                        metadata.get(row["dicom_id"], {}).get("ViewPosition", ""), ""
                    ),
                )
                for row in rows
            ),
            patient=subject,
            split=SPLIT_NAMES[splits.pop()],
            labels=observations.get(study),
            attributes={
                "date": first.get("StudyDate"),
                "procedure": first.get("PerformedProcedureStepDescription"),
                "earlier_studies": earlier.get(study),
            },
        )


def _earlier_studies(
    grouped: dict[tuple[str, str], list[dict[str, Any]]], metadata: dict[str, dict[str, Any]]
) -> dict[str, int]:
    """How many studies of the same patient came before, by date and time."""
    times: dict[str, list[tuple[str, float, str]]] = defaultdict(list)
    for (subject, study), rows in grouped.items():
        first = metadata.get(rows[0]["dicom_id"], {})
        if date := first.get("StudyDate"):
            times[subject].append((date, float(first.get("StudyTime") or 0), study))
    return {
        study: rank for dated in times.values() for rank, (_, _, study) in enumerate(sorted(dated))
    }


def _find_reports(root: Path) -> Path:
    for name in ("mimic-cxr-reports.zip", "mimic-cxr-reports", "mimic_cxr_sectioned.csv", "files"):
        if (root / name).exists():
            return root / name
    raise InputError(
        f"--reports: none found in {root}: name the folder or zip of report text files "
        "(mimic-cxr-reports.zip of MIMIC-CXR)"
    )


def _report_reader(reports: Path) -> Callable[[str, str], dict[str, str] | None]:
    """A function from subject and study to the report's sections, or None."""
    if not reports.exists():
        raise InputError(f"--reports: {reports}: no such file or folder")
    if reports.name.endswith((".csv", ".csv.gz")):
        table = {
            str(row["study"]): {k: v for k, v in row.items() if k != "study" and v}
            for row in read_rows(reports, ("study", "findings", "impression"))
        }
        return lambda subject, study: table.get(f"s{study}")
    if reports.is_dir():
        base = reports / "files" if (reports / "files").is_dir() else reports

        def from_folder(subject: str, study: str) -> dict[str, str] | None:
            file = base / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"
            if not file.is_file():
                return None
            return _sections(file.read_bytes(), str(file))

        return from_folder
    try:
        archive = zipfile.ZipFile(reports)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"--reports: {reports}: not a readable zip archive: {error}") from None
    members = {Path(name).stem: name for name in archive.namelist() if name.endswith(".txt")}

    def from_zip(subject: str, study: str) -> dict[str, str] | None:
        name = members.get(f"s{study}")
        if name is None:
            return None
        try:
            with archive.open(name) as file:
                return _sections(file.read(LARGEST + 1), f"{reports}:{name}")
        except (zipfile.BadZipFile, EOFError, OSError) as error:
            raise InputError(f"--reports: {reports}: {name}: cannot be read: {error}") from None

    return from_zip


def _sections(content: bytes, name: str) -> dict[str, str]:
    if len(content) > LARGEST:
        raise InputError(f"{name}: more than {LARGEST:,} bytes are too many for a report")
    text = content.decode("utf-8", errors="replace")
    return {**parse_sections(text), "full": " ".join(text.split())}


def _image_layout(
    images: Path | None, grouped: dict[tuple[str, str], list[dict[str, Any]]]
) -> tuple[str, str]:
    """What stands before p10/ and behind the image id, judged by the first image found."""
    if images is None:
        return "files/", ".jpg"
    if not images.is_dir():
        raise InputError(f"--images: {images}: no such folder")
    for (subject, study), rows in grouped.items():
        for prefix in ("files/", ""):
            folder = images / prefix / f"p{subject[:2]}" / f"p{subject}" / f"s{study}"
            for row in rows:
                for ending in (".jpg", ".png", ".dcm"):
                    if (folder / f"{row['dicom_id']}{ending}").is_file():
                        return prefix, ending
    raise InputError(
        f"--images: {images}: not one of the images of the split table is in it "
        "(expected files/p10/p10000032/s50414267/<id>.jpg)"
    )
