"""A Llama decoder, some of whose layers also look at the image (EMRRG, section 3.3).

Base: the Llama architecture as Hugging Face folders hold it: RMSNorm, rotary positions (with
Llama-3 scaling), grouped-query attention, SwiGLU, optional q/k/v biases (Qwen), a sliding window
(Mistral), tied or untied embeddings. Parameter names are Hugging Face's.

A hybrid layer adds non-causal attention to the image tokens inside the self-attention block:

    t = RMSNorm_in(x)                   v = RMSNorm_in(vis)          one norm for both
    a = self-attention of t, before o_proj;  q its queries, rotated
    K, V = W_kv v + b                                                no rotation
    c = softmax(q K^T / sqrt(d)) V
    g = tanh(w_g . a + b_g) * tanh(alpha)          gate "token": one number a token
    g = sigmoid(s * a + b) * tanh(alpha)           gate "channel": s, b, alpha one a channel
    x = x + W_o (a + g * c);   x = x + MLP(RMSNorm_post(x))

alpha = 0 at the start, so that the layer equals the plain one exactly. Only text positions
receive ``g * c``.

Glossary: `cross_attn.kv_proj` is W_kv and b; `cross_attn.gate` is w_g and b_g; `cross_attn.scale`
and `cross_attn.shift` are s and b of the channel gate; `cross_attn.alpha` is alpha.

Shapes: B studies, T tokens, I image tokens, H width, V vocabulary, W sequences decoded together
from one study's prefix (beams or samples), S keys held by a cache.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emrrg.cache import Cache, additive
from emrrg.decoder_config import DecoderConfig, Gate, read_decoder_config, rope_frequencies
from emrrg.errors import InputError
from emrrg.int8 import Int8Linear
from emrrg.lora import AdaptableLinear
from emrrg.pretrained import WeightFolder

IGNORED = -100
LOSS_CHUNK = (
    2**21
)  # logits held at once by the loss: 8 MiB in fp32, 65 tokens of a 32,000 vocabulary

# Rows for which `project` cuts a matrix of WIDE rows and more into blocks of SLAB rows on the CPU.
# In fp32 on two AVX-512 cores for 32000 x 512, in ms, as it is / as (W x^T)^T / in blocks:
# 3 rows 3.3 / 7.2 / 3.1, 5: 6.0 / 6.1 / 3.8, 10: 10.5 / 6.3 / 4.1, 15: 11.7 / 6.5 / 4.8,
# 20: 6.7 / 7.7 / 6.6. For smaller matrices the way of the library was the fastest.
FEW_ROWS, WIDE, SLAB = range(4, 17), 16384, 200


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis, in fp32 inside."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim), in x's dtype."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        hidden = F.silu(project(self.gate_proj, x)) * project(self.up_proj, x)
        return project(self.down_proj, hidden)


@dataclass
class Context:
    """What every layer of one forward pass shares."""

    cos: Tensor
    """(B or 1, T, 1, d): cosines of the rotation."""
    sin: Tensor
    """(B or 1, T, 1, d): sines, negated in the first half of d."""
    mask: Tensor | None
    """(B or 1, 1, T, S), added to the scores of layers without a window; None: causal alone."""
    window_mask: Tensor | None
    """The same for layers with a sliding window."""
    vis: Tensor | None
    """(B, I, H) image tokens; None: no cross-attention, or its keys are cached."""
    vis_mask: Tensor | None
    """(B, 1, 1, I), added to the scores of cross-attention."""
    text: Tensor | None
    """(B, T, 1): 1 where a position receives the image, else 0; None: everywhere."""
    cache: Cache | None
    """Keys and values of the tokens before."""
    maps: list[Tensor] | None = None
    """Collects the attention maps (B, T, I) of the hybrid layers where it is a list."""


class Attention(nn.Module):
    """Causal self-attention up to, but not including, the output projection."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        size = config.width_of_head
        self.layer = layer
        self.head_dim = size
        self.windowed = config.window(layer) is not None
        bias = config.qkv_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(
            config.num_attention_heads * size, config.hidden_size, bias=config.o_bias
        )

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Attend to the tokens before.

        Args:
            x: (B, T, H), normalised.
            context: shared by the layers.
        Returns:
            Heads side by side (B, T, heads * d), and the rotated queries (B, heads, T, d).
        """
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        q = rotate(project(self.q_proj, x).view(heads), context).transpose(1, 2)
        k = rotate(project(self.k_proj, x).view(heads), context).transpose(1, 2)
        v = project(self.v_proj, x).view(heads).transpose(1, 2)
        mask = context.window_mask if self.windowed else context.mask
        cache = context.cache
        if cache is None or cache.step < 0:
            if cache is not None:
                cache.write_prefix(self.layer, k, v)
            out = causal_attention(q, k, v, mask)
        else:
            k, v = cache.append(self.layer, k, v)
            out = grouped_attention(q, k, v, mask)
        return out.transpose(1, 2).reshape(batch, length, -1), q


class CrossAttention(nn.Module):
    """Gated attention of text to image tokens; the new parameters of a hybrid layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.num_attention_heads * config.width_of_head
        self.head_dim = config.width_of_head
        self.kind = config.hybrid_gate
        self.kv_proj = nn.Linear(config.hidden_size, 2 * config.kv_heads * self.head_dim)
        if self.kind == "token":
            self.gate = nn.Linear(width, 1)
            self.alpha = nn.Parameter(torch.zeros(1))
        else:
            self.scale = nn.Parameter(torch.ones(width))
            self.shift = nn.Parameter(torch.zeros(width))
            self.alpha = nn.Parameter(torch.zeros(width))

    def keys_values(self, vis: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, kv_heads, I, d) of the image tokens `vis` (B, I, H), normalised."""
        kv = linear(vis, self.kv_proj)
        keys, values = kv.view(*vis.shape[:2], -1, self.head_dim).transpose(1, 2).chunk(2, dim=1)
        return keys, values

    def gating(self, a: Tensor) -> Tensor:
        """g of the self-attention heads `a` (B, T, heads * d): (B, T, 1 or heads * d)."""
        alpha = torch.tanh(self.alpha)
        if self.kind == "token":
            gate = torch.tanh(linear(a, self.gate)) * alpha
        else:
            gate = torch.sigmoid(self.scale * a + self.shift) * alpha
        return gate.to(a.dtype)

    def forward(self, a: Tensor, q: Tensor, keys: Tensor, values: Tensor, c: Context) -> Tensor:
        """a + g * c, shapes as `Attention.forward` returns and `keys_values` gives them."""
        if c.maps is not None:
            c.maps.append(attention_map(q, keys, c.vis_mask))
        looked = grouped_attention(q, keys, values, c.vis_mask)
        gate = self.gating(a)
        if c.text is not None:
            gate = gate * c.text.to(gate.dtype)
        return torch.addcmul(a, gate, looked.transpose(1, 2).reshape(a.shape))


class DecoderLayer(nn.Module):
    """Attention (plain or hybrid) and SwiGLU, each on a normalised residual stream."""

    cross_attn: CrossAttention | None

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.cross_attn = CrossAttention(config) if layer in config.hybrid_layers else None

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, T, H) to (B, T, H)."""
        a, q = self.self_attn(self.input_layernorm(x), context)
        if self.cross_attn is not None:
            image = self.image_keys_values(context)
            if image is not None:
                a = self.cross_attn(a, q, *image, context)
        x = x + project(self.self_attn.o_proj, a)
        return x + self.mlp(self.post_attention_layernorm(x))

    def image_keys_values(self, context: Context) -> tuple[Tensor, Tensor] | None:
        """The image's keys and values: cached, computed, or None without an image."""
        assert self.cross_attn is not None
        cache = context.cache
        if cache is not None and self.layer in cache.image:
            return cache.image[self.layer]
        if context.vis is None:
            return None
        image = self.cross_attn.keys_values(self.input_layernorm(context.vis))
        if cache is not None:
            cache.image[self.layer] = (image[0].contiguous(), image[1].contiguous())
        return image


class Stack(nn.Module):
    """Embedding, layers and final norm; holds Hugging Face's prefix ``model.``."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        size = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(*size, _weight=torch.empty(size))  # drawn by `Decoder`
        self.layers = nn.ModuleList(
            DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A Llama-style language model with hybrid layers (this module's docstring).

    Args:
        config: sizes and variants. Weights are drawn from N(0, 0.02), biases are zero.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False  # keep only each layer's input, compute the rest again
        self.sharded = False  # over processes, by `emrrg.distributed.shard_decoder`
        self.model = Stack(config)
        self.lm_head: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._frequencies = rope_frequencies(config)  # no buffer: .to(dtype) must not round it
        if not self.model.embed_tokens.weight.is_meta:  # else there is nothing to draw into
            self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        hybrid = [m for m in self.modules() if isinstance(m, CrossAttention)]
        gates = {id(m.gate) for m in hybrid if m.kind == "token"}
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and id(module) not in gates:
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self.model.layers:
            if layer.cross_attn is not None:
                copy_keys_values(cast(DecoderLayer, layer))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        hybrid_layers: Iterable[int] = (),
        hybrid_gate: Gate = "token",
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        int8: bool = False,
    ) -> Decoder:
        """Read a Hugging Face folder: ``config.json`` and safetensors or ``.bin``, sharded or not.

        Headers and shapes are checked first; then the tensors go one by one into the target
        dtype and device.

        Args:
            folder: the folder.
            hybrid_layers: layers that shall cross-attend to the image; the new parameters start
                from the layer's own k_proj and v_proj.
            hybrid_gate: their gate.
            dtype: of the weights; None: as stored.
            device: of the weights; None: the CPU.
            int8: hold the layers' linear weights in int8 (`to_int8`), quantised one by one.
        Raises:
            InputError: the folder, a file or a tensor of it is missing, damaged or of another
                architecture (the message names it).
        """
        folder = Path(folder)
        config = read_decoder_config(folder)
        with torch.device("meta"):
            decoder = cls(config)
        weights = WeightFolder(folder)
        names = check_weights(decoder, weights)
        if int8:
            decoder.to_int8()
        for name, stored in weights.read(names):
            load_tensor(decoder, name, stored, dtype, device)
            del stored  # one at a time: the next may be in another file
        decoder.add_hybrid_layers(hybrid_layers, gate=hybrid_gate)
        return decoder

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights and of the activations."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids: (...) int64 to (..., H)."""
        return self.model.embed_tokens(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states after the final norm to logits: (..., H) to (..., V)."""
        if self.lm_head is None:
            return project(self.model.embed_tokens, hidden)
        return project(self.lm_head, hidden)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        *,
        vis: Tensor | None = None,
        vis_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            inputs_embeds: (B, T, H) embeddings. With a filled `cache`: (B, W, H), the newest token
                of each of the W sequences that go on from a study's prefix.
            attention_mask: (B, T), nonzero where there is a token; pads may stand on the left or
                the right. Positions count real tokens. None: no pads. Not with a filled cache.
            vis: (B, I, H) image tokens for the hybrid layers; None: they act as plain ones.
            vis_mask: (B, I), nonzero where there is an image token; None: everywhere.
            text_mask: (B, T) bool, True where a position receives the image; None: everywhere.
            cache: from `new_cache`; an empty one is filled with the prefix.
        Returns:
            (B, T, V) in the weights' dtype.
        Raises:
            InputError: more tokens than max_position_embeddings.
            ValueError: shapes disagree (the message names the tensor, expected and got).
        """
        hidden = self.hidden_states(
            inputs_embeds,
            attention_mask,
            vis=vis,
            vis_mask=vis_mask,
            text_mask=text_mask,
            cache=cache,
        )
        return self.logits(hidden)

    def hidden_states(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        *,
        vis: Tensor | None = None,
        vis_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        cache: Cache | None = None,
        maps: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the final norm; arguments and errors as `forward`.

        Args:
            maps: a list to which every hybrid layer appends its attention map, (B, T, I) fp32,
                averaged over heads. Costs memory; None: not computed.
        Returns:
            (B, T, H).
        """
        x = inputs_embeds.to(self.dtype)
        self._check(x, attention_mask, vis, vis_mask, text_mask, cache)
        if cache is not None and cache.step >= 0:
            context = self._step_context(cache, text_mask)
        else:
            context = self._prefix_context(x, attention_mask, vis, vis_mask, text_mask, cache)
        context.maps = maps
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, context, use_reentrant=False)
            else:
                x = layer(x, context)
        if cache is not None:
            cache.advance()
        return self.model.norm(x)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the next token, averaged over the positions that have a label.

        Equal to ``F.cross_entropy(logits(hidden), labels)`` in fp32. Logits exist for `LOSS_CHUNK`
        numbers at a time and are computed again in the backward pass.

        Args:
            hidden: (B, T, H) from `hidden_states`.
            labels: (B, T) int64: what follows each position; -100 where it does not count.
        Returns:
            () fp32; 0 where no position has a label.
        """
        counted = labels != IGNORED
        hidden, labels = hidden[counted], labels[counted]  # (tokens, H), (tokens,)
        tokens = max(1, LOSS_CHUNK // self.config.vocab_size)
        if len(labels) <= tokens:
            total = self._chunk_loss(hidden, labels)
        else:
            total = hidden.new_zeros((), dtype=torch.float32)
            for part, targets in zip(hidden.split(tokens), labels.split(tokens), strict=True):
                total = total + checkpoint(
                    self._chunk_loss, part, targets, use_reentrant=False, preserve_rng_state=False
                )
        return total / max(1, len(labels))

    def _chunk_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden).float(), labels, reduction="sum")

    def add_hybrid_layers(self, layers: Iterable[int], gate: Gate = "token") -> None:
        """Let plain layers cross-attend to the image; the output stays as it is until they train.

        The new parameters are fp32 (fp64 in an fp64 decoder), K and V start from the layer's own
        k_proj and v_proj.

        Args:
            layers: indices; those that are hybrid already stay as they are.
            gate: ``token`` or ``channel``, the same in every hybrid layer.
        Raises:
            InputError: an index that does not exist, or a second kind of gate.
        """
        new = sorted(set(layers) - set(self.config.hybrid_layers))
        if not new:
            return
        if self.config.hybrid_layers and gate != self.config.hybrid_gate:
            raise InputError(
                f"hybrid_gate: {gate!r}, but layers {list(self.config.hybrid_layers)} have a gate "
                f"of kind {self.config.hybrid_gate!r}"
            )
        self.config = dataclasses.replace(
            self.config,
            hybrid_layers=tuple(sorted({*self.config.hybrid_layers, *new})),
            hybrid_gate=gate,
        )
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        for index in new:
            layer = cast(DecoderLayer, self.model.layers[index])
            layer.cross_attn = CrossAttention(self.config).to(device=self.device, dtype=dtype)
            layer.cross_attn.train(self.training)
            copy_keys_values(layer)

    def hybrid_parameter_names(self) -> list[str]:
        """Names of the parameters that the hybrid layers add, in the order of the layers."""
        return [name for name, _ in self.named_parameters() if ".cross_attn." in name]

    def new_cache(
        self, batch: int, prefix: int, new_tokens: int, width: int = 1, *, static: bool = False
    ) -> Cache:
        """An empty cache for `batch` prefixes and what follows them; see `emrrg.cache.Cache`."""
        return Cache(
            self.config,
            batch=batch,
            prefix=prefix,
            new_tokens=new_tokens,
            width=width,
            dtype=self._compute_dtype(),
            device=self.device,
            static=static,
        )

    def to_int8(self) -> Decoder:
        """Hold the weights of the layers' linear maps in int8, frozen; itself.

        Embedding, norms, output projection and the hybrid layers' new parameters stay as they are,
        and so does a linear map that carries an adapter.
        """
        for layer in self.model.layers:
            for block in (cast(nn.Module, layer.self_attn), cast(nn.Module, layer.mlp)):
                for name, module in list(block.named_children()):
                    bare = isinstance(module, AdaptableLinear) and not module.adapters()
                    if type(module) is nn.Linear or bare:
                        setattr(block, name, Int8Linear.from_linear(cast(nn.Linear, module)))
        return self

    def _check(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        vis: Tensor | None,
        vis_mask: Tensor | None,
        text_mask: Tensor | None,
        cache: Cache | None,
    ) -> None:
        if x.ndim != 3 or x.shape[2] != self.config.hidden_size:
            expected = f"(B, T, {self.config.hidden_size})"
            raise ValueError(f"inputs_embeds: expected {expected}, got {tuple(x.shape)}")
        batch, length, hidden = x.shape
        if vis is not None and (
            vis.ndim != 3 or vis.shape[0] != batch or vis.shape[2] != hidden or not vis.shape[1]
        ):
            raise ValueError(f"vis: expected ({batch}, I, {hidden}), got {tuple(vis.shape)}")
        shapes: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
            ("attention_mask", attention_mask, (batch, length)),
            ("text_mask", text_mask, (batch, length)),
        ]
        if vis is not None:
            shapes.append(("vis_mask", vis_mask, (batch, vis.shape[1])))
        for name, tensor, shape in shapes:
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
        limit = self.config.max_position_embeddings
        if cache is None:
            if length > limit:
                raise InputError(
                    f"{length} tokens (prompt, image and report), but the decoder has "
                    f"max_position_embeddings {limit}: shorten the report or the image"
                )
        elif cache.step >= 0:
            if attention_mask is not None:
                raise ValueError("attention_mask: the cache knows it already; give None")
            if (batch, length) != (cache.batch, cache.width):
                raise ValueError(
                    f"inputs_embeds: expected ({cache.batch}, {cache.width}, {hidden}) to go on "
                    f"with the cache, got {tuple(x.shape)}"
                )
        elif (batch, length) != (cache.batch, cache.prefix):
            raise ValueError(
                f"inputs_embeds: expected ({cache.batch}, {cache.prefix}, {hidden}) to fill the "
                f"cache, got {tuple(x.shape)}"
            )

    def _compute_dtype(self) -> torch.dtype:
        """Of queries, keys and values: autocast's where it is on, else the weights'."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and signed sin (..., 1, d) for positions (...)."""
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        angles = positions[..., None].float() * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        dtype = self._compute_dtype()
        return (
            torch.cat([cos, cos], dim=-1).unsqueeze(-2).to(dtype),
            torch.cat([-sin, sin], dim=-1).unsqueeze(-2).to(dtype),
        )

    def _prefix_context(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        vis: Tensor | None,
        vis_mask: Tensor | None,
        text_mask: Tensor | None,
        cache: Cache | None,
    ) -> Context:
        length = x.shape[1]
        dtype = self._compute_dtype()
        real = None
        if attention_mask is not None:
            real = attention_mask.to(x.device) != 0
            if bool(real.all()):
                real = None  # the fast path: causal alone
        if real is None:
            positions = torch.arange(length, device=x.device).unsqueeze(0)
        else:
            positions = (real.long().cumsum(1) - 1).clamp(min=0)
        bias = None
        if vis_mask is not None and vis is not None:
            bias = additive(vis_mask.to(x.device) != 0, dtype)[:, None, None]
        cos, sin = self._rotation(positions)
        window, window_mask = self.config.sliding_window, None
        if window is not None:
            window_mask = causal_mask(length, real, window, dtype=dtype, device=x.device)
        context = Context(
            cos=cos,
            sin=sin,
            mask=causal_mask(length, real, None, dtype=dtype, device=x.device),
            window_mask=window_mask,
            vis=None if vis is None else vis.to(x.dtype),
            vis_mask=bias,
            text=None if text_mask is None else text_mask.to(x.device).unsqueeze(-1),
            cache=cache,
        )
        if cache is not None:
            cache.begin(real, positions, bias)
        return context

    def _step_context(self, cache: Cache, text_mask: Tensor | None) -> Context:
        mask, window_mask = cache.masks()
        cos, sin = self._rotation(cache.positions())
        text = None if text_mask is None else text_mask.to(cache.device).unsqueeze(-1)
        return Context(cos, sin, mask, window_mask, None, cache.image_mask, text, cache)


def check_weights(decoder: Decoder, weights: WeightFolder) -> list[str]:
    """Compare the tensors of a folder with a decoder's parameters, from the headers alone.

    Returns:
        The names of the tensors to read.
    Raises:
        InputError: a tensor is missing, unknown or of another shape (the message names it).
    """
    expected = {name: tuple(p.shape) for name, p in decoder.named_parameters()}
    for name, shape in expected.items():
        if name not in weights.shapes:
            raise InputError(f"{weights.folder}: tensor {name} is missing")
        if weights.shapes[name] != shape:
            raise InputError(
                f"{weights.paths[name]}: tensor {name} has shape {weights.shapes[name]}, but "
                f"config.json says {shape}"
            )
    for name, path in weights.paths.items():
        # Old Llama files store the rotary frequencies; tied ones may repeat the embedding.
        if name not in expected and not name.endswith((".inv_freq", "lm_head.weight")):
            raise InputError(f"{path}: tensor {name} has no place in a {decoder.config.model_type}")
    return list(expected)


@torch.no_grad()
def load_tensor(
    decoder: Decoder,
    name: str,
    stored: Tensor,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> None:
    """Put one tensor in its place: a copy of its own, in the dtype and on the device asked for."""
    path, _, last = name.rpartition(".")
    module = decoder.get_submodule(path)
    if isinstance(module, Int8Linear) and last == "weight":
        module.store(stored.to(device or "cpu"))
        return
    value = torch.empty(stored.shape, dtype=dtype or stored.dtype, device=device).copy_(stored)
    setattr(module, last, nn.Parameter(value, requires_grad=not isinstance(module, Int8Linear)))


@torch.no_grad()
def copy_keys_values(layer: DecoderLayer) -> None:
    """Start the cross-attention of a hybrid layer from the layer's own k_proj and v_proj."""
    assert layer.cross_attn is not None
    new = layer.cross_attn.kv_proj
    sources: Sequence[nn.Module] = (layer.self_attn.k_proj, layer.self_attn.v_proj)
    weights = [
        m.dequantized() if isinstance(m, Int8Linear) else cast(Tensor, m.weight) for m in sources
    ]
    new.weight.copy_(torch.cat(weights))
    biases = [m.bias for m in sources]
    if biases[0] is None:
        nn.init.zeros_(new.bias)
    else:
        new.bias.copy_(torch.cat([cast(Tensor, b) for b in biases]))


def project(module: nn.Module, x: Tensor) -> Tensor:
    """x W^T + b for a linear layer, or for an embedding used as one.

    The logits of a few rows at a time (a decoding step) are computed on the CPU in blocks of the
    vocabulary: matrix libraries else copy the whole matrix into another layout first.
    """
    if type(module) in (nn.Linear, nn.Embedding) and not torch.is_grad_enabled():
        weight = cast(Tensor, module.weight)
        rows = x.numel() // max(1, x.shape[-1])
        if x.device.type == "cpu" and len(weight) >= WIDE and rows in FEW_ROWS:
            flat, whole = x.reshape(rows, -1), len(weight) // SLAB * SLAB
            slabs = weight[:whole].view(-1, SLAB, weight.shape[1]).mT
            out = torch.bmm(flat.expand(len(slabs), -1, -1), slabs)  # (slabs, rows, SLAB)
            out = out.transpose(0, 1).flatten(1)
            if whole < len(weight):
                out = torch.cat([out, F.linear(flat, weight[whole:])], dim=1)
            bias = getattr(module, "bias", None)
            return (out if bias is None else out + bias).view(*x.shape[:-1], -1)
    if isinstance(module, nn.Embedding):
        return F.linear(x, module.weight)
    return module(x)


def linear(x: Tensor, module: nn.Linear) -> Tensor:
    """`module` applied in x's dtype: fp32 parameters that train beside half-precision ones."""
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return F.linear(x, module.weight.to(x.dtype), bias)


def rotate(x: Tensor, context: Context) -> Tensor:
    """Rotary positions of x (B, T, heads, d): x cos + (x2, x1) (-sin, sin), x1, x2 its halves."""
    return torch.addcmul(x * context.cos, x.roll(x.shape[-1] // 2, dims=-1), context.sin)


def causal_mask(
    length: int,
    real: Tensor | None,
    window: int | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Mask of a whole sequence, added to the scores; None where causal alone says it all.

    Args:
        length: tokens.
        real: (B, T) bool; None: no pads.
        window: of the sliding attention, tokens; None: no window.
        dtype: of the mask.
        device: of the mask.
    Returns:
        (B or 1, 1, T, T). Every position sees itself, so that pads stay finite.
    """
    narrow = window is not None and window < length
    if real is None and not narrow:
        return None
    index = torch.arange(length, device=device)
    distance = index[:, None] - index[None, :]
    keep = distance >= 0
    if narrow:
        keep = keep & (distance < cast(int, window))
    keep = keep[None]
    if real is not None:
        keep = (keep & real[:, None, :]) | (distance == 0)
    return additive(keep, dtype).unsqueeze(1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Self-attention of a whole sequence.

    Args:
        q: (B, heads, T, d).
        k: (B, kv_heads, T, d).
        v: as `k`.
        mask: (B or 1, 1, T, T) added to the scores; None: causal.
    Returns:
        (B, heads, T, d).
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention that is not causal by itself; query heads that share keys become rows.

    Args:
        q: (B, heads, T, d).
        k: (B, kv_heads, S, d).
        v: as `k`.
        mask: (B, 1, T or 1, S) added to the scores, or None.
    Returns:
        (B, heads, T, d).
    """
    batch, heads, length, size = q.shape
    group = heads // k.shape[1]
    rows = q.reshape(batch, k.shape[1], group * length, size)
    if mask is not None and group > 1 and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    return out.view(batch, heads, length, size)


def attention_map(q: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """Weights of the attention of `q` to `keys`, averaged over heads: (B, T, I) fp32."""
    batch, heads, length, size = q.shape
    rows = q.float().reshape(batch, keys.shape[1], -1, size)
    scores = rows @ keys.float().transpose(-1, -2) / math.sqrt(size)
    if mask is not None:
        scores = scores + mask.float()
    return scores.softmax(-1).view(batch, heads, length, -1).mean(1)
