"""The decoder against transformers, and its loading, cache and loss against plain code."""

from __future__ import annotations

import collections
import io
import json
import subprocess
import sys
import weakref
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from emrrg import building
from emrrg import decoder as decoder_module
from emrrg.cache import cache_bytes
from emrrg.config import TrainConfig
from emrrg.decoder import Decoder, DecoderConfig
from emrrg.decoder_config import rope_frequencies
from emrrg.errors import InputError
from emrrg.generation import GenerationConfig, generate
from emrrg.int8 import Int8Linear
from emrrg.pretrained import WeightFolder
from emrrg.tokenizer import load_tokenizer

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


def write_folder(folder, *, shards=None, dtype=torch.float32, **changes):
    """A random Llama in `folder`; `shards`: bytes a file."""
    torch.manual_seed(0)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **changes}))
    options = {} if shards is None else {"max_shard_size": shards}
    peer.to(dtype).save_pretrained(folder, **options)
    return peer.eval()


def edit_config(folder, **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


@torch.no_grad()
def test_shards_are_read_one_tensor_at_a_time(tmp_path, monkeypatch):
    peer = write_folder(tmp_path, shards=40_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    alive = []
    original = WeightFolder.read

    def read(self, names):
        for name, tensor in original(self, names):
            assert not any(earlier() is not None for earlier in alive)
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    monkeypatch.setattr(WeightFolder, "read", read)
    ours = Decoder.from_pretrained(tmp_path)
    assert len(alive) == len(list(ours.parameters()))
    ids = torch.randint(0, 61, (1, 9))
    assert (ours(ours.embed(ids)) - peer(ids).logits).abs().max() < 1e-4
    # The weights are the decoder's own: the files may go.
    for file in files:
        file.write_bytes(b"")
    assert (ours(ours.embed(ids)) - peer(ids).logits).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("binary", [False, True])
def test_peak_memory_is_the_model_and_little_more_than_a_shard(tmp_path, binary):
    """A 390 MB fp32 folder in 50 MB shards, read into bf16: at most 195 + 50 MB and some."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc/self/status")
    config = {
        "vocab_size": 4000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    write_folder(tmp_path, shards=50_000_000, **config)
    files = as_bin(tmp_path) if binary else list(tmp_path.glob("*.safetensors"))
    total = sum(f.stat().st_size for f in files)
    assert total > 350_000_000
    script = f"""
import torch
from emrrg.decoder import Decoder
def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024
before = peak()
decoder = Decoder.from_pretrained({str(tmp_path)!r}, dtype=torch.bfloat16)
print(peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert int(done.stdout) < total / 2 + 50_000_000 + 30_000_000


@torch.no_grad()
def test_dtype_of_the_weights(tmp_path):
    write_folder(tmp_path, dtype=torch.bfloat16)
    assert Decoder.from_pretrained(tmp_path).dtype == torch.bfloat16  # as stored
    ours = Decoder.from_pretrained(tmp_path, dtype=torch.float32, hybrid_layers=[0])
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    half = Decoder.from_pretrained(tmp_path, hybrid_layers=[0])
    x = torch.randn(1, 5, 48)
    vis = torch.randn(1, 3, 48)
    got = half(x, vis=vis)
    assert got.dtype == torch.bfloat16
    expected = ours(x, vis=vis)
    assert (got - expected).abs().max() < 0.05 * expected.std()


@torch.no_grad()
def test_config_of_transformers_4(tmp_path):
    """rope_theta and rope_scaling stood at the top level, and the type was called `type`."""
    peer = write_folder(tmp_path, rope_parameters=LLAMA3_ROPE)
    old = {k: v for k, v in LLAMA3_ROPE.items() if k not in ("rope_theta", "rope_type")}
    edit_config(
        tmp_path, rope_parameters=..., rope_theta=500.0, rope_scaling={**old, "type": "llama3"}
    )
    ours = Decoder.from_pretrained(tmp_path)
    ids = torch.randint(0, 61, (2, 50))
    assert (ours(ours.embed(ids)) - peer(ids).logits).abs().max() < 1e-4
    edit_config(tmp_path, rope_scaling=None)
    plain = Decoder.from_pretrained(tmp_path)
    assert plain.config.rope_theta == 500.0 and plain.config.rope_scaling is None
    assert (plain(ours.embed(ids)) - peer(ids).logits).abs().max() > 1e-2


def test_llama3_frequencies_equal_transformers():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**LLAMA3_ROPE, "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(head_dim=128, rope_parameters=scaling)
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](config)
    ours = DecoderConfig.from_huggingface({**SMALL, **config.to_dict()})
    torch.testing.assert_close(rope_frequencies(ours), expected, rtol=1e-6, atol=0)
    assert factor == 1.0


def test_old_files_with_rotary_buffers_load(tmp_path):
    write_folder(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, file)
    ours = Decoder.from_pretrained(tmp_path)
    assert ours.lm_head is None


def as_bin(folder, *, zipped=True):
    """Turn the safetensors of a folder into the ``.bin`` files of years ago."""
    for file in folder.glob("*.safetensors"):
        state = collections.OrderedDict(safetensors.torch.load_file(file))
        state._metadata = {"": {"version": 1}}
        name = file.name.replace("model", "pytorch_model", 1).replace("safetensors", "bin")
        torch.save(state, folder / name, _use_new_zipfile_serialization=zipped)
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace(".safetensors", ".bin").replace("model-", "pytorch_model-")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()
    return sorted(folder.glob("*.bin"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("shards", [None, 40_000])
@torch.no_grad()
def test_bin_files_give_the_same_weights(tmp_path, zipped, shards, monkeypatch):
    write_folder(tmp_path, shards=shards, dtype=torch.bfloat16)
    expected = Decoder.from_pretrained(tmp_path).state_dict()
    files = as_bin(tmp_path, zipped=zipped)
    assert len(files) > 3 if shards else [f.name for f in files] == ["pytorch_model.bin"]
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was run"))
    got = Decoder.from_pretrained(tmp_path).state_dict()
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == torch.bfloat16 and torch.equal(got[name], tensor), name


class Program:
    """Opens a file when an ordinary unpickler meets it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_broken_bin_files_are_named_before_any_tensor_is_read(tmp_path, zipped, monkeypatch):
    write_folder(tmp_path, shards=40_000)
    last = as_bin(tmp_path, zipped=zipped)[-1]
    monkeypatch.setattr(decoder_module, "load_tensor", lambda *a: pytest.fail("it was read"))
    whole = last.read_bytes()
    for length in (len(whole) - 40, len(whole) // 2, 10, 0):
        last.write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"{last.name}: .*(cut short|not a PyTorch file)"):
            Decoder.from_pretrained(tmp_path)
    if zipped:  # whole to look at, but a tensor's bytes are missing or too few
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        entry = next(name for name in parts if name.endswith("/data/1"))
        for bytes_ in (None, parts[entry][:-4]):
            with zipfile.ZipFile(last, "w") as archive:
                for name, content in (parts | {entry: bytes_}).items():
                    if content is not None:
                        archive.writestr(name, content)
            with pytest.raises(InputError, match=rf"{last.name}: storage 1 has \d+ bytes of \d+"):
                Decoder.from_pretrained(tmp_path)
    torch.save({"x": Program(tmp_path / "mark")}, last, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=rf"{last.name}: its pickle asks for io\.open"):
        Decoder.from_pretrained(tmp_path)
    assert not (tmp_path / "mark").exists()
    torch.save([1], last, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=rf"{last.name}: holds a list"):
        Decoder.from_pretrained(tmp_path)
    last.unlink()
    with pytest.raises(InputError, match=rf"{last.name}: is missing"):
        Decoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_what_a_config_leaves_out_means_what_it_means_there(family):
    sizes = {k: SMALL[k] for k in ("vocab_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"hidden_size": 256, "num_attention_heads": 32}
    kind = getattr(transformers, f"{family}Config")
    bare = {"model_type": kind.model_type, **sizes}
    if family == "Qwen2":
        bare["use_sliding_window"] = True
    expected = DecoderConfig.from_huggingface(kind(**bare).to_dict())
    assert DecoderConfig.from_huggingface(bare) == expected


def test_flags_meet_the_config_before_the_weights_are_read(tmp_path, llama_folder, monkeypatch):
    folder = llama_folder(tmp_path / "llm")  # three layers, 512 positions
    pieces = load_tokenizer(folder).vocab_size
    monkeypatch.setattr(Decoder, "from_pretrained", lambda *a, **k: pytest.fail("it was read"))

    def build(**flags):
        config = TrainConfig(llm=str(folder), regime="encoder", preset="tiny", **flags)
        building.build_model(config, [], torch.device("cpu"))

    with pytest.raises(InputError, match=r"--max-new-tokens: 26 image tokens, .* 512 positions"):
        build(max_new_tokens=500)
    with pytest.raises(InputError, match=r"--max-report-tokens.* 442 image tokens.* 512 positions"):
        build(image_size=336)
    with pytest.raises(InputError, match=r"--hybrid-layers: 3 is not a layer \(0 to 2\)"):
        build(hybrid_layers=(0, 3))
    edit_config(folder, vocab_size=pieces - 1)
    with pytest.raises(InputError, match=rf"--tokenizer: {pieces} pieces, .* {pieces - 1} embed"):
        build()
    edit_config(folder, vocab_size=pieces + 1024)
    with pytest.raises(InputError, match=r"--tokenizer: .* it is another model's tokenizer"):
        build()
    edit_config(folder, model_type="gpt2")
    with pytest.raises(InputError, match=r"config\.json: model_type: 'gpt2'"):
        build()


def test_a_model_of_7_billion_in_int8_fits_on_a_card_of_16_gb():
    config = DecoderConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32,
    )  # fmt: skip
    with torch.device("meta"):
        decoder = Decoder(config).to(torch.bfloat16).to_int8()
    size = sum(t.numel() * t.element_size() for t in decoder.state_dict().values())
    assert 6.9e9 < size < 7.1e9  # 6.48 in the layers, 0.52 in embedding and output
    # With its keys and values for 16 studies of 5 beams, and the largest matrix as bf16.
    cache = cache_bytes(config, batch=16, prefix=230, new_tokens=100, width=5, dtype=torch.bfloat16)
    assert size + cache + 2 * 4096 * 11008 < 16e9


def cut_a_shard(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def change_a_tensor(folder, change):
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


BROKEN = {
    "no-config": (lambda f: (f / "config.json").unlink(), r"holds no config\.json"),
    "bad-json": (lambda f: (f / "config.json").write_text("{"), r"config\.json: is not valid JSON"),
    "no-weights": (
        lambda f: [p.unlink() for p in f.glob("*.safetensors*")],
        r"holds no weights: no model\.safetensors and no pytorch_model\.bin",
    ),
    "missing-shard": (
        lambda f: sorted(f.glob("*.safetensors"))[2].unlink(),
        r"model-00003-of-\d+\.safetensors: is missing",
    ),
    "short-shard": (cut_a_shard, r"model-00002-of-\d+\.safetensors: .*cut short"),
    "no-safetensors": (
        lambda f: sorted(f.glob("*.safetensors"))[0].write_text("hello"),
        r"model-00001-of-\d+\.safetensors: .*cut short",
    ),
    "index-lies": (
        lambda f: change_a_tensor(f, lambda t: t.pop(next(iter(t)))),
        r"model-00001-of-\d+\.safetensors: lacks tensor",
    ),
    "shape": (
        lambda f: edit_config(f, intermediate_size=81),
        r"mlp\..*_proj\.weight has shape \(.*\), but config\.json says \(.*81.*\)",
    ),
    "more-layers": (
        lambda f: edit_config(f, num_hidden_layers=4),
        r"tensor model\.layers\.3\..* is missing",
    ),
    "fewer-layers": (
        lambda f: edit_config(f, num_hidden_layers=2),
        r"tensor model\.layers\.2\..* has no place in a llama",
    ),
    "other-architecture": (
        lambda f: edit_config(f, model_type="gpt2"),
        r"config\.json: model_type: 'gpt2' is not supported",
    ),
    "activation": (
        lambda f: edit_config(f, hidden_act="gelu"),
        r"config\.json: hidden_act: 'gelu'",
    ),
    "rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        r"config\.json: rope_scaling: type 'yarn' is not supported",
    ),
    "rope-number": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "llama3", "factor": 4.0}),
        r"rope_scaling: low_freq_factor is missing",
    ),
    "quantised": (
        lambda f: edit_config(f, quantization_config={"quant_method": "awq"}),
        r"config\.json: quantization_config: quantised weights cannot be read",
    ),
    "no-size": (lambda f: edit_config(f, hidden_size=...), r"hidden_size: None, expected a whole"),
    "heads": (
        lambda f: edit_config(f, num_attention_heads=5, head_dim=...),
        r"num_attention_heads: 5 does not divide hidden_size 48",
    ),
    "kv-heads": (
        lambda f: edit_config(f, num_key_value_heads=4),
        r"num_key_value_heads: 4 does not divide num_attention_heads 6",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_named_before_any_tensor_is_read(case, tmp_path, monkeypatch):
    change, message = BROKEN[case]
    write_folder(tmp_path, shards=40_000)
    change(tmp_path)
    read = []
    monkeypatch.setattr(decoder_module, "load_tensor", lambda *a: read.append(a))
    with pytest.raises(InputError, match=message) as caught:
        Decoder.from_pretrained(tmp_path)
    assert not read
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_no_folder(tmp_path):
    with pytest.raises(InputError, match="nowhere: is not a folder"):
        Decoder.from_pretrained(tmp_path / "nowhere")


def small_decoder(**changes):
    torch.manual_seed(0)
    sizes = {k: v for k, v in SMALL.items() if k != "initializer_range"}
    return Decoder(DecoderConfig(**{**sizes, **changes}))


def test_wrong_input_is_named():
    ours = small_decoder(max_position_embeddings=8)
    x = torch.zeros(2, 8, 48)
    ours(x)
    with pytest.raises(InputError, match=r"9 tokens .*max_position_embeddings 8"):
        ours(torch.zeros(2, 9, 48))
    with pytest.raises(ValueError, match=r"inputs_embeds: expected \(B, T, 48\), got \(2, 8, 47\)"):
        ours(torch.zeros(2, 8, 47))
    with pytest.raises(ValueError, match=r"attention_mask: expected \(2, 8\), got \(2, 7\)"):
        ours(x, torch.ones(2, 7))
    with pytest.raises(ValueError, match=r"vis: expected \(2, I, 48\), got \(1, 3, 48\)"):
        ours(x, vis=torch.zeros(1, 3, 48))
    with pytest.raises(ValueError, match=r"vis_mask: expected \(2, 3\), got \(2, 4\)"):
        ours(x, vis=torch.zeros(2, 3, 48), vis_mask=torch.ones(2, 4))
    cache = ours.new_cache(2, 4, 3)
    with pytest.raises(ValueError, match=r"expected \(2, 4, 48\) to fill the cache"):
        ours(x, cache=cache)
    ours(x[:, :4], cache=cache)
    with pytest.raises(ValueError, match=r"expected \(2, 1, 48\) to go on with the cache"):
        ours(x[:, :2], cache=cache)
    with pytest.raises(ValueError, match="the cache knows it already"):
        ours(x[:, :1], torch.ones(2, 1), cache=cache)


def test_without_pads_attention_is_causal_alone(monkeypatch):
    """The fast path: no (T, T) mask is built where there are no pads and no window."""
    ours = small_decoder()
    calls = []
    original = F.scaled_dot_product_attention

    def spy(*args, **options):
        calls.append((options.get("attn_mask"), options.get("is_causal")))
        return original(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    ours(torch.randn(2, 6, 48))
    ours(torch.randn(2, 6, 48), torch.ones(2, 6))
    assert calls == [(None, True)] * 6


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [None, 61 * 5, 61])
def test_loss_equals_cross_entropy_gradients_included(tied, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setattr(decoder_module, "LOSS_CHUNK", chunk)
    ours = small_decoder(tie_word_embeddings=tied).double()
    hidden = torch.randn(3, 9, 48, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 61, (3, 9))
    labels[0, 4:] = -100
    labels[2, 0] = -100
    weight = ours.model.embed_tokens.weight if tied else ours.lm_head.weight

    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    reference = torch.autograd.grad(expected, (hidden, weight))
    loss = ours.loss(hidden, labels)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for name, got, want in zip(("hidden", "weight"), gradients, reference, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8, msg=name)
    # A second backward pass gives the same.
    again = torch.autograd.grad(ours.loss(hidden, labels), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


def test_loss_never_holds_all_logits():
    """No tensor as large as (tokens, 32000) is ever made, forward or backward."""
    ours = small_decoder(vocab_size=32000).requires_grad_(False)
    hidden = torch.randn(4, 60, 48, requires_grad=True)
    labels = torch.randint(0, 32000, (4, 60))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t is not ours.lm_head.weight:
                    own = t.untyped_storage().data_ptr() != ours.lm_head.weight.data_ptr()
                    largest = max(largest, t.numel() * own)
            return out

    with Watch():
        ours.loss(hidden, labels).backward()
    assert 0 < largest <= decoder_module.LOSS_CHUNK < 240 * 32000 / 3


def test_loss_of_half_precision_is_computed_in_fp32():
    ours = small_decoder().to(torch.bfloat16)
    hidden = torch.randn(2, 9, 48, dtype=torch.bfloat16)
    labels = torch.randint(0, 61, (2, 9))
    expected = F.cross_entropy(ours.logits(hidden).float().flatten(0, 1), labels.flatten())
    torch.testing.assert_close(ours.loss(hidden, labels), expected)


def test_loss_without_labels_is_zero():
    ours = small_decoder()
    hidden = torch.randn(2, 3, 48, requires_grad=True)
    loss = ours.loss(hidden, torch.full((2, 3), -100))
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


@torch.no_grad()
def test_int8_weights_are_rounded_a_channel_at_a_time():
    torch.manual_seed(0)
    linear = nn.Linear(20, 7)
    linear.weight[3] *= 100  # one large channel must not coarsen the others
    linear.weight[5] = 0
    made = Int8Linear.from_linear(linear)
    assert made.weight.dtype == torch.int8
    error = (made.dequantized() - linear.weight).abs()
    assert (error <= linear.weight.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all()
    x = torch.randn(4, 3, 20)
    expected = F.linear(x, made.dequantized(), linear.bias)
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-4)  # one channel is large
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made(x).dtype == torch.bfloat16


def test_int8_gradient_of_the_input():
    made = Int8Linear.from_linear(nn.Linear(6, 5))
    x = torch.randn(3, 6, requires_grad=True)
    made(x).square().sum().backward()
    y = x.detach().requires_grad_()
    F.linear(y, made.dequantized(), made.bias).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert not any(p.requires_grad for p in made.parameters())


@torch.no_grad()
def test_int8_from_pretrained(tmp_path):
    write_folder(tmp_path, attention_bias=True)
    full = Decoder.from_pretrained(tmp_path).eval()
    ours = Decoder.from_pretrained(tmp_path, int8=True).eval()
    converted = Decoder.from_pretrained(tmp_path).eval().to_int8()
    x = torch.randn(2, 9, 48)
    expected = full(x)
    got = ours(x)
    assert torch.equal(got, converted(x))
    assert 0 < (got - expected).std() < 0.05 * expected.std()
    layers = {n for n, m in ours.named_modules() if isinstance(m, Int8Linear)}
    assert len(layers) == 3 * 7
    stored = sum(t.numel() * t.element_size() for t in ours.model.layers.state_dict().values())
    plain = sum(t.numel() * t.element_size() for t in full.model.layers.state_dict().values())
    assert stored < 0.35 * plain
    # Cached steps agree with the whole pass, as with any weights.
    cache = ours.new_cache(2, 8, 1)
    steps = torch.cat([ours(x[:, :8], cache=cache), ours(x[:, 8:], cache=cache)], 1)
    torch.testing.assert_close(steps, got)
    again = Decoder.from_pretrained(tmp_path).to_int8()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x), got)


@torch.no_grad()
def test_int8_trained_weights_choose_nearly_the_same_tokens():
    if not TINY_LLAMA.exists():
        pytest.skip(f"{TINY_LLAMA} is not here")
    full = Decoder.from_pretrained(TINY_LLAMA).eval()
    ours = Decoder.from_pretrained(TINY_LLAMA, int8=True).eval()
    config = GenerationConfig(max_new_tokens=200)
    story = generate(full, full.embed(torch.tensor([[1]])), config=config)[0]
    x = full.embed(torch.tensor([[1, *story]]))
    agree = (full(x).argmax(-1) == ours(x).argmax(-1)).float().mean()
    assert agree > 0.9  # of 260 thousand parameters; large models lose far less


@pytest.mark.parametrize("rows", [(1, 5), (3, 5), (2, 10)])
def test_logits_of_a_large_vocabulary_in_blocks(rows: tuple[int, int]) -> None:
    """A vocabulary that is no multiple of a block; as a layer with a bias and as an embedding."""
    g = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(24, 16384 + 77)
    table = torch.nn.Embedding(16384 + 77, 24)
    x = torch.randn(*rows, 24, generator=g)
    with torch.no_grad():
        for module in (layer, table):
            truth = x.double() @ module.weight.double().T
            if isinstance(module, torch.nn.Linear):
                truth += module.bias.double()
            found = decoder_module.project(module, x)
            assert found.shape == (*rows, 16384 + 77)
            torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=1e-5)
