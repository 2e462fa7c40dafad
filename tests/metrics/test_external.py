"""Other groups' packages, played by small modules with the same calls."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from emrrg.errors import InputError
from emrrg.metrics.external import external_score


def same(hyps: list[str], refs: list[str]) -> list[float | None]:
    return [float(h == r) if r else None for h, r in zip(hyps, refs, strict=True)]


class F1RadGraph:
    """As in radgraph 0.1.18: hyps and refs by name, (mean, rewards, annotations, annotations)."""

    def __init__(self, reward_level: str, model_type: str | None = None, cuda: int = 0) -> None:
        assert (reward_level, model_type, cuda) == ("partial", "radgraph-xl", -1)

    def __call__(self, refs: list[str], hyps: list[str]) -> Any:
        return 0.0, same(hyps, refs), [], []


class RaTEScore:
    """As in ratescore 0.6.0."""

    def __init__(self, use_gpu: bool = True) -> None:
        assert not use_gpu

    def compute_score(self, candidate_list: list[str], reference_list: list[str]) -> Any:
        return same(candidate_list, reference_list)


class GREEN:
    """As in GREEN's README: references first; a report that it cannot judge has no score."""

    def __init__(self, model_name: str, output_dir: str) -> None:
        assert model_name and output_dir

    def __call__(self, refs: list[str], hyps: list[str]) -> Any:
        return 0.0, 0.0, same(hyps, refs), "", None


MODULES = {"radgraph": F1RadGraph, "ratescore": RaTEScore, "green": GREEN}
NAMES = {"radgraph": "radgraph", "ratescore": "RaTEScore", "green": "green_score"}


@pytest.mark.parametrize("name", MODULES)
def test_each_package_is_called_as_it_wants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(NAMES[name])
    setattr(module, MODULES[name].__name__, MODULES[name])
    monkeypatch.setitem(sys.modules, NAMES[name], module)
    found = external_score(name, ["a", "b", "c"], ["a", "x", ""], bootstrap=100)
    assert found["per_report"] == [1.0, 0.0, None]
    assert (found["value"], found["undefined"]) == (0.5, 1)
    assert found["interval"] == [0.0, 1.0]
    assert found["version"] == "unknown"


@pytest.mark.parametrize("name", MODULES)
def test_a_package_that_is_not_there_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, NAMES[name], None)
    with pytest.raises(InputError, match=rf"{name} needs .*pip install"):
        external_score(name, ["a"], ["a"])


def test_what_goes_wrong_inside_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("RaTEScore")
    monkeypatch.setitem(sys.modules, "RaTEScore", module)
    with pytest.raises(InputError, match="ratescore: the package RaTEScore failed"):
        external_score("ratescore", ["a"], ["a"])
    with pytest.raises(InputError, match="'bleurt' is not one of"):
        external_score("bleurt", ["a"], ["a"])
