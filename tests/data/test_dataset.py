"""Steps of an epoch, batches of studies, and the splits of a run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory as loader_pin_memory

from emrrg.config import TrainConfig
from emrrg.data.dataset import (
    Batch,
    PhantomStudies,
    RecordStudies,
    Study,
    batches,
    collate_views,
    epoch_steps,
    even_batches,
    readers_may_die,
)
from emrrg.data.images import load_image
from emrrg.data.loading import data_workers, load_studies
from emrrg.data.phantoms import draw_phantom, phantom_split
from emrrg.errors import InputError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize(("count", "size"), [(1, 4), (4, 4), (103, 4), (640, 16)])
def test_an_epoch_is_every_study_once(count: int, size: int, bucket: bool) -> None:
    lengths = np.random.default_rng(0).integers(5, 90, count).tolist()
    steps = epoch_steps(lengths, size, seed=3, epoch=2, bucket=bucket)
    assert sorted(i for step in steps for i in step) == list(range(count))
    assert all(len(step) == size for step in steps[:-1])  # one that is not full is the last
    assert len(steps) == -(-count // size)
    assert steps == epoch_steps(lengths, size, seed=3, epoch=2, bucket=bucket)
    if count > 100:
        for other in ({"seed": 4, "epoch": 2}, {"seed": 3, "epoch": 3}):
            assert steps != epoch_steps(lengths, size, bucket=bucket, **other)
        assert [i for step in steps for i in step] != list(range(count))


def test_buckets_pad_less_and_come_in_any_order() -> None:
    lengths = np.random.default_rng(0).integers(5, 90, 640).tolist()

    def padded(steps: list[list[int]]) -> int:
        return sum(len(s) * max(lengths[i] for i in s) for s in steps)

    plain, bucketed = (
        epoch_steps(lengths, 8, seed=0, epoch=0, bucket=bucket) for bucket in (False, True)
    )
    assert padded(bucketed) < 1.1 * sum(lengths) < 1.4 * sum(lengths) < padded(plain)
    means = [np.mean([lengths[i] for i in step]) for step in bucketed]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_even_batches() -> None:
    assert even_batches(7, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert even_batches(0, 3) == []


def test_views_are_padded_and_masked() -> None:
    studies = [torch.full((n, 3, 2, 2), n, dtype=torch.uint8) for n in (1, 3, 2)]
    batch, mask = collate_views(studies)
    assert batch.shape == (3, 3, 3, 2, 2) and batch.dtype == torch.uint8
    assert mask.tolist() == [[True, False, False], [True, True, True], [True, True, False]]
    assert batch[mask].unique().tolist() == [1, 2, 3] and not batch[~mask].any()


def test_records_become_studies(annotated: Callable[[], Path]) -> None:
    path = annotated()
    config = TrainConfig(dataset="custom", annotation=str(path), images=str(path.parent))
    studies = load_studies(config, 48)
    assert {name: len(part) for name, part in studies.items()} == {"train": 8, "val": 2, "test": 2}
    train = studies["train"]
    content = json.loads(path.read_text())["train"]
    assert train.ids() == [row["id"] for row in content]
    assert train.views() == [1, 2] * 4
    assert train.reports() == [row["report"] for row in content]  # clean already
    study = train[3]
    assert isinstance(study, Study) and study.images.shape == (2, 3, 48, 48)
    for view, name in enumerate(content[3]["image_path"]):
        expected = load_image(path.parent / name, 48).transpose(2, 0, 1)
        assert torch.equal(study.images[view], torch.from_numpy(expected.copy()))
    few = load_studies(TrainConfig(
        dataset="custom", annotation=str(path), images=str(path.parent), train_studies=3
    ), 48, ("train",))  # fmt: skip
    assert few["train"].ids() == train.ids()[:3]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_follow_the_plan_and_name_what_is_broken(
    annotated: Callable[[], Path], workers: int
) -> None:
    path = annotated()
    config = TrainConfig(dataset="custom", annotation=str(path), images=str(path.parent))
    train = load_studies(config, 32, ("train",))["train"]
    plan = [[5, 0], [3], [1, 2, 7]]
    got = list(batches(train, plan, workers=workers))
    assert [batch.indices for batch in got] == plan
    assert [batch.ids for batch in got] == [[f"study-{i}" for i in part] for part in plan]
    assert got[0].view_mask.tolist() == [[True, True], [True, False]]
    assert torch.equal(got[1].images[0], train[3].images)
    (path.parent / "3-0.png").write_bytes(b"no image")
    broken = RecordStudies(train.records, 32)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"3-0\.png"):
        list(batches(broken, plan, workers=workers))
    got = list(batches(broken, plan, workers=workers, skip_bad=True))
    assert [batch.indices for batch in got] == [[5, 0], [], [1, 2, 7]]
    assert [len(batch.failures) for batch in got] == [0, 1, 0]
    assert "3-0.png" in got[1].failures[0]


def test_reading_draws_nothing_from_the_run(annotated: Callable[[], Path]) -> None:
    """A loader takes its seed from a stream of its own: resumed or not, dropout is the same."""
    studies = PhantomStudies("train", 4, domain="target", size=32, seed=0)
    before = torch.get_rng_state()
    list(batches(studies, [[0, 1], [2]]))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_is_pinned_by_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is no tensor, list or dictionary it leaves as it is, unless that can pin itself."""
    pinned: list[torch.Tensor] = []

    def pin(self: torch.Tensor) -> torch.Tensor:
        pinned.append(self)
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    mask = torch.tensor([[True, False]])
    batch = Batch([3], ["a"], torch.arange(24.0).view(1, 2, 3, 2, 2), mask, ["r"], ["f"])
    got = loader_pin_memory(batch)
    assert [t is u for t, u in zip(pinned, (batch.images, mask), strict=True)] == [True, True]
    assert got.images is not batch.images and torch.equal(got.images, batch.images)
    assert got.view_mask is not mask and torch.equal(got.view_mask, mask)
    assert (got.indices, got.ids, got.reports, got.failures) == ([3], ["a"], ["r"], ["f"])


def test_missing_files_are_found_at_once_or_when_they_are_read(
    annotated: Callable[[], Path],
) -> None:
    path = annotated()
    (path.parent / "3-0.png").unlink()
    given = {"dataset": "custom", "annotation": str(path), "images": str(path.parent)}
    with pytest.raises(InputError, match=r"study-3.*3-0\.png: no such file"):
        load_studies(TrainConfig(**given), 32)
    train = load_studies(TrainConfig(**given, bad_images="skip"), 32)["train"]
    assert len(train) == 8
    with pytest.raises(InputError, match=r"3-0\.png"):
        train[3]


def test_phantoms_are_the_same_in_one_process_and_in_two() -> None:
    one = PhantomStudies("train", 256, domain="source", size=16, seed=1)
    two = PhantomStudies("train", 256, domain="source", size=16, seed=1, processes=2)
    assert one.ids() == two.ids() and one.reports() == two.reports()
    assert all(torch.equal(one[i].images, two[i].images) for i in range(0, 256, 17))
    assert one.views() == [1] * 256
    first = next(iter(phantom_split("train", 256, domain="source", seed=1)))
    drawn = draw_phantom(first, domain="source", size=16, seed=1)
    assert torch.equal(one[0].images[0, 2], torch.from_numpy(drawn.image))
    assert one.labels()[0] == drawn.labels


def test_who_reads_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"annotation": "a", "images": "i"}
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert data_workers(TrainConfig(dataset="custom", **files), CPU) == 0
    assert data_workers(TrainConfig(dataset="custom", **files), CUDA) == 8
    assert data_workers(TrainConfig(dataset="phantoms"), CUDA) == 0
    assert data_workers(TrainConfig(dataset="custom", workers=3, **files), CPU) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # four processes share the machine
    assert data_workers(TrainConfig(dataset="custom", **files), CUDA) == 3


def test_only_a_readers_death_is_told_as_one() -> None:
    with pytest.raises(InputError, match="--workers: a process that"), readers_may_die():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    with pytest.raises(RuntimeError, match="shapes"), readers_may_die():
        raise RuntimeError("shapes disagree")
