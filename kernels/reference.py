"""The truth: every operation of this package in plain torch, slow and obvious, in fp32 or fp64.

Tests and benchmarks compare with these functions; nothing fast calls them. Each computes in float64
where an input is float64 and in float32 otherwise, and autograd differentiates it.

The selective scan (Mamba, arXiv 2312.00752, equations 2 to 4 with the discretisation of its code):

    d_t = softplus(delta_t + delta_bias)        softplus only where asked for
    h_t = exp(d_t A) h_{t-1} + d_t B_t u_t      a state of N numbers for each of D channels
    y_t = <C_t, h_t> + D u_t;                   out_t = y_t silu(z_t)

Shapes: B batch, L length, D channels, N states, G groups of channels that share B and C, K visiting
orders, W taps of the convolution, I and O inputs and outputs of a linear layer, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

RESET, SKIP = 1, 2  # bits of `step_flags`


def visiting_orders(rows: int, columns: int, cls_position: int | None = None) -> Tensor:
    """The four orders in which a vision Mamba visits its tokens (EMRRG, SPEC of the ARM encoder).

    Row by row, that reversed, column by column, that reversed; the class token keeps its number and
    its place in the sequence.

    Args:
        rows: patch rows.
        columns: patch columns.
        cls_position: the class token's number, 0 to rows * columns; None: there is none.
    Returns:
        (4, L) int64; ``orders[k, t]`` is the number of the token visited at step t of order k. Each
        row is a permutation of 0 ... L-1.
    Raises:
        ValueError: no patches, or a class token outside the sequence.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns: {rows} x {columns} holds no patch")
    patches = rows * columns
    if cls_position is not None and not 0 <= cls_position <= patches:
        raise ValueError(f"cls_position: {cls_position} is not in 0 ... {patches}")
    grid = torch.arange(patches).view(rows, columns)
    visits = []
    for sequence in (grid.flatten(), grid.T.flatten()):
        if cls_position is not None:
            numbers = sequence + (sequence >= cls_position)  # the class token takes one number
            cls = numbers.new_tensor([cls_position])
            sequence = torch.cat([numbers[:cls_position], cls, numbers[cls_position:]])
        visits += [sequence, sequence.flip(0)]
    return torch.stack(visits)


def step_flags(
    batch: int,
    length: int,
    *,
    reverse: bool = False,
    position_ids: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor | None:
    """What the scan does at each step beside the recurrence, as bits.

    `RESET`: the state is zero before this step, because a new sequence of a packed row begins (in
    the direction of the scan). `SKIP`: a padding step; the state passes unchanged, the output is 0.

    Args:
        batch: B.
        length: L.
        reverse: the scan goes from the last step to the first.
        position_ids: (B, L) or (L,) integers, 0 where a sequence begins.
        seq_idx: (B, L) or (L,) integers, the number of the sequence that a step belongs to.
        mask: (B, L) bool, False where there is padding.
    Returns:
        (B, L) uint8, or None where nothing was given.
    Raises:
        ValueError: both position_ids and seq_idx, or a shape that does not fit.
    """
    if position_ids is None and seq_idx is None and mask is None:
        return None
    if position_ids is not None and seq_idx is not None:
        raise ValueError("position_ids and seq_idx: give one of them, they say the same")
    given = {"position_ids": position_ids, "seq_idx": seq_idx, "mask": mask}
    for name, tensor in given.items():
        if tensor is not None and tuple(tensor.shape) not in ((batch, length), (length,)):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected ({batch}, {length})")
    device = next(t for t in given.values() if t is not None).device
    flags = torch.zeros(batch, length, dtype=torch.uint8, device=device)
    if position_ids is not None:
        begins = (position_ids == 0).expand(batch, length)
        if reverse:  # seen from its end, a sequence begins just before the next one starts
            begins = torch.cat([begins[:, 1:], torch.zeros_like(begins[:, :1])], dim=1)
        flags = flags + RESET * begins
    if seq_idx is not None:
        row = seq_idx.expand(batch, length)
        changes = row[:, 1:] != row[:, :-1]
        same = torch.zeros_like(row[:, :1], dtype=torch.bool)
        pair = [changes, same] if reverse else [same, changes]
        flags = flags + RESET * torch.cat(pair, dim=1)
    if mask is not None:
        flags = flags + SKIP * (mask.expand(batch, length) == 0)
    return flags.to(torch.uint8)


def selective_scan_ref(
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
    """The selective scan in mamba_ssm's channels-first layout.

    Args:
        u, delta, z: (B, D, L).
        A: (D, N).
        B, C: (B, N, L) or (B, G, N, L), or (D, N) where they do not depend on the input.
        D, delta_bias: (D,).
        delta_softplus: whether the step size passes through softplus.
        return_last_state: also return h_L.
    Returns:
        (B, D, L) in u's dtype; with `return_last_state` also (B, D, N), fp32 or fp64.
    """

    def last(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.movedim(-1, 1)

    out = scan_ref(
        u.mT,
        delta.mT,
        A,
        B if B.ndim == 2 else B.movedim(-1, 1),
        C if C.ndim == 2 else C.movedim(-1, 1),
        D,
        last(z),
        delta_bias,
        delta_softplus=delta_softplus,
        return_last_state=return_last_state,
    )
    if isinstance(out, tuple):
        return out[0].mT, out[1]
    return out.mT


def scan_ref(
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
    flags: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan in the native layout, one step after another.

    Args:
        u, delta, z: (B, L, D).
        A: (D, N).
        B, C: (B, L, N) or (B, L, G, N), or (D, N) where they do not depend on the input.
        D, delta_bias: (D,).
        delta_softplus: whether the step size passes through softplus.
        initial_state: (B, D, N); None: zeros.
        return_last_state: also return the state after the last step visited.
        reverse: visit L-1 first and 0 last; outputs stay at their places.
        flags: (B, L) uint8 of `step_flags`.
    Returns:
        (B, L, D) in u's dtype; with `return_last_state` also (B, D, N), fp32 or fp64.
    """
    dtype = _precision(u, delta, A, B, C)
    batch, length, dim = u.shape
    state = A.shape[1]
    h = u.new_zeros(batch, dim, state, dtype=dtype)
    if initial_state is not None:
        h = initial_state.to(dtype)
    x, a = u.to(dtype), A.to(dtype)
    step = delta.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step)
    b, c = (_per_channel(t.to(dtype), batch, length, dim) for t in (B, C))
    outs: list[Tensor] = [x.new_zeros(batch, dim)] * length
    for t in reversed(range(length)) if reverse else range(length):
        if flags is not None:
            h = torch.where((flags[:, t] & RESET).bool()[:, None, None], 0.0, h)
        d = step[:, t, :, None]  # (B, D, 1)
        moved = torch.exp(d * a) * h + d * b[:, t] * x[:, t, :, None]
        y = (moved * c[:, t]).sum(-1)
        if D is not None:
            y = y + D.to(dtype) * x[:, t]
        if flags is not None:
            skip = (flags[:, t] & SKIP).bool()[:, None]
            moved = torch.where(skip[..., None], h, moved)
            y = torch.where(skip, 0.0, y)
        h = moved
        outs[t] = y
    out = torch.stack(outs, dim=1) if length else x
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return (out.to(u.dtype), h) if return_last_state else out.to(u.dtype)


def state_update_ref(
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
) -> tuple[Tensor, Tensor]:
    """One step of the scan.

    Args:
        state: (B, D, N).
        u, delta, z: (B, D).
        A: (D, N).
        B, C: (B, N) or (B, G, N).
        D, delta_bias: (D,).
        delta_softplus: whether the step size passes through softplus.
    Returns:
        (B, D) in u's dtype, and the new state (B, D, N), fp32 or fp64.
    """
    out = scan_ref(
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
    )
    return out[0][:, 0], out[1]


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    orders: Tensor,
    activation: str | None = "silu",
) -> Tensor:
    """Causal depthwise convolution along each visiting order.

        out[k, :, t] = act(bias_k + sum_w weight_k[:, w] x[:, orders[k, t - W + 1 + w]])

    with zeros before the first step. Results stand in the order of the visit, not of the tokens.

    Args:
        x: (B, L, D).
        weight: (K, D, W).
        bias: (K, D) or None.
        orders: (K, L) int64, each row a permutation of the tokens.
        activation: ``silu`` or None.
    Returns:
        (K, B, L, D) in x's dtype.
    """
    dtype = _precision(x, weight)
    width = weight.shape[-1]
    outs = []
    for k, order in enumerate(orders):
        padded = F.pad(x.to(dtype)[:, order], (0, 0, width - 1, 0))  # (B, W-1+L, D)
        mixed = sum(padded[:, w : w + x.shape[1]] * weight[k, :, w].to(dtype) for w in range(width))
        assert isinstance(mixed, Tensor)
        if bias is not None:
            mixed = mixed + bias[k].to(dtype)
        outs.append(F.silu(mixed) if activation == "silu" else mixed)
    return torch.stack(outs).to(x.dtype)


def cross_scan_ref(
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
    """The scans of a vision Mamba's visiting orders, summed in place and gated once.

        out = silu(z) / K * sum over k of y_k, each put back where its token stands

    Gating once after the sum is exact, because every order would gate with the same z.

    Args:
        u, delta: (K, B, L, D), in the order of the visit; delta before bias and softplus.
        A: (K, D, N).
        B, C: (K, B, L, N), in the order of the visit.
        D, delta_bias: (K, D).
        z: (B, L, D), by token.
        orders: (K, L) int64, each row a permutation of the tokens.
    Returns:
        (B, L, D) in z's dtype, by token.
    """
    total: Tensor | float = 0.0
    for k, order in enumerate(orders):
        y = scan_ref(
            u[k].to(_precision(u, A)),
            delta[k],
            A[k],
            B[k],
            C[k],
            D[k],
            None,
            delta_bias[k],
            delta_softplus=True,
        )
        assert isinstance(y, Tensor)
        total = total + torch.zeros_like(y).index_copy(1, order, y)
    assert isinstance(total, Tensor)
    return (total / len(orders) * F.silu(z.to(total.dtype))).to(z.dtype)


class LowRank(Protocol):
    """What `lora_linear_ref` reads of a slice: scale * B (A x) added to rows from `start`."""

    @property
    def A(self) -> Tensor: ...  # noqa: N802
    @property
    def B(self) -> Tensor: ...  # noqa: N802
    @property
    def scale(self) -> float: ...
    @property
    def start(self) -> int: ...


def lora_linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slices: Sequence[LowRank],
    keep: Sequence[Tensor] | None = None,
) -> Tensor:
    """A linear layer with low-rank updates of row ranges (LoRA, arXiv 2106.09685; Partial LoRA).

        y = x W^T + b;   y[..., start : start + R] += scale * ((x A^T) * keep) B^T

    Args:
        x: (..., I).
        weight: (O, I).
        bias: (O,) or None.
        slices: any number of updates, ranges may overlap.
        keep: for each slice (..., r), dropout's mask divided by the share kept; None: no dropout.
    Returns:
        (..., O) in x's dtype.
    """
    dtype = _precision(x, weight)
    y = x.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        y = y + bias.to(dtype)
    for i, low in enumerate(slices):
        inner = x.to(dtype) @ low.A.to(dtype).T
        if keep is not None:
            inner = inner * keep[i].to(dtype)
        added = low.scale * (inner @ low.B.to(dtype).T)
        y = y + F.pad(added, (low.start, weight.shape[0] - low.start - low.B.shape[0]))
    return y.to(x.dtype)


def _precision(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _per_channel(t: Tensor, batch: int, length: int, dim: int) -> Tensor:
    """B or C as (B, L, D, N), a view: fixed (D, N), shared (B, L, N), or by group (B, L, G, N)."""
    if t.ndim == 2:
        return t.expand(batch, length, *t.shape)
    if t.ndim == 3:
        return t[:, :, None].expand(-1, -1, dim, -1)
    return t.repeat_interleave(dim // t.shape[2], dim=2)
