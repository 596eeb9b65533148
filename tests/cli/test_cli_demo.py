"""``demo``, as a user runs it, and the README's figures of its zoo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

STEPS = ["sync", "index", "search", "compose", "generate", "compose", "report", "eval", "eval"]
README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUB_ROUTER_"))}


def run(*arguments: str, **environment: str) -> Any:
    """A command line with ``--json`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "hub_router", *arguments, "--json"],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows(*headings: str) -> dict[str, list[str]]:
    """Cells of the README's table whose first headings these are, by their first cell, bold and code aside."""
    start = README.index(f"\n| {' | '.join(headings)} |") + 1
    head, _, *lines = README[start:].partition("\n\n")[0].splitlines()
    cells = [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in (head, *lines)]
    return {first: rest for first, *rest in cells}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The demo's folder and its steps."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run("demo", "--keep", str(folder))["steps"]


@pytest.mark.slow
def test_demo_does_the_main_job(kept: tuple[Path, list[dict[str, Any]]]) -> None:
    """Every step's document, and a catalog that is left for the user to look at."""
    folder, steps = kept
    assert [step["command"][:2] for step in steps] == [["hub-router", name] for name in STEPS]
    assert all(step["status"] == 0 and step["result"] for step in steps)
    assert len(run("list", "--home", str(folder / "home"))["adapters"]) == steps[0]["result"]["counts"]["added"]
    mean = steps[-2]["result"]["mean"]
    assert mean["own"] > mean["arrow"] > mean["base"]
    table, epsilon = steps[-1]["result"], steps[6]["result"]["calibration"]["chosen"]["epsilon"]
    calibrated = f"hilora:epsilon={epsilon:g}"
    assert calibrated in mean
    assert table["mean"][calibrated] > table["mean"]["base"] + 0.3
    assert set(table["unseen_mean"]) == set(table["mean"]) - {"own"}
    assert set(rows("method", "seen")) >= set(table["mean"])


@pytest.mark.slow
def test_the_readmes_figures_of_the_zoo(kept: tuple[Path, list[dict[str, Any]]]) -> None:
    """Those that take seconds; another machine may differ in a sample or two of 64."""
    folder, steps = kept
    chosen = ["base", "own", "uniform", "arrow", "spectr", "lego"]
    place = {"HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    table = run("eval", "zoo", "--methods", ",".join(chosen), "--home", str(folder / "home"), **place)
    by_method, by_task = rows("method", "seen"), rows("task", "`base`")
    for method in chosen:
        assert float(by_method[method][0]) == pytest.approx(table["mean"][method], abs=0.015)
    columns = by_task["task"]
    for row in table["rows"]:
        shown = dict(zip(columns, by_task[row["task"].removeprefix("zoo-")], strict=True))
        for method in set(chosen) & set(columns):
            assert float(shown[method]) == pytest.approx(row["accuracy"][method], abs=0.04), (row["task"], method)
    calibration = steps[6]["result"]["calibration"]
    for name in ("published", "chosen"):
        point = calibration[name]
        line = next(cells for first, cells in rows("epsilon").items() if first.startswith(f"{point['epsilon']:g},"))
        figures = [float(re.match(r"[\d.]+", cell)[0]) for cell in line]  # type: ignore[index]
        shares = [100 * point["own_above"], 100 * point["others_below"]]
        assert figures == pytest.approx([*shares, point["candidates_seen"], point["candidates_unseen"]], abs=0.3)
