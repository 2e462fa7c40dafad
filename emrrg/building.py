"""From flags to a model: fresh weights, released weights, or those of an earlier run."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from emrrg.checkpoint import load_released, read_released_checkpoint
from emrrg.config import PROMPT, ModelConfig, TrainConfig, flag
from emrrg.decoder import Decoder, DecoderConfig
from emrrg.decoder_config import read_decoder_config
from emrrg.errors import InputError
from emrrg.lora import add_lora, merge_lora
from emrrg.model import ReportGenerator
from emrrg.peft import PeftSettings, active_methods, merge_peft
from emrrg.runs import hold_frozen, llm_dtype, load_run, read_model_config, trains_llm
from emrrg.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from emrrg.vision import VISION_PRESETS

log = logging.getLogger("emrrg.train")

SPARE_EMBEDDINGS = 1024  # Qwen's embeddings have up to 400 rows more than its tokenizer pieces


def check_fit(config: TrainConfig) -> None:
    """Refuse combinations of flags that make no sense, before any long work.

    Raises:
        InputError: in the words of the flags.
    """
    trained = config.init is not None or (config.vision_checkpoint and config.llm)
    if config.regime in ("peft", "linear-probe") and not trained:
        what = {
            "peft": "adapts trained weights",
            "linear-probe": "trains the projector between trained weights",
        }[config.regime]
        raise InputError(
            f"--regime {config.regime}: {what}, and there are none: give --init RUN, or "
            "--vision-checkpoint FILE with --llm FOLDER, or train whole with --regime full"
        )
    if config.regime == "full":
        if config.llm_int8:
            raise InputError("--llm-int8: int8 weights cannot train; --regime full trains all")
        if config.shard_llm:
            raise InputError("--shard-llm: shards frozen weights; --regime full freezes none")
    if config.shard_llm and config.auto_batch:
        raise InputError("--auto-batch: each process tries by itself, so not with --shard-llm")
    if config.peft and config.regime != "peft":
        raise InputError(f"--peft: its methods train under --regime peft, not {config.regime}")
    if config.init is not None:
        for name in (
            "vision_checkpoint", "llm", "tokenizer", "preset", "image_size", "drop_path",
        ):  # fmt: skip
            if getattr(config, name) is not None:
                raise InputError(f"{flag(name)}: comes with --init already")


def image_size_of(config: TrainConfig) -> int:
    """Pixels a side that the flags lead to, without reading any weights."""
    if config.init is not None:
        return read_model_config(Path(config.init)).image_size
    return config.image_size or VISION_PRESETS[config.preset or "base"]["image_size"]


def build_model(
    config: TrainConfig,
    reports: Sequence[str],
    device: torch.device,
    place: torch.device | None = None,
) -> ReportGenerator:
    """Build the model that the flags describe.

    Args:
        config: training flags, presets filled in.
        reports: training reports, for a tokenizer of our own.
        device: where the model will work; a frozen language model is held in bf16 for CUDA.
        place: where the weights go for now; None: to the device.
    Raises:
        InputError: a weight file or folder that cannot be used.
    """
    place = place or device
    if config.init is not None:
        return from_run(config, Path(config.init), device, place)
    released = None
    vision = dict(VISION_PRESETS[config.preset or "tiny"])
    if config.vision_checkpoint is not None:
        released = read_released_checkpoint(config.vision_checkpoint)
        if config.preset not in (None, released.size):
            raise InputError(
                f"--preset {config.preset}: --vision-checkpoint {config.vision_checkpoint} is "
                f"{released.size or 'of another size'}"
            )
        vision = {**VISION_PRESETS.get(released.size or "", {}), **released.vision}
        vision["image_size"] = image_size_of(config)
    if config.image_size is not None:
        vision["image_size"] = config.image_size

    if config.drop_path is not None:
        vision["drop_path"] = config.drop_path

    tokenizer = find_tokenizer(config, reports)
    if config.llm is not None:
        check_llm(config, tokenizer, vision["image_size"])
        trains = config.regime == "full"
        decoder = Decoder.from_pretrained(
            config.llm,
            dtype=torch.float32 if trains else llm_dtype(device),
            device=place,
            int8=config.llm_int8,
        )
    else:
        decoder = Decoder(small_decoder(config, tokenizer, vision["image_size"]))
    add_hybrid_layers(config, decoder)
    if released is not None and released.hybrid_layers:
        decoder.add_hybrid_layers(released.hybrid_layers, gate=config.hybrid_gate)
    model = ReportGenerator(
        ModelConfig(
            **vision,
            decoder=decoder.config.to_dict(),
            llm=str(Path(config.llm).resolve()) if config.llm else None,
            llm_int8=config.llm_int8,
            prompt=PROMPT,
        ),
        tokenizer,
        decoder,
    )
    if released is not None:
        if released.lora:
            add_lora(
                model,
                released.lora["targets"],
                rank=released.lora["rank"],
                scale=released.lora["scale"],
            )
        report = load_released(model, released)
        for note in report.notes:
            log.info("%s: %s", config.vision_checkpoint, note)
        if released.lora:  # part of the base from now on
            merge_lora(model, reversible=False)
    model.adapt(adapted(config, model))
    return model.to(place)


def check_llm(config: TrainConfig, tokenizer: Tokenizer, image_size: int) -> None:
    """Compare the flags with a language model's config.json, before its weights are read.

    Raises:
        InputError: more pieces than embeddings, more tokens than positions, or a hybrid layer that
            does not exist.
    """
    assert config.llm is not None
    decoder = read_decoder_config(config.llm)
    if tokenizer.vocab_size > decoder.vocab_size:
        raise InputError(
            f"--tokenizer: {tokenizer.vocab_size} pieces, but --llm {config.llm} has "
            f"{decoder.vocab_size} embeddings"
        )
    if decoder.vocab_size - tokenizer.vocab_size >= SPARE_EMBEDDINGS:
        raise InputError(
            f"--tokenizer: {tokenizer.vocab_size} pieces, but --llm {config.llm} has "
            f"{decoder.vocab_size} embeddings; it is another model's tokenizer"
        )
    check_positions(config, tokenizer, PROMPT, (image_size // 16) ** 2 + 1, decoder)
    check_hybrid_layers(config, decoder.num_hidden_layers)


def check_positions(
    config: TrainConfig,
    tokenizer: Tokenizer,
    prompt: Sequence[str],
    image_tokens: int,
    decoder: DecoderConfig,
) -> None:
    """Refuse more tokens than the decoder has positions for."""
    words = 1 + sum(len(tokenizer.encode(part)) for part in prompt)
    longest = max(config.max_report_tokens, config.max_new_tokens)
    room = decoder.max_position_embeddings
    if image_tokens + words + longest > room:
        raise InputError(
            f"--max-report-tokens, --max-new-tokens: {image_tokens} image tokens, {words} of the "
            f"prompt and {longest} of the report are more than the language model's {room} "
            "positions"
        )


def check_hybrid_layers(config: TrainConfig, count: int) -> None:
    """Refuse hybrid layers that a decoder of `count` layers has not."""
    wrong = [i for i in config.hybrid_layers or () if not 0 <= i < count]
    if wrong:
        raise InputError(f"--hybrid-layers: {wrong[0]} is not a layer (0 to {count - 1})")


def from_run(
    config: TrainConfig, run: Path, device: torch.device, place: torch.device
) -> ReportGenerator:
    """The model of an earlier run, its adapters merged, new adapters and hybrid layers added."""
    settings = read_model_config(run)
    llm_adapted = "llm" in settings.lora_targets
    # Merging rounds small updates away in half precision.
    model = load_run(run, device="cpu" if llm_adapted else device, place=place)
    if settings.llm is not None and (llm_adapted or trains_llm(run)):
        # Its folder no longer holds what the model's decoder is.
        model.config = dataclasses.replace(model.config, llm=None)
    if model.config.llm_int8 and config.regime == "full":
        raise InputError(f"--regime full: --init {run} holds its language model in int8")
    merge_lora(model, reversible=False)
    merge_peft(model, reversible=False)
    model.visual_encoder.peft_bias = False  # the biases are the base's again
    if llm_adapted and settings.llm is not None and config.regime != "full":
        hold_frozen(model.llama_model, llm_dtype(device))
    if config.llm_int8 and not model.config.llm_int8:
        model.llama_model.to_int8()
        model.config = dataclasses.replace(model.config, llm_int8=True)
    if config.hybrid_layers is not None or not model.llama_model.config.hybrid_layers:
        add_hybrid_layers(config, model.llama_model)
    model.adapt(adapted(config, model))
    return model.to(place)


def adapted(config: TrainConfig, model: ReportGenerator) -> ModelConfig:
    """The model's configuration with what the flags add: adapters (only `peft` trains any).

    Methods that could not be merged away stay, and keep their sizes.
    """
    peft = config.regime == "peft"
    kept = tuple(active_methods(model))
    settings = model.config.peft_settings
    if not kept:
        flags = dataclasses.asdict(config)
        names = [f.name for f in dataclasses.fields(PeftSettings) if f.name in flags]
        settings = dataclasses.asdict(PeftSettings(**{name: flags[name] for name in names}))
    return dataclasses.replace(
        model.config,
        decoder=model.llama_model.config.to_dict(),
        lora_targets=config.lora_targets if peft else (),
        lora_rank=config.lora_rank,
        lora_scale=config.lora_scale,
        lora_dropout=config.lora_dropout,
        peft=(*kept, *(m for m in config.peft if peft and m not in kept)),
        peft_settings=settings,
        max_report_tokens=config.max_report_tokens,
        fit=config.fit,
        blind=config.blind,
    )


def add_hybrid_layers(config: TrainConfig, decoder: Decoder) -> None:
    """Let the chosen decoder layers attend to the image."""
    count = decoder.config.num_hidden_layers
    if config.hybrid_layers is not None:
        check_hybrid_layers(config, count)
        layers = list(config.hybrid_layers)
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
