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
import os
import platform
import shlex
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels.reference import RESET, SKIP

logger = logging.getLogger(__name__)

CHUNK = 1 << 20  # elements of a chunk of states: they stay in the caches
MIN_STEPS = 16  # of a chunk, however large a step is: the loop's overhead, and kept states


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
    last = torch.empty(u.shape[0], groups, *scan.A.shape[1:], dtype=scan.A.dtype)
    for part, block in scan.blocks():
        work = _Work(block)
        state = block.start()
        for begin, end in block.chunks():
            chunk = block.chunk(begin, end)
            states, _ = work.states(chunk, state)
            y = chunk.output(states)
            if z_steps is not None:
                y *= F.silu(block.take(part.of_steps(z_steps), begin, end))
            if chunk.skip is not None:
                y.masked_fill_(chunk.skip, 0.0)
            block.put(part.of_steps(out_steps), begin, end, y)
            state.copy_(states[-1])
        part.of_state(last).copy_(state)
    return out, last.transpose(2, 3).reshape(len(last), u.shape[2], A.shape[1])


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
    for part, block in scan.blocks():
        backward = _Backward(
            block, part.of_grads(grads), None if end_gradient is None else part.of_state(end_gradient)
        )
        for begin, end in backward.chunks(need_output=dz is not None):
            dy = block.take(part.of_steps(dout_steps), begin, end)
            if z_steps is not None:
                gate = block.take(part.of_steps(z_steps), begin, end)
                if dz_steps is not None:
                    y = backward.chunk.output(backward.states)
                    y *= dy * _dsilu(gate)
                    if backward.chunk.skip is not None:
                        y.masked_fill_(backward.chunk.skip, 0.0)
                    block.put(part.of_steps(dz_steps), begin, end, y)
                dy = dy * F.silu(gate)
            backward.step(begin, end, dy)
    dB, dC = (_by_sample(g, x) for g, x in ((grads.B, B_given), (grads.C, C_given)))
    return (
        du,
        ddelta,
        _by_channel(grads.A, A),
        dB,
        dC,
        _as(grads.D, D),
        dz,
        _as(grads.bias, delta_bias),
        None if initial_state is None else _by_channel(grads.initial, initial_state),
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
    total = _cross_sum(scan, z, orders)
    total *= F.silu(z.to(total.dtype))
    return total.to(z.dtype)


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
    du_steps, ddelta_steps = (None if x is None else x.permute(2, 1, 0, 3) for x in (du, ddelta))
    grads = _Grads.zeros(scan, du_steps, ddelta_steps, [*needs[2:6], needs[7], False])
    gate = z.to(dtype)
    dy_tokens = dout.to(dtype) * F.silu(gate)
    dy_tokens /= len(orders)
    total = torch.zeros(z.shape, dtype=dtype) if needs[6] else None
    for part, block in scan.blocks():
        backward = _Backward(block, part.of_grads(grads), None)
        if not needs[6] and not backward.any:
            continue
        for begin, end in backward.chunks(need_output=total is not None):
            if total is not None:
                y = backward.chunk.output(backward.states)
                part.add_tokens(total, orders[:, begin:end], y)
            if backward.any:
                dy = part.take_tokens(dy_tokens, orders[:, begin:end])
                backward.step(begin, end, dy)
    dz = None
    if total is not None:
        total *= dout.to(dtype) * _dsilu(gate) / len(orders)
        dz = total.to(z.dtype)
    dB, dC = (
        None if g is None else g.permute(2, 1, 0, 3).to(x.dtype)
        for g, x in ((grads.B, B), (grads.C, C))
    )
    return (
        du,
        ddelta,
        _by_channel(grads.A, A),
        dB,
        dC,
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
            dmixed = dmixed * _dsilu(mixed)
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


# The scan in plain torch.


@dataclass(frozen=True)
class _Scan:
    """Views of a scan's inputs by step: (L, B, G, D) and so on; D are a group's channels."""

    u: Tensor  # (L, B, G, D)
    delta: Tensor  # (L, B, G, D)
    A: Tensor  # (G, N, D) in the precision that is computed in
    B: Tensor  # (L, B, G, N), or (G, N, D) where it does not depend on the input
    C: Tensor
    D: Tensor | None  # (G, D)
    bias: Tensor | None  # (G, D)
    initial: Tensor | None  # (B, G, N, D)
    flags: Tensor | None  # (L, B)
    softplus: bool
    reverse: bool

    def blocks(self) -> Iterator[tuple[_Part, _Scan]]:
        """Ranges of samples and channels so small that a chunk of them fits the caches."""
        _, batch, groups, dim = self.u.shape
        state = self.A.shape[1]
        budget = max(1, CHUNK // max(MIN_STEPS, state // 4))  # elements of a step
        channels = min(dim, max(1, budget // (groups * state)))
        samples = max(1, budget // (groups * state * max(channels, 1)))
        for sample in range(0, batch, samples):
            for channel in range(0, dim, max(channels, 1)):
                part = _Part(slice(sample, sample + samples), slice(channel, channel + channels))
                yield part, part.of_scan(self)

    def chunks(self) -> list[tuple[int, int]]:
        """Steps [begin, end) of each chunk, in the order of the visit."""
        length, batch, groups, dim = self.u.shape
        state = self.A.shape[1]
        steps = max(CHUNK // max(1, batch * groups * dim * state), MIN_STEPS, state // 4)
        return [(t, min(t + steps, length)) for t in range(0, length, steps)]

    def start(self) -> Tensor:
        """(B, G, N, D), the state before the first step, free to be written."""
        if self.initial is not None:
            return self.initial.clone(memory_format=torch.contiguous_format)
        return self.A.new_zeros(self.u.shape[1], *self.A.shape)

    def take(self, x: Tensor, begin: int, end: int) -> Tensor:
        """Steps of x (L, ...) as visited, contiguous, in the precision computed in; maybe x itself."""
        x = _visited(x, begin, end, self.reverse)
        return x.to(self.A.dtype, memory_format=torch.contiguous_format).contiguous()

    def put(self, x: Tensor, begin: int, end: int, value: Tensor) -> None:
        """Write what `take` would give."""
        if self.reverse:
            x[len(x) - end : len(x) - begin] = value.flip(0)
        else:
            x[begin:end] = value

    def chunk(self, begin: int, end: int) -> _Chunk:
        """Some steps, ready to be computed with."""
        u, delta = self.take(self.u, begin, end), self.take(self.delta, begin, end)
        B, C = (t if t.ndim == 3 else self.take(t, begin, end) for t in (self.B, self.C))
        reset = skip = None
        if self.bias is not None:
            delta = delta + self.bias
        step = F.softplus(delta) if self.softplus else delta
        if self.flags is not None:
            flags = _visited(self.flags, begin, end, self.reverse)
            reset = (flags & RESET).bool()[..., None, None, None]
            skip = (flags & SKIP).bool()[..., None, None]
            # A step of size 0 of an input 0: what padding holds, even NaN, reaches nothing.
            step = step.masked_fill(skip, 0.0)
            u = u.masked_fill(skip, 0.0)
            B, C = (t if t.ndim == 3 else t.masked_fill(skip, 0.0) for t in (B, C))
        return _Chunk(u, delta, step, step * u, B, C, self.D, reset, skip)


@dataclass(frozen=True)
class _Part:
    """A range of samples and a range of each group's channels."""

    samples: slice
    channels: slice

    def of_steps(self, x: Tensor) -> Tensor:
        """Of (L, B, G, D)."""
        return x[:, self.samples, :, self.channels]

    def of_state(self, x: Tensor) -> Tensor:
        """Of (B, G, N, D)."""
        return x[self.samples, :, :, self.channels]

    def of_scan(self, scan: _Scan) -> _Scan:
        """Of all inputs."""

        def input_or_fixed(x: Tensor) -> Tensor:
            return x[..., self.channels] if x.ndim == 3 else x[:, self.samples]

        return replace(
            scan,
            u=self.of_steps(scan.u),
            delta=self.of_steps(scan.delta),
            A=scan.A[..., self.channels],
            B=input_or_fixed(scan.B),
            C=input_or_fixed(scan.C),
            D=None if scan.D is None else scan.D[..., self.channels],
            bias=None if scan.bias is None else scan.bias[..., self.channels],
            initial=None if scan.initial is None else self.of_state(scan.initial),
            flags=None if scan.flags is None else scan.flags[:, self.samples],
        )

    def of_grads(self, grads: _Grads) -> _Grads:
        """Of all gradients; those of samples that share a parameter stand in the same place."""

        def part(name: str) -> Tensor | None:
            x = getattr(grads, name)
            if x is None:
                return None
            if name in ("u", "delta"):
                return self.of_steps(x)
            if name == "initial":
                return self.of_state(x)
            return x[:, self.samples] if x.ndim == 4 else x[..., self.channels]

        return _Grads(**{f.name: part(f.name) for f in fields(grads)})

    def take_tokens(self, x: Tensor, orders: Tensor) -> Tensor:
        """(S, B, K, D) of x (B, L, D): what the orders (K, S) visit."""
        x = x[self.samples, :, self.channels]
        rows = [x.index_select(1, order) for order in orders]
        return torch.stack(rows, dim=2).transpose(0, 1).contiguous()

    def add_tokens(self, x: Tensor, orders: Tensor, value: Tensor) -> None:
        """Add to x (B, L, D) what `take_tokens` would give."""
        x = x[self.samples, :, self.channels]
        for k, order in enumerate(orders):
            x.index_add_(1, order, value[:, :, k].transpose(0, 1))


@dataclass(frozen=True)
class _Chunk:
    """S steps of the inputs; `before` and `step` are the step size before and after softplus."""

    u: Tensor  # (S, B, G, D)
    before: Tensor
    step: Tensor
    step_u: Tensor
    B: Tensor  # (S, B, G, N) or (G, N, D)
    C: Tensor
    D: Tensor | None
    reset: Tensor | None  # (S, B, 1, 1, 1) bool
    skip: Tensor | None  # (S, B, 1, 1) bool

    def output(self, states: Tensor) -> Tensor:
        """<C, h> + D u, (S, B, G, D)."""
        y = _sum_states(self.C, states)
        return y if self.D is None else y.addcmul_(self.D, self.u)


class _Work:
    """The two buffers of a block: decays and states of a chunk, (S, B, G, N, D)."""

    def __init__(self, scan: _Scan) -> None:
        chunks = scan.chunks()
        steps = chunks[0][1] if chunks else 0
        shape = (steps, scan.u.shape[1], *scan.A.shape)
        self.decay, self.state = (scan.A.new_empty(shape) for _ in range(2))
        self.A = scan.A.contiguous()

    def decays(self, chunk: _Chunk) -> Tensor:
        """exp(d A), 0 where a sequence begins."""
        decay = self.decay[: len(chunk.u)]
        torch.mul(chunk.step[..., None, :], self.A, out=decay)
        decay.exp_()
        if chunk.reset is not None:
            decay.masked_fill_(chunk.reset, 0.0)
        return decay

    def states(self, chunk: _Chunk, start: Tensor) -> tuple[Tensor, Tensor]:
        """h after each step of the chunk, and the decays."""
        decay = self.decays(chunk)
        states = self.state[: len(chunk.u)]
        _outer(chunk.B, chunk.step_u, out=states)
        before = start
        for h, a in zip(states.unbind(), decay.unbind(), strict=True):
            h.addcmul_(a, before)
            before = h
        return states, decay


@dataclass
class _Grads:
    """Gradients laid out as in `_Scan`, None where not needed; steps in the inputs' dtype."""

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


class _Backward:
    """The backward of one block: `for begin, end in chunks(): step(begin, end, dy)`.

    Args:
        scan: the block.
        grads: where its gradients go.
        end: (B, G, N, D), the last state's gradient; None: zeros.
    """

    chunk: _Chunk
    states: Tensor

    def __init__(self, scan: _Scan, grads: _Grads, end: Tensor | None) -> None:
        self.scan, self.grads, self.work = scan, grads, _Work(scan)
        self.decay: Tensor = self.work.decay
        self.gradient = torch.empty_like(self.work.decay)
        self.carry = scan.A.new_zeros(scan.u.shape[1], *scan.A.shape) if end is None else end.clone()
        g = grads
        self.need_step = g.delta is not None or g.bias is not None
        self.need_decay = self.need_step or g.A is not None
        self.need_gradient = self.need_decay or any(x is not None for x in (g.u, g.B, g.initial))
        self.any = self.need_gradient or g.C is not None or g.D is not None

    def chunks(self, need_output: bool) -> Iterator[tuple[int, int]]:
        """The chunks from the last to the first, `states` and `chunk` ready."""
        scan, work = self.scan, self.work
        chunks = scan.chunks()
        need_states = self.need_decay or need_output or self.grads.C is not None
        starts = [scan.start()] if chunks else []
        if need_states:
            for begin, end in chunks[:-1]:
                states, _ = work.states(scan.chunk(begin, end), starts[-1])
                starts.append(states[-1].clone())
        for begin, end in reversed(chunks):
            self.chunk = scan.chunk(begin, end)
            if need_states:
                self.start = starts.pop()
                self.states, self.decay = work.states(self.chunk, self.start)
            elif self.need_gradient:
                self.decay = work.decays(self.chunk)
            yield begin, end
        if self.grads.initial is not None:
            self.grads.initial.copy_(self.carry)

    def step(self, begin: int, end: int, dy: Tensor) -> None:
        """Gradients of a chunk whose output has the gradient dy (S, B, G, D)."""
        scan, chunk, grads = self.scan, self.chunk, self.grads
        if chunk.skip is not None:
            dy = dy.masked_fill(chunk.skip, 0.0)
        if grads.D is not None:
            grads.D += (dy * chunk.u).sum((0, 1))
        if grads.C is not None:
            if grads.C.ndim == 3:
                grads.C += (self.states * dy[..., None, :]).sum((0, 1))
            else:
                self._add(grads.C, begin, end, _sum_channels(dy, self.states))
        if self.need_gradient:
            moved = self._recurrence(begin, end, dy)
            if grads.u is not None:
                du = moved * chunk.step
                if chunk.D is not None:
                    du.addcmul_(dy, chunk.D)
                scan.put(grads.u, begin, end, du)
            if self.need_decay:
                self._decays(begin, end, moved)

    def _recurrence(self, begin: int, end: int, dy: Tensor) -> Tensor:
        """g of each step, its share of dB, and <B, g> (S, B, G, D); leaves a g for `_decays`."""
        chunk, grads = self.chunk, self.grads
        gradient = self.gradient[: len(chunk.u)]
        _outer(chunk.C, dy, out=gradient)
        g, a = gradient.unbind(), self.decay.unbind()
        g[-1].add_(self.carry)
        for t in range(len(g) - 2, -1, -1):
            g[t].addcmul_(a[t + 1], g[t + 1])
        if grads.B is not None:
            if grads.B.ndim == 3:
                grads.B += (gradient * chunk.step_u[..., None, :]).sum((0, 1))
            else:
                self._add(grads.B, begin, end, _sum_channels(chunk.step_u, gradient))
        moved = _sum_states(chunk.B, gradient)
        if self.need_decay:
            gradient.mul_(self.decay[: len(g)])
            self.carry.copy_(g[0])
        else:
            torch.mul(g[0], a[0], out=self.carry)
        return moved

    def _decays(self, begin: int, end: int, moved: Tensor) -> None:
        """dA, ddelta and ddelta_bias; a g becomes q = a g h_{t-1}."""
        scan, chunk, grads = self.scan, self.chunk, self.grads
        q = self.gradient[: len(chunk.u)]
        q[1:].mul_(self.states[:-1])
        q[0].mul_(self.start)
        if grads.A is not None:
            product = torch.mul(q, chunk.step[..., None, :], out=self.decay[: len(q)])
            grads.A += product.sum((0, 1))
        if self.need_step:
            dstep = q.mul_(self.work.A).sum(-2).addcmul_(moved, chunk.u)
            if scan.softplus:
                dstep *= torch.sigmoid(chunk.before)
            if chunk.skip is not None:
                dstep.masked_fill_(chunk.skip, 0.0)
            if grads.bias is not None:
                grads.bias += dstep.sum((0, 1))
            if grads.delta is not None:
                scan.put(grads.delta, begin, end, dstep)

    def _add(self, into: Tensor, begin: int, end: int, value: Tensor) -> None:
        """Add steps: blocks of channels share B and C."""
        if self.scan.reverse:
            into[len(into) - end : len(into) - begin] += value.flip(0)
        else:
            into[begin:end] += value


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

    def by_step(t: Tensor) -> Tensor:
        if t.ndim == 2:
            return _channels_last(t.to(dtype), groups)
        return t.transpose(0, 1)

    def by_group(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype).reshape(groups, -1)

    return _Scan(
        _steps(u, groups),
        _steps(delta, groups),
        _channels_last(A.to(dtype), groups),
        by_step(B),
        by_step(C),
        by_group(D),
        by_group(delta_bias),
        None if initial_state is None else _state(initial_state.to(dtype), groups),
        None if flags is None else flags.T,
        softplus,
        reverse,
    )


def _cross(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> _Scan:
    dtype = _precision(u, A)
    by_step = [t.permute(2, 1, 0, 3) for t in (u, delta, B, C)]
    return _Scan(
        by_step[0],
        by_step[1],
        A.to(dtype).mT.contiguous(),
        by_step[2],
        by_step[3],
        D.to(dtype),
        delta_bias.to(dtype),
        None,
        None,
        True,
        False,
    )


def _cross_sum(scan: _Scan, z: Tensor, orders: Tensor) -> Tensor:
    """The mean over the orders by token, (B, L, D), not gated."""
    total = torch.zeros(z.shape, dtype=scan.A.dtype)
    for part, block in scan.blocks():
        work = _Work(block)
        state = block.start()
        for begin, end in block.chunks():
            chunk = block.chunk(begin, end)
            states, _ = work.states(chunk, state)
            part.add_tokens(total, orders[:, begin:end], chunk.output(states))
            state.copy_(states[-1])
    return total.div_(len(orders))


def _steps(x: Tensor, groups: int) -> Tensor:
    """(B, L, D) as (L, B, G, D / G), a view."""
    return x.unflatten(2, (groups, x.shape[2] // groups)).transpose(0, 1)


def _state(x: Tensor, groups: int) -> Tensor:
    """(B, D, N) as (B, G, N, D / G), a view."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).transpose(2, 3)


def _channels_last(x: Tensor, groups: int) -> Tensor:
    """(D, N) as (G, N, D / G), contiguous."""
    return x.unflatten(0, (groups, len(x) // groups)).transpose(1, 2).contiguous()


def _by_channel(x: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient (..., G, N, D) in the shape and dtype of an input that ends with (G D, N)."""
    return None if x is None else x.transpose(-1, -2).reshape(like.shape).to(like.dtype)


def _by_sample(x: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient of B or C as in `_Scan` in the shape and dtype of the input."""
    if x is None or like.ndim == 2:
        return _by_channel(x, like)
    return _of_groups(x.transpose(0, 1), like)


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


def _visited(x: Tensor, begin: int, end: int, reverse: bool) -> Tensor:
    """Steps of x (L, ...) in the order of the visit."""
    return x[len(x) - end : len(x) - begin].flip(0) if reverse else x[begin:end]


def _outer(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """x (S, B, G, N) or fixed (G, N, D), times y (S, B, G, D): (S, B, G, N, D)."""
    return torch.mul(x if x.ndim == 3 else x[..., None], y[..., None, :], out=out)


def _sum_states(x: Tensor, states: Tensor) -> Tensor:
    """<x, states> over N: x (S, B, G, N) or fixed (G, N, D); the result is (S, B, G, D)."""
    if x.ndim == 3:
        return (states * x).sum(-2)
    return torch.matmul(x[..., None, :], states).squeeze(-2)


def _sum_channels(y: Tensor, states: Tensor) -> Tensor:
    """The sum over D of y (S, B, G, D) times states: (S, B, G, N)."""
    return torch.matmul(y[..., None, :], states.mT).squeeze(-2)


def _dsilu(x: Tensor) -> Tensor:
    """The derivative of silu."""
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


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
