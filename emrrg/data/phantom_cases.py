"""What a phantom has: findings by hospital, side, zone and severity, and their prose.

The two synthetic hospitals (``source`` and ``target``) see another mix of findings and prefer
other phrases; their vocabularies overlap, as those of two departments do. A sentence about a
finding names that finding and no other, and what is denied is absent, so that the observations
drawn are exactly those that a faithful labeler reads in the report.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

Domain = Literal["source", "target"]
DOMAINS: tuple[Domain, ...] = ("source", "target")

# Shares of the studies with each of CheXpert's observations, in CheXpert's order, as asked for: a
# finding that finds no room (below), or is one too many, is left out.
RATES: dict[str, dict[Domain, float]] = {
    "Enlarged Cardiomediastinum": {"source": 0.06, "target": 0.12},
    "Cardiomegaly": {"source": 0.38, "target": 0.30},
    "Lung Opacity": {"source": 0.20, "target": 0.20},
    "Lung Lesion": {"source": 0.12, "target": 0.15},
    "Edema": {"source": 0.16, "target": 0.20},
    "Consolidation": {"source": 0.26, "target": 0.20},
    "Pneumonia": {"source": 0.08, "target": 0.08},
    "Atelectasis": {"source": 0.14, "target": 0.24},
    "Pneumothorax": {"source": 0.13, "target": 0.28},
    "Pleural Effusion": {"source": 0.36, "target": 0.36},
    "Pleural Other": {"source": 0.06, "target": 0.07},
    "Fracture": {"source": 0.08, "target": 0.09},
    "Support Devices": {"source": 0.18, "target": 0.36},
}
MOST = 4  # findings a study
NORMAL: dict[Domain, float] = {"source": 0.20, "target": 0.12}
"""Shares of the studies in which nothing at all is drawn."""

# Each side has three zones, and a zone holds one finding of the lung or pleura, so that none
# hides another; a large heart takes one, too.
ZONES = ("upper", "mid", "lower")
SIDES = ("right", "left")


@dataclass(frozen=True)
class Case:
    """A finding to be drawn and told."""

    observation: str
    """CheXpert's name."""
    kind: str
    """Which of the observation's forms: ``nodule`` or ``mass``, ``rib`` or ``clavicle``, ..."""
    side: str
    """``right``, ``left``, ``bilateral``, or ``central``."""
    zone: str
    """``upper``, ``mid``, ``lower``, or ``""`` where zones do not apply."""
    severity: str
    """``mild``, ``moderate``, ``severe``; ``small``, ``moderate``, ``large``; or ``""``."""


def sample_cases(rng: np.random.Generator, domain: Domain) -> list[Case]:
    """Draw the findings of one study.

    Args:
        rng: source of chance.
        domain: the hospital.
    Returns:
        Up to `MOST` cases, at most one an observation, in CheXpert's order; none in a normal study.
    """
    if rng.random() < NORMAL[domain]:
        return []
    while True:
        free = {(side, zone) for side in SIDES for zone in ZONES}
        present = [n for n in RATES if rng.random() < RATES[n][domain] / (1 - NORMAL[domain])]
        cases: dict[str, Case] = {}
        # What needs most room comes first; the rest in any order, so that none is favoured.
        wide = ("Cardiomegaly", "Pneumonia")
        for name in sorted(present, key=lambda n: (n not in wide, rng.random())):
            if len(cases) < MOST and (case := _place(name, free, rng)) is not None:
                cases[name] = case
        if cases:
            return [cases[name] for name in RATES if name in cases]


@cache
def _shares(weights: tuple[float, ...]) -> list[float]:
    """Where each option ends in 0 to 1."""
    ends = list(itertools.accumulate(weights))
    return [end / ends[-1] for end in ends]


def _place(name: str, free: set[tuple[str, str]], rng: np.random.Generator) -> Case | None:
    """One finding where there is room for it; None where there is none."""

    def pick(options: tuple[str, ...], weights: tuple[float, ...] | None = None) -> str:
        if weights is None:
            return options[int(rng.integers(len(options)))]
        return options[bisect.bisect_right(_shares(weights), rng.random())]

    def take(zones: tuple[str, ...]) -> tuple[str, str] | None:
        room = sorted(slot for slot in free if slot[1] in zones)
        if not room:
            return None
        slot = room[int(rng.integers(len(room)))]
        free.remove(slot)
        return slot

    mild = ("mild", "moderate", "severe")
    small = ("small", "moderate", "large")
    if name == "Cardiomegaly":
        severity = pick(mild, (3, 4, 3))
        if severity == "severe":
            free.discard(("left", "lower"))  # the heart covers it
        return Case(name, "heart", "central", "", severity)
    if name == "Enlarged Cardiomediastinum":
        return Case(name, "mediastinum", "central", "", "")
    if name == "Edema":
        return Case(name, "edema", "bilateral", "", pick(mild, (3, 4, 3)))
    if name == "Support Devices":
        kind = pick(("pacemaker", "tube", "catheter", "feeding", "tubes"), (4, 2, 3, 2, 2))
        side = "central"
        if kind == "pacemaker":
            side = pick(("left", "right"), (5, 1))
        elif kind == "catheter":
            side = pick(SIDES, (4, 1))
        return Case(name, kind, side, "", "")
    if name == "Fracture":
        return Case(name, pick(("clavicle", "rib"), (3, 2)), pick(SIDES), "", "")
    if name == "Pneumonia":
        free.difference_update({("right", "lower"), ("left", "lower")})
        return Case(name, "pneumonia", "bilateral", "lower", "")
    if name == "Pleural Effusion":
        if {("right", "lower"), ("left", "lower")} <= free and rng.random() < 0.3:
            free.difference_update({("right", "lower"), ("left", "lower")})
            return Case(name, "effusion", "bilateral", "lower", pick(small, (5, 4, 1)))
        if (slot := take(("lower",))) is None:
            return None
        severity = pick(small, (4, 4, 3))
        if severity == "large":
            free.discard((slot[0], "mid"))
        return Case(name, "effusion", slot[0], "lower", severity)
    zones = {
        "Pneumothorax": ("upper",),
        "Pleural Other": ("upper",),
        "Atelectasis": ("lower",),
    }.get(name, ZONES)
    if (slot := take(zones)) is None:
        return None
    side, zone = slot
    if name == "Pneumothorax":
        severity = pick(small, (3, 4, 3))
        if severity == "large":
            free.discard((side, "mid"))
        return Case(name, "pneumothorax", side, "upper", severity)
    if name == "Pleural Other":
        return Case(name, "thickening", side, "upper", "")
    if name == "Atelectasis":
        other = ("left" if side == "right" else "right", "lower")
        if other in free and rng.random() < 0.4:
            free.remove(other)
            side = "bilateral"
        return Case(name, "atelectasis", side, "lower", "")
    if name == "Lung Lesion":
        return Case(name, pick(("nodule", "mass")), side, zone, "")
    return Case(name, "consolidation" if name == "Consolidation" else "opacity", side, zone, "")


Phrases = tuple[tuple[str, float, float], ...]
# Phrase, its weight in the source hospital, its weight in the target hospital.
_HEART_NORMAL: Phrases = (
    ("the heart is normal in size", 4, 1),
    ("heart size is normal", 1, 4),
    ("the heart size is within normal limits", 1, 1),
)
_MEDIASTINUM_NORMAL: Phrases = (
    ("the mediastinum is normal", 3, 1),
    ("the mediastinal contours are normal", 1, 3),
)
_LUNGS_NORMAL: Phrases = (
    ("the lungs are clear", 4, 1),
    ("both lungs are clear", 1, 3),
    ("the lungs are well expanded and clear", 1, 1),
)
_PLEURA_NORMAL: Phrases = (
    ("there is no pleural effusion or pneumothorax", 3, 1),
    ("no pneumothorax or pleural effusion", 1, 3),
)
_NO_EFFUSION: Phrases = (("there is no pleural effusion", 3, 1), ("no pleural effusion", 1, 3))
_NO_PNEUMOTHORAX: Phrases = (("there is no pneumothorax", 3, 1), ("no pneumothorax", 1, 3))
_BONES_NORMAL: Phrases = (("the bones are intact", 3, 1), ("no displaced fracture", 1, 3))

_TOLD: dict[str, Phrases] = {
    "heart": (
        ("the heart is {how} enlarged", 4, 1),
        ("there is {severity} cardiomegaly", 1, 4),
        ("the cardiac silhouette is {how} enlarged", 1, 1),
    ),
    "mediastinum": (
        ("the mediastinum is widened", 3, 1),
        ("there is widening of the mediastinum", 1, 3),
    ),
    "edema": (
        ("there is {severity} pulmonary edema", 4, 1),
        ("{severity} pulmonary edema is present", 1, 4),
        ("perihilar haze due to {severity} pulmonary edema", 1, 1),
    ),
    "consolidation": (
        ("there is consolidation in the {side} {zone} {lung}", 4, 1),
        ("{side} {zone} {lung} consolidation", 1, 4),
        ("dense consolidation occupies the {side} {zone} {lung}", 1, 1),
    ),
    "opacity": (
        ("there is a patchy opacity in the {side} {zone} {lung}", 4, 1),
        ("patchy {side} {zone} {lung} opacity", 1, 4),
        ("an ill defined opacity projects over the {side} {zone} {lung}", 1, 1),
    ),
    "pneumonia": (
        ("there is multifocal pneumonia in both lungs", 3, 1),
        ("bilateral multifocal pneumonia", 1, 3),
    ),
    "nodule": (
        ("there is a nodule in the {side} {zone} {lung}", 4, 1),
        ("{side} {zone} {lung} nodule", 1, 4),
        ("a well defined nodule projects over the {side} {zone} {lung}", 1, 1),
    ),
    "mass": (
        ("there is a mass in the {side} {zone} {lung}", 4, 1),
        ("{side} {zone} {lung} mass", 1, 4),
        ("a round mass projects over the {side} {zone} {lung}", 1, 1),
    ),
    "atelectasis": (
        ("there is linear atelectasis at the {side} base", 4, 1),
        ("{side} basilar atelectasis", 1, 4),
        ("plate like atelectasis at the {side} lung base", 1, 1),
    ),
    "atelectasis bilateral": (
        ("there is linear atelectasis at both bases", 4, 1),
        ("bibasilar atelectasis", 1, 4),
    ),
    "pneumothorax": (
        ("there is a {severity} {side} pneumothorax", 4, 1),
        ("{severity} {side} pneumothorax is present", 1, 3),
        ("{severity} {side} apical pneumothorax", 1, 2),
    ),
    "effusion": (
        ("there is a {severity} {side} pleural effusion", 4, 1),
        ("{severity} {side} pleural effusion is present", 1, 4),
        ("{side} pleural effusion which is {severity} in size", 1, 1),
    ),
    "effusion bilateral": (
        ("there are {severity} bilateral pleural effusions", 4, 1),
        ("{severity} bilateral pleural effusions are present", 1, 4),
    ),
    "thickening": (
        ("there is {side} apical pleural thickening", 3, 1),
        ("{side} apical pleural thickening is present", 1, 3),
    ),
    "rib": (
        ("there is a displaced fracture of a {side} rib", 3, 1),
        ("displaced {side} rib fracture", 1, 3),
    ),
    "clavicle": (
        ("there is a displaced fracture of the {side} clavicle", 3, 1),
        ("displaced {side} clavicle fracture", 1, 3),
    ),
    "pacemaker": (
        ("there is a {side} pacemaker with leads in place", 3, 1),
        ("{side} chest wall pacemaker with intact leads", 1, 3),
    ),
    "tube": (
        ("there is an endotracheal tube in place", 3, 1),
        ("endotracheal tube tip is above the carina", 1, 3),
    ),
    "catheter": (
        ("there is a {side} central venous catheter in place", 3, 1),
        ("{side} central venous catheter with tip in the svc", 1, 3),
    ),
    "feeding": (
        ("there is a nasogastric tube in place", 3, 1),
        ("nasogastric tube extends below the diaphragm", 1, 3),
    ),
    "tubes": (
        ("there are endotracheal and nasogastric tubes in place", 3, 1),
        ("endotracheal and nasogastric tubes are present", 1, 3),
    ),
}
_LUNG: Phrases = (("zone", 4, 1), ("lung", 1, 4))
_ADVERBS = {"mild": "mildly", "moderate": "moderately", "severe": "severely"}
_PARENCHYMA = ("Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis")


def write_report(
    cases: list[Case], rng: np.random.Generator, domain: Domain
) -> tuple[str, dict[str, str]]:
    """Tell the findings, region by region: heart, mediastinum, lungs, pleura, bones, devices.

    Args:
        cases: what is there, at most one case an observation.
        rng: source of chance.
        domain: the hospital.
    Returns:
        The report, and for each observation the sentence (without its stop) that tells it.
    """

    def choose(phrases: Phrases) -> str:
        shares = _shares(tuple(phrase[1 + DOMAINS.index(domain)] for phrase in phrases))
        return phrases[bisect.bisect_right(shares, rng.random())][0]

    told: dict[str, str] = {}
    for case in cases:
        both = f"{case.kind} {case.side}"
        told[case.observation] = choose(_TOLD[both if both in _TOLD else case.kind]).format(
            severity=case.severity,
            how=_ADVERBS.get(case.severity, ""),
            side=case.side,
            zone=case.zone,
            lung=choose(_LUNG),
        )
    sentences = [told.get("Cardiomegaly") or choose(_HEART_NORMAL)]
    if "Enlarged Cardiomediastinum" in told:
        sentences.append(told["Enlarged Cardiomediastinum"])
    elif rng.random() < 0.15:
        sentences.append(choose(_MEDIASTINUM_NORMAL))
    lungs = [told[name] for name in _PARENCHYMA if name in told]
    sentences += lungs or [choose(_LUNGS_NORMAL)]
    pleura = [told[n] for n in ("Pleural Effusion", "Pneumothorax", "Pleural Other") if n in told]
    sentences += pleura
    if "Pleural Effusion" not in told and "Pneumothorax" not in told:
        sentences.append(choose(_PLEURA_NORMAL))
    elif "Pleural Effusion" not in told:
        sentences.append(choose(_NO_EFFUSION))
    elif "Pneumothorax" not in told:
        sentences.append(choose(_NO_PNEUMOTHORAX))
    if "Fracture" in told:
        sentences.append(told["Fracture"])
    elif rng.random() < 0.15:
        sentences.append(choose(_BONES_NORMAL))
    if "Support Devices" in told:
        sentences.append(told["Support Devices"])
    return " . ".join(sentences) + " .", told
