"""The relatives of LoRA, each against its own definition in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from emrrg.errors import InputError
from emrrg.lora import add_lora, lora_state_dict, merge_lora
from emrrg.peft import (
    PEFT_METHODS,
    PeftSettings,
    active_methods,
    adapter_parameter_names,
    add_peft,
    decay_multiplier,
    merge_peft,
    peft_state_dict,
    unmerge_peft,
)
from emrrg.vision import VisionMamba, affix_orders, prompt_orders

D, N, R, DEPTH, F_DIM = 24, 5, 2, 2, 64  # width, states, dt rank, blocks, MLP width
SETTINGS = PeftSettings(extra_states=3, affix_tokens=2, prompt_tokens=5, adapter_dim=6)
SUFFIXES = ("", "_b", "_c", "_c_b")
TOKENS = ("affix", "affix-projected", "prompt", "prompt-projected")
COMBINED = ("additional-scan", "affix", "delta-A", "delta-D", "delta-conv1d", "delta-bias",
            "parallel-adapter", "prompt")  # fmt: skip


def small(**changes: object) -> VisionMamba:
    torch.manual_seed(0)
    arguments = {"image_size": (32, 48), "dim": D, "depth": DEPTH, "state_dim": N, **changes}
    model = VisionMamba(**arguments)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
            if "proj" in name:  # larger than at the start, so that B, C and dt matter
                parameter.mul_(0.3 if name.endswith("bias") else 3)
    return model.eval()


def awake(model: torch.nn.Module, names: list[str]) -> None:
    parameters = dict(model.named_parameters())
    torch.manual_seed(1)
    with torch.no_grad():
        for name in names:
            parameters[name].add_(torch.randn_like(parameters[name]) * 0.2)


def slow_encoder(s: dict[str, Tensor], image: Tensor) -> Tensor:
    """One image (3, 32, 48) to (7, D): every method written out where it acts."""

    def given(name: str) -> Tensor | float:
        return s.get(name, 0.0)

    def tokens(kind: str) -> Tensor | None:
        if f"peft_{kind}.tokens" in s:
            return s[f"peft_{kind}.tokens"]
        if f"peft_{kind}.embedding" not in s:
            return None
        hidden = s[f"peft_{kind}.embedding"] @ s[f"peft_{kind}.inner.weight"].T
        hidden = torch.tanh(hidden + s[f"peft_{kind}.inner.bias"])
        out = hidden @ s[f"peft_{kind}.outer.weight"].T + s[f"peft_{kind}.outer.bias"]
        if kind == "prompt":
            return out
        return torch.stack([row.view(DEPTH, 4, D) for row in out], dim=2)

    patches = image.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(6, -1)
    x = patches @ s["patch_embed.proj.weight"].reshape(D, -1).T + s["patch_embed.proj.bias"]
    h = torch.cat([x[:3], s["cls_token"][0], x[3:]]) + s["pos_embed"][0]
    rows, columns = list(range(7)), [0, 4, 1, 3, 5, 2, 6]  # 2 x 3 patches, class token number 3
    prompt, affix = tokens("prompt"), tokens("affix")
    if prompt is not None:
        h = torch.cat([h, prompt])
        half = len(prompt) // 2
        before, after = list(range(7, 7 + half)), list(range(7 + half, 7 + len(prompt)))
        rows, columns = before + rows + after, before + columns + after
    orders = {"": rows, "_b": rows[::-1], "_c": columns, "_c_b": columns[::-1]}
    for i in range(DEPTH):
        at, m = f"layers.{i}.", f"layers.{i}.mixer."
        t = F.layer_norm(h, (D,), s[f"{at}norm1.weight"], s[f"{at}norm1.bias"])
        X, Z = (t @ s[f"{m}in_proj.weight"].T).split(D, dim=-1)
        total = torch.zeros_like(X)
        for k, (suffix, order) in enumerate(orders.items()):
            extra = X.new_zeros(0, D) if affix is None else affix[i, k]
            visited = torch.cat([extra, X[order]])
            delta_conv = given(f"{m}peft_delta_conv1d")
            conv = s[f"{m}conv1d{suffix}.weight"][:, 0]
            conv = conv + (delta_conv[k] if isinstance(delta_conv, Tensor) else 0)
            padded = torch.cat([X.new_zeros(3, D), visited])
            mixed = torch.stack([(padded[j : j + 4] * conv.T).sum(0) for j in range(len(visited))])
            u = F.silu(mixed + s[f"{m}conv1d{suffix}.bias"])
            dt, B, C = (u @ s[f"{m}x_proj{suffix}.weight"].T).split([R, N, N], dim=-1)
            A_log = s[f"{m}A{suffix}_log"]
            skip, bias = s[f"{m}D{suffix}"], s[f"{m}dt_proj{suffix}.bias"]
            if f"{m}peft_delta_A" in s:
                A_log = A_log + s[f"{m}peft_delta_A"][k]
            if f"{m}peft_delta_D" in s:
                skip = skip + s[f"{m}peft_delta_D"][k]
            if f"{m}peft_delta_bias" in s:
                bias = bias + s[f"{m}peft_delta_bias"][k]
            if f"{m}peft_scan.A_log" in s:
                A_log = torch.cat([s[f"{m}peft_scan.A_log"][k], A_log], dim=1)
                B = torch.cat([u @ s[f"{m}peft_scan.B"][k].T, B], dim=1)
                C = torch.cat([u @ s[f"{m}peft_scan.C"][k].T, C], dim=1)
            delta = F.softplus(dt @ s[f"{m}dt_proj{suffix}.weight"].T + bias)
            state = torch.zeros_like(A_log)
            for step in range(len(visited)):
                d = delta[step][:, None]
                state = (d * -A_log.exp()).exp() * state + d * B[step] * u[step][:, None]
                place = step - len(extra)
                if place >= 0:
                    y = state @ C[step] + skip * u[step]
                    total = total.index_add(0, torch.tensor([order[place]]), y[None] / 4)
        y = total * F.silu(Z)
        h = h + y @ s[f"{m}out_proj.weight"].T
        if f"{m}peft_adapter.up.weight" in s:
            inner = (y @ s[f"{m}peft_adapter.down.weight"].T).clamp(min=0)
            h = h + 0.1 * inner @ s[f"{m}peft_adapter.up.weight"].T
        t = F.layer_norm(h, (D,), s[f"{at}norm2.weight"], s[f"{at}norm2.bias"])
        gate, value = (
            F.linear(t, s[f"{at}mlp.{w}.weight"], s[f"{at}mlp.{w}.bias"]) for w in ("w1", "w2")
        )
        h = h + F.linear(F.silu(gate) * value, s[f"{at}mlp.w3.weight"], s[f"{at}mlp.w3.bias"])
    return F.layer_norm(h[:7], (D,), s["norm_f.weight"], s["norm_f.bias"])


@pytest.mark.parametrize("methods", [*[(m,) for m in PEFT_METHODS], COMBINED])
def test_forward_and_every_gradient_match_float64(methods: tuple[str, ...]) -> None:
    model = small()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        base = model(images)
    names = add_peft(model, methods, SETTINGS)
    assert active_methods(model) == sorted(methods, key=PEFT_METHODS.index)
    assert adapter_parameter_names(model) == names
    with torch.no_grad():
        start = model(images)
        if set(methods) & set(TOKENS):
            assert not torch.equal(start, base)
            tokens = [
                getattr(model, f"peft_{m.partition('-')[0]}")() for m in methods if m in TOKENS
            ]
            assert all(t.abs().max() < 0.1 for t in tokens), "tokens do not start small"
        else:
            torch.testing.assert_close(start, base, rtol=1e-6, atol=1e-6)
            if "additional-scan" not in methods:  # there the sum over states may be reordered
                assert torch.equal(start, base), "step 0 is not the base model"
    awake(model, names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    probe = torch.randn(base.shape)
    out = model(images)
    (out * probe).sum().backward()
    state = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    expected = torch.stack([slow_encoder(state, image.double()) for image in images])
    (expected * probe).sum().backward()
    assert (expected - base).abs().max() > 1e-3, "the method does nothing"
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name not in names:
            assert parameter.grad is None, f"{name} is frozen, and has a gradient"
            continue
        wanted = state[name].grad
        assert parameter.grad is not None and wanted is not None, name
        error = (parameter.grad.double() - wanted).abs().max().item()
        assert error <= 2e-4 * max(1e-3, wanted.abs().max().item()), (name, error)


@pytest.mark.parametrize("method", PEFT_METHODS)
def test_counts_are_closed_formulas(method: str) -> None:
    model = small()
    names = add_peft(model, [method], SETTINGS)
    parameters = dict(model.named_parameters())
    count = sum(parameters[n].numel() for n in names)
    hidden = F_DIM
    assert hidden == model.layers[0].mlp.w1.out_features
    assert (
        count
        == {
            "delta-A": DEPTH * 4 * D * N,
            "delta-D": DEPTH * 4 * D,
            "delta-conv1d": DEPTH * 4 * D * 4,
            "delta-bias": DEPTH * 4 * D,
            "additional-scan": DEPTH * 4 * 3 * (D + D + D),
            "parallel-adapter": DEPTH * 6 * (D + D),
            "affix": DEPTH * 4 * 2 * D,
            "affix-projected": 2 * D + (D * D + D) + (D + 1) * DEPTH * 4 * D,
            "prompt": 5 * D,
            "prompt-projected": 5 * D + (D * D + D) + (D * D + D),
            "bias": D + DEPTH * (4 * D + 4 * D + 2 * hidden + D + 2 * D) + D,
        }[method]
    )


@pytest.mark.parametrize("method", ["delta-A", "delta-D", "delta-conv1d", "delta-bias"])
def test_deltas_merge_bit_for_bit_and_back(method: str) -> None:
    model = small()
    plain = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 32, 48)
    names = add_peft(model, [method])
    awake(model, names)
    with torch.no_grad():
        adapted = model(images)
        assert merge_peft(model) == []
        assert set(model.state_dict()) == set(plain) and active_methods(model) == []
        fresh = small()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(images), adapted)
        unmerge_peft(model)
        assert torch.equal(model(images), adapted)
    assert active_methods(model) == [method]
    for name, tensor in plain.items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("kind", ["affix", "prompt"])
def test_projected_tokens_collapse_into_plain_ones(kind: str) -> None:
    model = small()
    images = torch.randn(2, 3, 32, 48)
    awake(model, add_peft(model, [f"{kind}-projected"], SETTINGS))
    with torch.no_grad():
        before = model(images)
        assert merge_peft(model) == [kind]
        assert list(peft_state_dict(model)) == [f"peft_{kind}.tokens"]
        torch.testing.assert_close(model(images), before, rtol=1e-5, atol=1e-6)
        plain = small()
        add_peft(plain, [kind], SETTINGS)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(images), model(images))


def test_with_lora_everything_is_saved_apart_and_merges() -> None:
    model = small()
    images = torch.randn(2, 3, 32, 48)
    plain = set(model.state_dict())
    lora = add_lora(model, ["X", "B"], rank=2, dropout=0.0)
    mine = add_peft(model, ["delta-A", "parallel-adapter", "prompt"], SETTINGS)
    assert set(peft_state_dict(model)) == set(mine) and not set(mine) & set(lora)
    assert set(lora_state_dict(model)) == set(lora)
    assert set(model.state_dict()) == plain | set(mine) | set(lora)
    assert set(adapter_parameter_names(model)) == set(mine) | set(lora)
    awake(model, lora + mine)
    with torch.no_grad():
        before = model(images)
        merge_lora(model)
        assert merge_peft(model) == ["parallel-adapter", "prompt"]
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


def test_orders_with_tokens() -> None:
    orders = torch.tensor([[0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 2, 0]])
    assert prompt_orders(orders, 3).tolist() == [
        [3, 0, 1, 2, 4, 5],
        [5, 4, 2, 1, 0, 3],
        [3, 0, 2, 1, 4, 5],
        [5, 4, 1, 2, 0, 3],
    ]
    assert affix_orders(orders, 2)[1].tolist() == [5, 6, 2, 1, 0, 3, 4, 7, 8, 9, 10]
    assert all(sorted(row) == list(range(11)) for row in affix_orders(orders, 2).tolist())


@pytest.mark.parametrize("methods", [("affix", "prompt"), ("additional-scan", "parallel-adapter")])
def test_checkpointing_compiling_and_bf16(methods: tuple[str, ...]) -> None:
    model = small()
    awake(model, names := add_peft(model, methods, SETTINGS))
    images = torch.randn(2, 3, 32, 48)
    out = model(images)
    out.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if n in names}
    model.zero_grad()
    model.checkpointing = True
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in names:
            torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    model.checkpointing = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), out)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(images)
    assert (rounded.float() - out).norm() / out.norm() < 0.05


def test_resize_and_meta_device_with_tokens() -> None:
    model = small()
    add_peft(model, ["prompt", "affix"], SETTINGS)
    model.resize((64, 64))
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 17, D)


def test_weight_decay_is_raised_for_deltas() -> None:
    assert decay_multiplier("layers.0.mixer.peft_delta_A") == 10
    assert decay_multiplier("visual_encoder.layers.0.mixer.peft_delta_bias") == 100
    assert decay_multiplier("layers.0.mixer.peft_scan.A_log") == 0
    assert decay_multiplier("layers.0.mixer.in_proj.lora_X.A") == 1


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["lora"], "'lora': is not one of additional-scan"),
        (["delta-A", "delta-A"], "'delta-A': is there already"),
        (["affix", "affix-projected"], "the other form of affix"),
    ],
)
def test_what_cannot_be_is_refused(methods: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_peft(small(), methods)
    with pytest.raises(InputError, match="no vision Mamba"):
        add_peft(torch.nn.Linear(2, 2), ["prompt"])
    with pytest.raises(InputError, match="extra states: 0"):
        PeftSettings(extra_states=0)
