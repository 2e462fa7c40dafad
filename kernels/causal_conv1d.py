"""bootstrap"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import scan_cpu
from kernels.implementations import choose
from kernels.reference import causal_conv1d_ref


@torch.library.custom_op(
    "emrrg_kernels::causal_conv1d_fwd",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor orders, bool silu, "
    "str implementation) -> Tensor",
)
def causal_conv1d_fwd(x, weight, bias, orders, silu, implementation) -> Tensor:
    return scan_cpu.conv_forward(implementation == "native", x, weight, bias, orders, silu)


@causal_conv1d_fwd.register_fake
def _(x, weight, bias, orders, silu, implementation):
    return x.new_empty(len(orders), *x.shape)


@torch.library.custom_op(
    "emrrg_kernels::causal_conv1d_bwd",
    mutates_args=(),
    schema="(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor orders, bool silu, "
    "bool[] needs, str implementation) -> Tensor[]",
)
def causal_conv1d_bwd(dout, x, weight, bias, orders, silu, needs, implementation):
    gradients = scan_cpu.conv_backward(
        implementation == "native", dout, x, weight, bias, orders, silu, needs
    )
    return [g.contiguous() for g in gradients if g is not None]


@causal_conv1d_bwd.register_fake
def _(dout, x, weight, bias, orders, silu, needs, implementation):
    tensors = (x, weight, bias)
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, orders, silu, implementation = inputs
    ctx.needs = list(ctx.needs_input_grad[:3])
    ctx.silu, ctx.implementation = silu, implementation
    ctx.save_for_backward(x, weight, bias, orders)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gradients = iter(
        causal_conv1d_bwd(dout, *ctx.saved_tensors, ctx.silu, ctx.needs, ctx.implementation)
    )
    return (*(next(gradients) if need else None for need in ctx.needs), None, None, None)


causal_conv1d_fwd.register_autograd(_backward, setup_context=_setup_context)


def causal_conv1d(x, weight, bias, orders, activation="silu", implementation=None):
    implementation = choose(implementation, x.device, x.dtype, "causal_conv1d")
    if implementation == "reference":
        return causal_conv1d_ref(x, weight, bias, orders, activation)
    return causal_conv1d_fwd(x, weight, bias, orders, activation == "silu", implementation)
