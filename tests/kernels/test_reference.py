"""The reference itself: by hand, by loops over numbers, by numerical differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.reference import (
    RESET,
    SKIP,
    causal_conv1d_ref,
    cross_scan_ref,
    lora_linear_ref,
    scan_ref,
    selective_scan_ref,
    state_update_ref,
    step_flags,
    visiting_orders,
)

Normal = Callable[..., Tensor]


@pytest.fixture
def normal() -> Normal:
    """Random numbers in float64."""
    g = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)


def softplus(x: float) -> float:
    """log(1 + e^x)."""
    return math.log1p(math.exp(x))


def silu(x: float) -> float:
    """x / (1 + e^-x)."""
    return x / (1 + math.exp(-x))


def scan_by_numbers(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    z: np.ndarray,
    bias: np.ndarray,
    initial: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The docstring's equations, a number at a time; B, C (B, L, G, N)."""
    batch, length, dim = u.shape
    groups, state = B.shape[2:]
    out, h = np.zeros_like(u), initial.copy()
    for b in range(batch):
        for c in range(dim):
            group = c * groups // dim
            for t in range(length):
                d = softplus(delta[b, t, c] + bias[c])
                y = D[c] * u[b, t, c]
                for n in range(state):
                    h[b, c, n] *= math.exp(d * A[c, n])
                    h[b, c, n] += d * B[b, t, group, n] * u[b, t, c]
                    y += C[b, t, group, n] * h[b, c, n]
                out[b, t, c] = y * silu(z[b, t, c])
    return out, h


def scan_inputs(normal: Normal, groups: int = 2) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias, initial state; B 2, L 4, D 6, N 3."""
    row = (2, 4, groups, 3)
    parts = [normal(2, 4, 6), normal(2, 4, 6), -normal(6, 3).exp(), normal(*row), normal(*row)]
    return [*parts, normal(6), normal(2, 4, 6), normal(6), normal(2, 6, 3)]


def scan(inputs: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """`scan_ref` with softplus, its last state too."""
    options = {"delta_softplus": True, "initial_state": inputs[8], **options}
    result = scan_ref(*inputs[:8], return_last_state=True, **options)
    assert isinstance(result, tuple)
    return result


def close(a: Tensor, b: Tensor | np.ndarray) -> None:
    """To the last bits of float64."""
    torch.testing.assert_close(a, torch.as_tensor(b), rtol=1e-12, atol=1e-12)


# The scan.


def test_scan_by_numbers(normal: Normal) -> None:
    """Groups, skip, gate, bias, softplus and an initial state."""
    inputs = scan_inputs(normal)
    out, last = scan(inputs)
    expected = scan_by_numbers(*(t.numpy() for t in inputs))
    close(out, expected[0])
    close(last, expected[1])


def test_one_step_in_closed_form(normal: Normal) -> None:
    """L = 1 from a state of zero: y = d u <B, C> + D u, whatever A is."""
    u, delta, A, B, C, D, _, bias, _ = scan_inputs(normal, groups=1)
    step = slice(0, 1)
    out = scan_ref(
        u[:, step], delta[:, step], A, B[:, step], C[:, step], D, None, bias, delta_softplus=True
    )
    assert isinstance(out, Tensor)
    d = torch.logaddexp(delta[:, 0] + bias, torch.zeros(6, dtype=torch.float64))
    close(out[:, 0], u[:, 0] * (d * (B * C)[:, 0, 0].sum(-1, keepdim=True) + D))


def test_constant_input_in_closed_form() -> None:
    """Constant coefficients make a geometric series: h_t = d B u (1 - a^t) / (1 - a)."""
    ones = torch.ones(1, 6, 1, dtype=torch.float64)
    d, a = 0.5, math.exp(-0.5 * 3)
    out = scan_ref(ones, d * ones, torch.tensor([[-3.0]]).double(), 2 * ones, ones)
    assert isinstance(out, Tensor)
    t = torch.arange(1, 7, dtype=torch.float64)
    close(out[0, :, 0], d * 2 * (1 - a**t) / (1 - a))


def test_shapes_of_coefficients(normal: Normal) -> None:
    """(D, N), (B, L, N) and (B, L, G, N) mean the same where the numbers are the same."""
    inputs = scan_inputs(normal, groups=1)
    inputs[3] = inputs[3][:1, :1].expand(2, 4, 1, 3)
    expected = scan(inputs)
    for B in (inputs[3][:, :, 0], inputs[3].expand(-1, -1, 3, -1), inputs[3][0, 0].expand(6, 3)):
        for ours, true in zip(scan([*inputs[:3], B, *inputs[4:]]), expected, strict=True):
            close(ours, true)


def test_channels_first(normal: Normal) -> None:
    """mamba_ssm's layout is the same scan."""
    inputs = scan_inputs(normal)
    inputs[8] = torch.zeros_like(inputs[8])
    out, last = scan(inputs)
    u, delta, A, B, C, D, z, bias, _ = inputs
    first = [t.movedim(1, -1) for t in (u, delta, B, C, z)]
    ours = selective_scan_ref(
        first[0], first[1], A, first[2], first[3], D, first[4], bias, True, return_last_state=True
    )
    assert isinstance(ours, tuple)
    close(ours[0].mT, out)
    close(ours[1], last)
    alone = selective_scan_ref(first[0], first[1], A, first[2], first[3], D, first[4], bias, True)
    assert isinstance(alone, Tensor)
    close(alone, ours[0])


def test_reverse_is_a_flip(normal: Normal) -> None:
    """Of every input and of the output."""
    inputs = scan_inputs(normal)
    flipped = [t.flip(1) if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(inputs)]
    out, last = scan(flipped)
    ours, ours_last = scan(inputs, reverse=True)
    close(ours, out.flip(1))
    close(ours_last, last)


def test_two_halves_are_the_whole(normal: Normal) -> None:
    """The last state of one half begins the other."""
    inputs = scan_inputs(normal)
    out, last = scan(inputs)
    halves = [
        [t[:, half] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(inputs)]
        for half in (slice(0, 3), slice(3, 4))
    ]
    first, state = scan(halves[0])
    second, end = scan(halves[1], initial_state=state)
    close(torch.cat([first, second], dim=1), out)
    close(end, last)


def test_state_update_is_a_step(normal: Normal) -> None:
    """One step gives what the scan gives at its last."""
    inputs = scan_inputs(normal)
    out, last = scan(inputs)
    u, delta, A, B, C, D, z, bias, _ = inputs
    _, before = scan([t[:, :3] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(inputs)])
    ours, state = state_update_ref(
        before, u[:, 3], delta[:, 3], A, B[:, 3], C[:, 3], D, z[:, 3], bias, True
    )
    close(ours, out[:, 3])
    close(state, last)


def test_dtypes(normal: Normal) -> None:
    """The output has u's dtype, the state fp32, and fp64 where an input is."""
    inputs = scan_inputs(normal)
    half = [t.bfloat16() for t in inputs]
    out, last = scan(half)
    assert (out.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    single, _ = scan([t.float() for t in half])
    assert torch.equal(out, single.bfloat16())
    assert scan([half[0], inputs[1], *half[2:]])[1].dtype == torch.float64


# Packed sequences and padding.


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("by", ["seq_idx", "position_ids"])
def test_packed_is_separate(normal: Normal, reverse: bool, by: str) -> None:
    """Sequences of 1, 2 and 4 steps in a row are what each is alone, gradients included."""
    lengths = [1, 2, 4]
    u, delta, z = normal(1, 7, 2), normal(1, 7, 2), normal(1, 7, 2)
    B, C, A = normal(1, 7, 3), normal(1, 7, 3), -normal(2, 3).exp()
    rows = [t.requires_grad_() for t in (u, delta, B, C, z)]
    if by == "seq_idx":
        given = torch.repeat_interleave(torch.tensor([4, 4, 9]), torch.tensor([1, 2, 4]))
        given[0] = 0  # numbers may come back, only a change counts
    else:
        given = torch.cat([torch.arange(n) for n in lengths])
    flags = step_flags(1, 7, reverse=reverse, **{by: given})

    def run(steps: slice, marks: Tensor | None) -> Tensor:
        cut = [t[:, steps] for t in rows]
        out = scan_ref(
            cut[0], cut[1], A, cut[2], cut[3], None, cut[4], reverse=reverse, flags=marks
        )
        assert isinstance(out, Tensor)
        return out

    packed = run(slice(0, 7), flags)
    separate = torch.cat([run(slice(a, b), None) for a, b in ((0, 1), (1, 3), (3, 7))], dim=1)
    close(packed, separate)
    weight = normal(1, 7, 2)
    pairs = zip(
        torch.autograd.grad(packed, rows, weight, retain_graph=True),
        torch.autograd.grad(separate, rows, weight),
        strict=True,
    )
    for ours, true in pairs:
        close(ours, true)


def test_mask_passes_the_state(normal: Normal) -> None:
    """A masked step changes nothing and gives 0: as if it were not there."""
    inputs = scan_inputs(normal)
    mask = torch.tensor([[True, False, True, True], [True, False, True, True]])
    out, last = scan(inputs, flags=step_flags(2, 4, mask=mask))
    kept = [t[:, [0, 2, 3]] if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(inputs)]
    expected, expected_last = scan(kept)
    close(out[:, [0, 2, 3]], expected)
    close(last, expected_last)
    assert not out[:, 1].any()


def test_flags_by_hand() -> None:
    """Which bits stand where."""
    positions = torch.tensor([0, 1, 0, 1, 2])
    numbers = torch.tensor([[3, 3, 8, 8, 8]])
    mask = torch.tensor([[True, True, True, True, False]])
    for given in ({"position_ids": positions}, {"seq_idx": numbers}):
        flags = step_flags(1, 5, mask=mask, **given)
        assert flags is not None and flags.dtype == torch.uint8
        first = [RESET, 0, RESET, 0, SKIP] if "position_ids" in given else [0, 0, RESET, 0, SKIP]
        assert flags.tolist() == [first]
        flags = step_flags(1, 5, mask=mask, reverse=True, **given)
        assert flags is not None and flags.tolist() == [[0, RESET, 0, 0, SKIP]]
    assert step_flags(1, 5) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": torch.zeros(5), "seq_idx": torch.zeros(5)}, "give one of them"),
        ({"mask": torch.ones(2, 4)}, r"mask: shape \(2, 4\), expected \(1, 5\)"),
        ({"seq_idx": torch.ones(4)}, r"seq_idx: shape \(4,\)"),
    ],
)
def test_wrong_flags(given: dict[str, Tensor], message: str) -> None:
    """What does not fit is refused by name."""
    with pytest.raises(ValueError, match=message):
        step_flags(1, 5, **given)


# Visiting orders, convolution, cross scan.


def test_visiting_orders_by_hand() -> None:
    """2 rows of 3 patches, numbered row by row, the class token 3 between them."""
    #   0 1 2        0 1 2
    #   3 4 5   or   4 5 6 with the class token
    assert visiting_orders(2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [5, 4, 3, 2, 1, 0],
        [0, 3, 1, 4, 2, 5],
        [5, 2, 4, 1, 3, 0],
    ]
    assert visiting_orders(2, 3, cls_position=3).tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [6, 5, 4, 3, 2, 1, 0],
        [0, 4, 1, 3, 5, 2, 6],
        [6, 2, 5, 3, 1, 4, 0],
    ]
    assert visiting_orders(2, 3, cls_position=0)[2].tolist() == [0, 1, 4, 2, 5, 3, 6]
    assert visiting_orders(2, 3, cls_position=6)[2].tolist() == [0, 3, 1, 4, 2, 5, 6]


@pytest.mark.parametrize(
    ("rows", "columns", "cls", "message"),
    [(0, 3, None, "holds no patch"), (2, 2, 5, "5 is not in 0 ... 4"), (2, 2, -1, "-1 is not")],
)
def test_wrong_orders(rows: int, columns: int, cls: int | None, message: str) -> None:
    """No patches, or a class token outside."""
    with pytest.raises(ValueError, match=message):
        visiting_orders(rows, columns, cls)


def test_conv_by_numbers(normal: Normal) -> None:
    """Taps look back along the order of the visit, with zeros before the first step."""
    x, weight, bias = normal(2, 7, 3), normal(4, 3, 4), normal(4, 3)
    orders = visiting_orders(2, 3, cls_position=3)
    out = causal_conv1d_ref(x, weight, bias, orders)
    plain = causal_conv1d_ref(x, weight, None, orders, None)
    for k in range(4):
        for t in range(7):
            mixed = torch.zeros(2, 3, dtype=torch.float64)
            for w in range(4):
                if t - 3 + w >= 0:
                    mixed += weight[k, :, w] * x[:, orders[k, t - 3 + w]]
            close(plain[k, :, t], mixed)
            mixed = mixed + bias[k]
            close(out[k, :, t], mixed / (1 + torch.exp(-mixed)))


def test_cross_scan_by_numbers(normal: Normal) -> None:
    """Each order is a scan of its own; results return to their tokens, the mean is gated."""
    orders = visiting_orders(2, 2, cls_position=2)
    u, delta, A = normal(4, 2, 5, 3), normal(4, 2, 5, 3), -normal(4, 3, 2).exp()
    B, C, D, z, bias = (
        normal(4, 2, 5, 2),
        normal(4, 2, 5, 2),
        normal(4, 3),
        normal(2, 5, 3),
        normal(4, 3),
    )
    total = np.zeros((2, 5, 3))
    no_gate, zeros = np.full((2, 5, 3), 100.0), np.zeros((2, 3, 2))
    for k in range(4):
        y, _ = scan_by_numbers(
            *(t[k].numpy() for t in (u, delta, A)),
            *(t[k][:, :, None].numpy() for t in (B, C)),
            D[k].numpy(),
            no_gate,  # silu(100) is 100
            bias[k].numpy(),
            zeros,
        )
        for t, token in enumerate(orders[k].tolist()):
            total[:, token] += y[:, t] / 100
    gate = z.numpy() / (1 + np.exp(-z.numpy()))
    close(cross_scan_ref(u, delta, A, B, C, D, z, bias, orders), total / 4 * gate)


# The linear layer.


@dataclass
class Slice:
    """A low-rank update of some rows."""

    A: Tensor
    B: Tensor
    scale: float
    start: int = 0


def test_lora_linear_is_the_merged_layer(normal: Normal) -> None:
    """W + s B A on its rows; ranges may overlap; dropout's mask stands between A and B."""
    x, weight, bias = normal(2, 3, 5), normal(7, 5), normal(7)
    slices = [Slice(normal(2, 5), normal(4, 2), 0.5), Slice(normal(1, 5), normal(3, 1), -2.0, 3)]
    merged = weight.clone()
    for low in slices:
        merged[low.start : low.start + len(low.B)] += low.scale * low.B @ low.A
    close(lora_linear_ref(x, weight, bias, slices), x @ merged.T + bias)
    keep = [normal(2, 3, 2), normal(2, 3, 1)]
    expected = x @ weight.T
    expected[..., :4] += 0.5 * (x @ slices[0].A.T * keep[0]) @ slices[0].B.T
    expected[..., 3:6] -= 2 * (x @ slices[1].A.T * keep[1]) @ slices[1].B.T
    close(lora_linear_ref(x, weight, None, slices, keep), expected)


# Gradients, by differences.


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("flagged", [False, True])
def test_gradcheck_of_the_scan(normal: Normal, reverse: bool, flagged: bool) -> None:
    """All nine inputs, output and last state."""
    inputs = [t.requires_grad_() for t in scan_inputs(normal)]
    flags = torch.tensor([[0, RESET, 0, SKIP], [SKIP, 0, RESET | SKIP, 0]], dtype=torch.uint8)
    torch.autograd.gradcheck(
        lambda *t: scan(list(t), reverse=reverse, flags=flags if flagged else None), inputs
    )


def test_gradcheck_of_the_others(normal: Normal) -> None:
    """Convolution, cross scan, linear layer."""
    orders = visiting_orders(2, 2, cls_position=2)
    conv = [normal(1, 5, 2), normal(4, 2, 3), normal(4, 2)]
    cross = [normal(4, 1, 5, 2), normal(4, 1, 5, 2), -normal(4, 2, 2).exp(), normal(4, 1, 5, 2)]
    cross += [normal(4, 1, 5, 2), normal(4, 2), normal(1, 5, 2), normal(4, 2)]
    linear = [normal(3, 4), normal(5, 4), normal(5), normal(2, 4), normal(3, 2)]
    for tensors in (conv, cross, linear):
        for t in tensors:
            t.requires_grad_()
    torch.autograd.gradcheck(lambda *t: causal_conv1d_ref(*t, orders), conv)
    torch.autograd.gradcheck(lambda *t: cross_scan_ref(*t, orders), cross)
    torch.autograd.gradcheck(
        lambda x, w, b, low, high: lora_linear_ref(x, w, b, [Slice(low, high, 0.5, 1)]), linear
    )
