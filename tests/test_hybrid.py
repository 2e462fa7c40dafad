"""Hybrid layers: a slow float64 re-derivation, identity at the start, who gets gradients."""

from __future__ import annotations

import math

import pytest
import torch

from emrrg.decoder import Decoder, DecoderConfig
from emrrg.errors import InputError
from emrrg.generation import GenerationConfig, generate, report_maps, word_maps
from emrrg.int8 import Int8Linear

GATES = ["token", "channel"]
SIZES = {
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 50.0,
}


def plain_decoder(hybrid_layers=(), hybrid_gate="token", **changes):
    """A decoder with large random weights and biases, in which every part shows."""
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.25)
    decoder.add_hybrid_layers(hybrid_layers, gate=hybrid_gate)
    return decoder


def trained_gates(decoder, std=0.7):
    """Move every new parameter away from its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if ".cross_attn." in name:
                parameter.add_(torch.randn_like(parameter) * std)
    return decoder


@pytest.fixture
def inputs():
    """Embeddings (2, 7, H), image tokens (2, 4, H), and which positions are text."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 7, 24, generator=generator)
    vis = torch.randn(2, 4, 24, generator=generator)
    text = torch.tensor([[1, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 1]], dtype=torch.bool)
    return x, vis, text


def slow_hidden_states(decoder, x, vis, text):
    """SPEC's hybrid decoder in float64, one position and one head at a time, without torch.nn."""
    config = decoder.config
    weights = {name: p.detach().double() for name, p in decoder.state_dict().items()}
    heads, kv_heads = config.num_attention_heads, config.kv_heads
    size = config.width_of_head

    def norm(v, weight):
        return v / torch.sqrt((v * v).mean() + config.rms_norm_eps) * weight

    def turn(v, position):
        out = torch.empty_like(v)
        half = size // 2
        for i in range(half):
            angle = position * config.rope_theta ** (-2 * i / size)
            cos, sin = math.cos(angle), math.sin(angle)
            out[i] = v[i] * cos - v[half + i] * sin
            out[half + i] = v[half + i] * cos + v[i] * sin
        return out

    def attend(query, keys, values):
        scores = torch.stack([query @ key for key in keys]) / math.sqrt(size)
        share = torch.exp(scores - scores.max())
        share = share / share.sum()
        return sum(s * v for s, v in zip(share, values, strict=True))

    rows = []
    for b in range(len(x)):
        stream = [x[b, t].double() for t in range(x.shape[1])]
        for index in range(config.num_hidden_layers):
            w = {
                name.removeprefix(f"model.layers.{index}."): p
                for name, p in weights.items()
                if name.startswith(f"model.layers.{index}.")
            }
            inside = [norm(s, w["input_layernorm.weight"]) for s in stream]
            q = [(w["self_attn.q_proj.weight"] @ t).view(heads, size) for t in inside]
            k = [(w["self_attn.k_proj.weight"] @ t).view(kv_heads, size) for t in inside]
            v = [(w["self_attn.v_proj.weight"] @ t).view(kv_heads, size) for t in inside]
            q = [torch.stack([turn(h, t) for h in rows_]) for t, rows_ in enumerate(q)]
            k = [torch.stack([turn(h, t) for h in rows_]) for t, rows_ in enumerate(k)]
            hybrid = index in config.hybrid_layers
            if hybrid:
                look = [norm(i.double(), w["input_layernorm.weight"]) for i in vis[b]]
                both = [
                    w["cross_attn.kv_proj.weight"] @ i + w["cross_attn.kv_proj.bias"] for i in look
                ]
                image_k = [kv[: kv_heads * size].view(kv_heads, size) for kv in both]
                image_v = [kv[kv_heads * size :].view(kv_heads, size) for kv in both]
            after = []
            for t in range(len(stream)):
                a, c = [], []
                for h in range(heads):
                    g = h // (heads // kv_heads)
                    a.append(
                        attend(q[t][h], [m[g] for m in k[: t + 1]], [m[g] for m in v[: t + 1]])
                    )
                    if hybrid:
                        c.append(attend(q[t][h], [m[g] for m in image_k], [m[g] for m in image_v]))
                a = torch.cat(a)
                if hybrid and text[b, t]:
                    if config.hybrid_gate == "token":
                        opened = w["cross_attn.gate.weight"][0] @ a + w["cross_attn.gate.bias"][0]
                        gate = torch.tanh(opened) * torch.tanh(w["cross_attn.alpha"])
                    else:
                        opened = w["cross_attn.scale"] * a + w["cross_attn.shift"]
                        gate = torch.sigmoid(opened) * torch.tanh(w["cross_attn.alpha"])
                    a = a + gate * torch.cat(c)
                s = stream[t] + w["self_attn.o_proj.weight"] @ a
                u = norm(s, w["post_attention_layernorm.weight"])
                up = w["mlp.up_proj.weight"] @ u
                z = w["mlp.gate_proj.weight"] @ u
                after.append(s + w["mlp.down_proj.weight"] @ (z / (1 + torch.exp(-z)) * up))
            stream = after
        rows.append(torch.stack([norm(s, weights["model.norm.weight"]) for s in stream]))
    return torch.stack(rows)


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_equals_the_slow_derivation(gate, inputs):
    x, vis, text = inputs
    decoder = trained_gates(plain_decoder(hybrid_layers=(0, 2), hybrid_gate=gate))
    expected = slow_hidden_states(decoder, x, vis, text)
    plain = slow_hidden_states(decoder, x, vis, torch.zeros_like(text))
    assert (expected - plain).abs().max() > 0.1  # the image is worth something here
    got = decoder.double().hidden_states(x.double(), vis=vis.double(), text_mask=text)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # angles are fp32
    got = decoder.float().hidden_states(x, vis=vis, text_mask=text)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_step_zero_is_the_plain_model_bit_for_bit(gate, bias, inputs):
    x, vis, text = inputs
    decoder = plain_decoder(qkv_bias=bias)
    mask = torch.ones(2, 7)
    mask[1, :2] = 0
    before = [decoder(x), decoder(x, mask)]
    decoder.add_hybrid_layers([0, 2], gate=gate)
    assert torch.equal(decoder(x), before[0])
    assert torch.equal(decoder(x, vis=vis), before[0])
    assert torch.equal(decoder(x, vis=vis, text_mask=text), before[0])
    assert torch.equal(decoder(x, mask, vis=vis, text_mask=text), before[1])
    layer = decoder.model.layers[2]
    width = layer.self_attn.k_proj.weight.shape[0]
    assert torch.equal(layer.cross_attn.kv_proj.weight[:width], layer.self_attn.k_proj.weight)
    assert torch.equal(layer.cross_attn.kv_proj.weight[width:], layer.self_attn.v_proj.weight)
    if bias:
        assert torch.equal(layer.cross_attn.kv_proj.bias[:width], layer.self_attn.k_proj.bias)
        assert torch.equal(layer.cross_attn.kv_proj.bias[width:], layer.self_attn.v_proj.bias)
    else:
        assert not layer.cross_attn.kv_proj.bias.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_step_zero_in_half_precision_and_autocast(dtype, inputs):
    x, vis, text = inputs
    decoder = plain_decoder()
    mask = torch.ones(2, 7)
    mask[1, :2] = 0
    with torch.autocast("cpu", dtype=dtype):
        before = decoder(x, mask)
    half = plain_decoder().to(dtype)
    half_before = half(x, mask)
    for model in (decoder, half):
        model.add_hybrid_layers([0, 1])
        assert model.model.layers[0].cross_attn.kv_proj.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(decoder(x, mask, vis=vis, text_mask=text), before)
    assert torch.equal(half(x, mask, vis=vis, text_mask=text), half_before)


@pytest.mark.parametrize("gate", GATES)
def test_gradients_reach_only_the_new_parameters(gate, inputs):
    x, vis, text = inputs
    decoder = plain_decoder(hybrid_layers=(0, 2), hybrid_gate=gate)
    new = set(decoder.hybrid_parameter_names())
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(name in new)
    labels = torch.randint(0, 29, (2, 7))
    decoder.loss(decoder.hidden_states(x, vis=vis, text_mask=text), labels).backward()
    grads = {n for n, p in decoder.named_parameters() if p.grad is not None}
    assert grads == new
    moved = {n for n, p in decoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {n for n in new if n.endswith("alpha")}  # alpha = 0 holds the others still
    trained_gates(decoder)
    decoder.zero_grad()
    decoder.loss(decoder.hidden_states(x, vis=vis, text_mask=text), labels).backward()
    assert {n for n in new if decoder.get_parameter(n).grad.any()} == new


@pytest.mark.parametrize("gate", GATES)
def test_every_gradient_by_finite_differences(gate, inputs):
    x, vis, _ = inputs
    decoder = plain_decoder(
        hidden_size=12, num_hidden_layers=1, hybrid_layers=(0,), hybrid_gate=gate
    )
    decoder = trained_gates(decoder).double()
    names = decoder.hybrid_parameter_names()
    start = [decoder.get_parameter(name).detach().clone().requires_grad_() for name in names]
    x = x[:1, :4, :12].double().requires_grad_()
    vis = vis[:1, :2, :12].double().requires_grad_()

    def run(x, vis, *values):
        return torch.func.functional_call(
            decoder, dict(zip(names, values, strict=True)), (x,), {"vis": vis}
        )

    assert torch.autograd.gradcheck(run, (x, vis, *start), fast_mode=True)


def test_frozen_layers_store_only_what_their_inputs_need(inputs):
    """Beyond weights, a frozen plain layer keeps exactly these tensors for the backward pass."""
    x, _, _ = inputs
    decoder = plain_decoder(num_hidden_layers=1).requires_grad_(False)
    weights = {p.untyped_storage().data_ptr() for p in decoder.parameters()}

    def stored(model, x):
        kept = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault((t.data_ptr(), t.shape), t), lambda t: t
        )
        with hooks:
            model.hidden_states(x)
        return [t for t in kept.values() if t.untyped_storage().data_ptr() not in weights]

    assert stored(decoder, x) == []  # nothing needs a gradient: nothing is stored
    kept = stored(decoder, x.clone().requires_grad_())
    elements = sum(t.numel() for t in kept)
    tokens, width, hidden = 14, 24, 40
    # Three norms: input and 1 / rms. Attention: q, k, v, output (grouped: k and v repeated),
    # log-sum-exp, rotation tables. SwiGLU: gate, silu(gate), up.
    norms = 3 * tokens * (width + 1)
    attention = tokens * (4 * width + 6) + 2 * 2 * 7 * 4
    swiglu = 3 * tokens * hidden
    assert elements <= norms + attention + swiglu


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_only_text_positions_receive_the_image(gate, inputs):
    x, vis, _ = inputs
    decoder = trained_gates(
        plain_decoder(num_hidden_layers=1, hybrid_layers=(0,), hybrid_gate=gate)
    )
    text = torch.zeros(2, 7, dtype=torch.bool)
    text[:, 5] = True
    moved = (
        (decoder(x, vis=vis, text_mask=text) - decoder(x, vis=vis * 2 + 1, text_mask=text))
        .abs()
        .amax((0, 2))
    )
    assert (moved > 1e-3).tolist() == [False] * 5 + [True, False]
    plain = decoder(x)
    got = decoder(x, vis=vis, text_mask=text)
    assert torch.equal(got[:, :5], plain[:, :5]) and torch.equal(got[:, 6], plain[:, 6])


@torch.no_grad()
def test_masked_image_tokens_do_not_count(inputs):
    x, vis, text = inputs
    decoder = trained_gates(plain_decoder(hybrid_layers=(0, 1)))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    got = decoder(x, vis=vis, vis_mask=mask, text_mask=text)
    expected = decoder(x, vis=vis[:, :3], text_mask=text)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_cached_steps_equal_the_whole_pass(gate, static, inputs):
    x, vis, text = inputs
    decoder = trained_gates(plain_decoder(hybrid_layers=(0, 2), hybrid_gate=gate))
    text[:, 5:] = True
    mask = torch.ones(2, 7)
    mask[1, :2] = 0
    image_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = decoder(x, mask, vis=vis, vis_mask=image_mask, text_mask=text)
    cache = decoder.new_cache(2, 5, 2, static=static)
    got = [
        decoder(
            x[:, :5], mask[:, :5], vis=vis, vis_mask=image_mask, text_mask=text[:, :5], cache=cache
        )
    ]
    image = {layer: (k.data_ptr(), v.data_ptr()) for layer, (k, v) in cache.image.items()}
    assert set(image) == {0, 2}
    # The steps are given no image: its keys and values are computed once.
    got += [decoder(x[:, t : t + 1], cache=cache) for t in (5, 6)]
    torch.testing.assert_close(
        torch.cat(got, 1)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4
    )
    assert image == {layer: (k.data_ptr(), v.data_ptr()) for layer, (k, v) in cache.image.items()}


@torch.no_grad()
def test_image_keys_are_computed_once_a_study(inputs, monkeypatch):
    x, vis, text = inputs
    decoder = trained_gates(plain_decoder(hybrid_layers=(0, 2)))
    sizes = []
    kind = type(decoder.model.layers[0].cross_attn)
    original = kind.keys_values
    monkeypatch.setattr(
        kind, "keys_values", lambda self, v: sizes.append(v.shape[:2]) or original(self, v)
    )
    config = GenerationConfig(num_beams=3, max_new_tokens=8, min_new_tokens=8)
    generate(decoder, x, vis=vis, text_mask=text, config=config)
    assert sizes == [(2, 4), (2, 4)]  # two layers, two studies: not once a beam, not once a step


@torch.no_grad()
def test_maps_are_the_softmax_and_change_nothing(inputs):
    x, vis, text = inputs
    decoder = trained_gates(plain_decoder(hybrid_layers=(0, 2)))
    maps = []
    with_maps = decoder.hidden_states(x, vis=vis, text_mask=text, maps=maps)
    assert torch.equal(with_maps, decoder.hidden_states(x, vis=vis, text_mask=text))
    assert [m.shape for m in maps] == [(2, 7, 4), (2, 7, 4)]
    # By hand, for layer 0: rotation, queries and keys anew, head by head.
    layer = decoder.model.layers[0]
    t = layer.input_layernorm(x)
    heads = layer.self_attn.q_proj(t).view(2, 7, 6, 4)
    angle = torch.arange(7)[:, None] * 50.0 ** (-torch.arange(0, 4, 2) / 4)
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    first, second = heads[..., :2], heads[..., 2:]
    q = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    k = layer.cross_attn.kv_proj(layer.input_layernorm(vis))[..., :8].view(2, 4, 2, 4)
    expected = torch.zeros(2, 7, 4)
    for head in range(6):
        scores = torch.einsum("btd,bid->bti", q[:, :, head], k[:, :, head // 3]) / 2
        expected += scores.softmax(-1) / 6
    torch.testing.assert_close(maps[0], expected)


@torch.no_grad()
def test_report_maps_belong_to_the_positions_that_chose_the_tokens(inputs):
    x, vis, text = inputs
    decoder = trained_gates(plain_decoder(hybrid_layers=(0, 2)))
    x, vis, text = x[:1], vis[:1], text[:1]
    ids = [3, 4, 5]
    got = report_maps(decoder, x, ids, vis=vis, text_mask=text)
    assert got.shape == (2, 3, 4)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3))
    maps = []
    decoder.hidden_states(x, vis=vis, text_mask=text, maps=maps)
    torch.testing.assert_close(got[:, 0], torch.stack(maps)[:, 0, -1])
    words = word_maps(got, [("no", 0, 1), ("effusion", 1, 3)])
    torch.testing.assert_close(words[:, 0], got[:, 0])
    torch.testing.assert_close(words[:, 1], (got[:, 1] + got[:, 2]) / 2)
    with pytest.raises(InputError, match="no hybrid layers"):
        report_maps(plain_decoder(), x, ids, vis=vis)


def test_names_counts_and_config_round_trip():
    config = DecoderConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        hybrid_layers=tuple(range(0, 32, 8)),
    )
    with torch.device("meta"):
        decoder = Decoder(config)
    names = decoder.hybrid_parameter_names()
    assert sum(decoder.get_parameter(name).numel() for name in names) == 134_266_888  # SPEC 2
    assert len(names) == 4 * 5
    assert all(name.startswith("model.layers.") and ".cross_attn." in name for name in names)
    assert DecoderConfig(**config.to_dict()) == config


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_state_dict_round_trip(gate, inputs):
    x, vis, text = inputs
    decoder = trained_gates(plain_decoder(hybrid_layers=(0, 2), hybrid_gate=gate))
    again = Decoder(decoder.config)
    again.load_state_dict(decoder.state_dict())
    assert torch.equal(again(x, vis=vis, text_mask=text), decoder(x, vis=vis, text_mask=text))


@torch.no_grad()
def test_hybrid_layers_over_int8_weights(inputs):
    x, vis, _ = inputs
    decoder = plain_decoder().to_int8()
    before = decoder(x)
    decoder.add_hybrid_layers([1])
    assert torch.equal(decoder(x, vis=vis), before)
    layer = decoder.model.layers[1]
    assert isinstance(layer.self_attn.k_proj, Int8Linear)
    torch.testing.assert_close(
        layer.cross_attn.kv_proj.weight[:8], layer.self_attn.k_proj.dequantized()
    )


def test_adding_layers_twice_and_what_is_refused():
    decoder = plain_decoder(hybrid_layers=(0,))
    kept = decoder.model.layers[0].cross_attn
    decoder.add_hybrid_layers([0, 2])
    assert decoder.model.layers[0].cross_attn is kept
    assert decoder.config.hybrid_layers == (0, 2)
    with pytest.raises(InputError, match="have a gate of kind 'token'"):
        decoder.add_hybrid_layers([1], gate="channel")
    with pytest.raises(InputError, match=r"3 is not a layer \(0 to 2\)"):
        decoder.add_hybrid_layers([3])
    with pytest.raises(InputError, match="hybrid_gate: 'none'"):
        DecoderConfig(**SIZES, hybrid_gate="none")


def test_the_image_decides_after_training(inputs):
    """Two studies that differ in the image alone: only looking can tell their reports apart."""
    _, vis, _ = inputs
    decoder = plain_decoder()
    decoder.add_hybrid_layers([0, 2])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2, weight_decay=0.0)
    reports = torch.tensor([[5, 6, 7, 2], [8, 9, 10, 2]])
    prompt = decoder.embed(torch.tensor([[1, 3], [1, 3]])).detach()
    for _ in range(100):
        embeds = torch.cat([prompt, decoder.embed(reports[:, :-1])], 1)
        hidden = decoder.hidden_states(embeds, vis=vis)
        loss = decoder.loss(hidden[:, 1:], reports)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    config = GenerationConfig(max_new_tokens=6)
    assert generate(decoder, prompt, vis=vis, config=config) == [[5, 6, 7], [8, 9, 10]]
    assert generate(decoder, prompt, vis=vis.flip(0), config=config) == [[8, 9, 10], [5, 6, 7]]
