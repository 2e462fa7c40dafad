"""The LoRA-fused linear layer against float64: values, every gradient, dropout, what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels.lora_linear import LoraSlice, _backward_op, _forward_op, lora_linear
from kernels.reference import lora_linear_ref

DEVICE = {"torch": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
INPUTS, OUTPUTS = 75, 70  # neither a multiple of a block; two steps of the K loop
# rank, rows, first row, scale of each slice
RANGES = {
    "none": [],
    "X": [(3, 35, 0, 0.5)],
    "Z": [(3, 35, 35, 0.5)],
    "whole": [(16, OUTPUTS, 0, 1.0)],
    "one_row": [(1, 1, 69, 2.0)],
    "rank_70": [(70, 20, 41, 0.3)],  # two blocks of ranks
    "X_and_Z": [(4, 35, 0, 0.5), (4, 35, 35, 0.5)],
    "overlapping": [(3, 40, 5, 0.5), (5, 30, 30, 0.7), (2, 10, 50, -1.0)],
}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that what is not written shows; and one seed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["torch", "triton"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


def layer(
    ranges: Sequence[tuple[int, int, int, float]],
    *,
    device: str,
    shape: tuple[int, ...] = (2, 33),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    seed: int = 0,
) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor]], list[LoraSlice]]]:
    """Leaves by name, and how to make slices of such leaves."""
    draw = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw)

    leaves = {"x": random(*shape, INPUTS).to(dtype)}
    leaves["weight"] = (random(OUTPUTS, INPUTS) / math.sqrt(INPUTS)).to(dtype)
    if bias:
        leaves["bias"] = random(OUTPUTS).to(dtype)
    for i, (rank, rows, _, _) in enumerate(ranges):
        leaves[f"A{i}"] = random(rank, INPUTS) / math.sqrt(INPUTS)
        leaves[f"B{i}"] = random(rows, rank)
    leaves = {n: t.to(device).requires_grad_() for n, t in leaves.items()}

    def slices(of: dict[str, Tensor]) -> list[LoraSlice]:
        return [LoraSlice(of[f"A{i}"], of[f"B{i}"], r[3], r[2]) for i, r in enumerate(ranges)]

    return leaves, slices


def doubled(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.detach().cpu().double().requires_grad_() for n, t in leaves.items()}


def differentiate(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y), allow_unused=True)
    return {"y": y.detach()} | {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}


def reference(
    leaves: dict[str, Tensor],
    slices: Callable[[dict[str, Tensor]], list[LoraSlice]],
    dy: Tensor,
    keep: list[Tensor] | None = None,
) -> dict[str, Tensor]:
    """Value and gradients in float64."""
    exact = doubled(leaves)
    y = lora_linear_ref(exact["x"], exact["weight"], exact.get("bias"), slices(exact), keep)
    return differentiate(y, exact, dy.cpu().double())


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        error = (found[name].cpu().double() - value).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), (name, error)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_value_and_every_gradient(
    implementation: str, ranges: list[tuple[int, int, int, float]], bias: bool
) -> None:
    leaves, slices = layer(ranges, device=DEVICE[implementation], bias=bias)
    y = lora_linear(
        leaves["x"],
        leaves["weight"],
        leaves.get("bias"),
        slices(leaves),
        implementation=implementation,
    )
    dy = torch.randn(y.shape, device=y.device)
    found = differentiate(y, leaves, dy)
    compare(found, reference(leaves, slices, dy), 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_no_more_than_plain_torch(
    implementation: str, dtype: torch.dtype
) -> None:
    ranges = RANGES["overlapping"]
    leaves, slices = layer(ranges, device=DEVICE[implementation], dtype=dtype)
    y = lora_linear(
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        slices(leaves),
        implementation=implementation,
    )
    assert y.dtype == dtype
    dy = torch.randn(y.shape).to(y)
    found = differentiate(y, leaves, dy)
    assert all(found[n].dtype == t.dtype for n, t in leaves.items()), "a gradient's dtype"
    expected = reference(leaves, slices, dy)
    plain = {n: t.detach().to(dtype).requires_grad_() for n, t in leaves.items()}
    out = F.linear(plain["x"], plain["weight"], plain["bias"])
    for s in slices(plain):
        added = F.linear(F.linear(plain["x"], s.A), s.B) * s.scale
        out = out + F.pad(added, (s.start, OUTPUTS - s.start - s.B.shape[0]))
    rounded = differentiate(out, plain, dy)
    for name, value in expected.items():
        ours = (found[name].cpu().double() - value).abs().max().item()
        theirs = (rounded[name].cpu().double() - value).abs().max().item()
        ulp = torch.finfo(dtype).eps * value.abs().max().item()
        # The interpreter's store truncates where a GPU's rounds.
        slack = ulp if implementation == "triton" and DEVICE["triton"] == "cpu" else 0
        assert ours <= 2 * theirs + slack, (name, ours, theirs)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(0, 1),
        lambda t: t[:, 3:30],
        lambda t: t[:, ::2],
        lambda t: t[:1].expand(3, -1, -1),
        lambda t: t.unsqueeze(1).expand(-1, 2, -1, -1).transpose(0, 2),
        lambda t: t[0, 5],
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    ],
    ids=[
        "transposed",
        "part",
        "every_other",
        "expanded",
        "four_axes",
        "one_token",
        "columns_first",
    ],
)
def test_any_strides(implementation: str, view: Callable[[Tensor], Tensor]) -> None:
    leaves, slices = layer(RANGES["X_and_Z"], device=DEVICE[implementation])
    y = lora_linear(
        view(leaves["x"]),
        leaves["weight"],
        torch.stack([leaves["bias"]] * 2, 1)[:, 0],
        slices(leaves),
        implementation=implementation,
    )
    dy = torch.randn(*y.shape, 2, device=y.device)[..., 0]  # the gradient's strides are odd, too
    found = differentiate(y, leaves, dy)
    exact = doubled(leaves)
    out = lora_linear_ref(view(exact["x"]), exact["weight"], exact["bias"], slices(exact))
    compare(found, differentiate(out, exact, dy.cpu().double()), 5e-6)


def test_many_tokens_sum_by_chunks(implementation: str) -> None:
    """dA and dB of more tokens than one chunk of the Triton kernel takes."""
    leaves, slices = layer(RANGES["Z"], device=DEVICE[implementation], shape=(530,), bias=False)
    y = lora_linear(
        leaves["x"], leaves["weight"], None, slices(leaves), implementation=implementation
    )
    dy = torch.randn(y.shape, device=y.device)
    compare(differentiate(y, leaves, dy), reference(leaves, slices, dy), 5e-6)


def test_addresses_beyond_2_to_the_31(implementation: str) -> None:
    """x and W with rows, then columns, far apart in memory; what lies between is not touched."""
    device = DEVICE[implementation]
    leaves, slices = layer(RANGES["Z"], device=device, shape=(80,), dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(False)  # it would fill the memory
    near = leaves["x"].detach(), leaves["weight"].detach()
    stride = 2**31 // 60

    def run(x: Tensor, weight: Tensor) -> dict[str, Tensor]:
        views = {"x": x.requires_grad_(), "weight": weight.requires_grad_()}
        y = lora_linear(x, weight, leaves["bias"], slices(leaves), implementation=implementation)
        return differentiate(y, leaves | views, torch.ones_like(y))

    def far(t: Tensor, axis: int) -> Tensor:
        storage = torch.empty(t.shape[axis] * stride, dtype=t.dtype, device=device)
        strides = (stride, 1) if axis == 0 else (1, stride)
        return storage.as_strided(t.shape, strides).copy_(t)

    expected = run(*(t.clone() for t in near))
    for axis in (0, 1):
        for name, value in run(*(far(t, axis) for t in near)).items():
            torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.02, msg=name)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5)])
def test_empty_batch(implementation: str, shape: tuple[int, ...]) -> None:
    leaves, slices = layer(RANGES["X"], device=DEVICE[implementation], shape=shape)
    y = lora_linear(
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        slices(leaves),
        implementation=implementation,
    )
    assert y.shape == (*shape, OUTPUTS)
    for name, grad in differentiate(y, leaves, y.detach()).items():
        assert not grad.any() and not grad.isnan().any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_zero_is_the_base_bit_for_bit(implementation: str, dtype: torch.dtype) -> None:
    leaves, slices = layer(
        RANGES["overlapping"], device=DEVICE[implementation], shape=(3, 50), dtype=dtype
    )
    with torch.no_grad():
        for s in slices(leaves):
            s.B.zero_()
    x, weight, bias = leaves["x"], leaves["weight"], leaves["bias"]
    y = lora_linear(x, weight, bias, slices(leaves), implementation=implementation)
    assert torch.equal(y, lora_linear(x, weight, bias, [], implementation=implementation))
    if implementation == "torch":
        assert torch.equal(y, F.linear(x, weight, bias))


def drawn_mask(x: Tensor, rank: int, rate: float, implementation: str) -> Tensor:
    """Dropout's mask divided by the share kept, (..., r), as the layer draws it next."""
    A = torch.zeros(rank, INPUTS, device=x.device)
    A[:, 0] = 1
    ones = torch.zeros_like(x)
    ones[..., 0] = 1
    return lora_linear(
        ones,
        x.new_zeros(rank, INPUTS),
        None,
        [LoraSlice(A, torch.eye(rank, device=x.device), 1.0)],
        dropout=rate,
        training=True,
        implementation=implementation,
    )


def test_dropouts_mask(implementation: str) -> None:
    rate, rank = 0.3, 40
    x = torch.zeros(500, INPUTS, device=DEVICE[implementation])
    torch.manual_seed(1)
    first, second = (drawn_mask(x, rank, rate, implementation) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(drawn_mask(x, rank, rate, implementation), first), "a seed repeats it"
    torch.testing.assert_close(first.unique().cpu(), torch.tensor([0, 1 / (1 - rate)]))
    kept = torch.stack([first, second]).cpu() > 0
    deviation = math.sqrt(rate * (1 - rate))
    assert abs(kept.double().mean().item() - (1 - rate)) < 4 * deviation / math.sqrt(kept.numel())
    for axis in (1, 2):  # no row and no column is favoured
        means = kept.double().mean(dim=axis)
        spread = deviation / math.sqrt(kept.shape[axis])
        assert (means - (1 - rate)).abs().max() < 5 * spread
        assert 0.7 * spread < means.std() < 1.3 * spread
    centred = kept.double() - (1 - rate)
    for a, b in (
        (centred[0], centred[1]),
        (centred[:, 1:], centred[:, :-1]),
        (centred[..., 1:], centred[..., :-1]),
    ):  # neither calls nor neighbours are related
        assert abs((a * b).mean().item()) < 4 * deviation**2 / math.sqrt(a.numel())


def test_the_backward_uses_the_forwards_mask(implementation: str) -> None:
    ranges = RANGES["overlapping"]
    leaves, slices = layer(ranges, device=DEVICE[implementation], shape=(2, 40))
    rate, ranks = 0.4, [r[0] for r in ranges]
    torch.manual_seed(7)
    keep = drawn_mask(leaves["x"].detach(), sum(ranks), rate, implementation).cpu().double()
    assert 0.4 < (keep > 0).double().mean() < 0.8
    torch.manual_seed(7)
    y = lora_linear(
        leaves["x"],
        leaves["weight"],
        leaves["bias"],
        slices(leaves),
        dropout=rate,
        training=True,
        implementation=implementation,
    )
    dy = torch.randn(y.shape, device=y.device)
    found = differentiate(y, leaves, dy)
    compare(found, reference(leaves, slices, dy, list(keep.split(ranks, -1))), 5e-6)


def test_no_dropout_outside_training(implementation: str) -> None:
    leaves, slices = layer(RANGES["X"], device=DEVICE[implementation])
    arguments = (leaves["x"], leaves["weight"], leaves["bias"], slices(leaves))
    state = torch.get_rng_state()
    quiet = lora_linear(*arguments, dropout=0.9, implementation=implementation)
    assert torch.equal(quiet, lora_linear(*arguments, implementation=implementation))
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws no random number"


def test_checkpointing_draws_the_same_mask_again(implementation: str) -> None:
    leaves, slices = layer(RANGES["X_and_Z"], device=DEVICE[implementation])

    def run(x: Tensor) -> Tensor:
        return lora_linear(
            x,
            leaves["weight"],
            None,
            slices(leaves),
            dropout=0.5,
            training=True,
            implementation=implementation,
        )

    wanted = {n: t for n, t in leaves.items() if n != "bias"}
    results = []
    for again in (False, True):
        torch.manual_seed(3)
        y = checkpoint(run, leaves["x"], use_reentrant=False) if again else run(leaves["x"])
        torch.manual_seed(99)
        assert isinstance(y, Tensor)
        results.append(differentiate(y, wanted, torch.ones_like(y)))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


class Calls(TorchDispatchMode):
    """The calls of this package's operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "emrrg_kernels":
            self.found.append((func._schema.name, args, out))
        return out


@pytest.mark.parametrize(
    ("trained", "kept", "made"),
    [
        ("x A0 B0", "x weight A B h seed", 3),
        ("A0 B0", "x A B h seed", 2),
        ("B0", "A B h", 1),
        ("A0", "x A B seed", 1),
        ("x", "weight A B seed", 1),
        ("weight", "x A B", 1),
        ("bias", "A B", 1),
        ("x weight bias A0 B0", "x weight A B h seed", 5),
    ],
)
def test_only_what_the_wanted_gradients_need(
    implementation: str, trained: str, kept: str, made: int
) -> None:
    leaves, slices = layer(RANGES["Z"], device=DEVICE[implementation])
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained.split())
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = lora_linear(
            leaves["x"],
            leaves["weight"],
            leaves["bias"],
            slices(leaves),
            dropout=0.2,
            training=True,
            implementation=implementation,
        )
    tokens, rank = leaves["x"][..., 0].numel(), leaves["A0"].shape[0]
    shapes = {
        "x": leaves["x"].shape,
        "weight": leaves["weight"].shape,
        "A": leaves["A0"].shape,
        "B": leaves["B0"].shape,
        "h": (tokens, rank),
        "seed": (1,),
    }
    assert [tuple(t.shape) for t in saved] == [tuple(shapes[n]) for n in kept.split()]
    before = [(t.clone(), t._version) for t in saved]
    with Calls() as calls:
        y.backward(torch.ones_like(y), retain_graph=True)
    ((name, _, gradients),) = calls.found
    assert name == "emrrg_kernels::lora_linear_bwd" and len(gradients) == made
    for (value, version), tensor in zip(before, saved, strict=True):
        assert torch.equal(tensor, value) and tensor._version == version, "a saved tensor changed"
    once = {n: leaves[n].grad for n in trained.split()}
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in trained.split()), name
        leaf.grad = None
    y.backward(torch.ones_like(y))
    for name, grad in once.items():
        assert grad is not None and leaves[name].grad is not None
        assert torch.equal(leaves[name].grad, grad), f"{name}: a second backward differs"


def test_autocast_casts_the_base_and_keeps_the_adapters(implementation: str) -> None:
    device = DEVICE[implementation]
    leaves, slices = layer(RANGES["X_and_Z"], device=device)
    with torch.autocast(device, torch.bfloat16):
        y = lora_linear(
            leaves["x"],
            leaves["weight"],
            leaves["bias"],
            slices(leaves),
            implementation=implementation,
        )
    assert y.dtype == torch.bfloat16
    dy = torch.randn(y.shape, device=device).to(y)
    found = differentiate(y, leaves, dy)
    assert all(found[n].dtype == torch.float32 for n in leaves), "fp32 leaves, fp32 gradients"
    expected = reference(leaves, slices, dy)
    for name, value in expected.items():
        error = (found[name].cpu().double() - value).norm() / value.norm()
        assert error < 0.01, (name, error)


def test_float64_on_the_cpu() -> None:
    leaves, slices = layer(RANGES["overlapping"], device="cpu", dtype=torch.float64)
    leaves = doubled(leaves)

    def run(*tensors: Tensor) -> Tensor:
        of = dict(zip(leaves, tensors, strict=True))
        return lora_linear(of["x"][:, :3], of["weight"], of["bias"], slices(of))

    y = run(*leaves.values())
    dy = torch.randn_like(y)
    exact = doubled(leaves)
    out = lora_linear_ref(exact["x"][:, :3], exact["weight"], exact["bias"], slices(exact))
    compare(differentiate(y, leaves, dy), differentiate(out, exact, dy), 1e-13)


def test_other_implementations() -> None:
    leaves, slices = layer(RANGES["X"], device="cpu")
    arguments = (leaves["x"], leaves["weight"], leaves["bias"], slices(leaves))
    with Calls() as calls:
        default = lora_linear(*arguments)
        plain = lora_linear(*arguments, implementation="torch")
    assert [args[9] for _, args, _ in calls.found] == ["torch", "torch"]
    assert torch.equal(default, plain)
    exact = lora_linear(*arguments, implementation="reference")
    torch.testing.assert_close(default, exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear(*arguments, implementation="reference").dtype == torch.bfloat16
    torch.manual_seed(0)
    dropped = lora_linear(*arguments, dropout=0.5, training=True, implementation="reference")
    assert not torch.allclose(dropped, exact)


def test_operators_obey_torchs_rules(implementation: str) -> None:
    device = DEVICE[implementation]
    leaves, slices = layer(RANGES["Z"], device=device)
    (s,) = slices(leaves)
    seed = torch.tensor([5], device=device)
    base = (leaves["x"], leaves["weight"], leaves["bias"], s.A, s.B)
    torch.library.opcheck(_forward_op, (*base, seed, s.start, s.scale, 0.3, implementation, None))
    x, weight, _, A, B = (t.detach() for t in base)
    dy = torch.randn(2, 33, OUTPUTS, device=device)
    h = torch.randn(66, 3, device=device)
    rest = (seed, s.start, s.scale, 0.3)
    for needs in ([True] * 5, [True, False, False, True, True], [False, False, False, True, False]):
        torch.library.opcheck(
            _backward_op, (dy, x, weight, A, B, h, *rest, needs, implementation, None)
        )


def test_compiles_without_a_graph_break(implementation: str) -> None:
    leaves, slices = layer(RANGES["overlapping"], device=DEVICE[implementation])

    def run(x: Tensor, rate: float) -> Tensor:
        y = lora_linear(
            x,
            leaves["weight"],
            leaves["bias"],
            slices(leaves),
            dropout=rate,
            training=True,
            implementation=implementation,
        )
        return y.sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for rate in (0.0, 0.5):
        results = []
        for function in (run, compiled):
            torch.manual_seed(0)
            y = function(leaves["x"], rate)
            results.append(differentiate(y, leaves, torch.ones_like(y)))
        for name, value in results[0].items():
            assert torch.equal(results[1][name], value), (name, rate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4).long(), "weight": torch.zeros(6, 4).long()}, "x: torch.int64, ex"),
        ({"weight": torch.zeros(6, 4, device="meta")}, "weight is on meta, x on cpu"),
        ({"x": torch.zeros(3, 8)}, r"x: shape \(3, 8\), expected \(\.\.\., 4\)"),
        ({"weight": torch.zeros(6)}, r"weight: shape \(6,\), expected \(O, I\)"),
        ({"bias": torch.zeros(5)}, r"bias: shape \(5,\), expected \(6,\)"),
        ({"weight": torch.zeros(6, 4).half()}, "weight: torch.float16, x is torch.float32; cast"),
        ({"dropout": 1.0}, r"dropout: 1.0 is not in \[0, 1\)"),
        ({"slices": [(2, 5, 3, 3)]}, r"slices\[0\].A: shape \(2, 5\), expected \(r, 4\)"),
        ({"slices": [(2, 4, 3, 3)]}, r"slices\[0\].B: shape \(3, 3\), expected \(R, 2\)"),
        ({"slices": [(2, 4, 3, 2, 4)]}, r"slices\[0\]: rows 4 to 7 are not all within .* 6"),
        ({"implementation": "cuda"}, "'cuda': unknown, choose one of"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(3, 4),
        "weight": torch.zeros(6, 4),
        "bias": None,
        "slices": [],
    } | change
    arguments["slices"] = [
        LoraSlice(torch.zeros(sizes[:2]), torch.zeros(sizes[2:4]), 1.0, *sizes[4:])
        for sizes in arguments["slices"]
    ]
    with pytest.raises(ValueError, match=message):
        lora_linear(**arguments)
