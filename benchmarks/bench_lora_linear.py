"""A frozen linear layer with a low-rank update: ours against what people write, and PEFT's layer.

Range ``half``: the update goes to the first half of the rows, as Partial LoRA's X does; PEFT has no
such thing and updates all rows, those beyond with zeros. Range ``all``: every row. "no LoRA" is
the layer alone: what the update costs is the distance to it. Dropout stands in for training as
it is (0.1); it is off in the check, which compares results.

    pytest benchmarks/bench_lora_linear.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks import machine, peers, roofline
from benchmarks.work import Case, Contender, Work
from kernels.lora_linear import LoraSlice, lora_linear

RANK = 16
SCALE = 1.0
DROPOUT = 0.1
MODES = ("forward", "both", "both-dropout")

# (tokens, I, O): in_proj of the base and of the large encoder.
SHAPES: dict[str, dict[str, list[tuple[int, int, int]]]] = {
    "cpu": {
        "smoke": [(33, 64, 128)],
        "default": [(8 * 197, 768, 1536)],
        "full": [(8 * 197, 768, 1536), (8 * 197, 1024, 2048)],
    },
    "cuda": {
        "smoke": [(33, 64, 128)],
        "default": [(64 * 197, 768, 1536), (32 * 577, 1024, 2048)],
        "full": [(64 * 197, 768, 1536), (32 * 577, 1024, 2048), (8 * 6401, 1024, 2048)],
    },
}

OURS, TWO, ADDMM, PEFT, NONE = "emrrg", "two products and a sum", "addmm_", "PEFT", "no LoRA"
CONTENDERS = [
    Contender(OURS, ours=True),
    Contender(TWO),
    Contender(ADDMM),
    Contender(PEFT, missing=peers.peft),
    Contender(NONE),
]


class Layer(nn.Module):
    """The tensors that all contenders share.

    Args:
        inputs: I.
        outputs: O.
        rows: of the update, from the first.
        dtype: of the frozen weight; the update is fp32.
    """

    def __init__(self, inputs: int, outputs: int, rows: int, dtype: torch.dtype) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=made) / shape[1] ** 0.5

        self.weight = nn.Parameter(normal(outputs, inputs).to(dtype), requires_grad=False)
        self.A = nn.Parameter(normal(RANK, inputs))
        self.B = nn.Parameter(normal(rows, RANK))


def ours(layer: Layer, x: Tensor, dropout: float) -> Tensor:
    """This project's."""
    low = LoraSlice(layer.A, layer.B, SCALE)
    return lora_linear(x, layer.weight, None, [low], dropout=dropout, training=dropout > 0)


def two_products(layer: Layer, x: Tensor, dropout: float) -> Tensor:
    """As it is written down."""
    inner = F.dropout(F.linear(x, layer.A.to(x.dtype)), dropout, dropout > 0)
    added = SCALE * F.linear(inner, layer.B.to(x.dtype))
    y = F.linear(x, layer.weight)
    rows = layer.B.shape[0]
    if rows == y.shape[-1]:
        return y + added
    return torch.cat([y[..., :rows] + added, y[..., rows:]], dim=-1)


def addmm(layer: Layer, x: Tensor, dropout: float) -> Tensor:
    """The sum within the second product, in place."""
    inner = F.dropout(F.linear(x, layer.A.to(x.dtype)), dropout, dropout > 0)
    y = F.linear(x, layer.weight)
    y[:, : layer.B.shape[0]].addmm_(inner, layer.B.to(x.dtype).T, alpha=SCALE)
    return y


def none(layer: Layer, x: Tensor, dropout: float) -> Tensor:
    """The layer alone."""
    return F.linear(x, layer.weight)


def by_peft(layer: Layer) -> Callable[[Layer, Tensor, float], Tensor]:
    """PEFT's layer with the same tensors, B filled up with zeros; its dropout acts on x.

    On CUDA it runs under autocast, as it does in training: by itself it multiplies in fp32.
    """
    from peft import LoraConfig, inject_adapter_in_model

    outputs, inputs = layer.weight.shape
    device = layer.weight.device
    holder = nn.Module()
    holder.linear = nn.Linear(inputs, outputs, bias=False, device=device)
    holder.linear.weight = layer.weight
    config = LoraConfig(
        r=RANK, lora_alpha=int(SCALE * RANK), lora_dropout=DROPOUT, target_modules=["linear"]
    )
    adapted: Any = inject_adapter_in_model(config, holder).linear.to(device)  # type: ignore[union-attr]
    adapted.lora_A["default"].weight = layer.A
    padded = F.pad(layer.B.detach(), (0, 0, 0, outputs - layer.B.shape[0]))
    adapted.lora_B["default"].weight = layer.B = nn.Parameter(padded)

    def call(layer: Layer, x: Tensor, dropout: float) -> Tensor:
        if adapted.training != (dropout > 0):
            adapted.train(dropout > 0)
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            return adapted(x)

    return call


CALLS: dict[str, Callable[[Layer, Tensor, float], Tensor]] = {
    OURS: ours,
    TWO: two_products,
    ADDMM: addmm,
    NONE: none,
}


def make(
    rows: str, tokens: int, inputs: int, outputs: int, dtype: str
) -> tuple[Layer, Tensor, Tensor]:
    """The layer, its input and the gradient of its output."""
    kind = getattr(torch, dtype)
    layer = Layer(inputs, outputs, outputs // 2 if rows == "half" else outputs, kind)
    made = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, inputs, generator=made).to(kind)
    return layer, x, torch.randn(tokens, outputs, generator=made).to(kind)


def build(
    contender: str, mode: str, rows: str, tokens: int, inputs: int, outputs: int, dtype: str
) -> Work:
    """The work of one contender."""
    layer, x, dy = make(rows, tokens, inputs, outputs, dtype)
    device = machine.device()
    layer.to(device)
    range_rows = layer.B.shape[0]
    x, dy = x.to(device), dy.to(device)
    dropout = DROPOUT if mode == "both-dropout" else 0.0
    call = by_peft(layer) if contender == PEFT else CALLS[contender]
    x.requires_grad_(mode != "forward")
    wanted = [x] if contender == NONE else [x, layer.A, layer.B]

    def compute(rate: float) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(mode != "forward"):
            y = call(layer, x, rate)
        if mode == "forward":
            return (y,)
        return (y.detach(), *torch.autograd.grad(y, wanted, dy))

    def results() -> dict[str, Tensor]:
        found = dict(zip(("y", "dx", "dA", "dB"), compute(0.0), strict=False))
        if "dB" in found:
            found["dB"] = found["dB"][:range_rows]
        return found

    return Work(lambda: compute(dropout), results=None if contender == NONE else results)


def truth(
    mode: str, rows: str, tokens: int, inputs: int, outputs: int, dtype: str
) -> dict[str, Tensor]:
    """Float64, by the definition."""
    layer, x, dy = make(rows, tokens, inputs, outputs, dtype)
    layer.double()
    x, dy = x.double().requires_grad_(), dy.double()
    y = two_products(layer, x, 0.0)
    gradients = torch.autograd.grad(y, [x, layer.A, layer.B], dy)
    return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *gradients), strict=True))


def cases(size: str) -> list[tuple[Case, Contender]]:
    """Everything that a size measures."""
    kind = machine.device().type
    dtype = "float32" if kind == "cpu" else "bfloat16"
    pairs = []
    for tokens, inputs, outputs in SHAPES[kind][size]:
        counts = roofline.linear(tokens, inputs, outputs, 4 if kind == "cpu" else 2, RANK)
        for rows in ("half", "all"):
            for mode in MODES:
                case = Case(
                    suite="lora_linear",
                    group=f"{mode}-{rows}-{tokens}x{inputs}x{outputs}-{dtype}",
                    build=build,
                    arguments={
                        "mode": mode, "rows": rows, "tokens": tokens, "inputs": inputs,
                        "outputs": outputs, "dtype": dtype,
                    },
                    truth=truth,
                    tolerance=1e-4 if kind == "cpu" else 3e-2,
                    facts={"bytes": counts.bytes, "flops": counts.flops}
                    if mode == "forward"
                    else {},
                )  # fmt: skip
                pairs += [(case, contender) for contender in CONTENDERS]
    return pairs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case and contender."""
    pairs = cases(metafunc.config.getoption("--size"))
    names = [f"{case.group}-{contender.name}" for case, contender in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=names)


def test_lora_linear(case: Case, contender: Contender, measure: Any) -> None:
    """One contender of one case."""
    measure(case, contender)
