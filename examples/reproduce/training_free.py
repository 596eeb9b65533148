"""HiLoRA's Tables 3 and 9 and SpectR's Table 1 in small: samples and budget, and how often the right one is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import zoo

from hub_router.evaluate.diagnostics import routing_accuracy

SAMPLES, BUDGETS = (5, 10, 20, 40), (0.2, 0.4, 0.8)
# HiLoRA's epsilon as the pool's report calibrates it; with the published one nearly all adapters are candidates.
EPSILON = 0.000251
TESTS, PROMPTS = 16, 4
STEP = 3

Job = tuple[str, Mapping[str, Any], int, int]


def jobs(seeds: Sequence[int]) -> list[Job]:
    """Method, settings, samples per task, and seed; what draws nothing has no seeds."""
    found: list[Job] = [("hilora", {"gamma": 0.4}, count, seed) for count in SAMPLES for seed in seeds]
    found += [("hilora", {"gamma": gamma}, 20, seed) for gamma in BUDGETS if gamma != 0.4 for seed in seeds]
    return [*found, ("arrow", {"top_k": 4}, 0, seeds[0]), ("spectr", {"top_k": 4}, 0, seeds[0])]


def run(job: Job) -> dict[str, Any]:
    """Score one method."""
    method, settings, count, seed = job
    torch.set_num_threads(1)
    names = zoo.tasks()
    seen = _composed(names, job)
    found: dict[str, Any] = {"method": method, "settings": dict(settings), "samples": count, "seed": seed}
    found["seen"] = sum(zoo.accuracy(seen, task, TESTS) for task in names) / len(names)
    if not count:
        chosen = [routing_accuracy(seen, [t.input for t in zoo.pairs(n, "test.jsonl")[:PROMPTS]], n) for n in names]
        found["first"], found["among"] = (sum(each) / len(names) for each in zip(*chosen, strict=True))
    left_out = names[::STEP]
    others = [zoo.accuracy(_composed([n for n in names if n != task], job), task, TESTS) for task in left_out]
    return {**found, "unseen": sum(others) / len(left_out)}


def _composed(names: Sequence[str], job: Job) -> Any:
    method, settings, count, seed = job
    if not count:
        return zoo.composed(names, method, **settings)
    samples = {name: [each.input for each in zoo.pairs(name, "samples.jsonl")[:count]] for name in names}
    options = {**settings, "samples": samples, "encoder": "offline", "epsilon": EPSILON, "seed": seed}
    return zoo.composed(names, method, **options)


def report(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """The tables, from the results of all jobs."""
    rows = []
    for count in SAMPLES:
        rows.append([count, 0.4, *_figures(zoo.by(results, samples=count, settings={"gamma": 0.4}))])
    for gamma in BUDGETS:
        if gamma != 0.4:
            rows.append([20, gamma, *_figures(zoo.by(results, samples=20, settings={"gamma": gamma}))])
    hilora = zoo.table(["samples m", "gamma", "seen", "unseen"], rows)
    lines = []
    for method in ("arrow", "spectr"):
        (own,) = zoo.by(results, method=method)
        lines.append([method, *(f"{own[key]:.3f}" for key in ("first", "among", "seen", "unseen"))])
    return f"{hilora}\n\n{zoo.table(['', 'own adapter first', 'among the 4', 'seen', 'unseen'], lines)}"


def _figures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    return [zoo.mean_and_spread([each[key] for each in results]) for key in ("seen", "unseen")]
