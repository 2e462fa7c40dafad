"""Results kept in files, one a device: merged group by group, compared as ratios.

A file holds the machine, the runs (when, which commit, which versions), and a record for each
contender of each group. The records of a group come from one run, always: saving a group again
replaces it whole, and nothing from two devices can stand in one file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
FORMAT = 1
SAME = ("device", "kind", "cores", "system")  # of the machine
SLACK = 0.15  # of a ratio, that --compare forgives
LEAST = 2**24  # bytes of peak memory, below which pages that come and go make the ratio


class ResultError(ValueError):
    """A results file that cannot be used; the message names it."""


Record = dict[str, Any]


def path(device: str) -> Path:
    """Where a device's results are kept."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def read(file: Path) -> dict[str, Any]:
    """Read a results file.

    Raises:
        ResultError: it is missing, damaged, or of another format.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ResultError(f"{file}: is not valid JSON ({error})") from error
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ResultError(f"{file}: is not a results file of format {FORMAT}")
    return stored


def merged(
    stored: Mapping[str, Any] | None,
    machine: Mapping[str, Any],
    run: Mapping[str, Any],
    records: Sequence[Record],
) -> dict[str, Any]:
    """Stored results with the groups of a run put in their place.

    Args:
        stored: from `read`; None: there is nothing yet.
        machine: from `benchmarks.machine.describe`.
        run: what the records share: when, commit, versions, size, rates.
        records: of this run.
    Raises:
        ResultError: the stored results are another machine's.
    """
    old = {"runs": [], "records": []} if stored is None else stored
    if stored is not None:
        check_machine(stored, machine)
    fresh = {(r["suite"], r["group"]) for r in records}
    kept = [r for r in old["records"] if (r["suite"], r["group"]) not in fresh]
    used = sorted({r["run"] for r in kept})
    place = {number: i for i, number in enumerate(used)}
    return {
        "format": FORMAT,
        "machine": dict(machine),
        "runs": [*(old["runs"][number] for number in used), dict(run)],
        "records": [
            *({**r, "run": place[r["run"]]} for r in kept),
            *({**r, "run": len(used)} for r in records),
        ],
    }


def check_machine(stored: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Refuse results of another machine.

    Raises:
        ResultError: what differs.
    """
    for key in SAME:
        if stored["machine"].get(key) != machine.get(key):
            raise ResultError(
                f"stored results are of {key} {stored['machine'].get(key)!r}, this is "
                f"{machine.get(key)!r}: times of two machines are not compared"
            )


def write(file: Path, results: Mapping[str, Any]) -> None:
    """Write a results file; a reader finds the old one or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def groups(records: Iterable[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    """Records by (suite, group), then by contender, in their order."""
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        found.setdefault((record["suite"], record["group"]), {})[record["contender"]] = record
    return found


@dataclass(frozen=True)
class Ratio:
    """How much one of ours takes as a share of what a peer takes, now and in the stored run."""

    suite: str
    group: str
    ours: str
    peer: str
    stored: float
    now: float
    best_now: float
    """The ratio of our first quartile to the peer's third: what noise may explain."""
    what: str = "time"

    def worse(self, slack: float) -> bool:
        """Whether even the best reading of this run is worse than the stored one by `slack`."""
        return self.best_now > self.stored * (1 + slack)

    def __str__(self) -> str:
        return (
            f"{self.suite} {self.group}: {self.ours} takes {self.now:.3g} of {self.peer}'s "
            f"{self.what}, it took {self.stored:.3g}"
        )


def ratios(stored: Mapping[str, Any], records: Sequence[Record]) -> Iterator[Ratio]:
    """Every ratio of ours to a peer that both runs measured: times, and peak memory above `LEAST`.

    Args:
        stored: from `read`.
        records: of this run.
    """
    before = groups(stored["records"])
    for (suite, group), here in groups(records).items():
        there = before.get((suite, group), {})
        both = [name for name in here if measured(here[name]) and measured(there.get(name))]
        for ours in (name for name in both if here[name]["ours"]):
            for peer in (name for name in both if not here[name]["ours"]):
                yield Ratio(
                    suite,
                    group,
                    ours,
                    peer,
                    stored=there[ours]["median"] / there[peer]["median"],
                    now=here[ours]["median"] / here[peer]["median"],
                    best_now=here[ours]["q1"] / here[peer]["q3"],
                )
                peaks = [_peak(table[name]) for table in (there, here) for name in (ours, peer)]
                if min(peaks) > LEAST:
                    before_, now = peaks[0] / peaks[1], peaks[2] / peaks[3]
                    yield Ratio(suite, group, ours, peer, before_, now, now, "peak memory")


def _peak(record: Record) -> int:
    return (record.get("memory") or {}).get("peak", 0)


def measured(record: Record | None) -> bool:
    """Whether there is a time."""
    return record is not None and record.get("median") is not None
