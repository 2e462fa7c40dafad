"""Open-i (Indiana University, "IU X-ray"): the official reports and images.

Reports: ``NLMCXR_reports.tgz`` or its unpacked folder, 3,955 XML files. Images: the folder of
PNG (``CXR1_1_IM-0001-3001.png``) or DICOM files (``1/1_IM-0001-3001.dcm``), Kaggle's
(``1_IM-0001-3001.dcm.png``), or R2Gen's (``CXR1_1_IM-0001/0.png``); the names tell which.

R2Gen's 2,955 studies are those with a FINDINGS section and at least two images; a study's id is
the name of its first image without the last number, its report is that section, untouched.
Images: https://openi.nlm.nih.gov/faq (CC BY-NC-ND 4.0). The XML is parsed by the standard
library; a document type declaration, which these files do not have and which every attack by
entities needs, is refused.
"""

from __future__ import annotations

import csv
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from emrrg.data.preparing import FileIndex
from emrrg.data.records import Dropped, SourceStudy, View
from emrrg.errors import InputError

LARGEST = 4 * 2**20  # bytes of one report file; the largest real one has some 20 thousand


def studies(
    reports: Path, images: Path | None = None, projections: Path | None = None
) -> Iterator[SourceStudy | Dropped]:
    """Read every report.

    Args:
        reports: ``NLMCXR_reports.tgz`` or a folder of XML files (at any depth).
        images: folder of image files; None: images are named as Open-i's PNG download names them.
        projections: Kaggle's ``indiana_projections.csv`` (filename, projection), if there.
    Yields:
        One study a report, in the order of their numbers. Open-i names no patients.
    Raises:
        InputError: the reports or the images folder are not there, or a file is not Open-i's.
    """
    index = FileIndex(images) if images else None
    positions = _projections(projections) if projections else {}
    for name, content in sorted(_documents(reports), key=lambda item: _number(item[0])):
        yield _study(parse(content, name), index, positions)


def parse(content: bytes, name: str) -> ElementTree.Element:
    """Parse one XML report.

    Args:
        content: the file.
        name: for messages.
    Raises:
        InputError: no XML, too large, or with a document type declaration.
    """
    if len(content) > LARGEST:
        raise InputError(f"{name}: {len(content):,} bytes are too many for a report")
    parser = ElementTree.XMLParser(target=_NoDoctype(name))
    try:
        parser.feed(content)
        root = parser.close()
    except ElementTree.ParseError as error:
        raise InputError(f"{name}: not XML: {error}") from None
    if not isinstance(root, ElementTree.Element) or root.find("uId") is None:
        raise InputError(f"{name}: not an Open-i report (no uId)")
    return root


class _NoDoctype(ElementTree.TreeBuilder):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise InputError(f"{self.name}: has a document type declaration, which is not read")


def _documents(reports: Path) -> Iterator[tuple[str, bytes]]:
    if reports.is_dir():
        files = sorted(reports.rglob("*.xml"))
        if not files:
            raise InputError(f"--reports: {reports}: no XML files in it")
        for file in files:
            yield str(file), file.read_bytes()
        return
    try:
        with tarfile.open(reports) as archive:
            found = False
            for member in archive:
                if not member.isfile() or not member.name.endswith(".xml"):
                    continue
                found = True
                file_in = archive.extractfile(member)
                assert file_in is not None  # isfile
                yield f"{reports}:{member.name}", file_in.read(LARGEST + 1)
    except FileNotFoundError:
        raise InputError(f"--reports: {reports}: no such file or folder") from None
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]  # tarfile tells of every compression it tried
        raise InputError(f"--reports: {reports}: not a readable tar archive: {reason}") from None
    if not found:
        raise InputError(f"--reports: {reports}: no XML files in it")


def _study(
    root: ElementTree.Element, index: FileIndex | None, positions: dict[str, str]
) -> SourceStudy | Dropped:
    uid = _attribute(root, "uId")
    names = [image.get("id", "") for image in root.iter("parentImage")]
    if not names:
        return Dropped(uid, "no images")
    sections = {
        label.lower(): text.text or ""
        for text in root.iter("AbstractText")
        if (label := text.get("Label", ""))
    }
    identity = names[0].rsplit("-", 1)[0]
    mesh = [e.text for e in root.iter("major") if e.text and e.text != "normal"]
    return SourceStudy(
        id=identity,
        sections=sections,
        views=tuple(_views(identity, names, index, positions)),
        attributes={
            "uid": uid,
            "mesh": mesh,
            "license": root.findtext("licenseURL", ""),
        },
    )


def _views(
    identity: str, names: list[str], index: FileIndex | None, positions: dict[str, str]
) -> Iterator[View]:
    if index is not None and index.find("0") and (index.folder / identity).is_dir():
        for path in sorted((index.folder / identity).iterdir(), key=lambda p: _number(p.name)):
            yield View(f"{identity}/{path.name}")
        return
    for name in names:
        stem = name.removeprefix("CXR")
        found = index and (index.find(name) or index.find(stem))
        yield View(found or f"{name}.png", positions.get(stem, ""))


def _projections(path: Path) -> dict[str, str]:
    kinds = {"frontal": "FRONTAL", "lateral": "LATERAL"}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return {
                row["filename"].split(".", 1)[0]: kinds.get(row["projection"].lower(), "")
                for row in csv.DictReader(file)
            }
    except OSError as error:
        raise InputError(f"--projections: {path}: {error.strerror or error}") from None
    except (KeyError, AttributeError):
        raise InputError(f"--projections: {path}: needs the columns filename, projection") from None


def _attribute(root: ElementTree.Element, tag: str) -> str:
    element = root.find(tag)
    return "" if element is None else element.get("id", "")


def _number(name: str) -> tuple[int, str]:
    """Sort 2.xml before 10.xml."""
    match = re.search(r"(\d+)\.[^./]*$", name)
    return (int(match[1]) if match else 0, name)
