"""The scans of a vision Mamba's visiting orders, summed in place and gated once.

    d_kt = softplus(delta_kt + delta_bias_k);   x_kt = d_kt u_kt;   a_kt = exp(d_kt A_k)
    h_kt = a_kt h_k,t-1 + x_kt B_kt;            y_kt = <C_kt, h_kt> + D_k u_kt
    out at token o = silu(z_o) / K * sum over k of y_kt where orders[k, t] = o

(Mamba, arXiv 2312.00752, equations 2 to 4 with the discretisation of its code; Vision Mamba, arXiv
2401.09417, for scans in several orders.) An order is an index map: a step reads z and adds its y
where its token stands, so nothing of size (B, L, D) is flipped, permuted or gated K times.

Backward, with dy the gradient of y, w_t = a_t h_t-1 what a step keeps of the state and
v_t = a_t+1 dh_t+1 what the later steps give back:

    dh_t = dy_t C_t + v_t;   dC_t = sum_d dy_t h_t;   dB_t = sum_d x_t dh_t
    du_t = d_t <B_t, dh_t> + D dy_t;   dd_t = <A, r_t> + u_t <B_t, dh_t>;   r_t = w_t dh_t
    dA = sum_t dy_t C_t m_t;   m_t = a_t m_t-1 + d_t w_t, the derivative of h_t by A

r couples the states, which run forward, with their gradients, which run backward. Its recurrence
takes them apart:

    r_t = r_t+1 + p_t - q_t;   p_t = dy_t C_t w_t;   q_t = x_t B_t v_t

because p_t = r_t - w_t v_t and q_t = r_t+1 - w_t v_t. So one pass forward makes dC, dA, <A, p> and
the y that dz needs, one pass backward makes dh, <A, q> and the rest; each exponential is taken
twice, and no states are kept for a block of steps or computed again in one. Every `STEPS` steps the
sum starts anew from the state kept there, r_t+1 = h_t v_t. Its error is 1e-7 of its largest term;
that is d |A| times the other term of dd where a long step precedes a short one. dy is made once, by
token, for both passes and all orders of a program.

Shapes: B batch, L length, D channels, N states a channel, K orders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels import scan_cpu
from kernels.causal_conv1d import check_orders
from kernels.implementations import choose, nvidia
from kernels.inputs import CrossInputs
from kernels.reference import cross_scan_ref
from kernels.transforms import derivative, transformable
from kernels.triton_math import jit, silu_slope, softplus, softplus_slope, tl, triton

STEPS = 64  # between the states that the backward keeps
MANY_PROGRAMS = 1024  # two warps on each of the schedulers of a large GPU
SCATTER = hasattr(tl, "gather")  # Triton 3.3 has it


@jit
def _read(at, mask, WHOLE: tl.constexpr):
    """Load as fp32; WHOLE: no mask is needed."""
    if WHOLE:
        return tl.load(at).to(tl.float32)
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@jit
def _write(at, x, mask, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=mask)


@jit
def _in_tile(BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHANNELS: tl.constexpr):
    """Places in a contiguous tile (BLOCK_N, BLOCK_D).

    The alignment that is stated sets the channels of a thread. It then holds all N of them, and no
    sum over N leaves it.
    """
    at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return tl.multiple_of(at, [CHANNELS, CHANNELS])


@jit
def _advance(h, a, u, d, B_at, C_at, mask_n, WHOLE_N: tl.constexpr):
    """The state after a step, and <C, h>."""
    b = _read(B_at, mask_n, WHOLE_N)
    c = _read(C_at, mask_n, WHOLE_N)
    h = tl.math.exp2(d[None, :] * a) * h + b[:, None] * (d * u)[None, :]
    return h, tl.sum(h * c[:, None], 0)


if SCATTER:

    @jit
    def _exchange(x, lane):
        """x (rows, LANES) of other lanes."""
        return tl.gather(x, tl.broadcast_to(lane[None, :], x.shape), 1)

else:  # the compiler looks at names in branches that it does not take

    @jit
    def _exchange(x, lane):
        return x


@jit
def _halve(x, lane, BIT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """(2 ROWS, LANES) to (ROWS, LANES): lanes that differ by BIT add up a half each, or the row."""
    if ROWS == 0:
        kept, given = x, x
    else:
        upper = (lane & BIT)[None, :] != 0
        low, high = tl.split(tl.permute(tl.reshape(x, [2, ROWS, LANES]), 1, 2, 0))
        kept = tl.where(upper, high, low)
        given = tl.where(upper, low, high)
    return kept + _exchange(given, lane ^ BIT)


@jit
def _write_channel_sums(
    at,
    x,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """Write the sums of x (BLOCK_N, LANES * CHANNELS) over channels, N numbers.

    SCATTER: each thread holds all rows of its channels and the threads of a warp halve the rows:
    one keeps the upper half and gets it from the other, which keeps the lower. That takes 16
    shuffles for 16 rows, where a `tl.sum` takes 80, and shared memory.
    """
    if SCATTER:
        lane = tl.arange(0, LANES)
        if CHANNELS > 1:
            x = tl.sum(tl.reshape(x, [BLOCK_N, LANES, CHANNELS]), 2)
        for i in tl.static_range(6 if LANES == 64 else 5):
            x = _halve(x, lane, LANES >> (i + 1), BLOCK_N >> (i + 1), LANES)
        n = lane // (LANES // BLOCK_N)
        one = (lane % (LANES // BLOCK_N) == 0) & (n < N)
        tl.store(at + n, tl.reshape(x, [LANES]), mask=one)
    else:
        n = tl.arange(0, BLOCK_N)
        tl.store(at + n, tl.sum(x, 1), mask=n < N)


# fmt: off
@jit
def _gate_rows(
    total_ptr, z_ptr, dout_ptr, out_ptr, offs_l, offs_d, mask, b, L, D,
    stride_part, stride_tb, stride_tl, stride_td,
    stride_zb, stride_zl, stride_zd, stride_gb, stride_gl, stride_gd,
    PARTS: tl.constexpr, K: tl.constexpr, SLOPE: tl.constexpr, NVIDIA: tl.constexpr,
):
    # fmt: on
    """Rows of silu(z) total / K, or with SLOPE of dout silu'(z) total / K."""
    at = total_ptr + b * stride_tb + offs_l * stride_tl + offs_d * stride_td
    total = _read(at, mask, False)
    for part in tl.static_range(1, PARTS):
        total += _read(at + part * stride_part, mask, False)
    z = _read(z_ptr + b * stride_zb + offs_l * stride_zl + offs_d * stride_zd, mask, False)
    gate, slope = silu_slope(z, NVIDIA)
    if SLOPE:
        dout_at = dout_ptr + b * stride_gb + offs_l * stride_gl + offs_d * stride_gd
        gate = _read(dout_at, mask, False) * slope
    at = out_ptr + (b * L + offs_l) * D + offs_d
    tl.store(at, total * gate * (1.0 / K), mask=mask)


# fmt: off
@jit(do_not_specialize=["batch", "L"])
def _cross_scan_fwd_kernel(
    u_ptr, delta_ptr,
    A_ptr,  # (K, blocks, BLOCK_N, BLOCK_D), log2(e) A in tiles
    B_ptr, C_ptr,
    D_ptr,  # (K, D) contiguous
    z_ptr,
    bias_ptr,  # (K, D) contiguous
    orders_ptr,  # (K, L) contiguous
    total_ptr,  # (B, L, D) contiguous, or with PARALLEL (K, B, L, D)
    out_ptr,  # (B, L, D) contiguous
    batch, L, D,
    stride_uk, stride_ub, stride_ul, stride_ud,
    stride_dk, stride_db, stride_dl, stride_dd,
    stride_Bk, stride_Bb, stride_Bl,
    stride_Ck, stride_Cb, stride_Cl,
    stride_zb, stride_zl, stride_zd,
    K: tl.constexpr, N: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    CHANNELS: tl.constexpr, WHOLE: tl.constexpr, PARALLEL: tl.constexpr, NVIDIA: tl.constexpr,
):
    # fmt: on
    """A program takes a block of channels of a sample through all orders; PARALLEL: through one.

    Four steps are unrolled and store at their end, so that all their loads are under way at once.
    """
    WHOLE_N: tl.constexpr = N == BLOCK_N
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(1)
    first = 0
    last = K
    if PARALLEL:
        first = tl.program_id(0) % K
        last = first + 1
        b = b // K
    offs_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    in_tile = _in_tile(BLOCK_N, BLOCK_D, CHANNELS)
    mask = offs_d < D
    mask_n = offs_n < N
    for order in range(first, last):
        k = b * 0 + order  # int64
        a = tl.load(A_ptr + (k * blocks + block) * BLOCK_N * BLOCK_D + in_tile)
        skip = _read(D_ptr + k * D + offs_d, mask, WHOLE)
        bias = _read(bias_ptr + k * D + offs_d, mask, WHOLE)
        u_at = u_ptr + k * stride_uk + b * stride_ub + offs_d * stride_ud
        d_at = delta_ptr + k * stride_dk + b * stride_db + offs_d * stride_dd
        B_row = B_ptr + k * stride_Bk + b * stride_Bb
        C_row = C_ptr + k * stride_Ck + b * stride_Cb
        order_at = orders_ptr + k * L
        total_at = total_ptr + b * L * D + offs_d
        if PARALLEL:
            total_at += k * batch * L * D
        begun = mask & (k > 0)
        h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for _ in range(0, L - 3, 4):
            y0_at = total_at + tl.load(order_at) * D
            y1_at = total_at + tl.load(order_at + 1) * D
            y2_at = total_at + tl.load(order_at + 2) * D
            y3_at = total_at + tl.load(order_at + 3) * D
            order_at += 4
            u0 = _read(u_at, mask, WHOLE)
            d0 = softplus(_read(d_at, mask, WHOLE) + bias)
            h, y0 = _advance(h, a, u0, d0, B_row + offs_n, C_row + offs_n, mask_n, WHOLE_N)
            u_at += stride_ul
            d_at += stride_dl
            B_row += stride_Bl
            C_row += stride_Cl
            u1 = _read(u_at, mask, WHOLE)
            d1 = softplus(_read(d_at, mask, WHOLE) + bias)
            h, y1 = _advance(h, a, u1, d1, B_row + offs_n, C_row + offs_n, mask_n, WHOLE_N)
            u_at += stride_ul
            d_at += stride_dl
            B_row += stride_Bl
            C_row += stride_Cl
            u2 = _read(u_at, mask, WHOLE)
            d2 = softplus(_read(d_at, mask, WHOLE) + bias)
            h, y2 = _advance(h, a, u2, d2, B_row + offs_n, C_row + offs_n, mask_n, WHOLE_N)
            u_at += stride_ul
            d_at += stride_dl
            B_row += stride_Bl
            C_row += stride_Cl
            u3 = _read(u_at, mask, WHOLE)
            d3 = softplus(_read(d_at, mask, WHOLE) + bias)
            h, y3 = _advance(h, a, u3, d3, B_row + offs_n, C_row + offs_n, mask_n, WHOLE_N)
            u_at += stride_ul
            d_at += stride_dl
            B_row += stride_Bl
            C_row += stride_Cl
            y0 += skip * u0
            y1 += skip * u1
            y2 += skip * u2
            y3 += skip * u3
            if not PARALLEL:
                y0 += _read(y0_at, begun, False)
                y1 += _read(y1_at, begun, False)
                y2 += _read(y2_at, begun, False)
                y3 += _read(y3_at, begun, False)
            _write(y0_at, y0, mask, WHOLE)
            _write(y1_at, y1, mask, WHOLE)
            _write(y2_at, y2, mask, WHOLE)
            _write(y3_at, y3, mask, WHOLE)
        for _ in range(L // 4 * 4, L):
            y_at = total_at + tl.load(order_at) * D
            u = _read(u_at, mask, WHOLE)
            d = softplus(_read(d_at, mask, WHOLE) + bias)
            h, y = _advance(h, a, u, d, B_row + offs_n, C_row + offs_n, mask_n, WHOLE_N)
            y += skip * u
            if not PARALLEL:
                y += _read(y_at, begun, False)
            _write(y_at, y, mask, WHOLE)
            order_at += 1
            u_at += stride_ul
            d_at += stride_dl
            B_row += stride_Bl
            C_row += stride_Cl
        tl.debug_barrier()  # the next order reads what other threads may have written
    if not PARALLEL:
        for row in range(0, L, BLOCK_L):
            offs_l = b * 0 + row + tl.arange(0, BLOCK_L)[:, None]
            _gate_rows(
                total_ptr, z_ptr, z_ptr, out_ptr,
                offs_l, offs_d[None, :], (offs_l < L) & mask[None, :], b, L, D,
                0, L * D, D, 1, stride_zb, stride_zl, stride_zd, 0, 0, 0,
                PARTS=1, K=K, SLOPE=False, NVIDIA=NVIDIA,
            )  # fmt: skip


# fmt: off
@jit(do_not_specialize=["L"])
def _cross_scan_gate_kernel(
    total_ptr,  # (K, B, L, D) contiguous
    z_ptr, dout_ptr,
    out_ptr,  # (B, L, D) contiguous
    L, D, stride_part,
    stride_zb, stride_zl, stride_zd,
    stride_gb, stride_gl, stride_gd,
    K: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
    SLOPE: tl.constexpr, NVIDIA: tl.constexpr,
):
    # fmt: on
    """Sum what the orders left and gate it; with SLOPE the gradient of z."""
    pid = tl.program_id(0).to(tl.int64)
    rows = tl.cdiv(L, BLOCK_L)
    columns = tl.cdiv(D, BLOCK_D)
    offs_d = (pid % columns) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    offs_l = (pid // columns % rows) * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    _gate_rows(
        total_ptr, z_ptr, dout_ptr, out_ptr,
        offs_l, offs_d, (offs_l < L) & (offs_d < D), pid // columns // rows, L, D,
        stride_part, L * D, D, 1,
        stride_zb, stride_zl, stride_zd, stride_gb, stride_gl, stride_gd,
        PARTS=K, K=K, SLOPE=SLOPE, NVIDIA=NVIDIA,
    )  # fmt: skip


# fmt: off
@jit(do_not_specialize=["batch", "L"])
def _cross_scan_bwd_kernel(
    dout_ptr, u_ptr, delta_ptr,
    A_ptr,  # (K, blocks, BLOCK_N, BLOCK_D), log2(e) A in tiles
    B_ptr, C_ptr,
    D_ptr,  # (K, D) contiguous
    z_ptr,
    bias_ptr,  # (K, D) contiguous
    orders_ptr,  # (K, L) contiguous
    du_ptr, ddelta_ptr,  # (K, B, L, D) contiguous
    dA_ptr,  # (B, K, blocks, BLOCK_N, BLOCK_D), parts
    dB_ptr, dC_ptr,  # (blocks, K, B, L, N), parts
    dD_ptr,  # (B, K, D), parts
    dz_ptr,  # (B, L, D) contiguous
    dbias_ptr,  # (B, K, D), parts
    dy_ptr, p_ptr, y_ptr,  # (B, L, D), workspaces; with PARALLEL (K, B, L, D)
    kept_ptr,  # (B, blocks, chunks, BLOCK_N, BLOCK_D), workspace; with PARALLEL (K, B, ...)
    batch, L, D,
    stride_gb, stride_gl, stride_gd,
    stride_uk, stride_ub, stride_ul, stride_ud,
    stride_dk, stride_db, stride_dl, stride_dd,
    stride_Bk, stride_Bb, stride_Bl,
    stride_Ck, stride_Cb, stride_Cl,
    stride_zb, stride_zl, stride_zd,
    K: tl.constexpr, N: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    LANES: tl.constexpr, CHANNELS: tl.constexpr, SCATTER: tl.constexpr,
    WHOLE: tl.constexpr, PARALLEL: tl.constexpr, NVIDIA: tl.constexpr,
    NEED_U: tl.constexpr, NEED_DELTA: tl.constexpr, NEED_A: tl.constexpr, NEED_B: tl.constexpr,
    NEED_C: tl.constexpr, NEED_D: tl.constexpr, NEED_Z: tl.constexpr, NEED_BIAS: tl.constexpr,
):
    # fmt: on
    """A program takes a block of channels of a sample through all orders; PARALLEL: through one."""
    WHOLE_N: tl.constexpr = N == BLOCK_N
    NEED_P: tl.constexpr = NEED_DELTA | NEED_BIAS
    FORWARD: tl.constexpr = NEED_P | NEED_A | NEED_C | NEED_D | NEED_Z
    BACKWARD: tl.constexpr = NEED_P | NEED_B | NEED_U
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(1)
    first = 0
    last = K
    if PARALLEL:
        first = tl.program_id(0) % K
        last = first + 1
        b = b // K
    offs_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_d < D
    mask_n = offs_n < N
    chunks = tl.cdiv(L, STEPS)
    in_tile = _in_tile(BLOCK_N, BLOCK_D, CHANNELS)
    u_lane = offs_d * stride_ud
    d_lane = offs_d * stride_dd
    if PARALLEL:
        dy_ptr += (b * 0 + first) * batch * L * D
    dy_at = dy_ptr + b * L * D + offs_d
    for top in range(0, L, BLOCK_L):
        offs_l = b * 0 + top + tl.arange(0, BLOCK_L)[:, None]
        _gate_rows(
            dout_ptr, z_ptr, dout_ptr, dy_ptr,
            offs_l, offs_d[None, :], (offs_l < L) & mask[None, :], b, L, D,
            0, stride_gb, stride_gl, stride_gd, stride_zb, stride_zl, stride_zd, 0, 0, 0,
            PARTS=1, K=K, SLOPE=False, NVIDIA=NVIDIA,
        )  # fmt: skip
    tl.debug_barrier()  # other threads read what was stored
    for order in range(first, last):
        k = b * 0 + order  # int64
        a = tl.load(A_ptr + (k * blocks + block) * BLOCK_N * BLOCK_D + in_tile)
        skip = _read(D_ptr + k * D + offs_d, mask, WHOLE)
        bias = _read(bias_ptr + k * D + offs_d, mask, WHOLE)
        # Only scalars move from step to step; vectors of pointers would change their layout.
        u_row = u_ptr + k * stride_uk + b * stride_ub
        d_row = delta_ptr + k * stride_dk + b * stride_db
        B_row = B_ptr + k * stride_Bk + b * stride_Bb
        C_row = C_ptr + k * stride_Ck + b * stride_Cb
        order_at = orders_ptr + k * L
        row = (k * batch + b) * L  # of (K, B, L, ...)
        slot = b
        if PARALLEL:
            slot += k * batch
        p_row = p_ptr + slot * L * D
        y_at = y_ptr + slot * L * D + offs_d
        kept_row = kept_ptr + (slot * blocks + block) * chunks * BLOCK_N * BLOCK_D
        part = (b * K + k) * D + offs_d  # of (B, K, D)
        begun = mask & (k > 0)
        if FORWARD:
            dC_row = dC_ptr + (block * K * batch * L + row) * N
            h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            m = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dA = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dD = tl.zeros([BLOCK_D], tl.float32)
            for chunk in range(chunks):
                for _ in range(chunk * STEPS, tl.minimum(chunk * STEPS + STEPS, L)):
                    o = tl.load(order_at)
                    u = _read(u_row + u_lane, mask, WHOLE)
                    dy = _read(dy_at + o * D, mask, WHOLE)
                    d = softplus(_read(d_row + d_lane, mask, WHOLE) + bias)
                    bt = _read(B_row + offs_n, mask_n, WHOLE_N)
                    ct = _read(C_row + offs_n, mask_n, WHOLE_N)[:, None]
                    move = tl.math.exp2(d[None, :] * a)
                    w = move * h
                    h = bt[:, None] * (d * u)[None, :] + w
                    if NEED_D:
                        dD += dy * u
                    if NEED_Z:
                        y = tl.sum(h * ct, 0) + skip * u
                        if not PARALLEL:
                            y += _read(y_at + o * D, begun, False)
                        _write(y_at + o * D, y, mask, WHOLE)
                    if NEED_P:
                        _write(p_row + offs_d, dy * tl.sum(w * ct * a, 0), mask, WHOLE)
                        p_row += D
                    if NEED_A:
                        m = move * m + d[None, :] * w
                        dA += m * (ct * dy[None, :])
                    if NEED_C:
                        _write_channel_sums(
                            dC_row, h * dy[None, :], N, BLOCK_N, LANES, CHANNELS, SCATTER
                        )
                        dC_row += N
                    order_at += 1
                    u_row += stride_ul
                    d_row += stride_dl
                    B_row += stride_Bl
                    C_row += stride_Cl
                if NEED_P:
                    tl.store(kept_row + in_tile, h)
                    kept_row += BLOCK_N * BLOCK_D
            if NEED_D:
                _write(dD_ptr + part, dD, mask, WHOLE)
            if NEED_A:
                tile = ((b * K + k) * blocks + block) * BLOCK_N * BLOCK_D
                tl.store(dA_ptr + tile + in_tile, dA)
            tl.debug_barrier()  # other threads may read what was stored
        else:  # start at the end
            end = b * 0 + L
            order_at += end
            u_row += end * stride_ul
            d_row += end * stride_dl
            B_row += end * stride_Bl
            C_row += end * stride_Cl
        if BACKWARD:
            dB_row = dB_ptr + (block * K * batch * L + row + L) * N
            du_row = du_ptr + (row + L) * D
            ddelta_row = ddelta_ptr + (row + L) * D
            v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            r = tl.zeros([BLOCK_D], tl.float32)
            dbias = tl.zeros([BLOCK_D], tl.float32)
            for chunk in range(chunks):
                begin = (chunks - 1 - chunk) * STEPS
                if NEED_P:
                    kept_row -= BLOCK_N * BLOCK_D
                    r = tl.sum(tl.load(kept_row + in_tile) * v * a, 0)
                for _ in range(begin, tl.minimum(begin + STEPS, L)):
                    order_at -= 1
                    u_row -= stride_ul
                    d_row -= stride_dl
                    B_row -= stride_Bl
                    C_row -= stride_Cl
                    o = tl.load(order_at)
                    u = _read(u_row + u_lane, mask, WHOLE)
                    dy = _read(dy_at + o * D, mask, WHOLE)
                    d, slope = softplus_slope(_read(d_row + d_lane, mask, WHOLE) + bias, NVIDIA)
                    bt = _read(B_row + offs_n, mask_n, WHOLE_N)[:, None]
                    ct = _read(C_row + offs_n, mask_n, WHOLE_N)
                    dh = ct[:, None] * dy[None, :] + v
                    if NEED_U or NEED_P:
                        s = tl.sum(dh * bt, 0)
                    if NEED_U:
                        du_row -= D
                        _write(du_row + offs_d, d * s + skip * dy, mask, WHOLE)
                    if NEED_P:
                        p_row -= D
                        r += _read(p_row + offs_d, mask, WHOLE) - d * u * tl.sum(v * bt * a, 0)
                        dd = (r * 0.6931471805599453 + u * s) * slope
                        dbias += dd
                        if NEED_DELTA:
                            ddelta_row -= D
                            _write(ddelta_row + offs_d, dd, mask, WHOLE)
                    if NEED_B:
                        dB_row -= N
                        _write_channel_sums(
                            dB_row,
                            dh * (d * u)[None, :],
                            N, BLOCK_N, LANES, CHANNELS, SCATTER,
                        )  # fmt: skip
                    v = tl.math.exp2(d[None, :] * a) * dh
            if NEED_BIAS:
                _write(dbias_ptr + part, dbias, mask, WHOLE)
        tl.debug_barrier()
    if NEED_Z and not PARALLEL:
        for row in range(0, L, BLOCK_L):
            offs_l = b * 0 + row + tl.arange(0, BLOCK_L)[:, None]
            _gate_rows(
                y_ptr, z_ptr, dout_ptr, dz_ptr,
                offs_l, offs_d[None, :], (offs_l < L) & mask[None, :], b, L, D,
                0, L * D, D, 1,
                stride_zb, stride_zl, stride_zd, stride_gb, stride_gl, stride_gd,
                PARTS=1, K=K, SLOPE=True, NVIDIA=NVIDIA,
            )  # fmt: skip


def _blocks(state: int, dim: int, values: int) -> dict[str, Any]:
    """Sizes of a program whose threads hold `values` numbers of the state each.

    The threads of a warp (32, on AMD 64) hold all states of their channels while they fit; then no
    sum over the states leaves a thread. More states are split over warps.
    """
    lanes = 64 if torch.version.hip else 32
    block_n = triton.next_power_of_2(state)
    warps = max(1, block_n // values)
    block_d = min(4 * lanes, max(lanes, values * lanes * warps // block_n))
    return {
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        # Not as many rows as the tile of A: the compiler would give both one layout.
        "BLOCK_L": 8 if block_n == 16 else 16,
        "CHANNELS": block_d // lanes,
        "WHOLE": dim % block_d == 0,
        "num_warps": warps,
    }


def _parallel(count: int, programs: int) -> bool:
    """Whether the orders run side by side, with a second launch that sums and gates.

    Few programs leave most of a GPU idle, and each would wait for K times as many steps. On AMD the
    kernel that does all in one launch has more scalars than fit the scalar registers.
    """
    return bool(torch.version.hip) or (count > 1 and programs < MANY_PROGRAMS)


def _registers(count: int) -> dict[str, int]:
    """How many registers a thread may take, as an option of a launch.

    By itself the compiler takes 80 for the forward, and then waits for each load; up to 168 leave
    room for three warps on a scheduler. AMD's compiler has no such option.
    """
    return {} if torch.version.hip else {"maxnreg": count}


def _launch_fwd(inputs: CrossInputs) -> Tensor:
    u, delta, A, B, C, D, z, delta_bias, orders = inputs
    count, batch, length, dim = u.shape
    state = A.shape[2]
    out = z.new_empty(z.shape)
    if out.numel() == 0:
        return out
    # One channel a thread makes the most programs there can be; the exponentials (16 a clock on a
    # multiprocessor) bound the loop before its instructions do.
    sizes = _blocks(state, dim, 16 if state <= 16 else 32)
    blocks = triton.cdiv(dim, sizes["BLOCK_D"])
    parallel = _parallel(count, batch * blocks)
    total = out
    if parallel or out.dtype != torch.float32:
        total = _workspace(u, *((count,) if parallel else ()), *z.shape)
    B, C = _rows(B), _rows(C)
    _cross_scan_fwd_kernel[(batch * count if parallel else batch, blocks)](
        u, delta, _tiles(A, sizes["BLOCK_N"], sizes["BLOCK_D"]), B, C, D.contiguous(), z,
        delta_bias.contiguous(), orders.contiguous(), total, out, batch, length, dim,
        *u.stride(), *delta.stride(), *B.stride()[:3], *C.stride()[:3], *z.stride(),
        K=count, N=state, PARALLEL=parallel, NVIDIA=nvidia(), **sizes,
        **_registers(160 if state <= 16 else 255),
    )  # fmt: skip
    if parallel:
        _launch_gate(total, z, None, out)
    return out


def _launch_gate(total: Tensor, z: Tensor, dout: Tensor | None, out: Tensor) -> None:
    count, batch, length, dim = total.shape
    block_l, block_d = 16, 128
    grid = (batch * triton.cdiv(length, block_l) * triton.cdiv(dim, block_d),)
    strides = (0, 0, 0) if dout is None else dout.stride()
    _cross_scan_gate_kernel[grid](
        total, z, z if dout is None else dout, out,
        length, dim, total.stride(0), *z.stride(), *strides,
        K=count, BLOCK_L=block_l, BLOCK_D=block_d, SLOPE=dout is not None, NVIDIA=nvidia(),
        num_warps=4,
    )  # fmt: skip


def _launch_bwd(
    dout: Tensor, inputs: CrossInputs, needs: Sequence[bool]
) -> list[Tensor | None]:
    u, delta, A, B, C, D, z, delta_bias, orders = inputs
    if u.numel() == 0:
        wanted = zip(inputs.differentiable, needs, strict=True)
        return [torch.zeros_like(t) if need else None for t, need in wanted]
    count, batch, length, dim = u.shape
    state = A.shape[2]
    # Two channels a thread halve the shuffles of dB and dC for each number, and leave registers
    # for four programs on a scheduler.
    sizes = _blocks(state, dim, 32)
    blocks = triton.cdiv(dim, sizes["BLOCK_D"])
    # A's gradient has two more tiles in registers, which leave no room for what one launch needs.
    parallel = needs[2] or _parallel(count, batch * blocks)
    registers = _registers(168 if parallel and not needs[2] else 255)
    parts = (count,) if parallel else ()
    du, ddelta, dz = (
        t.new_empty(t.shape) if needs[i] else None for i, t in ((0, u), (1, delta), (6, z))
    )
    chunks = triton.cdiv(length, STEPS)
    tile = (sizes["BLOCK_N"], sizes["BLOCK_D"])
    shapes = (
        (needs[2], (batch, count, blocks, *tile)),
        (needs[3], (blocks, count, batch, length, state)),
        (needs[4], (blocks, count, batch, length, state)),
        (needs[5], (batch, count, dim)),
        (needs[7], (batch, count, dim)),
        (True, (*parts, batch, length, dim)),
        (needs[1] or needs[7], (*parts, batch, length, dim)),
        (needs[6], (*parts, batch, length, dim)),
        (needs[1] or needs[7], (*parts, batch, blocks, chunks, *tile)),
    )
    dA, dB, dC, dD, dbias, dy, p, y, kept = (
        _workspace(u, *shape) if need else None for need, shape in shapes
    )
    B, C = _rows(B), _rows(C)
    _cross_scan_bwd_kernel[(batch * count if parallel else batch, blocks)](
        dout, u, delta, _tiles(A, *tile), B, C, D.contiguous(), z,
        delta_bias.contiguous(), orders.contiguous(),
        *(u if t is None else t for t in (du, ddelta, dA, dB, dC, dD, dz, dbias, dy, p, y, kept)),
        batch, length, dim, *dout.stride(),
        *u.stride(), *delta.stride(), *B.stride()[:3], *C.stride()[:3], *z.stride(),
        K=count, N=state, STEPS=STEPS, LANES=sizes["BLOCK_D"] // sizes["CHANNELS"],
        SCATTER=SCATTER and state <= 32,
        PARALLEL=parallel, NVIDIA=nvidia(),
        **{f"NEED_{name}": need for name, need in zip(_NEEDS, needs, strict=True)},
        **sizes, **registers,
    )  # fmt: skip
    if parallel and y is not None and dz is not None:
        _launch_gate(y, z, dout, dz)
    if dA is not None:
        dA = dA.sum(0).mT.reshape(count, -1, tile[0])[:, :dim, :state].to(A.dtype)
    dB, dC, dD, dbias = (
        None if t is None else t.sum(0).to(x.dtype)
        for t, x in ((dB, B), (dC, C), (dD, D), (dbias, delta_bias))
    )
    return [du, ddelta, dA, dB, dC, dD, dz, dbias]


def _workspace(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _tiles(A: Tensor, block_n: int, block_d: int) -> Tensor:
    """log2(e) A in tiles (K, blocks, BLOCK_N, BLOCK_D), filled up with zeros: exp(d A) is exp2."""
    count, dim, state = A.shape
    blocks = triton.cdiv(dim, block_d)
    if state < block_n or dim % block_d:
        A = F.pad(A, (0, block_n - state, 0, blocks * block_d - dim))
    out = _workspace(A, count, blocks, block_n, block_d)
    tiles = A.float().reshape(count, blocks, block_d, block_n).mT
    return torch.mul(tiles, 1 / math.log(2), out=out)


def _rows(x: Tensor) -> Tensor:
    """x with its last axis contiguous, as the kernels read B and C."""
    return x if x.stride(-1) == 1 else x.contiguous()


_NEEDS = ("U", "DELTA", "A", "B", "C", "D", "Z", "BIAS")


@torch.library.custom_op(
    "emrrg_kernels::cross_scan_fwd",
    mutates_args=(),
    schema="(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, "
    "Tensor delta_bias, Tensor orders, str implementation) -> Tensor",
)
def _cross_scan_fwd(*args: Any) -> Tensor:
    *tensors, implementation = args
    inputs = CrossInputs(*tensors)
    check_orders("cross_scan", inputs.orders)
    if implementation == "triton":
        with torch.cuda.device_of(inputs.u):  # which need not be the current one
            return _launch_fwd(inputs)
    with torch.autocast("cpu", enabled=False):
        return scan_cpu.cross_forward(implementation == "native", inputs)


@_cross_scan_fwd.register_fake
def _(*args: Any) -> Tensor:
    return args[6].new_empty(args[6].shape)


@torch.library.custom_op(
    "emrrg_kernels::cross_scan_bwd",
    mutates_args=(),
    schema="(Tensor dout, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, "
    "Tensor z, Tensor delta_bias, Tensor orders, bool[] needs, str implementation) -> Tensor[]",
)
def _cross_scan_bwd(*args: Any) -> list[Tensor]:
    dout, *tensors, needs, implementation = args
    inputs = CrossInputs(*tensors)
    gradients: Sequence[Tensor | None]
    if implementation == "triton":
        with torch.cuda.device_of(dout):
            gradients = _launch_bwd(dout, inputs, needs)
    else:
        with torch.autocast("cpu", enabled=False):
            gradients = scan_cpu.cross_backward(implementation == "native", dout, inputs, needs)
    return [g.contiguous() for g in gradients if g is not None]


@_cross_scan_bwd.register_fake
def _(dout: Tensor, *args: Any) -> list[Tensor]:
    *tensors, _, needs, _ = args
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]


_gradients = derivative("cross_scan", _cross_scan_bwd)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, implementation = inputs
    ctx.needs = list(ctx.needs_input_grad[: len(_NEEDS)])
    ctx.implementation = implementation
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    gradients = iter(_gradients(dout, *ctx.saved_tensors, ctx.needs, ctx.implementation))
    return (*(next(gradients) if need else None for need in ctx.needs), None, None)


_scan = transformable("cross_scan", _cross_scan_fwd, _setup_context, _backward)


def cross_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    orders: Tensor,
    implementation: str | None = None,
) -> Tensor:
    """The scans of K visiting orders, summed where the tokens stand and gated once.

        out = silu(z) / K * sum over k of scan_k(u[k], delta[k], ...), each put back in place

    See the module's docstring for the recurrence. The state is fp32 whatever the inputs are.
    Gradients flow to every tensor but `orders`; those that nothing needs are not computed. The
    sum before the gate is not saved for the backward, it is computed again.

    Args:
        u, delta: (K, B, L, D) fp32, fp16 or bf16 (fp64 on the CPU), in the order of the visit, any
            strides; delta before bias and softplus.
        A: (K, D, N), N from 1 to 256. Negative for stability; not checked.
        B, C: (K, B, L, N), in the order of the visit; fp32 is the fastest.
        D, delta_bias: (K, D).
        z: (B, L, D), by token, any strides.
        orders: (K, L) int64, each row a permutation of the tokens 0 ... L-1
            (`kernels.reference.visiting_orders`); checked on the CPU alone.
        implementation: see `kernels.implementations`; None follows the device.
    Returns:
        (B, L, D) in z's dtype, by token, contiguous.
    Raises:
        ValueError: shapes or devices disagree, orders are no permutations, or an implementation
            that cannot run there.
        TypeError: a tensor that is not of floating point, or orders that are not int64.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias, orders)
    _check(*tensors)
    widest = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else u.dtype
    chosen = choose(implementation, u.device, widest, "cross_scan")
    if chosen == "reference":
        return cross_scan_ref(*tensors)
    return _scan(*tensors, chosen)


def _check(u: Tensor, delta: Tensor, A: Tensor, *others: Tensor) -> None:
    if u.ndim != 4 or A.ndim != 3:
        raise ValueError(
            f"cross_scan: u has shape {tuple(u.shape)}, expected (K, B, L, D), and A "
            f"{tuple(A.shape)}, expected (K, D, N)"
        )
    count, batch, length, dim = u.shape
    state = A.shape[2]
    if not 1 <= state <= 256 or count < 1:
        raise ValueError(
            f"cross_scan: A has shape {tuple(A.shape)}, expected K >= 1, 1 <= N <= 256"
        )
    expected = {
        "u": (count, batch, length, dim),
        "delta": (count, batch, length, dim),
        "A": (count, dim, state),
        "B": (count, batch, length, state),
        "C": (count, batch, length, state),
        "D": (count, dim),
        "z": (batch, length, dim),
        "delta_bias": (count, dim),
        "orders": (count, length),
    }
    for (name, shape), tensor in zip(expected.items(), (u, delta, A, *others), strict=True):
        if tuple(tensor.shape) != shape:
            got = tuple(tensor.shape)
            raise ValueError(f"cross_scan: {name} has shape {got}, expected {shape}")
        if tensor.device != u.device:
            raise ValueError(f"cross_scan: {name} is on {tensor.device}, u on {u.device}")
        if name == "orders" and tensor.dtype != torch.int64:
            raise TypeError(f"cross_scan: orders are {tensor.dtype}, expected torch.int64")
        if name != "orders" and not tensor.is_floating_point():
            raise TypeError(f"cross_scan: {name} is {tensor.dtype}, expected floating point")
