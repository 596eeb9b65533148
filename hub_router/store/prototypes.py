"""Prototype sets: named, versioned vectors per adapter and module, each tied to the weights that it was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import and_, func, insert, select
from sqlalchemy.orm import Session, aliased

from hub_router.errors import NotInCatalogError, StaleFeaturesError
from hub_router.records import AdapterRecord
from hub_router.store.known import CHUNK
from hub_router.store.lookup import closest, full_name
from hub_router.store.rows import adapter_rows, chunks, fetch, records
from hub_router.store.tables import Adapter, PrototypeSet, PrototypeVector
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
        parent_method (str): the method, such as ``arrow``, that it was refined from where no set is its parent.
        data_hash (str): sha256 of the training data; empty where there was none.
        seed (int | None): of the training.
        stale (tuple[str, ...]): references of the adapters whose weights are not those that it was made for.
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
    parent_method: str = ""
    data_hash: str = ""
    seed: int | None = None
    stale: tuple[str, ...] = ()

    @property
    def ref(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def origin(self) -> str:
        """What it was refined from: a set as ``name@version``, a method, or empty."""
        return self.parent_method if self.parent is None else f"{self.parent[0]}@{self.parent[1]}"


@dataclass(frozen=True)
class PrototypeSetMember:
    """An adapter of a prototype set.

    Args:
        adapter (AdapterRecord): as the catalog knows it now.
        weights_hash (str): identity of the weights that the vectors were made for.
        vectors (int): number of vectors.
        stale (bool): the adapter's weights are others by now, or its name stands for a revision with others.
    """

    adapter: AdapterRecord
    weights_hash: str
    vectors: int
    stale: bool


@dataclass(frozen=True)
class PrototypeSetRecord:
    """A prototype set with its vectors.

    Args:
        summary (PrototypeSetSummary): name, version and origin.
        members (tuple[tuple[AdapterRecord, Mapping[str, np.ndarray]], ...]): each adapter with its vectors, float32
            ``(D_in,)``, by module; ordered by catalog id.
        made_for (Mapping[int, str]): identity of the weights that the vectors were made for, by catalog id.
    """

    summary: PrototypeSetSummary
    members: tuple[tuple[AdapterRecord, Mapping[str, np.ndarray]], ...] = field(repr=False)
    made_for: Mapping[int, str] = field(default_factory=dict, repr=False)


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
    parent_method: str = "",
    data_hash: str = "",
    seed: int | None = None,
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
        parent_method (str): the method that this one was refined from where no set is its parent.
        data_hash (str): sha256 of the training data.
        seed (int | None): of the training.

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
        parent_method=parent_method,
        data_hash=data_hash,
        seed=seed,
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


def load_prototypes(
    session: Session, name: str, version: int | None = None, *, stale: bool = False
) -> PrototypeSetRecord:
    """A prototype set whose adapters still have the weights that it was made for.

    Args:
        session (Session): a session of the store.
        name (str): the set's name.
        version (int | None): default the newest.
        stale (bool): take it also where weights changed, to look at; its summary names the adapters.

    Returns:
        PrototypeSetRecord: with its vectors.

    Raises:
        NotInCatalogError: there is no such set or version; names what there is.
        StaleFeaturesError: weights of adapters changed since; names all of them.
    """
    stored = _find(session, name, version)
    (summary,) = _summaries(session, [stored])
    if summary.stale and not stale:
        raise StaleFeaturesError(
            f"prototype set {name!r} version {stored.version} was made for other weights of: "
            f"{', '.join(summary.stale)}; train it anew with: hub-router train, or sync the revisions that it was made "
            "for"
        )
    statement = select(PrototypeVector.adapter_id, PrototypeVector.module, PrototypeVector.vector)
    statement = statement.where(PrototypeVector.set_id == stored.id)
    vectors: dict[int, dict[str, np.ndarray]] = {}
    for adapter_id, module, vector in session.execute(
        statement.order_by(PrototypeVector.adapter_id, PrototypeVector.module)
    ):
        vectors.setdefault(adapter_id, {})[module] = from_bytes(vector)
    adapters = records(session, list(vectors))
    members = tuple((adapters[adapter_id], vectors[adapter_id]) for adapter_id in vectors)
    made_for = {row.adapter_id: row.weights_hash for row in _members(session, [stored.id]).get(stored.id, ())}
    return PrototypeSetRecord(summary, members, made_for)


def find_prototypes(
    session: Session, name: str, version: int | None = None
) -> tuple[PrototypeSetSummary, tuple[PrototypeSetMember, ...]]:
    """What is known of a prototype set, without reading its vectors; it may be stale.

    Args:
        session (Session): a session of the store.
        name (str): the set's name.
        version (int | None): default the newest.

    Returns:
        tuple[PrototypeSetSummary, tuple[PrototypeSetMember, ...]]: the set, and its adapters by catalog id.

    Raises:
        NotInCatalogError: there is no such set or version; names what there is.
    """
    stored = _find(session, name, version)
    rows = _members(session, [stored.id]).get(stored.id, [])
    adapters = records(session, [row.adapter_id for row in rows])
    members = (
        PrototypeSetMember(adapters[row.adapter_id], row.weights_hash, row.vectors, row.stale)
        for row in rows
        if row.adapter_id in adapters
    )
    return _summaries(session, [stored])[0], tuple(members)


def list_prototypes(session: Session) -> list[PrototypeSetSummary]:
    """Every version of every prototype set, by name and version."""
    order = select(PrototypeSet).order_by(PrototypeSet.name, PrototypeSet.version)
    return _summaries(session, session.scalars(order).all())


def served_by_weights(session: Session, hashes: Sequence[str]) -> dict[str, list[AdapterRecord]]:
    """Adapters in their newest revision by the identity of their weights.

    Args:
        session (Session): a session of the store.
        hashes (Sequence[str]): weights hashes.

    Returns:
        dict[str, list[AdapterRecord]]: ready ones first, then by catalog id; hashes that no adapter has are left out.
    """
    found: dict[str, list[AdapterRecord]] = {}
    wanted = sorted(set(hashes))
    for start in range(0, len(wanted), CHUNK):
        alike = Adapter.weights_hash.in_(wanted[start : start + CHUNK])
        statement = adapter_rows().where(Adapter.current.is_(True), alike)
        for record in fetch(session, statement.order_by(Adapter.status != "ready", Adapter.id)):
            found.setdefault(record.weights_hash, []).append(record)
    return found


def served_by_name(session: Session, refs: Sequence[str]) -> dict[str, AdapterRecord]:
    """Adapters in their newest revision by their full name.

    Args:
        session (Session): a session of the store.
        refs (Sequence[str]): ``repo_id`` or ``repo_id/subfolder``.

    Returns:
        dict[str, AdapterRecord]: names that no adapter has are left out.
    """
    found: dict[str, AdapterRecord] = {}
    wanted = sorted(set(refs))
    for start in range(0, len(wanted), CHUNK):
        named = full_name().in_(wanted[start : start + CHUNK])
        statement = adapter_rows().where(Adapter.current.is_(True), named)
        found |= {record.ref: record for record in fetch(session, statement)}
    return found


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
    raise NotInCatalogError(
        f"there is no prototype set {name!r} among {len(names)}{hint}; see: hub-router prototypes list"
    )


class _Row(NamedTuple):
    adapter_id: int
    weights_hash: str
    vectors: int
    stale: bool


def _members(session: Session, set_ids: Sequence[int]) -> dict[int, list[_Row]]:
    """The adapters of sets, by catalog id, without reading vectors."""
    # Only the first module is looked up: a row's hash lies behind its vector, and all rows of an adapter have the same.
    first = select(
        PrototypeVector.set_id,
        PrototypeVector.adapter_id,
        func.min(PrototypeVector.module).label("module"),
        func.count().label("vectors"),
    ).group_by(PrototypeVector.set_id, PrototypeVector.adapter_id)
    found: dict[int, list[_Row]] = {}
    for chunk in chunks(sorted(set_ids)):
        each = first.where(PrototypeVector.set_id.in_(chunk)).subquery()
        own, now = aliased(Adapter), aliased(Adapter)
        keys = (PrototypeVector.set_id, PrototypeVector.adapter_id, PrototypeVector.module)
        statement = (
            select(
                each.c.set_id,
                each.c.adapter_id,
                each.c.vectors,
                PrototypeVector.weights_hash,
                own.weights_hash,
                now.weights_hash,
            )
            .join(PrototypeVector, and_(*(key == each.c[key.key] for key in keys)))
            .join(own, own.id == each.c.adapter_id)
            # A new revision with other weights has a row of its own, and the name then stands for that one.
            .outerjoin(now, and_(now.repo_pk == own.repo_pk, now.subfolder == own.subfolder, now.current.is_(True)))
            .order_by(each.c.set_id, each.c.adapter_id)
        )
        for set_id, adapter_id, vectors, made_for, own_hash, hash_now in session.execute(statement):
            stale = own_hash != made_for or hash_now not in (None, made_for)
            found.setdefault(set_id, []).append(_Row(adapter_id, made_for, vectors, stale))
    return found


def _summaries(session: Session, stored: Sequence[PrototypeSet]) -> list[PrototypeSetSummary]:
    members = _members(session, [entry.id for entry in stored])
    changed = {row.adapter_id for rows in members.values() for row in rows if row.stale}
    refs = {adapter_id: record.ref for adapter_id, record in records(session, sorted(changed)).items()}
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
            adapters=len(members.get(entry.id, ())),
            vectors=sum(row.vectors for row in members.get(entry.id, ())),
            parent_method=entry.parent_method,
            data_hash=entry.data_hash,
            seed=entry.seed,
            stale=tuple(refs[row.adapter_id] for row in members.get(entry.id, ()) if row.stale),
        )
        for entry in stored
    ]
