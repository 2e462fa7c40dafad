"""Studies as batches: real records or phantoms behind one interface, in a resumable order.

A data set is indexed; its items are `Study`. A batch is made of uint8 pixels, which are
normalised on the device. The order of an epoch depends on the seed and the epoch's number alone,
so a run can go on in the middle of one.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from emrrg.data.image_cache import ImageCache
from emrrg.data.phantoms import Finding, draw_phantom, phantom_split
from emrrg.data.records import Record
from emrrg.errors import InputError


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

    ids: list[str]
    images: Tensor
    """(B, V, 3, S, S) uint8."""
    view_mask: Tensor
    """(B, V) bool, True where there is a view."""
    reports: list[str]


class Studies(Protocol):
    """What training and evaluation ask of a data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Study: ...
    def reports(self) -> list[str]:
        """Every report, without reading an image."""
        ...


class RecordStudies(Dataset[Study]):
    """Records of an annotation file; images are read when asked for.

    Args:
        records: as `emrrg.data.r2gen.read_annotation` gives them.
        size: pixels a side.
        cache_bytes: at most this much for resized images, in a temporary file that all reading
            processes share.
    """

    def __init__(self, records: Sequence[Record], size: int, cache_bytes: int = 2**30) -> None:
        self.records = list(records)
        self.size = size
        self._cache = ImageCache(size, cache_bytes)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Study:
        record = self.records[index]
        views = [torch.from_numpy(self._cache.load(path)) for path in record.images]
        images = torch.stack(views).permute(0, 3, 1, 2).contiguous()
        return Study(record.id, images, record.report, record.labels, (), dict(record.attributes))

    def reports(self) -> list[str]:
        return [record.report for record in self.records]


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
            with ProcessPoolExecutor(processes, mp_context=context) as pool:
                phantoms = list(pool.map(draw, indices, chunksize=32))
        else:
            phantoms = [draw(i) for i in indices]
        self.ids = [f"phantom-{domain}-{seed}-{i}" for i in indices]
        self.phantoms = phantoms

    def __len__(self) -> int:
        return len(self.phantoms)

    def __getitem__(self, index: int) -> Study:
        phantom = self.phantoms[index]
        grey = torch.from_numpy(phantom.image)
        images = grey.expand(1, 3, *grey.shape)
        return Study(
            self.ids[index], images, phantom.report, dict(phantom.labels), phantom.findings
        )

    def reports(self) -> list[str]:
        return [p.report for p in self.phantoms]


def _draw(index: int, *, domain: str, size: int, seed: int) -> Any:
    return draw_phantom(index, domain=domain, size=size, seed=seed)  # type: ignore[arg-type]


def collate(studies: Sequence[Study | InputError]) -> Batch | InputError:
    """Studies to a batch; the first error, if there is one, instead of a batch."""
    good: list[Study] = []
    for study in studies:
        if isinstance(study, InputError):
            return study
        good.append(study)
    images, view_mask = collate_views([s.images for s in good])
    return Batch([s.id for s in good], images, view_mask, [s.report for s in good])


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

    def __getitem__(self, index: int) -> Study | InputError:
        try:
            return self.studies[index]
        except InputError as error:
            return error


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """A permutation of the studies that depends on the seed and the epoch alone."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, epoch]))
    return generator.permutation(length).tolist()


def batches(
    studies: Studies,
    batch_size: int,
    *,
    order: Sequence[int] | None = None,
    skip: int = 0,
    workers: int = 0,
    finish: Callable[[Batch], Any] | None = None,
) -> Iterator[Any]:
    """Batches of a data set.

    Args:
        studies: the data set.
        batch_size: studies a batch; the last one may be smaller.
        order: indices in the order of visit; None: as they stand.
        skip: leave out so many batches at the beginning (resuming).
        workers: processes that read images; 0: this one.
        finish: applied to each batch.
    Raises:
        InputError: a study cannot be read (the message names its file).
    """
    indices = list(range(len(studies))) if order is None else list(order)
    starts = range(skip * batch_size, len(indices), batch_size)
    loader: DataLoader[Any] = DataLoader(
        _Guarded(studies),
        batch_sampler=[indices[s : s + batch_size] for s in starts],
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield finish(batch) if finish else batch
