"""CheXbert's layout, on a tiny random model: equal to the same model run by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from emrrg.errors import InputError
from emrrg.metrics.chexbert import label_reports
from emrrg.metrics.clinical import OBSERVATIONS

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "effusion", "heart", "is", "."]
WORDS += ["##s", "normal", "small", "left", "edema"]

# The order of the released heads (github.com/stanfordmlgroup/CheXbert, src/constants.py).
ORDER = [
    "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices", "No Finding",
]  # fmt: skip
MEANING = {0: None, 1: 1, 2: 0, 3: -1}
REPORTS = ["No effusions.", "Small LEFT\n\neffusion .", "", "heart is normal . " * 30]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Any, list[torch.nn.Linear]]:
    """A checkpoint as it was released (DataParallel's prefix, an optimizer), and its parts."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=40,
    )
    bert = transformers.BertModel(config).eval()
    heads = [torch.nn.Linear(128, 4 if i < 13 else 2) for i in range(14)]
    with torch.no_grad():
        for weight in bert.parameters():  # far from the start, so that classes differ
            weight.add_(torch.randn_like(weight) * 0.3)
    state = {f"module.bert.{k}": v for k, v in bert.state_dict().items()}
    state["module.bert.embeddings.position_ids"] = torch.arange(40)[None]
    for i, head in enumerate(heads):
        state[f"module.linear_heads.{i}.weight"] = head.weight.detach()
        state[f"module.linear_heads.{i}.bias"] = head.bias.detach()
    checkpoint = tmp_path / "chexbert.pth"
    torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}}, checkpoint)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return checkpoint, tmp_path / "vocab.txt", bert, heads


def test_labels_are_those_of_the_model(files: Any) -> None:
    checkpoint, vocabulary, bert, heads = files
    found = label_reports(REPORTS, checkpoint, vocabulary, batch_size=3)
    index = {word: i for i, word in enumerate(WORDS)}
    tokens = [
        ["no", "effusion", "##s", "."],
        ["small", "left", "effusion", "."],
        [],
        (["heart", "is", "normal", "."] * 30)[:38],  # 40 positions, begin and end mark included
    ]
    seen = set()
    for labels, pieces in zip(found, tokens, strict=True):
        assert tuple(labels) == OBSERVATIONS
        ids = torch.tensor([[index[w] for w in ["[CLS]", *pieces, "[SEP]"]]])
        with torch.no_grad():
            first = bert(input_ids=ids).last_hidden_state[:, 0]
            for name, head in zip(ORDER, heads, strict=True):
                expected = MEANING[int(head(first).argmax())]
                assert labels[name] == expected, name
                seen.add(expected)
    assert seen == {None, 1, 0, -1}
    # In one batch or one by one, padding changes nothing.
    assert label_reports(REPORTS, checkpoint, vocabulary.parent, batch_size=1) == found


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda c, v: c.unlink(), "cannot be read"),
        (lambda c, v: v.unlink(), "no such file"),
        (lambda c, v: v.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n"), "15 word pieces.* has 4"),
        (lambda c, v: torch.save({"a": torch.zeros(2)}, c), "no CheXbert checkpoint"),
        (lambda c, v: torch.save([1], c), "no CheXbert checkpoint"),
    ],
)
def test_errors_say_what_is_wrong(files: Any, damage: Any, word: str) -> None:
    checkpoint, vocabulary, _, _ = files
    damage(checkpoint, vocabulary)
    with pytest.raises(InputError, match=word):
        label_reports(["no effusion"], checkpoint, vocabulary)


def test_a_layer_that_is_missing_is_named(files: Any) -> None:
    checkpoint, vocabulary, _, _ = files
    content = torch.load(checkpoint, weights_only=True)
    del content["model_state_dict"]["module.bert.encoder.layer.1.output.dense.bias"]
    torch.save(content, checkpoint)
    with pytest.raises(InputError, match=r"encoder\.layer\.1\.output\.dense\.bias"):
        label_reports(["no effusion"], checkpoint, vocabulary)


def test_without_transformers_the_extra_is_named(
    files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, vocabulary, _, _ = files
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'emrrg\[chexbert\]'"):
        label_reports(["no effusion"], checkpoint, vocabulary)
