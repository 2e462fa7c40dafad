"""What a `emrrg.decoder.Decoder` is built from, read from Hugging Face's ``config.json``."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from emrrg.errors import InputError
from emrrg.pretrained import read_folder_config

Gate = Literal["token", "channel"]

# What a config.json that leaves a key out means by it, where that depends on the architecture.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None},
    "mistral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096,
    },
    "qwen2": {
        "max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096,
    },
}  # fmt: skip


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and variants of a `Decoder`; field names are Hugging Face's where it has one."""

    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width inside the SwiGLU."""
    num_hidden_layers: int
    """Layers."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key and value heads, a divisor of the query heads; None: as many."""
    head_dim: int | None = None
    """Width of a head, even; None: hidden_size / num_attention_heads."""
    max_position_embeddings: int = 2048
    """Most tokens in a sequence, prompt and image included."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside the norms."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Mapping[str, Any] | None = None
    """Scaling of the rotary frequencies: ``rope_type`` linear (``factor``) or llama3 (also
    ``low_freq_factor``, ``high_freq_factor``, ``original_max_position_embeddings``)."""
    sliding_window: int | None = None
    """A token sees itself and this many minus one before it; None: everything before it."""
    sliding_layers: tuple[int, ...] | None = None
    """Layers with the window; None: all, if there is a window."""
    qkv_bias: bool = False
    """Biases of q_proj, k_proj and v_proj."""
    o_bias: bool = False
    """Bias of o_proj."""
    mlp_bias: bool = False
    """Biases in the SwiGLU."""
    tie_word_embeddings: bool = False
    """The output projection is the embedding."""
    hybrid_layers: tuple[int, ...] = ()
    """Layers that cross-attend to the image."""
    hybrid_gate: Gate = "token"
    """Their gate: a number a token, or one a channel."""
    model_type: str = "llama"
    """Hugging Face's name of the architecture."""

    def __post_init__(self) -> None:
        for name in ("sliding_layers", "hybrid_layers"):
            if isinstance(getattr(self, name), list):  # from JSON
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise InputError(
                    f"num_attention_heads: {self.num_attention_heads} does not divide "
                    f"hidden_size {self.hidden_size}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is not at least 1")
        if self.kv_heads > self.num_attention_heads or self.num_attention_heads % self.kv_heads:
            raise InputError(
                f"num_key_value_heads: {self.kv_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.width_of_head % 2:
            raise InputError(f"head_dim: {self.head_dim} is odd; rotary positions need pairs")
        if self.hybrid_gate not in ("token", "channel"):
            raise InputError(f"hybrid_gate: {self.hybrid_gate!r} is not token or channel")
        for layer in self.hybrid_layers:
            if not 0 <= layer < self.num_hidden_layers:
                raise InputError(
                    f"hybrid_layers: {layer} is not a layer (0 to {self.num_hidden_layers - 1})"
                )
        rope_frequencies(self)  # refuses a scaling that it does not know

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return cast(int, self.num_key_value_heads)

    @property
    def width_of_head(self) -> int:
        """Width of a head."""
        return cast(int, self.head_dim)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, in tokens; None where it sees everything."""
        if self.sliding_layers is not None and layer not in self.sliding_layers:
            return None
        return self.sliding_window

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them; ``DecoderConfig(**d)`` reads them back."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            name: list(v) if isinstance(v, tuple) else dict(v) if isinstance(v, Mapping) else v
            for name, v in values.items()
        }

    @classmethod
    def from_huggingface(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Read the fields of a Hugging Face ``config.json``.

        Args:
            values: the JSON object, of transformers 4 (``rope_theta``, ``rope_scaling``) or 5
                (``rope_parameters``).
        Raises:
            InputError: another architecture than Llama, Mistral or Qwen2, or a variant of it that
                is not supported (the message names the key).
        """
        kind = values.get("model_type")
        if kind not in DEFAULTS:
            raise InputError(
                f"model_type: {kind!r} is not supported; give a llama, mistral or qwen2 model"
            )
        if values.get("quantization_config"):
            raise InputError(
                "quantization_config: quantised weights cannot be read; give the folder of the "
                "model as it was before (it can be held in int8 while it is loaded)"
            )
        values = {**DEFAULTS[kind], **values}
        if values.get("hidden_act", "silu") != "silu":
            raise InputError(f"hidden_act: {values['hidden_act']!r} is not supported, only 'silu'")
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads",
        ):  # fmt: skip
            if not isinstance(values.get(name), int):
                raise InputError(f"{name}: {values.get(name)!r}, expected a whole number")
        rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        bias = bool(values.get("attention_bias", False))
        layers = values["num_hidden_layers"]
        window, windowed = values.get("sliding_window"), None
        if kind == "llama":
            window = None
        elif kind == "qwen2":
            bias = True
            window = window if values.get("use_sliding_window") else None
            if values.get("layer_types"):
                kinds = values["layer_types"]
                windowed = tuple(i for i, k in enumerate(kinds) if k == "sliding_attention")
            else:
                windowed = tuple(range(values.get("max_window_layers", 28), layers))
        return cls(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=layers,
            num_attention_heads=values["num_attention_heads"],
            num_key_value_heads=values.get("num_key_value_heads"),
            head_dim=values.get("head_dim"),
            max_position_embeddings=values["max_position_embeddings"],
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope_scaling=None if rope_type == "default" else {**rope, "rope_type": rope_type},
            sliding_window=window,
            sliding_layers=windowed if window is not None else None,
            qkv_bias=bias,
            o_bias=bias and kind == "llama",
            mlp_bias=bool(values.get("mlp_bias", False)),
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            model_type=kind,
        )


def read_decoder_config(folder: str | os.PathLike[str]) -> DecoderConfig:
    """The sizes of the model in a Hugging Face folder; its weights are not looked at.

    Raises:
        InputError: no folder, no ``config.json`` in it, or one that cannot be used (the message
            names the file and the key).
    """
    values = read_folder_config(Path(folder))
    try:
        return DecoderConfig.from_huggingface(values)
    except InputError as error:
        raise InputError(f"{Path(folder) / 'config.json'}: {error}") from error


def rope_frequencies(config: DecoderConfig) -> Tensor:
    """Rotary frequencies theta^(-2i/d), scaled where the configuration says so.

    The llama3 rule divides frequencies whose wavelength exceeds original/low_freq_factor by
    `factor`, keeps those below original/high_freq_factor, and interpolates between the two.

    Returns:
        (head_dim / 2,) fp32, radians a token.
    Raises:
        InputError: a scaling rule that is not known, or lacks a number.
    """
    size = config.width_of_head
    index = torch.arange(0, size, 2, dtype=torch.float32, device="cpu")
    frequencies = config.rope_theta ** -(index / size)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    kind = scaling.get("rope_type", scaling.get("type"))
    needed = {
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if kind not in needed:
        raise InputError(f"rope_scaling: type {kind!r} is not supported, only linear and llama3")
    for name in needed[kind]:
        if not isinstance(scaling.get(name), (int, float)):
            raise InputError(f"rope_scaling: {name} is missing, which type {kind!r} needs")
    factor = scaling["factor"]
    if kind == "linear":
        return frequencies / factor
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (smooth + (1 - smooth) / factor)
