"""From flags to a model: fresh weights, released weights, or those of an earlier run."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from emrrg.checkpoint import load_encoder, read_released_checkpoint
from emrrg.config import PROMPT, ModelConfig, TrainConfig
from emrrg.decoder import Decoder, DecoderConfig
from emrrg.errors import InputError
from emrrg.lora import merge_lora
from emrrg.model import ReportGenerator
from emrrg.runs import load_run
from emrrg.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from emrrg.vision import VISION_PRESETS


def check_fit(config: TrainConfig) -> None:
    """Refuse combinations of flags that make no sense, before any long work.

    Raises:
        InputError: in the words of the flags.
    """
    trained = config.init is not None or (config.vision_checkpoint and config.llm)
    if config.regime == "peft" and not trained:
        raise InputError(
            "--regime peft: adapts trained weights, and there are none: give --init RUN, or "
            "--vision-checkpoint FILE with --llm FOLDER, or train whole with --regime full"
        )
    if config.regime == "linear-probe" and not trained:
        raise InputError(
            "--regime linear-probe: trains the projector between trained weights, and there are "
            "none: give --init RUN, or --vision-checkpoint FILE with --llm FOLDER"
        )
    if config.init is not None:
        for name in ("vision_checkpoint", "llm", "tokenizer", "preset", "image_size"):
            if getattr(config, name) is not None:
                raise InputError(f"--{name.replace('_', '-')}: comes with --init already")


def build_model(config: TrainConfig, reports: Sequence[str]) -> ReportGenerator:
    """Build the model that the flags describe, on the CPU.

    Args:
        config: training flags, presets filled in.
        reports: training reports, for a tokenizer of our own.
    Raises:
        InputError: a weight file or folder that cannot be used.
    """
    if config.init is not None:
        return from_run(config)
    released = None
    if config.vision_checkpoint is not None:
        released = read_released_checkpoint(config.vision_checkpoint)
    preset = config.preset or (released.size if released else None) or "tiny"
    if released and released.size not in (None, preset):
        raise InputError(
            f"--preset {preset}: --vision-checkpoint {config.vision_checkpoint} is {released.size}"
        )
    vision = dict(VISION_PRESETS[preset])
    if config.image_size is not None:
        vision["image_size"] = config.image_size

    tokenizer = find_tokenizer(config, reports)
    decoder = None
    if config.llm is not None:
        dtype = torch.bfloat16 if config.device != "cpu" and torch.cuda.is_available() else None
        decoder = Decoder.from_pretrained(config.llm, dtype=dtype)
        if tokenizer.vocab_size > decoder.config.vocab_size:
            raise InputError(
                f"--tokenizer: {tokenizer.vocab_size} pieces, but --llm {config.llm} has "
                f"{decoder.config.vocab_size} embeddings"
            )
    else:
        decoder = Decoder(small_decoder(config, tokenizer, vision["image_size"]))
    add_hybrid_layers(config, decoder)
    model = ReportGenerator(
        ModelConfig(
            **vision,
            decoder=decoder.config.to_dict(),
            llm=str(Path(config.llm).resolve()) if config.llm else None,
            **adapter_fields(config),
            prompt=PROMPT,
            max_report_tokens=config.max_report_tokens,
            blind=config.blind,
        ),
        tokenizer,
        decoder,
    )
    if released:
        load_encoder(model.visual_encoder, released.tensors)
    return model


def from_run(config: TrainConfig) -> ReportGenerator:
    """The model of an earlier run, its adapters merged, new adapters and hybrid layers added."""
    assert config.init is not None
    earlier = load_run(config.init)
    if earlier.config.lora_targets:
        merge_lora(earlier)
    decoder = earlier.llama_model
    if not decoder.config.hybrid_layers:
        add_hybrid_layers(config, decoder)
    model = ReportGenerator(
        dataclasses.replace(
            earlier.config,
            decoder=decoder.config.to_dict(),
            **adapter_fields(config),
            max_report_tokens=config.max_report_tokens,
            blind=config.blind,
        ),
        earlier.tokenizer,
        decoder,
    )
    mine = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in earlier.named_parameters():
            if name in mine and mine[name] is not parameter:
                mine[name].copy_(parameter)
    return model


def adapter_fields(config: TrainConfig) -> dict[str, object]:
    """The adapters that the regime trains: only `peft` has any."""
    return {
        "lora_targets": config.lora_targets if config.regime == "peft" else (),
        "lora_rank": config.lora_rank,
        "lora_scale": config.lora_scale,
        "lora_dropout": config.lora_dropout,
    }


def add_hybrid_layers(config: TrainConfig, decoder: Decoder) -> None:
    """Let the chosen decoder layers attend to the image."""
    count = decoder.config.num_hidden_layers
    if config.hybrid_layers is not None:
        layers = list(config.hybrid_layers)
        wrong = [i for i in layers if not 0 <= i < count]
        if wrong:
            raise InputError(f"--hybrid-layers: {wrong[0]} is not a layer (0 to {count - 1})")
    else:
        layers = list(range(0, count, config.hybrid_every)) if config.hybrid_every else []
    if layers:
        decoder.add_hybrid_layers(layers, gate=config.hybrid_gate)


def small_decoder(config: TrainConfig, tokenizer: Tokenizer, image_size: int) -> DecoderConfig:
    """A Llama-shaped decoder to train from scratch."""
    image_tokens = (image_size // 16) ** 2 + 1
    longest = max(config.max_report_tokens, config.max_new_tokens)
    return DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=config.decoder_dim,
        intermediate_size=config.decoder_dim * 8 // 3 // 8 * 8,
        num_hidden_layers=config.decoder_layers,
        num_attention_heads=config.decoder_heads,
        num_key_value_heads=config.decoder_heads,
        max_position_embeddings=-(-(image_tokens + longest + 128) // 128) * 128,
        tie_word_embeddings=True,
    )


def find_tokenizer(config: TrainConfig, reports: Sequence[str]) -> Tokenizer:
    """The tokenizer asked for, the --llm folder's, or one trained on the reports."""
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    if config.llm is not None:
        return load_tokenizer(config.llm)
    with tempfile.TemporaryDirectory() as folder:
        corpus = [*reports, *(part for part in PROMPT for _ in range(8))]
        return train_tokenizer(corpus, config.vocab_size, Path(folder) / "tokenizer.model")


