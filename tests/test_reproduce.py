"""The experiments of ``examples/reproduce`` on three of the zoo's tasks and a step or two: they make their tables."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "reproduce"
TASKS = ("zoo-film", "zoo-plural", "zoo-french")


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import ewora
    import lora_mixer
    import maple
    import training_free
    import zoo

    from hub_router.training import TrainingSettings

    monkeypatch.setattr(zoo, "tasks", lambda: TASKS)
    monkeypatch.setattr(maple, "SETTINGS", TrainingSettings(steps=2, batch_size=2))
    monkeypatch.setattr(lora_mixer, "STEPS", 2)
    monkeypatch.setattr(lora_mixer, "SIZES", (2,))
    monkeypatch.setattr(lora_mixer, "COEFFICIENTS", ((0.1, 0.05), (1.0, 0.5)))
    for name, value in (("MIXED", 2), ("SINGLE", 1), ("TASKS", TASKS[:2])):
        monkeypatch.setattr(ewora, name, value)
    for name, value in (("SAMPLES", (2, 20)), ("BUDGETS", (0.4,)), ("TESTS", 2), ("PROMPTS", 1)):
        monkeypatch.setattr(training_free, name, value)
    return {"maple": maple, "lora-mixer": lora_mixer, "ewora": ewora, "training-free": training_free}


@pytest.mark.parametrize(
    ("name", "rows"), [("maple", 3), ("lora-mixer", 4 + 4 + 2), ("ewora", 4), ("training-free", 2 + 2)]
)
def test_an_experiment_makes_its_table(experiments: dict[str, Any], name: str, rows: int) -> None:
    experiment = experiments[name]
    results = [experiment.run(job) for job in experiment.jobs([0])]
    report = experiment.report(results, [0])
    body = [line for line in report.splitlines() if line.startswith("| ") and "---" not in line]
    tables = report.count("\n\n") + 1
    assert len(body) == rows + tables
    assert "nan" not in report


def test_the_command_says_what_it_takes() -> None:
    done = subprocess.run([sys.executable, FOLDER / "run.py", "--help"], capture_output=True, text=True, check=True)
    assert all(
        word in done.stdout for word in ("maple", "lora-mixer", "ewora", "training-free", "--seeds", "--workers")
    )
