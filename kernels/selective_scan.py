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

Layout of the kernels. A program has as many channels of one sequence as a warp has threads, and a
thread holds all N states of one channel: a sum over states never leaves the thread, and the loop
over steps has no barrier. More than 16 states are split over warps. B and C come packed in
fp32, one row of 2 N numbers a step, read as vectors. `kernels.budgets` counts the instructions.

The forward keeps h every `STEPS` steps for the backward: N bytes for each (b, d, l), only where a
gradient is wanted. The backward goes through blocks of as many steps: it computes the states inside
a block again, holds them in registers and goes back through them. Each exponential but a block's
last is taken twice, which costs less than the registers to hold it. dB and dC are sums over
channels: threads fold them over the lanes of a warp (a reduce-scatter, 16 shuffles for 16 states
where `tl.sum` takes 80), each program writes its part and a second kernel adds the parts in a fixed
order. No atomics: gradients are equal from run to run, bit by bit.

A few long sequences would leave a GPU idle. They are cut into chunks, in two passes: first each
chunk from a state of zero, which gives its last state and the factor that its first one takes,
then, with the states at all borders known, the scan of every chunk.

Names: B batch, L length, D channels, N states, G groups of channels that share B and C. A step is a
step of the scan: with `reverse` step 0 is the last position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import implementations, scan_cpu, scan_torch
from kernels.implementations import choose, nvidia, triton_interpreted
from kernels.inputs import ScanInputs
from kernels.reference import scan_ref, step_flags
from kernels.transforms import derivative, transformable
from kernels.triton_math import jit, silu, silu_slope, softplus, softplus_slope, tl, triton

STEPS = 4  # of a block: the forward loads them at once, the backward holds the states inside
FEW_PROGRAMS = 3  # for each multiprocessor; with fewer a scan is cut into chunks
SHORTEST_CHUNK = 64  # steps; the first pass costs two thirds of the second

# Numbers for which no kernel is compiled anew: one serves all shapes. The compiler must not know
# that a stride is 1 in any case: it would give neighbouring channels to one thread.
_NUMBERS = ["L", "dim", "groups", "blocks", "rows", "chunk", "chunks", "unit", "size"]
_NUMBERS += [f"stride_{x}{i}" for x in "udzg" for i in "bld"]
_NUMBERS += [f"stride_{x}{i}" for x in "il" for i in "bdn"]
_NUMBERS += [f"stride_{x}{i}" for x in "aBC" for i in "dn"]
_NUMBERS += [f"stride_{x}{i}" for x in "BC" for i in "blg"]
_TENSORS = ["u", "delta", "A", "B", "C", "D", "z", "bias", "flags", "initial", "out", "last"]
_TENSORS += ["dout", "dlast", "du", "ddelta", "dz", "dB", "dC", "dinitial"]
_ONCE = {
    "do_not_specialize": _NUMBERS,
    "do_not_specialize_on_alignment": [f"{x}_ptr" for x in _TENSORS],
}


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


if hasattr(tl, "gather"):  # from Triton 3.3 on

    @jit
    def _across(x, lane, BIT: tl.constexpr):
        """The values (rows, LANES) of the lanes whose number differs in BIT: shuffles."""
        return tl.gather(x, tl.broadcast_to((lane ^ BIT)[None, :], x.shape), 1)

else:  # the compiler looks at names in branches that it does not take

    @jit
    def _across(x, lane, BIT: tl.constexpr):
        return x


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
    n = tl.broadcast_to(four * V + tl.arange(0, V)[None, :, None], [Q, V, lane.shape[0]])
    # What is said of the lanes, here and for other tiles, orders the axes, after the fours: lanes
    # go along it then. Nothing of these tensors is aligned, so no load becomes wider for it.
    return tl.max_contiguous(n, [1, V, 2])


@jit
def _place(lane, NP: tl.constexpr, LANES: tl.constexpr):
    """Places of a tile of states in a workspace, in the shape of `_state_index`: fours together."""
    V: tl.constexpr = 4 if NP >= 4 else NP
    four = (tl.arange(0, NP // V) * (V * LANES))[:, None, None] + (lane * V)[None, None, :]
    return tl.max_contiguous(four + tl.arange(0, V)[None, :, None], [1, V, 2])


@jit
def _states(at, NP: tl.constexpr, LANES: tl.constexpr):
    """Load a tile (NP, LANES) through addresses in the shape of `_state_index`."""
    return tl.reshape(tl.load(at).to(tl.float32), [NP, LANES])


@jit
def _channel_states(
    ptr, n, d, stride_n, stride_d, N: tl.constexpr, NP: tl.constexpr, LANES: tl.constexpr
):
    """Load (D, N) numbers of the program's channels as a tile (NP, LANES), zeros from N on."""
    offset = n.to(tl.int64) * stride_n + (d.to(tl.int64) * stride_d)[None, None, :]
    at = ptr + tl.max_contiguous(offset, [1, 1, 2])
    return tl.reshape(tl.load(at, mask=n < N, other=0.0).to(tl.float32), [NP, LANES])


@jit
def _per_channel(ptr, d, LANES: tl.constexpr):
    if ptr is None:
        x = tl.zeros([LANES], tl.float32)
    else:
        x = tl.load(ptr + d).to(tl.float32)
    return x


@jit
def _steps(row, offset, k, stride_l, mask):
    """Load steps k of a block, (rows, LANES), fp32; offset: of the first; no mask: all."""
    at = row + tl.max_contiguous(offset[None, :] + k * stride_l, [1, 2])
    if mask is None:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=mask, other=0.0)
    return x.to(tl.float32)


@jit
def _write_steps(row, offset, x, k, stride_l, mask):
    at = row + tl.max_contiguous(offset[None, :] + k * stride_l, [1, 2])
    tl.store(at, x.to(at.dtype.element_ty), mask=mask)


@jit
def _flags(at, k, stride_l, mask):
    """Which steps move the state; and what their exponents get, -inf at a reset; (rows, 1)."""
    if mask is None:
        flags = tl.load(at + k * stride_l)
    else:
        flags = tl.load(at + k * stride_l, mask=mask, other=2)
    return (flags & 2) == 0, tl.where((flags & 1) != 0, -float("inf"), 0.0)


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
@jit(do_not_specialize=["L", "groups", "rows"])
def _pack_kernel(
    B_ptr, C_ptr,
    flags_ptr,  # (B, L) contiguous
    packed_ptr,  # (B, G, rows, 2, NP) fp32 contiguous, in the order of the scan
    L, groups, rows,
    stride_Bb, stride_Bl, stride_Bg, stride_Bn,
    stride_Cb, stride_Cl, stride_Cg, stride_Cn,
    N: tl.constexpr, NP: tl.constexpr, REVERSE: tl.constexpr, BLOCK_L: tl.constexpr,
):
    # fmt: on
    """B and C side by side in fp32, zeros beyond L and N and in padding; None is left out."""
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(rows, BLOCK_L)
    b = pid // blocks // groups
    g = pid // blocks % groups
    t = pid % blocks * BLOCK_L + tl.arange(0, BLOCK_L)[:, None]
    n = tl.arange(0, NP)[None, :].to(tl.int64)
    step = t
    if REVERSE:
        step = L - 1 - t
    ok = (t < L) & (n < N)
    if flags_ptr is not None:  # a step of padding adds 0 times B to the state: NaN must not stay
        flags = tl.load(flags_ptr + b * L + step, mask=t < L, other=2)
        ok = ok & ((flags & 2) == 0)
    at = packed_ptr + ((b * groups + g) * rows + t) * (2 * NP) + n
    if B_ptr is not None:
        row = B_ptr + b * stride_Bb + g * stride_Bg + step * stride_Bl + n * stride_Bn
        tl.store(at, tl.load(row, mask=ok, other=0.0).to(tl.float32), mask=t < rows)
    if C_ptr is not None:
        row = C_ptr + b * stride_Cb + g * stride_Cg + step * stride_Cl + n * stride_Cn
        tl.store(at + NP, tl.load(row, mask=ok, other=0.0).to(tl.float32), mask=t < rows)


# fmt: off
@jit(**_ONCE)
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


@jit(**_ONCE)
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
@jit
def _forward_block(
    h, sum_d, t, left, A, bias, skip, fixed_B, fixed_C,
    u_row, delta_row, z_row, out_row, flags_row, packed_at,
    offset_u, offset_d, offset_z, offset_o, valid, k,
    stride_ul, stride_dl, stride_zl, stride_ol, stride_fl,
    NP: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, TAIL: tl.constexpr,
    SOFTPLUS: tl.constexpr, B_FIXED: tl.constexpr, C_FIXED: tl.constexpr, NVIDIA: tl.constexpr,
):
    # fmt: on
    """A block of steps, `left` of them with TAIL: the next state, and the sum of d (inf: reset)."""
    FLAGS: tl.constexpr = flags_row is not None
    ok = None
    inside = valid[None, :]
    if TAIL:
        ok = k < left
        inside = ok & valid[None, :]
    u = _steps(u_row, t * stride_ul + offset_u, k, stride_ul, ok)
    step = _steps(delta_row, t * stride_dl + offset_d, k, stride_dl, ok) + bias[None, :]
    if SOFTPLUS:
        step = softplus(step)
    if TAIL:
        step = tl.where(ok, step, 0.0)
    reset = step
    if FLAGS:
        live, reset = _flags(flags_row + t * stride_fl, k, stride_fl, ok)
        step = tl.where(live, step, 0.0)
        u = tl.where(live, u, 0.0)
        sum_d -= tl.sum(reset, 0)
        reset = tl.broadcast_to(reset, step.shape)
    sum_d += tl.sum(step, 0)
    x = step * u
    y = skip[None, :] * u
    for i in tl.static_range(STEPS):
        B = _row(fixed_B, packed_at, i, 0, B_FIXED, NP, LANES)
        h = _decay(step, A, reset, i, STEPS, FLAGS) * h + _take(x, i, STEPS)[None, :] * B
        if out_row is not None:
            C = _row(fixed_C, packed_at, i, 1, C_FIXED, NP, LANES)
            y = _put(y, _take(y, i, STEPS) + tl.sum(h * C, 0), i, STEPS)
    if out_row is not None:
        if z_row is not None:
            y *= silu(_steps(z_row, t * stride_zl + offset_z, k, stride_zl, ok), NVIDIA)
        if FLAGS:
            y = tl.where(live, y, 0.0)
        _write_steps(out_row, t * stride_ol + offset_o, y, k, stride_ol, inside)
    return h, sum_d


# fmt: off
@jit(**_ONCE)
def _forward_kernel(
    u_ptr, delta_ptr, A_ptr,
    B_ptr, C_ptr,  # (D, N) where fixed
    packed_ptr,  # (B, G, rows, 2, NP)
    D_ptr, z_ptr, bias_ptr,
    flags_ptr,  # (B, L) contiguous
    initial_ptr,  # (B, D, N)
    border_ptr,  # (B, chunks, G, blocks, NP, LANES): states that chunks begin with
    out_ptr,  # (B, L, D) contiguous
    kept_ptr,  # (B, ceil(L / STEPS), G, blocks, NP, LANES): states before each block of steps
    last_ptr,  # (B, D, N) contiguous
    own_ptr, decay_ptr,  # (B, chunks, G, blocks, NP, LANES): of the first pass
    L, dim, groups, blocks, rows, chunk, chunks, unit,
    stride_ub, stride_ul, stride_ud,
    stride_db, stride_dl, stride_dd,
    stride_zb, stride_zl, stride_zd,
    stride_an, stride_ad,
    stride_Bn, stride_Bd, stride_Cn, stride_Cd,
    stride_ib, stride_id, stride_in,
    N: tl.constexpr, NP: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, GATHER: tl.constexpr, NVIDIA: tl.constexpr,
    WIDE: tl.constexpr,
):
    # fmt: on
    """A program takes its channels through a chunk. Without out_ptr: the first pass over chunks.

    WIDE: a sequence spans 2^31 elements or more.
    """
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
    place = _place(lane, NP, LANES)
    tile = ((b * chunks + c) * groups * blocks + block) * (NP * LANES)
    begin = c * chunk
    steps = tl.minimum(L - begin, chunk).to(tl.int32)
    first = begin  # its position
    stride_ol = dim
    stride_fl = 1
    if REVERSE:
        first = L - 1 - begin

    A = _channel_states(A_ptr, n, d, stride_an, stride_ad, N, NP, LANES) * 1.4426950408889634
    bias = _per_channel(bias_ptr, d, LANES)
    skip = _per_channel(D_ptr, d, LANES)
    fixed_B = A
    fixed_C = A
    if B_FIXED:
        fixed_B = _channel_states(B_ptr, n, d, stride_Bn, stride_Bd, N, NP, LANES)
    if C_FIXED:
        fixed_C = _channel_states(C_ptr, n, d, stride_Cn, stride_Cd, N, NP, LANES)
    u_row = u_ptr + (b * stride_ub + first * stride_ul)
    delta_row = delta_ptr + (b * stride_db + first * stride_dl)
    z_row = z_ptr
    if z_ptr is not None:
        z_row = z_ptr + (b * stride_zb + first * stride_zl)
    out_row = out_ptr
    if out_ptr is not None:
        out_row = out_ptr + (b * L + first) * dim
    flags_row = flags_ptr
    if flags_ptr is not None:
        flags_row = flags_ptr + (b * L + first)
    packed_at = packed_ptr
    if packed_ptr is not None:
        packed_at = packed_ptr + (((b * groups + g) * rows + begin) * (2 * NP) + n)
    kept_at = kept_ptr
    if kept_ptr is not None:
        kept = b * tl.cdiv(L, STEPS) + begin // STEPS
        kept_at = kept_ptr + ((kept * groups * blocks + block) * (NP * LANES) + place)
    if REVERSE:
        stride_ul = -stride_ul
        stride_dl = -stride_dl
        stride_zl = -stride_zl
        stride_ol = -stride_ol
        stride_fl = -stride_fl

    h = A * 0.0
    if initial_ptr is not None:
        if c == 0:
            initial = initial_ptr + b * stride_ib
            h = _channel_states(initial, n, d, stride_in, stride_id, N, NP, LANES)
    if border_ptr is not None:
        if c > 0:
            h = _states(border_ptr + tile + place, NP, LANES)
    sum_d = tl.zeros([LANES], tl.float32)
    k = tl.arange(0, STEPS)[:, None]
    if WIDE:
        k = k.to(tl.int64)
    else:
        d = d.to(tl.int32)
    offset_u = d * stride_ud
    offset_d = d * stride_dd
    offset_z = d * stride_zd
    offset_o = d * unit
    for i in range(steps // STEPS):
        # The compiler must not see how t moves: it would keep pointers to all tensors in registers.
        t = (i * STEPS) ^ (unit - 1)
        if WIDE:
            t = t.to(tl.int64)
        if kept_ptr is not None:
            tl.store(kept_at, tl.reshape(h, place.shape))
            kept_at += groups * blocks * (NP * LANES)
        h, sum_d = _forward_block(
            h, sum_d, t, STEPS, A, bias, skip, fixed_B, fixed_C,
            u_row, delta_row, z_row, out_row, flags_row, packed_at,
            offset_u, offset_d, offset_z, offset_o, valid, k,
            stride_ul, stride_dl, stride_zl, stride_ol, stride_fl,
            NP, LANES, STEPS, False, SOFTPLUS, B_FIXED, C_FIXED, NVIDIA,
        )  # fmt: skip
        if packed_ptr is not None:
            packed_at += STEPS * 2 * NP
    if steps % STEPS > 0:
        t = steps // STEPS * STEPS
        if WIDE:
            t = t.to(tl.int64)
        if kept_ptr is not None:
            tl.store(kept_at, tl.reshape(h, place.shape))
        h, sum_d = _forward_block(
            h, sum_d, t, steps % STEPS, A, bias, skip, fixed_B, fixed_C,
            u_row, delta_row, z_row, out_row, flags_row, packed_at,
            offset_u, offset_d, offset_z, offset_o, valid, k,
            stride_ul, stride_dl, stride_zl, stride_ol, stride_fl,
            NP, LANES, STEPS, True, SOFTPLUS, B_FIXED, C_FIXED, NVIDIA,
        )  # fmt: skip

    if last_ptr is not None:
        if c == chunks - 1:
            to = tl.reshape(n, [NP, LANES])
            at = last_ptr + (b * dim + d[None, :]) * N + to
            tl.store(at, h, mask=valid[None, :] & (to < N))
    if own_ptr is not None:
        tl.store(own_ptr + tile + place, tl.reshape(h, place.shape))
        decay = tl.math.exp2(sum_d[None, :] * A)
        if flags_ptr is not None:
            decay = tl.where((sum_d == float("inf"))[None, :], 0.0, decay)
        tl.store(decay_ptr + tile + place, tl.reshape(decay, place.shape))


# fmt: off
@jit
def _forward_step(
    h, step, u, A, reset, fixed_B, packed_at, k: tl.constexpr, B_FIXED: tl.constexpr,
    NP: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, FLAGS: tl.constexpr,
):
    # fmt: on
    """The state after step k of a block."""
    B = _row(fixed_B, packed_at, k, 0, B_FIXED, NP, LANES)
    x = _take(step, k, STEPS) * _take(u, k, STEPS)
    return _decay(step, A, reset, k, STEPS, FLAGS) * h + x[None, :] * B


@jit
def _write_lane_sums(
    at, x, lane, wanted, NP: tl.constexpr, LANES: tl.constexpr, GATHER: tl.constexpr
):
    n, writes = _sum_index(lane, NP)
    tl.store(at + n, _lane_sums(x, lane, NP, LANES, GATHER), mask=writes & wanted)


# fmt: off
@jit
def _read_state(
    h, dz_row, at, parts_at, C, dy, dz, u, skip, dC, lane, ok, inside,
    NP: tl.constexpr, LANES: tl.constexpr, C_FIXED: tl.constexpr, GATHER: tl.constexpr,
    NEED_C: tl.constexpr,
):
    # fmt: on
    """What a step makes of the state after it: dz, and dC, which is written or added up."""
    if dz_row is not None:
        dz *= tl.sum(h * C, 0) + skip * u
        tl.store(dz_row + at, dz.to(dz_row.dtype.element_ty), mask=ok)
    if NEED_C:
        if C_FIXED:
            dC += h * dy[None, :]
        else:
            _write_lane_sums(parts_at + NP, h * dy[None, :], lane, inside, NP, LANES, GATHER)
    return dC


# fmt: off
@jit
def _backward_step(
    carry, dA, dB, dC, dbias, before, after, A, step, reset, u, dy, dz, slope, skip,
    fixed_B, fixed_C, packed_at, dz_row, du_row, ddelta_row, offset_o, stride_ol,
    parts_row, parts_step, lane, valid, t, left, unit, k: tl.constexpr,
    NP: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
    B_FIXED: tl.constexpr, C_FIXED: tl.constexpr, GATHER: tl.constexpr, FLAGS: tl.constexpr,
    NEED_B: tl.constexpr, NEED_C: tl.constexpr, NEED_A: tl.constexpr, NEED_D: tl.constexpr,
):
    # fmt: on
    """Step k of a block, backward, from the state before it; None after it: found here."""
    at = t * stride_ol + offset_o + k * stride_ol
    parts_at = parts_row
    if parts_row is not None:
        parts_at = parts_row + (t + k) * parts_step
    inside = k < left
    ok = inside & valid
    d = _take(step, k, STEPS)
    u = _take(u, k, STEPS)
    dy = _take(dy, k, STEPS)
    dz = _take(dz, k, STEPS)
    C = _row(fixed_C, packed_at, k, 1, C_FIXED, NP, LANES)
    if after is not None:
        dC = _read_state(
            after, dz_row, at, parts_at, C, dy, dz, u, skip, dC, lane, ok, inside,
            NP, LANES, C_FIXED, GATHER, NEED_C,
        )  # fmt: skip
    g = dy[None, :] * C + carry
    B = _row(fixed_B, packed_at, k, 0, B_FIXED, NP, LANES)
    s = tl.sum(g * B, 0)
    if du_row is not None:
        du = d * s + skip * dy
        tl.store(du_row + at, du.to(du_row.dtype.element_ty), mask=ok)
    if NEED_B:
        if B_FIXED:
            dB += g * (d * u)[None, :]
        else:
            _write_lane_sums(parts_at, g * (d * u)[None, :], lane, inside, NP, LANES, GATHER)
    # The forward took this exponential too. The compiler must not see that, nor take it before s
    # is there: it would keep those of all steps in registers.
    again = d.to(tl.int32, bitcast=True) ^ (s.to(tl.int32, bitcast=True) & (unit - 1))
    exponent = again.to(tl.float32, bitcast=True)[None, :] * A
    if FLAGS:
        exponent += _take(reset, k, STEPS)[None, :]
    a = tl.math.exp2(exponent)
    carry = g * a
    q = carry * before
    if NEED_A:
        dA += q * d[None, :]
    if NEED_D:
        ddelta = (u * s + tl.sum(q * A, 0) * 0.6931471805599453) * _take(slope, k, STEPS)
        dbias += ddelta
        if ddelta_row is not None:
            tl.store(ddelta_row + at, ddelta.to(ddelta_row.dtype.element_ty), mask=ok)
    if after is None:
        B = _row(fixed_B, packed_at, k, 0, B_FIXED, NP, LANES)  # both again, as the state above
        C = _row(fixed_C, packed_at, k, 1, C_FIXED, NP, LANES)
        h = a * before + (d * u)[None, :] * B
        dC = _read_state(
            h, dz_row, at, parts_at, C, dy, dz, u, skip, dC, lane, ok, inside,
            NP, LANES, C_FIXED, GATHER, NEED_C,
        )  # fmt: skip
    return carry, dA, dB, dC, dbias


# fmt: off
@jit(**_ONCE)
def _backward_kernel(
    dout_ptr,
    dlast_ptr,  # (B, D, N)
    kept_ptr,  # (B, ceil(L / STEPS), G, blocks, NP, LANES)
    border_ptr,  # (B, chunks, G, blocks, NP, LANES): gradients of the states that chunks end with
    u_ptr, delta_ptr, A_ptr,
    B_ptr, C_ptr,  # (D, N) where fixed
    packed_ptr,  # (B, G, rows, 2, NP)
    D_ptr, z_ptr, bias_ptr,
    flags_ptr,  # (B, L) contiguous
    du_ptr, ddelta_ptr, dz_ptr,  # (B, L, D) contiguous
    parts_ptr,  # (B, L, G, blocks, 2, NP): of dB and dC
    dA_ptr, dB_ptr, dC_ptr,  # (B, chunks, N, D): parts, dB and dC where fixed
    dD_ptr, dbias_ptr,  # (B, chunks, D): parts
    dinitial_ptr,  # (B, D, N) contiguous
    L, dim, groups, blocks, rows, chunk, chunks, unit,
    stride_gb, stride_gl, stride_gd,
    stride_ub, stride_ul, stride_ud,
    stride_db, stride_dl, stride_dd,
    stride_zb, stride_zl, stride_zd,
    stride_an, stride_ad,
    stride_Bn, stride_Bd, stride_Cn, stride_Cd,
    stride_lb, stride_ld, stride_ln,
    N: tl.constexpr, NP: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, GATHER: tl.constexpr, NVIDIA: tl.constexpr,
    WIDE: tl.constexpr, ALIKE: tl.constexpr, NEED_B: tl.constexpr, NEED_C: tl.constexpr,
):
    # fmt: on
    """A program takes its channels back through a chunk, a block of four steps at a time.

    WIDE: a sequence spans 2^31 elements or more. ALIKE: all (B, L, D) have the same stride along D.
    """
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
    place = _place(lane, NP, LANES)
    tile = ((b * chunks + c) * groups * blocks + block) * (NP * LANES)
    begin = c * chunk
    steps = tl.minimum(L - begin, chunk).to(tl.int32)
    first = begin  # its position
    stride_ol = dim
    stride_fl = 1
    if REVERSE:
        first = L - 1 - begin

    A = _channel_states(A_ptr, n, d, stride_an, stride_ad, N, NP, LANES) * 1.4426950408889634
    bias = _per_channel(bias_ptr, d, LANES)
    skip = _per_channel(D_ptr, d, LANES)
    fixed_B = A
    fixed_C = A
    if B_FIXED:
        fixed_B = _channel_states(B_ptr, n, d, stride_Bn, stride_Bd, N, NP, LANES)
    if C_FIXED:
        fixed_C = _channel_states(C_ptr, n, d, stride_Cn, stride_Cd, N, NP, LANES)
    dout_row = dout_ptr + (b * stride_gb + first * stride_gl)
    u_row = u_ptr + (b * stride_ub + first * stride_ul)
    delta_row = delta_ptr + (b * stride_db + first * stride_dl)
    z_row = z_ptr
    if z_ptr is not None:
        z_row = z_ptr + (b * stride_zb + first * stride_zl)
    flags_row = flags_ptr
    if flags_ptr is not None:
        flags_row = flags_ptr + (b * L + first)
    dz_row = dz_ptr
    if dz_ptr is not None:
        dz_row = dz_ptr + (b * L + first) * dim
    du_row = du_ptr
    if du_ptr is not None:
        du_row = du_ptr + (b * L + first) * dim
    ddelta_row = ddelta_ptr
    if ddelta_ptr is not None:
        ddelta_row = ddelta_ptr + (b * L + first) * dim
    NEED_D: tl.constexpr = ddelta_ptr is not None or dbias_ptr is not None
    if REVERSE:
        stride_gl = -stride_gl
        stride_ul = -stride_ul
        stride_dl = -stride_dl
        stride_zl = -stride_zl
        stride_ol = -stride_ol
        stride_fl = -stride_fl
    if not WIDE:
        d = d.to(tl.int32)
    offset_u = d * stride_ud
    if ALIKE:
        offset_d = offset_u
        offset_z = offset_u
        offset_g = offset_u
        offset_o = offset_u
    else:
        offset_d = d * stride_dd
        offset_z = d * stride_zd
        offset_g = d * stride_gd
        offset_o = d * unit
    packed_row = packed_ptr
    if packed_ptr is not None:
        packed_row = packed_ptr + ((b * groups + g) * rows + begin) * (2 * NP)
    kept = b * tl.cdiv(L, STEPS) + begin // STEPS
    kept_row = kept_ptr + (kept * groups * blocks + block) * (NP * LANES)
    parts_row = parts_ptr
    parts_step = groups * blocks * (2 * NP)
    if parts_ptr is not None:
        parts_row = parts_ptr + ((b * L + begin) * groups * blocks + block) * (2 * NP)

    carry = A * 0.0
    if dlast_ptr is not None:
        if c == chunks - 1:
            dlast = dlast_ptr + b * stride_lb
            carry = _channel_states(dlast, n, d, stride_ln, stride_ld, N, NP, LANES)
            carry = tl.where(valid[None, :], carry, 0.0)
    if border_ptr is not None:
        if c < chunks - 1:
            carry = _states(border_ptr + tile + place, NP, LANES)
    dA = A * 0.0
    dB = A * 0.0
    dC = A * 0.0
    dD = tl.zeros([LANES], tl.float32)
    dbias = tl.zeros([LANES], tl.float32)
    k = tl.arange(0, STEPS)[:, None]
    kept_step = groups * blocks * (NP * LANES)
    many = tl.cdiv(steps, STEPS)
    for i in range(many):
        # The compiler must not see how t moves: it would keep pointers to all tensors in registers.
        t = ((many - 1 - i) * STEPS) ^ (unit - 1)
        left = steps - t
        ok = k < left
        row = t + tl.minimum(k, left - 1)  # what a step beyond the last reads is not used
        if WIDE:
            t = t.to(tl.int64)
            row = row.to(tl.int64)
        u = _steps(u_row, offset_u, row, stride_ul, None)
        step = _steps(delta_row, offset_d, row, stride_dl, None) + bias[None, :]
        if SOFTPLUS:
            step, slope = softplus_slope(step, NVIDIA)
        else:
            slope = tl.full(step.shape, 1.0, tl.float32)
        step = tl.where(ok, step, 0.0)
        slope = tl.where(ok, slope, 0.0)
        reset = step
        if FLAGS:
            live, reset = _flags(flags_row + t * stride_fl, k, stride_fl, ok)
            step = tl.where(live, step, 0.0)
            slope = tl.where(live, slope, 0.0)
            u = tl.where(live, u, 0.0)
            reset = tl.broadcast_to(reset, step.shape)
        packed_at = packed_row
        if packed_ptr is not None:
            packed_at = (packed_row + t * (2 * NP)) + n

        at_kept = (kept_row + t // STEPS * kept_step) + place
        h0 = _states(at_kept, NP, LANES)
        h1 = _forward_step(
            h0, step, u, A, reset, fixed_B, packed_at, 0, B_FIXED, NP, LANES, STEPS, FLAGS
        )
        h2 = _forward_step(
            h1, step, u, A, reset, fixed_B, packed_at, 1, B_FIXED, NP, LANES, STEPS, FLAGS
        )
        h3 = _forward_step(
            h2, step, u, A, reset, fixed_B, packed_at, 2, B_FIXED, NP, LANES, STEPS, FLAGS
        )

        dout = _steps(dout_row, offset_g, row, stride_gl, None)
        dout = tl.where(ok & valid[None, :], dout, 0.0)
        if FLAGS:
            dout = tl.where(live, dout, 0.0)
        dy = dout
        if z_ptr is not None:
            z = _steps(z_row, offset_z, row, stride_zl, None)
            if FLAGS:
                z = tl.where(live, z, 0.0)  # what padding holds, even NaN, reaches nothing
            gate, dz = silu_slope(z, NVIDIA)
            dy = dout * gate
            dz *= dout
        else:
            dz = dout
        after = None
        before = h3
        for m in tl.static_range(STEPS):
            carry, dA, dB, dC, dbias = _backward_step(
                carry, dA, dB, dC, dbias, before, after, A, step, reset, u, dy, dz, slope, skip,
                fixed_B, fixed_C, packed_at, dz_row, du_row, ddelta_row, offset_o, stride_ol,
                parts_row, parts_step, lane, valid, t, left, unit, STEPS - 1 - m,
                NP, LANES, STEPS, B_FIXED, C_FIXED, GATHER, FLAGS,
                NEED_B, NEED_C, dA_ptr is not None, NEED_D,
            )  # fmt: skip
            after = before
            if m == 0:
                before = h2
            elif m == 1:
                before = h1
            else:
                before = _states(at_kept, NP, LANES)  # again: that is cheaper than to keep it
        if dD_ptr is not None:
            dD += tl.sum(dy * u, 0)

    to = tl.reshape(n, [NP, LANES])
    whole = valid[None, :] & (to < N)
    part = (b * chunks + c) * dim + d
    tile_part = (b * chunks + c) * N * dim + to * dim + d[None, :]
    if dA_ptr is not None:
        tl.store(dA_ptr + tile_part, dA, mask=whole)
    if dB_ptr is not None:
        tl.store(dB_ptr + tile_part, dB, mask=whole)
    if dC_ptr is not None:
        tl.store(dC_ptr + tile_part, dC, mask=whole)
    if dD_ptr is not None:
        tl.store(dD_ptr + part, dD, mask=valid)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part, dbias, mask=valid)
    if dinitial_ptr is not None:
        if c == 0:
            at = dinitial_ptr + ((b * dim + d[None, :]) * N + to)
            tl.store(at, carry.to(dinitial_ptr.dtype.element_ty), mask=whole)


# fmt: off
@jit(**_ONCE)
def _backward_border_kernel(
    dout_ptr, dlast_ptr, delta_ptr, A_ptr,
    C_ptr,  # (D, N) where fixed
    packed_ptr, z_ptr, bias_ptr, flags_ptr,
    own_ptr, decay_ptr,  # (B, chunks, G, blocks, NP, LANES)
    L, dim, groups, blocks, rows, chunk, chunks, unit,
    stride_gb, stride_gl, stride_gd,
    stride_db, stride_dl, stride_dd,
    stride_zb, stride_zl, stride_zd,
    stride_an, stride_ad, stride_Cn, stride_Cd,
    stride_lb, stride_ld, stride_ln,
    N: tl.constexpr, NP: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, GATHER: tl.constexpr, NVIDIA: tl.constexpr,
    WIDE: tl.constexpr,
):
    # fmt: on
    """The first pass of the backward over chunks: the gradient that a chunk makes of zero."""
    FLAGS: tl.constexpr = flags_ptr is not None
    C_FIXED: tl.constexpr = C_ptr is not None
    pid = tl.program_id(0).to(tl.int64)
    block = pid % (groups * blocks)
    c = pid // (groups * blocks) % chunks
    b = pid // (groups * blocks) // chunks
    g = block // blocks
    width = dim // groups
    lane = tl.arange(0, LANES)
    inner = block % blocks * LANES + lane
    valid = inner < width
    d = g * width + tl.minimum(inner, width - 1)
    n = _state_index(lane, NP, GATHER)
    place = _place(lane, NP, LANES)
    tile = ((b * chunks + c) * groups * blocks + block) * (NP * LANES)
    begin = c * chunk
    steps = tl.minimum(L - begin, chunk).to(tl.int32)
    first = begin
    stride_fl = 1
    if REVERSE:
        first = L - 1 - begin

    A = _channel_states(A_ptr, n, d, stride_an, stride_ad, N, NP, LANES) * 1.4426950408889634
    bias = _per_channel(bias_ptr, d, LANES)
    fixed_C = A
    if C_FIXED:
        fixed_C = _channel_states(C_ptr, n, d, stride_Cn, stride_Cd, N, NP, LANES)
    dout_row = dout_ptr + (b * stride_gb + first * stride_gl)
    delta_row = delta_ptr + (b * stride_db + first * stride_dl)
    z_row = z_ptr
    if z_ptr is not None:
        z_row = z_ptr + (b * stride_zb + first * stride_zl)
    flags_at = flags_ptr
    if flags_ptr is not None:
        flags_at = flags_ptr + (b * L + first)
    packed_at = packed_ptr
    if packed_ptr is not None:
        packed_at = packed_ptr + (((b * groups + g) * rows + begin) * (2 * NP) + n)
    if REVERSE:
        stride_gl = -stride_gl
        stride_dl = -stride_dl
        stride_zl = -stride_zl
        stride_fl = -stride_fl
    carry = A * 0.0
    if dlast_ptr is not None:
        if c == chunks - 1:
            dlast = dlast_ptr + b * stride_lb
            carry = _channel_states(dlast, n, d, stride_ln, stride_ld, N, NP, LANES)
            carry = tl.where(valid[None, :], carry, 0.0)
    sum_d = tl.zeros([LANES], tl.float32)
    k = tl.arange(0, STEPS)[:, None]
    if WIDE:
        k = k.to(tl.int64)
    else:
        d = d.to(tl.int32)
    offset_g = d * stride_gd
    offset_d = d * stride_dd
    offset_z = d * stride_zd
    many = tl.cdiv(steps, STEPS)
    for i in range(many):
        t = (many - 1 - i) * STEPS
        if WIDE:
            t = t.to(tl.int64)
        ok = k < steps - t
        step = _steps(delta_row, t * stride_dl + offset_d, k, stride_dl, ok) + bias[None, :]
        dy = _steps(dout_row, t * stride_gl + offset_g, k, stride_gl, ok & valid[None, :])
        if SOFTPLUS:
            step = softplus(step)
        step = tl.where(ok, step, 0.0)
        reset = step
        if z_ptr is not None:
            dy *= silu(_steps(z_row, t * stride_zl + offset_z, k, stride_zl, ok), NVIDIA)
        if FLAGS:
            live, reset = _flags(flags_at + t * stride_fl, k, stride_fl, ok)
            step = tl.where(live, step, 0.0)
            dy = tl.where(live, dy, 0.0)
            sum_d -= tl.sum(reset, 0)
            reset = tl.broadcast_to(reset, step.shape)
        sum_d += tl.sum(step, 0)
        row_at = packed_at
        if packed_ptr is not None:
            row_at = packed_at + t * (2 * NP)
        for m in tl.static_range(STEPS - 1, -1, -1):
            C = _row(fixed_C, row_at, m, 1, C_FIXED, NP, LANES)
            carry += _take(dy, m, STEPS)[None, :] * C
            carry *= _decay(step, A, reset, m, STEPS, FLAGS)
    tl.store(own_ptr + tile + place, tl.reshape(carry, place.shape))
    decay = tl.math.exp2(sum_d[None, :] * A)
    if FLAGS:
        decay = tl.where((sum_d == float("inf"))[None, :], 0.0, decay)
    tl.store(decay_ptr + tile + place, tl.reshape(decay, place.shape))


def _lanes() -> int:
    """Channels of a program: a warp, so that there are as many programs as there can be."""
    return 64 if torch.version.hip else 32


def _sizes(state: int) -> dict[str, Any]:
    """Of a tile of states: 16 of them in a thread at most, more are split over warps."""
    padded = triton.next_power_of_2(state)
    return {
        "N": state,
        "NP": padded,
        "LANES": _lanes(),
        "STEPS": STEPS,
        # Triton 3.3 has it; the interpreter is quicker with a sum.
        "GATHER": hasattr(tl, "gather") and not triton_interpreted(),
        "NVIDIA": nvidia(),
        "num_warps": max(1, padded // 16),
    }


def _registers(need_A: bool, wide: bool) -> dict[str, int]:
    """Registers a thread of the backward may take, as an option of a launch.

    With 168 three warps fit on a scheduler, and all programs of an encoder's batch on an H200 at
    once. The gradient of A takes 16 more, which then do not fit, nor do offsets of 64 bits or what
    the compiler makes for Blackwell. AMD's compiler has no such option.
    """
    more = need_A or wide or implementations.capability() >= (10, 0)
    return {} if more or torch.version.hip else {"maxnreg": 168}


def _wide(programs: int, padded: int, *tensors: Tensor | None) -> bool:
    """Whether offsets inside one sequence, of these tensors and of workspaces, pass 2^31."""
    given = [x for x in tensors if x is not None]
    length, dim = given[0].shape[1:]
    rows = -(-length // STEPS) * STEPS
    kept, parts = rows // STEPS * programs * padded * _lanes(), rows * programs * 2 * padded
    spans = ((length - 1) * x.stride(1) + (dim - 1) * x.stride(2) for x in given)
    return max(kept, parts, length * dim, *spans) >= 2**31


def _blocks(dim: int, groups: int) -> int:
    return -(-dim // groups // _lanes())


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132  # of an H100 or H200
    return torch.cuda.get_device_properties(device).multi_processor_count


def _chunk(length: int, programs: int, device: torch.device) -> int:
    """Steps of a chunk: all, where there are programs enough to fill the device."""
    processors = _processors(device)
    if programs >= FEW_PROGRAMS * processors:
        return max(length, 1)
    # The chunks then fill it four times as well: a scheduler hides the latencies of four warps.
    chunks = 4 * FEW_PROGRAMS * processors // programs
    return max(SHORTEST_CHUNK, -(-length // chunks // STEPS) * STEPS)


def _kept_shape(batch: int, length: int, dim: int, state: int, groups: int) -> tuple[int, ...]:
    padded = 1 << (state - 1).bit_length()
    return batch, -(-length // STEPS), groups, _blocks(dim, groups), padded, _lanes()


def _workspace(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _fixed(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """B or C where it is (D, N), and its strides along N and D."""
    if x is None or x.ndim == 4:
        return None, 0, 0
    return x, x.stride(1), x.stride(0)


def _pack(
    B: Tensor | None, C: Tensor | None, flags: Tensor | None, like: Tensor, reverse: bool
) -> Tensor | None:
    """What of B and C depends on the input, side by side, in fp32 and in the order of the scan."""
    B = None if B is None or B.ndim == 2 else B
    C = None if C is None or C.ndim == 2 else C
    given = C if B is None else B
    if given is None:
        return None
    batch, length, groups, state = given.shape
    sizes = _sizes(state)
    rows = -(-length // STEPS) * STEPS
    packed = _workspace(like, batch, groups, rows, 2, sizes["NP"])
    block = max(1, 1024 // sizes["NP"])
    grid = (batch * groups * triton.cdiv(rows, block),)
    _pack_kernel[grid](
        B, C, flags, packed, length, groups, rows, *_strides(B, 4), *_strides(C, 4),
        N=state, NP=sizes["NP"], REVERSE=reverse, BLOCK_L=block, num_warps=4,
    )  # fmt: skip
    return packed


def _join(border: Tensor, decay: Tensor, reverse: bool) -> Tensor:
    batch, chunks = border.shape[:2]
    size = border[0, 0].numel()
    grid = (batch * triton.cdiv(size, 1024),)
    _join_kernel[grid](border, decay, chunks, size, REVERSE=reverse, BLOCK=1024, num_warps=4)
    return border


def _launch_fwd(inputs: ScanInputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    u, delta, A, B, C, D, z, delta_bias, initial_state, flags, delta_softplus, reverse = inputs
    batch, length, dim = u.shape
    state = A.shape[1]
    out = u.new_empty(u.shape)
    last = _workspace(u, batch, dim, state)
    groups = inputs.groups
    kept = _workspace(u, *_kept_shape(batch, length, dim, state, groups) if keep else (0,))
    if out.numel() == 0:
        last.zero_() if initial_state is None else last.copy_(initial_state)
        return out, last, kept
    sizes = _sizes(state)
    blocks = _blocks(dim, groups)
    programs = batch * groups * blocks
    chunk = _chunk(length, programs, u.device)
    chunks = triton.cdiv(length, chunk)
    D, delta_bias, flags = (_contiguous(x) for x in (D, delta_bias, flags))
    packed = _pack(B, C, flags, u, reverse)
    rows = 0 if packed is None else packed.shape[2]
    fixed_B, *strides_B = _fixed(B)
    fixed_C, *strides_C = _fixed(C)
    border = own = decay = None

    def launch(**outputs: Tensor | None) -> None:
        _forward_kernel[(programs * chunks,)](
            u, delta, A, fixed_B, fixed_C, packed, D, z, delta_bias, flags, initial_state, border,
            **outputs,
            L=length, dim=dim, groups=groups, blocks=blocks, rows=rows, chunk=chunk, chunks=chunks,
            unit=1,
            **_named("u", u), **_named("d", delta), **_named("z", z),
            stride_an=A.stride(1), stride_ad=A.stride(0),
            stride_Bn=strides_B[0], stride_Bd=strides_B[1],
            stride_Cn=strides_C[0], stride_Cd=strides_C[1],
            **_named_states("i", initial_state),
            SOFTPLUS=delta_softplus, REVERSE=reverse,
            WIDE=_wide(groups * blocks, sizes["NP"], u, delta, z), **sizes,
        )  # fmt: skip

    if chunks > 1:
        own, decay = (
            _workspace(u, batch, chunks, groups, blocks, sizes["NP"], _lanes()) for _ in range(2)
        )
        launch(out_ptr=None, kept_ptr=None, last_ptr=None, own_ptr=own, decay_ptr=decay)
        border = _join(own, decay, False)
    launch(
        out_ptr=out, kept_ptr=kept if keep else None, last_ptr=last, own_ptr=None, decay_ptr=None
    )
    return out, last, kept


def _named(letter: str, x: Tensor | None) -> dict[str, int]:
    """Strides of a (B, L, D) tensor by the names of the kernels' arguments."""
    return dict(zip((f"stride_{letter}{i}" for i in "bld"), _strides(x, 3), strict=True))


def _named_states(letter: str, x: Tensor | None) -> dict[str, int]:
    """Strides of a (B, D, N) tensor."""
    return dict(zip((f"stride_{letter}{i}" for i in "bdn"), _strides(x, 3), strict=True))


def _launch_bwd(
    dout: Tensor | None,
    dlast: Tensor | None,
    kept: Tensor,
    inputs: ScanInputs,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    u, delta, A, B, C, D, z, delta_bias, initial_state, flags, delta_softplus, reverse = inputs
    wanted = dict(zip(_NEEDS, needs, strict=True))
    if u.numel() == 0:
        pairs = zip(inputs.differentiable, needs, strict=True)
        wanted_inputs = (x if need else None for x, need in pairs)
        zeros = [None if x is None else torch.zeros_like(x) for x in wanted_inputs]
        if zeros[8] is not None and dlast is not None:
            zeros[8].copy_(dlast)  # no step: the last state is the first
        return zeros
    if kept.numel() == 0:  # the forward did not know that a gradient would be wanted
        kept = _launch_fwd(inputs, True)[2]
    if dout is None:
        dout = u.new_zeros(1).expand(u.shape)
    batch, length, dim = u.shape
    state = A.shape[1]
    sizes = _sizes(state)
    groups = inputs.groups
    blocks = _blocks(dim, groups)
    programs = batch * groups * blocks
    chunk = _chunk(length, programs, u.device)
    chunks = triton.cdiv(length, chunk)
    D, delta_bias, flags = (_contiguous(x) for x in (D, delta_bias, flags))
    packed = _pack(B, C, flags, u, reverse)
    rows = 0 if packed is None else packed.shape[2]
    fixed_B, *strides_B = _fixed(B)
    fixed_C, *strides_C = _fixed(C)
    common = {
        "L": length, "dim": dim, "groups": groups, "blocks": blocks, "rows": rows,
        "chunk": chunk, "chunks": chunks, "unit": 1,
        **_named("g", dout), **_named_states("l", dlast), **_named("d", delta), **_named("z", z),
        "stride_an": A.stride(1), "stride_ad": A.stride(0),
        "stride_Cn": strides_C[0], "stride_Cd": strides_C[1],
        "SOFTPLUS": delta_softplus, "REVERSE": reverse,
        "WIDE": _wide(groups * blocks, sizes["NP"], u, dout, delta, z),
    }  # fmt: skip
    border = None
    if chunks > 1:
        border, decay = (
            _workspace(u, batch, chunks, groups, blocks, sizes["NP"], _lanes()) for _ in range(2)
        )
        _backward_border_kernel[(programs * chunks,)](
            dout, dlast, delta, A, fixed_C, packed, z, delta_bias, flags, border, decay,
            **common, **sizes,
        )  # fmt: skip
        _join(border, decay, True)

    def room(need: bool, *shape: int) -> Tensor | None:
        return _workspace(u, *shape) if need else None

    du, ddelta, dz = (
        x.new_empty(x.shape) if x is not None and wanted[name] else None
        for name, x in (("u", u), ("delta", delta), ("z", z))
    )
    parts_B = wanted["B"] and fixed_B is None
    parts_C = wanted["C"] and fixed_C is None
    parts = room(parts_B or parts_C, batch, length, groups, blocks, 2, sizes["NP"])
    tile = (batch * chunks, state, dim)
    dA = room(wanted["A"], *tile)
    dB = room(wanted["B"] and fixed_B is not None, *tile)
    dC = room(wanted["C"] and fixed_C is not None, *tile)
    dD = room(wanted["D"], batch * chunks, dim)
    dbias = room(wanted["delta_bias"], batch * chunks, dim)
    dinitial = None
    if initial_state is not None and wanted["initial_state"]:
        dinitial = initial_state.new_empty(initial_state.shape)
    _backward_kernel[(programs * chunks,)](
        dout, dlast, kept, border, u, delta, A, fixed_B, fixed_C, packed, D, z, delta_bias, flags,
        du, ddelta, dz, parts, dA, dB, dC, dD, dbias, dinitial,
        **common, **_named("u", u), stride_Bn=strides_B[0], stride_Bd=strides_B[1],
        ALIKE=len({1, *(x.stride(2) for x in (dout, u, delta, z) if x is not None)}) == 1,
        NEED_B=wanted["B"], NEED_C=wanted["C"], **sizes,
        **_registers(wanted["A"], common["WIDE"]),
    )  # fmt: skip
    if dA is not None:
        dA = dA.sum(0).T.to(A.dtype)
    if dB is not None:
        dB = dB.sum(0).T.to(B.dtype)
    if dC is not None:
        dC = dC.sum(0).T.to(C.dtype)
    if parts is not None:
        if parts_B:
            dB = B.new_empty(B.shape)
        if parts_C:
            dC = C.new_empty(C.shape)
        count = batch * length * groups
        block = max(1, 512 // sizes["NP"])
        _add_parts_kernel[(triton.cdiv(count, block),)](
            parts, dB if parts_B else None, dC if parts_C else None, length, groups, blocks, count,
            N=state, NP=sizes["NP"], REVERSE=reverse, BLOCK_R=block, num_warps=4,
        )  # fmt: skip
    if dD is not None and D is not None:
        dD = dD.sum(0).to(D.dtype)
    if dbias is not None and delta_bias is not None:
        dbias = dbias.sum(0).to(delta_bias.dtype)
    return [du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial]


_NEEDS = ScanInputs._fields[:9]  # what can have a gradient
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_state, Tensor? flags, bool delta_softplus, bool reverse"
)


def _precision(*tensors: Tensor | None) -> torch.dtype:
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if wide else torch.float32


@torch.library.custom_op(
    "emrrg_kernels::selective_scan_fwd",
    mutates_args=(),
    schema=f"({_INPUTS}, bool keep, str implementation) -> (Tensor, Tensor, Tensor)",
)
def _scan_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, keep, implementation = args
    inputs = ScanInputs(*given)
    if implementation == "triton":
        with torch.cuda.device_of(inputs.u):  # which need not be the current one
            return _launch_fwd(inputs, keep)
    keep = keep and implementation == "torch"
    kept = _kept_by_torch(inputs, keep)
    with torch.autocast("cpu", enabled=False):
        out, last = scan_cpu.scan_forward(
            implementation == "native", inputs, kept if keep else None
        )
    return out.contiguous(), last.contiguous(), kept


def _kept_by_torch(inputs: ScanInputs, keep: bool) -> Tensor:
    u, state = inputs.u, inputs.A.shape[1]
    size = scan_torch.kept_size(*u.shape, state, inputs.z is not None) if keep else 0
    return u.new_empty(size, dtype=_precision(*inputs[:5]))


@_scan_fwd.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, keep, implementation = args
    inputs = ScanInputs(*given)
    u, A = inputs.u, inputs.A
    last = u.new_empty((u.shape[0], *A.shape), dtype=_precision(*inputs[:5]))
    if keep and implementation == "triton":
        kept = _workspace(u, *_kept_shape(*u.shape, A.shape[1], inputs.groups))
    else:
        kept = _kept_by_torch(inputs, keep and implementation == "torch")
    return u.new_empty(u.shape), last, kept


@torch.library.custom_op(
    "emrrg_kernels::selective_scan_bwd",
    mutates_args=(),
    schema=f"(Tensor? dout, Tensor? dlast, Tensor kept, {_INPUTS}, bool[] needs, "
    "str implementation) -> Tensor[]",
)
def _scan_bwd(*args: Any) -> list[Tensor]:
    dout, dlast, kept, *given, needs, implementation = args
    inputs = ScanInputs(*given)
    if implementation == "triton":
        with torch.cuda.device_of(kept):
            grads = _launch_bwd(dout, dlast, kept, inputs, needs)
    else:
        native = implementation == "native"
        ours = kept if kept.numel() else None
        with torch.autocast("cpu", enabled=False):
            grads = list(scan_cpu.scan_backward(native, dout, dlast, inputs, needs, ours))
    return [x.contiguous() for x in grads if x is not None]


@_scan_bwd.register_fake
def _(dout: Tensor | None, dlast: Tensor | None, kept: Tensor, *args: Any) -> list[Tensor]:
    *inputs, needs, _ = args
    tensors = inputs[: len(_NEEDS)]
    return [x.new_empty(x.shape) for x, need in zip(tensors, needs, strict=True) if need]


_scan_gradients = derivative("selective_scan", _scan_bwd)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, delta_softplus, reverse, _, implementation = inputs
    ctx.set_materialize_grads(False)
    ctx.needs = list(ctx.needs_input_grad[: len(_NEEDS)])
    ctx.options = delta_softplus, reverse
    ctx.implementation = implementation
    ctx.save_for_backward(output[2], *tensors)


def _backward(
    ctx: Any, dout: Tensor | None, dlast: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dout is None and dlast is None:
        return (None,) * 14
    kept, *tensors = ctx.saved_tensors
    grads = iter(
        _scan_gradients(
            dout, dlast, kept, *tensors, *ctx.options, ctx.needs, ctx.implementation
        )
    )
    return (*(next(grads) if need else None for need in ctx.needs), *(None,) * 5)


_scan = transformable("selective_scan", _scan_fwd, _setup_context, _backward)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan, channels last; see the module's docstring for the recurrence.

    The state is fp32 (fp64 where u, delta, A, B or C is), whatever they are. Gradients flow to
    every tensor of floating point, through the last state too, and are computed only for those that
    need them. On a GPU the forward keeps 1/4 N numbers in fp32 for each (b, d, l) where a gradient
    is wanted; "torch" on the CPU at most as many, and one more with z; "native" keeps none.

    Args:
        u, delta: (B, L, D) fp32, fp16 or bf16 (fp64 on the CPU), any strides. delta: before bias
            and softplus.
        A: (D, N), N from 1 to 256, real. Negative for stability; not checked.
        B, C: (B, L, N), or (B, L, G, N) for G groups of D / G channels, or (D, N) where they do
            not depend on the input; each of its own kind.
        D, delta_bias: (D,).
        z: (B, L, D), multiplies the output as silu(z).
        delta_softplus: whether the step size passes through softplus.
        initial_state: (B, D, N); None: zeros.
        return_last_state: also return the state after the last step.
        reverse: from position L-1 to 0; the output stays in place, nothing is flipped.
        position_ids: (B, L) or (L,) integers, 0 where a packed sequence begins: the state is reset.
        seq_idx: (B, L) or (L,) integers, the number of the packed sequence; instead of the former.
        mask: (B, L) or (L,), False where there is padding: the state passes, the output is 0, and
            what the inputs hold there, even NaN, reaches nothing.
        implementation: see `kernels.implementations`; None follows the device.
    Returns:
        (B, L, D) in u's dtype, contiguous; with `return_last_state` also (B, D, N) fp32 (fp64).
    Raises:
        ValueError: shapes or devices disagree, or an implementation that cannot run there.
        TypeError: a tensor that is not of real floating point.
    """
    _check("selective_scan", u, delta, A, B, C, D, z, delta_bias, initial_state)
    return _selective_scan(
        "selective_scan", u, delta, A, B, C, D, z, delta_bias,
        delta_softplus=delta_softplus, initial_state=initial_state,
        return_last_state=return_last_state, reverse=reverse, position_ids=position_ids,
        seq_idx=seq_idx, mask=mask, implementation=implementation,
    )  # fmt: skip


def _selective_scan(
    op: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    *,
    delta_softplus: bool,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`selective_scan` for tensors that are checked, `op` being the function that was called."""
    batch, length, _ = u.shape
    flags = step_flags(
        batch, length, reverse=reverse, position_ids=position_ids, seq_idx=seq_idx, mask=mask
    )
    if flags is not None and flags.device != u.device:
        given = {"position_ids": position_ids, "seq_idx": seq_idx, "mask": mask}
        names = " and ".join(name for name, x in given.items() if x is not None)
        raise ValueError(f"{op}: {names} on {flags.device}, u on {u.device}")
    widest = _precision(u, delta, A, B, C, D, z, delta_bias, initial_state)
    chosen = choose(implementation, u.device, widest, op)
    if chosen == "reference":
        return scan_ref(
            u, delta, A, B, C, D, z, delta_bias,
            delta_softplus=delta_softplus, initial_state=initial_state,
            return_last_state=return_last_state, reverse=reverse, flags=flags,
        )  # fmt: skip
    B, C = (x[:, :, None] if x.ndim == 3 else x for x in (B, C))
    groups = max([1, *(x.shape[2] for x in (B, C) if x.ndim == 4)])
    B, C = (x.expand(-1, -1, groups, -1) if x.ndim == 4 else x for x in (B, C))
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, last, _ = _scan(*inputs, flags, delta_softplus, reverse, keep, chosen)
    return (out, last) if return_last_state else out


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan, channels first: mamba_ssm's function of this name, real A.

    No tensor is transposed in memory; the kernels take strides. See `selective_scan`.

    Args:
        u, delta, z: (B, D, L).
        A: (D, N).
        B, C: (B, N, L), or (B, G, N, L) for groups, or (D, N) where they do not depend on the
            input.
        D, delta_bias: (D,).
        delta_softplus: whether the step size passes through softplus.
        return_last_state: also return the state after the last step.
    Returns:
        (B, D, L) in u's dtype; with `return_last_state` also (B, D, N) fp32 (fp64).
    Raises:
        ValueError: shapes or devices disagree.
        TypeError: a tensor that is not of real floating point.
    """
    _check("selective_scan_fn", u, delta, A, B, C, D, z, delta_bias)
    out = _selective_scan(
        "selective_scan_fn",
        u.mT,
        delta.mT,
        A,
        B if B.ndim == 2 else B.movedim(-1, 1),
        C if C.ndim == 2 else C.movedim(-1, 1),
        D,
        None if z is None else z.mT,
        delta_bias,
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
    )
    if isinstance(out, tuple):
        return out[0].mT, out[1]
    return out.mT


def selective_state_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the scan, as in generation token by token; it can be trained through.

    mamba_ssm's function of this name overwrites `state` and returns the output alone. This one
    returns the new state, so that gradients flow through it: `out, state = ...(state, ...)`.

    Args:
        state: (B, D, N).
        u, delta, z: (B, D).
        A: (D, N).
        B, C: (B, N) or (B, G, N).
        D, delta_bias: (D,).
        delta_softplus: whether the step size passes through softplus.
        implementation: see `kernels.implementations`; None follows the device.
    Returns:
        (B, D) in u's dtype, and the new state (B, D, N), fp32 or fp64.
    Raises:
        ValueError: shapes or devices disagree, or an implementation that cannot run there.
        TypeError: a tensor that is not of real floating point.
    """
    _check("selective_state_update", u, delta, A, B, C, D, z, delta_bias, state)
    out = _selective_scan(
        "selective_state_update",
        u[:, None],
        delta[:, None],
        A,
        B[:, None],
        C[:, None],
        D,
        None if z is None else z[:, None],
        delta_bias,
        delta_softplus=delta_softplus,
        initial_state=state,
        return_last_state=True,
        implementation=implementation,
    )
    assert isinstance(out, tuple)
    return out[0][:, 0], out[1]


def describe(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    implementation: str | None = None,
) -> str:
    """Which implementation a call would run, and why, in a line.

    Args:
        device: of the tensors; None: the first GPU, or the CPU where there is none.
        dtype: the widest type among the tensors.
        implementation: as given to the call.
    Raises:
        ValueError: no implementation can run there.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = choose(implementation, place, dtype, "selective_scan")
    reasons = {
        "triton": f"Triton {getattr(triton, '__version__', None)}"
        + (", in the interpreter: for tests" if triton_interpreted() else ""),
        "native": "C++, compiled for this machine",
        "torch": "plain torch",
        "reference": "step by step, the truth for tests",
    }
    reason = reasons[chosen]
    if chosen == "torch" and implementation is None:
        if dtype == torch.float64:
            reason += ", because compiled code has no float64"
        else:
            reason += f", because nothing could be compiled: {scan_cpu.native_error()}"
    how = "asked for" if implementation else "the default there"
    name = str(dtype).removeprefix("torch.")
    return f"selective_scan on {place} in {name}: {chosen} ({reason}), {how}"


def warmup(
    state: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    *,
    gate: bool = True,
    delta_softplus: bool = True,
    gradients: bool = True,
) -> None:
    """Compile now what the first call would: a forward, and a backward with all gradients.

    One compilation serves all batches, lengths and widths, and all strides of tensors whose
    channels lie side by side.

    Args:
        state: N.
        dtype: of u, delta and z; the weights are fp32.
        device: None: the first GPU, or the CPU where there is none.
        gate: whether there is a z.
        delta_softplus: as given to the calls.
        gradients: whether to compile the backward too.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def room(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=of, device=place, requires_grad=gradients)

    u, delta, z = (room(1, 2 * STEPS + 1, 32, of=dtype) for _ in range(3))
    B, C = (room(1, 2 * STEPS + 1, state) for _ in range(2))
    A, D, bias = room(32, state), room(32), room(32)
    out = selective_scan(
        u, delta, A, B, C, D, z if gate else None, bias, delta_softplus=delta_softplus
    )
    if gradients:
        assert isinstance(out, Tensor)
        out.sum().backward()


_LAYOUTS: dict[str, tuple[str, dict[int, str], str]] = {
    "selective_scan": ("BLD", {3: "BLN", 2: "DN", 4: "BLGN"}, "initial_state"),
    "selective_scan_fn": ("BDL", {3: "BNL", 2: "DN", 4: "BGNL"}, ""),
    "selective_state_update": ("BD", {2: "BN", 3: "BGN"}, "state"),
}
"""Public function to the dimensions of its u, those of its B and C by their number, and its name
of the state."""


def _check(
    op: str,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None = None,
) -> None:
    """Refuse what disagrees, in the names and the order of dimensions of the caller's function."""
    row, forms, state = _LAYOUTS[op]
    if u.ndim != len(row) or A.ndim != 2:
        raise ValueError(
            f"{op}: u has shape {tuple(u.shape)}, expected {_letters(row)}, and A "
            f"{tuple(A.shape)}, expected (D, N)"
        )
    rows = tuple(u.shape)
    size = {**dict(zip(row, rows, strict=True)), "N": A.shape[1]}
    dim = size["D"]
    if not 1 <= size["N"] <= 256:
        raise ValueError(f"{op}: A has shape {tuple(A.shape)}, expected 1 <= N <= 256")
    grouped = forms[len(row) + 1]
    axis = grouped.index("G")
    groups = [x.shape[axis] if x.ndim == len(grouped) else 1 for x in (B, C)]
    for name, count in zip("BC", groups, strict=True):
        if count < 1 or dim % count:
            raise ValueError(f"{op}: {name} has {count} groups for {dim} channels")
    if groups[0] != groups[1] and 1 not in groups:
        raise ValueError(f"{op}: B has {groups[0]} groups, C has {groups[1]}, expected as many")

    def shape(form: str, count: int = 1) -> tuple[int, ...]:
        return tuple([count if letter == "G" else size[letter] for letter in form])

    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "u": (u, rows),
        "delta": (delta, rows),
        "A": (A, (dim, size["N"])),
        "B": (B, shape(forms.get(B.ndim, grouped), groups[0])),
        "C": (C, shape(forms.get(C.ndim, grouped), groups[1])),
        "D": (D, (dim,)),
        "z": (z, rows),
        "delta_bias": (delta_bias, (dim,)),
        state: (initial_state, (size["B"], dim, size["N"])),
    }
    for name, (tensor, wanted) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted:
            named = {"A": ["DN"], "D": ["D"], "delta_bias": ["D"], state: ["BDN"]}
            named |= {"B": list(forms.values()), "C": list(forms.values())}
            count = groups["BC".index(name)] if name in ("B", "C") else 1
            allowed = [f"{_letters(f)} = {shape(f, count)}" for f in named.get(name, [row])]
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}, expected {' or '.join(allowed)}, "
                f"because u has shape {rows} = {_letters(row)} and A {tuple(A.shape)} = (D, N)"
            )
        if tensor.device != u.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, u on {u.device}")
        if tensor.is_complex():
            raise TypeError(
                f"{op}: {name} is {tensor.dtype}; complex states are not supported, "
                "the scan of Mamba-1 is real"
            )
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} is {tensor.dtype}, expected floating point")


def _letters(form: str) -> str:
    """``"BLD"`` -> ``(B, L, D)``."""
    return f"({', '.join(form)}{',' * (len(form) == 1)})"
