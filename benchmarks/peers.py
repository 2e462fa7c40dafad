"""What a person would use instead, each behind one calling convention.

Nothing is imported before it is asked for: a peer that is not there is a skip with its reason and
the line that installs it.
"""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from benchmarks.work import error_line

CHUNK = 8  # steps that the compiled scan unrolls


def find(module: str, install: str, attribute: str | None = None) -> str | None:
    """Why a peer cannot take part, with the line that installs it; None: it can."""
    try:
        found: Any = _import(module)
    except Exception as error:  # a broken build raises anything
        return f"{module} cannot be imported ({error_line(error)}): {install}"
    if attribute is not None and not hasattr(found, attribute):
        return f"{module} has no {attribute}: {install}"
    return None


def _import(module: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def needs_cuda() -> str | None:
    """For peers that have no other implementation."""
    return None if torch.cuda.is_available() else "needs a CUDA device"


def mamba_ssm_cuda() -> str | None:
    """mamba_ssm with its compiled Mamba-1 scan (since mid-2026 a plain install lacks it)."""
    install = (
        "MAMBA_FORCE_BUILD=TRUE pip install mamba-ssm causal-conv1d --no-build-isolation "
        "(builds with nvcc)"
    )
    return (
        needs_cuda()
        or find("selective_scan_cuda", install)
        or find("mamba_ssm.ops.selective_scan_interface", install, "selective_scan_fn")
    )


def causal_conv1d_cuda() -> str | None:
    """The compiled convolution that belongs to mamba_ssm."""
    return needs_cuda() or find("causal_conv1d", "pip install causal-conv1d", "causal_conv1d_fn")


def mambapy() -> str | None:
    """mambapy's parallel scan."""
    return find("mambapy.pscan", "pip install mambapy", "pscan")


def transformers_scan() -> str | None:
    """The scan that transformers runs where no kernels are."""
    return find(
        "transformers.models.mamba.modeling_mamba",
        "pip install 'transformers>=5.20'",
        "mamba_selective_scan",
    )


def vllm_scan() -> str | None:
    """vLLM's Triton scan, forward only."""
    return needs_cuda() or find(
        "vllm.model_executor.layers.mamba.ops.selective_scan_triton",
        "pip install vllm",
        "selective_scan_fwd_triton",
    )


def peft() -> str | None:
    """Hugging Face PEFT."""
    return find("peft.tuners.lora", "pip install peft", "Linear")


def transformers() -> str | None:
    """Hugging Face transformers."""
    return find("transformers", "pip install transformers")


# Scans: (u, delta, A, B, C, D, z, delta_bias), softplus on, channels first unless they say so.


def scan_mamba_ssm_cuda(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """mamba_ssm's CUDA kernel; it wants B and C in u's dtype."""
    interface = _import("mamba_ssm.ops.selective_scan_interface")
    return interface.selective_scan_fn(
        u, delta, A, B.to(u.dtype), C.to(u.dtype), D, z, bias, delta_softplus=True
    )


def scan_by_slices(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """mamba_ssm's reference: its own where that is installed, else one of the same complexity.

    All factors (B, D, L, N) at once, then a loop that takes a slice of them at every step: autograd
    answers each slice with a full-sized gradient, so the backward is quadratic in L.
    """
    try:
        reference = _import("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    except Exception:  # not installed, or a build that cannot be imported
        reference = None
    if reference is not None:
        return reference(u, delta, A, B, C, D, z, bias, delta_softplus=True)
    step = F.softplus(delta.float() + bias[:, None])
    factor = torch.exp(step[..., None] * A[:, None])  # (B, D, L, N)
    added = (step * u.float())[..., None] * B.float().transpose(1, 2)[:, None]
    state = A.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for t in range(u.shape[2]):
        state = factor[:, :, t] * state + added[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, t].float()))
    y = torch.stack(outputs, dim=2) + u.float() * D[:, None]
    return (y * F.silu(z.float())).to(u.dtype)


def scan_mambapy(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """What mambapy's block computes around its parallel scan; (B, L, D)."""
    pscan = _import("mambapy.pscan").pscan
    step = F.softplus(delta + bias)[..., None]
    states = pscan(torch.exp(step * A), step * B[:, :, None] * u[..., None])
    y = (states @ C[..., None]).squeeze(3) + D * u
    return (y * F.silu(z)).to(u.dtype)


def scan_transformers(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """transformers without kernels; it wants B and C in u's dtype.

    Where mamba_ssm is installed its name stands for that package's kernel: what it wraps does not.
    """
    module = _import("transformers.models.mamba.modeling_mamba")
    scan = inspect.unwrap(module.mamba_selective_scan)
    y = scan(
        u, delta, A, B.to(u.dtype), C.to(u.dtype), D, z=z, delta_bias=bias, delta_softplus=True
    )
    return y.to(u.dtype)


def scan_vllm(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """vLLM's Triton kernel; it writes its output into z, and over delta.

    How long it takes does not depend on the values: it can be timed on what it wrote itself.
    """
    module = _import("vllm.model_executor.layers.mamba.ops.selective_scan_triton")
    states = torch.zeros(u.shape[0], *A.shape, dtype=torch.float32, device=u.device)
    module.selective_scan_fwd_triton(
        u, delta, A, B[:, None], C[:, None], D, z, bias, True,
        query_start_loc=None, cache_indices=None, has_initial_state=None,
        ssm_states=states, null_block_id=-1,
    )  # fmt: skip
    return z


def scan_by_steps(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """The plain loop with `unbind`, whose backward is linear in L; (B, L, D), any precision."""
    step = F.softplus(delta.to(A.dtype) + bias)
    added = step * u.to(A.dtype)
    state = A.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for d, x, b, c in zip(*(t.unbind(1) for t in (step, added, B, C)), strict=True):
        state = torch.exp(d[..., None] * A) * state + x[..., None] * b[:, None]
        outputs.append((state @ c[..., None]).squeeze(2))
    y = torch.stack(outputs, dim=1) + D * u.to(A.dtype)
    return (y * F.silu(z.to(A.dtype))).to(u.dtype)


def scan_compiled() -> Callable[..., Tensor]:
    """A chunked scan in plain torch, its chunk compiled; (B, L, D).

    What was compiled before is forgotten: `torch.compile` keeps eight variants of a function (of
    shapes, of who needs a gradient), and runs the ninth uncompiled with no more than a warning.
    """
    torch.compiler.reset()
    return partial(_scan_by_chunks, torch.compile(_chunk, dynamic=False))


def _scan_by_chunks(
    chunk: Callable[..., Any],
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor,
) -> Tensor:  # fmt: skip
    length = u.shape[1]
    step = F.softplus(delta.float() + bias)
    padding = (0, 0, 0, -length % CHUNK)  # a step of size 0 changes nothing
    chunks = [
        F.pad(t, padding).unflatten(1, (-1, CHUNK)).unbind(1)
        for t in (step, step * u.float(), B, C)
    ]
    state = A.new_zeros(u.shape[0], *A.shape)
    scaled = A / math.log(2)
    outputs = []
    for d, x, b, c in zip(*chunks, strict=True):
        y, state = chunk(state, scaled, d, x, b, c)
        outputs.append(y)
    y = torch.cat(outputs, dim=1)[:, :length] + D * u.float()
    return (y * F.silu(z.float())).to(u.dtype)


def _chunk(
    state: Tensor, A: Tensor, d: Tensor, x: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(CHUNK):
        decay = torch.exp2(d[:, t, :, None] * A)
        state = decay * state + x[:, t, :, None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


class FlippingMixer(nn.Module):
    """The four-direction mixer as the released code composes it, on the weights of ours.

    Every order gets its own flipped or permuted copy of X and Z, a channels-first convolution and
    scan, gates its own output, and is put back by another copy.

    Args:
        mixer: an `emrrg.vision.Mixer`, without adapters.
        conv: (x (B, D, L), weight (D, W), bias) to silu of the causal convolution.
        scan: channels first, as above.
    """

    def __init__(
        self,
        mixer: Any,
        conv: Callable[[Tensor, Tensor, Tensor], Tensor],
        scan: Callable[..., Tensor],
    ) -> None:
        super().__init__()
        self.mixer, self.conv, self.scan = mixer, conv, scan

    def forward(self, x: Tensor, orders: Tensor, affix: Tensor | None = None) -> Tensor:
        """As `emrrg.vision.Mixer.forward`, without affix tokens."""
        mixer = self.mixer
        xz = mixer.in_proj(x).transpose(1, 2)  # (B, 2 D, L)
        total: Tensor | None = None
        for k, visited in _visits(xz, orders):
            inner, z = visited.chunk(2, dim=1)
            y = self._one_order(inner, z, ("", "_b", "_c", "_c_b")[k])
            y = _put_back(y, orders, k)
            total = y if total is None else total + y
        assert total is not None
        return mixer.out_proj((total / len(orders)).transpose(1, 2))

    def _one_order(self, inner: Tensor, z: Tensor, suffix: str) -> Tensor:
        mixer = self.mixer
        conv, dt = getattr(mixer, f"conv1d{suffix}"), getattr(mixer, f"dt_proj{suffix}")
        u = self.conv(inner, conv.weight.squeeze(1), conv.bias)
        rows = getattr(mixer, f"x_proj{suffix}")(u.transpose(1, 2))
        low, B, C = rows.split([mixer.dt_rank, mixer.state_dim, mixer.state_dim], dim=-1)
        delta = F.linear(low, dt.weight).transpose(1, 2)
        precise = torch.float64 if u.dtype == torch.float64 else torch.float32
        return self.scan(
            u,
            delta,
            -torch.exp(getattr(mixer, f"A{suffix}_log").to(precise)),
            B.transpose(1, 2).to(precise),
            C.transpose(1, 2).to(precise),
            getattr(mixer, f"D{suffix}").to(precise),
            z,
            dt.bias.to(precise),
        )


def _visits(xz: Tensor, orders: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(B, 2 D, L) as each of the four orders sees it."""
    columns = xz[:, :, orders[2]]
    yield 0, xz
    yield 1, xz.flip(2)
    yield 2, columns
    yield 3, columns.flip(2)


def _put_back(y: Tensor, orders: Tensor, k: int) -> Tensor:
    """(B, D, L) of an order, each token in its place."""
    if k % 2:
        y = y.flip(2)
    return y[:, :, orders[2].argsort()] if k >= 2 else y


def conv_cuda(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """causal_conv1d's kernel."""
    return _import("causal_conv1d").causal_conv1d_fn(x, weight, bias, activation="silu")


def conv_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same in torch."""
    width = weight.shape[1]
    y = F.conv1d(F.pad(x, (width - 1, 0)), weight[:, None], bias, groups=len(weight))
    return F.silu(y)


class Attention(nn.Module):
    """Multi-head self-attention by torch's fused operator; heads 64 wide."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.heads = dim // 64
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and SwiGLU, each after a layer norm, added to what comes in."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim)
        self.gate, self.up = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        x = x + self.attention(self.norm1(x))
        inner = self.norm2(x)
        return x + self.down(F.silu(self.gate(inner)) * self.up(inner))


class VisionTransformer(nn.Module):
    """A ViT with as many parameters as the vision Mamba of the same width and depth.

    Args:
        pixels: a side.
        dim: D.
        depth: blocks.
        parameters: how many to have; the hidden width of the blocks is chosen for it.
    """

    def __init__(self, pixels: int, dim: int, depth: int, parameters: int) -> None:
        super().__init__()
        patches = (pixels // 16) ** 2
        outside = 3 * 256 * dim + dim + dim + (patches + 1) * dim + 2 * dim
        attention = 4 * dim * dim + 4 * dim + 4 * dim
        hidden = ((parameters - outside) / depth - attention - dim) / (3 * dim + 2)
        self.patches = nn.Conv2d(3, dim, 16, stride=16)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.zeros(1, patches + 1, dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim, round(hidden)) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, P+1, D)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
