"""Studies as batches: real records or phantoms behind one interface, in a resumable order.

A data set is indexed; its items are `Study`. A batch is made of uint8 pixels, which are
normalised on the device. The steps of an epoch depend on the seed and the epoch's number alone, so
a run can go on in the middle of one, and several processes can share the studies of a step without
a word between them.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from emrrg.data.image_cache import ImageCache
from emrrg.data.images import Fit
from emrrg.data.phantoms import Finding, draw_phantom, phantom_split
from emrrg.data.records import Record
from emrrg.errors import InputError

Labels = dict[str, int | None]


@dataclass(frozen=True)
class Study:
    """One study, ready for the model."""

    id: str
    images: Tensor
    """(V, 3, S, S) uint8."""
    report: str
    labels: dict[str, int | None] | None = None
    """The true CheXpert observations, where the data set knows them."""
    findings: tuple[Finding, ...] = ()
    """Phantoms: what was drawn, and where."""
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """Several studies; a study with fewer views than the widest is padded."""

    indices: list[int]
    """Where the studies stand in the data set."""
    ids: list[str]
    images: Tensor
    """(B, V, 3, S, S) uint8."""
    view_mask: Tensor
    """(B, V) bool, True where there is a view."""
    reports: list[str]
    failures: list[str] = field(default_factory=list)
    """What could not be read, one line each; those studies are not in the batch."""

    def pin_memory(self) -> Batch:
        """The same where CUDA copies from without waiting; a loader calls this by its name."""
        pinned = {name: getattr(self, name).pin_memory() for name in ("images", "view_mask")}
        return replace(self, **pinned)


class Studies(Protocol):
    """What training and evaluation ask of a data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Study: ...
    def ids(self) -> list[str]:
        """Every study's name, without reading an image."""
        ...

    def reports(self) -> list[str]:
        """Every report, without reading an image."""
        ...

    def labels(self) -> list[Labels | None]:
        """Every study's true observations where they are known, without reading an image."""
        ...

    def attributes(self) -> list[Mapping[str, Any]]:
        """What else is known of every study (view, sex, age, ...), without reading an image."""
        ...

    def views(self) -> list[int]:
        """How many images every study has, without reading one."""
        ...


class RecordStudies(Dataset[Study]):
    """Records of an annotation file; images are read when asked for.

    Args:
        records: as `emrrg.data.r2gen.read_annotation` gives them.
        size: pixels a side.
        cache_bytes: at most this much for resized images, in a temporary file that all reading
            processes share.
        fit: how an image becomes a square, as `emrrg.data.images.load_image` has it.
    """

    def __init__(
        self,
        records: Sequence[Record],
        size: int,
        cache_bytes: int = 2**30,
        fit: Fit = "stretch",
    ) -> None:
        self.records = list(records)
        self.size = size
        self._cache = ImageCache(size, cache_bytes, fit=fit)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Study:
        record = self.records[index]
        views = [torch.from_numpy(self._cache.load(path)) for path in record.images]
        images = torch.stack(views).permute(0, 3, 1, 2).contiguous()
        return Study(record.id, images, record.report, record.labels, (), dict(record.attributes))

    def ids(self) -> list[str]:
        return [record.id for record in self.records]

    def reports(self) -> list[str]:
        return [record.report for record in self.records]

    def labels(self) -> list[Labels | None]:
        return [record.labels for record in self.records]

    def attributes(self) -> list[Mapping[str, Any]]:
        return [record.attributes for record in self.records]

    def views(self) -> list[int]:
        return [len(record.images) for record in self.records]


class PhantomStudies(Dataset[Study]):
    """Synthetic studies, drawn once at the start and kept in memory (S*S bytes each).

    Args:
        split: ``train``, ``val`` or ``test``; the splits of one seed share no phantom.
        count: studies.
        domain: ``source`` or ``target``.
        size: pixels a side.
        seed: phantoms of different seeds differ.
        processes: draw in this many processes.
    """

    def __init__(
        self, split: str, count: int, *, domain: str, size: int, seed: int, processes: int = 1
    ) -> None:
        indices = list(phantom_split(split, count, domain=domain, seed=seed))
        draw = partial(_draw, domain=domain, size=size, seed=seed)
        if processes > 1 and count >= 256:
            context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
            try:
                with ProcessPoolExecutor(
                    processes, mp_context=context, initializer=_begin_drawing
                ) as pool:
                    phantoms = list(pool.map(draw, indices, chunksize=32))
            except BrokenProcessPool as error:
                raise InputError(
                    "a process that draws phantoms died; it may have run out of memory: try fewer "
                    "studies or a smaller --image-size"
                ) from error
        else:
            with threadpool_limits(1, "blas"):
                phantoms = [draw(i) for i in indices]
        self._ids = [f"phantom-{domain}-{seed}-{i}" for i in indices]
        self.phantoms = phantoms

    def __len__(self) -> int:
        return len(self.phantoms)

    def __getitem__(self, index: int) -> Study:
        phantom = self.phantoms[index]
        grey = torch.from_numpy(phantom.image)
        images = grey.expand(1, 3, *grey.shape)
        return Study(
            self._ids[index], images, phantom.report, dict(phantom.labels), phantom.findings
        )

    def ids(self) -> list[str]:
        return list(self._ids)

    def reports(self) -> list[str]:
        return [p.report for p in self.phantoms]

    def labels(self) -> list[Labels | None]:
        return [dict(p.labels) for p in self.phantoms]

    def attributes(self) -> list[Mapping[str, Any]]:
        return [{} for _ in self.phantoms]

    def views(self) -> list[int]:
        return [1] * len(self.phantoms)


def _begin_drawing() -> None:
    """What a process does first that draws phantoms."""
    gc.disable()  # drawing leaves no cycles, and collecting touches all that came from the parent
    threadpool_limits(1)  # a process a core: several threads each would wait for one another
    # It would wait for ever for work of a parent that was killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _draw(index: int, *, domain: str, size: int, seed: int) -> Any:
    return draw_phantom(index, domain=domain, size=size, seed=seed)  # type: ignore[arg-type]


def collate(items: Sequence[tuple[int, Study | InputError]]) -> Batch:
    """Studies to a batch; what could not be read is named in it instead."""
    good = [(index, study) for index, study in items if isinstance(study, Study)]
    failures = [str(error) for _, error in items if isinstance(error, InputError)]
    if not good:
        return Batch([], [], torch.empty(0), torch.empty(0), [], failures)
    images, view_mask = collate_views([study.images for _, study in good])
    return Batch(
        [index for index, _ in good],
        [study.id for _, study in good],
        images,
        view_mask,
        [study.report for _, study in good],
        failures,
    )


def collate_views(studies: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack studies of unequal numbers of views.

    Args:
        studies: (V_i, 3, S, S) each, at least one.
    Returns:
        (B, max V, 3, S, S) of the same dtype, zeros where there is no view, and (B, max V) bool.
    """
    views = max(map(len, studies))
    batch = studies[0].new_zeros(len(studies), views, *studies[0].shape[1:])
    mask = torch.zeros(len(studies), views, dtype=torch.bool)
    for i, study in enumerate(studies):
        batch[i, : len(study)] = study
        mask[i, : len(study)] = True
    return batch, mask


class _Guarded(Dataset[Any]):
    """Hands errors over as items: a worker's exception would lose its type and its one line."""

    def __init__(self, studies: Studies) -> None:
        self.studies = studies

    def __len__(self) -> int:
        return len(self.studies)

    def __getitem__(self, index: int) -> tuple[int, Study | InputError]:
        try:
            return index, self.studies[index]
        except InputError as error:
            return index, error


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the studies that depends on the seed and the epoch alone."""
    return _generator(seed, epoch).permutation(length).tolist()


def epoch_steps(
    lengths: Sequence[int], size: int, *, seed: int, epoch: int, bucket: bool
) -> list[list[int]]:
    """The studies of each optimizer step of an epoch, all processes together.

    Args:
        lengths: tokens of each study's report.
        size: studies a step; the last one may have fewer.
        seed: with `epoch`, decides the order.
        epoch: its number.
        bucket: sort within stretches of 16 steps by length, so that a batch pads little; the steps
            then come in a random order, a last one that is not full staying the last.
    Returns:
        Every index once.
    """
    order = epoch_order(len(lengths), seed, epoch)
    if bucket:
        stretch = 16 * size
        pieces = [order[i : i + stretch] for i in range(0, len(order), stretch)]
        order = [i for piece in pieces for i in sorted(piece, key=lambda i: lengths[i])]
    steps = [order[i : i + size] for i in range(0, len(order), size)]
    if bucket:
        full = len(steps) - (len(steps[-1]) < size)
        shuffled = _generator(seed, epoch, 1).permutation(full)
        steps = [steps[i] for i in shuffled] + steps[full:]
    return steps


def even_batches(count: int, size: int) -> list[list[int]]:
    """The indices 0 ... count-1 as they stand, `size` at a time."""
    return [list(range(i, min(i + size, count))) for i in range(0, count, size)]


def batches(
    studies: Studies,
    plan: Sequence[Sequence[int]],
    *,
    workers: int = 0,
    skip_bad: bool = False,
) -> Iterator[Batch]:
    """Read batches of a data set.

    Args:
        studies: the data set.
        plan: the studies of each batch.
        workers: processes that read images; 0: this one.
        skip_bad: leave out studies that cannot be read and name them in the batch's `failures`.
    Raises:
        InputError: a study cannot be read (the message names its file), or a reading process died.
    """
    loader: DataLoader[Any] = DataLoader(
        _Guarded(studies),
        batch_sampler=[list(batch) for batch in plan],
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_initialized(),  # a run on the CPU leaves CUDA alone
        worker_init_fn=_leave_signals if workers else None,
        # Where there is none, a loader draws its seed from torch's own stream, once an epoch.
        generator=torch.Generator(),
    )
    with readers_may_die():
        for batch in loader:
            if batch.failures and not skip_bad:
                raise InputError(batch.failures[0])
            yield batch


@contextmanager
def readers_may_die() -> Iterator[None]:
    """Say in one line that a reading process died: torch tells it wherever the program just is.

    Raises:
        InputError: one did.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"--workers: a process that reads images died ({str(error).splitlines()[0]}); "
            "it may have run out of memory: try fewer, or --workers 0"
        ) from error


def _leave_signals(_worker: int) -> None:
    """Ctrl-C, and a scheduler's SIGTERM, reach the whole process group; only the training process
    answers them, and then it ends its readers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _generator(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(list(numbers)))
