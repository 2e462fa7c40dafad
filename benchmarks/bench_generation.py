"""Writing reports after an image prefix: greedy and beam search, against transformers' generate.

A decoder with random weights, a prefix of 230 tokens (image and prompt), the same weights, settings
and threads for both. On the CPU the tokens must be those of the same search in float64; on CUDA,
in bf16, the first step's logits are compared. A report is as long as the setting says, since no
end mark is written.

    pytest benchmarks/bench_generation.py --benchmark-only
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import machine, peers
from benchmarks.work import Case, Contender, Work
from emrrg.cache import cache_bytes
from emrrg.decoder import Decoder
from emrrg.decoder_config import DecoderConfig
from emrrg.generation import GenerationConfig, generate

PREFIX = 230
BEAMS = (1, 3, 5)
OURS, PEER = "emrrg", "transformers"
CONTENDERS = [Contender(OURS, ours=True), Contender(PEER, missing=peers.transformers)]

# (width, layers, vocabulary, reports a batch, new tokens)
Shape = tuple[int, int, int, int, int]
SHAPES: dict[str, dict[str, list[Shape]]] = {
    "cpu": {
        "smoke": [(64, 2, 500, 1, 6)],
        "default": [(512, 4, 32000, 1, 60), (512, 4, 2000, 1, 60), (512, 4, 32000, 4, 60)],
        "full": [
            (512, 4, 32000, 1, 100), (512, 4, 2000, 1, 100), (512, 4, 32000, 4, 100),
            (512, 4, 2000, 16, 100),
        ],
    },
    "cuda": {
        "smoke": [(64, 2, 500, 1, 6)],
        "default": [(2048, 22, 32000, 1, 100), (2048, 22, 32000, 16, 100)],
        "full": [
            (2048, 22, 32000, 1, 100), (2048, 22, 32000, 16, 100), (2048, 22, 32000, 64, 100),
            (4096, 32, 32000, 1, 100), (4096, 32, 32000, 16, 100),
        ],
    },
}  # fmt: skip


def huggingface_config(width: int, layers: int, vocabulary: int) -> dict[str, Any]:
    """Fields of a Llama's ``config.json``."""
    heads = max(1, width // 64)
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": width * 8 // 3 // 8 * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 512,
    }


def decoder(width: int, layers: int, vocabulary: int) -> Decoder:
    """Our decoder with random weights."""
    torch.manual_seed(0)
    fields = huggingface_config(width, layers, vocabulary)
    model = Decoder(DecoderConfig.from_huggingface(fields)).eval()
    machine.rounded(model)
    return model


def prefixes(batch: int, width: int) -> Tensor:
    """(B, T, H)."""
    return 0.02 * torch.randn(batch, PREFIX, width, generator=torch.Generator().manual_seed(1))


def options(beams: int, new_tokens: int) -> dict[str, Any]:
    """Both know these by the same names."""
    return {
        "num_beams": beams,
        "min_new_tokens": new_tokens,
        "max_new_tokens": new_tokens,
        "repetition_penalty": 2.0,
        "length_penalty": 2.0,
    }


def build(
    contender: str, beams: int, width: int, layers: int, vocabulary: int, batch: int,
    new_tokens: int,
) -> Work:  # fmt: skip
    """Reports of a batch by one contender."""
    device = machine.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ours = decoder(width, layers, vocabulary)
    embeds = prefixes(batch, width).to(device, dtype)
    settings = options(beams, new_tokens)
    if contender == OURS:
        model: Any = ours.to(device, dtype)

        def run() -> list[list[int]]:
            return generate(model, embeds, config=GenerationConfig(**settings))

        def logits() -> Tensor:
            return model(embeds)[:, -1]

    else:
        model = peer(ours, width, layers, vocabulary).to(device, dtype)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=device)

        def run() -> list[list[int]]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on penalties and inputs_embeds: as meant
                return model.generate(
                    inputs_embeds=embeds,
                    attention_mask=mask,
                    do_sample=False,
                    pad_token_id=0,
                    **settings,
                ).tolist()

        def logits() -> Tensor:
            return model(inputs_embeds=embeds, attention_mask=mask).logits[:, -1]

    @torch.no_grad()
    def results() -> dict[str, Tensor]:
        return {"logits": logits()} if device.type == "cuda" else {"tokens": torch.tensor(run())}

    def sizes() -> dict[str, int]:
        return {
            "weights": sum(p.nbytes for p in model.parameters()),
            "cache": cache_bytes(
                ours.config,
                batch=batch * (1 if contender == OURS else beams),
                prefix=PREFIX,
                new_tokens=new_tokens,
                width=beams if contender == OURS else 1,
                dtype=dtype,
            ),
        }

    return Work(run, results=results, sizes=sizes)


def peer(ours: Decoder, width: int, layers: int, vocabulary: int) -> Any:
    """transformers' Llama with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**huggingface_config(width, layers, vocabulary)))
    model.load_state_dict(ours.state_dict())
    return model.eval()


@torch.no_grad()
def truth(
    beams: int, width: int, layers: int, vocabulary: int, batch: int, new_tokens: int
) -> dict[str, Tensor]:
    """The same search in float64 on the CPU, or its first logits."""
    model = decoder(width, layers, vocabulary).double()
    embeds = prefixes(batch, width).double()
    if machine.device().type == "cuda":
        return {"logits": model(embeds)[:, -1]}
    config = GenerationConfig(**options(beams, new_tokens))
    return {"tokens": torch.tensor(generate(model, embeds, config=config)).double()}


def cases(size: str) -> list[tuple[Case, Contender]]:
    """Everything that a size measures."""
    kind = machine.device().type
    return [
        (
            Case(
                suite="generation",
                group=f"beams{beams}-{batch}x{new}tokens-{layers}x{width}-v{vocabulary}",
                build=build,
                arguments={
                    "beams": beams, "width": width, "layers": layers, "vocabulary": vocabulary,
                    "batch": batch, "new_tokens": new,
                },
                truth=truth if width < 4096 else None,  # as large in float64 it fits nowhere
                tolerance=0.0 if kind == "cpu" else 1e-1,
                facts={"tokens": batch * new, "beams": beams},
                items=(batch, "reports"),
            ),
            contender,
        )
        for width, layers, vocabulary, batch, new in SHAPES[kind][size]
        for beams in BEAMS
        for contender in CONTENDERS
    ]  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case and contender."""
    pairs = cases(metafunc.config.getoption("--size"))
    names = [f"{case.group}-{contender.name}" for case, contender in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=names)


def test_generation(case: Case, contender: Contender, measure: Any) -> None:
    """One contender of one case."""
    measure(case, contender)
