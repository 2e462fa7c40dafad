"""The scans and the convolution on the CPU: "torch", plain and tuned, and "native", compiled.

Both keep no state but one chunk's: memory is O(B L D + B D N), never (B, L, D, N). Plain tensors come
in and go out; what is differentiated, registered and chosen stands in the files that call this one.

"torch" works on chunks of S steps with states laid out (S, B, G, N, D), the channels last: one
`exp` over a whole chunk, one `addcmul_` for each step, and matrix products for the sums over N or D.
The backward computes the states of one chunk after the other again, from those at its beginning.
A cross scan is a scan of K groups of channels, each with its own order of the tokens.

    d_t = softplus(delta_t + delta_bias);  a_t = exp(d_t A);  h_t = a_t h_{t-1} + d_t u_t B_t
    y_t = <C_t, h_t> + D u_t
    backward, from the last step: g_t = dy_t C_t + a_{t+1} g_{t+1};  q_t = g_t a_t h_{t-1}
    dC_t = sum_d dy_t h_t;  dB_t = sum_d d_t u_t g_t;  dA = sum_t d_t q_t;  du_t = d_t <B_t, g_t>
    dd_t = <A, q_t> + u_t <B_t, g_t>

(Mamba, arXiv 2312.00752, equations 2 to 4 with the discretisation of its code.)
"""

from __future__ import annotations

import array
import ctypes
import hashlib
import logging
import math
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels.reference import RESET, SKIP

logger = logging.getLogger(__name__)

CHUNK = 1 << 17  # elements of a chunk of states for each thread: they stay in its cache
BLOCK = 1 << 18  # elements without states that are computed at once
MIN_STEPS = 4  # of a chunk, however large a step is: the loop's overhead, and kept states


def scan_forward(
    native: bool,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    flags: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The selective scan, see `kernels.reference.scan_ref`.

    Args:
        native: compiled code; else plain torch.
        u, delta, z: (B, L, D), any strides.
        A: (D, N).
        B, C: (D, N) or (B, L, G, N).
        D, delta_bias: (D,).
        initial_state: (B, D, N).
        flags: (B, L) uint8 of `kernels.reference.step_flags`.
        delta_softplus: whether the step size passes through softplus.
        reverse: from the last step to the first.
    Returns:
        (B, L, D) in u's dtype, and the last state (B, D, N), fp32 or fp64.
    """
    out = torch.empty(u.shape, dtype=u.dtype)
    B, C = _same_groups(B, C)
    if native:
        last = torch.empty(u.shape[0], *A.shape, dtype=torch.float32)
        inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, flags)
        _scan_native(*inputs, delta_softplus, reverse, out=out, last=last)
        return out, last
    scan = _scan(u, delta, A, B, C, D, delta_bias, initial_state, flags, delta_softplus, reverse)
    groups = scan.A.shape[0]
    out_steps, z_steps = _steps(out, groups), None if z is None else _steps(z, groups)
    last, memory = torch.empty(u.shape[0], *A.shape, dtype=scan.A.dtype), _Memory()
    for part in scan.parts():
        ours = part.of_scan(scan)
        state = ours.start()
        for steps, size in ours.ranges():
            block = _Block(ours, steps, size, memory)
            y = block.room("y")
            for i in range(block.count):
                states, _ = block.states(i, state)
                block.output(i, states, y[i])
                state.copy_(states[:, :, -1])
            if D is not None:
                y.addcmul_(block.u, ours.D)
            if z_steps is not None:
                y *= F.silu(block.cut(part.of(z_steps)))
            block.join(block.mask(y), part.of(out_steps))
        part.of(_state(last, groups)).copy_(state)
    return out, last


def scan_backward(
    native: bool,
    dout: Tensor | None,
    dlast: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    flags: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of `scan_forward`.

    Args:
        native, u, ..., reverse: as there.
        dout: (B, L, D), the output's gradient; None: zeros.
        dlast: (B, D, N), the last state's; None: zeros.
        needs: which of the nine gradients to compute.
    Returns:
        Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state, each in its input's shape and
        dtype; None where it is not needed.
    """
    du, ddelta, dz = (
        _room(x, need) for x, need in ((u, needs[0]), (delta, needs[1]), (z, needs[6]))
    )
    B_given, C_given = B, C
    B, C = _same_groups(B, C)
    if dout is None:
        dout = u.new_zeros(1).expand(u.shape)
    if native:
        sums = [_sum_room(x, n) for x, n in ((A, needs[2]), (D, needs[5]), (delta_bias, needs[7]))]
        dA, dD, dbias = sums
        dB, dC = (
            _sum_room(x, n) if x.ndim == 2 else _room(x, n, torch.float32)
            for x, n in ((B, needs[3]), (C, needs[4]))
        )
        dinitial = _room(initial_state, needs[8], torch.float32)
        inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state, flags)
        grads_ = (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)
        _scan_native(*inputs, delta_softplus, reverse, dout=dout, dlast=dlast, grads=grads_)
        return (
            du,
            ddelta,
            _as(dA, A),
            _of_groups(dB, B_given),
            _of_groups(dC, C_given),
            _as(dD, D),
            dz,
            _as(dbias, delta_bias),
            _as(dinitial, initial_state),
        )
    scan = _scan(u, delta, A, B, C, D, delta_bias, initial_state, flags, delta_softplus, reverse)
    groups = scan.A.shape[0]
    du_steps, ddelta_steps, dz_steps, z_steps = (
        None if x is None else _steps(x, groups) for x in (du, ddelta, dz, z)
    )
    grads = _Grads.zeros(scan, du_steps, ddelta_steps, [*needs[2:6], *needs[7:]])
    dout_steps = _steps(dout, groups)
    end_gradient = None
    if dlast is not None:
        end_gradient = _state(dlast.to(scan.A.dtype), groups)
    memory = _Memory()
    for part in scan.parts():
        ours = part.of_scan(scan)
        end = None if end_gradient is None else part.of(end_gradient)
        backward = _Backward(ours, part.of_grads(grads), end, dz is not None, memory)
        for block in backward.blocks():
            given, dy, y = block.cut(part.of(dout_steps)), block.room("dy"), block.room("y")
            if z_steps is None:
                dy.copy_(given)
            else:
                gate = block.cut(part.of(z_steps))
                torch.mul(given, F.silu(gate), out=dy)
            block.mask(dy)
            for i in backward.chunks(block):
                if dz is not None:
                    block.output(i, backward.states, y[i])
                backward.step(block, i, dy[i])
            if dz_steps is not None:
                if ours.D is not None:
                    y.addcmul_(block.u, ours.D)
                block.join(block.mask(_silu_backward(y.mul_(given), gate)), part.of(dz_steps))
            backward.finish(block, dy)
    dB, dC = (
        _of_matrix(g, x)
        if g is None or x.ndim == 2
        else _of_groups(g.permute(1, 2, 0, 3), x)
        for g, x in ((grads.B, B_given), (grads.C, C_given))
    )
    return (
        du,
        ddelta,
        _of_matrix(grads.A, A),
        dB,
        dC,
        _as(grads.D, D),
        dz,
        _as(grads.bias, delta_bias),
        None if grads.initial is None else _as(grads.initial.permute(1, 0, 3, 2), initial_state),
    )


def cross_forward(
    native: bool,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    orders: Tensor,
) -> Tensor:
    """The scans of all visiting orders, summed and gated; `kernels.reference.cross_scan_ref`.

    Args:
        native: compiled code; else plain torch.
        u, delta: (K, B, L, D), any strides.
        A: (K, D, N).
        B, C: (K, B, L, N).
        D, delta_bias: (K, D).
        z: (B, L, D).
        orders: (K, L) int64.
    Returns:
        (B, L, D) in z's dtype.
    """
    if native:
        out = torch.empty(z.shape, dtype=z.dtype)
        _cross_native(u, delta, A, B, C, D, z, delta_bias, orders, out=out)
        return out
    scan = _cross(u, delta, A, B, C, D, delta_bias)
    total = torch.zeros(z.shape, dtype=scan.A.dtype)
    memory = _Memory()
    for part in scan.parts():
        ours, tokens = part.of_scan(scan), part.of_tokens(total)
        state = ours.start()
        for steps, size in ours.ranges():
            block = _Block(ours, steps, size, memory)
            y = block.room("y")
            for i in range(block.count):
                states, _ = block.states(i, state)
                block.output(i, states, y[i])
                state.copy_(states[:, :, -1])
            block.add_tokens(tokens, orders, y.addcmul_(block.u, ours.D))
    total *= F.silu(z.to(total.dtype))
    return total.div_(len(orders)).to(z.dtype)


def cross_backward(
    native: bool,
    dout: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    orders: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of `cross_forward`.

    Args:
        native, u, ..., orders: as there.
        dout: (B, L, D), the output's gradient.
        needs: which of the eight gradients to compute.
    Returns:
        Gradients of u, delta, A, B, C, D, z, delta_bias, each in its input's shape and dtype; None
        where it is not needed.
    """
    du, ddelta = (_room(x, need) for x, need in ((u, needs[0]), (delta, needs[1])))
    if native:
        dz = _room(z, needs[6])
        dB, dC = (_room(x, need) for x, need in ((B, needs[3]), (C, needs[4])))
        sums = [_sum_room(x, n) for x, n in ((A, needs[2]), (D, needs[5]), (delta_bias, needs[7]))]
        dA, dD, dbias = sums
        grads_ = (du, ddelta, dA, dB, dC, dD, dz, dbias)
        _cross_native(u, delta, A, B, C, D, z, delta_bias, orders, dout=dout, grads=grads_)
        return du, ddelta, _as(dA, A), dB, dC, _as(dD, D), dz, _as(dbias, delta_bias)
    scan = _cross(u, delta, A, B, C, D, delta_bias)
    dtype = scan.A.dtype
    grads = _Grads.zeros(scan, du, ddelta, [*needs[2:6], needs[7], False])
    gate = z.to(dtype)
    dy_tokens = dout.to(dtype) * F.silu(gate)
    dy_tokens /= len(orders)
    total = torch.zeros(z.shape, dtype=dtype) if needs[6] else None
    memory = _Memory()
    for part in scan.parts():
        ours = part.of_scan(scan)
        backward = _Backward(ours, part.of_grads(grads), None, total is not None, memory)
        for block in backward.blocks():
            dy, y = block.room("dy"), block.room("y")
            block.take_tokens(part.of_tokens(dy_tokens), orders, dy)
            for i in backward.chunks(block):
                if total is not None:
                    block.output(i, backward.states, y[i])
                backward.step(block, i, dy[i])
            if total is not None:
                y.addcmul_(block.u, ours.D)
                block.add_tokens(part.of_tokens(total), orders, y)
            backward.finish(block, dy)
    dz = None
    if total is not None:
        dz = _silu_backward(total.mul_(dout).div_(len(orders)), gate).to(z.dtype)
    return (
        du,
        ddelta,
        _of_matrix(grads.A, A),
        _as(grads.B, B),
        _as(grads.C, C),
        _as(grads.D, D),
        dz,
        _as(grads.bias, delta_bias),
    )


def conv_forward(
    native: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    orders: Tensor,
    silu: bool,
) -> Tensor:
    """Depthwise convolution along visiting orders; `kernels.reference.causal_conv1d_ref`.

    Args:
        native: compiled code; else plain torch.
        x: (B, L, D), any strides.
        weight: (K, D, W).
        bias: (K, D) or None.
        orders: (K, L) int64.
        silu: whether the result passes through SiLU.
    Returns:
        (K, B, L, D) in x's dtype.
    """
    out = torch.empty(len(orders), *x.shape, dtype=x.dtype)
    if native:
        _conv_native(x, weight, bias, orders, silu, out=out)
        return out
    for k, begin, end, mixed, _ in _conv_chunks(x, weight, bias, orders):
        out[k, :, begin:end] = F.silu(mixed, inplace=True) if silu else mixed
    return out


def conv_backward(
    native: bool,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    orders: Tensor,
    silu: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of `conv_forward`, which is computed again.

    Args:
        native, x, ..., silu: as there.
        dout: (K, B, L, D), the output's gradient.
        needs: which of the three gradients to compute.
    Returns:
        Gradients of x, weight, bias, each in its input's shape and dtype; None where not needed.
    """
    if native:
        grads = (_room(x, needs[0]), _sum_room(weight, needs[1]), _sum_room(bias, needs[2]))
        _conv_native(x, weight, bias, orders, silu, dout=dout, grads=grads)
        return grads[0], _as(grads[1], weight), _as(grads[2], bias)
    dtype = _precision(x, weight)
    width = weight.shape[-1]
    dx = torch.zeros(x.shape, dtype=dtype) if needs[0] else None
    dweight = torch.zeros(weight.shape, dtype=dtype) if needs[1] else None
    dbias = None
    if bias is not None and needs[2]:
        dbias = torch.zeros(bias.shape, dtype=dtype)
    for k, begin, end, mixed, rows in _conv_chunks(x, weight, bias, orders):
        dmixed = dout[k, :, begin:end].to(dtype)
        if silu:
            dmixed = _silu_backward(dmixed, mixed)
        if dbias is not None:
            dbias[k] += dmixed.sum((0, 1))
        if dweight is not None:
            for w in range(width):
                dweight[k, :, w] += (dmixed * rows[:, w : w + end - begin]).sum((0, 1))
        if dx is not None:
            drows = torch.zeros_like(rows)
            for w in range(width):
                drows[:, w : w + end - begin].addcmul_(dmixed, weight[k, :, w].to(dtype))
            real = max(0, width - 1 - begin)  # rows before it stand before the sequence
            tokens = orders[k, begin - width + 1 + real : end]
            dx.index_add_(1, tokens, drows[:, real:])
    return (
        None if dx is None else dx.to(x.dtype),
        None if dweight is None else dweight.to(weight.dtype),
        None if dbias is None or bias is None else dbias.to(bias.dtype),
    )


def native_available() -> bool:
    """Whether compiled code can run here; builds it on first use, or finds what was built before."""
    return _native().library is not None


def native_error() -> str | None:
    """Why `native_available` says no; None where it says yes."""
    return _native().error


# The scan in plain torch. Its tensors are laid out (groups, samples, steps, ..., channels of a group):
# operations on a chunk and on one step of it then share their work among threads in the same way,
# and a core finds in its own cache what it wrote before.


@dataclass(frozen=True)
class _Scan:
    """Inputs of a scan, views where they can be; D are the channels of a group."""

    u: Tensor  # (G, B, L, D)
    delta: Tensor  # (G, B, L, D)
    A: Tensor  # (G, 1, 1, N, D) in the precision that is computed in
    B: Tensor  # (G, B, L, N) in that precision, or (G, 1, 1, N, D) where it is fixed
    C: Tensor
    D: Tensor | None  # (G, 1, 1, D)
    bias: Tensor | None  # (G, 1, 1, D)
    initial: Tensor | None  # (G, B, N, D)
    flags: Tensor | None  # (B, L)
    softplus: bool
    reverse: bool

    def chunk(self) -> int:
        """Elements of a chunk of states."""
        return CHUNK * torch.get_num_threads()

    def parts(self) -> Iterator[_Part]:
        """Ranges of samples and channels of which a few steps' states fit a chunk."""
        groups, batch, _, dim = self.u.shape
        state = self.A.shape[-2]
        budget = max(1, self.chunk() // max(MIN_STEPS, state // 4))  # elements of a step
        channels = _share(dim, budget // (groups * state))
        samples = _share(batch, budget // max(1, groups * state * channels))
        for sample in range(0, batch, samples):
            for channel in range(0, dim, channels):
                yield _Part(slice(sample, sample + samples), slice(channel, channel + channels))

    def ranges(self) -> list[tuple[slice, int]]:
        """The steps of each block in the order of the visit, and the steps of its chunks."""
        groups, batch, length, dim = self.u.shape
        step, state = max(1, groups * batch * dim), self.A.shape[-2]
        size = min(max(self.chunk() // (step * state), MIN_STEPS, state // 4), max(length, 1))
        span = size * max(1, min(length, BLOCK // step) // size)
        whole = length // size * size
        edges = [*range(0, whole, span), whole] if whole else [0]
        ranges = [(a, b, size) for a, b in zip(edges, edges[1:], strict=False)]
        if whole < length:
            ranges.append((whole, length, length - whole))
        if self.reverse:
            ranges = [(length - b, length - a, size) for a, b, size in ranges]
        return [(slice(a, b), size) for a, b, size in ranges]

    def start(self) -> Tensor:
        """(G, B, N, D), the state before the first step, free to be written."""
        if self.initial is not None:
            return _copy(self.initial)
        groups, batch, _, dim = self.u.shape
        return self.A.new_zeros(groups, batch, self.A.shape[-2], dim)


@dataclass(frozen=True)
class _Part:
    """A range of samples and a range of each group's channels."""

    samples: slice
    channels: slice

    def of(self, x: Tensor) -> Tensor:
        """Of (G, B, L, D), or of a state (G, B, N, D)."""
        return x[:, self.samples, :, self.channels]

    def of_tokens(self, x: Tensor) -> Tensor:
        """Of (B, L, D)."""
        return x[self.samples, :, self.channels]

    def _coefficients(self, x: Tensor) -> Tensor:
        return x[..., self.channels] if x.ndim == 5 else x[:, self.samples]

    def of_scan(self, scan: _Scan) -> _Scan:
        """Of all inputs."""
        return replace(
            scan,
            u=self.of(scan.u),
            delta=self.of(scan.delta),
            A=scan.A[..., self.channels].contiguous(),
            B=self._coefficients(scan.B),
            C=self._coefficients(scan.C),
            D=None if scan.D is None else scan.D[..., self.channels],
            bias=None if scan.bias is None else scan.bias[..., self.channels],
            initial=None if scan.initial is None else self.of(scan.initial),
            flags=None if scan.flags is None else scan.flags[self.samples],
        )

    def of_grads(self, grads: _Grads) -> _Grads:
        """Of all gradients; those of samples that share a parameter stand in the same place."""
        part = {}
        for field in fields(grads):
            x = getattr(grads, field.name)
            if x is not None and field.name in ("u", "delta", "initial"):
                x = self.of(x)
            elif x is not None:
                x = self._coefficients(x) if field.name in "BC" else x[..., self.channels]
            part[field.name] = x
        return _Grads(**part)


@dataclass
class _Grads:
    """Gradients laid out as in `_Scan`, None where not needed; u's and delta's in their dtype."""

    u: Tensor | None
    delta: Tensor | None
    A: Tensor | None
    B: Tensor | None
    C: Tensor | None
    D: Tensor | None
    bias: Tensor | None
    initial: Tensor | None

    @classmethod
    def zeros(
        cls, scan: _Scan, u: Tensor | None, delta: Tensor | None, needs: Sequence[bool]
    ) -> _Grads:
        """Room for the sums that are needed, of A, B, C, D, bias, initial."""
        likes = (scan.A, scan.B, scan.C, scan.D, scan.bias, scan.initial)
        sums = [
            torch.zeros(x.shape, dtype=scan.A.dtype) if need and x is not None else None
            for x, need in zip(likes, needs, strict=True)
        ]
        return cls(u, delta, *sums)


class _Memory:
    """Buffers by name, for chunk after chunk: fresh memory costs as much as what is computed in it."""

    def __init__(self) -> None:
        self.flat: dict[str, Tensor] = {}
        self.shaped: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def room(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A contiguous buffer, the same for the same name; what it held is lost."""
        buffer = self.shaped.get((name, shape))
        if buffer is None:
            flat, size = self.flat.get(name), math.prod(shape)
            if flat is None or len(flat) < size:
                flat = self.flat[name] = like.new_empty(size)
            buffer = self.shaped[name, shape] = flat[:size].view(shape)
        return buffer


class _Block:
    """Successive steps of a part of a scan, in chunks of S: (chunks, G, B, S, ...), as visited.

    What has no states is computed for all chunks at once.

    Args:
        scan: the part.
        steps: which of 0 ... L-1.
        size: S, a divisor of their number.
        memory: where everything is put; the next block puts it at the same places.
    """

    def __init__(self, scan: _Scan, steps: slice, size: int, memory: _Memory) -> None:
        self.scan, self.place, self.memory = scan, steps, memory
        self.count = (steps.stop - steps.start) // size
        groups, batch, _, dim = scan.u.shape
        state = scan.A.shape[-2]
        self.small = (self.count, groups, batch, size, dim)
        self.large = (groups, batch, size, state, dim)
        self.rows = (self.count, groups, batch, size, state)
        u, before = self.cut(scan.u), self.cut(scan.delta)
        if scan.bias is not None:
            before = torch.add(before, scan.bias, out=self.room("before"))
        self.before = step = before
        if scan.softplus:
            step = F.softplus(before, out=self.room("step"))  # type: ignore[call-arg]
        B, C = (x if x.ndim == 5 else self.cut(x).contiguous() for x in (scan.B, scan.C))
        self.reset = self.skip = None
        if scan.flags is not None:
            flags = self.cut(scan.flags[None, ..., None], torch.uint8)
            self.reset, self.skip = (flags & RESET).bool()[..., None], (flags & SKIP).bool()
            # A step of size 0 of an input 0: what padding holds, even NaN, reaches nothing.
            u, step = u.masked_fill(self.skip, 0.0), step.masked_fill(self.skip, 0.0)
            B = B if B is scan.B else B.masked_fill(self.skip, 0.0)
            C = C if C is scan.C else C.masked_fill(self.skip, 0.0)
        self.u, self.step = u, step
        self.step_u = torch.mul(step, u, out=self.room("step_u"))
        # Where exp would underflow it takes a hundred times as long; what it would give is as good as 0.
        lowest = math.log(torch.finfo(scan.A.dtype).tiny)
        self.lowest = lowest if step.numel() and (step * scan.A.amin(3)).min() < lowest else None
        # By chunk: B and C as factors of states, and as rows where they depend on the input.
        self.B, self.B_rows = self._coefficients(B, scan.B)
        self.C, self.C_rows = self._coefficients(C, scan.C)
        self.steps = step.unsqueeze(4).unbind()
        self.steps_u = self.step_u.unsqueeze(4).unbind()

    def _coefficients(self, x: Tensor, given: Tensor) -> tuple[Sequence[Tensor], Tensor | None]:
        if x is given and x.ndim == 5:
            return [x] * self.count, None
        return x.unsqueeze(5).unbind(), x

    def room(self, name: str) -> Tensor:
        """A buffer (chunks, G, B, S, D)."""
        return self.memory.room(name, self.small, self.scan.A)

    def large_room(self, name: str) -> Tensor:
        """A buffer (G, B, S, N, D), for the states of a chunk."""
        return self.memory.room(name, self.large, self.scan.A)

    def rows_room(self, name: str) -> Tensor:
        """A buffer (chunks, G, B, S, N)."""
        return self.memory.room(name, self.rows, self.scan.A)

    def cut(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The block's steps of x (G, B, L, ...) in chunks; a view where nothing has to be changed."""
        x = x[:, :, self.place].to(dtype or self.scan.A.dtype)
        if self.scan.reverse:
            x = x.flip(2)
        return x.unflatten(2, (self.count, -1)).permute(2, 0, 1, 3, 4)

    def join(self, chunks: Tensor, into: Tensor) -> None:
        """Write chunks to where `cut` reads them."""
        steps = into[:, :, self.place]
        if self.scan.reverse:
            steps.copy_(chunks.permute(1, 2, 0, 3, 4).flatten(2, 3).flip(2))
        else:
            steps.unflatten(2, (self.count, -1)).permute(2, 0, 1, 3, 4).copy_(chunks)

    def take_tokens(self, x: Tensor, orders: Tensor, chunks: Tensor) -> Tensor:
        """What the orders (G, L) visit of x (B, L, D) at these steps, written to chunks."""
        for group, order in enumerate(orders[:, self.place]):
            for i, tokens in enumerate(order.view(self.count, -1)):
                torch.index_select(x, 1, tokens, out=chunks[i, group])
        return chunks

    def add_tokens(self, x: Tensor, orders: Tensor, chunks: Tensor) -> None:
        """Add to x (B, L, D) at the places where `take_tokens` reads."""
        for group, order in enumerate(orders[:, self.place]):
            for i, tokens in enumerate(order.view(self.count, -1)):
                x.index_add_(1, tokens, chunks[i, group])

    def mask(self, chunks: Tensor) -> Tensor:
        """Zero padding steps."""
        return chunks if self.skip is None else chunks.masked_fill_(self.skip, 0.0)

    def decays(self, i: int) -> Tensor:
        """exp(d A) of chunk i, (G, B, S, N, D), 0 where a sequence begins."""
        decay = torch.mul(self.steps[i], self.scan.A, out=self.large_room("decay"))
        if self.lowest is not None:
            decay.clamp_(min=self.lowest)
        decay.exp_()
        return decay if self.reset is None else decay.masked_fill_(self.reset[i], 0.0)

    def states(self, i: int, before: Tensor) -> tuple[Tensor, Tensor]:
        """h after each step of chunk i, (G, B, S, N, D), and the decays."""
        decay = self.decays(i)
        states = torch.mul(self.B[i], self.steps_u[i], out=self.large_room("states"))
        for h, a in zip(states.unbind(2), decay.unbind(2), strict=True):
            h.addcmul_(a, before)
            before = h
        return states, decay

    def output(self, i: int, states: Tensor, out: Tensor) -> None:
        """<C, h> of chunk i into (G, B, S, D)."""
        self.sum_states(self.C[i], self.C_rows, i, states, out)

    def sum_states(
        self, x: Tensor, rows: Tensor | None, i: int, states: Tensor, out: Tensor
    ) -> None:
        """B or C of chunk i times states, summed over N, into (G, B, S, D)."""
        if rows is None:
            torch.sum(torch.mul(states, x, out=self.large_room("spare states")), 3, out=out)
            return
        state, dim = states.shape[-2:]
        matrices = states.view(-1, state, dim)
        torch.bmm(rows[i].view(-1, 1, state), matrices, out=out.view(-1, 1, dim))


class _Backward:
    """The backward of a part of a scan.

        for block in blocks():
            for i in chunks(block): step(block, i, dy[i])
            finish(block, dy)

    Args:
        scan: the part.
        grads: where its gradients go.
        end: (G, B, N, D), the last state's gradient; None: zeros.
        need_output: whether `states` are needed for the output, whatever the gradients.
        memory: for blocks.
    """

    states: Tensor
    decay: Tensor

    def __init__(
        self, scan: _Scan, grads: _Grads, end: Tensor | None, need_output: bool, memory: _Memory
    ) -> None:
        self.scan, self.grads, self.memory, g = scan, grads, memory, grads
        self.carry = torch.zeros_like(scan.start()) if end is None else _copy(end)
        self.need_step = g.delta is not None or g.bias is not None
        self.need_decay = self.need_step or g.A is not None
        self.need_moved = self.need_step or g.u is not None
        self.need_gradient = (
            self.need_decay or self.need_moved or g.B is not None or g.initial is not None
        )
        self.need_states = self.need_decay or need_output or g.C is not None

    def blocks(self) -> Iterator[_Block]:
        """The blocks from the last to the first."""
        ranges = self.scan.ranges()
        self.starts = [self.scan.start()]  # the state before each chunk
        if self.need_states:
            for n, (steps, size) in enumerate(ranges, 1):
                block = _Block(self.scan, steps, size, self.memory)
                for i in range(block.count - (n == len(ranges))):
                    states, _ = block.states(i, self.starts[-1])
                    self.starts.append(_copy(states[:, :, -1]))
        for steps, size in reversed(ranges):
            yield _Block(self.scan, steps, size, self.memory)
        if self.grads.initial is not None:
            self.grads.initial.copy_(self.carry)

    def chunks(self, block: _Block) -> Iterator[int]:
        """The chunks of a block from the last to the first, `states` ready where needed."""
        for i in reversed(range(block.count)):
            if self.need_states:
                self.start = self.starts.pop()
                self.states, self.decay = block.states(i, self.start)
            elif self.need_gradient:
                self.decay = block.decays(i)
            yield i

    def step(self, block: _Block, i: int, dy: Tensor) -> None:
        """What a chunk's states are needed for.

        Args:
            block, i: the chunk.
            dy: (G, B, S, D), the gradient of the sum over N with D u; 0 in padding.
        """
        grads = self.grads
        if grads.C is not None:
            self._add_sums(grads.C, "dC", block, i, dy, self.states)
        if not self.need_gradient:
            return
        gradient = torch.mul(block.C[i], dy[:, :, :, None], out=block.large_room("gradient"))
        g, a = gradient.unbind(2), self.decay.unbind(2)
        h = (self.start, *self.states.unbind(2)) if self.need_decay else ()
        g[-1].add_(self.carry)
        for t in range(len(g) - 1, -1, -1):  # one step is done with while the cache has it
            given = a[t].mul_(g[t])
            if t:
                g[t - 1].add_(given)
            else:
                self.carry.copy_(given)
            if self.need_decay:
                given.mul_(h[t])  # q
        if grads.B is not None:
            self._add_sums(grads.B, "dB", block, i, block.step_u[i], gradient)
        if self.need_moved:
            block.sum_states(block.B[i], block.B_rows, i, gradient, block.room("moved")[i])
        if grads.A is not None:
            product = torch.mul(self.decay, block.steps[i], out=gradient)
            grads.A += product.sum((1, 2), keepdim=True)
        if self.need_step:
            torch.sum(self.decay.mul_(self.scan.A), 3, out=block.room("powers")[i])

    def finish(self, block: _Block, dy: Tensor) -> None:
        """What needs no states; dy (chunks, G, B, S, D) as in `step`, of all chunks."""
        scan, grads = self.scan, self.grads
        for name, into in (("dB", grads.B), ("dC", grads.C)):
            if into is not None and into.ndim == 4:
                block.join(block.cut(into).add_(block.rows_room(name)), into)
        moved, powers = block.room("moved"), block.room("powers")
        if grads.D is not None:
            grads.D += self._sum(torch.mul(dy, block.u, out=block.room("spare")))
        if self.need_step:
            dstep = powers.addcmul_(moved, block.u)
            if scan.softplus:
                dstep = torch.ops.aten.softplus_backward(dstep, block.before, 1, 20)
            block.mask(dstep)
            if grads.bias is not None:
                grads.bias += self._sum(dstep)
            if grads.delta is not None:
                block.join(dstep, grads.delta)
        if grads.u is not None:
            du = moved.mul_(block.step)
            if scan.D is not None:
                du.addcmul_(dy, scan.D)
            block.join(du, grads.u)

    @staticmethod
    def _sum(chunks: Tensor) -> Tensor:
        """(chunks, G, B, S, D) to (G, 1, 1, D)."""
        return chunks.sum((0, 2, 3))[:, None, None]

    def _add_sums(
        self, into: Tensor, name: str, block: _Block, i: int, y: Tensor, states: Tensor
    ) -> None:
        """y (G, B, S, D) times states: their sum over D for `finish`, or else added to (G, N, D)."""
        if into.ndim == 5:
            product = torch.mul(states, y[:, :, :, None], out=block.large_room("spare states"))
            into += product.sum((1, 2), keepdim=True)
            return
        state, dim = states.shape[-2:]
        # A row times a transposed matrix runs several times as fast as the matrix times a column.
        matrices = states.view(-1, state, dim).mT
        torch.bmm(y.view(-1, 1, dim), matrices, out=block.rows_room(name)[i].view(-1, 1, state))


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    flags: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> _Scan:
    dtype = _precision(u, delta, A, B, C)
    groups = max(t.shape[2] if t.ndim == 4 else 1 for t in (B, C))

    def matrix(t: Tensor) -> Tensor:  # (D, N)
        return t.to(dtype).unflatten(0, (groups, -1)).transpose(1, 2)[:, None, None]

    def coefficients(t: Tensor) -> Tensor:
        return matrix(t) if t.ndim == 2 else t.to(dtype).permute(2, 0, 1, 3)

    def vector(t: Tensor | None) -> Tensor | None:  # (D,)
        return None if t is None else t.to(dtype).view(groups, 1, 1, -1)

    return _Scan(
        _steps(u, groups),
        _steps(delta, groups),
        matrix(A),
        coefficients(B),
        coefficients(C),
        vector(D),
        vector(delta_bias),
        None if initial_state is None else _state(initial_state.to(dtype), groups),
        flags,
        softplus,
        reverse,
    )


def _cross(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> _Scan:
    dtype = _precision(u, A)
    A, B, C, D, delta_bias = (t.to(dtype) for t in (A, B, C, D, delta_bias))
    A, D, delta_bias = A.mT[:, None, None], D[:, None, None], delta_bias[:, None, None]
    return _Scan(u, delta, A, B, C, D, delta_bias, None, None, True, False)


def _copy(x: Tensor) -> Tensor:
    """A contiguous copy."""
    return x.clone(memory_format=torch.contiguous_format)


def _share(count: int, most: int) -> int:
    """The size of the fewest ranges of nearly equal size that make up `count`."""
    return -(-count // max(1, -(-count // max(1, most)))) or 1


def _steps(x: Tensor, groups: int) -> Tensor:
    """(B, L, D) as (G, B, L, D / G), a view."""
    return x.unflatten(2, (groups, x.shape[2] // groups)).permute(2, 0, 1, 3)


def _state(x: Tensor, groups: int) -> Tensor:
    """(B, D, N) as (G, B, N, D / G), a view."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).permute(1, 0, 3, 2)


def _of_matrix(x: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient (G, 1, 1, N, D) in the shape and dtype of an input (G D, N) or (G, D, N)."""
    return None if x is None else x.mT.reshape(like.shape).to(like.dtype)


def _same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C with as many groups as the one with more."""
    if B.ndim == 2 or C.ndim == 2 or B.shape[2] == C.shape[2]:
        return B, C
    groups = max(B.shape[2], C.shape[2])
    B, C = (t.repeat_interleave(groups // t.shape[2], dim=2) for t in (B, C))
    return B, C


def _of_groups(x: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient of what `_same_groups` gives as that of what it got."""
    if x is None:
        return None
    if x.shape != like.shape:
        x = x.unflatten(2, (like.shape[2], -1)).sum(3)
    return x.to(like.dtype)


def _as(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    """x in the shape and dtype of `like`."""
    return None if x is None or like is None else x.reshape(like.shape).to(like.dtype)


def _silu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient of silu's input, given that of its output."""
    return torch.ops.aten.silu_backward(gradient, x)


def _conv_chunks(
    x: Tensor, weight: Tensor, bias: Tensor | None, orders: Tensor
) -> Iterator[tuple[int, int, int, Tensor, Tensor]]:
    """The convolution before its activation, a few steps at a time.

    Yields:
        k, begin, end, the result (B, end - begin, D), and the rows (B, W - 1 + end - begin, D) that
        it came from, zeros before the first step.
    """
    dtype = _precision(x, weight)
    batch, length, dim = x.shape
    width = weight.shape[-1]
    steps = max(MIN_STEPS, (CHUNK >> 2) // max(1, batch * dim))
    for k, order in enumerate(orders):
        taps = weight[k].to(dtype).T.contiguous()  # (W, D)
        for begin in range(0, length, steps):
            end = min(begin + steps, length)
            first = begin - width + 1
            rows = x.index_select(1, order[max(first, 0) : end]).to(dtype)
            if first < 0:
                rows = F.pad(rows, (0, 0, -first, 0))
            mixed = rows[:, : end - begin] * taps[0]
            for w in range(1, width):
                mixed.addcmul_(rows[:, w : w + end - begin], taps[w])
            if bias is not None:
                mixed += bias[k].to(dtype)
            yield k, begin, end, mixed, rows


def _precision(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


# Compiled code: built once with the system's compiler, kept in a folder of the user's.

SOURCE = Path(__file__).with_name("scan_cpu.cpp")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-Wno-psabi")
# Tried in this order: a compiler may know no OpenMP (then threads are its own), or no -march=native.
VARIANTS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
BUILD_SECONDS = 300
FLOAT_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
FUNCTIONS = ("scan_forward", "scan_backward", "conv_forward", "conv_backward")


@dataclass(frozen=True)
class _Native:
    """The compiled functions, or why there are none."""

    library: ctypes.CDLL | None
    error: str | None

    def call(self, name: str, values: list[int]) -> None:
        """Run a function on its structure of 8-byte fields."""
        if self.library is None:
            raise RuntimeError(f"native CPU code: {self.error}")
        fields_ = array.array("q", values)
        if getattr(self.library, "emrrg_" + name)(ctypes.c_void_p(fields_.buffer_info()[0])):
            raise MemoryError(f"native {name}: out of memory")


_lock = threading.Lock()
_loaded: _Native | None = None


def _native() -> _Native:
    """The library, found or built on the first call of this process."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def _load() -> _Native:
    """Find a build of this source for this processor, or build one."""
    if struct.calcsize("P") != 8:
        return _Native(None, "needs a 64-bit system")
    if not SOURCE.is_file():
        return _Native(None, f"{SOURCE} is missing: install the package again")
    source = SOURCE.read_bytes()
    target = _digest(source, _processor().encode())
    compiler = _compiler()
    folder = _cache_folder()
    # Without a compiler, what any other built from this source for this processor serves as well.
    key = f"scan_cpu-{target}-{_digest(' '.join((*compiler, *FLAGS)).encode()) if compiler else ''}"
    for path in sorted(folder.glob(key + "*.so")):
        library = _open(path)
        if library is not None:
            logger.info("native CPU code: %s", path)
            return _Native(library, None)
    if not compiler:
        return _Native(None, "no C++ compiler found (c++, g++, clang++, or the variable CXX)")
    begin = time.perf_counter()
    path, error = _build(compiler, folder, key)
    library = None if path is None else _open(path)
    if path is None or library is None:
        return _Native(None, error or f"{path} was built but cannot be loaded")
    logger.info(
        "native CPU code: built in %.1f s with %s: %s",
        time.perf_counter() - begin,
        " ".join(compiler[:-1]),
        path,
    )
    return _Native(library, None)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "Features", "model name", "cpu family", "model", "CPU part")
    kept = dict(x.split(":", 1) for x in lines if x.split(":")[0].strip() in wanted and ":" in x)
    return f"{platform.machine()} {sorted(kept.items())}"


def _compiler() -> list[str]:
    """The command of the C++ compiler, its own flags, and its version; empty where there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in ([named] if named else []) + [["c++"], ["g++"], ["clang++"]]:
        program = shutil.which(command[0])
        if program is None:
            continue
        command = [program, *command[1:], *shlex.split(os.environ.get("CXXFLAGS", ""))]
        try:
            version = subprocess.run(
                [program, "--version"], capture_output=True, text=True, timeout=60, check=True
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return [*command, version.stdout.partition("\n")[0]]
    return []


def _cache_folder() -> Path:
    """A folder that only this user can write, made where it is missing."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    for folder in (Path(home, "emrrg-kernels"), Path(tempfile.gettempdir(), f"emrrg-kernels-{user}")):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            state = folder.stat()
        except OSError:
            continue
        private = user == "user" or (state.st_uid == user and not state.st_mode & 0o022)
        if private and os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="emrrg-kernels-"))


def _build(compiler: list[str], folder: Path, key: str) -> tuple[Path | None, str | None]:
    """Compile into `folder`; the name ends with a digest of what it holds, so damage shows."""
    handle, name = tempfile.mkstemp(dir=folder, prefix="building-", suffix=".so")
    os.close(handle)
    built = Path(name)
    message = ""
    try:
        for variant in VARIANTS:
            command = [*compiler[:-1], *FLAGS, *variant, str(SOURCE), "-o", name, "-pthread"]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False
                )
            except (OSError, subprocess.SubprocessError) as error:
                return None, f"{compiler[0]} failed: {error}"
            if done.returncode == 0:
                path = folder / f"{key}-{_digest(built.read_bytes())}.so"
                built.replace(path)  # at once: whoever builds at the same time writes the same
                return path, None
            message = message or (done.stderr.strip().splitlines() or ["no message"])[0]
        return None, f"{compiler[0]} failed: {message}"
    except OSError as error:
        return None, f"cannot write {folder}: {error}"
    finally:
        built.unlink(missing_ok=True)


def _open(path: Path) -> ctypes.CDLL | None:
    """Load a build; None where it is damaged or foreign, and then it is removed."""
    try:
        if _digest(path.read_bytes()) == path.stem.rpartition("-")[2]:
            library = ctypes.CDLL(str(path))
            for name in FUNCTIONS:
                function = getattr(library, "emrrg_" + name)
                function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
            return library
        path.unlink(missing_ok=True)
    except (OSError, AttributeError):
        pass
    return None


# Calls of compiled code: structures are lists of 8-byte numbers, in the order of scan_cpu.cpp.

_ABSENT = [0] * 6  # a tensor's fields: address, type, strides of order, sample, step, channel


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _fields(x: Tensor | None, strides: tuple[int, int, int, int], reverse: bool = False) -> list[int]:
    """A tensor's fields; in reverse its steps (dimension 1) are numbered from the last."""
    if x is None:
        return _ABSENT
    kind = FLOAT_TYPES.get(x.dtype)
    if kind is None:
        raise TypeError(f"native CPU code: {x.dtype} is not among fp32, bf16, fp16")
    order, sample, step, channel = strides
    if reverse:
        start = x.data_ptr() + (x.shape[1] - 1) * step * x.element_size()
        return [start, kind, order, sample, -step, channel]
    return [x.data_ptr(), kind, order, sample, step, channel]


def _by_step(x: Tensor | None, reverse: bool = False) -> list[int]:
    """(B, L, D) or (B, L, G, N)."""
    if x is None:
        return _ABSENT
    s = x.stride()
    return _fields(x, (0, *s) if len(s) == 3 else (s[2], s[0], s[1], s[3]), reverse)


def _by_order(x: Tensor | None) -> list[int]:
    """(K, B, L, D)."""
    return _ABSENT if x is None else _fields(x, x.stride())


def _plain(x: Tensor | None) -> Tensor | None:
    """A parameter as compiled code reads it."""
    return None if x is None else x.to(torch.float32).contiguous()


def _room(x: Tensor | None, need: bool, dtype: torch.dtype | None = None) -> Tensor | None:
    """A gradient that is wholly written."""
    return torch.empty(x.shape, dtype=dtype or x.dtype) if need and x is not None else None


def _sum_room(x: Tensor | None, need: bool) -> Tensor | None:
    """A gradient that is a sum over samples: zeros where there are none."""
    return torch.zeros(x.shape, dtype=torch.float32) if need and x is not None else None


def _scan_native(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    flags: Tensor | None,
    softplus: bool,
    reverse: bool,
    *,
    out: Tensor | None = None,
    last: Tensor | None = None,
    dout: Tensor | None = None,
    dlast: Tensor | None = None,
    grads: Sequence[Tensor | None] = (None,) * 9,
) -> None:
    """One call of scan_forward, or of scan_backward where there is no `out`."""
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = grads
    groups = max(t.shape[2] if t.ndim == 4 else 1 for t in (B, C))
    fixed_B, fixed_C = (_plain(t) if t.ndim == 2 else None for t in (B, C))
    A, D, delta_bias = _plain(A), _plain(D), _plain(delta_bias)  # type: ignore[assignment]
    initial_state, dlast = _plain(initial_state), _plain(dlast)
    batch, length, dim = u.shape
    flag_fields = [0, 0, 0]
    if flags is not None:
        sample, step = flags.stride()
        flag_fields = [flags.data_ptr(), sample, step]
        if reverse:
            flag_fields = [flags.data_ptr() + (length - 1) * step, sample, -step]
    values = [1, batch, length, dim, A.shape[1], groups, int(softplus), torch.get_num_threads()]
    for x in (u, delta, None if B.ndim == 2 else B, None if C.ndim == 2 else C, z, out, dout):
        values += _by_step(x, reverse)
    for x in (du, ddelta, dz, None if B.ndim == 2 else dB, None if C.ndim == 2 else dC):
        values += _by_step(x, reverse)
    plain = (A, D, delta_bias, initial_state, fixed_B, fixed_C, dlast, last, dA, dD, dbias, dinitial)
    values += [_address(x) for x in plain]
    values += [_address(dB if B.ndim == 2 else None), _address(dC if C.ndim == 2 else None)]
    values += [*flag_fields, 0]
    _native().call("scan_backward" if out is None else "scan_forward", values)


def _cross_native(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    orders: Tensor,
    *,
    out: Tensor | None = None,
    dout: Tensor | None = None,
    grads: Sequence[Tensor | None] = (None,) * 8,
) -> None:
    """One call of scan_forward, or of scan_backward where there is no `out`."""
    du, ddelta, dA, dB, dC, dD, dz, dbias = grads
    A, D, delta_bias = _plain(A), _plain(D), _plain(delta_bias)  # type: ignore[assignment]
    orders = orders.contiguous()
    count, batch, length, dim = u.shape
    values = [count, batch, length, dim, A.shape[2], 1, 1, torch.get_num_threads()]
    for x in (u, delta, B, C):
        values += _by_order(x)
    values += [*_by_step(z), *_by_step(out), *_by_step(dout)]
    values += [*_by_order(du), *_by_order(ddelta), *_by_step(dz), *_by_order(dB), *_by_order(dC)]
    values += [_address(A), _address(D), _address(delta_bias), 0, 0, 0, 0]
    values += [0, _address(dA), _address(dD), _address(dbias), 0, 0, 0]
    values += [0, 0, 0, orders.data_ptr()]
    _native().call("scan_backward" if out is None else "scan_forward", values)


def _conv_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    orders: Tensor,
    silu: bool,
    *,
    out: Tensor | None = None,
    dout: Tensor | None = None,
    grads: Sequence[Tensor | None] = (None,) * 3,
) -> None:
    """One call of conv_forward, or of conv_backward where there is no `out`."""
    dx, dweight, dbias = grads
    weight, bias = _plain(weight), _plain(bias)  # type: ignore[assignment]
    orders = orders.contiguous()
    batch, length, dim = x.shape
    values = [len(orders), batch, length, dim, weight.shape[2], int(silu), torch.get_num_threads()]
    values += [*_by_step(x), *_by_order(out), *_by_order(dout), *_by_step(dx)]
    values += [_address(t) for t in (weight, bias, dweight, dbias, orders)]
    _native().call("conv_backward" if out is None else "conv_forward", values)
