"""Beam search after an image prefix: this project against transformers, in one run.

Four layers, 512 wide, a prefix of 230 tokens, 5 beams, the same weights, settings and threads; the
tokens are compared before anything is timed. Groups stand for a setting, so that both stand in one
table. `extra_info` holds the cache's bytes, the tokens a second, and the machine.

    pytest benchmarks/bench_generation.py --benchmark-only
"""

from __future__ import annotations

import platform
import warnings

import pytest
import torch

from emrrg.cache import cache_bytes
from emrrg.decoder import Decoder, DecoderConfig
from emrrg.generation import GenerationConfig, generate

transformers = pytest.importorskip("transformers", reason="transformers is the peer")

PREFIX, BEAMS = 230, 5
# Studies a batch, vocabulary, new tokens; the prefix and the width stay.
SHAPES = {
    "smoke": [(1, 2000, 8)],
    "default": [(1, 32000, 60), (1, 2000, 60), (4, 32000, 60)],
    "full": [(1, 32000, 100), (1, 2000, 100), (4, 32000, 100), (16, 2000, 100)],
}
ROUNDS = {"smoke": 1, "default": 5, "full": 10}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One case a shape of the chosen size."""
    shapes = SHAPES[metafunc.config.getoption("--size")]
    names = [f"{batch}x{PREFIX}-v{vocabulary}-n{new}" for batch, vocabulary, new in shapes]
    metafunc.parametrize("setting", shapes, ids=names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def setting(request):
    """Both models with the same weights, the prefix, and the settings."""
    batch, vocabulary, new = request.param
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
    )
    peer = transformers.LlamaForCausalLM(config).eval()
    ours = Decoder(DecoderConfig.from_huggingface(config.to_dict())).eval()
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(batch, PREFIX, 512) * 0.02
    options = {
        "num_beams": BEAMS,
        "min_new_tokens": new,
        "max_new_tokens": new,
        "repetition_penalty": 2.0,
        "length_penalty": 2.0,
    }
    return ours, peer, x, options


def ours_runs(ours, x, options):
    """Reports of this project, (B, new) as lists."""
    return generate(ours, x, config=GenerationConfig(**options))


def peer_runs(peer, x, options):
    """Reports of transformers, (B, new) as lists."""
    mask = torch.ones(x.shape[:2], dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on penalties and inputs_embeds: as meant
        return peer.generate(
            inputs_embeds=x, attention_mask=mask, do_sample=False, pad_token_id=0, **options
        ).tolist()


@pytest.mark.parametrize("who", ["emrrg", "transformers"])
def test_beam_search(benchmark, setting, who, size, request):
    ours, peer, x, options = setting
    benchmark.group = f"beam-search-{request.node.callspec.id.removesuffix(f'-{who}')}"
    expected = peer_runs(peer, x, options)
    assert ours_runs(ours, x, options) == expected
    new = options["max_new_tokens"]
    benchmark.extra_info |= {
        "tokens": len(x) * new,
        "threads": torch.get_num_threads(),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cache_bytes": cache_bytes(
            ours.config,
            batch=len(x) * (1 if who == "emrrg" else BEAMS),
            prefix=PREFIX,
            new_tokens=new,
            width=BEAMS if who == "emrrg" else 1,
        ),
    }
    run, model = (ours_runs, ours) if who == "emrrg" else (peer_runs, peer)
    benchmark.pedantic(run, args=(model, x, options), rounds=ROUNDS[size], warmup_rounds=1)
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        benchmark.extra_info["tokens_per_second"] = round(len(x) * new / median, 1)
