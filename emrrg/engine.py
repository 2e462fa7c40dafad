"""What a step of training is: build the parts, read batches, take a step, save and restore.

The loop that calls this is in `emrrg.train`. The loss of a step is the mean over the report tokens
of all its studies, whatever the number of processes and of accumulated batches that they are
spread over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from emrrg.building import build_model, check_fit, image_size_of
from emrrg.config import TrainConfig, to_dict
from emrrg.data.dataset import Batch, Studies, batches, even_batches
from emrrg.data.images import normalize
from emrrg.data.loading import load_studies
from emrrg.distributed import World, replicated, shard_decoder
from emrrg.errors import InputError
from emrrg.evaluation import autocast
from emrrg.model import IGNORED, ReportGenerator, set_regime
from emrrg.optim import build_optimizer
from emrrg.progress import Progress
from emrrg.runs import (
    load_run,
    read_checkpoint,
    read_tensors,
    save_base,
    save_checkpoint,
    write_json,
)
from emrrg.system import available_memory, memory_bytes
from emrrg.vision import PatchConv

log = logging.getLogger("emrrg.train")

FEATURE_BYTES = 2**31  # most that cached image features take
LARGEST_BATCH = 512  # that --auto-batch tries


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
    features: Tensor | None = None
    """(n, P+1, D) features of the training images, where they are cached."""


def prepare(
    config: TrainConfig, run: Path, device: torch.device, world: World, resuming: bool
) -> Session:
    """Build everything that the steps need: data, model, optimizer."""
    seed_everything(config.seed)
    if not resuming:
        check_fit(config)
    if resuming:
        model = load_run(run, device=device, which="last")
        studies = load_studies(config, model.config.image_size)
    else:
        studies = load_studies(config, image_size_of(config))
        model = build_model(config, studies["train"].reports(), device)
    check_length(model, config)
    if len({str(part) for part in world.gather(model.tokenizer.encode("the heart is ."))}) > 1:
        raise InputError("--tokenizer: the processes do not agree on it; give them one file")
    trained = set(set_regime(model, config.regime or "full"))
    if not resuming:
        if config.blind:
            set_feature_mean(model, studies["train"], config, device)
        if world.is_main:
            save_base(run, model, trained)
        world.wait()
    store_frozen(model, config, device)
    model.visual_encoder.checkpointing = config.checkpointing
    if config.shard_llm:
        shard_decoder(model.llama_model, world, device)
    if config.compile:
        for block in model.visual_encoder.layers:
            block.compile()
        for layer in cast(Any, model.llama_model.model.layers):
            layer.mlp.compile(dynamic=True)
    parameters = {n: p for n, p in model.named_parameters() if n in trained}
    session = Session(
        config,
        device,
        world,
        model,
        replicated(model, world, device),
        parameters,
        studies,
        [model.report_row(report) for report in studies["train"].reports()],
        build_optimizer(config, parameters),
        torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
    )
    if config.auto_batch:
        largest = min(world.gather(largest_batch(session)))
        log.info("--auto-batch: %d studies fit", largest)
        session.config = dataclasses.replace(config, auto_batch=False, batch_size=largest)
        if world.is_main and not config.dry_run:
            write_json(run / "config.json", to_dict(session.config))
    session.features = cached_features(session)
    return session


def check_length(model: ReportGenerator, config: TrainConfig) -> None:
    """Refuse what the decoder has no positions for, before any long work."""
    image = model.visual_encoder.num_patches + 1
    prompt = 1 + sum(len(model.tokenizer.encode(part)) for part in model.config.prompt)
    longest = max(config.max_report_tokens, config.max_new_tokens)
    room = model.llama_model.config.max_position_embeddings
    if image + prompt + longest > room:
        raise InputError(
            f"--max-report-tokens, --max-new-tokens: {image} image tokens, {prompt} of the prompt "
            f"and {longest} of the report are more than the language model's {room} positions"
        )


def store_frozen(model: ReportGenerator, config: TrainConfig, device: torch.device) -> None:
    """Hold the encoder's frozen matrices in autocast's type on CUDA, where they are used in it."""
    if device.type != "cuda" or config.precision == "fp32":
        return
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    for module in model.visual_encoder.modules():
        if isinstance(module, nn.Linear | PatchConv):
            for parameter in module.parameters(recurse=False):
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


def studies_a_step(config: TrainConfig, world: World) -> int:
    """Studies of an optimizer step, all processes and accumulated batches together."""
    return config.batch_size * config.accumulate * world.size


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
) -> tuple[float, list[str], bool]:
    """One optimizer step; a loss or gradient that is not finite changes nothing.

    Args:
        session: the run.
        studies: the step's studies, of all processes.
        reader: gives this process's batches.
        stopped: whether a signal came.
    Returns:
        The loss averaged over the step's tokens (nan or inf where the step was skipped), what could
        not be read, and whether any process was told to stop.
    """
    config, world = session.config, session.world
    session.model.train()
    session.optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(session.rows[i]) for i in studies)
    parts = share(studies, config, world)
    failures: list[str] = []
    loss = 0.0
    inputs: list[tuple[list[int], Batch | None]] = []
    for part in parts:
        if session.features is not None:
            inputs.append((part, None))
            continue
        batch = next(reader)
        failures += batch.failures
        if batch.ids:
            inputs.append((batch.indices, batch))
    if not inputs and world.size > 1:  # the others wait for this process's gradients
        inputs.append(([], None))
    try:
        for k, (indices, images) in enumerate(inputs):
            loss += backward(session, indices, images, tokens, last=k == len(inputs) - 1)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"--batch-size: {config.batch_size} studies do not fit into the memory of "
            f"{session.device}; try --auto-batch, a smaller --batch-size with --accumulate, "
            "--checkpointing, or --llm-int8"
        ) from error
    loss, stop = world.total([loss, float(stopped())], session.device)
    if not math.isfinite(loss):
        return loss, failures, stop > 0
    session.scaler.unscale_(session.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(session.parameters.values(), config.grad_clip or math.inf)
    if not torch.isfinite(norm) and not session.scaler.is_enabled():
        return math.nan, failures, stop > 0
    session.scaler.step(session.optimizer)
    session.scaler.update()
    return loss, failures, stop > 0


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
    together = contextlib.nullcontext()
    if world.size > 1 and not last:
        together = session.network.no_sync()  # type: ignore[operator]
    with together:
        with autocast(device, session.config.precision):
            loss = session.network(images, mask, labels, features)
        weight = sum(map(len, rows)) / tokens if indices else 0.0
        # DDP averages over the processes; the weights sum to 1 over them.
        session.scaler.scale(loss * (weight * world.size)).backward()
    return float(loss.detach()) * weight


def data_workers(config: TrainConfig, device: torch.device) -> int:
    """Processes that read images: as asked; none for phantoms (they are in memory) or the CPU."""
    if config.workers is not None:
        return config.workers
    return 0 if config.dataset == "phantoms" or device.type == "cpu" else 8


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
        with autocast(session.device, config.precision):
            images = normalize(batch.images.to(session.device))
            parts.append(
                (batch.indices, model.features(images, batch.view_mask.to(session.device)).cpu())
            )
    for indices, part in (item for items in world.gather(parts) for item in items):
        features[indices] = part.float()
    log.info("image features are computed once: %.0f MiB", features.nbytes / 2**20)
    return features


def largest_batch(session: Session) -> int:
    """The largest batch, by doubling, whose forward and backward pass fits."""
    longest = max(range(len(session.rows)), key=lambda i: len(session.rows[i]))
    study = next(batches(session.studies["train"], [[longest]]))
    room, floor = available_memory(session.device), memory_bytes()
    fits = size = 1
    while size <= LARGEST_BATCH:
        batch = dataclasses.replace(
            study,
            indices=[longest] * size,
            images=study.images.expand(size, *study.images.shape[1:]),
            view_mask=study.view_mask.expand(size, -1),
        )
        session.model.train()
        try:
            backward(session, batch.indices, batch, size * len(session.rows[longest]), last=True)
        except torch.OutOfMemoryError:
            break
        fits = size
        growth = memory_bytes() - floor
        if session.device.type == "cpu" and room is not None and 2 * growth > 0.8 * room:
            break
        size *= 2
    session.optimizer.zero_grad(set_to_none=True)
    if session.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return fits


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
        facts = {**progress.state(), "processes": world.size}
        if session.scaler.is_enabled():
            facts["scaler"] = session.scaler.state_dict()
        save_checkpoint(run, progress.step, session.parameters, tensors, facts, best=best)
    world.wait()


def restore(run: Path, session: Session, progress: Progress) -> None:
    """Read back what `save` wrote; the weights are in the model already."""
    checkpoint = read_checkpoint(run, "last")
    tensors = read_tensors(checkpoint.folder / "optimizer.safetensors")
    for name, parameter in session.parameters.items():
        values = {
            key.rsplit(":", 1)[1]: value.to(parameter.device if value.ndim else "cpu")
            for key, value in tensors.items()
            if key.rsplit(":", 1)[0] == name
        }
        if values:
            session.optimizer.state[parameter] = values
    rank = session.world.rank
    if f"rng:cpu:{rank}" in tensors:
        torch.set_rng_state(tensors[f"rng:cpu:{rank}"])
    else:  # more processes than before
        seed_everything(session.config.seed + 1 + rank + 1000 * checkpoint.state["step"])
    if f"rng:cuda:{rank}" in tensors and session.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[f"rng:cuda:{rank}"], session.device)
    if "scaler" in checkpoint.state:
        session.scaler.load_state_dict(checkpoint.state["scaler"])
    progress.restore(checkpoint.state)
    if checkpoint.state["processes"] != session.world.size:
        log.info(
            "saved by %d processes, going on with %d: the epoch begins anew where a step's studies "
            "differ", checkpoint.state["processes"], session.world.size,
        )  # fmt: skip
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
    for batch in batches(studies, even_batches(len(studies), config.eval_batch_size)):
        tokens = encoder(normalize(batch.images.to(device))[batch.view_mask.to(device)])
        total += tokens.sum(0)
        count += len(tokens)
    model.feature_mean.copy_(total / count)
