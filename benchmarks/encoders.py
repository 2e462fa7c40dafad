"""The vision Mamba, its mixer, and what they are compared with, as work to time.

On CUDA the work runs under bf16 autocast; matrices are stored in bf16 where nothing trains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import machine, peers
from benchmarks.work import Contender, Work
from emrrg.vision import VISION_PRESETS, Mixer, VisionMamba
from kernels.reference import visiting_orders
from kernels.selective_scan import selective_scan_fn

CHECKED = 1  # images whose results are compared with float64
SMALL = {"dim": 64, "depth": 2}  # stands for a preset at smoke size

OURS = "emrrg"
FLIPS_OURS = "flips and permutations, our scan"
FLIPS_PEER = "flips and permutations, mamba_ssm + causal_conv1d"
VIT = "ViT, SDPA"


def _mamba_ssm() -> str | None:
    return peers.mamba_ssm_cuda() or peers.causal_conv1d_cuda()


CONTENDERS = [
    Contender(OURS, ours=True),
    Contender(FLIPS_OURS),
    Contender(FLIPS_PEER, missing=_mamba_ssm),
    Contender(VIT),
]


def preset(name: str) -> dict[str, int]:
    """Width and depth of a size."""
    return SMALL if name == "small" else {k: VISION_PRESETS[name][k] for k in ("dim", "depth")}


def encoder(contender: str, name: str, pixels: int) -> nn.Module:
    """An encoder, the same weights for all but the ViT, which has as many."""
    torch.manual_seed(0)
    sizes = preset(name)
    ours = VisionMamba(pixels, dim=sizes["dim"], depth=sizes["depth"], drop_path=0.0)
    if contender == VIT:
        count = sum(p.numel() for p in ours.parameters())
        return peers.VisionTransformer(pixels, **preset(name), parameters=count)
    if contender != OURS:
        for block in ours.layers:
            block.mixer = flipping(cast(Mixer, block.mixer), contender)
    return ours


def flipping(mixer: Mixer, contender: str) -> peers.FlippingMixer:
    """The released composition around the weights of a mixer."""
    if contender == FLIPS_PEER:
        return peers.FlippingMixer(mixer, peers.conv_cuda, peers.scan_mamba_ssm_cuda)
    return peers.FlippingMixer(mixer, peers.conv_torch, _our_scan)


def _our_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    return cast(Tensor, selective_scan_fn(u, delta, A, B, C, D, z, bias, delta_softplus=True))


def build_encoder(contender: str, mode: str, name: str, batch: int, pixels: int) -> Work:
    """Images to tokens; mode ``inference``, or ``training``: every parameter's gradient."""
    model = encoder(contender, name, pixels)
    images = _draw(batch, 3, pixels, pixels)
    return _work(model, mode, images, lambda x: model(x))


def encoder_truth(mode: str, name: str, batch: int, pixels: int) -> dict[str, Tensor]:
    """Float64 on the CPU, composed of flips and plain scans."""
    model = cast(VisionMamba, encoder(FLIPS_OURS, name, pixels).double())
    model.checkpointing = True  # a quarter of the memory, which large images need
    return _truth(mode, _draw(batch, 3, pixels, pixels), lambda x: model(x))


class AttentionMixer(nn.Module):
    """Attention in the place of a mixer."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = peers.Attention(dim)

    def forward(self, x: Tensor, orders: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        return self.attention(x)


def mixer(contender: str, name: str) -> nn.Module:
    """A mixer, or attention of the same width."""
    torch.manual_seed(0)
    dim = preset(name)["dim"]
    ours = Mixer(dim, 16, -(-dim // 16))
    ours.initialise(preset(name)["depth"])
    if contender == OURS:
        return ours
    return AttentionMixer(dim) if contender == VIT else flipping(ours, contender)


def build_mixer(contender: str, mode: str, name: str, batch: int, pixels: int) -> Work:
    """Tokens to tokens; mode as in `build_encoder`."""
    model = mixer(contender, name)
    tokens, orders = _tokens(name, batch, pixels)
    orders = orders.to(machine.device())
    return _work(model, mode, tokens, lambda x: model(x, orders))


def mixer_truth(mode: str, name: str, batch: int, pixels: int) -> dict[str, Tensor]:
    """Float64 on the CPU, composed of flips and plain scans."""
    model = mixer(FLIPS_OURS, name).double()
    tokens, orders = _tokens(name, batch, pixels)
    return _truth(mode, tokens, lambda x: model(x, orders))


def _tokens(name: str, batch: int, pixels: int) -> tuple[Tensor, Tensor]:
    side = pixels // 16
    orders = visiting_orders(side, side, cls_position=side * side // 2)
    return _draw(batch, side * side + 1, preset(name)["dim"]), orders


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _work(model: nn.Module, mode: str, inputs: Tensor, call: Callable[[Tensor], Tensor]) -> Work:
    device = machine.device()
    model.to(device).train(mode == "training").requires_grad_(mode == "training")
    if device.type == "cuda" and mode == "inference":
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(torch.bfloat16)
    inputs = inputs.to(device).requires_grad_(mode == "training")
    dout: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            return call(x)

    @torch.no_grad()
    def inference() -> Tensor:
        return forward(inputs)

    def training() -> None:
        out = forward(inputs)
        if not dout:
            dout.append(_gradient_like(out))
        out.backward(dout[0])

    def fresh() -> tuple[Any, ...]:
        for parameter in (*model.parameters(), inputs):
            parameter.grad = None
        return ()

    def results() -> dict[str, Tensor]:
        part = inputs.detach()[:CHECKED].requires_grad_(mode == "training")
        with torch.set_grad_enabled(mode == "training"):
            out = forward(part)
        return {"out": out.detach()} | _input_gradient(mode, out, part)

    another = isinstance(model, peers.VisionTransformer | AttentionMixer)
    checked = None if another else results  # nothing to compare another function with
    if mode == "training":
        return Work(training, prepare=fresh, results=checked)
    return Work(inference, results=checked)


def _truth(mode: str, inputs: Tensor, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    part = inputs[:CHECKED].double().requires_grad_(mode == "training")
    with torch.set_grad_enabled(mode == "training"):
        out = call(part)
    return {"out": out.detach()} | _input_gradient(mode, out, part)


def _input_gradient(mode: str, out: Tensor, inputs: Tensor) -> dict[str, Tensor]:
    if mode == "inference":
        return {}
    return {"dinput": torch.autograd.grad(out, inputs, _gradient_like(out))[0]}


def _gradient_like(out: Tensor) -> Tensor:
    drawn = torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(2))
    return drawn.to(out.device, out.dtype).expand_as(out)
