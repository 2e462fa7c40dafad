"""The machine that a run is made on: its name, its versions, and what it can do at best."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch", "triton", "transformers", "peft", "mambapy", "mamba-ssm", "causal-conv1d", "vllm",
    "pytest-benchmark",
)  # fmt: skip
REPEATS = 7


def device() -> torch.device:
    """Where everything is measured: CUDA (or ROCm) where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """The device as people call it; on the CPU with the threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}"


def cpu_name() -> str:
    """The processor, and the widest vectors that it has."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    name = re.sub(r"\((R|TM)\)", "", found[1] if found else platform.machine())
    vectors = next((v for v in ("avx512f", "avx2") if re.search(rf"\b{v}\b", text)), None)
    return " ".join(name.split()) + (f" ({vectors.upper().rstrip('F')})" if vectors else "")


def versions() -> dict[str, str]:
    """Versions of Python and of what is compared, where it is installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda or torch.version.hip:
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
    return found


def commit() -> str | None:
    """The commit that is measured, with a plus sign where the tree differs; None: not a clone.

    Results that a run before wrote are no difference.
    """
    try:
        head = _git("rev-parse", "--short=12", "HEAD").strip()
        code = "--", ".", ":(exclude)benchmarks/results"
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


@cache
def rates(small: bool) -> dict[str, float]:
    """What the device does at best, measured once: the floor that operations are held against.

    Args:
        small: only show that the measurement works; the figures are then good for nothing.
    Returns:
        ``bytes``: read and written a second by a copy that fits no cache; ``exps``, on the CPU:
        2^x a second by torch on values in the caches (on CUDA memory would bind it:
        `benchmarks.roofline` takes the card's data sheet instead); ``flops``: operations a second
        of a matrix product, fp32 on the CPU and bf16 on CUDA.
    """
    where = device()
    cuda = where.type == "cuda"
    source = torch.ones(2**20 if small else 2**28 if cuda else 2**26, device=where)
    target = torch.empty_like(source)
    side = 256 if small else 8192 if cuda else 2048
    a = torch.rand(side, side, device=where, dtype=torch.bfloat16 if cuda else torch.float32)
    found = {
        "bytes": 2 * source.nbytes / best_time(lambda: target.copy_(source)),
        "flops": 2 * side**3 / best_time(lambda: a @ a),
    }
    return found if cuda else {**found, "exps": _exps(1 if small else 300)}


def _exps(passes: int) -> float:
    # 256 KiB for each thread: less, and torch leaves threads idle.
    x = torch.rand(2**16 * torch.get_num_threads()).neg_()
    y = torch.empty_like(x)

    def run() -> None:
        for _ in range(passes):
            torch.exp2(x, out=y)

    return passes * x.numel() / best_time(run)


def best_time(run: Callable[[], Any]) -> float:
    """The shortest of a few runs, in seconds."""
    run()
    times = []
    for _ in range(REPEATS):
        start = now()
        run()
        times.append(now() - start)
    return min(times)


@torch.no_grad()
def rounded(model: nn.Module) -> nn.Module:
    """The model itself; on CUDA its weights rounded to what bf16 can hold.

    Whatever is stored in bf16 there then has the same weights as float64's truth.
    """
    if device().type == "cuda":
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def now() -> float:
    """The time in seconds when everything given to the device so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def describe() -> dict[str, Any]:
    """What two runs must have in common for their ratios to be compared."""
    return {
        "device": device_name(),
        "kind": device().type,
        "cores": os.cpu_count(),
        "system": sys.platform,
    }
