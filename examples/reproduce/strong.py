"""A second pool over the zoo's base model: adapters that know their task well and do harm outside it.

The zoo's own adapters replay the other tasks' corpus and change little there. These see their own task alone, with the
larger update that a community adapter may have; to an input of another task they give an answer of their own.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
import zoo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "zoo"))

import tasks as definitions
import train as training

from hub_router import compose
from hub_router.records import Sample
from hub_router.training import TrainingSettings, fit

# Whole clusters of four: without its own adapter, a task has to find others that are of use to it.
TASKS = (
    *("zoo-film", "zoo-food", "zoo-hotel", "zoo-product"),
    *("zoo-colour", "zoo-owner", "zoo-when", "zoo-where"),
    *("zoo-antonym", "zoo-category", "zoo-past", "zoo-plural"),
)
# With the zoo's scaling of 2, adapters that saw their task alone leave the others' accuracy where it was (.54, the base
# .52); with 8 they cost most of it (.21), and are right on their own (.98).
RANK, SCALING, RATE, STEPS, BATCH = 8, 8, 4e-3, 200, 16
SAMPLES = 100
GATES = TrainingSettings(learning_rate=1e-3, steps=100)  # the paper's
_GATE = "gate.npz"


def folder() -> Path:
    """Where the pool lies; run.py names the folder above it."""
    return Path(os.environ["REPRODUCE_WORK"]) / "strong"


def samples(name: str) -> tuple[Sample, ...]:
    """Inputs and answers for the training of gates; drawn anew, without the tests' prompts."""
    task = _task(name)
    _, tests, _ = training.split(task)
    reserved, rng = {prompt for prompt, _ in tests}, Random(f"{name} gates")
    return tuple(Sample(*training.fresh(lambda: task.example(rng)[:2], reserved)) for _ in range(SAMPLES))


def train(name: str) -> None:
    """Train one adapter, and its gate for PHATGOOSE; nothing where they lie there already."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # that the base is not on the Hub
    torch.set_num_threads(1)
    base, own = zoo.folder() / zoo.BASE, folder() / name
    if not (own / "adapter_config.json").exists():
        _train_adapter(_task(name), base, own)
    if not (own / _GATE).exists():
        routed = compose(base, {name: own}, "phatgoose")
        fit(routed, {name: samples(name)}, settings=GATES)
        np.savez(own / _GATE, **routed.vectors[name])


def _train_adapter(task: definitions.Task, base: Path, own: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, _, reserved = training.split(task)
    torch.manual_seed(training.SEED)
    rng = Random(f"strong {task.name}")
    config = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)

    def draw() -> list[training.Pair]:
        return [training.fresh(lambda: task.example(rng)[:2], reserved) for _ in range(BATCH)]

    training.fit(model, AutoTokenizer.from_pretrained(base), draw, STEPS, RATE)
    model.save_pretrained(own)


def gates(names: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """PHATGOOSE's vectors by adapter and module: each was trained alone, whatever the pool."""
    return {name: dict(np.load(folder() / name / _GATE)) for name in names}


def _task(name: str) -> definitions.Task:
    return next(task for task in definitions.TASKS if f"zoo-{task.name}" == name)
