"""Several processes that train one model: who am I, and how do we agree.

Started by torchrun, every process runs the same command on its own device (CUDA with NCCL, or the
CPU with gloo). The trainable part is replicated and its gradients are averaged (DDP); a frozen
language model can be sharded (FSDP2). Without torchrun there is one process and nothing of
`torch.distributed` is touched.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from emrrg.decoder import Decoder
from emrrg.errors import InputError

Value = TypeVar("Value")
PATIENCE = timedelta(minutes=30)  # how long a process waits for the others: they may be writing


@dataclass(frozen=True)
class World:
    """The processes of a run."""

    rank: int = 0
    """This process's number; 0 writes files and prints."""
    size: int = 1
    """How many there are."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, in the order of the ranks, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def once(self, compute: Callable[[], Value]) -> Value:
        """What process 0 computes, in every process."""
        if self.size == 1:
            return compute()
        box: list[Any] = [compute() if self.is_main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def total(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """Sums over the processes, in fp64."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def local_device(device: torch.device) -> torch.device:
    """This process's own device: under torchrun, CUDA device number LOCAL_RANK.

    Raises:
        InputError: more processes on this machine than CUDA devices, or one device for them all.
    """
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    if device.index is not None:
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise InputError(f"--device {device}: each process needs its own; say --device cuda")
        return device
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise InputError(
            f"--nproc-per-node: process {local} has no CUDA device of its own "
            f"({torch.cuda.device_count()} here); start fewer, or use --device cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def said_once() -> Iterator[None]:
    """What is wrong with the command line, the same in every process, process 0 says."""
    try:
        yield
    except InputError:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(2) from None
        raise


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started, for as long as the context lasts.

    Whatever ends one of them ends all, with one message on each machine: the first to fail says
    why, and what every process finds (a wrong flag) or what follows from it (a peer that is gone)
    is not said again.

    Args:
        device: this process's.
    Raises:
        InputError: WORLD_SIZE is set, but nothing else of what torchrun sets.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    if dist.is_initialized():  # by whoever calls us
        yield World(dist.get_rank(), dist.get_world_size())
        return
    cuda = device.type == "cuda"
    try:
        dist.init_process_group(
            "nccl" if cuda else "gloo", timeout=PATIENCE, device_id=device if cuda else None
        )
    except ValueError as error:
        raise InputError(
            f"WORLD_SIZE says that there are several processes, but {error}; start them with "
            "torchrun, or unset WORLD_SIZE for one alone"
        ) from error
    world = World(dist.get_rank(), dist.get_world_size())
    # There as long as no process of this machine has said why the run ends.
    unsaid = Path(tempfile.gettempdir()) / f"emrrg-{world.once(lambda: uuid.uuid4().hex)}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        unsaid.touch()
    world.wait()
    try:
        yield world
    except BaseException as error:
        first = _take(unsaid)
        lost = isinstance(error, RuntimeError) and _lost_a_peer(error)
        if lost and first:
            print(
                f"emrrg: error: another process of this run was ended, so rank {world.rank} of "
                f"{world.size} cannot go on; start all of them again with --resume",
                file=sys.stderr,
            )
        if lost or (isinstance(error, InputError) and not first):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1 if lost else 2)  # closing the group would wait for those that are gone
        raise
    _take(unsaid)
    dist.destroy_process_group()


def _take(path: Path) -> bool:
    """Remove a file; whether it was this process that did."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _lost_a_peer(error: RuntimeError) -> bool:
    words = ("Connection closed", "Connection reset", "connectFullMesh", "Broken pipe", "timed out")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def replicated(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """The model with gradients averaged over the processes (DDP); itself where there is one."""
    if world.size == 1:
        return model
    # The class token's, in a batch of one: of no consequence at its size.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    frozen += [n for n, _ in model.named_buffers()]
    # Frozen weights are the same everywhere already, or sharded: DDP must not broadcast them.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def alone(network: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context in which backward passes of `replicated`'s result average nothing yet."""
    if isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def shard_decoder(decoder: Decoder, world: World, device: torch.device) -> None:
    """Shard the frozen weights of a decoder's layers over the processes (FSDP2).

    A layer's weights are gathered when it runs, forward and backward, and dropped after it. What
    trains stays whole, and so do embedding, output projection and final norm.

    Args:
        decoder: the same in every process. It may be on the CPU: its layers go to the device one by
            one, so that it need never fit there whole.
        world: the processes.
        device: this process's.
    Raises:
        InputError: one process alone, or int8 weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if world.size == 1:
        raise InputError("--shard-llm: there is one process; start several with torchrun")
    if any(tensor.dtype == torch.int8 for tensor in decoder.state_dict().values()):
        raise InputError("--shard-llm: int8 weights cannot be sharded; leave out --llm-int8")
    mesh = init_device_mesh(device.type, (world.size,))
    for layer in decoder.model.layers:
        trained = {p for p in layer.parameters() if p.requires_grad}
        # Each layer is a root of its own, and a root keeps its weights unless told otherwise.
        fully_shard(layer, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    decoder.sharded = True
    decoder.to(device)
    with torch.no_grad():  # what is first gathered in inference mode could never train
        decoder.hidden_states(torch.zeros(1, 1, decoder.config.hidden_size, device=device))


@contextmanager
def in_step(decoder: Decoder, world: World, device: torch.device) -> Iterator[None]:
    """Run a decoder as often as it takes, each process for itself, though it may be sharded.

    Whoever runs a sharded layer waits for the others' shards. So a process that is done goes on
    running it, without effect, until all are.
    """
    if not decoder.sharded:
        yield
        return

    def working(*_: Any) -> None:
        world.total([1.0], device)

    hook = decoder.model.layers[0].register_forward_pre_hook(working, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    nothing = torch.zeros(1, 1, decoder.config.hidden_size, device=device)
    with torch.inference_mode():
        while world.total([0.0], device)[0]:
            decoder.hidden_states(nothing)
