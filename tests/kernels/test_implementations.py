"""Which implementation runs: by rule, as asked for, or refused in a line; also without Triton."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import implementations, scan_cpu
from kernels.causal_conv1d import causal_conv1d
from kernels.cross_scan import cross_scan
from kernels.implementations import IMPLEMENTATIONS, choose, nvidia, triton_interpreted
from kernels.lora_linear import LoraSlice, lora_linear
from kernels.selective_scan import selective_scan
from kernels.triton_math import triton

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "dtype", "compiler", "expected"),
    [
        (CPU, torch.float32, True, "native"),
        (CPU, torch.bfloat16, True, "native"),
        (CPU, torch.float32, False, "torch"),
        (CPU, torch.float64, True, "torch"),
        (GPU, torch.bfloat16, True, "triton"),
    ],
)
def test_the_default_follows_the_device(
    device: torch.device,
    dtype: torch.dtype,
    compiler: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scan_cpu, "native_available", lambda: compiler)
    assert choose(None, device, dtype, "scan") == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_choice_is_kept_or_refused(
    implementation: str, device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_cpu, "native_available", lambda: True)
    monkeypatch.setattr(implementations, "triton_interpreted", lambda: False)
    runs = {
        "triton": device is GPU and dtype == torch.float32,
        "native": device is CPU and dtype == torch.float32,
        "torch": device is CPU,
        "reference": True,
    }[implementation]
    if runs:
        assert choose(implementation, device, dtype, "scan") == implementation
    else:
        with pytest.raises(ValueError, match=f"scan: implementation='{implementation}': .*use|; "):
            choose(implementation, device, dtype, "scan")


def test_refusals_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_cpu, "native_available", lambda: False)
    monkeypatch.setattr(scan_cpu, "native_error", lambda: "no compiler")
    with pytest.raises(ValueError, match=r"cannot be built here \(no compiler\); use 'torch'"):
        choose("native", CPU, torch.float32, "scan")
    with pytest.raises(ValueError, match="'fast': unknown, choose one of triton, native, torch"):
        choose("fast", CPU, torch.float32, "scan")
    with pytest.raises(ValueError, match="no implementation for device 'xpu'"):
        choose(None, torch.device("xpu"), torch.float32, "scan")
    monkeypatch.setattr(implementations, "triton_interpreted", lambda: False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        choose("triton", CPU, torch.float32, "scan")
    monkeypatch.setattr(implementations, "triton", None)
    with pytest.raises(ValueError, match="pip install triton"):
        choose(None, GPU, torch.float32, "scan")


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
def test_the_interpreter_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert triton_interpreted() == (not torch.cuda.is_available())
    if triton_interpreted():
        assert choose("triton", CPU, torch.float32, "scan") == "triton"
        assert not nvidia()
    monkeypatch.setattr(implementations, "triton_interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    assert nvidia()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not nvidia()


@pytest.mark.skipif(not triton_interpreted(), reason="there is no interpreter")
def test_kernels_are_launched_on_the_device_of_their_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton launches on the current device; on a second GPU that would be the first."""
    from triton.runtime.interpreter import GridExecutor

    devices: list[torch.device] = []
    launched: list[torch.device | None] = []

    @contextlib.contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        devices.append(x.device)
        yield
        devices.pop()

    def launch(*args: Any, **kwargs: Any) -> Any:
        launched.append(devices[-1] if devices else None)
        return run(*args, **kwargs)

    run = GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, requires_grad=True)

    orders = torch.tensor([[0, 1], [1, 0]])
    rows, state = leaf(1, 2, 3), leaf(1, 2, 2)
    several, states = leaf(2, 1, 2, 3), leaf(2, 1, 2, 2)
    A, D = leaf(3, 2), leaf(2, 3)
    low = LoraSlice(leaf(2, 3), leaf(4, 2), 1.0)
    for out in (
        selective_scan(rows, rows, A, state, state, implementation="triton"),
        causal_conv1d(rows, leaf(2, 3, 2), D, orders, implementation="triton"),
        cross_scan(
            several, several, A.expand(2, 3, 2), states, states, D, rows, D, orders, "triton"
        ),
        lora_linear(rows, leaf(4, 3), None, [low], implementation="triton"),
    ):
        before = len(launched)
        out.sum().backward()
        assert len(launched) > before > 0
    assert set(launched) == {CPU}


def test_the_choice_is_a_constant_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finding or building compiled code is no graph."""
    torch._dynamo.reset()
    built: list[int] = []

    def available() -> bool:
        with open(__file__) as file:  # what the compiler cannot trace
            built.append(len(file.read()))
        return False

    monkeypatch.setattr(scan_cpu, "native_available", available)

    def function(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if choose(None, x.device, x.dtype, "scan") == "torch" else x * 3

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(torch.ones(3)), torch.full((3,), 2.0))
    assert built


_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it raises
import torch
from kernels import budgets, causal_conv1d, cross_scan, lora_linear, selective_scan
u, rows = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 4)
A = -torch.rand(6, 4)
out = selective_scan.selective_scan(u, u, A, rows, rows, implementation="torch")
exact = selective_scan.selective_scan(u, u, A, rows, rows, implementation="reference")
torch.testing.assert_close(out, exact)
out.sum().backward()
assert u.grad.any()
try:
    selective_scan.selective_scan(u, u, A, rows, rows, implementation="triton")
except ValueError as error:
    print(error)
"""


def test_everything_runs_on_the_cpu_without_triton() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed; run `pip install triton`" in done.stdout
