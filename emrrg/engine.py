"""What a step of training is: build the parts, read batches, take a step, save and restore.

The loop that calls this is in `emrrg.train`. The loss of a step is the mean over the report tokens
of all its studies, whatever the number of processes and of accumulated batches that they are
spread over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from emrrg.building import build_model, check_fit, check_positions, image_size_of
from emrrg.config import TrainConfig, to_dict
from emrrg.data.dataset import Batch, Studies, batches, even_batches
from emrrg.data.images import normalize
from emrrg.data.loading import data_workers, load_studies
from emrrg.distributed import World, alone, replicated, shard_decoder
from emrrg.errors import InputError
from emrrg.evaluation import autocast
from emrrg.model import IGNORED, ReportGenerator, set_regime
from emrrg.optim import build_optimizer
from emrrg.progress import SAVED, Progress
from emrrg.runs import (
    find_checkpoint,
    load_run,
    read_checkpoint,
    read_model_config,
    read_state,
    read_tensors,
    save_base,
    save_checkpoint,
    write_json,
)
from emrrg.system import available_memory, memory_bytes, numerics, out_of_memory
from emrrg.vision import PatchConv

log = logging.getLogger("emrrg.train")

FEATURE_BYTES = 2**31  # most that cached image features take
LARGEST_BATCH = 512  # that --auto-batch tries
SPENT = ("network", "data", "scoring", "files")
"""What the time of a run goes to: steps, features and generation; drawing or listing studies and
reading batches; scores and their intervals, METEOR's Java program among them; checkpoints, curves
and samples. The rest (building the model, log lines) is none of them."""


@dataclass
class Session:
    """What the steps of a run work with."""

    config: TrainConfig
    device: torch.device
    world: World
    model: ReportGenerator
    network: nn.Module
    """The model, or what averages its gradients over the processes."""
    parameters: Mapping[str, Tensor]
    """What trains."""
    studies: dict[str, Studies]
    rows: list[list[int]]
    """The training reports as ids, with their end marks."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step_studies: int
    """Studies of an optimizer step, all processes and accumulated batches together."""
    features: Tensor | None = None
    """(n, P+1, D) features of the training images, where they are cached."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPENT, 0.0))
    """What this process's time goes to, as `SPENT` has it."""

    @cached_property
    def training_data(self) -> str:
        """A hash of the training studies' names and reports, in their order."""
        told = hashlib.sha256()
        for name, row in zip(self.studies["train"].ids(), self.rows, strict=True):
            told.update(f"{name} {row}\n".encode())
        return told.hexdigest()

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time that something takes to `seconds`."""
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started


@dataclass(frozen=True)
class Step:
    """What came of one optimizer step."""

    loss: float
    """Averaged over the step's tokens; nan or inf where it changed nothing."""
    failures: list[str]
    """What could not be read."""
    stop: bool
    """Whether any process was told to stop."""


def prepare(
    config: TrainConfig, run: Path, device: torch.device, world: World, resuming: bool
) -> Session:
    """Build everything that the steps need: data, model, optimizer."""
    seed_everything(config.seed)
    # What is to be sharded may not fit on the device whole.
    place = torch.device("cpu") if config.shard_llm else device
    step_studies = config.batch_size * config.accumulate * world.size
    if resuming:
        step_studies = state_to_resume(run)[1]["step_studies"]
        size = read_model_config(run).image_size
    else:
        check_fit(config)
        size = image_size_of(config)
    started = time.perf_counter()
    studies = load_studies(config, size)
    seconds = time.perf_counter() - started
    if resuming:
        model = load_run(run, device=device, which="last", place=place)
    else:
        model = build_model(config, studies["train"].reports(), device, place)
    image_tokens = model.visual_encoder.num_patches + 1
    decoder = model.llama_model.config
    check_positions(config, model.tokenizer, model.config.prompt, image_tokens, decoder)
    if len({str(part) for part in world.gather(model.tokenizer.encode("the heart is ."))}) > 1:
        raise InputError("--tokenizer: the processes do not agree on it; give them one file")
    trained = set(set_regime(model, config.regime or "full"))
    if not resuming:
        if config.blind:
            set_feature_mean(model, studies["train"], config)
        if world.is_main:
            save_base(run, model, trained)
        world.wait()
    store_frozen(model, config, device)
    model.visual_encoder.checkpointing = config.checkpointing
    model.llama_model.checkpointing = config.checkpointing
    if config.shard_llm:
        shard_decoder(model.llama_model, world, device)
        model.to(device)
    if config.compile:
        for block in model.visual_encoder.layers:
            block.compile()
        for layer in cast(Any, model.llama_model.model.layers):
            layer.mlp.compile(dynamic=True)
    parameters = {n: p for n, p in model.named_parameters() if n in trained}
    session = Session(
        config=config,
        device=device,
        world=world,
        model=model,
        network=replicated(model, world, device),
        parameters=parameters,
        studies=studies,
        rows=[model.report_row(report) for report in studies["train"].reports()],
        optimizer=build_optimizer(config, parameters),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        step_studies=step_studies,
    )
    if config.auto_batch and not resuming:
        set_batch_size(session, run)
    session.seconds["data"] += seconds
    session.features = cached_features(session)
    if world.size > 1:
        settle(session)
    return session


def settle(session: Session) -> None:
    """Fix in which order gradients are summed over the processes.

    DDP decides it by its first backward pass, for all after that one. With a first one that counts
    for nothing, every step of a run that goes on is summed as in a run that was never stopped.
    """
    session.model.train()
    backward(session, [], None, tokens=1, last=True)
    session.optimizer.zero_grad(set_to_none=True)


def store_frozen(model: ReportGenerator, config: TrainConfig, device: torch.device) -> None:
    """Hold the encoder's frozen matrices in autocast's type on CUDA, where they are used in it."""
    if device.type != "cuda" or config.precision == "fp32":
        return
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    for module in model.visual_encoder.modules():
        if isinstance(module, nn.Linear | PatchConv) and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(dtype)  # the scan adds biases in fp32


def share(studies: Sequence[int], config: TrainConfig, world: World) -> list[list[int]]:
    """This process's batches of a step; none where there are fewer studies than processes."""
    mine = list(studies[world.rank :: world.size])
    return [[mine[i] for i in part] for part in even_batches(len(mine), config.batch_size)]


def read_steps(session: Session, steps: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """The batches of steps, one after another, read ahead by workers where there are any."""
    config = session.config
    if session.features is not None:
        return iter(())
    plan = [part for step in steps for part in share(step, config, session.world)]
    return batches(
        session.studies["train"],
        plan,
        workers=data_workers(config, session.device),
        skip_bad=config.bad_images == "skip",
    )


def training_step(
    session: Session, studies: Sequence[int], reader: Iterator[Batch], stopped: Callable[[], bool]
) -> Step:
    """One optimizer step; a loss or gradient that is not finite changes nothing.

    Args:
        session: the run.
        studies: the step's studies, of all processes.
        reader: gives this process's batches.
        stopped: whether a signal came.
    Raises:
        InputError: a batch does not fit into memory, or a study cannot be read.
    """
    config, world = session.config, session.world
    failures: list[str] = []
    inputs: list[tuple[list[int], Batch | None]] = []
    for part in share(studies, config, world):
        if session.features is not None:
            inputs.append((part, None))
            continue
        with session.timed("data"):
            batch = next(reader)
        failures += batch.failures
        if batch.ids:
            inputs.append((batch.indices, batch))
    read: Sequence[int] = studies
    if config.bad_images == "skip":  # the mean is over what could be read
        told = world.gather(([i for part, _ in inputs for i in part], failures))
        read = [i for part, _ in told for i in part]
        failures = [line for _, lines in told for line in lines]
    tokens = sum(len(session.rows[i]) for i in read)
    # The others wait for this process's gradients, and for its shards at every batch.
    wanted = 1 if world.size > 1 else 0
    if session.model.llama_model.sharded:
        wanted = math.ceil(math.ceil(len(studies) / world.size) / config.batch_size)
    inputs += [([], None)] * (wanted - len(inputs))

    started = time.perf_counter()
    session.model.train()
    session.optimizer.zero_grad(set_to_none=True)
    loss = 0.0 if read else math.nan
    for k, (indices, images) in enumerate(inputs):
        with fitting(session, indices, images):
            loss += backward(session, indices, images, tokens, last=k == len(inputs) - 1)
    loss, stop = world.total([loss, float(stopped())], session.device)
    if math.isfinite(loss):
        with fitting(session, *inputs[-1]):  # the first update also makes AdamW's moments
            loss = update(session, loss)
    session.seconds["network"] += time.perf_counter() - started
    return Step(loss, failures, stop > 0)


def update(session: Session, loss: float) -> float:
    """Apply the gradients; the loss, or nan where the gradients were not finite."""
    session.scaler.unscale_(session.optimizer)
    limit = session.config.grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(session.parameters.values(), limit)
    if not torch.isfinite(norm) and not session.scaler.is_enabled():
        return math.nan
    session.scaler.step(session.optimizer)
    session.scaler.update()
    if not torch.isfinite(norm) and session.scaler.get_scale() < 1:
        return math.nan  # the scaler lowers its scale where they overflow, but here they do not
    return loss


def backward(
    session: Session, indices: Sequence[int], batch: Batch | None, tokens: int, last: bool
) -> float:
    """Add the gradients of a batch, weighted by its share of the step's tokens.

    Args:
        session: the run.
        indices: the batch's studies; none: an empty contribution, for the other processes' sake.
        batch: their images; None where features are cached.
        tokens: of the whole step.
        last: whether gradients are averaged over the processes after this one.
    Returns:
        The batch's part of the step's loss.
    """
    world, device = session.world, session.device
    rows = [session.rows[i] for i in indices] or [session.rows[0]]
    width = max(map(len, rows))
    labels = torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows], device=device)
    images = mask = features = None
    if session.features is not None:
        features = session.features[list(indices) or [0]].to(device, non_blocking=True)
    elif batch is not None:
        images = normalize(batch.images.to(device, non_blocking=True))
        mask = batch.view_mask.to(device)
    else:
        size = session.model.config.image_size
        images = torch.zeros(1, 1, 3, size, size, device=device)
        mask = torch.ones(1, 1, dtype=torch.bool, device=device)
    with contextlib.nullcontext() if last else alone(session.network):
        with autocast(device, session.config.precision):
            loss = session.network(images, mask, labels, features)
        weight = sum(map(len, rows)) / tokens if indices else 0.0
        # DDP averages over the processes; the weights sum to 1 over them.
        session.scaler.scale(loss * (weight * world.size)).backward()
    return float(loss.detach()) * weight if indices else 0.0


@contextlib.contextmanager
def fitting(session: Session, indices: Sequence[int], batch: Batch | None) -> Iterator[None]:
    """Say which batch memory ran out with.

    Raises:
        InputError: it ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise InputError(does_not_fit(session, indices, batch)) from error


def does_not_fit(session: Session, indices: Sequence[int], batch: Batch | None) -> str:
    """The batch that memory ran out with, and what to do."""
    names = session.studies["train"].ids()
    shown = ", ".join(names[i] for i in indices[:4]) + (", ..." if len(indices) > 4 else "")
    views = batch.images.shape[1] if batch is not None else 1
    longest = max((len(session.rows[i]) for i in indices), default=0)
    return (
        f"--batch-size: {len(indices)} studies ({shown}; up to {views} views, {longest} report "
        f"tokens) do not fit into the memory of {session.device}; try --auto-batch, a smaller "
        "--batch-size with --accumulate, --checkpointing, --precision bf16, or --llm-int8"
    )


@torch.no_grad()
def cached_features(session: Session) -> Tensor | None:
    """Features of all training images, where the encoder is frozen and they fit.

    Each is computed in the same batch whether or not the run was stopped in between, so that a
    resumed run sees the same bits.
    """
    config, model, world = session.config, session.model, session.world
    encoder = model.visual_encoder
    trains = any(p.requires_grad for p in encoder.parameters())
    count, tokens = len(session.studies["train"]), encoder.num_patches + 1
    too_many = count * tokens * encoder.dim * 4 > FEATURE_BYTES
    if not config.cache_features or trains or config.blind or too_many:
        return None
    if config.epochs < 2 or config.bad_images == "skip":
        return None
    model.eval()
    plan = even_batches(count, config.eval_batch_size)[world.rank :: world.size]
    features = torch.empty(count, tokens, encoder.dim)
    parts = []
    for batch in batches(
        session.studies["train"], plan, workers=data_workers(config, session.device)
    ):
        with session.timed("network"), autocast(session.device, config.precision):
            images = normalize(batch.images.to(session.device))
            part = model.features(images, batch.view_mask.to(session.device))
            parts.append((batch.indices, part.float().cpu()))
    for indices, part in (item for items in world.gather(parts) for item in items):
        features[indices] = part
    log.info("image features are computed once: %.0f MiB", features.nbytes / 2**20)
    return features


def set_batch_size(session: Session, run: Path) -> None:
    """Find the largest batch that fits, and make it the run's."""
    config, world = session.config, session.world
    largest = min(world.gather(largest_batch(session)))
    log.info("--auto-batch: %d studies fit", largest)
    session.config = dataclasses.replace(config, auto_batch=False, batch_size=largest)
    session.step_studies = largest * config.accumulate * world.size
    if world.is_main and not config.dry_run:
        write_json(run / "config.json", to_dict(session.config))


def largest_batch(session: Session) -> int:
    """The largest batch whose forward and backward pass fits, all of it as large as any study."""
    longest = max(range(len(session.rows)), key=lambda i: len(session.rows[i]))
    views, side = max(session.studies["train"].views()), session.model.config.image_size
    floor, room = memory_bytes(), available_memory(session.device)
    per_study = 0.0
    moments = 2 * sum(p.numel() * p.element_size() for p in session.parameters.values())
    room = None if room is None else room - moments
    beside: list[Tensor] = []
    session.model.train()

    def fits(size: int) -> bool:
        nonlocal per_study
        # On the CPU an attempt that fails does harm, so it is foretold.
        if session.device.type == "cpu" and room is not None and size * per_study > 0.8 * room:
            return False
        batch = Batch(
            [longest] * size,
            [""] * size,
            torch.zeros(size, views, 3, side, side, dtype=torch.uint8),
            torch.ones(size, views, dtype=torch.bool),
            [],
        )
        try:
            # AdamW's moments, which only the first step makes, must find room beside the batch.
            beside.append(torch.empty(moments, dtype=torch.uint8, device=session.device))
            # Each process by itself: they may come to different ends.
            backward(session, batch.indices, batch, size * len(session.rows[longest]), last=False)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            beside.clear()
            session.optimizer.zero_grad(set_to_none=True)
        per_study = max(per_study, (memory_bytes() - floor) / size)
        return True

    largest = largest_that_fits(fits, LARGEST_BATCH)
    if session.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if not largest:
        raise InputError(
            f"--auto-batch: not even one study fits: {does_not_fit(session, [0], None)}"
        )
    return largest


def largest_that_fits(fits: Callable[[int], bool], limit: int) -> int:
    """The largest size up to a limit, by doubling and then halving the gap; 0: not even 1."""
    good, bad = 0, limit + 1
    while good + 1 < bad:
        size = max(1, 2 * good) if 2 * good < bad else (good + bad) // 2
        if fits(size):
            good = size
        else:
            bad = size
    return good


def save(run: Path, session: Session, progress: Progress, *, best: bool = False) -> None:
    """Write a checkpoint of everything that the run's future depends on."""
    world, device = session.world, session.device
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    everyone = world.gather(states)
    if world.is_main:
        names = {id(p): n for n, p in session.parameters.items()}
        tensors = {
            f"{names[id(p)]}:{key}": value
            for p, values in session.optimizer.state.items()
            for key, value in values.items()
        }
        for rank, own in enumerate(everyone):
            for kind, state in zip(("cpu", "cuda"), own, strict=False):
                tensors[f"rng:{kind}:{rank}"] = state
        facts = {
            **progress.state(),
            "processes": world.size,
            "step_studies": session.step_studies,
            "numerics": numerics(device),
            "training_data": session.training_data,
        }
        if session.scaler.is_enabled():
            facts["scaler"] = session.scaler.state_dict()
        save_checkpoint(
            run,
            progress.step,
            session.parameters,
            tensors,
            facts,
            best=best,
            keep=session.config.keep_last,
        )
    world.wait()


def state_to_resume(run: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of a run's last checkpoint, and what it says beside its tensors.

    Raises:
        InputError: there is none, or it does not say all that a run needs to go on.
    """
    folder = find_checkpoint(run, "last")
    state = read_state(folder)
    for name in (*SAVED, "best_score", "processes", "step_studies"):
        if name not in state:
            raise InputError(
                f"{folder / 'state.json'}: holds no {name!r}, so the run cannot go on from it; "
                "it is damaged, or another version wrote it"
            )
    return folder, state


def restore(run: Path, session: Session, progress: Progress) -> None:
    """Read back what `save` wrote; the weights are in the model already."""
    folder, state = state_to_resume(run)
    tensors = read_tensors(folder / "optimizer.safetensors")
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, kind = key.rpartition(":")
        moments.setdefault(name, {})[kind] = value
    for name, parameter in session.parameters.items():
        if name in moments:
            values = {k: v.to(parameter.device) for k, v in moments[name].items()}
            session.optimizer.state[parameter] = values
    rank, size = session.world.rank, session.world.size
    # More processes than before, or another kind of device, have nothing to go on with.
    seed_everything(session.config.seed + 1 + rank + 1000 * state["step"])
    if f"rng:cpu:{rank}" in tensors:
        torch.set_rng_state(tensors[f"rng:cpu:{rank}"])
    if session.device.type == "cuda" and f"rng:cuda:{rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"rng:cuda:{rank}"], session.device)
    if "scaler" in state:
        session.scaler.load_state_dict(state["scaler"])
    progress.restore(state)
    before = state["processes"]
    if before != size:
        log.info(
            "saved by %d processes, going on with %d: still %d studies a step, other dropout",
            before, size, session.step_studies,
        )  # fmt: skip
    was, now = state.get("numerics", {}), numerics(session.device)
    changed = [name for name in (was | now) if was and was.get(name) != now.get(name)]
    if changed:
        log.info(
            "saved with %s, going on with %s: no longer the same numbers bit for bit",
            *(", ".join(f"{name} {of.get(name)}" for name in changed) for of in (was, now)),
        )
    if state.get("training_data", session.training_data) != session.training_data:
        log.info("the training studies or their reports are not those that it was saved with")
    log.info("going on from step %d", progress.step)


@torch.no_grad()
def load_best(run: Path, session: Session) -> None:
    """Bring the model to the weights of the run's best checkpoint."""
    weights = read_checkpoint(run, "best").weights
    for name, parameter in session.parameters.items():
        parameter.copy_(weights[name])


def seed_everything(seed: int) -> None:
    """Seed torch and Python."""
    torch.manual_seed(seed)
    random.seed(seed)


@torch.no_grad()
def set_feature_mean(model: ReportGenerator, studies: Studies, config: TrainConfig) -> None:
    """The blind control: the mean of the encoder's features over the training images."""
    encoder, device = model.visual_encoder.eval(), model.device
    total = torch.zeros_like(model.feature_mean)
    count = 0
    plan = even_batches(len(studies), config.eval_batch_size)
    for batch in batches(
        studies,
        plan,
        workers=data_workers(config, device),
        skip_bad=config.bad_images == "skip",
    ):
        if batch.ids:
            tokens = encoder(normalize(batch.images.to(device))[batch.view_mask.to(device)])
            total += tokens.sum(0)
            count += len(tokens)
    if not count:
        raise InputError("--blind: no training image could be read, so there is no mean")
    model.feature_mean.copy_(total / count)
