"""Training over catalogued adapters: gates become the next version of a prototype set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from hub_router.errors import TrainingError
from hub_router.hub.adaptertraining import AdapterSummary, train_adapter
from hub_router.hub.composing import base_of_set, checked_pool, load_base, need_synced, pinned, pool_features
from hub_router.hub.prototypes import PrototypeSets, check_name
from hub_router.hub.trainingdata import DataColumns, TrainingData, encoded_examples, read_examples
from hub_router.hub.trainingoptions import Options, sorted_out, with_given
from hub_router.hub.trainingpool import refuse_doubles, samples_of
from hub_router.progress import Progress
from hub_router.settings import Settings
from hub_router.store import selection
from hub_router.store.selection import AdapterRef
from hub_router.store.session import Store

if TYPE_CHECKING:
    from hub_router.lora.adapter import LoraAdapter
    from hub_router.prototypes import Prototypes
    from hub_router.records import AdapterRecord
    from hub_router.routing.base import Router
    from hub_router.training.data import Example
    from hub_router.training.recipe import Recipe
    from hub_router.training.settings import TrainingSettings

__all__ = ["AdapterSummary", "DataColumns", "TrainingData", "TrainingSummary", "train", "train_adapter"]


@dataclass(frozen=True)
class TrainingSummary:
    """What ``train`` made.

    Args:
        name (str): of the prototype set.
        version (int | None): of this run; None where nothing was trained.
        method (str): that was trained.
        adapters (tuple[str, ...]): names in the pool.
        examples (int): that were learned from, or set aside.
        steps (int): of the optimizer.
        loss (float | None): over the last tenth of the steps, nats per answer token.
        validation (float | None): on the examples that were set aside.
        notes (tuple[str, ...]): what to know of the run, a line each.
    """

    name: str
    version: int | None
    method: str
    adapters: tuple[str, ...]
    examples: int
    steps: int
    loss: float | None
    validation: float | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Plan:
    """A run whose every part was checked, as far as that takes no weights of the base model."""

    recipe: Recipe
    settings: TrainingSettings
    members: Mapping[str, AdapterRecord]
    base: str
    router: Router
    pool: Sequence[LoraAdapter]
    features: Any
    hyperparameters: Mapping[str, Any]
    examples: Sequence[Example]
    notes: tuple[str, ...]


def train(
    store: Store,
    home: Settings,
    method: str,
    name: str,
    adapters: Mapping[str, AdapterRef] | Iterable[AdapterRef],
    *,
    base_model: str | None,
    data: TrainingData,
    options: Mapping[str, Any],
    log: str | Path | None,
    device: str | None,
    dry_run: bool,
    restart: bool,
    progress: Progress,
) -> TrainingSummary:
    """See :meth:`hub_router.hub.Hub.train`."""
    from hub_router.composition.build import compose
    from hub_router.training.checkpoint import remove
    from hub_router.training.fit import fit
    from hub_router.training.lock import held

    given = sorted_out(method, options)
    check_name(name)
    # A set's name may be "..", its folder not.
    folder = home.home / "training" / f"{quote(name, safe='')}.run"
    # Before the data are read, which may take minutes.
    with nullcontext() if dry_run else held(folder):
        plan = _planned(store, method, adapters, given, base_model, data, progress)
        if dry_run:
            steps, notes = _steps(plan), _checked(plan, None if restart else folder)
            names = tuple(plan.members)
            return TrainingSummary(name, None, method, names, len(plan.examples), steps, None, None, notes)
        if restart:
            remove(folder)
        model, tokenizer = load_base(plan.base, device)
        routed = compose(model, plan.pool, method, tokenizer=tokenizer, features=plan.features, **plan.hyperparameters)
        result = fit(
            routed,
            plan.examples,
            settings=plan.settings,
            checkpoint=folder,
            keep_checkpoint=True,
            log=log,
            progress=progress,
            **given.recipe,
        )
        version = _save(store, name, replace(result.prototypes, base_model=plan.base), plan.members, folder, model)
    return TrainingSummary(
        name=name,
        version=version,
        method=method,
        adapters=tuple(plan.members),
        examples=len(plan.examples),
        steps=result.steps,
        loss=result.loss,
        validation=result.validation,
        notes=plan.notes,
    )


def _save(
    store: Store,
    name: str,
    prototypes: Prototypes,
    members: Mapping[str, AdapterRecord],
    folder: Path,
    model: Any,
) -> int:
    """Store the gates, once for all processes of a run, and then forget its checkpoint; the set's version."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    from hub_router.training.checkpoint import remove

    ranks = PartialState(cpu=model.device.type == "cpu")
    version: list[Any] = [None]
    if ranks.is_main_process:
        version = [PrototypeSets(store).save(name, prototypes, members)]
        # Only now: a set that could not be stored need not be trained again.
        remove(folder)
    if ranks.num_processes > 1:
        broadcast_object_list(version)
    return version[0]


def _planned(
    store: Store,
    method: str,
    adapters: Mapping[str, AdapterRef] | Iterable[AdapterRef],
    given: Options,
    base_model: str | None,
    data: TrainingData,
    progress: Progress,
) -> _Plan:
    """Check everything but the base model's weights."""
    from hub_router.routing.registry import create
    from hub_router.training.data import needs_labels
    from hub_router.training.registry import create_recipe

    recipe = create_recipe(method, given.recipe)
    settings = with_given(recipe.settings, given.settings)
    create(method, given.method)
    with store.read() as session:
        hyperparameters = pinned(session, given.method)
        router = create(method, hyperparameters)
        members = selection.select(session, adapters)
        refuse_doubles(members)
        features = pool_features(session, members, [router])
        samples = samples_of(session, members)
        trained_on = base_of_set(session, hyperparameters.get("prototypes", ""))
    examples, notes = read_examples(data, samples, members, labelled=needs_labels(recipe), progress=progress)
    having = {example.adapter for example in examples}
    lacking = [each for each in members if each not in having]
    if method == "phatgoose" and lacking:
        raise TrainingError(
            "phatgoose trains each adapter's gate on its own task, and there are no examples of: "
            f"{', '.join(lacking)}; give some, or leave these adapters out"
        )
    base = base_model or selection.common_base(members)
    if trained_on and trained_on != base:
        notes += (f"{hyperparameters['prototypes']} was trained on {trained_on}, and this run is on {base}",)
    pool = checked_pool(members, base, router, features)
    need_synced(pool, members)
    return _Plan(recipe, settings, members, base, router, pool, features, hyperparameters, examples, notes)


def _steps(plan: _Plan) -> int:
    """Steps of all phases."""
    from hub_router.training.data import split
    from hub_router.training.loop import planned_steps

    settings = plan.settings
    learned, _ = split(plan.examples, settings.validation, settings.seed)
    places = {name: place for place, name in enumerate(plan.members)} | {"": -1}
    adapters = [places[each.adapter] for each in learned]
    phases = plan.recipe.phases(tuple(plan.members), sorted(set(adapters)))
    return sum(planned_steps(phase, adapters, settings) for phase in phases)


def _checked(plan: _Plan, folder: Path | None) -> tuple[str, ...]:
    """The rest that a dry run checks: that the data can be tokenized, and a stopped run gone on with; notes."""
    from hub_router.composition.architecture import empty_model
    from hub_router.routing.registry import hyperparameters_of
    from hub_router.training.checkpoint import is_left
    from hub_router.training.data import data_hash

    encoded_examples(plan.base, empty_model(plan.base), plan.examples, tuple(plan.members))
    hashes = {adapter.name: adapter.weights_hash for adapter in plan.pool}
    known = {
        "method": plan.router.name,
        "hyperparameters": hyperparameters_of(plan.router),
        "recipe": repr(plan.recipe),
        "settings": plan.settings.decisive,
        "data": data_hash(plan.examples),
        "adapters": list(hashes.items()),
    }
    left = folder is not None and is_left(folder, known)
    return (*plan.notes, *([f"a run in {folder}, stopped or still going, would go on"] if left else []))
