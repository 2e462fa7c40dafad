"""ARM, a vision Mamba with four scan directions: the encoder of MambaXray-VL and EMRRG.

    x   = patches of the image, 16 x 16 pixels each, through W_patch            (B, P, D)
    x   = cat(x[:P//2], cls, x[P//2:]) + pos_embed                              (B, P+1, D)
    h   = h + mixer(LN1 h);   h = h + W3 (silu(W1 LN2 h) * W2 LN2 h)            each block
    out = LN_f(h)                                                               (B, P+1, D)

The mixer is Mamba (arXiv 2312.00752, section 3) with one input projection and one gate for four
visiting orders of the tokens:

    [X | Z] = W_in h
    each order k:   u = silu(causal conv4_k(X));   [dt | B | C] = x_proj_k u
                    delta = softplus(dt_proj_k dt + b_k);   A = -exp(A_log_k)
                    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t;   y_t = <C_t, h_t> + D_k u_t
    out = W_out( silu(Z) / 4 * sum over k of y, each put back in place )

Orders, and the suffix of their parameters: row by row "", that reversed "_b", column by column
"_c", that reversed "_c_b". The class token stands in the middle of each. Parameter names are those
of the released checkpoints.

Shapes: B images, S pixels a side, P patches, L = P + 1 tokens, D width, N states a channel, R rank
of dt, K = 4 orders.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emrrg.errors import InputError
from emrrg.lora import DIRECTIONS, AdaptableLayer, AdaptableLinear, stacked_linear
from kernels.causal_conv1d import causal_conv1d
from kernels.cross_scan import cross_scan
from kernels.reference import visiting_orders

# Arguments of `VisionMamba` by name of the size; the three large ones are released.
VISION_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"image_size": 80, "dim": 128, "depth": 4},
    "base": {"image_size": 224, "dim": 768, "depth": 12},
    "large": {"image_size": 224, "dim": 1024, "depth": 24},
    "huge": {"image_size": 224, "dim": 1536, "depth": 24},
}
CONV_WIDTH = 4


class PatchConv(AdaptableLayer, nn.Conv2d):
    """The patch convolution (stride = kernel size), computed as a linear map of the patches."""

    weight: nn.Parameter

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, D, H/16, W/16)."""
        size = self.kernel_size[0]
        batch, channels, height, width = images.shape
        rows, columns = height // size, width // size
        patches = images.reshape(batch, channels, rows, size, columns, size)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        return self.adapted(patches).transpose(1, 2).unflatten(2, (rows, columns))


class PatchEmbed(nn.Module):
    """Image to patch tokens."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = PatchConv(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, P, D), row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Mixer(nn.Module):
    """Mamba over four visiting orders, gated once after their sum.

    Args:
        dim: D.
        state_dim: N, states a channel.
        dt_rank: R.
    """

    peft_delta_A: nn.Parameter | None  # noqa: N815 (K, D, N)
    peft_delta_D: nn.Parameter | None  # noqa: N815 (K, D)
    peft_delta_conv1d: nn.Parameter | None  # (K, D, W)
    peft_delta_bias: nn.Parameter | None  # (K, D)

    def __init__(self, dim: int, state_dim: int, dt_rank: int) -> None:
        super().__init__()
        self.dim, self.state_dim, self.dt_rank = dim, state_dim, dt_rank
        # Places for the methods of `emrrg.peft`; None: the plain mixer.
        for name in ("delta_A", "delta_D", "delta_conv1d", "delta_bias"):
            self.register_parameter(f"peft_{name}", None)
        self.peft_scan: Any = None
        self.peft_adapter: Any = None
        self.merged_deltas: dict[str, tuple[nn.Parameter, list[Tensor]]] = {}
        self.in_proj = AdaptableLinear(dim, 2 * dim, bias=False)
        self.out_proj = AdaptableLinear(dim, dim, bias=False)
        for k in DIRECTIONS:
            log_n = torch.arange(1, state_dim + 1, dtype=torch.float32).log()
            self.register_parameter(f"A{k}_log", nn.Parameter(log_n.repeat(dim, 1)))
            self.register_parameter(f"D{k}", nn.Parameter(torch.ones(dim)))
            conv = nn.Conv1d(dim, dim, CONV_WIDTH, groups=dim)
            self.add_module(f"conv1d{k}", conv)
            x_proj = AdaptableLinear(dim, dt_rank + 2 * state_dim, bias=False)
            self.add_module(f"x_proj{k}", x_proj)
            self.add_module(f"dt_proj{k}", AdaptableLinear(dt_rank, dim))

    @torch.no_grad()
    def initialise(self, depth: int) -> None:
        """Draw what does not start from torch's defaults; `depth` blocks share the output."""
        nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
        self.out_proj.weight.div_(math.sqrt(depth))
        for layer in self._layers("dt_proj"):
            nn.init.uniform_(layer.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            log_dt = torch.empty_like(layer.bias).uniform_(math.log(1e-3), math.log(0.1))
            dt = log_dt.exp().clamp(min=1e-4)
            layer.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt

    def forward(self, x: Tensor, orders: Tensor, affix: Tensor | None = None) -> Tensor:
        """Mix the tokens.

        Args:
            x: (B, L, D).
            orders: (K, L) int64; `orders[k, t]` is the place in x visited at step t of order k.
            affix: (K, T, D) tokens of each order, visited before the image's and then dropped
                (affix tuning, `emrrg.peft`); None: none.
        Returns:
            (B, L, D).
        """
        batch, length, dim = x.shape
        inner, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, D) each, views
        if affix is not None:
            tokens = affix.flatten(0, 1).to(inner.dtype)
            inner = torch.cat([inner, tokens.expand(batch, -1, -1)], dim=1)
            z = F.pad(z, (0, 0, 0, len(tokens)))
            orders = affix_orders(orders, affix.shape[1])
        convs, dt_layers = self._layers("conv1d"), self._layers("dt_proj")
        conv_weight = torch.stack([conv.weight for conv in convs]).squeeze(2)  # (K, D, W)
        conv_bias = torch.stack([conv.bias for conv in convs])
        A_log, D = self._stack("A{}_log"), self._stack("D{}")
        delta_bias = torch.stack([layer.bias for layer in dt_layers])
        if self.peft_delta_conv1d is not None:
            conv_weight = conv_weight + self.peft_delta_conv1d
        if self.peft_delta_A is not None:
            A_log = A_log + self.peft_delta_A
        if self.peft_delta_D is not None:
            D = D + self.peft_delta_D
        if self.peft_delta_bias is not None:
            delta_bias = delta_bias + self.peft_delta_bias

        u = causal_conv1d(inner, conv_weight, conv_bias, orders, activation="silu")  # (K, B, L, D)
        flat = u.view(len(DIRECTIONS), -1, dim)
        projected = stacked_linear(self._layers("x_proj"), flat)  # (K, B L, R + 2 N)
        dt, B, C = projected.split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        delta = stacked_linear(dt_layers, dt)  # (K, B L, D)
        if self.peft_scan is not None:
            A_log, B, C = self.peft_scan(flat, A_log, B, C)
        scan = (len(DIRECTIONS), batch, inner.shape[1], -1)
        y = cross_scan(
            u,
            delta.view(scan),
            -torch.exp(A_log.float()),
            B.float().view(scan),
            C.float().view(scan),
            D.float(),
            z,
            delta_bias.float(),
            orders,
        )[:, :length]
        out = self.out_proj(y)
        return out if self.peft_adapter is None else out + self.peft_adapter(y)

    def _layers(self, name: str) -> list[Any]:
        return [getattr(self, name + k) for k in DIRECTIONS]

    def _stack(self, name: str) -> Tensor:
        return torch.stack([cast(Tensor, getattr(self, name.format(k))) for k in DIRECTIONS])


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = dim * 4 * 2 // 3
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """Mixer and MLP, each after a layer norm, added to what comes in."""

    def __init__(self, dim: int, state_dim: int, dt_rank: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = Mixer(dim, state_dim, dt_rank)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = SwiGLU(dim)

    def forward(self, h: Tensor, orders: Tensor, affix: Tensor | None = None) -> Tensor:
        """(B, L, D) to (B, L, D); arguments as in `Mixer.forward`."""
        h = self._add(h, self.mixer(self.norm1(h), orders, affix))
        return self._add(h, self.mlp(self.norm2(h)))

    def _add(self, h: Tensor, branch: Tensor) -> Tensor:
        """h + branch, the branch dropped for whole samples at random (DropPath)."""
        if not self.training or self.drop_path == 0:
            return h + branch
        keep = 1 - self.drop_path
        mask = torch.empty(len(h), 1, 1, dtype=branch.dtype, device=h.device).bernoulli_(keep)
        return torch.addcmul(h, branch, (mask / keep).to(branch.dtype))


class VisionMamba(nn.Module):
    """The image encoder; every token goes on, there is no head.

    Args:
        image_size: pixels, a side or (height, width); multiples of `patch_size`.
        patch_size: pixels a side of a patch.
        dim: D, a multiple of 8.
        depth: blocks.
        state_dim: N, states a channel of the scan.
        dt_rank: R; None: D / 16, rounded up.
        drop_path: stochastic depth while training; block i > 0 drops its branches at the rate
            drop_path * (i - 1) / (depth - 1), the first block never (the release's arithmetic).
        checkpointing: keep only each block's input for the backward pass and compute the rest
            again.
    Raises:
        InputError: an image size that is not a multiple of the patch size.
    """

    orders: Tensor

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        state_dim: int = 16,
        *,
        dt_rank: int | None = None,
        drop_path: float = 0.1,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.dim, self.depth = patch_size, dim, depth
        self.state_dim = state_dim
        self.checkpointing = checkpointing
        rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        rates = [drop_path * max(0, i - 1) / max(1, depth - 1) for i in range(depth)]
        self.layers = nn.ModuleList(Block(dim, state_dim, rank, rate) for rate in rates)
        self.norm_f = nn.LayerNorm(dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, 0, dim))
        self.peft_prompt: Any = None  # places for the methods of `emrrg.peft`
        self.peft_affix: Any = None
        self.peft_bias = False
        self._set_grid(image_size)
        self._initialise()

    @property
    def num_patches(self) -> int:
        """P."""
        return self.grid[0] * self.grid[1]

    def resize(self, image_size: int | tuple[int, int]) -> None:
        """Change the image size; the position embedding is interpolated.

        Args:
            image_size: as in the constructor.
        Raises:
            InputError: not a multiple of the patch size.
        """
        old, pos_embed = self.grid, self.pos_embed
        self._set_grid(image_size)
        with torch.no_grad():
            self.pos_embed.copy_(interpolate_pos_embed(pos_embed, self.grid, old))
        self.pos_embed.requires_grad_(pos_embed.requires_grad)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: (B, 3, H, W) float, normalised by ImageNet's mean and deviation.
        Returns:
            (B, P+1, D); the class token is in the middle, at P // 2.
        Raises:
            InputError: images of another size than the model was built for.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2:] != self.image_size:
            raise InputError(
                f"images: shape {tuple(images.shape)}, expected (batch, 3, {self.image_size[0]}, "
                f"{self.image_size[1]}); build the model with that image_size, or resize() it"
            )
        x = self.patch_embed(images)
        middle = self.num_patches // 2
        cls = self.cls_token.expand(len(x), -1, -1).to(x.dtype)
        h = torch.cat([x[:, :middle], cls, x[:, middle:]], dim=1) + self.pos_embed
        length, orders = h.shape[1], self.orders
        if self.peft_prompt is not None:
            prompt = self.peft_prompt()
            h = torch.cat([h, prompt.to(h.dtype).expand(len(h), -1, -1)], dim=1)
            orders = prompt_orders(orders, len(prompt))
        affixes = [None] * self.depth if self.peft_affix is None else self.peft_affix()
        for block, affix in zip(self.layers, affixes, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, orders, affix, use_reentrant=False)
            else:
                h = block(h, orders, affix)
        return self.norm_f(h[:, :length])

    def _set_grid(self, image_size: int | tuple[int, int]) -> None:
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2 or any(s < self.patch_size or s % self.patch_size for s in size):
            raise InputError(
                f"image size: {image_size} is not a multiple of the patch size {self.patch_size}"
            )
        self.image_size = torch.Size(size)
        self.grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        orders = visiting_orders(*self.grid, cls_position=self.num_patches // 2)
        self.register_buffer("orders", orders.to(self.cls_token.device), persistent=False)
        old = self.pos_embed
        self.pos_embed = nn.Parameter(old.new_zeros(1, self.num_patches + 1, self.dim))

    @torch.no_grad()
    def _initialise(self) -> None:
        conv = self.patch_embed.proj
        fan_in = conv.weight[0].numel()
        # LeCun normal, cut at two deviations; the constant restores the deviation after the cut.
        nn.init.trunc_normal_(conv.weight, std=1.0, a=-2.0, b=2.0)
        conv.weight.mul_(fan_in**-0.5 / 0.87962566103423978)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        for module in self.layers:
            block = cast(Block, module)
            block.mixer.initialise(self.depth)
            for layer in (block.mlp.w1, block.mlp.w2, block.mlp.w3):
                nn.init.zeros_(layer.bias)


def prompt_orders(orders: Tensor, tokens: int) -> Tensor:
    """Visiting orders of a sequence with prompt tokens at its end.

    The first half of them (rounded down) is visited before the image by the orders "" and "_c" and
    the rest after it; the reversed orders "_b" and "_c_b" stay the reverse of those.

    Args:
        orders: (K, L) int64.
        tokens: T, prompt tokens.
    Returns:
        (K, L + T) int64.
    """
    length = orders.shape[1]
    places = torch.arange(length, length + tokens, device=orders.device)
    forward = [torch.cat([places[: tokens // 2], orders[k], places[tokens // 2 :]]) for k in (0, 2)]
    return torch.stack([forward[0], forward[0].flip(0), forward[1], forward[1].flip(0)])


def affix_orders(orders: Tensor, tokens: int) -> Tensor:
    """Visiting orders of a sequence with every order's own affix tokens at its end.

    Order k visits its own tokens, then the image, and last the other orders' tokens: there they
    change nothing that is kept, and the order stays a permutation.

    Args:
        orders: (K, L) int64.
        tokens: T, affix tokens of each order.
    Returns:
        (K, L + K T) int64.
    """
    count, length = orders.shape
    places = torch.arange(length, length + count * tokens, device=orders.device)
    places = places.view(count, tokens)
    others = [torch.cat([places[:k], places[k + 1 :]]).flatten() for k in range(count)]
    return torch.cat([places, orders, torch.stack(others)], dim=1)


def interpolate_pos_embed(
    pos_embed: Tensor,
    grid: tuple[int, int],
    old_grid: tuple[int, int] | None = None,
) -> Tensor:
    """Bring a position embedding to another patch grid, bicubically; the class token's row stays.

    Args:
        pos_embed: (1, P+1, D), the class token's row at P // 2; or (1, P, D) without a class token
            (the released autoregressive files), which then gets a row of zeros.
        grid: patch rows and columns wanted.
        old_grid: rows and columns that it has; None: a square.
    Returns:
        (1, P'+1, D) in pos_embed's dtype; equal to what came in where the grid stays.
    Raises:
        InputError: its rows are no square, and no `old_grid` says what they are.
    """
    rows, dim = pos_embed.shape[-2:]
    if old_grid is None:
        side = math.isqrt(rows)
        if rows - side * side not in (0, 1):
            raise InputError(
                f"pos_embed: {rows} rows are no square grid with or without a class token"
            )
        old_grid = (side, side)
    patches = old_grid[0] * old_grid[1]
    if rows not in (patches, patches + 1):
        raise InputError(f"pos_embed: {rows} rows do not fit a grid of {old_grid}")
    middle = patches // 2
    if rows == patches:
        cls, body = pos_embed.new_zeros(1, 1, dim), pos_embed
    else:
        cls = pos_embed[:, middle : middle + 1]
        body = torch.cat([pos_embed[:, :middle], pos_embed[:, middle + 1 :]], dim=1)
    if tuple(grid) != tuple(old_grid):
        image = body.reshape(1, *old_grid, dim).permute(0, 3, 1, 2).float()
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
        body = image.flatten(2).transpose(1, 2).to(pos_embed.dtype)
    middle = body.shape[1] // 2
    return torch.cat([body[:, :middle], cls, body[:, middle:]], dim=1)
