"""LoRA adapters as Hugging Face PEFT stores them: one folder a component.

    y = W x + (alpha / r) B A x        alpha = s r, so that both scales agree

Partial LoRA maps onto the whole layer: the rows of B that a target leaves alone are zero, and
several targets on one layer become one adapter of the sum of their ranks, block by block. In
training the two differ: PEFT drops entries of x, this project those of A x.

Shapes: I, O inputs and outputs of a layer, r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emrrg.errors import InputError
from emrrg.lora import mixer_rows

COMPONENTS = ("visual_encoder", "llama_model")


def huggingface_adapters(
    tensors: Mapping[str, Tensor],
    vision: Mapping[str, Any],
    *,
    scale: float,
    dropout: float = 0.0,
) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """What PEFT's two files hold, for each component that carries adapters.

    Args:
        tensors: a system's tensors by name; the adapters among them are ``<layer>.lora_<target>.A``
            and ``.B``.
        vision: `dim`, `state_dim` and `patch_size` of the encoder, where it carries adapters.
        scale: s.
        dropout: as trained, for the record.
    Returns:
        ``visual_encoder`` and ``llama_model``, as far as they carry adapters, each with the content
        of ``adapter_config.json`` and the tensors of ``adapter_model.safetensors``. Names are
        relative to the component.
    Raises:
        InputError: there are no adapters.
    """
    layers: dict[str, dict[str, list[tuple[str, Tensor, Tensor]]]] = {c: {} for c in COMPONENTS}
    for name, down in tensors.items():
        found = re.fullmatch(r"(visual_encoder|llama_model)\.(.+)\.lora_(\w+)\.A", name)
        if found:
            up = tensors[f"{name[:-1]}B"]
            layers[found[1]].setdefault(found[2], []).append((found[3], down, up))
    adapters = {
        component: _component(component, found, vision, scale, dropout)
        for component, found in layers.items()
        if found
    }
    if not adapters:
        raise InputError("--adapter-format peft: there are no LoRA adapters to write")
    return adapters


def _component(
    component: str,
    layers: Mapping[str, list[tuple[str, Tensor, Tensor]]],
    vision: Mapping[str, Any],
    scale: float,
    dropout: float,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, parts in layers.items():
        down = torch.cat([A for _, A, _ in parts])
        up = torch.cat([_whole_rows(target, B, vision) for target, _, B in parts], dim=1)
        if layer == "patch_embed.proj":  # a convolution there
            size = vision["patch_size"]
            down, up = down.view(len(down), 3, size, size), up[:, :, None, None]
        ranks[layer] = len(down)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = up.contiguous()
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {layer: rank for layer, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if component == "llama_model" else None,
        "base_model_name_or_path": None,
        "r": common,
        "lora_alpha": _number(scale * common),
        "rank_pattern": others,
        "alpha_pattern": {layer: _number(scale * rank) for layer, rank in others.items()},
        "target_modules": sorted(ranks),
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
    }
    return config, tensors


def _whole_rows(target: str, up: Tensor, vision: Mapping[str, Any]) -> Tensor:
    """B with zeros in the rows that its target leaves alone."""
    if target in ("llm", "patch_embed"):
        return up
    dim, states = vision["dim"], vision["state_dim"]
    dt_rank = vision.get("dt_rank") or math.ceil(dim / 16)
    module, rows = mixer_rows(target, dim, states, dt_rank)
    _, every = mixer_rows(module, dim, states, dt_rank)
    placed = up.new_zeros(every.stop, up.shape[1])
    placed[rows] = up
    return placed


def _number(value: float) -> float | int:
    """An integer where it is one, as PEFT's configurations have it."""
    return int(value) if value == int(value) else value
