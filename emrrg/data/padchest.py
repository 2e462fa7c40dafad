"""PadChest: one table of images with Spanish reports and labels.

    PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv (or .gz)
        ImageID, ImageDir, StudyDate_DICOM, StudyID, PatientID, PatientBirth, PatientSex_DICOM,
        Projection, Report, MethodLabel, Labels, ...
    images  0/<ImageID> (as unpacked, by ImageDir) or all in one folder; 16-bit PNG

Reports are Spanish, in lower case, without accents, and have no sections. Labels name what is
there in a tree of 174 findings; `CHEXPERT` says which of them make which CheXpert observation
(they say nothing of what is absent). Spanish names of the common ones are understood too.
https://bimcv.cipf.es/bimcv-projects/padchest/ (request form).
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from emrrg.data.preparing import FileIndex
from emrrg.data.records import Dropped, SourceStudy, View
from emrrg.data.tables import read_rows
from emrrg.errors import InputError
from emrrg.metrics.clinical import OBSERVATIONS

PROJECTIONS = {
    "PA": "PA", "AP": "AP", "AP_horizontal": "AP", "AP Supine": "AP", "L": "LATERAL", "COSTAL": "",
}  # fmt: skip

CHEXPERT: dict[str, tuple[str, ...]] = {
    "No Finding": ("normal", "sin hallazgos", "sin hallazgos patologicos"),
    "Enlarged Cardiomediastinum": (
        "mediastinal enlargement", "superior mediastinal enlargement",
        "ensanchamiento mediastinico",
    ),
    "Cardiomegaly": ("cardiomegaly", "cardiomegalia"),
    "Lung Opacity": (
        "infiltrates", "interstitial pattern", "ground glass pattern", "alveolar pattern",
        "reticular interstitial pattern", "reticulonodular interstitial pattern",
        "miliary opacities", "increased density", "infiltrado", "infiltrados", "opacidad",
        "patron intersticial", "patron alveolar", "vidrio deslustrado", "aumento de densidad",
    ),
    "Lung Lesion": (
        "nodule", "multiple nodules", "pulmonary mass", "mass", "lung metastasis", "cavitation",
        "nodulo", "nodulos", "masa", "masa pulmonar", "metastasis pulmonar",
    ),
    "Edema": ("pulmonary edema", "kerley lines", "edema pulmonar", "edema", "lineas de kerley"),
    "Consolidation": ("consolidation", "air bronchogram", "consolidacion", "broncograma aereo"),
    "Pneumonia": ("pneumonia", "atypical pneumonia", "neumonia", "neumonia atipica"),
    "Atelectasis": (
        "atelectasis", "total atelectasis", "lobar atelectasis", "segmental atelectasis",
        "laminar atelectasis", "round atelectasis", "atelectasis basal", "atelectasia",
        "atelectasia laminar", "atelectasias",
    ),
    "Pneumothorax": ("pneumothorax", "hydropneumothorax", "neumotorax", "hidroneumotorax"),
    "Pleural Effusion": (
        "pleural effusion", "loculated pleural effusion", "loculated fissural effusion",
        "hydropneumothorax", "empyema", "hemothorax", "derrame pleural", "derrame",
        "hidroneumotorax", "empiema", "hemotorax",
    ),
    "Pleural Other": (
        "pleural thickening", "apical pleural thickening", "calcified pleural thickening",
        "pleural plaques", "calcified pleural plaques", "pleural mass", "fissure thickening",
        "minor fissure thickening", "major fissure thickening", "engrosamiento pleural",
        "placas pleurales",
    ),
    "Fracture": (
        "fracture", "rib fracture", "callus rib fracture", "vertebral fracture",
        "clavicle fracture", "humeral fracture", "vertebral compression", "fractura",
        "fractura costal", "fractura vertebral", "aplastamiento vertebral",
    ),
    "Support Devices": (
        "electrical device", "pacemaker", "dual chamber device", "single chamber device",
        "nsg tube", "endotracheal tube", "tracheostomy tube", "chest drain tube",
        "ventriculoperitoneal drain tube", "gastrostomy tube", "central venous catheter",
        "central venous catheter via subclavian vein", "central venous catheter via jugular vein",
        "central venous catheter via umbilical vein", "reservoir central venous catheter",
        "catheter", "artificial heart valve", "artificial mitral heart valve",
        "artificial aortic heart valve", "marcapasos", "tubo endotraqueal", "sonda nasogastrica",
        "cateter venoso central", "drenaje pleural", "dispositivo", "reservorio",
    ),
}  # fmt: skip
"""CheXpert observation to the PadChest labels, and their Spanish names, that mean it."""

_MEANING = {
    label: tuple(name for name, labels in CHEXPERT.items() if label in labels)
    for labels_ in CHEXPERT.values()
    for label in labels_
}


def studies(table: Path, images: Path | None = None) -> Iterator[SourceStudy | Dropped]:
    """Group the table's images by study.

    Args:
        table: the CSV file.
        images: folder of images; None: not looked for, and named as ``ImageDir/ImageID``.
    Yields:
        One study each, in the table's order. Images marked EXCLUDE are dropped.
    Raises:
        InputError: a file or a column is missing, or Labels is no list.
    """
    index = FileIndex(images) if images else None
    grouped: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_rows(table, ("ImageID", "StudyID", "PatientID", "Projection", "Report")):
        if row["Projection"] not in PROJECTIONS:
            yield Dropped(row["ImageID"], f"projection {row['Projection'] or 'unknown'}")
        else:
            grouped[row["StudyID"]].append(row)
    for identity, rows in grouped.items():
        first = rows[0]
        labels = _labels(first.get("Labels", ""), f"{table}: {first['ImageID']}")
        if "exclude" in labels:
            yield Dropped(identity, "labelled exclude")
            continue
        report = first["Report"]
        yield SourceStudy(
            id=identity,
            sections={"full": report, "findings": report},
            views=tuple(_view(row, index) for row in rows),
            patient=first["PatientID"],
            labels=to_chexpert(labels) if first.get("Labels") else None,
            attributes={
                "language": "es",
                "padchest_labels": labels,
                "label_method": first.get("MethodLabel"),
                "sex": first.get("PatientSex_DICOM"),
                "age": _age(first),
                "date": first.get("StudyDate_DICOM"),
            },
        )


def to_chexpert(labels: Iterable[str]) -> dict[str, int | None]:
    """PadChest's labels, or Spanish names, as CheXpert observations.

    Args:
        labels: names of findings, in any case, with or without accents.
    Returns:
        All 14 observations; 1 where a label means it, else None.
    """
    found: dict[str, int | None] = dict.fromkeys(OBSERVATIONS)
    for label in labels:
        for name in _MEANING.get(_plain(label), ()):
            found[name] = 1
    return found


def unknown_labels(labels: Iterable[str]) -> Counter[str]:
    """How often labels occur that mean no CheXpert observation (most of the 174 do not)."""
    return Counter(label for label in labels if _plain(label) not in _MEANING)


def _plain(label: str) -> str:
    return " ".join(label.lower().translate(str.maketrans("áéíóúüñ", "aeiouun")).split())


def _labels(text: str, where: str) -> list[str]:
    if not text:
        return []
    try:
        labels = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        labels = None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise InputError(f"{where}: Labels must be a list such as ['normal'], not {text[:60]!r}")
    return [plain for label in labels if (plain := " ".join(label.split()))]


def _view(row: dict[str, Any], index: FileIndex | None) -> View:
    name = row["ImageID"]
    found = index and index.find(name.split(".", 1)[0])
    folder = f"{row['ImageDir']}/" if row.get("ImageDir") else ""
    return View(found or f"{folder}{name}", PROJECTIONS[row["Projection"]])


def _age(row: dict[str, Any]) -> int | None:
    """Years, to within one: only the year of birth is known."""
    date, birth = row.get("StudyDate_DICOM", ""), row.get("PatientBirth", "")
    if not re.match(r"\d{4}", date) or not re.match(r"\d{4}", birth):
        return None
    return int(date[:4]) - int(birth[:4])
