"""CheXbert (Smit et al. 2020, arXiv 2004.09167) as a labeler, from a checkpoint on this machine.

The checkpoint is a BERT (12 layers of bert-base-uncased in the released one; the sizes are read
from the weights) and 14 linear heads on the first token: 13 with the classes blank, positive,
negative and uncertain, and one, "No Finding", with blank and positive. Needs the optional package
`transformers` and BERT's vocabulary (``vocab.txt``). Nothing is downloaded; the checkpoint is read
without running what it holds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emrrg.errors import InputError
from emrrg.metrics.labeler import OBSERVATIONS

if TYPE_CHECKING:
    from torch import Tensor

NAME = "CheXbert"
HEADS: tuple[str, ...] = (*OBSERVATIONS[1:], OBSERVATIONS[0])
"""Observations in the order of the checkpoint's heads."""

CLASSES: tuple[int | None, ...] = (None, 1, 0, -1)
"""Labels in the order of a head's outputs."""

_HEAD_WIDTH = 64  # of an attention head, in every BERT


def label_reports(
    reports: Sequence[str],
    checkpoint: str | Path,
    vocabulary: str | Path,
    *,
    batch_size: int = 32,
    device: str = "cpu",
) -> list[dict[str, int | None]]:
    """Label reports with CheXbert.

    Args:
        reports: texts; CheXbert was trained on impressions.
        checkpoint: ``chexbert.pth``.
        vocabulary: BERT's ``vocab.txt``, or the folder that holds it.
        batch_size: reports at a time.
        device: where the model runs.
    Returns:
        For each report observation to 1, 0, -1 (uncertain) or None (not mentioned).
    Raises:
        InputError: `transformers` is not installed, or a file is missing or not what it should be.
    """
    try:
        import transformers  # noqa: F401  it brings tokenizers
        from tokenizers import BertWordPieceTokenizer
    except ImportError:
        raise InputError(
            "CheXbert needs the package transformers: pip install 'emrrg[chexbert]'"
        ) from None
    import torch

    path = Path(vocabulary)
    path = path / "vocab.txt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such file (BERT's vocabulary, one word piece a line)")
    tokenizer = BertWordPieceTokenizer(str(path), lowercase=True)
    model, heads = _load(Path(checkpoint), tokenizer.get_vocab_size())
    model.to(device)
    tokenizer.enable_truncation(model.config.max_position_embeddings)
    tokenizer.enable_padding()
    labels: list[dict[str, int | None]] = []
    with torch.inference_mode():
        for start in range(0, len(reports), batch_size):
            texts = [" ".join(text.split()) for text in reports[start : start + batch_size]]
            encoded = tokenizer.encode_batch(texts)
            first = model(
                input_ids=torch.tensor([one.ids for one in encoded], device=device),
                attention_mask=torch.tensor([one.attention_mask for one in encoded], device=device),
            ).last_hidden_state[:, 0]
            classes = torch.stack(
                [(first @ w.to(device).T + b.to(device)).argmax(1) for w, b in heads], dim=1
            )
            labels += [
                {HEADS[i]: CLASSES[c] for i, c in enumerate(row)} for row in classes.tolist()
            ]
    return [{name: row[name] for name in OBSERVATIONS} for row in labels]


def _load(path: Path, words: int) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """The BERT of a checkpoint, ready to run, and its heads (weight, bias)."""
    from transformers import BertConfig, BertModel

    from emrrg.unpickling import PickledFile, TensorRecord

    file = PickledFile(path)
    content = file.content
    state = content.get("model_state_dict", content) if isinstance(content, dict) else {}
    records = {
        str(key).removeprefix("module."): value
        for key, value in state.items()
        if isinstance(value, TensorRecord)
    }
    tensors = {key: value.float() for key, value in file.tensors(records).items()}
    try:
        heads = [
            (tensors[f"linear_heads.{i}.weight"], tensors[f"linear_heads.{i}.bias"])
            for i in range(len(HEADS))
        ]
        table = tensors["bert.embeddings.word_embeddings.weight"]
        inner = tensors["bert.encoder.layer.0.intermediate.dense.weight"]
        positions = tensors["bert.embeddings.position_embeddings.weight"]
    except KeyError as error:
        raise InputError(f"{path}: is no CheXbert checkpoint: no {error.args[0]!r} in it") from None
    if len(table) != words:
        raise InputError(
            f"{path}: knows {len(table)} word pieces, the vocabulary has {words}; "
            "the released checkpoint needs bert-base-uncased's vocab.txt"
        )
    layers = {
        int(m[1]) for key in tensors if (m := re.match(r"bert\.encoder\.layer\.(\d+)\.", key))
    }
    config = BertConfig(
        vocab_size=len(table),
        hidden_size=table.shape[1],
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, table.shape[1] // _HEAD_WIDTH),
        intermediate_size=len(inner),
        max_position_embeddings=len(positions),
    )
    own = {k.removeprefix("bert."): v for k, v in tensors.items() if k.startswith("bert.")}
    own.pop("embeddings.position_ids", None)  # a buffer that older versions stored
    model = BertModel(config)
    try:
        model.load_state_dict(own, strict=True)
    except RuntimeError as error:
        raise InputError(f"{path}: does not fit a BERT: {str(error).splitlines()[-1]}") from None
    return model.eval(), heads
