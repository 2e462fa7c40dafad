"""Writing text with a `Decoder`: greedy, beam search, sampling.

The rules are those of Hugging Face ``generate(inputs_embeds=...)``, so that the same weights and
settings give the same tokens: repetition penalty and n-grams look at generated tokens only; beam
search keeps ``max(2, 1 + end marks) * beams`` candidates, penalises log-probabilities (greedy and
sampling: logits), divides the score of a finished report by ``length ** length_penalty``, and
stops by the same heuristics.

A study's prefix is computed and held once for all its beams (`emrrg.decoder.Cache`).

Shapes: B studies, W sequences a study (beams or samples), V vocabulary, N new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emrrg.cache import Cache
from emrrg.decoder import Decoder
from emrrg.errors import InputError

WORST = -1.0e9  # the score of a candidate that must not be chosen
BLOCK = 1024  # candidates of which `largest` first looks at the best


@dataclass(frozen=True)
class GenerationConfig:
    """How to write; field names and meanings are Hugging Face's."""

    num_beams: int = 1
    """Beams; 1: greedy, or plain sampling."""
    min_new_tokens: int = 0
    """No end mark before so many tokens."""
    max_new_tokens: int = 120
    """Most tokens, the end mark included."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already generated become less likely."""
    length_penalty: float = 1.0
    """Power of the length by which a finished beam's log-probability is divided."""
    no_repeat_ngram_size: int = 0
    """No sequence of so many tokens occurs twice; 0: no such rule."""
    early_stopping: bool | Literal["never"] = False
    """True: stop at so many finished reports as beams; never: only when none can become better."""
    do_sample: bool = False
    """Draw tokens at random instead of taking the likeliest."""
    temperature: float = 1.0
    """Sampling: logits are divided by it."""
    top_k: int = 0
    """Sampling: among so many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sampling: among the likeliest tokens whose probabilities first sum to it."""
    num_return_sequences: int = 1
    """Reports a study: the best beams, or independent samples."""
    eos_token_id: int | tuple[int, ...] | None = 2
    """End marks; None: always `max_new_tokens`."""
    pad_token_id: int | None = None
    """Fills the rows of finished reports; None: the first end mark."""

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):  # from JSON
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        for name in ("num_beams", "max_new_tokens", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: {getattr(self, name)} is not at least 1")
        for name in ("min_new_tokens", "no_repeat_ngram_size", "top_k"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}: {getattr(self, name)} is below 0")
        for name in ("repetition_penalty", "temperature", "top_p"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}: {getattr(self, name)} is not above 0")
        if self.top_p > 1:
            raise InputError(f"top_p: {self.top_p} is above 1")
        if not math.isfinite(self.length_penalty):
            raise InputError(f"length_penalty: {self.length_penalty} is not a finite number")
        if self.early_stopping not in (True, False, "never"):
            raise InputError(f"early_stopping: {self.early_stopping!r} is not True, False or never")
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens: {self.min_new_tokens} is above max_new_tokens "
                f"{self.max_new_tokens}"
            )
        if self.num_return_sequences > 1:
            if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
                raise InputError(
                    f"num_return_sequences: {self.num_return_sequences} is above num_beams "
                    f"{self.num_beams}"
                )
            if self.num_beams == 1 and not self.do_sample:
                raise InputError(
                    f"num_return_sequences: {self.num_return_sequences} greedy reports would be "
                    "the same; give num_beams or do_sample"
                )

    @property
    def end_marks(self) -> tuple[int, ...]:
        """The end marks as a tuple."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def fill(self) -> int:
        """What fills the rows of finished reports."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.end_marks[0] if self.end_marks else 0


@dataclass(frozen=True)
class Generated:
    """One report."""

    ids: list[int]
    """Tokens without the end mark."""
    finished: bool
    """Whether it came to an end mark before `max_new_tokens`."""
    score: float
    """Beam search: log-probability / length ** length_penalty; otherwise the sum of the
    log-probabilities after penalties and filters."""


def generate(
    decoder: Decoder,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    *,
    vis: Tensor | None = None,
    vis_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    generator: torch.Generator | None = None,
    static: bool | None = None,
) -> list[list[int]]:
    """Write reports; see `generate_sequences` for arguments and errors.

    Returns:
        The token ids of each report without its end mark; `num_return_sequences` reports a study,
        study by study, the best first.
    """
    reports = generate_sequences(
        decoder,
        inputs_embeds,
        attention_mask,
        vis=vis,
        vis_mask=vis_mask,
        text_mask=text_mask,
        config=config,
        generator=generator,
        static=static,
    )
    return [report.ids for report in reports]


@torch.inference_mode()
def generate_sequences(
    decoder: Decoder,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    *,
    vis: Tensor | None = None,
    vis_mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    config: GenerationConfig | None = None,
    generator: torch.Generator | None = None,
    static: bool | None = None,
) -> list[Generated]:
    """Write reports that go on from a prefix.

    Args:
        decoder: the language model.
        inputs_embeds: (B, T, H) embeddings of the prefix: prompt and image.
        attention_mask: (B, T), nonzero where there is a token; prefixes of unequal length stand at
            the right end. None: no pads.
        vis: (B, I, H) image tokens for the hybrid layers.
        vis_mask: (B, I), nonzero where there is an image token.
        text_mask: (B, T) bool, True where a position of the prefix receives the image; generated
            tokens always do.
        config: how to write.
        generator: source of chance for sampling; None: torch's own.
        static: decoding steps of one shape, which on CUDA are captured once as a graph and
            replayed; None: on CUDA yes, elsewhere no.
    Returns:
        `num_return_sequences` reports a study, study by study, the best first.
    Raises:
        InputError: prefix and new tokens exceed max_position_embeddings; an end mark or padding
            outside the vocabulary; a prefix that is empty or ends in a pad.
        ValueError: shapes disagree.
    """
    config = config or GenerationConfig()
    batch, length = inputs_embeds.shape[:2]
    marks = [("eos_token_id", mark) for mark in config.end_marks]
    for name, mark in [*marks, ("pad_token_id", config.fill)]:
        if not 0 <= mark < decoder.config.vocab_size:
            raise InputError(
                f"{name}: {mark} is not in the vocabulary, 0 to {decoder.config.vocab_size - 1}"
            )
    if length == 0:
        raise InputError("inputs_embeds: the prefix is empty; give at least a begin mark")
    if attention_mask is not None and not bool((attention_mask[:, -1] != 0).all()):
        raise InputError("attention_mask: a prefix ends in a pad; put the pads on the left")
    if batch == 0:
        return []
    width = config.num_beams if config.num_beams > 1 else config.num_return_sequences
    if static is None:
        static = inputs_embeds.device.type == "cuda" and not decoder.sharded
    cache = decoder.new_cache(batch, length, config.max_new_tokens, width, static=static)
    hidden = decoder.hidden_states(
        inputs_embeds, attention_mask, vis=vis, vis_mask=vis_mask, text_mask=text_mask, cache=cache
    )
    first = decoder.logits(hidden[:, -1:]).expand(-1, width, -1)  # (B, W, V)
    search = beam_search if config.num_beams > 1 else choose_one_by_one
    return search(Step(decoder, cache), first, config, generator)


class Step:
    """One decoding step: the newest token of every sequence in, logits of the next one out.

    With a static cache on CUDA the first call captures the step as a graph, later calls replay it.

    Args:
        decoder: the language model.
        cache: filled with the prefix.
    """

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        self.decoder = decoder
        self.cache = cache
        self.graphed = cache.static and cache.device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tokens = torch.zeros(cache.batch, cache.width, dtype=torch.long, device=cache.device)
        self._logits = torch.empty(0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """(B, W) int64 to (B, W, V); with a graph the result is overwritten by the next call."""
        if not self.graphed:
            return self._run(tokens)
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._tokens.copy_(tokens)
        self._graph.replay()
        self.cache.step += 1
        return self._logits

    def _run(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.decoder.embed(tokens), cache=self.cache)

    def _capture(self) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):  # libraries choose their kernels and workspaces
                self._run(self._tokens)
                self.cache.rewind()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._run(self._tokens)
        self.cache.rewind()
        self._graph = graph


def choose_one_by_one(
    advance: Step,
    logits: Tensor,
    config: GenerationConfig,
    generator: torch.Generator | None,
) -> list[Generated]:
    """Greedy decoding or sampling: every sequence for itself.

    Args:
        advance: one decoding step.
        logits: (B, W, V) after the prefix.
        config: how to write.
        generator: source of chance.
    """
    batch, width, _ = logits.shape
    rows = batch * width
    ends = torch.tensor(config.end_marks, dtype=torch.long, device=logits.device)
    tokens = torch.full((rows, config.max_new_tokens), config.fill, device=logits.device)
    running = torch.ones(rows, dtype=torch.bool, device=logits.device)
    score = torch.zeros(rows, device=logits.device)
    for step in range(config.max_new_tokens):
        scores = logits.reshape(rows, -1).float()
        scores = penalise(scores, tokens[:, :step], ends, config)
        if config.do_sample:
            scores = restrict(scores, config, keep=1)
            chances = scores.softmax(-1)
            chosen = torch.multinomial(chances, 1, generator=generator)[:, 0]
        else:
            chosen = scores.argmax(-1)
        gained = scores.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        score = torch.where(running, score + gained, score)
        tokens[:, step] = torch.where(running, chosen, tokens[:, step])
        running = running & ~torch.isin(chosen, ends)
        if step + 1 == config.max_new_tokens or not running.any():
            break
        logits = advance(tokens[:, step].view(batch, width))
    return [
        cut(row, config.end_marks, value)
        for row, value in zip(tokens.tolist(), score.tolist(), strict=True)
    ]


def beam_search(
    advance: Step,
    logits: Tensor,
    config: GenerationConfig,
    generator: torch.Generator | None,
) -> list[Generated]:
    """Beam search; arguments as `choose_one_by_one`.

    Running beams and finished reports are kept apart, W of each a study. A candidate that reaches
    its end competes with the finished ones only if it is among the W best candidates of its step;
    the running beams go on with the best candidates that did not end.
    """
    batch, width, vocabulary = logits.shape
    device = logits.device
    limit = config.max_new_tokens
    ends = torch.tensor(config.end_marks, dtype=torch.long, device=device)
    count = min(max(2, 1 + len(config.end_marks)) * width, width * vocabulary)
    first_ones = torch.arange(count, device=device) < width
    running = torch.full((batch, width, limit), config.fill, device=device)
    finished = running.clone()
    running_score = torch.zeros(batch, width, device=device)
    running_score[:, 1:] = WORST  # all beams are alike at first: only one may branch
    finished_score = torch.full((batch, width), WORST, device=device)
    finished_length = torch.zeros(batch, width, dtype=torch.long, device=device)
    complete = torch.zeros(batch, width, dtype=torch.bool, device=device)
    hopeful = torch.ones(batch, 1, dtype=torch.bool, device=device)

    for step in range(limit):
        scores = logits.reshape(batch * width, vocabulary).float().log_softmax(-1)
        scores = penalise(scores, running[:, :, :step].reshape(batch * width, step), ends, config)
        if config.do_sample:
            scores = restrict(scores, config, keep=max(2, 1 + len(config.end_marks)))
        total = scores.view(batch, width, vocabulary) + running_score[:, :, None]
        total = total.view(batch, -1)
        if config.do_sample:
            place = torch.multinomial(total.softmax(-1), count, generator=generator)
            best, order = total.gather(1, place).sort(dim=-1, descending=True)
            place = place.gather(1, order)
        else:
            best, place = largest(total, count)
        parent, token = place // vocabulary, place % vocabulary  # (B, count)
        ended = torch.isin(token, ends)
        if step + 1 == limit:
            ended = torch.ones_like(ended)

        # The running beams: the best candidates that did not end.
        running_score, keep = (best + ended * WORST).topk(width)
        origin = parent.gather(1, keep)
        grown = pick(running, origin)
        grown[:, :, step] = token.gather(1, keep)

        # The finished reports: old ones and the new ones among the first W candidates.
        value = best / (step + 1) ** config.length_penalty
        if config.early_stopping is True:
            value = value + complete.all(-1, keepdim=True) * WORST
        arrived = ended & first_ones
        value = value + ~hopeful * WORST
        value = value + ~arrived * WORST
        candidates = pick(running, parent)
        candidates[:, :, step] = token
        finished_score, keep = torch.cat([finished_score, value], 1).topk(width)
        finished = pick(torch.cat([finished, candidates], 1), keep)
        lengths = torch.full_like(parent, step + 1)
        finished_length = torch.cat([finished_length, lengths], 1).gather(1, keep)
        complete = torch.cat([complete, arrived], 1).gather(1, keep)
        running = grown

        # Can a running beam still become better than the worst finished report?
        horizon = step + 1
        if config.early_stopping == "never" and config.length_penalty > 0:
            horizon = limit
        possible = running_score[:, :1] / horizon**config.length_penalty
        worst = torch.where(complete, finished_score.amin(1, keepdim=True), WORST)
        hopeful = hopeful & (possible > worst).any(-1, keepdim=True)
        full = config.early_stopping is True and bool(complete.all())
        if step + 1 == limit or full or not bool(hopeful.any()):
            break
        advance.cache.reorder(origin)
        logits = advance(running[:, :, step])

    kept = config.num_return_sequences
    rows = zip(
        finished[:, :kept].flatten(0, 1).tolist(),
        finished_length[:, :kept].flatten().tolist(),
        finished_score[:, :kept].flatten().tolist(),
        strict=True,
    )
    return [cut(row[:length], config.end_marks, value) for row, length, value in rows]


def largest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`x.topk(count)` of (B, M), on the CPU for a large M in a seventh of its time.

    The largest numbers lie in those blocks whose largest numbers are largest.
    """
    rows, length = x.shape
    blocks = length // BLOCK
    if x.device.type != "cpu" or blocks <= 2 * count:
        return x.topk(count)
    whole = blocks * BLOCK
    cut_up = x[:, :whole].unflatten(1, (blocks, BLOCK))
    chosen = cut_up.amax(-1).topk(count).indices[:, :, None]
    places = torch.cat(
        [
            (chosen * BLOCK + torch.arange(BLOCK)).flatten(1),
            torch.arange(whole, length).expand(rows, -1),
        ],
        dim=1,
    )
    values, index = x.gather(1, places).topk(count)
    return values, places.gather(1, index)


def pick(sequences: Tensor, index: Tensor) -> Tensor:
    """Rows (B, M, N) of `sequences` (B, W, N) by `index` (B, M)."""
    return sequences.gather(1, index[:, :, None].expand(-1, -1, sequences.shape[2]))


def cut(row: Sequence[int], ends: Sequence[int], score: float) -> Generated:
    """A report up to its first end mark."""
    for place, token in enumerate(row):
        if token in ends:
            return Generated(list(row[:place]), True, score)
    return Generated(list(row), False, score)


def penalise(scores: Tensor, tokens: Tensor, ends: Tensor, config: GenerationConfig) -> Tensor:
    """Apply repetition penalty, n-gram rule and shortest length, in this order.

    Args:
        scores: (rows, V) fp32 logits or log-probabilities; not written to.
        tokens: (rows, n) int64, what is generated so far.
        ends: (E,) int64 end marks.
        config: how to write.
    Returns:
        (rows, V) fp32.
    """
    step = tokens.shape[1]
    if config.repetition_penalty != 1.0 and step:
        used = scores.gather(1, tokens)
        p = config.repetition_penalty
        scores = scores.scatter(1, tokens, torch.where(used < 0, used * p, used / p))
    if 0 < config.no_repeat_ngram_size <= step:
        scores = forbid_repeated_ngrams(scores, tokens, config.no_repeat_ngram_size)
    if step < config.min_new_tokens and len(ends):
        scores = scores.index_fill(1, ends, -math.inf)
    return scores


def forbid_repeated_ngrams(scores: Tensor, tokens: Tensor, size: int) -> Tensor:
    """-inf for every token that would complete an n-gram of `size` tokens for a second time."""
    windows = tokens.unfold(1, size, 1)  # (rows, places, size)
    recent = tokens[:, tokens.shape[1] + 1 - size :]  # (rows, size - 1)
    again = (windows[:, :, :-1] == recent[:, None]).all(-1)
    last = windows[:, :, -1]
    banned = torch.zeros_like(scores, dtype=torch.int32).scatter_add_(1, last, again.int())
    return scores.masked_fill(banned > 0, -math.inf)


def restrict(scores: Tensor, config: GenerationConfig, keep: int) -> Tensor:
    """Temperature, top-k and top-p; at least `keep` tokens stay possible."""
    if config.temperature != 1.0:
        scores = scores / config.temperature
    if config.top_k:
        k = min(max(config.top_k, keep), scores.shape[-1])
        scores = scores.masked_fill(scores < scores.topk(k).values[:, -1:], -math.inf)
    if config.top_p < 1.0:
        ascending, order = scores.sort(descending=False)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - config.top_p
        tail[:, -keep:] = False
        scores = scores.masked_fill(torch.zeros_like(tail).scatter(1, order, tail), -math.inf)
    return scores


@torch.inference_mode()
def report_maps(
    decoder: Decoder,
    inputs_embeds: Tensor,
    ids: Sequence[int],
    *,
    vis: Tensor,
    text_mask: Tensor | None = None,
) -> Tensor:
    """Where each hybrid layer looked while it wrote a report, token by token.

    The report is read again in one pass; the map of a token is that of the position before it,
    which chose it.

    Args:
        decoder: the language model.
        inputs_embeds: (1, T, H) embeddings of the prefix, without pads.
        ids: the report's tokens, n of them.
        vis: (1, I, H) image tokens.
        text_mask: (1, T) bool, True where a position of the prefix receives the image.
    Returns:
        (hybrid layers, n, I) fp32, averaged over heads; the last axis sums to 1.
    Raises:
        InputError: the decoder has no hybrid layers, or too few positions.
        ValueError: more than one study, or shapes disagree.
    """
    if not decoder.config.hybrid_layers:
        raise InputError("the decoder has no hybrid layers, so nothing looks at the image")
    if len(inputs_embeds) != 1:
        raise ValueError(f"inputs_embeds: expected one study, got {len(inputs_embeds)}")
    if not ids:
        return vis.new_zeros(len(decoder.config.hybrid_layers), 0, vis.shape[1]).float()
    seen = torch.tensor([list(ids[:-1])], dtype=torch.long, device=inputs_embeds.device)
    embeds = torch.cat([inputs_embeds, decoder.embed(seen).to(inputs_embeds.dtype)], dim=1)
    if text_mask is not None:
        text_mask = torch.cat([text_mask, torch.ones_like(seen, dtype=text_mask.dtype)], dim=1)
    maps: list[Tensor] = []
    decoder.hidden_states(embeds, vis=vis, text_mask=text_mask, maps=maps)
    return torch.stack([m[0, inputs_embeds.shape[1] - 1 :] for m in maps])


def word_maps(maps: Tensor, words: Sequence[tuple[str, int, int]]) -> Tensor:
    """Average the maps of each word's tokens.

    Args:
        maps: (..., n, I) from `report_maps`.
        words: from `Tokenizer.words`, of the same n tokens.
    Returns:
        (..., words, I).
    """
    if not words:
        return maps[..., :0, :]
    return torch.stack([maps[..., a:b, :].mean(-2) for _, a, b in words], dim=-2)
