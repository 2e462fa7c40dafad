"""The selective scan against float64: every gradient, every option, every implementation.

"triton" runs in Triton's interpreter where there is no GPU: a step of a program takes milliseconds
there, so its shapes are tiny and chosen for what they cross (blocks, groups, chunks).
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import scan_cpu
from kernels import selective_scan as module
from kernels.implementations import triton_interpreted
from kernels.reference import scan_ref, selective_scan_ref, step_flags
from kernels.selective_scan import (
    describe,
    selective_scan,
    selective_scan_fn,
    selective_state_update,
    warmup,
)

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(not scan_cpu.native_available(), reason="there is no compiler"),
)
TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        not (triton_interpreted() or torch.cuda.is_available()), reason="Triton is not installed"
    ),
)
CPU = ["torch", NATIVE]
EVERY = [*CPU, TRITON]
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _quick_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter patches the language at each call of a device function, milliseconds each.

    The launch has patched it already, but for Triton's own functions (`tl.sum`): those once.
    """
    if not triton_interpreted():
        return
    from triton.runtime import interpreter

    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        place = self.fn.__module__
        if place.startswith("triton.") and place not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(place)
        return self.rewrite()(*args, **kwargs)

    if hasattr(interpreter.InterpretedFunction, "rewrite"):
        monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


def make(
    batch: int,
    length: int,
    dim: int,
    state: int,
    *,
    groups: int | None = None,
    fixed: Sequence[str] = (),
    without: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    delta_scale: float = 0.5,
) -> Tensors:
    """Inputs by name; B and C fixed where named, (B, L, N) without groups."""
    torch.manual_seed(batch + 10 * length + dim + state)

    def rows() -> Tensor:
        shape = (batch, length, state) if groups is None else (batch, length, groups, state)
        return torch.randn(shape)

    inputs = {
        "u": torch.randn(batch, length, dim).to(dtype),
        "delta": (delta_scale * torch.randn(batch, length, dim)).to(dtype),
        "A": -torch.rand(dim, state) * 3 - 0.1,
        "B": torch.randn(dim, state) if "B" in fixed else rows(),
        "C": torch.randn(dim, state) if "C" in fixed else rows(),
        "D": torch.randn(dim),
        "z": torch.randn(batch, length, dim).to(dtype),
        "delta_bias": 0.5 * torch.randn(dim),
        "initial_state": torch.randn(batch, dim, state),
    }
    return {name: x for name, x in inputs.items() if name not in without}


def run(
    function: Callable[..., Any],
    inputs: Tensors,
    needed: Sequence[str] | None = None,
    flip: bool = False,
    **options: Any,
) -> Tensors:
    """Output, last state and the needed gradients of both together, by name.

    flip: the output gets the gradients of the other steps.
    """
    needed = [n for n in inputs if needed is None or n in needed]
    leaves = {n: x.detach().requires_grad_(n in needed) for n, x in inputs.items()}
    out, last = function(**leaves, return_last_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    dout, dlast = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (out, last)
    )
    pairs = [
        (x, dx)
        for x, dx in ((out, dout.flip(1) if flip else dout), (last, dlast))
        if x.requires_grad
    ]
    gradients = torch.autograd.grad(
        [x for x, _ in pairs], [leaves[n] for n in needed], [dx for _, dx in pairs]
    )
    return {"out": out.detach(), "last": last.detach(), **dict(zip(needed, gradients, strict=True))}


def ours(
    inputs: Tensors, implementation: str, needed: Sequence[str] | None = None, **options: Any
) -> Tensors:
    device = DEVICE if implementation == "triton" else torch.device("cpu")
    there = {n: x.to(device) for n, x in inputs.items()}
    options = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}
    actual = run(selective_scan, there, needed, implementation=implementation, **options)
    return {n: x.cpu() for n, x in actual.items()}


def reference(inputs: Tensors, needed: Sequence[str] | None = None, **options: Any) -> Tensors:
    packing = {n: options.pop(n, None) for n in ("position_ids", "seq_idx", "mask")}
    batch, length, _ = inputs["u"].shape
    flags = step_flags(batch, length, reverse=options.get("reverse", False), **packing)
    return run(scan_ref, inputs, needed, flags=flags, **options)


def assert_as_exact(actual: Tensors, inputs: Tensors, slack: float = 5e-6, **options: Any) -> None:
    """Our error is at most twice that of plain torch in this dtype, both against float64.

    And `slack` times the largest number, some roundings of fp32.
    """
    needed = [n for n in actual if n in NAMES]
    exact = reference({n: x.double() for n, x in inputs.items()}, needed, **options)
    plain = reference(inputs, needed, **options)
    for name, value in actual.items():
        expected = exact[name]
        assert value.shape == expected.shape, (name, value.shape, expected.shape)
        assert value.dtype == plain[name].dtype, (name, value.dtype, plain[name].dtype)
        if not value.numel():
            continue
        assert value.isfinite().all(), name
        error, allowed = ((x.double() - expected).abs().max().item() for x in (value, plain[name]))
        scale = expected.abs().max().item()
        assert error <= 2 * allowed + slack * scale, (name, error, allowed, scale)


def assert_equal(actual: Tensors, expected: Tensors, **tolerance: Any) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(
            value, expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


@pytest.mark.parametrize("implementation", CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "length", "dim", "state"),
    [
        (2, 33, 37, 16),
        (1, 197, 20, 16),  # the encoder's length
        (3, 1, 40, 5),  # one step
        (2, 33, 24, 1),  # one state
        (1, 5, 3, 256),  # as many as there can be
    ],
)
def test_forward_and_every_gradient(
    implementation: str, batch: int, length: int, dim: int, state: int, dtype: torch.dtype
) -> None:
    inputs = make(batch, length, dim, state, dtype=dtype)
    assert_as_exact(ours(inputs, implementation, delta_softplus=True), inputs, delta_softplus=True)


@pytest.mark.parametrize(
    ("batch", "length", "dim", "state", "dtype"),
    [
        (2, 6, 35, 16, torch.float32),  # two blocks of channels, the second with three of 32
        (1, 5, 3, 16, torch.bfloat16),
        (1, 5, 3, 16, torch.float16),
        (1, 1, 4, 5, torch.float32),
        (1, 3, 3, 1, torch.float32),
        (1, 2, 2, 3, torch.float32),
        (1, 2, 2, 20, torch.float32),  # more states than a thread holds
        (1, 2, 2, 256, torch.float32),
        (1, 33, 2, 4, torch.float32),
    ],
)
def test_triton_forward_and_every_gradient(
    batch: int, length: int, dim: int, state: int, dtype: torch.dtype
) -> None:
    inputs = make(batch, length, dim, state, dtype=dtype)
    # The interpreter cuts bf16 off where a GPU rounds.
    slack = 8e-3 if dtype == torch.bfloat16 else 5e-6
    actual = ours(inputs, "triton", delta_softplus=True)
    assert_as_exact(actual, inputs, slack, delta_softplus=True)


@pytest.mark.slow
@pytest.mark.parametrize("state", [5, 16])
def test_triton_at_the_encoders_length(state: int) -> None:
    inputs = make(1, 197, 5, state)
    assert_as_exact(ours(inputs, "triton", delta_softplus=True), inputs, delta_softplus=True)


@pytest.mark.parametrize("state", [1, 2, 3, 4, 8, 16, 32, 64])
def test_sums_over_lanes_by_shuffles(state: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs for dB and dC; the interpreter else takes a plain sum."""
    monkeypatch.setattr(module, "triton_interpreted", lambda: False)
    monkeypatch.setattr(module, "nvidia", lambda: torch.cuda.is_available())
    inputs = make(1, 3, 34, state)
    actual = ours(inputs, "triton", delta_softplus=True)
    assert_as_exact(actual, inputs, delta_softplus=True)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=4)))
def test_each_option_on_and_off(implementation: str, given: tuple[bool, ...]) -> None:
    optional = ("D", "z", "delta_bias", "initial_state")
    without = [n for n, there in zip(optional, given, strict=True) if not there]
    inputs = make(1, 3, 5, 4, without=without)
    for softplus in (False, True):
        if not softplus:
            inputs["delta"] = inputs["delta"].abs()
        actual = ours(inputs, implementation, delta_softplus=softplus)
        assert_as_exact(actual, inputs, delta_softplus=softplus)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize(
    ("groups", "fixed"), [(2, ""), (3, "B"), (None, "B"), (None, "C"), (None, "BC"), (1, "")]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_groups_and_fixed_projections(
    implementation: str, groups: int | None, fixed: str, reverse: bool
) -> None:
    inputs = make(2, 3, 6, 4, groups=groups, fixed=fixed)
    options = {"delta_softplus": True, "reverse": reverse}
    assert_as_exact(ours(inputs, implementation, **options), inputs, **options)


@pytest.mark.parametrize("implementation", EVERY)
def test_one_group_of_c_serves_all_groups_of_b(implementation: str) -> None:
    inputs = make(1, 3, 6, 4, groups=2)
    inputs["C"] = inputs["C"][:, :, :1]
    repeated = inputs | {"C": inputs["C"].expand(-1, -1, 2, -1)}
    actual = ours(inputs, implementation, delta_softplus=True)
    expected = ours(repeated, implementation, delta_softplus=True)
    torch.testing.assert_close(actual["out"], expected["out"])
    torch.testing.assert_close(actual["C"], expected["C"].sum(2, keepdim=True))


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("layout", ["channels first", "slices", "steps apart", "broadcast"])
def test_any_strides(implementation: str, layout: str) -> None:
    """Views give what their contiguous copies give, bit by bit, and are not written to."""
    inputs = make(2, 5, 6, 4)
    rows = ("u", "delta", "z")
    if layout == "channels first":
        views = {n: inputs[n].mT.contiguous().mT for n in (*rows, "B", "C")}
    elif layout == "slices":  # of what a mixer's projections give
        both = torch.cat([inputs["u"], inputs["z"]], dim=-1)
        three = torch.cat([inputs["delta"][..., :3], inputs["B"], inputs["C"]], dim=-1)
        views = {"u": both[..., :6], "z": both[..., 6:], "B": three[..., 3:7], "C": three[..., 7:]}
    elif layout == "steps apart":
        views = {n: torch.stack([inputs[n]] * 3, dim=2)[:, :, 1] for n in rows}
        views["A"] = inputs["A"].T.contiguous().T
        views |= {n: torch.stack([inputs[n]] * 2, 1)[:, 0] for n in ("D", "delta_bias")}
        views["initial_state"] = inputs["initial_state"].mT.contiguous().mT
    else:
        views = {n: inputs[n][:1, :1].expand(2, 5, -1) for n in (*rows, "B", "C")}
    whole = inputs | {n: x.contiguous() for n, x in views.items()}
    before = {n: x.clone() for n, x in views.items()}
    actual = ours(inputs | views, implementation, delta_softplus=True)
    assert_equal(actual, ours(whole, implementation, delta_softplus=True), rtol=0, atol=0)
    assert_equal(views, before, rtol=0, atol=0)
    assert_as_exact(actual, whole, delta_softplus=True)


PACKED = {
    "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 4, 5, 6]]),
    "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2, 3], [4, 4, 4, 4, 4, 4, 4]]),
}


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["position_ids", "seq_idx", "mask", "both"])
def test_packed_rows_and_padding(implementation: str, kind: str, reverse: bool) -> None:
    inputs = make(2, 7, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 0, 1, 1]]).bool()
    options: dict[str, Any] = {"delta_softplus": True, "reverse": reverse}
    if kind in PACKED:
        options[kind] = PACKED[kind]
    else:
        options["mask"] = mask
        if kind == "both":
            options["seq_idx"] = PACKED["seq_idx"]
    actual = ours(inputs, implementation, **options)
    assert_as_exact(actual, inputs, **options)
    if "mask" in options:
        assert not actual["out"][~mask].any(), "padding has an output"
        assert not actual["delta"][~mask].any(), "padding has a gradient"
        poisoned = inputs | {n: inputs[n].clone() for n in ("u", "delta", "B", "C", "z")}
        for name in ("u", "delta", "B", "C", "z"):
            poisoned[name][~mask] = torch.nan
        assert_equal(ours(poisoned, implementation, **options), actual, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_are_as_if_alone(implementation: str, reverse: bool) -> None:
    inputs = make(1, 7, 5, 4, without=["initial_state"])
    needed = ("u", "delta", "B", "C", "z")
    whole = run(
        selective_scan, inputs, needed, delta_softplus=True, reverse=reverse,
        position_ids=torch.tensor([0, 1, 2, 0, 1, 2, 3]), implementation=implementation,
    ) if DEVICE.type == "cpu" or implementation != "triton" else ours(
        inputs, implementation, needed, delta_softplus=True, reverse=reverse,
        position_ids=torch.tensor([0, 1, 2, 0, 1, 2, 3]),
    )  # fmt: skip
    for part in (slice(0, 3), slice(3, 7)):
        alone = {n: x[:, part] if n in needed else x for n, x in inputs.items()}
        leaves = {n: x.detach().requires_grad_(n in needed) for n, x in alone.items()}
        out = scan_ref(**leaves, delta_softplus=True, reverse=reverse)
        assert isinstance(out, Tensor)
        torch.testing.assert_close(whole["out"][:, part], out.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", EVERY)
def test_reverse_is_the_scan_of_the_flipped(implementation: str) -> None:
    inputs = make(2, 6, 5, 4)
    rows = ("u", "delta", "B", "C", "z")
    flipped = inputs | {n: inputs[n].flip(1) for n in rows}
    actual = ours(inputs, implementation, delta_softplus=True, reverse=True)
    expected = ours(flipped, implementation, delta_softplus=True, flip=True)
    expected |= {n: expected[n].flip(1) for n in ("out", *rows)}
    assert_equal(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", EVERY)
def test_states_hand_over_between_halves(implementation: str) -> None:
    """Two scans, the second from the first one's last state, are one, gradients included."""
    inputs = make(1, 7, 5, 4)
    rows = ("u", "delta", "B", "C", "z")

    def halves(return_last_state: bool, implementation: str, **tensors: Tensor) -> Any:
        rest = {n: x for n, x in tensors.items() if n not in (*rows, "initial_state")}
        state: Any = tensors["initial_state"]
        outs = []
        for part in (slice(0, 3), slice(3, 7)):
            out, state = selective_scan(
                **{n: tensors[n][:, part] for n in rows}, **rest, initial_state=state,
                delta_softplus=True, return_last_state=True, implementation=implementation,
            )  # fmt: skip
            outs.append(out)
        return torch.cat(outs, dim=1), state

    device = DEVICE if implementation == "triton" else torch.device("cpu")
    there = {n: x.to(device) for n, x in inputs.items()}
    actual = {n: x.cpu() for n, x in run(halves, there, implementation=implementation).items()}
    assert_as_exact(actual, inputs, delta_softplus=True)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("which", ["out", "last"])
def test_gradients_of_one_result_alone(implementation: str, which: str) -> None:
    inputs = make(1, 5, 5, 4)
    device = DEVICE if implementation == "triton" else torch.device("cpu")
    gradients = []
    for function, place, extra in (
        (selective_scan, device, {"implementation": implementation}),
        (scan_ref, torch.device("cpu"), {}),
    ):
        double = function is scan_ref
        leaves = {
            n: (x.double() if double else x.clone()).to(place).detach().requires_grad_()
            for n, x in inputs.items()
        }
        out, last = function(**leaves, delta_softplus=True, return_last_state=True, **extra)
        (out if which == "out" else last).square().sum().backward()
        gradients.append({n: x.grad for n, x in leaves.items()})
    for name, value in gradients[0].items():
        expected = gradients[1][name]
        if value is None or expected is None:  # C, D and z do not reach the last state
            assert expected is None or not expected.any(), name
            assert value is None or not value.any(), name
        else:
            torch.testing.assert_close(
                value.cpu().double(),
                expected,
                rtol=1e-4,
                atol=1e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize(
    "options", [{}, {"reverse": True}, {"position_ids": PACKED["position_ids"]}]
)
@pytest.mark.parametrize("fixed", ["", "BC"])
def test_chunks_make_no_difference(
    options: dict[str, Any], fixed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(2, 7, 5, 4, fixed=fixed)
    monkeypatch.setattr(module, "_chunk", lambda *_: 4)
    actual = ours(inputs, "triton", delta_softplus=True, **options)
    assert_as_exact(actual, inputs, delta_softplus=True, **options)
    monkeypatch.setattr(module, "_chunk", lambda *_: 8)
    whole = ours(inputs, "triton", delta_softplus=True, **options)
    assert_equal(actual, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "dim", "length", "chunked"),
    [(64, 768, 197, False), (32, 1024, 577, False), (8, 2048, 4096, False), (1, 2048, 65536, True)],
)
def test_few_long_sequences_are_chunked(
    batch: int, dim: int, length: int, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_processors", lambda _: 132)
    chunk = module._chunk(length, batch * module._blocks(dim, 1), torch.device("cuda"))
    assert (chunk < length) == chunked
    assert chunk % module.STEPS == 0 or not chunked


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_scan(implementation: str, batch: int, length: int) -> None:
    inputs = make(batch, length, 4, 3)
    actual = ours(inputs, implementation, delta_softplus=True)
    assert actual["out"].shape == (batch, length, 4)
    if not length:
        torch.testing.assert_close(actual["last"], inputs["initial_state"])
        exact = reference(inputs, ["initial_state"], delta_softplus=True)
        torch.testing.assert_close(actual["initial_state"], exact["initial_state"])
    for name, value in actual.items():
        assert not value.isnan().any(), name
        if name in ("A", "D", "delta_bias"):
            assert not value.any(), name


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize(
    ("delta_scale", "dtype"), [(30.0, torch.float32), (1e4, torch.float32), (30.0, torch.float16)]
)
def test_extreme_step_sizes(implementation: str, delta_scale: float, dtype: torch.dtype) -> None:
    inputs = make(1, 6, 5, 4, dtype=dtype, delta_scale=delta_scale)
    actual = ours(inputs, implementation, delta_softplus=True)
    assert_as_exact(actual, inputs, 2e-5, delta_softplus=True)


@pytest.mark.parametrize("implementation", EVERY)
def test_gradients_are_equal_bit_by_bit(implementation: str) -> None:
    inputs = make(2, 5, 34, 4)
    first = ours(inputs, implementation, delta_softplus=True)
    assert_equal(ours(inputs, implementation, delta_softplus=True), first, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("needed", [("u", "delta", "B", "C", "z"), *((n,) for n in NAMES)])
def test_only_needed_gradients_are_computed(implementation: str, needed: tuple[str, ...]) -> None:
    inputs = make(1, 5, 5, 4)
    actual = ours(inputs, implementation, needed, delta_softplus=True)
    assert_as_exact(actual, inputs, delta_softplus=True)
    rows = {"B", "C"}
    given = [x.unsqueeze(2) if n in rows else x for n, x in inputs.items()]
    device = DEVICE if implementation == "triton" else torch.device("cpu")
    given = [x.to(device) for x in given]
    kept = torch.empty(0, device=device)
    gradients = torch.ops.emrrg_kernels.selective_scan_bwd(
        torch.ones_like(given[0]), None, kept, *given, None, True, False,
        [n in needed for n in NAMES], implementation,
    )  # fmt: skip
    assert [x.shape for x in gradients] == [
        given[i].shape for i, n in enumerate(NAMES) if n in needed
    ]


def test_workspaces_of_unneeded_gradients_are_not_allocated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: list[tuple[int, ...]] = []
    allocate = module._workspace

    def note(like: Tensor, *shape: int) -> Tensor:
        shapes.append(shape)
        return allocate(like, *shape)

    monkeypatch.setattr(module, "_workspace", note)
    inputs = make(2, 3, 5, 4)
    ours(inputs, "triton", ("u",), delta_softplus=True)
    packed, tile = (2, 1, 4, 2, 4), (2, 5, 4)
    kept = module._kept_shape(2, 3, 5, 4, 1)
    assert sorted(shapes) == sorted([tile, kept, packed, packed])


@pytest.mark.parametrize("implementation", EVERY)
def test_the_forward_keeps_only_for_a_backward(implementation: str) -> None:
    inputs = make(1, 9, 5, 4)
    saved: list[int] = []

    def note(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    device = DEVICE if implementation == "triton" else torch.device("cpu")
    leaves = {n: x.to(device).requires_grad_() for n, x in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        selective_scan(**leaves, implementation=implementation)
    plain = 1 + 9 * 5  # the threads, what z multiplies; so few states are not worth keeping
    kept = {"triton": 3 * 4 * module._lanes(), "torch": plain}.get(implementation, 0)
    assert sorted(saved) == sorted([kept, *(x.numel() for x in inputs.values())])
    saved.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = selective_scan(**leaves, implementation=implementation)
    assert isinstance(out, Tensor) and not saved and not out.requires_grad


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("axis", ["batch", "steps", "channels", "states"])
def test_addresses_beyond_two_to_the_31(implementation: str, axis: str, tmp_path: Path) -> None:
    """Elements apart by more than int32 counts, in a file of which a few pages are stored."""
    if DEVICE.type == "cuda" and implementation == "triton":
        pytest.skip("the tensors lie in a file")
    torch.use_deterministic_algorithms(False)  # it would fill the file
    size = 2**31 + 2**20
    storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    inputs = make(2, 3, 2, 3, dtype=torch.float16)
    far = 2**30 + 4 if axis in ("steps", "states") else 2**31 + 4
    strides = {"batch": (far, 2, 1), "steps": (8, far, 1), "channels": (8, 2, far)}
    names = ("B", "C", "initial_state", "A") if axis == "states" else ("u", "delta", "z")
    inputs |= {n: inputs[n].half() for n in names}
    views = {}
    for i, name in enumerate(names):
        x = inputs[name]
        apart = strides.get(axis, (8, 2, far))[-x.ndim :]
        views[name] = storage.as_strided(x.shape, apart, 64 * i).copy_(x)
    actual = ours(inputs | views, implementation, delta_softplus=True)
    assert_equal(actual, ours(inputs, implementation, delta_softplus=True), rtol=0, atol=0)


@pytest.mark.parametrize("implementation", CPU)
def test_float64_where_an_input_is(implementation: str) -> None:
    inputs = {n: x.double() for n, x in make(1, 5, 5, 4).items()}
    if implementation == "native":
        with pytest.raises(ValueError, match="float64"):
            selective_scan(**inputs, implementation=implementation)
        return
    assert_equal(
        run(selective_scan, inputs, delta_softplus=True),
        reference(inputs, delta_softplus=True),
        rtol=1e-12,
        atol=1e-12,
    )


# The grid of mamba_ssm's own test of its scan, in our words: a drop-in passes it.


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("variable", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("dtype", "length"), [
    (torch.float32, 8), (torch.float32, 127), (torch.float16, 64), (torch.bfloat16, 65),
])  # fmt: skip
def test_drop_in_for_mamba_ssm(
    dtype: torch.dtype, length: int, variable: tuple[bool, bool], groups: int, skip: bool,
    gate: bool, bias: bool, softplus: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    batch, dim, state = 2, 4, 8
    rtol, atol = {
        torch.float32: (6e-4, 2e-3), torch.float16: (3e-3, 5e-3), torch.bfloat16: (3e-2, 5e-2)
    }[dtype]  # fmt: skip
    rtol_weights, atol_weights = max(rtol, 1e-3), max(atol, 1e-3)
    row = (batch, state, length) if groups == 1 else (batch, groups, state, length)
    given: dict[str, Tensor | None] = {
        "u": torch.randn(batch, dim, length, dtype=dtype),
        "delta": 0.5 * torch.rand(batch, dim, length, dtype=dtype),
        "A": -0.5 * torch.rand(dim, state),
        "B": torch.randn(row, dtype=dtype) if variable[0] else torch.randn(dim, state),
        "C": torch.randn(row, dtype=dtype) if variable[1] else torch.randn(dim, state),
        "D": torch.randn(dim) if skip else None,
        "z": torch.randn(batch, dim, length, dtype=dtype) if gate else None,
        "delta_bias": 0.5 * torch.rand(dim) if bias else None,
    }
    results = []
    for function in (selective_scan_fn, selective_scan_ref):
        leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in given.items()}
        out, last = function(**leaves, delta_softplus=softplus, return_last_state=True)
        torch.manual_seed(1)
        out.backward(torch.randn_like(out))
        gradients = {n: x.grad for n, x in leaves.items() if x is not None}
        results.append({"out": out.detach(), "last": last.detach(), **gradients})
    for name, value in results[0].items():
        weights = name in ("A", "B", "C", "D", "delta_bias")
        scale = 5 if weights or name == "last" else 2  # sums over the batch and the length
        torch.testing.assert_close(
            value, results[1][name],
            rtol=scale * (rtol_weights if weights else rtol),
            atol=scale * (atol_weights if weights else atol),
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("implementation", EVERY)
def test_steps_of_generation_are_the_scan(implementation: str) -> None:
    inputs = make(2, 4, 5, 4)

    def steps(return_last_state: bool, **tensors: Any) -> Any:
        state = tensors.pop("initial_state")
        rows = {n: tensors.pop(n) for n in ("u", "delta", "B", "C", "z")}
        outs = []
        for t in range(4):
            out, state = selective_state_update(
                state, **{n: x[:, t] for n, x in rows.items()}, **tensors,
                delta_softplus=True, implementation=implementation,
            )  # fmt: skip
            outs.append(out)
        return torch.stack(outs, dim=1), state

    device = DEVICE if implementation == "triton" else torch.device("cpu")
    there = {n: x.to(device) for n, x in inputs.items()}
    before = there["initial_state"].clone()
    actual = {n: x.cpu() for n, x in run(steps, there).items()}
    assert_as_exact(actual, inputs, delta_softplus=True)
    torch.testing.assert_close(there["initial_state"], before, rtol=0, atol=0)


# Operators


def operator_arguments(implementation: str, *, every: bool = True) -> tuple[Any, ...]:
    inputs = make(1, 3, 4, 3, groups=2)
    if not every:
        inputs |= dict.fromkeys(("D", "z", "delta_bias", "initial_state"))
    tensors = [None if x is None else x.requires_grad_() for x in inputs.values()]
    flags = step_flags(1, 3, mask=torch.tensor([[True, True, False]])) if every else None
    return (*tensors, flags, True, False, True, implementation)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("every", [False, True])
def test_opcheck(implementation: str, every: bool) -> None:
    if DEVICE.type == "cuda" and implementation == "triton":
        pytest.skip("the arguments are on the CPU")
    forward = operator_arguments(implementation, every=every)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if implementation == "torch":
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(module._scan_fwd, forward, test_utils=tests)
    with torch.no_grad():
        out, last, kept = module._scan_fwd(*forward)
    needs = [x is not None for x in forward[:9]]
    tensors = [None if x is None else x.detach() for x in forward[:10]]
    backward = (out, last, kept, *tensors, True, False, needs, implementation)
    torch.library.opcheck(module._scan_bwd, backward, test_utils=["test_schema", "test_faketensor"])


class Mixer(torch.nn.Module):
    """What a model wraps around the scan."""

    def __init__(self, dim: int = 6, state: int = 4, implementation: str | None = None) -> None:
        super().__init__()
        self.projections = torch.nn.Linear(dim, 3 * dim + 2 * state)
        self.A_log = torch.nn.Parameter(torch.randn(dim, state))
        self.D = torch.nn.Parameter(torch.ones(dim))
        self.dt_bias = torch.nn.Parameter(torch.randn(dim))
        self.implementation = implementation

    def forward(self, x: Tensor) -> Tensor:
        dim, state = self.A_log.shape
        u, delta, z, B, C = self.projections(x).split([dim, dim, dim, state, state], dim=-1)
        out = selective_scan(
            u, delta, -self.A_log.exp(), B, C, self.D, z, self.dt_bias,
            delta_softplus=True, implementation=self.implementation,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return x + out


def gradients_of(model: torch.nn.Module, x: Tensor) -> Tensors:
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("implementation", [None, "torch"])
def test_compile_without_graph_breaks(backend: str, implementation: str | None) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Mixer(implementation=implementation), torch.randn(2, 5, 6)
    expected = gradients_of(model, x)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), model(x))
    model.zero_grad()
    compiled(x).square().sum().backward()
    actual = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal(actual, expected)


def test_compile_with_changing_lengths_and_packing() -> None:
    torch._dynamo.reset()
    inputs = make(2, 5, 6, 4)

    def scan(position_ids: Tensor, **tensors: Tensor) -> Any:
        return selective_scan(**tensors, position_ids=position_ids, return_last_state=True)

    compiled = torch.compile(scan, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 8, 11):
        inputs = make(2, length, 6, 4)
        position_ids = torch.arange(length) % 4
        actual = compiled(position_ids, **inputs)
        torch.testing.assert_close(actual, scan(position_ids, **inputs))


def test_the_other_functions_compile_without_graph_breaks() -> None:
    """Channels first, and a step: values, new state and gradients."""
    inputs = make(2, 5, 6, 4, without=("initial_state",))
    first = {n: x.mT if n in ("u", "delta", "B", "C", "z") else x for n, x in inputs.items()}
    step = {n: x[:, 0] if n in ("u", "delta", "B", "C", "z") else x for n, x in inputs.items()}
    step["state"] = torch.randn(2, 6, 4)
    cases: list[tuple[Callable[..., Any], Tensors, dict[str, bool]]] = [
        (selective_scan_fn, first, {"delta_softplus": True, "return_last_state": True}),
        (selective_state_update, step, {"delta_softplus": True}),
    ]
    for function, tensors, options in cases:
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found = []
        for call in (function, compiled):
            leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
            out, state = call(**leaves, **options)
            (out.square().sum() + state.sum()).backward()
            found.append({"out": out, "state": state, **{n: x.grad for n, x in leaves.items()}})
        assert_equal(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("implementation", EVERY)
def test_autocast_changes_nothing(implementation: str) -> None:
    """The operator computes from what it is given; the state stays fp32."""
    inputs = make(1, 5, 5, 4)
    expected = ours(inputs, implementation, delta_softplus=True)
    with torch.autocast("cuda" if DEVICE.type == "cuda" else "cpu", dtype=torch.bfloat16):
        actual = ours(inputs, implementation, delta_softplus=True)
    assert_equal(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, x = Mixer(), torch.randn(2, 5, 6, requires_grad=True)
    expected = gradients_of(model, x)
    wrapped = functools.partial(checkpoint, model, use_reentrant=reentrant)
    model.zero_grad()
    wrapped(x).square().sum().backward()
    assert_equal({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize("implementation", EVERY)
def test_vmap(implementation: str) -> None:
    inputs = {n: x.to(DEVICE if implementation == "triton" else "cpu") for n, x in make(
        2, 3, 5, 4
    ).items()}  # fmt: skip
    names = ("u", "delta", "B", "C", "z", "initial_state")
    scan = functools.partial(selective_scan, delta_softplus=True, implementation=implementation)

    def one(*sample: Tensor) -> Any:
        rows = {n: x.unsqueeze(0) for n, x in zip(names, sample, strict=True)}
        return scan(**{**inputs, **rows})

    actual = torch.vmap(one)(*(inputs[n] for n in names))
    torch.testing.assert_close(actual.squeeze(1), scan(**inputs))


@pytest.mark.parametrize("implementation", EVERY)
def test_vmap_over_any_axis(implementation: str) -> None:
    """What it hands over are views: of vectors with gaps, of padding apart from row to row."""
    device = DEVICE if implementation == "triton" else torch.device("cpu")
    inputs = {n: x.to(device) for n, x in make(2, 3, 5, 4).items()}
    mask = torch.tensor([[[1, 1, 0], [0, 1, 1]], [[1, 0, 1], [1, 1, 1]]], device=device).bool()
    D = torch.stack([inputs["D"], -inputs["D"]], dim=1)

    def one(D: Tensor, mask: Tensor) -> Any:
        return selective_scan(**{**inputs, "D": D}, mask=mask, implementation=implementation)

    actual = torch.vmap(one, in_dims=1)(D, mask)
    for i in range(2):
        expected = one(D[:, i].contiguous(), mask[:, i].contiguous())
        torch.testing.assert_close(actual[i], expected, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", EVERY)
def test_gradients_of_each_sample(implementation: str) -> None:
    """More on torch.func is in test_transforms.py."""
    device = DEVICE if implementation == "triton" else torch.device("cpu")
    inputs = {n: x.to(device) for n, x in make(2, 2, 3, 2, without=["initial_state"]).items()}
    weights = ("A", "D", "delta_bias")

    def loss(function: Any, tensors: Tensors) -> Tensor:
        rows = {n: x if n in weights else x[None] for n, x in tensors.items()}
        return function(**rows, delta_softplus=True).square().sum()

    scan = functools.partial(selective_scan, implementation=implementation)
    axes = ({n: None if n in weights else 0 for n in inputs},)
    actual = torch.vmap(torch.func.grad(functools.partial(loss, scan)), axes)(inputs)
    for i in range(2):
        leaves = {n: x if n in weights else x[i] for n, x in inputs.items()}
        leaves = {n: x.cpu().double().requires_grad_() for n, x in leaves.items()}
        expected = torch.autograd.grad(loss(scan_ref, leaves), list(leaves.values()))
        for name, value in zip(leaves, expected, strict=True):
            torch.testing.assert_close(
                actual[name][i].cpu().double(), value, rtol=1e-4, atol=1e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )  # fmt: skip


_PROCESSES = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from kernels.causal_conv1d import causal_conv1d
from kernels.cross_scan import cross_scan
from test_selective_scan import Mixer, gradients_of

class Both(Mixer):  # a scan, then convolutions and scans in two orders of its output
    def __init__(self):
        super().__init__()
        self.taps = torch.nn.Parameter(torch.randn(2, 6, 4))
        self.A_logs = torch.nn.Parameter(torch.randn(2, 6, 4))
        self.register_buffer("orders", torch.tensor([[0, 1, 2, 3, 4], [4, 2, 0, 1, 3]]))

    def forward(self, x):
        y = super().forward(x)
        u = causal_conv1d(y, self.taps, None, self.orders)
        rows = u[..., :4]
        bias = self.dt_bias.expand(2, -1)
        return cross_scan(
            u, u, -self.A_logs.exp(), rows, rows, self.D.expand(2, -1), y, bias, self.orders
        )

def main(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6)
    model = Both()
    expected = gradients_of(model, x)
    state = {n: p.clone() for n, p in model.state_dict().items()}
    parallel = DistributedDataParallel(model)
    parallel.zero_grad()
    parallel(x[2 * rank:][:2]).square().sum().mul(2).backward()  # gradients are averaged
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], msg=lambda m: f"DDP {n}: {m}")
    sharded = Both()
    sharded.load_state_dict(state)
    mesh = dist.init_device_mesh("cpu", (2,))
    fully_shard(sharded, mesh=mesh)
    sharded(x[2 * rank:][:2]).square().sum().mul(2).backward()
    for n, p in sharded.named_parameters():
        whole = p.grad.full_tensor()
        torch.testing.assert_close(whole, expected[n], msg=lambda m: f"FSDP2 {n}: {m}")
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(main, (sys.argv[1],), nprocs=2)
"""


@pytest.mark.slow
def test_ddp_and_fsdp2(tmp_path: Path) -> None:
    script = tmp_path / "processes.py"
    script.write_text(textwrap.dedent(_PROCESSES))
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "rendezvous")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr


# Refusals


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"A": torch.randn(5, 4, dtype=torch.complex64)},
            TypeError,
            "A is torch.complex64; complex",
        ),
        ({"A": torch.randn(5, 257)}, ValueError, "expected 1 <= N <= 256"),
        ({"A": torch.randn(6, 4)}, ValueError, r"\(6, 4\), expected \(D, N\) = \(5, 4\)"),
        ({"u": torch.randn(7, 5)}, ValueError, r"u has shape \(7, 5\), expected \(B, L, D\)"),
        ({"delta": torch.randn(2, 6, 5)}, ValueError, r"delta has shape \(2, 6, 5\)"),
        ({"B": torch.randn(2, 7, 3)}, ValueError, r"B has shape \(2, 7, 3\), expected .* or"),
        ({"B": torch.randn(2, 7, 3, 4)}, ValueError, "B has 3 groups for 5 channels"),
        ({"D": torch.ones(5, dtype=torch.int64)}, TypeError, "D is torch.int64"),
        ({"initial_state": torch.randn(2, 4, 5)}, ValueError, "initial_state has shape"),
        ({"z": torch.randn(2, 7, 5, device="meta")}, ValueError, "z is on meta, u on cpu"),
        ({"mask": torch.ones(2, 7, device="meta")}, ValueError, "scan: mask on meta, u on cpu"),
        ({"implementation": "fast"}, ValueError, "unknown, choose one of"),
        ({"mask": torch.ones(2, 6)}, ValueError, "mask: shape"),
        ({"position_ids": torch.zeros(7), "seq_idx": torch.zeros(7)}, ValueError, "give one"),
    ],
)
def test_refusals_say_what_is_wrong(
    changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        selective_scan(**{**make(2, 7, 5, 4), **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"u": torch.randn(7, 5)}, "u has shape (7, 5), expected (B, D, L), and A (5, 4), exp"),
        ({"u": torch.randn(2, 7, 5)}, "u has shape (2, 7, 5) = (B, D, L) and A (5, 4) = (D, N)"),
        ({"delta": torch.randn(2, 7, 5)}, "delta has shape (2, 7, 5), expected (B, D, L) = (2, 5"),
        ({"B": torch.randn(2, 7, 4)}, "expected (B, N, L) = (2, 4, 7) or (D, N) = (5, 4) or (B, G"),
        ({"C": torch.randn(2, 3, 4, 7)}, "C has 3 groups for 5 channels"),
        ({"D": torch.randn(4)}, "D has shape (4,), expected (D,) = (5,)"),
        ({"z": torch.randn(2, 7, 5)}, "z has shape (2, 7, 5), expected (B, D, L) = (2, 5, 7)"),
        ({"z": torch.randn(2, 5, 7, device="meta")}, "z is on meta, u on cpu"),
    ],
)
def test_channels_first_is_refused_in_its_own_words(changed: dict[str, Any], message: str) -> None:
    made = make(2, 7, 5, 4, without=["initial_state"])
    first = {n: x.mT if n in ("u", "delta", "B", "C", "z") else x for n, x in made.items()}
    inputs = {**first, **changed}
    with pytest.raises(ValueError) as error:
        selective_scan_fn(**inputs)
    assert str(error.value).startswith("selective_scan_fn: ") and message in str(error.value)


def test_a_step_is_refused_in_its_own_words() -> None:
    inputs = make(2, 1, 6, 4, groups=2, without=["initial_state"])
    step = {n: x if n in ("A", "D", "delta_bias") else x[:, 0] for n, x in inputs.items()}
    for changed, message in (
        ({"state": torch.zeros(2, 4, 6)}, "state has shape (2, 4, 6), expected (B, D, N) = (2, 6"),
        ({"B": torch.randn(2, 2, 5)}, "expected (B, N) = (2, 4) or (B, G, N) = (2, 2, 4), because"),
        ({"B": torch.randn(6, 4)}, "B has shape (6, 4), expected (B, N) = (2, 4)"),
    ):
        with pytest.raises(ValueError) as error:
            selective_state_update(**{"state": torch.zeros(2, 6, 4), **step, **changed})
        assert str(error.value).startswith("selective_state_update: "), error.value
        assert message in str(error.value)


def test_groups_that_differ_are_refused() -> None:
    inputs = make(2, 7, 6, 4, groups=2)
    with pytest.raises(ValueError, match="B has 2 groups, C has 3"):
        selective_scan(**{**inputs, "C": torch.randn(2, 7, 3, 4)})
    with pytest.raises(ValueError, match=r"expected \(B, D\)"):
        selective_state_update(
            torch.zeros(2, 6, 4),
            inputs["u"],
            inputs["delta"],
            inputs["A"],
            inputs["B"],
            inputs["C"],
        )


def test_describe_says_what_runs() -> None:
    default = "native" if scan_cpu.native_available() else "torch"
    line = describe("cpu")
    assert line.startswith(f"selective_scan on cpu in float32: {default} (")
    assert "the default there" in line
    assert "torch (plain torch, because compiled code has no float64)" in describe(
        "cpu", torch.float64
    )
    assert describe("cpu", implementation="reference").endswith("asked for")
    if triton_interpreted():
        assert "in the interpreter" in describe("cpu", implementation="triton")
    with pytest.raises(ValueError, match="float64"):
        describe("cuda", torch.float64)


def test_warmup_runs_what_the_first_call_would(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("scan_forward", "scan_backward"):
        run_it = getattr(scan_cpu, name)

        def note(*args: Any, name: str = name, run_it: Any = run_it) -> Any:
            calls.append(name)
            return run_it(*args)

        monkeypatch.setattr(scan_cpu, name, note)
    warmup(5, torch.float32, "cpu")
    assert calls == ["scan_forward", "scan_backward"]
    warmup(5, torch.float32, "cpu", gate=False, gradients=False)
    assert calls == ["scan_forward", "scan_backward", "scan_forward"]
