"""torch.func through every public function: gradients, vmap, gradients of each sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from kernels import scan_cpu
from kernels.causal_conv1d import causal_conv1d
from kernels.cross_scan import cross_scan
from kernels.lora_linear import LoraSlice, lora_linear
from kernels.selective_scan import selective_scan, selective_scan_fn, selective_state_update

B, L, D, N, K, R = 3, 4, 5, 3, 2, 2


@dataclass(frozen=True)
class Case:
    """A public function of named tensors.

    Attributes:
        call: of the implementation and the tensors by name.
        shapes: of the tensors; B is the axis of samples.
        sample: along which axis a tensor has its samples, None for a weight.
    """

    call: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    sample: dict[str, int | None]

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        torch.manual_seed(0)
        found = {n: torch.randn(s, dtype=torch.float64) for n, s in self.shapes.items()}
        if "A" in found and self.call is not lora:
            found["A"] = -found["A"].abs() - 0.1
        return {n: x.to(dtype) for n, x in found.items()}

    def loss(self, implementation: str, *tensors: Tensor) -> Tensor:
        """A number that depends on every output and is not linear in it."""
        named = dict(zip(self.shapes, tensors, strict=True))
        return self.call(implementation, **named).sin().sum()

    def loss_of_sample(self, implementation: str, *tensors: Tensor) -> Tensor:
        """The same of a single sample, whose axis is put back with length one."""
        whole = [
            x if axis is None else x.unsqueeze(axis)
            for x, axis in zip(tensors, self.sample.values(), strict=True)
        ]
        return self.loss(implementation, *whole)


def scan(implementation: str, **tensors: Tensor) -> Tensor:
    out, last = selective_scan(
        **tensors, delta_softplus=True, return_last_state=True, implementation=implementation
    )
    return torch.cat([out.flatten(), last.flatten()])


def scan_fn(implementation: str, **tensors: Tensor) -> Tensor:
    """Follows the device, with no argument for it."""
    if implementation == "reference":
        tensors = {n: x if x.ndim < 3 else x.mT for n, x in tensors.items()}
        return selective_scan(**tensors, implementation=implementation).mT
    return selective_scan_fn(**tensors)


def step(implementation: str, **tensors: Tensor) -> Tensor:
    out, state = selective_state_update(**tensors, implementation=implementation)
    return torch.cat([out.flatten(), state.flatten()])


def cross(implementation: str, **tensors: Tensor) -> Tensor:
    orders = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2]])
    return cross_scan(*tensors.values(), orders, implementation=implementation)


def conv(implementation: str, **tensors: Tensor) -> Tensor:
    orders = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2]])
    return causal_conv1d(*tensors.values(), orders, implementation=implementation)


def lora(implementation: str, x: Tensor, weight: Tensor, bias: Tensor, **low: Tensor) -> Tensor:
    slices = [LoraSlice(low["A"], low["B"], 0.5, 1), LoraSlice(low["A"], low["B"], 0.7, 2)]
    return lora_linear(x, weight, bias, slices, implementation=implementation)


ROWS = {"u": (B, L, D), "delta": (B, L, D)}
CASES = {
    "selective_scan": Case(
        scan,
        ROWS | {
            "A": (D, N), "B": (B, L, N), "C": (D, N), "D": (D,), "z": (B, L, D),
            "delta_bias": (D,), "initial_state": (B, D, N),
        },
        {"u": 0, "delta": 0, "A": None, "B": 0, "C": None, "D": None, "z": 0,
         "delta_bias": None, "initial_state": 0},
    ),
    "selective_scan_fn": Case(
        scan_fn,
        {"u": (B, D, L), "delta": (B, D, L), "A": (D, N), "B": (B, N, L), "C": (B, N, L)},
        {"u": 0, "delta": 0, "A": None, "B": 0, "C": 0},
    ),
    "selective_state_update": Case(
        step,
        {"state": (B, D, N), "u": (B, D), "delta": (B, D), "A": (D, N), "B": (B, N), "C": (B, N)},
        {"state": 0, "u": 0, "delta": 0, "A": None, "B": 0, "C": 0},
    ),
    "cross_scan": Case(
        cross,
        {"u": (K, B, L, D), "delta": (K, B, L, D), "A": (K, D, N), "B": (K, B, L, N),
         "C": (K, B, L, N), "D": (K, D), "z": (B, L, D), "delta_bias": (K, D)},
        {"u": 1, "delta": 1, "A": None, "B": 1, "C": 1, "D": None, "z": 0, "delta_bias": None},
    ),
    "causal_conv1d": Case(
        conv,
        {"x": (B, L, D), "weight": (K, D, 4), "bias": (K, D)},
        {"x": 0, "weight": None, "bias": None},
    ),
    "lora_linear": Case(
        lora,
        {"x": (B, L, D), "weight": (7, D), "bias": (7,), "A": (R, D), "B": (4, R)},
        {"x": 0, "weight": None, "bias": None, "A": None, "B": None},
    ),
}  # fmt: skip
NATIVE = pytest.mark.skipif(not scan_cpu.native_available(), reason="there is no compiler")
# Where an operator goes from there is below the transforms; the kernels are in their own files.
PAIRS = [pytest.param(name, "torch", id=f"{name}-torch") for name in CASES]
PAIRS += [
    pytest.param(name, "native", id=f"{name}-native", marks=NATIVE)
    for name in ("selective_scan", "cross_scan", "causal_conv1d")
]


def exact_gradients(case: Case, of: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.requires_grad_() for x in case.tensors(torch.float64).values()]
    return torch.autograd.grad(of(*leaves), leaves)


def assert_close(case: Case, actual: Any, expected: Any) -> None:
    for name, x, y in zip(case.shapes, actual, expected, strict=True):
        torch.testing.assert_close(
            x.double(), y, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("name", "implementation"), PAIRS)
def test_gradients(name: str, implementation: str) -> None:
    """Every gradient by `grad` and by `vjp`."""
    case = CASES[name]
    tensors = case.tensors()
    numbers = tuple(range(len(tensors)))
    expected = exact_gradients(case, lambda *x: case.loss("reference", *x))

    def loss(*x: Tensor) -> Tensor:
        return case.loss(implementation, *x)

    assert_close(case, grad(loss, numbers)(*tensors.values()), expected)
    value, back = vjp(loss, *tensors.values())
    assert_close(case, back(torch.ones_like(value)), expected)


@pytest.mark.parametrize(("name", "implementation"), PAIRS)
def test_gradients_of_each_sample(name: str, implementation: str) -> None:
    """vmap(grad(...)): what differential privacy and influence functions ask for."""
    case = CASES[name]
    tensors = case.tensors()
    axes = tuple(case.sample.values())
    numbers = tuple(range(len(tensors)))

    def loss(*x: Tensor) -> Tensor:
        return case.loss_of_sample(implementation, *x)

    actual = vmap(grad(loss, numbers), in_dims=axes)(*tensors.values())
    samples = []
    for i in range(B):
        leaves = [
            (x if axis is None else x.select(axis, i)).detach().requires_grad_()
            for x, axis in zip(case.tensors(torch.float64).values(), axes, strict=True)
        ]
        samples.append(torch.autograd.grad(case.loss_of_sample("reference", *leaves), leaves))
    assert_close(case, actual, [torch.stack(x) for x in zip(*samples, strict=True)])


@pytest.mark.parametrize("name", CASES)
def test_other_nestings(name: str) -> None:
    """grad of a vmap, a Jacobian, and autograd around a vmap."""
    case = CASES[name]
    tensors = case.tensors()
    axes = tuple(case.sample.values())
    numbers = tuple(range(len(tensors)))

    def each(implementation: str, *x: Tensor) -> Tensor:
        return vmap(lambda *s: case.loss_of_sample(implementation, *s), in_dims=axes)(*x)

    expected = exact_gradients(case, lambda *x: each("reference", *x).square().sum())

    def loss(*x: Tensor) -> Tensor:
        return each("torch", *x).square().sum()

    assert_close(case, grad(loss, numbers)(*tensors.values()), expected)
    leaves = [x.clone().requires_grad_() for x in tensors.values()]
    assert_close(case, torch.autograd.grad(loss(*leaves), leaves), expected)
    jacobian = jacrev(lambda *x: each("torch", *x), numbers)(*tensors.values())
    per_sample = each("torch", *tensors.values())
    assert_close(
        case, [(2 * per_sample).double() @ j.double().flatten(1) for j in jacobian],
        [x.flatten() for x in expected],
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_not_provided_says_so(name: str) -> None:
    """Second derivatives and forward mode, with torch.func and without; the reference has them."""
    case = CASES[name]
    tensors = list(case.tensors().values())
    first, *rest = tensors

    def loss(implementation: str, x: Tensor) -> Tensor:
        return case.loss(implementation, x, *rest)

    def second(implementation: str) -> Tensor:
        return grad(lambda x: grad(lambda y: loss(implementation, y))(x).sum())(first)

    public = "selective_scan" if name.startswith("selective") else name
    message = f"{public}: second derivatives are not provided; implementation='reference'"
    with pytest.raises(RuntimeError, match=message):
        second("torch")
    assert second("reference").isfinite().all()
    leaf = first.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss("torch", leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        gradient.sum().backward()

    message = f"{public}: forward-mode derivatives are not provided"
    with pytest.raises(RuntimeError, match=message):
        jvp(lambda x: loss("torch", x), (first,), (first,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        loss("torch", forward_ad.make_dual(first, first))
    with forward_ad.dual_level():
        loss("torch", first)  # without a tangent there is nothing to lose


def test_a_modules_gradients_by_functional_call() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = torch.nn.Linear(D, 2 * D + 2 * N)
            self.A_log = torch.nn.Parameter(torch.randn(D, N))

        def forward(self, x: Tensor) -> Tensor:
            u, delta, b, c = self.projection(x).split([D, D, N, N], dim=-1)
            out = selective_scan(u, delta, -self.A_log.exp(), b, c, delta_softplus=True)
            assert isinstance(out, Tensor)
            return out

    torch.manual_seed(0)
    module, x = Module(), torch.randn(B, L, D)
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(module, parameters, (sample[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    module(x).square().sum().backward()
    for name, p in module.named_parameters():
        assert each[name].shape == (B, *p.shape), name
        torch.testing.assert_close(each[name].sum(0), p.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_under_vmap() -> None:
    """As torch's own: refused unless told whether samples share their mask."""
    case = CASES["lora_linear"]
    x, weight, bias, A, low = case.tensors().values()
    x = x[:1].expand_as(x)

    def layer(sample: Tensor) -> Tensor:
        return lora_linear(
            sample, weight, bias, [LoraSlice(A, low, 1.0)], dropout=0.5, training=True
        )

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)
    torch.manual_seed(0)
    same = vmap(layer, randomness="same")(x)
    different = vmap(layer, randomness="different")(x)
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    assert not torch.equal(different[0], different[1])
