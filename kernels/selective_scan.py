"""The selective scan of Mamba, forward and backward.

    d_t = softplus(delta_t + delta_bias)        softplus only where asked for
    h_t = exp(d_t A) h_{t-1} + d_t B_t u_t      a state of N numbers for each of D channels
    y_t = <C_t, h_t> + D u_t;                   out_t = y_t silu(z_t)

(Mamba, arXiv 2312.00752, equations 2 to 4 with the discretisation of its code.) The state is fp32
whatever the inputs are. `selective_scan_fn` has mamba_ssm's signature and layout (B, D, L);
`selective_scan` is native, (B, L, D), and can do more. Both are one `torch.library` operator,
``emrrg_kernels::selective_scan_fwd``, so that torch.compile sees no graph break.

Shapes: B batch, L length, D channels, N states, G groups of channels that share B and C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import scan_cpu
from kernels.implementations import choose
from kernels.reference import scan_ref, step_flags

LARGEST_STATE = 256
_NEEDS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@torch.library.custom_op(
    "emrrg_kernels::selective_scan_fwd",
    mutates_args=(),
    schema="(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_state, Tensor? flags, bool delta_softplus, bool reverse, "
    "str implementation) -> (Tensor, Tensor)",
)
def _scan_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, implementation = args
    with torch.autocast("cpu", enabled=False):
        return scan_cpu.scan_forward(implementation == "native", *inputs)


@_scan_fwd.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    u, delta, A = args[:3]
    wide = torch.promote_types(torch.promote_types(u.dtype, delta.dtype), torch.float32)
    out = u.new_empty(u.shape)
    return out, u.new_empty(u.shape[0], u.shape[2], A.shape[1], dtype=wide)


@torch.library.custom_op(
    "emrrg_kernels::selective_scan_bwd",
    mutates_args=(),
    schema="(Tensor? dout, Tensor? dlast, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? flags, "
    "bool delta_softplus, bool reverse, bool[] needs, str implementation) -> Tensor[]",
)
def _scan_bwd(*args: Any) -> list[Tensor]:
    *inputs, needs, implementation = args
    with torch.autocast("cpu", enabled=False):
        gradients = scan_cpu.scan_backward(implementation == "native", *inputs, tuple(needs))
    return [g.contiguous() for g in gradients if g is not None]


@_scan_bwd.register_fake
def _(dout: Any, dlast: Any, *args: Any) -> list[Tensor]:
    tensors, needs = args[: len(_NEEDS)], args[-2]
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, delta_softplus, reverse, implementation = inputs
    ctx.needs = list(ctx.needs_input_grad[: len(_NEEDS)])
    ctx.options = (delta_softplus, reverse)
    ctx.implementation = implementation
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    empty = (None,) * 4
    if dout is None and dlast is None:
        return (*(None for _ in ctx.needs), *empty)
    gradients = iter(
        _scan_bwd(dout, dlast, *ctx.saved_tensors, *ctx.options, ctx.needs, ctx.implementation)
    )
    return (*(next(gradients) if need else None for need in ctx.needs), *empty)


_scan_fwd.register_autograd(_backward, setup_context=_setup_context)


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
    """The selective scan in the native layout; see the module for the equation.

    Gradients flow to every floating input, through the last state too; those that nothing needs are
    not computed. They are the same bits from run to run.

    Args:
        u, delta: (B, L, D) fp32, fp16 or bf16 (fp64 by "torch" on the CPU), any strides.
        A: (D, N), N from 1 to 256. Negative for stability; not checked. Complex A is refused.
        B, C: (B, L, N) or (B, L, G, N), G a divisor of D; or (D, N) where they do not depend on
            the input.
        D, delta_bias: (D,).
        z: (B, L, D), gates the output by silu(z).
        delta_softplus: whether the step size passes through softplus, after the bias.
        initial_state: (B, D, N); None: zeros.
        return_last_state: also return the state after the last step visited.
        reverse: visit L-1 first and 0 last; outputs stay at their places.
        position_ids: (B, L) or (L,) integers, 0 where a sequence of a packed row begins.
        seq_idx: (B, L) or (L,) integers, the sequence that a step belongs to (instead of
            position_ids); the state does not pass from one to another.
        mask: (B, L) bool, False where there is padding: the state passes, the output is 0.
        implementation: see `kernels.implementations`; None follows the device.
    Returns:
        (B, L, D) in u's dtype; with `return_last_state` also (B, D, N) fp32 (fp64 for fp64).
    Raises:
        ValueError: shapes or devices disagree (the message names the tensor, expected and got), or
            an implementation that cannot run there.
        TypeError: a tensor that is not real floating point.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state)
    batch, length, _ = u.shape
    flags = step_flags(
        batch, length, reverse=reverse, position_ids=position_ids, seq_idx=seq_idx, mask=mask
    )
    tensors = (u, delta, A, B, C)
    widest = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else u.dtype
    chosen = choose(implementation, u.device, widest, "selective_scan")
    if chosen == "reference":
        return scan_ref(
            u, delta, A, B, C, D, z, delta_bias,
            delta_softplus=delta_softplus, initial_state=initial_state,
            return_last_state=return_last_state, reverse=reverse, flags=flags,
        )  # fmt: skip
    if B.ndim == 3:
        B = B[:, :, None]
    if C.ndim == 3:
        C = C[:, :, None]
    out, last = _scan_fwd(
        u, delta, A, B, C, D, z, delta_bias, initial_state, flags, delta_softplus, reverse, chosen
    )
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
    """The selective scan with mamba_ssm's signature, layout and meaning: a drop-in.

    Args:
        u, delta, z: (B, D, L), any strides.
        A: (D, N), real.
        B, C: (B, N, L) or (B, G, N, L), or (D, N) where they do not depend on the input.
        D, delta_bias: (D,).
        delta_softplus: whether the step size passes through softplus.
        return_last_state: also return the last state, which is differentiable.
    Returns:
        (B, D, L) in u's dtype; with `return_last_state` also (B, D, N) fp32.
    Raises:
        ValueError, TypeError: as `selective_scan`.
    """
    result = selective_scan(
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
    if isinstance(result, tuple):
        return result[0].mT, result[1]
    return result.mT


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
    """One step of the scan, for generation; trainable, so `state` is not written to.

    Args:
        state: (B, D, N).
        u, delta, z: (B, D).
        A: (D, N).
        B, C: (B, N) or (B, G, N).
        D, delta_bias: (D,).
        delta_softplus: whether the step size passes through softplus.
        implementation: see `kernels.implementations`.
    Returns:
        (B, D) in u's dtype, and the new state (B, D, N) fp32 (fp64 for fp64).
    Raises:
        ValueError, TypeError: as `selective_scan`.
    """
    out = selective_scan(
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
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    implementation: str | None = None,
) -> str:
    """Which implementation of the scan runs on tensors of a device and type, in one line.

    Raises:
        ValueError: none can run there.
    """
    device = torch.device(device)
    chosen = choose(implementation, device, dtype, "selective_scan")
    how = "asked for" if implementation else f"the default on {device.type}"
    return f"selective_scan: {chosen} ({how}, {str(dtype).removeprefix('torch.')})"


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    if A.is_complex() or B.is_complex() or C.is_complex():
        raise TypeError("selective_scan: A, B and C must be real; complex ones are not supported")
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(
            f"selective_scan: u has shape {tuple(u.shape)}, expected three axes, and A "
            f"{tuple(A.shape)}, expected (D, N)"
        )
    batch, length, dim = u.shape
    state = A.shape[1]
    if not 1 <= state <= LARGEST_STATE:
        raise ValueError(f"selective_scan: A has {state} states, expected 1 to {LARGEST_STATE}")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "delta": (delta, (batch, length, dim)),
        "A": (A, (dim, state)),
        "D": (D, (dim,)),
        "z": (z, (batch, length, dim)),
        "delta_bias": (delta_bias, (dim,)),
        "initial_state": (initial_state, (batch, dim, state)),
    }
    for name, tensor in (("B", B), ("C", C)):
        shape: tuple[int, ...] = (dim, state)
        if tensor.ndim == 3:
            shape = (batch, length, state)
        elif tensor.ndim == 4:
            groups = tensor.shape[2]
            shape = (batch, length, groups, state)
            if groups < 1 or dim % groups:
                raise ValueError(
                    f"selective_scan: {name} has {groups} groups, which do not divide {dim} channels"
                )
        expected[name] = (tensor, shape)
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"selective_scan: {name} has shape {tuple(tensor.shape)}, expected {shape}"
            )
        if tensor.device != u.device:
            raise ValueError(f"selective_scan: {name} is on {tensor.device}, u on {u.device}")
        if not tensor.is_floating_point():
            raise TypeError(f"selective_scan: {name} is {tensor.dtype}, expected floating point")
    if not u.is_floating_point():
        raise TypeError(f"selective_scan: u is {u.dtype}, expected floating point")
