"""How a training run goes, whatever it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hub_router.errors import TrainingError

SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of the loop; a method brings its paper's.

    Args:
        learning_rate (float): AdamW's, after warm-up.
        epochs (float): examples that are drawn, over those that there are, where ``steps`` is None.
        steps (int | None): optimizer steps of each phase.
        batch_size (int): examples per optimizer step, over all processes.
        accumulation (int): parts that a batch is computed in, one after another.
        warmup (float): share of the steps over which the rate rises from 0.
        schedule (str): ``linear`` or ``cosine`` to 0, or ``constant``.
        weight_decay (float): AdamW's.
        clip (float): largest norm of the gradient.
        precision (str): ``float32``, or ``bfloat16`` for autocast.
        checkpointing (bool): compute activations again in the backward, to save memory.
        validation (float): share of each adapter's examples that is set aside.
        evaluate_every (int): steps between losses on the validation split; 0: at the end alone.
        patience (int): evaluations without a better loss after which a phase ends; 0: never. The best gates are kept.
        save_every (int): steps between checkpoints, where a folder is given.
        seed (int): of the draws.
    """

    learning_rate: float = 1e-3
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 16
    accumulation: int = 1
    warmup: float = 0.06
    schedule: str = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    precision: str = "float32"
    checkpointing: bool = False
    validation: float = 0.0
    evaluate_every: int = 0
    patience: int = 0
    save_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        rules: Mapping[str, tuple[bool, str]] = {
            "learning_rate": (_within(self.learning_rate, 0, math.inf, open_below=True), "a number above 0"),
            "epochs": (_within(self.epochs, 0, math.inf, open_below=True), "a number above 0"),
            "steps": (self.steps is None or _count(self.steps, 1), "an integer of at least 1, or None"),
            "batch_size": (_count(self.batch_size, 1), "an integer of at least 1"),
            "accumulation": (_count(self.accumulation, 1), "an integer of at least 1"),
            "warmup": (_within(self.warmup, 0, 1), "a number from 0, below 1"),
            "schedule": (self.schedule in SCHEDULES, " or ".join(SCHEDULES)),
            "weight_decay": (_within(self.weight_decay, 0, math.inf), "a number of at least 0"),
            "clip": (_within(self.clip, 0, math.inf, open_below=True), "a number above 0"),
            "precision": (self.precision in PRECISIONS, " or ".join(PRECISIONS)),
            "checkpointing": (isinstance(self.checkpointing, bool), "True or False"),
            "validation": (_within(self.validation, 0, 1), "a number from 0, below 1"),
            "evaluate_every": (_count(self.evaluate_every, 0), "an integer of at least 0"),
            "patience": (_count(self.patience, 0), "an integer of at least 0"),
            "save_every": (_count(self.save_every, 1), "an integer of at least 1"),
            "seed": (_count(self.seed, 0) and self.seed < 2**31, "an integer from 0, below 2^31"),
        }
        faults = [
            f"{name}={getattr(self, name)!r}, expected {valid}" for name, (good, valid) in rules.items() if not good
        ]
        if self.patience and not (self.validation and self.evaluate_every):
            faults.append(f"patience={self.patience!r} without validation and evaluate_every above 0")
        if faults:
            raise TrainingError(f"training cannot use {'; '.join(faults)}")

    def rate(self, step: int, total: int) -> float:
        """Learning rate of a step.

        Args:
            step (int): 0 .. total - 1.
            total (int): optimizer steps of the phase.

        Returns:
            float: of warm-up, then of the schedule.
        """
        rising = math.ceil(self.warmup * total)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(total - rising, 1)
        factor = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[self.schedule]
        return self.learning_rate * factor

    @property
    def decisive(self) -> dict[str, Any]:
        """Field values that the trained weights depend on; how often checkpoints are written is none."""
        return {key: value for key, value in self.to_json().items() if key != "save_every"}

    def to_json(self) -> dict[str, Any]:
        """Field values, for the catalog and for a checkpoint's fingerprint."""
        return asdict(self)


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _within(value: Any, low: float, high: float, *, open_below: bool = False) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        return False
    return (low < value if open_below else low <= value) and value < high
