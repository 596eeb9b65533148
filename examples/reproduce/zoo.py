"""The zoo as the experiments see it: base model, pools, samples, tests; and jobs on several processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from hub_router import RoutedModel, compose
from hub_router.evaluate.accuracy import answer, exact_match
from hub_router.records import Sample
from hub_router.settings import bundled
from hub_router.training import Example
from hub_router.training.batches import collate, predict
from hub_router.training.data import encode

BASE = "zoo-base"


@cache
def folder() -> Path:
    """Folder of the zoo's repositories."""
    return bundled("zoo") / "hub_router"


@cache
def tasks() -> tuple[str, ...]:
    """Names of the adapters, each trained on the task of its name."""
    return tuple(sorted(path.name for path in folder().glob("zoo-*") if path.name != BASE))


@cache
def pairs(task: str, file: str) -> tuple[Sample, ...]:
    """Inputs and answers of a task: ``samples.jsonl`` for training, ``test.jsonl`` held out."""
    lines = (folder() / task / file).read_text(encoding="utf-8").splitlines()
    return tuple(Sample(entry["input"], entry["output"]) for entry in map(json.loads, lines))


def samples(names: Iterable[str]) -> dict[str, tuple[Sample, ...]]:
    """Training samples by task."""
    return {name: pairs(name, "samples.jsonl") for name in names}


def composed(names: Iterable[str], method: str, *, pool: Path | None = None, **settings: Any) -> RoutedModel:
    """A fresh base model with these adapters, the zoo's own or those of another folder."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return compose(folder() / BASE, {name: (pool or folder()) / name for name in names}, method, **settings)


def accuracy(routed: RoutedModel, task: str, count: int | None = None) -> float:
    """Exact match on the first held-out prompts of a task."""
    tests = pairs(task, "test.jsonl")[:count]
    answers = answer(routed, [test.input for test in tests], max_new_tokens=10)
    return exact_match(answers, [test.output for test in tests])


@torch.inference_mode()
def answer_loss(routed: RoutedModel, task: str, count: int | None = None) -> float:
    """Cross-entropy per answer token of the first held-out prompts of a task, nats."""
    tests = [Example(task, test.input, test.output) for test in pairs(task, "test.jsonl")[:count]]
    encoded = encode(tests, [task], routed.tokenizer, routed.model.config.max_position_embeddings, False)
    batch = collate(encoded, routed.tokenizer.pad_token_id, routed.model, False, routed.model.device)
    return float(batch.loss(predict(routed.model, batch, "float32"))) / batch.learned


def in_processes(run: Callable[[Any], Any], jobs: Sequence[Any], workers: int, title: str) -> list[Any]:
    """Results of jobs in their order, each in one of some processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = []
        for done, result in enumerate(pool.map(run, jobs), 1):
            results.append(result)
            print(f"\r{title}: {done} of {len(jobs)}", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return results


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation over seeds."""
    mean = sum(values) / len(values)
    spread = (sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)) ** 0.5
    return f"{mean:.3f} ± {spread:.3f}" if len(values) > 1 else f"{mean:.3f}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def by(results: Sequence[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """Those results that have these values."""
    return [each for each in results if all(each[key] == value for key, value in wanted.items())]
