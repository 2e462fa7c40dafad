"""What the scans are given, in the order of their operators' schemas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """A selective scan's, see `kernels.reference.scan_ref`; tensors have any strides."""

    u: Tensor  # (B, L, D)
    delta: Tensor  # (B, L, D)
    A: Tensor  # (D, N)
    B: Tensor  # (D, N), or (B, L, G, N) for G groups of D / G channels
    C: Tensor
    D: Tensor | None  # (D,)
    z: Tensor | None  # (B, L, D)
    delta_bias: Tensor | None  # (D,)
    initial_state: Tensor | None  # (B, D, N)
    flags: Tensor | None  # (B, L) uint8 of `kernels.reference.step_flags`
    delta_softplus: bool
    reverse: bool

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The nine tensors that can have a gradient."""
        return self[:9]

    @property
    def groups(self) -> int:
        """G; B and C can differ, and one of them be the same for all channels."""
        return max(x.shape[2] if x.ndim == 4 else 1 for x in (self.B, self.C))


class CrossInputs(NamedTuple):
    """A cross scan's, see `kernels.reference.cross_scan_ref`; tensors have any strides."""

    u: Tensor  # (K, B, L, D)
    delta: Tensor  # (K, B, L, D)
    A: Tensor  # (K, D, N)
    B: Tensor  # (K, B, L, N)
    C: Tensor  # (K, B, L, N)
    D: Tensor  # (K, D)
    z: Tensor  # (B, L, D)
    delta_bias: Tensor  # (K, D)
    orders: Tensor  # (K, L) int64

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """The eight tensors that can have a gradient."""
        return self[:8]
