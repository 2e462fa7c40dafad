"""Options and fixtures that all benchmarks share."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--size smoke`` proves that a benchmark runs; default measures; full takes its time."""
    parser.addoption(
        "--size",
        choices=("smoke", "default", "full"),
        default="default",
        help="how large and how often: smoke (seconds in all), default, full",
    )


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> str:
    """The value of ``--size``."""
    return request.config.getoption("--size")
