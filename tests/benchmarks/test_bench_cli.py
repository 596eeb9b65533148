"""What a user waits for before anything happens."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest


@pytest.mark.parametrize("arguments", [["--help"], ["sync", "--help"]], ids=" ".join)
def test_help_in_under_400_ms(benchmark: Any, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "hub_router", *arguments]
    benchmark.pedantic(subprocess.run, (command,), {"check": True, "capture_output": True}, rounds=10, warmup_rounds=1)
    assert benchmark.stats.stats.median < 0.4
