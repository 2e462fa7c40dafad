"""The common rules: check against float64, warm up, time, weigh, keep a record."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import machine, memory, roofline
from benchmarks.results import Record
from benchmarks.work import Case, Contender, Work, error_line, errors
from emrrg.system import out_of_memory

SECONDS = {"smoke": 0.0, "default": 2.0, "full": 20.0}  # of timed rounds
ROUNDS = {"smoke": (1, 1), "default": (3, 30), "full": (5, 100)}  # fewest, most
# Seconds a call above which it is timed twice, above three times that once.
SLOW = {"smoke": 4.0, "default": 4.0, "full": 10.0}
WARM_LIMIT = 5.0  # seconds a call above which memory is measured without a call before
QUEUE = 2e-2  # seconds of calls in a round on CUDA, so that launches hide behind the work


class WrongPeerError(Exception):
    """A peer's results are not what they should be."""


class Measure:
    """Check, time and weigh one contender of a case, and keep the record."""

    def __init__(self, benchmark: Any, size: str, records: list[Record]) -> None:
        self._benchmark, self._size, self._records = benchmark, size, records

    def __call__(self, case: Case, contender: Contender) -> None:
        record: Record = {
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
        try:
            self._measure(case, contender, record)
        except WrongPeerError as error:
            reason = f"{error}; not timed"
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            if not out_of_memory(error):
                self._records.append({**record, "skipped": f"failed: {error_line(error)}"})
                raise
            reason = "does not fit into the device's memory"
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if reason is not None and record["median"] is None:
            self._skip(record, reason)
        self._keep(record, case)

    def _measure(self, case: Case, contender: Contender, record: Record) -> None:
        arguments = {"contender": contender.name, **case.arguments}
        work = case.build(**arguments)
        record["errors"] = self._check(case, contender, work)
        record |= self._time(work)
        del work
        weighed = case.memory and (contender.ours or self._size != "smoke")
        if weighed and record["median"] is not None:
            warm = case.warm or record["median"] < WARM_LIMIT
            record["memory"] = memory.peak(case.build, arguments, warm=warm)

    def _check(self, case: Case, contender: Contender, work: Work) -> dict[str, float]:
        """Errors against float64; a wrong peer is not timed, one of ours is a failure."""
        if case.truth is None or work.results is None:
            return {}
        found = errors(work.results(), _truth(case))
        worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
        if not found[worst] <= case.tolerance:
            line = f"wrong: {worst} is off by {found[worst]:.2g}, {case.tolerance:.2g} are allowed"
            assert not contender.ours, f"{contender.name}: {line}"
            raise WrongPeerError(line)
        return found

    def _time(self, work: Work) -> dict[str, Any]:
        once = one_call(work)
        if once <= SLOW[self._size] and self._size != "smoke":  # the first may have compiled
            once = one_call(work)
        rounds, iterations = rounds_for(self._size, once)
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

    def _keep(self, record: Record, case: Case) -> None:
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
            if "bytes" in case.facts:
                rates = machine.rates(self._size == "smoke")
                card = roofline.measured_card(machine.device_name(), rates)
                floor = roofline.floor(roofline.counted(case.facts), card)
                info["share_of_floor"] = floor / record["median"]
        self._benchmark.extra_info.update(info)

    def _skip(self, record: Record, reason: str) -> None:
        self._records.append({**record, "skipped": reason})
        pytest.skip(reason)


def one_call(work: Work) -> float:
    """Seconds that a call takes."""
    prepared = work.prepare()
    start = machine.now()
    work.run(*prepared)
    return machine.now() - start


def rounds_for(size: str, once: float) -> tuple[int, int]:
    """Rounds, and calls a round, for a call that took so many seconds."""
    fewest, most = ROUNDS[size]
    if size == "smoke":
        return fewest, 1
    iterations = max(1, min(1000, math.ceil(QUEUE / once))) if torch.cuda.is_available() else 1
    if once > SLOW[size]:
        return (1 if once > 3 * SLOW[size] else 2), 1
    return max(fewest, min(most, math.ceil(SECONDS[size] / (once * iterations)))), iterations


_last: list[tuple[Any, Mapping[str, Tensor]]] = []  # the truth of the latest case


def _truth(case: Case) -> Mapping[str, Tensor]:
    assert case.truth is not None
    key = (case.truth, repr(sorted(case.arguments.items())))
    if not _last or _last[0][0] != key:
        _last[:] = [(key, case.truth(**case.arguments))]
    return _last[0][1]
