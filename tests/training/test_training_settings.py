"""Settings of the loop: every wrong value at once, and the learning rate by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from hub_router.errors import TrainingError
from hub_router.training.settings import TrainingSettings

WRONG: dict[str, list[Any]] = {
    "learning_rate": [0, -1e-3, math.nan, math.inf, "1e-3", None, True],
    "epochs": [0, -1.0, math.inf, "1"],
    "steps": [0, -5, 1.5, True, "10"],
    "batch_size": [0, 2.0, None],
    "accumulation": [0, 0.5],
    "warmup": [-0.1, 1.0, math.nan, "0"],
    "schedule": ["Linear", None, 3, ["linear"]],
    "weight_decay": [-0.1, math.inf],
    "clip": [0, math.inf, None],
    "precision": ["float16", "bf16", None],
    "checkpointing": ["no", 1, None],
    "validation": [-0.1, 1, 1.5],
    "evaluate_every": [-1, 0.5, True],
    "patience": [-1, 2.0],
    "save_every": [0, None],
    # What a prototype set's file and the catalog hold.
    "seed": [-1, 1.0, True, 2**31],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_values(name: str, value: Any) -> None:
    with pytest.raises(TrainingError) as raised:
        TrainingSettings(**{name: value})
    assert f"{name}={value!r}, expected" in str(raised.value)


def test_every_wrong_value_is_named_at_once() -> None:
    wrong = {name: values[0] for name, values in WRONG.items() if name != "checkpointing"}
    with pytest.raises(TrainingError) as raised:
        TrainingSettings(**wrong)
    for name, value in wrong.items():
        assert f"{name}={value!r}, expected" in str(raised.value)


@pytest.mark.parametrize("given", [{}, {"validation": 0.2}, {"evaluate_every": 5}])
def test_patience_needs_what_it_waits_for(given: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="patience=2 without validation and evaluate_every above 0"):
        TrainingSettings(patience=2, **given)
    assert TrainingSettings(patience=2, validation=0.2, evaluate_every=5).patience == 2


def test_edges_are_valid() -> None:
    TrainingSettings(
        learning_rate=1, epochs=0.01, steps=1, batch_size=1, warmup=0, weight_decay=0, validation=0, seed=2**31 - 1
    )


def test_settings_are_json() -> None:
    settings = TrainingSettings(steps=7, precision="bfloat16", validation=0.1)
    assert TrainingSettings(**json.loads(json.dumps(settings.to_json()))) == settings


@pytest.mark.parametrize(
    ("options", "total", "expected"),
    [
        # Warm-up over ceil(0.3 * 10) = 3 steps, then 7 steps down to where the next one would be 0.
        ({"warmup": 0.3}, 10, [1 / 3, 2 / 3, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        ({"warmup": 0.0}, 4, [1, 3 / 4, 2 / 4, 1 / 4]),
        ({"warmup": 0.0, "schedule": "constant"}, 3, [1, 1, 1]),
        ({"warmup": 0.5, "schedule": "constant"}, 3, [1 / 2, 1, 1]),
        (
            {"warmup": 0.2, "schedule": "cosine"},
            5,
            [1, 1, (1 + math.cos(math.pi / 4)) / 2, 1 / 2, (1 + math.cos(3 * math.pi / 4)) / 2],
        ),
        ({"warmup": 0.06}, 1, [1]),
        ({"warmup": 0.99}, 2, [1 / 2, 1]),
    ],
)
def test_rate(options: dict[str, Any], total: int, expected: list[float]) -> None:
    settings = TrainingSettings(learning_rate=0.02, **options)
    assert [settings.rate(step, total) for step in range(total)] == pytest.approx([0.02 * each for each in expected])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 17, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.5, 0.999])
def test_rate_is_never_zero_nor_above_the_peak(schedule: str, total: int, warmup: float) -> None:
    settings = TrainingSettings(warmup=warmup, schedule=schedule)
    rates = [settings.rate(step, total) for step in range(total)]
    assert all(0 < rate <= settings.learning_rate for rate in rates)
    assert max(rates) == settings.learning_rate
