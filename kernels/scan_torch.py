"""The scans and the convolution of `kernels.scan_cpu` in plain torch, for any CPU and fp64.

States are laid out (groups, samples, steps, N, channels of a group), a chunk of S steps at a time:
one `exp` for a whole chunk, one `addcmul_` for each step, matrix products for sums.
Operations on a chunk and on one of its steps share their work among threads in the same way, so a
core finds in its own cache what it wrote before. What has no states is computed for blocks of many
chunks. The backward goes from the last chunk to the first and computes the states of each again,
from the state before it: one that the forward kept, N / 4 numbers for each (b, l, d), or that a
first pass computes (the cross scan has four times as many). Memory is O(B L (D + N) + B D N) with
N / 4 for a constant, never (B, L, D, N).

A cross scan is a scan of K groups of channels, each with its own order of the tokens.

    d_t = softplus(delta_t + delta_bias);  a_t = exp(d_t A);  h_t = a_t h_{t-1} + d_t u_t B_t
    y_t = <C_t, h_t> + D u_t
    backward, from the last step: g_t = dy_t C_t + a_{t+1} g_{t+1};  q_t = g_t a_t h_{t-1}
    dC_t = sum_d dy_t h_t;  dB_t = sum_d d_t u_t g_t;  dA = sum_t d_t q_t;  du_t = d_t <B_t, g_t>
    dd_t = <A, q_t> + u_t <B_t, g_t>

(Mamba, arXiv 2312.00752, equations 2 to 4 with the discretisation of its code.)

Gradients are the same from run to run; the size of a chunk, and with it the order of some sums,
depends on the number of threads. Arguments and results of the functions are those of
`kernels.scan_cpu`; inputs are not differentiated by autograd.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels.reference import RESET, SKIP

CHUNK = 1 << 18  # elements of a chunk of states for each thread: they stay in its cache
BLOCK = 1 << 18  # elements without states that are computed at once
KEPT = 1 << 21  # elements, at most, of a buffer that a thread keeps
STEPS = 4  # between states that a forward keeps; a chunk has so many or a multiple


def scan_forward(
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
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output and the last state; `kept`, in `kept_shape`, gets states for `scan_backward`."""
    scan = _scan(u, delta, A, B, C, D, delta_bias, initial_state, flags, delta_softplus, reverse)
    groups = scan.A.shape[0]
    out, last = u.new_empty(u.shape), scan.A.new_empty(u.shape[0], *A.shape)
    memory = _Memory(scan.A)
    out_steps, z_steps = _steps(out, groups), None if z is None else _steps(z, groups)
    for part in scan.parts():
        state = part.of(_state(last, groups))
        ours = None if kept is None else part.of(kept)
        for block, y in _outputs(part.of_scan(scan), state, memory, ours):
            if z_steps is None:
                block.join(block.mask(y), part.of(out_steps))
            else:
                gate = block.cut(part.of(z_steps))
                gate = torch.ops.aten.silu.out(gate, out=block.room("spare"))
                block.put(part.of(out_steps), torch.mul, y, gate)
    return out, last


def kept_shape(batch: int, length: int, dim: int, state: int, groups: int) -> tuple[int, ...]:
    """Of the states before steps STEPS, 2 STEPS, ..., (G, B, ..., N, D / G), in A's precision."""
    return groups, batch, length // STEPS, state, dim // groups


def scan_backward(
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
    kept: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The nine gradients; without what the forward kept its states are computed once more."""
    scan = _scan(u, delta, A, B, C, D, delta_bias, initial_state, flags, delta_softplus, reverse)
    groups = scan.A.shape[0]
    du, ddelta, dz = (
        x.new_empty(x.shape) if need and x is not None else None
        for x, need in ((u, needs[0]), (delta, needs[1]), (z, needs[6]))
    )
    du_steps, ddelta_steps, dz_steps, z_steps, dout_steps = (
        None if x is None else _steps(x, groups) for x in (du, ddelta, dz, z, dout)
    )
    if dz is not None and dout is None:
        dz.zero_()
        dz_steps = None
    grads = _Grads.zeros(scan, du_steps, ddelta_steps, [*needs[2:6], *needs[7:]])
    end_gradient = None if dlast is None else _state(dlast.to(scan.A.dtype), groups)
    memory = _Memory(scan.A)
    for part in scan.parts():
        end = None if end_gradient is None else part.of(end_gradient)
        ours = None if kept is None else part.of(kept)
        backward = _Backward(part.of_scan(scan), part.of_grads(grads), end, memory, ours)
        for block in backward.blocks(need_output=dz_steps is not None):
            dy, y = block.room("dy"), None
            if dout_steps is None:
                dy.zero_()
            elif z_steps is None:
                dy.copy_(block.cut(part.of(dout_steps)))
            else:
                gradient, gate = block.cut(part.of(dout_steps)), block.cut(part.of(z_steps))
                if dz_steps is not None:
                    y, slope = block.room("y"), block.room("slope")
                    torch.ops.aten.silu_backward.grad_input(gradient, gate, grad_input=slope)
                gate = torch.ops.aten.silu.out(gate, out=block.room("spare"))
                torch.mul(gradient, gate, out=dy)
            backward.run(block, block.mask(dy), y)
            if dz_steps is not None and y is not None:
                block.put(part.of(dz_steps), torch.mul, y, slope)
    dA, dinitial = grads.A, grads.initial
    return (
        du,
        ddelta,
        None if dA is None else _like(dA.mT, A),
        _of_coefficients(grads.B, B),
        _of_coefficients(grads.C, C),
        None if D is None else _like(grads.D, D),
        dz,
        None if delta_bias is None else _like(grads.bias, delta_bias),
        None if dinitial is None else _like(dinitial.permute(1, 0, 3, 2), initial_state),
    )


def cross_forward(
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
    """The output."""
    scan = _cross(u, delta, A, B, C, D, delta_bias)
    total, memory = scan.A.new_zeros(z.shape), _Memory(scan.A)
    for part in scan.parts():
        ours, tokens = part.of_scan(scan), part.of_tokens(total)
        for block, y in _outputs(ours, ours.start(), memory):
            block.add_tokens(tokens, orders, y)
    total *= F.silu(z.to(total.dtype))
    return total.div_(len(orders)).to(z.dtype)


def cross_backward(
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
    """The eight gradients."""
    scan = _cross(u, delta, A, B, C, D, delta_bias)
    dtype = scan.A.dtype
    du, ddelta = (
        x.new_empty(x.shape) if need else None for x, need in ((u, needs[0]), (delta, needs[1]))
    )
    grads = _Grads.zeros(scan, du, ddelta, [*needs[2:6], needs[7], False])
    gate, total, memory = z.to(dtype), None, _Memory(scan.A)
    dy_tokens = F.silu(gate).mul_(dout).div_(len(orders))
    if needs[6]:
        total = scan.A.new_zeros(z.shape)
    for part in scan.parts():
        backward = _Backward(part.of_scan(scan), part.of_grads(grads), None, memory)
        for block in backward.blocks(need_output=total is not None):
            y = None if total is None else block.room("y")
            dy = block.take_tokens(part.of_tokens(dy_tokens), orders, block.room("dy"))
            backward.run(block, dy, y)
            if total is not None and y is not None:
                block.add_tokens(part.of_tokens(total), orders, y)
    dz = None
    if total is not None:
        dz = torch.ops.aten.silu_backward(total.mul_(dout).div_(len(orders)), gate).to(z.dtype)
    return (
        du,
        ddelta,
        None if grads.A is None else _like(grads.A.mT, A),
        _like(grads.B, B),
        _like(grads.C, C),
        _like(grads.D, D),
        dz,
        _like(grads.bias, delta_bias),
    )


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, orders: Tensor, silu: bool
) -> Tensor:
    """The output."""
    out = x.new_empty(len(orders), *x.shape)
    for k, begin, end, mixed, _ in _conv_chunks(x, weight, bias, orders):
        out[k, :, begin:end] = F.silu(mixed, inplace=True) if silu else mixed
    return out


def conv_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    orders: Tensor,
    silu: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The three gradients."""
    dtype = _precision(x, weight)
    width = weight.shape[-1]
    dx = torch.zeros_like(x, dtype=dtype) if needs[0] else None
    dweight = torch.zeros_like(weight, dtype=dtype) if needs[1] else None
    dbias = None
    if bias is not None and needs[2]:
        dbias = torch.zeros_like(bias, dtype=dtype)
    for k, begin, end, mixed, rows in _conv_chunks(x, weight, bias, orders):
        dmixed = dout[k, :, begin:end].to(dtype)
        if silu:
            dmixed = torch.ops.aten.silu_backward(dmixed, mixed)
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
    return _like(dx, x), _like(dweight, weight), None if bias is None else _like(dbias, bias)


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

    @cached_property
    def largest_rate(self) -> float:
        """Of |A|."""
        return self.A.abs().max().item() if self.A.numel() else 0.0

    def chunk(self) -> int:
        """Elements of a chunk of states."""
        return CHUNK * torch.get_num_threads()

    def parts(self) -> Iterator[_Part]:
        """Ranges of samples and channels of which a few steps' states fit a chunk."""
        groups, batch, _, dim = self.u.shape
        state = self.A.shape[-2]
        budget = max(1, self.chunk() // max(STEPS, state // 4))  # elements of a step
        channels = _share(dim, budget // (groups * state))
        samples = _share(batch, budget // max(1, groups * state * channels))
        for sample in range(0, batch, samples):
            for channel in range(0, dim, channels):
                yield _Part(slice(sample, sample + samples), slice(channel, channel + channels))

    def ranges(self) -> list[tuple[slice, int]]:
        """The steps of each block in the order of the visit, and the steps of its chunks."""
        groups, batch, length, dim = self.u.shape
        step, state = max(1, groups * batch * dim), self.A.shape[-2]
        size = max(self.chunk() // (step * state), STEPS, state // 4) // STEPS * STEPS
        size = min(size, max(length, 1))
        span = size * max(1, min(length, BLOCK // step) // size)
        whole = length // size * size
        edges = [*range(0, whole, span), whole] if whole else [0]
        ranges = [(a, b, size) for a, b in itertools.pairwise(edges)]
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
        """Of (G, B, L, D), of a state (G, B, N, D), or of many of them (G, B, ..., N, D)."""
        return x[:, self.samples, ..., self.channels]

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
            elif x is not None and field.name in ("B", "C"):
                x = self._coefficients(x)
            elif x is not None:
                x = x[..., self.channels]
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
            scan.A.new_zeros(x.shape) if need and x is not None else None
            for x, need in zip(likes, needs, strict=True)
        ]
        return cls(u, delta, *sums)


_thread = threading.local()


class _Memory:
    """Buffers by name, which a thread keeps from call to call while they are small.

    Fresh memory costs as much as what is computed in it.

    Args:
        like: of the dtype of all buffers.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.flat: dict[str, Tensor] = vars(_thread).setdefault(str(like.dtype), {})
        self.shaped: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self.chunks: dict[tuple[int, ...], _Chunk] = {}

    def room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A contiguous buffer, the same for the same name; what it held is lost."""
        buffer = self.shaped.get((name, shape))
        if buffer is None:
            flat, size = self.flat.get(name), math.prod(shape)
            if flat is None or len(flat) < size:
                with torch.inference_mode(False):  # it may serve outside of that mode later
                    flat = torch.empty(size, dtype=self.like.dtype, device=self.like.device)
                if size <= KEPT:
                    self.flat[name] = flat
            buffer = self.shaped[name, shape] = flat[:size].view(shape)
        return buffer

    def chunk(self, shape: tuple[int, ...]) -> _Chunk:
        """Room for a chunk of states, the same for the same shape."""
        if shape not in self.chunks:
            self.chunks[shape] = _Chunk(self, shape)
        return self.chunks[shape]


class _Chunk:
    """Room for the states of a chunk, (G, B, S, N, D), and its views.

    Cutting a view takes about as long as computing in it, so each is cut once.

    Args:
        memory: where it is put.
        shape: of the states.
    """

    def __init__(self, memory: _Memory, shape: tuple[int, ...]) -> None:
        self.memory, self.shape = memory, shape
        self.decay, self.states = memory.room("decay", shape), memory.room("states", shape)
        self.decay_steps, self.states_steps = self.decay.unbind(2), self.states.unbind(2)
        self.decay_matrices, self.states_matrices = (
            x.view(-1, *shape[-2:]) for x in (self.decay, self.states)
        )

    @cached_property
    def arrived(self) -> Tensor:
        """For what is left of the state before, a_t h_{t-1}."""
        return self.memory.room("arrived", self.shape)

    @cached_property
    def arrived_steps(self) -> tuple[Tensor, ...]:
        """Each (G, B, N, D)."""
        return self.arrived.unbind(2)

    @cached_property
    def arrived_rows(self) -> Tensor:
        """(G B, S, N D)."""
        groups, batch, steps, state, dim = self.shape
        return self.arrived.view(groups * batch, steps, state * dim)

    @cached_property
    def spare(self) -> Tensor:
        """For products, (G, B, S, N, D)."""
        return self.memory.room("spare states", self.shape)

    @cached_property
    def ones(self) -> tuple[Tensor, Tensor]:
        """A row for each matrix, (G B S, 1, N), and for each sample, (G B, 1, S)."""
        groups, batch, steps, state, _ = self.shape
        one = self.decay.new_ones(1, 1, 1)
        return (
            one.expand(groups * batch * steps, 1, state).contiguous(),
            one.expand(groups * batch, 1, steps).contiguous(),
        )


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
        # An exp that underflows takes a hundred times as long.
        self.tiny = torch.finfo(scan.A.dtype).tiny
        low, high = (x.item() for x in step.aminmax())
        self.underflow = max(-low, high) * scan.largest_rate > -math.log(self.tiny)
        self.chunk = memory.chunk((groups, batch, size, state, dim))
        # By chunk: B and C as factors of states, and as rows where they depend on the input.
        self.B, self.B_rows = self._coefficients(B, scan.B)
        self.C, self.C_rows = self._coefficients(C, scan.C)
        self.steps = step.unsqueeze(4).unbind()
        self.steps_u = self.step_u.unsqueeze(4).unbind()

    def _coefficients(
        self, x: Tensor, given: Tensor
    ) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
        if x is given and x.ndim == 5:
            return [x] * self.count, None
        return x.unsqueeze(5).unbind(), self.row_of_each(x)

    def row_of_each(self, x: Tensor) -> tuple[Tensor, ...]:
        """(chunks, G, B, S, X) as a row for each matrix of states: for each chunk (G B S, 1, X)."""
        return x.view(self.count, -1, 1, x.shape[-1]).unbind()

    def room(self, name: str) -> Tensor:
        """A buffer (chunks, G, B, S, D)."""
        return self.memory.room(name, self.small)

    def rows_room(self, name: str) -> Tensor:
        """A buffer (chunks, G, B, S, N)."""
        return self.memory.room(name, self.rows)

    def _chunks(self, steps: Tensor) -> Tensor:
        """A view of the block's steps, (G, B, ..., X)."""
        return steps.unflatten(2, (self.count, -1)).permute(2, 0, 1, 3, 4)

    def cut(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The block's steps of x (G, B, L, ...) in chunks, a view unless something changes."""
        x = x[:, :, self.place].to(dtype or self.scan.A.dtype)
        return self._chunks(x.flip(2) if self.scan.reverse else x)

    def join(self, chunks: Tensor, into: Tensor) -> None:
        """Write chunks to where `cut` reads them."""
        steps = into[:, :, self.place]
        if self.scan.reverse:
            steps.copy_(chunks.permute(1, 2, 0, 3, 4).flatten(2, 3).flip(2))
        else:
            self._chunks(steps).copy_(chunks)

    def put(self, into: Tensor | None, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """function(*values), 0 in padding, written to where `cut` reads; None: to a buffer."""
        dtype = self.scan.A.dtype
        if into is not None and not self.scan.reverse and self.skip is None and into.dtype == dtype:
            return function(*values, out=self._chunks(into[:, :, self.place]))
        chunks = self.mask(function(*values, out=self.room("spare")))
        if into is not None:
            self.join(chunks, into)
        return chunks

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

    def decays(self, i: int) -> None:
        """Compute exp(d A) of chunk i, 0 where a sequence begins, where the chunk has its room."""
        decay = torch.mul(self.steps[i], self.scan.A, out=self.chunk.decay)
        if self.underflow:
            decay.clamp_(min=math.log(self.tiny)).exp_()
            torch.threshold_(decay, 2 * self.tiny, 0.0)
        else:
            decay.exp_()
        if self.reset is not None:
            decay.masked_fill_(self.reset[i], 0.0)

    def states(self, i: int, before: Tensor) -> None:
        """Compute h after each step of chunk i, and the decays, where the chunk has its room."""
        self.decays(i)
        chunk = self.chunk
        torch.mul(self.B[i], self.steps_u[i], out=chunk.states)
        for h, a in zip(chunk.states_steps, chunk.decay_steps, strict=True):
            h.addcmul_(a, before)
            before = h

    def states_and_arrived(self, i: int, before: Tensor) -> None:
        """Compute also a_t h_{t-1}."""
        self.decays(i)
        chunk, step_u = self.chunk, self.steps_u[i].unbind(2)
        B = self.B[i].expand(-1, -1, len(step_u), -1, -1).unbind(2)
        rooms = zip(chunk.states_steps, chunk.arrived_steps, chunk.decay_steps, strict=True)
        for (h, arrived, a), b, x in zip(rooms, B, step_u, strict=True):
            torch.mul(a, before, out=arrived)
            torch.addcmul(arrived, b, x, out=h)
            before = h

    def output(self, i: int, out: Tensor) -> None:
        """<C, h> of chunk i into (G B S, 1, D)."""
        self._sum_states(self.C[i], self.C_rows, i, self.chunk.states_matrices, out)

    def moved(self, i: int, out: Tensor) -> None:
        """<B, g> of chunk i into (G B S, 1, D)."""
        self._sum_states(self.B[i], self.B_rows, i, self.chunk.states_matrices, out)

    def _sum_states(
        self, x: Tensor, rows: Sequence[Tensor] | None, i: int, matrices: Tensor, out: Tensor
    ) -> None:
        """B or C of chunk i times states or their gradients (G B S, N, D), summed over N."""
        if rows is None:
            spare = self.chunk.spare
            torch.mul(matrices.view(spare.shape), x, out=spare)
            torch.sum(spare, 3, out=out.view(spare[:, :, :, 0].shape))
        else:
            torch.bmm(rows[i], matrices, out=out)

    def add_sums(
        self, into: Tensor, y: Tensor, y_rows: Tensor, matrices: Tensor, sums: Tensor
    ) -> None:
        """y (G, B, S, 1, D) times (G B S, N, D): summed over D to `sums`, or added to (G, N, D)."""
        if into.ndim == 5:
            spare = self.chunk.spare
            torch.mul(matrices.view(spare.shape), y, out=spare)
            into += spare.sum((1, 2), keepdim=True)
        else:
            # A row times a transposed matrix is several times as fast as the matrix times a column.
            torch.bmm(y_rows, matrices.mT, out=sums)


class _Backward:
    """The backward of a part of a scan: `for block in blocks(): run(block, dy)`.

    Args:
        scan: the part.
        grads: where its gradients go.
        end: (G, B, N, D), the last state's gradient; None: zeros.
        memory: for blocks.
        kept: (G, B, ..., N, D) of `_outputs`; None: they are computed again.
    """

    def __init__(
        self,
        scan: _Scan,
        grads: _Grads,
        end: Tensor | None,
        memory: _Memory,
        kept: Tensor | None = None,
    ) -> None:
        self.scan, self.grads, self.memory, self.kept, g = scan, grads, memory, kept, grads
        self.carry = torch.zeros_like(scan.start()) if end is None else _copy(end)
        groups, batch, state, dim = self.carry.shape
        self.dA = None  # of each sample
        if g.A is not None:
            self.dA = self.carry.new_zeros(groups * batch, 1, state * dim)
        self.need_step = g.delta is not None or g.bias is not None
        self.need_decay = self.need_step or g.A is not None
        self.need_moved = self.need_step or g.u is not None
        self.need_gradient = (
            self.need_decay or self.need_moved or g.B is not None or g.initial is not None
        )
        self.need_states = self.need_decay or g.C is not None

    def blocks(self, need_output: bool) -> Iterator[_Block]:
        """The blocks from the last to the first; `need_output`: each will be `run` with a y."""
        ranges = self.scan.ranges()
        self.need_states |= need_output
        self.starts = [self.scan.start()]  # the state before each chunk
        if self.need_states and self.kept is not None:
            edges = itertools.accumulate(
                size for steps, size in ranges for _ in range(steps.start, steps.stop, size)
            )
            self.starts += [self.kept[:, :, edge // STEPS - 1] for edge in list(edges)[:-1]]
        elif self.need_states:
            for n, (steps, size) in enumerate(ranges, 1):
                block = _Block(self.scan, steps, size, self.memory)
                for i in range(block.count - (n == len(ranges))):
                    block.states(i, self.starts[-1])
                    self.starts.append(_copy(block.chunk.states_steps[-1]))
        for steps, size in reversed(ranges):
            yield _Block(self.scan, steps, size, self.memory)
        if self.grads.initial is not None:
            self.grads.initial.copy_(self.carry)
        if self.grads.A is not None and self.dA is not None:
            samples = self.dA.view(self.carry.shape)
            self.grads.A += samples.sum(1)[:, None, None]

    def run(self, block: _Block, dy: Tensor, y: Tensor | None) -> None:
        """The gradients of a block.

        Args:
            block: the next that `blocks` gave.
            dy: (chunks, G, B, S, D), the gradient of <C, h> + D u; 0 in padding.
            y: gets <C, h> + D u; None: not needed.
        """
        grads, rows = self.grads, block.row_of_each
        dy_steps, dy_rows, step_u_rows = dy.unsqueeze(4).unbind(), rows(dy), rows(block.step_u)
        outputs = None if y is None else rows(y)
        moved, powers = rows(block.room("moved")), rows(block.room("powers"))
        dB, dC = rows(block.rows_room("dB")), rows(block.rows_room("dC"))
        chunk = block.chunk
        for i in reversed(range(block.count)):
            if self.need_states:
                block.states_and_arrived(i, self.starts.pop())
            elif self.need_gradient:
                block.decays(i)
            if outputs is not None:
                block.output(i, outputs[i])
            if grads.C is not None:
                block.add_sums(grads.C, dy_steps[i], dy_rows[i], chunk.states_matrices, dC[i])
            if not self.need_gradient:
                continue
            self._gradients(block, i, dy_steps[i])
            if grads.B is not None:
                factors = block.steps_u[i], step_u_rows[i]
                block.add_sums(grads.B, *factors, chunk.states_matrices, dB[i])
            if self.need_moved:
                block.moved(i, moved[i])
            if self.need_decay:
                self._decay_gradients(block, i, powers[i])
        if y is not None and self.scan.D is not None:
            y.addcmul_(block.u, self.scan.D)
        self._finish(block, dy)

    def _gradients(self, block: _Block, i: int, dy: Tensor) -> None:
        """The states' gradients of chunk i; dy (G, B, S, 1, D)."""
        chunk = block.chunk
        torch.mul(block.C[i], dy, out=chunk.states)
        g, a = chunk.states_steps, chunk.decay_steps
        g[-1].add_(self.carry)
        for t in range(len(g) - 1, 0, -1):
            g[t - 1].addcmul_(a[t], g[t])
        torch.mul(a[0], g[0], out=self.carry)

    def _decay_gradients(self, block: _Block, i: int, powers: Tensor) -> None:
        """What goes through exp(d A) in chunk i; the decays and the gradients are lost.

        Sums are products with ones, which take a third of the time of `sum`.
        """
        chunk, (ones_state, ones_step) = block.chunk, block.chunk.ones
        q = chunk.arrived.mul_(chunk.states)
        if self.need_step:
            torch.mul(q, self.scan.A, out=chunk.decay)
            torch.bmm(ones_state, chunk.decay_matrices, out=powers)
        if self.dA is not None:
            q.mul_(block.steps[i])
            self.dA.baddbmm_(ones_step, chunk.arrived_rows)

    def _finish(self, block: _Block, dy: Tensor) -> None:
        """What needs no states."""
        scan, grads = self.scan, self.grads
        for name, into in (("dB", grads.B), ("dC", grads.C)):
            if into is not None and into.ndim == 4:
                block.join(block.cut(into).add_(block.rows_room(name)), into)
        moved, powers = block.room("moved"), block.room("powers")
        if grads.D is not None:
            grads.D += self._sum(torch.mul(dy, block.u, out=block.room("spare")))
        if self.need_step:
            if scan.softplus:
                dstep = powers.addcmul_(moved, block.u)
                dstep = block.put(grads.delta, _softplus_backward, dstep, block.before)
            else:
                dstep = block.put(grads.delta, torch.addcmul, powers, moved, block.u)
            if grads.bias is not None:
                grads.bias += self._sum(dstep)
        if grads.u is not None:
            if scan.D is None:
                block.put(grads.u, torch.mul, moved, block.step)
            else:
                block.put(grads.u, torch.addcmul, moved.mul_(block.step), dy, scan.D)

    @staticmethod
    def _sum(chunks: Tensor) -> Tensor:
        """(chunks, G, B, S, D) to (G, 1, 1, D)."""
        return chunks.sum((0, 2, 3))[:, None, None]


def _softplus_backward(gradient: Tensor, before: Tensor, out: Tensor) -> Tensor:
    return torch.ops.aten.softplus_backward.grad_input(gradient, before, 1, 20, grad_input=out)


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


def _outputs(
    scan: _Scan, state: Tensor, memory: _Memory, kept: Tensor | None = None
) -> Iterator[tuple[_Block, Tensor]]:
    """<C, h> + D u of each block, (chunks, G, B, S, D); `state` becomes h after the last step.

    `kept` (G, B, ..., N, D) gets the states of `scan_forward`.
    """
    before = last = scan.start()
    slots = iter(() if kept is None else kept.unbind(2))
    for steps, size in scan.ranges():
        block = _Block(scan, steps, size, memory)
        y = block.room("y")
        rows = block.row_of_each(y)
        for i in range(block.count):
            block.states(i, before)
            block.output(i, rows[i])
            *_, last = states = block.chunk.states_steps
            if kept is None:
                before.copy_(last)
            for h in states[STEPS - 1 :: STEPS] if kept is not None else ():
                before = next(slots)
                before.copy_(h)
        yield block, y if scan.D is None else y.addcmul_(block.u, scan.D)
    state.copy_(last)


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


def _of_coefficients(x: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient of B or C as in `_Scan` as that of the input (D, N) or (B, L, G, N)."""
    if x is None:
        return None
    return _like(x.mT if like.ndim == 2 else x.permute(1, 2, 0, 3), like)


def _like(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    """x in the shape and dtype of `like`."""
    return None if x is None or like is None else x.reshape(like.shape).to(like.dtype)


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
    steps = max(STEPS, (CHUNK >> 2) // max(1, batch * dim))
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
