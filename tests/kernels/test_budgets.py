"""What the kernels' machine code may cost, compiled for GPUs that need not be here.

Counts and spills hold for the Triton that they were pinned with; with another one every kernel must
still compile for every target and fit its shared memory.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from kernels import budgets  # noqa: E402

pytestmark = pytest.mark.timeout(900)  # compiling takes a minute, on a busy machine many

PAGE = Path(__file__).parents[2] / "docs/kernels.md"
MODULES = ("selective_scan", "cross_scan", "causal_conv1d", "lora_linear")
PINNED = "3.7.1"
# Bytes of shared memory that a program can have.
SHARED = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
SCAN, CROSS = "selective_scan", "cross_scan"
# Forwards that must keep the budget: gate, softplus, skip, masks and run-time strides.
FORWARD = (
    (f"{SCAN}._forward_kernel", "gate, softplus, skip"),
    (f"{SCAN}._forward_kernel", "packed or padded sequences"),
    (f"{CROSS}._cross_scan_fwd_kernel", "forward"),
)
# Instructions per (b,d,l,n) on sm_90: what was reached, rounded up.
REACHED: dict[tuple[str, str], float] = {
    (f"{SCAN}._forward_kernel", "gate, softplus, skip"): 8.46,
    (f"{SCAN}._forward_kernel", "the same, for training"): 8.54,
    (f"{SCAN}._forward_kernel", "packed or padded sequences"): 9.11,
    (f"{SCAN}._forward_kernel", "a long sequence's chunks, first pass"): 6.08,
    (f"{SCAN}._backward_kernel", "base frozen"): 24.84,
    (f"{SCAN}._backward_kernel", "every gradient"): 25.11,
    (f"{SCAN}._backward_kernel", "packed or padded sequences"): 26.11,
    (f"{SCAN}._backward_kernel", "steps 2^31 elements apart"): 25.38,
    (f"{SCAN}._backward_border_kernel", "a long sequence's chunks, first pass"): 7.55,
    (f"{CROSS}._cross_scan_fwd_kernel", "forward"): 8.71,
    (f"{CROSS}._cross_scan_bwd_kernel", "base frozen"): 28.19,
    (f"{CROSS}._cross_scan_bwd_kernel", "every gradient"): 31.35,
    (f"{CROSS}._cross_scan_bwd_kernel", "base frozen, a large batch in one launch"): 26.29,
}
Rows = dict[tuple[str, str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Every case on every target, compiled afresh in another process: here is the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return {(r["kernel"], r["what"], r["target"]): r for r in budgets.rows()}


@pytest.fixture
def counted() -> None:
    if triton.__version__ != PINNED:
        pytest.skip(f"counts are pinned for Triton {PINNED}, this is {triton.__version__}")


def test_every_kernel_compiles_for_every_target(rows: Rows) -> None:
    kernels = {
        f"{name}.{kernel}"
        for name in MODULES
        for kernel, value in vars(importlib.import_module(f"kernels.{name}")).items()
        if kernel.endswith("_kernel") and value.fn.__module__ == f"kernels.{name}"
    }
    assert {kernel for kernel, _, _ in rows} == kernels, "a kernel has no case"
    assert len(rows) == len(budgets.CASES) * len(budgets.TARGETS)


def test_no_kernel_spills(rows: Rows, counted: None) -> None:
    assert not {key: r["spills"] for key, r in rows.items() if r["spills"]}


def test_shared_memory_suffices_on_every_target(rows: Rows) -> None:
    for key, r in rows.items():
        assert r["shared"] <= SHARED[r["target"]], key


def test_the_forwards_hot_loop(rows: Rows, counted: None) -> None:
    """With gate, softplus, skip, masks and run-time strides."""
    for kernel in FORWARD:
        hot = rows[(*kernel, "sm_90")]["per_element"]
        assert hot["all"] <= 9.4, kernel
        assert "SHFL" not in hot and "BAR" not in hot, kernel


def test_counts_are_what_was_reached(rows: Rows, counted: None) -> None:
    counts = {
        key: rows[(*key, "sm_90")]["per_element"]["all"]
        for key in {key[:2] for key in rows}
        if rows[(*key, "sm_90")]["per_element"]
    }
    assert set(counts) == set(REACHED)
    for key, count in counts.items():
        assert count <= REACHED[key], key
        assert count > 0.9 * REACHED[key], f"{key}: better than pinned, pin it"


def test_the_pages_table_is_this_one(rows: Rows, counted: None) -> None:
    text = PAGE.read_text()
    assert budgets.BEGIN in text and budgets.END in text
    page = text.split(budgets.BEGIN)[1].split(budgets.END)[0].strip()
    assert page == budgets.table(list(rows.values())), (
        "out of date: python -m kernels.budgets --write docs/kernels.md"
    )


def test_writing_into_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"one\n{budgets.BEGIN}\nold\n{budgets.END}\ntwo\n")
    budgets.write(page, "new")
    assert page.read_text() == f"one\n{budgets.BEGIN}\nnew\n{budgets.END}\ntwo\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="has no lines <!-- budgets: begin"):
        budgets.write(page, "new")


def instructions(text: str) -> list[budgets._Instruction]:
    """``name opcode target falls`` lines: a target by name, - for none."""
    lines = [line.split() for line in text.strip().splitlines()]
    names = {line[0]: i for i, line in enumerate(lines)}
    return [
        budgets._Instruction(opcode, names.get(target), falls == "falls")
        for _, opcode, target, falls in lines
    ]


def test_finding_loops() -> None:
    code = instructions(
        """
        start  MOV  -      falls
        outer  LDG  -      falls
        inner  FFMA -      falls
        jump   BRA  skip   falls
        again  MUFU.EX2 -  falls
        skip   BRA  cold   falls
        back   BRA  inner  falls
        early  BRA  outer  falls
        later  STG  -      falls
        close  BRA  outer  falls
        end    EXIT -      ends
        cold   SHFL -      falls
        home   BRA  back   ends
        pad    BRA  pad    ends
        """
    )
    outer, inner = sorted(budgets._loops(code), key=lambda loop: loop.depth)
    assert (outer.depth, outer.innermost) == (0, False)
    assert outer.own == Counter(LDG=1, BRA=2, STG=1), "continue and the end are one loop"
    assert (inner.depth, inner.innermost) == (1, True)
    # What stands behind the end and comes back belongs to the loop that it comes back to.
    assert inner.own == Counter({"FFMA": 1, "MUFU.EX2": 1, "BRA": 4, "SHFL": 1})
    assert inner.count("MUFU", "SHFL") == 2 and inner.instructions == 7
    assert budgets.Figures("sm_90", 1, 0, 0, 13, [outer, inner]).hot is inner
    with pytest.raises(ValueError, match="no loop"):
        _ = budgets.Figures("sm_90", 1, 0, 0, 13, []).hot


def test_a_kernel_of_known_cost(tmp_path: Path) -> None:
    """A loop of eight exp2, one shuffle and one store for each thread, counted from its code."""
    script = tmp_path / "known.py"
    script.write_text(
        """
import torch, triton
import triton.language as tl
from kernels.budgets import TARGETS, recorded

@triton.jit
def known_kernel(x_ptr, L, W, BLOCK: tl.constexpr):
    at = x_ptr + tl.arange(0, BLOCK)
    x = tl.load(at)
    for t in tl.range(0, L, loop_unroll_factor=1):
        for _ in tl.static_range(8):
            x = tl.math.exp2(x)
        tl.store(at + t * BLOCK, x)
        x += tl.sum(x, 0)

for target in TARGETS:
    with recorded(target) as launches:
        known_kernel[(3,)](torch.empty(640, device="meta"), 197, 768, BLOCK=64, num_warps=1)
    (launch,) = launches
    assert launch.signature == {"x_ptr": "*fp32", "L": "i32", "W": "i32"}, launch
    assert list(launch.divisible) == ["x_ptr", "W"] and launch.grid == (3,), launch
    f = launch.figures()
    hot = f.hot
    lanes = 32 if target.startswith("sm_") else 64
    steps, rest = divmod(hot.count("MUFU.EX2", "v_exp_f32"), 8 * 64 // lanes)
    assert rest == 0 and steps >= 1, (target, hot)
    assert hot.count("STG", "global_store") == steps, (target, hot)
    if lanes == 32:
        assert hot.count("SHFL") == 5 * steps, (target, hot)
    assert f.spills == 0 and 0 < f.registers < 64, (target, f)
    assert f.instructions > hot.instructions > 10 * steps, (target, f)
print("counted")
"""
    )
    out = run_without_interpreter(script, tmp_path)
    assert out.stdout == "counted\n", out.stderr


def test_what_a_kernel_lacks_is_named(tmp_path: Path) -> None:
    script = tmp_path / "lacking.py"
    script.write_text(
        """
import triton
from kernels.budgets import compile_kernel

@triton.jit
def some_kernel(x_ptr, L):
    pass

try:
    compile_kernel(some_kernel, "sm_90", {"x_ptr": "*fp32"}, {"x_ptr": 1, "N": 2})
except ValueError as error:
    print(error)
"""
    )
    out = run_without_interpreter(script, tmp_path)
    expected = "some_kernel: given twice ['x_ptr'], missing ['L'], unknown ['N']\n"
    assert out.stdout == expected, out.stderr


def test_compiles_with_a_triton_that_has_no_gather(tmp_path: Path) -> None:
    """Triton 3.2: the sums over channels take another way."""
    script = tmp_path / "older.py"
    script.write_text(
        """
import triton.language as tl
del tl.gather
from kernels import budgets

for case in budgets.CASES:
    if case.kernel in ("_backward_kernel", "_cross_scan_bwd_kernel") and case.what == "base frozen":
        with budgets.recorded("sm_90") as launches:
            case.call()
        (launch,) = [x for x in launches if x.kernel.__name__ == case.kernel]
        print(case.kernel, launch.figures().spills < 1024)
"""
    )
    out = run_without_interpreter(script, tmp_path)
    assert out.stdout == "_backward_kernel True\n_cross_scan_bwd_kernel True\n", out.stderr


def run_without_interpreter(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(PAGE.parents[1])}
    return subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
