"""MAPLE's Table 2 and Figures 1, 3, 4, 5 and 6 in small: the parent, joint training without masking, and with it.

Two pools over one base model: the zoo's own adapters, and those of ``strong.py``, which do harm outside their task.
Seen: a pool of all adapters, each task with its own. Unseen: leave one out; its samples are in no training either.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import strong
import torch
import zoo

from hub_router import RoutedModel
from hub_router.evaluate.diagnostics import effective_rank, pairwise_cosines, routing_entropies
from hub_router.features import PoolFeatures
from hub_router.training import TrainingSettings, fit

MODES = {
    "base": "no adapter",
    "alone": "one adapter alone: its own, or the best other",
    "parent": "untrained",
    "none": "MAPLE without masking",
    "after": "MAPLE",
    "before": "MAPLE, masked before top-k",
}
# The paper's averages on ten benchmarks, Phi-2: Table 2 for Arrow, Table 1 for PHATGOOSE.
PAPER = {
    ("arrow", "parent"): "65.94",
    ("arrow", "none"): "66.06",
    ("arrow", "after"): "66.41",
    ("phatgoose", "parent"): "66.26",
    ("phatgoose", "after"): "66.63",
}
# Some of every cluster.
LEFT_OUT = {
    "zoo": ("zoo-compare", "zoo-emotion", "zoo-food", "zoo-past", "zoo-spanish", "zoo-where"),
    "strong": ("zoo-category", "zoo-food", "zoo-hotel", "zoo-owner", "zoo-plural", "zoo-when"),
}
# The paper's for Llama 3 but the rate, 1e-3 there: entries of a unit vector are larger here. MAPLE's best of 3e-3, 1e-2
# and 5e-2 (.510, .583 and .500; without masking .516, .552, .562) on the other six tasks of the strong pool, seed 0.
SETTINGS = TrainingSettings(learning_rate=1e-2, epochs=1, batch_size=16, warmup=0.06)
TESTS, PROMPTS = 32, 8
_UNTRAINED = ("base", "alone", "parent")

Job = tuple[str, str, str, int, str | None]


def prepare(workers: int) -> None:
    """Train the second pool, and its gates for PHATGOOSE."""
    zoo.in_processes(strong.train, strong.TASKS, workers, "strong pool")


def jobs(seeds: Sequence[int]) -> list[Job]:
    """Pool, parent, mode, seed, and the task that is left out; what is not trained has no seeds."""
    first = seeds[:1]
    runs = [(pool, "arrow", mode, first) for pool in ("zoo", "strong") for mode in _UNTRAINED]
    runs += [("zoo", "arrow", mode, seeds) for mode in ("none", "after")]
    runs += [("strong", "arrow", mode, seeds) for mode in ("none", "after", "before")]
    runs += [("strong", "phatgoose", mode, first) for mode in ("parent", "none", "after")]
    return [
        (pool, parent, mode, seed, task)
        for pool, parent, mode, of in runs
        for seed in of
        for task in (None, *LEFT_OUT[pool])
    ]


def run(job: Job) -> dict[str, Any]:
    """Train the gates of one pool and measure it."""
    from dataclasses import replace

    pool, parent, mode, seed, left_out = job
    torch.set_num_threads(1)
    whole = zoo.tasks() if pool == "zoo" else strong.TASKS
    names = [name for name in whole if name != left_out]
    tested = names if left_out is None else [left_out]
    tests = TESTS * (1 if left_out is None else 2)
    routed = _composed(pool, names, parent, mode)
    found: dict[str, Any] = {"pool": pool, "parent": parent, "mode": mode, "seed": seed, "left_out": left_out}
    if mode == "alone":
        # The best other one is chosen by the test's own prompts: what choosing could reach at most.
        others = [[task] if left_out is None else names for task in tested]
        return {
            **found,
            "accuracy": _mean(_best(routed, task, some, tests) for task, some in zip(tested, others, strict=True)),
        }
    if mode not in _UNTRAINED:
        samples = zoo.samples(names) if pool == "zoo" else {name: strong.samples(name) for name in names}
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            fit(routed, samples, settings=replace(SETTINGS, seed=seed), mask=mode, log=log)
            found["losses"] = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    found["accuracy"] = _mean(zoo.accuracy(routed, task, tests) for task in tested)
    found["loss"] = _mean(zoo.answer_loss(routed, task, TESTS) for task in tested)
    if mode != "base":
        prompts = [test.input for task in tested for test in zoo.pairs(task, "test.jsonl")[:PROMPTS]]
        found |= {"entropies": routing_entropies(routed, prompts), **_shape(routed.vectors)}
    return found


def _best(routed: RoutedModel, task: str, adapters: Sequence[str], tests: int) -> float:
    """The largest accuracy that one of some adapters has on a task."""
    found = []
    for name in adapters:
        routed.set_method("single", adapter=name)
        found.append(zoo.accuracy(routed, task, tests))
    return max(found)


def _composed(pool: str, names: Sequence[str], parent: str, mode: str) -> RoutedModel:
    settings: dict[str, Any] = {"pool": strong.folder() if pool == "strong" else None}
    if mode in ("base", "alone"):
        return zoo.composed(names, "base", **settings)
    if parent == "phatgoose":
        settings |= {"prototypes": "gates", "features": PoolFeatures(prototypes={"gates": strong.gates(names)})}
    return zoo.composed(names, "maple", parent=parent, **settings)


def _shape(vectors: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Mean over modules of the mean cosine (its absolute value, for Arrow's signs are free) and the effective rank."""
    modules: dict[str, list[torch.Tensor]] = {}
    for own in vectors.values():
        for module, vector in own.items():
            modules.setdefault(module, []).append(torch.from_numpy(vector))
    matrices = [torch.stack(rows) for rows in modules.values() if len(rows) > 1]
    units = [torch.nn.functional.normalize(matrix, dim=-1) for matrix in matrices]
    return {
        "cosine": _mean(float(pairwise_cosines(matrix).abs().mean()) for matrix in matrices),
        "rank": _mean(map(effective_rank, units)),
    }


def report(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """The tables, from the results of all jobs."""
    groups = list(dict.fromkeys((each["pool"], each["parent"], each["mode"]) for each in results))
    accuracies, figures, curves = [], [], []
    for pool, parent, mode in sorted(groups, key=lambda group: (group[:2] != ("zoo", "arrow"), group[1])):
        own = zoo.by(results, pool=pool, parent=parent, mode=mode)
        wholes = [each for each in own if each["left_out"] is None]
        others = [[each for each in own if each["left_out"] and each["seed"] == whole["seed"]] for whole in wholes]
        title = [pool, parent if mode not in ("base", "alone") else "", MODES[mode]]
        seen = zoo.mean_and_spread([each["accuracy"] for each in wholes])
        unseen = zoo.mean_and_spread([_mean(each["accuracy"] for each in group) for group in others])
        rest = [each for group in others for each in group]
        losses = ["" if mode == "alone" else f"{_mean(e['loss'] for e in group):.2f}" for group in (wholes, rest)]
        accuracies.append([*title, PAPER.get((parent, mode), ""), seen, unseen, *losses])
        if mode in ("base", "alone"):
            continue
        inside = [value for each in wholes for value in each["entropies"]]
        outside = [value for group in others for each in group for value in each["entropies"]]
        shape = [zoo.mean_and_spread([each[key] for each in wholes]) for key in ("cosine", "rank")]
        figures.append(
            [*title, _quartiles(inside), _quartiles(outside), f"{_mean(outside) - _mean(inside):+.3f}", *shape]
        )
        if mode in ("none", "after", "before"):
            curves.append([*title, *_tenths([each["losses"] for each in wholes])])
    head = ["pool", "parent", ""]
    return "\n\n".join(
        [
            zoo.table([*head, "paper", "seen", "unseen", "loss, seen", "unseen"], accuracies),
            zoo.table([*head, "entropy in pool", "left out", "gap", "cosine", "effective rank"], figures),
            zoo.table([*head, *(f"{10 * number}%" for number in range(1, 11))], curves),
        ]
    )


def _quartiles(values: Sequence[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in np.quantile(values, [0.25, 0.5, 0.75]))


def _tenths(runs: Sequence[Sequence[float]]) -> list[str]:
    """Mean training loss of every tenth of the steps, over all runs."""
    parts = [np.array_split(losses, 10) for losses in runs]
    return [f"{_mean(float(part.mean()) for part in tenth if part.size):.2f}" for tenth in zip(*parts, strict=True)]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
