"""The pages keep what they promise: commands, flags, names and links exist."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import itertools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"python -m ((?:emrrg|kernels|benchmarks)(?:\.\w+)+)([^`|#\n;)]*)")


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Modules and the words after them; lines that end in a backslash go on."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for module, words in COMMAND.findall(text):
        yield module, shlex.split(re.sub(r"[>&].*", "", words))


ALL = sorted({(page.name, module, *words) for page in PAGES for module, words in commands(page)})


def main_of(module: str) -> Callable[[Sequence[str]], int | None]:
    """A command's `main`, of a package that of its ``__main__``."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    return found.main


@cache
def flags_of(module: str, *words: str) -> set[str]:
    """The flags that ``--help`` prints."""
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stopped, contextlib.redirect_stdout(printed):
        main_of(module)([*words, "--help"])
    assert not stopped.value.code
    return set(re.findall(r"--[\w-]+", printed.getvalue()))


def unknown(module: str, words: Sequence[str]) -> list[str]:
    """Flags that a command does not have; ``--train-flags`` is looked into."""
    first = list(itertools.takewhile(lambda w: w in ("check", "prepare", "openi"), words))
    known = flags_of(module, *first)
    found = [w for w in words if re.fullmatch(r"--\w[\w-]*", w) and w not in known]
    for name, value in itertools.pairwise(words):
        if name == "--train-flags":
            found += unknown("emrrg.train", shlex.split(value))
    return found


def test_there_are_commands() -> None:
    named = {module for page, module, *_ in ALL if page == "README.md"}
    assert {"emrrg.train", "emrrg.evaluate", "emrrg.generate", "emrrg.data"} <= named


@pytest.mark.parametrize("command", ALL, ids=" ".join)
def test_a_command_has_the_flags_that_a_page_gives_it(command: tuple[str, ...]) -> None:
    _, module, *words = command
    assert unknown(module, words) == []


def test_the_table_of_commands_names_flags_that_they_have() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    rows = re.findall(r"^\| `python -m (emrrg\.\w+)(.*)", text, re.MULTILINE)
    assert len(rows) == text.count("\n| `python -m emrrg") >= 10
    for module, rest in rows:
        missing = set(re.findall(r"--\w[\w-]*", rest)) - flags_of(module)
        assert not missing, f"{module}: {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_names_exist(page: Path) -> None:
    """Imports of the pages' Python, and what is read from the modules imported."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        tree, modules = ast.parse(block), {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    modules[name.asname or name.name] = importlib.import_module(name.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for name in node.names:
                    assert hasattr(importlib.import_module(node.module), name.name), name.name
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = modules.get(node.value.id)
                assert owner is None or hasattr(owner, node.attr), f"{node.value.id}.{node.attr}"
