"""A sheet of phantoms: images, where their findings are, and what the reports say of them."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from emrrg.data.phantom_cases import DOMAINS, MOST, RATES, Domain
from emrrg.data.phantoms import Phantom, draw_phantom, phantom_split

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4
COLOURS = ("#ffd400", "#4cc9ff", "#ff7fbf", "#8dff70")
assert len(COLOURS) >= MOST


def draw_sheet(path: Path, studies: int, size: int, seed: int) -> None:
    """Draw phantoms of both hospitals.

    Args:
        path: PNG to write.
        studies: phantoms a hospital, chosen by `choose`.
        size: pixels a side.
        seed: of the phantoms.
    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-studies // COLUMNS)
    height = 3.9 * rows * len(DOMAINS) + 0.4
    figure = Figure(figsize=(3.1 * COLUMNS, height))
    FigureCanvasAgg(figure)
    title = "SYNTHETIC images: procedurally drawn phantoms, not X-rays of any patient"
    figure.suptitle(title, fontsize=14, y=1 - 0.2 / height)
    axes = figure.subplots(rows * len(DOMAINS), COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for k, domain in enumerate(DOMAINS):
        for place, (index, phantom) in enumerate(choose(domain, studies, size, seed)):
            axis = axes[k * rows + place // COLUMNS, place % COLUMNS]
            show(axis, phantom, f"synthetic, {domain} hospital, no. {index}")
    figure.subplots_adjust(0.01, 0.75 / height, 0.99, 1 - 0.55 / height, wspace=0.04, hspace=0.34)
    figure.savefig(path, dpi=90)


def choose(domain: Domain, count: int, size: int, seed: int) -> list[tuple[int, Phantom]]:
    """Test phantoms of a hospital, with their numbers.

    Args:
        domain: the hospital.
        count: phantoms.
        size: pixels a side.
        seed: of the phantoms.
    Returns:
        Those first that show most kinds of findings that none before them shows.
    """
    numbers = phantom_split("test", max(4 * count, 64), domain=domain, seed=seed)
    drawn = [(n, draw_phantom(n, domain=domain, size=size, seed=seed)) for n in numbers]
    missing = set(RATES)

    def new(item: tuple[int, Phantom]) -> int:
        return len(missing & {finding.observation for finding in item[1].findings})

    chosen: list[tuple[int, Phantom]] = []
    while len(chosen) < count:
        best = max(drawn, key=new)  # the first of several
        drawn.remove(best)
        missing -= {finding.observation for finding in best[1].findings}
        chosen.append(best)
    return chosen


def show(axis: Axes, phantom: Phantom, title: str) -> None:
    """Draw one phantom with numbered boxes, and its report with the same numbers."""
    from matplotlib.patches import Rectangle

    size = len(phantom.image)
    axis.imshow(phantom.image, cmap="gray", vmin=0, vmax=255)
    axis.set_title(title, fontsize=8, pad=3)
    report = phantom.report
    findings = sorted(phantom.findings, key=lambda f: report.index(f.sentence))
    for number, finding in enumerate(findings, start=1):
        colour = COLOURS[number - 1]
        for left, top, right, bottom in finding.boxes:
            corner = (left * size - 0.5, top * size - 0.5)
            wide, high = (right - left) * size, (bottom - top) * size
            axis.add_patch(Rectangle(corner, wide, high, fill=False, edgecolor=colour))
            axis.text(*corner, str(number), color=colour, fontsize=8, va="bottom", clip_on=True)
        report = report.replace(finding.sentence, f"[{number}] {finding.sentence}")
    axis.text(0, size * 1.02, textwrap.fill(report, 52), fontsize=7, va="top")
