"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emrrg.jsonl import read_rows, replaced


def plot_curves(metrics: Path, path: Path) -> None:
    """Draw loss, learning rate and validation scores over the steps of ``metrics.jsonl``.

    Args:
        metrics: the run's log.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(metrics)
    training = [r for r in rows if "loss" in r]
    validation = [r for r in rows if "val" in r]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = [r["step"] for r in training]
    left.plot(steps, [r["loss"] for r in training], color="black", label="training loss")
    left.set(xlabel="step", ylabel="cross-entropy a token", title="Loss")
    rate = left.twinx()
    rate.plot(steps, [r["lr"] for r in training], color="grey", linestyle=":")
    rate.set_ylabel("learning rate (dotted)")
    styles = {"BLEU-4": "-o", "ROUGE-L": "--s", "CIDEr": "-.^", "finding F1": ":D"}
    for name, style in styles.items():
        points = [(r["step"], r["val"][name]) for r in validation if r["val"].get(name) is not None]
        if points:
            right.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    right.set(xlabel="step", title="Validation")
    if validation:
        right.legend(fontsize=8)
    else:
        right.text(0.5, 0.5, "no validation yet", ha="center", transform=right.transAxes)
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def plot_ablation(study: str, cells: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw finding F1 and CIDEr of each cell: one dot a seed, the mean as a bar.

    Args:
        study: its name; ``rank`` and ``share`` are drawn over the share of parameters that train.
        cells: as `emrrg.ablate.summarise` gives them.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.34 * len(cells)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    names = list(cells)
    if study in ("rank", "share"):
        names.sort(key=lambda name: cells[name]["share"])
    labels = [f"{name}\n{100 * cells[name]['share']:.2f} % trained" for name in names]
    for axis, column in zip(axes, ("finding F1", "CIDEr"), strict=True):
        means = [cells[name][column]["mean"] for name in names]
        axis.barh(range(len(names)), means, color="0.8", edgecolor="black")
        for place, name in enumerate(names):
            values = cells[name][column]["values"]
            axis.plot(values, [place] * len(values), "ko", markersize=4)
        axis.set(xlabel=column)
    axes[0].set_yticks(range(len(names)), labels)
    axes[0].invert_yaxis()
    figure.suptitle(f"{study}: synthetic images; bars are means, dots are seeds")
    figure.savefig(path, dpi=110)
