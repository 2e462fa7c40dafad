"""Several processes that train one model: who am I, and how do we agree.

Started by torchrun, every process runs the same command on its own device (CUDA with NCCL, or the
CPU with gloo). The trainable part is replicated and its gradients are averaged (DDP); a frozen
language model can be sharded (FSDP2). Without torchrun there is one process and nothing of
`torch.distributed` is touched.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
        InputError: more processes on this machine than CUDA devices.
    """
    if device.type != "cuda" or "LOCAL_RANK" not in os.environ or device.index is not None:
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
def joined(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started, for as long as the context lasts.

    When one of them is gone, the others cannot go on: each ends with status 1, and the lowest rank
    that is left says so in one line.

    Args:
        device: this process's.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    rank = int(os.environ["RANK"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    world = World(rank, size)
    places = world.gather((socket.gethostname(), os.getpid()))
    try:
        yield world
    except RuntimeError as error:
        if not _lost_a_peer(error):
            raise
        below = [place for place in places[:rank] if _alive(*place)]
        if not below:
            print(
                f"emrrg: error: another process of this run ended, so rank {rank} of {size} cannot "
                "go on; its own message says why. Start all again with --resume",
                file=sys.stderr,
            )
        os._exit(1)  # closing the group would wait for the one that is gone
    dist.destroy_process_group()


def _lost_a_peer(error: RuntimeError) -> bool:
    words = ("Connection closed", "Connection reset", "connectFullMesh", "Broken pipe", "timed out")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _alive(host: str, pid: int) -> bool:
    """Whether a process of this machine runs; one of another machine is not known to."""
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    # A zombie still answers: killed, and not yet waited for by the launcher.
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return True


def replicated(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """The model with gradients averaged over the processes (DDP); itself where there is one."""
    if world.size == 1:
        return model
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    frozen += [n for n, _ in model.named_buffers()]
    # Frozen weights are the same everywhere already, or sharded: DDP must not broadcast them.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def shard_decoder(decoder: nn.Module, world: World, device: torch.device) -> None:
    """Shard the frozen attention and MLP weights of a decoder over the processes (FSDP2).

    A layer's weights are gathered when it runs and dropped after it. What trains stays whole, and
    so do norms and embeddings, which are small or used outside the layers.

    Args:
        decoder: an `emrrg.decoder.Decoder`, on `device`, the same in every process.
        world: the processes.
        device: this process's.
    Raises:
        InputError: one process alone, or int8 weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if world.size == 1:
        raise InputError("--shard-llm: there is one process; start several with torchrun")
    mesh = init_device_mesh(device.type, (world.size,))
    for layer in decoder.model.layers:  # type: ignore[union-attr]
        for block in (layer.self_attn, layer.mlp):  # type: ignore[union-attr]
            if any(p.dtype == torch.int8 for p in [*block.parameters(), *block.buffers()]):
                raise InputError(
                    "--shard-llm: int8 weights cannot be sharded; leave out --llm-int8"
                )
            trained = {p for p in block.parameters() if p.requires_grad}
            fully_shard(block, mesh=mesh, ignored_params=trained)
