"""Where a run stands: counters, the bar, log lines, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emrrg.config import TrainConfig
from emrrg.errors import InputError
from emrrg.jsonl import append_row, read_rows, write_rows
from emrrg.runs import writing
from emrrg.system import memory_bytes

log = logging.getLogger("emrrg.train")

SAVED = ("step", "epoch", "batch", "samples", "bad_steps", "bad_images", "waited", "losses")
PICTURES = 120.0  # seconds between them
ESTIMATE_AFTER = 20  # steps at most, after which the time of an epoch is told


class Progress:
    """Counts steps and tells people and files about them.

    Args:
        run: the run's folder.
        config: the flags.
        total_steps: optimizer steps of the whole run.
        epoch_steps: of one epoch.
        quiet: no bar, no lines, no files (every process but the first).
    """

    def __init__(
        self, run: Path, config: TrainConfig, total_steps: int, epoch_steps: int, quiet: bool
    ) -> None:
        self.path = run / "metrics.jsonl"
        self.run = run
        self.log_every, self.epochs, self.patience = (
            config.log_every, config.epochs, config.patience,
        )  # fmt: skip
        self.tensorboard = config.tensorboard and not quiet
        self.total_steps, self.epoch_steps = total_steps, epoch_steps
        self.quiet = quiet
        self.step = self.epoch = self.batch = self.samples = 0
        self.bad_steps = self.bad_images = 0
        self.waited = 0  # validations since the best one
        self.best_score = -math.inf
        self.losses: list[float] = []  # since the last line
        self._unread: set[str] = set()
        self._window_samples = self._window_tokens = self._first_step = 0
        self._drawn = -math.inf
        self._board: Any = None
        if self.tensorboard:
            summary_writer()

    def __enter__(self) -> Progress:
        self._bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            unit="step",
            disable=self.quiet or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        if self.tensorboard:  # points after a resumed run's step are dropped
            folder = str(self.run / "tensorboard")
            self._board = summary_writer()(folder, purge_step=self.step + 1 if self.step else None)
        self._first_step = self.step
        self._started = self._window_started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def advance(self, ids: Sequence[str], loss: float, lr: float, tokens: int) -> None:
        """Count one optimizer step; every `log_every` steps write a line.

        Args:
            ids: its studies, those of all processes.
            loss: averaged over its tokens; nan or inf where the step was skipped.
            lr: its learning rate.
            tokens: report tokens.
        """
        self.step += 1
        self.batch += 1
        self.samples += len(ids)
        self._window_samples += len(ids)
        self._window_tokens += tokens
        if math.isfinite(loss):
            self.bad_steps = 0
            self.losses.append(loss)
        else:
            self.bad_steps += 1
            self.say(f"step {self.step}: the loss is {loss}; skipped ({', '.join(ids)})")
            self.write({"step": self.step, "skipped": list(ids)})
        self._bar.update()
        now = time.monotonic()
        taken = self.step - self._first_step
        pace = (now - self._started) / taken
        if taken == min(ESTIMATE_AFTER, self.epoch_steps // 4):
            self.say(
                f"an epoch of {self.epoch_steps} steps takes about {clock(pace * self.epoch_steps)}"
            )
        if self.step % self.log_every and self.step != self.total_steps:
            return
        seconds = max(1e-9, now - self._window_started)
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "lr": lr,
            "studies_per_second": self._window_samples / seconds,
            "tokens_per_second": self._window_tokens / seconds,
            "memory_gib": memory_bytes() / 2**30,
        }
        loss_text = "none" if row["loss"] is None else f"{row['loss']:.3f}"
        shown = (
            f"loss {loss_text}  lr {lr:.2e}  {row['studies_per_second']:.1f} studies/s  "
            f"{row['tokens_per_second']:.0f} tokens/s  {row['memory_gib']:.2f} GiB"
        )
        self._bar.set_postfix_str(shown)
        if self._bar.disable and not self.quiet:
            eta = clock(pace * (self.total_steps - self.step))
            log.info("step %d/%d  %s  ETA %s", self.step, self.total_steps, shown, eta)
        self.write(row)
        self.losses, self._window_samples, self._window_tokens = [], 0, 0
        self._window_started = now

    def due(self) -> bool:
        """Whether it is time for another picture; they take half a second each."""
        now = time.monotonic()
        if self.quiet or now - self._drawn < PICTURES:
            return False
        self._drawn = now
        return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens meanwhile (validation, a checkpoint) is not counted as time of a step."""
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self._started += seconds
        self._window_started += seconds

    def unreadable(self, failures: Sequence[str]) -> None:
        """Count studies that were left out because an image could not be read; name each once."""
        self.bad_images += len(failures)
        for line in failures:
            if line not in self._unread:
                self._unread.add(line)
                self.say(f"left out: {line}")
                self.write({"step": self.step, "unreadable": line})

    @property
    def over(self) -> bool:
        """Whether there is nothing left to train: no epoch, no step, or no patience."""
        if self.batch:  # its epoch is not validated yet
            return False
        impatient = 0 < self.patience <= self.waited
        if impatient:
            self.say(f"stopped: no better score in {self.waited} validations")
        return impatient or self.epoch >= self.epochs or self.step >= self.total_steps

    def next_epoch(self) -> None:
        """An epoch is over, and validated."""
        self.epoch += 1
        self.batch = 0

    def judge(self, score: float) -> bool:
        """Note a validation's score; whether it is the best so far."""
        best = score > self.best_score
        self.best_score = max(score, self.best_score)
        self.waited = 0 if best else self.waited + 1
        return best

    def say(self, text: str) -> None:
        """A line that does not tear the bar."""
        if self.quiet:
            return
        if self._bar.disable:
            log.info("%s", text)
        else:
            tqdm.write(text, file=sys.stdout)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append to `metrics.jsonl`; numbers go to TensorBoard too."""
        if self.quiet:
            return
        with writing(self.path):
            append_row(self.path, row)
        if self._board is not None:
            numbers = {**row, **{f"val/{k}": v for k, v in row.get("val", {}).items()}}
            for name, value in numbers.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self._board.add_scalar(name, value, row["step"])

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        score = self.best_score if math.isfinite(self.best_score) else None
        return {**{name: getattr(self, name) for name in SAVED}, "best_score": score}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to a saved state, and drop the log lines that came after it."""
        for name in SAVED:
            setattr(self, name, state[name])
        self.best_score = -math.inf if state["best_score"] is None else state["best_score"]
        if not self.quiet:
            kept = [r for r in read_rows(self.path) if r["step"] <= self.step]
            # A validation at the end of an epoch that is not over yet comes again.
            write_rows(self.path, [r for r in kept if "val" not in r or r["epoch"] <= self.epoch])

    def start(self) -> None:
        """Begin at step 0; what an attempt left that was ended before its first checkpoint goes."""
        if not self.quiet:
            write_rows(self.path, [])


def summary_writer() -> Any:
    """TensorBoard's writer.

    Raises:
        InputError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "--tensorboard: needs TensorBoard: pip install 'emrrg[tensorboard]'"
        ) from error
    return SummaryWriter


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
