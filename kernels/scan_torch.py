"""The scans and the convolution of `kernels.scan_cpu` in plain torch, for any CPU and fp64.

States are laid out (groups, samples, steps, N, channels of a group), a chunk of S steps at a time:
one `exp` for a whole chunk, one `addcmul_` for each step, matrix products for sums.
Operations on a chunk and on one of its steps share their work among threads in the same way, so a
core finds in its own cache what it wrote before. What has no states is computed for blocks of many
chunks. The backward goes from the last chunk to the first and computes the states of each again,
from the state before it: one that the forward kept, N / 4 numbers for each (b, l, d) at most, or
that a first pass computes (the cross scan has four times as many). What a gate multiplies is kept
too. Memory is O(B L (D + N) + B D N) with N / 4 for a constant, never (B, L, D, N).

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

from kernels.inputs import CrossInputs, ScanInputs
from kernels.reference import RESET, SKIP

CHUNK = 1 << 18  # elements of a chunk of states for each thread: they stay in its cache
BLOCK = 1 << 18  # elements without states that are computed at once
KEPT = 1 << 21  # elements, at most, of a buffer that a thread keeps
STEPS = 4  # the fewest between states that a forward keeps; a chunk has a multiple of it


def scan_forward(inputs: ScanInputs, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The output and the last state; `kept`, of `kept_size`, is written for `scan_backward`."""
    if inputs.reverse:
        inputs = _flipped(inputs)
    threads = torch.get_num_threads()
    if kept is not None:
        kept[0] = threads
    u, z, groups, scan = inputs.u, inputs.z, inputs.groups, _scan(inputs, threads)
    out, last = u.new_empty(u.shape), scan.A.new_empty(u.shape[0], *inputs.A.shape)
    memory = _Memory(scan.A)
    out_steps, z_steps = _steps(out, groups), None if z is None else _steps(z, groups)
    for part, walk, ours in _walks(scan, memory, kept, gated=z is not None):
        outs = walk.blocks(part.of(out_steps))
        gates = None if z_steps is None else walk.blocks(part.of(z_steps))
        for block, y in _outputs(walk, part.of(_state(last, groups)), ours):
            if gates is None:
                outs[block.number].copy_(block.mask(y))
            else:
                gate = block.values(gates)
                gate = torch.ops.aten.silu.out(gate, out=block.room("spare").all)
                block.put(outs, torch.mul, y, gate)
    return out.flip(1) if inputs.reverse else out, last


def kept_size(batch: int, length: int, dim: int, state: int, gated: bool) -> int:
    """How many numbers a forward keeps: its threads, states, with z what the gate multiplies."""
    return 1 + batch * dim * (length // _kept_every(batch, dim, state) * state + length * gated)


def _kept_every(batch: int, dim: int, state: int) -> int:
    """Steps from a state that a forward keeps to the next: a thread's chunk, or STEPS.

    It does not depend on the number of threads: a compiled model may be run with others.
    """
    return max(STEPS, CHUNK // max(1, batch * dim * state) // STEPS * STEPS)


def scan_backward(
    dout: Tensor | None,
    dlast: Tensor | None,
    inputs: ScanInputs,
    needs: Sequence[bool],
    kept: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The nine gradients; without what the forward kept that is computed once more."""
    if inputs.reverse:
        inputs, dout = _flipped(inputs), _flip(dout)
    u, delta, A, B, C, D, z, delta_bias, initial_state, *_ = inputs
    # What was kept lies as the forward cut the scan, which may have had other threads.
    threads = torch.get_num_threads() if kept is None else int(kept[0].item())
    groups, scan = inputs.groups, _scan(inputs, threads)
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
    for part, walk, ours in _walks(scan, memory, kept, gated=z is not None):
        end = None if end_gradient is None else part.of(end_gradient)
        backward = _Backward(walk, part.of_grads(grads), end, () if ours is None else ours.states)
        known = () if ours is None else ours.outputs
        gates, douts, dzs = (
            None if x is None else walk.blocks(part.of(x)) for x in (z_steps, dout_steps, dz_steps)
        )
        for block in backward.blocks(need_output=dzs is not None and not known):
            dy, y = block.room("dy"), None
            if douts is None:
                dy.all.zero_()
            elif gates is None:
                dy.all.copy_(douts[block.number])
            else:
                gradient, gate = block.values(douts), block.values(gates)
                if dzs is not None:
                    y = known[block.number] if known else block.room("y")
                    slope = block.room("slope").all
                    torch.ops.aten.silu_backward.grad_input(gradient, gate, grad_input=slope)
                gate = torch.ops.aten.silu.out(gate, out=block.room("spare").all)
                torch.mul(gradient, gate, out=dy.all)
            block.mask(dy.all)
            backward.run(block, dy, None if known else y)
            if dzs is not None and y is not None:
                block.put(dzs, torch.mul, y.all, slope)
    dA, dinitial = grads.A, grads.initial
    dB, dC = _of_coefficients(grads.B, B), _of_coefficients(grads.C, C)
    if inputs.reverse:
        du, ddelta, dz = (_flip(x) for x in (du, ddelta, dz))
        dB, dC = (x if x is None or x.ndim == 2 else x.flip(1) for x in (dB, dC))
    return (
        du,
        ddelta,
        None if dA is None else _like(dA.mT, A),
        dB,
        dC,
        None if D is None else _like(grads.D, D),
        dz,
        None if delta_bias is None else _like(grads.bias, delta_bias),
        None if dinitial is None else _like(dinitial.permute(1, 0, 3, 2), initial_state),
    )


def cross_forward(inputs: CrossInputs) -> Tensor:
    """The output."""
    z, orders, scan = inputs.z, inputs.orders, _cross(inputs)
    total, memory = scan.A.new_zeros(z.shape), _Memory(scan.A)
    for part, walk, _ in _walks(scan, memory):
        tokens = part.of_tokens(total)
        for block, y in _outputs(walk, walk.scan.start()):
            block.add_tokens(tokens, orders, y)
    total *= F.silu(z.to(total.dtype))
    return total.div_(len(orders)).to(z.dtype)


def cross_backward(
    dout: Tensor, inputs: CrossInputs, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The eight gradients."""
    u, delta, A, B, C, D, z, delta_bias, orders = inputs
    scan = _cross(inputs)
    dtype = scan.A.dtype
    du, ddelta = (
        x.new_empty(x.shape) if need else None for x, need in ((u, needs[0]), (delta, needs[1]))
    )
    grads = _Grads.zeros(scan, du, ddelta, [*needs[2:6], needs[7], False])
    gate, total, memory = z.to(dtype), None, _Memory(scan.A)
    dy_tokens = F.silu(gate).mul_(dout).div_(len(orders))
    if needs[6]:
        total = scan.A.new_zeros(z.shape)
    for part, walk, _ in _walks(scan, memory):
        backward = _Backward(walk, part.of_grads(grads))
        for block in backward.blocks(need_output=total is not None):
            dy, y = block.room("dy"), None if total is None else block.room("y")
            block.take_tokens(part.of_tokens(dy_tokens), orders, dy.all)
            backward.run(block, dy, y)
            if total is not None and y is not None:
                block.add_tokens(part.of_tokens(total), orders, y.all)
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
    every: int  # steps between states that a forward keeps; a chunk has so many or a multiple
    threads: int  # that a chunk is cut for

    @cached_property
    def largest_rate(self) -> float:
        """Of |A|."""
        return self.A.abs().max().item() if self.A.numel() else 0.0

    def chunk(self) -> int:
        """Elements of a chunk of states."""
        return CHUNK * self.threads

    def parts(self) -> Iterator[_Part]:
        """Ranges of samples and channels of which a few steps' states fit a chunk."""
        groups, batch, _, dim = self.u.shape
        state = self.A.shape[-2]
        budget = max(1, self.chunk() // max(self.every, state // 4))  # elements of a step
        channels = _share(dim, budget // (groups * state))
        samples = _share(batch, budget // max(1, groups * state * channels))
        for sample in range(0, batch, samples):
            for channel in range(0, dim, channels):
                yield _Part(slice(sample, sample + samples), slice(channel, channel + channels))

    def cuts(self) -> list[_Cut]:
        """All steps: blocks of as many chunks as fit, the chunks left, the steps left."""
        groups, batch, length, dim = self.u.shape
        step, state = max(1, groups * batch * dim), self.A.shape[-2]
        size = max(self.chunk() // (step * state), self.every, state // 4)
        size = size // self.every * self.every
        size = min(size, max(length, 1))
        chunks = max(1, min(length, BLOCK // step) // size)
        blocks, rest = divmod(length // size, chunks)
        cuts, start = [], 0
        for shape in ((blocks, chunks, size), (1, rest, size), (1, 1, length % size)):
            stop = start + math.prod(shape)
            if stop > start:
                cuts.append(_Cut(slice(start, stop), *shape))
            start = stop
        return cuts

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
        """Of (G, B, L, D) or of a state, (G, B, N, D)."""
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


@dataclass(frozen=True)
class _Cut:
    """Successive steps of a scan: blocks of chunks of `size` steps."""

    steps: slice
    blocks: int
    chunks: int
    size: int

    def blocks_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """(G, B, L, X) as (chunks, G, B, S, X) for each block, views."""
        x = x[:, :, self.steps].unflatten(2, (self.blocks, self.chunks, self.size))
        return x.permute(2, 3, 0, 1, 4, 5).unbind()

    def chunks_of(self, x: Tensor) -> Tensor:
        """(G, B, L, X) as (all chunks, G, B, S, X), a view."""
        return x[:, :, self.steps].unflatten(2, (-1, self.size)).permute(2, 0, 1, 3, 4)


class _Chunks:
    """Chunks (n, G, B, S, X), those of each cut, in the views that operations with states take.

    Cutting a view takes about as long as computing in it, so each is cut once.

    Args:
        tensors: of each cut; or the same for all steps, (n, G, 1, S, N, D).
        axis: 4 for channels, which states have last, 5 for states.
    """

    def __init__(self, *tensors: Tensor, axis: int = 4) -> None:
        self.tensors, self.axis = tensors, axis
        self.fixed = any(x.ndim == 6 for x in tensors)

    @property
    def all(self) -> Tensor:
        """The only tensor."""
        (x,) = self.tensors
        return x

    @cached_property
    def factors(self) -> list[Tensor]:
        """Of each chunk, (G, B, S, 1, D) or (G, B, S, N, 1)."""
        wide = (x if x.ndim == 6 else x.unsqueeze(self.axis) for x in self.tensors)
        return [factor for x in wide for factor in x.unbind()]

    @cached_property
    def steps(self) -> list[tuple[Tensor, ...]]:
        """Of each chunk its steps, (G, B, 1, D); for a block alone, since they are many."""
        return [factor.unbind(2) for factor in self.factors]

    @cached_property
    def rows(self) -> list[Tensor]:
        """Of each chunk a row for each matrix of states, (G B S, 1, X)."""
        return [row for x in self.tensors for row in x.view(len(x), -1, 1, x.shape[-1]).unbind()]


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
        self.shaped: dict[tuple[str, tuple[int, ...]], _Chunks] = {}
        self.states: dict[tuple[int, ...], _States] = {}

    def room(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A contiguous buffer, the same memory for the same name; what it held is lost."""
        flat, size = self.flat.get(name), math.prod(shape)
        if flat is None or len(flat) < size:
            with torch.inference_mode(False):  # it may serve outside of that mode later
                flat = torch.empty(size, dtype=self.like.dtype, device=self.like.device)
            if size <= KEPT:
                self.flat[name] = flat
        return flat[:size].view(shape)

    def chunks(self, name: str, shape: tuple[int, ...]) -> _Chunks:
        """Room for a block, the same for the same name and shape."""
        if (name, shape) not in self.shaped:
            self.shaped[name, shape] = _Chunks(self.room(name, shape))
        return self.shaped[name, shape]

    def chunk(self, shape: tuple[int, ...]) -> _States:
        """Room for a chunk of states, the same for the same shape."""
        if shape not in self.states:
            self.states[shape] = _States(self, shape)
        return self.states[shape]


class _States:
    """Room for the states of a chunk, (G, B, S, N, D), and its views, each cut once.

    Args:
        memory: where it is put.
        shape: of the states.
    """

    def __init__(self, memory: _Memory, shape: tuple[int, ...]) -> None:
        self.memory, self.shape = memory, shape
        self.decay, self.states = memory.room("decay", shape), memory.room("states", shape)
        self.decay_steps, self.states_steps = self.decay.unbind(2), self.states.unbind(2)
        self.matrices = self.states.view(-1, *shape[-2:])  # (G B S, N, D)
        self.columns = self.matrices.mT
        # From the last step but one to the first, its states and the decays of the step after it.
        pairs = zip(self.states_steps[:-1], self.decay_steps[1:], strict=True)
        self.backwards = list(pairs)[::-1]

    @cached_property
    def rows(self) -> Tensor:
        """The states as (G B, S, N D)."""
        groups, batch, steps, state, dim = self.shape
        return self.states.view(groups * batch, steps, state * dim)

    @cached_property
    def arrived(self) -> Tensor:
        """For what is left of the state before, a_t h_{t-1}."""
        return self.memory.room("arrived", self.shape)

    @cached_property
    def rooms(self) -> tuple[tuple[Tensor, ...], ...]:
        """Of states, `arrived` and decays, each step's (G, B, N, D)."""
        return self.states_steps, self.arrived.unbind(2), self.decay_steps

    @cached_property
    def arrived_matrices(self) -> Tensor:
        """(G B S, N, D)."""
        return self.arrived.view(self.matrices.shape)

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


class _Walk:
    """The steps of a part in blocks of chunks, with the views of all inputs by block and chunk.

    Args:
        scan: the part.
        memory: where blocks are put, one after the other at the same places.
    """

    def __init__(self, scan: _Scan, memory: _Memory) -> None:
        self.scan, self.memory, self.cuts = scan, memory, scan.cuts()
        # Of each block its cut, the number of its first chunk, its steps.
        self.places: list[tuple[_Cut, int, slice]] = []
        first = 0
        for cut in self.cuts:
            span = cut.chunks * cut.size
            for start in range(cut.steps.start, cut.steps.stop, span):
                self.places.append((cut, first, slice(start, start + span)))
                first += cut.chunks
        self.u, self.delta = self.blocks(scan.u), self.blocks(scan.delta)
        self.reset: list[Tensor] | None = None  # of each chunk, (1, B, S, 1, 1)
        self.skip: list[Tensor] | None = None  # of each block, (chunks, 1, B, S, 1)
        B, C = scan.B, scan.C
        if scan.flags is not None:
            flags = scan.flags[None, ..., None]
            skip, reset = (flags & SKIP).bool(), (flags & RESET).bool()
            self.skip = self.blocks(skip)
            self.reset = [x for cut in self.cuts for x in cut.chunks_of(reset)[..., None].unbind()]
            B, C = (x if x.ndim == 5 else x.masked_fill(skip, 0.0) for x in (B, C))
        self.B, self.C = self.coefficients(B), self.coefficients(C)
        self._given_B = B

    @cached_property
    def B_steps(self) -> Tensor:  # noqa: N802
        """B by step, (L, G, B, N, 1), or (L, G, 1, N, D) where it is fixed."""
        B, length = self._given_B, self.scan.u.shape[2]
        if B.ndim == 5:
            return B[:, :, 0].expand(length, -1, -1, -1, -1)
        return B.permute(2, 0, 1, 3).contiguous()[..., None]

    def blocks(self, x: Tensor) -> list[Tensor]:
        """(G, B, L, X) as (chunks, G, B, S, X) for each block, views."""
        return [block for cut in self.cuts for block in cut.blocks_of(x)]

    def coefficients(self, x: Tensor) -> _Chunks:
        """B or C, (G, B, L, N), or the same for all steps, (G, 1, 1, N, D)."""
        if x.ndim == 4:
            return _Chunks(*(cut.chunks_of(x).contiguous() for cut in self.cuts), axis=5)
        counts = [(cut.blocks * cut.chunks, cut.size) for cut in self.cuts]
        return _Chunks(*(x[None].expand(n, -1, -1, size, -1, -1) for n, size in counts))

    def shape(self, number: int) -> tuple[int, ...]:
        """Of a block, (chunks, G, B, S, D)."""
        cut = self.places[number][0]
        groups, batch, _, dim = self.scan.u.shape
        return cut.chunks, groups, batch, cut.size, dim

    def __len__(self) -> int:
        return len(self.places)


class _Kept:
    """What the forward of a part keeps for its backward, the next `size` numbers of a tensor.

    Args:
        memory: flat.
        walk: the part's.
        gated: whether a gate multiplies the outputs.
    """

    def __init__(self, memory: Tensor, walk: _Walk, gated: bool) -> None:
        groups, batch, length, dim = walk.scan.u.shape
        states = length // walk.scan.every
        shapes: list[tuple[int, ...]] = [(groups, batch, walk.scan.A.shape[-2], dim)] * states
        if gated:
            shapes += [walk.shape(number) for number in range(len(walk))]
        sizes = [math.prod(shape) for shape in shapes]
        self.size = sum(sizes)
        pieces = memory[: self.size].split(sizes)
        views = [x.view(shape) for x, shape in zip(pieces, shapes, strict=True)]
        self.states = views[:states]  # before steps `every`, 2 `every`, ...
        self.outputs = [_Chunks(x) for x in views[states:]]  # of each block <C, h> + D u


class _Block:
    """Successive steps of a part of a scan, in chunks of S: (chunks, G, B, S, ...), as visited.

    What has no states is computed for all chunks at once.

    Args:
        walk: the part's.
        number: of the block; what another computed is lost.
    """

    def __init__(self, walk: _Walk, number: int) -> None:
        cut, self.first, self.place = walk.places[number]
        self.walk, self.scan, self.number, self.count = walk, walk.scan, number, cut.chunks
        scan = walk.scan
        self.shape = walk.shape(number)
        groups, batch, _, dim = scan.u.shape
        self.chunk = walk.memory.chunk((groups, batch, cut.size, scan.A.shape[-2], dim))
        self.skip = None if walk.skip is None else walk.skip[number]
        u, before = self.values(walk.u), self.values(walk.delta)
        if scan.bias is not None:
            before = torch.add(before, scan.bias, out=self.room("before").all)
        self.before, self.step, self.step_u = before, self.room("step"), self.room("step_u")
        self.tiny = torch.finfo(scan.A.dtype).tiny
        largest = self._compute_steps()
        # An exp that underflows takes a hundred times as long.
        self.underflow = largest * scan.largest_rate > -math.log(self.tiny)
        if self.skip is not None:
            u = u.masked_fill(self.skip, 0.0)
        self.u = u
        torch.mul(self.step.all, u, out=self.step_u.all)

    def _compute_steps(self) -> float:
        """The sizes of the steps; returns the largest.

        A step of size 0 of an input 0: what padding holds, even NaN, reaches nothing.
        """
        step = self.step.all
        if not self.scan.softplus:
            low, high = self.mask(step.copy_(self.before)).aminmax()
            return max(-low.item(), high.item())
        torch.exp(self.before, out=step).log1p_()  # in 0.6 of the time of `softplus`
        largest = self.mask(step).amax().item()
        if not math.isfinite(largest):  # the exp overflowed
            F.softplus(self.before, out=step)  # type: ignore[call-arg]
            largest = self.mask(step).amax().item()
        return largest

    @cached_property
    def B_steps(self) -> tuple[Tensor, ...]:  # noqa: N802
        """B of each step, (G, B, N, 1), or (G, 1, N, D) where it is fixed."""
        return self.walk.B_steps[self.place].unbind()

    def room(self, name: str) -> _Chunks:
        """A buffer (chunks, G, B, S, D)."""
        return self.walk.memory.chunks(name, self.shape)

    def values(self, blocks: Sequence[Tensor]) -> Tensor:
        """This block's of those of `_Walk.blocks`, in the precision that is computed in."""
        return blocks[self.number].to(self.scan.A.dtype)

    def put(
        self, blocks: Sequence[Tensor], function: Callable[..., Tensor], *values: Tensor
    ) -> None:
        """function(*values), 0 in padding, written to this one of the blocks."""
        into = blocks[self.number]
        if self.skip is None and into.dtype == self.scan.A.dtype:
            function(*values, out=into)
        else:
            into.copy_(self.mask(function(*values, out=self.room("spare").all)))

    def take_tokens(self, x: Tensor, orders: Tensor, chunks: Tensor) -> None:
        """What the orders (G, L) visit of x (B, L, D) at these steps, written to chunks."""
        for group, order in enumerate(orders[:, self.place]):
            for i, tokens in enumerate(order.view(self.count, -1)):
                torch.index_select(x, 1, tokens, out=chunks[i, group])

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
        decay = torch.mul(self.step.factors[i], self.scan.A, out=self.chunk.decay)
        if self.underflow:
            decay.clamp_(min=math.log(self.tiny)).exp_()
            torch.threshold_(decay, 2 * self.tiny, 0.0)
        else:
            decay.exp_()
        if self.walk.reset is not None:
            decay.masked_fill_(self.walk.reset[self.first + i], 0.0)

    def states(self, i: int, before: Tensor) -> None:
        """Compute h after each step of chunk i, and the decays, where the chunk has its room."""
        self.decays(i)
        chunk = self.chunk
        torch.mul(self.walk.B.factors[self.first + i], self.step_u.factors[i], out=chunk.states)
        for h, a in zip(chunk.states_steps, chunk.decay_steps, strict=True):
            h.addcmul_(a, before)
            before = h

    def states_and_arrived(self, i: int, before: Tensor) -> None:
        """Compute also a_t h_{t-1}."""
        self.decays(i)
        size = self.shape[3]
        B, step_u = self.B_steps[i * size : (i + 1) * size], self.step_u.steps[i]
        for h, arrived, a, b, x in zip(*self.chunk.rooms, B, step_u, strict=True):
            torch.mul(a, before, out=arrived)
            torch.addcmul(arrived, b, x, out=h)
            before = h

    def output(self, i: int, out: Tensor) -> None:
        """<C, h> of chunk i into (G B S, 1, D)."""
        self._sum_states(self.walk.C, i, out)

    def moved(self, i: int, out: Tensor) -> None:
        """<B, g> of chunk i, whose states gave way to g, into (G B S, 1, D)."""
        self._sum_states(self.walk.B, i, out)

    def _sum_states(self, x: _Chunks, i: int, out: Tensor) -> None:
        """B or C of chunk i times what is in the states' room, summed over N."""
        chunk = self.chunk
        if x.fixed:
            torch.mul(chunk.states, x.factors[self.first + i], out=chunk.spare)
            torch.sum(chunk.spare, 3, out=out.view(chunk.spare[:, :, :, 0].shape))
        else:
            torch.bmm(x.rows[self.first + i], chunk.matrices, out=out)

    def add_sums(self, into: Tensor | _Chunks, i: int, y: _Chunks) -> None:
        """y times what is in the states' room of chunk i, summed over D into a row of each matrix.

        Where `into` is (G, 1, 1, N, D), of a B or C that is the same for all steps, it is added.
        """
        chunk = self.chunk
        if isinstance(into, _Chunks):
            # A row times a transposed matrix is several times as fast as the matrix times a column.
            torch.bmm(y.rows[i], chunk.columns, out=into.rows[self.first + i])
        else:
            torch.mul(chunk.states, y.factors[i], out=chunk.spare)
            into += chunk.spare.sum((1, 2), keepdim=True)


class _Backward:
    """The backward of a part of a scan: `for block in blocks(): run(block, dy)`.

    Args:
        walk: the part's.
        grads: where its gradients go.
        end: (G, B, N, D), the last state's gradient; None: zeros.
        kept: states of `_outputs`, (G, B, N, D) each; none: they are computed again.
    """

    def __init__(
        self,
        walk: _Walk,
        grads: _Grads,
        end: Tensor | None = None,
        kept: Sequence[Tensor] = (),
    ) -> None:
        self.walk, self.scan, self.grads, self.kept, g = walk, walk.scan, grads, kept, grads
        self.carry = torch.zeros_like(self.scan.start()) if end is None else _copy(end)
        groups, batch, state, dim = self.carry.shape
        self.dA = None  # of each sample
        if g.A is not None:
            self.dA = self.carry.new_zeros(groups * batch, 1, state * dim)
        self.dB, self.dC = self._sums(g.B), self._sums(g.C)
        self.du, self.ddelta = (None if x is None else walk.blocks(x) for x in (g.u, g.delta))
        self.need_step = g.delta is not None or g.bias is not None
        self.need_decay = self.need_step or g.A is not None
        self.need_moved = self.need_step or g.u is not None
        self.need_gradient = (
            self.need_decay or self.need_moved or g.B is not None or g.initial is not None
        )
        self.need_states = self.need_decay or g.C is not None

    def _sums(self, x: Tensor | None) -> Tensor | _Chunks | None:
        """Room for the gradient of B or C."""
        if x is None or x.ndim == 5:
            return x
        return _Chunks(
            *(
                torch.empty_like(cut.chunks_of(x), memory_format=torch.contiguous_format)
                for cut in self.walk.cuts
            )
        )

    def blocks(self, need_output: bool) -> Iterator[_Block]:
        """The blocks from the last to the first; `need_output`: each will be `run` with a y."""
        walk, grads = self.walk, self.grads
        self.need_states |= need_output
        self.starts = [self.scan.start()]  # the state before each chunk
        if self.need_states and self.kept:
            sizes = (cut.size for cut, *_ in walk.places for _ in range(cut.chunks))
            edges = list(itertools.accumulate(sizes))
            self.starts += [self.kept[edge // self.scan.every - 1] for edge in edges[:-1]]
        elif self.need_states:
            for number in range(len(walk)):
                block = _Block(walk, number)
                for i in range(block.count - (number == len(walk) - 1)):
                    block.states(i, self.starts[-1])
                    self.starts.append(_copy(block.chunk.states_steps[-1]))
        for number in reversed(range(len(walk))):
            yield _Block(walk, number)
        if grads.initial is not None:
            grads.initial.copy_(self.carry)
        if grads.A is not None and self.dA is not None:
            samples = self.dA.view(self.carry.shape)
            grads.A += samples.sum(1)[:, None, None]
        for sums, into in ((self.dB, grads.B), (self.dC, grads.C)):
            if isinstance(sums, _Chunks) and into is not None:
                for cut, x in zip(walk.cuts, sums.tensors, strict=True):
                    cut.chunks_of(into).add_(x)

    def run(self, block: _Block, dy: _Chunks, y: _Chunks | None) -> None:
        """The gradients of a block.

        Args:
            block: the next that `blocks` gave.
            dy: (chunks, G, B, S, D), the gradient of <C, h> + D u; 0 in padding.
            y: gets <C, h> + D u; None: not needed.
        """
        moved, powers = block.room("moved"), block.room("powers")
        for i in reversed(range(block.count)):
            if self.need_states:
                block.states_and_arrived(i, self.starts.pop())
            elif self.need_gradient:
                block.decays(i)
            if y is not None:
                block.output(i, y.rows[i])
            if self.dC is not None:
                block.add_sums(self.dC, i, dy)
            if not self.need_gradient:
                continue
            self._gradients(block, i, dy.factors[i])
            if self.dB is not None:
                block.add_sums(self.dB, i, block.step_u)
            if self.need_moved:
                block.moved(i, moved.rows[i])
            if self.need_decay:
                self._decay_gradients(block, i, powers.rows[i])
        if y is not None and self.scan.D is not None:
            y.all.addcmul_(block.u, self.scan.D)
        self._finish(block, dy.all, moved.all, powers.all)

    def _gradients(self, block: _Block, i: int, dy: Tensor) -> None:
        """The states' gradients of chunk i, in the states' room; dy (G, B, S, 1, D)."""
        chunk = block.chunk
        torch.mul(self.walk.C.factors[block.first + i], dy, out=chunk.states)
        later = chunk.states_steps[-1].add_(self.carry)
        for g, a in chunk.backwards:
            later = g.addcmul_(a, later)
        torch.mul(chunk.decay_steps[0], later, out=self.carry)

    def _decay_gradients(self, block: _Block, i: int, powers: Tensor) -> None:
        """What goes through exp(d A) in chunk i; the states' gradients are lost.

        Sums are products with ones, which take a third of the time of `sum`.
        """
        chunk, (ones_state, ones_step) = block.chunk, block.chunk.ones
        q = chunk.arrived.mul_(chunk.states)
        if self.dA is not None:
            torch.mul(q, block.step.factors[i], out=chunk.states)
            self.dA.baddbmm_(ones_step, chunk.rows)
        if self.need_step:
            q.mul_(self.scan.A)
            torch.bmm(ones_state, chunk.arrived_matrices, out=powers)

    def _finish(self, block: _Block, dy: Tensor, moved: Tensor, powers: Tensor) -> None:
        """What needs no states."""
        scan, grads = self.scan, self.grads
        if grads.D is not None:
            grads.D += self._sum(torch.mul(dy, block.u, out=block.room("spare").all))
        if self.need_step:
            dstep = powers.addcmul_(moved, block.u)
            if scan.softplus:
                torch.ops.aten.softplus_backward.grad_input(
                    dstep, block.before, 1, 20, grad_input=dstep
                )
            block.mask(dstep)
            if grads.bias is not None:
                grads.bias += self._sum(dstep)
            if self.ddelta is not None:
                self.ddelta[block.number].copy_(dstep)
        if self.du is not None:
            if scan.D is None:
                block.put(self.du, torch.mul, moved, block.step.all)
            else:
                block.put(self.du, torch.addcmul, moved.mul_(block.step.all), dy, scan.D)

    @staticmethod
    def _sum(chunks: Tensor) -> Tensor:
        """(chunks, G, B, S, D) to (G, 1, 1, D)."""
        if chunks.shape[1] > 1:
            return chunks.sum((0, 2, 3))[:, None, None]
        rows = chunks.view(-1, chunks.shape[-1])
        return (rows.new_ones(1, len(rows)) @ rows)[None, None]


def _scan(inputs: ScanInputs, threads: int) -> _Scan:
    u, delta, A, B, C, D, _, bias, initial_state, flags, softplus, _ = inputs
    dtype, groups = _precision(u, delta, A, B, C), inputs.groups

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
        vector(bias),
        None if initial_state is None else _state(initial_state.to(dtype), groups),
        flags,
        softplus,
        _kept_every(u.shape[0], *A.shape),
        threads,
    )


def _cross(inputs: CrossInputs) -> _Scan:
    u, delta, A, B, C, D, _, bias, _ = inputs
    dtype = _precision(u, A)
    A, B, C, D, bias = (t.to(dtype) for t in (A, B, C, D, bias))
    A, D, bias = A.mT[:, None, None], D[:, None, None], bias[:, None, None]
    threads = torch.get_num_threads()
    return _Scan(u, delta, A, B, C, D, bias, None, None, True, STEPS, threads)


def _outputs(
    walk: _Walk, state: Tensor, kept: _Kept | None = None
) -> Iterator[tuple[_Block, Tensor]]:
    """<C, h> + D u of each block, (chunks, G, B, S, D); `state` becomes h after the last step.

    With a gate and `kept` they stand there, else where the next block's will.
    """
    scan = walk.scan
    before = last = scan.start()
    slots = iter(() if kept is None else kept.states)
    for number in range(len(walk)):
        block = _Block(walk, number)
        y = kept.outputs[number] if kept is not None and kept.outputs else block.room("y")
        for i in range(block.count):
            block.states(i, before)
            block.output(i, y.rows[i])
            last = block.chunk.states_steps[-1]
            if kept is None:
                before.copy_(last)
            else:
                for h in block.chunk.states_steps[scan.every - 1 :: scan.every]:
                    before = next(slots)
                    before.copy_(h)
        yield block, y.all if scan.D is None else y.all.addcmul_(block.u, scan.D)
    state.copy_(last)


def _walks(
    scan: _Scan, memory: _Memory, kept: Tensor | None = None, gated: bool = False
) -> Iterator[tuple[_Part, _Walk, _Kept | None]]:
    """Each part, its steps, and where its forward keeps what; `kept` is of `kept_size`."""
    if kept is not None:
        kept = kept[1:]  # the first is the number of threads
    for part in scan.parts():
        walk = _Walk(part.of_scan(scan), memory)
        ours = None
        if kept is not None:
            ours = _Kept(kept, walk, gated)
            kept = kept[ours.size :]
        yield part, walk, ours


def _flipped(inputs: ScanInputs) -> ScanInputs:
    """The last step first; a B or C that is the same for all steps as it is."""
    B, C = (x if x.ndim == 2 else x.flip(1) for x in (inputs.B, inputs.C))
    return inputs._replace(
        u=inputs.u.flip(1),
        delta=inputs.delta.flip(1),
        B=B,
        C=C,
        z=_flip(inputs.z),
        flags=_flip(inputs.flags),
    )


def _flip(x: Tensor | None) -> Tensor | None:
    """Steps, dimension 1, from the last."""
    return None if x is None else x.flip(1)


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
