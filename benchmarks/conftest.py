"""Options of the benchmarks, and what happens to the records at the end: kept, compared.

pytest benchmarks/ --benchmark-only --size smoke|default|full [--save [FILE]] [--compare FILE]
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

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
        help="fail where one of ours lost, in time or memory, against a peer since the run in FILE "
        "(same machine)",
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
    if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise pytest.UsageError("unset TRITON_INTERPRET: the interpreter is not timed")
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
    for item in items:
        if is_benchmark(item):
            item.add_marker(pytest.mark.benchmark(timer=machine.now, disable_gc=True))
            if config.getoption("--size") != "smoke":
                item.add_marker(pytest.mark.timeout(0))


def is_benchmark(item: pytest.Item) -> bool:
    """Whether a test is one of this folder's."""
    return Path(__file__).parent in Path(item.path).parents


RECORDS = pytest.StashKey[list[results.Record]]()
STORED = pytest.StashKey[Mapping[str, Any]]()
COMPARED = pytest.StashKey[list[str]]()
KEEPER = pytest.StashKey["Keeper"]()


class Keeper:
    """Writes the results file after every test, so that a run that ends early loses nothing.

    A stored group is replaced when all its contenders had their turn: a part of it, from an
    interrupted run or ``-k``, is left out.

    Args:
        path: of the file.
        size: the value of ``--size``.
        contenders: names of every group's contenders, by (suite, group).
    """

    def __init__(self, path: Path, size: str, contenders: Mapping[tuple[str, str], set[str]]):
        self.path, self._contenders = path, contenders
        self._stored = results.read(path) if path.exists() else None
        self._before = results.groups([] if self._stored is None else self._stored["records"])
        self._run = {
            "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "commit": machine.commit(),
            "size": size,
            "versions": machine.versions(),
            "rates": machine.rates(size == "smoke"),
        }
        self._written = 0
        self.parts: list[str] = []
        """Groups that were left as they are stored, because only a part of each was measured."""

    def keep(self, records: list[results.Record]) -> None:
        """Write what is stored and what was measured."""
        records = [r for r in records if results.measured(r) or "skipped" in r]
        if len(records) == self._written:
            return
        self._written = len(records)
        tables = results.groups(records)
        parts = {
            group
            for group, table in tables.items()
            if self._contenders[group] & set(self._before.get(group, ())) - set(table)
        }
        self.parts = [" ".join(group) for group in sorted(parts)]
        mine = [r for r in records if (r["suite"], r["group"]) not in parts]
        if mine:
            results.write(
                self.path, results.merged(self._stored, machine.describe(), self._run, mine)
            )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make ready to keep the results."""
    config, path = session.config, save_path(session.config)
    suites = {item.module for item in session.items if is_benchmark(item)}  # type: ignore[attr-defined]
    if path is None or not suites or config.option.collectonly:
        return
    size = config.getoption("--size")
    everyone: dict[tuple[str, str], set[str]] = {}
    for module in suites:
        for case, contender in module.cases(size):
            everyone.setdefault((case.suite, case.group), set()).add(contender.name)
    config.stash[KEEPER] = Keeper(path, size, everyone)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Keep what was measured so far."""
    keeper = item.config.stash.get(KEEPER, None)
    if keeper is not None:
        keeper.keep(item.config.stash[RECORDS])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Compare what was measured."""
    config = session.config
    records = config.stash.get(RECORDS, [])
    if records and STORED in config.stash:
        found = list(results.ratios(config.stash[STORED], records))
        lost = [str(r) for r in found if r.worse(config.getoption("--slack"))]
        config.stash[COMPARED] = lost or [
            "nothing got worse" if found else "nothing to compare: no group is in both runs"
        ]
        if lost or not found:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was kept and what got worse."""
    stash = terminalreporter.config.stash
    keeper = stash.get(KEEPER, None)
    if keeper is not None:
        terminalreporter.write_line(f"results kept in {keeper.path}")
        for group in keeper.parts:
            terminalreporter.write_line(f"left as it was, only a part was measured: {group}")
    if COMPARED in stash:
        terminalreporter.section("ratios to the peers, against the stored run")
        for line in stash[COMPARED]:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> str:
    """The value of ``--size``."""
    return request.config.getoption("--size")


@pytest.fixture
def measure(benchmark: Any, size: str, pytestconfig: pytest.Config) -> Measure:
    """`Measure` for this test."""
    return Measure(benchmark, size, pytestconfig.stash[RECORDS])
