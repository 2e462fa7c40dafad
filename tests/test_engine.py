"""The parts of a training step, against sums written out here."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from emrrg import engine
from emrrg.config import TrainConfig, to_dict
from emrrg.data.images import normalize
from emrrg.distributed import World
from emrrg.engine import (
    Session,
    cached_features,
    largest_batch,
    load_best,
    prepare,
    read_steps,
    restore,
    save,
    seed_everything,
    share,
    store_frozen,
    training_step,
    update,
)
from emrrg.errors import InputError
from emrrg.evaluation import write_reports
from emrrg.model import set_regime
from emrrg.optim import learning_rate, set_lr
from emrrg.progress import Progress
from emrrg.runs import read_checkpoint, write_json

CPU = torch.device("cpu")
STEPS_TO_LEARN = 150
CONFIG = TrainConfig(
    dataset="phantoms", preset="tiny", regime="full", image_size=32, decoder_dim=32,
    decoder_layers=2, decoder_heads=2, hybrid_every=2, vocab_size=300, train_studies=7,
    val_studies=1, test_studies=1, batch_size=3, drop_path=0.0, grad_clip=0.0, epochs=2,
    eval_batch_size=3,
)  # fmt: skip


def session(tmp_path: Path, **changes: object) -> Session:
    config = dataclasses.replace(CONFIG, **changes)
    return prepare(config, tmp_path, CPU, World(), resuming=False)


def loss_by_hand(made: Session, studies: list[int]) -> Tensor:
    """Mean over all report tokens of -log p, each study alone in its batch."""
    model, total, tokens = made.model, torch.zeros(()), 0
    for i in studies:
        study = made.studies["train"][i]
        ids = [*model.tokenizer.encode(study.report)[: CONFIG.max_report_tokens]]
        ids.append(model.tokenizer.eos_id)
        prefix = model.encode(normalize(study.images[None]), torch.ones(1, 1, dtype=torch.bool))
        rows = model.llama_model.embed(torch.tensor(ids[:-1], dtype=torch.long))
        embeds = torch.cat([prefix.embeds[0], rows])[None]
        text = torch.cat([prefix.text_mask[0], torch.ones(len(ids) - 1, dtype=torch.bool)])[None]
        logits = model.llama_model(embeds, vis=prefix.vis, text_mask=text)[0, -len(ids) :]
        total = total + F.cross_entropy(logits, torch.tensor(ids), reduction="sum")
        tokens += len(ids)
    return total / tokens


@pytest.mark.parametrize("studies", [[0, 1, 2], [0, 1, 2, 3, 4, 5, 6]], ids=["one", "three"])
def test_a_step_is_the_mean_over_all_its_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, studies: list[int]
) -> None:
    """Loss and every gradient, in one batch and accumulated over three of 3, 3 and 1 studies."""
    made = session(tmp_path)
    for name, parameter in made.parameters.items():  # so that the image matters in hybrid layers
        if name.endswith("alpha"):
            torch.nn.init.constant_(parameter, 0.5)
    monkeypatch.setattr(engine, "update", lambda _session, loss: loss)  # leave the gradients
    expected = loss_by_hand(made, studies)
    gradients = torch.autograd.grad(expected, list(made.parameters.values()))
    step = training_step(made, studies, read_steps(made, [studies]), lambda: False)
    assert step.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert not step.stop and not step.failures
    for (name, parameter), gradient in zip(made.parameters.items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-6, rtol=2e-4, msg=name)


def test_another_machine_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sums come out otherwise with other threads, so a resumed run may differ in the last bits."""
    made = session(tmp_path)
    write_json(tmp_path / "config.json", to_dict(CONFIG))
    progress = Progress(tmp_path, CONFIG, 10, 5, quiet=True)
    save(tmp_path, made, progress)
    threads = torch.get_num_threads()
    assert read_checkpoint(tmp_path, "last").state["numerics"]["threads"] == str(threads)
    told = []
    for count in (threads, threads + 1):
        torch.set_num_threads(count)
        try:
            with caplog.at_level("INFO", "emrrg.train"):
                caplog.clear()
                restore(tmp_path, made, progress)
        finally:
            torch.set_num_threads(threads)
        told.append([record.getMessage() for record in caplog.records])
    assert told[0] == ["going on from step 0"]
    assert told[1][0] == (
        f"saved with threads {threads}, going on with threads {threads + 1}: no longer the same "
        "numbers bit for bit"
    )


def test_other_studies_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = session(tmp_path)
    write_json(tmp_path / "config.json", to_dict(CONFIG))
    progress = Progress(tmp_path, CONFIG, 10, 5, quiet=True)
    save(tmp_path, made, progress)
    caplog.set_level("INFO", "emrrg.train")
    for told in (False, True):
        restore(tmp_path, made, progress)
        said = [record.getMessage() for record in caplog.records]
        assert any("training studies or their reports are not" in line for line in said) == told
        # As another process finds them.
        made = dataclasses.replace(made, rows=[*made.rows[:3], made.rows[3][1:], *made.rows[4:]])


def test_it_learns_a_batch_by_heart(tmp_path: Path) -> None:
    """Four studies: the loss goes to nothing, and each report comes back word for word."""
    made = session(
        tmp_path, train_studies=4, batch_size=4, decoder_dim=64, lr=3e-3, warmup_steps=10,
        grad_clip=1.0, num_beams=1,
    )  # fmt: skip
    losses = []
    for k in range(STEPS_TO_LEARN):
        set_lr(made.optimizer, learning_rate(made.config, k, STEPS_TO_LEARN, 0))
        reader = read_steps(made, [[0, 1, 2, 3]])
        losses.append(training_step(made, [0, 1, 2, 3], reader, lambda: False).loss)
    assert losses[0] > 4 and losses[-1] < 0.05, losses[::10]
    studies = made.studies["train"]
    written = write_reports(made.model, studies, made.config, CPU)
    assert written.reports == studies.reports()
    assert len(set(written.reports)) > 1


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 12])
def test_processes_share_a_step(size: int, count: int) -> None:
    studies = list(range(100, 100 + count))
    parts = [share(studies, CONFIG, World(rank, size)) for rank in range(size)]
    flat = [i for part in parts for batch in part for i in batch]
    assert sorted(flat) == studies
    assert all(len(batch) <= 3 for part in parts for batch in part)
    sizes = [sum(map(len, part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1 and len(parts[0]) == math.ceil(sizes[0] / 3)


def test_clipping_by_hand(tmp_path: Path) -> None:
    made = session(tmp_path, grad_clip=0.5)
    torch.manual_seed(1)
    for parameter in made.parameters.values():
        parameter.grad = torch.randn_like(parameter)
    before = {n: p.grad.clone() for n, p in made.parameters.items()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in before.values()))
    assert norm > 0.5 and update(made, 1.25) == 1.25
    for name, parameter in made.parameters.items():
        torch.testing.assert_close(parameter.grad, before[name] * (0.5 / norm), msg=name)


def test_a_scaler_that_cannot_help(tmp_path: Path) -> None:
    """Gradients that overflow in fp16 halve the scale; where that is no help, the step is bad."""
    made = session(tmp_path, precision="fp16")
    before = {n: p.detach().clone() for n, p in made.parameters.items()}
    scales, told = [], []
    for _ in range(18):
        made.scaler.scale(torch.ones(()))  # as a backward pass does: it makes the scale
        for parameter in made.parameters.values():
            parameter.grad = torch.full_like(parameter, torch.inf)
        told.append(update(made, 1.25))
        scales.append(made.scaler.get_scale())
    assert scales == [2.0**k for k in range(15, -3, -1)]
    assert told[:16] == [1.25] * 16 and all(math.isnan(loss) for loss in told[16:])
    assert all(torch.equal(p, before[n]) for n, p in made.parameters.items())


def test_what_is_frozen_takes_no_part_in_autograd(tmp_path: Path) -> None:
    made = session(tmp_path, cache_features=False)
    made.parameters = dict(made.model.named_parameters())
    trained = set(set_regime(made.model, "linear-probe"))
    seen, features = [], made.model.features

    def watched(*args: Tensor) -> Tensor:
        seen.append(features(*args))
        return seen[-1]

    made.model.features = watched  # type: ignore[method-assign]
    training_step(made, [0, 1, 2], read_steps(made, [[0, 1, 2]]), lambda: False)
    assert len(seen) == 1 and seen[0].grad_fn is None
    given = {n for n, p in made.model.named_parameters() if p.grad is not None}
    assert given == trained
    # With an encoder that is adapted in its last block alone, nothing before it keeps a graph.
    set_regime(made.model, "linear-probe")
    for parameter in made.model.visual_encoder.layers[-1].parameters():
        parameter.requires_grad_(True)
    inputs: list[Tensor] = []
    made.model.visual_encoder.layers[-1].register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    made.model.features(torch.zeros(1, 1, 3, 32, 32), torch.ones(1, 1, dtype=torch.bool))
    assert seen[-1].grad_fn is not None and inputs[0].grad_fn is None


def test_features_are_those_of_the_images(tmp_path: Path) -> None:
    made = session(tmp_path)
    set_regime(made.model, "linear-probe")
    features = cached_features(made)
    assert features is not None
    for i in range(7):
        image = made.studies["train"][i].images
        with torch.no_grad():
            expected = made.model.visual_encoder.eval()(normalize(image))
        torch.testing.assert_close(features[i], expected[0], atol=1e-5, rtol=1e-4, msg=str(i))
    # Not where the encoder trains, where they would not fit, or would be used once.
    for changes in ({"epochs": 1}, {"cache_features": False}, {"bad_images": "skip"}):
        made.config = dataclasses.replace(CONFIG, **changes)
        assert cached_features(made) is None, changes
    made.config = CONFIG
    set_regime(made.model, "encoder")
    assert cached_features(made) is None


def test_features_that_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = session(tmp_path)
    set_regime(made.model, "linear-probe")
    monkeypatch.setattr(engine, "FEATURE_BYTES", 7 * 5 * 128 * 4)
    assert cached_features(made) is not None
    monkeypatch.setattr(engine, "FEATURE_BYTES", 7 * 5 * 128 * 4 - 1)
    assert cached_features(made) is None


def test_the_blind_control_sees_the_mean(tmp_path: Path) -> None:
    made = session(tmp_path, blind=True)
    images = torch.stack([made.studies["train"][i].images[0] for i in range(7)])
    with torch.no_grad():
        expected = made.model.visual_encoder.eval()(normalize(images)).double().mean(0)
    torch.testing.assert_close(made.model.feature_mean.double(), expected, atol=1e-6, rtol=1e-5)
    assert not any(name.startswith("visual_encoder.") for name in made.parameters)


def test_reports_that_are_too_long_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a model of an earlier run, whose language model has few positions."""
    made = session(tmp_path / "first")
    monkeypatch.setattr(engine, "build_model", lambda *_: made.model)
    with pytest.raises(InputError, match="more than the language model's") as error:
        session(tmp_path / "second", max_new_tokens=1000)
    assert "--max-report-tokens, --max-new-tokens" in str(error.value)


def test_frozen_matrices_stay_in_fp32_on_the_cpu(tmp_path: Path) -> None:
    made = session(tmp_path)
    set_regime(made.model, "linear-probe")
    store_frozen(made.model, dataclasses.replace(CONFIG, precision="bf16"), CPU)
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}


def test_only_frozen_matrices_are_rounded(tmp_path: Path) -> None:
    """As on CUDA: the scan adds its biases, A and D in fp32, and what trains is not rounded."""
    made = session(tmp_path)
    set_regime(made.model, "linear-probe")
    store_frozen(made.model, CONFIG, torch.device("cuda"))
    kinds = {n: p.dtype for n, p in made.model.named_parameters()}
    mixer = "visual_encoder.layers.0.mixer"
    for name in ("in_proj.weight", "x_proj_c.weight", "dt_proj.weight"):
        assert kinds[f"{mixer}.{name}"] == torch.bfloat16, name
    for name in ("dt_proj.bias", "A_log", "D_b", "conv1d.weight"):
        assert kinds[f"{mixer}.{name}"] == torch.float32, name
    assert kinds["llama_proj.weight"] == torch.float32


@pytest.mark.parametrize(("room", "expected"), [(1000, 8), (500, 4), (650, 5), (None, 12)])
def test_the_cpu_is_not_tried_beyond_its_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int | None, expected: int
) -> None:
    """A batch of n studies takes 100 n bytes here; at most 0.8 of what is free beside AdamW's
    moments may be taken."""
    made, tried = session(tmp_path), [0]
    moments = sum(8 * p.numel() for p in made.parameters.values())
    free = None if room is None else room + moments

    def backward(_session: Session, indices: list[int], *_: object, **__: object) -> float:
        tried.append(len(indices))
        return 0.0

    monkeypatch.setattr(engine, "backward", backward)
    monkeypatch.setattr(engine, "LARGEST_BATCH", 12)
    monkeypatch.setattr(engine, "memory_bytes", lambda: 7000 + 100 * max(tried))
    monkeypatch.setattr(engine, "available_memory", lambda _device: free)
    assert largest_batch(made) == expected
    assert max(tried) == expected


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_is_saved_comes_back(tmp_path: Path, precision: Any) -> None:
    """Moments, random numbers, counters and the scaler of fp16; and the best weights, which are
    not the last."""
    config = dataclasses.replace(CONFIG, precision=precision)
    made = session(tmp_path, precision=precision)
    write_json(tmp_path / "config.json", to_dict(config))
    progress = Progress(tmp_path, config, 10, 5, quiet=True)
    progress.start()
    with progress:
        for k in range(3):
            step = training_step(made, [k], read_steps(made, [[k]]), lambda: False)
            progress.advance([str(k)], step.loss, 1e-4, 10)
            save(tmp_path, made, progress, best=k == 1)
    draws = torch.rand(4)
    moments = {
        name: {key: value.clone() for key, value in made.optimizer.state[p].items()}
        for name, p in made.parameters.items()
    }
    last = {name: p.detach().clone() for name, p in made.parameters.items()}
    again = prepare(config, tmp_path, CPU, World(), resuming=True)
    counted = Progress(tmp_path, config, 10, 5, quiet=True)
    seed_everything(99)
    restore(tmp_path, again, counted)
    if precision == "fp16":
        assert made.scaler.state_dict()["_growth_tracker"] == 3
        assert again.scaler.state_dict() == made.scaler.state_dict()
    assert torch.equal(torch.rand(4), draws)
    assert counted.state() == progress.state() and counted.losses == progress.losses
    for name, parameter in again.parameters.items():
        assert torch.equal(parameter, last[name]), name
        state = again.optimizer.state[parameter]
        assert state.keys() == moments[name].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(state[key], moments[name][key]) for key in state), name
    load_best(tmp_path, again)
    best = read_checkpoint(tmp_path, "best")
    assert best.state["step"] == 2
    assert all(torch.equal(p, best.weights[n]) for n, p in again.parameters.items())
    assert not all(torch.equal(p, last[n]) for n, p in again.parameters.items())
