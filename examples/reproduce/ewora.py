"""EWoRA's Table 1 in small: LoRA, AdaLoRA and EWoRA of one budget, on mixed data and on single tasks; and Figure 2."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import adalora
import peft
import torch
import zoo

from hub_router.ewora import EworaConfig
from hub_router.ewora.diagnostics import ExpertRecord, heatmap
from hub_router.records import Sample
from hub_router.training import Example, TrainingSettings
from hub_router.training.peft_adapter import fit_adapter

# Kinds of tasks that have little in common, as the paper's code, mathematics and general reasoning.
TASKS = ("zoo-film", "zoo-french", "zoo-plural", "zoo-category", "zoo-owner", "zoo-compare")
RANK, EXPERTS = 8, 4
MIXED, SINGLE = 180, 60
TESTS, PROMPTS = 64, 16
METHODS = ("LoRA", "AdaLoRA", "EWoRA")


def jobs(seeds: Sequence[int]) -> list[tuple[int, str, str | None]]:
    """Seed, method, and the task that is learned alone; None for all together."""
    return [(seed, method, task) for method in METHODS for task in (None, *TASKS) for seed in seeds]


def run(job: tuple[int, str, str | None]) -> dict[str, Any]:
    """Train one adapter and test it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seed, method, task = job
    torch.set_num_threads(1)
    base = zoo.folder() / zoo.BASE
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    learned = TASKS if task is None else (task,)
    examples = [Example(name, each.input, each.output) for name in learned for each in zoo.pairs(name, "samples.jsonl")]
    settings = TrainingSettings(learning_rate=3e-3, steps=MIXED if task is None else SINGLE, batch_size=16, seed=seed)
    if method == "AdaLoRA":
        tuned, loss = adalora.fit(model, tokenizer, examples, RANK, 2 * RANK, settings)
        size = adalora.size(tuned)
    else:
        tuned, loss = _fit(model, tokenizer, examples, method, settings)
        size = sum(each.numel() for name, each in tuned.named_parameters() if "lora_" in name or "ewora_" in name)
    scores = {name: _accuracy(tuned, tokenizer, zoo.pairs(name, "test.jsonl")[:TESTS]) for name in learned}
    found = {"seed": seed, "method": method, "task": task, "loss": loss, "size": size, "accuracy": scores}
    return found | (_distances(tuned, tokenizer) if method == "EWoRA" and task is None else {})


def _fit(
    model: Any, tokenizer: Any, examples: Sequence[Example], method: str, settings: TrainingSettings
) -> tuple[Any, float]:
    shape = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    config = peft.LoraConfig(**shape) if method == "LoRA" else EworaConfig(**shape, n=EXPERTS)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        outcome = fit_adapter(model, tokenizer, examples, config, settings=settings, out=out)
        return peft.PeftModel.from_pretrained(model, out).eval(), outcome.loss


@torch.inference_mode()
def _distances(tuned: Any, tokenizer: Any) -> dict[str, Any]:
    """L1 distances between the tasks' mean expert weights: by kind of module and layer, and by pair of tasks."""
    record = ExpertRecord(tuned)
    for task in TASKS:
        with record.task(task):
            for test in zoo.pairs(task, "test.jsonl")[:PROMPTS]:
                tuned(**tokenizer(test.input, return_tensors="pt", return_token_type_ids=False))
    drawn = heatmap(record.distances())
    kinds = {kind.rpartition(".")[2]: row.tolist() for kind, row in zip(drawn.kinds, drawn.values, strict=True)}
    means = record.means().values()
    pairs = {
        f"{one.removeprefix('zoo-')}, {two.removeprefix('zoo-')}": sum(
            float((of_tasks[one] - of_tasks[two]).abs().sum()) for of_tasks in means
        )
        / len(means)
        for one, two in combinations(TASKS, 2)
    }
    return {"kinds": kinds, "pairs": pairs}


@torch.inference_mode()
def _accuracy(model: Any, tokenizer: Any, tests: Sequence[Sample]) -> float:
    """Exact match of greedy answers."""
    inputs = [test.input for test in tests]
    batch = tokenizer(inputs, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    made = model.generate(**batch, max_new_tokens=10, do_sample=False)[:, batch["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(made, skip_special_tokens=True)
    return sum(text.strip() == test.output for text, test in zip(texts, tests, strict=True)) / len(tests)


def report(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """The table, from the results of all jobs."""
    rows = []
    for method in METHODS:
        mixed = zoo.by(results, method=method, task=None)
        together = {task: [each["accuracy"][task] for each in mixed] for task in TASKS}
        alone = {task: [each["accuracy"][task] for each in zoo.by(results, method=method, task=task)] for task in TASKS}
        singles = [each for each in zoo.by(results, method=method) if each["task"]]
        for title, figures, sized in (("mixed", together, mixed), ("single", alone, singles)):
            means = [sum(figures[task][number] for task in TASKS) / len(TASKS) for number in range(len(seeds))]
            cells = [zoo.mean_and_spread(figures[task]) for task in TASKS]
            rows.append(
                [
                    method,
                    title,
                    round(sum(each["size"] for each in sized) / len(sized)),
                    *cells,
                    zoo.mean_and_spread(means),
                ]
            )
    head = ["", "data", "parameters", *(task.removeprefix("zoo-") for task in TASKS), "mean"]
    return f"{zoo.table(head, rows)}\n\n{_figure(zoo.by(results, method='EWoRA', task=None))}"


def _figure(mixed: Sequence[Mapping[str, Any]]) -> str:
    """Figure 2, mean over seeds; below it the pairs of tasks."""
    layers = range(len(next(iter(mixed[0]["kinds"].values()))))
    rows = [
        [kind, *(f"{sum(each['kinds'][kind][layer] for each in mixed) / len(mixed):.3f}" for layer in layers)]
        for kind in mixed[0]["kinds"]
    ]
    pairs = {pair: [each["pairs"][pair] for each in mixed] for pair in mixed[0]["pairs"]}
    order = sorted(pairs, key=lambda pair: sum(pairs[pair]))
    ends = [
        [what, pair, zoo.mean_and_spread(pairs[pair])]
        for what, pair in (("closest", order[0]), ("farthest", order[-1]))
    ]
    distances = zoo.table(["mean distance", *(f"layer {layer}" for layer in layers)], rows)
    return f"{distances}\n\n{zoo.table(['pair of tasks', '', 'mean distance'], ends)}"
