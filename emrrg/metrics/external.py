"""RadGraph F1, RaTEScore and GREEN through their authors' packages, where these are installed.

None of them is a dependency: each brings a large model of its own, which it loads (and, the first
time, downloads) itself. They are only called when they are asked for by name, and the result says
which version of the package made the score.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from emrrg.errors import InputError
from emrrg.metrics.bootstrap import Array, interval, resample

Scorer = Callable[[Any, list[str], list[str], str], Sequence[float | None]]


def _radgraph(module: Any, hypotheses: list[str], references: list[str], device: str) -> Any:
    """Delbrouck et al. 2022, reward "partial" (entities, and whether they have relations)."""
    scorer = module.F1RadGraph(
        reward_level="partial", model_type="radgraph-xl", cuda=-1 if device == "cpu" else 0
    )
    return scorer(hyps=hypotheses, refs=references)[1]


def _ratescore(module: Any, hypotheses: list[str], references: list[str], device: str) -> Any:
    """Zhao et al. 2024, arXiv 2406.16845."""
    return module.RaTEScore(use_gpu=device != "cpu").compute_score(hypotheses, references)


def _green(module: Any, hypotheses: list[str], references: list[str], device: str) -> Any:
    """Ostmeier et al. 2024, arXiv 2405.03595; a language model of 7 billion parameters."""
    scorer = module.GREEN("StanfordAIMI/GREEN-radllama2-7b", output_dir=".")
    return scorer(references, hypotheses)[2]


EXTERNAL: dict[str, tuple[str, str, Scorer]] = {
    "radgraph": ("radgraph", "radgraph", _radgraph),
    "ratescore": ("RaTEScore", "RaTEScore", _ratescore),
    "green": ("green_score", "green-score", _green),
}
"""Name to module, package and scorer."""


def external_score(
    name: str,
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    bootstrap: int = 0,
    seed: int = 42,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score reports by another package.

    Args:
        name: one of `EXTERNAL`.
        hypotheses: generated reports, one a study.
        references: reports in the same order.
        bootstrap: resamples of the studies for a 95 % interval of the mean; 0 for none.
        seed: of the resamples.
        device: "cpu", or else the package's own choice of GPU.
    Returns:
        {"value": mean over the reports that got a score, "interval", "undefined": the others,
        "per_report", "package", "version"}.
    Raises:
        InputError: an unknown name, the package is not installed, or it failed (the message has
            its own error).
    """
    if name not in EXTERNAL:
        raise InputError(f"{name!r} is not one of {', '.join(EXTERNAL)}")
    module_name, package, scorer = EXTERNAL[name]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"{name} needs its authors' package: pip install {package} ({error})"
        ) from None
    try:
        values = np.array(scorer(module, list(hypotheses), list(references), device), dtype=float)
    except Exception as error:  # foreign code, foreign errors
        raise InputError(f"{name}: the package {package} failed: {error}") from error
    if values.shape != (len(references),):
        raise InputError(
            f"{name}: the package {package} gave {values.shape} scores for {len(references)} pairs;"
            " its version is not one that is known here"
        )
    defined = np.isfinite(values)
    rows = np.stack([np.where(defined, values, 0.0), defined.astype(float)], axis=1)

    def mean(sums: Array) -> Array:
        none = np.full(len(sums), np.nan)
        return np.divide(sums[:, 0], sums[:, 1], out=none, where=sums[:, 1] > 0)

    try:
        number = version(package)
    except PackageNotFoundError:
        number = "unknown"
    return {
        "value": float(values[defined].mean()) if defined.any() else None,
        "interval": interval(resample(rows, mean, bootstrap, seed)) if bootstrap else None,
        "undefined": int((~defined).sum()),
        "per_report": [float(x) if np.isfinite(x) else None for x in values],
        "package": package,
        "version": number,
    }
