"""Recipes: values for the flags of `emrrg.train` that the user left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from emrrg.config import TrainConfig
from emrrg.errors import InputError

# The paper's recipe (its release, per data set), and the small one that needs no data at all.
# The values are flags of `emrrg.train`; a flag given by the user wins over them.
RECIPES: dict[str, dict[str, Any]] = {
    "phantoms": {
        "train_studies": 3000, "val_studies": 48, "epochs": 4, "lr": 2e-3, "decoder_layers": 2,
        "hybrid_every": 1, "save_every": 500,
    },
    "iu_xray": {
        "batch_size": 4, "epochs": 21, "max_report_tokens": 60,
        "num_beams": 5, "min_new_tokens": 40, "max_new_tokens": 100,
    },
    "mimic_cxr": {
        "batch_size": 6, "epochs": 5, "max_report_tokens": 100,
        "num_beams": 3, "min_new_tokens": 80, "max_new_tokens": 120,
    },
    "chexpert_plus": {
        "batch_size": 6, "epochs": 11, "max_report_tokens": 100,
        "num_beams": 3, "min_new_tokens": 80, "max_new_tokens": 120,
    },
}  # fmt: skip
_PAPER = {
    "lr": 1e-4, "min_lr": 1e-6, "weight_decay": 0.01, "decay_all": True, "schedule": "epoch-cosine",
    "warmup_steps": 0, "grad_clip": 0.0, "seed": 42, "bucket": False,
    "beta2": 0.999, "precision": "bf16",
    "repetition_penalty": 2.0, "length_penalty": 2.0,
}  # fmt: skip
for _name in ("iu_xray", "mimic_cxr", "chexpert_plus"):
    RECIPES[_name] = {**_PAPER, **RECIPES[_name], "dataset": _name}


def suggest(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values that the recipe suggests for the flags that the user left out."""
    given = {name: value for name, value in given.items() if value is not None}
    recipe, dataset = given.get("recipe"), given.get("dataset")
    values: dict[str, Any] = {}
    if recipe is None and dataset is None:
        recipe = values["recipe"] = "phantoms"
    if recipe is not None:
        if recipe not in RECIPES:
            raise InputError(f"--recipe: {recipe!r} is not one of {', '.join(RECIPES)}")
        values |= RECIPES[recipe]
    elif dataset in RECIPES:  # our own defaults, with the data set's lengths
        lengths = ("max_report_tokens", "max_new_tokens")
        values |= {k: v for k, v in RECIPES[dataset].items() if k in lengths}
    trained = "init" in given or ("vision_checkpoint" in given and "llm" in given)
    values.setdefault("dataset", "phantoms")
    values["regime"] = "peft" if trained or recipe == "phantoms" else "full"
    values["preset"] = None if "init" in given or "vision_checkpoint" in given else "tiny"
    if "hybrid_layers" in given:
        values.pop("hybrid_every", None)
    else:
        values["hybrid_every"] = 8 if "llm" in given else values.get("hybrid_every", 2)
    return values


def source_stage(config: TrainConfig) -> TrainConfig:
    """Stage (a) of the phantoms recipe: everything trains, on the source hospital."""
    return dataclasses.replace(
        config,
        recipe=None,
        dataset="phantoms",
        domain="source",
        regime="full",
        lora_targets=(),
        peft=(),
        hybrid_every=0,
        hybrid_layers=None,
        train_studies=config.source_studies,
        epochs=config.source_epochs,
        lr=config.source_lr,
        eval_every=0,
        max_steps=config.source_steps,
    )
