"""Beside others: Hugging Face's package `kernels`, transformers, and its Mamba on our scan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(x) for x in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Wheels of Hugging Face's `kernels`, and of this project."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("wheels")
    fetched = subprocess.run(
        [
            *PIP,
            "download",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-d",
            folder / "theirs",
            "kernels",
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    if fetched.returncode:
        pytest.skip(f"pip cannot fetch `kernels`: {fetched.stderr.strip().splitlines()[-1:]}")
    source = folder / "source"  # a build leaves files beside the source
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("kernels", "emrrg"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "ours", source)
    return {name: next((folder / name).glob("*.whl")) for name in ("theirs", "ours")}


_THEIRS = """
import kernels
assert kernels.__file__ and kernels.get_kernel, "Hugging Face's package is whole"
"""
_OURS = """
import torch
from kernels.selective_scan import selective_scan_fn
u, B = torch.randn(1, 4, 5), torch.randn(1, 3, 5)
assert selective_scan_fn(u, u, -torch.rand(4, 3), B, B).shape == u.shape
from kernels.cross_scan import cross_scan
"""
_TRANSFORMERS = "from transformers import LlamaConfig, LlamaForCausalLM\n"


@pytest.mark.slow
@pytest.mark.parametrize("order", [("theirs", "ours"), ("ours", "theirs")])
def test_hugging_faces_kernels_in_both_orders(
    order: tuple[str, str], wheels: dict[str, Path], tmp_path: Path
) -> None:
    """Both work however they were installed, and removing one leaves the other whole."""
    names = {"theirs": "kernels", "ours": "emrrg"}
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch, transformers
    for name in order:
        run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheels[name])
    assert not (site / "kernels" / "selective_scan.py").samefile(
        ROOT / "kernels" / "selective_scan.py"
    )
    run(python, "-c", _THEIRS + _OURS + _TRANSFORMERS)
    run(python, "-c", _TRANSFORMERS + _OURS + _THEIRS)
    removed, left = order
    run(*PIP, "--python", python, "uninstall", "-y", names[removed])
    run(python, "-c", (_THEIRS if left == "theirs" else _OURS) + _TRANSFORMERS)


def test_transformers_imports_a_llama_after_our_kernels() -> None:
    pytest.importorskip("transformers")
    run(sys.executable, "-c", _OURS + _TRANSFORMERS, PYTHONPATH=str(ROOT))


_MAMBA = """
import sys
import types
import torch

bound = sys.argv[1] == "ours"
if bound:  # transformers looks for the function by the name of the package that first had it
    from kernels.selective_scan import selective_scan_fn
    package = types.ModuleType("mamba_ssm")
    package.ops = types.ModuleType("mamba_ssm.ops")
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    calls = []

    def scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
             return_last_state=False):
        calls.append(u.shape)
        return selective_scan_fn(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
        )

    package.selective_scan_fn = interface.selective_scan_fn = scan
    package.ops.selective_scan_interface = interface
    for module in (package, package.ops, interface):
        module.__path__ = []
        sys.modules[module.__name__] = module

from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(0)
config = MambaConfig(
    vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2, use_mambapy=False
)
model = MambaForCausalLM(config).train()
ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
gradients = {n: p.grad for n, p in model.named_parameters()}
with torch.no_grad():
    text = model.eval().generate(ids[:, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
if bound:
    assert len(calls) >= 2, "transformers does not call our scan"
torch.save({"loss": loss.detach(), "text": text, **gradients}, sys.argv[2])
"""


def test_transformers_mamba_on_our_scan(tmp_path: Path) -> None:
    """Loss, gradients and generated tokens are those of transformers' own slow path."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this transformers binds the function in another way")
    results = []
    for which in ("ours", "slow"):
        file = tmp_path / f"{which}.pt"
        run(sys.executable, "-c", _MAMBA, which, file, PYTHONPATH=str(ROOT))
        results.append(torch.load(file))
    ours, slow = results
    assert ours.keys() == slow.keys() and torch.equal(ours["text"], slow["text"])
    for name, value in ours.items():
        torch.testing.assert_close(
            value, slow[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
