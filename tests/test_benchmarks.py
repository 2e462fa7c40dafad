"""The benchmarks' own arithmetic: counts, checks, records, comparison, page; not their figures."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    bench_finetune,
    bench_lora_linear,
    bench_selective_scan,
    conftest,
    encoders,
    machine,
    measure,
    memory,
    peers,
    report,
    results,
    roofline,
)
from benchmarks.work import Case, Contender, Work, errors
from emrrg import vision
from emrrg.vision import VISION_PRESETS, VisionMamba
from kernels import selective_scan as scan_kernels
from kernels.reference import scan_ref

ROOT = Path(__file__).parents[1]
MACHINE = {"device": "CPU of a test, 2 threads", "kind": "cpu", "cores": 2, "system": "linux"}
GPU = {"device": "NVIDIA H200", "kind": "cuda", "cores": 16, "system": "linux"}
RUN = {
    "time": "2030-01-01 00:00",
    "commit": "0123456789ab",
    "size": "default",
    "versions": {"torch": "2"},
    "rates": {"bytes": 2e10, "exps": 4e9, "flops": 2e11},
}
H200 = roofline.CARDS[-1]


def record(group: str, contender: str, median: float | None, **more: Any) -> results.Record:
    """A record with a spread of ten per cent."""
    times = (
        {}
        if median is None
        else {"q1": 0.95 * median, "q3": 1.05 * median, "rounds": 9, "iterations": 1}
    )
    return {
        "suite": "selective_scan", "group": group, "contender": contender, "ours": False,
        "median": median, "facts": {}, "series": None, "items": None, **times, **more,
    }  # fmt: skip


def stored(*records: results.Record, machine: dict[str, Any] = MACHINE) -> dict[str, Any]:
    """A results file of one run."""
    return results.merged(None, machine, RUN, records)


# Counts.


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [  # microseconds on an H200 with 16-bit activations: bytes, exponentials
        ((64, 768, 197), (18, 46), (32, 49)),
        ((32, 1024, 577), (36, 90), (62, 95)),
        ((8, 2048, 4096), (125, 321), (220, 337)),
        ((1, 2048, 65536), (251, 642), (440, 674)),
    ],
)
def test_scan_counts_are_those_of_the_published_floor(shape, forward, backward):
    scan = roofline.Scan(*shape, size=2)
    for counts, (moved, exps) in ((scan.forward(), forward), (scan.backward(), backward)):
        assert counts.bytes / 4.3e12 * 1e6 == pytest.approx(moved, rel=0.03)
        assert counts.exps / 4.18e12 * 1e6 == pytest.approx(exps, rel=0.01)
        assert roofline.floor(counts, H200) == pytest.approx(exps * 1e-6, rel=0.01)


def test_scan_counts_by_hand():
    scan = roofline.Scan(batch=2, dim=3, length=5, state=4, size=4)
    elements, states = 2 * 3 * 5, 2 * 3 * 5 * 4
    small = 4 * (2 * 2 * 5 * 4 + 3 * 4)
    assert scan.forward().bytes == 4 * 4 * elements + small
    assert scan.backward().bytes == 7 * 4 * elements + 2 * small
    assert scan.forward().exps == states + 4 * elements
    assert scan.mode("both-frozen") == scan.forward() + scan.backward()
    plain = roofline.Scan(2, 3, 5, 4, 4, gated=False)
    assert scan.forward().bytes - plain.forward().bytes == 4 * elements  # z is not read
    assert scan.forward().exps - plain.forward().exps == 2 * elements


def test_mamba_ssm_floor_is_the_published_one():
    forward, backward = roofline.peer_scan(roofline.Scan(64, 768, 197)) or (0, 0)
    assert forward / H200.issue == pytest.approx(254e-6, rel=0.01)
    assert backward / H200.issue == pytest.approx(520e-6, rel=0.01)
    forward, backward = roofline.peer_scan(roofline.Scan(1, 2048, 65536)) or (0, 0)
    assert forward / H200.issue == pytest.approx(1458e-6, rel=0.02)
    assert backward / H200.issue == pytest.approx(4556e-6, rel=0.01)
    assert roofline.peer_scan(roofline.Scan(1, 8, 33)) is None


def test_encoder_products_are_those_that_torch_counts():
    batch, pixels, dim, depth = 2, 64, 64, 2
    model = VisionMamba(pixels, dim=dim, depth=depth).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(batch, 3, pixels, pixels))
    parts = roofline.encoder(batch, pixels, dim, depth)
    assert sum(c.flops for c in parts.values()) == counter.get_total_flops()
    assert parts["SwiGLU"].bytes == depth * 2 * 3 * batch * (16 + 1) * (64 * 4 * 2 // 3)


def test_instructions_are_those_of_the_compiled_kernels():
    """The table that `python -m kernels.budgets --write` wrote: sm_80 first, then sm_90."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    counted = {(r[0].strip("`"), r[1]): r[5].split() for r in rows if len(r) == 7}
    kernels = {
        "forward": ("selective_scan._forward_kernel", "gate, softplus, skip"),
        "backward": ("selective_scan._backward_kernel", "every gradient"),
        "first forward": (
            "selective_scan._forward_kernel", "a long sequence's chunks, first pass",
        ),
        "first backward": (
            "selective_scan._backward_border_kernel", "a long sequence's chunks, first pass",
        ),
        "cross": ("cross_scan._cross_scan_fwd_kernel", "forward"),
    }  # fmt: skip
    for name, key in kernels.items():
        for place, target in enumerate(("sm_80", "sm_90")):
            cells = counted[key]
            expected = float(cells[min(place, len(cells) - 1)])
            assert roofline.INSTRUCTIONS[target][name] == pytest.approx(expected, rel=0.05), (
                f"{name} for {target}: put {expected} into roofline.INSTRUCTIONS"
            )


def test_long_sequences_are_cut_where_the_kernels_cut_them():
    assert (scan_kernels.FEW_PROGRAMS, scan_kernels._lanes()) == (
        roofline.FEW_PROGRAMS, roofline.LANES,
    )  # fmt: skip
    known = roofline.INSTRUCTIONS["sm_90"]
    few, many = roofline.Scan(1, 2048, 640), roofline.Scan(13, 1024, 640)
    assert few.instructions("forward", H200) == pytest.approx(
        few.elements * 16 / 32 * (known["forward"] + known["first forward"])
    )
    assert many.instructions("backward", H200) == many.elements * 16 / 32 * known["backward"]
    both = many.instructions("both", H200)
    assert both == many.instructions("forward", H200) + many.instructions("backward", H200)
    assert many.model("both", H200).instructions == both
    assert many.instructions("both", roofline.Card("CPU", 1, 1, 1, 1)) == 0


def test_lora_counts_by_hand():
    counts = roofline.linear(rows=7, inputs=5, outputs=3, size=2, rank=2)
    assert counts.flops == 2 * 7 * (5 * 3 + 2 * 5 + 2 * 3)
    assert counts.bytes == 2 * (7 * 5 + 7 * 3 + 5 * 3 + 2 * 5 + 2 * 3)


def test_model_names_its_bound():
    card = roofline.Card("card", bytes=10.0, exps=10.0, issue=10.0, flops=10.0)
    for name, counts in {
        "memory": roofline.Counts(4, 1, 2, 3),
        "exponentials": roofline.Counts(1, 4, 2, 3),
        "products": roofline.Counts(1, 2, 4, 3),
        "instructions": roofline.Counts(1, 2, 3, 4),
    }.items():
        assert roofline.bound(counts, card) == name
        assert roofline.model(counts, card) == pytest.approx(0.4)
    assert roofline.floor(roofline.Counts(1, 2, 3, 4), card) == pytest.approx(0.3)


def test_counted_reads_what_a_record_holds():
    assert roofline.counted({"bytes": 2, "exps": 3, "size": 4}) == roofline.Counts(2, 3, 0, 0)


def test_a_measured_card_keeps_what_was_measured():
    rates = {"bytes": 1.0, "exps": 2.0, "flops": 3.0}
    cpu = roofline.measured_card("some CPU", rates)
    assert cpu.target is None
    assert (cpu.bytes, cpu.exps, cpu.flops, cpu.issue) == (1.0, 2.0, 3.0, math.inf)
    h200 = roofline.measured_card("NVIDIA H200", rates)
    assert (h200.bytes, h200.exps, h200.issue) == (1.0, H200.exps, H200.issue)
    other = roofline.measured_card("NVIDIA L40S", {"bytes": 1.0, "flops": 3.0})
    assert roofline.floor(roofline.Counts(bytes=2, exps=1e30, flops=3), other) == 2.0


# Peers compute what they are said to compute.


def scan_inputs(length: int = 13) -> dict[str, torch.Tensor]:
    given = bench_selective_scan.inputs(2, 6, length, torch.float32, torch.device("cpu"))
    given.pop("dout")
    return {name: value.double().requires_grad_() for name, value in given.items()}


@pytest.mark.parametrize("name", ["scan_by_steps", "scan_by_slices", "scan_compiled"])
def test_loops_are_the_scan_with_all_gradients(name):
    given = scan_inputs()
    function = getattr(peers, name)

    def by_slices(*tensors):
        turned = [t.float().transpose(1, 2) if t.ndim == 3 else t.float() for t in tensors]
        return function(*turned).transpose(1, 2)

    def compiled(*tensors):
        with torch.compiler.set_stance("force_eager"):  # the arithmetic, not the compiler
            return function()(*(t.float() for t in tensors))

    call = {"scan_by_slices": by_slices, "scan_compiled": compiled}.get(name, function)
    expected = scan_ref(*given.values(), delta_softplus=True)
    found = call(*given.values())
    assert isinstance(expected, torch.Tensor)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    pairs = {"out": (found, expected)}
    for key, a, b in zip(
        given,
        torch.autograd.grad(found, list(given.values()), weights.to(found.dtype)),
        torch.autograd.grad(expected, list(given.values()), weights),
        strict=True,
    ):
        pairs[f"d{key}"] = (a, b)
    for key, (a, b) in pairs.items():
        tolerance = 1e-11 if name == "scan_by_steps" else 1e-4  # the others compute in fp32
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("name", ["mambapy", "transformers", "mamba_ssm reference"])
def test_peers_take_part_in_half_precision(name):
    reason = {"mambapy": peers.mambapy, "transformers": peers.transformers_scan}.get(name, tuple)()
    if reason:
        pytest.skip(reason)
    arguments = {"mode": "both", "batch": 2, "dim": 6, "length": 9, "dtype": "bfloat16"}
    work = bench_selective_scan.build(name, **arguments)
    assert work.results is not None
    found = work.results()
    assert found["out"].dtype == torch.bfloat16 and len(found) == 9
    assert max(errors(found, bench_selective_scan.truth(**arguments)).values()) < 3e-2


def test_every_shape_and_mode_of_the_compiled_scan_is_compiled(monkeypatch):
    compile_ = torch.compile
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(peers, "CHUNK", 1)
    monkeypatch.setattr(torch, "compile", lambda f, **more: compile_(f, backend=backend, **more))
    with torch._dynamo.config.patch(recompile_limit=2):
        for mode, dim in (("forward", 3), ("both", 4), ("both-frozen", 5)):
            before = len(graphs)
            bench_selective_scan.build(
                bench_selective_scan.COMPILED, mode, batch=1, dim=dim, length=3, dtype="float32"
            ).once()
            assert len(graphs) > before, f"{mode} ran uncompiled"
    torch.compiler.reset()


def test_the_truth_of_the_scan_is_the_reference():
    arguments = {"batch": 2, "dim": 6, "length": 9, "dtype": "float32"}
    given = bench_selective_scan.inputs(2, 6, 9, torch.float32, torch.device("cpu"))
    dout = given.pop("dout").double()
    leaves = {name: value.double().requires_grad_() for name, value in given.items()}
    expected = scan_ref(*leaves.values(), delta_softplus=True)
    assert isinstance(expected, torch.Tensor)
    gradients = torch.autograd.grad(expected, list(leaves.values()), dout)
    found = bench_selective_scan.truth("both", **arguments)
    torch.testing.assert_close(found["out"], expected.detach())
    for name, gradient in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(
            found[f"d{name}"], gradient, msg=lambda m, name=name: f"d{name}: {m}"
        )


def test_the_flipping_mixer_is_ours_in_another_order():
    arguments = {"name": "small", "batch": 1, "pixels": 48}
    expected = encoders.mixer_truth("training", **arguments)
    work = encoders.build_mixer(encoders.OURS, "training", **arguments)
    assert work.results is not None
    found = work.results()
    assert set(found) == {"out", "dinput"}
    assert max(errors(found, expected).values()) < 1e-5


@pytest.mark.parametrize("name", ["base", "large"])
def test_the_vit_has_as_many_parameters(name):
    arguments = VISION_PRESETS[name]
    with torch.device("meta"):
        ours = sum(p.numel() for p in VisionMamba(**arguments).parameters())
        vit = peers.VisionTransformer(
            arguments["image_size"], arguments["dim"], arguments["depth"], ours
        )
    assert sum(p.numel() for p in vit.parameters()) == pytest.approx(ours, rel=1e-3)


@pytest.mark.parametrize("contender", [c.name for c in bench_lora_linear.CONTENDERS])
def test_lora_contenders_in_float64(contender):
    if contender == bench_lora_linear.PEFT and peers.peft():
        pytest.skip(str(peers.peft()))
    arguments = {
        "mode": "both", "rows": "half", "tokens": 5, "inputs": 24, "outputs": 16,
        "dtype": "float64",
    }  # fmt: skip
    work = bench_lora_linear.build(contender, **arguments)
    if contender == bench_lora_linear.NONE:
        assert work.results is None
        return
    assert work.results is not None
    found = work.results()
    assert set(found) == {"y", "dx", "dA", "dB"}
    # A and B are fp32, as they are in training.
    assert max(errors(found, bench_lora_linear.truth(**arguments)).values()) < 1e-5


@pytest.mark.parametrize("regime", bench_finetune.REGIMES)
def test_a_step_trains_what_the_regime_says(regime):
    arguments = {
        "checkpointing": regime == "peft", "name": "small", "pixels": 32, "decoder": "tiny",
        "tokens": 4, "batch": 2,
    }  # fmt: skip
    run = bench_finetune.run_of(regime, **arguments)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    for _ in range(3):  # the first steps move only B, which starts at zero
        run.forget()
        run.step()
    changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert changed <= trained
    kinds = {
        "adapter": any(".lora_X." in n for n in changed),
        "encoder": any(n.endswith("mixer.out_proj.weight") for n in changed),
        "projector": "llama_proj.weight" in changed,
        "hybrid": any(".cross_attn.alpha" in n for n in changed),
        "decoder": any(n.endswith("self_attn.q_proj.weight") for n in changed),
    }
    expected = {
        "peft": {"adapter", "projector", "hybrid"},
        "encoder": {"encoder", "projector", "hybrid"},
        "full": {"encoder", "projector", "hybrid", "decoder"},
        "linear-probe": {"projector"},
    }[regime]
    assert {kind for kind, moved in kinds.items() if moved} == expected
    assert (run.features is not None) == (regime == "linear-probe")


@pytest.mark.parametrize("regime", bench_finetune.REGIMES)
def test_a_step_is_checked_through_the_encoder(regime, monkeypatch):
    arguments = {"name": "small", "pixels": 32, "decoder": "tiny", "tokens": 4, "batch": 2}
    work = bench_finetune.build(regime, checkpointing=True, **arguments)
    truth = bench_finetune.truth(checkpointing=True, **arguments)
    assert work.results is not None
    assert max(errors(work.results(), truth).values()) < 1e-5
    if regime == "linear-probe":
        return
    recompute = vision.checkpoint
    monkeypatch.setattr(
        vision, "checkpoint", lambda block, h, *more, **how: recompute(block, h, *more, **how) + h
    )
    wrong = errors(work.results(), truth)
    assert wrong["dimages"] > 1e-2


# Checks and records.


def test_errors_are_shares_of_the_largest_magnitude():
    truth = {"a": torch.tensor([0.0, -4.0], dtype=torch.float64), "b": torch.zeros(1).double()}
    assert errors({"a": torch.tensor([1.0, -4.0])}, truth) == {"a": 0.25}
    assert errors({"a": torch.tensor([-2.0, -4.0])}, truth) == {"a": 0.5}
    assert errors({"b": torch.tensor([0.5])}, truth) == {"b": 0.5}
    assert math.isnan(errors({"a": torch.tensor([math.nan, 0.0])}, truth)["a"])
    with pytest.raises(AssertionError, match=r"a: \(3,\)"):
        errors({"a": torch.zeros(3)}, truth)
    with pytest.raises(AssertionError):
        errors({}, truth)
    with pytest.raises(AssertionError):
        errors({"c": torch.zeros(1)}, truth)


class FakeBenchmark:
    """What `Measure` uses of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.group, self.extra_info, self.stats = "", {}, None

    def pedantic(self, run, setup=None, rounds=1, iterations=1):
        times = []
        for _ in range(rounds):
            given = setup()[0] if setup else ()
            start = machine.now()
            run(*given)
            times.append(machine.now() - start)
        middle = sorted(times)[len(times) // 2]
        stats = SimpleNamespace(
            median=middle, q1=min(times), q3=max(times), min=min(times), max=max(times)
        )
        self.stats = SimpleNamespace(stats=stats)


def adder(contender: str, value: float) -> Work:
    """Adds one, or two where it is wrong, or nothing that is a number."""
    wrong = {"wrong": 2.0, "nan": math.nan}.get(contender, 1.0)
    x = torch.full((3,), value)
    return Work(lambda: x + wrong, results=lambda: {"x": x, "y": x + wrong})


def add_truth(value: float) -> dict[str, torch.Tensor]:
    x = torch.full((3,), value, dtype=torch.float64)
    return {"x": x, "y": x + 1}


CASE = Case(
    "suite", "group", adder, {"value": 1.0}, add_truth,
    facts={"bytes": 1e6}, memory=False, items=(3, "numbers"),
)  # fmt: skip


def run_measure(contender: Contender, case: Case = CASE) -> tuple[list[results.Record], Any]:
    records: list[results.Record] = []
    benchmark = FakeBenchmark()
    try:
        measure.Measure(benchmark, "smoke", records)(case, contender)
    except pytest.skip.Exception as skipped:  # or the test would be skipped, not red
        pytest.fail(f"not measured: {skipped}")
    return records, benchmark


def test_a_right_contender_is_timed():
    records, benchmark = run_measure(Contender("right", ours=True))
    assert records[0]["median"] > 0 and records[0]["errors"] == {"x": 0.0, "y": 0.0}
    median = records[0]["median"]
    assert benchmark.extra_info["numbers_per_second"] == pytest.approx(3 / median)
    floor = 1e6 / machine.rates(True)["bytes"]
    assert benchmark.extra_info["share_of_floor"] == pytest.approx(floor / median)


@pytest.mark.parametrize("name", ["wrong", "nan"])
def test_a_wrong_result_is_never_timed(name):
    with pytest.raises(AssertionError, match="wrong: y is off"):
        run_measure(Contender(name, ours=True))
    records: list[results.Record] = []
    benchmark = FakeBenchmark()
    with pytest.raises(pytest.skip.Exception, match="wrong: y is off by"):
        measure.Measure(benchmark, "smoke", records)(CASE, Contender(name))
    assert benchmark.stats is None and records[0]["median"] is None
    assert "not timed" in records[0]["skipped"]


def breaking(contender: str, value: float) -> Work:
    """Fails as its name says, at once or when it is built a second time, to be weighed."""
    failures = {
        "full": torch.OutOfMemoryError("no room"),
        "cublas": RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
        "broken": ValueError("no such thing\nand more"),
    }
    builds.append(contender)
    if contender in failures and (value == 0 or len(builds) == 2):
        raise failures[contender]
    return Work(lambda: None)


builds: list[str] = []


@pytest.mark.parametrize("name", ["full", "cublas"])
def test_what_does_not_fit_is_a_skip_with_its_reason(name):
    records: list[results.Record] = []
    case = Case("suite", "group", breaking, {"value": 0})
    with pytest.raises(pytest.skip.Exception, match="does not fit") as skipped:
        measure.Measure(FakeBenchmark(), "smoke", records)(case, Contender(name, ours=True))
    assert records[0]["median"] is None and "does not fit" in records[0]["skipped"]
    assert skipped.value.__context__ is None  # whose frames would keep tensors


def test_a_time_is_kept_where_there_is_no_room_to_weigh(monkeypatch):
    builds.clear()
    monkeypatch.setattr(memory, "peak", lambda build, arguments, warm: build(**arguments))
    records, _ = run_measure(Contender("full", ours=True), Case("s", "g", breaking, {"value": 1}))
    assert builds == ["full", "full"]
    assert records[0]["median"] > 0 and "skipped" not in records[0] and "memory" not in records[0]


def test_what_fails_is_recorded_and_red():
    records: list[results.Record] = []
    case = Case("suite", "group", breaking, {"value": 0})
    with pytest.raises(ValueError, match="no such thing"):
        measure.Measure(FakeBenchmark(), "smoke", records)(case, Contender("broken"))
    assert records[0]["skipped"] == "failed: ValueError: no such thing"
    assert records[0]["median"] is None


def test_rounds_are_planned_with_a_warm_call():
    calls = []

    def run():
        calls.append(machine.now())
        if len(calls) == 1:
            time.sleep(0.2)  # compiles

    found = measure.Measure(FakeBenchmark(), "default", [])._time(Work(run))
    assert found["rounds"] == 30  # as many as a fast call gets


def test_a_missing_peer_is_a_skip_with_its_reason():
    records: list[results.Record] = []
    with pytest.raises(pytest.skip.Exception, match="pip install it"):
        measure.Measure(FakeBenchmark(), "smoke", records)(
            CASE, Contender("peer", missing=lambda: "pip install it")
        )
    assert records == [{**records[0], "skipped": "pip install it", "median": None}]


def test_no_install_is_asked_for_what_is_there():
    assert peers.find("json", "pip install json", "loads") is None
    assert peers.find("json", "pip install json", "no_such") == (
        "json has no no_such: pip install json"
    )
    missing = peers.find("no_such_module", "pip install it")
    assert missing is not None and missing.endswith(": pip install it")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time it on")
def test_the_interpreter_is_never_timed():
    assert "interpreter" in (bench_selective_scan.available("triton")() or "")


def test_the_interpreter_is_refused_where_a_gpu_would_be_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = SimpleNamespace(stash={}, getoption=lambda name: None)
    with pytest.raises(pytest.UsageError, match="unset TRITON_INTERPRET"):
        conftest.pytest_configure(config)
    monkeypatch.delenv("TRITON_INTERPRET")
    conftest.pytest_configure(config)


def test_slow_calls_are_repeated_less():
    assert measure.rounds_for("smoke", 1e-6) == (1, 1)
    assert measure.rounds_for("default", 1e-3)[0] == 30
    assert measure.rounds_for("default", 0.9)[0] == 3
    assert measure.rounds_for("default", 5.0)[0] == 2
    assert measure.rounds_for("default", 13.0)[0] == 1
    assert measure.rounds_for("full", 9.0)[0] == 5


def allocate(contender: str, mebibytes: int) -> Work:
    """Holds 32 MiB, and takes some more for a moment and some as its result."""
    held = torch.ones(200 * 2**18)[: 32 * 2**18].clone()

    def run() -> torch.Tensor:
        passing = torch.ones(mebibytes * 2**18)
        return passing[: len(passing) // 2] + 1

    return Work(run, sizes=lambda: {"held": held.nbytes})


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or torch.cuda.is_available(), reason="Linux, CPU"
)
def test_peak_memory_is_what_the_call_takes():
    arguments = {"contender": "any", "mebibytes": 64}
    found = memory.peak(allocate, arguments, warm=True)
    assert found["held"] == 32 * 2**20
    assert 95.5 <= found["peak"] / 2**20 <= 100  # a few of its pages may be resident before
    assert 128 <= found["total"] / 2**20 <= 160


def killed(contender: str) -> Work:
    """What the system does to a process that takes too much."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or torch.cuda.is_available(), reason="Linux, CPU"
)
def test_a_process_without_memory_is_no_failure():
    with pytest.raises(MemoryError, match="status -9"):
        memory.peak(killed, {"contender": "any"}, warm=True)


def keeper(path: Path) -> conftest.Keeper:
    return conftest.Keeper(path, "smoke", {("selective_scan", g): {"ours", "peer"} for g in "abc"})


def test_every_test_leaves_what_was_measured_in_the_file(tmp_path):
    file = tmp_path / "run.json"
    records = [record("a", "ours", 1.0)]
    first = keeper(file)
    for more in ([], [record("a", "peer", 2.0)], [record("b", "ours", 3.0)]):
        records += more
        first.keep(records)
        assert [r["median"] for r in results.read(file)["records"]] == [
            r["median"] for r in records
        ]
    assert len(results.read(file)["runs"]) == 1
    # The next run ends within the second group, and an unmeasured record is none.
    again = keeper(file)
    more = [record("a", "ours", 4.0), record("a", "peer", None, skipped="absent")]
    again.keep(more)
    again.keep([*more, record("b", "ours", 5.0), record("c", "ours", 6), record("c", "peer", None)])
    kept = results.read(file)
    assert sorted((r["group"], r["contender"], r["median"]) for r in kept["records"]) == [
        ("a", "ours", 4.0), ("a", "peer", None), ("b", "ours", 5.0), ("c", "ours", 6.0),
    ]  # fmt: skip
    assert again.parts == []


def test_a_part_of_a_group_takes_the_place_of_nothing(tmp_path):
    file = tmp_path / "run.json"
    results.write(
        file,
        results.merged(
            None, machine.describe(), RUN, [record("a", "ours", 1.0), record("a", "peer", 2.0)]
        ),
    )
    part = keeper(file)
    part.keep([record("a", "ours", 9.0)])
    assert [r["median"] for r in results.read(file)["records"]] == [1.0, 2.0]
    assert part.parts == ["selective_scan a"]
    part.keep([record("a", "ours", 9.0), record("a", "peer", 8.0)])
    assert [r["median"] for r in results.read(file)["records"]] == [9.0, 8.0]
    assert part.parts == []


def test_groups_are_saved_whole():
    old = stored(record("a", "ours", 1.0), record("a", "peer", 2.0), record("b", "ours", 3.0))
    new = results.merged(old, MACHINE, {**RUN, "commit": "new"}, [record("a", "ours", 4.0)])
    assert [(r["group"], r["contender"], r["median"], r["run"]) for r in new["records"]] == [
        ("b", "ours", 3.0, 0),
        ("a", "ours", 4.0, 1),  # the peer's time was another run's
    ]
    assert [run["commit"] for run in new["runs"]] == [RUN["commit"], "new"]
    last = results.merged(new, MACHINE, {**RUN, "commit": "last"}, [record("b", "ours", 5.0)])
    assert [run["commit"] for run in last["runs"]] == ["new", "last"]  # no record is of the first


def test_a_commit_is_marked_where_the_code_differs(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() is None
    stored, code = tmp_path / "benchmarks/results/cpu.json", tmp_path / "scan.py"
    stored.parent.mkdir(parents=True)
    for path in (stored, code):
        path.write_text("1")
    author = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    head = machine.commit()
    assert head is not None and len(head) == 12
    stored.write_text("2")
    assert machine.commit() == head
    code.write_text("2")
    assert machine.commit() == head + "+"


@pytest.mark.parametrize("key", results.SAME)
def test_machines_are_not_mixed(key):
    with pytest.raises(results.ResultError, match=f"of {key}"):
        results.merged(stored(), {**MACHINE, key: "another"}, RUN, [])


def test_a_damaged_file_is_named(tmp_path):
    for content in ("{", "[]", '{"format": 99}'):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(results.ResultError, match=r"r\.json"):
            results.read(tmp_path / "r.json")
    with pytest.raises(results.ResultError, match=r"none\.json"):
        results.read(tmp_path / "none.json")


# Comparison.


def compared(before: float, ours: float, peer: float = 10.0, spread: float = 0.05):
    def pair(time: float, other: float) -> list[results.Record]:
        quartiles = {"q1": time * (1 - spread), "q3": time * (1 + spread)}
        peers_ = {"q1": other * (1 - spread), "q3": other * (1 + spread)}
        return [
            record("g", "ours", time, ours=True) | quartiles,
            record("g", "peer", other) | peers_,
            record("g", "absent", None),
        ]

    found = list(results.ratios(stored(*pair(before, 10.0)), pair(ours, peer)))
    assert [(r.ours, r.peer) for r in found] == [("ours", "peer")]
    return found[0]


def test_a_lost_ratio_is_found():
    assert compared(1.0, 1.5).worse(0.15)
    assert not compared(1.0, 1.1).worse(0.15)
    assert compared(1.0, 1.1, spread=0.0).worse(0.05)
    assert "ours takes 0.15 of peer's time, it took 0.1" in str(compared(1.0, 1.5))


def test_a_slower_machine_is_no_loss():
    assert not compared(1.0, 3.0, peer=30.0).worse(0.0)


def test_noise_is_no_loss():
    assert not compared(1.0, 1.3, spread=0.2).worse(0.15)


@pytest.mark.parametrize(("ours", "lost"), [(110, False), (120, True)])
def test_lost_memory_is_found(ours, lost):
    def pair(peak: int) -> list[results.Record]:
        return [
            record("g", "ours", 1.0, ours=True, memory={"peak": peak * 2**20}),
            record("g", "peer", 2.0, memory={"peak": 200 * 2**20}),
        ]

    found = [r for r in results.ratios(stored(*pair(100)), pair(ours)) if r.what != "time"]
    assert [r.worse(0.15) for r in found] == [lost]
    assert str(found[0]).endswith(f"takes {ours / 200:.3g} of peer's peak memory, it took 0.5")
    assert len(list(results.ratios(stored(*pair(1)), pair(ours)))) == 1  # too little to compare


def test_groups_that_only_one_run_has_are_not_compared():
    assert not list(results.ratios(stored(record("other", "ours", 1.0, ours=True)), []))
    fresh = [record("new", "ours", 1.0, ours=True), record("new", "peer", 1.0)]
    assert not list(results.ratios(stored(), fresh))


def benchmarks_run(*options: str) -> subprocess.CompletedProcess[str]:
    """One short suite in a process of its own."""
    return subprocess.run(
        [
            sys.executable, "-m", "pytest", "benchmarks/bench_data.py", "--benchmark-only",
            "--size", "smoke", "-q", "-k", "scores", "-p", "no:cacheprovider", *options,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={
            name: value
            for name, value in os.environ.items()
            if name != "TRITON_INTERPRET" and not name.startswith("PYTEST_XDIST")
        },
    )  # fmt: skip


def test_save_and_compare_from_the_command_line(tmp_path):
    file = tmp_path / "run.json"
    first = benchmarks_run("--save", str(file))
    assert first.returncode == 0, first.stdout + first.stderr
    kept = results.read(file)
    assert [r["contender"] for r in kept["records"]] == ["emrrg", "pycocoevalcap"]
    assert all(r["median"] > 0 and max(r["errors"].values()) < 1e-9 for r in kept["records"])
    for r in kept["records"]:  # a run in which ours took next to nothing
        if r["ours"]:
            r["median"] /= 1e6
    results.write(file, kept)
    second = benchmarks_run("--compare", str(file))
    assert second.returncode == 1, second.stdout
    assert "emrrg takes" in second.stdout


def test_a_comparison_of_nothing_fails_and_says_so():
    stash = {
        conftest.RECORDS: [record("new", "ours", 1.0, ours=True)],
        conftest.STORED: stored(record("other", "ours", 1.0, ours=True)),
    }
    session = SimpleNamespace(config=SimpleNamespace(stash=stash), exitstatus=0)
    conftest.pytest_sessionfinish(session)
    assert session.exitstatus == pytest.ExitCode.TESTS_FAILED
    assert stash[conftest.COMPARED] == ["nothing to compare: no group is in both runs"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--compare": "other.json"}, "--compare: .* two machines are not compared"),
        ({"--save": "other.json"}, "--save: .* two machines are not compared"),
        ({"--compare": "none.json"}, "--compare: .*none.json: cannot be read"),
        ({"--save": "", "--size": "smoke"}, "--save: a smoke run measures nothing"),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results.write(tmp_path / "other.json", stored())
    config = SimpleNamespace(stash={}, getoption=lambda name: options.get(name))
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(config)


# The page.


def finetune(batch: int, regime: str, median: float | None, peak: int) -> results.Record:
    sizes = {
        "weights": 100, "optimizer": 10, "gradients": 5, "trainable": 5, "parameters": 50,
        "kept": 7, "peak": peak, "total": 1,
    }  # fmt: skip
    return record(
        f"base-224px-small-batch{batch}", regime, median, suite="finetune", ours=regime == "peft",
        items=[batch, "studies"], facts={"batch": batch, "checkpointing": False}, memory=sizes,
    )  # fmt: skip


def scans() -> list[results.Record]:
    group = "both-8x768x197-float32"
    return [
        record(
            group,
            "native",
            0.01,
            ours=True,
            facts=bench_selective_scan.facts("both", (8, 768, 197), "float32"),
        ),
        record(group, "torch", 0.04, ours=True, facts={}),
        record(group, "mamba_ssm reference", 8.0),
        record(group, "mambapy", 0.9),
        record(group, "vLLM", None, skipped="needs a CUDA device"),
    ]


def test_claims_are_ratios_of_one_device():
    found = report.claims(
        stored(
            *scans(),
            finetune(1, "peft", 1.0, peak=90),
            finetune(1, "full", 1.5, peak=290),
            finetune(4, "peft", 2.0, peak=90),
            finetune(4, "full", 5.0, peak=190),
            finetune(4, "encoder", 1.0, peak=90),
        )
    )
    assert [claim.value for claim in found] == [
        pytest.approx(200), pytest.approx(22.5), pytest.approx(4), None, pytest.approx(1.5),
        pytest.approx(0.5), pytest.approx(1.5), pytest.approx(1.0),
    ]  # fmt: skip
    assert [str(found[i]) for i in (0, 3, 4, 5)] == [
        "200 x", "not measured", "1.5 x", "0.5 x, 1 of 2 settings",
    ]  # fmt: skip
    on_gpu = report.claims(stored(*scans(), machine=GPU))
    assert {claim.value for claim in on_gpu} == {None}  # they speak of the CPU


def test_what_was_not_measured_says_so():
    page = report.render([stored(*scans())])
    table = page.split("## What was to be shown")[1].split("##")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(report.CLAIMS)
    assert "| 200 x | not measured |" in lines[1]
    assert all(line.endswith("| not measured | not measured |") for line in lines[4:])
    assert report.verdict(report.Shown(14.5), 15) == "14.5 x (missed)"
    assert report.verdict(report.Shown(15.0), 15) == "15 x"
    assert "- vLLM: needs a CUDA device" in page
    assert f"### Writing reports\n\n{report.NOTES['generation']}\n\nNot measured." in page
    assert "Every suite: not measured" in page


def test_devices_are_not_mixed():
    other = scans()
    for r in other:
        r["median"] = r["median"] and r["median"] * 1000
    page = report.render([stored(*scans()), stored(*other, machine=GPU)])
    first, second = page.split(f"## {GPU['device']}")
    assert "10 ms" in first and "8e+03 s" not in first
    assert "10 s" in second.split("## On paper")[0]
    assert "Every suite: not measured" not in page


def test_a_regime_that_does_not_fit_is_in_the_table():
    table = report.finetune_table(
        {
            "base-224px-small-batch1": {
                "peft": finetune(1, "peft", 1.0, peak=90),
                "full": finetune(1, "full", None, 0) | {"skipped": "does not fit"},
            }
        }
    )
    rows = [line.split(" | ") for line in table.splitlines()]
    assert rows[-1][3:6] == ["full", "", "does not fit"]
    assert len({len(row) for row in rows if not row[0].startswith("|-")}) == 1


def test_groups_stand_by_shape_then_mode_and_curves_last():
    def group(name: str, series: dict[str, Any] | None = None) -> tuple[str, Any]:
        return name, {"any": record(name, "any", 1.0, series=series)}

    groups = [
        group("both-1x9x100-float32", {"name": "scan", "x": 100}),
        group("both-1x9x20-float32", {"name": "scan", "x": 20}),
        group("both-frozen-8x9x100-float32"), group("both-8x9x100-float32"),
        group("forward-64x9x20-float32"), group("forward-8x9x100-float32"),
    ]  # fmt: skip
    assert [name for name, _ in sorted(groups, key=report.place)] == [
        "forward-8x9x100-float32", "both-8x9x100-float32", "both-frozen-8x9x100-float32",
        "forward-64x9x20-float32", "both-1x9x20-float32", "both-1x9x100-float32",
    ]  # fmt: skip


def test_a_spread_of_few_calls_says_so():
    assert report.spread(record("g", "who", 10.0, rounds=1)) == "one call"
    assert report.spread(record("g", "who", 10.0, rounds=2)) == "two calls"
    assert report.spread(record("g", "who", 10.0)) == "9.5 s - 10.5 s"


def test_runs_share_the_line_of_their_versions():
    first = stored(record("a", "ours", 1.0))
    rates = {"bytes": 2e12, "flops": 5e14}  # of a GPU, where exponentials are not measured
    second = results.merged(first, MACHINE, {**RUN, "rates": rates}, [record("b", "ours", 1.0)])
    lines = report.runs_line(second).splitlines()
    assert (
        "| 1: 2030-01-01 00:00 | 0123456789ab | default | selective_scan | 20 GB/s | 4 G/s |"
        in (lines[2])
    )
    assert "| 2e+03 GB/s |  | 5e+05 GFLOP/s |" in lines[3]
    assert lines[-1] == "Every run: torch 2."


def test_reasons_name_groups_only_where_they_hold_for_some():
    absent = {"skipped": "needs a GPU"}
    tables = {
        "a": {"x": record("a", "x", None, **absent), "y": record("a", "y", None, **absent)},
        "b": {"y": record("b", "y", 1.0)},
    }
    assert report.skipped(tables) == ["- x: needs a GPU", "- y (a): needs a GPU"]


def test_fit_finds_the_power():
    points = [(float(x), 3e-6 * x**1.7) for x in (128, 256, 512, 1024)]
    assert report.fit(points) == pytest.approx(1.7)
    assert report.fit(points[:2]) is None


def test_fits_are_shown_for_each_contender():
    def point(x: int, who: str, power: float) -> results.Record:
        series = {"name": "scan, both", "x": x, "unit": "length"}
        return record(f"both-{x}", who, 1e-6 * x**power, series=series)

    records = [point(x, w, k) for x in (512, 128, 256) for w, k in (("a", 1.0), ("b", 2.0))]
    table = report.fit_table({r["group"] + r["contender"]: {r["contender"]: r} for r in records})
    assert "| scan, both | a | 128 - 512 length | 1.00 |" in table
    assert "| scan, both | b | 128 - 512 length | 2.00 |" in table


def test_page_pictures_and_readme_are_written_and_checked(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    curve = [
        record(
            f"both-1x16x{x}-float32", who, 1e-6 * x, ours=who == "native",
            series={"name": "scan, both", "x": x, "unit": "length"}, memory={"peak": x},
        )
        for x in (16, 32, 64)
        for who in ("native", "mambapy")
    ]  # fmt: skip
    steps = [finetune(1, r, 1.0, 90) for r in ("peft", "full")]
    steps += [r | {"group": r["group"].replace("base", "large")} for r in steps]
    results.write(tmp_path / "results" / "cpu.json", stored(*scans(), *curve, *steps))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    options = ["--results", str(tmp_path / "results"), "--root", str(tmp_path)]
    assert report.main([*options, "--check"]) == 1
    assert report.main(options) == 0
    assert report.main([*options, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "200 x" in text
    page = (tmp_path / report.PAGE).read_text()
    pictures = {p.name for p in (tmp_path / "docs" / "benchmarks").iterdir()}
    named = {line.split("(benchmarks/")[1][:-1] for line in page.splitlines() if "![" in line}
    assert pictures == named and len(named) == 3  # a curve, two systems
    (tmp_path / report.PAGE).write_text(page + "by hand\n")
    assert report.main([*options, "--check"]) == 1
    assert "is not what the results say" in capsys.readouterr().out
    readme.write_text("no markers\n")
    assert report.main(options) == 0
    assert readme.read_text() == "no markers\n"


def test_a_damaged_results_file_is_one_line(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{")
    assert report.main(["--results", str(tmp_path), "--root", str(tmp_path)]) == 2
    assert "x.json" in capsys.readouterr().err


def test_the_committed_page_is_what_the_committed_results_say():
    files = sorted(results.FOLDER.glob("*.json"))
    if not files:
        pytest.skip("no results are kept yet")
    assert report.main(["--check"]) == 0
    for file in files:
        kept = json.loads(file.read_text(encoding="utf-8"))
        assert results.path(kept["machine"]["device"]) == file
        assert {run["size"] for run in kept["runs"]} <= {"default", "full"}
