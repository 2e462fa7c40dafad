"""Results to a page, pictures and the README's table: ``python -m benchmarks.report``.

Reads ``benchmarks/results/*.json``, one file a device; writes ``docs/benchmarks.md``, pictures
beside it, and what stands between the markers in ``README.md``. Devices are never mixed: each has
its own section, and every ratio is of two times of one run. What was not measured says so.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import figures, results, roofline
from benchmarks.results import Record, groups, measured

ROOT = Path(__file__).parents[1]
PAGE = Path("docs/benchmarks.md")
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NOT_MEASURED = "not measured"
PAPER_SCANS = ((64, 768, 197), (32, 1024, 577), (8, 2048, 4096), (1, 2048, 65536))
SCAN_FIELDS = ("batch", "dim", "length", "state", "size", "gated")
PAPER_IMAGES = (("base", 768, 12), ("large", 1024, 24))

INTRO = """\
# Benchmarks

Written by `python -m benchmarks.report` from `benchmarks/results/`; do not edit.

```bash
pip install -e ".[test,bench]" -c constraints.txt
pytest benchmarks/ --benchmark-only                     # minutes on two cores; on CUDA, GPU sizes
pytest benchmarks/ --benchmark-only --size full --save  # keep a run in benchmarks/results/
pytest benchmarks/ --benchmark-only --compare benchmarks/results/DEVICE.json
python -m benchmarks.report
```

## How it is measured

- Every contender gets the same inputs and is asked for the same gradients. Its results are compared
  with float64 before it is timed: one of ours that is wrong fails the run, a wrong peer is not
  timed. `largest error` is a difference as a share of the result's largest magnitude; it is empty
  where a peer is another function (a ViT), or a model too large for float64.
- The time is the median over rounds, with the quartiles, after calls that warm up (compile, load),
  by a clock that waits for the device. Calls of many seconds are timed twice or once, and the table
  says so. On a GPU short calls follow one another within a round, so that launches hide behind the
  work, and whatever fits the L2 cache stays there.
- Peak memory is what a call takes above its inputs and weights: of the allocator on a GPU, of the
  resident pages of a fresh process on the CPU. With a backward pass the gradients are in it.
- Ratios are of two times of one run on one machine; devices are never mixed. Names in bold are
  this project's; `x ours` is a time as a multiple of the first of them.
- `of the floor` is the share of the time that bytes, exponentials or products must take at rates
  which the run itself measured, or a GPU's data sheet tells (last section). On a CPU the rate of
  exponentials is `torch.exp2`'s; the C++ scan computes its own, and can stand above 100 %.
- A peer that is not installed is left out with the line that installs it. Triton's interpreter is
  never timed.
- `--compare` fails where a time or a peak memory of ours, as a share of a peer's, grew by more than
  15 % (`--slack`) since the stored run, beyond what the quartiles explain.
"""

SUITES = {
    "finetune": "Fine-tuning: a training step by regime",
    "selective_scan": "Selective scan",
    "mixer": "The four-direction mixer",
    "encoder": "The encoder as images grow",
    "lora_linear": "LoRA-fused linear layer",
    "generation": "Writing reports",
    "data": "Images, labels and scores",
}

NOTES = {
    "finetune": """\
The step of `emrrg.train`: normalise, forward, backward, clip, AdamW. `peft`: LoRA on X, rank 16,
projector, hybrid layers; `encoder`: the encoder in place of the adapters; `full`: everything;
`linear-probe`: the projector, on features that are computed once. Weights, gradients and AdamW's
state are the bytes of their tensors; activations are what autograd keeps for the backward pass,
counted tensor by tensor; the peak of a step, weights and AdamW's state included, is measured. The
parts do not add up to it: gradients grow while activations go. Weights are random, which changes
neither time nor memory. peft wins where `speed / peft's` is below 1 and `peak / peft's` above.""",
    "selective_scan": """\
Ours: `triton` (GPUs), `native` (C++), `torch` (tuned, plain) and `reference`, the slow and obvious
truth of the tests. `mamba_ssm reference` is that package's plain-torch function or, where it is not
installed, one of the same complexity (all factors at once, a slice of them each step);
`transformers` is what that package runs without kernels; `torch.compile` compiles eight steps of a
plain-torch scan at a time; `loop with unbind` is the plain loop whose backward is linear in the
length. `both` is forward and backward, `both-frozen` the same where A, D and delta's bias need no
gradient, as under LoRA. Groups are mode-BxDxL; N = 16, with softplus, skip and gate.""",
    "mixer": """\
The flipping mixer copies X and Z for each order, gates each order's output and puts it back, as the
released code does, on the same weights. The ViT's part is attention alone, by torch's fused
operator: another function, so there is no error to show. Groups are mode-size-images x pixels.""",
    "encoder": """\
`training` computes every parameter's gradient; these, of a fixed size, lead the memory of small
images. The ViT has as many parameters, and `images a second` says what it costs to grow: its
attention is quadratic in the tokens, the scan is linear.""",
    "lora_linear": """\
A frozen layer, rank 16, `half` of its rows or `all` updated; tokens x inputs x outputs. PEFT
updates all rows in either case. `no LoRA` is the layer alone.""",
    "generation": """\
A decoder of random weights after a prefix of 230 tokens; groups are
beams-reports x new tokens-layers x width-vocabulary. On the CPU the tokens are those of the same
search in float64, for both; on a GPU, in bf16, the first step's logits are compared. The time of a
group with one report is the latency.""",
    "data": """\
Files of 2048 x 2496 pixels, synthetic, to 224 x 224. An epoch has two reading processes. METEOR, a
Java program, is left out of the scores.""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, the pictures and the README's table.

    Args:
        argv: arguments; None: `sys.argv`.
    Returns:
        0; with ``--check`` 1 where the page or the table is not what the results say.
    """
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=main.__doc__)
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of the runs")
    parser.add_argument("--root", type=Path, default=ROOT, help="where docs/ and README.md are")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(argv)
    try:
        devices = [results.read(file) for file in sorted(options.results.glob("*.json"))]
    except results.ResultError as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    page, readme = options.root / PAGE, options.root / "README.md"
    text = render(devices)
    table = with_table(readme.read_text(encoding="utf-8"), readme_table(devices))
    if options.check:
        old = page.read_text(encoding="utf-8") if page.exists() else ""
        stale = [
            str(path)
            for path, new, before in (
                (page, text, old),
                (readme, table, readme.read_text(encoding="utf-8")),
            )
            if new != before
        ]
        for path in stale:
            print(f"{path}: is not what the results say; run python -m benchmarks.report")
        return int(bool(stale))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    readme.write_text(table, encoding="utf-8")
    for stored in devices:
        figures.draw(stored, page.with_suffix(""))
    return 0


def render(devices: Sequence[Mapping[str, Any]]) -> str:
    """The page."""
    parts = [INTRO, *asked(devices), *shares()]
    for stored in devices:
        parts += device_section(stored)
    if not any(stored["machine"]["kind"] == "cuda" for stored in devices):
        parts += ["## GPU", f"Every suite: {NOT_MEASURED}. What to expect on paper follows."]
    parts += on_paper(devices)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def with_table(text: str, table: str) -> str:
    """A README with the table between its markers; as it is where it has none."""
    if BEGIN not in text or END not in text:
        return text
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


GROWTH = "Growth, time ~ x^k and memory ~ x^k, by least squares (1 is linear, 2 quadratic)"

# What the suites were asked to show.

MISSED = "Why something is missed, and what was tried, stands in [decisions.md](decisions.md)."

CLAIMS = (
    (
        "plain-torch scan, forward + backward at (8, 768, 197, 16) fp32 on the CPU, "
        "against mamba_ssm's reference",
        200,
    ),
    ("the same against mambapy", 15),
    ("C++ scan against plain torch, the same", 2.5),
    ("reports at 5 beams against transformers' generate, least of all settings", 2),
    ("training step, peft against full fine-tuning: studies a second, least of all batches", 1),
    ("the same, peft against training the encoder", 1),
    ("peak memory, full fine-tuning against peft, least of all batches", 1),
    ("the same, training the encoder against peft", 1),
)


class Shown(NamedTuple):
    """How many times faster or smaller than a peer: the least of several settings."""

    value: float | None
    measured: int = 1
    settings: int = 1

    def __str__(self) -> str:
        some = f", {self.measured} of {self.settings} settings"
        return times(self.value) + (some if 0 < self.measured < self.settings else "")


def claims(stored: Mapping[str, Any]) -> list[Shown]:
    """One for each of `CLAIMS`."""
    tables = groups(stored["records"])
    on_cpu = stored["machine"]["kind"] == "cpu"
    scan = tables.get(("selective_scan", "both-8x768x197-float32"), {}) if on_cpu else {}
    torch, native = scan.get("torch"), scan.get("native")
    beams = [t for (s, g), t in tables.items() if s == "generation" and g.startswith("beams5-")]
    steps = [t for (s, _), t in tables.items() if s == "finetune"]
    return [
        Shown(quotient(scan.get("mamba_ssm reference"), torch)),
        Shown(quotient(scan.get("mambapy"), torch)),
        Shown(quotient(torch, native)),
        least(quotient(t.get("transformers"), t.get("emrrg")) for t in beams),
        least(quotient(t.get("full"), t.get("peft")) for t in steps),
        least(quotient(t.get("encoder"), t.get("peft")) for t in steps),
        least(smaller(t.get("full"), t.get("peft")) for t in steps),
        least(smaller(t.get("encoder"), t.get("peft")) for t in steps),
    ]


def best(table: Mapping[str, Record]) -> Record | None:
    """The fastest of ours."""
    ours = [r for r in table.values() if r["ours"] and measured(r)]
    return min(ours, key=lambda r: r["median"], default=None)


def quotient(slow: Record | None, fast: Record | None) -> float | None:
    """How many times longer one takes; None where either was not measured."""
    if slow is None or fast is None or not (measured(slow) and measured(fast)):
        return None
    return slow["median"] / fast["median"]


def smaller(large: Record | None, small: Record | None) -> float | None:
    """How many times more memory one takes at its peak."""
    above, below = step_peak(large), step_peak(small)
    return None if above is None or below is None else above / below


def step_peak(record: Record | None) -> float | None:
    """Bytes of a training step: what it holds anyway, and its peak above that."""
    memory = (record or {}).get("memory")
    return memory["weights"] + memory["optimizer"] + memory["peak"] if memory else None


def least(values: Iterable[float | None]) -> Shown:
    """The smallest that was measured, and how many were."""
    everything = list(values)
    found = [value for value in everything if value is not None]
    return Shown(min(found, default=None), len(found), len(everything))


def asked(devices: Sequence[Mapping[str, Any]]) -> list[str]:
    """The claims, device by device."""
    head = ["what", "wanted", *(stored["machine"]["device"] for stored in devices)]
    found = [claims(stored) for stored in devices]
    if not any(stored["machine"]["kind"] == "cuda" for stored in devices):
        head.append("GPU")
        found.append([Shown(None)] * len(CLAIMS))
    rows = [
        [what, f">= {wanted} x", *(verdict(column[i], wanted) for column in found)]
        for i, (what, wanted) in enumerate(CLAIMS)
    ]
    return ["## What was to be shown", markdown([head, *rows]), MISSED]


def readme_table(devices: Sequence[Mapping[str, Any]]) -> str:
    """The claims in short, for the README."""
    return asked(devices)[1]


def verdict(shown: Shown, wanted: float) -> str:
    """What was shown, and whether it is less than was wanted."""
    return f"{shown}{' (missed)' if shown.value is not None and shown.value < wanted else ''}"


def times(value: float | None) -> str:
    """A ratio for people."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.3g} x" if value < 100 else f"{value:.0f} x"


@cache
def _share_rows() -> tuple[tuple[str, ...], ...]:
    import torch

    from emrrg.audit import LLAMA_2_7B, AuditConfig, System, parameter_groups, shares
    from emrrg.model import set_regime

    rows = []
    for preset in ("base", "large"):
        for every in (8, 0):
            with torch.device("meta"):
                model = System(AuditConfig(preset=preset, hybrid_every=every), LLAMA_2_7B)  # type: ignore[arg-type]
            set_regime(model, "peft")  # type: ignore[arg-type]
            found = shares(parameter_groups(model))
            count = list(found["numerators"].values())
            percent = list(found["percent"].values())
            last = percent[-1] if every else percent[1]
            rows.append(
                (
                    f"{preset}, {'hybrid layers every 8' if every else 'no hybrid layers'}",
                    f"{count[0]:,} ({percent[0]['encoder']:.2f} %)",
                    f"{count[1]:,} ({percent[1]['encoder + projector']:.2f} %)",
                    f"{count[-1]:,} ({last['whole system']:.2f} %)",
                )
            )
    return tuple(rows)


def shares() -> list[str]:
    """Trainable shares, counted from shapes by `emrrg.audit`."""
    head = ["LoRA on X, rank 16; Llama-2-7B", "of the encoder", "of encoder and projector",
            "of the whole system"]  # fmt: skip
    return [
        "## What trains",
        markdown([head, *map(list, _share_rows())]),
        "The paper says 2.3 %, without a baseline. `python -m emrrg.audit` takes it apart: its "
        "release trains 2.322 % of those modules of the large encoder and the projector that a "
        "hook-based counter sees.",
    ]


# A device.


def device_section(stored: Mapping[str, Any]) -> list[str]:
    """Everything measured on one device."""
    machine = stored["machine"]
    parts = [f"## {machine['device']}", runs_line(stored)]
    tables = groups(stored["records"])
    for suite, title in SUITES.items():
        found = [(group, table) for (s, group), table in tables.items() if s == suite]
        mine = dict(sorted(found, key=place))
        parts += [f"### {title}", NOTES[suite]]
        if not mine:
            parts.append(f"{NOT_MEASURED.capitalize()}.")
            continue
        if suite == "finetune":
            parts.append(finetune_table(mine))
        else:
            parts.append(suite_table(mine, stored))
        reasons = skipped(mine)
        if reasons:
            parts.append(f"{NOT_MEASURED.capitalize()}:\n\n" + "\n".join(reasons))
        fits = fit_table(mine)
        if fits:
            parts += [f"{GROWTH}:", fits]
        parts += [
            f"![{caption}](benchmarks/{name})" for name, caption in figures.names(stored, suite)
        ]
    return parts


def place(item: tuple[str, Mapping[str, Record]]) -> tuple[Any, ...]:
    """Where a group stands: curves last, by their x; the others by their shape, then the mode."""
    group, table = item
    series_ = next(iter(table.values())).get("series") or {}
    mode = max((m for m in MODES if group.startswith(f"{m}-")), key=len, default="")
    shape = re.split(r"(\d+)", group.removeprefix(mode))  # text and numbers take turns
    numbers = [int(part) if part.isdigit() else part for part in shape]
    return series_.get("name", ""), numbers, (*MODES, "").index(mode)


MODES = ("forward", "backward", "both", "both-frozen", "both-dropout", "inference", "training")


def runs_line(stored: Mapping[str, Any]) -> str:
    """When and with what."""
    rows = [["run, UTC", "commit", "size", "suites", "copy", "exponentials", "products"]]
    used: dict[str, list[int]] = {}
    for i, run in enumerate(stored["runs"]):
        suites = dict.fromkeys(r["suite"] for r in stored["records"] if r["run"] == i)
        rates = run["rates"]
        rows.append(
            [
                f"{i + 1}: {run['time']}",
                run["commit"] or "unknown",
                run["size"],
                ", ".join(suites),
                f"{rates['bytes'] / 1e9:.3g} GB/s",
                f"{rates['exps'] / 1e9:.3g} G/s" if "exps" in rates else "",
                f"{rates['flops'] / 1e9:.4g} GFLOP/s",
            ]
        )
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        used.setdefault(versions, []).append(i + 1)
    lines = [
        f"{'Every run' if len(used) == 1 else 'Run ' + ', '.join(map(str, numbers))}: {versions}."
        for versions, numbers in used.items()
    ]
    return markdown(rows) + "\n\n" + "\n".join(lines)


def suite_table(tables: Mapping[str, Mapping[str, Record]], stored: Mapping[str, Any]) -> str:
    """A row a contender and group: time, spread, against the first of ours, memory, error."""
    items = next((r["items"][1] for t in tables.values() for r in t.values() if r["items"]), None)
    floors = any("bytes" in r["facts"] for t in tables.values() for r in t.values())
    head = ["group", "who", "median", "quartiles", "x ours"]
    head += [f"{items} a second"] if items else []
    head += ["of the floor"] if floors else []
    head += ["peak memory", "largest error"]
    rows = [head]
    for group, table in tables.items():
        ours = next((r for r in table.values() if r["ours"] and measured(r)), None)
        for name, record in table.items():
            if not measured(record):
                continue
            ratio = quotient(record, ours)
            row = [
                group,
                f"**{name}**" if record["ours"] else name,
                seconds(record["median"]),
                spread(record),
                "" if ratio is None else f"{ratio:.3g}",
            ]
            row += [per_second(record)] if items else []
            row += [floor_share(record, stored)] if floors else []
            memory = (record.get("memory") or {}).get("peak")
            error = max((record.get("errors") or {"": None}).values(), key=lambda e: e or 0)
            row += [
                "" if memory is None else size(memory),
                "" if error is None else f"{error:.1e}",
            ]
            rows.append(row)
    return markdown(rows)


def finetune_table(tables: Mapping[str, Mapping[str, Record]]) -> str:
    """A row a regime and batch: what trains, what a step takes, what it holds."""
    rows = [
        [
            "system", "batch", "checkpointing", "regime", "trains", "studies a second",
            "speed / peft's", "weights", "gradients", "AdamW", "activations", "peak of a step",
            "peak / peft's",
        ]
    ]  # fmt: skip
    for group, table in tables.items():
        system = group.split("-batch")[0]
        for name, record in table.items():
            facts = record["facts"]
            row = [system, str(facts["batch"]), "yes" if facts["checkpointing"] else "no", name]
            if not measured(record):
                rows.append([*row, "", record.get("skipped", NOT_MEASURED), *[""] * 7])
                continue
            memory = record.get("memory") or {}
            speed, room = quotient(record, table.get("peft")), smaller(record, table.get("peft"))
            peak = step_peak(record)
            rows.append(
                [
                    *row,
                    f"{memory['trainable']:,} ({share_of(memory)})" if memory else "",
                    per_second(record),
                    "" if speed is None else f"{1 / speed:.2f}",
                    *(size(memory[k]) if memory else "" for k in MEMORY_PARTS),
                    "" if peak is None else size(peak),
                    "" if room is None else f"{room:.2f}",
                ]
            )
    return markdown(rows)


MEMORY_PARTS = ("weights", "gradients", "optimizer", "kept")


def share_of(memory: Mapping[str, int]) -> str:
    """Trainable parameters as a share of all."""
    return f"{100 * memory['trainable'] / memory['parameters']:.2f} %"


def skipped(tables: Mapping[str, Mapping[str, Record]]) -> list[str]:
    """Who was left out and why, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for group, table in tables.items():
        for name, record in table.items():
            if record.get("skipped"):
                reasons.setdefault((name, record["skipped"]), []).append(group)
    takes_part = Counter(name for table in tables.values() for name in table)
    lines = []
    for (name, reason), where in reasons.items():
        some = "" if len(where) == takes_part[name] else f" ({', '.join(where)})"
        lines.append(f"- {name}{some}: {reason}")
    return lines


def floor_share(record: Record, stored: Mapping[str, Any]) -> str:
    """The floor of what was counted, as a share of the time."""
    if "bytes" not in record["facts"]:
        return ""
    floor = roofline.floor(roofline.counted(record["facts"]), card_of(record, stored))
    return f"{100 * floor / record['median']:.0f} %"


def card_of(record: Record, stored: Mapping[str, Any]) -> roofline.Card:
    """The device with the rates that the record's run measured."""
    rates = stored["runs"][record["run"]]["rates"]
    return roofline.measured_card(stored["machine"]["device"], rates)


def fit(points: Sequence[tuple[float, float]]) -> float | None:
    """k of y ~ x^k, by least squares of the logarithms; None for fewer than three points."""
    if len(points) < 3 or any(y <= 0 for _, y in points):
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    middle = [sum(v) / len(logs) for v in zip(*logs, strict=True)]
    above = sum((x - middle[0]) * (y - middle[1]) for x, y in logs)
    return above / sum((x - middle[0]) ** 2 for x, _ in logs)


def series(
    tables: Mapping[str, Mapping[str, Record]],
) -> dict[str, dict[str, list[Record]]]:
    """Measured records of each curve, by contender, in the order of x."""
    found: dict[str, dict[str, list[Record]]] = {}
    for table in tables.values():
        for name, record in table.items():
            if record.get("series") and measured(record):
                curve = found.setdefault(record["series"]["name"], {})
                curve.setdefault(name, []).append(record)
    for curves in found.values():
        for records in curves.values():
            records.sort(key=lambda r: r["series"]["x"])
    return found


def fit_table(tables: Mapping[str, Mapping[str, Record]]) -> str:
    """k of time and memory for each curve; empty where no curve has three points."""
    rows = [["curve", "who", "x from - to", "k of the time", "k of the memory"]]
    for name, curves in series(tables).items():
        for who, records in curves.items():
            points = [(r["series"]["x"], r["median"]) for r in records]
            k = fit(points)
            if k is None:
                continue
            weights = [(r["series"]["x"], r["memory"]["peak"]) for r in records if r.get("memory")]
            room = fit(weights) if len(weights) == len(points) else None
            unit = records[0]["series"]["unit"]
            rows.append(
                [
                    name,
                    who,
                    f"{points[0][0]} - {points[-1][0]} {unit}",
                    f"{k:.2f}",
                    "" if room is None else f"{room:.2f}",
                ]
            )
    return markdown(rows) if len(rows) > 1 else ""


# On paper.


def on_paper(devices: Sequence[Mapping[str, Any]]) -> list[str]:
    """The model's times for cards that nobody has to have, and the model against measurements."""
    cards = roofline.CARDS
    known = roofline.INSTRUCTIONS["sm_90"]
    return [
        "## On paper: A100, H100, H200",
        f"""\
None of this is measured. The floor is what the bytes, the exponentials or the products must take;
the model adds the instructions that the compiled kernels issue, counted in their machine code
([kernels.md](kernels.md)): on sm_90 {known["forward"]} for each (b, d, l, n) forward and
{known["backward"]} backward with every gradient, {known["first forward"]} and
{known["first backward"]} more where a long sequence is cut into chunks; mamba_ssm's CUDA kernels
55 and 112 at length 197, 23 and 71 from 4096 on. Assumed: a copy reaches
{100 * roofline.COPY_SHARE:.0f} % of the memory's rate (measured on an H200), products
{100 * roofline.PRODUCT_SHARE:.0f} % of the data sheet's; every operation reads and writes memory
once; no time for launches, latency, or uneven work. So a real run is slower than the model, and a
kernel that takes more than twice its time deserves a look.""",
        markdown(scans_on_paper(cards)),
        markdown(encoders_on_paper(cards)),
        "### The model against what was measured",
        checked_model(devices),
    ]


def scans_on_paper(cards: Sequence[roofline.Card]) -> list[list[str]]:
    """Model and floor of our scan, and the instruction floor of mamba_ssm's."""
    rows = [["bf16, N = 16, (B, D, L)", "", *(card.name for card in cards), "bound by"]]
    for shape in PAPER_SCANS:
        scan = roofline.Scan(*shape, size=2)
        where = f"({', '.join(map(str, shape))})"
        for mode in ("forward", "backward"):
            counts = [scan.model(mode, card) for card in cards]
            pairs = list(zip(counts, cards, strict=True))
            cells = [
                f"{seconds(roofline.model(c, card))} (floor {seconds(roofline.floor(c, card))})"
                for c, card in pairs
            ]
            bounds = dict.fromkeys(roofline.bound(c, card) for c, card in pairs)
            rows.append([where, mode, *cells, ", ".join(bounds)])
        peer = roofline.peer_scan(scan)
        for i, mode in enumerate(("forward", "backward")):
            if peer is not None:
                cells = [seconds(peer[i] / card.issue) for card in cards]
                rows.append([where, f"{mode}, mamba_ssm's kernel", *cells, "instructions"])
    return rows


def encoders_on_paper(cards: Sequence[roofline.Card]) -> list[list[str]]:
    """The sum of the operations' times."""
    rows = [["encoder, forward, 64 images, bf16", *(c.name for c in cards), "slowest, last card"]]
    for name, dim, depth in PAPER_IMAGES:
        for pixels in (224, 1280):
            cells = []
            for card in cards:
                parts = roofline.encoder(64, pixels, dim, depth, target=card.target)
                spent = {part: roofline.model(counts, card) for part, counts in parts.items()}
                cells.append(seconds(sum(spent.values())))
            slowest = sorted(spent, key=lambda part: -spent[part])[:3]
            shares_ = [f"{p} {100 * spent[p] / sum(spent.values()):.0f} %" for p in slowest]
            rows.append([f"{name}, {pixels} px", *cells, ", ".join(shares_)])
    return rows


def checked_model(devices: Sequence[Mapping[str, Any]]) -> str:
    """Predicted and measured times of our scan, for every device."""
    rows = [["device", "scan", "who", "floor", "model", "measured", "measured / model"]]
    for stored in devices:
        for (suite, group), table in groups(stored["records"]).items():
            record = best(table) if suite == "selective_scan" else None
            if record is None or record.get("series"):
                continue
            card = card_of(record, stored)
            scan = roofline.Scan(*(record["facts"][name] for name in SCAN_FIELDS))
            counts = scan.model(group.split("-")[0], card)
            predicted = roofline.model(counts, card)
            rows.append(
                [
                    stored["machine"]["device"],
                    group,
                    record["contender"],
                    seconds(roofline.floor(counts, card)),
                    seconds(predicted),
                    seconds(record["median"]),
                    f"{record['median'] / predicted:.2f}",
                ]
            )
    if len(rows) == 1:
        return f"{NOT_MEASURED.capitalize()}."
    note = "On a CPU the model is its floor, from rates that the run itself measured."
    if not any(stored["machine"]["kind"] == "cuda" for stored in devices):
        note += f" On GPUs: {NOT_MEASURED}."
    return markdown(rows) + "\n\n" + note


# For people.


def per_second(record: Record) -> str:
    """The rate of a record's items."""
    if not record["items"]:
        return ""
    rate = record["items"][0] / record["median"]
    return f"{rate:.3g}" if rate < 1000 else f"{rate:,.0f}"


def spread(record: Record) -> str:
    """The quartiles, or of how few calls the time is."""
    if record["rounds"] < 3:
        return "one call" if record["rounds"] == 1 else "two calls"
    return f"{seconds(record['q1'])} - {seconds(record['q3'])}"


def seconds(value: float) -> str:
    """A time with three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def size(value: float) -> str:
    """Bytes with three digits."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 2**10:.3g} KiB"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
