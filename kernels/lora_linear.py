"""A linear layer with low-rank updates of row ranges, in one pass (LoRA, arXiv 2106.09685).

    h = s (x A^T) * keep            rank r; keep is dropout's mask divided by the share kept
    y = x W^T + b;   y[..., start : start + R] += h B^T

and backward, the small rank first in every product:

    g  = s (dy[..., start : start + R] B) * keep
    dB = dy[..., start : start + R]^T h        dA = g^T x
    dx = dy W + g A                            dW = dy^T x,  db = sum of dy over the rows

W is frozen as a rule: then neither dW nor what only it needs exists. Kept for the backward are x
(where dA or dW is wanted), h (where dB is), and the parameters; dropout's mask is drawn again from
its seed. Nothing saved is written to.

On a GPU: h by a skinny product that reads x once; then y by one product whose K loop ends with
another step over r for the row blocks inside the range, so that y is written once and never read.
Computing x A^T inside the K loop instead would repeat it for every block of output rows: r / 128
more tensor-core work on 128 columns (12 % at r = 16) against 4 / O more traffic and one short
launch (arithmetic, no measurement). dx is the same kernel. dA and dB sum over all tokens: partial
sums by chunks, added in a fixed order, so two runs agree bit for bit. dW is a plain product with
nothing to fuse: torch's.

On the CPU the same in plain torch, the low rank added in place to the range's rows of y.

Shapes: I, O inputs and outputs, R rows of the range, r rank, M tokens (all leading axes of x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels.implementations import choose, triton_interpreted
from kernels.reference import lora_linear_ref
from kernels.transforms import derivative, transformable
from kernels.triton_math import jit, tl, triton


@jit
def _token_offsets(rows, L, stride_b, stride_l, ONE_STRIDE: tl.constexpr):
    """Offsets of tokens that lie as (batch, L), or with one stride."""
    if ONE_STRIDE:
        return rows * stride_l
    return (rows // L) * stride_b + (rows % L) * stride_l


@jit
def _dot(a, b, acc, INTERPRET: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b in fp32, on operands of a's type (the interpreter has no 16-bit product)."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(a.dtype).to(tl.float32), acc)
    return tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)


@jit
def _down_kernel(
    x_ptr,
    w_ptr,
    seed_ptr,
    h_ptr,
    M,
    L,
    K,
    R,
    stride_xb,
    stride_xl,
    stride_xk,
    stride_wr,
    stride_wk,
    scale,
    rate,
    ONE_STRIDE: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h[m, j] = scale * keep[m, j] * sum over k of x[m, k] w[j, k]; h is contiguous (M, R)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)
    x_at = _token_offsets(tl.minimum(rows, M - 1), L, stride_xb, stride_xl, ONE_STRIDE)
    x_ptrs = x_ptr + x_at[:, None] + k[None, :] * stride_xk
    w_at = (ranks % R).to(tl.int64) * stride_wr
    w_ptrs = w_ptr + w_at[None, :] + k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for done in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - done, other=0.0)
            w = tl.load(w_ptrs, mask=k[:, None] < K - done, other=0.0)
        acc = _dot(x, w, acc, INTERPRET, PRECISION)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk
    places = rows[:, None] * R + ranks[None, :]  # int64, as rows are
    acc = acc * scale
    if seed_ptr is not None:
        kept = tl.rand(tl.load(seed_ptr), places) >= rate
        acc = tl.where(kept, acc / (1.0 - rate), 0.0)
    inside = (rows[:, None] < M) & (ranks[None, :] < R)
    tl.store(h_ptr + places, acc.to(h_ptr.dtype.element_ty), mask=inside)


@jit
def _linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    h_ptr,
    up_ptr,
    y_ptr,
    M,
    L,
    K,
    O,  # noqa: E741
    R,
    start,
    stop,
    stride_xb,
    stride_xl,
    stride_xk,
    stride_wo,
    stride_wk,
    stride_uo,
    stride_ur,
    ONE_STRIDE: tl.constexpr,
    EVEN_K: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y[m, o] = bias[o] + sum of x[m, k] w[o, k] + sum of h[m, j] up[o - start, j].

    The last sum for start <= o < stop alone; h contiguous (M, R), y contiguous (M, O).

    Programs run GROUP token blocks at a time through all output blocks, so that both stay in L2.
    """
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_o = tl.cdiv(O, BLOCK_O)
    pid = tl.program_id(0)
    first = pid // (GROUP * blocks_o) * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    block_m = first + pid % (GROUP * blocks_o) % height
    block_o = pid % (GROUP * blocks_o) // height

    rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = block_o * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    step = tl.full((), BLOCK_K, tl.int64)
    x_at = _token_offsets(tl.minimum(rows, M - 1), L, stride_xb, stride_xl, ONE_STRIDE)
    w_at = (outs % O).to(tl.int64) * stride_wo
    x_ptrs = x_ptr + x_at[:, None] + k[None, :] * stride_xk
    w_ptrs = w_ptr + w_at[None, :] + k[:, None] * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for done in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < K - done, other=0.0)
            w = tl.load(w_ptrs, mask=k[:, None] < K - done, other=0.0)
        acc = _dot(x, w, acc, INTERPRET, PRECISION)
        x_ptrs += step * stride_xk
        w_ptrs += step * stride_wk

    j = tl.arange(0, BLOCK_R).to(tl.int64)
    up_at = (outs - start).to(tl.int64)[None, :] * stride_uo
    up_rows = (outs >= start) & (outs < stop)
    meets = (block_o * BLOCK_O < stop) & (block_o * BLOCK_O + BLOCK_O > start)
    for done in tl.range(0, tl.where(meets, R, 0), BLOCK_R, num_stages=1):
        ranks = done + j
        h_ptrs = h_ptr + tl.minimum(rows, M - 1)[:, None] * R + ranks[None, :]
        h = tl.load(h_ptrs, mask=ranks[None, :] < R, other=0.0)
        up_ptrs = up_ptr + up_at + ranks[:, None] * stride_ur
        up = tl.load(up_ptrs, mask=up_rows[None, :] & (ranks[:, None] < R), other=0.0)
        acc = _dot(h, up, acc, INTERPRET, PRECISION)

    if bias_ptr is not None:
        acc += tl.load(bias_ptr + outs % O).to(tl.float32)[None, :]
    y_ptrs = y_ptr + rows[:, None] * O + outs[None, :]
    inside = (rows[:, None] < M) & (outs[None, :] < O)
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def _outer_kernel(
    x_ptr,
    h_ptr,
    part_ptr,
    M,
    L,
    P,
    R,
    chunk,
    stride_xb,
    stride_xl,
    stride_xp,
    stride_pc,
    stride_pp,
    stride_pr,
    ONE_STRIDE: tl.constexpr,
    INTERPRET: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """part[c, p, j] = sum of x[m, p] h[m, j] over the tokens m of chunk c; h contiguous (M, R)."""
    begin = tl.program_id(1).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, M)
    columns = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    column_at = (columns % P).to(tl.int64) * stride_xp
    m = tl.arange(0, BLOCK_M).to(tl.int64)
    acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for done in range(begin, end, BLOCK_M):
        rows = done + m
        x_at = _token_offsets(rows, L, stride_xb, stride_xl, ONE_STRIDE)
        x_ptrs = x_ptr + x_at[None, :] + column_at[:, None]
        x = tl.load(x_ptrs, mask=rows[None, :] < end, other=0.0)
        h_ptrs = h_ptr + rows[:, None] * R + ranks[None, :]
        h = tl.load(h_ptrs, mask=(rows[:, None] < end) & (ranks[None, :] < R), other=0.0)
        acc = _dot(x, h, acc, INTERPRET, PRECISION)
    part_ptrs = part_ptr + tl.program_id(1).to(tl.int64) * stride_pc
    part_ptrs += columns.to(tl.int64)[:, None] * stride_pp + ranks[None, :] * stride_pr
    tl.store(part_ptrs, acc, mask=(columns[:, None] < P) & (ranks[None, :] < R))


def _tokens(x: Tensor) -> Tensor:
    """x as (batch, L, I), a view wherever its strides allow."""
    if x.ndim <= 2:
        return x.reshape(1, -1, x.shape[-1])
    return x if x.ndim == 3 else x.flatten(0, -3)


def _layout(x: Tensor) -> dict[str, Any]:
    """Keyword arguments that tell a kernel where the tokens of (batch, L, ...) lie."""
    batch, length = x.shape[:2]
    one_stride = batch == 1 or x.stride(0) == length * x.stride(1)
    return {
        "M": batch * length,
        "L": length,
        "stride_xb": x.stride(0),
        "stride_xl": x.stride(1),
        "ONE_STRIDE": one_stride,
    }


def _products(x: Tensor, tf32: bool | None) -> dict[str, Any]:
    """Keyword arguments of the products: precision of fp32 operands, and the interpreter's."""
    if tf32 is None:
        matmul = torch.backends.cuda.matmul  # `allow_tf32` raises where the new name was set
        precision = getattr(matmul, "fp32_precision", None)
        tf32 = precision == "tf32" if precision is not None else matmul.allow_tf32
    return {"PRECISION": "tf32" if tf32 else "ieee", "INTERPRET": triton_interpreted()}


def _block_r(rank: int) -> int:
    return min(64, max(16, triton.next_power_of_2(rank)))


def _tiles(x: Tensor, rows: int, outputs: int, tf32: bool) -> dict[str, int]:
    """Block sizes of `_linear_kernel`: 96 KiB of shared memory, which every NVIDIA GPU since
    Ampere has, or the 64 KiB of AMD's. Small blocks where large ones would be too few to fill a
    GPU, and for fp32 without tensor cores, where registers bind.
    """
    if x.element_size() == 4 and not tf32:
        return {"BLOCK_M": 64, "BLOCK_O": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    block = 128 if triton.cdiv(rows, 128) * triton.cdiv(outputs, 128) >= 128 else 64
    stages = 2 if torch.version.hip else 3
    return {
        "BLOCK_M": block,
        "BLOCK_O": block,
        "BLOCK_K": 128 // x.element_size(),
        "num_warps": block // 16,
        "num_stages": stages,
    }


def _down(
    x: Tensor, weight: Tensor, seed: Tensor | None, scale: float, dropout: float, tf32: bool | None
) -> Tensor:
    """scale * keep * (x weight^T): (batch, L, K) and (r, K) of any strides to (M, r)."""
    rank, inner = weight.shape
    layout = _layout(x)
    h = x.new_empty(layout["M"], rank)
    if h.numel() == 0:
        return h
    block_k, block_r = 64, _block_r(rank)
    _down_kernel[(triton.cdiv(layout["M"], 64), triton.cdiv(rank, block_r))](
        x,
        weight,
        seed,
        h,
        K=inner,
        R=rank,
        stride_xk=x.stride(2),
        stride_wr=weight.stride(0),
        stride_wk=weight.stride(1),
        scale=scale,
        rate=dropout,
        EVEN_K=inner % block_k == 0,
        BLOCK_M=64,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=4,
        num_stages=3,
        **layout,
        **_products(x, tf32),
    )
    return h


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    up: Tensor,
    start: int,
    tf32: bool | None,
) -> Tensor:
    """x weight^T + bias, and h up^T on the columns from `start`: (batch, L, K) to (M, O)."""
    outputs, inner = weight.shape
    layout = _layout(x)
    y = x.new_empty(layout["M"], outputs)
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    products = _products(x, tf32)
    tiles = _tiles(x, layout["M"], outputs, products["PRECISION"] == "tf32")
    blocks = triton.cdiv(layout["M"], tiles["BLOCK_M"]) * triton.cdiv(outputs, tiles["BLOCK_O"])
    _linear_kernel[(blocks,)](
        x,
        weight,
        bias,
        h,
        up,
        y,
        K=inner,
        O=outputs,
        R=up.shape[1],
        start=start,
        stop=start + up.shape[0],
        stride_xk=x.stride(2),
        stride_wo=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_uo=up.stride(0),
        stride_ur=up.stride(1),
        EVEN_K=inner % tiles["BLOCK_K"] == 0,
        BLOCK_R=_block_r(up.shape[1]),
        GROUP=8,
        **tiles,
        **layout,
        **products,
    )
    return y


def _outer(x: Tensor, h: Tensor, transposed: bool, tf32: bool | None) -> Tensor:
    """x^T h over all tokens, in fp32: (batch, L, P) and (M, r) to (P, r), or (r, P) transposed."""
    columns, rank = x.shape[2], h.shape[1]
    layout = _layout(x)
    shape = (rank, columns) if transposed else (columns, rank)
    if layout["M"] == 0 or columns * rank == 0:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    chunk = max(512, 64 * triton.cdiv(layout["M"], 64 * 128))  # at most 128 chunks
    chunks = triton.cdiv(layout["M"], chunk)
    part = torch.empty(chunks, *shape, dtype=torch.float32, device=x.device)
    block_r = _block_r(rank)
    _outer_kernel[(triton.cdiv(columns, 64), chunks, triton.cdiv(rank, block_r))](
        x,
        h,
        part,
        P=columns,
        R=rank,
        chunk=chunk,
        stride_xp=x.stride(2),
        stride_pc=part.stride(0),
        stride_pp=part.stride(2 if transposed else 1),
        stride_pr=part.stride(1 if transposed else 2),
        BLOCK_M=64,
        BLOCK_P=64,
        BLOCK_R=block_r,
        num_warps=max(4, block_r // 8),
        num_stages=2,
        **layout,
        **_products(x, tf32),
    )
    return part[0] if chunks == 1 else part.sum(0)


def _keep(like: Tensor, seed: Tensor, dropout: float) -> Tensor:
    """Dropout's mask divided by the share kept, from a seed, on the CPU."""
    generator = torch.Generator().manual_seed(int(seed))
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def _down_torch(
    x: Tensor, weight: Tensor, seed: Tensor | None, scale: float, dropout: float
) -> Tensor:
    h = F.linear(x, weight.to(x.dtype)).flatten(0, -2)
    if seed is not None:
        h.mul_(_keep(h, seed, dropout))
    return h if scale == 1.0 else h.mul_(scale)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    seed: Tensor | None,
    start: int,
    scale: float,
    dropout: float,
    implementation: str,
    tf32: bool | None,
) -> tuple[Tensor, Tensor]:
    """y (..., O) and h (M, r)."""
    with torch.cuda.device_of(x):  # which need not be the current one
        tokens = _tokens(x)
        if implementation == "triton":
            h = _down(tokens, A, seed, scale, dropout, tf32)
            y = _linear(tokens, weight, bias, h, B, start, tf32)
        else:
            h = _down_torch(tokens, A, seed, scale, dropout)
            y = F.linear(tokens, weight, bias).flatten(0, -2)
            y[:, start : start + B.shape[0]].addmm_(h, B.to(x.dtype).T)
        return y.view(*x.shape[:-1], weight.shape[0]), h


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    h: Tensor | None,
    seed: Tensor | None,
    start: int,
    scale: float,
    dropout: float,
    needs: Sequence[bool],
    implementation: str,
    tf32: bool | None,
) -> list[Tensor]:
    """Those gradients of x, W, b, A and B that `needs` asks for; only their inputs are given."""
    with torch.cuda.device_of(dy):  # which need not be the current one
        outer = _tokens(dy)
        ranged = outer[..., start : start + B.shape[0]]
        use_triton = implementation == "triton"
        if needs[0] or needs[3]:
            if use_triton:
                g = _down(ranged, B.T, seed, scale, dropout, tf32)
            else:
                g = _down_torch(ranged, B.T, seed, scale, dropout)
        gradients: list[Tensor] = []
        if needs[0]:
            assert weight is not None
            if use_triton:
                dx = _linear(outer, weight.T, None, g, A.T, 0, tf32)
            else:
                dx = F.linear(outer, weight.T).flatten(0, -2)
                dx.addmm_(g, A.to(dy.dtype))
            gradients.append(dx.view(*dy.shape[:-1], weight.shape[1]))
        if needs[1]:
            assert x is not None
            gradients.append(outer.flatten(0, 1).T @ _tokens(x).flatten(0, 1))
        if needs[2]:
            gradients.append(outer.sum((0, 1)))
        if needs[3]:
            assert x is not None
            dA = _outer(_tokens(x), g, True, tf32) if use_triton else g.T @ _tokens(x).flatten(0, 1)
            gradients.append(dA.to(A.dtype))
        if needs[4]:
            assert h is not None
            dB = _outer(ranged, h, False, tf32) if use_triton else (h.T @ ranged.flatten(0, 1)).T
            gradients.append(dB.to(B.dtype).contiguous())
        return gradients


_forward_op = torch.library.custom_op("emrrg_kernels::lora_linear_fwd", _forward, mutates_args=())
_backward_op = torch.library.custom_op("emrrg_kernels::lora_linear_bwd", _backward, mutates_args=())


@_forward_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    tokens = math.prod(x.shape[:-1])
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(tokens, A.shape[0])


@_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    h: Any,
    seed: Any,
    start: int,
    scale: float,
    dropout: float,
    needs: Sequence[bool],
    implementation: str,
    tf32: Any,
) -> list[Tensor]:
    inputs = A.shape[1]
    fresh = (
        lambda: dy.new_empty(*dy.shape[:-1], inputs),
        lambda: dy.new_empty(dy.shape[-1], inputs),
        lambda: dy.new_empty(dy.shape[-1]),
        lambda: torch.empty_like(A, memory_format=torch.contiguous_format),
        lambda: torch.empty_like(B, memory_format=torch.contiguous_format),
    )
    return [make() for make, needed in zip(fresh, needs, strict=True) if needed]


_gradients = derivative("lora_linear", _backward_op)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, A, B, seed, *ctx.rest = inputs
    h = output[1]
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.needs = list(ctx.needs_input_grad[:5])
    of_x, of_weight, _, of_A, of_B = ctx.needs
    ctx.save_for_backward(
        x if of_weight or of_A else None,
        weight if of_x else None,
        A,
        B,
        h if of_B else None,
        seed if of_x or of_A else None,
    )


def _differentiate(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    start, scale, dropout, implementation, tf32 = ctx.rest
    found = iter(
        _gradients(dy, *ctx.saved_tensors, start, scale, dropout, ctx.needs, implementation, tf32)
    )
    return (*(next(found) if needed else None for needed in ctx.needs), *(None,) * 6)


_linear_with_updates = transformable("lora_linear", _forward_op, _save, _differentiate)


@dataclass(frozen=True)
class LoraSlice:
    """scale * B (A x), added to the output rows from `start`.

    Attributes:
        A: (r, I), as a rule fp32.
        B: (R, r), as a rule fp32.
        scale: s.
        start: first output row.
    """

    A: Tensor
    B: Tensor
    scale: float
    start: int = 0


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slices: Sequence[LoraSlice],
    *,
    dropout: float = 0.0,
    training: bool = False,
    implementation: str | None = None,
    allow_tf32: bool | None = None,
) -> Tensor:
    """A linear layer with low-rank updates of row ranges (LoRA, arXiv 2106.09685; Partial LoRA).

        y = x W^T + b;   y[..., start : start + R] += s * dropout(x A^T) B^T   for every slice

    The products of a slice round A and B to x's dtype and sum in fp32; their gradients come in
    their own dtype. Under autocast x, W and b are cast first, as in `torch.nn.functional.linear`.
    Where B = 0 the result equals that without slices bit for bit (on the CPU: that of
    `torch.nn.functional.linear`).

    Args:
        x: (..., I) fp32, fp16 or bf16, on the CPU also fp64; any strides.
        weight: (O, I) in x's dtype.
        bias: (O,) in x's dtype, or None.
        slices: any number of updates; their row ranges may overlap.
        dropout: rate on the rank-r product while training, in [0, 1). Its seed is drawn from
            torch's generator of x's device.
        training: whether dropout acts.
        implementation: "triton", "torch", "native" (the same as "torch": the products are the
            BLAS's) or "reference"; None: "triton" on a GPU, "torch" on the CPU.
        allow_tf32: whether fp32 products on a GPU may round their operands to TF32; None: as
            `torch.backends.cuda.matmul` says.
    Returns:
        (..., O) in x's dtype.
    Raises:
        ValueError: a shape, dtype, device or the dropout rate does not fit, or the implementation
            cannot run here.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        x, weight = x.to(low), weight.to(low)
        bias = None if bias is None else bias.to(low)
    _check(x, weight, bias, slices, dropout)
    if implementation is None and device == "cpu":
        implementation = "torch"
    implementation = choose(implementation, x.device, x.dtype, "lora_linear")
    dropout = dropout if training and slices else 0.0
    if implementation == "reference":
        keep = None
        if dropout:
            keep = [F.dropout(x.new_ones(*x.shape[:-1], s.A.shape[0]), dropout) for s in slices]
        with torch.autocast(device, enabled=False):
            return lora_linear_ref(x, weight, bias, slices, keep)
    A, B, scale, start = _merged(weight, slices)
    seed = torch.randint(2**62, (1,), device=x.device) if dropout else None
    y, _ = _linear_with_updates(
        x, weight, bias, A, B, seed, start, scale, dropout, implementation, allow_tf32
    )
    return y


def _merged(weight: Tensor, slices: Sequence[LoraSlice]) -> tuple[Tensor, Tensor, float, int]:
    """All slices as one: A stacked, B side by side in the rows from the first to the last.

    The columns of B beyond a slice's own rows are zero. That costs sum r / I of the layer's work,
    where separate passes would read and write y once for each slice.
    """
    if not slices:
        return weight.new_empty(0, weight.shape[1]), weight.new_empty(0, 0), 1.0, 0
    if len(slices) == 1:
        return slices[0].A, slices[0].B, float(slices[0].scale), slices[0].start
    first = min(s.start for s in slices)
    last = max(s.start + s.B.shape[0] for s in slices)
    scale = float(slices[0].scale)
    shared = all(s.scale == scale for s in slices)
    columns = [
        F.pad(
            s.B if shared else s.B * s.scale,
            (0, 0, s.start - first, last - s.start - s.B.shape[0]),
        )
        for s in slices
    ]
    A = torch.cat([s.A for s in slices])
    return A, torch.cat(columns, dim=1), scale if shared else 1.0, first


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, slices: Sequence[LoraSlice], dropout: float
) -> None:
    def refuse(problem: str) -> None:
        raise ValueError(f"lora_linear: {problem}")

    if weight.ndim != 2:
        refuse(f"weight: shape {tuple(weight.shape)}, expected (O, I)")
    outputs, inputs = weight.shape
    if x.ndim < 1 or x.shape[-1] != inputs:
        refuse(f"x: shape {tuple(x.shape)}, expected (..., {inputs})")
    if bias is not None and tuple(bias.shape) != (outputs,):
        refuse(f"bias: shape {tuple(bias.shape)}, expected ({outputs},)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            refuse(f"{name}: {tensor.dtype}, x is {x.dtype}; cast one, or use autocast")
    if not x.is_floating_point():
        refuse(f"x: {x.dtype}, expected floating point")
    if not 0 <= dropout < 1:
        refuse(f"dropout: {dropout} is not in [0, 1)")
    for i, s in enumerate(slices):
        if s.A.ndim != 2 or s.A.shape[1] != inputs:
            refuse(f"slices[{i}].A: shape {tuple(s.A.shape)}, expected (r, {inputs})")
        if s.B.ndim != 2 or s.B.shape[1] != s.A.shape[0]:
            refuse(f"slices[{i}].B: shape {tuple(s.B.shape)}, expected (R, {s.A.shape[0]})")
        if not 0 <= s.start <= outputs - s.B.shape[0]:
            refuse(
                f"slices[{i}]: rows {s.start} to {s.start + s.B.shape[0]} are not all within "
                f"the layer's {outputs}"
            )
    parts = {f"slices[{i}].{name}": getattr(s, name) for i, s in enumerate(slices) for name in "AB"}
    for name, tensor in {"weight": weight, "bias": bias, **parts}.items():
        if tensor is not None and tensor.device != x.device:
            refuse(f"{name} is on {tensor.device}, x on {x.device}")
