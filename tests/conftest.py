"""What all tests share: Triton's interpreter where there is no GPU, and no network."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():  # read when a kernel is decorated, so before any import of one
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, there is none"))
