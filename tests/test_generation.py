"""Generation equals Hugging Face's, token for token; and the cache is shared as promised."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import warnings
from pathlib import Path

import pytest
import torch

from emrrg import generation
from emrrg.cache import Cache, cache_bytes
from emrrg.decoder import Decoder, DecoderConfig
from emrrg.errors import InputError
from emrrg.generation import GenerationConfig, Step, generate, generate_sequences, penalise

transformers = pytest.importorskip("transformers", reason="transformers is the peer of these tests")

TINY_LLAMA = Path(__file__).parents[1] / "../shared/data/tiny-llama"
STUDIES, PREFIX = 3, 14
# Settings that the two spell differently are handled in `peer_reports`.
GRID = [
    {
        "num_beams": beams,
        "repetition_penalty": repetition,
        "length_penalty": length,
        "min_new_tokens": least,
        "max_new_tokens": most,
    }
    for beams, repetition, length, (least, most) in itertools.product(
        (1, 3, 5), (1.0, 2.0), (1.0, 2.0), ((0, 24), (8, 16), (6, 6))
    )
    if beams > 1 or length == 1.0
]
FURTHER = [
    {"num_beams": 1, "no_repeat_ngram_size": 2},
    {"num_beams": 3, "no_repeat_ngram_size": 3, "repetition_penalty": 1.3},
    {"num_beams": 3, "no_repeat_ngram_size": 1, "max_new_tokens": 12},
    {"num_beams": 1, "eos_token_id": (2, 13, 29), "min_new_tokens": 5},
    {"num_beams": 4, "eos_token_id": (2, 13, 29), "min_new_tokens": 5},
    {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0},
    {"num_beams": 5, "num_return_sequences": 2, "length_penalty": -1.0},
    {"num_beams": 3, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -0.5},
    {"num_beams": 2, "eos_token_id": None, "max_new_tokens": 10},
    {"num_beams": 1, "eos_token_id": None, "max_new_tokens": 10},
]
SAMPLING = [
    {"num_beams": 1},
    {"num_beams": 1, "temperature": 0.6, "num_return_sequences": 3},
    {"num_beams": 1, "top_k": 5, "repetition_penalty": 1.5},
    {"num_beams": 1, "top_p": 0.7, "temperature": 1.4, "num_return_sequences": 2},
    {"num_beams": 1, "top_k": 20, "top_p": 0.9, "min_new_tokens": 6},
    {"num_beams": 3, "top_k": 8, "temperature": 1.2},
    {"num_beams": 3, "top_p": 0.8, "num_return_sequences": 2},
    # Without an end mark two tokens stay possible, not one.
    {"num_beams": 3, "top_k": 1, "eos_token_id": None},
]


def name_of(settings):
    return "-".join(f"{key}={value}" for key, value in settings.items())


@pytest.fixture(scope="module")
def models():
    """A random model with sharp, varied choices and a common end mark; and its peer."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.35,
    )
    peer = transformers.LlamaForCausalLM(config).eval()
    ours = Decoder(DecoderConfig.from_huggingface(config.to_dict())).eval()
    ours.load_state_dict(peer.state_dict())
    return ours, peer


@pytest.fixture(scope="module")
def prefix():
    """Embeddings (B, T, H) and a mask with prompts of three lengths."""
    x = torch.randn(STUDIES, PREFIX, 32, generator=torch.Generator().manual_seed(4))
    mask = torch.ones(STUDIES, PREFIX, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, :2] = 0
    return x, mask


def peer_reports(peer, x, mask, **settings):
    """Hugging Face's reports, cut at their end mark."""
    settings = {"max_new_tokens": 24, "eos_token_id": 2, "do_sample": False, **settings}
    ends = settings["eos_token_id"]
    ends = [] if ends is None else list(ends) if isinstance(ends, tuple) else [ends]
    penalty = settings.pop("repetition_penalty", 1.0)
    processors = transformers.LogitsProcessorList()
    if penalty != 1.0:
        # transformers 5.24 given repetition_penalty exempts as many of the first *generated*
        # tokens as the prompt has pads (it takes the pads' number for an offset into what is
        # generated); the rule itself, given as a processor, counts all of them.
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
    settings["eos_token_id"] = ends or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.generation_config.eos_token_id = ends or None
        rows = peer.generate(
            inputs_embeds=x,
            attention_mask=mask,
            logits_processor=processors,
            pad_token_id=0,
            top_k=settings.pop("top_k", 0),
            **settings,
        ).tolist()
    limit = settings["max_new_tokens"]
    reports = []
    for row in rows:
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        reports.append(row[:limit] if stop is None else row[:stop])
    return reports


@pytest.mark.parametrize("settings", GRID, ids=name_of)
def test_equals_transformers(models, prefix, settings):
    ours, peer = models
    x, mask = prefix
    expected = peer_reports(peer, x, mask, **settings)
    got = generate(ours, x, mask, config=GenerationConfig(**settings))
    assert got == expected
    assert len(set(map(tuple, got))) == STUDIES


@pytest.mark.parametrize("settings", FURTHER, ids=name_of)
def test_equals_transformers_further(models, prefix, settings):
    ours, peer = models
    x, mask = prefix
    expected = peer_reports(peer, x, mask, **settings)
    config = GenerationConfig(**{"max_new_tokens": 24, **settings})
    assert generate(ours, x, mask, config=config) == expected


@pytest.mark.parametrize("settings", SAMPLING, ids=name_of)
def test_sampling_equals_transformers_from_the_same_seed(models, prefix, settings):
    ours, peer = models
    x, mask = prefix
    torch.manual_seed(5)
    expected = peer_reports(peer, x, mask, do_sample=True, **settings)
    torch.manual_seed(5)
    config = GenerationConfig(max_new_tokens=24, do_sample=True, **settings)
    got = generate(ours, x, mask, config=config)
    assert got == expected
    assert len(set(map(tuple, got))) > 1


def draw_settings(rng):
    """Settings of every kind together, at random."""
    most, beams = rng.choice([1, 2, 7, 15]), rng.choice([1, 2, 3, 6, 9])
    settings = {
        "num_beams": beams,
        "max_new_tokens": most,
        "repetition_penalty": rng.choice([1.0, 2.0, 0.8]),
        "no_repeat_ngram_size": rng.choice([0, 0, 2, 3]),
        "eos_token_id": rng.choice([2, 2, (2, 3), (1, 3, 4), None]),
        "do_sample": rng.random() < 0.3,
    }
    if settings["eos_token_id"] is not None:
        settings["min_new_tokens"] = rng.choice([0, min(3, most), most])
    if settings["do_sample"]:
        settings["temperature"] = rng.choice([0.5, 1.0, 1.7])
        settings["top_k"] = rng.choice([0, 4, 9])
    if beams > 1:
        settings["length_penalty"] = rng.choice([1.0, 2.0, 0.0, -1.0])
        settings["early_stopping"] = rng.choice([False, True, "never"])
        settings["num_return_sequences"] = rng.randint(1, min(3, beams))
    return settings


@pytest.mark.parametrize("seed", range(4))
def test_random_settings_equal_transformers(models, seed):
    ours, peer = models
    rng = random.Random(seed)
    for _ in range(12):
        batch, length = rng.choice([1, 2, 3]), rng.choice([1, 2, 9])
        x = torch.randn(batch, length, 32)
        mask = torch.ones(batch, length, dtype=torch.long)
        for row in mask:
            row[: rng.randrange(length)] = 0
        settings = draw_settings(rng)
        torch.manual_seed(seed)
        expected = peer_reports(peer, x, mask, **settings)
        torch.manual_seed(seed)
        static = rng.random() < 0.5
        got = generate(ours, x, mask, config=GenerationConfig(**settings), static=static)
        assert got == expected, (settings, mask.tolist())


@pytest.mark.parametrize("beams", [1, 4])
def test_trained_weights_equal_transformers(beams):
    if not TINY_LLAMA.exists():
        pytest.skip(f"{TINY_LLAMA} is not here")
    peer = transformers.LlamaForCausalLM.from_pretrained(TINY_LLAMA).eval()
    ours = Decoder.from_pretrained(TINY_LLAMA).eval()
    ids = torch.randint(3, 512, (2, 30), generator=torch.Generator().manual_seed(6))
    ids[:, 0] = 1
    x = ours.embed(ids).detach()
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :11] = 0
    settings = {
        "num_beams": beams,
        "repetition_penalty": 2.0,
        "min_new_tokens": 20,
        "max_new_tokens": 60,
    }
    expected = peer_reports(peer, x, mask, **settings)
    assert generate(ours, x, mask, config=GenerationConfig(**settings)) == expected


@pytest.mark.parametrize("settings", [GRID[0], GRID[-1], FURTHER[4], SAMPLING[3]], ids=name_of)
def test_fixed_shapes_give_the_same(models, prefix, settings):
    ours, _ = models
    x, mask = prefix
    config = GenerationConfig(
        **{"max_new_tokens": 24, "do_sample": settings in SAMPLING, **settings}
    )
    runs = []
    for static in (False, True):
        torch.manual_seed(7)
        runs.append(generate(ours, x, mask, config=config, static=static))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("window", [4, 9, 20])
@pytest.mark.parametrize("static", [False, True])
def test_sliding_window_equals_transformers(prefix, window, static):
    torch.manual_seed(8)
    config = transformers.MistralConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=window,
        initializer_range=0.35,
    )
    peer = transformers.MistralForCausalLM(config).eval()
    ours = Decoder(DecoderConfig.from_huggingface(config.to_dict())).eval()
    ours.load_state_dict(peer.state_dict())
    x, mask = prefix
    settings = {"num_beams": 3, "min_new_tokens": 20, "max_new_tokens": 24}
    expected = peer_reports(peer, x, mask, **settings)
    got = generate(ours, x, mask, config=GenerationConfig(**settings), static=static)
    assert got == expected


@pytest.mark.parametrize("settings", [GRID[3], GRID[-2], FURTHER[1]], ids=name_of)
def test_a_study_alone_equals_it_in_a_batch(models, prefix, settings):
    ours, _ = models
    x, mask = prefix
    config = GenerationConfig(**{"max_new_tokens": 24, **settings})
    together = generate(ours, x, mask, config=config)
    for study in range(STUDIES):
        real = mask[study].bool()
        alone = generate(ours, x[study : study + 1, real], config=config)
        assert alone == [together[study]]


def test_scores_are_log_probabilities(models, prefix):
    ours, _ = models
    x = prefix[0][:1]
    for settings in ({"num_beams": 1}, {"num_beams": 4, "length_penalty": 0.7}):
        config = GenerationConfig(max_new_tokens=24, **settings)
        (report,) = generate_sequences(ours, x, config=config)
        ids = torch.tensor([[*report.ids, 2]] if report.finished else [report.ids])
        with torch.no_grad():
            logits = ours(torch.cat([x, ours.embed(ids[:, :-1])], 1))[:, PREFIX - 1 :]
        total = logits.log_softmax(-1).gather(-1, ids[..., None]).sum()
        if "length_penalty" in settings:
            total = total / ids.shape[1] ** 0.7
        assert report.score == pytest.approx(total.item(), abs=1e-4)


def test_generator_makes_sampling_repeatable(models, prefix):
    ours, _ = models
    config = GenerationConfig(max_new_tokens=24, do_sample=True)
    first, second, third = (
        generate(ours, prefix[0], config=config, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first == second != third


def test_repetition_penalty_counts_every_generated_token_despite_pads():
    # What transformers 5.24 does not do on its own (see `peer_reports`).
    scores = torch.tensor([[1.0, -1.0, 4.0, 0.5]])
    config = GenerationConfig(repetition_penalty=2.0)
    got = penalise(scores, torch.tensor([[2, 1, 2]]), torch.tensor([3]), config)
    assert got.tolist() == [[1.0, -2.0, 2.0, 0.5]]


def test_a_prefix_is_held_once_a_study_and_beams_move_no_memory(models, prefix, monkeypatch):
    ours, _ = models
    x, mask = prefix
    seen = []
    original = Cache.append

    def append(cache, layer, k, v):
        keys, values = original(cache, layer, k, v)
        if layer == 0:
            seen.append((cache, cache.keys.data_ptr(), keys.clone()))
        return keys, values

    monkeypatch.setattr(Cache, "append", append)
    reorders = []
    monkeypatch.setattr(
        Cache,
        "reorder",
        lambda cache, parents, original=Cache.reorder: (
            reorders.append(parents.clone()) or original(cache, parents)
        ),
    )
    config = GenerationConfig(num_beams=5, min_new_tokens=12, max_new_tokens=12)
    generate(ours, x, mask, config=config)
    assert any((p != torch.arange(5)).any() for p in reorders)  # beams did change places
    cache, address, _ = seen[0]
    assert cache.keys.shape == (2, STUDIES, 2, PREFIX + 12 * 5, 8)
    assert all(c is cache and a == address for c, a, _ in seen)
    for (_, _, before), (_, _, after) in itertools.pairwise(seen):
        slots = before.shape[2]
        assert after.shape[2] == slots + 5
        assert torch.equal(after[:, :, :slots], before)  # nothing moved, whichever beam won


@pytest.mark.parametrize("static", [False, True])
def test_cache_bytes_foretells_the_memory(static):
    config = DecoderConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        hybrid_layers=(0, 2),
    )
    decoder = Decoder(config).to(torch.bfloat16)
    cache = decoder.new_cache(2, 11, 7, 5, static=static)
    vis = torch.randn(2, 6, 32)
    with torch.no_grad():
        decoder(torch.randn(2, 11, 32), vis=vis, cache=cache)
    expected = cache_bytes(
        config,
        batch=2,
        prefix=11,
        new_tokens=7,
        width=5,
        image_tokens=6,
        dtype=torch.bfloat16,
        static=static,
    )
    assert cache.nbytes == expected
    slots = 48 if static else 46
    assert expected == 2 * 2 * 8 * 2 * 2 * (3 * slots + 2 * 6)


def test_the_stated_memory_of_llama_2():
    llama = DecoderConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    )
    sizes = {"batch": 1, "prefix": 230, "new_tokens": 120, "dtype": torch.bfloat16}
    assert cache_bytes(llama, width=3, **sizes) == 295 * 2**20
    assert 3 * cache_bytes(llama, width=1, **sizes) == 525 * 2**20


def test_step_refuses_to_overrun(models, prefix):
    ours, _ = models
    for static in (False, True):
        cache = ours.new_cache(STUDIES, PREFIX, 1, static=static)
        with torch.inference_mode():
            ours(prefix[0], cache=cache)
            step = Step(ours, cache)
            step(torch.zeros(STUDIES, 1, dtype=torch.long))
            with pytest.raises(ValueError, match="made for 1 new tokens"):
                step(torch.zeros(STUDIES, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 0}, "num_beams: 0 is not at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens: 9 is above max_new_tokens 8"),
        ({"top_p": 1.5}, "top_p: 1.5 is above 1"),
        ({"temperature": 0.0}, "temperature: 0.0 is not above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: nan"),
        ({"length_penalty": float("inf")}, "length_penalty: inf"),
        ({"early_stopping": "soon"}, "early_stopping: 'soon'"),
        ({"num_return_sequences": 2}, "greedy reports would be the same"),
        ({"num_beams": 2, "num_return_sequences": 3}, "is above num_beams 2"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        GenerationConfig(**settings)


def test_input_that_cannot_be_is_refused_before_any_work(models, prefix, monkeypatch):
    ours, _ = models
    x, mask = prefix
    worked = []
    monkeypatch.setattr(Decoder, "hidden_states", lambda *a, **k: worked.append(1))
    with pytest.raises(InputError, match=r"14 .* and 60 to generate .*max_position_embeddings 64"):
        generate(ours, x, mask, config=GenerationConfig(max_new_tokens=60))
    with pytest.raises(InputError, match="eos_token_id: 40 is not in the vocabulary, 0 to 39"):
        generate(ours, x, mask, config=GenerationConfig(eos_token_id=40))
    with pytest.raises(InputError, match="pad_token_id: -1 is not in the vocabulary, 0 to 39"):
        generate(ours, x, mask, config=GenerationConfig(pad_token_id=-1))
    with pytest.raises(InputError, match="the prefix is empty"):
        generate(ours, x[:, :0], config=GenerationConfig(max_new_tokens=4))
    with pytest.raises(InputError, match="ends in a pad"):
        generate(ours, x, mask.flip(1), config=GenerationConfig(max_new_tokens=4))
    assert not worked


def test_empty_batch(models):
    assert generate(models[0], torch.zeros(0, 4, 32)) == []


class ReplayedGraph:
    """Stands for a CUDA graph: what Python held when it was captured is fixed, tensors live on."""

    captures = 0

    @contextlib.contextmanager
    def capture(self, step, run):
        self.step, self.run, self.at = step, run, step.cache.step
        ReplayedGraph.captures += 1
        yield

    def replay(self):
        cache = self.step.cache
        now, addresses = cache.step, [cache.keys.data_ptr(), cache.lineage.data_ptr()]
        cache.step = self.at
        self.step._logits.copy_(self.run(self.step._tokens))
        cache.step = now
        assert addresses == [cache.keys.data_ptr(), cache.lineage.data_ptr()]


@pytest.mark.parametrize(
    "settings", [GRID[0], GRID[-1], FURTHER[1], FURTHER[4], FURTHER[5], SAMPLING[1]], ids=name_of
)
@pytest.mark.parametrize("window", [None, 9])
def test_a_captured_step_can_be_replayed(models, prefix, monkeypatch, settings, window):
    """The capture on CUDA, played through on the CPU: no step may depend on a Python number."""
    ours, _ = models
    if window is not None:
        config = dataclasses.replace(ours.config, sliding_window=window)
        windowed = Decoder(config).eval()
        windowed.load_state_dict(ours.state_dict())
        ours = windowed
    x, mask = prefix
    config = GenerationConfig(
        **{"max_new_tokens": 24, "do_sample": settings in SAMPLING, **settings}
    )
    torch.manual_seed(7)
    expected = generate(ours, x, mask, config=config, static=False)
    steps = []

    def start(self, *args, original=Step.__init__):
        original(self, *args)
        self.graphed = True
        steps.append(self)

    class Stream:
        def wait_stream(self, other):
            pass

    nothing = contextlib.nullcontext
    monkeypatch.setattr(Step, "__init__", start)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nothing())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", ReplayedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda g: g.capture(steps[-1], steps[-1]._run))
    monkeypatch.setattr(ReplayedGraph, "captures", 0)
    torch.manual_seed(7)
    assert generate(ours, x, mask, config=config, static=True) == expected
    assert ReplayedGraph.captures == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [GRID[0], GRID[-1], FURTHER[4], FURTHER[5]], ids=name_of)
def test_graph_on_cuda_gives_the_same(models, prefix, settings):
    ours, _ = models
    x, mask = prefix
    config = GenerationConfig(**{"max_new_tokens": 24, **settings})
    expected = generate(ours, x, mask, config=config)
    ours.to("cuda")
    try:
        assert generate(ours, x.cuda(), mask.cuda(), config=config) == expected
    finally:
        ours.to("cpu")


@pytest.mark.parametrize("length", [40, 1024 * 9, 1024 * 30 + 17, 160_000])
def test_largest_is_topk(length: int) -> None:
    """The best of each block first; a rest that is no block, and candidates ruled out."""
    g = torch.Generator().manual_seed(length)
    x = torch.randperm(3 * length, generator=g).view(3, length).float()
    x[1] = x[1].sort(descending=True).values  # all in the first block
    x[2, : length // 2] = -torch.inf
    x[2, -1] = 1e9
    values, places = generation.largest(x, 10)
    expected = x.topk(10)
    assert torch.equal(values, expected.values) and torch.equal(places, expected.indices)
