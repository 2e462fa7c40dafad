"""The selective scan: ours by implementation, and what else there is, forward and backward.

Modes: ``forward`` without gradients; ``backward`` alone; ``both``; ``both-frozen``, where A, D and
delta's bias need no gradient, as under Partial LoRA.

    pytest benchmarks/bench_selective_scan.py --benchmark-only
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, lru_cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from benchmarks import machine, peers
from benchmarks.roofline import Scan
from benchmarks.work import Case, Contender, Work
from kernels.implementations import choose
from kernels.selective_scan import selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
STATES = 16
MODES = ("forward", "backward", "both", "both-frozen")
FROZEN = ("A", "D", "delta_bias")

# (B, D, L): the shapes of the encoders, and long sequences.
SHAPES: dict[str, dict[str, list[tuple[int, int, int]]]] = {
    "cpu": {
        "smoke": [(2, 32, 33)],
        "default": [(8, 768, 197), (1, 1536, 2048)],
        "full": [(8, 768, 197), (1, 1536, 2048), (32, 1024, 577)],
    },
    "cuda": {
        "smoke": [(2, 128, 33)],
        "default": [(64, 768, 197), (32, 1024, 577), (8, 2048, 4096)],
        "full": [(64, 768, 197), (32, 1024, 577), (8, 2048, 4096), (1, 2048, 65536)],
    },
}
# Lengths of the curve time ~ L^k, at (B, D).
CURVE: dict[str, dict[str, tuple[tuple[int, int], list[int]]]] = {
    "cpu": {
        "smoke": ((1, 16), [16, 32]),
        "default": ((1, 384), [128, 256, 512, 1024]),
        "full": ((1, 384), [128, 256, 512, 1024, 2048, 4096]),
    },
    "cuda": {
        "smoke": ((1, 64), [16, 32]),
        "default": ((8, 1024), [256, 1024, 4096, 16384]),
        "full": ((8, 1024), [256, 1024, 4096, 16384, 65536]),
    },
}
# Elements (B D L N) times steps that a quadratic backward may take: beyond it is minutes a call.
QUADRATIC = {"cpu": 4e9, "cuda": 2e11}
MOST_STATES = 2**31  # that the same may hold, all at once


def available(implementation: str) -> Callable[[], str | None]:
    """Whether one of ours runs on this device."""

    def missing() -> str | None:
        device = machine.device()
        if implementation == "triton" and device.type != "cuda":
            return "needs a GPU; the interpreter is not timed"
        try:
            choose(implementation, device, torch.float32, "selective_scan")
        except ValueError as error:
            return str(error)
        return None

    return missing


COMPILED, LOOP = "torch.compile", "loop with unbind"
CONTENDERS = [
    *(Contender(n, True, available(n)) for n in ("triton", "native", "torch", "reference")),
    Contender(COMPILED),
    Contender(LOOP),
    Contender("mamba_ssm CUDA", missing=peers.mamba_ssm_cuda),
    Contender("mamba_ssm reference"),
    Contender("mambapy", missing=peers.mambapy),
    Contender("transformers", missing=peers.transformers_scan),
    Contender("vLLM", missing=peers.vllm_scan),
]
QUADRATICS = ("reference", "mamba_ssm reference", "transformers")
CALLS: dict[str, Callable[..., Tensor]] = {
    LOOP: peers.scan_by_steps,
    "mamba_ssm CUDA": peers.scan_mamba_ssm_cuda,
    "mamba_ssm reference": peers.scan_by_slices,
    "mambapy": peers.scan_mambapy,
    "transformers": peers.scan_transformers,
    "vLLM": peers.scan_vllm,
}
CHANNELS_FIRST = ("mamba_ssm CUDA", "mamba_ssm reference", "transformers", "vLLM")


def inputs(
    batch: int, dim: int, length: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Values as in a trained mixer, and a gradient of the output (``dout``); (B, L, D)."""
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made)

    step = torch.exp(
        math.log(1e-3) + torch.rand(dim, generator=made) * (math.log(0.1) - math.log(1e-3))
    )
    found = {
        "u": normal(batch, length, dim).to(dtype),
        "delta": (0.5 * normal(batch, length, dim)).to(dtype),
        "A": -torch.arange(1.0, STATES + 1) * torch.exp(0.2 * normal(dim, STATES)),
        "B": normal(batch, length, STATES).to(dtype).float(),  # fp32, and exact in u's dtype
        "C": normal(batch, length, STATES).to(dtype).float(),
        "D": 1 + 0.1 * normal(dim),
        "z": normal(batch, length, dim).to(dtype),
        "delta_bias": step + torch.log(-torch.expm1(-step)),  # softplus of it is the step
        "dout": normal(batch, length, dim).to(dtype),
    }
    return {name: value.to(device) for name, value in found.items()}


def flipped(name: str, value: Tensor) -> Tensor:
    """Between (B, L, .) and (B, ., L)."""
    return value.transpose(1, 2).contiguous() if value.ndim == 3 else value


def build(contender: str, mode: str, batch: int, dim: int, length: int, dtype: str) -> Work:
    """The work of one contender, in its own layout."""
    given = inputs(batch, dim, length, getattr(torch, dtype), machine.device())
    first = contender in CHANNELS_FIRST
    if first:
        given = {name: flipped(name, value) for name, value in given.items()}
    wanted = [n for n in NAMES if mode != "forward" and not (mode == "both-frozen" and n in FROZEN)]
    dout = given.pop("dout")
    leaves = {n: v.requires_grad_(n in wanted) for n, v in given.items()}
    call = (
        peers.scan_compiled() if contender == COMPILED else CALLS.get(contender) or ours(contender)
    )

    def forward() -> Tensor:
        with torch.set_grad_enabled(bool(wanted)):
            return call(*leaves.values())

    def backward(out: Tensor, again: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [leaves[n] for n in wanted], dout, retain_graph=again)

    def both() -> tuple[Tensor, ...]:
        return backward(forward())

    def results() -> Mapping[str, Tensor]:
        if contender == "vLLM":  # writes over its inputs
            found = {"out": call(*(v.clone() for v in leaves.values()))}
        else:
            found = {"out": forward()}
        if wanted:
            found |= {f"d{n}": g for n, g in zip(wanted, backward(found["out"]), strict=True)}
        found = {n: v.detach() for n, v in found.items()}
        return {n: flipped(n, v) for n, v in found.items()} if first else found

    if mode == "backward" and dout.is_cuda and contender != COMPILED:
        # From one graph, again and again: launches then hide behind the calls before. (The compiled
        # backward may write over what was saved for it, and has many launches of its own.)
        graph = cache(forward)  # when it is first called: the check has freed its own by then
        return Work(lambda: backward(graph(), again=True), results=results)
    if mode == "backward":
        return Work(backward, prepare=lambda: (forward(),), results=results)
    return Work(forward if mode == "forward" else both, results=results)


def ours(implementation: str) -> Callable[..., Tensor]:
    """This project's scan in its native layout."""

    def call(*tensors: Tensor) -> Tensor:
        out = selective_scan(*tensors, delta_softplus=True, implementation=implementation)
        return cast(Tensor, out)

    return call


def truth(mode: str, batch: int, dim: int, length: int, dtype: str) -> dict[str, Tensor]:
    """Float64 output and gradients, the same for every mode."""
    return shape_truth(batch, dim, length, dtype)


@lru_cache(maxsize=1)
def shape_truth(batch: int, dim: int, length: int, dtype: str) -> dict[str, Tensor]:
    """By a plain loop over the steps, a row and a block of channels at a time; on the CPU."""
    given = inputs(batch, dim, length, getattr(torch, dtype), machine.device())
    given = {name: value.double() for name, value in given.items()}
    dout = given.pop("dout")
    leaves = {n: v.requires_grad_() for n, v in given.items()}
    most = 2**28 if dout.is_cuda else 2**23
    block = max(1, min(dim, most // (length * STATES)))
    out = torch.empty_like(dout)
    for row in range(batch):
        for begin in range(0, dim, block):
            part = slice(begin, begin + block)
            here = peers.scan_by_steps(
                leaves["u"][row : row + 1, :, part],
                leaves["delta"][row : row + 1, :, part],
                leaves["A"][part],
                leaves["B"][row : row + 1],
                leaves["C"][row : row + 1],
                leaves["D"][part],
                leaves["z"][row : row + 1, :, part],
                leaves["delta_bias"][part],
            )
            here.backward(dout[row : row + 1, :, part])
            out[row, :, part] = here.detach()[0]
    gradients = {f"d{n}": v.grad.cpu() for n, v in leaves.items() if v.grad is not None}
    return {"out": out.cpu(), **gradients}


def limits(contender: Contender, arguments: Mapping[str, Any], size: str) -> Contender:
    """The contender, or why it sits this case out."""
    kind, mode = machine.device().type, arguments["mode"]
    name = contender.name
    length = arguments["length"]
    states = arguments["batch"] * arguments["dim"] * length * STATES
    reason = None
    if name == "vLLM" and mode != "forward":
        reason = "vLLM's kernel has no backward"
    elif name in QUADRATICS and states > MOST_STATES:
        reason = "holds every state: does not fit"
    elif name in QUADRATICS and mode != "forward" and states * length > QUADRATIC[kind]:
        reason = "its backward is quadratic in the length: minutes a call"
    elif name in QUADRATICS and size == "default" and mode in ("backward", "both-frozen"):
        reason = "its backward is quadratic in the length: at default size in one mode"
    elif name == COMPILED and size == "smoke":
        reason = "compiling takes half a minute: not at smoke size"
    if reason is None or contender.missing() is not None:
        return contender
    return Contender(name, contender.ours, lambda: reason)


def cases(size: str) -> list[tuple[Case, Contender]]:
    """Everything that a size measures."""
    kind = machine.device().type
    dtype = "float32" if kind == "cpu" else "bfloat16"
    wanted: list[tuple[str, tuple[int, int, int], bool]] = [
        (mode, shape, False) for shape in SHAPES[kind][size] for mode in MODES
    ]
    (rows, channels), lengths = CURVE[kind][size]
    wanted += [("both", (rows, channels, length), True) for length in lengths]
    pairs = []
    for mode, shape, curve in wanted:
        batch, dim, length = shape
        arguments = {
            "mode": mode, "batch": batch, "dim": dim, "length": length, "dtype": dtype,
        }  # fmt: skip
        case = Case(
            suite="selective_scan",
            group=f"{mode}-{'x'.join(map(str, shape))}-{dtype}",
            build=build,
            arguments=arguments,
            truth=truth,
            tolerance=2e-4 if dtype == "float32" else 3e-2,
            facts=facts(mode, shape, dtype),
            series={"name": f"scan, {mode}", "x": shape[2], "unit": "length"} if curve else None,
            memory=mode in ("forward", "both"),
        )
        pairs += [
            (case, limits(contender, arguments, size))
            for contender in CONTENDERS
            if not (curve and contender.name in (COMPILED, LOOP))
        ]
    return pairs


def facts(mode: str, shape: tuple[int, int, int], dtype: str) -> dict[str, float]:
    """The scan's sizes, and counted bytes and exponentials."""
    scan = Scan(*shape, STATES, size=4 if dtype == "float32" else 2)
    counts = scan.mode(mode)
    return {**asdict(scan), "bytes": counts.bytes, "exps": counts.exps}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case and contender."""
    pairs = cases(metafunc.config.getoption("--size"))
    names = [f"{case.group}-{contender.name}".replace(" ", "_") for case, contender in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=names)


def test_scan(case: Case, contender: Contender, measure: Any) -> None:
    """One contender of one case."""
    measure(case, contender)
