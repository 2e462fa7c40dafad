"""Train a report generator: ``python -m emrrg.train``.

Without arguments it runs the whole mission in small, on synthetic phantoms: (a) a tiny model is
trained whole on one synthetic hospital, which stands for the pre-trained model; (b) it is frozen
and adapted by Partial LoRA and hybrid layers to another hospital. With ``--dataset`` it trains on
real data. A run that was stopped goes on with ``--resume RUN``.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from emrrg.building import build_model, check_fit
from emrrg.config import RECIPES, TrainConfig, flag, parse_config, run_command, to_dict
from emrrg.data.dataset import Batch, Studies, batches, epoch_order
from emrrg.data.images import normalize
from emrrg.data.loading import load_studies
from emrrg.errors import InputError
from emrrg.evaluation import (
    Evaluation,
    autocast,
    evaluate_model,
    format_scores,
    selection_score,
    write_predictions,
    write_samples,
)
from emrrg.jsonl import append_row, read_rows, write_rows
from emrrg.model import ReportGenerator, set_regime
from emrrg.plots import plot_curves
from emrrg.runs import (
    load_run,
    mark_finished,
    read_checkpoint,
    read_index,
    read_json,
    read_run_config,
    read_tensors,
    save_base,
    save_checkpoint,
    state_of,
    write_json,
)
from emrrg.system import describe_system, memory_bytes, pick_device

log = logging.getLogger("emrrg.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: flags; None: `sys.argv`.
    Returns:
        0 when the run went to its end, 130 when it was interrupted (and saved).
    Raises:
        InputError: something that the user gave cannot be used.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    config, given = parse_config(TrainConfig, argv, "emrrg.train", suggest)
    if config.resume is not None:
        config = resumed(Path(config.resume), given)
    run = run_folder(config)
    if config.resume is None:
        config = dataclasses.replace(config, output=str(run))
        write_json(run / "config.json", to_dict(config))
    if config.recipe == "phantoms" and config.init is None:
        finished = train_phantoms(config, run)
    else:
        finished = train(config, run)
    if not finished:
        log.info("interrupted; go on with: python -m emrrg.train --resume %s", run)
        return 130
    log.info(NEXT_STEPS, run, run, run)
    return 0


NEXT_STEPS = """
What to try next:
  python -m emrrg.evaluate %s --split test
  python -m emrrg.generate %s image.png --heatmap heatmap.png
  python -m emrrg.train --init %s --dataset custom --annotation A.json --images DIR"""


def suggest(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values that the recipe suggests for the flags that the user left out."""
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
    if "hybrid_layers" not in given:
        values["hybrid_every"] = 8 if "llm" in given else values.get("hybrid_every", 2)
    return values


def resumed(run: Path, given: Mapping[str, Any]) -> TrainConfig:
    """The configuration of a run that goes on; only what does not change its numbers may differ."""
    if not (run / "config.json").exists():
        raise InputError(f"--resume: {run} holds no config.json, it is not a run folder")
    config = read_run_config(run)
    free = {"resume", "device", "threads", "workers", "log_every", "save_every", "epochs"}
    for name, value in given.items():
        if name not in free and value != getattr(config, name):
            raise InputError(f"{flag(name)}: cannot change in a run that goes on (--resume {run})")
    changes = {name: given[name] for name in free & set(given)}
    return dataclasses.replace(config, **changes, resume=str(run), output=str(run))


def run_folder(config: TrainConfig) -> Path:
    """Make the run's folder: the one asked for (empty or new), or the next free default name."""
    if config.resume is not None:
        return Path(config.resume)
    if config.output is not None:
        run = Path(config.output)
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise InputError(
                f"--output: {run} exists already; choose another, or go on with --resume {run}"
            )
    else:
        stem = Path("runs") / (config.recipe or config.dataset or "run")
        run, number = stem, 1
        while run.exists():
            number += 1
            run = stem.with_name(f"{stem.name}-{number}")
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".writable").touch()
        (run / ".writable").unlink()
    except OSError as error:
        raise InputError(f"--output: cannot write in {run} ({error.strerror})") from error
    return run


def train_phantoms(config: TrainConfig, run: Path) -> bool:
    """The two stages of the default run, each of which goes on where it was stopped."""
    source_run = run / "source"
    source = dataclasses.replace(
        config,
        recipe=None,
        dataset="phantoms",
        domain="source",
        regime="full",
        lora_targets=(),
        hybrid_every=0,
        hybrid_layers=None,
        train_studies=config.source_studies,
        epochs=config.source_epochs,
        lr=config.source_lr,
        eval_every=0,
        output=str(source_run),
        resume=str(source_run) if (source_run / "config.json").exists() else None,
    )
    log.info("(a) %s: train the whole model on source phantoms (synthetic images)", source_run)
    if not read_index(source_run).get("finished"):
        source_run.mkdir(exist_ok=True)
        write_json(source_run / "config.json", to_dict(source))
        if not train(source, source_run):
            return False
    log.info("\n(b) %s: adapt it to target phantoms (%s)", run, config.regime)
    return train(dataclasses.replace(config, init=str(source_run)), run)


def train(config: TrainConfig, run: Path) -> bool:
    """Train one model from its first step, or its last checkpoint, to the final scores.

    Args:
        config: the flags, presets filled in.
        run: the run's folder.
    Returns:
        False if a signal stopped the run (its state is saved), True when it is done.
    """
    device = pick_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed)
    started = time.monotonic()

    resuming = "last" in read_index(run)
    if resuming:
        model = load_run(run, device=device, which="last")
        studies = load_studies(config, model.config.image_size)
    else:
        check_fit(config)
        studies = load_studies(config, None)
        model = build_model(config, studies["train"].reports()).to(device)
    trained = set_regime(model, config.regime or "full")
    parameters = {n: p for n, p in model.named_parameters() if n in set(trained)}
    optimizer = build_optimizer(config, parameters)
    total_steps = steps_in_all(config, len(studies["train"]))
    progress = Progress(run, config, total_steps)
    if resuming:
        restore(run, parameters, optimizer, progress)
    else:
        if config.blind:
            set_feature_mean(model, studies["train"], config, device)
        save_base(run, model, trained)
        seed_everything(config.seed + 1)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    for line in describe_system(model, device, config):
        log.info("%s", line)

    before = None
    if config.init is not None:
        before = scored_once(run / "scores_before.json", model, studies, config, device, run)

    with progress, stop_on_signals() as stopped:
        while progress.epoch < config.epochs and progress.step < total_steps:
            order = epoch_order(len(studies["train"]), config.seed, progress.epoch)
            for batch in batches(
                studies["train"],
                config.batch_size,
                order=order,
                skip=progress.batch,
                workers=data_workers(config, device),
            ):
                set_lr(optimizer, learning_rate(config, progress.step, total_steps))
                loss = training_step(model, batch, optimizer, scaler, parameters, config, device)
                progress.advance(batch, loss, optimizer.param_groups[0]["lr"])
                if progress.bad_steps >= config.bad_steps:
                    save(run, progress, parameters, optimizer)
                    raise InputError(
                        f"--lr: the loss was not finite for {progress.bad_steps} steps in a row "
                        f"(studies {', '.join(batch.ids[:4])}, ...); the state before them is in "
                        f"{run}; try a smaller --lr or --precision fp32"
                    )
                done = progress.step >= total_steps
                if progress.step % config.save_every == 0 or stopped():
                    save(run, progress, parameters, optimizer)
                if stopped():
                    return False
                if done:
                    break
            progress.next_epoch()
            best = validate(model, studies, config, device, progress, run, total_steps)
            save(run, progress, parameters, optimizer, best=best)
            plot_curves(run / "metrics.jsonl", run / "curves.png")

    finish(run, studies, config, device, before, time.monotonic() - started)
    return True


def training_step(
    model: ReportGenerator,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Mapping[str, Tensor],
    config: TrainConfig,
    device: torch.device,
) -> float:
    """One optimizer step; a loss or gradient that is not finite changes nothing.

    Returns:
        The loss (nan or inf where the step was skipped).
    """
    model.train()
    images = normalize(batch.images.to(device, non_blocking=True))
    report_ids = model.report_ids(batch.reports).to(device)
    with autocast(device, config.precision):
        loss = model(images, batch.view_mask.to(device), report_ids)
    optimizer.zero_grad(set_to_none=True)
    value = float(loss.detach())
    if not math.isfinite(value):
        return value
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    limit = config.grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), limit)
    if not torch.isfinite(norm) and not scaler.is_enabled():
        return math.nan
    scaler.step(optimizer)
    scaler.update()
    return value


def build_optimizer(
    config: TrainConfig, parameters: Mapping[str, Tensor]
) -> torch.optim.Optimizer:
    """AdamW; norms, biases, A_log, D, embeddings of position and class decay only if asked."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in parameters.items():
        groups[config.decay_all or decays(name, parameter)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": config.weight_decay if decayed else 0.0}
            for decayed, members in groups.items()
            if members
        ],
        lr=config.lr,
        betas=(0.9, 0.999),
        fused=True,
    )


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay belongs on a parameter: matrices and filters, and nothing else."""
    state_space = ("A_log", "A_b_log", "A_c_log", "A_c_b_log", "cls_token", "pos_embed")
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in state_space


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine to `min_lr`, stepped every step or (the paper) every epoch."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    if config.schedule == "epoch-cosine":
        steps_an_epoch = math.ceil(total_steps / config.epochs)
        done = (step // steps_an_epoch) / config.epochs
    floor = min(config.min_lr, config.lr)
    return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def steps_in_all(config: TrainConfig, studies: int) -> int:
    """Optimizer steps of the whole run."""
    steps = config.epochs * math.ceil(studies / config.batch_size)
    return min(steps, config.max_steps or steps)


def data_workers(config: TrainConfig, device: torch.device) -> int:
    """Processes that read images: as asked; none for phantoms (they are in memory) or the CPU."""
    if config.workers is not None:
        return config.workers
    return 0 if config.dataset == "phantoms" or device.type == "cpu" else 8


class Progress:
    """Where the run stands: counters, the log, the bar, `metrics.jsonl`."""

    def __init__(self, run: Path, config: TrainConfig, total_steps: int) -> None:
        self.path = run / "metrics.jsonl"
        self.log_every = config.log_every
        self.total_steps = total_steps
        self.step = self.epoch = self.batch = self.samples = self.bad_steps = 0
        self.best_score = -math.inf
        self._window: list[float] = []
        self._window_samples = 0
        self._first_step = 0

    def __enter__(self) -> Progress:
        self._bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self._first_step = self.step
        self._started = self._window_started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, batch: Batch, loss: float, lr: float) -> None:
        """Count one step; every `log_every` steps write a line."""
        self.step += 1
        self.batch += 1
        self.samples += len(batch.ids)
        self._window_samples += len(batch.ids)
        if math.isfinite(loss):
            self.bad_steps = 0
            self._window.append(loss)
        else:
            self.bad_steps += 1
            self.say(f"step {self.step}: the loss is {loss}; skipped ({', '.join(batch.ids)})")
            self.write({"step": self.step, "skipped": batch.ids})
        self._bar.update()
        if self.step % self.log_every and self.step != self.total_steps:
            return
        now = time.monotonic()
        rate = self._window_samples / max(1e-9, now - self._window_started)
        mean = sum(self._window) / len(self._window) if self._window else math.nan
        pace = (now - self._started) / max(1, self.step - self._first_step)
        eta = pace * (self.total_steps - self.step)
        memory = memory_bytes() / 2**30
        self._bar.set_postfix_str(f"loss {mean:.3f}, lr {lr:.1e}, {rate:.0f} studies/s")
        if self._bar.disable:
            log.info(
                "step %d/%d  loss %.3f  lr %.2e  %.1f studies/s  %.2f GiB  ETA %d:%02d",
                self.step, self.total_steps, mean, lr, rate, memory, *divmod(int(eta), 60),
            )  # fmt: skip
        row = {"step": self.step, "epoch": self.epoch, "loss": mean, "lr": lr}
        self.write({**row, "studies_per_second": rate, "memory_gib": memory})
        self._window, self._window_samples, self._window_started = [], 0, now

    def next_epoch(self) -> None:
        """An epoch is over."""
        self.epoch += 1
        self.batch = 0

    def say(self, text: str) -> None:
        """A line that does not tear the bar."""
        tqdm.write(text, file=sys.stdout)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append to `metrics.jsonl`."""
        append_row(self.path, row)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        names = ("step", "epoch", "batch", "samples", "bad_steps")
        score = self.best_score if math.isfinite(self.best_score) else None
        return {**{n: getattr(self, n) for n in names}, "best_score": score}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state, and drop the log lines that came after it."""
        for name, value in state.items():
            if name != "best_score":
                setattr(self, name, value)
        self.best_score = -math.inf if state["best_score"] is None else state["best_score"]
        if self.path.exists():
            write_rows(self.path, [r for r in read_rows(self.path) if r["step"] <= self.step])


def save(
    run: Path,
    progress: Progress,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    best: bool = False,
) -> None:
    """Write a checkpoint of everything that the run's future depends on."""
    names = {id(p): n for n, p in parameters.items()}
    moments = {
        f"{names[id(p)]}:{key}": value
        for p, values in optimizer.state.items()
        for key, value in values.items()
    }
    moments["rng:cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        moments["rng:cuda"] = torch.cuda.get_rng_state()
    save_checkpoint(run, progress.step, parameters, moments, progress.state(), best=best)


def restore(
    run: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Read back what `save` wrote; the weights are in the model already."""
    checkpoint = read_checkpoint(run, "last")
    tensors = read_tensors(checkpoint.folder / "optimizer.safetensors")
    for name, parameter in parameters.items():
        values = {
            key.rsplit(":", 1)[1]: value.to(parameter.device if value.ndim else "cpu")
            for key, value in tensors.items()
            if key.rsplit(":", 1)[0] == name
        }
        if values:
            optimizer.state[parameter] = values
    torch.set_rng_state(tensors["rng:cpu"])
    if "rng:cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng:cuda"])
    progress.restore(checkpoint.state)
    log.info("going on from step %d", progress.step)


def seed_everything(seed: int) -> None:
    """Seed torch and Python."""
    torch.manual_seed(seed)
    random.seed(seed)


@torch.no_grad()
def set_feature_mean(
    model: ReportGenerator, studies: Studies, config: TrainConfig, device: torch.device
) -> None:
    """The blind control: the mean of the encoder's features over the training images."""
    encoder = model.visual_encoder.eval()
    total = torch.zeros_like(model.feature_mean)
    count = 0
    for batch in batches(studies, config.eval_batch_size):
        tokens = encoder(normalize(batch.images.to(device))[batch.view_mask.to(device)])
        total += tokens.sum(0)
        count += len(tokens)
    model.feature_mean.copy_(total / count)


def validate(
    model: ReportGenerator,
    studies: Mapping[str, Studies],
    config: TrainConfig,
    device: torch.device,
    progress: Progress,
    run: Path,
    total_steps: int,
) -> bool:
    """Generate reports for the validation studies at the end of an epoch.

    Returns:
        Whether the weights are the best so far (always, where there is no validation).
    """
    last = progress.epoch >= config.epochs or progress.step >= total_steps
    if not config.eval_every or not len(studies["val"]):
        return True
    if progress.epoch % config.eval_every and not last:
        return False
    result = evaluate_model(model, studies["val"], config, device, meteor=False)
    score = selection_score(result.scores)
    progress.say(f"epoch {progress.epoch}: validation {format_scores(result.scores)}")
    progress.write({"step": progress.step, "epoch": progress.epoch, "val": result.brief()})
    best = score > progress.best_score
    progress.best_score = max(score, progress.best_score)
    write_samples(run, result, studies["val"], "validation")
    return best


def scored_once(
    path: Path,
    model: ReportGenerator,
    studies: Mapping[str, Studies],
    config: TrainConfig,
    device: torch.device,
    run: Path,
) -> dict[str, Any]:
    """Test scores before training; read back where a resumed run has them already."""
    if path.exists():
        return read_json(path)
    result = evaluate_model(model, studies["test"], config, device, name="before")
    log.info("before adaptation: %s", format_scores(result.scores))
    write_json(path, result.scores)
    return result.scores


def finish(
    run: Path,
    studies: Mapping[str, Studies],
    config: TrainConfig,
    device: torch.device,
    before: dict[str, Any] | None,
    seconds: float,
) -> None:
    """Score the best weights on the test studies and write the results."""
    model = load_run(run, device=device, which="best")
    set_regime(model, config.regime or "full")
    result: Evaluation = evaluate_model(
        model, studies["test"], config, device, train_reports=studies["train"].reports()
    )
    state = state_of(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    encoder = sum(p.numel() for n, p in state.items() if n.startswith("visual_encoder."))
    scores = {
        "after" if before else "test": result.scores,
        **({"before": before} if before else {}),
        "parameters": {
            "trainable": trainable,
            "total": total,
            "share": trainable / total,
            "encoder": encoder,
        },
        "seconds": seconds,
        "synthetic": config.dataset == "phantoms",
    }
    write_json(run / "scores.json", scores)
    write_predictions(run / "predictions.json", result)
    write_samples(run, result, studies["test"], "test")
    plot_curves(run / "metrics.jsonl", run / "curves.png")
    mark_finished(run)
    log.info("")
    if before:
        log.info("test before: %s", format_scores(before))
    log.info("test%s: %s", " after" if before else "", format_scores(result.scores))
    if "baselines" in result.scores:
        constant = result.scores["baselines"]["constant"]
        log.info("constant report: %s", format_scores(constant))
    log.info(
        "trained %s of %s parameters (%.2f %%) in %.0f s; results in %s",
        f"{trainable:,}", f"{total:,}", 100 * trainable / total, seconds, run,
    )  # fmt: skip


@contextmanager
def stop_on_signals() -> Iterator[Any]:
    """SIGINT and SIGTERM let the running step finish; a second SIGINT ends at once."""
    caught: list[int] = []

    def handler(number: int, _frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread: leave the signals to whoever runs us
        pass
    try:
        yield lambda: bool(caught)
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


if __name__ == "__main__":
    run_command(main)
