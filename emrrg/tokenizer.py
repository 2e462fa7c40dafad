"""Text to token ids and back: sentencepiece models, ``tokenizer.json`` files, and training.

A sentencepiece ``tokenizer.model`` is used as Llama uses it: white space is part of the pieces, the
text gets one leading space, and what else happens to spaces is as the file says. Text never becomes
a mark: "</s>" in a report is five characters. Reports are encoded without begin and end marks; the
model adds those it wants. A tokenizer without a padding id (Llama's) pads with its end mark.
"""

from __future__ import annotations

import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece

from emrrg.config import read_json
from emrrg.errors import InputError

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
JSON_CONFIG = "tokenizer_config.json"


class Tokenizer(ABC):
    """What a tokenizer offers; `load_tokenizer` and `train_tokenizer` make one.

    Attributes:
        bos_id: begins a sequence.
        eos_id: ends a report.
        pad_id: fills rows of unequal length; the end mark where the file names none.
        vocab_size: ids are below it.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    vocab_size: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end marks."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; begin, end and padding marks vanish, ids outside the model are skipped."""

    def words(self, ids: Sequence[int]) -> list[tuple[str, int, int]]:
        """The words of `decode(ids)`, split at white space, each with the tokens that wrote it.

        Returns:
            (word, first, last + 1): indices into `ids`. A token that writes the end of one word and
            the start of the next belongs to both; one that writes nothing belongs to none.
        """
        text = self.decode(ids)
        # What the first k tokens write. A part of a character may decode to a mark of its own:
        # only what agrees with the whole text counts.
        ends = [shared_start(self.decode(ids[:k]), text) for k in range(len(ids))]
        ends.append(len(text))
        words = []
        for match in re.finditer(r"\S+", text):
            touched = [
                k for k in range(len(ids)) if ends[k] < match.end() and ends[k + 1] > match.start()
            ]
            words.append((match.group(), touched[0], touched[-1] + 1))
        return words

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the tokenizer into a folder that `load_tokenizer` can read; the file's path."""


def shared_start(first: str, second: str) -> int:
    """How many characters two texts have in common at their start."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, with Llama's handling of spaces.

    Args:
        model: the serialised model.
        where: the file that it comes from, for messages.
    Raises:
        InputError: it is not a sentencepiece model, or has no end mark.
    """

    def __init__(self, model: bytes, where: str) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"{where}: is not a sentencepiece model") from error
        processor = self._processor
        self.vocab_size = processor.get_piece_size()
        self.eos_id = processor.eos_id()
        if self.eos_id < 0:
            raise InputError(f"{where}: has no end mark (eos); reports could never end")
        self.bos_id = processor.bos_id() if processor.bos_id() >= 0 else self.eos_id
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else self.eos_id

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end marks."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; begin, end and padding marks vanish, ids outside the model are skipped."""
        return self._processor.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``tokenizer.model`` into a folder; its path."""
        path = Path(folder) / SENTENCEPIECE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._model)
        return path


class JsonTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the `tokenizers` library (the extra ``emrrg[tokenizers]``).

    The marks are named by ``tokenizer_config.json`` beside it, or else by ``config.json``.

    Args:
        path: the file.
    Raises:
        InputError: the library is not installed, the file cannot be read, or there is no end mark.
    """

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise InputError(
                f"{path}: needs the tokenizers library: pip install 'emrrg[tokenizers]'"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"{path}: is not a tokenizer.json ({error})") from error
        self._tokenizer.encode_special_tokens = True  # marks in the text are text
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        marks = {name: mark_id(path.parent, name, ids) for name in ("bos", "eos", "pad")}
        if marks["eos"] is None:
            raise InputError(
                f"{path}: has no end mark; name eos_token in tokenizer_config.json beside it"
            )
        self.eos_id = marks["eos"]
        self.bos_id = self.eos_id if marks["bos"] is None else marks["bos"]
        self.pad_id = self.eos_id if marks["pad"] is None else marks["pad"]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end marks."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; begin, end and padding marks vanish, ids outside the model are skipped."""
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return self._tokenizer.decode(known, skip_special_tokens=True)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``; the path of the first."""
        path = Path(folder) / JSON_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(path))
        marks = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        names = {name: self._tokenizer.id_to_token(i) for name, i in marks.items()}
        (path.parent / JSON_CONFIG).write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
        return path


def mark_id(folder: Path, name: str, ids: Mapping[str, int]) -> int | None:
    """The id of the mark `name` (bos, eos or pad) as a Hugging Face folder names it, or None.

    Raises:
        InputError: the folder names a token that the vocabulary lacks.
    """
    if (folder / JSON_CONFIG).exists():
        token = read_json(folder / JSON_CONFIG).get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None:
            if token not in ids:
                raise InputError(
                    f"{folder / JSON_CONFIG}: {name}_token {token!r} is not in the vocabulary"
                )
            return ids[token]
    if (folder / "config.json").exists():
        value = read_json(folder / "config.json").get(f"{name}_token_id")
        if isinstance(value, list):  # several end marks: the first
            value = value[0] if value else None
        return value
    return None


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer.

    Args:
        path: a sentencepiece model, a ``tokenizer.json``, or a folder that holds
            ``tokenizer.model`` or else ``tokenizer.json``.
    Raises:
        InputError: nothing there that can be read (the message names the file).
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (SENTENCEPIECE_FILE, JSON_FILE) if (path / name).exists()]
        if not found:
            raise InputError(f"{path}: holds no {SENTENCEPIECE_FILE} and no {JSON_FILE}")
        path = found[0]
    if path.suffix == ".json":
        if not path.exists():
            raise InputError(f"{path}: no such file")
        return JsonTokenizer(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    return SentencePieceTokenizer(content, str(path))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]
) -> Tokenizer:
    """Train a sentencepiece model; the same texts give the same file, byte for byte.

    Byte-pair pieces, Llama's kind, over every character of the texts, line breaks included; unk 0,
    bos 1, eos 2, no padding id, spaces as in Llama's model. A corpus that is too small gives fewer
    pieces than asked for.

    Args:
        texts: reports, and whatever else the model reads (the prompt).
        vocab_size: most pieces.
        path: the file to write.
    Raises:
        InputError: no text, or fewer pieces than the texts have characters.
    """
    corpus = [text for text in texts if text.strip()]
    if not corpus:
        raise InputError("a tokenizer needs text to train on, and every report is empty")
    characters = len({c for text in corpus for c in text} | {" "})
    if vocab_size < characters + 3:
        raise InputError(
            f"--vocab-size: {vocab_size} pieces are too few for {characters} characters and 3 marks"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=1 << 20,
        shuffle_input_sentence=False,
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    path = Path(path)
    tokenizer = SentencePieceTokenizer(model.getvalue(), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return tokenizer
