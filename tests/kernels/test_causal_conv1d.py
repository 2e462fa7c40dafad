"""The convolution along visiting orders against float64: gradients, operators and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import causal_conv1d as module
from kernels import scan_cpu
from kernels.causal_conv1d import causal_conv1d
from kernels.reference import causal_conv1d_ref, visiting_orders

NAMES = ("x", "weight", "bias")
CPU = [
    "torch",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(not scan_cpu.native_available(), reason="there is no compiler"),
    ),
]
Inputs = list[Tensor | None]


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
    width: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Inputs, Tensor]:
    """Inputs as the vision mixer makes them (x a view of half the rows), random orders."""
    torch.manual_seed(count + 10 * length + dim + width)
    double = dtype if dtype == torch.float64 else torch.float32
    inputs: Inputs = [
        torch.randn(batch, length, 2 * dim).to(dtype)[..., :dim],
        torch.randn(count, dim, width, dtype=double),
        torch.randn(count, dim, dtype=double) if bias else None,
    ]
    return inputs, torch.stack([torch.randperm(length) for _ in range(count)])


def run(
    function: Callable[..., Tensor],
    inputs: Inputs,
    orders: Tensor,
    dout: Tensor,
    needed: Sequence[str] = NAMES,
    **options: Any,
) -> dict[str, Tensor]:
    """The output and the needed gradients by name."""
    leaves = {
        name: None if x is None else x.detach().requires_grad_(name in needed)
        for name, x in zip(NAMES, inputs, strict=True)
    }
    out = function(*leaves.values(), orders, **options)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and name in needed}
    gradients = torch.autograd.grad(out, list(wanted.values()), dout)
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def assert_as_exact(
    actual: dict[str, Tensor],
    inputs: Inputs,
    orders: Tensor,
    dout: Tensor,
    slack: float = 2e-6,
    **options: Any,
) -> None:
    """Our error is at most twice that of plain torch in this dtype, both against float64.

    And `slack` times the largest number, some roundings of fp32.
    """
    doubles = [None if x is None else x.double() for x in inputs]
    exact = run(causal_conv1d_ref, doubles, orders, dout.double(), **options)
    plain = run(causal_conv1d_ref, inputs, orders, dout, **options)
    for name, value in actual.items():
        expected = exact[name]
        assert value.shape == expected.shape and value.dtype == plain[name].dtype, name
        error, allowed = ((x.double() - expected).abs().max().item() for x in (value, plain[name]))
        scale = expected.abs().max().item()
        assert error <= 2 * allowed + slack * scale, (name, error, allowed, scale)


@pytest.mark.parametrize("implementation", CPU)
@pytest.mark.parametrize(
    ("count", "batch", "length", "dim", "width"),
    [
        (4, 2, 33, 40, 4),  # the mixer's
        (4, 1, 197, 24, 4),  # its length
        (1, 3, 33, 70, 3),  # one order, channels off the block
        (4, 2, 1, 20, 4),  # one step
        (2, 2, 3, 17, 7),  # more taps than steps
        (3, 2, 5, 9, 1),  # one tap
    ],
)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_every_gradient(
    implementation: str,
    count: int,
    batch: int,
    length: int,
    dim: int,
    width: int,
    activation: str | None,
    bias: bool,
    dtype: torch.dtype,
) -> None:
    inputs, orders = make(count, batch, length, dim, width, bias=bias, dtype=dtype)
    dout = torch.randn(count, batch, length, dim).to(dtype)
    options = {"activation": activation}
    actual = run(causal_conv1d, inputs, orders, dout, implementation=implementation, **options)
    assert_as_exact(actual, inputs, orders, dout, **options)
    again = run(causal_conv1d, inputs, orders, dout, implementation=implementation, **options)
    for name, value in actual.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize(
    ("count", "batch", "length", "dim", "width", "activation", "bias"),
    [
        (4, 1, 20, 40, 4, "silu", True),  # two blocks of channels, two and three of steps
        (1, 1, 197, 16, 4, "silu", True),
        (2, 1, 1, 16, 4, None, True),  # one step, an aligned block
        (2, 2, 3, 17, 7, "silu", False),  # more taps than steps
        (3, 1, 5, 9, 1, None, False),  # one tap
    ],
)
def test_kernels_forward_and_every_gradient(
    count: int,
    batch: int,
    length: int,
    dim: int,
    width: int,
    activation: str | None,
    bias: bool,
) -> None:
    inputs, orders = make(count, batch, length, dim, width, bias=bias)
    dout = torch.randn(count, batch, length, dim)
    options = {"activation": activation}
    actual = run(causal_conv1d, inputs, orders, dout, implementation="triton", **options)
    assert_as_exact(actual, inputs, orders, dout, **options)
    again = run(causal_conv1d, inputs, orders, dout, implementation="triton", **options)
    for name, value in actual.items():
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_in_lower_precision(dtype: torch.dtype) -> None:
    inputs, orders = make(2, 1, 9, 20, 4, dtype=dtype)
    dout = torch.randn(2, 1, 9, 20).to(dtype)
    actual = run(causal_conv1d, inputs, orders, dout, implementation="triton")
    # The interpreter cuts bits off where a GPU rounds.
    assert_as_exact(actual, inputs, orders, dout, slack=torch.finfo(dtype).eps)


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
def test_a_plain_causal_convolution(implementation: str) -> None:
    """One order, first to last: what Mamba's convolution computes, by torch's own."""
    (x, weight, bias), _ = make(1, 2, 11, 6, 4)
    assert x is not None and weight is not None and bias is not None
    orders = torch.arange(11)[None]
    out = causal_conv1d(x, weight, bias, orders, None, implementation)
    mixed = torch.conv1d(x.mT, weight[0][:, None], bias[0], padding=3, groups=6)[..., :11].mT
    torch.testing.assert_close(out[0], mixed)


@pytest.mark.parametrize("implementation", CPU)
def test_visiting_orders(implementation: str) -> None:
    inputs, _ = make(4, 2, 13, 20, 4)
    orders = visiting_orders(3, 4, cls_position=6)
    dout = torch.randn(4, 2, 13, 20)
    actual = run(causal_conv1d, inputs, orders, dout, implementation=implementation)
    assert_as_exact(actual, inputs, orders, dout)


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
def test_any_strides(implementation: str) -> None:
    """Channels first, expanded, transposed, and a gradient that is one number."""
    inputs, orders = make(2, 2, 5, 12, 4)
    x, weight, bias = inputs
    assert x is not None and weight is not None and bias is not None
    strided: Inputs = [x.mT.contiguous().mT, weight.mT.contiguous().mT, bias[:, :1].expand_as(bias)]
    dout = torch.randn(()).expand(2, 2, 5, 12)
    crossed = orders.t().contiguous().t()
    actual = run(causal_conv1d, strided, crossed, dout, implementation=implementation)
    assert_as_exact(actual, strided, orders, dout)
    assert all(t.is_contiguous() for t in actual.values())


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
def test_rows_further_apart_than_32_bits_count(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tokens 2^31 elements apart, in memory that is reserved and never touched between them."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    inputs, orders = make(1, 1, 2, 3, 2, dtype=torch.bfloat16)
    dout = torch.randn(1, 1, 2, 3).to(torch.bfloat16)
    expected = run(causal_conv1d, inputs, orders, dout, implementation=implementation)
    x = inputs[0]
    assert x is not None
    far = torch.empty(2**31 + 64, dtype=x.dtype).as_strided(x.shape, (0, 2**31, 1)).copy_(x)
    far_dout = torch.empty(2**31 + 64, dtype=x.dtype).as_strided(dout.shape, (0, 0, 2**31, 1))
    far_dout.copy_(dout)
    arguments: Inputs = [far, *inputs[1:]]
    actual = run(causal_conv1d, arguments, orders, far_dout, implementation=implementation)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
def test_an_empty_batch(implementation: str) -> None:
    inputs, orders = make(2, 0, 5, 8, 4)
    dout = torch.randn(2, 0, 5, 8)
    actual = run(causal_conv1d, inputs, orders, dout, implementation=implementation)
    assert actual["out"].shape == (2, 0, 5, 8)
    for name, x in zip(NAMES, inputs, strict=True):
        assert x is not None and torch.equal(actual[name], torch.zeros_like(x)), name


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
@pytest.mark.parametrize("needed", [["x"], ["weight"], ["bias"], ["x", "bias"]])
def test_only_needed_gradients_are_computed(
    implementation: str, needed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, orders = make(2, 1, 4, 10, 4)
    dout = torch.randn(2, 1, 4, 10)
    asked: list[list[bool]] = []

    def spy(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            asked.append(list(args[-1]))
            return function(*args)

        return noted

    monkeypatch.setattr(scan_cpu, "conv_backward", spy(scan_cpu.conv_backward))
    monkeypatch.setattr(module, "_launch_bwd", spy(module._launch_bwd))
    actual = run(causal_conv1d, inputs, orders, dout, needed, implementation=implementation)
    assert asked == [[name in needed for name in NAMES]]
    assert_as_exact(actual, inputs, orders, dout)


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
def test_nothing_is_saved_where_nothing_needs_a_gradient(implementation: str) -> None:
    inputs, orders = make(2, 1, 3, 8, 4)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = causal_conv1d(*inputs, orders, implementation=implementation)
        assert not out.requires_grad and not saved
        assert inputs[1] is not None
        inputs[1].requires_grad_()
        causal_conv1d(*inputs, orders, implementation=implementation)
    # The inputs and no more: not what stands before the activation.
    mine = {t.untyped_storage().data_ptr() for t in (*inputs, orders) if t is not None}
    assert saved and all(t.untyped_storage().data_ptr() in mine for t in saved)


@pytest.mark.parametrize("implementation", [*CPU, "triton"])
@pytest.mark.parametrize("bias", [True, False])
def test_operator_rules(implementation: str, bias: bool) -> None:
    """`opcheck`: schema, fake tensors with the strides of real ones, autograd, aot_dispatch."""
    inputs, orders = make(2, 1, 2, 8, 2, bias=bias)
    x, weight, bias_tensor = inputs
    assert x is not None and weight is not None
    leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_(), bias_tensor)
    torch.library.opcheck(module._causal_conv1d_fwd, (*leaves, orders, True, implementation))
    arguments = (*inputs, orders, True, [True, False, bias], implementation)
    torch.library.opcheck(module._causal_conv1d_bwd, (torch.randn(2, 1, 2, 8), *arguments))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    inputs, orders = make(4, 2, 9, 12, 4)
    dout = torch.randn(4, 2, 9, 12)
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    actual, expected = (run(f, inputs, orders, dout) for f in (compiled, causal_conv1d))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_autocast_changes_nothing() -> None:
    inputs, orders = make(2, 1, 9, 12, 4)
    dout = torch.randn(2, 1, 9, 12)
    expected = run(causal_conv1d, inputs, orders, dout, implementation="torch")
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(causal_conv1d, inputs, orders, dout, implementation="torch")
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_activation_checkpointing() -> None:
    inputs, orders = make(2, 1, 9, 12, 4)
    dout = torch.randn(2, 1, 9, 12)

    def again(*args: Tensor) -> Tensor:
        return checkpoint(causal_conv1d, *args, use_reentrant=False)

    actual, expected = (run(f, inputs, orders, dout) for f in (again, causal_conv1d))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("activation", ["silu", None])
def test_gradcheck_in_float64(activation: str | None) -> None:
    inputs, orders = make(2, 1, 5, 3, 4, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in inputs if t is not None]
    assert torch.autograd.gradcheck(
        lambda *t: causal_conv1d(*t, orders, activation, "torch"), leaves
    )


def test_the_reference_is_an_implementation() -> None:
    inputs, orders = make(2, 1, 5, 6, 4)
    dout = torch.randn(2, 1, 5, 6)
    actual = run(causal_conv1d, inputs, orders, dout, implementation="reference")
    expected = run(causal_conv1d_ref, inputs, orders, dout)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[0], r"x has shape \(5, 6\), expected \(B, L, D\)"),
        ("weight", lambda t: t[:, :5], r"weight has shape \(2, 5, 4\), expected \(2, 6, 4\)"),
        ("weight", lambda t: t[..., :0], r"weight is \(2, 6, 0\), expected K >= 1, W >= 1"),
        ("bias", lambda t: t[0], r"bias has shape \(6,\), expected \(2, 6\)"),
        ("orders", lambda t: t[:1], r"orders has shape \(1, 5\), expected \(2, 5\)"),
        ("orders", lambda t: t.clamp(max=3), "a row of orders is no permutation of 0 ... 4"),
        ("orders", lambda t: t - 1, "a row of orders is no permutation of 0 ... 4"),
        ("bias", lambda t: t.to("meta"), "bias is on meta, x on cpu"),
        ("activation", lambda _: "gelu", "activation is 'gelu', expected 'silu' or None"),
    ],
)
def test_refusals_name_the_tensor(name: str, change: Any, message: str) -> None:
    inputs, orders = make(2, 1, 5, 6, 4)
    arguments: dict[str, Any] = dict(zip((*NAMES, "orders"), (*inputs, orders), strict=True))
    arguments[name] = change(arguments.get(name))
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**arguments)


def test_refuses_types_and_implementations() -> None:
    (x, weight, bias), orders = make(2, 1, 5, 6, 4)
    assert x is not None and weight is not None and bias is not None
    with pytest.raises(TypeError, match=r"orders are torch\.int32, expected torch\.int64"):
        causal_conv1d(x, weight, bias, orders.int())
    with pytest.raises(TypeError, match=r"x is torch\.int64, expected floating point"):
        causal_conv1d(x.long(), weight, bias, orders)
    with pytest.raises(ValueError, match="causal_conv1d: implementation='fast': unknown"):
        causal_conv1d(x, weight, bias, orders, implementation="fast")
    with pytest.raises(ValueError, match="implementation='triton': computes in float32"):
        causal_conv1d(x.double(), weight, bias, orders, implementation="triton")
