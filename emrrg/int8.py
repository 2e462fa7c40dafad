"""Frozen weights held in int8: one scale an output channel, activations as they are.

    W ~ diag(s) Q,   s_o = max_i |W_oi| / 127,   Q = round(W / s) in [-127, 127]
    y = s * (Q x) + b

A 7B model's layers take 6.5 GB instead of 13 in bf16. Q is turned into the activations' dtype
(exactly: 8 bits fit bf16's mantissa) for each product, forward and backward, and never stored so.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A frozen linear layer with int8 weights; stands where an `nn.Linear` stood.

    Attributes:
        weight: (O, I) int8.
        weight_scale: (O,) fp32.
        bias: (O,) in the activations' dtype, or None.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features)
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, device=device))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Quantise a linear layer."""
        weight = linear.weight
        made = cls(weight.shape[1], weight.shape[0], linear.bias, weight.device)
        if not weight.is_meta:
            made.store(weight.detach())
        return made

    @torch.no_grad()
    def store(self, weight: Tensor) -> None:
        """Quantise `weight` (O, I), of any floating dtype, into this layer, on its device."""
        weight = weight.float()
        scale = weight.abs().amax(1) / 127
        scale = torch.where(scale > 0, scale, 1.0)
        self.weight = (weight / scale[:, None]).round_().to(torch.int8)
        self.weight_scale = scale

    def dequantized(self) -> Tensor:
        """The weights that this layer computes with: (O, I) fp32."""
        return self.weight.float() * self.weight_scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O), in x's dtype (under autocast in its dtype)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = _Product.apply(x, self.weight, self.weight_scale)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Product(torch.autograd.Function):
    """s * (Q x); keeps Q, not its copy in the activations' dtype, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        return (grad * scale.to(grad.dtype)) @ weight.to(grad.dtype), None, None
