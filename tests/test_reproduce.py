"""The experiments of ``examples/reproduce`` on three of the zoo's tasks and a step or two: they make their tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hub_router.training import TrainingSettings

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "reproduce"
TASKS = ("zoo-film", "zoo-plural", "zoo-french")
SETTINGS = TrainingSettings(steps=10, batch_size=2)


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import ewora
    import lora_mixer
    import maple
    import strong
    import training_free
    import zoo

    monkeypatch.setattr(zoo, "tasks", lambda: TASKS)
    monkeypatch.setenv("REPRODUCE_WORK", str(tmp_path))
    for name, value in (("TASKS", TASKS), ("STEPS", 1), ("BATCH", 2), ("SAMPLES", 2), ("GATES", SETTINGS)):
        monkeypatch.setattr(strong, name, value)
    left_out = {"zoo": TASKS[:1], "strong": TASKS[1:2]}
    for name, value in (("SETTINGS", SETTINGS), ("LEFT_OUT", left_out), ("TESTS", 2), ("PROMPTS", 1)):
        monkeypatch.setattr(maple, name, value)
    for name, value in (
        ("STEPS", 2),
        ("SIZES", (2,)),
        ("COEFFICIENTS", {(0.1, 0.05): "", (1.0, 0.5): ""}),
        ("TESTS", 2),
    ):
        monkeypatch.setattr(lora_mixer, name, value)
    for name, value in (("MIXED", 5), ("SINGLE", 2), ("TASKS", TASKS[:2]), ("TESTS", 2), ("PROMPTS", 1)):
        monkeypatch.setattr(ewora, name, value)
    for name, value in (("SAMPLES", (3,)), ("BUDGETS", (0.4, 0.8)), ("TESTS", 2), ("PROMPTS", 1)):
        monkeypatch.setattr(training_free, name, value)
    return {"maple": maple, "lora-mixer": lora_mixer, "ewora": ewora, "training-free": training_free}


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("maple", (2 * 2 + 2 * 3 + 1 + 3) + (2 * 3 + 1 + 3) + (2 * 2 + 1 + 2)),
        ("lora-mixer", 4 + 2 * 2),
        ("ewora", 2 * 3 + 7 + 2),
        ("training-free", 8 + 4 + 2),
    ],
)
def test_an_experiment_makes_its_table(experiments: dict[str, Any], name: str, rows: int) -> None:
    experiment = experiments[name]
    if name == "maple":  # what its prepare() does in processes of their own
        for task in TASKS:
            experiment.strong.train(task)
    results = [experiment.run(job) for job in experiment.jobs([0])]
    report = experiment.report(results, [0])
    body = [line for line in report.splitlines() if line.startswith("| ") and "---" not in line]
    tables = report.count("\n\n") + 1
    assert len(body) == rows + tables
    assert "nan" not in report


def test_the_command_says_what_it_takes() -> None:
    done = subprocess.run([sys.executable, FOLDER / "run.py", "--help"], capture_output=True, text=True, check=True)
    assert all(
        word in done.stdout
        for word in ("maple", "lora-mixer", "ewora", "training-free", "--seeds", "--workers", "--work")
    )
