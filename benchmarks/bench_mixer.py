"""The four-direction mixer against the released composition, and against attention of its width.

pytest benchmarks/bench_mixer.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import encoders, machine
from benchmarks.work import Case, Contender

# Sizes, images a batch, pixels a side.
SHAPES: dict[str, dict[str, tuple[list[str], int, list[int]]]] = {
    "cpu": {
        "smoke": (["small"], 2, [48]),
        "default": (["base"], 1, [192, 224, 448, 896, 1280]),
        "full": (["base", "large"], 1, [192, 224, 448, 896, 1280]),
    },
    "cuda": {
        "smoke": (["small"], 2, [48]),
        "default": (["base", "large"], 8, [192, 224, 448, 896, 1280]),
        "full": (["base", "large"], 32, [192, 224, 448, 896, 1280]),
    },
}


def cases(size: str) -> list[tuple[Case, Contender]]:
    """Everything that a size measures."""
    kind = machine.device().type
    names, batch, sides = SHAPES[kind][size]
    return [
        (
            Case(
                suite="mixer",
                group=f"{mode}-{name}-{batch}x{pixels}px",
                build=encoders.build_mixer,
                arguments={"mode": mode, "name": name, "batch": batch, "pixels": pixels},
                truth=encoders.mixer_truth,
                tolerance=2e-4 if kind == "cpu" else 3e-2,
                series={
                    "name": f"mixer {name}, {mode}",
                    "x": (pixels // 16) ** 2 + 1,
                    "unit": "tokens",
                },
            ),
            contender,
        )
        for name in names
        for mode in ("inference", "training")
        for pixels in sides
        for contender in encoders.CONTENDERS
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case and contender."""
    pairs = cases(metafunc.config.getoption("--size"))
    names = [f"{case.group}-{contender.name}" for case, contender in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=names)


def test_mixer(case: Case, contender: Contender, measure: Any) -> None:
    """One contender of one case."""
    measure(case, contender)
