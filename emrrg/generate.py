"""Write reports: ``python -m emrrg.generate runs/x frontal.png [lateral.png]``.

Or of many: ``python -m emrrg.generate runs/x --list studies.csv --output predictions.jsonl``
goes on where it was stopped; a study that cannot be read is named and left out.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from emrrg.config import check_writable, parse_config, run_command
from emrrg.data.dataset import RecordStudies, batches, even_batches
from emrrg.data.images import normalize
from emrrg.data.records import Dropped, Record, SourceStudy
from emrrg.data.tabular import studies
from emrrg.errors import InputError
from emrrg.heatmap import attention_maps, draw_heatmap
from emrrg.jsonl import append_row, read_rows, write_rows
from emrrg.model import ReportGenerator
from emrrg.runs import load_run, read_run_config, tell_if_unfinished
from emrrg.system import pick_device

log = logging.getLogger("emrrg.generate")

NOTICE = "Generated text, for research only: not a diagnosis."
SYNTHETIC = "This model was trained on synthetic images alone: of a real one it knows nothing."
SETTINGS = (
    "num_beams", "min_new_tokens", "max_new_tokens", "repetition_penalty", "length_penalty",
)  # fmt: skip
TORN = b'{"id": '
"""How a line of the output begins, also one that a kill left half written."""


@dataclass(frozen=True)
class GenerateConfig:
    """Write a radiology report for the views of one study (PNG, JPEG, DICOM, ...), or reports for
    a list of studies."""

    run: str
    """Run folder that training left."""
    views: tuple[str, ...] = ()
    """Image files: all views of one study."""
    list: str | None = None
    """Annotation file, or a CSV, TSV, JSON or JSON Lines file with image path(s) and, where there
    is one, an id a row."""
    split: Literal["train", "val", "test"] | None = None
    """With --list: only the studies of this split, where the list has splits."""
    output: str | None = None
    """With --list: JSON Lines file that gets an object a study; what it holds is not done again."""
    images: str | None = None
    """With --list: folder that its paths start from [default: the list's own]."""
    batch_size: int = 16
    """With --list: studies at once."""
    workers: int = 0
    """With --list: processes that read images."""
    json: bool = False
    """Print a JSON object instead of plain text."""
    heatmap: str | None = None
    """Write a PNG of where the hybrid layers looked, sentence by sentence."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights."""
    num_beams: int | None = None
    """Beams of the search [default: as in training]."""
    min_new_tokens: int | None = None
    """Shortest report, in tokens [default: as in training]."""
    max_new_tokens: int | None = None
    """Longest report, in tokens [default: as in training]."""
    repetition_penalty: float | None = None
    """Repetition penalty [default: as in training]."""
    length_penalty: float | None = None
    """Length penalty [default: as in training]."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""

    def __post_init__(self) -> None:
        if bool(self.views) == (self.list is not None):
            raise InputError("views: give image files after the run folder, or --list FILE")
        if self.list is not None:
            if self.output is None:
                raise InputError("--output: needed with --list, a .jsonl file")
            if self.heatmap is not None or self.json:
                raise InputError("--heatmap, --json: go with image files, not with --list")
        elif (self.output, self.images, self.split) != (None, None, None):
            raise InputError("--output, --images, --split: go with --list")
        if self.batch_size < 1 or self.workers < 0:
            raise InputError("--batch-size, --workers: at least 1, and not below 0")
        if self.heatmap is not None and Path(self.heatmap).suffix.lower() != ".png":
            raise InputError(f"--heatmap: {self.heatmap} does not end in .png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; arguments and errors as `emrrg.train.main`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    asked, _ = parse_config(GenerateConfig, argv, "emrrg.generate", positional=("run", "views"))
    if asked.heatmap is not None:
        check_writable(Path(asked.heatmap), "--heatmap")
    model = load_run(asked.run, device=pick_device(asked.device), which=asked.checkpoint)
    tell_if_unfinished(Path(asked.run), log)
    if asked.heatmap is not None and not model.llama_model.config.hybrid_layers:
        raise InputError(f"--heatmap: {asked.run} has no hybrid layers, so nothing looks anywhere")
    model.generation = dataclasses.replace(
        model.generation,
        **{name: value for name in SETTINGS if (value := getattr(asked, name)) is not None},
    )
    notice = NOTICE
    if read_run_config(Path(asked.run)).dataset == "phantoms":
        notice = f"{NOTICE} {SYNTHETIC}"
    if asked.list is not None:
        write_list(model, asked)
        log.info("%s", notice)
        return 0
    report = model.generate([asked.views])[0]
    if asked.heatmap is not None:
        draw_heatmap(attention_maps(model, asked.views, report), Path(asked.heatmap))
        log.info("where the hybrid layers looked: %s", asked.heatmap)
    if asked.json:
        print(json.dumps({"views": list(asked.views), "report": report, "notice": notice}))
    else:
        print(report)
        log.info("%s", notice)
    return 0


def write_list(model: ReportGenerator, asked: GenerateConfig) -> None:
    """Write the reports of a list; the output grows batch by batch."""
    assert asked.list is not None and asked.output is not None
    table, output = Path(asked.list), Path(asked.output)
    folder = Path(asked.images) if asked.images is not None else table.parent
    records, failed = [], 0
    for study in listed(table, asked.split):
        if isinstance(study, Dropped) or not study.views:
            reason = study.reason if isinstance(study, Dropped) else "no image"
            log.info("left out: %s: %s: %s", table, study.id, reason)
            failed += 1
            continue
        paths = tuple(folder / view.path for view in study.views)
        records.append(Record(study.id, "", paths, "test"))
    kept = written_before(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_rows(output, kept)  # without a torn last line, and what could not be read is tried again
    done = {row["id"] for row in kept}
    todo = [record for record in records if record.id not in done]
    if done:
        log.info("%s: %d of %d studies are done", output, len(records) - len(todo), len(records))
    plan = even_batches(len(todo), asked.batch_size)
    reader = batches(
        RecordStudies(todo, model.config.image_size, cache_bytes=0, fit=model.config.fit),
        plan,
        workers=asked.workers,
        skip_bad=True,
    )
    unread = 0
    bar = tqdm(total=len(todo), unit="study", disable=not sys.stderr.isatty())
    with bar:
        for part, batch in zip(plan, reader, strict=True):
            broken = [i for i in part if i not in batch.indices]
            for index, line in zip(broken, batch.failures, strict=True):
                unread += 1
                tqdm.write(f"left out: {todo[index].id}: {line}", file=sys.stderr)
                append_row(output, {"id": todo[index].id, "error": line})
            if batch.ids:
                images = normalize(batch.images.to(model.device))
                reports = model.generate_batch(
                    images, batch.view_mask.to(model.device), model.generation
                )
                for name, report in zip(batch.ids, reports, strict=True):
                    append_row(output, {"id": name, "report": report})
            bar.update(len(part))
    count = len(records) - unread
    if not count and failed + unread:
        raise InputError(
            f"--list: none of the {failed + unread} studies of {table} could be read; their paths "
            f"start from {folder} (--images)"
        )
    log.info("%s: %d reports, %d studies left out", output, count, failed + unread)


def listed(table: Path, split: str | None) -> Sequence[SourceStudy | Dropped]:
    """The studies of a list, of one split where that is asked for.

    Raises:
        InputError: the list cannot be read, or no study of it is of the split.
    """
    found = [
        study
        for study in studies(table, texts=False)
        if split is None or isinstance(study, Dropped) or study.split == split
    ]
    if split is not None and all(isinstance(study, Dropped) for study in found):
        raise InputError(f"--split: {table} has no study of split {split!r}")
    return found


def written_before(output: Path) -> list[dict[str, Any]]:
    """The reports that an earlier call has written.

    Raises:
        InputError: the file is another one, which must not be overwritten.
    """
    if not output.exists():
        return []
    rows = read_rows(output)
    whole, _, last = output.read_bytes().rpartition(b"\n")
    complete = len(whole.splitlines())
    ours = all(isinstance(row, dict) and {"report", "error"} & set(row) for row in rows)
    if not ours or len(rows) < complete or not last.startswith(TORN[: len(last)]):
        raise InputError(
            f"--output: {output} exists, and is not what --list writes; choose another name"
        )
    return [row for row in rows if "report" in row]


if __name__ == "__main__":
    run_command(main)
