"""Options of the benchmarks, and what happens to the records at the end: kept, compared.

pytest benchmarks/ --benchmark-only --size smoke|default|full [--save [FILE]] [--compare FILE]
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, results
from benchmarks.measure import Measure

SIZES = ("smoke", "default", "full")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--size``, ``--save``, ``--compare``, ``--slack``."""
    group = parser.getgroup("emrrg")
    group.addoption(
        "--size",
        choices=SIZES,
        default="default",
        help="how large and how often: smoke (proves that it runs), default (minutes), full",
    )
    group.addoption(
        "--save",
        metavar="FILE",
        nargs="?",
        const="",
        help="keep the results [default FILE: benchmarks/results/<device>.json]",
    )
    group.addoption(
        "--compare",
        metavar="FILE",
        help="fail where one of ours lost against a peer since the run in FILE (same machine)",
    )
    group.addoption(
        "--slack",
        type=float,
        default=results.SLACK,
        help=f"share of a ratio that --compare forgives [default: {results.SLACK}]",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse options that cannot work, before anything is measured."""
    config.stash[RECORDS] = []
    if config.getoption("--save") == "" and config.getoption("--size") == "smoke":
        raise pytest.UsageError("--save: a smoke run measures nothing; name a FILE to try it")
    target = save_path(config)
    for option, path in (("--save", target), ("--compare", config.getoption("--compare"))):
        if path is None or (option == "--save" and not Path(path).exists()):
            continue
        try:
            stored = results.read(Path(path))
            results.check_machine(stored, machine.describe())
        except results.ResultError as error:
            raise pytest.UsageError(f"{option}: {error}") from error
        if option == "--compare":
            config.stash[STORED] = stored


def save_path(config: pytest.Config) -> Path | None:
    """Where ``--save`` puts the results; None: nowhere."""
    target = config.getoption("--save")
    if target is None:
        return None
    return Path(target) if target else results.path(machine.device_name())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every benchmark the synchronising timer, and the time that it needs."""
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.path).parents:
            item.add_marker(pytest.mark.benchmark(timer=machine.now, disable_gc=True))
            if config.getoption("--size") != "smoke":
                item.add_marker(pytest.mark.timeout(0))


RECORDS = pytest.StashKey[list[results.Record]]()
STORED = pytest.StashKey[Mapping[str, Any]]()
LOST = pytest.StashKey[list[str]]()
SAVED = pytest.StashKey[Path]()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep and compare what was measured."""
    config = session.config
    records = config.stash.get(RECORDS, [])
    if not records:
        return
    path = save_path(config)
    if path is not None:
        stored = results.read(path) if path.exists() else None
        run = {
            "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "commit": machine.commit(),
            "size": config.getoption("--size"),
            "versions": machine.versions(),
            "rates": machine.rates(config.getoption("--size") == "smoke"),
        }
        results.write(path, results.merged(stored, machine.describe(), run, records))
        config.stash[SAVED] = path
    if STORED in config.stash:
        found = list(results.ratios(config.stash[STORED], records))
        lost = [str(r) for r in found if r.worse(config.getoption("--slack"))]
        config.stash[LOST] = lost
        if lost or not found:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was kept and what got worse."""
    stash = terminalreporter.config.stash
    if SAVED in stash:
        terminalreporter.write_line(f"results kept in {stash[SAVED]}")
    if LOST in stash:
        terminalreporter.section("ratios to the peers, against the stored run")
        for line in stash[LOST] or ["nothing got worse"]:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> str:
    """The value of ``--size``."""
    return request.config.getoption("--size")


@pytest.fixture
def measure(benchmark: Any, size: str, pytestconfig: pytest.Config) -> Measure:
    """`Measure` for this test."""
    return Measure(benchmark, size, pytestconfig.stash[RECORDS])
