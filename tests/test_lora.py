"""Partial LoRA against its equation in float64, target by target."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from emrrg.decoder import Decoder, DecoderConfig
from emrrg.errors import InputError
from emrrg.int8 import Int8Linear
from emrrg.lora import (
    LORA_TARGETS,
    add_lora,
    lora_state_dict,
    merge_lora,
    stacked_linear,
    unmerge_lora,
)
from emrrg.vision import VISION_PRESETS, VisionMamba

ENCODER_TARGETS = tuple(t for t in LORA_TARGETS if t != "llm")
D, N, R = 24, 5, 2  # width, states, dt rank of the small encoder


def small(depth: int = 2) -> VisionMamba:
    torch.manual_seed(0)
    model = VisionMamba(image_size=(32, 48), dim=D, depth=depth, state_dim=N)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
            if "proj" in name:  # larger than at the start, so that B, C and dt matter
                parameter.mul_(0.3 if name.endswith("bias") else 3)
    return model.eval()


def awake(model: torch.nn.Module, names: list[str]) -> None:
    """Give B values, so that every adapter counts."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            if name.endswith(".B"):
                parameters[name].normal_(std=0.2)


def slow_encoder(s: dict[str, Tensor], image: Tensor, scale: float) -> Tensor:
    """One image (3, 32, 48) to (7, D); every adapter written out beside the layer it adapts."""

    def low_rank(x: Tensor, name: str) -> Tensor | float:
        if f"{name}.A" not in s:
            return 0.0
        return scale * ((x @ s[f"{name}.A"].T) @ s[f"{name}.B"].T)

    patches = image.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(6, -1)
    weight = s["patch_embed.proj.weight"].reshape(D, -1)
    x = patches @ weight.T + s["patch_embed.proj.bias"]
    x = x + low_rank(patches, "patch_embed.proj.lora_patch_embed")
    h = torch.cat([x[:3], s["cls_token"][0], x[3:]]) + s["pos_embed"][0]
    rows = [0, 1, 2, 3, 4, 5, 6]
    columns = [0, 4, 1, 3, 5, 2, 6]  # of a 2 x 3 grid with the class token as number 3
    for i in range(2):
        at = f"layers.{i}."
        t = F.layer_norm(h, (D,), s[f"{at}norm1.weight"], s[f"{at}norm1.bias"])
        m = f"{at}mixer."
        X = t @ s[f"{m}in_proj.weight"][:D].T + low_rank(t, f"{m}in_proj.lora_X")
        Z = t @ s[f"{m}in_proj.weight"][D:].T + low_rank(t, f"{m}in_proj.lora_Z")
        whole = low_rank(t, f"{m}in_proj.lora_in_proj")
        if isinstance(whole, Tensor):
            X, Z = X + whole[:, :D], Z + whole[:, D:]
        total = torch.zeros_like(X)
        orders = {"": rows, "_b": rows[::-1], "_c": columns, "_c_b": columns[::-1]}
        for k, order in orders.items():
            padded = torch.cat([X.new_zeros(3, D), X[order]])
            conv = s[f"{m}conv1d{k}.weight"][:, 0]
            mixed = torch.stack([(padded[j : j + 4] * conv.T).sum(0) for j in range(7)])
            u = F.silu(mixed + s[f"{m}conv1d{k}.bias"])
            x_proj = s[f"{m}x_proj{k}.weight"]
            dt = u @ x_proj[:R].T + low_rank(u, f"{m}x_proj{k}.lora_dt_in")
            B = u @ x_proj[R : R + N].T + low_rank(u, f"{m}x_proj{k}.lora_B")
            C = u @ x_proj[R + N :].T + low_rank(u, f"{m}x_proj{k}.lora_C")
            whole = low_rank(u, f"{m}x_proj{k}.lora_x_proj")
            if isinstance(whole, Tensor):
                dt, B, C = dt + whole[:, :R], B + whole[:, R : R + N], C + whole[:, R + N :]
            raw = dt @ s[f"{m}dt_proj{k}.weight"].T + low_rank(dt, f"{m}dt_proj{k}.lora_dt_proj")
            delta = F.softplus(raw + s[f"{m}dt_proj{k}.bias"])
            A = -s[f"{m}A{k}_log"].exp()
            state = torch.zeros_like(A)
            for step, place in enumerate(order):
                d = delta[step][:, None]
                state = (d * A).exp() * state + d * B[step] * u[step][:, None]
                y = state @ C[step] + s[f"{m}D{k}"] * u[step]
                total = total.index_add(0, torch.tensor([place]), y[None] / 4)
        y = total * F.silu(Z)
        h = h + y @ s[f"{m}out_proj.weight"].T + low_rank(y, f"{m}out_proj.lora_out_proj")
        t = F.layer_norm(h, (D,), s[f"{at}norm2.weight"], s[f"{at}norm2.bias"])
        gate, value = (
            F.linear(t, s[f"{at}mlp.{w}.weight"], s[f"{at}mlp.{w}.bias"]) for w in ("w1", "w2")
        )
        h = h + F.linear(F.silu(gate) * value, s[f"{at}mlp.w3.weight"], s[f"{at}mlp.w3.bias"])
    return F.layer_norm(h, (D,), s["norm_f.weight"], s["norm_f.bias"])


@pytest.mark.parametrize("targets", [*[(t,) for t in ENCODER_TARGETS], ENCODER_TARGETS])
def test_every_adapter_gradient_matches_float64(targets: tuple[str, ...]) -> None:
    model = small()
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        base = model(images)
    names = add_lora(model, targets, rank=3, scale=0.7, dropout=0.0)
    with torch.no_grad():
        assert torch.equal(model(images), base), "step 0 is not the base model"
    awake(model, names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    probe = torch.randn(base.shape)
    out = model(images)
    (out * probe).sum().backward()
    state = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    expected = torch.stack([slow_encoder(state, image.double(), 0.7) for image in images])
    (expected * probe).sum().backward()
    assert (expected - base).abs().max() > 1e-3, "the adapters do nothing"
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name not in names:
            assert parameter.grad is None, f"{name} is frozen, and has a gradient"
            continue
        expected_grad = state[name].grad
        assert parameter.grad is not None and expected_grad is not None, name
        error = (parameter.grad.double() - expected_grad).abs().max().item()
        assert error <= 2e-4 * max(1e-3, expected_grad.abs().max().item()), (name, error)


@pytest.mark.parametrize("targets", [*[(t,) for t in ENCODER_TARGETS], ENCODER_TARGETS])
def test_merging_and_back(targets: tuple[str, ...]) -> None:
    model = small()
    images = torch.randn(2, 3, 32, 48)
    plain = {n: p.detach().clone() for n, p in model.state_dict().items()}
    names = add_lora(model, targets, rank=3, scale=0.5, dropout=0.1)
    awake(model, names)
    with torch.no_grad():
        adapted = model(images)
        merge_lora(model)
        assert set(model.state_dict()) == set(plain), "a merged model is a plain one"
        torch.testing.assert_close(model(images), adapted, rtol=1e-4, atol=1e-5)
        fresh = small()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(images), model(images))
        unmerge_lora(model)
        assert torch.equal(model(images), adapted)
    for name, tensor in plain.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert set(lora_state_dict(model)) == set(names)


def test_merged_weights_are_the_equation_in_fp32() -> None:
    model = small(depth=1)
    awake(model, add_lora(model, ["X", "dt_in"], rank=3, scale=0.5))
    layer = model.layers[0].mixer.in_proj
    x_proj = model.layers[0].mixer.x_proj_c
    before = layer.weight.detach().clone(), x_proj.weight.detach().clone()
    X, dt_in = layer.lora_X, x_proj.lora_dt_in
    merge_lora(model)
    torch.testing.assert_close(layer.weight[:D], before[0][:D] + 0.5 * X.B @ X.A)
    assert torch.equal(layer.weight[D:], before[0][D:])
    torch.testing.assert_close(x_proj.weight[:R], before[1][:R] + 0.5 * dt_in.B @ dt_in.A)
    assert torch.equal(x_proj.weight[R:], before[1][R:])
    with pytest.raises(InputError, match="unmerge before saving"):
        lora_state_dict(model)
    merge_lora(model)  # nothing left to merge
    torch.testing.assert_close(layer.weight[:D], before[0][:D] + 0.5 * X.B @ X.A)


@pytest.mark.parametrize(("preset", "count"), [("base", 294_912), ("large", 786_432)])
def test_the_papers_count(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = VisionMamba(**VISION_PRESETS[preset])
    state = dict(model.named_parameters())
    names = add_lora(model, ["X"], rank=16)
    after = dict(model.named_parameters())
    assert sum(after[n].numel() for n in names) == count
    assert set(after) - set(names) == set(state)


@pytest.mark.parametrize("target", ENCODER_TARGETS)
def test_counts_are_closed_formulas(target: str) -> None:
    depth, r = 2, 3
    model = small(depth)
    names = add_lora(model, [target], rank=r)
    count = sum(dict(model.named_parameters())[n].numel() for n in names)
    whole = R + 2 * N
    assert (
        count
        == {
            "X": depth * r * (D + D),
            "Z": depth * r * (D + D),
            "dt_in": depth * 4 * r * (D + R),
            "B": depth * 4 * r * (D + N),
            "C": depth * 4 * r * (D + N),
            "in_proj": depth * r * (D + 2 * D),
            "out_proj": depth * r * (D + D),
            "x_proj": depth * 4 * r * (D + whole),
            "dt_proj": depth * 4 * r * (R + D),
            "patch_embed": r * (3 * 16 * 16 + D),
        }[target]
    )


def test_names_of_the_adapters() -> None:
    model = small(depth=1)
    names = add_lora(model, ["X", "B"], rank=2)
    mixer = "layers.0.mixer."
    assert names == [f"{mixer}in_proj.lora_X.A", f"{mixer}in_proj.lora_X.B"] + [
        f"{mixer}x_proj{k}.lora_B.{m}" for k in ("", "_b", "_c", "_c_b") for m in "AB"
    ]


def test_dropout_acts_on_the_rank_r_product_in_training_alone() -> None:
    model = small(depth=1)
    awake(model, add_lora(model, ["X", "x_proj"], rank=8, scale=1.0, dropout=0.5))
    layer = model.layers[0].mixer.in_proj
    x = torch.randn(400, D)
    with torch.no_grad():
        base = F.linear(x, layer.weight)[:, :D]
        A, B = layer.lora_X.A, layer.lora_X.B
        torch.testing.assert_close(layer(x)[:, :D], base + x @ A.T @ B.T)
        layer.train()
        torch.manual_seed(3)
        added = layer(x)[:, :D] - base
        # In the column space of B; each coefficient is zero or doubled, about half of each.
        inner = torch.linalg.lstsq(B.double(), added.double().T).solution.T
        ratio = inner / (x @ A.T).double()
        kept = ratio.abs() > 1
        torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 2), rtol=1e-2, atol=0)
        assert ratio[~kept].abs().max() < 1e-2
        assert abs(kept.double().mean().item() - 0.5) < 0.05
        layers = [getattr(model.layers[0].mixer, f"x_proj{k}") for k in ("", "_b", "_c", "_c_b")]
        u = torch.randn(4, 50, D)
        quiet = stacked_linear(layers, u)
        torch.testing.assert_close(
            quiet, torch.stack([m(v) for m, v in zip(layers, u, strict=True)])
        )
        for m in layers:
            m.train()
        torch.manual_seed(0)
        assert not torch.allclose(stacked_linear(layers, u), quiet)


def decoder() -> Decoder:
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Decoder(config).eval()


def test_the_llm_target() -> None:
    model = decoder()
    plain = set(model.state_dict())
    embeds = torch.randn(2, 5, 32)
    with torch.no_grad():
        base = model(embeds)
    names = add_lora(model, ["llm"], rank=4, scale=0.5, dropout=0.0)
    state = dict(model.named_parameters())
    assert sum(state[n].numel() for n in names) == 2 * 4 * ((32 + 32) + (32 + 16))
    assert set(model.state_dict()) == plain | set(names)
    with torch.no_grad():
        assert torch.equal(model(embeds), base)
    awake(model, names)
    out = model(embeds)
    out.sum().backward()
    for name in names:
        assert state[name].grad is not None and state[name].grad.abs().max() > 0, name
    reference = decoder()
    with torch.no_grad():
        for i, layer in enumerate(reference.model.layers):
            for part in ("q_proj", "v_proj"):
                at = f"model.layers.{i}.self_attn.{part}.lora_llm"
                getattr(layer.self_attn, part).weight += 0.5 * state[f"{at}.B"] @ state[f"{at}.A"]
        torch.testing.assert_close(reference(embeds), out, rtol=1e-4, atol=1e-5)
        merge_lora(model)
        torch.testing.assert_close(model(embeds), out, rtol=1e-4, atol=1e-5)
    assert set(model.state_dict()) == plain


@pytest.mark.parametrize("int8", [False, True])
def test_gradients_of_the_llm_target_match_float64(int8: bool) -> None:
    """Against dA = s B^T dW, dB = s dW A^T, with dW of the merged model in float64."""
    model, reference = decoder(), decoder()
    with torch.no_grad():
        for parameter in (*model.parameters(), *reference.parameters()):
            if parameter.ndim == 2:  # larger than at the start, so that attention matters
                parameter.mul_(8)
    if int8:
        model.to_int8()
    names = add_lora(model, ["llm"], rank=4, scale=0.5, dropout=0.0)
    awake(model, names)
    model.requires_grad_(False)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    embeds, labels = torch.randn(2, 5, 32), torch.randint(0, 40, (2, 5))
    model.loss(model.hidden_states(embeds), labels).backward()
    weights: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            path, _, last = name.rpartition(".")
            layer = model.get_submodule(path)
            if isinstance(layer, Int8Linear) and last == "weight":
                parameter.copy_(layer.dequantized())
            if name.endswith(("q_proj.weight", "v_proj.weight")):
                weights[path] = parameter
        reference.double()
        for path, weight in weights.items():
            adapter = model.get_submodule(f"{path}.lora_llm")
            weight += 0.5 * adapter.B.double() @ adapter.A.double()
    logits = reference(embeds.double())
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for path, weight in weights.items():
        adapter = model.get_submodule(f"{path}.lora_llm")
        assert weight.grad is not None and weight.grad.abs().max() > 1e-4
        for name, got, expected in (
            ("A", adapter.A.grad, 0.5 * adapter.B.double().T @ weight.grad),
            ("B", adapter.B.grad, 0.5 * weight.grad @ adapter.A.double().T),
        ):
            error = (got.double() - expected).abs().max().item()
            assert error <= 2e-4 * expected.abs().max().item(), (path, name, error)
    frozen = [n for n, p in model.named_parameters() if n not in names and p.grad is not None]
    assert not frozen


def test_adapters_on_int8_weights_learn_but_do_not_merge() -> None:
    model = decoder().to_int8()
    embeds = torch.randn(2, 5, 32)
    with torch.no_grad():
        base = model(embeds)
    names = add_lora(model, ["llm"], rank=4, dropout=0.0)
    with torch.no_grad():
        assert torch.equal(model(embeds), base)
    awake(model, names)
    model(embeds).sum().backward()
    assert all(dict(model.named_parameters())[n].grad is not None for n in names)
    with pytest.raises(InputError, match="int8"):
        merge_lora(model)


def test_half_precision_base_with_fp32_adapters() -> None:
    model = small()
    names = add_lora(model, ["X", "out_proj", "B"], rank=3, dropout=0.0)
    awake(model, names)
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(images)
    assert (rounded.float() - exact).norm() / exact.norm() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        model(images).sum().backward()
    state = dict(model.named_parameters())
    assert all(state[n].grad is not None and state[n].grad.dtype == torch.float32 for n in names)
    half = decoder().to(torch.bfloat16)
    names = add_lora(half, ["llm"], rank=4, dropout=0.0)
    awake(half, names)
    assert all(dict(half.named_parameters())[n].dtype == torch.float32 for n in names)
    half(torch.randn(2, 5, 32, dtype=torch.bfloat16)).float().sum().backward()
    assert all(dict(half.named_parameters())[n].grad is not None for n in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["Y"]}, "'Y': is not one of X, Z"),
        ({"targets": ["X", "X"]}, "'X': is adapted already"),
        ({"targets": ["llm"]}, "no decoder"),
        ({"targets": ["X"], "rank": 0}, "rank: 0"),
        ({"targets": ["X"], "dropout": 1.0}, "dropout: 1.0"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_lora(small(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no vision Mamba"):
        add_lora(decoder(), ["X"])
