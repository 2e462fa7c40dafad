"""Comparisons that need several trainings: ``python -m emrrg.ablate --study sight``.

``sight`` asks whether the generated reports depend on the image. It trains the default system
twice, once as it is and once *blind* (every image's features replaced by their mean over the
training images), and compares the finding F1 of the reports on held-out phantoms. Every cell is
one `python -m emrrg.train` in a process of its own; cells that are done are not run again.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emrrg.config import parse_config, run_command
from emrrg.errors import InputError
from emrrg.runs import read_index, read_json, write_json

log = logging.getLogger("emrrg.ablate")

# What each cell of a study adds to the flags of `emrrg.train`.
STUDIES: dict[str, dict[str, list[str]]] = {"sight": {"seeing": [], "blind": ["--blind"]}}


@dataclass(frozen=True)
class AblateConfig:
    """Train the cells of a comparison, one after another, and print their scores."""

    study: Literal["sight"] = "sight"
    """sight: do the reports depend on the image?"""
    output: str = "runs/sight"
    """Folder of the cells, their logs and table.md; what is done there is kept."""
    train_flags: str = ""
    """Further flags of emrrg.train for every cell, in one string."""

    def __post_init__(self) -> None:
        for word in ("--output", "--resume", "--blind"):
            if word in self.train_flags.split():
                raise InputError(f"--train-flags: {word} is set by the study itself")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; arguments and errors as `emrrg.train.main`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    config, _ = parse_config(AblateConfig, argv, "emrrg.ablate")
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, flags in STUDIES[config.study].items():
        run_cell(folder / name, [*config.train_flags.split(), *flags])
        results[name] = read_json(folder / name / "scores.json")
    table = sight_table(results)
    (folder / "table.md").write_text(table, encoding="utf-8")
    write_json(folder / "results.json", {"study": config.study, "cells": results})
    log.info("\n%s\nwritten to %s", table, folder)
    return 0


def run_cell(run: Path, flags: Sequence[str]) -> None:
    """Train one cell, or go on with it, or leave it as it is where it is done.

    Raises:
        InputError: the training failed (the message names its log).
    """
    if read_index(run).get("finished"):
        log.info("%s: done already", run)
        return
    started = (run / "config.json").exists()
    where = ["--resume", str(run)] if started else ["--output", str(run), *flags]
    command = [sys.executable, "-m", "emrrg.train", *where]
    log.info("%s: %s", run, " ".join(command[1:]))
    output = run.with_name(f"{run.name}.log")
    with open(output, "a", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        last = output.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["no output"]
        raise InputError(f"{output}: the training ended with status {done.returncode}: {last[0]}")


def sight_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The comparison as Markdown."""
    lines = [
        "| trained | finding F1 (micro) | 95 % interval | BLEU-4 | CIDEr |",
        "|---|---|---|---|---|",
    ]
    for name, scores in results.items():
        after = scores["after"]
        f1 = after["finding_f1"]
        lines.append(
            f"| {name} | {f1['value']:.3f} | {f1['low']:.3f} to {f1['high']:.3f} | "
            f"{after['BLEU-4']:.3f} | {after['CIDEr']:.3f} |"
        )
    values = {name: scores["after"]["finding_f1"] for name, scores in results.items()}
    gap = values["seeing"]["value"] - values["blind"]["value"]
    apart = values["seeing"]["low"] > values["blind"]["high"]
    lines += ["", f"Difference {gap:+.3f}; the intervals {'are apart' if apart else 'overlap'}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main)
