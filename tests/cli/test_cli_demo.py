"""``demo``, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = ["sync", "index", "search", "compose", "generate", "compose", "eval"]


@pytest.mark.slow
def test_demo_does_the_main_job(tmp_path: Path) -> None:
    """Every step's document, and a catalog that is left for the user to look at."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUB_ROUTER_"))}
    done = subprocess.run(
        [sys.executable, "-m", "hub_router", "demo", "--json", "--keep", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)["steps"]
    assert [step["command"][:2] for step in steps] == [["hub-router", name] for name in STEPS]
    assert all(step["status"] == 0 and step["result"] for step in steps)
    mean = steps[-1]["result"]["mean"]
    assert mean["own"] > mean["arrow"] > mean["base"]
    kept = subprocess.run(
        [sys.executable, "-m", "hub_router", "list", "--json", "--home", str(tmp_path / "home")],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert len(json.loads(kept.stdout)["adapters"]) == steps[0]["result"]["counts"]["added"]
