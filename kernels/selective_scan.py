"""The selective scan of Mamba-1, forward and backward, for GPUs and CPUs.

    d_t = softplus(delta_t + delta_bias)        softplus only where asked for
    h_t = exp(d_t A) h_{t-1} + d_t B_t u_t      a state of N numbers for each of D channels
    y_t = <C_t, h_t> + D u_t;                   out_t = y_t silu(z_t)

(Mamba, arXiv 2312.00752, equations 2 to 4 with the discretisation of its code.) Backward, from the
last step to the first, with dy_t = dout_t silu(z_t), a_t = exp(d_t A) and g the gradient of h:

    g_t = C_t dy_t + a_{t+1} g_{t+1};           q_t = a_t g_t h_{t-1}
    dB_t = sum_d g_t d_t u_t;  dC_t = sum_d h_t dy_t;  dA = sum_t q_t d_t;  dD = sum_t dy_t u_t
    du_t = d_t <B_t, g_t> + D dy_t;             dd_t = u_t <B_t, g_t> + <A, q_t>
    dz_t = dout_t y_t silu'(z_t)

Layout of the kernels. A program has 32 channels of one sequence, one warp, one channel a thread, and
a thread holds all N states of its channel: a sum over states never leaves the thread, and the loop
over steps has no barrier. More than 16 states are split over warps. B and C come packed in fp32, one
row of 2 N numbers a step, read as vectors; 8.6 instructions for each (b, d, l, n) on sm_90.

The forward keeps h every `KEPT` steps for the backward: N bytes for each (b, d, l), only where a
gradient is wanted. The backward goes through pairs of steps, computes the states of a pair again and
holds them in registers, so each exponential is taken about one and a half times. dB and dC are sums
over channels: threads fold them over the lanes of a warp (a reduce-scatter, 16 shuffles for 16
states where `tl.sum` takes 80), each program writes its part and a second kernel adds the parts in a
fixed order. No atomics: gradients are equal from run to run, bit by bit.

A few long sequences would leave a GPU idle. They are cut into chunks in two passes: first each chunk
from a state of zero, which gives its last state and the factor that the first one takes, then, with
the states at all borders known, the scan of every chunk.

Names: B batch, L length, D channels, N states, G groups of channels that share B and C. A step is a
step of the scan: with `reverse` step 0 is the last position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import scan_cpu
from kernels.implementations import choose, nvidia, triton_interpreted
from kernels.reference import scan_ref, step_flags
from kernels.triton_math import jit, silu, silu_slope, softplus, softplus_slope, tl, triton

LANES = 32  # channels of a program: a warp, and as many programs as there can be
STEPS = 4  # of the forward whose loads are under way at once; 8 gain 3 %, and take more registers
KEPT = 4  # steps between the states that the backward finds, a multiple of STEPS
FEW_PROGRAMS = 3  # for each multiprocessor; with fewer a scan is cut into chunks
SHORTEST_CHUNK = 64  # steps; the first pass costs two thirds of the second

_STRIDES = ["stride_ud", "stride_dd", "stride_zd", "stride_gd", "stride_an", "stride_ad"]
# Strides that the compiler must not know to be 1: it would give neighbouring channels to one thread.
_OPAQUE = [*_STRIDES, "unit"]


@jit
def _take(tile, k: tl.constexpr, ROWS: tl.constexpr):
    """Row k of an fp32 tile (ROWS, ...) whose rows one thread holds: names registers, no more."""
    here = tl.arange(0, ROWS) == k
    if len(tile.shape) == 3:
        here = here[:, None, None]
    else:
        here = here[:, None]
    bits = tl.where(here, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@jit
def _put(tile, row, k: tl.constexpr, ROWS: tl.constexpr):
    """The tile (ROWS, LANES) with another row k."""
    here = tl.arange(0, ROWS) == k
    return tl.where(here[:, None], row[None, :], tile)


@jit
def _across(x, lane, BIT: tl.constexpr):
    """The values (rows, LANES) of the lanes whose number differs in BIT: shuffles."""
    return tl.gather(x, tl.broadcast_to((lane ^ BIT)[None, :], x.shape), 1)


@jit
def _fold(x, lane, BIT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, TWIST: tl.constexpr):
    """(2 ROWS, LANES) to (ROWS, LANES): lanes that differ in BIT add up one half of the rows each.

    With TWIST the upper lane has its halves exchanged already (`_state_index`), for bits 4 and 8.
    """
    pair = tl.reshape(x, [2, ROWS, LANES])
    low = _take(pair, 0, 2)
    high = _take(pair, 1, 2)
    if TWIST and BIT >= 4:
        kept, given = low, high
    else:
        upper = ((lane & BIT) != 0)[None, :]
        kept, given = tl.where(upper, high, low), tl.where(upper, low, high)
    return kept + _across(given, lane, BIT)


@jit
def _lane_sums(x, lane, NP: tl.constexpr, LANES: tl.constexpr, GATHER: tl.constexpr):
    """Sums of x (NP, LANES) over channels, each lane some of them: (ROWS, LANES), `_sum_index`."""
    if not GATHER:
        sums = tl.sum(x, 1)
        if NP > 16:
            x = tl.reshape(sums, [4, NP // 4, 1])
            x = tl.where(tl.arange(0, 4)[:, None, None] == (lane // 4 % 4)[None, None, :], x, 0.0)
        else:
            x = tl.reshape(sums, [NP, 1, 1])
            x = tl.where(tl.arange(0, NP)[:, None, None] == (lane % NP)[None, None, :], x, 0.0)
        x = tl.sum(x, 0)
    else:
        if NP >= 16:
            x = _fold(x, lane, 8, NP // 2, LANES, True)
            x = _fold(x, lane, 4, NP // 4, LANES, True)
        elif NP == 8:
            x = _fold(x, lane, 4, 4, LANES, True)
        if NP >= 4 and NP <= 16:
            x = _fold(x, lane, 2, 2, LANES, True)
        if NP >= 2 and NP <= 16:
            x = _fold(x, lane, 1, 1, LANES, True)
        if NP == 1 or NP > 16:
            x += _across(x, lane, 1)
        if NP <= 2 or NP > 16:
            x += _across(x, lane, 2)
        if NP <= 4:
            x += _across(x, lane, 4)
        if NP <= 8:
            x += _across(x, lane, 8)
        x += _across(x, lane, 16)
        if LANES == 64:
            x += _across(x, lane, 32)
    return x


@jit
def _sum_index(lane, NP: tl.constexpr):
    """Which states the sums of `_lane_sums` are, (ROWS, LANES), and the lanes that write them."""
    if NP > 16:
        row = tl.arange(0, NP // 4)[:, None]
        n = (lane // 4 % 4 * (NP // 4))[None, :] + row
        writes = (lane < 16) & (lane % 4 == 0)
    else:
        n = (lane % NP)[None, :] + tl.arange(0, 1)[:, None]
        writes = lane < NP
    return n, writes[None, :]


@jit
def _state_index(lane, NP: tl.constexpr, GATHER: tl.constexpr):
    """Which state a thread has in which place, (NP / 4, 4, LANES) or (1, NP, LANES).

    Fours are contiguous, for vector loads. Lanes differ in the order of the fours, so that in the
    first folds of `_lane_sums`, the largest, all lanes keep one half and give the other.
    """
    V: tl.constexpr = 4 if NP >= 4 else NP
    Q: tl.constexpr = NP // V
    T: tl.constexpr = 4 if Q >= 4 else Q
    four = tl.arange(0, Q)[:, None, None]
    if GATHER:
        four = four ^ (lane // 4 % T * (Q // T))[None, None, :]
    return four * V + tl.arange(0, V)[None, :, None] + (lane * 0)[None, None, :]


@jit
def _place(lane, unit, NP: tl.constexpr, LANES: tl.constexpr):
    """Places of a tile of states in a workspace, in the shape of `_state_index`."""
    V: tl.constexpr = 4 if NP >= 4 else NP
    row = (tl.arange(0, NP // V) * V)[:, None, None] + tl.arange(0, V)[None, :, None]
    return row * LANES + (lane * unit)[None, None, :]


@jit
def _states(at, NP: tl.constexpr, LANES: tl.constexpr):
    """Load a tile (NP, LANES) through addresses in the shape of `_state_index`."""
    return tl.reshape(tl.load(at).to(tl.float32), [NP, LANES])


@jit
def _channel_states(
    ptr, n, d, stride_n, stride_d, N: tl.constexpr, NP: tl.constexpr, LANES: tl.constexpr
):
    """Load (D, N) numbers of the program's channels as a tile (NP, LANES), zeros from N on."""
    at = ptr + n * stride_n + (d * stride_d)[None, None, :]
    return tl.reshape(tl.load(at, mask=n < N, other=0.0).to(tl.float32), [NP, LANES])


@jit
def _per_channel(ptr, d, LANES: tl.constexpr):
    if ptr is None:
        x = tl.zeros([LANES], tl.float32)
    else:
        x = tl.load(ptr + d).to(tl.float32)
    return x


@jit
def _steps(ptr, t, k, stride_l, offset, mask):
    """Load steps t + k of a channel each, (rows, LANES), fp32."""
    at = ptr + t * stride_l + (k * stride_l + offset[None, :])
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@jit
def _live(flags_ptr, b, t, k, L, ok, REVERSE: tl.constexpr):
    """Which of the steps t + k move the state; and what their exponents get, -inf at a reset."""
    if flags_ptr is None:
        return ok, tl.where(ok, 0.0, 0.0)
    else:
        step = t + k
        if REVERSE:
            step = L - 1 - step
        flags = tl.load(flags_ptr + b * L + step, mask=ok, other=0)
        return ok & ((flags & 2) == 0), tl.where((flags & 1) != 0, -float("inf"), 0.0)


@jit
def _decay(d, A, reset, k: tl.constexpr, ROWS: tl.constexpr, FLAGS: tl.constexpr):
    """exp(d_k A), where A is in units of log2(e); 0 where step k is a reset."""
    exponent = _take(d, k, ROWS)[None, :] * A
    if FLAGS:
        exponent += _take(reset, k, ROWS)[None, :]
    return tl.math.exp2(exponent)


@jit
def _row(
    fixed, packed_at, k: tl.constexpr, SECOND: tl.constexpr, FIXED: tl.constexpr,
    NP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """B (C with SECOND) at step k of a block: its own tile, or out of the packed rows."""
    if FIXED:
        row = fixed
    else:
        row = _states(packed_at + (k * 2 * NP + SECOND * NP), NP, LANES)
    return row


# fmt: off
@jit
def _pack_kernel(
    B_ptr, C_ptr,
    packed_ptr,  # (B, G, rows, 2, NP) fp32 contiguous, in the order of the scan
    L, groups, rows,
    stride_Bb, stride_Bl, stride_Bg, stride_Bn,
    stride_Cb, stride_Cl, stride_Cg, stride_Cn,
    N: tl.constexpr, NP: tl.constexpr, REVERSE: tl.constexpr, BLOCK_L: tl.constexpr,
):
    # fmt: on
    """B and C side by side in fp32, zeros beyond L and N; what is None is left out."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(rows, BLOCK_L)
    b = pid // blocks // groups
    g = pid // blocks % groups
    t = pid % blocks * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    n = tl.arange(0, NP)[None, :]
    step = t
    if REVERSE:
        step = L - 1 - t
    ok = (t < L) & (n < N)
    at = packed_ptr + ((b * groups + g) * rows + t) * (2 * NP) + n
    if B_ptr is not None:
        row = B_ptr + b * stride_Bb + g * stride_Bg + step * stride_Bl + n * stride_Bn
        tl.store(at, tl.load(row, mask=ok, other=0.0).to(tl.float32), mask=t < rows)
    if C_ptr is not None:
        row = C_ptr + b * stride_Cb + g * stride_Cg + step * stride_Cl + n * stride_Cn
        tl.store(at + NP, tl.load(row, mask=ok, other=0.0).to(tl.float32), mask=t < rows)


# fmt: off
@jit
def _add_parts_kernel(
    parts_ptr,  # (B, L, G, blocks, 2, NP) fp32 contiguous, in the order of the scan
    dB_ptr, dC_ptr,  # (B, L, G, N) contiguous
    L, groups, blocks, rows,
    N: tl.constexpr, NP: tl.constexpr, REVERSE: tl.constexpr, BLOCK_R: tl.constexpr,
):
    # fmt: on
    """The gradients of B and C: the programs' parts, added in their order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    n = tl.arange(0, NP)[None, :]
    ok = (row < rows) & (n < N)
    at = parts_ptr + row * blocks * (2 * NP) + n
    g = row % groups
    step = row // groups % L
    if REVERSE:
        step = L - 1 - step
    to = ((row // groups // L * L + step) * groups + g) * N + n
    if dB_ptr is not None:
        total = tl.zeros([BLOCK_R, NP], tl.float32)
        for block in range(blocks):
            total += tl.load(at + block * (2 * NP), mask=ok, other=0.0)
        tl.store(dB_ptr + to, total.to(dB_ptr.dtype.element_ty), mask=ok)
    if dC_ptr is not None:
        total = tl.zeros([BLOCK_R, NP], tl.float32)
        for block in range(blocks):
            total += tl.load(at + (block * (2 * NP) + NP), mask=ok, other=0.0)
        tl.store(dC_ptr + to, total.to(dC_ptr.dtype.element_ty), mask=ok)


@jit
def _join_kernel(border_ptr, decay_ptr, chunks, size, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """From what each chunk makes of zero to what each begins with; (B, chunks, size), in place.

    border_{c+1} = decay_c border_c + own_c; chunk 0 begins with what it was given, and counted in.
    """
    blocks = tl.cdiv(size, BLOCK)
    b = tl.program_id(0).to(tl.int64) // blocks
    offset = tl.program_id(0).to(tl.int64) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = offset < size
    border = tl.zeros([BLOCK], tl.float32)
    for i in range(chunks):
        c = i
        if REVERSE:
            c = chunks - 1 - i
        at = (b * chunks + c) * size + offset
        own = tl.load(border_ptr + at, mask=ok, other=0.0)
        tl.store(border_ptr + at, border, mask=ok)
        if i == 0:
            border = own
        else:
            border = tl.load(decay_ptr + at, mask=ok, other=0.0) * border + own


# fmt: off
@jit(do_not_specialize=_OPAQUE)
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr,
    B_ptr, C_ptr,  # (D, N) where fixed
    packed_ptr,  # (B, G, rows, 2, NP)
    D_ptr, z_ptr, bias_ptr, flags_ptr,
    initial_ptr,  # (B, D, N)
    border_ptr,  # (B, chunks, G, blocks, NP, LANES): states that chunks begin with
    out_ptr,  # (B, L, D) contiguous
    kept_ptr,  # (B, ceil(L / KEPT), G, blocks, NP, LANES)
    last_ptr,  # (B, D, N) contiguous
    own_ptr, decay_ptr,  # (B, chunks, G, blocks, NP, LANES): of the first pass
    L, dim, groups, blocks, rows, chunk, chunks, unit,
    stride_ub, stride_ul, stride_ud,
    stride_db, stride_dl, stride_dd,
    stride_zb, stride_zl, stride_zd,
    stride_an, stride_ad,
    stride_Bn, stride_Bd, stride_Cn, stride_Cd,
    stride_ib, stride_in, stride_id,
    N: tl.constexpr, NP: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
    KEPT: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, GATHER: tl.constexpr, NVIDIA: tl.constexpr,
):
    # fmt: on
    """A program takes its channels through a chunk. Without out_ptr: the first pass over chunks."""
    FLAGS: tl.constexpr = flags_ptr is not None
    B_FIXED: tl.constexpr = B_ptr is not None
    C_FIXED: tl.constexpr = C_ptr is not None
    pid = tl.program_id(0).to(tl.int64)
    block = pid % (groups * blocks)  # of all channels; neighbours share B and C
    c = pid // (groups * blocks) % chunks
    b = pid // (groups * blocks) // chunks
    g = block // blocks
    width = dim // groups
    lane = tl.arange(0, LANES)
    inner = block % blocks * LANES + lane
    valid = inner < width
    d = g * width + tl.minimum(inner, width - 1)
    n = _state_index(lane, NP, GATHER)
    begin = c * chunk
    end = tl.minimum(begin + chunk, L)

    A = _channel_states(A_ptr, n, d, stride_an, stride_ad, N, NP, LANES) * 1.4426950408889634
    bias = _per_channel(bias_ptr, d, LANES)
    skip = _per_channel(D_ptr, d, LANES)
    fixed_B = A
    fixed_C = A
    if B_FIXED:
        fixed_B = _channel_states(B_ptr, n, d, stride_Bn, stride_Bd, N, NP, LANES)
    if C_FIXED:
        fixed_C = _channel_states(C_ptr, n, d, stride_Cn, stride_Cd, N, NP, LANES)
    u_row = u_ptr + b * stride_ub
    delta_row = delta_ptr + b * stride_db
    z_row = z_ptr
    if z_ptr is not None:
        z_row = z_ptr + b * stride_zb
    out_step = dim
    out_row = out_ptr
    if out_ptr is not None:
        out_row = out_ptr + b * L * dim
    if REVERSE:
        u_row += (L - 1) * stride_ul
        delta_row += (L - 1) * stride_dl
        stride_ul = -stride_ul
        stride_dl = -stride_dl
        if z_ptr is not None:
            z_row += (L - 1) * stride_zl
            stride_zl = -stride_zl
        if out_ptr is not None:
            out_row += (L - 1) * dim
            out_step = -dim
    offset_u = d * stride_ud
    offset_d = d * stride_dd
    offset_z = d * stride_zd
    offset_o = d * unit
    place = _place(lane, unit, NP, LANES)
    packed_at = packed_ptr
    if packed_ptr is not None:
        packed_at = packed_ptr + ((b * groups + g) * rows + begin) * (2 * NP) + n
    kept_at = kept_ptr
    if kept_ptr is not None:
        many = tl.cdiv(L, KEPT)
        kept_at = kept_ptr + ((b * many + begin // KEPT) * groups * blocks + block) * (NP * LANES)
    tile = ((b * chunks + c) * groups * blocks + block) * (NP * LANES)

    h = A * 0.0
    if initial_ptr is not None:
        if c == 0:
            initial = initial_ptr + b * stride_ib
            h = _channel_states(initial, n, d, stride_in, stride_id, N, NP, LANES)
    if border_ptr is not None:
        if c > 0:
            h = _states(border_ptr + tile + place, NP, LANES)
    sum_d = tl.zeros([LANES], tl.float32)
    k = tl.arange(0, STEPS)[:, None].to(tl.int64)
    for t in range(begin, end, STEPS):
        ok = k < end - t
        u = _steps(u_row, t, k, stride_ul, offset_u, ok)
        step = _steps(delta_row, t, k, stride_dl, offset_d, ok) + bias[None, :]
        if SOFTPLUS:
            step = softplus(step)
        live, reset = _live(flags_ptr, b, t, k, L, ok, REVERSE)
        step = tl.where(live, step, 0.0)
        if FLAGS:
            u = tl.where(live, u, 0.0)
            reset = tl.broadcast_to(reset, step.shape)
        x = step * u
        y = tl.zeros([STEPS, LANES], tl.float32)
        for i in tl.static_range(STEPS):
            if kept_ptr is not None and i % KEPT == 0:
                tl.store(kept_at + place, tl.reshape(h, place.shape))
            B = _row(fixed_B, packed_at, i, 0, B_FIXED, NP, LANES)
            h = _decay(step, A, reset, i, STEPS, FLAGS) * h + _take(x, i, STEPS)[None, :] * B
            if out_ptr is not None:
                C = _row(fixed_C, packed_at, i, 1, C_FIXED, NP, LANES)
                y = _put(y, tl.sum(h * C, 0), i, STEPS)
        if out_ptr is not None:
            y += skip[None, :] * u
            if FLAGS:
                y = tl.where(live, y, 0.0)
            if z_ptr is not None:
                y *= silu(_steps(z_row, t, k, stride_zl, offset_z, ok), NVIDIA)
            at = out_row + t * out_step + (k * out_step + offset_o[None, :])
            tl.store(at, y.to(out_ptr.dtype.element_ty), mask=ok & valid[None, :])
        else:
            sum_d += tl.sum(step, 0)
            if FLAGS:
                sum_d += tl.sum(-reset, 0)
        if packed_ptr is not None:
            packed_at += STEPS * 2 * NP
        if kept_ptr is not None:
            kept_at += STEPS // KEPT * groups * blocks * (NP * LANES)

    if last_ptr is not None:
        if c == chunks - 1:
            to = tl.reshape(n, [NP, LANES])
            at = last_ptr + (b * dim + d[None, :]) * N + to
            tl.store(at, h, mask=valid[None, :] & (to < N))
    if own_ptr is not None:
        tl.store(own_ptr + tile + place, tl.reshape(h, place.shape))
        decay = tl.math.exp2(sum_d[None, :] * A)
        if FLAGS:
            decay = tl.where((sum_d == float("inf"))[None, :], 0.0, decay)
        tl.store(decay_ptr + tile + place, tl.reshape(decay, place.shape))
