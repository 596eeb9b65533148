"""Compositions of catalogued adapters: checked and stored, built, scored."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hub_router.errors import HubRouterError, NotInCatalogError, UnsupportedAdapterError
from hub_router.progress import Progress
from hub_router.records import AdapterRecord, CompositionRecord
from hub_router.settings import DEFAULT_ENCODER
from hub_router.store import adapters as adapter_queries
from hub_router.store import compositions as composition_queries
from hub_router.store import selection
from hub_router.store.selection import AdapterRef
from hub_router.store.session import Store

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from hub_router.composition.routed import RoutedModel
    from hub_router.evaluate.comparison import Comparison
    from hub_router.features import PoolFeatures
    from hub_router.lora.adapter import LoraAdapter

_LOG = logging.getLogger(__name__)


def define(
    store: Store,
    name: str,
    adapters: Mapping[str, AdapterRef] | Iterable[AdapterRef],
    method: str,
    base_model: str | None,
    replace: bool,
    hyperparameters: Mapping[str, Any],
) -> CompositionRecord:
    """See :meth:`hub_router.hub.Hub.define`."""
    from hub_router.composition.architecture import empty_model
    from hub_router.composition.assemble import stack
    from hub_router.composition.pool import check_pool, read_pool
    from hub_router.composition.tasks import need_tasks
    from hub_router.routing.registry import create

    if not name.strip() or name != name.strip():
        raise HubRouterError(f"composition name {name!r} is empty or padded, expected a word such as 'reviews'")
    router = create(method, hyperparameters)
    with store.read() as session:
        members = selection.select(session, adapters)
        features = _features(session, members)
    need_tasks(router, list(members), features=features, samples={}, encoder=features.encoder, tokenizer=True)
    base = base_model or selection.common_base(members)
    pool, unreadable = read_pool({label: record.path for label, record in members.items()})
    plan = check_pool(empty_model(base), base, pool, unreadable, router.members([adapter.name for adapter in pool]))
    for note in plan.notes:
        _LOG.warning("%s", note)
    router.check(stack(pool))
    with store.write() as session:
        composition_queries.save(
            session,
            name,
            base_model=base,
            method=method,
            hyperparameters=hyperparameters,
            members=[(label, record.id, record.weights_hash) for label, record in members.items()],
            replace=replace,
        )
        return composition_queries.load(session, name)


def load(store: Store, name: str, device: str | None) -> RoutedModel:
    """See :meth:`hub_router.hub.Hub.load`."""
    with store.read() as session:
        composition = selection.usable(session, name)
        features = _features(session, {member.name: member.adapter for member in composition.members})
    from hub_router.composition.build import compose

    pool = _read(composition)
    model, tokenizer = _base(composition.base_model, device)
    return compose(
        model, pool, composition.method, tokenizer=tokenizer, features=features, **composition.hyperparameters
    )


def evaluate(
    store: Store,
    name: str,
    methods: Sequence[str] | None,
    samples: int | None,
    device: str | None,
    progress: Progress,
) -> Comparison:
    """See :meth:`hub_router.hub.Hub.evaluate`."""
    from hub_router.evaluate.comparison import OWN, compare
    from hub_router.routing.registry import create

    with store.read() as session:
        composition = selection.usable(session, name)
        features = _features(session, {member.name: member.adapter for member in composition.members})
        tasks = {
            member.name: adapter_queries.samples(session, member.adapter.id, split="test")[:samples]
            for member in composition.members
        }
    chosen = list(dict.fromkeys(methods or ("base", OWN, "uniform", composition.method)))
    settings = {
        method: (method, composition.hyperparameters if method == composition.method else {}) for method in chosen
    }
    for method, hyperparameters in settings.values():
        if method != OWN:
            create(method, hyperparameters)
    pool = _read(composition)
    model, tokenizer = _base(composition.base_model, device)
    return compare(model, tokenizer, pool, tasks, settings, features=features, progress=progress)


def _features(session: Session, members: Mapping[str, AdapterRecord]) -> PoolFeatures:
    """What the catalog knows of a pool, by the encoder that it is indexed with."""
    from hub_router.search.index import indexed_encoder

    return selection.features(session, members, indexed_encoder(session) or DEFAULT_ENCODER)


def _read(composition: CompositionRecord) -> Sequence[LoraAdapter]:
    """The members' weights, after a check that the files still hold what was composed."""
    from hub_router.composition.pool import read_pool

    pool, unreadable = read_pool({member.name: member.adapter.path for member in composition.members})
    if unreadable:
        raise UnsupportedAdapterError("\n".join(unreadable))
    changed = [
        f"  - {member.name}: {member.adapter.path}"
        for member, adapter in zip(composition.members, pool, strict=True)
        if adapter.weights_hash != member.weights_hash
    ]
    if changed:
        lines = "\n".join(changed)
        raise NotInCatalogError(
            f"adapter files changed since composition {composition.name!r} was stored:\n{lines}\n"
            f"run hub-router sync on them, then: hub-router compose {composition.name} --replace ..."
        )
    return pool


def _base(reference: str, device: str | None) -> tuple[Any, Any]:
    """Base model and tokenizer by Hub id or folder."""
    import torch

    from hub_router.composition.base_model import load_base

    return load_base(reference, device or ("cuda" if torch.cuda.is_available() else "cpu"))
