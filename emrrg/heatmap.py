"""Where the hybrid layers looked while a report was written, sentence by sentence.

The report is read again in one pass; each token has, in each hybrid layer, an attention map over
the image tokens (averaged over heads). A sentence's map is the mean over its words of the means
over their tokens. Two things to keep in mind: a vision Mamba mixes its tokens, so a patch's token
knows more than its patch; and attention says what was read, not what it was worth.

Shapes: V views a study, S pixels a side, G patches a side, L hybrid layers.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from emrrg.data.images import normalize
from emrrg.data.phantoms import NOTICE
from emrrg.errors import InputError
from emrrg.generation import report_maps, word_maps
from emrrg.model import ReportGenerator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Words = Sequence[tuple[str, int, int]]

COLUMNS = 4  # views beside each other, more where the figure would become tall
TALLEST = 1.25  # height of a figure over its width
SIDE = 2.6  # inches a view
LINE = 0.14  # inches a line of text
LONGEST = 220  # characters of a sentence that are shown, a view


@dataclass(frozen=True)
class SentenceMap:
    """One sentence and where the hybrid layers looked while they wrote it."""

    text: str
    """Words joined by blanks, without the stop."""
    layers: Array
    """(L, G, G): share of the attention on each patch, rows from top to bottom."""
    class_token: Array
    """(L,): share on the class token, which has no place; with `layers` it sums to 1."""

    @property
    def grid(self) -> Array:
        """(G, G): mean over the layers, scaled to sum to 1 over the patches."""
        mean = self.layers.mean(0)
        return mean / mean.sum()


@dataclass(frozen=True)
class AttentionMaps:
    """A study with the maps of its report."""

    images: NDArray[np.uint8]
    """(V, S, S, 3) as the model saw them."""
    sentences: tuple[SentenceMap, ...]
    hybrid_layers: tuple[int, ...]
    """The decoder layers that looked."""
    synthetic: bool = False
    """Whether a view is a phantom."""


def attention_maps(
    model: ReportGenerator, views: Sequence[str | Path], report: str
) -> AttentionMaps:
    """Read a report again and note where each sentence looked.

    Args:
        model: the system.
        views: image files, all of one study.
        report: what to read: a generated report, or any other text.
    Raises:
        InputError: the decoder has no hybrid layers, an image is missing or broken, or the report
            is longer than the decoder's positions.
    """
    images = model.load_views(views)
    return AttentionMaps(
        images.permute(0, 2, 3, 1).numpy(),
        tuple(sentence_maps(model, images, report)),
        tuple(model.llama_model.config.hybrid_layers),
        any(is_phantom(path) for path in views),
    )


@torch.inference_mode()
def sentence_maps(model: ReportGenerator, images: Tensor, report: str) -> list[SentenceMap]:
    """The maps of a report's sentences.

    Args:
        model: the system; it is put into evaluation mode meanwhile.
        images: (V, 3, S, S) uint8, the views of one study.
        report: what to read.
    Raises:
        InputError: the decoder has no hybrid layers, or the report is longer than its positions.
    """
    ids = model.tokenizer.encode(report)
    training = model.training
    model.eval()
    try:
        pixels = normalize(images.to(model.device))[None]
        mask = torch.ones(pixels.shape[:2], dtype=torch.bool, device=model.device)
        prefix = model.encode(pixels, mask)
        maps = report_maps(
            model.llama_model, prefix.embeds, ids, vis=prefix.vis, text_mask=prefix.text_mask
        )  # (L, tokens, P+1)
    finally:
        model.train(training)
    found = []
    for sentence in split_sentences(model.tokenizer.words(ids)):
        mean = word_maps(maps, sentence).mean(-2).double().cpu().numpy()  # (L, P+1)
        middle = (mean.shape[1] - 1) // 2  # where the class token stands
        patches = np.delete(mean, middle, axis=1)
        side = math.isqrt(patches.shape[1])
        text = " ".join(word for word, _, _ in sentence)
        found.append(SentenceMap(text, patches.reshape(-1, side, side), mean[:, middle]))
    return found


def split_sentences(words: Words) -> list[list[tuple[str, int, int]]]:
    """Divide words at full stops, alone (" . ") or at a word's end ("clear.").

    Args:
        words: from `emrrg.tokenizer.Tokenizer.words`.
    Returns:
        The words of each sentence without the stops; sentences without a letter or digit are left
        out.
    """
    sentences: list[list[tuple[str, int, int]]] = [[]]
    for word, first, last in words:
        if bare := word.rstrip("."):
            sentences[-1].append((bare, first, last))
        if word.endswith("."):
            sentences.append([])
    return [s for s in sentences if any(c.isalnum() for word, _, _ in s for c in word)]


def is_phantom(path: str | Path) -> bool:
    """Whether an image file says of itself that it is synthetic (`emrrg.data.phantoms`)."""
    try:
        with Image.open(path) as image:
            return image.info.get("Comment") == NOTICE
    except (OSError, Image.DecompressionBombError):  # not for Pillow to read, as DICOM
        return False


def draw_heatmap(maps: AttentionMaps, path: Path) -> None:
    """Write `heatmap_figure` to a PNG.

    Args:
        maps: from `attention_maps`.
        path: the file.
    Raises:
        InputError: the report has no sentence.
        OSError: the file cannot be written.
    """
    heatmap_figure(maps).savefig(path, dpi=110)


def heatmap_figure(maps: AttentionMaps) -> Figure:
    """Draw a panel a sentence: the views beside each other, the sentence's map over each.

    Panels are numbered in the order of the sentences; many make the figure wider as well as taller.
    All share one scale, in multiples of an even spread over the patches, up to 2 at least: so a map
    that is all but even looks it.

    Args:
        maps: from `attention_maps`.
    Raises:
        InputError: the report has no sentence.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not maps.sentences:
        raise InputError("the report has no sentence, so there is nothing to show a map of")
    views, count = len(maps.images), len(maps.sentences)
    titles = []
    for number, sentence in enumerate(maps.sentences, 1):
        text = textwrap.shorten(sentence.text, LONGEST * views, placeholder=" ...")
        share = f"class token {float(sentence.class_token.mean()):.0%}"
        titles.append(f"{textwrap.fill(f'{number}. {text}', 40 * views)}\n({share})")
    named = ", ".join(map(str, maps.hybrid_layers))
    note = (
        f"Where decoder layers {named} looked for each sentence (mean over layers, heads, words). "
        "For research only: attention is not an explanation, and generated text is not a diagnosis."
    )
    if views > 1:
        note += " The features of the views are averaged: the maps are the same over each."
    if maps.synthetic:
        note = f"SYNTHETIC image. {note}"

    row = SIDE + LINE * (2 + max(title.count("\n") for title in titles))
    columns = min(count, max(1, COLUMNS // views))
    while columns < count and row * math.ceil(count / columns) > TALLEST * SIDE * views * columns:
        columns += 1
    rows = math.ceil(count / columns)
    width = max(SIDE * views * columns, 5.0)
    note = textwrap.fill(note, int(width * 14))
    height = row * rows + LINE * note.count("\n") + 1.2
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    spread = maps.sentences[0].grid.size
    grids = [sentence.grid * spread for sentence in maps.sentences]
    highest = max(2.0, *(float(grid.max()) for grid in grids))
    shades = None
    for axis, title, grid in zip(axes.flat, titles, grids, strict=False):
        for k, image in enumerate(maps.images):
            place = (k, k + 1, 1, 0)
            axis.imshow(image, extent=place)
            shades = axis.imshow(
                grid,
                extent=place,
                cmap="inferno",
                alpha=0.45,
                vmin=0,
                vmax=highest,
                interpolation="bilinear",
            )
        axis.set(xlim=(0, views), ylim=(1, 0))
        axis.set_title(title, fontsize=8)
    assert shades is not None
    scale = figure.colorbar(
        shades, ax=axes, location="top", shrink=4 / width, aspect=32, fraction=0.4 / height
    )
    scale.set_label("attention, in multiples of an even spread", fontsize=8)
    scale.ax.tick_params(labelsize=8)
    figure.suptitle(note, fontsize=8)
    return figure
