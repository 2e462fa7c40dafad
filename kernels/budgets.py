"""Compile the kernels for GPUs that are not here, and count what the machine code does.

    python -m kernels.budgets                            print the table
    python -m kernels.budgets --write docs/kernels.md    and put it between the page's markers
    python -m kernels.budgets --json                     everything counted, for tests

Triton compiles for a named target without a device, and its wheel carries NVIDIA's `cuobjdump` and
`nvdisasm`. So registers, spills, shared memory and the instructions of a hot loop are facts that a
CPU can establish; they are static counts, not timings. Every kernel is compiled as its launcher
launches it: `recorded` runs the launcher on tensors without storage and notes the launch.

A loop is a natural loop of the flow graph. Its `own` instructions leave out the loops inside it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from kernels.inputs import CrossInputs, ScanInputs

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Loop:
    """A loop of machine code.

    Attributes:
        depth: 0 for an outermost loop.
        own: how often each opcode stands in it, outside its inner loops; with modifiers, as in
            ``MUFU.EX2``.
        innermost: whether it holds no other loop.
    """

    depth: int
    own: Counter[str]
    innermost: bool

    @property
    def instructions(self) -> int:
        """Number of its own instructions."""
        return sum(self.own.values())

    def count(self, *prefixes: str) -> int:
        """Its own instructions whose opcode begins with one of the prefixes."""
        return sum(n for opcode, n in self.own.items() if opcode.startswith(prefixes))


@dataclass(frozen=True)
class Figures:
    """What a compiled kernel uses.

    Attributes:
        target: as in `TARGETS`.
        registers: per thread; on AMD the vector registers.
        spills: bytes per thread spilled to memory.
        shared: bytes of shared memory a program.
        instructions: of the whole kernel.
        loops: in the order of their beginning.
    """

    target: str
    registers: int
    spills: int
    shared: int
    instructions: int
    loops: list[Loop] = field(repr=False)

    @property
    def hot(self) -> Loop:
        """The innermost loop with the most exponentials, then with the most instructions.

        (An unrolled loop has a remainder loop beside it, which is not the hot one.)
        """
        inner = [loop for loop in self.loops if loop.innermost]
        if not inner:
            raise ValueError(f"{self.target}: the kernel has no loop")
        return max(inner, key=lambda x: (x.count("MUFU.EX2", "v_exp_f32"), x.instructions))


def gpu_target(name: str) -> Any:
    """``sm_90`` or ``gfx942`` as a Triton target."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def compile_kernel(
    kernel: Any,
    target: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    divisible: Sequence[str] = (),
    **options: Any,
) -> Any:
    """Compile one kernel as a launch with these arguments would, with no GPU.

    Args:
        kernel: what `triton.jit` returned, outside the interpreter.
        target: as in `TARGETS`.
        signature: type of each run-time argument: ``*fp32``, ``*bf16``, ``i32``, ``i64``, ``fp32``.
        constexprs: values of the other arguments.
        divisible: run-time arguments known to be divisible by 16 (aligned pointers, sizes).
        options: ``num_warps``, ``num_stages``, ...
    Raises:
        ValueError: an argument of the kernel is in neither or in both of the two.
    """
    import triton
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    both = set(signature) & set(constexprs)
    missing = set(names) - set(signature) - set(constexprs)
    unknown = (set(signature) | set(constexprs)) - set(names)
    if both or missing or unknown:
        raise ValueError(
            f"{kernel.__name__}: given twice {sorted(both)}, missing {sorted(missing)}, "
            f"unknown {sorted(unknown)}"
        )
    source = ASTSource(
        fn=kernel,
        signature={n: signature.get(n, "constexpr") for n in names},
        constexprs={(i,): constexprs[n] for i, n in enumerate(names) if n in constexprs},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in divisible},
    )
    return triton.compile(source, target=gpu_target(target), options=options)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as its launcher makes it on a GPU.

    Attributes:
        target: what it was recorded for.
        kernel: what `triton.jit` returned.
        signature: type of each run-time argument: ``*fp32``, ``*bf16``, ``i32``, ``i64``, ``fp32``.
        constexprs: values of the other arguments.
        divisible: run-time arguments that are divisible by 16 (aligned pointers, sizes).
        options: ``num_warps``, ``num_stages``, ...
        grid: programs along each axis.
    """

    target: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    grid: tuple[int, ...] = ()

    def figures(self, target: str | None = None) -> Figures:
        """Compile and count, for the target that it was recorded for or a sibling of that."""
        target = target or self.target
        compiled = compile_kernel(
            self.kernel,
            target,
            self.signature,
            self.constexprs,
            divisible=self.divisible,
            **self.options,
        )
        return figures(compiled, target)


@contextlib.contextmanager
def recorded(target: str = "sm_90") -> Iterator[list[Launch]]:
    """Note launches instead of making them; for tensors without storage (device "meta").

        with recorded("sm_90") as launches:
            launcher(torch.empty(2, 5, 768, device="meta"))
        launches[0].figures()

    Args:
        target: as in `TARGETS`; launchers see torch for AMD where it is one of AMD's.
    Yields:
        the launches so far.
    """
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_launch(target, kernel, args, kwargs, grid))

    hip = None if target.startswith("sm_") else "6"
    capability = divmod(int(target[3:]), 10) if target.startswith("sm_") else (0, 0)
    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch("torch.version.hip", hip),
        mock.patch("kernels.implementations.capability", lambda: capability),
    ):
        yield launches


def _launch(
    target: str, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any
) -> Launch:
    names = list(kernel.arg_names)
    given = {p.name: p.default for p in kernel.params if p.has_default}
    given |= dict(zip(names, args, strict=False))
    given |= {k: v for k, v in kwargs.items() if k in names}
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    divisible: list[str] = []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None:
            constexprs[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(name)
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and special:
            constexprs[name] = 1
        else:
            signature[name] = parameter.annotation_type or (
                "i32" if -(2**31) <= value < 2**31 else "i64"
            )
            if value % 16 == 0 and special and not parameter.do_not_specialize_on_alignment:
                divisible.append(name)
    options = {k: v for k, v in kwargs.items() if k not in names}
    return Launch(
        target,
        kernel,
        signature,
        constexprs,
        divisible,
        options,
        tuple(grid(given) if callable(grid) else grid),
    )


_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}


def figures(compiled: Any, target: str) -> Figures:
    """Registers, spills, shared memory and loops of what `compile_kernel` returned."""
    if target.startswith("sm_"):
        return _nvidia_figures(compiled.asm["cubin"], target, compiled.metadata.shared)
    return _amd_figures(compiled.asm["amdgcn"], target, compiled.metadata.shared)


def sass(cubin: bytes) -> list[tuple[int, str]]:
    """Address and text of every instruction, by `nvdisasm`."""
    text = _nvidia_tool("nvdisasm", cubin, "-c")
    code = [
        (int(m[1], 16), m[2].strip()) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)
    ]
    labels: dict[str, int] = {}  # a label stands before the instruction that it names
    waiting: list[str] = []
    for line in text.splitlines():
        if m := re.match(r"\s*(\.L_x_\d+):", line):
            waiting.append(m[1])
        elif m := re.search(r"/\*([0-9a-f]{4,})\*/\s+\S", line):
            labels.update(dict.fromkeys(waiting, int(m[1], 16)))
            waiting = []
    return [
        (at, re.sub(r"`\((\.L_x_\d+)\)", lambda m: f"{labels[m[1]]:#x}", instruction))
        for at, instruction in code
    ]


def _nvidia_figures(cubin: bytes, target: str, shared: int) -> Figures:
    usage = _nvidia_tool("cuobjdump", cubin, "-res-usage")
    counted = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    lines = sass(cubin)
    at = {address: i for i, (address, _) in enumerate(lines)}
    code = []
    for _, text in lines:
        opcode, target_of = _opcode(text), None
        if opcode.startswith("BRA"):
            target_of = at[int(re.findall(r"0x[0-9a-f]+", text)[-1], 16)]
        # Conditional: a predicate in front, or as the first operand.
        falls = text.startswith("@") or "P" in text.split(opcode, 1)[1] or ".DIV" in opcode
        ends = opcode.startswith(("BRA", "EXIT", "RET")) and not falls
        code.append(_Instruction(opcode, target_of, not ends))
    return Figures(
        target,
        registers=counted["REG"],
        spills=counted["STACK"] + counted["LOCAL"],
        shared=shared,
        instructions=sum(i.opcode != "NOP" for i in code),
        loops=_loops(code),
    )


def _amd_figures(text: str, target: str, shared: int) -> Figures:
    def note(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in text.split(".section", 1)[0].splitlines():  # what follows are tables, not code
        if m := re.match(r"(\.LBB\d+_\d+):", line):
            labels[m[1]] = len(code)
        elif m := re.match(r"\s+([a-z]\w+)(?:\s+(\S*)|$)", line):
            if m[1].startswith(("s_branch", "s_cbranch")):
                jumps.append((len(code), m[2]))
            code.append(_Instruction(m[1], None, m[1] not in ("s_branch", "s_endpgm")))
    for i, label in jumps:
        code[i] = replace(code[i], target=labels[label])
    return Figures(
        target,
        registers=note("vgpr_count"),
        spills=note("private_segment_fixed_size"),
        shared=shared,
        instructions=len(code),
        loops=_loops(code),
    )


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    target: int | None  # index of the instruction that it may jump to
    falls: bool  # whether the next one may follow


def _loops(code: list[_Instruction]) -> list[Loop]:
    """The natural loops of the flow graph (code placed behind the end that jumps back is none)."""
    starts = sorted(
        {0}
        | {i.target for i in code if i.target is not None}
        | {n + 1 for n, i in enumerate(code) if i.target is not None or not i.falls}
    )
    starts = [n for n in starts if n < len(code)]
    block_of = {n: k for k, n in enumerate(starts)}
    ends = [*starts[1:], len(code)]
    after: list[set[int]] = []
    for end in ends:
        last = code[end - 1]
        places = [last.target] if last.target is not None else []
        places += [end] if last.falls and end < len(code) else []
        after.append({block_of[n] for n in places})
    before: list[set[int]] = [set() for _ in starts]
    reached, waiting = {0}, [0]
    while waiting:
        k = waiting.pop()
        for n in after[k]:
            before[n].add(k)
            if n not in reached:
                reached.add(n)
                waiting.append(n)
    dominators = {k: set(reached) if k else {0} for k in reached}
    changed = True
    while changed:
        changed = False
        for k in sorted(reached - {0}):
            new = set.intersection(*(dominators[p] for p in before[k])) | {k}
            changed |= new != dominators[k]
            dominators[k] = new
    bodies: dict[int, set[int]] = {}
    for k in reached:
        for head in after[k] & dominators[k]:
            body, waiting = bodies.setdefault(head, {head}), [k]
            while waiting:
                n = waiting.pop()
                if n not in body:
                    body.add(n)
                    waiting += before[n]

    def opcodes(blocks: set[int]) -> Counter[str]:
        inside = (i.opcode for k in blocks for i in code[starts[k] : ends[k]])
        return Counter(opcode for opcode in inside if opcode != "NOP")

    loops = []
    for _, body in sorted(bodies.items()):
        inner = [other for other in bodies.values() if other < body]
        own = body - set().union(*inner)
        loops.append(
            Loop(
                depth=sum(body < other for other in bodies.values()),
                own=opcodes(own),
                innermost=not inner,
            )
        )
    return loops


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _nvidia_tool(name: str, cubin: bytes, *flags: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    path = str(tool) if tool.exists() else shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name}: is in neither Triton's wheel nor the PATH")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run(
            [path, *flags, str(file)], check=True, capture_output=True, text=True
        ).stdout


@dataclass(frozen=True)
class Case:
    """A row of the table: one kernel as one call of its launcher launches it.

    Attributes:
        kernel: the kernel function's name.
        what: of the call, for people.
        call: runs the launcher on tensors of device "meta".
        hot: of each hot loop, in the order of the code, the steps of the scan that a pass works on
            and the stores that it makes; each loop works once on every (b,d,l,n). Empty: no figure
            per element.
        which: of the launches of that kernel.
    """

    kernel: str
    what: str
    call: Callable[[], object]
    hot: tuple[tuple[int, int], ...] = ()
    which: int = 0


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _activation(*shape: int) -> torch.Tensor:
    return _empty(*shape, dtype=torch.bfloat16)


BATCH, LENGTH, DIM, STATE, ORDERS, RANK = 64, 197, 768, 16, 4, 16  # the encoder at 224 pixels


def _lora_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "x": _empty(BATCH, LENGTH, DIM, dtype=dtype),
        "weight": _empty(2 * DIM, DIM, dtype=dtype),
        "A": _empty(RANK, DIM),
        "B": _empty(DIM, RANK),
        "h": _empty(BATCH * LENGTH, RANK, dtype=dtype),
        "seed": _empty(1, dtype=torch.int64),
        "dy": _empty(BATCH, LENGTH, 2 * DIM, dtype=dtype),
    }


def _lora_forward(dtype: torch.dtype) -> None:
    from kernels import lora_linear

    t = _lora_tensors(dtype)
    lora_linear._forward(
        t["x"], t["weight"], None, t["A"], t["B"], t["seed"], 0, 1.0, 0.1, "triton", False
    )


def _lora_backward(dtype: torch.dtype) -> None:
    from kernels import lora_linear

    t = _lora_tensors(dtype)
    rest = (t["A"], t["B"], t["h"], t["seed"], 0, 1.0, 0.1)
    needs = [True, False, False, True, True]
    lora_linear._backward(t["dy"], t["x"], t["weight"], *rest, needs, "triton", False)


def _cross_inputs(batch: int = BATCH) -> CrossInputs:
    u = _activation(ORDERS, batch, LENGTH, DIM)
    b = _empty(ORDERS, batch, LENGTH, STATE)
    skip = _empty(ORDERS, DIM)
    orders = _empty(ORDERS, LENGTH, dtype=torch.int64)
    A, z = _empty(ORDERS, DIM, STATE), _activation(*u.shape[1:])
    return CrossInputs(u, u, A, b, b, skip, z, skip, orders)


def _cross_forward(batch: int = BATCH) -> None:
    from kernels import cross_scan

    cross_scan._launch_fwd(_cross_inputs(batch))


def _cross_backward(needs: str, batch: int = BATCH) -> None:
    from kernels import cross_scan

    needed = [n in needs.split() for n in CrossInputs._fields[:8]]
    dout = _activation(batch, LENGTH, DIM)
    cross_scan._launch_bwd(dout, _cross_inputs(batch), needed)


def _scan_inputs(batch: int, length: int, dim: int) -> ScanInputs:
    u, b = _activation(batch, length, dim), _empty(batch, length, 1, STATE)
    A, vector = _empty(dim, STATE), _empty(dim)
    return ScanInputs(u, u, A, b, b, vector, u, vector, None, None, True, False)


def _packed() -> ScanInputs:
    flags = _empty(BATCH, LENGTH, dtype=torch.uint8)
    return _scan_inputs(BATCH, LENGTH, DIM)._replace(flags=flags)


def _far_apart() -> ScanInputs:
    """Steps 2^31 elements apart, as in a view of something large."""
    inputs = _scan_inputs(BATCH, LENGTH, DIM)
    u = inputs.u
    far = torch.empty_strided(u.shape, (0, 2**31, 1), dtype=u.dtype, device="meta")
    return inputs._replace(u=far, delta=far)


def _scan_forward(keep: bool, inputs: ScanInputs | None = None) -> None:
    from kernels import selective_scan

    selective_scan._launch_fwd(inputs or _scan_inputs(BATCH, LENGTH, DIM), keep)


def _scan_backward(needs: str, inputs: ScanInputs | None = None) -> None:
    from kernels import selective_scan

    inputs = inputs or _scan_inputs(BATCH, LENGTH, DIM)
    kept = _empty(*selective_scan._kept_shape(*inputs.u.shape, STATE, 1))
    needed = [n in needs.split() for n in selective_scan._NEEDS]
    selective_scan._launch_bwd(inputs.u, None, kept, inputs, needed)


def _long_forward() -> None:
    from kernels import selective_scan

    selective_scan._launch_fwd(_scan_inputs(*LONG), False)


def _conv_tensors() -> tuple[torch.Tensor, ...]:
    weight, bias = _empty(ORDERS, DIM, 4), _empty(ORDERS, DIM)
    orders = _empty(ORDERS, LENGTH, dtype=torch.int64)
    return _activation(BATCH, LENGTH, DIM), weight, bias, orders


def _conv_forward() -> None:
    from kernels import causal_conv1d

    causal_conv1d._launch_fwd(*_conv_tensors(), True)


def _conv_backward(needs: list[bool]) -> None:
    from kernels import causal_conv1d

    dout = _activation(ORDERS, BATCH, LENGTH, DIM)
    causal_conv1d._launch_bwd(dout, *_conv_tensors(), True, needs)


LONG = (1, 65536, 2048)  # few channels, many steps: cut into chunks
EVERY = "u delta A B C D z delta_bias"
FROZEN = "u delta B C z"  # what a mixer with adapters alone needs

CASES = (
    Case("_forward_kernel", "gate, softplus, skip", lambda: _scan_forward(False), ((4, 4),)),
    Case("_forward_kernel", "the same, for training", lambda: _scan_forward(True), ((4, 8),)),
    Case(
        "_forward_kernel",
        "packed or padded sequences",
        lambda: _scan_forward(False, _packed()),
        ((4, 4),),
    ),
    Case("_forward_kernel", "a long sequence's chunks, first pass", _long_forward, ((4, 0),)),
    Case("_backward_kernel", "base frozen", lambda: _scan_backward(FROZEN), ((4, 20),)),
    Case("_backward_kernel", "every gradient", lambda: _scan_backward(EVERY), ((4, 20),)),
    Case(
        "_backward_kernel",
        "packed or padded sequences",
        lambda: _scan_backward(EVERY, _packed()),
        ((4, 20),),
    ),
    Case(
        "_backward_kernel",
        "steps 2^31 elements apart",
        lambda: _scan_backward(FROZEN, _far_apart()),
        ((4, 20),),
    ),
    Case("_pack_kernel", "B and C", lambda: _scan_forward(False)),
    Case("_add_parts_kernel", "dB and dC", lambda: _scan_backward(FROZEN)),
    Case("_join_kernel", "a long sequence's chunks", _long_forward),
    Case(
        "_backward_border_kernel",
        "a long sequence's chunks, first pass",
        lambda: _scan_backward(FROZEN, _scan_inputs(*LONG)),
        ((4, 0),),
    ),
    Case("_cross_scan_fwd_kernel", "forward", _cross_forward, ((4, 4),)),
    Case(
        "_cross_scan_bwd_kernel", "base frozen", lambda: _cross_backward(FROZEN), ((1, 3), (1, 3))
    ),
    Case(
        "_cross_scan_bwd_kernel", "every gradient", lambda: _cross_backward(EVERY), ((1, 3), (1, 3))
    ),
    Case(
        "_cross_scan_bwd_kernel",
        "base frozen, a large batch in one launch",
        lambda: _cross_backward(FROZEN, 2 * BATCH),
        ((1, 3), (1, 3)),
    ),
    Case("_cross_scan_gate_kernel", "forward, one image", lambda: _cross_forward(1)),
    Case("_causal_conv1d_fwd_kernel", "forward", _conv_forward),
    Case("_causal_conv1d_bwd_kernel", "base frozen", lambda: _conv_backward([True, False, False])),
    Case("_causal_conv1d_bwd_kernel", "every gradient", lambda: _conv_backward([True, True, True])),
    Case("_down_kernel", "x A^T, bf16", lambda: _lora_forward(torch.bfloat16)),
    Case("_linear_kernel", "y, bf16", lambda: _lora_forward(torch.bfloat16)),
    Case("_linear_kernel", "dx, bf16", lambda: _lora_backward(torch.bfloat16)),
    Case("_outer_kernel", "dA, bf16", lambda: _lora_backward(torch.bfloat16)),
    Case("_linear_kernel", "y, fp32", lambda: _lora_forward(torch.float32)),
)


def row(case: Case, target: str) -> dict[str, Any]:
    """What one case needs on one target, as JSON."""
    with recorded(target) as launches:
        case.call()
    launch = [x for x in launches if x.kernel.__name__ == case.kernel][case.which]
    f = launch.figures()
    most = sorted(f.loops, key=_exponentials, reverse=True)[: len(case.hot)]
    hot = [loop for loop in f.loops if loop in most]
    per_element: dict[str, float] = {}
    for loop, (steps, stores) in zip(hot, case.hot, strict=True):
        if target.startswith("sm_") and loop.count("STG") != stores:
            raise ValueError(
                f"{case.kernel}, {case.what}, {target}: {loop.count('STG')} stores in a pass, not "
                f"{stores}; does it still hold {steps} steps?"
            )
        elements = steps * _states_of_a_thread(launch)
        for opcode, count in loop.own.items():
            for name in ("all", opcode.split(".")[0]):
                per_element[name] = per_element.get(name, 0.0) + count / elements
    return {
        "kernel": f"{launch.kernel.__module__.removeprefix('kernels.')}.{case.kernel}",
        "what": case.what,
        "target": target,
        "registers": f.registers,
        "spills": f.spills,
        "shared": f.shared,
        "instructions": f.instructions,
        "per_element": per_element,
    }


def _states_of_a_thread(launch: Launch) -> float:
    given = launch.constexprs
    states = given["NP"] * given["LANES"] if "NP" in given else given["BLOCK_N"] * given["BLOCK_D"]
    warp = gpu_target(launch.target).warp_size
    return states / (warp * launch.options["num_warps"])


def _exponentials(loop: Loop) -> int:
    return loop.count("MUFU.EX2", "v_exp_f32")


def rows(targets: Sequence[str] = TARGETS) -> list[dict[str, Any]]:
    """Every case on every target; in a process of its own, where the interpreter is off."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.budgets", "--json", "--targets", *targets]
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if out.returncode:
        raise RuntimeError(f"{' '.join(command)}: failed, see above")
    return json.loads(out.stdout)


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `rows` as a Markdown table, one line a case."""
    import triton

    targets = list(dict.fromkeys(r["target"] for r in found))
    cases: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for r in found:
        cases.setdefault((r["kernel"], r["what"]), {})[r["target"]] = r
    lines = [
        f"Triton {triton.__version__}; where a cell has several numbers, they are of "
        f"{', '.join(targets)}.",
        "",
        "| kernel | call | registers | spilled bytes | shared KiB | instructions per (b,d,l,n) "
        f"| SHFL, BAR per (b,d,l,n), {_COUNTED} |",
        "|---|---|---|---|---|---|---|",
    ]
    for (kernel, what), by_target in cases.items():
        each = [by_target[t] for t in targets]
        columns = [
            " ".join(str(r["registers"]) for r in each),
            " ".join(str(r["spills"]) for r in each) if any(r["spills"] for r in each) else "0",
            " ".join(f"{r['shared'] / 1024:.0f}" for r in each),
            " ".join(f"{r['per_element']['all']:.1f}" for r in each if r["per_element"]),
            _crossings(by_target.get(_COUNTED)),
        ]
        lines.append(f"| `{kernel}` | {what} | {' | '.join(columns)} |")
    return "\n".join(lines)


_COUNTED = "sm_90"


def _crossings(r: Mapping[str, Any] | None) -> str:
    if r is None or not r["per_element"]:
        return ""
    return ", ".join(f"{r['per_element'].get(k, 0):.2f}" for k in ("SHFL", "BAR"))


def write(page: Path, text: str) -> None:
    """Put text between a page's markers.

    Raises:
        ValueError: the page does not have the two markers.
    """
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: has no lines {BEGIN} and {END} to write between")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


BEGIN = "<!-- budgets: begin, written by python -m kernels.budgets --write -->"
END = "<!-- budgets: end -->"


def _numbered(pair: tuple[int, str]) -> dict[str, Any]:
    return row(CASES[pair[0]], pair[1])


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, write it into a page, or print everything as JSON."""
    parser = argparse.ArgumentParser(description="Static figures of the kernels' machine code.")
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="GPUs to compile for")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page with the two markers")
    parser.add_argument("--json", action="store_true", help="print everything counted, as JSON")
    args = parser.parse_args(argv)
    if _interpreted():
        found = rows(args.targets)
    else:
        pairs = [(i, t) for i in range(len(CASES)) for t in args.targets]
        with ProcessPoolExecutor() as pool:
            found = list(pool.map(_numbered, pairs))
    print(json.dumps(found) if args.json else table(found))
    if args.write:
        write(args.write, table(found))


def _interpreted() -> bool:
    from kernels.implementations import triton_interpreted

    return triton_interpreted()


if __name__ == "__main__":
    main()
