"""Accuracy per task of several routing methods over one pool and one base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hub_router.composition.build import compose
from hub_router.composition.routed import RoutedModel
from hub_router.errors import HubRouterError, MethodError
from hub_router.evaluate.accuracy import answer, answer_budget, exact_match
from hub_router.features import PoolFeatures
from hub_router.lora.adapter import LoraAdapter
from hub_router.progress import SILENT, Advance, Progress
from hub_router.records import Sample

# The column in which every task runs on its own adapter: the oracle of the papers.
OWN = "own"


@dataclass(frozen=True)
class TaskRow:
    """One task's line of the table.

    Args:
        task (str): name of the adapter that was trained on the task.
        samples (int): number of samples scored.
        accuracy (Mapping[str, float]): exact-match accuracy by method, between 0 and 1.
    """

    task: str
    samples: int
    accuracy: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """The whole table.

    Args:
        methods (tuple[str, ...]): columns.
        rows (tuple[TaskRow, ...]): one per task, in pool order.
    """

    methods: tuple[str, ...]
    rows: tuple[TaskRow, ...]

    @property
    def mean(self) -> dict[str, float]:
        """Mean over tasks by method, each task counting once."""
        return {method: sum(row.accuracy[method] for row in self.rows) / len(self.rows) for method in self.methods}


def compare(
    model: Any,
    tokenizer: Any,
    adapters: Sequence[LoraAdapter],
    tasks: Mapping[str, Sequence[Sample]],
    methods: Mapping[str, tuple[str, Mapping[str, Any]]],
    *,
    features: PoolFeatures | None = None,
    batch_size: int = 64,
    progress: Progress = SILENT,
) -> Comparison:
    """Compose the pool with each method in turn and score every task.

    Args:
        model (PreTrainedModel): base model; composed and detached per method, unchanged at the end.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        adapters (Sequence[LoraAdapter]): the pool.
        tasks (Mapping[str, Sequence[Sample]]): samples by the name of the task's own adapter.
        methods (Mapping[str, tuple[str, Mapping]]): column title -> (method, hyperparameters); the method ``own``
            is ``single`` with each task's own adapter.
        features (PoolFeatures | None): what a catalog knows of the adapters, handed to ``compose``.
        batch_size (int): prompts per batch.
        progress (Progress): one step per prompt and method.

    Returns:
        Comparison: accuracy by task and method.

    Raises:
        HubRouterError: no task has samples.
        MethodError: a task's own adapter is not in the pool.
    """
    scored = {task: list(samples) for task, samples in tasks.items() if samples}
    if not scored:
        raise HubRouterError("no samples to score; sync adapters that carry test.jsonl or samples.jsonl")
    pool = {adapter.name: adapter for adapter in adapters}
    orphans = sorted(set(scored) - set(pool))
    if orphans:
        raise MethodError(f"tasks without an adapter in the pool: {', '.join(orphans)}; pool: {', '.join(pool)}")
    total = sum(len(samples) for samples in scored.values()) * len(methods)
    accuracy: dict[str, dict[str, float]] = {task: {} for task in scored}
    with progress.task("evaluating", total) as advance:
        for title, (method, hyperparameters) in methods.items():
            # The oracle runs one small pool per task; every other method runs all tasks over the whole pool.
            if method == OWN:
                runs: list[Any] = [("single", [pool[task]], {"adapter": task}, {task: scored[task]}) for task in scored]
            else:
                runs = [(method, list(adapters), dict(hyperparameters), scored)]
            for name, members, settings, part in runs:
                routed = compose(model, members, name, tokenizer=tokenizer, features=features, **settings)
                try:
                    for task, value in _score(routed, part, batch_size, advance).items():
                        accuracy[task][title] = value
                finally:
                    routed.detach()
    rows = tuple(TaskRow(task, len(scored[task]), accuracy[task]) for task in pool if task in scored)
    return Comparison(methods=tuple(methods), rows=rows)


def _score(
    routed: RoutedModel, tasks: Mapping[str, Sequence[Sample]], batch_size: int, advance: Advance
) -> dict[str, float]:
    """Exact match per task; all tasks share the batches."""
    samples = [sample for group in tasks.values() for sample in group]
    answers = answer(
        routed,
        [sample.input for sample in samples],
        max_new_tokens=answer_budget(routed, samples),
        batch_size=batch_size,
        advance=advance,
    )
    scores, start = {}, 0
    for task, group in tasks.items():
        stop = start + len(group)
        scores[task] = exact_match(answers[start:stop], [sample.output for sample in group])
        start = stop
    return scores
