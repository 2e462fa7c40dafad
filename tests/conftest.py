"""What all tests share: Triton's interpreter where there is no GPU, and no network."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel is decorated, so before any import of one
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

# Tests that run side by side share the cores: threads that wait for each other's take much longer.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // _workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, there is none"))


@pytest.fixture(scope="session")
def brief() -> list[str]:
    """Flags of a training of six steps that takes a second or two."""
    return shlex.split(
        "--dataset phantoms --train-studies 12 --val-studies 3 --test-studies 4 --batch-size 4 "
        "--epochs 2 --num-beams 1 --max-new-tokens 8 --log-every 1 --warmup-steps 2 --lr 1e-3"
    )


@pytest.fixture(scope="session")
def small(brief: list[str]) -> list[str]:
    """Those flags, and those of a small model from random weights."""
    return [*brief, *shlex.split(
        "--image-size 32 --decoder-dim 32 --decoder-layers 2 --decoder-heads 2 --vocab-size 300"
    )]  # fmt: skip


@pytest.fixture
def annotated(tmp_path: Path) -> Callable[[], Path]:
    """A data set of files: 8 / 2 / 2 studies of one or two views; the annotation's path."""

    def write() -> Path:
        from PIL import Image

        folder = tmp_path / "data"
        folder.mkdir()
        words = ("heart", "lung", "clear", "large", "no", "effusion", "left", "right")
        content: dict[str, list[dict[str, Any]]] = {"train": [], "val": [], "test": []}
        for k in range(12):
            split = "train" if k < 8 else "val" if k < 10 else "test"
            names = [f"{k}-{view}.png" for view in range(1 + k % 2)]
            for view, name in enumerate(names):
                Image.new("L", (40, 36), 20 * k + 5 * view).save(folder / name)
            report = " ".join(words[(k + j) % 8] for j in range(3 + k % 4)) + " ."
            content[split].append({"id": f"study-{k}", "report": report, "image_path": names})
        path = folder / "annotation.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def llama_folder() -> Callable[[Path], Path]:
    """Write a small Llama as Hugging Face stores it, with a tokenizer."""

    def write(folder: Path) -> Path:
        from safetensors.torch import save_file

        from emrrg.config import PROMPT
        from emrrg.decoder import Decoder, DecoderConfig
        from emrrg.tokenizer import train_tokenizer

        torch.manual_seed(3)
        folder.mkdir()
        texts = ["the heart is enlarged .", "no pneumothorax .", *PROMPT] * 4
        tokenizer = train_tokenizer(texts, 200, folder / "tokenizer.model")
        sizes: dict[str, Any] = {
            "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 512, "tie_word_embeddings": False,
        }  # fmt: skip
        decoder = Decoder(DecoderConfig(**sizes))
        (folder / "config.json").write_text(
            json.dumps({"model_type": "llama", "rms_norm_eps": 1e-5, **sizes})
        )
        tensors = {n: p.detach().contiguous() for n, p in decoder.named_parameters()}
        save_file(tensors, folder / "model.safetensors")
        return folder

    return write


@pytest.fixture
def encoder_file() -> Callable[[Path], Path]:
    """Write a small encoder as a released file of the contrastive stage."""

    def write(path: Path) -> Path:
        from emrrg.vision import VisionMamba

        torch.manual_seed(4)
        state = VisionMamba(image_size=32, dim=32, depth=2).state_dict()
        torch.save({"model": {f"visual_encoder.{n}": t for n, t in state.items()}}, path)
        return path

    return write


# METEOR's Java process and the resampling take longer than such a training.
_QUICK = """
import contextlib, emrrg.evaluation, emrrg.train
emrrg.evaluation.meteor_ahead = emrrg.train.meteor_ahead = contextlib.nullcontext
score = emrrg.evaluation.score_reports
emrrg.evaluation.score_reports = lambda *a, **k: score(*a, **{**k, "meteor": "off"})
emrrg.train.INTERVALS = 10
emrrg.train.plot_curves = lambda *_: None
"""


@pytest.fixture(scope="session")
def train() -> Callable[..., int]:
    """`emrrg.train.main`, quick: flags in, exit status out."""
    from emrrg import evaluation
    from emrrg import train as command

    score = evaluation.score_reports

    def quick(*args: Any, **settings: Any) -> Any:
        return score(*args, **{**settings, "meteor": "off"})

    def run(*flags: Any, pictures: bool = False) -> int:
        threads = torch.get_num_threads()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "score_reports", quick)
            for module in (evaluation, command):
                patch.setattr(module, "meteor_ahead", contextlib.nullcontext)
            patch.setattr(command, "INTERVALS", 10)
            if not pictures:
                patch.setattr(command, "plot_curves", lambda *_: None)
            try:
                return command.main([str(flag) for flag in flags])
            finally:
                torch.set_num_threads(threads)  # --threads is for the whole process

    return run


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, train: Callable[..., int], small: list[str]
) -> Path:
    """A finished small run, everything trained; not to be written to."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert train(*small, "--output", run) == 0
    return run


@pytest.fixture
def launch() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `emrrg.train`, quick, in a process group of its own; what is left of it is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*flags: Any, before: str = "", **environment: str) -> subprocess.Popen[str]:
        code = f"{_QUICK}\n{before}\nfrom emrrg.config import run_command\n"
        process = subprocess.Popen(
            [sys.executable, "-c", code + "run_command(emrrg.train.main)", *map(str, flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
