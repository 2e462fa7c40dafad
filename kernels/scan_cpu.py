"""The scans and the convolution on the CPU: "native", compiled, and "torch", plain.

Plain tensors come in and go out; what is differentiated, registered and chosen stands in the files
that call this one. Equations and the plain implementation are in `kernels.scan_torch`, the compiled
one in ``scan_cpu.cpp``, which is built on first use (`kernels.native`). Both compute in fp32,
whatever the inputs ("torch" in fp64 where one is), take any strides, keep O(B L (D + N) + B D N)
memory and compute only what is asked for. Gradients are the same from run to run, and with "native"
for any number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import scan_torch
from kernels.inputs import CrossInputs, ScanInputs
from kernels.native import Library, load

SOURCE = Path(__file__).with_name("scan_cpu.cpp")
FUNCTIONS = (
    "emrrg_scan_forward",
    "emrrg_scan_backward",
    "emrrg_conv_forward",
    "emrrg_conv_backward",
)
MOST_STATES = 256
FLOAT_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_lock = threading.Lock()
_loaded: Library | None = None


def scan_forward(
    native: bool, inputs: ScanInputs, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The selective scan, see `kernels.reference.scan_ref`.

    Args:
        native: compiled code; else plain torch.
        inputs: the scan's.
        kept: flat, of `scan_torch.kept_size`, fp32 or fp64: gets what saves `scan_backward` work;
            plain torch alone.
    Returns:
        (B, L, D) in u's dtype, and the last state (B, D, N), fp32 or fp64.
    """
    inputs = _same_groups(inputs)
    if not native:
        return scan_torch.scan_forward(inputs, kept)
    u = inputs.u
    out = u.new_empty(u.shape)
    last = u.new_empty(u.shape[0], *inputs.A.shape, dtype=torch.float32)
    _scan_native(inputs, out=out, last=last)
    return out, last


def scan_backward(
    native: bool,
    dout: Tensor | None,
    dlast: Tensor | None,
    inputs: ScanInputs,
    needs: Sequence[bool],
    kept: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of `scan_forward`.

    Args:
        native, inputs: as there.
        dout: (B, L, D), the output's gradient; None: zeros.
        dlast: (B, D, N), the last state's; None: zeros.
        needs: which of the nine gradients to compute.
        kept: what the forward wrote there.
    Returns:
        Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state, each in its input's shape
        and dtype; None where it is not needed.
    """
    given = inputs.differentiable
    inputs = _same_groups(inputs)
    grads: Sequence[Tensor | None]
    if native:
        likes = inputs.differentiable
        grads = [_room(x, need) for x, need in zip(likes, needs, strict=True)]
        for i in (2, 3, 4, 5, 7, 8):
            grads[i] = _sum_room(likes[i], needs[i])
        if dout is None:
            dout = inputs.u.new_zeros(1).expand(inputs.u.shape)
        _scan_native(inputs, dout=dout, dlast=dlast, grads=grads)
    else:
        grads = scan_torch.scan_backward(dout, dlast, inputs, needs, kept)
    return tuple(_as(_of_groups(g, x), x) for g, x in zip(grads, given, strict=True))


def cross_forward(native: bool, inputs: CrossInputs) -> Tensor:
    """The scans of all visiting orders, summed and gated; `kernels.reference.cross_scan_ref`.

    Args:
        native: compiled code; else plain torch.
        inputs: the cross scan's.
    Returns:
        (B, L, D) in z's dtype.
    """
    if not native:
        return scan_torch.cross_forward(inputs)
    out = inputs.z.new_empty(inputs.z.shape)
    _cross_native(inputs, out=out)
    return out


def cross_backward(
    native: bool, dout: Tensor, inputs: CrossInputs, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of `cross_forward`.

    Args:
        native, inputs: as there.
        dout: (B, L, D), the output's gradient.
        needs: which of the eight gradients to compute.
    Returns:
        Gradients of u, delta, A, B, C, D, z, delta_bias, each in its input's shape and dtype; None
        where it is not needed.
    """
    if not native:
        return scan_torch.cross_backward(dout, inputs, needs)
    likes = inputs.differentiable
    grads = [_room(x, need) for x, need in zip(likes, needs, strict=True)]
    for i in (2, 5, 7):
        grads[i] = _sum_room(likes[i], needs[i])
    _cross_native(inputs, dout=dout, grads=grads)
    return tuple(_as(g, x) for g, x in zip(grads, likes, strict=True))


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
    if not native:
        return scan_torch.conv_forward(x, weight, bias, orders, silu)
    out = x.new_empty(len(orders), *x.shape)
    _conv_native(x, weight, bias, orders, silu, out=out)
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
    if not native:
        return scan_torch.conv_backward(dout, x, weight, bias, orders, silu, needs)
    dx, dweight = _room(x, needs[0]), _sum_room(weight, needs[1])
    dbias = _sum_room(bias, needs[2])
    _conv_native(x, weight, bias, orders, silu, dout=dout, grads=(dx, dweight, dbias))
    return dx, _as(dweight, weight), _as(dbias, bias)


def native_available() -> bool:
    """Whether compiled code can run here; on first use it is found or built."""
    return native_error() is None


def native_error() -> str | None:
    """Why `native_available` says no; None where it says yes."""
    return _library().error


# Compiled functions read structures of 8-byte numbers, in the order of scan_cpu.cpp.


def _library() -> Library:
    """The compiled functions, found or built on the first call of this process."""
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = load(SOURCE, FUNCTIONS)
    return _loaded


def _same_groups(inputs: ScanInputs) -> ScanInputs:
    """B and C with as many groups as the one with more."""
    B, C = inputs.B, inputs.C
    if B.ndim == 2 or C.ndim == 2 or B.shape[2] == C.shape[2]:
        return inputs
    B, C = (t.repeat_interleave(inputs.groups // t.shape[2], dim=2) for t in (B, C))
    return inputs._replace(B=B, C=C)


def _of_groups(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """A gradient of what `_same_groups` gives as that of what it got."""
    if gradient is None or like is None or gradient.shape == like.shape:
        return gradient
    return gradient.unflatten(2, (like.shape[2], -1)).sum(3)


def _as(x: Tensor | None, like: Tensor | None) -> Tensor | None:
    """x in the dtype of `like`."""
    return None if x is None or like is None else x.to(like.dtype)


def _call(name: str, fields: list[int]) -> None:
    failure = _library().call(f"emrrg_{name}", fields)
    if failure == 1:
        raise MemoryError(f"{name}: out of memory")
    if failure == 2:
        raise IndexError("orders: a number is not among those of the tokens, 0 ... L-1")


_ABSENT = [0] * 6  # a tensor's fields: address, type, strides of order, sample, step, channel


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _fields(x: Tensor | None, strides: Sequence[int], reverse: bool = False) -> list[int]:
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


def _room(x: Tensor | None, need: bool) -> Tensor | None:
    """A gradient that is wholly written."""
    return x.new_empty(x.shape) if need and x is not None else None


def _sum_room(x: Tensor | None, need: bool) -> Tensor | None:
    """A gradient in fp32: a sum over samples, zeros where there are none."""
    return x.new_zeros(x.shape, dtype=torch.float32) if need and x is not None else None


def _scan_native(
    inputs: ScanInputs,
    *,
    out: Tensor | None = None,
    last: Tensor | None = None,
    dout: Tensor | None = None,
    dlast: Tensor | None = None,
    grads: Sequence[Tensor | None] = (None,) * 9,
) -> None:
    """One call of scan_forward, or of scan_backward where there is no `out`."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, flags, softplus, reverse = inputs
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = grads
    groups = inputs.groups
    fixed_B, fixed_C = (_plain(t) if t.ndim == 2 else None for t in (B, C))
    A, D, delta_bias = _plain(A), _plain(D), _plain(delta_bias)  # type: ignore[assignment]
    initial_state, dlast = _plain(initial_state), _plain(dlast)
    batch, length, dim = u.shape
    state = A.shape[1]
    assert all(x is None or x.shape == u.shape for x in (delta, z, out, dout)), "(B, L, D)"
    assert all(
        x.shape == ((dim, state) if x.ndim == 2 else (batch, length, groups, state)) for x in (B, C)
    )
    assert len(A) == dim and dim % groups == 0 and state <= MOST_STATES
    assert all(x is None or x.shape == (dim,) for x in (D, delta_bias))
    assert all(x is None or x.shape == (batch, dim, state) for x in (initial_state, dlast))
    flag_fields = [0, 0, 0]
    if flags is not None:
        assert flags.shape == (batch, length) and flags.dtype == torch.uint8
        sample, step = flags.stride()
        flag_fields = [flags.data_ptr(), sample, step]
        if reverse:
            flag_fields = [flags.data_ptr() + (length - 1) * step, sample, -step]
    values = [1, batch, length, dim, state, groups, int(softplus), torch.get_num_threads()]
    for x in (u, delta, None if B.ndim == 2 else B, None if C.ndim == 2 else C, z, out, dout):
        values += _by_step(x, reverse)
    for x in (du, ddelta, dz, None if B.ndim == 2 else dB, None if C.ndim == 2 else dC):
        values += _by_step(x, reverse)
    plain = (
        A,
        D,
        delta_bias,
        initial_state,
        fixed_B,
        fixed_C,
        dlast,
        last,
        dA,
        dD,
        dbias,
        dinitial,
    )
    values += [_address(x) for x in plain]
    values += [_address(dB if B.ndim == 2 else None), _address(dC if C.ndim == 2 else None)]
    values += [*flag_fields, 0]
    _call("scan_backward" if out is None else "scan_forward", values)


def _cross_native(
    inputs: CrossInputs,
    *,
    out: Tensor | None = None,
    dout: Tensor | None = None,
    grads: Sequence[Tensor | None] = (None,) * 8,
) -> None:
    """One call of scan_forward, or of scan_backward where there is no `out`."""
    u, delta, A, B, C, D, z, delta_bias, orders = inputs
    du, ddelta, dA, dB, dC, dD, dz, dbias = grads
    A, D, delta_bias = _plain(A), _plain(D), _plain(delta_bias)  # type: ignore[assignment]
    orders = orders.to(torch.int64).contiguous()
    count, batch, length, dim = u.shape
    state = A.shape[2]
    assert delta.shape == u.shape and orders.shape == (count, length) and state <= MOST_STATES
    assert A.shape == (count, dim, state) and D.shape == delta_bias.shape == (count, dim)
    assert B.shape == C.shape == (count, batch, length, state)
    assert all(x is None or x.shape == (batch, length, dim) for x in (z, out, dout))
    values = [count, batch, length, dim, state, 1, 1, torch.get_num_threads()]
    for x in (u, delta, B, C):
        values += _by_order(x)
    values += [*_by_step(z), *_by_step(out), *_by_step(dout)]
    values += [*_by_order(du), *_by_order(ddelta), *_by_step(dz), *_by_order(dB), *_by_order(dC)]
    values += [_address(A), _address(D), _address(delta_bias), 0, 0, 0, 0]
    values += [0, _address(dA), _address(dD), _address(dbias), 0, 0, 0]
    values += [0, 0, 0, orders.data_ptr()]
    _call("scan_backward" if out is None else "scan_forward", values)


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
    orders = orders.to(torch.int64).contiguous()
    batch, length, dim = x.shape
    count = len(orders)
    assert orders.shape == (count, length) and weight.shape[:2] == (count, dim)
    assert bias is None or bias.shape == (count, dim)
    assert dout is None or dout.shape == (count, batch, length, dim)
    values = [count, batch, length, dim, weight.shape[2], int(silu), torch.get_num_threads()]
    values += [*_by_step(x), *_by_order(out), *_by_order(dout), *_by_step(dx)]
    values += [_address(t) for t in (weight, bias, dweight, dbias, orders)]
    _call("conv_backward" if out is None else "conv_forward", values)
