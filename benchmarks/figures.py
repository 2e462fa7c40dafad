"""Pictures of results, drawn in greys: lines differ in dash and marker, bars in shade and hatch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import Record, groups, measured

STYLES = (
    {"color": "black", "linestyle": "-", "marker": "o"},
    {"color": "0.45", "linestyle": "--", "marker": "s"},
    {"color": "black", "linestyle": ":", "marker": "^"},
    {"color": "0.6", "linestyle": "-.", "marker": "D"},
    {"color": "0.3", "linestyle": (0, (5, 1, 1, 1)), "marker": "v"},
    {"color": "0.7", "linestyle": "-", "marker": "x"},
    {"color": "black", "linestyle": (0, (1, 3)), "marker": "P"},
    {"color": "0.5", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "*"},
)
PARTS = (
    ("weights", "0.85", ""),
    ("optimizer", "0.6", "//"),
    ("gradients", "0.35", ".."),
    ("kept", "white", "xx"),
)
LABELS = {"optimizer": "AdamW's state", "kept": "activations"}
MEBIBYTE = 2**20


def names(stored: Mapping[str, Any], suite: str) -> list[tuple[str, str]]:
    """File names and captions of a suite's pictures."""
    stem = results.path(stored["machine"]["device"]).stem
    records = [r for r in stored["records"] if r["suite"] == suite and measured(r)]
    if suite == "finetune" and any(r.get("memory") for r in records):
        return [
            (f"{stem}-finetune-{system.lower()}.png", f"a training step of {system} by regime")
            for system in _systems(records)
        ]
    curves = dict.fromkeys(r["series"]["name"] for r in records if r.get("series"))
    return [(f"{stem}-{_file(name)}.png", name) for name in curves if _points(records, name) > 1]


def draw(stored: Mapping[str, Any], folder: Path) -> None:
    """Draw all pictures of a device into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for suite in dict.fromkeys(r["suite"] for r in stored["records"]):
        records = [r for r in stored["records"] if r["suite"] == suite and measured(r)]
        pictures, device = names(stored, suite), stored["machine"]["device"]
        if suite == "finetune":
            for (name, _), (system, own) in zip(pictures, _systems(records).items(), strict=False):
                _draw_steps(own, system, device, folder / name)
            continue
        for name, caption in pictures:
            own = [r for r in records if r.get("series") and r["series"]["name"] == caption]
            _draw_curve(own, caption, device, folder / name)


def _systems(records: list[Record]) -> dict[str, list[Record]]:
    """Records of training steps by what is trained: encoder, pixels, decoder."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["group"].split("-batch")[0], []).append(record)
    return found


def _points(records: list[Record], name: str) -> int:
    own = [r for r in records if r.get("series") and r["series"]["name"] == name]
    return len({r["series"]["x"] for r in own})


def _file(name: str) -> str:
    return "-".join(name.replace(",", "").split())


def _figure(columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _draw_curve(records: list[Record], title: str, device: str, path: Path) -> None:
    figure, (left, right) = _figure(2, 10, 4)
    whose = dict.fromkeys(r["contender"] for r in records)
    for who, style in zip(whose, _cycle(), strict=False):
        own = sorted((r for r in records if r["contender"] == who), key=lambda r: r["series"]["x"])
        x = [r["series"]["x"] for r in own]
        left.plot(x, [r["median"] for r in own], label=who, markersize=5, **style)
        left.fill_between(x, [r["q1"] for r in own], [r["q3"] for r in own], color="0.9")
        room = [(r["series"]["x"], r["memory"]["peak"]) for r in own if r.get("memory")]
        if room:
            right.plot([x for x, _ in room], [y / MEBIBYTE for _, y in room], markersize=5, **style)
    unit = records[0]["series"]["unit"]
    sizes = {r["series"]["x"] for r in records}
    for axes, what in ((left, "time, seconds"), (right, "peak memory, MiB")):
        axes.set(xscale="log", yscale="log", xlabel=unit, ylabel=what)
        axes.set_xticks(sorted(sizes), [f"{x:g}" for x in sorted(sizes)], fontsize=8)
        axes.tick_params(axis="x", which="minor", labelbottom=False)
        _plain_ticks(axes.yaxis)
        axes.grid(True, which="both", color="0.92")
        axes.set_axisbelow(True)
    figure.suptitle(f"{title} ({device})", fontsize=10)
    figure.legend(loc="outside lower center", ncols=min(4, len(whose)), fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_steps(records: list[Record], system: str, device: str, path: Path) -> None:
    tables = list(groups(records).values())
    figure, (left, right) = _figure(2, 13, 4.4)
    regimes = list(dict.fromkeys(r["contender"] for r in records))
    width = 0.8 / len(regimes)
    shades = ("black", "0.45", "0.7", "white")
    for k, regime in enumerate(regimes):
        label: str | None = regime
        for i, table in enumerate(tables):
            record = table.get(regime)
            if record is None:
                continue
            place = i + (k - (len(regimes) - 1) / 2) * width
            left.bar(
                place,
                record["items"][0] / record["median"],
                width * 0.95,
                color=shades[k % 4],
                edgecolor="black",
                label=label,
            )
            label = None
            _stack(right, record, place, width * 0.95)
    labels = [
        f"{t['batch']}{', ckpt' if t['checkpointing'] else ''}"
        for t in (next(iter(table.values()))["facts"] for table in tables)
    ]
    for axes, what in ((left, "studies a second"), (right, "memory, MiB")):
        axes.set_xticks(range(len(tables)), labels, fontsize=8)
        axes.set(xlabel="studies a batch (ckpt: activation checkpointing)", ylabel=what)
    right.set_title(f"bars by regime: {', '.join(regimes)}; line: peak of a step", fontsize=8)
    left.margins(y=0.25)
    left.legend(fontsize=8, ncols=len(regimes), loc="upper center")
    right.legend(fontsize=8, loc="upper left")
    figure.suptitle(f"{system} ({device})", fontsize=10)
    figure.savefig(path, dpi=110)


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... as they are, where there is no room for powers of ten alone."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _stack(axes: Any, record: Record, place: float, width: float) -> None:
    memory = record.get("memory")
    if not memory:
        return
    named = axes.get_legend_handles_labels()[1]
    below = 0.0
    for part, color, hatch in PARTS:
        height = memory[part] / MEBIBYTE
        axes.bar(
            place,
            height,
            width,
            bottom=below,
            color=color,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.4,
            label=None if LABELS.get(part, part) in named else LABELS.get(part, part),
        )
        below += height
    peak = (memory["weights"] + memory["optimizer"] + memory["peak"]) / MEBIBYTE
    axes.plot([place - width / 2, place + width / 2], [peak, peak], color="black", linewidth=2)


def _cycle() -> Iterator[dict[str, Any]]:
    while True:
        yield from STYLES
