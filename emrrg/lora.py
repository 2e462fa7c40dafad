"""Partial LoRA: low-rank adapters on row ranges of frozen linear layers (MambaPEFT; EMRRG, 3.2).

    rows [start, start + R) of y = W x  <-  W_rows x + s * B dropout(A x)

A (r, I) starts from a Kaiming-uniform draw, B (R, r) from zero, so that step 0 equals the base
model exactly. There is no activation and no alpha / r: s alone. Dropout acts on the rank-r product.

Targets and where they live (code name -> paper):

    X, Z          rows [:D], [D:] of in_proj; one adapter, shared by the four scan orders
    dt_in, B, C   rows [:R], [R:R+N], [R+N:] of x_proj (MambaPEFT's d, B, C); one per order
    in_proj, out_proj                 whole layer
    x_proj, dt_proj                   whole layer, one per order; dt_proj is the paper's LoRA_p(dt)
    patch_embed                       the patch convolution, seen as a linear map of its patches
    llm                               q_proj and v_proj of every decoder layer

An adapter is a child of the layer that it adapts: ``layers.0.mixer.in_proj.lora_X.A``. The names
of the base parameters stay what they were.

Shapes: O, I outputs and inputs of a layer, r rank, K = 4 scan orders, M rows of a product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from emrrg.config import LORA_TARGETS
from emrrg.errors import InputError
from emrrg.int8 import Int8Linear
from kernels.lora_linear import LoraSlice, lora_linear

DIRECTIONS = ("", "_b", "_c", "_c_b")  # suffixes of the four scan orders' parameters


class Adapter(nn.Module):
    """s * B dropout(A x), for a range of output rows of the layer that holds it.

    Args:
        inputs: I, width of the layer's input.
        rows: R, output rows that it adds to.
        rank: r.
        scale: s.
        dropout: rate on the rank-r product while training.
        start: first output row.
        device: of the parameters, which are fp32 whatever the layer's dtype.
    """

    def __init__(
        self,
        inputs: int,
        rows: int,
        *,
        rank: int,
        scale: float,
        dropout: float,
        start: int = 0,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.dropout, self.start = rank, scale, dropout, start
        self.A = nn.Parameter(torch.empty(rank, inputs, device=device, dtype=torch.float32))
        self.B = nn.Parameter(torch.zeros(rows, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def rows(self) -> slice:
        """The output rows that it adds to."""
        return slice(self.start, self.start + self.B.shape[0])

    def update(self) -> Tensor:
        """s B A, what merging adds to the weight's rows: (R, I) fp32."""
        return self.scale * (self.B.detach() @ self.A.detach())

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        rows = f"{self.start}:{self.start + self.B.shape[0]}"
        return f"rows={rows}, rank={self.rank}, scale={self.scale}, dropout={self.dropout}"


class AdaptableLayer(nn.Module):
    """Mixed into a layer with `weight` and `bias`: it can carry adapters, merge and unmerge them.

    Merged adapters leave the module tree, so that the parameters and the state dict of a merged
    model are the plain model's; unmerging brings them back.
    """

    weight: Tensor
    bias: Any  # None where the layer has none
    _merged: tuple[dict[str, Adapter], Tensor] | None = None  # and the weight as it was before

    def adapters(self) -> dict[str, Adapter]:
        """The adapters at work, by name."""
        return {n: m for n, m in self._modules.items() if isinstance(m, Adapter)}

    def attach(self, target: str, adapter: Adapter) -> None:
        """Add an adapter as the child ``lora_<target>``.

        Raises:
            InputError: the target has one, or another adapter here has another dropout rate.
        """
        others = self.adapters()
        if f"lora_{target}" in others:
            raise InputError(f"LoRA target {target!r}: is adapted already; merge it first")
        if self._merged is not None:
            raise InputError(f"LoRA target {target!r}: its layer holds merged adapters; unmerge")
        if any(other.dropout != adapter.dropout for other in others.values()):
            raise InputError(f"LoRA target {target!r}: its layer's adapters have another dropout")
        self.add_module(f"lora_{target}", adapter)

    def adapted(self, x: Tensor) -> Tensor:
        """x W^T + b and the adapters' part; W is seen as (O, I): (..., I) to (..., O)."""
        weight, adapters = self.weight.flatten(1), list(self.adapters().values())
        if not adapters:
            return F.linear(x, weight, self.bias)
        slices = [LoraSlice(a.A, a.B, a.scale, a.start) for a in adapters]
        return lora_linear(
            x, weight, self.bias, slices, dropout=adapters[0].dropout, training=self.training
        )

    @torch.no_grad()
    def merge(self, reversible: bool = True) -> None:
        """W <- W + s B A in fp32, rounded once to W's dtype; W is kept aside for `unmerge`."""
        adapters = self.adapters()
        if not adapters:
            return
        if self._merged is not None:
            raise InputError("LoRA: its layer holds merged adapters already; unmerge first")
        if reversible:
            self._merged = (adapters, self.weight.detach().clone())
        weight = self.weight.detach().flatten(1).float()
        for name, adapter in adapters.items():
            weight[adapter.rows] += adapter.update().to(weight.device)
            delattr(self, name)
        self.weight.copy_(weight.view_as(self.weight))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`: the weight as it was, bit for bit, and the adapters at work."""
        if self._merged is None:
            return
        adapters, weight = self._merged
        self._merged = None
        self.weight.copy_(weight)
        for name, adapter in adapters.items():
            self.add_module(name, adapter.to(self.weight.device))


class AdaptableLinear(AdaptableLayer, nn.Linear):
    """`nn.Linear` that can carry adapters."""

    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        return self.adapted(x)


class AdaptableInt8Linear(AdaptableLayer, Int8Linear):
    """A linear layer frozen in int8 that can carry adapters; they cannot be merged into it."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        out = Int8Linear.forward(self, x)
        for a in self.adapters().values():
            inner = F.dropout(F.linear(x, a.A.to(x.dtype)), a.dropout, self.training)
            added = F.linear(inner, a.B.to(x.dtype)) * a.scale
            out = out + F.pad(added, (a.start, self.out_features - a.rows.stop))
        return out

    def merge(self, reversible: bool = True) -> None:
        """Refused: int8 would round the update away."""
        raise InputError(
            "LoRA: adapters cannot be merged into int8 weights; load the model in fp32"
        )


def stacked_linear(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Products of K layers, each with its own input, in one batched product; no biases.

    Args:
        layers: K layers of one shape, with the same adapters.
        x: (K, M, I).
    Returns:
        (K, M, O).
    """
    if not all(isinstance(layer, AdaptableLayer) for layer in layers):
        # Somebody wrapped them (PEFT, quantisation, ...): only their forward knows the product.
        return torch.stack([_without_bias(layer, x[k]) for k, layer in enumerate(layers)])
    plain = cast(Sequence[AdaptableLayer], layers)
    weight = torch.stack([layer.weight for layer in plain])
    y = torch.bmm(x, weight.mT)
    adapters = [list(layer.adapters().values()) for layer in plain]  # K lists, one entry a target
    if not adapters[0]:
        return y
    outputs = weight.shape[1]
    down = torch.stack([torch.cat([a.A for a in here]) for here in adapters])  # (K, sum r, I)
    up = torch.stack(
        [
            torch.cat([F.pad(a.B, (0, 0, a.start, outputs - a.rows.stop)) for a in here], dim=1)
            for here in adapters
        ]
    )  # (K, O, sum r)
    scales = [s for a in adapters[0] for s in [a.scale] * a.rank]
    if len(set(scales)) > 1:
        up, scale = up * up.new_tensor(scales), 1.0
    else:
        scale = scales[0]
    inner = torch.bmm(x, down.to(x.dtype).mT)
    inner = F.dropout(inner, adapters[0][0].dropout, plain[0].training)
    return torch.baddbmm(y, inner, up.to(x.dtype).mT, alpha=scale)


def _without_bias(layer: nn.Module, x: Tensor) -> Tensor:
    bias = getattr(layer, "bias", None)
    return layer(x) if bias is None else layer(x) - bias


def add_lora(
    model: nn.Module,
    targets: Sequence[str],
    *,
    rank: int = 16,
    scale: float = 1.0,
    dropout: float = 0.1,
) -> list[str]:
    """Add adapters to a model in place; the names of the base parameters stay what they were.

    Args:
        model: a `VisionMamba`, a `Decoder`, or a system that holds them as `visual_encoder` and
            `llama_model`.
        targets: of `LORA_TARGETS`, any number of them.
        rank: r.
        scale: s (EMRRG 1.0 with rank 16; MambaPEFT 0.1 with rank 64).
        dropout: rate on the rank-r product while training, in [0, 1).
    Returns:
        Names of the new parameters, as `model.named_parameters()` has them.
    Raises:
        InputError: an unknown or repeated target, a value out of range, or a target that the model
            does not have.
    """
    if rank < 1:
        raise InputError(f"LoRA rank: {rank} is not at least 1")
    if not 0 <= dropout < 1:
        raise InputError(f"LoRA dropout: {dropout} is not in [0, 1)")
    before = set(dict(model.named_parameters()))
    for target in targets:
        if target not in LORA_TARGETS:
            raise InputError(f"LoRA target {target!r}: is not one of {', '.join(LORA_TARGETS)}")
        for layer, rows in target_layers(model, target):
            weight = layer.weight.flatten(1)
            layer.attach(
                target,
                Adapter(
                    weight.shape[1],
                    rows.stop - rows.start,
                    rank=rank,
                    scale=scale,
                    dropout=dropout,
                    start=rows.start,
                    device=weight.device,
                ),
            )
    return [name for name, _ in model.named_parameters() if name not in before]


def target_layers(model: nn.Module, target: str) -> Iterator[tuple[AdaptableLayer, slice]]:
    """The layers that a target adapts, each with the output rows.

    Raises:
        InputError: the model has no such layers.
    """
    if target == "llm":
        yield from _llm_layers(model)
        return
    encoder = cast(Any, getattr(model, "visual_encoder", model))
    if not hasattr(encoder, "patch_embed"):
        raise InputError(f"LoRA target {target!r}: the model has no vision Mamba")
    if target == "patch_embed":
        layer = encoder.patch_embed.proj
        yield layer, slice(0, layer.weight.shape[0])
        return
    for block in encoder.layers:
        mixer = block.mixer
        name, rows = mixer_rows(target, mixer.dim, mixer.state_dim, mixer.dt_rank)
        suffixes = DIRECTIONS if name in ("x_proj", "dt_proj") else ("",)
        for suffix in suffixes:
            yield getattr(mixer, name + suffix), rows


def mixer_rows(target: str, dim: int, states: int, dt_rank: int) -> tuple[str, slice]:
    """The layer of a mixer that a target adapts, and its output rows (sizes D, N, R)."""
    projected = dt_rank + 2 * states
    return {
        "X": ("in_proj", slice(0, dim)),
        "Z": ("in_proj", slice(dim, 2 * dim)),
        "dt_in": ("x_proj", slice(0, dt_rank)),
        "B": ("x_proj", slice(dt_rank, dt_rank + states)),
        "C": ("x_proj", slice(dt_rank + states, projected)),
        "in_proj": ("in_proj", slice(0, 2 * dim)),
        "out_proj": ("out_proj", slice(0, dim)),
        "x_proj": ("x_proj", slice(0, projected)),
        "dt_proj": ("dt_proj", slice(0, dim)),
    }[target]


def _llm_layers(model: nn.Module) -> Iterator[tuple[AdaptableLayer, slice]]:
    """q_proj and v_proj of every decoder layer, made adaptable where they are plain."""
    decoder = cast(Any, getattr(model, "llama_model", model))
    if not hasattr(decoder, "lm_head") and not hasattr(decoder, "embed"):
        raise InputError("LoRA target 'llm': the model has no decoder")
    for block in decoder.model.layers:
        for name in ("q_proj", "v_proj"):
            layer = getattr(block.self_attn, name)
            if type(layer) is nn.Linear:
                layer.__class__ = AdaptableLinear  # the same parameters, hooks and names
            elif type(layer) is Int8Linear:
                layer.__class__ = AdaptableInt8Linear
            yield layer, slice(0, layer.out_features)


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors alone, by their names in the model.

    Raises:
        InputError: the adapters are merged, so that there are none to save.
    """
    if any(layer._merged is not None for _, layer in adaptable_layers(model)):
        raise InputError("LoRA: the adapters are merged; unmerge before saving them")
    return {
        f"{name}.{key}" if name else key: value
        for name, layer in adaptable_layers(model)
        for target, adapter in layer.adapters().items()
        for key, value in ((f"{target}.A", adapter.A), (f"{target}.B", adapter.B))
    }


def merge_lora(model: nn.Module, *, reversible: bool = True) -> None:
    """Fold every adapter into its weight, for evaluation and export.

    The sum is computed in fp32 and rounded once to the weight's dtype: exact to rounding in fp32,
    while half precision rounds small updates away (convert the model to fp32 first). The adapters
    leave the module tree, so the merged model's state dict is the plain model's.

    Args:
        model: holds the adapters.
        reversible: keep them and the weights as they were for `unmerge_lora`; False: the merged
            weights are the base from now on, and new adapters may be added.
    Raises:
        InputError: merged already, or the weights are int8.
    """
    for _, layer in adaptable_layers(model):
        layer.merge(reversible)


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`: base weights bit for bit as before, adapters at work again."""
    for _, layer in adaptable_layers(model):
        layer.unmerge()


def adaptable_layers(model: nn.Module) -> Iterator[tuple[str, AdaptableLayer]]:
    """The layers of a model that can carry adapters, by name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptableLayer):
            yield name, module
