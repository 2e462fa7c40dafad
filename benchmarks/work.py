"""What a benchmark is made of: work to time, contenders that do it, and cases that say how much."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Work:
    """One call, ready to be timed.

    Attributes:
        run: what is timed; gets what `prepare` returns.
        prepare: what stands before each call and is not timed.
        results: what the call computes, by name, in one layout for all contenders.
        sizes: bytes that the call holds anyway, by name.
    """

    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = tuple
    results: Callable[[], Mapping[str, Tensor]] | None = None
    sizes: Callable[[], dict[str, int]] = dict

    def once(self) -> None:
        """Prepare and run."""
        self.run(*self.prepare())


@dataclass(frozen=True)
class Contender:
    """Somebody who does the work.

    Attributes:
        name: in tables.
        ours: whether it is this project's; ratios are formed against those that are not.
        missing: why it cannot take part here, with the line that installs it; None: it can.
    """

    name: str
    ours: bool = False
    missing: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Case:
    """What all contenders of a table do.

    Attributes:
        suite: the file's subject.
        group: the table's name: operation, mode, shape.
        build: makes the `Work` of one contender from its name and `arguments`; a function of a
            module.
        arguments: keyword arguments, the same for all.
        truth: float64 results from the same arguments; None: the results are compared otherwise.
        tolerance: largest error of a result, as a share of its largest magnitude.
        facts: counted, not measured: bytes, exponentials, operations.
        series: ``name``, ``x`` and ``unit`` where the case is a point of a curve time ~ x^k.
        items: what a call handles, for rates: a number and a noun.
        memory: whether to measure it.
        warm: whether memory is always that of a second call; else of the first where one takes
            long.
    """

    suite: str
    group: str
    build: Callable[..., Work]
    arguments: Mapping[str, Any]
    truth: Callable[..., Mapping[str, Tensor]] | None = None
    tolerance: float = 1e-4
    facts: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, Any] | None = None
    items: tuple[int, str] | None = None
    memory: bool = True
    warm: bool = False


def error_line(error: Exception) -> str:
    """The error's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"


def errors(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each result, as a share of the truth's largest magnitude.

    Args:
        results: of a contender; of those of the truth, it may lack some.
        truth: float64.
    Raises:
        AssertionError: a shape differs, or there is nothing to compare.
    """
    assert results and set(results) <= set(truth), (sorted(results), sorted(truth))
    found = {}
    for name, value in results.items():
        right = truth[name]
        assert value.shape == right.shape, f"{name}: {tuple(value.shape)}, not {right.shape}"
        scale = float(right.abs().max()) or 1.0
        difference = (value.to(right.device, right.dtype) - right).abs().max()
        found[name] = float(difference) / scale  # nan stays nan
    return found
