"""Train a report generator: ``python -m emrrg.train``.

Without arguments it runs the whole mission in small, on synthetic phantoms: (a) a tiny model is
trained whole on one synthetic hospital, which stands for the pre-trained model; (b) it is frozen
and adapted by Partial LoRA and hybrid layers to another hospital. With ``--dataset`` it trains on
real data. A run that was stopped goes on with ``--resume RUN``; ``torchrun --nproc-per-node 8 -m
emrrg.train ...`` spreads it over GPUs.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from emrrg.config import TrainConfig, flag, parse_config, run_command, to_dict
from emrrg.data.dataset import batches, epoch_steps
from emrrg.data.images import normalize
from emrrg.distributed import World, joined, local_device
from emrrg.engine import (
    Session,
    prepare,
    read_steps,
    restore,
    save,
    seed_everything,
    studies_a_step,
    training_step,
)
from emrrg.errors import InputError
from emrrg.evaluation import (
    autocast,
    evaluate_model,
    format_scores,
    selection_score,
    write_predictions,
    write_samples,
)
from emrrg.optim import learning_rate, set_lr
from emrrg.plots import plot_curves
from emrrg.progress import Progress, clock
from emrrg.recipes import source_stage, suggest
from emrrg.runs import (
    generation_of,
    load_run,
    mark_finished,
    read_index,
    read_json,
    read_run_config,
    state_of,
    write_json,
)
from emrrg.system import describe_device, memory_bytes, parameter_counts, pick_device

log = logging.getLogger("emrrg.train")

INTERVALS = 1000  # resamples behind the intervals of the final scores


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
    device = local_device(pick_device(config.device))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with joined(device) as world:
        if not world.is_main:
            log.setLevel(logging.ERROR)
        if config.dry_run:
            dry_run(config, device, world)
            return 0
        run = Path(world.gather(str(run_folder(config)) if world.is_main else "")[0])
        if config.resume is None:
            config = dataclasses.replace(config, output=str(run))
            if world.is_main:
                write_json(run / "config.json", to_dict(config))
        if config.recipe == "phantoms" and config.init is None:
            finished = train_phantoms(config, run, device, world)
        else:
            finished = train(config, run, device, world)
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


def train_phantoms(config: TrainConfig, run: Path, device: torch.device, world: World) -> bool:
    """The two stages of the default run, each of which goes on where it was stopped."""
    folder = run / "source"
    source = dataclasses.replace(source_stage(config), output=str(folder))
    log.info("(a) %s: train the whole model on source phantoms (synthetic images)", folder)
    if not read_index(folder).get("finished"):
        if world.is_main:
            folder.mkdir(exist_ok=True)
            write_json(folder / "config.json", to_dict(source))
        world.wait()
        if not train(source, folder, device, world):
            return False
    log.info("\n(b) %s: adapt it to target phantoms (%s)", run, config.regime)
    adapt = dataclasses.replace(
        config, init=str(folder), preset=None, image_size=None, tokenizer=None
    )
    return train(adapt, run, device, world)


def train(config: TrainConfig, run: Path, device: torch.device, world: World) -> bool:
    """Train one model from its first step, or its last checkpoint, to the final scores.

    Args:
        config: the flags, presets filled in.
        run: the run's folder.
        device: of this process.
        world: the processes of the run.
    Returns:
        False if a signal stopped the run (its state is saved), True when it is done.
    """
    started = time.monotonic()
    resuming = "last" in read_index(run)
    session = prepare(config, run, device, world, resuming)
    config = session.config
    count, size = len(session.studies["train"]), studies_a_step(config, world)
    steps_an_epoch = math.ceil(count / size)
    total_steps = config.epochs * steps_an_epoch
    total_steps = min(total_steps, config.max_steps or total_steps)
    progress = Progress(run, config, total_steps, steps_an_epoch, quiet=not world.is_main)
    if resuming:
        restore(run, session, progress)
    else:
        seed_everything(config.seed + 1 + world.rank)
    summarise(session, total_steps)
    before = scored_before(run, session) if config.init is not None else None

    ids = session.studies["train"].ids()
    lengths = [len(row) for row in session.rows]
    stopping = False
    with progress, stop_on_signals() as stopped:
        while progress.epoch < config.epochs and progress.step < total_steps and not stopping:
            steps = epoch_steps(
                lengths, size, seed=config.seed, epoch=progress.epoch, bucket=config.bucket
            )[progress.batch :]
            reader = read_steps(session, steps)
            for studies in steps:
                lr = learning_rate(config, progress.step, total_steps)
                set_lr(session.optimizer, lr)
                loss, failures, stop = training_step(session, studies, reader, stopped)
                progress.unreadable(failures)
                names = [ids[i] for i in studies]
                progress.advance(names, loss, lr, sum(lengths[i] for i in studies))
                if progress.bad_steps >= config.bad_steps:
                    save(run, session, progress)
                    raise InputError(
                        f"--lr: the loss was not finite for {progress.bad_steps} steps in a row "
                        f"(studies {', '.join(names[:4])}, ...); the state before them is in "
                        f"{run}; try a smaller --lr or --precision fp32"
                    )
                if progress.step % config.save_every == 0 or stop:
                    save(run, session, progress)
                if stop:
                    return False
                if progress.step >= total_steps:
                    break
            progress.next_epoch()
            pause = time.monotonic()
            best = validate(session, progress, run, total_steps)
            stopping = 0 < config.patience <= progress.waited
            if stopping:
                progress.say(f"stopped: no better score in {progress.waited} validations")
            save(run, session, progress, best=best)
            if world.is_main:
                plot_curves(run / "metrics.jsonl", run / "curves.png")
            progress.pause(time.monotonic() - pause)

    finish(run, session, before, time.monotonic() - started)
    return True


def summarise(session: Session, total_steps: int) -> None:
    """What trains, from where, on which device."""
    config, model = session.config, session.model
    trainable, total = parameter_counts(model)
    encoder = sum(p.numel() for p in model.visual_encoder.parameters())
    log.info("device: %s", describe_device(session.device))
    if session.world.size > 1:
        log.info("processes: %d", session.world.size)
    start = config.init or config.vision_checkpoint or "random weights"
    log.info(
        "model: encoder %s, language model %s parameters, from %s",
        f"{encoder:,}", f"{sum(p.numel() for p in model.llama_model.parameters()):,}", start,
    )  # fmt: skip
    adapters = [*model.config.lora_targets, *model.config.peft]
    log.info(
        "trains: %s of %s parameters (%.2f %%), regime %s%s",
        f"{trainable:,}", f"{total:,}", 100 * trainable / total, config.regime,
        f", adapters {', '.join(adapters)}" if adapters else "",
    )  # fmt: skip
    sizes = ", ".join(f"{len(part)} {name}" for name, part in session.studies.items())
    log.info(
        "data: %s studies (%s); %d steps of %d studies, %d epochs",
        sizes, config.dataset, total_steps, studies_a_step(config, session.world), config.epochs,
    )  # fmt: skip


def validate(session: Session, progress: Progress, run: Path, total_steps: int) -> bool:
    """Generate reports for the validation studies at the end of an epoch.

    Returns:
        Whether the weights are the best so far (always, where there is no validation).
    """
    config, studies = session.config, session.studies["val"]
    last = progress.epoch >= config.epochs or progress.step >= total_steps
    if not config.eval_every or not len(studies):
        return True
    if progress.epoch % config.eval_every and not last:
        return False
    result = evaluate_model(
        session.model, studies, config, session.device, meteor=False, label="validating",
        world=session.world,
    )  # fmt: skip
    score = selection_score(result.scores, config)
    progress.say(f"epoch {progress.epoch}: validation {format_scores(result.scores)}")
    progress.write({"step": progress.step, "epoch": progress.epoch, "val": result.brief()})
    best = score > progress.best_score
    progress.best_score = max(score, progress.best_score)
    progress.waited = 0 if best else progress.waited + 1
    if session.world.is_main:
        write_samples(run, result, studies, "validation")
    return best


def scored_before(run: Path, session: Session) -> dict[str, Any]:
    """Test scores before training; read back where a resumed run has them already."""
    path = run / "scores_before.json"
    if path.exists():
        return read_json(path)
    result = evaluate_model(
        session.model, session.studies["test"], session.config, session.device,
        label="before adaptation", bootstrap=INTERVALS, world=session.world,
    )  # fmt: skip
    log.info("before adaptation: %s", format_scores(result.scores))
    session.world.wait()
    if session.world.is_main:
        write_json(path, result.scores)
    return result.scores


def finish(run: Path, session: Session, before: dict[str, Any] | None, seconds: float) -> None:
    """Score the best weights on the test studies and write the results."""
    config, studies = session.config, session.studies
    trainable, total = parameter_counts(session.model)
    model = load_run(run, device=session.device, which="best")
    result = evaluate_model(
        model,
        studies["test"],
        config,
        session.device,
        train_reports=studies["train"].reports(),
        bootstrap=INTERVALS,
        label="testing",
        world=session.world,
    )
    session.world.wait()
    if not session.world.is_main:
        return
    encoder = sum(p.numel() for n, p in state_of(model).items() if n.startswith("visual_encoder."))
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
        "peak_memory_bytes": memory_bytes(),
        "device": describe_device(session.device),
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
    log.info("constant report: %s", format_scores(result.scores["baselines"]["constant"]))
    log.info(
        "trained %s of %s parameters (%.2f %%) in %s; results in %s",
        f"{trainable:,}", f"{total:,}", 100 * trainable / total, clock(seconds), run,
    )  # fmt: skip


def dry_run(config: TrainConfig, device: torch.device, world: World) -> None:
    """Two steps and one generation in a folder that vanishes; what they took, and would take."""
    if config.recipe == "phantoms" and config.init is None:
        config = source_stage(config)
    with tempfile.TemporaryDirectory() as folder:
        session = prepare(config, Path(folder), device, world, resuming=False)
        config = session.config
        count, size = len(session.studies["train"]), studies_a_step(config, world)
        steps_an_epoch = math.ceil(count / size)
        summarise(session, config.epochs * steps_an_epoch)
        lengths = [len(row) for row in session.rows]
        # The same step twice: the first one also builds what is built once.
        step = epoch_steps(lengths, size, seed=config.seed, epoch=0, bucket=config.bucket)[0]
        reader = read_steps(session, [step, step])
        times = []
        for _ in range(2):
            started = time.perf_counter()
            loss, _, _ = training_step(session, step, reader, lambda: False)
            times.append(time.perf_counter() - started)
        part = next(batches(session.studies["train"], [step[: config.eval_batch_size]]))
        started = time.perf_counter()
        session.model.eval()
        with autocast(device, config.precision):
            written = session.model.generate_batch(
                normalize(part.images.to(device)), part.view_mask.to(device), generation_of(config)
            )
        seconds = time.perf_counter() - started
    epoch = times[1] * steps_an_epoch
    log.info("dry run: loss %.3f; a step takes %.2f s (the first %.2f s)", loss, times[1], times[0])
    log.info(
        "an epoch of %d steps takes about %s, %d epochs %s (without validation); peak %.2f GiB",
        steps_an_epoch, clock(epoch), config.epochs, clock(epoch * config.epochs),
        memory_bytes() / 2**30,
    )  # fmt: skip
    rate = len(part.ids) / seconds
    log.info("generation: %.1f reports/s; the first: %s", rate, written[0][:200] or "(empty)")


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
