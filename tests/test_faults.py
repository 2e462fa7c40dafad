"""What goes wrong in a long training: kills, full disks, bad numbers, no memory, broken images."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import emrrg
from emrrg import engine
from emrrg.config import TrainConfig
from emrrg.data.dataset import RecordStudies
from emrrg.data.loading import load_studies
from emrrg.distributed import World
from emrrg.engine import largest_that_fits, prepare, read_steps, training_step
from emrrg.errors import InputError
from emrrg.evaluation import evaluate_model
from emrrg.jsonl import read_rows
from emrrg.model import ReportGenerator
from emrrg.runs import find_checkpoint, read_checkpoint, read_index, read_json, read_run_config
from emrrg.system import out_of_memory

Train = Callable[..., int]
Launch = Callable[..., "subprocess.Popen[str]"]
CPU = torch.device("cpu")
ADAPT = shlex.split("--regime peft --lora-targets X,llm --lora-dropout 0.3")
FILES = shlex.split(
    "--dataset custom --image-size 32 --decoder-dim 32 --decoder-layers 2 --decoder-heads 2 "
    "--vocab-size 100 --batch-size 3 --epochs 2 --num-beams 1 --max-new-tokens 6 --log-every 1"
)


def weights(run: Path, name: str | None = None) -> dict[str, Tensor]:
    folder = run / "checkpoints" / (name or read_index(run)["last"])
    return load_file(folder / "weights.safetensors")


def moments(run: Path, name: str) -> dict[str, Tensor]:
    tensors = load_file(run / "checkpoints" / name / "optimizer.safetensors")
    return {key: tensor for key, tensor in tensors.items() if not key.startswith("rng:")}


def rows(run: Path, key: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(run / "metrics.jsonl") if key in row]


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def assert_same_end(run: Path, expected: Path) -> None:
    for key in ("loss", "lr"):
        assert [r[key] for r in rows(run, key)] == [r[key] for r in rows(expected, key)]
    assert [r["val"] for r in rows(run, "val")] == [r["val"] for r in rows(expected, "val")]
    assert_same_bits(weights(run), weights(expected))
    assert (run / "predictions.json").read_text() == (expected / "predictions.json").read_text()


# --- Kills ---

# Before the checkpoint of step 4 is whole there are eight flushes to disk, and as many renames.
KILLED_AT_STEP = """
import os, signal
real, calls = emrrg.train.training_step, []
def step(*args):
    calls.append(1)
    if len(calls) == {n}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
emrrg.train.training_step = step
"""
KILLED_WHILE_SAVING = """
import os, signal
import emrrg.engine
save = emrrg.engine.save_checkpoint
def saving(run, step, *args, **settings):
    if step == 4:
        for name in ("fsync", "replace", "rename"):
            def dying(*a, real=getattr(os, name), calls=calls, **k):
                calls.append(1)
                if len(calls) == {n}:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*a, **k)
            setattr(os, name, dying)
    return save(run, step, *args, **settings)
calls = []
emrrg.engine.save_checkpoint = saving
"""


@pytest.fixture(scope="module")
def undisturbed(
    train: Train, trained: Path, brief: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Nine steps that nothing disturbed; not to be written to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    flags = [*brief, *ADAPT, "--epochs", 3, "--init", trained]
    assert train(*flags, "--save-every", 2, "--output", run) == 0
    return run


def test_a_kill_costs_the_steps_since_the_last_checkpoint(
    train: Train, launch: Launch, trained: Path, undisturbed: Path, brief: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = [*brief, *ADAPT, "--epochs", 3, "--init", trained, "--save-every", 2, "--output", run]
    process = launch(*flags, before=KILLED_AT_STEP.format(n=6))
    process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL
    assert len(rows(run, "loss")) == 5 and read_index(run)["last"] == "step-000004"
    # A line that the kill tore is no line.
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert train("--resume", run) == 0
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize(
    "n", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 17) if n != 5)]
)
def test_a_kill_while_a_checkpoint_is_written(
    train: Train, launch: Launch, trained: Path, undisturbed: Path, brief: list[str],
    tmp_path: Path, n: int,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    flags = [*brief, *ADAPT, "--epochs", 3, "--init", trained, "--save-every", 2, "--output", run]
    process = launch(*flags, before=KILLED_WHILE_SAVING.format(n=n))
    process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL
    for which in ("last", "best"):
        assert read_checkpoint(run, which).state["step"] in (3, 4)
    emrrg.load(run)
    assert train("--resume", run) == 0
    assert_same_end(run, undisturbed)
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"index.json", *(read_index(run)[which] for which in ("last", "best"))}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_random(
    train: Train, launch: Launch, trained: Path, brief: list[str], tmp_path: Path
) -> None:
    """Whenever the kill comes, everything can be read, and --resume goes on to the same end.

    A quarter of them comes while the program starts, the others some steps later.
    """
    flags = [*brief, *ADAPT, "--epochs", 40, "--eval-every", 10, "--init", trained]
    flags += ["--save-every", 2]
    expected = tmp_path / "expected"
    process = launch(*flags, "--output", expected)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    draw, ends, saved, halves = random.Random(1), 0, set(), 0
    run = tmp_path / "run-0"
    for kill in range(20):
        again = (run / "config.json").exists()
        process = launch(*(["--resume", run] if again else [*flags, "--output", run]))
        if kill % 4 == 0:
            time.sleep(draw.uniform(0.1, 4))
        else:
            steps = len(rows(run, "loss")) + draw.randrange(1, 14)
            deadline = time.monotonic() + 300
            while len(rows(run, "loss")) < steps and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.1))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        halves += any((run / "checkpoints").glob(".*.tmp"))
        if read_index(run):
            saved.add(read_checkpoint(run, "last").state["step"])
            read_checkpoint(run, "best")
            emrrg.load(run)
        if process.returncode == 0:  # it was done before the kill came
            assert_same_end(run, expected)
            ends, run = ends + 1, tmp_path / f"run-{ends + 1}"
    print(f"20 kills, {halves} in the middle of a checkpoint, at {len(saved)} steps, {ends} ends")
    assert len(saved) >= 8
    assert train("--resume", run) == 0
    assert_same_end(run, expected)


def test_sigterm_to_all_processes_saves(
    launch: Launch, annotated: Callable[[], Path], tmp_path: Path
) -> None:
    """As a scheduler sends it: also to the processes that read images, which leave it to us."""
    path, run = annotated(), tmp_path / "run"
    data = ["--annotation", path, "--images", path.parent, "--workers", 2]
    process = launch(*FILES, *data, "--epochs", 100000, "--eval-every", 0, "--output", run)
    deadline = time.monotonic() + 100
    while len(rows(run, "loss")) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert f"interrupted; go on with: python -m emrrg.train --resume {run}" in out
    assert "Traceback" not in err
    steps = len(rows(run, "loss"))
    assert read_checkpoint(run, "last").state["step"] == steps
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, 0)


def test_one_process_at_a_time_writes_a_run(train: Train, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    hold = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, run / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"\n"
        with pytest.raises(InputError, match=f"{run}: another process is training there"):
            train("--resume", run, "--epochs", 3)
        other.kill()
    assert read_run_config(run).epochs == 2
    assert train("--resume", run, "--epochs", 3) == 0


@pytest.mark.slow
def test_a_kill_while_phantoms_are_drawn_leaves_nobody(
    launch: Launch, small: list[str], tmp_path: Path
) -> None:
    flags = [*small, "--train-studies", 50_000, "--image-size", 128]
    process = launch(*flags, "--output", tmp_path / "run")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline, drawing = time.monotonic() + 100, list[str]()
    while len(drawing) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        drawing = children.read_text().split()
        time.sleep(0.05)
    process.kill()
    deadline = time.monotonic() + 10
    while left := [pid for pid in drawing if Path("/proc", pid).exists()]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(int(pid), signal.SIGKILL)
            pytest.fail("they wait for work that will never come")
        time.sleep(0.05)


def test_a_state_that_does_not_say_all(train: Train, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    file = find_checkpoint(run, "last") / "state.json"
    state = read_json(file)
    for name in ("step_studies", "waited"):
        file.write_text(json.dumps({k: v for k, v in state.items() if k != name}))
        with pytest.raises(InputError, match=f"{file}: holds no '{name}'"):
            train("--resume", run, "--epochs", 3)


# --- Disks that are full ---


def test_a_checkpoint_that_cannot_be_written(
    train: Train, trained: Path, undisturbed: Path, brief: list[str], tmp_path: Path
) -> None:
    """A limit on file sizes stands for the full disk: the system refuses the write."""
    run = tmp_path / "run"
    flags = [*brief, *ADAPT, "--epochs", 3, "--init", trained, "--save-every", 2, "--output", run]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, calls = engine.save_checkpoint, []

    def saving(*args: Any, **settings: Any) -> None:
        calls.append(args[1])
        if args[1] == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            save(*args, **settings)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "save_checkpoint", saving)
        with pytest.raises(InputError) as error:
            train(*flags)
    assert f"{run}/checkpoints/step-000004: cannot be written" in str(error.value)
    assert "--resume" in str(error.value) and "\n" not in str(error.value)
    assert calls == [2, 3, 4]
    assert read_checkpoint(run, "last").state["step"] == 3
    assert not list((run / "checkpoints").glob(".*"))
    assert train("--resume", run) == 0
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_a_disk_that_is_full_in_earnest(launch: Launch, small: list[str], tmp_path: Path) -> None:
    """Room for the base and two checkpoints of 12 MB, not for three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        run = disk / "run"
        process = launch(*small, "--save-every", 1, "--output", run)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 2, err
        (line,) = err.strip().splitlines()
        assert str(run / "checkpoints") in line and "No space left on device" in line
        assert "make room and go on with --resume" in line
        step = read_checkpoint(run, "last").state["step"]
        assert 1 <= step < 6 and emrrg.load(run) is not None
        subprocess.run([*mount[:-2], "-o", "remount,size=200m", str(disk)], check=True)
        process = launch("--resume", run)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        process = launch(*small, "--save-every", 1, "--output", disk / "expected")
        assert process.communicate(timeout=200) and process.returncode == 0
        assert_same_end(run, disk / "expected")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("what", ["fsync", "replace", "rename"])
@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("step", [1, 2], ids=["again", "next"])
def test_no_room_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, call: int, step: int
) -> None:
    """Each flush and rename of a save fails in turn; the checkpoint before it stays the last.

    Or one of the two is the last, where the step is the same: it was validated meanwhile.
    """
    tensors, new = {"a": torch.arange(5.0)}, {"a": torch.zeros(5)}
    engine.save_checkpoint(tmp_path, 1, tensors, tensors, {"step": 1}, best=True)
    real, calls = getattr(os, what), [0]

    def failing(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == call + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, what, failing)
        try:
            engine.save_checkpoint(tmp_path, step, new, tensors, {"step": step}, best=False)
            failed = False
        except InputError as error:
            failed = True
            assert "No space left on device" in str(error)
    now = read_checkpoint(tmp_path, "last")
    assert failed == (calls[0] > call)
    assert now.state["step"] == (1 if failed else step)
    whole = [new["a"].tolist()] if not failed else [tensors["a"].tolist()]
    if failed and step == 1:
        whole.append(new["a"].tolist())
    assert now.weights["a"].tolist() in whole
    if step == 2:
        torch.testing.assert_close(read_checkpoint(tmp_path, "best").weights["a"], tensors["a"])
    engine.save_checkpoint(tmp_path, 2, {"a": torch.ones(5)}, tensors, {"step": 2}, best=False)
    assert read_checkpoint(tmp_path, "last").weights["a"].tolist() == [1.0] * 5


def test_a_log_that_cannot_be_written(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, row: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("emrrg.progress.append_row", full)
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written \(No space left"):
        train(*small, "--output", tmp_path / "run")


# --- Numbers that are not finite ---


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], value: float = float("nan")) -> None:
    """Make the loss of some steps a number that is none."""
    real, calls = ReportGenerator.forward, [0]

    def forward(self: ReportGenerator, *args: Any) -> Tensor:
        loss = real(self, *args)
        calls[0] += 1
        return loss * value if calls[0] in steps else loss

    monkeypatch.setattr(ReportGenerator, "forward", forward)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_changes_nothing(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], value: float,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    spoil(monkeypatch, {2}, value)
    assert train(*small, "--save-every", 1, "--keep-last", 9, "--output", run) == 0
    before, after = ("step-000001", "step-000002")
    assert_same_bits(weights(run, before), weights(run, after))
    assert_same_bits(moments(run, before), moments(run, after))
    (row,) = rows(run, "skipped")
    assert row["step"] == 2 and len(row["skipped"]) == 4
    assert all(name.startswith("phantom-") for name in row["skipped"])
    assert f"step 2: the loss is {value}; skipped ({row['skipped'][0]}, " in capsys.readouterr().out
    losses = [row["loss"] for row in rows(run, "loss")]
    assert losses[1] is None and all(torch.isfinite(torch.tensor([losses[0], *losses[2:]])))


def test_a_gradient_that_is_no_number_changes_nothing(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = tmp_path / "run", engine.backward

    def backward(session: Any, *args: Any, **settings: Any) -> float:
        loss = real(session, *args, **settings)
        if not read_index(run).get("last") and session.optimizer.state:  # the second step
            next(iter(session.parameters.values())).grad.view(-1)[0] = torch.inf
        return loss

    monkeypatch.setattr(engine, "backward", backward)
    assert train(*small, "--save-every", 2, "--output", run) == 0
    assert [row["step"] for row in rows(run, "skipped")] == [2]


def test_a_run_of_bad_steps_ends_it_with_its_state_saved(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, {2, 4, 5, 6})  # one alone is survived
        with pytest.raises(InputError) as error:
            train(*small, "--bad-steps", 3, "--epochs", 4, "--output", run)
    last = rows(run, "skipped")[-1]["skipped"]
    for text in ("--lr: ", "3 steps in a row", ", ".join(last[:4]), str(run)):
        assert text in str(error.value), text
    assert read_checkpoint(run, "last").state["step"] == 6
    assert train("--resume", run) == 0
    assert len(rows(run, "loss")) == 12 and len(rows(run, "skipped")) == 4


# --- Memory ---


def test_out_of_memory_says_the_batch_and_what_to_do(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: ReportGenerator, *args: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(ReportGenerator, "forward", forward)
    with pytest.raises(InputError) as error:
        train(*small, "--output", tmp_path / "run")
    for text in ("--batch-size: 4 studies (phantom-", "1 views", "report tokens", "--auto-batch",
                 "--accumulate", "--checkpointing", "--llm-int8"):  # fmt: skip
        assert text in str(error.value), text
    assert "\n" not in str(error.value)


def test_out_of_memory_in_the_update(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one makes AdamW's moments, when the batch has been through the network already."""

    def step(*args: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(InputError, match=r"--batch-size: 4 studies \(phantom-.*do not fit"):
        train(*small, "--output", tmp_path / "run")


def test_out_of_memory_while_reports_are_written(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_run_config(trained)
    studies = load_studies(config, 32, ("test",))["test"]

    def generate(self: ReportGenerator, *args: Any) -> list[str]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(ReportGenerator, "generate_batch", generate)
    with pytest.raises(InputError) as error:
        evaluate_model(emrrg.load(trained), studies, config, CPU)
    for text in ("--eval-batch-size: reports of 4 studies (phantom-", "of cpu", "--num-beams"):
        assert text in str(error.value), text
    assert "\n" not in str(error.value)


def test_what_the_cpu_says_when_memory_runs_out() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(error.value)
    assert out_of_memory(MemoryError()) and out_of_memory(torch.OutOfMemoryError(""))
    for said in ("CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"):
        assert out_of_memory(RuntimeError(said))
    assert not out_of_memory(RuntimeError("shapes disagree"))


def test_the_largest_that_fits() -> None:
    for limit in (1, 2, 7, 8, 100):
        for most in range(limit + 3):
            tried: list[int] = []

            def fits(size: int, most: int = most, tried: list[int] = tried) -> bool:
                tried.append(size)
                return size <= most

            assert largest_that_fits(fits, limit) == min(most, limit)
            assert len(tried) <= 15 and max(tried) <= max(2 * most, 1)


def test_auto_batch_finds_it(
    train: Train, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ReportGenerator.forward

    def forward(self: ReportGenerator, images: Tensor, *args: Any) -> Tensor:
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, images, *args)

    monkeypatch.setattr(ReportGenerator, "forward", forward)
    run = tmp_path / "run"
    assert train(*small, "--auto-batch", "--output", run) == 0
    assert read_json(run / "config.json")["batch_size"] == 5
    monkeypatch.setattr(ReportGenerator, "forward", lambda *_: forward(*_[:1], [0] * 9))
    with pytest.raises(InputError, match="do not fit into the memory of cpu"):
        train(*small, "--auto-batch", "--output", tmp_path / "none")


# --- Images, and who reads them ---


def break_images(path: Path, *names: str) -> None:
    for name in names:
        (path.parent / name).write_bytes((path.parent / name).read_bytes()[:50])


def test_broken_images_are_left_out_named_and_counted(
    train: Train, annotated: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = annotated(), tmp_path / "run"
    break_images(path, "3-1.png", "9-0.png", "11-0.png")
    (path.parent / "5-0.png").unlink()
    flags = [*FILES, "--annotation", path, "--images", path.parent, "--output", run]
    assert train(*flags, "--bad-images", "skip") == 0
    said = capsys.readouterr().out
    for name in ("3-1.png", "5-0.png", "9-0.png"):  # 9-0.png: of a study for validation
        assert said.count(f"left out: {path.parent / name}") == 1
    assert len(rows(run, "unreadable")) == 3
    assert read_checkpoint(run, "last").state["bad_images"] == 6  # three studies in two epochs
    predictions = json.loads((run / "predictions.json").read_text())
    assert [row["id"] for row in predictions] == ["study-10"]
    (unread,) = read_json(run / "scores.json")["test"]["unreadable"]
    assert "11-0.png" in unread


def test_the_loss_is_of_what_could_be_read(annotated: Callable[[], Path], tmp_path: Path) -> None:
    path = annotated()
    config = TrainConfig(
        dataset="custom", annotation=str(path), images=str(path.parent), image_size=32,
        decoder_dim=32, decoder_layers=1, vocab_size=100, batch_size=2, drop_path=0.0,
        preset="tiny", bad_images="skip", regime="full", bucket=False,
    )  # fmt: skip

    def losses(studies: list[int], name: str) -> tuple[float, dict[str, Tensor]]:
        session = prepare(config, tmp_path / name, CPU, World(), resuming=False)
        step = training_step(session, studies, read_steps(session, [studies]), lambda: False)
        return step.loss, {n: p.detach() for n, p in session.parameters.items()}

    expected, moved = losses([0, 1, 4, 5], "without")
    break_images(path, "2-0.png", "3-0.png", "6-0.png")
    got, moved_too = losses([0, 1, 2, 3, 6, 4, 5], "with")  # the second batch has nothing left
    assert got == pytest.approx(expected, rel=1e-6)
    for name, value in moved.items():
        torch.testing.assert_close(moved_too[name], value, atol=1e-5, rtol=1e-4, msg=name)
    nothing, _ = losses([2, 3], "nothing")
    assert nothing != nothing  # nan: a skipped step


def test_images_none_of_which_can_be_read(
    train: Train, annotated: Callable[[], Path], tmp_path: Path
) -> None:
    path, run = annotated(), tmp_path / "run"
    break_images(path, *(f"{k}-0.png" for k in range(8)))
    flags = [*FILES, "--annotation", path, "--images", path.parent, "--bad-images", "skip"]
    with pytest.raises(InputError) as error:
        train(*flags, "--bad-steps", 2, "--output", run)
    said = str(error.value)
    assert said.startswith("--bad-images: 2 steps in a row trained nothing") and "-0.png" in said
    assert str(run) in said and "\n" not in said
    break_images(path, "10-0.png", "11-0.png")
    with pytest.raises(InputError, match="--bad-images: no test study could be read"):
        train(*flags, "--dry-run")


def test_a_dry_run_leaves_out_what_cannot_be_read(
    train: Train, annotated: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = annotated()
    break_images(path, "3-0.png", "10-0.png")
    flags = [*FILES, "--annotation", path, "--images", path.parent, "--bad-images", "skip"]
    assert train(*flags, "--dry-run") == 0
    assert "reports/s; the first:" in capsys.readouterr().out


def test_nothing_to_score(trained: Path, annotated: Callable[[], Path], small: list[str]) -> None:
    path = annotated()
    break_images(path, "10-0.png", "11-0.png")
    config = TrainConfig(
        dataset="custom", annotation=str(path), images=str(path.parent), bad_images="skip"
    )
    studies = load_studies(config, 32, ("test",))["test"]
    with pytest.raises(InputError, match=r"no study of this split could be read.*10-0\.png"):
        evaluate_model(emrrg.load(trained), studies, config, CPU)


def test_readers_change_nothing(
    train: Train, annotated: Callable[[], Path], tmp_path: Path
) -> None:
    path = annotated()
    flags = [*FILES, "--annotation", path, "--images", path.parent]
    assert train(*flags, "--workers", 0, "--output", tmp_path / "none") == 0
    assert train(*flags, "--workers", 2, "--output", tmp_path / "two") == 0
    assert_same_end(tmp_path / "two", tmp_path / "none")
    break_images(path, "3-1.png")
    with pytest.raises(InputError, match=r"3-1\.png"):
        train(*flags, "--workers", 2, "--output", tmp_path / "broken")


def test_a_reader_that_dies(
    train: Train, annotated: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, owner = annotated(), os.getpid()
    real = RecordStudies.__getitem__

    def dying(self: RecordStudies, index: int) -> Any:
        if os.getpid() != owner and index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, index)

    monkeypatch.setattr(RecordStudies, "__getitem__", dying)
    flags = [*FILES, "--annotation", path, "--images", path.parent, "--workers", 1]
    with pytest.raises(InputError) as error:
        train(*flags, "--output", tmp_path / "run")
    assert str(error.value).startswith("--workers: a process that reads images died")
    assert "\n" not in str(error.value)


# --- Long runs ---


@pytest.mark.slow
def test_memory_is_that_of_this_program_alone() -> None:
    """The system's own figure begins with what the program before held that started this one."""
    then = "from emrrg.system import memory_bytes; print(memory_bytes())"
    code = (
        f"import os, sys; held = b'x' * 2**30; "
        f"os.execv(sys.executable, [sys.executable, '-c', {then!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 50e6 < int(done.stdout) < 2**30, done.stdout


# What the process holds now, instead of the most that it ever held.
HELD = """
import os
import emrrg.progress
def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
emrrg.progress.memory_bytes = held
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_soak_of_two_thousand_steps_takes_no_more_memory(
    launch: Launch, small: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ["--train-studies", 80, "--epochs", 100, "--eval-every", 20, "--save-every", 50]
    process = launch(*small, *flags, "--log-every", 20, "--output", run, before=HELD)
    _, err = process.communicate(timeout=1700)
    assert process.returncode == 0, err
    held = {row["step"]: row["memory_gib"] * 1024 for row in rows(run, "loss")}
    assert max(held) == 2000
    first = max(mib for step, mib in held.items() if 400 < step <= 800)  # after a validation
    last = max(mib for step, mib in held.items() if step > 1600)
    print(f"MiB: {held[20]:.0f} at step 20, {first:.0f} to step 800, {last:.0f} to step 2000")
    assert last - first < 8, held
    assert find_checkpoint(run, "last").name == "step-002000"
    assert len(list((run / "checkpoints").glob("step-*"))) <= 2
