"""One training step of the whole system by regime: what Partial LoRA saves.

What is timed is what ``python -m emrrg.train`` does a step: normalise the images, forward,
backward, clip, AdamW, in its precision and storage. ``peft`` trains LoRA on X with rank 16, the
projector and the hybrid layers; ``encoder`` the encoder in place of the adapters; ``full``
everything; ``linear-probe`` the projector, on image features that are computed once, as training
does. Each with and without activation checkpointing, which recomputes the encoder's blocks.

Memory: weights, gradients and AdamW's state as their tensors have it; activations, what autograd
keeps for the backward pass, counted tensor by tensor; and the peak of a step, measured (of a
process of its own, on CUDA of the allocator). The parts do not add up to the peak: gradients grow
while activations go, and operations need room for what they are at.

    pytest benchmarks/bench_finetune.py --benchmark-only
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import encoders, machine
from benchmarks.work import Case, Contender, Work
from emrrg.audit import kept_bytes
from emrrg.config import PROMPT, ModelConfig, TrainConfig
from emrrg.data.images import normalize
from emrrg.decoder import Decoder
from emrrg.decoder_config import DecoderConfig
from emrrg.engine import store_frozen
from emrrg.evaluation import autocast
from emrrg.model import ReportGenerator, set_regime
from emrrg.optim import build_optimizer
from emrrg.tokenizer import Tokenizer, train_tokenizer

REGIMES = ("peft", "encoder", "full", "linear-probe")
CONTENDERS = [Contender(name, ours=name == "peft") for name in REGIMES]
HYBRID_EVERY = 8

DECODERS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 256,
    },
    "small": {
        "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376,
        "num_hidden_layers": 8, "num_attention_heads": 8, "tie_word_embeddings": True,
    },
    "TinyLlama-1.1B": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
    },
    "Llama-2-7B": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
    },
}  # fmt: skip

UNCHECKED = ("Llama-2-7B",)  # in float64 it fits nowhere: built on the device, results not compared

# (encoder, pixels a side, decoder, tokens of a report, studies a batch)
Plan = tuple[str, int, str, int, list[int]]
PLANS: dict[str, dict[str, list[Plan]]] = {
    "cpu": {
        "smoke": [("small", 48, "tiny", 8, [1, 2])],
        "default": [("base", 224, "small", 60, [1, 4, 16])],
        "full": [("base", 224, "small", 60, [1, 4, 16]), ("large", 224, "small", 60, [1, 4, 16])],
    },
    "cuda": {
        "smoke": [("small", 48, "tiny", 8, [1, 2])],
        "default": [("base", 224, "TinyLlama-1.1B", 60, [1, 4, 16, 64])],
        "full": [
            ("base", 224, "TinyLlama-1.1B", 60, [1, 4, 16, 64, 128]),
            ("large", 224, "Llama-2-7B", 100, [1, 4, 16, 64]),
        ],
    },
}


@cache
def tokenizer() -> Tokenizer:
    """A small one: its pieces are fewer than any decoder's embeddings."""
    with tempfile.TemporaryDirectory() as folder:
        texts = [*PROMPT, "the heart is normal . no pleural effusion ."] * 8
        return train_tokenizer(texts, 160, Path(folder) / "tokenizer.model")


def model_of(
    regime: str, name: str, pixels: int, decoder: str, device: torch.device
) -> ReportGenerator:
    """The system with random weights, the same in every regime but for the adapters."""
    torch.manual_seed(0)
    sizes = DecoderConfig(**DECODERS[decoder])
    half = device.type == "cuda" and regime != "full"  # as a frozen decoder is held there
    if decoder in UNCHECKED:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
        try:
            with device:
                language = Decoder(sizes)
        finally:  # it may not fit
            torch.set_default_dtype(before)
    else:
        language = Decoder(sizes)
        machine.rounded(language)
        if half:
            language.to(torch.bfloat16)
    language.add_hybrid_layers(range(0, sizes.num_hidden_layers, HYBRID_EVERY))
    widths = encoders.preset(name)
    config = ModelConfig(
        image_size=pixels,
        dim=widths["dim"],
        depth=widths["depth"],
        decoder=language.config.to_dict(),
        lora_targets=("X",) if regime == "peft" else (),
    )
    model = ReportGenerator(config, tokenizer(), language)
    machine.rounded(model)
    return model.to(device)


@dataclass
class Run:
    """What a step works with."""

    config: TrainConfig
    device: torch.device
    model: ReportGenerator
    parameters: list[Tensor]
    """What trains."""
    optimizer: torch.optim.Optimizer
    images: Tensor
    """(B, 1, 3, S, S) uint8 on the CPU."""
    labels: Tensor
    """(B, R) int64 on the CPU: reports with their end marks."""
    features: Tensor | None = None
    """(B, P+1, D) on the CPU, where they are computed once."""

    def loss(self) -> Tensor:
        """Of all studies."""
        labels = self.labels.to(self.device)
        with autocast(self.device, self.config.precision):
            if self.features is not None:
                return self.model(None, None, labels, self.features.to(self.device))
            images = normalize(self.images.to(self.device))
            return self.model(images, _present(images), labels)

    def check(self) -> dict[str, Tensor]:
        """`gradients` of the first study, without dropout."""
        self.model.eval()
        with autocast(self.device, self.config.precision):
            if self.features is not None:
                features = self.features[:1].to(self.device)
                found = gradients(self.model, self.labels[:1].to(self.device), features=features)
            else:
                images = normalize(self.images[:1].to(self.device))
                found = gradients(self.model, self.labels[:1].to(self.device), images)
        self.model.train()
        return found

    def step(self) -> float:
        """One optimizer step; the loss."""
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.optimizer.step()
        return float(loss.detach())

    def forget(self) -> tuple[()]:
        """Free the gradients of the step before."""
        self.optimizer.zero_grad(set_to_none=True)
        return ()


def _present(images: Tensor) -> Tensor:
    return torch.ones(images.shape[:2], dtype=torch.bool, device=images.device)


def run_of(
    regime: str, checkpointing: bool, name: str, pixels: int, decoder: str, tokens: int, batch: int
) -> Run:
    """A run ready to take a step."""
    device = machine.device()
    model = model_of(regime, name, pixels, decoder, device)
    config = TrainConfig(regime=regime)  # type: ignore[arg-type]
    trained = set(set_regime(model, regime))
    store_frozen(model, config, device)
    model.visual_encoder.checkpointing = checkpointing
    model.train()
    parameters = {n: p for n, p in model.named_parameters() if n in trained}
    made = torch.Generator().manual_seed(1)
    size = (batch, 1, 3, pixels, pixels)
    words = torch.randint(3, tokenizer().vocab_size, (batch, tokens), generator=made)
    run = Run(
        config,
        device,
        model,
        list(parameters.values()),
        build_optimizer(config, parameters),
        images=torch.randint(0, 256, size, generator=made, dtype=torch.uint8),
        labels=torch.cat([words, torch.full((batch, 1), tokenizer().eos_id)], dim=1),
    )
    if regime == "linear-probe":
        with torch.no_grad(), autocast(device, config.precision):
            parts = [normalize(part.to(device)) for part in run.images.split(4)]
            run.features = torch.cat([model.features(p, _present(p)).float().cpu() for p in parts])
    return run


def build(contender: str, **arguments: Any) -> Work:
    """A step in a regime."""
    run = run_of(contender, **arguments)

    def sizes() -> dict[str, int]:
        everything = list(run.model.parameters())
        state = [t for values in run.optimizer.state.values() for t in values.values()]
        return {
            "weights": sum(p.nbytes for p in everything),
            "gradients": sum(p.nbytes for p in run.parameters),
            "optimizer": sum(t.nbytes for t in state if isinstance(t, Tensor)),
            "trainable": sum(p.numel() for p in run.parameters),
            "parameters": sum(p.numel() for p in everything),
            "kept": kept_bytes(run.model, run.loss),
        }

    return Work(run.step, prepare=run.forget, results=run.check, sizes=sizes)


def gradients(
    model: ReportGenerator,
    labels: Tensor,
    images: Tensor | None = None,
    features: Tensor | None = None,
) -> dict[str, Tensor]:
    """The loss, and its gradients in what every regime has.

    That is the projector and the norm, and the images: theirs comes through the whole encoder.
    """
    layers = {"llama_proj": model.llama_proj, "layer_norm": model.layer_norm}
    named: dict[str, Tensor] = {
        f"d{layer}.{name}": p for layer, m in layers.items() for name, p in m.named_parameters()
    }
    present = None
    if images is not None:
        named["dimages"] = images.requires_grad_()
        present = _present(images)
    loss = model(images, present, labels, features)
    computed = torch.autograd.grad(loss, list(named.values()))
    return {"loss": loss.detach(), **dict(zip(named, computed, strict=True))}


def truth(
    checkpointing: bool, name: str, pixels: int, decoder: str, tokens: int, batch: int
) -> dict[str, Tensor]:
    """Float64 on the CPU, without dropout; adapters and gates start as the identity."""
    run = run_of("full", False, name, pixels, decoder, tokens, batch)
    model = run.model.cpu().double().eval()
    return gradients(model, run.labels[:1], normalize(run.images[:1]).double())


def cases(size: str) -> list[tuple[Case, Contender]]:
    """Everything that a size measures."""
    kind = machine.device().type
    pairs = []
    for name, pixels, decoder, tokens, batches in PLANS[kind][size]:
        for batch in batches:
            for checkpointing in (False, True):
                ending = "-checkpointing" if checkpointing else ""
                case = Case(
                    suite="finetune",
                    group=f"{name}-{pixels}px-{decoder}-batch{batch}{ending}",
                    build=build,
                    arguments={
                        "checkpointing": checkpointing, "name": name, "pixels": pixels,
                        "decoder": decoder, "tokens": tokens, "batch": batch,
                    },
                    truth=None if decoder in UNCHECKED else truth,
                    tolerance=1e-3 if kind == "cpu" else 1e-1,
                    facts={"batch": batch, "checkpointing": checkpointing},
                    items=(batch, "studies"),
                    warm=True,  # AdamW's state is there before the step that is weighed
                )  # fmt: skip
                pairs += [(case, contender) for contender in CONTENDERS]
    return pairs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case and contender."""
    pairs = cases(metafunc.config.getoption("--size"))
    names = [f"{case.group}-{contender.name}" for case, contender in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=names)


def test_step(case: Case, contender: Contender, measure: Any) -> None:
    """One contender of one case."""
    measure(case, contender)
