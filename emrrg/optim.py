"""AdamW with parameter groups, and the learning rate over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from emrrg.config import TrainConfig
from emrrg.peft import decay_multiplier

STATE_SPACE = ("A_log", "A_b_log", "A_c_log", "A_c_b_log")
TOKENS = ("cls_token", "pos_embed", "tokens")


def build_optimizer(config: TrainConfig, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """AdamW; what `decays` refuses decays only under ``--decay-all``, as the paper has it.

    Args:
        config: ``lr``, ``beta2``, ``weight_decay``, ``decay_all``.
        parameters: what trains, by name.
    """
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in parameters.items():
        factor = 1.0 if config.decay_all else decay_multiplier(name) * decays(name, parameter)
        groups.setdefault(factor, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": factor * config.weight_decay}
            for factor, members in groups.items()
        ],
        lr=config.lr,
        betas=(0.9, config.beta2),
        fused=True,
    )


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay belongs on a parameter: matrices, filters and the deltas of
    `emrrg.peft`; not norms, biases, A_log, D, gates, or position, class and learned tokens."""
    if ".peft_delta_" in name:
        return True
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in (*STATE_SPACE, *TOKENS)


def learning_rate(config: TrainConfig, step: int, total_steps: int, epoch: int) -> float:
    """Linear warm-up, then a cosine to `min_lr`, stepped every step or (the paper) every epoch.

        lr(t) = min_lr + (lr - min_lr) (1 + cos(pi t)) / 2,   t the share of the run that is done

    Args:
        config: ``lr``, ``min_lr``, ``warmup_steps``, ``schedule``, ``epochs``.
        step: optimizer steps taken.
        total_steps: of the whole run.
        epoch: epochs done.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "epoch-cosine":
        done = epoch / config.epochs
    floor = min(config.min_lr, config.lr)
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
