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

SIZES = (5, 40)
RAISED, LOWERED = "RSL, entropy raised (Eq. 5)", "RSL, entropy lowered (text)"
SIGNS = {RAISED: "maximise", LOWERED: "minimise"}
LOSSES: Mapping[str, Mapping[str, Any]] = {
    "no balance loss": {"balance": "none"},
    "auxiliary loss": {"balance": "aux"},
    **{title: {"balance": "rsl", "entropy": sign} for title, sign in SIGNS.items()},
}
# The paper's Table 9 at 1,000 and 2,000 samples for seven tasks; without RSL is with the auxiliary loss.
PAPER = {"auxiliary loss": ("75.47", "77.29"), RAISED: ("76.80", "79.26")}
DEFAULT = (0.1, 0.05)
# alpha and lambda of the paper's Table 15 with its accuracy, load variance and entropy; the last is what A.6 names.
COEFFICIENTS: Mapping[tuple[float, float], str] = {
    (0.05, 0.01): "76.2, 0.12, 1.9",
    DEFAULT: "78.5, 0.08, 1.5",
    (0.2, 0.1): "75.8, 0.05, 1.2",
    (0.1, 0.5): "",
}
STEPS, TESTS, PROMPTS = 60, 32, 2

Job = tuple[int, int, str, Mapping[str, Any]]


def jobs(seeds: Sequence[int]) -> list[Job]:
    """Seed, samples per task, title, options; the coefficients at the largest size, by both signs."""
    runs = [(size, title, options) for size in SIZES for title, options in LOSSES.items()]
    for alpha, weight in COEFFICIENTS:
        for title, sign in SIGNS.items():
            options = {"balance": "rsl", "entropy": sign, "alpha": alpha, "entropy_weight": weight}
            if (alpha, weight) != DEFAULT:
                runs.append((SIZES[-1], _swept(title, alpha, weight), options))
    return [(seed, *each) for each in runs for seed in seeds]


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
        "accuracy": sum(zoo.accuracy(routed, task, TESTS) for task in names) / len(names),
        "load variance": float(load.var(unbiased=False)) * len(names) ** 2,
        "entropy": sum(routing_entropies(routed, prompts)) / len(prompts),
    }


def report(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """The tables, from the results of all jobs."""
    rows = []
    for title in LOSSES:
        accuracies = [_figure(zoo.by(results, size=size, title=title), "accuracy") for size in SIZES]
        largest = zoo.by(results, size=SIZES[-1], title=title)
        rows.append(
            [title, *PAPER.get(title, ("", "")), *accuracies, *(_figure(largest, key) for key in _MEASURES[1:])]
        )
    swept = []
    for (alpha, weight), paper in COEFFICIENTS.items():
        for title in SIGNS:
            named = title if (alpha, weight) == DEFAULT else _swept(title, alpha, weight)
            own = zoo.by(results, size=SIZES[-1], title=named)
            swept.append([alpha, weight, title, paper, *(_figure(own, key) for key in _MEASURES)])
    here = [f"accuracy at {size}" for size in SIZES]
    losses = ["", "paper, 1K", "2K", *here, *(f"{key} at {SIZES[-1]}" for key in _MEASURES[1:])]
    return f"{zoo.table(losses, rows)}\n\n{zoo.table(['alpha', 'lambda', '', 'paper', *_MEASURES], swept)}"


_MEASURES = ("accuracy", "load variance", "entropy")


def _swept(title: str, alpha: float, weight: float) -> str:
    return f"{title}: {alpha}, {weight}"


def _figure(results: Sequence[Mapping[str, Any]], key: str) -> str:
    return zoo.mean_and_spread([each[key] for each in results])
