"""Compositions of catalogued adapters: checked and stored, built, scored."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hub_router.errors import HubRouterError, MethodError, NotInCatalogError, UnsupportedAdapterError
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
    from hub_router.composition.needs import check_needs
    from hub_router.composition.pool import check_pool, read_pool
    from hub_router.routing.registry import create

    if not name.strip() or name != name.strip():
        raise HubRouterError(f"composition name {name!r} is empty or padded, expected a word such as 'reviews'")
    router = create(method, hyperparameters)
    with store.read() as session:
        members = selection.select(session, adapters)
        features = _features(session, members)
    base = base_model or selection.common_base(members)
    pool, unreadable = read_pool({label: record.path for label, record in members.items()})
    plan = check_pool(empty_model(base), base, pool, unreadable, router.members([adapter.name for adapter in pool]))
    for note in plan.notes:
        _LOG.warning("%s", note)
    check_needs(router, stack(pool), features)
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
    tasks: Sequence[str] | None,
    samples: int | None,
    unseen: bool,
    device: str | None,
    progress: Progress,
) -> Comparison:
    """See :meth:`hub_router.hub.Hub.evaluate`."""
    from hub_router.evaluate.columns import OWN, read_columns
    from hub_router.evaluate.comparison import check_tasks, compare, refusals

    with store.read() as session:
        composition = selection.usable(session, name)
        members = {member.name: member.adapter for member in composition.members}
        features = _features(session, members)
        scored = {
            member: adapter_queries.samples(session, members[member].id, split="test")[:samples]
            for member in _chosen(composition, tasks)
        }
    kept = {composition.method: composition.hyperparameters}
    columns = read_columns(methods or ("base", OWN, "uniform", composition.method), kept)
    check_tasks(list(members), scored, columns, unseen=unseen)
    pool = _read(composition)
    refused = refusals(pool, columns, features)
    asked = [refused[column.title] for column in columns if column.asked and column.title in refused]
    if asked:
        raise MethodError("\n".join(asked))
    model, tokenizer = _base(composition.base_model, device)
    able = [column for column in columns if column.title not in refused]
    table = compare(model, tokenizer, pool, scored, able, unseen=unseen, features=features, progress=progress)
    return dataclasses.replace(table, methods=tuple(column.title for column in columns), refused=refused)


def _chosen(composition: CompositionRecord, tasks: Sequence[str] | None) -> Sequence[str]:
    """The members whose tasks are scored, in pool order."""
    members = [member.name for member in composition.members]
    strangers = [task for task in tasks or () if task not in members]
    if strangers:
        raise NotInCatalogError(
            f"composition {composition.name!r} has no members {', '.join(map(repr, strangers))}; its members: "
            f"{', '.join(members)}"
        )
    return [member for member in members if tasks is None or member in tasks]


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
