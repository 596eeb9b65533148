"""HiLoRA's Tables 1, 3 and 9 and SpectR's Table 1 and Figure 6 in small, on the zoo's own adapters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import encoders
import torch
import zoo

from hub_router.evaluate.diagnostics import routing_accuracy, score_ratio

SAMPLES, BUDGETS, ENCODERS = (2, 5, 10, 20), (0.2, 0.4, 0.8), ("MiniLM", "MiniLM, 64 of 384", "hashed words")
TOKEN_LEVEL = ("arrow", "spectr")
# HiLoRA's Table 1: top 3 for all that choose adapters. Merged factors need adapters of one rank, which these are not.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "hilora-gs": {},
    "hilora-roc": {},
    "retriever": {"top_k": 3},
    "arrow": {"top_k": 3},
    "uniform": {},
    "base": {},
}
# The paper's averages over ten NLI tasks, LLaMA2-7B.
PAPER = {
    "own adapter": "65.13",
    "hilora": "63.41",
    "hilora-gs": "61.89",
    "hilora-roc": "55.80",
    "retriever": "56.99",
    "arrow": "53.91",
    "uniform": "55.35",
}
# SpectR's Table 1, mean of four models.
CHOSEN = {"arrow": "49.4", "spectr": "53.9"}
TESTS, PROMPTS = 16, 4
LEFT_OUT = ("zoo-compare", "zoo-emotion", "zoo-food", "zoo-past", "zoo-spanish", "zoo-where")

# Method, settings, samples per task (0: none), encoder, and seed.
Job = tuple[str, Mapping[str, Any], int, str, int]


def jobs(seeds: Sequence[int]) -> list[Job]:
    """What is drawn has seeds: the components of HiLoRA."""
    variants = {(count, 0.4, ENCODERS[0]) for count in SAMPLES} | {
        (SAMPLES[-1], gamma, ENCODERS[0]) for gamma in BUDGETS
    }
    variants |= {(SAMPLES[-1], 0.4, name) for name in ENCODERS}
    found: list[Job] = [
        ("hilora", {"gamma": gamma}, count, name, seed) for count, gamma, name in sorted(variants) for seed in seeds
    ]
    first = seeds[0]
    for method, settings in METHODS.items():
        found.append((method, settings, SAMPLES[-1] if method in ("hilora-gs", "retriever") else 0, ENCODERS[0], first))
    found += [(method, {"top_k": 4}, 0, ENCODERS[0], first) for method in TOKEN_LEVEL]
    return [*found, ("own adapter", {}, 0, ENCODERS[0], first)]


def run(job: Job) -> dict[str, Any]:
    """Score one method."""
    method, settings, count, name, seed = job
    torch.set_num_threads(1)
    names = zoo.tasks()
    found: dict[str, Any] = {
        "method": method,
        "settings": dict(settings),
        "samples": count,
        "encoder": name,
        "seed": seed,
    }
    if method == "own adapter":
        alone = [zoo.accuracy(zoo.composed([task], "uniform"), task, TESTS) for task in names]
        return {**found, "seen": _mean(alone), "unseen": None}
    seen = _composed(names, job)
    found["seen"] = _mean(zoo.accuracy(seen, task, TESTS) for task in names)
    if method in TOKEN_LEVEL and settings["top_k"] == 4:
        found["tasks"] = {task: _routing(seen, task) for task in names}
    others = [name for name in LEFT_OUT if name in names] or names
    found["unseen"] = _mean(zoo.accuracy(_composed([n for n in names if n != t], job), t, 2 * TESTS) for t in others)
    return found


def _routing(routed: Any, task: str) -> dict[str, float]:
    prompts = [test.input for test in zoo.pairs(task, "test.jsonl")[:PROMPTS]]
    first, among = routing_accuracy(routed, prompts, task)
    config = json.loads((zoo.folder() / task / "adapter_config.json").read_text(encoding="utf-8"))
    return {"first": first, "among": among, "ratio": score_ratio(routed, prompts, task), "rank": config["r"]}


def _composed(names: Sequence[str], job: Job) -> Any:
    method, settings, count, name, seed = job
    if not count:
        return zoo.composed(names, method, **settings)
    samples = {task: [each.input for each in zoo.pairs(task, "samples.jsonl")[:count]] for task in names}
    options: dict[str, Any] = {**settings, "samples": samples, "encoder": encoders.encoder(name)}
    if method.startswith("hilora"):
        options["epsilon"] = encoders.epsilon(name)
    if method == "hilora":
        options["seed"] = seed
    return zoo.composed(names, method, **options)


def report(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """The tables, from the results of all jobs."""
    main = zoo.by(results, method="hilora", samples=SAMPLES[-1], encoder=ENCODERS[0], settings={"gamma": 0.4})
    rows = [["hilora", PAPER["hilora"], *_figures(main)]]
    for method in ("own adapter", *METHODS):
        own = [each for each in zoo.by(results, method=method) if each["settings"] != {"top_k": 4}]
        rows.append([method, PAPER.get(method, ""), *_figures(own)])
    varied = []
    for each in results:
        if each["method"] == "hilora" and each["seed"] == seeds[0]:
            gamma = each["settings"]
            own = zoo.by(results, method="hilora", samples=each["samples"], encoder=each["encoder"], settings=gamma)
            varied.append([each["samples"], gamma["gamma"], each["encoder"], *_figures(own)])
    return "\n\n".join(
        [
            zoo.table(["HiLoRA's Table 1", "paper", "seen", "unseen"], rows),
            zoo.table(["samples m", "gamma", "encoder", "seen", "unseen"], varied),
            _spectr(results),
        ]
    )


def _spectr(results: Sequence[Mapping[str, Any]]) -> str:
    """SpectR's Table 1, and Figure 6 over the ranks that the zoo's adapters have."""
    rows, ranks = [], []
    for method in TOKEN_LEVEL:
        (own,) = zoo.by(results, method=method, settings={"top_k": 4})
        tasks = own["tasks"].values()
        ranks = sorted({each["rank"] for each in tasks})
        found = [_mean(each[key] for each in tasks) for key in ("first", "among")]
        ratios = [_mean(each["ratio"] for each in tasks if each["rank"] == rank) for rank in ranks]
        rows.append(
            [method, CHOSEN[method], *(f"{value:.3f}" for value in (*found, own["seen"], own["unseen"], *ratios))]
        )
    head = ["SpectR's Table 1, Figure 6", "paper", "own adapter first", "among the 4", "seen", "unseen"]
    return zoo.table([*head, *(f"own/max score, rank {rank}" for rank in ranks)], rows)


def _figures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {key: [each[key] for each in results] for key in ("seen", "unseen")}
    return ["" if None in values else zoo.mean_and_spread(values) for values in found.values()]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
