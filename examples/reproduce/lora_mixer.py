"""LoRA-Mixer's Table 9, Figures 3 and 4, and Table 15 on the zoo: balance losses, expert load, coefficients.

Every run trains the router of the whole pool for equally many steps, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import zoo

from hub_router.evaluate.diagnostics import expert_load, routing_entropies
from hub_router.training import TrainingSettings, fit

SIZES = (5, 10, 40)
LOSSES: Mapping[str, Mapping[str, Any]] = {
    "no balance loss": {"balance": "none"},
    "auxiliary loss": {"balance": "aux"},
    "RSL, entropy raised (Eq. 5)": {"balance": "rsl", "entropy": "maximise"},
    "RSL, entropy lowered (text)": {"balance": "rsl", "entropy": "minimise"},
}
COEFFICIENTS = ((0.01, 0.005), (0.1, 0.05), (0.1, 0.5), (1.0, 0.05))
STEPS, PROMPTS = 120, 2

Job = tuple[int, int, str, Mapping[str, Any]]


def jobs(seeds: Sequence[int]) -> list[Job]:
    """Seed, samples per task, title, options; the coefficients at the largest size, by both signs."""
    found: list[Job] = [(seed, size, title, LOSSES[title]) for size in SIZES for title in LOSSES for seed in seeds]
    for alpha, weight in COEFFICIENTS:
        options = {"balance": "rsl", "alpha": alpha, "entropy_weight": weight}
        found += [(seed, SIZES[-1], f"{alpha}, {weight}", options) for seed in seeds if (alpha, weight) != (0.1, 0.05)]
    return found


def run(job: Job) -> dict[str, Any]:
    """Train one router and measure it."""
    seed, size, title, options = job
    torch.set_num_threads(1)
    names = zoo.tasks()
    routed = zoo.composed(names, "lora-mixer")
    data = {name: own[:size] for name, own in zoo.samples(names).items()}
    settings = TrainingSettings(learning_rate=1e-2, steps=STEPS, batch_size=16, seed=seed)
    result = fit(routed, data, settings=settings, **options)
    prompts = [test.input for task in names for test in zoo.pairs(task, "test.jsonl")[:PROMPTS]]
    load = expert_load(routed, prompts)
    return {
        "seed": seed,
        "size": size,
        "title": title,
        "loss": result.loss,
        "accuracy": sum(zoo.accuracy(routed, task, 32) for task in names) / len(names),
        "load variance": float(load.var(unbiased=False)) * len(names) ** 2,
        "entropy": sum(routing_entropies(routed, prompts)) / len(prompts),
    }


def report(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """The tables, from the results of all jobs."""
    rows = [
        [title, *(_figure(zoo.by(results, size=size, title=title), "accuracy") for size in SIZES)] for title in LOSSES
    ]
    sizes = zoo.table(["accuracy by samples per task", *map(str, SIZES)], rows)
    largest = [
        [title, *(_figure(zoo.by(results, size=SIZES[-1], title=title), key) for key in _MEASURES)] for title in LOSSES
    ]
    load = zoo.table([f"at {SIZES[-1]} samples per task", *_MEASURES], largest)
    swept = []
    for alpha, weight in COEFFICIENTS:
        title = "RSL, entropy raised (Eq. 5)" if (alpha, weight) == (0.1, 0.05) else f"{alpha}, {weight}"
        own = zoo.by(results, size=SIZES[-1], title=title)
        swept.append([alpha, weight, *(_figure(own, key) for key in _MEASURES)])
    return f"{sizes}\n\n{load}\n\n{zoo.table(['alpha', 'lambda', *_MEASURES], swept)}"


_MEASURES = ("accuracy", "load variance", "entropy")


def _figure(results: Sequence[Mapping[str, Any]], key: str) -> str:
    return zoo.mean_and_spread([each[key] for each in results])
