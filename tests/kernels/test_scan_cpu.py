"""The CPU implementations against float64 autograd of the reference: results and every gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import scan_cpu, scan_torch
from kernels.inputs import CrossInputs, ScanInputs
from kernels.reference import (
    RESET,
    SKIP,
    causal_conv1d_ref,
    cross_scan_ref,
    scan_ref,
    step_flags,
    visiting_orders,
)

ROOT = Path(__file__).parents[2]
SCAN = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
CROSS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
CONV = ("x", "weight", "bias")
LOW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that is not written shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["native", "torch"])
def native(request: pytest.FixtureRequest) -> bool:
    """Both implementations."""
    if request.param == "native" and not scan_cpu.native_available():
        pytest.skip(f"native: {scan_cpu.native_error()}")
    return request.param == "native"


def compare(name: str, ours: Tensor | None, truth: Tensor | None) -> None:
    """fp32 against fp64, relative to the largest entry too: sums cancel."""
    assert (ours is None) == (truth is None), name
    if ours is None or truth is None:
        return
    truth = truth.detach()
    assert ours.shape == truth.shape, name
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    torch.testing.assert_close(
        ours.double(), truth, rtol=1e-4, atol=1e-5 * scale, msg=lambda m: f"{name}: {m}"
    )


def error(x: Tensor, truth: Tensor) -> float:
    """The largest difference."""
    return float((x.double() - truth).abs().max())


def leaves(tensors: Sequence[Tensor | None], dtype: torch.dtype) -> list[Any]:
    """Copies that autograd differentiates."""
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def gradients(
    out: Sequence[Tensor], inputs: Sequence[Tensor | None], douts: Sequence[Tensor]
) -> list[Tensor | None]:
    """Autograd's, zeros where an input has no part in the output."""
    real = [x for x in inputs if x is not None]
    found = iter(
        torch.autograd.grad(
            out, real, [d.to(o.dtype) for o, d in zip(out, douts, strict=True)], allow_unused=True
        )
    )
    result: list[Tensor | None] = []
    for x in inputs:
        gradient = None if x is None else next(found)
        result.append(torch.zeros_like(x) if x is not None and gradient is None else gradient)
    return result


# The scan.


@dataclass(frozen=True)
class Case:
    """A scan's sizes and options."""

    batch: int = 2
    length: int = 33
    dim: int = 20
    state: int = 16
    groups: int = 1
    C_groups: int = 0  # 0: as B
    fixed_B: bool = False  # noqa: N815
    fixed_C: bool = False  # noqa: N815
    D: bool = True
    z: bool = True
    bias: bool = True
    softplus: bool = True
    initial: bool = True
    flags: bool = False
    reverse: bool = False


CASES = {
    "plain": Case(D=False, z=False, bias=False, softplus=False, initial=False),
    "all": Case(),
    "all-reverse": Case(reverse=True),
    "all-flags": Case(flags=True),
    "all-flags-reverse": Case(flags=True, reverse=True),
    "no-gate": Case(z=False),
    "no-skip": Case(D=False),
    "no-bias": Case(bias=False),
    "one-step": Case(length=1),
    "one-step-reverse": Case(length=1, reverse=True),
    "no-steps": Case(length=0),
    "no-samples": Case(batch=0),
    "encoder-length": Case(length=197, batch=1),
    "chunks-of-the-backward": Case(length=300, batch=1, dim=3),  # native keeps 256 steps at N = 16
    "chunks-reverse-flags": Case(length=300, batch=1, dim=3, reverse=True, flags=True),
    "one-channel": Case(dim=1),
    "one-vector": Case(dim=16),
    "more-than-a-tile": Case(dim=80, length=9),
    "slabs": Case(dim=300, length=5),  # native adds up dB, dC of several ranges of channels
    "one-state": Case(state=1),
    "odd-states": Case(state=5),
    "states-past-a-vector": Case(state=18),
    "most-states": Case(state=256, length=40, batch=1, dim=3),
    "groups": Case(dim=60, groups=3),
    "groups-of-one-channel": Case(dim=6, groups=6),
    "groups-of-C-only": Case(dim=24, groups=1, C_groups=4),
    "groups-reverse-flags": Case(dim=40, groups=2, reverse=True, flags=True),
    "fixed-B": Case(fixed_B=True),
    "fixed-C": Case(fixed_C=True, state=5),
    "fixed-B-C": Case(fixed_B=True, fixed_C=True, flags=True, reverse=True),
    "fixed-B-groups-of-C": Case(fixed_B=True, groups=2),
}


def draw(case: Case, seed: int = 0) -> tuple[list[Tensor | None], Tensor | None]:
    """The nine inputs in float64, and flags."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    batch, length, dim, state = case.batch, case.length, case.dim, case.state
    u, delta = normal(batch, length, dim), normal(batch, length, dim)
    if not case.softplus:
        delta = 0.3 * delta.abs()
    A = -normal(dim, state).exp()
    B = normal(dim, state) if case.fixed_B else normal(batch, length, case.groups, state)
    groups = case.C_groups or case.groups
    C = normal(dim, state) if case.fixed_C else normal(batch, length, groups, state)
    D = normal(dim) if case.D else None
    z = normal(batch, length, dim) if case.z else None
    bias = normal(dim) if case.bias else None
    initial = normal(batch, dim, state) if case.initial else None
    flags = None
    if case.flags:
        flags = torch.randint(0, 4, (batch, length), generator=g).to(torch.uint8)
        flags *= torch.rand(batch, length, generator=g) < 0.3
    return [u, delta, A, B, C, D, z, bias, initial], flags


def reference(
    inputs: Sequence[Tensor | None], flags: Tensor | None, case: Case
) -> tuple[Tensor, Tensor]:
    """Output and last state of `scan_ref`."""
    result = scan_ref(
        *inputs[:8],  # type: ignore[arg-type]
        delta_softplus=case.softplus,
        initial_state=inputs[8],
        return_last_state=True,
        reverse=case.reverse,
        flags=flags,
    )
    assert isinstance(result, tuple)
    return result


def run(
    native: bool,
    case: Case,
    inputs: Sequence[Tensor | None],
    flags: Tensor | None,
    dout: Tensor | None,
    dlast: Tensor | None,
    needs: Sequence[bool] = (True,) * 9,
    keep: bool = False,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, ...]]:
    """Forward and backward of an implementation; keep: plain torch keeps what it can use again."""
    given = ScanInputs(*inputs, flags, case.softplus, case.reverse)  # type: ignore[arg-type]
    kept = None
    if keep:
        sizes = case.batch, case.length, case.dim, case.state
        precision = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32  # type: ignore[union-attr]
        size = scan_torch.kept_size(*sizes, inputs[6] is not None)
        kept = torch.full((size,), torch.nan, dtype=precision)
    forward = scan_cpu.scan_forward(native, given, kept)
    return forward, scan_cpu.scan_backward(native, dout, dlast, given, needs, kept)


def upstream(case: Case) -> tuple[Tensor, Tensor]:
    """Gradients of the output and of the last state."""
    g = torch.Generator().manual_seed(1)
    dout = torch.randn(case.batch, case.length, case.dim, generator=g)
    return dout, torch.randn(case.batch, case.dim, case.state, generator=g)


def check(native: bool, case: Case) -> None:
    """Forward and backward against float64."""
    inputs, flags = draw(case)
    low = [None if t is None else t.float() for t in inputs]
    truth = leaves(low, torch.float64)
    out, last = reference(truth, flags, case)
    dout, dlast = upstream(case)
    expected = gradients([out, last], truth, [dout, dlast])
    for keep in (False,) if native else (False, True):
        (our_out, our_last), ours = run(native, case, low, flags, dout, dlast, keep=keep)
        compare("out", our_out, out)
        compare("last state", our_last, last)
        for name, gradient, true in zip(SCAN, ours, expected, strict=True):
            compare(f"gradient of {name}, states kept: {keep}", gradient, true)


@pytest.mark.parametrize("name", CASES)
def test_scan(native: bool, name: str) -> None:
    """Forward, last state and all gradients, one reason a case."""
    check(native, CASES[name])


@pytest.mark.parametrize("name", ["all-flags-reverse", "groups", "fixed-B-C", "slabs"])
@pytest.mark.parametrize("chunk", [300, 4000])
def test_torch_in_small_pieces(monkeypatch: pytest.MonkeyPatch, name: str, chunk: int) -> None:
    """Ranges of samples and of channels, blocks and chunks, with a rest in each.

    Of the larger chunks states are kept more than STEPS apart.
    """
    monkeypatch.setattr(scan_torch, "CHUNK", chunk)
    monkeypatch.setattr(scan_torch, "BLOCK", 500)
    monkeypatch.setattr(scan_torch, "STEPS", 3)
    check(False, CASES[name])


@pytest.mark.parametrize("name", ["all-flags-reverse", "groups"])
@pytest.mark.parametrize("threads", [(1, 3), (3, 1)], ids=str)
def test_torch_with_other_threads_backward(
    monkeypatch: pytest.MonkeyPatch, name: str, threads: tuple[int, int]
) -> None:
    """Parts, blocks and chunks are of the size for the threads; what is kept must fit them."""
    monkeypatch.setattr(scan_torch, "CHUNK", 2000)
    monkeypatch.setattr(scan_torch, "BLOCK", 3000)
    before = torch.get_num_threads()

    def with_threads(function: Callable[..., Any], count: int) -> Callable[..., Any]:
        def run_with(*args: Any) -> Any:
            torch.set_num_threads(count)
            return function(*args)

        return run_with

    for function, count in zip(("scan_forward", "scan_backward"), threads, strict=True):
        monkeypatch.setattr(scan_cpu, function, with_threads(getattr(scan_cpu, function), count))
    try:
        check(False, CASES[name])
    finally:
        torch.set_num_threads(before)


def test_torch_in_float64() -> None:
    """float64 in, float64 throughout."""
    case = Case(length=12)
    inputs, flags = draw(case)
    truth = leaves(inputs, torch.float64)
    out, last = reference(truth, flags, case)
    dout, dlast = (t.double() for t in upstream(case))
    expected = gradients([out, last], truth, [dout, dlast])
    (our_out, our_last), ours = run(False, case, inputs, flags, dout, dlast)
    assert our_out.dtype == our_last.dtype == torch.float64
    torch.testing.assert_close(our_out, out, rtol=1e-12, atol=1e-12)
    for name, gradient, true in zip(SCAN, ours, expected, strict=True):
        torch.testing.assert_close(
            gradient, true, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )
    if scan_cpu.native_available():
        with pytest.raises(TypeError, match="float64"):
            scan_cpu.scan_forward(True, ScanInputs(*inputs, flags, True, False))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", ["all", "groups", "all-flags-reverse"])
def test_scan_in_half_precision(native: bool, dtype: torch.dtype, name: str) -> None:
    """At most twice the error of plain torch in that dtype, and as exact a last state."""
    case = CASES[name]
    inputs, flags = draw(case)
    half = [None if t is None else t.to(dtype) for t in inputs]
    for i in (2, 5, 7):  # as the models have them
        half[i] = None if half[i] is None else half[i].float()
    truth, plain = leaves(half, torch.float64), leaves(half, torch.float32)
    plain = [None if t is None else t.detach().requires_grad_() for t in half]
    out, last = reference(truth, flags, case)
    plain_out, plain_last = reference(plain, flags, case)
    dout, dlast = upstream(case)
    dout = dout.to(dtype)
    expected = gradients([out, last], truth, [dout, dlast])
    usual = gradients([plain_out, plain_last], plain, [dout, dlast])
    (our_out, our_last), ours = run(native, case, half, flags, dout, dlast)
    assert our_out.dtype == dtype
    assert error(our_out, out) <= 2 * error(plain_out, out)
    compare("last state", our_last, last)
    for name_, gradient, low, true, given in zip(SCAN, ours, usual, expected, half, strict=True):
        assert gradient is not None and low is not None and true is not None and given is not None
        assert gradient.dtype == given.dtype, name_
        scale = float(true.abs().max())
        assert error(gradient, true) <= 2 * error(low, true) + 1e-6 * scale, name_


@pytest.mark.parametrize("name", ["all-flags", "plain", "fixed-B-C", "groups-of-C-only"])
def test_only_what_is_needed(native: bool, name: str) -> None:
    """One gradient alone is what it is among all, and no other is returned."""
    case = CASES[name]
    inputs, flags = draw(case)
    low = [None if t is None else t.float() for t in inputs]
    dout, dlast = upstream(case)
    _, every = run(native, case, low, flags, dout, dlast)
    for i, name_ in enumerate(SCAN):
        _, alone = run(native, case, low, flags, dout, dlast, [j == i for j in range(9)])
        assert [j for j in range(9) if alone[j] is not None] == ([i] if low[i] is not None else [])
        whole = every[i]
        if whole is not None:
            compare(f"gradient of {name_} alone", alone[i], whole.double())
    assert run(native, case, low, flags, dout, dlast, [False] * 9)[1] == (None,) * 9


def test_one_upstream_gradient(native: bool) -> None:
    """A missing gradient of the output, or of the last state, is one of zeros."""
    case = Case(length=7)
    inputs, flags = draw(case)
    low = [None if t is None else t.float() for t in inputs]
    dout, dlast = upstream(case)
    for given, zeros in (
        ((None, dlast), (torch.zeros_like(dout), dlast)),
        ((dout, None), (dout, torch.zeros_like(dlast))),
    ):
        _, ours = run(native, case, low, flags, *given)
        _, expected = run(native, case, low, flags, *zeros)
        for name, a, b in zip(SCAN, ours, expected, strict=True):
            assert a is not None and b is not None
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    """Ways of holding the same numbers."""

    def channels_first(x: Tensor) -> Tensor:
        return x.transpose(1, -1).contiguous().transpose(1, -1)

    def every_second(x: Tensor) -> Tensor:
        wide = x.repeat_interleave(2, dim=-1)
        wide[..., 1::2] = SKIP if x.dtype == torch.uint8 else torch.nan
        return wide[..., ::2]

    def part(x: Tensor) -> Tensor:
        around = SKIP if x.dtype == torch.uint8 else torch.nan
        wide = torch.full([n + 3 for n in x.shape], around, dtype=x.dtype)
        view = wide[tuple(slice(1, n + 1) for n in x.shape)]
        view.copy_(x)
        return view

    def steps_first(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    return {f.__name__: f for f in (channels_first, every_second, part, steps_first)}


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_strides(native: bool, layout: str, dtype: torch.dtype, reverse: bool) -> None:
    """Any strides give the same results, and the tensors given stay as they are."""
    case = Case(length=37, dim=70, state=5, groups=2, reverse=reverse, flags=True)
    inputs, flags = draw(case)
    plain = [None if t is None else t.to(dtype) for t in inputs]
    dout, dlast = upstream(case)
    dout = dout.to(dtype)
    laid = layouts()[layout]
    strided = [None if t is None else laid(t) if t.ndim > 1 else t for t in plain]
    before = [None if t is None else t.clone() for t in strided]
    assert flags is not None
    (out, last), grads = run(native, case, plain, flags, dout, dlast)
    (our_out, our_last), ours = run(native, case, strided, laid(flags), laid(dout), laid(dlast))
    pairs = [("out", our_out, out), ("last", our_last, last), *zip(SCAN, ours, grads, strict=True)]
    for name, a, b in pairs:
        assert a is not None and b is not None
        exact = {"rtol": 0, "atol": 0} if native else {"rtol": 2e-2, "atol": 1e-5}
        torch.testing.assert_close(a, b, **exact, msg=lambda m, n=name: f"{n}: {m}")
    for name, given, kept in zip(SCAN, strided, before, strict=True):
        assert given is None or kept is None or torch.equal(given, kept), name


def test_expanded_inputs(native: bool) -> None:
    """Strides of 0: what an expanded or a summed tensor has."""
    case = Case(length=9, dim=18)
    inputs, flags = draw(case)
    low = [None if t is None else t.float() for t in inputs]
    assert low[1] is not None
    low[1] = low[1][:, :, :1].expand(-1, -1, 18)
    dout, dlast = torch.ones(1).expand(2, 9, 18), torch.ones(1).expand(2, 18, 16)
    solid = [None if t is None else t.contiguous() for t in low]
    expected = run(native, case, solid, flags, dout.contiguous(), dlast.contiguous())
    ours = run(native, case, low, flags, dout, dlast)
    for a, b in zip((*ours[0], *ours[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences(native: bool, reverse: bool) -> None:
    """A row of three sequences gives what each gives alone, gradients included."""
    case = Case(batch=1, length=29, initial=False, reverse=reverse)
    inputs, _ = draw(case)
    low = [None if t is None else t.float() for t in inputs]
    lengths = [7, 1, 21]
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    flags = step_flags(1, 29, reverse=reverse, seq_idx=numbers)
    dout, _ = upstream(case)
    (out, _), grads = run(native, case, low, flags, dout, None)
    begin = 0
    sums = dict.fromkeys(("A", "D", "delta_bias"), torch.zeros(()))
    for length in lengths:
        steps = slice(begin, begin + length)
        alone = [
            t[:, steps] if t is not None and i in (0, 1, 3, 4, 6) else t for i, t in enumerate(low)
        ]
        (own, _), own_grads = run(native, case, alone, None, dout[:, steps], None)
        torch.testing.assert_close(out[:, steps], own, rtol=1e-5, atol=1e-6)
        for name, whole, part in zip(SCAN, grads, own_grads, strict=True):
            if name in sums:
                sums[name] = sums[name] + part
            elif whole is not None:
                torch.testing.assert_close(
                    whole[:, steps], part, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
        begin += length
    for name, total in sums.items():
        torch.testing.assert_close(
            grads[SCAN.index(name)], total, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_may_hold_anything(native: bool, reverse: bool) -> None:
    """NaN in padding reaches no output, no gradient and no state; its own gradients are 0."""
    case = Case(length=20, reverse=reverse)
    inputs, _ = draw(case)
    low = [None if t is None else t.float() for t in inputs]
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, 13:], mask[1, :4] = False, False
    flags = step_flags(2, 20, mask=mask)
    assert flags is not None and set(flags.unique().tolist()) == {0, SKIP}
    dout, dlast = upstream(case)
    clean = run(native, case, low, flags, dout, dlast)
    for i in (0, 1, 3, 4, 6):
        padded = low[i]
        assert padded is not None
        padded[~mask] = torch.nan
    dirty_dout = dout.clone()
    dirty_dout[~mask] = 7.0
    ours = run(native, case, low, flags, dirty_dout, dlast)
    assert not ours[0][0][~mask].any()
    names = ("out", "last", *SCAN)
    for name, a, b in zip(names, (*ours[0], *ours[1]), (*clean[0], *clean[1]), strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")
        if name in ("u", "delta", "B", "C", "z"):
            assert not a[~mask].any(), name


def test_reset_forgets(native: bool) -> None:
    """Nothing from before a reset, not even an infinity, is seen after it."""
    case = Case(batch=1, length=6, D=False, z=False)
    inputs, _ = draw(case)
    low = [None if t is None else t.float() for t in inputs]
    flags = torch.tensor([[0, 0, 0, RESET, 0, 0]], dtype=torch.uint8)
    dout, dlast = upstream(case)
    _, grads = run(native, case, low, flags, dout * (torch.arange(6) > 2)[:, None], dlast)
    for name in ("u", "delta", "B"):
        gradient = grads[SCAN.index(name)]
        assert gradient is not None and not gradient[:, :3].any() and gradient[:, 3:].all(), name
    initial = grads[8]
    assert initial is not None and not initial.any()


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_extreme_delta(native: bool, size: float, dtype: torch.dtype) -> None:
    """No NaN where steps are huge, tiny or both; the exact value where it is finite."""
    case = Case(length=8, bias=False, initial=True, z=False, D=False)
    inputs, flags = draw(case)
    low = [None if t is None else t.to(dtype) for t in inputs]
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0])
    delta = (signs * min(size, torch.finfo(dtype).max / 4))[:, None].to(dtype).expand(2, 8, 20)
    low[1] = delta
    truth = leaves(low, torch.float64)
    out, last = reference(truth, flags, case)
    dout, dlast = upstream(case)
    expected = gradients([out, last], truth, [dout, dlast])
    (our_out, our_last), ours = run(native, case, low, flags, dout.to(dtype), dlast)
    pairs = [
        ("out", our_out, out),
        ("last", our_last, last),
        *zip(SCAN, ours, expected, strict=True),
    ]
    for name, a, b in pairs:
        if b is None:
            continue
        assert a is not None and not a.isnan().any(), name
        inside = b.abs() < torch.finfo(a.dtype).max / 4
        scale = float(b[inside].abs().max())
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert error(a[inside], b[inside]) <= tolerance * scale + 1e-37, name


@pytest.mark.parametrize("above", [[], [25.0, 87.0], [25.0, 90.0, 1e6, 1e30]], ids=str)
def test_softplus(native: bool, above: list[float]) -> None:
    """Relative error at most 2e-6 from -20 to 20, exact above; seen as the output of one step.

    The exp of 90 overflows, and what is done about it may concern its neighbours.
    """
    x = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor(above)])
    one = torch.ones(1, 1, len(x))
    ones = torch.ones(1, 1, 1, 1)
    A = -torch.ones(len(x), 1)
    inputs = ScanInputs(one, x[None, None], A, ones, ones, *[None] * 5, True, False)
    out, _ = scan_cpu.scan_forward(native, inputs)
    truth = torch.logaddexp(x.double(), torch.zeros(1, dtype=torch.float64))
    assert float((out[0, 0].double() / truth - 1).abs().max()) <= 2e-6
    assert torch.equal(out[0, 0, 4001:], x[4001:])
    slope = scan_cpu.scan_backward(native, one, None, inputs, [False, True] + [False] * 7)
    # of softplus alone: the decay acts on a state of 0
    assert slope[1] is not None
    ratio = slope[1][0, 0].double() / torch.sigmoid(x.double())
    assert float((ratio - 1).abs().max()) <= 2e-6


def test_decay(native: bool) -> None:
    """exp(d A) to the last bits, 1 exactly for a step of size 0, however often."""
    x = torch.cat([-torch.logspace(-6, 1.9, 2000), torch.zeros(1)])
    state = torch.ones(1, len(x), 1)
    zeros, one = torch.zeros(1, 1, len(x)), torch.zeros(1, 1, 1, 1)
    rest = (None, None, None, state, None, False, False)
    inputs = ScanInputs(zeros, torch.ones_like(zeros), x[:, None], one, one, *rest)
    _, last = scan_cpu.scan_forward(native, inputs)
    truth = x.double().exp()
    bound = 2e-7 + 1.2e-7 * x.double().abs()  # the argument is rounded too
    assert bool(((last[0, :, 0].double() / truth - 1).abs() <= bound).all())
    long = torch.zeros(1, 5000, 3)
    rows, state = one.expand(1, 5000, 1, 1), state[:, :3]
    inputs = inputs._replace(
        u=long, delta=long, A=-torch.ones(3, 1), B=rows, C=rows, initial_state=state
    )
    _, last = scan_cpu.scan_forward(native, inputs)
    assert torch.equal(last, state)


def test_same_bits_again(native: bool) -> None:
    """A second backward gives the same bits; "native" for any number of threads."""
    case = Case(batch=3, length=40, dim=200)
    inputs, flags = draw(case)
    low = [None if t is None else t.float() for t in inputs]
    dout, dlast = upstream(case)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = run(native, case, low, flags, dout, dlast)
        for count in (2, 2, 1, 3) if native else (2, 2):
            torch.set_num_threads(count)
            again = run(native, case, low, flags, dout, dlast)
            for a, b in zip((*again[0], *again[1]), (*first[0], *first[1]), strict=True):
                assert a is not None and b is not None and torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


# The cross scan.


def draw_cross(orders: Tensor, batch: int, dim: int, state: int) -> tuple[list[Tensor], Tensor]:
    """The eight inputs in float64, and the output's gradient in fp32."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    count, length = orders.shape
    big, small = (count, batch, length, dim), (count, batch, length, state)
    inputs = [normal(*big), normal(*big), -normal(count, dim, state).exp(), normal(*small)]
    inputs += [normal(*small), normal(count, dim), normal(batch, length, dim), normal(count, dim)]
    return inputs, torch.randn(batch, length, dim, generator=g)


ORDERS = {
    "2x3-cls": visiting_orders(2, 3, 3),
    "no-cls": visiting_orders(3, 4),
    "one-order": visiting_orders(5, 1)[:1],
    "three-orders": visiting_orders(3, 3, 0)[:3],
    "one-token": visiting_orders(1, 1),
    "encoder": visiting_orders(14, 14, 98),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("batch", "dim", "state"), [(2, 5, 16), (1, 70, 3)])
def test_cross(native: bool, name: str, batch: int, dim: int, state: int) -> None:
    """Forward and all gradients, together and each alone."""
    orders = ORDERS[name]
    inputs, dout = draw_cross(orders, batch, dim, state)
    low = [t.float() for t in inputs]
    truth = leaves(low, torch.float64)
    out = cross_scan_ref(*truth, orders)
    expected = gradients([out], truth, [dout])
    compare("out", scan_cpu.cross_forward(native, CrossInputs(*low, orders)), out)
    ours = scan_cpu.cross_backward(native, dout, CrossInputs(*low, orders), [True] * 8)
    for i, (which, gradient, true) in enumerate(zip(CROSS, ours, expected, strict=True)):
        compare(f"gradient of {which}", gradient, true)
        needs = [j == i for j in range(8)]
        alone = scan_cpu.cross_backward(native, dout, CrossInputs(*low, orders), needs)
        assert [g is not None for g in alone] == needs
        compare(f"gradient of {which} alone", alone[i], true)


def test_cross_of_long_sequences(native: bool) -> None:
    """More tokens than the backward keeps states of."""
    orders = visiting_orders(17, 17)
    inputs, dout = draw_cross(orders, 1, 3, 16)
    low = [t.float() for t in inputs]
    truth = leaves(low, torch.float64)
    expected = gradients([cross_scan_ref(*truth, orders)], truth, [dout])
    ours = scan_cpu.cross_backward(native, dout, CrossInputs(*low, orders), [True] * 8)
    for which, gradient, true in zip(CROSS, ours, expected, strict=True):
        compare(f"gradient of {which}", gradient, true)


@pytest.mark.parametrize("empty", ["samples", "steps"])
def test_empty_cross(native: bool, empty: str) -> None:
    """No samples or no steps: gradients of parameters are zeros."""
    orders = visiting_orders(2, 2) if empty == "samples" else torch.zeros(4, 0, dtype=torch.long)
    inputs, dout = draw_cross(orders, 0 if empty == "samples" else 2, 5, 3)
    low = [t.float() for t in inputs]
    assert scan_cpu.cross_forward(native, CrossInputs(*low, orders)).shape == dout.shape
    ours = scan_cpu.cross_backward(native, dout, CrossInputs(*low, orders), [True] * 8)
    for which, gradient, given in zip(CROSS, ours, low, strict=True):
        assert gradient is not None and gradient.shape == given.shape, which
        assert not gradient.any(), which


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_cross_in_half_precision(native: bool, dtype: torch.dtype) -> None:
    """At most twice plain torch's error; parameters, B and C are fp32 as the encoder has them."""
    orders = visiting_orders(4, 5, 10)
    inputs, dout = draw_cross(orders, 2, 12, 16)
    half = [t.to(dtype) if i in (0, 1, 6) else t.float() for i, t in enumerate(inputs)]
    dout = dout.to(dtype)
    truth = leaves(half, torch.float64)
    plain = [t.clone().requires_grad_() for t in half]
    out, low_out = cross_scan_ref(*truth, orders), cross_scan_ref(*plain, orders)
    expected, usual = gradients([out], truth, [dout]), gradients([low_out], plain, [dout])
    ours_out = scan_cpu.cross_forward(native, CrossInputs(*half, orders))
    assert ours_out.dtype == dtype
    assert error(ours_out, out) <= 2 * error(low_out, out)
    ours = scan_cpu.cross_backward(native, dout, CrossInputs(*half, orders), [True] * 8)
    for which, gradient, low, true in zip(CROSS, ours, usual, expected, strict=True):
        assert gradient is not None and low is not None and true is not None
        assert gradient.dtype == low.dtype, which
        scale = float(true.abs().max())
        assert error(gradient, true) <= 2 * error(low, true) + 1e-5 * scale, which


def test_cross_strides(native: bool) -> None:
    """Views of wider tensors, as a projection gives them; the same results again."""
    orders = ORDERS["2x3-cls"]
    inputs, dout = draw_cross(orders, 2, 20, 5)
    low = [t.float() for t in inputs]
    expected = scan_cpu.cross_backward(native, dout, CrossInputs(*low, orders), [True] * 8)
    wide = [torch.cat([t, torch.full_like(t, torch.nan)], dim=-1) for t in low]
    views = [w[..., : t.shape[-1]] for w, t in zip(wide, low, strict=True)]
    order_view = torch.stack([orders, orders], dim=-1)[..., 0]
    for _ in range(2):
        ours = scan_cpu.cross_backward(native, dout, CrossInputs(*views, order_view), [True] * 8)
        for which, a, b in zip(CROSS, ours, expected, strict=True):
            assert a is not None and b is not None
            exact = {"rtol": 0, "atol": 0} if native else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(a, b, **exact, msg=lambda m, n=which: f"{n}: {m}")


def test_orders_are_checked(native: bool) -> None:
    """A token that does not exist is refused: nothing is read or written outside the tensors."""
    orders = ORDERS["2x3-cls"].clone()
    inputs, dout = draw_cross(orders, 1, 5, 3)
    low = [t.float() for t in inputs]
    x, weight = torch.randn(1, 7, 5), torch.randn(4, 5, 4)
    for wrong in (7, -8):
        orders[2, 3] = wrong
        with pytest.raises((IndexError, RuntimeError)):
            scan_cpu.cross_forward(native, CrossInputs(*low, orders))
        with pytest.raises((IndexError, RuntimeError)):
            scan_cpu.cross_backward(native, dout, CrossInputs(*low, orders), [True] * 8)
        with pytest.raises((IndexError, RuntimeError)):
            scan_cpu.conv_forward(native, x, weight, None, orders, True)
        with pytest.raises((IndexError, RuntimeError)):
            scan_cpu.conv_backward(
                native, torch.ones(4, 1, 7, 5), x, weight, None, orders, True, [True] * 3
            )


# The convolution.


@pytest.mark.parametrize("name", ["2x3-cls", "one-token", "three-orders", "encoder"])
@pytest.mark.parametrize("width", [1, 2, 4, 5])
@pytest.mark.parametrize(("bias", "silu"), [(True, True), (False, False)])
def test_conv(native: bool, name: str, width: int, bias: bool, silu: bool) -> None:
    """Forward and all gradients, together and each alone."""
    orders = ORDERS[name]
    count, length = orders.shape
    g = torch.Generator().manual_seed(0)
    dim = 70 if name == "2x3-cls" else 5
    low = [torch.randn(2, length, dim, generator=g), torch.randn(count, dim, width, generator=g)]
    low.append(torch.randn(count, dim, generator=g))
    given = [*low[:2], low[2] if bias else None]
    dout = torch.randn(count, 2, length, dim, generator=g)
    truth = leaves(given, torch.float64)
    out = causal_conv1d_ref(*truth, orders, "silu" if silu else None)
    expected = gradients([out], truth, [dout])
    compare("out", scan_cpu.conv_forward(native, *given, orders, silu), out)
    ours = scan_cpu.conv_backward(native, dout, *given, orders, silu, [True] * 3)
    for i, (which, gradient, true) in enumerate(zip(CONV, ours, expected, strict=True)):
        compare(f"gradient of {which}", gradient, true)
        needs = [j == i for j in range(3)]
        alone = scan_cpu.conv_backward(native, dout, *given, orders, silu, needs)
        assert [g is not None for g in alone] == [n and true is not None for n in needs]
        compare(f"gradient of {which} alone", alone[i], true)


def test_torch_conv_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces shorter than the taps reach."""
    monkeypatch.setattr(scan_torch, "CHUNK", 100)
    monkeypatch.setattr(scan_torch, "STEPS", 2)
    test_conv(False, "2x3-cls", 5, True, True)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_conv_in_half_precision(native: bool, dtype: torch.dtype) -> None:
    """At most twice plain torch's error, from a view as the encoder gives it."""
    orders = visiting_orders(4, 5, 10)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 21, 40, generator=g).to(dtype)[..., :20]
    weight = torch.randn(4, 20, 4, generator=g).to(dtype)
    bias = torch.randn(4, 20, generator=g).to(dtype)
    given = [x, weight, bias]
    dout = torch.randn(4, 2, 21, 20, generator=g).to(dtype)
    truth, plain = leaves(given, torch.float64), [t.clone().requires_grad_() for t in given]
    out, low_out = (causal_conv1d_ref(*t, orders) for t in (truth, plain))
    expected, usual = gradients([out], truth, [dout]), gradients([low_out], plain, [dout])
    ours_out = scan_cpu.conv_forward(native, *given, orders, True)
    assert ours_out.dtype == dtype
    assert error(ours_out, out) <= 2 * error(low_out, out)
    ours = scan_cpu.conv_backward(native, dout, *given, orders, True, [True] * 3)
    for which, gradient, low, true in zip(CONV, ours, usual, expected, strict=True):
        assert gradient is not None and low is not None and true is not None
        assert gradient.dtype == dtype, which
        assert error(gradient, true) <= 2 * error(low, true), which


# Memory, and life without a compiler.

MEMORY = """
import json, re, torch
from kernels import scan_cpu
from kernels.inputs import ScanInputs
def resident(name):
    status = open("/proc/self/status").read()
    return int(re.search(name + r":\\s+(\\d+) kB", status)[1]) / 1024
torch.set_num_threads(1)
shape = (2, 1024, 512)
u, delta, z, dout = (torch.rand(shape) for _ in range(4))
A, B, C = -torch.rand(512, 64), torch.rand(2, 1024, 1, 64), torch.rand(2, 1024, 1, 64)
def both(native, cut):
    rows = [x[:, :cut] for x in (u, delta, B, C, z)]
    inputs = ScanInputs(*rows[:2], A, *rows[2:4], None, rows[4], None, None, None, True, False)
    kept = scan_cpu.scan_forward(native, inputs)
    return kept, scan_cpu.scan_backward(native, dout[:, :cut], None, inputs, [True] * 9)
result = []
for native in (True, False):
    both(native, 2)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = resident("VmRSS")
    both(native, 1024)
    result.append(resident("VmHWM") - before)
print(json.dumps(result))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident memory")
def test_memory() -> None:
    """Far from (B, L, D, N), 268 MB: u and delta take 4 MB each, their gradients as much."""
    if not scan_cpu.native_available():
        pytest.skip(f"native: {scan_cpu.native_error()}")
    native, plain = json.loads(python(MEMORY))
    assert 8 < native < 60, f"native: {native:.0f} MB"
    assert 8 < plain < 90, f"torch: {plain:.0f} MB"


def python(code: str, **environment: str) -> str:
    """What code prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_COMPILER = """
import torch
from kernels import scan_cpu
from kernels.inputs import ScanInputs
print(scan_cpu.native_available(), scan_cpu.native_error())
u, B = torch.rand(1, 3, 2), torch.rand(1, 3, 1, 4)
inputs = ScanInputs(u, u, -torch.rand(2, 4), B, B, *[None] * 5, True, False)
print(scan_cpu.scan_forward(False, inputs)[0].shape)
try:
    scan_cpu.scan_forward(True, inputs)
except RuntimeError as error:
    print(error)
"""


def test_without_a_compiler(tmp_path: Path) -> None:
    """No compiler and no build: the reason is given, and "torch" serves."""
    printed = python(
        WITHOUT_COMPILER,
        PATH=str(tmp_path),
        CXX="",
        XDG_CACHE_HOME=str(tmp_path),
        TMPDIR=str(tmp_path),
    ).splitlines()
    reason = "no C++ compiler: neither CXX nor c++, g++, clang++ is one"
    assert printed == [
        f"False {reason}",
        "torch.Size([1, 3, 2])",
        f"compiled CPU code: {reason}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["-march=x86-64", "-march=x86-64-v3", "-fno-openmp"])
def test_other_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str) -> None:
    """Narrower vectors, conversions without instructions for them, threads without OpenMP."""
    if not scan_cpu.native_available():
        pytest.skip(f"native: {scan_cpu.native_error()}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXXFLAGS", flags)
    monkeypatch.setattr(scan_cpu, "_loaded", None)
    assert scan_cpu.native_error() is None
    assert list(tmp_path.rglob("*.so"))
    for name in CASES:
        check(True, CASES[name])
    for dtype in LOW:
        test_scan_in_half_precision(True, dtype, "all")
        test_conv_in_half_precision(True, dtype)
    test_softplus(True, [25.0, 90.0, 1e6, 1e30])
    test_decay(True)
    test_same_bits_again(True)
    test_cross(True, "2x3-cls", 2, 5, 16)
