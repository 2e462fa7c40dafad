"""The result page in a real browser: what it shows, what keys and filters do, and what it cannot.

The browser is a headless Chromium that is spoken to through two pipes (the DevTools protocol):
real key strokes, real layout, and every request that the page makes.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
NEEDS_BROWSER = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome in PATH"
)


class Browser:
    """One page in a headless Chromium."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        read_commands, write_commands = os.pipe()
        read_answers, write_answers = os.pipe()
        # The browser reads commands from descriptor 3 and answers on 4.
        descriptors = [(os.POSIX_SPAWN_DUP2, read_commands, 3), (os.POSIX_SPAWN_DUP2, write_answers, 4)]
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        self.process = os.posix_spawn(
            CHROMIUM, [CHROMIUM, *flags], os.environ, file_actions=descriptors, setsid=True
        )
        os.close(read_commands)
        os.close(write_answers)
        self.commands, self.answers = write_commands, read_answers
        self.buffer = b""
        self.number = 0
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session: str | None = None
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
