"""Device functions that the Triton kernels share, and Triton itself where it is installed.

    from kernels.triton_math import jit, tl, sigmoid, softplus

Without Triton (macOS, Windows) `jit` leaves a function as it is and `tl` and `triton` are None, so
that every module of this package imports; `kernels.implementations.choose` then refuses "triton".

`NVIDIA` is a constexpr: True lets a function use one instruction of PTX where the portable code
takes several. False under the interpreter and on AMD (`kernels.implementations.nvidia`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

triton: Any
tl: Any
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except ImportError:
    triton = tl = None


def _unchanged(fn: Any = None, **options: Any) -> Any:
    return fn or _unchanged


jit: Callable[..., Any] = triton.jit if triton else _unchanged


@jit
def reciprocal(x, NVIDIA: tl.constexpr):
    """1 / x in fp32, to 1 ulp."""
    if NVIDIA:  # division takes nine instructions
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@jit
def exp(x):
    """e^x in fp32, relative error below 2e-7 (1 + |x|)."""
    return tl.math.exp2(x * 1.4426950408889634)


@jit
def sigmoid(x, NVIDIA: tl.constexpr):
    """1 / (1 + e^-x) in fp32."""
    return reciprocal(1.0 + exp(-x), NVIDIA)


@jit
def silu(x, NVIDIA: tl.constexpr):
    """x / (1 + e^-x) in fp32; 0 where e^-x overflows."""
    return x * sigmoid(x, NVIDIA)


@jit
def silu_slope(x, NVIDIA: tl.constexpr):
    """silu(x) and its derivative, in fp32."""
    s = sigmoid(x, NVIDIA)
    y = x * s
    return y, s + y * (1.0 - s)


@jit
def _log1p_unit(e):
    """log(1 + e) for e in [0, 1], relative error below 4e-7.

    e times the polynomial of degree 7 with constant term 1 whose largest relative error is least
    (1.8e-7, found by linear programming); plain log(1 + e) loses all digits of a small e.
    """
    p = -0.008839134126901627 * e + 0.045195356011390686
    p = p * e - 0.10930042713880539
    p = p * e + 0.1786457896232605
    p = p * e - 0.24541740119457245
    p = p * e + 0.33284443616867065
    p = p * e - 0.499981552362442
    p = p * e + 1.0
    return p * e


@jit
def softplus(x):
    """log(1 + e^x) in fp32, relative error below 2e-6 for |x| <= 20, any x without overflow."""
    return tl.maximum(x, 0.0) + _log1p_unit(exp(-tl.abs(x)))


@jit
def softplus_slope(x, NVIDIA: tl.constexpr):
    """softplus(x) and its derivative sigmoid(x), in fp32."""
    e = exp(-tl.abs(x))
    r = reciprocal(1.0 + e, NVIDIA)
    return tl.maximum(x, 0.0) + _log1p_unit(e), tl.where(x >= 0, r, e * r)
