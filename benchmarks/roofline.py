"""What an operation must cost: bytes, exponentials, instructions and products, counted on paper.

A device moves so many bytes, evaluates so many exponentials, issues so many instructions and
multiplies so much a second; whichever takes longest bounds the time from below:

    floor = max(bytes / copy rate, exponentials / exp rate, flops / product rate)
    model = max(floor, warp instructions / issue rate)

The floor is physics; the model adds what the compiled kernels issue. Both leave out launches,
latency and imbalance.

Shapes: B batch, L length, D channels, N states, E = B L D, X = E N.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

WARP = 32


@dataclass(frozen=True)
class Counts:
    """What an operation takes.

    Attributes:
        bytes: read and written once each, as if the caches were perfect.
        exps: evaluations on the special-function units (2^x, log2, reciprocal).
        flops: of matrix products.
        instructions: of warps, all the others' work.
    """

    bytes: float = 0.0
    exps: float = 0.0
    flops: float = 0.0
    instructions: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.bytes + other.bytes,
            self.exps + other.exps,
            self.flops + other.flops,
            self.instructions + other.instructions,
        )

    def times(self, factor: float) -> Counts:
        """So many of it."""
        return Counts(
            self.bytes * factor,
            self.exps * factor,
            self.flops * factor,
            self.instructions * factor,
        )


@dataclass(frozen=True)
class Card:
    """What a device does at best, each a second.

    Attributes:
        name: as people call it.
        bytes: moved to and from memory by a copy.
        exps: on all special-function units.
        issue: warp instructions.
        flops: bf16 products with fp32 sums, dense; at the share that large products reach.
        processors: multiprocessors.
        target: what kernels are compiled for; None: their instructions are not modelled.
    """

    name: str
    bytes: float
    exps: float
    issue: float
    flops: float
    processors: int = 0
    target: str | None = None

    @classmethod
    def nvidia(
        cls, name: str, target: str, processors: int, hertz: float, memory: float, flops: float
    ) -> Card:
        """From the data sheet: 16 special-function results and 4 instructions a clock and SM.

        A copy reaches `COPY_SHARE` of the memory's rate, products `PRODUCT_SHARE` of theirs.
        """
        return cls(
            name,
            memory * COPY_SHARE,
            processors * 16 * hertz,
            processors * 4 * hertz,
            flops * PRODUCT_SHARE,
            processors,
            target,
        )


# A copy on an H200 measured 4.3 of the 4.8 TB/s; the same share is assumed of the others.
COPY_SHARE = 4.3 / 4.8
# What large bf16 products reach of the data sheet's rate; an assumption.
PRODUCT_SHARE = 0.65

CARDS = (
    Card.nvidia("A100 80 GB SXM", "sm_80", 108, 1.41e9, 2.039e12, 312e12),
    Card.nvidia("H100 80 GB SXM", "sm_90", 132, 1.98e9, 3.35e12, 989e12),
    Card.nvidia("H200 141 GB SXM", "sm_90", 132, 1.98e9, 4.8e12, 989e12),
)

# Instructions for each (b, d, l, n) in the hot loops of the compiled kernels, as `kernels.budgets`
# counts them (the table in docs/kernels.md; a test compares): selective scan forward and backward,
# the first passes over the chunks of a long sequence, and the cross scan forward.
INSTRUCTIONS = {
    "sm_80": {
        "forward": 8.6, "backward": 25.0, "first forward": 6.1, "first backward": 7.9, "cross": 8.1,
    },
    "sm_90": {
        "forward": 8.5, "backward": 25.0, "first forward": 6.1, "first backward": 7.5, "cross": 8.7,
    },
}  # fmt: skip
# A scan is cut into chunks where it has fewer programs, of so many channels, a multiprocessor.
FEW_PROGRAMS, LANES = 3, 32
# The same of mamba_ssm's CUDA kernels for sm_90, by length: forward, backward.
PEER_INSTRUCTIONS = {197: (55.0, 112.0), 4096: (23.0, 71.0), 65536: (23.0, 71.0)}


@dataclass(frozen=True)
class Scan:
    """A selective scan's sizes.

    Attributes:
        batch, dim, length, state: B, D, L, N.
        size: bytes of an element of u, delta, z and the output; B, C, A are fp32.
        gated: whether the output is multiplied by silu(z).
    """

    batch: int
    dim: int
    length: int
    state: int = 16
    size: int = 4
    gated: bool = True

    @property
    def elements(self) -> int:
        """E."""
        return self.batch * self.length * self.dim

    def forward(self) -> Counts:
        """Reads u, delta, B, C and z, writes the output.

        Exponentials: one a state; two for softplus and two for the gate a channel and step.
        """
        tensors = 4 if self.gated else 3
        states = self.elements * self.state
        return Counts(
            bytes=tensors * self.size * self.elements + self._parameters(),
            exps=states + (4 if self.gated else 2) * self.elements,
        )

    def backward(self) -> Counts:
        """Reads u, delta, z, B, C and the output's gradient, writes five gradients.

        The factors exp(delta A) are computed once more; softplus, its derivative and the gate take
        five a channel and step.
        """
        tensors = 7 if self.gated else 5
        states = self.elements * self.state
        return Counts(
            bytes=tensors * self.size * self.elements + 2 * self._parameters(),
            exps=states + (5 if self.gated else 3) * self.elements,
        )

    def mode(self, mode: str) -> Counts:
        """Of ``forward``, ``backward``, or both together, whatever else the mode is called."""
        if mode == "forward":
            return self.forward()
        return self.backward() if mode == "backward" else self.forward() + self.backward()

    def instructions(self, mode: str, card: Card) -> float:
        """Warp instructions of our kernels in a mode, as `mode` has it; 0 where not modelled."""
        if card.target is None:
            return 0.0
        known = INSTRUCTIONS[card.target]
        chunked = self.batch * -(-self.dim // LANES) < FEW_PROGRAMS * card.processors
        wanted = (mode,) if mode in ("forward", "backward") else ("forward", "backward")
        issued = sum(known[m] + (known[f"first {m}"] if chunked else 0.0) for m in wanted)
        return self.elements * self.state * issued / WARP

    def model(self, mode: str, card: Card) -> Counts:
        """Everything that our kernels take on a card."""
        return replace(self.mode(mode), instructions=self.instructions(mode, card))

    def _parameters(self) -> int:
        """Bytes of B and C, fp32, and of A."""
        return 4 * (2 * self.batch * self.length * self.state + self.dim * self.state)


def linear(rows: int, inputs: int, outputs: int, size: int, rank: int = 0) -> Counts:
    """y = x W^T, with a low-rank update in the same pass where there is a rank.

    Args:
        rows: tokens.
        inputs: I.
        outputs: O.
        size: bytes of an element.
        rank: r.
    """
    moved = rows * (inputs + outputs) + inputs * outputs + rank * (inputs + outputs)
    return Counts(
        bytes=moved * size, flops=2.0 * rows * (inputs * outputs + rank * (inputs + outputs))
    )


def encoder(
    batch: int, pixels: int, dim: int, depth: int, size: int = 2, target: str | None = None
) -> dict[str, Counts]:
    """The forward pass of the vision Mamba by operation, each reading and writing memory once.

    Args:
        batch: images.
        pixels: a side.
        dim: D.
        depth: blocks.
        size: bytes of an activation.
        target: of the scans' instructions; None: not counted.
    """
    patches = (pixels // 16) ** 2
    tokens = batch * (patches + 1)
    rank, hidden = -(-dim // 16), dim * 4 * 2 // 3
    scan = Scan(4 * batch, dim, patches + 1, size=size, gated=False)
    issued = INSTRUCTIONS[target]["cross"] if target else 0.0
    scans = replace(scan.forward(), instructions=scan.elements * scan.state * issued / WARP)
    block = {
        "in_proj": linear(tokens, dim, 2 * dim, size),
        "convolutions": Counts(bytes=5 * size * tokens * dim, exps=8.0 * tokens * dim),
        "x_proj": linear(tokens, dim, rank + 32, size).times(4),
        "dt_proj": linear(tokens, rank, dim, size).times(4),
        "scans": scans + Counts(bytes=2 * size * tokens * dim, exps=2.0 * tokens * dim),
        "out_proj": linear(tokens, dim, dim, size),
        "MLP": linear(tokens, dim, 2 * hidden, size) + linear(tokens, hidden, dim, size),
        "SwiGLU": Counts(bytes=3 * size * tokens * hidden, exps=2.0 * tokens * hidden),
        "norms and sums": Counts(bytes=12 * size * tokens * dim),
    }
    return {
        "patches": linear(batch * patches, 768, dim, size),
        **{name: counts.times(depth) for name, counts in block.items()},
    }


def floor(counts: Counts, card: Card) -> float:
    """Seconds that no implementation of these counts can beat on the card."""
    return max(counts.bytes / card.bytes, counts.exps / card.exps, counts.flops / card.flops)


def model(counts: Counts, card: Card) -> float:
    """Seconds with the instructions that are issued."""
    return max(floor(counts, card), counts.instructions / card.issue)


def bound(counts: Counts, card: Card) -> str:
    """What `model` is bound by."""
    parts = {
        "memory": counts.bytes / card.bytes,
        "exponentials": counts.exps / card.exps,
        "products": counts.flops / card.flops,
        "instructions": counts.instructions / card.issue,
    }
    return max(parts, key=lambda name: parts[name])


def peer_scan(scan: Scan) -> tuple[float, float] | None:
    """Warp instructions of mamba_ssm's CUDA forward and backward, where their count is known."""
    known = PEER_INSTRUCTIONS.get(scan.length)
    if known is None:
        return None
    states = scan.elements * scan.state
    return states * known[0] / WARP, states * known[1] / WARP


def counted(facts: Mapping[str, Any]) -> Counts:
    """Bytes, exponentials and products that a record holds."""
    return Counts(*(float(facts.get(name, 0)) for name in ("bytes", "exps", "flops")))


def measured_card(name: str, rates: Mapping[str, float]) -> Card:
    """The device that `benchmarks.machine.rates` measured.

    A known card keeps its data sheet's exponentials and instructions; of another one neither is
    modelled, and of the CPU the exponentials are those that were measured.
    """
    for card in CARDS:
        if card.name.split()[0] in name:
            return replace(card, name=name, bytes=rates["bytes"], flops=rates["flops"])
    exps = rates.get("exps", float("inf"))
    return Card(name, rates["bytes"], exps, float("inf"), rates["flops"])
