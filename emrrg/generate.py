"""Write the report of one study: ``python -m emrrg.generate runs/x frontal.png [lateral.png]``."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emrrg.config import parse_config, run_command
from emrrg.errors import InputError
from emrrg.heatmap import attention_maps, draw_heatmap
from emrrg.runs import load_run
from emrrg.system import pick_device

log = logging.getLogger("emrrg.generate")

NOTICE = "Generated text, for research only: not a diagnosis."


@dataclass(frozen=True)
class GenerateConfig:
    """Write a radiology report for the views of one study (PNG, JPEG, DICOM, ...)."""

    run: str
    """Run folder that training left."""
    views: tuple[str, ...] = ()
    """Image files: all views of one study."""
    json: bool = False
    """Print a JSON object instead of plain text."""
    heatmap: str | None = None
    """Write a PNG of where the hybrid layers looked, sentence by sentence."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights."""
    beams: int | None = None
    """Beams of the search [default: as in training]."""
    min_new_tokens: int | None = None
    """Shortest report, in tokens [default: as in training]."""
    max_new_tokens: int | None = None
    """Longest report, in tokens [default: as in training]."""
    repetition_penalty: float | None = None
    """Repetition penalty [default: as in training]."""
    length_penalty: float | None = None
    """Length penalty [default: as in training]."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""

    def __post_init__(self) -> None:
        if not self.views:
            raise InputError("views: give at least one image file after the run folder")
        if self.heatmap is not None and Path(self.heatmap).suffix.lower() != ".png":
            raise InputError(f"--heatmap: {self.heatmap} does not end in .png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; arguments and errors as `emrrg.train.main`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    asked, _ = parse_config(GenerateConfig, argv, "emrrg.generate", positional=("run", "views"))
    model = load_run(asked.run, device=pick_device(asked.device), which=asked.checkpoint)
    if asked.heatmap is not None and not model.llama_model.config.hybrid_layers:
        raise InputError(f"--heatmap: {asked.run} has no hybrid layers, so nothing looks anywhere")
    model.generation = dataclasses.replace(
        model.generation,
        **{
            field: value
            for field, name in {
                "num_beams": "beams",
                "min_new_tokens": "min_new_tokens",
                "max_new_tokens": "max_new_tokens",
                "repetition_penalty": "repetition_penalty",
                "length_penalty": "length_penalty",
            }.items()
            if (value := getattr(asked, name)) is not None
        },
    )
    report = model.generate([asked.views])[0]
    if asked.heatmap is not None:
        draw_heatmap(attention_maps(model, asked.views, report), Path(asked.heatmap))
        log.info("where the hybrid layers looked: %s", asked.heatmap)
    if asked.json:
        print(json.dumps({"views": list(asked.views), "report": report, "notice": NOTICE}))
    else:
        print(report)
        log.info("%s", NOTICE)
    return 0


if __name__ == "__main__":
    run_command(main)
