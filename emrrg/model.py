"""The whole system: chest X-rays in, a report out (EMRRG, arXiv 2510.16776, section 3).

    vis  = LN(W_p mean_over_views(encoder(image)))              (B, P+1, H)
    seq  = [BOS] "Human: <Img>" vis "</Img> Generate ... \\nAssistant:" report "</s>"
    loss = mean over report tokens of -log p(token | everything before it)

The encoder is a vision Mamba (`emrrg.vision`), the decoder a Llama (`emrrg.decoder`), some of
whose layers also cross-attend to `vis`. Attribute names are those of the released checkpoints:
`visual_encoder`, `llama_proj`, `layer_norm`, `llama_model`.

Shapes: B studies, V views a study, S pixels a side, P patches, H the decoder's width, R report
tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emrrg.config import ModelConfig
from emrrg.data.dataset import collate_views
from emrrg.data.images import load_image, normalize
from emrrg.decoder import Decoder, DecoderConfig
from emrrg.errors import InputError
from emrrg.generation import GenerationConfig, generate
from emrrg.lora import add_lora
from emrrg.peft import PeftSettings, active_methods, adapter_parameter_names, add_peft
from emrrg.tokenizer import Tokenizer
from emrrg.vision import VisionMamba

IGNORED = -100  # the label of positions that do not count in the loss


@dataclass(frozen=True)
class EncodedBatch:
    """The decoder's input for a batch of studies, up to and including the prompt."""

    embeds: Tensor
    """(B, T, H): [BOS] prompt, image tokens, prompt."""
    vis: Tensor
    """(B, P+1, H): the image tokens, which the hybrid layers attend to."""
    text_mask: Tensor
    """(B, T) bool: True for text, False for image positions."""


class ReportGenerator(nn.Module):
    """A vision Mamba, a projector and a Llama that together write radiology reports.

    Args:
        config: sizes, adapters, prompt; `config.decoder` holds the fields of `DecoderConfig`.
        tokenizer: turns reports into ids; its vocabulary must not exceed the decoder's.
        decoder: a decoder that is loaded already; None builds one with random weights.
    """

    feature_mean: Tensor

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, decoder: Decoder | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.generation = GenerationConfig()
        self.visual_encoder = VisionMamba(
            image_size=config.image_size,
            patch_size=config.patch_size,
            dim=config.dim,
            depth=config.depth,
            state_dim=config.state_dim,
            drop_path=config.drop_path,
        )
        if decoder is None:
            decoder = Decoder(DecoderConfig(**config.decoder))
        self.llama_model = decoder
        hidden = decoder.config.hidden_size
        self.llama_proj = nn.Linear(config.dim, hidden)
        self.layer_norm = nn.LayerNorm(hidden)
        self.adapt(config)
        ids_before, ids_after = (tokenizer.encode(part) for part in config.prompt)
        self._ids_before = [tokenizer.bos_id, *ids_before]
        self._ids_after = ids_after

    def adapt(self, config: ModelConfig) -> None:
        """Add the adapters and the control that a configuration names, and make it the model's."""
        self.config = config
        if config.blind:
            tokens = self.visual_encoder.num_patches + 1
            zeros = torch.zeros(tokens, config.dim, device=self.device)
            self.register_buffer("feature_mean", zeros)
        elif hasattr(self, "feature_mean"):
            del self.feature_mean
        add_lora(
            self,
            config.lora_targets,
            rank=config.lora_rank,
            scale=config.lora_scale,
            dropout=config.lora_dropout,
        )
        there = active_methods(self)
        methods = [method for method in config.peft if method not in there]
        add_peft(self, methods, PeftSettings(**config.peft_settings))

    def train(self, mode: bool = True) -> ReportGenerator:
        """As `nn.Module.train`; an encoder of which nothing trains drops no paths."""
        super().train(mode)
        if not any(p.requires_grad for p in self.visual_encoder.parameters()):
            self.visual_encoder.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.llama_proj.weight.device

    def features(self, images: Tensor, view_mask: Tensor) -> Tensor:
        """Token features of each study, averaged over the views that are present.

        Args:
            images: (B, V, 3, S, S) float, normalised; absent views hold anything.
            view_mask: (B, V) bool, True where there is a view; at least one a study.
        Returns:
            (B, P+1, D).
        """
        if self.config.blind:
            return self.feature_mean.expand(len(images), -1, -1)
        if images.shape[1] == 1:
            return self.visual_encoder(images[:, 0])
        tokens = self.visual_encoder(images[view_mask])  # (views, P+1, D)
        study = view_mask.nonzero()[:, 0]
        total = tokens.new_zeros(len(images), *tokens.shape[1:]).index_add(0, study, tokens)
        return total / view_mask.sum(1).view(-1, 1, 1).to(tokens.dtype)

    def project(self, features: Tensor) -> Tensor:
        """Image features to the decoder's width: (B, P+1, D) -> (B, P+1, H)."""
        return self.layer_norm(self.llama_proj(features))

    def encode(self, images: Tensor, view_mask: Tensor) -> EncodedBatch:
        """Images to the decoder's input up to the prompt's end; arguments as `features`."""
        return self.prefix(self.features(images, view_mask))

    def prefix(self, features: Tensor) -> EncodedBatch:
        """Image features (B, P+1, D) to the decoder's input up to the prompt's end."""
        vis = self.project(features)
        before, after = (
            self.llama_model.embed(torch.tensor(ids, device=vis.device)).expand(len(vis), -1, -1)
            for ids in (self._ids_before, self._ids_after)
        )
        embeds = torch.cat([before.to(vis.dtype), vis, after.to(vis.dtype)], dim=1)
        text_mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=vis.device)
        text_mask[:, before.shape[1] : before.shape[1] + vis.shape[1]] = False
        return EncodedBatch(embeds, vis, text_mask)

    def forward(
        self,
        images: Tensor | None,
        view_mask: Tensor | None,
        report_ids: Tensor,
        features: Tensor | None = None,
    ) -> Tensor:
        """The training loss.

        Args:
            images: (B, V, 3, S, S) float, normalised; None where features are given.
            view_mask: (B, V) bool; None where features are given.
            report_ids: (B, R) int64: report, end mark, then `IGNORED` to the right.
            features: (B, P+1, D) of `features`, where they are known already.
        Returns:
            () fp32: cross-entropy averaged over report tokens, the end mark included.
        """
        if features is None:
            assert images is not None and view_mask is not None
            features = self.features(images, view_mask)
        prefix = self.prefix(features)
        inputs = report_ids[:, :-1].clamp(min=0)  # what is ignored as a label is never seen either
        report = self.llama_model.embed(inputs).to(prefix.embeds.dtype)
        embeds = torch.cat([prefix.embeds, report], dim=1)
        text_mask = torch.cat([prefix.text_mask, torch.ones_like(inputs, dtype=torch.bool)], dim=1)
        hidden = self.llama_model.hidden_states(embeds, vis=prefix.vis, text_mask=text_mask)
        return self.llama_model.loss(hidden[:, prefix.embeds.shape[1] - 1 :], report_ids)

    def report_ids(self, reports: Sequence[str]) -> Tensor:
        """Reports to labels: cut to `max_report_tokens`, end mark, padded with `IGNORED`.

        Returns:
            (B, R) int64 on the CPU.
        """
        rows = [self.report_row(report) for report in reports]
        width = max(map(len, rows), default=1)
        return torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows])

    def report_row(self, report: str) -> list[int]:
        """Ids of one report: cut to `max_report_tokens`, then the end mark."""
        limit = self.config.max_report_tokens
        return [*self.tokenizer.encode(report)[:limit], self.tokenizer.eos_id]

    @torch.inference_mode()
    def generate_batch(
        self, images: Tensor, view_mask: Tensor, generation: GenerationConfig | None = None
    ) -> list[str]:
        """Write one report a study; arguments as `features`, on the model's device."""
        prefix = self.encode(images, view_mask)
        mask = torch.ones(prefix.embeds.shape[:2], dtype=torch.long, device=prefix.embeds.device)
        ids = generate(
            self.llama_model,
            prefix.embeds,
            mask,
            vis=prefix.vis,
            text_mask=prefix.text_mask,
            config=self.generation_config(generation),
        )
        return [self.tokenizer.decode(row) for row in ids]

    def generation_config(self, generation: GenerationConfig | None = None) -> GenerationConfig:
        """The generation settings with this tokenizer's end and padding ids filled in."""
        return dataclasses.replace(
            generation or self.generation,
            eos_token_id=self.tokenizer.eos_id,
            pad_token_id=self.tokenizer.pad_id,
        )

    def load_views(self, paths: Sequence[str | Path]) -> Tensor:
        """Read the images of one study: (V, 3, S, S) uint8 on the CPU."""
        size = self.config.image_size
        views = [
            np.ascontiguousarray(load_image(path, size, fit=self.config.fit)) for path in paths
        ]
        return torch.stack([torch.from_numpy(v).permute(2, 0, 1) for v in views])

    def generate(self, studies: Sequence[Sequence[str | Path]], **settings: Any) -> list[str]:
        """Write a report for each study.

        Args:
            studies: for each study the paths of its views (PNG, JPEG, DICOM, ...).
            **settings: fields of `GenerationConfig` to change, such as ``num_beams=1``; end and
                padding marks are the tokenizer's.
        Returns:
            `num_return_sequences` reports a study (1 where it is not asked for), study by study.
        Raises:
            InputError: an image is missing or broken (the message names it), a study without views
                or given as one path, or a setting that does not exist or cannot be.
        """
        if not studies:
            return []
        for i, paths in enumerate(studies):
            if isinstance(paths, str | Path) or not paths:
                raise InputError(
                    f"studies[{i}]: {str(paths)!r} is no list of views; "
                    'one study of two views is [["a.png", "b.png"]]'
                )
        fixed = ("eos_token_id", "pad_token_id")
        free = [f.name for f in dataclasses.fields(GenerationConfig) if f.name not in fixed]
        for name in settings:
            if name in fixed:
                raise InputError(f"{name}: is the tokenizer's to say")
            if name not in free:
                raise InputError(f"{name}: is no such setting; there are {', '.join(free)}")
        training = self.training
        self.eval()
        try:
            batch, mask = collate_views([self.load_views(paths) for paths in studies])
            images = normalize(batch.to(self.device))
            return self.generate_batch(
                images, mask.to(self.device), dataclasses.replace(self.generation, **settings)
            )
        finally:
            self.train(training)


def set_regime(model: ReportGenerator, regime: str) -> list[str]:
    """Decide what trains; everything else is frozen (SPEC: regimes).

    Args:
        model: the system.
        regime: ``peft`` (adapters, projector, hybrid layers), ``full`` (everything), ``encoder``
            (encoder, projector, hybrid layers) or ``linear-probe`` (projector alone).
    Returns:
        Names of the trainable parameters.
    """
    decoder = getattr(model, "llama_model", None)
    hybrid = {f"llama_model.{n}" for n in decoder.hybrid_parameter_names()} if decoder else set()
    adapters = set(adapter_parameter_names(model))
    trained = []
    for name, parameter in model.named_parameters():
        projector = name.startswith(("llama_proj.", "layer_norm."))
        wanted = {
            "peft": projector or name in hybrid or name in adapters,
            "full": True,
            "encoder": projector or name in hybrid or name.startswith("visual_encoder."),
            "linear-probe": projector,
        }[regime]
        if model.config.blind and name.startswith("visual_encoder."):
            wanted = False  # nothing would reach it
        parameter.requires_grad_(wanted)
        if wanted:
            trained.append(name)
    return trained
