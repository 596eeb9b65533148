"""MAPLE's Table 2 and Figures 1, 3, 4, 5 and 6 on the zoo: the parent, joint training without masking, and with it.

Seen: a pool of all adapters, each task with its own. Unseen: leave one out; its samples are in no training either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import zoo

from hub_router.evaluate.diagnostics import effective_rank, pairwise_cosines, routing_entropies
from hub_router.training import TrainingSettings, fit

MODES = ("parent", "none", "after")
NAMES = {"parent": "Arrow", "none": "MAPLE without masking", "after": "MAPLE"}
# The paper's Table 2, average accuracy on ten benchmarks, Phi-2.
PAPER = {"parent": "65.94", "none": "66.06", "after": "66.41"}
# The paper's for Llama 3, but that the zoo has 40 samples per task, not 200.
SETTINGS = TrainingSettings(learning_rate=1e-3, epochs=1, batch_size=16, warmup=0.06)
PROMPTS = 8


def jobs(seeds: Sequence[int]) -> list[tuple[int, str, str | None]]:
    """Seed, mode, and the task that is left out; the parent is not trained, and has no seeds."""
    left_out = [None, *zoo.tasks()]
    return [
        (seed, mode, task) for mode in MODES for seed in (seeds if mode != "parent" else seeds[:1]) for task in left_out
    ]


def run(job: tuple[int, str, str | None], settings: TrainingSettings | None = None) -> dict[str, Any]:
    """Train one pool and measure it."""
    from dataclasses import replace

    seed, mode, left_out = job
    torch.set_num_threads(1)
    pool = [name for name in zoo.tasks() if name != left_out]
    routed = zoo.composed(pool, "maple")
    before = routed.vectors
    loss = None
    if mode != "parent":
        loss = fit(routed, zoo.samples(pool), settings=replace(settings or SETTINGS, seed=seed), mask=mode).loss
    tested = pool if left_out is None else [left_out]
    prompts = [test.input for task in tested for test in zoo.pairs(task, "test.jsonl")[:PROMPTS]]
    return {
        "seed": seed,
        "mode": mode,
        "left_out": left_out,
        "loss": loss,
        "accuracy": {task: zoo.accuracy(routed, task) for task in tested},
        "entropies": routing_entropies(routed, prompts),
        "prototypes": {
            "before": _shape(before),
            "after": _shape(routed.vectors),
        },
    }


def _shape(vectors: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Mean over modules of the mean cosine (its absolute value, for Arrow's signs are free) and the effective rank."""
    modules: dict[str, list[torch.Tensor]] = {}
    for own in vectors.values():
        for module, vector in own.items():
            modules.setdefault(module, []).append(torch.from_numpy(vector))
    matrices = [torch.stack(rows) for rows in modules.values() if len(rows) > 1]
    cosines = [float(pairwise_cosines(matrix).abs().mean()) for matrix in matrices]
    unit = [effective_rank(torch.nn.functional.normalize(matrix, dim=-1)) for matrix in matrices]
    return {"cosine": sum(cosines) / len(cosines), "rank": sum(unit) / len(unit)}


def report(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """The tables, from the results of all jobs."""
    lines = []
    for mode in MODES:
        columns: dict[str, list[float]] = {
            name: [] for name in ("seen", "unseen", "id", "ood", "gap", "cosine", "rank")
        }
        for seed in seeds if mode != "parent" else seeds[:1]:
            own = zoo.by(results, mode=mode, seed=seed)
            whole = next(each for each in own if each["left_out"] is None)
            others = [each for each in own if each["left_out"] is not None]
            columns["seen"].append(_mean(whole["accuracy"].values()))
            columns["unseen"].append(_mean(value for each in others for value in each["accuracy"].values()))
            columns["id"].append(_mean(whole["entropies"]))
            columns["ood"].append(_mean(value for each in others for value in each["entropies"]))
            columns["gap"].append(columns["ood"][-1] - columns["id"][-1])
            columns["cosine"].append(whole["prototypes"]["after"]["cosine"])
            columns["rank"].append(whole["prototypes"]["after"]["rank"])
        lines.append([NAMES[mode], PAPER[mode], *map(zoo.mean_and_spread, columns.values())])
    head = ["", "paper, Table 2", "seen", "unseen", "entropy in pool", "left out", "gap", "cosine", "effective rank"]
    return zoo.table(head, lines)


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def tune(rates: Sequence[float], epochs: Sequence[float], workers: int) -> str:
    """Seed 0 at other settings: how the choice above was made."""
    rows = []
    for rate in rates:
        for count in epochs:
            settings = TrainingSettings(learning_rate=rate, epochs=count, batch_size=16, warmup=0.06)
            trained = [job for job in jobs([0]) if job[1] != "parent"]
            results = zoo.in_processes(
                partial(run, settings=settings), trained, workers, f"rate {rate}, {count} epochs"
            )
            for mode in MODES[1:]:
                own = zoo.by(results, mode=mode)
                seen = _mean(next(each for each in own if each["left_out"] is None)["accuracy"].values())
                unseen = _mean(v for each in own if each["left_out"] for v in each["accuracy"].values())
                rows.append([rate, count, NAMES[mode], f"{seen:.3f}", f"{unseen:.3f}"])
    return zoo.table(["learning rate", "epochs", "", "seen", "unseen"], rows)
