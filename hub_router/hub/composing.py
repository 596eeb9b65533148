"""Compositions of catalogued adapters: checked and stored, built, scored."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_router.errors import (
    HubRouterError,
    MethodError,
    NotInCatalogError,
    StaleFeaturesError,
    UnsupportedAdapterError,
)
from hub_router.hub.prototypes import parse_name
from hub_router.progress import Progress
from hub_router.records import AdapterRecord, CompositionRecord
from hub_router.settings import DEFAULT_ENCODER
from hub_router.store import adapters as adapter_queries
from hub_router.store import compositions as composition_queries
from hub_router.store import selection
from hub_router.store.prototypes import PrototypeSetRecord, find_prototypes, load_prototypes
from hub_router.store.selection import AdapterRef
from hub_router.store.session import Store

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from hub_router.composition.routed import RoutedModel
    from hub_router.evaluate.columns import Column
    from hub_router.evaluate.comparison import Comparison
    from hub_router.features import PoolFeatures, Vectors
    from hub_router.lora.adapter import LoraAdapter
    from hub_router.routing.base import Router

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
    from hub_router.composition.needs import check_trained
    from hub_router.routing.registry import create

    if not name.strip() or name != name.strip():
        raise HubRouterError(f"composition name {name!r} is empty or padded, expected a word such as 'reviews'")
    router = create(method, hyperparameters)
    check_trained(router)
    with store.read() as session:
        hyperparameters = pinned(session, hyperparameters)
        router = create(method, hyperparameters)
        members = selection.select(session, adapters)
        features = pool_features(session, members, [router])
        trained_on = base_of_set(session, str(hyperparameters.get("prototypes", "")))
    base = base_model or selection.common_base(members)
    checked_pool(members, base, router, features)
    if trained_on and trained_on != base:
        chosen = hyperparameters["prototypes"]
        _LOG.warning("prototype set %s was trained on %s, and this pool is on %s", chosen, trained_on, base)
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


def base_of_set(session: Session, name: str) -> str:
    """The base model that a prototype set was trained on.

    Args:
        session (Session): a reading session.
        name (str): of a set of the catalog, or of a file.

    Returns:
        str: as the set has it; empty without a set.

    Raises:
        NotInCatalogError: there is no such set or version.
    """
    from hub_router.composition.trained import is_set_file
    from hub_router.prototypes import read_prototypes

    if not name:
        return ""
    if is_set_file(name):
        path = Path(name).expanduser()
        # A file that is missing is refused where its vectors are needed.
        return read_prototypes(path).base_model if path.is_file() else ""
    return find_prototypes(session, *parse_name(name))[0].base_model


def need_synced(pool: Sequence[LoraAdapter], members: Mapping[str, AdapterRecord]) -> None:
    """Refuse adapters whose files are not those that the catalog knows.

    Args:
        pool (Sequence[LoraAdapter]): as read.
        members (Mapping[str, AdapterRecord]): by name in the pool.

    Raises:
        StaleFeaturesError: names all of them.
    """
    changed = [each.name for each in pool if each.weights_hash != members[each.name].weights_hash]
    if changed:
        refs = " ".join(members[name].ref for name in changed)
        raise StaleFeaturesError(
            f"weights changed since the adapters were synced: {', '.join(changed)}; run: hub-router sync {refs}"
        )


def checked_pool(
    members: Mapping[str, AdapterRecord], base: str, router: Router, features: PoolFeatures
) -> Sequence[LoraAdapter]:
    """Read a pool and hold it against its base model and its method; no weights of the base are loaded.

    Args:
        members (Mapping[str, AdapterRecord]): by name in the pool.
        base (str): Hub id or folder of the base model.
        router (Router): the method.
        features (PoolFeatures): what the catalog knows of the pool.

    Returns:
        Sequence[LoraAdapter]: in pool order.

    Raises:
        HubRouterError: lists what does not fit, or what the method lacks.
    """
    from hub_router.composition.architecture import empty_model
    from hub_router.composition.assemble import prepare, stack
    from hub_router.composition.needs import check_needs
    from hub_router.composition.outer import check_outer, widths_of
    from hub_router.composition.pool import check_pool, read_pool
    from hub_router.composition.trained import set_of, with_set_file

    pool, unreadable = read_pool({label: record.path for label, record in members.items()})
    model = empty_model(base)
    plan = check_pool(model, base, pool, unreadable, router.members([adapter.name for adapter in pool]))
    for note in plan.notes:
        _LOG.warning("%s", note)
    bank = stack(pool)
    check_needs(router, bank, features)
    check_outer(model, router, bank)
    if set_of(router):
        # Only here does it show whether the set has vectors for all of these adapters.
        widths = widths_of(model, router, bank.modules)
        prepare(router, bank, dataclasses.replace(with_set_file(features, router, pool), widths=widths))
    return pool


def load(store: Store, name: str, device: str | None) -> RoutedModel:
    """See :meth:`hub_router.hub.Hub.load`."""
    from hub_router.routing.registry import create

    with store.read() as session:
        composition = selection.usable(session, name)
        router = create(composition.method, composition.hyperparameters)
        features = pool_features(session, {member.name: member.adapter for member in composition.members}, [router])
    from hub_router.composition.build import compose

    pool = _read(composition)
    model, tokenizer = load_base(composition.base_model, device)
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
    from hub_router.routing.registry import create

    with store.read() as session:
        composition = selection.usable(session, name)
        members = {member.name: member.adapter for member in composition.members}
        columns = read_columns(
            methods or ("base", OWN, "uniform", composition.method), {composition.method: composition.hyperparameters}
        )
        routers = [create(column.method, column.hyperparameters) for column in columns if column.method != OWN]
        features = pool_features(session, members, routers)
        scored = {
            member: adapter_queries.samples(session, members[member].id, split="test")[:samples]
            for member in _chosen(composition, tasks)
        }
    check_tasks(list(members), scored, columns, unseen=unseen)
    pool = _read(composition)
    refused = refusals(pool, columns, features)
    asked = [refused[column.title] for column in columns if column.asked and column.title in refused]
    if asked:
        raise MethodError("\n".join(asked))
    model, tokenizer = load_base(composition.base_model, device)
    able = [column for column in columns if column.title not in refused]
    table = compare(model, tokenizer, pool, scored, able, unseen=unseen, features=features, progress=progress)
    notes = _unseen_notes(able) if unseen else ()
    return dataclasses.replace(table, methods=tuple(column.title for column in columns), refused=refused, notes=notes)


def _unseen_notes(columns: Sequence[Column]) -> tuple[str, ...]:
    """Of columns whose gates were trained beforehand, and so on the tasks that are left out of the pool, too."""
    return tuple(
        f"{column.title}: the gates of {column.hyperparameters['prototypes']} were trained on the tasks of all of "
        "their adapters, that of the one left out among them"
        for column in columns
        if column.hyperparameters.get("prototypes")
    )


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


def pool_features(session: Session, members: Mapping[str, AdapterRecord], routers: Iterable[Router]) -> PoolFeatures:
    """What the catalog knows of a pool, by the encoder that it is indexed with, and the prototype sets that are named.

    Args:
        session (Session): a reading session.
        members (Mapping[str, AdapterRecord]): by name in the pool.
        routers (Iterable[Router]): methods, which may name sets; a name that is a file's is left to the engine.

    Returns:
        PoolFeatures: by name in the pool.

    Raises:
        NotInCatalogError: there is no such set or version.
        StaleFeaturesError: weights of a set's adapters changed since; names all of them.
    """
    from hub_router.composition.trained import is_set_file, need_kind, set_of
    from hub_router.search.index import indexed_encoder

    known = selection.features(session, members, indexed_encoder(session) or DEFAULT_ENCODER)
    sets = {}
    for router in routers:
        name = set_of(router) or ""
        if name and not is_set_file(name):
            found = load_prototypes(session, *parse_name(name), stale=True)
            need_kind(router, name, found.summary.method, found.summary.hyperparameters)
            sets[name] = _vectors(found, members)
    return dataclasses.replace(known, prototypes=sets)


def _vectors(found: PrototypeSetRecord, members: Mapping[str, AdapterRecord]) -> Vectors:
    """A set's vectors of a pool's members, whose weights must be those that they were made for."""
    vectors = {record.id: own for record, own in found.members}
    refs = {record.ref for record, _ in found.members}
    changed = [
        label
        for label, record in members.items()
        if (record.ref in refs if record.id not in vectors else found.made_for[record.id] != record.weights_hash)
    ]
    if changed:
        raise StaleFeaturesError(
            f"prototype set {found.summary.ref} was made for other weights of: {', '.join(changed)}; train it anew "
            "with: hub-router train, or compose the revisions that it was made for"
        )
    return {label: vectors[record.id] for label, record in members.items() if record.id in vectors}


def pinned(session: Session, hyperparameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name the version of a prototype set, so that a later one does not change what was composed.

    Args:
        session (Session): a reading session.
        hyperparameters (Mapping[str, Any]): of a method.

    Returns:
        Mapping[str, Any]: the same where no set is named; a file's path is made absolute.

    Raises:
        NotInCatalogError: there is no such set or version.
    """
    from hub_router.composition.trained import is_set_file

    name = hyperparameters.get("prototypes")
    if not name:
        return hyperparameters
    if is_set_file(name):
        return {**hyperparameters, "prototypes": str(Path(name).expanduser().absolute())}
    summary, _ = find_prototypes(session, *parse_name(name))
    return {**hyperparameters, "prototypes": summary.ref}


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


def load_base(reference: str, device: str | None) -> tuple[Any, Any]:
    """Base model and tokenizer.

    Args:
        reference (str): Hub id or folder.
        device (str | None): torch device; None takes CUDA where there is one.

    Returns:
        tuple[Any, Any]: model and tokenizer.
    """
    import torch

    from hub_router.composition import base_model

    return base_model.load_base(reference, device or ("cuda" if torch.cuda.is_available() else "cpu"))
