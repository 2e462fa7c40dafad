"""Which implementation of an operation runs: chosen by rule, reported, never changed in silence.

"triton"     CUDA and ROCm devices; on CPU tensors only under Triton's interpreter (tests)
"native"     CPU, C++ compiled on first use
"torch"      CPU, plain torch
"reference"  any device: slow and obvious (`kernels.reference`)
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from kernels.triton_math import softplus, triton

Implementation = Literal["triton", "native", "torch", "reference"]
IMPLEMENTATIONS = ("triton", "native", "torch", "reference")


def choose(
    implementation: str | None, device: torch.device, dtype: torch.dtype, op: str
) -> Implementation:
    """The implementation that runs `op` on tensors of this device and type.

    Args:
        implementation: the caller's choice; None follows the device: "triton" on CUDA and ROCm,
            "native" on the CPU where there is a compiler and dtype is not float64, else "torch".
        device: of the tensors.
        dtype: the widest floating type among the inputs.
        op: the public function's name, for messages.
    Returns:
        One of `IMPLEMENTATIONS`.
    Raises:
        ValueError: an unknown name, or an implementation that cannot run there.
    """
    gpu = device.type == "cuda"
    if implementation is None:
        implementation = "triton" if gpu else _on_cpu(dtype == torch.float64)
        if not gpu and device.type not in ("cpu", "meta"):
            raise ValueError(
                f"{op}: no implementation for device {device.type!r}; move the tensors to the CPU "
                "or a CUDA device, or pass implementation='reference'"
            )
    problem = None
    if implementation not in IMPLEMENTATIONS:
        problem = f"unknown, choose one of {', '.join(IMPLEMENTATIONS)}"
    elif implementation == "triton":
        if triton is None:
            problem = "Triton is not installed; run `pip install triton`"
        elif not gpu and not triton_interpreted():
            problem = (
                f"the tensors are on {device.type!r}; move them to a CUDA device, or set "
                "TRITON_INTERPRET=1 before the first import to run the interpreter"
            )
        elif dtype == torch.float64:
            problem = "computes in float32, the inputs are float64; cast them, or use 'reference'"
    elif implementation in ("native", "torch") and gpu:
        problem = f"runs on the CPU, the tensors are on {device}; use 'triton'"
    elif implementation == "native":
        if dtype == torch.float64:
            problem = "computes in float32, the inputs are float64; use 'torch'"
        elif not _native_available():
            problem = f"cannot be built here ({_native_error()}); use 'torch'"
    if problem:
        raise ValueError(f"{op}: implementation={implementation!r}: {problem}")
    return implementation  # type: ignore[return-value]


def triton_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter: decided when they were decorated."""
    return type(softplus).__name__ == "InterpretedFunction"


def nvidia() -> bool:
    """Whether kernels may use PTX: not under the interpreter, and not on AMD."""
    return not triton_interpreted() and torch.version.hip is None


def capability() -> tuple[int, int]:
    """Compute capability of the current NVIDIA device; that of an H200 where there is none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)


def _native_available() -> bool:
    from kernels.scan_cpu import native_available

    return native_available()


def _native_error() -> str | None:
    from kernels.scan_cpu import native_error

    return native_error()


def _on_cpu(float64: bool) -> str:
    return "torch" if float64 or not _native_available() else "native"


def _constant(function: Any) -> None:
    """torch.compile takes the function's result as a constant: it may build, which is no graph.

    What `torch.compiler.assume_constant_result` does, without its import of the whole compiler.
    """
    function._dynamo_marked_constant = True


for _function in (_native_available, _native_error, _on_cpu, triton_interpreted, nvidia):
    _constant(_function)
