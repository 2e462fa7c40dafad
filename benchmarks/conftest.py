"""The common rules: what is checked before timing, how it is timed, what is kept, what is compared.

    pytest benchmarks/ --benchmark-only --size smoke|default|full [--save [FILE]] [--compare FILE]
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import machine, memory, results
from benchmarks.work import Case, Contender, Work, errors

SIZES = ("smoke", "default", "full")
SECONDS = {"smoke": 0.0, "default": 3.0, "full": 20.0}  # of timed rounds
ROUNDS = {"smoke": (1, 1), "default": (3, 30), "full": (5, 100)}
SLOW = 10.0  # seconds a call above which it is called only twice, above three times that once
WARM_LIMIT = 5.0  # seconds a call above which memory is measured without a call before


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
STORED = pytest.StashKey[dict[str, Any]]()
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
            "rates": machine.rates(small=config.getoption("--size") == "smoke"),
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


class Measure:
    """Check, time and weigh one contender of a case, and keep the record."""

    def __init__(self, benchmark: Any, size: str, records: list[results.Record]) -> None:
        self._benchmark, self._size, self._records = benchmark, size, records

    def __call__(self, case: Case, contender: Contender) -> None:
        record: results.Record = {
            "suite": case.suite,
            "group": case.group,
            "contender": contender.name,
            "ours": contender.ours,
            "median": None,
            "facts": dict(case.facts),
            "series": case.series and dict(case.series),
            "items": case.items and list(case.items),
        }
        self._benchmark.group = f"{case.suite} {case.group}"
        reason = contender.missing()
        if reason is not None:
            self._skip(record, reason)
        arguments = {"contender": contender.name, **case.arguments}
        try:
            work = case.build(**arguments)
            record["errors"] = self._check(case, contender, work, record)
            record |= self._time(work)
            del work
            if case.memory and record["median"] is not None:
                warm = case.warm or record["median"] < WARM_LIMIT
                record["memory"] = memory.peak(case.build, arguments, warm=warm)
        except torch.OutOfMemoryError:
            self._skip(record, "does not fit into the device's memory")
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self._keep(record, case)

    def _check(
        self, case: Case, contender: Contender, work: Work, record: results.Record
    ) -> dict[str, float]:
        """Errors against float64; a wrong peer is not timed, one of ours is a failure."""
        if case.truth is None or work.results is None:
            return {}
        found = errors(work.results(), _truth(case))
        worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
        if not found[worst] <= case.tolerance:
            line = f"wrong: {worst} is off by {found[worst]:.2g}, {case.tolerance:.2g} are allowed"
            assert not contender.ours, f"{contender.name}: {line}"
            self._skip(record, f"{line}; not timed")
        return found

    def _time(self, work: Work) -> dict[str, Any]:
        prepared = work.prepare()
        start = machine.now()
        work.run(*prepared)
        once = machine.now() - start
        del prepared
        rounds, iterations = _rounds(self._size, once)
        plain = work.prepare is tuple
        self._benchmark.pedantic(
            work.run,
            setup=None if plain else lambda: (work.prepare(), {}),
            rounds=rounds,
            iterations=iterations if plain else 1,
        )
        if self._benchmark.stats is None:  # --benchmark-disable
            return {}
        stats = self._benchmark.stats.stats
        return {
            "median": stats.median,
            "q1": stats.q1,
            "q3": stats.q3,
            "min": stats.min,
            "max": stats.max,
            "rounds": rounds,
            "iterations": iterations if plain else 1,
        }

    def _keep(self, record: results.Record, case: Case) -> None:
        self._records.append(record)
        info: dict[str, Any] = {
            "device": machine.device_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            **case.facts,
        }
        if record.get("errors"):
            info["max_error"] = max(record["errors"].values())
        if record.get("memory"):
            info |= {f"memory_{name}": n for name, n in record["memory"].items()}
        if record["median"]:
            if case.items:
                info[f"{case.items[1]}_per_second"] = case.items[0] / record["median"]
            if case.facts.get("floor"):
                info["share_of_floor"] = case.facts["floor"] / record["median"]
        self._benchmark.extra_info.update(info)

    def _skip(self, record: results.Record, reason: str) -> None:
        self._records.append({**record, "skipped": reason})
        pytest.skip(reason)


@pytest.fixture
def measure(benchmark: Any, size: str, pytestconfig: pytest.Config) -> Iterator[Measure]:
    """`Measure` for this test."""
    yield Measure(benchmark, size, pytestconfig.stash[RECORDS])


def _rounds(size: str, once: float) -> tuple[int, int]:
    """Rounds, and calls a round, for a call that took so many seconds.

    A round of short calls on CUDA queues so many that the launches hide behind the work.
    """
    fewest, most = ROUNDS[size]
    if size == "smoke":
        return fewest, 1
    iterations = max(1, min(1000, math.ceil(2e-2 / once))) if torch.cuda.is_available() else 1
    if once > SLOW:
        return (1 if once > 3 * SLOW else 2), 1
    return max(fewest, min(most, math.ceil(SECONDS[size] / (once * iterations)))), iterations


_last: list[tuple[Any, Mapping[str, Tensor]]] = []  # the truth of the latest case


def _truth(case: Case) -> Mapping[str, Tensor]:
    assert case.truth is not None
    key = (case.truth, repr(sorted(case.arguments.items())))
    if not _last or _last[0][0] != key:
        _last[:] = [(key, case.truth(**case.arguments))]
    return _last[0][1]
