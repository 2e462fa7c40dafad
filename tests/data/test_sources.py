"""`python -m emrrg.data prepare`: each source's layout, made here in small, to records."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emrrg.data import openi, padchest
from emrrg.data.__main__ import main
from emrrg.data.preparing import FileIndex, choose_section, prepare, split_by_group
from emrrg.data.r2gen import read_annotation
from emrrg.data.records import SourceStudy, View
from emrrg.errors import InputError

SHARED = Path(__file__).parents[2] / "../shared/data"
OPENI = SHARED / "openi"


def run(*arguments: object) -> dict[str, dict[str, Any]]:
    """Run prepare; the records of the file it wrote, by id."""
    words = [str(a) for a in arguments]
    assert main(["prepare", *words]) == 0
    content = json.loads(Path(words[words.index("--output") + 1]).read_text())
    return {record["id"]: record for group in content.values() for record in group}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def picture(path: Path, value: int = 99) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)
    return path


# Open-i


def openi_xml(uid: str, images: list[str], findings: str = "Clear.", impression: str = "") -> bytes:
    parents = "".join(f'<parentImage id="{name}"/>' for name in images)
    return (
        f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="{uid}"/>'
        "<licenseURL>http://creativecommons.org/licenses/by-nc-nd/4.0/</licenseURL>"
        "<MedlineCitation><Article><Abstract>"
        f'<AbstractText Label="FINDINGS">{findings}</AbstractText>'
        f'<AbstractText Label="IMPRESSION">{impression}</AbstractText>'
        "</Abstract></Article></MedlineCitation><MeSH><major>Edema/mild</major></MeSH>"
        f"{parents}</eCitation>"
    ).encode()


@pytest.mark.skipif(not OPENI.exists(), reason="the Open-i reports are not there")
def test_r2gens_iu_xray_studies_are_rebuilt_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split_file = OPENI / "r2gen_iu_xray_annotation.json"
    original = json.loads(split_file.read_text())
    run(
        "openi", "--reports", OPENI / "NLMCXR_reports.tgz", "--split-from", split_file,
        "--output", tmp_path / "a.json", "--dropped", tmp_path / "dropped.csv",
    )  # fmt: skip
    rebuilt = json.loads((tmp_path / "a.json").read_text())
    for split, count in (("train", 2069), ("val", 296), ("test", 590)):
        expected = {record["id"]: record["report"] for record in original[split]}
        got = {record["id"]: record["report"] for record in rebuilt[split]}
        assert len(expected) == count
        assert got == expected
    said = capsys.readouterr().out
    assert "kept     2,955 records" in said and "dropped  1,000" in said
    assert "514: no text in section 'findings'" in said
    with open(tmp_path / "dropped.csv") as file:
        reasons = Counter(row["reason"] for row in csv.DictReader(file))
    assert reasons == {
        "no text in section 'findings'": 514,
        "fewer than 2 images": 382,
        "no images": 104,
    }


def make_openi(folder: Path) -> Path:
    """Three reports as a tgz."""
    archive = folder / "reports.tgz"
    reports = {
        "1": openi_xml("CXR1", ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"], "One.", "Fine."),
        "10": openi_xml("CXR10", ["CXR10_IM-0002-1001", "CXR10_IM-0002-2001"], "", "Ten."),
        "2": openi_xml("CXR2", ["CXR2_IM-0652-1001"], "Two.", "Fine."),
    }
    with tarfile.open(archive, "w:gz") as file:
        for name, content in reports.items():
            member = tarfile.TarInfo(f"ecgen-radiology/{name}.xml")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return archive


@pytest.mark.parametrize("layout", ["official", "kaggle", "dicom", "r2gen"])
def test_openi_images_by_any_layout(layout: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    expected = {
        "official": ["CXR1_1_IM-0001-3001.png", "CXR1_1_IM-0001-4001.png"],
        "kaggle": ["1_1_IM-0001-3001.dcm.png", "1_1_IM-0001-4001.dcm.png"],
        "dicom": ["1/1_1_IM-0001-3001.dcm", "1/1_1_IM-0001-4001.dcm"],
        "r2gen": ["CXR1_1_IM-0001/0.png", "CXR1_1_IM-0001/1.png"],
    }[layout]
    for name in expected:
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(b"any")
    records = run(
        "openi", "--reports", make_openi(tmp_path), "--images", images,
        "--output", tmp_path / "a.json",
    )  # fmt: skip
    assert list(records) == ["CXR1_1_IM-0001"]
    record = records["CXR1_1_IM-0001"]
    assert record["image_path"] == expected
    assert record["report"] == "One." and record["impression"] == "Fine."
    assert record["uid"] == "CXR1" and record["mesh"] == ["Edema/mild"]


@pytest.mark.skipif(os.name != "posix", reason="makes a symbolic link")
def test_a_link_in_a_circle_is_followed_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}/{name}.png")
        (tmp_path / name / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    picture(tmp_path / "elsewhere/c.png")
    (tmp_path / "a/c").symlink_to(tmp_path / "elsewhere")
    index = FileIndex(tmp_path)
    assert (index.find("a"), index.find("b"), index.find("c")) == (
        "a/a.png",
        "b/b.png",
        "a/c/c.png",
    )
    assert sum(map(len, index.by_stem.values())) == 3


def test_openi_sections_and_projections(tmp_path: Path) -> None:
    reports, output = make_openi(tmp_path), tmp_path / "a.json"
    got = {}
    for section in ("findings", "impression", "both", "either"):
        records = run(
            "openi", "--reports", reports, "--output", output, "--section", section,
            "--min-views", 1,
        )  # fmt: skip
        got[section] = {k: r["report"] for k, r in records.items()}
    one, two, ten = "CXR1_1_IM-0001", "CXR2_IM-0652", "CXR10_IM-0002"
    assert [study.id for study in openi.studies(reports)] == [one, two, ten]
    assert got == {
        "findings": {one: "One.", two: "Two."},
        "impression": {one: "Fine.", two: "Fine.", ten: "Ten."},
        "both": {one: "One. Fine.", two: "Two. Fine."},
        "either": {one: "One.", two: "Two.", ten: "Ten."},
    }
    rows = [
        {"uid": "1", "filename": "1_1_IM-0001-3001.dcm.png", "projection": "Lateral"},
        {"uid": "1", "filename": "1_1_IM-0001-4001.dcm.png", "projection": "Frontal"},
    ]
    table = write_csv(tmp_path / "projections.csv", rows)
    records = run(
        "openi", "--reports", reports, "--output", output, "--projections", table,
        "--views", "one",
    )  # fmt: skip
    assert records[one]["image_path"] == ["CXR1_1_IM-0001-4001.png"]
    assert records[one]["view"] == ["FRONTAL"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "b">]><eCitation>&a;</eCitation>',
         "document type"),
        ('<?xml version="1.0" encoding="utf-16"?><!DOCTYPE x SYSTEM "file:///etc/passwd"><x/>'
         .encode("utf-16"), "document type"),
        (b"<eCitation><uId id='CXR1'/>", "not XML"),
        (b"<html><body/></html>", "not an Open-i report"),
        (b" " * (4 * 2**20 + 1), "too many"),
    ],
)  # fmt: skip
def test_openi_refuses_hostile_and_broken_xml(content: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        openi.parse(content, "reports/1.xml")
    assert "reports/1.xml" in str(caught.value)


@pytest.mark.parametrize("broken", ["missing.tgz", "text.tgz", "empty", "cut.tgz"])
def test_openi_names_what_cannot_be_read(broken: str, tmp_path: Path) -> None:
    (tmp_path / "text.tgz").write_text("not an archive")
    (tmp_path / "empty").mkdir()
    whole = make_openi(tmp_path).read_bytes()
    (tmp_path / "cut.tgz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=broken):
        run("openi", "--reports", tmp_path / broken, "--output", tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()


# MIMIC-CXR

MIMIC_REPORT = """                                 FINAL REPORT
 INDICATION:  Cough.

 COMPARISON:  ___.

 FINDINGS:
 Lungs of {study} are clear.

 IMPRESSION:
 Normal.
"""


def make_mimic(root: Path, reports_as: str = "folder") -> Path:
    """Two patients, four studies: two views; one lateral; no findings; no report file."""
    images = [
        ("10000032", "50414267", "d1", "LATERAL", "train"),
        ("10000032", "50414267", "d2", "AP", "train"),
        ("10000032", "50414268", "d3", "LL", "train"),
        ("11000001", "51000001", "d4", "PA", "validate"),
        ("11000001", "51000002", "d5", "PA", "validate"),
        ("12000001", "52000001", "d6", "", "test"),
    ]
    split, metadata, texts = [], [], {}
    for patient, study, image, view, part in images:
        split.append({"dicom_id": image, "study_id": study, "subject_id": patient, "split": part})
        metadata.append(
            {"dicom_id": image, "subject_id": patient, "study_id": study, "ViewPosition": view,
             "PerformedProcedureStepDescription": "CHEST (PA AND LAT)",
             "StudyDate": "21800507" if study.endswith("7") else "21800506",
             "StudyTime": "213014.531"}
        )  # fmt: skip
        name = f"p{patient[:2]}/p{patient}/s{study}"
        picture(root / "files" / name / f"{image}.jpg")
        if study == "51000001":
            texts[name] = " FINAL REPORT\n IMPRESSION:  Only an impression.\n"
        elif study != "51000002":
            texts[name] = MIMIC_REPORT.format(study=study)
    write_csv(root / "mimic-cxr-2.0.0-split.csv.gz", split)
    write_csv(root / "mimic-cxr-2.0.0-metadata.csv.gz", metadata)
    label = {"subject_id": "10000032", "study_id": "50414267", "Edema": "1.0", "Fracture": "-1.0",
             "Pneumonia": "0.0", "Atelectasis": ""}  # fmt: skip
    write_csv(root / "mimic-cxr-2.0.0-chexpert.csv", [label])
    if reports_as == "zip":
        with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w") as archive:
            for name, text in texts.items():
                archive.writestr(f"files/{name}.txt", text)
    elif reports_as == "folder":
        for name, text in texts.items():
            file = root / "mimic-cxr-reports/files" / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    else:
        rows = [
            {"study": Path(n).name, "findings": f"Lungs of {Path(n).name[1:]} are clear.",
             "impression": ""} for n in texts if not n.endswith("51000001")
        ]  # fmt: skip
        write_csv(root / "mimic_cxr_sectioned.csv", rows)
    return root


@pytest.mark.parametrize("reports_as", ["folder", "zip", "sectioned"])
def test_mimic(reports_as: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_mimic(tmp_path / "mimic", reports_as)
    records = run("mimic_cxr", "--root", root, "--images", root, "--output", tmp_path / "a.json")
    said = capsys.readouterr().out
    assert list(records) == ["s50414267", "s50414268", "s52000001"]
    assert "1: no report file" in said or reports_as == "sectioned"
    first = records["s50414267"]
    folder = "files/p10/p10000032/s50414267"
    assert first["image_path"] == [f"{folder}/d1.jpg", f"{folder}/d2.jpg"]
    assert first["view"] == ["LATERAL", "AP"] and first["patient"] == "10000032"
    assert first["report"] == "Lungs of 50414267 are clear."
    assert first["labels"] == {"Edema": 1, "Fracture": -1, "Pneumonia": 0, "Atelectasis": None}
    assert [r["split"] for r in records.values()] == ["train", "train", "test"]
    assert [r["earlier_studies"] for r in records.values()] == [1, 0, 0]
    assert "labels" not in records["s50414268"]
    loaded = read_annotation(tmp_path / "a.json", root)
    assert loaded["train"][0].labels == first["labels"]


def test_mimic_views(tmp_path: Path) -> None:
    root = make_mimic(tmp_path / "mimic")
    got = {}
    for views in ("one", "frontal", "each"):
        records = run(
            "mimic_cxr", "--root", root, "--images", root / "files", "--views", views,
            "--section", "either", "--output", tmp_path / "a.json",
        )  # fmt: skip
        got[views] = {k: [Path(p).stem for p in r["image_path"]] for k, r in records.items()}
    assert records["d4"]["split"] == "val"
    assert got["one"] == {
        "s50414267": ["d2"], "s50414268": ["d3"], "s51000001": ["d4"], "s52000001": ["d6"]
    }  # fmt: skip
    assert got["frontal"] == {"s50414267": ["d2"], "s51000001": ["d4"], "s52000001": ["d6"]}
    assert got["each"] == {k: [k] for k in ("d1", "d2", "d3", "d4", "d6")}


def test_mimic_missing_parts_are_named(tmp_path: Path) -> None:
    root = make_mimic(tmp_path / "mimic")
    arguments = ["mimic_cxr", "--root", root, "--output", tmp_path / "a.json"]
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InputError, match="not one of the images"):
        run(*arguments, "--images", tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"mimic-cxr-2\*-negbio.*--labels none goes without"):
        run(*arguments, "--labels", "negbio")
    with pytest.raises(InputError, match="none: no such file or folder"):
        run(*arguments, "--reports", tmp_path / "none")
    (root / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    write_csv(root / "mimic-cxr-2.0.0-split.csv", [{"dicom_id": "d", "split": "train"}])
    with pytest.raises(InputError, match="no column 'study_id'"):
        run(*arguments)


# CheXpert Plus


def make_chexpert(folder: Path) -> Path:
    rows = []
    for patient in range(1, 11):
        for study in (1, 2):
            for view, side in ((1, "Frontal"), (2, "Lateral")):
                path = f"train/patient{patient:05}/study{study}/view{view}_{side.lower()}"
                rows.append(
                    {"path_to_image": f"{path}.jpg", "path_to_dcm": f"{path}.dcm",
                     "frontal_lateral": side, "ap_pa": "AP" if view == 1 else "",
                     "deid_patient_id": f"patient{patient:05}",
                     "patient_report_date_order": f"{study}.0",
                     "report": f"NARRATIVE:\nChest\n\nFINDINGS:\nClear {patient}.\n",
                     "section_findings": f"Clear {patient}." if study == 1 else "",
                     "section_impression": "1. Normal.", "section_history": "Cough.",
                     "age": "61.0", "sex": "Female", "race": "Asian", "split": "train"}
                )  # fmt: skip
                picture(folder / "PNG" / f"{path}.png")
    return write_csv(folder / "df_chexpert_plus_240401.csv", rows)


def test_chexpert_plus(tmp_path: Path) -> None:
    table = make_chexpert(tmp_path)
    labels = tmp_path / "findings_fixed.json"
    labels.write_text(
        json.dumps({"path_to_image": "train/patient00003/study1/view1_frontal.jpg",
                    "Edema": None, "No Finding": 1.0, "Pneumonia": 0.0}) + "\n"
    )  # fmt: skip
    records = run(
        "chexpert_plus", "--table", table, "--images", tmp_path / "PNG", "--labels", labels,
        "--output", tmp_path / "a.json", "--views", "frontal", "--section", "impression",
    )  # fmt: skip
    assert len(records) == 20
    third = records["patient00003_study1"]
    assert third["image_path"] == ["train/patient00003/study1/view1_frontal.png"]
    assert third["labels"] == {"Edema": None, "No Finding": 1, "Pneumonia": 0}
    assert (third["age"], third["sex"], third["indication"]) == ("61.0", "Female", "Cough.")
    assert third["earlier_studies"] == 0 and records["patient00003_study2"]["earlier_studies"] == 1
    splits: dict[str, set[str]] = {}
    for record in records.values():
        splits.setdefault(record["patient"], set()).add(record["split"])
    assert all(len(held) == 1 for held in splits.values())  # no patient is divided
    assert Counter(next(iter(held)) for held in splits.values()) == {
        "train": 7, "val": 1, "test": 2
    }  # fmt: skip
    each = run("chexpert_plus", "--table", table, "--output", tmp_path / "c.json",
               "--views", "each")  # fmt: skip
    assert len(each) == 20  # images of all studies have the same two names
    assert each["patient00003_study1_view2_lateral"]["view"] == ["LATERAL"]
    kept = run("chexpert_plus", "--table", table, "--output", tmp_path / "b.json",
               "--split-by", "source")  # fmt: skip
    assert len(kept) == 10 and {r["split"] for r in kept.values()} == {"train"}


# PadChest


def test_padchest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def row(
        image: str, study: str, projection: str, labels: list[str], **more: str
    ) -> dict[str, Any]:
        report = (
            "sin hallazgos patologicos ." if "normal" in labels else "cardiomegalia . derrame ."
        )
        return {"": "7", "ImageID": f"{image}.png", "ImageDir": "0", "StudyDate_DICOM": "20140915",
                "StudyID": study, "PatientID": f"p{study}", "PatientBirth": "1930.0",
                "PatientSex_DICOM": "F", "Projection": projection, "Report": report,
                "MethodLabel": "Physician", "Labels": str(labels), **more}  # fmt: skip

    rows = [
        row("a", "1", "PA", ["normal"]),
        row("b", "1", "L", ["normal"]),
        row("c", "2", "AP_horizontal", [" cardiomegaly", "pleural effusion", "goiter"]),
        row("d", "3", "EXCLUDE", ["normal"]),
        row("e", "4", "PA", ["exclude"]),
        row("f", "5", "COSTAL", [], Labels=""),
    ]
    table = write_csv(tmp_path / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", rows)
    for name in "abcdef":
        deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 500
        (tmp_path / "images/0").mkdir(parents=True, exist_ok=True)
        Image.fromarray(deep).save(tmp_path / f"images/0/{name}.png")
    records = run(
        "padchest", "--table", table, "--images", tmp_path / "images",
        "--output", tmp_path / "a.json",
    )  # fmt: skip
    assert sorted(records) == ["1", "2", "5"]
    assert records["1"]["image_path"] == ["0/a.png", "0/b.png"]
    assert records["1"]["view"] == ["PA", "LATERAL"]
    assert (records["1"]["age"], records["1"]["sex"], records["1"]["language"]) == (84, "F", "es")
    assert records["5"]["image_path"] == ["0/f.png"] and "view" not in records["5"]
    assert records["2"]["report"] == "cardiomegalia . derrame ."
    positive = [name for name, value in records["2"]["labels"].items() if value == 1]
    assert positive == ["Cardiomegaly", "Pleural Effusion"]
    assert len(records["2"]["labels"]) == 14 and "labels" not in records["5"]
    assert records["2"]["padchest_labels"] == ["cardiomegaly", "pleural effusion", "goiter"]
    said = capsys.readouterr().out
    assert "1: projection EXCLUDE" in said and "1: labelled exclude" in said
    rows[0]["Labels"] = "normal"
    with pytest.raises(InputError, match="Labels must be a list"):
        run("padchest", "--table", write_csv(tmp_path / "b.csv", rows), "--output", tmp_path / "b")


def test_padchest_labels_in_spanish() -> None:
    found = padchest.to_chexpert(["Cardiomegalia", "NEUMOTÓRAX", "derrame  pleural", "bocio"])
    assert {k for k, v in found.items() if v} == {
        "Cardiomegaly", "Pneumothorax", "Pleural Effusion"
    }  # fmt: skip
    assert found["Edema"] is None and len(found) == 14  # not said is not absent
    assert padchest.unknown_labels(["bocio", "normal"]) == {"bocio": 1}


# Tables


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "csv.gz", "semicolon.csv"])
def test_tables_of_every_format(kind: str, tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b.png", "c.png"):
        picture(tmp_path / name)
    rows: list[dict[str, Any]] = [
        {"Study_ID": "s1", "Image": "a/1.png|a/2.png", "Report": 'Said "clear", so.\nTwice.',
         "Split": "Training", "Patient": "p1", "Edema": "1", "scanner": "x"},
        {"Study_ID": "s2", "Image": "b.png", "Report": "Größe normal.", "Split": "validate",
         "Patient": "p2", "Edema": "", "scanner": "y"},
        {"Study_ID": "s3", "Image": "c.png", "Report": "", "Split": "test", "Patient": "p3",
         "Edema": "0", "scanner": "z"},
    ]  # fmt: skip
    file = tmp_path / f"table.{kind}"
    if kind == "jsonl":
        rows[0]["Image"] = ["a/1.png", "a/2.png"]
        file.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif kind == "json":
        file.write_text(json.dumps(rows), encoding="utf-8-sig")
    else:
        write_csv(file, rows)
    if kind in ("tsv", "semicolon.csv"):
        mark = "\t" if kind == "tsv" else ";"
        with open(file, "w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, list(rows[0]), delimiter=mark)
            writer.writeheader()
            writer.writerows(rows)
    records = run("tabular", "--table", file, "--images", tmp_path, "--output", tmp_path / "a.json")
    assert list(records) == ["s1", "s2"]
    assert records["s1"]["image_path"] == ["a/1.png", "a/2.png"]
    assert records["s1"]["report"] == 'Said "clear", so.\nTwice.'
    assert (records["s1"]["split"], records["s2"]["split"]) == ("train", "val")
    assert (records["s1"]["patient"], records["s1"]["scanner"]) == ("p1", "x")
    assert (records["s1"]["labels"], records["s2"]["labels"]) == ({"Edema": 1}, {"Edema": None})
    assert records["s2"]["report"] == "Größe normal."


def test_table_rows_of_one_id_are_one_study(tmp_path: Path) -> None:
    rows = [
        {"id": "s1", "file": "1.dcm", "view": "L", "text": "FINDINGS: Clear. IMPRESSION: Normal."},
        {"id": "s1", "file": "2.dcm", "view": "PA", "text": ""},
        {"id": "s2", "file": "3.dcm", "view": "PA", "text": "One."},
        {"id": "s2", "file": "4.dcm", "view": "PA", "text": "Another."},
        {"id": "", "file": "5.dcm", "view": "PA", "text": "Nobody's."},
    ]
    table = write_csv(tmp_path / "t.csv", rows)
    records = run(
        "tabular", "--table", table, "--output", tmp_path / "a.json", "--parse-sections",
        "--section", "impression", "--views", "one", "--dropped", tmp_path / "d.csv",
    )  # fmt: skip
    assert list(records) == ["s1"]
    assert (records["s1"]["report"], records["s1"]["image_path"]) == ("Normal.", ["2.dcm"])
    with open(tmp_path / "d.csv") as file:
        assert [tuple(row) for row in csv.reader(file)] == [
            ("id", "reason", "detail"),
            ("row 5", "no id", ""),
            ("s2", "rows of the same id have different texts", ""),
        ]


def test_table_views_in_columns_of_their_own(tmp_path: Path) -> None:
    rows = [{"front": "a.png", "side": "b.png", "text": "Clear."},
            {"front": "c.png", "side": "", "text": "Clear."}]  # fmt: skip
    table = write_csv(tmp_path / "t.csv", rows)
    arguments = ("tabular", table, "--output", tmp_path / "a.json", "--image-column")
    records = run(*arguments, "front,side")
    assert records["row1"]["image_path"] == ["a.png", "b.png"]
    assert records["row2"]["image_path"] == ["c.png"]
    assert not {"front", "side"} & {*records["row1"], *records["row2"]}
    with pytest.raises(InputError, match=r"--image-column back: .*has no such column"):
        run(*arguments, "front,back")


def test_table_sections_in_columns_or_in_the_text(tmp_path: Path) -> None:
    rows = [{"image": "a.png", "Findings": "Clear.", "Impression": "Normal."},
            {"image": "b.png", "Findings": "", "Impression": "Only this."}]  # fmt: skip
    columns = write_csv(tmp_path / "columns.csv", rows)
    rows = [{"image": "a.png", "text": "FINDINGS: Clear. IMPRESSION: Normal."},
            {"image": "b.png", "text": "IMPRESSION: Only this."}]  # fmt: skip
    texts = write_csv(tmp_path / "texts.csv", rows)
    expected = {
        "findings": ["Clear."], "impression": ["Normal.", "Only this."],
        "both": ["Clear. Normal."], "either": ["Clear.", "Only this."],
    }  # fmt: skip
    for section, reports in expected.items():
        for table in (columns, texts):
            records = run("tabular", table, "--output", tmp_path / "a", "--section", section)
            got = [records[name]["report"] for name in sorted(records)]
            assert got == reports, (section, table.name)


def test_table_columns_by_name_and_without_ids(tmp_path: Path) -> None:
    rows = [{"x": f"{k}.png", "y": f"Text {k}.", "z": f"p{k}"} for k in range(10)]
    table = write_csv(tmp_path / "t.csv", rows)
    with pytest.raises(InputError, match="no column found for the image; it has x, y, z"):
        run("tabular", "--table", table, "--output", tmp_path / "a.json")
    names = ("--image-column", "x", "--text-column", "y", "--patient-column", "z")
    records = run("tabular", "--table", table, "--output", tmp_path / "a.json", *names)
    assert list(records["row1"]["image_path"]) == ["0.png"]
    assert Counter(r["split"] for r in records.values()) == {"train": 7, "val": 1, "test": 2}
    with pytest.raises(InputError, match="--view-column w"):
        run("tabular", "--table", table, "--output", tmp_path / "b", "--view-column", "w")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("sep=;\r\nimage;text\r\na\\b.png;Fine, clear.\r\n", "excel.csv"),
        ('image,text,\na/b.png,"Fine, clear.",\n', "commas.csv"),
        ('image,text\na\\b.png,"Fine, clear.",,\n', "trailing.csv"),
        ('[{"image": "a\\\\b.png", "text": "Fine, clear.", "age": NaN, "Edema": NaN},'
         ' {"image": "a/b.png", "text": NaN}]', "pandas.json"),
        ('{"image": "a/b.png", "text": "Fine, clear.", "age": NaN, "Edema": NaN}', "pandas.jsonl"),
    ],
)  # fmt: skip
def test_tables_as_programs_write_them(content: str, name: str, tmp_path: Path) -> None:
    """Excel's first line, Windows paths, commas at the end of a line, and NaN for nothing."""
    (tmp_path / name).write_bytes(content.encode())
    picture(tmp_path / "a/b.png")
    records = run(
        "tabular", tmp_path / name, "--images", tmp_path, "--output", tmp_path / "out.json"
    )
    assert list(records) == ["row1"]
    assert (records["row1"]["report"], records["row1"]["image_path"]) == (
        "Fine, clear.", ["a/b.png"]
    )  # fmt: skip
    assert "age" not in records["row1"]
    assert records["row1"].get("labels") in (None, {"Edema": None})


@pytest.mark.parametrize("view", [None, 3, True, {"a": 1}, [None], ["PA", 3]])
def test_odd_views_and_half_characters_stop_nothing(view: Any, tmp_path: Path) -> None:
    """A JSON string may hold half a surrogate pair, which no file can."""
    record = {
        "id": "a\ud83d",
        "report": "Clear \ud83d here.",
        "image_path": ["a.png"],
        "view": view,
    }
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"train": [record]}))
    records = run("r2gen", file, "--output", tmp_path / "b.json", "--dropped", tmp_path / "d.csv")
    assert records["a?"]["report"] == "Clear ? here."
    assert main(["check", str(file), "--output", str(tmp_path / "page")]) == 1  # no a.png
    (tmp_path / "t.jsonl").write_text(json.dumps(record | {"image": "a.png", "view": None}))
    assert list(run("tabular", tmp_path / "t.jsonl", "--output", tmp_path / "c.json")) == ["a?"]


def test_nothing_is_no_id(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text('[{"id": null, "image": "a.png", "text": "x"}, {"id": NaN, "image": "b.png", '
                    '"text": "y"}, {"id": 7, "image": "c.png", "text": "z"}]')  # fmt: skip
    assert list(run("tabular", file, "--output", tmp_path / "a.json")) == ["7"]


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ("", "t.csv", "no rows"),
        ("image,text\n", "t.csv", "no rows"),
        ("\nimage,text\na.png,fine\n", "t.csv", "line 1 is empty"),
        ("image,text\na.png,one, two\n", "t.csv", "line 2: more fields"),
        ("image,text\nnull,\0\n", "t.csv", "image files not found"),
        ('{"image": "a.png"', "t.jsonl", "line 1: not JSON"),
        ("[1, 2]", "t.json", "list of objects"),
        ("image,text,Edema\na.png,x,maybe\n", "t.csv", r"t\.csv: row1: label 'Edema': 'maybe'"),
        (b"\xff\xfe\xff", "t.csv", "UTF-8"),
        ('image,text\na.png,fine\nb.png,"open\nc.png,lost\n', "t.csv", "line 3: a quotation mark"),
        ('image,"text\na.png,fine\n', "t.csv", "line 1: a quotation mark"),
        ('image,text\na.png,fine,"open\n', "t.csv", "line 2: a quotation mark"),
        ("image,text\na.png,fine\n", "t.csv", "1: image files not found, the first: .*a.png"),
        (b"not gzip", "t.csv.gz", "cannot be read"),
    ],
)
def test_broken_tables_are_named(
    content: str | bytes, name: str, says: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says):
        run("tabular", "--table", file, "--images", tmp_path, "--output", tmp_path / "a.json")
    assert not (tmp_path / "a.json").exists()


# An annotation file as a source, and what all sources share


def test_annotation_is_mended_and_divided_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "a.png")
    good = [
        {"id": f"s{k}", "report": f"Study {k}.", "image_path": ["a.png"], "patient": f"p{k // 2}"}
        for k in range(20)
    ]
    bad = [
        {"id": "s1", "report": "Again.", "image_path": ["a.png"]},
        {"id": "gone", "report": "Lost.", "image_path": ["b.png"]},
        {"id": "mute", "report": "", "image_path": ["a.png"]},
        {"id": "loose", "report": "No images."},
    ]
    (tmp_path / "in.json").write_text(json.dumps({"train": [*good, *bad]}))
    arguments = ["r2gen", "--annotation", tmp_path / "in.json", "--images", tmp_path]
    records = run(*arguments, "--output", tmp_path / "out.json", "--split-by", "patient")
    assert list(records.keys() - {g["id"] for g in good}) == [] and len(records) == 20
    assert Counter(r["split"] for r in records.values()) == {"train": 14, "val": 2, "test": 4}
    for k in range(0, 20, 2):
        assert records[f"s{k}"]["split"] == records[f"s{k + 1}"]["split"]
    said = capsys.readouterr().out
    for reason in ("is also that of", "image files not found", "no text", "no 'image_path'"):
        assert reason in said
    kept = run(*arguments, "--output", tmp_path / "out.json")
    assert {r["split"] for r in kept.values()} == {"train"}


@pytest.mark.skipif(not SHARED.exists(), reason="the sample data is not there")
def test_the_sample_passes_through_unchanged(tmp_path: Path) -> None:
    sample = SHARED / "xray-sample"
    records = run(
        "r2gen", "--annotation", sample / "annotation.json", "--images", sample / "images",
        "--output", tmp_path / "a.json",
    )  # fmt: skip
    original = json.loads((sample / "annotation.json").read_text())
    for split, group in original.items():
        for entry in group:
            got = records[entry["id"]]
            assert got["split"] == split
            assert got["report"] == entry["report"] and got["image_path"] == entry["image_path"]


def test_a_record_of_its_own_for_each_view_loses_none() -> None:
    def ids(*studies: tuple[str, list[str]]) -> list[str]:
        made = [SourceStudy(n, {"full": "Clear."}, tuple(map(View, paths))) for n, paths in studies]
        prepared = prepare(made, section="full", views="each")
        assert not prepared.dropped
        return [entry["id"] for entry in prepared.entries]

    assert ids(("s1", ["a.png", "b.png"]), ("s2", ["c.png"])) == ["a", "b", "c"]
    assert ids(("s1", ["x/0.png", "x/1.png"]), ("s2", ["y/2.png"])) == ["s1_0", "s1_1", "s2_2"]
    assert ids(("s1", ["x/pa.png"]), ("s2", ["y/pa.png", "y/s2_z.png"])) == [
        "s1_pa", "s2_pa", "s2_z"
    ]  # fmt: skip
    assert ids(("s1", ["pa/i.png", "lat/i.png"]), ("s2", ["j.png"])) == ["s1_0", "s1_1", "j"]


def test_splits_meet_their_shares_and_divide_no_group() -> None:
    rng = np.random.default_rng(0)
    groups = [f"p{k}" for k in rng.integers(0, 300, 2000)]
    splits = split_by_group(groups, (0.7, 0.1, 0.2), seed=0)
    counts = Counter(splits)
    for split, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        assert abs(counts[split] / 2000 - share) < 0.01
    of_group: dict[str, set[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        of_group.setdefault(group, set()).add(split)
    assert all(len(held) == 1 for held in of_group.values())
    assert split_by_group(groups, (0.7, 0.1, 0.2), seed=0) == splits
    assert split_by_group(groups, (0.7, 0.1, 0.2), seed=1) != splits
    by_name = dict(zip(groups, splits, strict=True))
    shuffled = groups[::-1]
    assert split_by_group(shuffled, (0.7, 0.1, 0.2), seed=0) == [by_name[g] for g in shuffled]
    assert set(split_by_group(groups, (1, 0, 0), seed=0)) == {"train"}


@pytest.mark.parametrize(
    ("count", "fractions", "expected"),
    [
        (1, (0.7, 0.1, 0.2), (1, 0, 0)),
        (2, (0.7, 0.1, 0.2), (1, 0, 1)),
        (3, (0.7, 0.1, 0.2), (1, 1, 1)),
        (4, (0.7, 0.1, 0.2), (2, 1, 1)),
        (3, (0.8, 0, 0.2), (2, 0, 1)),
        (2, (0.1, 0.1, 0.8), (1, 0, 1)),
        (30, (0.7, 0.1, 0.2), (21, 3, 6)),
    ],
)
def test_few_groups_leave_no_split_empty_that_training_needs(
    count: int, fractions: tuple[float, ...], expected: tuple[int, ...]
) -> None:
    for seed in range(5):
        splits = Counter(split_by_group([f"p{k}" for k in range(count)], fractions, seed))
        assert tuple(splits[s] for s in ("train", "val", "test")) == expected


def test_a_split_that_is_empty_is_told() -> None:
    made = [SourceStudy(f"s{k}", {"full": "Clear."}, (View("a.png"),)) for k in range(2)]
    prepared = prepare(made, section="full")
    [note] = [line for line in prepared.summary().splitlines() if line.startswith("note")]
    assert "no val records, so training will keep its last weights" in note
    assert "--split-by patient" in note and "(train 1, val 0, test 1)" in prepared.summary()
    whole = prepare([replace(s, id=f"{s.id}{k}") for s in made for k in "ab"], section="full")
    assert "note" not in whole.summary()
    of_source = prepare([replace(s, split="val") for s in made], section="full", split_by="source")
    notes = [line for line in of_source.summary().splitlines() if line.startswith("note")]
    assert ["no train" in notes[0], "no test" in notes[1], len(notes)] == [True, True, 2]


def test_choose_section() -> None:
    sections = {"findings": " ", "impression": "I.", "last_paragraph": "L.", "full": "All."}
    chosen = {
        s: choose_section(sections, s) for s in ("findings", "impression", "both", "either", "full")
    }  # type: ignore[arg-type]
    assert chosen == {
        "findings": "", "impression": "I.", "both": "", "either": "I.", "full": "All."
    }  # fmt: skip
    assert choose_section({"last_paragraph": "L.", "full": "All."}, "either") == "L."


def test_views_and_words_are_bounded() -> None:
    views = tuple(View(f"{k}.png", p) for k, p in enumerate(("LATERAL", "", "PA", "AP")))
    study = SourceStudy("s", {"findings": "Two words"}, views)
    assert len(prepare([study], max_views=2).entries[0]["image_path"]) == 2
    assert prepare([study], views="one").entries[0]["image_path"] == ["2.png"]
    assert prepare([study], min_words=3).dropped[0].reason == "report of fewer than 3 words"
    assert prepare([study], min_views=5).dropped[0].reason == "fewer than 5 images"
    each = prepare([study], views="each").entries
    assert [e["id"] for e in each] == ["s_0", "s_1", "s_2", "s_3"]
    assert len({e["split"] for e in each}) == 1 and {e["study"] for e in each} == {"s"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["openi", "--output", "a.json"], "--reports: needed with openi"),
        (["openi", "--reports", "x"], "output"),
        (["padchest", "--table", "t", "--output", "a", "--root", "r"], "--root: not used with"),
        (["nowhere", "--output", "a"], "nowhere"),
        (["tabular", "--table", "t", "--output", "a", "--fractions", "0.5,0.5"], "three"),
        (["tabular", "--table", "t", "--output", "a", "--min-views", "0"], "--min-views"),
        (["tabular", "--table", "t", "--output", "a", "--images", "/none"], "no such folder"),
        (["mimic_cxr", "--root", "r", "--output", "a", "--labels", "x"], "--labels x"),
        (["openi", "a", "b", "--output", "c"], "b: openi takes one file or folder"),
        (["openi", "a", "--reports", "b", "--output", "c"], "a: openi takes one file or folder"),
    ],
)
def test_flags_are_checked(arguments: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        main(["prepare", *arguments])


def test_the_source_may_follow_its_name(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [{"image": "a.png", "text": "Clear.", "split": "test"}])
    run("tabular", "--table", table, "--output", tmp_path / "flag.json")
    run("tabular", table, "--output", tmp_path / "place.json")
    texts = [(tmp_path / name).read_text() for name in ("flag.json", "place.json")]
    assert texts[0] == texts[1] and "Clear." in texts[0]


def test_nothing_is_written_where_nothing_is_kept(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "t.csv", [{"image": "a.png", "text": ""}])
    with pytest.raises(InputError, match="no record was kept"):
        run("tabular", "--table", table, "--output", tmp_path / "a.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv"]
    good = write_csv(tmp_path / "g.csv", [{"image": "a.png", "text": "Clear."}])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run("tabular", "--table", good, "--output", tmp_path / "file/a.json")
