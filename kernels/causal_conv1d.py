"""Causal depthwise convolution, bias and SiLU along several visiting orders of one sequence.

    s_kt = bias_k + sum over w of weight_k[:, w] x at token orders[k, t - W + 1 + w], zero before 0
    out_kt = silu(s_kt)

(The short convolution of Mamba, arXiv 2312.00752, section 3.4, seen in the orders of Vision Mamba,
arXiv 2401.09417.) All orders in one launch, and x is read where its tokens stand: no permuted copy.

Backward: s is computed again instead of saved. A token sits at step t of order k, the inverse of
the permutation says which, so its gradient is gathered from the W steps that it reaches:

    ds_kt = dout_kt silu'(s_kt);   dx = sum over k, j of weight_k[:, W - 1 - j] ds_k,t+j
    dweight_k[:, w] = sum over b, t of ds_kt x at orders[k, t - W + 1 + w];   dbias_k = sum of ds_kt

Each number is written by one program: no atomics, and the same bits each time.

Shapes: B batch, L length, D channels, K orders, W taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import scan_cpu
from kernels.implementations import choose, nvidia
from kernels.reference import causal_conv1d_ref
from kernels.transforms import derivative, transformable
from kernels.triton_math import jit, silu, silu_slope, tl, triton


@jit
def _row(x_ptr, order_ptr, step, SHIFT: tl.constexpr, mask_d, L, stride_xl):
    """x at the tokens of steps (BLOCK_L, 1) + SHIFT, zero outside of the sequence."""
    step = step + SHIFT
    inside = (step >= 0) & (step < L)
    token = tl.load(order_ptr + step, mask=inside, other=0)
    return tl.load(x_ptr + token * stride_xl, mask=inside & mask_d, other=0.0).to(tl.float32)


# fmt: off
@jit
def _taps(
    x_ptr, weight_ptr, bias_ptr, order_ptr, step, SHIFT: tl.constexpr, mask_d, L, stride_xl, D,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """s at steps (BLOCK_L, 1) + SHIFT of one order of one sample, fp32.

    The compiler sees that calls for neighbouring SHIFTs read the same rows, and reads them once.
    """
    if HAS_BIAS:
        bias = tl.load(bias_ptr, mask=mask_d, other=0.0).to(tl.float32)
        s = tl.broadcast_to(bias, [BLOCK_L, BLOCK_D])
    else:
        s = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for w in tl.static_range(W):
        x = _row(x_ptr, order_ptr, step, SHIFT + w - (W - 1), mask_d, L, stride_xl)
        s += x * tl.load(weight_ptr + w * D, mask=mask_d, other=0.0).to(tl.float32)
    return s


# fmt: off
@jit(do_not_specialize=["batch", "L"])
def _causal_conv1d_fwd_kernel(
    x_ptr,
    weight_ptr,  # (K, W, D) contiguous
    bias_ptr,  # (K, D) contiguous
    orders_ptr,  # (K, L) contiguous
    out_ptr,  # (K, B, L, D) contiguous
    batch, L, D,
    stride_xb, stride_xl, stride_xd,
    K: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, NVIDIA: tl.constexpr,
):
    # fmt: on
    """A program takes a tile of steps and channels of one order; the orders of a tile are next."""
    k = (tl.program_id(0) % K).to(tl.int64)
    tiles = tl.cdiv(L, BLOCK_L)
    b = (tl.program_id(0) // K // tiles).to(tl.int64)
    first = (tl.program_id(0) // K % tiles).to(tl.int64) * BLOCK_L
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    step = first + tl.arange(0, BLOCK_L)[:, None]
    mask_d = offs_d < D
    s = _taps(
        x_ptr + b * stride_xb + offs_d * stride_xd, weight_ptr + k * W * D + offs_d,
        bias_ptr + k * D + offs_d, orders_ptr + k * L, step, 0, mask_d, L, stride_xl, D,
        W, HAS_BIAS, BLOCK_L, BLOCK_D,
    )  # fmt: skip
    if SILU:
        s = silu(s, NVIDIA)
    at = ((k * batch + b) * L + step) * D + offs_d
    tl.store(out_ptr + at, s, mask=(step < L) & mask_d)


# fmt: off
@jit(do_not_specialize=["L"])
def _causal_conv1d_bwd_kernel(
    dout_ptr, x_ptr,
    weight_ptr,  # (K, W, D) contiguous
    bias_ptr,  # (K, D) contiguous
    orders_ptr,  # (K, L) contiguous
    inverse_ptr,  # (K, L) contiguous: the step of a token
    dx_ptr,  # (B, L, D) contiguous
    dweight_ptr,  # (B tiles, K, W, D), parts
    dbias_ptr,  # (B tiles, K, D), parts
    L, D,
    stride_gk, stride_gb, stride_gl, stride_gd,
    stride_xb, stride_xl, stride_xd,
    K: tl.constexpr, W: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr,
    NEED_X: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, NVIDIA: tl.constexpr,
):
    # fmt: on
    """A program takes a tile of tokens and channels, and gathers from all orders."""
    tiles = tl.cdiv(L, BLOCK_L)
    tile = tl.program_id(0).to(tl.int64)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_L
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    token = first + tl.arange(0, BLOCK_L)[:, None]
    mask_d = offs_d < D
    x_at = x_ptr + b * stride_xb + offs_d * stride_xd
    dx = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for order in range(K):
        k = b * 0 + order  # int64
        order_at = orders_ptr + k * L
        weight_at = weight_ptr + k * W * D + offs_d
        bias_at = bias_ptr + k * D + offs_d
        g_at = dout_ptr + k * stride_gk + b * stride_gb + offs_d * stride_gd
        # A token past the end stands at step L, where nothing is read.
        step = tl.load(inverse_ptr + k * L + token, mask=token < L, other=L)
        for j in tl.static_range(W if NEED_X else 1):
            reached = step + j
            inside = (reached < L) & mask_d
            ds = tl.load(g_at + reached * stride_gl, mask=inside, other=0.0).to(tl.float32)
            if SILU:
                s = _taps(
                    x_at, weight_at, bias_at, order_at, step, j, mask_d, L, stride_xl, D,
                    W, HAS_BIAS, BLOCK_L, BLOCK_D,
                )  # fmt: skip
                _, slope = silu_slope(s, NVIDIA)
                ds *= slope
            if NEED_X:
                tap_at = weight_at + (W - 1 - j) * D
                dx += ds * tl.load(tap_at, mask=mask_d, other=0.0).to(tl.float32)
            if j == 0:
                if NEED_WEIGHT:
                    for w in tl.static_range(W):
                        x = _row(x_at, order_at, step, w - (W - 1), mask_d, L, stride_xl)
                        part = tl.sum(ds * x, 0)[None, :]
                        at = ((tile * K + k) * W + w) * D + offs_d
                        tl.store(dweight_ptr + at, part, mask=mask_d)
                if NEED_BIAS:
                    part = tl.sum(ds, 0)[None, :]
                    tl.store(dbias_ptr + (tile * K + k) * D + offs_d, part, mask=mask_d)
    if NEED_X:
        tl.store(dx_ptr + (b * L + token) * D + offs_d, dx, mask=(token < L) & mask_d)


def _sizes(dim: int, rows: int) -> dict[str, int]:
    """A tile and its warps: eight channels a thread, one where rows of x are not aligned."""
    return {"BLOCK_L": rows, "BLOCK_D": 128 if dim % 16 == 0 else 32, "num_warps": 4}


def _launch_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, orders: Tensor, silu: bool
) -> Tensor:
    batch, length, dim = x.shape
    count, _, width = weight.shape
    out = x.new_empty(count, *x.shape)
    if out.numel() == 0:
        return out
    sizes = _sizes(dim, 16)
    tiles = batch * triton.cdiv(length, sizes["BLOCK_L"])
    _causal_conv1d_fwd_kernel[(tiles * count, triton.cdiv(dim, sizes["BLOCK_D"]))](
        x, weight.mT.contiguous(), weight if bias is None else bias.contiguous(),
        orders.contiguous(), out, batch, length, dim, *x.stride(),
        K=count, W=width, HAS_BIAS=bias is not None, SILU=silu, NVIDIA=nvidia(), **sizes,
    )  # fmt: skip
    return out


def _launch_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    orders: Tensor,
    silu: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    batch, length, dim = x.shape
    count, _, width = weight.shape
    if dout.numel() == 0:
        wanted = zip((x, weight, bias), needs, strict=True)
        return [t.new_zeros(t.shape) if need and t is not None else None for t, need in wanted]
    orders = orders.contiguous()
    inverse = torch.empty_like(orders)
    inverse.scatter_(1, orders, torch.arange(length, device=x.device).expand_as(orders))
    # Fewer rows leave registers for more programs; more rows leave fewer parts of dweight to add.
    weights = needs[1] or needs[2]
    sizes = _sizes(dim, 16 if weights else 8)
    # Two programs fit a multiprocessor; a third would take registers that then are spilled.
    options = {"maxnreg": 255} if weights and not torch.version.hip else {}
    tiles = batch * triton.cdiv(length, sizes["BLOCK_L"])
    dx = x.new_empty(x.shape) if needs[0] else None
    dweight, dbias = (
        x.new_empty(shape, dtype=torch.float32) if need else None
        for need, shape in (
            (needs[1], (tiles, count, width, dim)),
            (needs[2], (tiles, count, dim)),
        )
    )
    _causal_conv1d_bwd_kernel[(tiles, triton.cdiv(dim, sizes["BLOCK_D"]))](
        dout, x, weight.mT.contiguous(), weight if bias is None else bias.contiguous(),
        orders, inverse, *(x if t is None else t for t in (dx, dweight, dbias)),
        length, dim, *dout.stride(), *x.stride(),
        K=count, W=width, HAS_BIAS=bias is not None, SILU=silu,
        NEED_X=needs[0], NEED_WEIGHT=needs[1], NEED_BIAS=needs[2], NVIDIA=nvidia(),
        **sizes, **options,
    )  # fmt: skip
    return [
        dx,
        None if dweight is None else dweight.sum(0).mT.to(weight.dtype),
        None if dbias is None or bias is None else dbias.sum(0).to(bias.dtype),
    ]


@torch.library.custom_op(
    "emrrg_kernels::causal_conv1d_fwd",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor orders, bool silu, "
    "str implementation) -> Tensor",
)
def _causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    orders: Tensor,
    silu: bool,
    implementation: str,
) -> Tensor:
    check_orders("causal_conv1d", orders)
    if implementation == "triton":
        with torch.cuda.device_of(x):  # which need not be the current one
            return _launch_fwd(x, weight, bias, orders, silu)
    with torch.autocast("cpu", enabled=False):
        return scan_cpu.conv_forward(implementation == "native", x, weight, bias, orders, silu)


@_causal_conv1d_fwd.register_fake
def _(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(weight.shape[0], *x.shape)


@torch.library.custom_op(
    "emrrg_kernels::causal_conv1d_bwd",
    mutates_args=(),
    schema="(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor orders, bool silu, "
    "bool[] needs, str implementation) -> Tensor[]",
)
def _causal_conv1d_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    orders: Tensor,
    silu: bool,
    needs: list[bool],
    implementation: str,
) -> list[Tensor]:
    gradients: Sequence[Tensor | None]
    if implementation == "triton":
        with torch.cuda.device_of(x):
            gradients = _launch_bwd(dout, x, weight, bias, orders, silu, needs)
    else:
        with torch.autocast("cpu", enabled=False):
            gradients = scan_cpu.conv_backward(
                implementation == "native", dout, x, weight, bias, orders, silu, needs
            )
    return [g.contiguous() for g in gradients if g is not None]


@_causal_conv1d_bwd.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    orders: Tensor,
    silu: bool,
    needs: list[bool],
    implementation: str,
) -> list[Tensor]:
    wanted = zip((x, weight, bias), needs, strict=True)
    return [t.new_empty(t.shape) for t, need in wanted if need and t is not None]


_gradients = derivative("causal_conv1d", _causal_conv1d_bwd)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, orders, silu, implementation = inputs
    ctx.needs = list(ctx.needs_input_grad[:3])
    ctx.silu, ctx.implementation = silu, implementation
    ctx.save_for_backward(x, weight, bias, orders)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gradients = iter(
        _gradients(dout, *ctx.saved_tensors, ctx.silu, ctx.needs, ctx.implementation)
    )
    return (*(next(gradients) if need else None for need in ctx.needs), None, None, None)


_convolution = transformable("causal_conv1d", _causal_conv1d_fwd, _setup_context, _backward)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    orders: Tensor,
    activation: str | None = "silu",
    implementation: str | None = None,
) -> Tensor:
    """Causal depthwise convolution along each of K visiting orders, then bias and SiLU.

        out[k, :, t] = act(bias_k + sum_w weight_k[:, w] x[:, orders[k, t - W + 1 + w]])

    with zeros before the first step (Mamba, arXiv 2312.00752, section 3.4). Sums are fp32 whatever
    the inputs are. Gradients flow to x, weight and bias; those that nothing needs are not computed.
    What stands before the activation is not saved for the backward, it is computed again.

    Args:
        x: (B, L, D) fp32, fp16 or bf16 (fp64 on the CPU), any strides.
        weight: (K, D, W), as fp32 as it is kept.
        bias: (K, D), or None.
        orders: (K, L) int64, each row a permutation of the tokens 0 ... L-1
            (`kernels.reference.visiting_orders`); checked on the CPU alone.
        activation: ``silu`` or None.
        implementation: see `kernels.implementations`; None follows the device.
    Returns:
        (K, B, L, D) in x's dtype, in the order of the visit, contiguous.
    Raises:
        ValueError: shapes or devices disagree, orders are no permutations, an unknown activation,
            or an implementation that cannot run there.
        TypeError: a tensor that is not of floating point, or orders that are not int64.
    """
    if activation not in ("silu", None):
        raise ValueError(f"causal_conv1d: activation is {activation!r}, expected 'silu' or None")
    _check(x, weight, bias, orders)
    tensors = [t for t in (x, weight, bias) if t is not None]
    widest = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else x.dtype
    chosen = choose(implementation, x.device, widest, "causal_conv1d")
    if chosen == "reference":
        return causal_conv1d_ref(x, weight, bias, orders, activation)
    return _convolution(x, weight, bias, orders, activation == "silu", chosen)


def check_orders(name: str, orders: Tensor) -> None:
    """Refuse orders that are no permutations; on the CPU alone, a GPU would have to be waited for.

    Args:
        name: the operation, for the message.
        orders: (K, L) int64.
    Raises:
        ValueError: a row is no permutation of 0 ... L-1.
    """
    if orders.device.type != "cpu" or orders.numel() == 0:
        return
    length = orders.shape[1]
    visited = torch.zeros_like(orders, dtype=torch.bool)
    inside = orders.min() >= 0 and orders.max() < length
    if not inside or not visited.scatter_(1, orders, True).all():
        raise ValueError(f"{name}: a row of orders is no permutation of 0 ... {length - 1}")


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, orders: Tensor) -> None:
    if x.ndim != 3 or weight.ndim != 3:
        raise ValueError(
            f"causal_conv1d: x has shape {tuple(x.shape)}, expected (B, L, D), and weight "
            f"{tuple(weight.shape)}, expected (K, D, W)"
        )
    count, _, width = weight.shape
    if count < 1 or width < 1:
        raise ValueError(f"causal_conv1d: weight is {tuple(weight.shape)}, expected K >= 1, W >= 1")
    expected = {
        "x": (x, tuple(x.shape)),
        "weight": (weight, (count, x.shape[2], width)),
        "bias": (bias, (count, x.shape[2])),
        "orders": (orders, (count, x.shape[1])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            got = tuple(tensor.shape)
            raise ValueError(f"causal_conv1d: {name} has shape {got}, expected {shape}")
        if tensor.device != x.device:
            raise ValueError(f"causal_conv1d: {name} is on {tensor.device}, x on {x.device}")
        if name == "orders" and tensor.dtype != torch.int64:
            raise TypeError(f"causal_conv1d: orders are {tensor.dtype}, expected torch.int64")
        if name != "orders" and not tensor.is_floating_point():
            raise TypeError(f"causal_conv1d: {name} is {tensor.dtype}, expected floating point")
