"""Peak memory of a call: the allocator's on CUDA, a fresh process's resident size on the CPU.

The fresh processes are forked from one that has imported torch and computed nothing, so that each
begins with the same pages whatever was measured before.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.work import Work

M_MMAP_THRESHOLD = -3  # of glibc's mallopt
DIRECT = 1 << 16  # larger blocks go back to the system when they are freed


def peak(build: Callable[..., Work], arguments: Mapping[str, Any], *, warm: bool) -> dict[str, int]:
    """What a call takes above its inputs and what it holds anyway.

    Args:
        build: a function of a module, so that another process finds it.
        arguments: its keyword arguments.
        warm: call once before; what libraries keep for ever is not counted then.
    Returns:
        ``peak``: bytes above what was there before the call; ``total``: above what was there
        before the work was built; and the sizes that the work reports. Empty where it cannot be
        known.
    """
    if torch.cuda.is_available():
        return _measure_cuda(build, arguments, warm)
    if not Path("/proc/self/clear_refs").exists():
        return {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "benchmarks.memory"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, build, dict(arguments), warm))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        line = f"the process that measures memory ended with status {process.exitcode}"
        killed = process.exitcode == -signal.SIGKILL  # by the system, which had no more
        raise (MemoryError if killed else RuntimeError)(line) from None
    finally:
        process.join()


def _child(
    sender: Connection, build: Callable[..., Work], arguments: dict[str, Any], warm: bool
) -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, DIRECT)
    begin = _status("VmRSS")
    work = build(**arguments)
    if warm:
        work.once()
    gc.collect()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    prepared = work.prepare()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak so far
    before = _status("VmRSS")
    kept = work.run(*prepared)
    highest = _status("VmHWM")
    sizes = work.sizes()
    del kept
    sender.send({"peak": max(0, highest - before), "total": highest - begin, **sizes})


def _measure_cuda(
    build: Callable[..., Work], arguments: Mapping[str, Any], warm: bool
) -> dict[str, int]:
    gc.collect()  # or what is freed meanwhile would count for the call
    begin = torch.cuda.memory_allocated()
    work = build(**arguments)
    if warm:
        work.once()
    gc.collect()
    prepared = work.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = work.run(*prepared)
    torch.cuda.synchronize()
    highest = torch.cuda.max_memory_allocated()
    sizes = work.sizes()
    del kept
    return {"peak": highest - before, "total": highest - begin, **sizes}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)
