"""The nearest-neighbour baseline: the report of the training image nearest to each study's own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize as to_unit_length
from tqdm import tqdm

from emrrg.config import TrainConfig
from emrrg.data.dataset import Studies, batches, even_batches
from emrrg.data.images import normalize
from emrrg.data.loading import data_workers
from emrrg.errors import InputError
from emrrg.model import ReportGenerator

log = logging.getLogger("emrrg.neighbours")

UNASKED = 20_000
"""Training studies, at most, that are read for this baseline where it was not asked for."""
_MOST_SIMILARITIES = 2**24  # at once


def by_default(model: ReportGenerator, training: Studies) -> bool:
    """Whether to look for neighbours unasked: not where a model sees nothing, or it takes long."""
    if model.config.blind:
        return False
    if len(training) > UNASKED:
        log.info(
            "the nearest-neighbour baseline would read %d training studies: it is left out "
            "(emrrg.evaluate --neighbours has it)",
            len(training),
        )
        return False
    return True


def nearest_reports(
    model: ReportGenerator,
    studies: Studies,
    training: Studies,
    config: TrainConfig,
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Give each study the report of the training study whose image is nearest.

    Nearest by the cosine of the encoder's features, averaged over views and tokens, less their
    mean over the training studies. A study is not its own neighbour (same id, same report).

    Args:
        model: whose encoder sees.
        studies: what to find neighbours of.
        training: where to find them.
        config: batch size, reading processes, what a broken image does.
        device: where the model is.
        stopped: whether a signal came; asked after every batch.
    Returns:
        One report a study; "" for one whose images cannot be read, and for all when stopped.
    Raises:
        InputError: the model is blind, or an image cannot be read (unless --bad-images skip).
    """
    if model.config.blind:
        raise InputError("--neighbours: this model sees no image, so none is near to another")
    known = study_features(model, training, config, device, stopped)
    asked = study_features(model, studies, config, device, stopped)
    if stopped():
        return [""] * len(studies)
    middle = torch.stack(list(known.values())).mean(0)
    table = to_unit_length(torch.stack(list(known.values())) - middle, dim=1)
    names, reports = training.ids(), training.reports()
    column = {(names[i], reports[i]): k for k, i in enumerate(known)}
    place = list(known)
    themselves = list(zip(studies.ids(), studies.reports(), strict=True))
    found = [""] * len(studies)
    rows = list(asked)
    step = max(1, _MOST_SIMILARITIES // len(place))
    for part in (rows[start : start + step] for start in range(0, len(rows), step)):
        queries = to_unit_length(torch.stack([asked[i] for i in part]) - middle, dim=1)
        nearness = queries @ table.T
        for row, i in enumerate(part):
            if themselves[i] in column:
                nearness[row, column[themselves[i]]] = -2.0
        for i, best in zip(part, nearness.argmax(1).tolist(), strict=True):
            found[i] = reports[place[best]]
    return found


@torch.inference_mode()
def study_features(
    model: ReportGenerator,
    studies: Studies,
    config: TrainConfig,
    device: torch.device,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[int, Tensor]:
    """The encoder's features of every study that can be read; of some, when stopped.

    Returns:
        Place in the data set to (D,) fp32 on the CPU, averaged over views and tokens.
    Raises:
        InputError: an image cannot be read (unless --bad-images skip), or none can.
    """
    model.eval()
    found: dict[int, Tensor] = {}
    failure = "there is none"
    plan = even_batches(len(studies), config.eval_batch_size)
    workers, skip = data_workers(config, device), config.bad_images == "skip"
    hidden = not sys.stderr.isatty()
    with tqdm(total=len(studies), desc="features", leave=False, disable=hidden) as bar:
        for batch in batches(studies, plan, workers=workers, skip_bad=skip):
            if stopped():
                return found
            if batch.ids:
                images = normalize(batch.images.to(device))
                features = model.features(images, batch.view_mask.to(device))
                found |= dict(zip(batch.indices, features.mean(1).float().cpu(), strict=True))
            failure = batch.failures[-1] if batch.failures else failure
            bar.update(len(batch.ids) + len(batch.failures))
    if not found:
        raise InputError(f"--neighbours: no study could be read; the last: {failure}")
    return found
