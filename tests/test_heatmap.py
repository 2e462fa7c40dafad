"""The maps of a report's sentences: right tokens, right places, right picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emrrg import heatmap
from emrrg.config import ModelConfig
from emrrg.data.images import normalize
from emrrg.data.phantoms import draw_phantom, main
from emrrg.decoder import DecoderConfig
from emrrg.errors import InputError
from emrrg.heatmap import (
    AttentionMaps,
    SentenceMap,
    attention_maps,
    draw_heatmap,
    heatmap_figure,
    is_phantom,
    sentence_maps,
    split_sentences,
)
from emrrg.model import ReportGenerator
from emrrg.tokenizer import train_tokenizer

REPORT = "the heart is normal in size . the lungs are clear . no pneumothorax ."
SIZE, SIDE = 64, 4


def tiny_model(folder: Path, hybrid_layers: tuple[int, ...] = (0, 2)) -> ReportGenerator:
    reports = [draw_phantom(i, size=16).report for i in range(40)]
    tokenizer = train_tokenizer([*reports, REPORT], 200, folder / "tokenizer.model")
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        hybrid_layers=hybrid_layers,
    )
    torch.manual_seed(0)
    config = ModelConfig(image_size=SIZE, dim=32, depth=3, drop_path=0.9, decoder=decoder.to_dict())
    model = ReportGenerator(config, tokenizer).eval()
    for name, parameter in model.llama_model.named_parameters():
        if name.endswith("alpha"):
            parameter.data.fill_(0.7)  # gates as if trained
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def views(count: int) -> torch.Tensor:
    """(V, 3, S, S) uint8."""
    images = [draw_phantom(i, size=SIZE).image for i in range(count)]
    return torch.from_numpy(np.stack(images))[:, None].expand(-1, 3, -1, -1)


@torch.no_grad()
def test_maps_are_means_over_the_words_of_a_sentence(model):
    images = views(1)
    got = sentence_maps(model, images, REPORT)
    assert [s.text for s in got] == [s.strip() for s in REPORT.split(" .")[:-1]]
    ids = model.tokenizer.encode(REPORT)
    prefix = model.encode(normalize(images)[None], torch.ones(1, 1, dtype=torch.bool))
    embeds = torch.cat([prefix.embeds, model.llama_model.embed(torch.tensor([ids]))], 1)
    text = torch.cat([prefix.text_mask, torch.ones(1, len(ids), dtype=torch.bool)], 1)
    maps = []
    model.llama_model.hidden_states(embeds, vis=prefix.vis, text_mask=text, maps=maps)
    # The token at position t was chosen at t - 1.
    start = prefix.embeds.shape[1]
    words = model.tokenizer.words(ids)
    assert [w for w, _, _ in words] == REPORT.split()
    for layer in range(2):
        for number, sentence in enumerate(got):
            before = REPORT.split(" .")[:number]
            first = sum(len(s.split()) + 1 for s in before)
            own = words[first : first + len(sentence.text.split())]
            expected = torch.stack(
                [maps[layer][0, start - 1 + a : start - 1 + b].mean(0) for _, a, b in own]
            ).mean(0)
            assert sentence.class_token[layer] == pytest.approx(float(expected[8]), rel=1e-4)
            patches = torch.cat([expected[:8], expected[9:]]).reshape(SIDE, SIDE)
            np.testing.assert_allclose(sentence.layers[layer], patches.numpy(), rtol=1e-4)
    for sentence in got:
        np.testing.assert_allclose(sentence.layers.sum((1, 2)) + sentence.class_token, 1, rtol=1e-5)
        assert sentence.grid.sum() == pytest.approx(1)
        np.testing.assert_allclose(
            sentence.grid, sentence.layers.sum(0) / sentence.layers.sum(), rtol=1e-9
        )
    assert np.abs(got[0].grid - got[1].grid).max() > 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 3), (1, 2), (2, 0), (3, 3)])
def test_a_map_lies_where_its_patch_lies(model, monkeypatch, row, column):
    """The token that a patch of the image feeds is the one that is shown in its place."""
    fed = []
    block = model.visual_encoder.layers[0]
    handle = block.register_forward_pre_hook(lambda module, args: fed.append(args[0].clone()))
    plain = torch.full((1, 3, SIZE, SIZE), 90, dtype=torch.uint8)
    marked = plain.clone()
    marked[..., row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = 250
    for images in (plain, marked):
        model.encode(normalize(images)[None], torch.ones(1, 1, dtype=torch.bool))
    handle.remove()
    changed = (fed[0] - fed[1]).abs().amax((0, 2)).nonzero()[:, 0].tolist()
    assert len(changed) == 1

    def looked_there(decoder, embeds, ids, **others):
        maps = torch.zeros(2, len(ids), SIDE * SIDE + 1)
        maps[:, :, changed[0]] = 1
        return maps

    monkeypatch.setattr(heatmap, "report_maps", looked_there)
    for sentence in sentence_maps(model, plain, REPORT):
        expected = np.zeros((SIDE, SIDE))
        expected[row, column] = 1
        np.testing.assert_allclose(sentence.grid, expected)


def test_two_views_share_one_map(model):
    one, two = views(1), views(2)
    single = sentence_maps(model, one, REPORT)
    twice = sentence_maps(model, one.repeat(2, 1, 1, 1), REPORT)
    both = sentence_maps(model, two, REPORT)
    for a, b, c in zip(single, twice, both, strict=True):
        np.testing.assert_allclose(a.layers, b.layers, atol=1e-6)
        assert np.abs(a.layers - c.layers).max() > 1e-6


def test_the_model_is_left_as_it_was(model):
    expected = sentence_maps(model, views(1), REPORT)
    model.train()
    try:
        got = sentence_maps(model, views(1), REPORT)
        assert model.training and model.visual_encoder.training
        np.testing.assert_array_equal(got[0].layers, expected[0].layers)  # no dropped paths
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b . c .", ["a b", "c"]),
        ("a b. c.", ["a b", "c"]),
        ("nodule of 2.5 cm . clear", ["nodule of 2.5 cm", "clear"]),
        (" . . a .. - .", ["a"]),
        ("", []),
    ],
)
def test_sentences_end_at_full_stops(text, expected):
    words = [(word, k, k + 1) for k, word in enumerate(text.split())]
    found = split_sentences(words)
    assert [" ".join(w for w, _, _ in sentence) for sentence in found] == expected
    for sentence in found:
        for word, first, last in sentence:
            assert words[first][0].startswith(word) and last == first + 1


def test_without_hybrid_layers_nothing_looks(tmp_path):
    model = tiny_model(tmp_path, hybrid_layers=())
    with pytest.raises(InputError, match="no hybrid layers"):
        sentence_maps(model, views(1), REPORT)


def test_a_report_that_is_too_long_is_one_line(model):
    with pytest.raises(InputError, match="256"):
        sentence_maps(model, views(1), "the lungs are clear . " * 80)


def some_maps(sentences: int, views: int) -> AttentionMaps:
    rng = np.random.default_rng(0)
    found = []
    for k in range(sentences):
        shares = rng.random((2, 17)) ** 3
        shares /= shares.sum(1, keepdims=True)
        found.append(SentenceMap(f"sentence {k}", shares[:, 1:].reshape(2, 4, 4), shares[:, 0]))
    images = rng.integers(0, 255, (views, 32, 32, 3), dtype=np.uint8)
    return AttentionMaps(images, tuple(found), (0, 2), synthetic=True)


@pytest.mark.parametrize(("sentences", "count"), [(1, 1), (3, 2), (5, 1), (2, 6)])
def test_a_panel_a_sentence_over_every_view(sentences, count):
    maps = some_maps(sentences, count)
    figure = heatmap_figure(maps)
    panels = [axis for axis in figure.axes if axis.get_images()]
    assert len(panels) == sentences
    highest = max(2, *(s.grid.max() * 16 for s in maps.sentences))
    for axis, sentence in zip(panels, maps.sentences, strict=True):
        assert sentence.text in axis.get_title()
        assert f"{sentence.class_token.mean():.0%}" in axis.get_title()
        pictures, shades = axis.get_images()[::2], axis.get_images()[1::2]
        for k in range(count):
            np.testing.assert_array_equal(pictures[k].get_array(), maps.images[k])
            np.testing.assert_allclose(shades[k].get_array(), sentence.grid * 16)
            assert (
                list(shades[k].get_extent()) == list(pictures[k].get_extent()) == [k, k + 1, 1, 0]
            )
            assert shades[k].get_clim() == (0, pytest.approx(highest))
    note = " ".join(figure.get_suptitle().split())
    assert "layers 0, 2" in note and "SYNTHETIC" in note and "not a diagnosis" in note
    assert ("averaged" in note) == (count > 1)


@pytest.mark.parametrize(("sentences", "count"), [(1, 1), (6, 2), (14, 1), (30, 2)])
def test_the_figure_stays_readable(sentences, count):
    """No text over another or over a picture, pictures of one size, and not a strip."""
    long = "there is a small left pleural effusion with adjacent atelectasis , which has grown " * 2
    maps = some_maps(sentences, count)
    texts = [s.text if k % 3 else f"{s.text} {long}" for k, s in enumerate(maps.sentences)]
    found = [dataclasses.replace(s, text=t) for s, t in zip(maps.sentences, texts, strict=True)]
    figure = heatmap_figure(dataclasses.replace(maps, sentences=tuple(found)))
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    assert 0.3 < height / width < 1.6
    panels = [axis for axis in figure.axes if axis.get_images()]
    boxes = [axis.get_window_extent() for axis in panels]
    assert min(box.width for box in boxes) > 1.8 * figure.dpi * count  # inches a view
    assert max(box.width for box in boxes) < 1.01 * min(box.width for box in boxes)
    for number, (axis, text) in enumerate(zip(panels, texts, strict=True), 1):
        assert " ".join(axis.get_title().split()).startswith(f"{number}. {text.strip()} (class")
    [bar] = [axis for axis in figure.axes if axis.get_xlabel()]
    boxes += [axis.title.get_window_extent() for axis in panels]
    boxes += [bar.get_tightbbox(), figure._suptitle.get_window_extent()]
    for k, box in enumerate(boxes):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, k
        for other in boxes[:k]:
            assert min(box.x1, other.x1) <= max(box.x0, other.x0) + 1 or (
                min(box.y1, other.y1) <= max(box.y0, other.y0) + 1
            ), (k, boxes.index(other))


def test_nothing_to_draw(tmp_path):
    with pytest.raises(InputError, match="no sentence"):
        draw_heatmap(some_maps(0, 1), tmp_path / "map.png")


def test_from_files_to_a_picture(model, tmp_path):
    main(["--export", str(tmp_path), "--studies", "1", "--size", str(SIZE)])
    phantom = next((tmp_path / "images" / "test").glob("*.png"))
    other = tmp_path / "other.png"
    Image.fromarray(draw_phantom(8, size=SIZE).image).save(other)
    maps = attention_maps(model, [phantom, other], REPORT)
    assert maps.synthetic and maps.hybrid_layers == (0, 2)
    assert not attention_maps(model, [other], REPORT).synthetic
    assert maps.images.shape == (2, SIZE, SIZE, 3)
    assert (maps.images[1, :, :, 0] == draw_phantom(8, size=SIZE).image).all()
    draw_heatmap(maps, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as image:
        assert min(image.size) > 300
        assert np.asarray(image.convert("RGB")).std((0, 1)).min() > 5
    (tmp_path / "not.dcm").write_bytes(b"nothing")
    assert not is_phantom(tmp_path / "not.dcm")
