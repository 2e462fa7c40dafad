"""The cross scan against float64: every gradient, every implementation, operators and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import cross_scan as module
from kernels import scan_cpu
from kernels.cross_scan import cross_scan
from kernels.inputs import CrossInputs
from kernels.reference import cross_scan_ref, visiting_orders

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
CPU = [
    "torch",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not scan_cpu.native_available(), reason="there is no compiler"),
    ),
]
Tensors = list[Tensor]


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(
    count: int,
    batch: int,
    length: int,
    dim: int,
    state: int,
    *,
    dtype: torch.dtype = torch.float32,
    delta_scale: float = 1.0,
) -> tuple[Tensors, Tensor]:
    """Inputs as the vision mixer makes them (z a view, u and delta contiguous), random orders."""
    torch.manual_seed(count + 10 * length + dim + state)
    double = dtype if dtype == torch.float64 else torch.float32
    inputs = [
        torch.randn(count, batch, length, dim).to(dtype),
        (torch.randn(count, batch, length, dim) * delta_scale).to(dtype),
        -torch.rand(count, dim, state, dtype=double) * 4 - 0.1,
        torch.randn(count, batch, length, state, dtype=double),
        torch.randn(count, batch, length, state, dtype=double),
        torch.randn(count, dim, dtype=double),
        torch.randn(batch, length, 2 * dim).to(dtype)[..., dim:],
        torch.randn(count, dim, dtype=double) - 2,
    ]
    orders = torch.stack([torch.randperm(length) for _ in range(count)])
    return inputs, orders


def run(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    orders: Tensor,
    dout: Tensor,
    needed: Sequence[str] = NAMES,
    **options: Any,
) -> dict[str, Tensor]:
    """The output and the needed gradients by name."""
    leaves = {
        name: x.detach().requires_grad_(name in needed)
        for name, x in zip(NAMES, inputs, strict=True)
    }
    out = function(*leaves.values(), orders, **options)
    gradients = torch.autograd.grad(out, [leaves[name] for name in needed], dout)
    return {"out": out.detach(), **dict(zip(needed, gradients, strict=True))}


def assert_as_exact(
    actual: dict[str, Tensor],
    inputs: Sequence[Tensor],
    orders: Tensor,
    dout: Tensor,
    slack: float = 5e-6,
) -> None:
    """Our error is at most twice that of plain torch in this dtype, both against float64.

    And `slack` times the largest number, some roundings of fp32.
    """
    exact = run(cross_scan_ref, [x.double() for x in inputs], orders, dout.double())
    plain = run(cross_scan_ref, inputs, orders, dout)
    for name, value in actual.items():
        expected = exact[name]
        assert value.shape == expected.shape and value.dtype == plain[name].dtype, name
        error, allowed = ((x.double() - expected).abs().max().item() for x in (value, plain[name]))
        scale = expected.abs().max().item()
        assert error <= 2 * allowed + slack * scale, (name, error, allowed, scale)


@pytest.mark.parametrize("implementation", CPU)
@pytest.mark.parametrize(
    ("count", "batch", "length", "dim", "state"),
    [
        (4, 2, 33, 40, 16),  # the mixer's
        (4, 1, 197, 24, 16),  # its length
        (1, 3, 33, 70, 5),  # one order, channels and states off the blocks
        (4, 2, 1, 20, 16),  # one step
        (3, 2, 33, 17, 1),  # one state
        (2, 1, 7, 5, 100),  # many
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_every_gradient(
    implementation: str, count: int, batch: int, length: int, dim: int, state: int, dtype: Any
) -> None:
    inputs, orders = make(count, batch, length, dim, state, dtype=dtype)
    dout = torch.randn(batch, length, dim).to(dtype)
    actual = run(cross_scan, inputs, orders, dout, implementation=implementation)
    assert_as_exact(actual, inputs, orders, dout)
    again = run(cross_scan, inputs, orders, dout, implementation=implementation)
    for name, value in actual.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize(
    ("count", "batch", "length", "dim", "state", "parallel"),
    [
        (4, 1, 5, 33, 16, True),  # two blocks of channels in the forward, one in the backward
        (4, 1, 5, 33, 16, False),
        (2, 2, 6, 70, 5, False),  # states off the block, two chunks
        (1, 1, 33, 3, 1, False),  # one order, one state, nine chunks
        (1, 1, 1, 64, 33, True),  # one step; states in two warps
    ],
)
def test_kernels_forward_and_every_gradient(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    batch: int,
    length: int,
    dim: int,
    state: int,
    parallel: bool,
) -> None:
    monkeypatch.setattr(module, "_parallel", lambda *_: parallel)
    monkeypatch.setattr(module, "STEPS", 4)
    inputs, orders = make(count, batch, length, dim, state)
    dout = torch.randn(batch, length, dim)
    needed = [name for name in NAMES if name != "A" or parallel]  # A's gradient runs in parallel
    actual = run(cross_scan, inputs, orders, dout, needed, implementation="triton")
    assert_as_exact(actual, inputs, orders, dout)
    if length == 1:
        again = run(cross_scan, inputs, orders, dout, needed, implementation="triton")
        for name, value in actual.items():
            assert torch.equal(value, again[name]), name


def test_kernels_at_the_mixers_length() -> None:
    inputs, orders = make(1, 1, 197, 2, 3)
    out = cross_scan(*inputs, orders, implementation="triton")
    exact = cross_scan_ref(*(x.double() for x in inputs), orders)
    torch.testing.assert_close(out, exact.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_in_lower_precision(dtype: torch.dtype) -> None:
    inputs, orders = make(2, 1, 6, 20, 4, dtype=dtype)
    dout = torch.randn(1, 6, 20).to(dtype)
    actual = run(cross_scan, inputs, orders, dout, implementation="triton")
    # The interpreter cuts bits off where a GPU rounds.
    assert_as_exact(actual, inputs, orders, dout, slack=torch.finfo(dtype).eps)


def test_kernels_without_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, orders = make(1, 1, 4, 20, 16)
    dout = torch.randn(1, 4, 20)
    monkeypatch.setattr(module, "SCATTER", False)  # Triton 3.2
    actual = run(cross_scan, inputs, orders, dout, ["B", "C"], implementation="triton")
    assert_as_exact(actual, inputs, orders, dout)


@pytest.mark.parametrize("implementation", CPU)
def test_visiting_orders(implementation: str) -> None:
    inputs, _ = make(4, 2, 13, 20, 16)
    orders = visiting_orders(3, 4, cls_position=6)
    dout = torch.randn(2, 13, 20)
    actual = run(cross_scan, inputs, orders, dout, implementation=implementation)
    assert_as_exact(actual, inputs, orders, dout)


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
def test_any_strides(implementation: str) -> None:
    """Channels first, expanded, split from one tensor, and a gradient that is one number."""
    inputs, orders = make(2, 2, 5, 12, 4)
    u, delta, A, _, _, D, z, bias = inputs
    both = torch.randn(2, 2, 5, 10)
    strided = [
        u.mT.contiguous().mT,
        delta[:1].expand_as(delta),
        A.mT.contiguous().mT,
        both[..., 1:5],
        both[..., 6:],
        D[:, :1].expand_as(D),
        z.mT.contiguous().mT,
        bias.mT.contiguous().mT,
    ]
    dout = torch.randn(()).expand(2, 5, 12)
    actual = run(cross_scan, strided, orders.t().contiguous().t(), dout,
                 implementation=implementation)  # fmt: skip
    assert_as_exact(actual, strided, orders, dout)
    assert all(x.is_contiguous() for x in actual.values())


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
def test_rows_further_apart_than_32_bits_count(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps 2^31 elements apart, in memory that is reserved and never touched between them."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    inputs, orders = make(1, 1, 2, 3, 2, dtype=torch.bfloat16)
    dout = torch.randn(1, 2, 3).to(torch.bfloat16)
    expected = run(cross_scan, inputs, orders, dout, implementation=implementation)
    far = []
    for x in (*inputs, dout):
        if x.dim() > 2 and x.shape[-2:] == (2, 3):
            room = torch.empty(2**31 + 64, dtype=x.dtype)
            spread = room.as_strided(x.shape, (*[0] * (x.dim() - 2), 2**31, 1))
            far.append(spread.copy_(x))
        else:
            far.append(x)
    actual = run(cross_scan, far[:-1], orders, far[-1], implementation=implementation)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
def test_an_empty_batch(implementation: str) -> None:
    inputs, orders = make(2, 0, 5, 8, 4)
    actual = run(cross_scan, inputs, orders, torch.randn(0, 5, 8), implementation=implementation)
    assert actual["out"].shape == (0, 5, 8)
    for name, x in zip(NAMES, inputs, strict=True):
        assert torch.equal(actual[name], torch.zeros_like(x)), name


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
@pytest.mark.parametrize("scale", [30.0, 1e-3])
def test_extreme_steps(implementation: str, scale: float) -> None:
    """delta from -90 to 90: exp(d A) is 1 or 0, softplus 0 or linear, and nothing overflows."""
    inputs, orders = make(2, 1, 7, 12, 4, delta_scale=scale)
    if scale < 1:
        inputs[7] -= 12  # all steps are tiny, where log(1 + e^x) would lose its digits
    dout = torch.randn(1, 7, 12)
    actual = run(cross_scan, inputs, orders, dout, implementation=implementation)
    # Where a long step precedes a short one the kernels' r loses as many digits as d |A| has.
    longest = 90 * 4 if scale > 1 else 1
    assert_as_exact(actual, inputs, orders, dout, slack=max(5e-6, 2**-24 * longest))


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
@pytest.mark.parametrize(
    "needed", [["u"], ["delta_bias"], ["A"], ["B"], ["C"], ["D"], ["z"], ["u", "delta", "B", "C"]]
)
def test_only_needed_gradients_are_computed(
    implementation: str, needed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, orders = make(2, 1, 4, 10, 3)
    dout = torch.randn(1, 4, 10)
    asked: list[list[bool]] = []

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            asked.append(list(args[-1]))
            return function(*args)

        return noted

    monkeypatch.setattr(scan_cpu, "cross_backward", spy(scan_cpu.cross_backward))
    monkeypatch.setattr(module, "_launch_bwd", spy(module._launch_bwd))
    actual = run(cross_scan, inputs, orders, dout, needed, implementation=implementation)
    assert asked == [[name in needed for name in NAMES]]
    assert_as_exact(actual, inputs, orders, dout)


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
def test_nothing_is_saved_where_nothing_needs_a_gradient(implementation: str) -> None:
    inputs, orders = make(2, 1, 3, 8, 2)
    saved: Tensors = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = cross_scan(*inputs, orders, implementation=implementation)
        assert not out.requires_grad and not saved
        inputs[0].requires_grad_()
        cross_scan(*inputs, orders, implementation=implementation)
    # The inputs and no more: neither states nor the sum before the gate.
    mine = {x.untyped_storage().data_ptr() for x in (*inputs, orders)}
    assert saved and all(x.untyped_storage().data_ptr() in mine for x in saved)


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
def test_operator_rules(implementation: str) -> None:
    """`opcheck`: schema, fake tensors with the strides of real ones, autograd, aot_dispatch."""
    length = 1 if implementation == "triton" else 3
    inputs, orders = make(2, 1, length, 8, 2)
    leaves = [x.clone().requires_grad_(i not in (2, 5)) for i, x in enumerate(inputs)]
    torch.library.opcheck(module._cross_scan_fwd, (*leaves, orders, implementation))
    needs = [True, True, False, True, True, False, True, True]
    arguments = (torch.randn(1, length, 8), *inputs, orders, needs, implementation)
    torch.library.opcheck(module._cross_scan_bwd, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    inputs, orders = make(4, 2, 9, 12, 4)
    dout = torch.randn(2, 9, 12)
    compiled = torch.compile(cross_scan, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    actual, expected = (run(function, inputs, orders, dout) for function in (compiled, cross_scan))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_autocast_changes_nothing() -> None:
    inputs, orders = make(2, 1, 9, 12, 4)
    dout = torch.randn(1, 9, 12)
    expected = run(cross_scan, inputs, orders, dout, implementation="torch")
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(cross_scan, inputs, orders, dout, implementation="torch")
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_activation_checkpointing() -> None:
    inputs, orders = make(2, 1, 9, 12, 4)
    dout = torch.randn(1, 9, 12)

    def again(*args: Tensor) -> Tensor:
        return checkpoint(cross_scan, *args, use_reentrant=False)

    actual, expected = (run(function, inputs, orders, dout) for function in (again, cross_scan))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_gradcheck_in_float64() -> None:
    inputs, orders = make(2, 1, 4, 3, 2, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        lambda *x: cross_scan(*x, orders, implementation="torch"), leaves
    )


def test_the_reference_is_an_implementation() -> None:
    inputs, orders = make(2, 1, 5, 6, 3)
    dout = torch.randn(1, 5, 6)
    actual = run(cross_scan, inputs, orders, dout, implementation="reference")
    expected = run(cross_scan_ref, inputs, orders, dout)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_many_programs_run_in_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert len(grid) == 2 or self.name == "gate"
            return lambda *_, **__: launched.append(self.name)

    for name in ("fwd", "bwd", "gate"):
        monkeypatch.setattr(module, f"_cross_scan_{name}_kernel", Kernel(name))
    frozen = [True, True, False, True, True, False, True, False]
    for batch, expected in ((1, ["fwd", "gate", "bwd", "gate"]), (128, ["fwd", "bwd"])):
        inputs, orders = make(4, batch, 1, 768, 16)
        given = CrossInputs(*inputs, orders)
        module._launch_fwd(given)
        module._launch_bwd(given.z, given, frozen)
        assert launched == expected
        launched.clear()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("u", lambda x: x[0], r"u has shape \(1, 5, 6\), expected \(K, B, L, D\)"),
        ("delta", lambda x: x[:, :, 1:], r"delta has shape \(2, 1, 4, 6\), expected"),
        ("A", lambda x: x.repeat(1, 1, 100), "1 <= N <= 256"),
        ("B", lambda x: x[..., :2], r"B has shape \(2, 1, 5, 2\), expected \(2, 1, 5, 3\)"),
        ("z", lambda x: x[..., :5], r"z has shape \(1, 5, 5\), expected \(1, 5, 6\)"),
        ("delta_bias", lambda x: x[0], r"delta_bias has shape \(6,\), expected \(2, 6\)"),
        ("orders", lambda x: x[:1], r"orders has shape \(1, 5\), expected \(2, 5\)"),
        ("orders", lambda x: x.clamp(min=1), "a row of orders is no permutation of 0 ... 4"),
        ("orders", lambda x: x + 1, "a row of orders is no permutation of 0 ... 4"),
        ("D", lambda x: x.to("meta"), "D is on meta, u on cpu"),
    ],
)
def test_refusals_name_the_tensor(name: str, change: Any, message: str) -> None:
    inputs, orders = make(2, 1, 5, 6, 3)
    arguments = dict(zip((*NAMES, "orders"), (*inputs, orders), strict=True))
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        cross_scan(**arguments)


def test_refuses_types_and_implementations() -> None:
    inputs, orders = make(2, 1, 5, 6, 3)
    with pytest.raises(TypeError, match=r"orders are torch\.int32, expected torch\.int64"):
        cross_scan(*inputs, orders.int())
    with pytest.raises(TypeError, match=r"u is torch\.int64, expected floating point"):
        cross_scan(inputs[0].long(), *inputs[1:], orders)
    with pytest.raises(ValueError, match="cross_scan: implementation='fast': unknown"):
        cross_scan(*inputs, orders, implementation="fast")
    doubles = [x.double() for x in inputs]
    with pytest.raises(ValueError, match="implementation='triton': computes in float32"):
        cross_scan(*doubles, orders, implementation="triton")
