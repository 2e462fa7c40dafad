"""The decoder against transformers, and its loading, cache and loss against plain code."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from emrrg import decoder as decoder_module
from emrrg.cache import cache_bytes
from emrrg.decoder import Decoder, DecoderConfig
from emrrg.errors import InputError

transformers = pytest.importorskip("transformers", reason="transformers is the peer of these tests")

TINY_LLAMA = Path(__file__).parents[1] / "../shared/data/tiny-llama"

SMALL = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,  # large enough that a mistake anywhere shows in the logits
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
# One entry a family and a variant that a real folder has.
FAMILIES = {
    "llama-2": ("Llama", {"num_key_value_heads": 6}),
    "llama-grouped-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-3": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("Llama", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "mistral-head-dim": ("Mistral", {"sliding_window": 5, "head_dim": 12}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
}


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """A random model of each family: transformers', and ours read from its folder."""
    family, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **changes})
    peer = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():  # biases start at zero, which would hide them
        for name, parameter in peer.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    peer.save_pretrained(tmp_path)
    return peer, Decoder.from_pretrained(tmp_path).eval()


@torch.no_grad()
def test_logits_equal_transformers(pair):
    peer, ours = pair
    ids = torch.randint(0, 61, (3, 40))
    expected = peer(ids).logits
    got = ours(ours.embed(ids))
    assert expected.std() > 0.5
    assert (got - expected).abs().max() < 1e-4


@torch.no_grad()
def test_padded_prompts_equal_transformers(pair):
    peer, ours = pair
    ids = torch.randint(0, 61, (3, 30))
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[1, :9] = 0
    mask[2, :1] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = peer(ids, attention_mask=mask, position_ids=positions).logits
    got = ours(ours.embed(ids), mask)
    assert (got - expected)[mask.bool()].abs().max() < 1e-4
    # Pads are as good as absent: the second study alone, without its pads.
    alone = ours(ours.embed(ids[1:2, 9:]))
    assert (got[1:2, 9:] - alone).abs().max() < 1e-4
    assert got.isfinite().all()


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_cached_steps_equal_transformers(pair, padded):
    peer, ours = pair
    ids = torch.randint(0, 61, (2, 40))
    mask = torch.ones(2, 40, dtype=torch.long)
    if padded:
        mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = peer(ids, attention_mask=mask, position_ids=positions).logits
    x = ours.embed(ids)
    cache = ours.new_cache(2, 25, 15)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    parts = [ours(x[:, :25], mask[:, :25] if padded else None, cache=cache)]
    parts += [ours(x[:, t : t + 1], cache=cache) for t in range(25, 40)]
    difference = (torch.cat(parts, 1) - expected)[mask.bool()]
    assert difference.abs().max() < 1e-4


@torch.no_grad()
def test_trained_weights_equal_transformers():
    if not TINY_LLAMA.exists():
        pytest.skip(f"{TINY_LLAMA} is not here")
    peer = transformers.LlamaForCausalLM.from_pretrained(TINY_LLAMA).eval()
    ours = Decoder.from_pretrained(TINY_LLAMA).eval()
    ids = torch.randint(0, 512, (2, 200), generator=torch.Generator().manual_seed(1))
    expected = peer(ids).logits
    assert (ours(ours.embed(ids)) - expected).abs().max() < 1e-4
    cache = ours.new_cache(2, 190, 10)
    x = ours.embed(ids)
    parts = [ours(x[:, :190], cache=cache)]
    parts += [ours(x[:, t : t + 1], cache=cache) for t in range(190, 200)]
    assert (torch.cat(parts, 1) - expected).abs().max() < 1e-4
