"""Train a report generator: ``python -m emrrg.train``.

Without arguments it runs the whole mission in small, on synthetic phantoms: (a) a tiny model is
trained whole on one synthetic hospital, which stands for the pre-trained model; (b) it is frozen
and adapted by Partial LoRA and hybrid layers to another hospital. With ``--dataset`` it trains on
real data. A run that was stopped goes on with ``--resume RUN``; ``torchrun --nproc-per-node 8 -m
emrrg.train ...`` spreads it over GPUs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from emrrg.config import TrainConfig, flag, parse_config, run_command, to_dict
from emrrg.data.dataset import batches, epoch_steps, even_batches, readers_may_die
from emrrg.data.images import normalize
from emrrg.distributed import World, in_step, joined, local_device, said_once
from emrrg.engine import (
    Session,
    load_best,
    prepare,
    read_steps,
    restore,
    save,
    seed_everything,
    training_step,
)
from emrrg.errors import InputError
from emrrg.evaluation import (
    Evaluation,
    StoppedError,
    autocast,
    default_scoring,
    evaluate_model,
    format_scores,
    selection_score,
    write_predictions,
    write_samples,
)
from emrrg.metrics.java import meteor_ahead
from emrrg.model import ReportGenerator
from emrrg.neighbours import by_default, nearest_reports
from emrrg.optim import learning_rate, set_lr
from emrrg.plots import plot_curves
from emrrg.progress import Progress, clock
from emrrg.recipes import source_stage, suggest
from emrrg.runs import (
    generation_of,
    is_export,
    mark_finished,
    read_index,
    read_json,
    read_run_config,
    resume_hint,
    sole_writer,
    write_json,
    writing,
)
from emrrg.system import describe_device, memory_bytes, parameter_counts, pick_device

log = logging.getLogger("emrrg.train")

Stopped = Callable[[], bool]

INTERVALS = 1000  # resamples behind the intervals of the final scores
BASELINES = {
    "constant": "constant report",
    "nearest_neighbour": "report of the nearest training image",
}
MAY_CHANGE = (
    "device", "threads", "workers", "log_every", "save_every", "keep_last", "epochs", "patience",
    "bad_steps", "tensorboard",
)  # fmt: skip
"""Flags that may differ when a run goes on: they leave the numbers of the steps that it has taken
as they are. Of those to come, ``epochs`` decides the learning rate, and where they end."""
AGAIN = 1.0  # seconds after which a further SIGINT is a person's second one


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
    with said_once():
        config, given = parse_config(TrainConfig, argv, "emrrg.train", suggest)
        if config.resume is not None:
            config = resumed(Path(config.resume), given)
        device = pick_device(config.device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
    device = local_device(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with joined(device) as world:
        log.setLevel(logging.INFO if world.is_main else logging.ERROR)
        if config.dry_run:
            dry_run(config, device, world)
            return 0
        run = Path(world.once(lambda: str(run_folder(config))))
        with sole_writer(run) if world.is_main else nullcontext():
            if config.resume is None:
                config = dataclasses.replace(config, output=str(run))
                if world.is_main:
                    write_json(run / "config.json", to_dict(config))
            elif world.once(lambda: nothing_left(run, config)):
                return 0
            world.wait()
            if not (run / "config.json").exists():
                raise InputError(f"--output: {run} must be a folder that all machines share")
            with stop_on_signals(world) as stopped, readers_may_die():
                two_stages = config.recipe == "phantoms" and not config.init
                train_all = train_phantoms if two_stages else train
                try:
                    finished = train_all(config, run, device, world, stopped)
                except StoppedError:
                    finished = False
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
    if is_export(run):
        raise InputError(f"--resume: {run} is exported, it cannot go on; start from it with --init")
    config = read_run_config(run)
    for name, value in given.items():
        if name not in (*MAY_CHANGE, "resume") and value != getattr(config, name):
            raise InputError(
                f"{flag(name)}: cannot change in a run that goes on (--resume {run}); "
                f"{', '.join(map(flag, MAY_CHANGE))} can"
            )
    changes = {name: given[name] for name in MAY_CHANGE if name in given}
    return dataclasses.replace(config, **{**changes, "resume": str(run), "output": str(run)})


def nothing_left(run: Path, config: TrainConfig) -> bool:
    """Whether a run that is to go on is at its end; says so, or notes that its end has moved."""
    before, finished = read_run_config(run), read_index(run).get("finished")
    now = dataclasses.replace(before, epochs=config.epochs, patience=config.patience)
    if finished and now.epochs <= before.epochs and now.patience == before.patience:
        log.info(
            "%s is finished and scored (--epochs %d), nothing is left to do; a larger --epochs%s "
            "trains on",
            run, before.epochs, ", with another --patience," if before.patience else "",
        )  # fmt: skip
        return True
    if finished:
        mark_finished(run, False)
    if now != before:
        write_json(run / "config.json", to_dict(now))
    return False


def run_folder(config: TrainConfig) -> Path:
    """Make the run's folder: the one asked for (empty or new), or the next free default name."""
    if config.resume is not None:
        return Path(config.resume)
    if config.output is not None:
        run = Path(config.output)
        # What is hidden are half-written files of an attempt that a kill ended at once; a
        # configuration alone is that of an attempt which was refused before it trained.
        left = {p.name for p in run.iterdir() if p.name[0] != "."} if run.is_dir() else set()
        if run.is_file() or left - {"config.json"}:
            raise InputError(
                f"--output: {run} exists already; choose another, or go on with --resume {run}"
            )
    else:
        stem = Path("runs") / (config.recipe or config.dataset or "run")
        run, number, stopped = stem, 1, None
        while not made(run):
            if (run / "config.json").exists() and not read_index(run).get("finished"):
                stopped = run
            number += 1
            run = stem.with_name(f"{stem.name}-{number}")
        if run != stem:
            log.info("%s exists already: this run goes to %s", stem, run)
        if stopped is not None:
            log.info("%s is unfinished; %s", stopped, resume_hint(stopped))
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".writable").touch()
        (run / ".writable").unlink()
    except OSError as error:
        raise InputError(f"--output: cannot write in {run} ({error.strerror})") from error
    return run


def made(folder: Path) -> bool:
    """Make a folder; False: it is there already, made by another run this very moment perhaps."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise InputError(f"--output: cannot make {folder} ({error.strerror})") from error
    return True


def train_phantoms(
    config: TrainConfig, run: Path, device: torch.device, world: World, stopped: Stopped
) -> bool:
    """The two stages of the default run, each of which goes on where it was stopped."""
    folder = run / "source"
    source = dataclasses.replace(source_stage(config), output=str(folder))
    if config.auto_batch and "last" in read_index(folder):  # the batch that was found then
        found = read_run_config(folder).batch_size
        source = dataclasses.replace(source, auto_batch=False, batch_size=found)
    log.info("(a) %s: train the whole model on source phantoms (synthetic images)", folder)
    if not read_index(folder).get("finished"):
        if world.is_main:
            folder.mkdir(exist_ok=True)
            write_json(folder / "config.json", to_dict(source))
        world.wait()
        if not train(source, folder, device, world, stopped, brief=True):
            return False
    log.info("\n(b) %s: adapt it to target phantoms (%s)", run, config.regime)
    adapt = dataclasses.replace(
        config, init=str(folder), preset=None, image_size=None, drop_path=None, tokenizer=None
    )
    return train(adapt, run, device, world, stopped)


def train(
    config: TrainConfig,
    run: Path,
    device: torch.device,
    world: World,
    stopped: Stopped,
    *,
    brief: bool = False,
) -> bool:
    """Train one model from its first step, or its last checkpoint, to the final scores.

    Args:
        config: the flags, presets filled in.
        run: the run's folder.
        device: of this process.
        world: the processes of the run.
        stopped: whether a signal came.
        brief: score the result without METEOR, intervals and baselines: it is but a stage.
    Returns:
        False if a signal stopped the run (its state is saved), True when it is done.
    Raises:
        StoppedError: a signal came while there was nothing to save.
    """
    started = time.monotonic()
    resuming = "last" in read_index(run)
    session = prepare(config, run, device, world, resuming)
    config, size = session.config, session.step_studies
    steps_an_epoch = math.ceil(len(session.rows) / size)
    total_steps = min(config.epochs * steps_an_epoch, config.max_steps or sys.maxsize)
    progress = Progress(run, config, total_steps, steps_an_epoch, quiet=not world.is_main)
    if resuming:
        restore(run, session, progress)
    else:
        progress.start()
        seed_everything(config.seed + 1 + world.rank)
    summarise(session, total_steps)
    before = scored_before(run, session, stopped) if config.init is not None else None

    ids = session.studies["train"].ids()
    lengths = [len(row) for row in session.rows]
    with progress:
        while not progress.over:
            plan = epoch_steps(
                lengths, size, seed=config.seed, epoch=progress.epoch, bucket=config.bucket
            )
            steps = plan[progress.batch : progress.batch + max(0, total_steps - progress.step)]
            reader = read_steps(session, steps)
            for studies in steps:
                lr = learning_rate(config, progress.step, total_steps, progress.epoch)
                set_lr(session.optimizer, lr)
                step = training_step(session, studies, reader, stopped)
                names = [ids[i] for i in studies]
                progress.unreadable(step.failures)
                progress.advance(names, step.loss, lr, sum(lengths[i] for i in studies))
                hopeless = progress.bad_steps >= config.bad_steps
                if progress.step % config.save_every == 0 or step.stop or hopeless:
                    with progress.paused(), session.timed("files"):
                        save(run, session, progress)
                        draw_curves(run, progress)
                if hopeless and len(step.failures) == len(studies):
                    raise InputError(
                        f"--bad-images: {progress.bad_steps} steps in a row trained nothing, the "
                        f"last because none of its studies could be read ({step.failures[-1]}); "
                        f"the state before them is in {run}"
                    )
                if hopeless:
                    raise InputError(
                        f"--lr: the loss was not finite for {progress.bad_steps} steps in a row "
                        f"(the last with studies {', '.join(names[:4])}, ...); the state before "
                        f"them is in {run}; try a smaller --lr or --precision fp32"
                    )
                if step.stop:
                    return False
            with progress.paused():
                try:
                    best = validate(session, progress, run, stopped)
                except StoppedError:  # resumed, the run comes back to this validation
                    save(run, session, progress)
                    raise
                progress.next_epoch()
                with session.timed("files"):
                    save(run, session, progress, best=best)
                    draw_curves(run, progress)

    finish(run, session, before, started, stopped, brief)
    return True


def summarise(session: Session, total_steps: int) -> None:
    """What trains, from where, on which device."""
    config, model = session.config, session.model
    trainable, total = parameter_counts(model)
    log.info("device: %s", describe_device(session.device))
    if session.world.size > 1:
        log.info("processes: %d", session.world.size)
    start, llm = (
        config.init or given or "random weights" for given in (config.vision_checkpoint, config.llm)
    )
    log.info(
        "model: encoder of %s parameters from %s, language model of %s from %s, hybrid layers %s",
        f"{encoder_size(model):,}", start, f"{parameter_counts(model.llama_model)[1]:,}", llm,
        ", ".join(map(str, model.llama_model.config.hybrid_layers)) or "none",
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
        sizes, config.dataset, total_steps, session.step_studies, config.epochs,
    )  # fmt: skip


def validate(session: Session, progress: Progress, run: Path, stopped: Stopped) -> bool:
    """Generate reports for the validation studies at the end of an epoch.

    Returns:
        Whether the weights are the best so far (always, where there is no validation).
    """
    config, studies, epoch = session.config, session.studies["val"], progress.epoch + 1
    if not config.eval_every or not len(studies):
        return True
    last = epoch >= config.epochs or progress.step >= progress.total_steps
    if epoch % config.eval_every and not last:
        return False
    result = evaluate_model(
        session.model, studies, config, session.device, meteor=False, label="validating",
        world=session.world, stopped=stopped,
    )  # fmt: skip
    took(session, result)
    score = selection_score(result.scores, config)
    progress.unreadable(result.scores["unreadable"])
    progress.say(f"epoch {epoch}: validation {format_scores(result.scores)}")
    progress.write({"step": progress.step, "epoch": epoch, "val": result.brief()})
    if session.world.is_main:
        with session.timed("files"), writing(run / "samples.md"):
            write_samples(run, result, studies, "validation")
    return progress.judge(score)


def took(session: Session, result: Evaluation) -> None:
    """Count the time of an evaluation."""
    session.seconds["network"] += result.seconds
    session.seconds["scoring"] += result.scoring_seconds


def scored_before(run: Path, session: Session, stopped: Stopped) -> dict[str, Any]:
    """Test scores before training; read back where a resumed run has them already.

    METEOR comes with the scores after it, so that Java starts once (seconds each time).
    """
    path, texts, world = run / "scores_before.json", run / "predictions_before.json", session.world
    if all(world.gather(path.exists() and texts.exists())):
        return read_json(path)
    result = evaluate_model(
        session.model, session.studies["test"], session.config, session.device, meteor=False,
        label="before adaptation", bootstrap=INTERVALS, world=world, stopped=stopped,
    )  # fmt: skip
    took(session, result)
    log.info("before adaptation: %s", format_scores(result.scores))
    if world.is_main:
        with writing(path):
            write_predictions(texts, result)
            write_json(path, result.scores)
    return result.scores


def finish(
    run: Path,
    session: Session,
    before: dict[str, Any] | None,
    started: float,
    stopped: Stopped,
    brief: bool,
) -> None:
    """Score the best weights on the test studies and write the results."""
    config, studies = session.config, session.studies
    load_best(run, session)
    earlier = {}
    if before is not None and session.world.is_main:
        rows = json.loads((run / "predictions_before.json").read_text(encoding="utf-8"))
        earlier["before"] = {row["id"]: row["hypothesis"] for row in rows}
    full = session.world.is_main and not brief
    with meteor_ahead(full):
        scoring = default_scoring(studies["test"])
        if full and by_default(session.model, studies["train"]):
            with session.timed("network"):
                nearest = nearest_reports(
                    session.model,
                    studies["test"],
                    studies["train"],
                    config,
                    session.device,
                    stopped,
                )
            scoring = dataclasses.replace(scoring, neighbours=nearest)
        result = evaluate_model(
            session.model,
            studies["test"],
            config,
            session.device,
            train_reports=None if brief else studies["train"].reports(),
            others=earlier,
            scoring=scoring,
            meteor=not brief,
            bootstrap=0 if brief else INTERVALS,
            label="testing",
            world=session.world,
            stopped=stopped,
        )
    if not session.world.is_main:
        return
    if before is not None:
        beside = result.scores.pop("others")["before"]
        before = {**before, **beside, "missing": result.scores["missing"]}
    took(session, result)
    with session.timed("files"), writing(run / "scores.json"):
        write_predictions(run / "predictions.json", result)
        write_samples(run, result, studies["test"], "test")
        plot_curves(run / "metrics.jsonl", run / "curves.png")
    seconds = time.monotonic() - started
    outside = seconds - session.seconds["network"]
    trainable, total = parameter_counts(session.model)
    scores = {
        "after" if before else "test": result.scores,
        **({"before": before} if before else {}),
        "parameters": {
            "trainable": trainable,
            "total": total,
            "share": trainable / total,
            "encoder": encoder_size(session.model),
        },
        "seconds": seconds,
        "seconds_outside_network": outside,
        "seconds_by": session.seconds,
        "peak_memory_bytes": memory_bytes(),
        "device": describe_device(session.device),
        "synthetic": config.dataset == "phantoms",
    }
    with writing(run / "scores.json"):
        write_json(run / "scores.json", scores)
        mark_finished(run)
    log.info("")
    if before:
        log.info("test before: %s", format_scores(before))
    log.info("test%s: %s", " after" if before else "", format_scores(result.scores))
    baselines = {} if brief else result.scores["baselines"]
    for name, title in BASELINES.items():
        if name in baselines:
            log.info("%s: %s", title, format_scores(baselines[name]))
    log.info(
        "trained %s of %s parameters (%.2f %%) in %s, %.0f %% of it outside the network (%s); "
        "results in %s",
        f"{trainable:,}", f"{total:,}", 100 * trainable / total, clock(seconds),
        100 * outside / seconds,
        ", ".join(f"{n} {s:.1f} s" for n, s in session.seconds.items() if n != "network"), run,
    )  # fmt: skip


def encoder_size(model: ReportGenerator) -> int:
    """Parameters of the encoder, its adapters included."""
    return sum(p.numel() for p in model.visual_encoder.parameters())


def draw_curves(run: Path, progress: Progress) -> None:
    """Refresh ``curves.png``, now and then."""
    if progress.due():
        with writing(run / "curves.png"):
            plot_curves(run / "metrics.jsonl", run / "curves.png")


def dry_run(config: TrainConfig, device: torch.device, world: World) -> None:
    """Two steps and one generation in a folder that vanishes; what they took, and would take."""
    if config.recipe == "phantoms" and config.init is None:
        config = source_stage(config)
    with tempfile.TemporaryDirectory() as folder:
        session = prepare(config, Path(folder), device, world, resuming=False)
        config, size = session.config, session.step_studies
        steps_an_epoch = math.ceil(len(session.rows) / size)
        summarise(session, config.epochs * steps_an_epoch)
        lengths = [len(row) for row in session.rows]
        # The same step twice: the first one also builds what is built once.
        step = epoch_steps(lengths, size, seed=config.seed, epoch=0, bucket=config.bucket)[0]
        reader = read_steps(session, [step, step])
        times = []
        for _ in range(2):
            started = time.perf_counter()
            loss = training_step(session, step, reader, lambda: False).loss
            times.append(time.perf_counter() - started)
        test, started = session.studies["test"], time.perf_counter()
        session.model.eval()
        plan = even_batches(len(test), config.eval_batch_size)
        skip = config.bad_images == "skip"
        part = next((part for part in batches(test, plan, skip_bad=skip) if part.ids), None)
        if part is None:
            raise InputError("--bad-images: no test study could be read")
        with autocast(device, config.precision), in_step(session.model.llama_model, world, device):
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
def stop_on_signals(world: World) -> Iterator[Stopped]:
    """SIGINT and SIGTERM let the running step finish; a second SIGINT ends at once."""
    caught: list[float] = []
    owner = os.getpid()

    def handler(number: int, _frame: Any) -> None:
        now = time.monotonic()
        # torchrun passes on what the terminal has sent to every process already.
        if caught and number == signal.SIGINT and now - caught[0] > AGAIN:
            raise KeyboardInterrupt
        if not caught and world.is_main and os.getpid() == owner:  # what it forked keeps silent
            os.write(2, b"\nstopping after this step; again, to end without saving\n")
        caught.append(now)

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
