"""Comparisons that need several trainings: ``python -m emrrg.ablate --study cross-attention``.

    sight            do the reports depend on the image? The default system as it is, and *blind*
                     (every image's features replaced by their mean over the training images)
    cross-attention  hybrid layers on and off x Partial LoRA on and off
    rank             Partial LoRA's rank
    share            quality against the share of parameters that train
    peft             every LoRA target and every further method of `emrrg.peft`
    dataset          adaptation to each data set: the phantoms' two hospitals, and your own (--data)

Every cell but those of ``sight`` starts from one base, trained whole on source phantoms, and is
adapted with several seeds; the seed decides the phantoms, the weights' start and the order. A cell
is one `python -m emrrg.train` in a process of its own; what is done is not run again, what was
stopped goes on, and a cell that fails stops no other. The table gives mean and deviation over the
seeds, and a paired bootstrap test of each cell against the first one on the test studies of all
seeds.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emrrg.config import (
    LORA_TARGETS,
    PEFT_METHODS,
    TrainConfig,
    parse_config,
    run_command,
    to_dict,
)
from emrrg.errors import InputError
from emrrg.evaluation import headline
from emrrg.metrics.clinical import compare_labels, label_report
from emrrg.metrics.nlg import compare_reports
from emrrg.plots import plot_ablation
from emrrg.progress import clock
from emrrg.recipes import source_stage, suggest
from emrrg.runs import read_index, read_json, write_json

log = logging.getLogger("emrrg.ablate")

COLUMNS = ("finding F1", "BLEU-4", "ROUGE-L", "CIDEr")
RESAMPLES = 1000
# Flags of `emrrg.train` that shape the base; a cell has them from it.
OF_THE_BASE = (
    "--vision-checkpoint", "--llm", "--tokenizer", "--preset", "--image-size", "--drop-path",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One setting of a study."""

    name: str
    flags: tuple[str, ...]
    """What it adds to the flags of `emrrg.train`."""


STUDIES: dict[str, list[Cell]] = {
    "sight": [Cell("seeing", ()), Cell("blind", ("--blind",))],
    "cross-attention": [
        Cell("both", ()),
        Cell("Partial LoRA only", ("--hybrid-every", "0")),
        Cell("cross-attention only", ("--lora-targets", "none")),
        Cell("neither", ("--lora-targets", "none", "--hybrid-every", "0")),
    ],
    "rank": [Cell(f"rank {r}", ("--lora-rank", str(r))) for r in (16, 1, 4, 64)],
    "share": [
        Cell("X, rank 16", ()),
        Cell("projector", ("--regime", "linear-probe")),
        Cell("X, rank 1", ("--lora-rank", "1")),
        Cell("X, rank 64", ("--lora-rank", "64")),
        Cell(
            "X, Z, out_proj, llm, rank 64",
            ("--lora-targets", "X,Z,out_proj,llm", "--lora-rank", "64"),
        ),
        Cell("encoder", ("--regime", "encoder")),
        Cell("full", ("--regime", "full")),
    ],
    "peft": [
        *(Cell(f"LoRA {t}", ("--lora-targets", t)) for t in LORA_TARGETS),
        *(Cell(m, ("--lora-targets", "none", "--peft", m)) for m in PEFT_METHODS),
    ],
    "dataset": [
        Cell("target hospital", ("--domain", "target")),
        Cell("source hospital", ("--domain", "source")),
    ],
}


@dataclass(frozen=True)
class AblateConfig:
    """Train the cells of a comparison and write their scores as a table and a picture."""

    study: Literal["sight", "cross-attention", "rank", "share", "peft", "dataset"] = "sight"
    """What is compared: the reports with and without sight of the images; hybrid layers and Partial
    LoRA on and off; LoRA's rank; the share of parameters that train; every LoRA target and PEFT
    method; data sets (--data)."""
    seeds: tuple[int, ...] = (42, 43, 44)
    """Seeds of each cell, separated by commas (sight: the first one alone)."""
    output: str | None = None
    """Folder of the cells, their logs, table.md, results.json and figure.png [default:
    runs/ablation-STUDY]; what is done there is kept."""
    base: str | None = None
    """Run that the cells start from [default: trained on source phantoms, in OUTPUT/base]."""
    jobs: int = 1
    """Cells that train at the same time, the CPU's threads shared among them."""
    data: tuple[str, ...] = ()
    """dataset: further cells as NAME=ANNOTATION:IMAGES, separated by commas."""
    train_flags: str = ""
    """Further flags of emrrg.train for the base and every cell, in one string; what a cell has from
    its base (--image-size and the like) goes to the base alone."""

    def __post_init__(self) -> None:
        words = [word.split("=")[0] for word in shlex.split(self.train_flags)]
        for word in ("--output", "--resume", "--blind", "--init", "--seed", "--config"):
            if word in words:
                raise InputError(f"--train-flags: {word} is set by the study itself")
        if self.jobs < 1:
            raise InputError(f"--jobs: {self.jobs} is not at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError("--seeds: give at least one, none of them twice")
        if self.data and self.study != "dataset":
            raise InputError("--data: goes with --study dataset")
        for item in self.data:
            name, _, paths = item.partition("=")
            if not name or ":" not in paths:
                raise InputError(f"--data: {item!r} is not NAME=ANNOTATION:IMAGES")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; arguments and errors as `emrrg.train.main`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    config, _ = parse_config(AblateConfig, argv, "emrrg.ablate")
    folder = Path(config.output or f"runs/ablation-{config.study}")
    folder.mkdir(parents=True, exist_ok=True)
    cells = cells_of(config)
    seeds = config.seeds[:1] if config.study == "sight" else config.seeds
    flags = shlex.split(config.train_flags)
    same_study(folder, config)
    with stopped_by_signals() as train:
        start: list[str] = []
        if config.study != "sight":
            start = ["--recipe", "phantoms", "--init", str(base_run(config, folder, flags, train))]
            flags = without(flags, OF_THE_BASE)
        tasks = [
            (
                folder / f"{slug(cell.name)}-{seed}",
                [*start, *flags, *cell.flags, "--seed", str(seed)],
            )
            for cell in cells
            for seed in seeds
        ]
        todo = sum(not read_index(run).get("finished") for run, _ in tasks)
        log.info("%d trainings, %d of them to do", len(tasks), todo)
        threads = max(1, (os.cpu_count() or 1) // config.jobs) if config.jobs > 1 else None
        run_cells(tasks, config.jobs, threads, train)
    results = {
        cell.name: [read_cell(folder / f"{slug(cell.name)}-{seed}") for seed in seeds]
        for cell in cells
    }
    summary = summarise(results)
    table = markdown(config.study, summary, seeds)
    (folder / "table.md").write_text(table, encoding="utf-8")
    write_json(
        folder / "results.json", {"study": config.study, "seeds": list(seeds), "cells": summary}
    )
    plot_ablation(config.study, summary, folder / "figure.png")
    log.info("\n%s\nwritten to %s", table, folder)
    return 0


def cells_of(config: AblateConfig) -> list[Cell]:
    """The cells of a study, the user's own data sets included."""
    cells = list(STUDIES[config.study])
    for item in config.data:
        name, _, paths = item.partition("=")
        annotation, _, images = paths.rpartition(":")
        given = ("--dataset", "custom", "--annotation", annotation, "--images", images)
        cells.append(Cell(name, given))
    return cells


Train = Callable[[Sequence[str], Any], int]
"""Runs a command to its end, its output into a file; the exit status."""


class Stopped(Exception):  # noqa: N818 -- no error: the user asked for it
    """No further training is to start."""


@contextmanager
def stopped_by_signals() -> Iterator[Train]:
    """Run trainings so that Ctrl-C or SIGTERM stops them all: each saves, and goes on next time."""
    running: set[subprocess.Popen[bytes]] = set()
    lock, stopped = threading.RLock(), threading.Event()  # the handler may interrupt its holder

    def train(command: Sequence[str], output: Any) -> int:
        with lock:  # either it is seen by who stops all, or it does not start
            if stopped.is_set():
                raise Stopped
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            running.add(process)
        try:
            status = process.wait()
            if status and stopped.is_set():
                raise Stopped
            return status
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            running.discard(process)

    def stop(*_: Any) -> None:
        with lock:
            stopped.set()
            for process in list(running):
                process.terminate()
        raise KeyboardInterrupt

    previous = {}
    if threading.current_thread() is threading.main_thread():
        previous = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield train
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def same_study(folder: Path, config: AblateConfig) -> None:
    """Note what the cells of a folder are trained with, and refuse to mix.

    Raises:
        InputError: the folder holds cells of other flags or of another base.
    """
    file = folder / "study.json"
    asked = {
        "study": config.study,
        "base": config.base,
        "train_flags": without(shlex.split(config.train_flags), ("--threads", "--workers")),
    }
    if file.exists() and (before := read_json(file)) != asked:
        name = next(key for key in asked if before.get(key) != asked[key])
        raise InputError(
            f"--output: {folder} holds cells with {name} {before.get(name)!r}, not "
            f"{asked[name]!r}; choose another folder"
        )
    write_json(file, asked)


def without(flags: Sequence[str], names: Sequence[str]) -> list[str]:
    """Flags but those of these names, each followed by its value or joined to it by ``=``."""
    kept, skip = [], False
    for word in flags:
        name, joined, _ = word.partition("=")
        if skip:
            skip = False
        elif name in names:
            skip = not joined
        else:
            kept.append(word)
    return kept


def base_run(config: AblateConfig, folder: Path, flags: Sequence[str], train: Train) -> Path:
    """The run that all cells start from: given, done already, or trained now."""
    if config.base is not None:
        return Path(config.base)
    run = folder / "base"
    whole, _ = parse_config(TrainConfig, ["--recipe", "phantoms", *flags], "emrrg.train", suggest)
    file = folder / "base.json"
    values = {
        k: v for k, v in to_dict(source_stage(whole)).items() if k not in ("output", "resume")
    }
    write_json(file, values)
    run_cell(run, ["--config", str(file)], None, train)
    return run


def run_cells(
    tasks: Sequence[tuple[Path, Sequence[str]]], jobs: int, threads: int | None, train: Train
) -> None:
    """Train the cells, `jobs` at a time; after each, say how many are left and for how long.

    Raises:
        InputError: cells that failed, when all others are done.
        KeyboardInterrupt: stopped; the trainings have ended.
    """
    failed: list[str] = []
    ended: list[Path] = []
    times: list[float] = []

    def attempt(run: Path, flags: Sequence[str]) -> None:
        started = time.monotonic()
        try:
            if run_cell(run, flags, threads, train):
                times.append(time.monotonic() - started)
            ended.append(run)
            left = len(tasks) - len(ended) - len(failed)
            if left and times:
                spent = statistics.fmean(times) * math.ceil(left / jobs)
                log.info("%d trainings left, about %s", left, clock(spent))
        except InputError as error:
            log.info("%s", error)
            failed.append(str(error))
        except Stopped:
            pass

    with ThreadPoolExecutor(jobs) as pool:
        done = [pool.submit(attempt, run, flags) for run, flags in tasks]
        try:
            for task in done:
                task.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        many = f"{len(failed)} of {len(tasks)} cells failed, the first: " if failed[1:] else ""
        raise InputError(f"{many}{failed[0]}")


def run_cell(run: Path, flags: Sequence[str], threads: int | None, train: Train) -> bool:
    """Train one cell, or go on with it, or leave it as it is where it is done.

    Returns:
        Whether it trained.
    Raises:
        InputError: the training failed (the message names its log).
    """
    if read_index(run).get("finished"):
        log.info("%s: done already", run)
        return False
    started = any(run.rglob("checkpoints/index.json"))
    if not started and (run / "config.json").exists():
        shutil.rmtree(run)  # it ended before there was anything to go on with
    where = ["--resume", str(run)] if started else ["--output", str(run), *flags]
    if threads is not None:
        where += ["--threads", str(threads)]
    command = [sys.executable, "-m", "emrrg.train", *where]
    log.info("%s: %s", run, shlex.join(command[1:]))
    output = run.with_name(f"{run.name}.log")
    with open(output, "a", encoding="utf-8") as file:
        status = train(command, file)
    if status:
        last = output.read_text(encoding="utf-8").strip().splitlines()[-1:] or ["no output"]
        raise InputError(f"{output}: the training ended with status {status}: {last[0]}")
    return True


def read_cell(run: Path) -> dict[str, Any]:
    """What a finished cell left: scores, parameters, and its reports."""
    scores = read_json(run / "scores.json")
    after = scores.get("after") or scores["test"]
    predictions = json.loads((run / "predictions.json").read_text(encoding="utf-8"))
    return {
        "scores": headline(after),
        "finding_interval": after["clinical"]["intervals"]["findings"]["micro"]["f1"],
        "share": scores["parameters"]["share"],
        "trainable": scores["parameters"]["trainable"],
        "seconds": scores["seconds"],
        "predictions": predictions,
    }


def summarise(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Mean, deviation and spread of every cell, and its test against the first one."""
    first = next(iter(results))
    summary: dict[str, dict[str, Any]] = {}
    for name, runs in results.items():
        row: dict[str, Any] = {
            "trainable": runs[0]["trainable"],
            "share": runs[0]["share"],
            "seconds": [run["seconds"] for run in runs],
            "finding_intervals": [run["finding_interval"] for run in runs],
        }
        for column in COLUMNS:
            values = [run["scores"][column] for run in runs]
            row[column] = {
                "values": values,
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
            }
        row["against_first"] = None if name == first else compare(runs, results[first])
        summary[name] = row
    return summary


def compare(
    runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Paired bootstrap of two cells over the test studies of all seeds; None: not the same ones."""
    mine = [row for run in runs for row in run["predictions"]]
    theirs = [row for run in others for row in run["predictions"]]
    references = [row["reference"] for row in mine]
    if references != [row["reference"] for row in theirs]:
        return None
    reports = [row["hypothesis"] for row in mine], [row["hypothesis"] for row in theirs]
    truth = [label_report(text) for text in references]
    labels = [[label_report(text) for text in part] for part in reports]
    found = compare_labels(labels[0], labels[1], truth, bootstrap=RESAMPLES)
    language = compare_reports(
        reports[0], reports[1], references, bootstrap=RESAMPLES, meteor="off"
    )
    return {
        "finding F1": found["findings"]["micro"]["f1"],
        **{name: language[key] for name, key in (("BLEU-4", "BLEU_4"), ("CIDEr", "CIDEr"))},
    }


def markdown(study: str, summary: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        f"| {study} | trained | {' | '.join(COLUMNS)} | finding F1 against the first |",
        f"|---|---|{'---|' * len(COLUMNS)}---|",
    ]
    for name, row in summary.items():
        cells = []
        for column in COLUMNS:
            deviation = row[column]["deviation"]
            spread = f" ± {deviation:.3f}" if deviation is not None else ""
            cells.append(f"{row[column]['mean']:.3f}{spread}")
        test = row["against_first"]
        verdict = ""
        if test:
            f1 = test["finding F1"]
            low, high = f1["interval"]
            verdict = (
                f"{f1['difference']:+.3f} ({low:+.3f} to {high:+.3f}), p = {f1['p_value']:.3f}"
            )
        trained = f"{row['trainable']:,} ({100 * row['share']:.2f} %)"
        lines.append(f"| {name} | {trained} | {' | '.join(cells)} | {verdict} |")
    many = f"mean ± deviation over seeds {', '.join(map(str, seeds))}; " if len(seeds) > 1 else ""
    lines += ["", f"Synthetic images (phantoms); {many}paired bootstrap, {RESAMPLES} resamples."]
    if study == "sight":
        intervals = [row["finding_intervals"][0] for row in summary.values()]
        apart = intervals[0][0] > intervals[1][1]
        shown = ", ".join(f"{low:.3f} to {high:.3f}" for low, high in intervals)
        lines.append(f"95 % intervals: {shown}: {'apart' if apart else 'overlapping'}.")
    return "\n".join(lines) + "\n"


def slug(name: str) -> str:
    """A cell's name as a folder's."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).replace("--", "-")


if __name__ == "__main__":
    run_command(main)
