"""The whole encoder: how time and memory grow with the image, beside a ViT of equal parameters.

pytest benchmarks/bench_encoder.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import encoders, machine
from benchmarks.work import Case, Contender

INFERENCE, TRAINING = "inference", "training"
SIDES = [192, 224, 384, 512, 768, 1024, 1280]
# (size, mode, images a batch, pixels a side).
PLANS: dict[str, dict[str, list[tuple[str, str, int, list[int]]]]] = {
    "cpu": {
        "smoke": [("small", INFERENCE, 2, [32, 48]), ("small", TRAINING, 2, [48])],
        "default": [("base", INFERENCE, 1, SIDES[:5]), ("base", TRAINING, 1, SIDES[:3])],
        "full": [
            ("base", INFERENCE, 1, SIDES), ("base", TRAINING, 1, SIDES),
            ("large", INFERENCE, 1, SIDES), ("large", TRAINING, 1, SIDES[:5]),
        ],
    },
    "cuda": {
        "smoke": [("small", INFERENCE, 2, [32, 48]), ("small", TRAINING, 2, [48])],
        "default": [
            ("base", INFERENCE, 8, SIDES), ("base", TRAINING, 8, SIDES),
            ("large", INFERENCE, 8, SIDES), ("large", TRAINING, 2, SIDES),
        ],
        "full": [
            ("base", INFERENCE, 64, SIDES), ("base", TRAINING, 16, SIDES),
            ("large", INFERENCE, 32, SIDES), ("large", TRAINING, 4, SIDES),
        ],
    },
}  # fmt: skip


def cases(size: str) -> list[tuple[Case, Contender]]:
    """Everything that a size measures."""
    kind = machine.device().type
    return [
        (
            Case(
                suite="encoder",
                group=f"{mode}-{name}-{batch}x{pixels}px",
                build=encoders.build_encoder,
                arguments={"mode": mode, "name": name, "batch": batch, "pixels": pixels},
                truth=encoders.encoder_truth,
                tolerance=1e-3 if kind == "cpu" else 1e-1,
                series={
                    "name": f"encoder {name}, {mode}",
                    "x": (pixels // 16) ** 2 + 1,
                    "unit": "tokens",
                },
                items=(batch, "images"),
            ),
            contender,
        )
        for name, mode, batch, sides in PLANS[kind][size]
        for pixels in sides
        for contender in encoders.CONTENDERS
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case and contender."""
    pairs = cases(metafunc.config.getoption("--size"))
    names = [f"{case.group}-{contender.name}" for case, contender in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=names)


def test_encoder(case: Case, contender: Contender, measure: Any) -> None:
    """One contender of one case."""
    measure(case, contender)
