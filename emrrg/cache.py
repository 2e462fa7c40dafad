"""Keys and values of a decoder while it writes: a study's prefix once, its sequences after it.

Every layer holds one block of keys, and one of values, for each study:

    slot     0 ... prefix-1                 the prefix, shared by the W sequences of the study
    slot     prefix + t * W + w             token t of sequence w

A token never moves. When beams are reordered, only the table `lineage` changes, which says what
each sequence may look at: its study's prefix, and the tokens that it descends from. So no key or
value is ever copied, and the prefix (prompt and image) is stored once a study, not once a beam.

Shapes: B studies, W sequences a study, T prefix tokens, S slots, d width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from emrrg.decoder_config import DecoderConfig
from emrrg.errors import InputError

SLOT_MULTIPLE = 8  # fixed shapes: slots are rounded up to it, which fused attention asks of masks


class Cache:
    """The keys and values of all layers, allocated once.

    Args:
        config: of the decoder.
        batch: studies.
        prefix: tokens of the prefix, pads included.
        new_tokens: most tokens that may follow.
        width: sequences that go on from each study's prefix.
        dtype: of keys and values.
        device: where they are.
        static: every step has the same shapes and addresses (it looks at all slots, those to come
            masked), so that a CUDA graph can replay it; else a step looks at the slots in use.
    Raises:
        InputError: more tokens than max_position_embeddings.

    Attributes:
        step: -1 before the prefix, then the number of tokens written after it.
        keys: (layers, B, kv_heads, S, d); `values` alike.
        lineage: (B, W, S), added to the scores: 0 where a sequence may look, else -inf.
        image: layer to the keys and values of the image tokens, (B, kv_heads, I, d) each.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        batch: int,
        prefix: int,
        new_tokens: int,
        width: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        static: bool = False,
    ) -> None:
        limit = config.max_position_embeddings
        if prefix + new_tokens > limit:
            raise InputError(
                f"{prefix} tokens of prompt and image and {new_tokens} to generate are more than "
                f"the decoder's max_position_embeddings {limit}: generate fewer"
            )
        self.batch, self.prefix, self.new_tokens, self.width = batch, prefix, new_tokens, width
        self.window, self.static = config.sliding_window, static
        slots = slot_count(prefix, new_tokens, width, static)
        shape = (config.num_hidden_layers, batch, config.kv_heads, slots, config.width_of_head)
        # What a fixed-shape step reads, but masks, must be finite.
        make = torch.zeros if static else torch.empty
        self.keys = make(shape, dtype=dtype, device=device)
        self.values = make(shape, dtype=dtype, device=device)
        self.lineage = torch.full((batch, width, slots), -math.inf, dtype=dtype, device=device)
        self.image: dict[int, tuple[Tensor, Tensor]] = {}
        self.image_mask: Tensor | None = None
        self.step = -1
        self._padded = False
        self._lengths = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._positions = torch.zeros(batch, slots, dtype=torch.long, device=device)
        # Step and sequence of each slot; a prefix slot belongs to none.
        after = torch.arange(slots, device=device) - prefix
        self._slot_step = torch.where(after < 0, -1, after // width)
        own = after % width == torch.arange(width, device=device)[:, None]
        self._own = own & (after >= 0)  # (W, S)
        # The running step and its slots, where a graph can read them.
        self._step = torch.full((), -1, dtype=torch.long, device=device)
        self._slots = torch.arange(width, device=device) + prefix - width

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, the image's included; `cache_bytes` foretells it."""
        tensors = [self.keys, self.values, *(t for pair in self.image.values() for t in pair)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def begin(self, real: Tensor | None, positions: Tensor, image_mask: Tensor | None) -> None:
        """Note which tokens of the prefix are real and where each study's text goes on.

        Args:
            real: (B, T) bool; None: no pads.
            positions: (B or 1, T) int64 of the prefix.
            image_mask: (B, 1, 1, I), added to the scores of cross-attention.
        """
        self.image_mask = image_mask
        self._padded = real is not None
        prefix = self.lineage[:, :, : self.prefix]
        if real is None:
            prefix.zero_()
        else:
            prefix.copy_(additive(real, self.dtype).unsqueeze(1).expand_as(prefix))
        self._lengths.copy_(positions.amax(1, keepdim=True) + 1)
        self._positions.copy_(self._lengths + self._slot_step)
        self._positions[:, : self.prefix] = positions

    def write_prefix(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store a layer's keys and values (B, kv_heads, T, d) of the prefix."""
        self.keys[layer, :, :, : self.prefix] = k
        self.values[layer, :, :, : self.prefix] = v

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest token of each sequence (B, kv_heads, W, d).

        Returns:
            The layer's keys and values (B, kv_heads, S, d), or those of the slots in use.
        """
        keys, values = self.keys[layer], self.values[layer]
        if self.static:
            keys.index_copy_(2, self._slots, k.to(keys.dtype))
            values.index_copy_(2, self._slots, v.to(values.dtype))
            return keys, values
        end = self._end()
        keys[:, :, end - self.width : end] = k
        values[:, :, end - self.width : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def masks(self) -> tuple[Tensor | None, Tensor | None]:
        """Masks (B, 1, W, S) of the coming step, without and with the sliding window.

        The first is None where every slot in use may be looked at; the second where no layer has
        a window.
        """
        if self.step >= self.new_tokens:
            raise ValueError(f"the cache is full: it was made for {self.new_tokens} new tokens")
        step = self._step if self.static else self.step
        end = self.lineage.shape[-1] if self.static else self._end()
        self.lineage.masked_fill_(self._own & (self._slot_step == step), 0)
        mask = self.lineage[:, None, :, :end]
        windowed = None
        if self.window is not None:
            far = self._positions[:, :end] <= self._lengths + (step - self.window)
            windowed = mask.masked_fill(far[:, None, None], -math.inf)
        if self.width == 1 and not self._padded and not self.static:
            return None, windowed
        return mask, windowed

    def positions(self) -> Tensor:
        """Positions (B, 1) int64 of the coming step's tokens."""
        return self._lengths + (self._step if self.static else self.step)

    def advance(self) -> None:
        """Go on to the next step."""
        self.step += 1
        if self.static:
            self._step.add_(1)
            self._slots.add_(self.width)

    def rewind(self) -> None:
        """Back to the state right after the prefix (the steps tried meanwhile never happened)."""
        self.step = 0
        self._step.zero_()
        first = self.prefix
        self._slots.copy_(torch.arange(first, first + self.width, device=self.device))
        self.lineage[:, :, first:] = -math.inf

    def reorder(self, parents: Tensor) -> None:
        """Let sequence w of study b go on from what was its sequence parents[b, w].

        Args:
            parents: (B, W) int64. No key or value moves.
        """
        index = parents.unsqueeze(-1).expand(-1, -1, self.lineage.shape[-1])
        self.lineage.copy_(self.lineage.gather(1, index))

    def _end(self) -> int:
        return self.prefix + (self.step + 1) * self.width


def slot_count(prefix: int, new_tokens: int, width: int, static: bool) -> int:
    """Slots of a cache."""
    slots = prefix + new_tokens * width
    return -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE if static else slots


def cache_bytes(
    config: DecoderConfig,
    *,
    batch: int,
    prefix: int,
    new_tokens: int,
    width: int = 1,
    image_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    static: bool = False,
) -> int:
    """Bytes of the keys and values of a `Cache`, known before anything is allocated.

    2 * kv_heads * head_dim * itemsize * batch * (layers * (prefix + new_tokens * width)
    + hybrid layers * image_tokens). Llama-2-7B in bf16 with a prefix of 230 tokens, 120 new ones
    and 3 beams: 295 MiB a study for the text; held once a beam, it would be 525 MiB.

    Args:
        config: of the decoder.
        batch: studies.
        prefix: tokens of the prefix.
        new_tokens: most tokens that may follow.
        width: sequences a study.
        image_tokens: image tokens a study, which the hybrid layers keep.
        dtype: of keys and values.
        static: as `Cache`.
    """
    a_token = 2 * config.kv_heads * config.width_of_head * dtype.itemsize
    slots = config.num_hidden_layers * slot_count(prefix, new_tokens, width, static)
    return a_token * batch * (slots + len(config.hybrid_layers) * image_tokens)


def additive(keep: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `keep` is True, -inf elsewhere."""
    zero = torch.zeros((), dtype=dtype, device=keep.device)
    return torch.where(keep, zero, zero - math.inf)
