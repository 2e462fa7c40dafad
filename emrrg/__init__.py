"""Radiology reports from chest X-rays: vision Mamba, Partial LoRA, a Llama with hybrid layers.

    import emrrg
    model = emrrg.load("runs/x")
    model.generate([["frontal.png", "lateral.png"], ["other.dcm"]])

For research: a generated report is not a diagnosis.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from emrrg.model import ReportGenerator

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    run: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    checkpoint: Literal["best", "last"] = "best",
) -> ReportGenerator:
    """Read a trained model from a folder.

    Args:
        run: the folder that ``python -m emrrg.train`` left, or ``python -m emrrg.export`` wrote.
        device: ``cpu``, ``cuda``, ...
        checkpoint: ``best`` by the validation score, or ``last``.
    Returns:
        A model whose ``generate([["image.png"]])`` writes one report a study.
    Raises:
        emrrg.errors.InputError: the folder holds no run, or weights that do not fit.
    """
    from emrrg.runs import load_run  # here, so that `import emrrg` stays quick

    return load_run(run, device=device, which=checkpoint)
