"""Accuracy per task of several routing methods over one pool and one base model, with and without its own adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hub_router.composition.assemble import stack
from hub_router.composition.build import compose
from hub_router.composition.needs import check_needs, check_trained
from hub_router.composition.plan import TextEncoder
from hub_router.composition.routed import RoutedModel
from hub_router.encoder import load_encoder
from hub_router.errors import HubRouterError, MethodError
from hub_router.evaluate.accuracy import answer, answer_budget, exact_match
from hub_router.evaluate.columns import OWN, Column
from hub_router.features import PoolFeatures
from hub_router.lora.adapter import LoraAdapter
from hub_router.progress import SILENT, Advance, Progress
from hub_router.records import Sample
from hub_router.routing.base import SequenceRouter
from hub_router.routing.registry import create

# They are one adapter: where it is the task's own there is nothing left without it, and else it is no matter.
# Gates of mole are of the whole pool that they were trained over.
_NEVER_UNSEEN = (OWN, "single", "mole")

Tasks = Mapping[str, Sequence[Sample]]


@dataclass(frozen=True)
class TaskRow:
    """One task's line of the table.

    Args:
        task (str): name of the adapter that was trained on the task.
        samples (int): number of samples scored.
        accuracy (Mapping[str, float]): exact-match accuracy by method, between 0 and 1.
        unseen (Mapping[str, float]): the same with the task's own adapter left out of the pool.
    """

    task: str
    samples: int
    accuracy: Mapping[str, float]
    unseen: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The whole table.

    Args:
        methods (tuple[str, ...]): columns, those that were refused among them.
        rows (tuple[TaskRow, ...]): one per task, in pool order.
        refused (Mapping[str, str]): why the pool does not allow a method, by column.
        notes (tuple[str, ...]): what a reader must know of a column.
    """

    methods: tuple[str, ...]
    rows: tuple[TaskRow, ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def mean(self) -> dict[str, float]:
        """Mean over tasks by method, each task counting once; without methods that were refused."""
        return _means([row.accuracy for row in self.rows], self.methods)

    @property
    def unseen_mean(self) -> dict[str, float]:
        """The same with each task's own adapter left out of the pool; empty where that was not asked for."""
        return _means([row.unseen for row in self.rows], self.methods)


@dataclass(frozen=True)
class Remembering:
    """A sentence encoder that embeds no text twice: methods that read the same prompts share the work.

    Args:
        encoder (TextEncoder): does it once.
        vectors (dict[str, np.ndarray]): by text.
    """

    encoder: TextEncoder
    vectors: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The encoder's."""
        return self.encoder.name

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors ``(N, D)`` in the order of ``texts``."""
        new = list(dict.fromkeys(text for text in texts if text not in self.vectors))
        if new:
            self.vectors.update(zip(new, self.encoder.encode(new), strict=True))
        return np.stack([self.vectors[text] for text in texts])


def refusals(
    adapters: Sequence[LoraAdapter], columns: Sequence[Column], features: PoolFeatures | None = None
) -> dict[str, str]:
    """Which methods the pool does not allow; no base model and no encoder is loaded to tell.

    Args:
        adapters (Sequence[LoraAdapter]): the pool.
        columns (Sequence[Column]): methods.
        features (PoolFeatures | None): what a catalog knows of the adapters.

    Returns:
        dict[str, str]: everything that a method lacks, by title.
    """
    bank = stack(adapters)
    found = {}
    for column in columns:
        if column.method == OWN:
            continue
        try:
            router = create(column.method, column.hyperparameters)
            check_trained(router)
            check_needs(router, bank, features or PoolFeatures())
        except MethodError as error:
            found[column.title] = str(error)
    return found


def check_tasks(adapters: Sequence[str], tasks: Tasks, columns: Sequence[Column], *, unseen: bool) -> None:
    """Refuse a comparison that has nothing to score, before anything is loaded.

    Args:
        adapters (Sequence[str]): names of the pool.
        tasks (Mapping[str, Sequence[Sample]]): samples by the name of the task's own adapter.
        columns (Sequence[Column]): methods.
        unseen (bool): whether each task is also scored without its own adapter.

    Raises:
        HubRouterError: no task has samples.
        MethodError: a task's own adapter is not in the pool; or without it nothing is left to compare.
    """
    if not any(tasks.values()):
        raise HubRouterError("no samples to score; sync adapters that carry test.jsonl or samples.jsonl")
    orphans = sorted(task for task, samples in tasks.items() if samples and task not in adapters)
    if orphans:
        raise MethodError(f"tasks without an adapter in the pool: {', '.join(orphans)}; pool: {', '.join(adapters)}")
    if unseen and len(adapters) < 2:
        raise MethodError(f"unseen leaves a task's own adapter out, and {adapters[0]!r} is all of the pool")
    if unseen and all(column.method in _NEVER_UNSEEN for column in columns):
        raise MethodError(
            f"unseen leaves a task's own adapter out, which says nothing of {', '.join(_NEVER_UNSEEN)}; name a method "
            "that uses the pool"
        )


def compare(
    model: Any,
    tokenizer: Any,
    adapters: Sequence[LoraAdapter],
    tasks: Tasks,
    columns: Sequence[Column],
    *,
    unseen: bool = False,
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
        columns (Sequence[Column]): methods; ``own`` is ``single`` with each task's own adapter.
        unseen (bool): also score each task over the pool without its own adapter, with every method but ``own`` and
            ``single``.
        features (PoolFeatures | None): what a catalog knows of the adapters, handed to ``compose``; its encoder is
            loaded once for all methods.
        batch_size (int): prompts per batch.
        progress (Progress): one step per prompt and method.

    Returns:
        Comparison: accuracy by task and method.

    Raises:
        HubRouterError: no task has samples.
        MethodError: a task's own adapter is not in the pool, or a method is not allowed by the pool.
    """
    names = [adapter.name for adapter in adapters]
    check_tasks(names, tasks, columns, unseen=unseen)
    scored = {task: list(tasks[task]) for task in names if tasks.get(task)}
    without = [column for column in columns if unseen and column.method not in _NEVER_UNSEEN]
    features = features or PoolFeatures()
    encoder = _encoder(columns, features)
    seen_accuracy: dict[str, dict[str, float]] = {task: {} for task in scored}
    unseen_accuracy: dict[str, dict[str, float]] = {task: {} for task in scored}
    runs = [(seen_accuracy, column, run) for column in columns for run in _seen(column, adapters, scored)]
    runs += [(unseen_accuracy, column, run) for column in without for run in _unseen(column, adapters, scored)]
    total = sum(len(samples) for samples in scored.values()) * (len(columns) + len(without))
    with progress.task("evaluating", total) as advance:
        for accuracy, column, (method, settings, pool, part) in runs:
            routed = compose(model, pool, method, tokenizer=tokenizer, encoder=encoder, features=features, **settings)
            try:
                for task, value in _score(routed, part, batch_size, advance).items():
                    accuracy[task][column.title] = value
            finally:
                routed.detach()
    rows = tuple(TaskRow(task, len(scored[task]), seen_accuracy[task], unseen_accuracy[task]) for task in scored)
    return Comparison(methods=tuple(column.title for column in columns), rows=rows)


# Method, hyperparameters, pool, and the tasks that are scored over it.
_Run = tuple[str, Mapping[str, Any], Sequence[LoraAdapter], Mapping[str, list[Sample]]]


def _seen(column: Column, adapters: Sequence[LoraAdapter], scored: Mapping[str, list[Sample]]) -> Iterator[_Run]:
    """All tasks over the whole pool; the oracle has a pool of one per task."""
    if column.method != OWN:
        yield column.method, column.hyperparameters, adapters, scored
        return
    for own in adapters:
        if own.name in scored:
            yield "single", {"adapter": own.name}, [own], {own.name: scored[own.name]}


def _unseen(column: Column, adapters: Sequence[LoraAdapter], scored: Mapping[str, list[Sample]]) -> Iterator[_Run]:
    """Each task over the pool without its own adapter."""
    for task, samples in scored.items():
        rest = [adapter for adapter in adapters if adapter.name != task]
        yield column.method, column.hyperparameters, rest, {task: samples}


def _encoder(columns: Sequence[Column], features: PoolFeatures) -> Remembering | None:
    """The sentence encoder, where a method asks one."""
    routers = [create(column.method, column.hyperparameters) for column in columns if column.method != OWN]
    if not any(isinstance(router, SequenceRouter) for router in routers):
        return None
    return Remembering(load_encoder(features.encoder))


def _means(columns: Sequence[Mapping[str, float]], methods: Sequence[str]) -> dict[str, float]:
    """Mean by method of the tasks' accuracies, of methods that have some."""
    return {
        method: sum(column[method] for column in columns) / len(columns)
        for method in methods
        if all(method in column for column in columns)
    }


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
