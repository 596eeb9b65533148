"""EWoRA's Table 1 in small: LoRA and EWoRA of one budget, on mixed data and on single tasks."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import zoo

from hub_router.ewora import EworaConfig
from hub_router.records import Sample
from hub_router.training import Example, TrainingSettings
from hub_router.training.peft_adapter import fit_adapter

# Kinds of tasks that have little in common, as the paper's code, mathematics and general reasoning.
TASKS = ("zoo-film", "zoo-french", "zoo-plural", "zoo-category", "zoo-owner", "zoo-compare")
RANK, EXPERTS = 8, 4
MIXED, SINGLE = 180, 60
METHODS = ("LoRA", "EWoRA")


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
    shape = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    config = peft.LoraConfig(**shape) if method == "LoRA" else EworaConfig(**shape, n=EXPERTS)
    settings = TrainingSettings(learning_rate=3e-3, steps=MIXED if task is None else SINGLE, batch_size=16, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "adapter"
        outcome = fit_adapter(model, tokenizer, examples, config, settings=settings, out=out)
        tuned = peft.PeftModel.from_pretrained(model, out).eval()
        size = sum(each.numel() for name, each in tuned.named_parameters() if "lora_" in name or "ewora_" in name)
        scores = {name: _accuracy(tuned, tokenizer, zoo.pairs(name, "test.jsonl")) for name in learned}
    return {"seed": seed, "method": method, "task": task, "loss": outcome.loss, "size": size, "accuracy": scores}


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
        for title, figures in (("mixed", together), ("single", alone)):
            means = [sum(figures[task][number] for task in TASKS) / len(TASKS) for number in range(len(seeds))]
            cells = [zoo.mean_and_spread(figures[task]) for task in TASKS]
            rows.append([method, title, mixed[0]["size"], *cells, zoo.mean_and_spread(means)])
    return zoo.table(["", "data", "parameters", *(task.removeprefix("zoo-") for task in TASKS), "mean"], rows)
