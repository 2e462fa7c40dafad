"""Several processes: the numbers of one, every study scored once, one message when one is gone.

The processes are started as torchrun starts them, by its environment variables, with gloo on the
CPU; torchrun itself is in the slow tier.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from emrrg.distributed import World, joined, local_device, said_once
from emrrg.errors import InputError
from emrrg.jsonl import read_rows
from emrrg.runs import read_index
from emrrg.system import pick_device

Train = Callable[..., int]
Start = Callable[..., list[subprocess.Popen[str]]]

PROGRAM = """
import os, signal, sys
import torch
import emrrg.engine, emrrg.evaluation, emrrg.train
from emrrg.config import run_command
from emrrg.distributed import joined
score = emrrg.evaluation.score_reports
emrrg.evaluation.score_reports = lambda *a, **k: score(*a, **{**k, "meteor": "off"})
emrrg.train.INTERVALS = 10
emrrg.train.plot_curves = lambda *_: None
main = emrrg.train.main
rank = int(os.environ["RANK"])
if rank:  # process 0 alone writes: in another one these fail
    emrrg.engine.save_base = emrrg.engine.save_checkpoint = emrrg.engine.write_json = None
    emrrg.train.write_json = emrrg.train.write_predictions = emrrg.train.write_samples = None
    emrrg.train.plot_curves = emrrg.train.mark_finished = None
    emrrg.progress.append_row = emrrg.progress.write_rows = None
"""


@pytest.fixture
def start() -> Iterator[Start]:
    """Run a program in n processes; those that are left at the end are killed."""
    running: list[subprocess.Popen[str]] = []

    def begin(count: int, program: str, **environment: str) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(count):
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            running.append(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM + textwrap.dedent(program)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env={
                        **os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
                        **{name: str(value) for name, value in places.items()}, **environment,
                    },
                )
            )  # fmt: skip
        return running[-count:]

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(processes: list[subprocess.Popen[str]], seconds: float = 200) -> None:
    """Wait; every one must have ended well."""
    for process in processes:
        _, err = process.communicate(timeout=seconds)
        assert process.returncode == 0, err


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / read_index(run)["last"] / "weights.safetensors")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run / "metrics.jsonl") if "loss" in row]


def assert_same_training(run: Path, expected: Path) -> None:
    """Losses, weights, and every study's report, up to the order of sums."""
    assert losses(run) == pytest.approx(losses(expected), rel=2e-5)
    one = weights(expected)
    for name, got in weights(run).items():
        torch.testing.assert_close(got, one[name], atol=5e-5, rtol=1e-3, msg=name)
    texts = [(folder / "predictions.json").read_text() for folder in (run, expected)]
    assert json.loads(texts[0]) == json.loads(texts[1])
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (run, expected)]
    assert scores[0]["test" if "test" in scores[0] else "after"]["pairs"] == 5


# Seven studies in steps of four or six: a last step with fewer studies than processes.
DATA = ["--train-studies", "13", "--test-studies", "5", "--drop-path", "0"]
ADAPT = "--regime peft --lora-targets X,llm --lora-dropout 0 --test-studies 5".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def base(train: Train, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single process, four studies a step, without dropout."""
    run = tmp_path_factory.mktemp("base") / "run"
    assert train(*small, *DATA, "--output", run) == 0
    return run


def test_two_and_three_processes_equal_one(
    train: Train, small: list[str], brief: list[str], base: Path, tmp_path: Path, start: Start
) -> None:
    flags = [*small, *DATA]
    two = start(
        2,
        f"""
        flags, brief, base, adapt = {flags!r}, {brief!r}, {str(base)!r}, {ADAPT!r}
        out = lambda name: ["--output", {str(tmp_path)!r} + "/" + name]
        with joined(torch.device("cpu")) as world:
            assert main([*flags, "--batch-size", "2", *out("two")]) == 0
            synchronised, replicated = [], emrrg.engine.replicated
            def counted(*args):
                network = replicated(*args)
                def hook(_, bucket):
                    if bucket.is_last():
                        synchronised.append(1)
                    done = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
                    return done.get_future().then(lambda f: f.value()[0] / 2)
                network.register_comm_hook(None, hook)
                return network
            emrrg.engine.replicated = counted
            assert main([*flags, "--batch-size", "1", "--accumulate", "2", "--no-bucket",
                         *out("accumulated")]) == 0
            # Once a step, not once a batch; and once before them all.
            assert len(synchronised) == 8 + 1, synchronised
            emrrg.engine.replicated = replicated
            assert main([*brief, *adapt, "--batch-size", "2", "--init", base, *out("peft")]) == 0
            assert main([*brief, *adapt, "--batch-size", "2", "--init", base, "--shard-llm",
                         *out("sharded")]) == 0
            real, calls = emrrg.train.training_step, []
            def step(*args):
                calls.append(1)
                if len(calls) == 3 and rank == 1:  # one of them is told; all stop after this step
                    signal.raise_signal(signal.SIGTERM)
                return real(*args)
            emrrg.train.training_step = step
            assert main([*flags, "--batch-size", "2", *out("stopped")]) == 130
        """,
    )
    assert train(*flags, "--no-bucket", "--output", tmp_path / "one-no-bucket") == 0
    assert train(*flags, "--batch-size", 6, "--output", tmp_path / "one-of-six") == 0
    assert train(*brief, *ADAPT, "--init", base, "--output", tmp_path / "one-peft") == 0
    finish(two)
    stopped = tmp_path / "stopped"
    assert read_index(stopped)["last"] == "step-000003"
    for name in ("by-one", "by-three"):
        shutil.copytree(stopped, tmp_path / name)
    three = start(
        3,
        f"""
        flags = {flags!r}
        write, written = emrrg.model.ReportGenerator.generate_batch, []
        def counted(model, images, *rest):
            written.append(len(images))
            return write(model, images, *rest)
        emrrg.model.ReportGenerator.generate_batch = counted
        with joined(torch.device("cpu")) as world:
            assert main([*flags, "--batch-size", "2", "--output", "{tmp_path}/three"]) == 0
            # Three studies validated twice and five tested, each by one of the processes.
            assert sum(map(sum, world.gather(written))) == 2 * 3 + 5
            assert main(["--resume", "{tmp_path}/by-three"]) == 0
            real, calls = emrrg.train.training_step, []
            def step(*args):
                calls.append(1)
                if len(calls) == 2 and rank == 2:
                    signal.raise_signal(signal.SIGINT)
                return real(*args)
            emrrg.train.training_step = step
            assert main([*flags, "--batch-size", "2", "--output", "{tmp_path}/halves"]) == 130
            assert main(["--resume", "{tmp_path}/halves"]) == 0
            assert len(set(world.gather(torch.rand(()).item()))) == 3  # each has dropout of its own
            assert world.gather(rank) == [0, 1, 2]
            assert world.total([rank, 1.5], torch.device("cpu")) == [3.0, 4.5]
            assert world.once(lambda: rank) == 0
        """,
    )
    assert train("--resume", tmp_path / "by-one") == 0
    assert_same_training(tmp_path / "two", base)
    assert_same_training(tmp_path / "accumulated", tmp_path / "one-no-bucket")
    assert_same_training(tmp_path / "peft", tmp_path / "one-peft")
    assert_same_training(tmp_path / "sharded", tmp_path / "one-peft")
    assert_same_training(tmp_path / "by-one", base)
    finish(three)
    assert_same_training(tmp_path / "three", tmp_path / "one-of-six")
    assert_same_training(tmp_path / "by-three", base)
    # Sums of three depend on their order, so this order must not depend on the stop.
    whole, halves = weights(tmp_path / "three"), weights(tmp_path / "halves")
    assert not [name for name in whole if not torch.equal(halves[name], whole[name])]


def test_a_sharded_decoder_holds_its_share(start: Start) -> None:
    """The same numbers as whole, forward and backward; between calls each process holds half."""
    finish(
        start(
            2,
            """
            import copy
            from emrrg.decoder import Decoder, DecoderConfig
            from emrrg.distributed import shard_decoder
            from emrrg.lora import add_lora
            torch.manual_seed(0)
            whole = Decoder(DecoderConfig(vocab_size=50, hidden_size=32, intermediate_size=64,
                            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                            max_position_embeddings=64, hybrid_layers=(0,)))
            add_lora(whole, ["llm"], rank=2, dropout=0)
            for name, p in whole.named_parameters():
                p.requires_grad_(".lora_" in name or ".cross_attn." in name)
                if name.endswith((".B", ".alpha")):
                    torch.nn.init.normal_(p)
            part = copy.deepcopy(whole)
            frozen = {n: p.numel() for n, p in whole.named_parameters()
                      if ".layers." in n and ".lora_" not in n and ".cross_attn." not in n}
            with joined(torch.device("cpu")) as world:
                shard_decoder(part, world, torch.device("cpu"))
                def held():
                    parameters = dict(part.named_parameters())
                    return sum(parameters[n].to_local().numel() for n in frozen)
                torch.manual_seed(rank)  # each has data of its own
                x = torch.randn(3, 7, 32, requires_grad=True)
                vis = torch.randn(3, 4, 32)
                for grad in (True, False, True):
                    with torch.inference_mode(not grad):
                        assert held() == sum(frozen.values()) // 2
                        first, second = (d(x, vis=vis) for d in (whole, part))
                        torch.testing.assert_close(first, second)
                        assert held() == sum(frozen.values()) // 2
                    if grad:
                        for logits in (first, second):
                            logits.square().mean().backward()
                        assert held() == sum(frozen.values()) // 2
                for (name, p), q in zip(whole.named_parameters(), part.parameters()):
                    if p.requires_grad:
                        torch.testing.assert_close(q.grad, p.grad, msg=name)
                assert sum(p.requires_grad for p in part.parameters()) == 2 * 2 * 2 + 5
            """,
        )
    )


LONG = ["--epochs", "100000", "--eval-every", "0"]


def ended(processes: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Statuses, and what all of them wrote to stderr."""
    said = [process.communicate(timeout=90)[1] for process in processes]
    return [process.returncode for process in processes], "".join(said)


def wait_for_steps(run: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while len(read_rows(run / "metrics.jsonl")) < steps:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("victim", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_one_that_is_killed_ends_all(
    small: list[str], tmp_path: Path, start: Start, victim: int
) -> None:
    run = tmp_path / "run"
    flags = [*small, *LONG, "--output", str(run)]
    processes = start(3, f"run_command(lambda _: main({flags!r}))")
    wait_for_steps(run, 3)
    processes[victim].send_signal(signal.SIGKILL)
    statuses, said = ended(processes)
    assert statuses[victim] == -signal.SIGKILL
    assert all(status == 1 for k, status in enumerate(statuses) if k != victim), said
    lines = [line for line in said.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and "another process of this run was ended" in lines[0], said
    assert "Traceback" not in said


def test_what_one_cannot_read_ends_all_with_its_message(
    small: list[str], tmp_path: Path, start: Start, annotated: Callable[[], Path]
) -> None:
    path = annotated()
    broken = path.parent / "3-1.png"
    broken.write_bytes(broken.read_bytes()[:50])
    at = small.index("--dataset")
    flags = [
        *small[:at], *small[at + 2 :], "--dataset", "custom", "--annotation", str(path),
        "--images", str(path.parent), "--output", str(tmp_path / "run"), "--no-bucket",
        "--vocab-size", "100",
    ]  # fmt: skip
    statuses, said = ended(start(2, f"run_command(lambda _: main({flags!r}))"))
    assert sorted(statuses) == [1, 2], said
    lines = [line for line in said.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and str(broken) in lines[0], said


def test_what_all_find_is_said_once(tmp_path: Path, small: list[str], start: Start) -> None:
    flags = [*small, "--regime", "peft", "--output", str(tmp_path / "run")]
    statuses, said = ended(start(2, f"run_command(lambda _: main({flags!r}))"))
    assert statuses == [2, 2]
    assert said.count("--regime peft: adapts trained weights") == 1, said


def test_a_wrong_flag_is_said_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end, said_once():
        raise InputError("--lr: no")
    assert end.value.code == 2
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError), said_once():
        raise InputError("--lr: no")


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with joined(cpu) as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert not torch.distributed.is_initialized()
    assert World().gather("x") == ["x"] and World().total([2.0], cpu) == [2.0]
    assert World().once(lambda: 3) == 3
    assert local_device(cpu) == cpu
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert local_device(torch.device("cuda:3")) == torch.device("cuda:3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--device cuda:3: each process needs its own"):
        local_device(torch.device("cuda:3"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start them with torchrun"), joined(cpu):
        pass


def test_a_numbered_device_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched there, and its memory is told."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1", "cpu:0"):
        assert pick_device(name) == torch.device(name)
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(InputError, match=r"cuda:2 is not there \(2 CUDA devices\)"):
        pick_device("cuda:2")


@pytest.mark.slow
def test_torchrun(small: list[str], base: Path, tmp_path: Path) -> None:
    """The documented command line, to its end, and with a process killed."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "emrrg.train", *small, *DATA, "--batch-size", "2",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(base), rel=2e-5)

    run = tmp_path / "killed"
    process = subprocess.Popen(
        [*command, *LONG, "--output", str(run)], stderr=subprocess.PIPE, text=True
    )
    wait_for_steps(run, 3)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode != 0
    assert err.count("another process of this run was ended") <= 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_machines(small: list[str], base: Path, tmp_path: Path) -> None:
    """The documented command line on each: here both are this one, with a torchrun each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "1",
                "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1",
                "-m", "emrrg.train", *small, *DATA, "--batch-size", "2",
                "--output", str(tmp_path / "run"),
            ],
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        finish(machines, 800)
    finally:
        for machine in machines:
            if machine.poll() is None:  # torchrun ends its processes with it
                machine.terminate()
                machine.communicate(timeout=60)
    assert losses(tmp_path / "run") == pytest.approx(losses(base), rel=2e-5)


@pytest.mark.slow
def test_torchrun_that_is_interrupted_saves(small: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "emrrg.train", *small, *LONG, "--output", str(run),
        ],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for_steps(run, 5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    process.communicate(timeout=90)
    steps = int(read_index(run)["last"].removeprefix("step-"))
    assert steps >= 5 and len(losses(run)) == steps
