"""Tokenizers: Llama's ids, training, marks, words, and files that are not what they should be."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from emrrg.errors import InputError
from emrrg.tokenizer import load_tokenizer, train_tokenizer

DATA = Path(__file__).parents[1] / "../shared/data"
REPORTS = [
    "the heart is normal in size . the lungs are clear . no pleural effusion .",
    "there is a small left apical pneumothorax . no focal consolidation .",
    "cardiomegaly with mild pulmonary edema , unchanged .\nright picc line in place .",
]


@pytest.fixture(scope="module")
def open_llama():
    path = DATA / "tokenizer" / "open_llama.model"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def corpus():
    """Every text of the Open-i reports, then every report of the R2Gen annotation."""
    archive = DATA / "openi" / "NLMCXR_reports.tgz"
    if not archive.exists():
        pytest.skip(f"{archive} is not here")
    texts = []
    with tarfile.open(archive) as files:
        for member in files:
            if member.name.endswith(".xml"):
                tree = ElementTree.parse(files.extractfile(member))
                texts += [node.text for node in tree.iter("AbstractText") if node.text]
    splits = json.loads((DATA / "openi" / "r2gen_iu_xray_annotation.json").read_text())
    return texts + [record["report"] for split in splits.values() for record in split]


@pytest.fixture
def small(tmp_path):
    return train_tokenizer(REPORTS * 3, 120, tmp_path / "tokenizer.model")


def test_ids_equal_the_sentencepiece_llama_tokenizer_on_the_whole_corpus(open_llama, corpus):
    # The digest is that of transformers 4.53.3's LlamaTokenizer(file, legacy=True), which runs
    # sentencepiece itself, over the same texts: json.dumps of all ids, without special tokens.
    ids = [open_llama.encode(text) for text in corpus]
    assert (len(ids), sum(map(len, ids))) == (17_499, 481_097)
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    assert digest == "d818f8934c614126e48d4c387d529b551a0f555ad06d4d924a674cd98ea051b4"


def test_ids_equal_the_installed_llama_tokenizer(open_llama, corpus, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the peer")
    pytest.importorskip("google.protobuf", reason="transformers reads .model files by protobuf")
    shutil.copy(DATA / "tokenizer" / "open_llama.model", tmp_path / "tokenizer.model")
    peer = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    # transformers 5 does not collapse runs of spaces, though this model's file says so.
    texts = [" ".join(text.split()) for text in corpus]
    expected = peer(texts, add_special_tokens=False)["input_ids"]
    assert [open_llama.encode(text) for text in texts] == expected


def test_llama_marks(open_llama):
    assert (open_llama.bos_id, open_llama.eos_id, open_llama.vocab_size) == (1, 2, 32_000)
    assert open_llama.pad_id == 2  # the file has none
    assert open_llama.encode("") == []
    assert 2 not in open_llama.encode("</s>")  # text never becomes a mark
    ids = open_llama.encode("no effusion")
    assert open_llama.decode([1, *ids, 2]) == "no effusion"
    assert open_llama.decode([*ids, -100, 99_999]) == "no effusion"


def test_training_is_deterministic_and_lossless(tmp_path):
    first = train_tokenizer(REPORTS, 90, tmp_path / "a.model")
    train_tokenizer(iter(REPORTS), 90, tmp_path / "b.model")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert first.vocab_size == 90
    assert (first.bos_id, first.eos_id, first.pad_id) == (1, 2, 2)
    for report in REPORTS:
        assert first.decode(first.encode(report)) == report
        assert 0 not in first.encode(report)
    assert 0 in first.encode("漢")  # a character that the training texts lack


def test_training_on_little_text(tmp_path):
    one = train_tokenizer(["no acute disease ."], 2000, tmp_path / "a.model")
    assert one.vocab_size < 2000
    assert one.decode(one.encode("no acute disease .")) == "no acute disease ."


def test_training_refuses_what_cannot_work(tmp_path):
    with pytest.raises(InputError, match="every report is empty"):
        train_tokenizer(["", "  "], 100, tmp_path / "a.model")
    with pytest.raises(InputError, match="--vocab-size: 10 pieces are too few"):
        train_tokenizer(REPORTS, 10, tmp_path / "a.model")
    assert not (tmp_path / "a.model").exists()


def test_saved_and_read_back(small, tmp_path):
    small.save(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    assert [again.encode(r) for r in REPORTS] == [small.encode(r) for r in REPORTS]


def test_words_own_their_tokens(small):
    for report in REPORTS:
        ids = small.encode(report)
        words = small.words(ids)
        assert [word for word, _, _ in words] == report.split()
        assert words[0][1] == 0 and words[-1][2] == len(ids)
        for (_, _, end), (_, start, _) in itertools.pairwise(words):
            assert start <= end <= start + 1
        for word, start, end in words:
            assert word in small.decode(ids[start:end])
    assert small.words([]) == []


def test_words_of_characters_in_several_bytes(open_llama):
    ids = open_llama.encode("größe 漢字 ok")
    assert [word for word, _, _ in open_llama.words(ids)] == ["größe", "漢字", "ok"]


@pytest.fixture
def json_folder(tmp_path):
    """A byte-level tokenizer.json as Qwen and Llama 3 have it, with a gap in its ids."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is an extra")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(REPORTS, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    pad = dict(values["added_tokens"][0], id=400, content="<|pad|>")
    values["added_tokens"].append(pad)
    values["model"]["vocab"]["<|pad|>"] = 400
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    marks = {"bos_token": None, "eos_token": {"content": "<|end|>"}, "pad_token": "<|pad|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(marks))
    return tmp_path


def test_tokenizer_json(json_folder):
    ours = load_tokenizer(json_folder)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (1, 1, 400)  # no bos: the end mark
    assert ours.vocab_size == 401  # ids, not entries
    for report in [*REPORTS, "größe 漢字"]:
        ids = ours.encode(report)
        assert ours.decode([*ids, ours.eos_id, ours.pad_id]) == report
        assert [word for word, _, _ in ours.words(ids)] == report.split()
    assert ours.eos_id not in ours.encode("<|end|>")
    ours.save(json_folder / "copy")
    again = load_tokenizer(json_folder / "copy" / "tokenizer.json")
    assert again.encode(REPORTS[0]) == ours.encode(REPORTS[0])
    assert (again.eos_id, again.pad_id) == (ours.eos_id, ours.pad_id)


def test_tokenizer_json_equals_transformers(json_folder):
    transformers = pytest.importorskip("transformers", reason="transformers is the peer")
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(json_folder / "tokenizer.json"))
    ours = load_tokenizer(json_folder)
    for report in REPORTS:
        assert ours.encode(report) == peer(report, add_special_tokens=False)["input_ids"]


def test_marks_from_config_json(json_folder):
    (json_folder / "tokenizer_config.json").unlink()
    config = {"bos_token_id": 0, "eos_token_id": [1, 400]}
    (json_folder / "config.json").write_text(json.dumps(config))
    ours = load_tokenizer(json_folder)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (0, 1, 1)


def test_sentencepiece_comes_first(json_folder, small):
    small.save(json_folder)
    assert load_tokenizer(json_folder).vocab_size == small.vocab_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"not a model", "tokenizer.model: is not a sentencepiece model"),
        ("tokenizer.model", b"", "tokenizer.model: is not a sentencepiece model"),
        ("tokenizer.json", b"{}", "tokenizer.json: is not a tokenizer.json"),
        ("other.txt", b"", "holds no tokenizer.model and no tokenizer.json"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


def test_missing_things_are_named(tmp_path, json_folder):
    with pytest.raises(InputError, match=r"nowhere\.model: cannot be read"):
        load_tokenizer(tmp_path / "nowhere.model")
    (json_folder / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="has no end mark"):
        load_tokenizer(json_folder)
    (json_folder / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    with pytest.raises(InputError, match="eos_token '<stop>' is not in the vocabulary"):
        load_tokenizer(json_folder)
