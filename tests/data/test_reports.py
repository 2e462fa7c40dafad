"""Report cleaning, against what R2Gen's own code leaves."""

from __future__ import annotations

import hashlib
import string
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from emrrg.data.reports import clean_report, parse_sections, replace_marks
from emrrg.errors import InputError

OPENI = Path(__file__).parents[2] / "../shared/data/openi/NLMCXR_reports.tgz"


@pytest.mark.parametrize(
    ("raw", "iu_xray", "mimic_cxr"),
    [
        ("The HEART is normal. Lungs are clear.", *["the heart is normal . lungs are clear ."] * 2),
        ("1. No change. 2. Stable, T11. Left < right", *["no change . stable t1left  right ."] * 2),
        ("2.5 cm and/or x-ray (PA): O'Neil", *["25 cm andor x-ray pa oneil ."] * 2),
        ("Clear..\n  No  effusion.. ", "clear.\n  no  effusion .", "clear . no effusion ."),
        ("Seen on ____ . Stable", "seen on  . stable .", "seen on  . stable ."),
        ("", *[" ."] * 2),
    ],
)
def test_r2gen_to_the_letter(raw: str, iu_xray: str, mimic_cxr: str) -> None:
    assert clean_report(raw, "iu_xray") == iu_xray.replace("clear.\n", "clear\n")
    assert clean_report(raw, "mimic_cxr") == mimic_cxr


def test_r2gen_deletes_these_signs_and_no_others() -> None:
    """Its character set has ":-[" in it: all that lies between, which are "; < = > ? @" too."""
    for sign in string.punctuation:
        kept = sign in "#$-`|~"
        for style in ("iu_xray", "mimic_cxr"):
            assert clean_report(f"a{sign}b", style) == f"a{sign if kept else ''}b .", (style, sign)


def test_r2gen_squeezes_so_often_and_no_more() -> None:
    """3 and 8 halvings of dots, 6 of blanks: what is over is left, and shows."""
    assert clean_report("1" + "." * 8 + " Stable", "iu_xray") == "stable ."
    assert clean_report("1" + "." * 9 + " Stable", "iu_xray") == "1 . stable ."
    assert clean_report("1" + "." * 256 + " Stable", "mimic_cxr") == "stable ."
    assert clean_report("1" + "." * 257 + " Stable", "mimic_cxr") == "1 . stable ."
    assert clean_report("a" + " " * 64 + "b", "mimic_cxr") == "a b ."
    assert clean_report("a" + " " * 65 + "b", "mimic_cxr") == "a  b ."


@pytest.mark.skipif(not OPENI.exists(), reason="the Open-i reports are not there")
def test_r2gen_on_the_whole_openi_corpus() -> None:
    """The digests are of what R2Gen's tokenizers.py returns for every section."""
    digests = {"iu_xray": hashlib.sha256(), "mimic_cxr": hashlib.sha256()}
    with tarfile.open(OPENI) as archive:
        names = sorted(n for n in archive.getnames() if n.endswith(".xml"))
        count = 0
        for name in names:
            member = archive.extractfile(name)
            assert member is not None
            for section in ElementTree.parse(member).iter("AbstractText"):
                count += 1
                for style, digest in digests.items():
                    cleaned = clean_report(section.text or "", style)  # type: ignore[arg-type]
                    digest.update(cleaned.encode() + b"\n")
    assert (len(names), count) == (3955, 15820)
    assert {style: digest.hexdigest() for style, digest in digests.items()} == {
        "iu_xray": "c2f040a245a730447514aec178d1e18efb7dbfc236e6299261f008b2e489125a",
        "mimic_cxr": "5e3a909523f91b75ea39338a4167e6ae37cb8e7b310707616b69c346b12b0680",
    }


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("1. No change. 2. Stable.", "no change . stable ."),
        ("Fracture of T11. No pneumothorax", "fracture of t11 . no pneumothorax ."),
        ("Nodule of 2.5 cm, atelectasis/infiltrate.", "nodule of 2.5 cm atelectasis infiltrate ."),
        ("Mid-thoracic x-ray (PA): SpO2 < 90%", "mid-thoracic x-ray pa spo2 90% ."),
        ("Clear..  . \nNo effusion!", "clear . no effusion ."),
        ("Heart size is\nnormal.No edema", "heart size is normal . no edema ."),
        (" \n", ""),
    ],
)
def test_plain_has_none_of_the_accidents(raw: str, plain: str) -> None:
    assert clean_report(raw, "plain") == plain


def test_marks() -> None:
    raw = "XXXX atelectasis, seen on ___. [**Name**] xxxx-year-old"
    assert replace_marks(raw) == "atelectasis, seen on. -year-old"
    assert clean_report(raw, "plain", marks="mask") == (
        "xxxx atelectasis seen on xxxx . xxxx xxxx -year-old ."
    )
    assert clean_report("Normal chest x-XXXX.", "iu_xray") == "normal chest x-xxxx ."
    assert clean_report("Normal chest XXXX.", "iu_xray", marks="drop") == "normal chest ."


def test_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="'iu'"):
        clean_report("x", "iu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="keep, drop or mask"):
        clean_report("x", marks="hide")  # type: ignore[arg-type]


class TestSections:
    def test_mimic_report(self) -> None:
        text = (
            "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n"
            " INDICATION:  ___ year old woman with effusion // effusion\n \n COMPARISON:  ___\n \n"
            " FINDINGS: \n \n Large left pleural effusion is new.  Small\n right effusion. Level\n"
            " T11: normal.\n \n IMPRESSION: \n \n Large left effusion\n"
        )
        assert parse_sections(text) == {
            "examination": "CHEST (PA AND LAT)",
            "indication": "___ year old woman with effusion // effusion",
            "comparison": "___",
            "findings": (
                "Large left pleural effusion is new. Small right effusion. Level T11: normal."
            ),
            "impression": "Large left effusion",
        }

    def test_report_without_findings_gives_its_last_paragraph(self) -> None:
        text = (
            " WET READ: ___ 5:30 PM\n  No pneumonia.\n ________________________________________\n"
            "                 FINAL REPORT\n CHEST, TWO VIEWS: ___\n \n HISTORY:  Cough.\n \n"
            " COMPARISON:  None.\n \n The lungs are clear.\n \n Dr. ___ was told.\n"
        )
        assert parse_sections(text) == {
            "wet read": "___ 5:30 PM No pneumonia.",
            "history": "Cough.",
            "comparison": "None.",
            "last_paragraph": "The lungs are clear. Dr. ___ was told.",
        }

    def test_names_are_brought_together(self) -> None:
        for heading in ("IMPRESSION", "IMPRESSOIN", "Impression", "CONCLUSION", "IMPRESIÓN"):
            assert parse_sections(f"{heading}: Normal.") == {"impression": "Normal."}
        for heading in ("FINDINGS", "PA AND LATERAL CHEST VIEWS", "PORTABLE AP CHEST", "HALLAZGOS"):
            assert parse_sections(f"{heading}: Clear.") == {"findings": "Clear."}
        assert parse_sections("ACCESSION NUMBER: 7")["accession number"] == "7"

    def test_a_heading_may_have_a_line_of_its_own(self) -> None:
        text = "COMPARISON\r\nNone.\r\n\r\nFINDINGS\r\nClear. No\r\nimpression of a mass.\r\n" \
               "Impression \r\nNormal.\r\n"  # fmt: skip
        assert parse_sections(text) == {
            "comparison": "None.",
            "findings": "Clear. No impression of a mass.",
            "impression": "Normal.",
        }

    def test_the_last_findings_with_text_count(self) -> None:
        text = "FINDINGS: Old.\nTECHNIQUE: a\nFINDINGS: New.\nTECHNIQUE: b\nFINDINGS: ___\n"
        assert parse_sections(text) == {"findings": "New.", "technique": "a b"}

    def test_one_line(self) -> None:
        text = "INDICATION: Cough. FINDINGS: No findings: none. Clear. Impression: Normal."
        assert parse_sections(text) == {
            "indication": "Cough.",
            "findings": "No findings: none. Clear.",
            "impression": "Normal.",
        }

    def test_text_without_headings(self) -> None:
        assert parse_sections("Lungs clear.\n\nHeart normal.") == {
            "last_paragraph": "Lungs clear. Heart normal."
        }
        assert parse_sections(" \n ") == {}
