"""Prototype sets: named, versioned vectors per adapter and module, each tied to the weights that it was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from hub_router.errors import NotInCatalogError, StaleFeaturesError
from hub_router.records import AdapterRecord
from hub_router.store.lookup import closest
from hub_router.store.rows import records
from hub_router.store.tables import PrototypeSet, PrototypeVector
from hub_router.store.vectors import from_bytes, to_bytes


@dataclass(frozen=True)
class PrototypeSetSummary:
    """A version of a prototype set, without its vectors.

    Args:
        name (str): the set's name.
        version (int): counts from 1 within a name.
        method (str): what made the vectors, e.g. ``maple``.
        base_model (str): Hub id or folder of the base model.
        parent (tuple[str, int] | None): name and version of the set that this one was refined from.
        hyperparameters (Mapping[str, Any]): settings of the refinement.
        metrics (Mapping[str, Any]): what was measured of it.
        adapters (int): number of adapters.
        vectors (int): number of vectors.
    """

    name: str
    version: int
    method: str
    base_model: str
    parent: tuple[str, int] | None
    hyperparameters: Mapping[str, Any]
    metrics: Mapping[str, Any]
    adapters: int
    vectors: int


@dataclass(frozen=True)
class PrototypeSetRecord:
    """A prototype set with its vectors.

    Args:
        summary (PrototypeSetSummary): name, version and origin.
        members (tuple[tuple[AdapterRecord, Mapping[str, np.ndarray]], ...]): each adapter with its vectors, float32
            ``(D_in,)``, by module; ordered by catalog id.
    """

    summary: PrototypeSetSummary
    members: tuple[tuple[AdapterRecord, Mapping[str, np.ndarray]], ...] = field(repr=False)


def save_prototypes(
    session: Session,
    name: str,
    *,
    method: str,
    base_model: str,
    members: Sequence[tuple[AdapterRecord, Mapping[str, np.ndarray]]],
    parent: tuple[str, int] | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> int:
    """Stores vectors as the next version of a set; earlier versions stay.

    Args:
        session (Session): a writing session.
        name (str): the set's name.
        method (str): what made the vectors.
        base_model (str): Hub id or folder of the base model.
        members (Sequence[tuple[AdapterRecord, Mapping[str, np.ndarray]]]): each adapter, as it was when its vectors
            were made, with the vectors ``(D_in,)`` by module.
        parent (tuple[str, int] | None): name and version of the set that this one was refined from.
        hyperparameters (Mapping[str, Any] | None): settings of the refinement, JSON values.
        metrics (Mapping[str, Any] | None): what was measured of it, JSON values.

    Returns:
        int: the version.

    Raises:
        NotInCatalogError: the parent does not exist.
    """
    parent_id = None if parent is None else _find(session, *parent).id
    newest = session.scalar(select(func.max(PrototypeSet.version)).where(PrototypeSet.name == name))
    stored = PrototypeSet(
        name=name,
        version=(newest or 0) + 1,
        method=method,
        parent_id=parent_id,
        base_model=base_model,
        hyperparameters=dict(hyperparameters or {}),
        metrics=dict(metrics or {}),
    )
    session.add(stored)
    session.flush()
    rows = [
        {
            "set_id": stored.id,
            "adapter_id": record.id,
            "module": module,
            "vector": to_bytes(vector),
            "weights_hash": record.weights_hash,
        }
        for record, vectors in members
        for module, vector in vectors.items()
    ]
    if rows:
        session.execute(insert(PrototypeVector), rows)
    return stored.version


def load_prototypes(session: Session, name: str, version: int | None = None) -> PrototypeSetRecord:
    """A prototype set whose adapters still have the weights that it was made for.

    Args:
        session (Session): a session of the store.
        name (str): the set's name.
        version (int | None): default the newest.

    Returns:
        PrototypeSetRecord: with its vectors.

    Raises:
        NotInCatalogError: there is no such set or version; names what there is.
        StaleFeaturesError: weights of adapters changed since; names all of them.
    """
    stored = _find(session, name, version)
    statement = select(
        PrototypeVector.adapter_id, PrototypeVector.module, PrototypeVector.vector, PrototypeVector.weights_hash
    ).where(PrototypeVector.set_id == stored.id)
    vectors: dict[int, dict[str, np.ndarray]] = {}
    made_for: dict[int, str] = {}
    order = (PrototypeVector.adapter_id, PrototypeVector.module)
    for adapter_id, module, vector, weights_hash in session.execute(statement.order_by(*order)):
        vectors.setdefault(adapter_id, {})[module] = from_bytes(vector)
        made_for[adapter_id] = weights_hash
    adapters = records(session, list(vectors))
    changed = [record.ref for record in adapters.values() if record.weights_hash != made_for[record.id]]
    if changed:
        raise StaleFeaturesError(
            f"prototype set {name!r} version {stored.version} was made for other weights of: {', '.join(changed)}; "
            "train it anew with: hub-router train, or sync the revisions that it was made for"
        )
    members = tuple((adapters[adapter_id], vectors[adapter_id]) for adapter_id in vectors)
    return PrototypeSetRecord(_summaries(session, [stored])[0], members)


def list_prototypes(session: Session) -> list[PrototypeSetSummary]:
    """Every version of every prototype set, by name and version."""
    order = select(PrototypeSet).order_by(PrototypeSet.name, PrototypeSet.version)
    return _summaries(session, session.scalars(order).all())


def _find(session: Session, name: str, version: int | None = None) -> PrototypeSet:
    statement = select(PrototypeSet).where(PrototypeSet.name == name).order_by(PrototypeSet.version.desc())
    versions = session.scalars(statement).all()
    for stored in versions:
        if version is None or stored.version == version:
            return stored
    if versions:
        listed = ", ".join(str(stored.version) for stored in reversed(versions))
        raise NotInCatalogError(f"prototype set {name!r} has no version {version}; it has: {listed}")
    names = session.scalars(select(PrototypeSet.name).distinct()).all()
    close = closest(name, names)
    hint = f"; closest: {', '.join(close)}" if close else ""
    raise NotInCatalogError(f"there is no prototype set {name!r} among {len(names)}{hint}")


def _summaries(session: Session, stored: Sequence[PrototypeSet]) -> list[PrototypeSetSummary]:
    ids = {entry.id for entry in stored}
    counted = select(PrototypeVector.set_id, func.count(PrototypeVector.adapter_id.distinct()), func.count()).group_by(
        PrototypeVector.set_id
    )
    counts = {set_id: (adapters, vectors) for set_id, adapters, vectors in session.execute(counted) if set_id in ids}
    named = {
        set_id: (name, version)
        for set_id, name, version in session.execute(select(PrototypeSet.id, PrototypeSet.name, PrototypeSet.version))
    }
    return [
        PrototypeSetSummary(
            name=entry.name,
            version=entry.version,
            method=entry.method,
            base_model=entry.base_model,
            parent=None if entry.parent_id is None else named[entry.parent_id],
            hyperparameters=entry.hyperparameters,
            metrics=entry.metrics,
            adapters=counts.get(entry.id, (0, 0))[0],
            vectors=counts.get(entry.id, (0, 0))[1],
        )
        for entry in stored
    ]
