"""The machine: device, memory, and the line that says what runs where."""

from __future__ import annotations

import sys

import torch
from torch import nn

from emrrg.errors import InputError
from kernels.implementations import choose


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU.

    Raises:
        InputError: an unknown device, or CUDA asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device: {name!r} is not auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: {name!r} is not auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device: {name} is not there ({torch.cuda.device_count()} CUDA devices)"
        )
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where Triton launches, and whose memory is told
    return device


def memory_bytes() -> int:
    """Peak memory in bytes: allocated on the CUDA device, or else resident in this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:  # Linux; there getrusage begins with what the process that started this one held
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(x.split()[1]) * 1024 for x in file if x.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, those held in int8 included."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(b.numel() for b in model.buffers() if b.dtype == torch.int8)
    return trainable, sum(p.numel() for p in model.parameters()) + held


def available_memory(device: torch.device) -> int | None:
    """Bytes that may still be taken: of the CUDA device, or of the machine (Linux; else None)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    # Of torch's allocator on the CPU, CUDA itself and cuBLAS: all a RuntimeError.
    lines = ("DefaultCPUAllocator", "can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        line in str(error) for line in lines
    )


def numerics(device: torch.device) -> dict[str, str]:
    """What the last bits of a result depend on, beside the seed."""
    same = {
        "torch": torch.__version__,
        "kernels": choose(None, device, torch.float32, "selective_scan"),
    }
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), **same}
    instructions, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return {"device": f"CPU ({instructions})", "threads": str(threads), **same}


def describe_device(device: torch.device) -> str:
    """Device, threads, and the implementation of the scan that runs there."""
    kernel = choose(None, device, torch.float32, "selective_scan")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name} ({device}), torch {torch.__version__}, kernels: {kernel}"
    return (
        f"CPU with {torch.get_num_threads()} threads, torch {torch.__version__}, kernels: {kernel}"
    )
