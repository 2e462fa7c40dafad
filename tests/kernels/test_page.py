"""The examples of docs/kernels.md run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs/kernels.md"


def test_the_pages_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    examples = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(examples) >= 5
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for example in examples:
        line = text[: example.start()].count("\n") + 1
        exec(compile("\n" * line + example[1], str(PAGE), "exec"), names)  # errors name the line
    assert capsys.readouterr().out.strip(), "describe() says something"


def test_the_page_names_what_exists() -> None:
    calls = re.findall(r"`(kernels\.\w+)\.(\w+)`", PAGE.read_text())
    assert len(calls) >= 6
    for module, name in calls:
        assert callable(getattr(__import__(module, fromlist=[name]), name))
