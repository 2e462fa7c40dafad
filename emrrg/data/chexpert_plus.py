"""CheXpert Plus: one table of images with their reports, already divided into sections.

    df_chexpert_plus_240401.csv   path_to_image, path_to_dcm, frontal_lateral, ap_pa,
                                  deid_patient_id, patient_report_date_order, report,
                                  section_findings, section_impression, ..., age, sex, ..., split
    images  train/patient42142/study5/view1_frontal.jpg (or .png, or the DICOM files)
    labels  chexbert_labels/findings_fixed.json, one JSON object a line, if wanted

Its own split has train and a validation part of 200 patients, no test part; without
``--split-by source`` a new one is made by patient.
https://aimi.stanford.edu/datasets/chexpert-plus (research use agreement).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emrrg.data.records import Dropped, SourceStudy, View
from emrrg.data.tables import read_labels, read_rows
from emrrg.errors import InputError

SPLIT_NAMES = {"train": "train", "valid": "val", "validate": "val", "val": "val", "test": "test"}
ATTRIBUTES = (
    "age", "sex", "race", "ethnicity", "interpreter_needed", "insurance_type", "recent_bmi",
    "deceased",
)  # fmt: skip
_STUDY = re.compile(r"(patient\d+)/(study\d+)")


def studies(
    table: Path, images: Path | None = None, labels: Path | None = None
) -> Iterator[SourceStudy | Dropped]:
    """Group the table's images by study.

    Args:
        table: the CSV file.
        images: folder that ``train/`` and ``valid/`` stand in; None: not looked for.
        labels: a file of CheXbert labels; None: no labels.
    Yields:
        One study each, in the table's order.
    Raises:
        InputError: a file or a column is missing.
    """
    observations = _labels(labels) if labels else {}
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, row in enumerate(read_rows(table, ("path_to_image", "deid_patient_id")), 1):
        match = _STUDY.search(row["path_to_image"])
        if match is None:
            yield Dropped(
                row["path_to_image"] or f"row {number}", "no patient and study in its path"
            )
            continue
        grouped[f"{match[1]}_{match[2]}"].append(row)
    ending = _ending(images, grouped)
    for identity, rows in grouped.items():
        first = rows[0]
        order = first.get("patient_report_date_order", "")
        sections = {
            name.removeprefix("section_"): text
            for name, text in first.items()
            if name.startswith("section_") and text
        }
        sections["full"] = first.get("report", "")
        if "indication" not in sections:
            sections["indication"] = sections.get("clinical_history") or sections.get("history", "")
        yield SourceStudy(
            id=identity,
            sections=sections,
            views=tuple(View(_path(row, ending), _position(row)) for row in rows),
            patient=first["deid_patient_id"] or identity.split("_")[0],
            split=SPLIT_NAMES.get(first.get("split", "")),
            labels=next(filter(None, (observations.get(r["path_to_image"]) for r in rows)), None),
            attributes={
                **{name: first.get(name) for name in ATTRIBUTES},
                "earlier_studies": int(float(order)) - 1 if _is_count(order) else None,
            },
        )


def _is_count(text: str) -> bool:
    return bool(re.fullmatch(r"[1-9]\d*(\.0+)?", text))


def _position(row: dict[str, Any]) -> str:
    side = row.get("frontal_lateral") or Path(row["path_to_image"]).stem
    if "lateral" in side.lower():
        return "LATERAL"
    position = row.get("ap_pa", "").upper()
    return position if position in ("AP", "PA") else "FRONTAL"


def _path(row: dict[str, Any], ending: str) -> str:
    if ending == ".dcm" and row.get("path_to_dcm"):
        return str(row["path_to_dcm"])
    return str(Path(row["path_to_image"]).with_suffix(ending).as_posix())


def _ending(images: Path | None, grouped: dict[str, list[dict[str, Any]]]) -> str:
    """How the image files end, judged by the first one found."""
    if images is None:
        return ".jpg"
    if not images.is_dir():
        raise InputError(f"--images: {images}: no such folder")
    for rows in grouped.values():
        for row in rows:
            for ending in (".png", ".jpg", ".dcm"):
                if (images / _path(row, ending)).is_file():
                    return ending
    raise InputError(
        f"--images: {images}: not one of the table's images is in it "
        "(expected train/patient.../study.../view1_frontal.png)"
    )


def _labels(path: Path) -> dict[str, dict[str, int | None]]:
    """Labels by image path; the files are JSON Lines, whatever their name."""
    rows = read_rows(path, ("path_to_image",), kind="jsonl")
    return {
        row["path_to_image"]: read_labels(row, f"{path}: {row['path_to_image']}") for row in rows
    }
