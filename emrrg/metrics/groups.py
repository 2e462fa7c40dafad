"""Studies divided by a column of the annotation: view, sex, age band, or any other."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emrrg.errors import InputError

Groups = dict[str, dict[str, list[int]]]
"""Column to value to the places of the studies that have it."""

UNKNOWN = "unknown"
AGE_LIMITS = (18, 40, 60, 80)
"""Years at which the age bands begin."""

_YES_OR_NO = {"yes": True, "true": True, "y": True, "no": False, "false": False, "n": False}
_MOST_VALUES = 20
_NUMBERS_AS_THEY_ARE = 10
_AGE = re.compile(r"^0*(\d+(?:\.\d+)?) ?([ymwd]?)(?:ears?|onths?|eeks?|ays?|rs?)?\.?\+?$")
_YEARS = {"": 1.0, "y": 1.0, "m": 1 / 12, "w": 1 / 52.18, "d": 1 / 365.25}


def group_studies(columns: Mapping[str, Sequence[Any]]) -> Groups:
    """Divide studies by each of some columns.

    Numbers of which there are more than ten different ones are put in bands: ages (a column with
    "age" in its name; years, or DICOM's 063Y) from 18, 40, 60 and 80 years, others by quartiles.
    Several views of a study are one value ("LATERAL+PA"). Empty and missing values are "unknown".

    Args:
        columns: name to one value a study.
    Returns:
        Name to value to the places of its studies, in the order of the values.
    Raises:
        InputError: a column has more than twenty different values that are no numbers.
    """
    return {name: _group(name, list(values)) for name, values in columns.items()}


def known_priors(values: Sequence[Any], names: Sequence[str], where: str) -> list[bool | None]:
    """Whether studies have an earlier one, from a column of the annotation.

    Args:
        values: one a study: a number of earlier studies, yes or no, a list of them, or nothing.
        names: of the studies, for messages.
        where: file and column, for messages.
    Returns:
        None where the column says nothing.
    Raises:
        InputError: another value.
    """
    priors: list[bool | None] = []
    for name, value in zip(names, values, strict=True):
        text = str(value).strip().lower()
        number = _number(text)
        if value is None or text in ("", "nan"):
            priors.append(None)
        elif isinstance(value, bool | list):
            priors.append(bool(value))
        elif text in _YES_OR_NO:
            priors.append(_YES_OR_NO[text])
        elif number is not None:
            priors.append(number > 0)
        else:
            raise InputError(f"{where}: study {name}: {value!r} is neither yes, no nor a number")
    return priors


def _group(name: str, values: list[Any]) -> dict[str, list[int]]:
    texts = [_text(value) for value in values]
    is_age = re.search(r"(?:^|[^a-z])age(?:[^a-z]|$)", name.lower()) is not None
    numbers = [_years(text) if is_age else _number(text) for text in texts]
    known = [i for i, text in enumerate(texts) if text != UNKNOWN]
    if known and all(numbers[i] is not None for i in known):
        distinct = {numbers[i] for i in known}
        if is_age or len(distinct) > _NUMBERS_AS_THEY_ARE:
            found = np.array([numbers[i] for i in known], dtype=np.float64)
            limits = AGE_LIMITS if is_age else np.unique(np.quantile(found, [0.25, 0.5, 0.75]))
            return _bands(numbers, [float(limit) for limit in limits])
    groups: dict[str, list[int]] = {}
    for i, text in enumerate(texts):
        groups.setdefault(text, []).append(i)
    if len(groups) > _MOST_VALUES:
        raise InputError(
            f"column {name!r}: {len(groups)} different values, for instance {texts[0]!r}; "
            f"scores are broken down by at most {_MOST_VALUES}"
        )
    return {value: groups[value] for value in sorted(groups, key=lambda v: (v == UNKNOWN, v))}


def _bands(numbers: list[float | None], limits: list[float]) -> dict[str, list[int]]:
    edges = [-math.inf, *limits, math.inf]
    bands: dict[str, list[int]] = {}
    for low, high in itertools.pairwise(edges):
        inside = [i for i, x in enumerate(numbers) if x is not None and low <= x < high]
        if inside:
            if low == -math.inf:
                name = f"under {high:g}"
            else:
                name = f"{low:g} and over" if high == math.inf else f"{low:g} to under {high:g}"
            bands[name] = inside
    if missing := [i for i, x in enumerate(numbers) if x is None]:
        bands[UNKNOWN] = missing
    return bands


def _text(value: Any) -> str:
    if isinstance(value, list | tuple | set):
        return "+".join(sorted({_text(one) for one in value})) or UNKNOWN
    text = "" if value is None or value != value else " ".join(str(value).split())
    return UNKNOWN if text.lower() in ("", "nan", "none", "null", UNKNOWN) else text


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _years(text: str) -> float | None:
    match = _AGE.match(text.lower())
    return float(match[1]) * _YEARS[match[2]] if match else None
