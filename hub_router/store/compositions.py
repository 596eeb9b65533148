"""Compositions: routed models' recipes under names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import delete as delete_rows
from sqlalchemy import select
from sqlalchemy.orm import Session, selectinload

from hub_router.errors import MethodError, NameTakenError, NotInCatalogError
from hub_router.records import CompositionMemberRecord, CompositionRecord
from hub_router.store.lookup import closest
from hub_router.store.rows import records
from hub_router.store.tables import Composition, CompositionMember, utcnow


def save(
    session: Session,
    name: str,
    *,
    base_model: str,
    method: str,
    hyperparameters: Mapping[str, Any],
    members: Sequence[tuple[str, int, str]],
    replace: bool = False,
) -> None:
    """Stores a composition.

    Args:
        session (Session): a writing session.
        name (str): unique name.
        base_model (str): Hub id or folder of the base model.
        method (str): routing method.
        hyperparameters (Mapping[str, Any]): the method's settings, JSON values.
        members (Sequence[tuple[str, int, str]]): the user's name, catalog id and weights hash of each adapter, in the
            order of axis E.
        replace (bool): overwrite the composition of this name.

    Raises:
        NameTakenError: there is one of this name, and ``replace`` is not set.
        NotInCatalogError: catalog ids that do not exist; lists all of them.
        MethodError: a name twice among the members, or a setting that JSON cannot hold; lists all of them.
    """
    _check(session, name, hyperparameters, members)
    stored = session.scalars(select(Composition).where(Composition.name == name)).one_or_none()
    if stored is not None and not replace:
        raise NameTakenError(
            f"a composition named {name!r} exists (method {stored.method}, base {stored.base_model}); choose another "
            "name, or overwrite it with --replace (replace=True)"
        )
    if stored is None:
        stored = Composition(name=name)
        session.add(stored)
    stored.base_model, stored.method, stored.hyperparameters = base_model, method, dict(hyperparameters)
    # A change of members alone would not touch the row.
    stored.updated_at = utcnow()
    stored.members.clear()
    # The old members' rows must be gone before new ones take their positions.
    session.flush()
    stored.members.extend(
        CompositionMember(position=position, adapter_id=adapter_id, name=label, weights_hash=weights_hash)
        for position, (label, adapter_id, weights_hash) in enumerate(members)
    )
    session.flush()


def load(session: Session, name: str) -> CompositionRecord:
    """A composition by name.

    Args:
        session (Session): a session of the store.
        name (str): its name.

    Returns:
        CompositionRecord: with its adapters as the catalog knows them now; nothing says that they are still served.

    Raises:
        NotInCatalogError: there is none of that name; names the closest.
    """
    found = _load(session, name)
    if not found:
        raise NotInCatalogError(_absent(session, name))
    return found[0]


def list_all(session: Session) -> list[CompositionRecord]:
    """Every composition, by name."""
    return _load(session)


def delete(session: Session, name: str) -> None:
    """Forgets a composition; its adapters stay.

    Args:
        session (Session): a writing session.
        name (str): its name.

    Raises:
        NotInCatalogError: there is none of that name; names the closest.
    """
    stored = session.scalars(select(Composition.id).where(Composition.name == name)).one_or_none()
    if stored is None:
        raise NotInCatalogError(_absent(session, name))
    session.execute(delete_rows(Composition).where(Composition.id == stored))


def _check(
    session: Session, name: str, hyperparameters: Mapping[str, Any], members: Sequence[tuple[str, int, str]]
) -> None:
    labels = [label for label, _, _ in members]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise MethodError(f"composition {name!r} names {', '.join(map(repr, twice))} twice; name each adapter once")
    unwritable = [f"{key}={value!r}" for key, value in hyperparameters.items() if not _is_json(value)]
    if unwritable:
        raise MethodError(
            f"composition {name!r}: settings must be finite numbers, text, booleans or lists, "
            f"got {', '.join(unwritable)}"
        )
    known = records(session, [adapter_id for _, adapter_id, _ in members])
    unknown = [f"{label} (id {adapter_id})" for label, adapter_id, _ in members if adapter_id not in known]
    if unknown:
        raise NotInCatalogError(
            f"composition {name!r} has adapters that are not in the catalog: {', '.join(unknown)}; see: hub-router list"
        )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _load(session: Session, name: str | None = None) -> list[CompositionRecord]:
    statement = select(Composition).options(selectinload(Composition.members)).order_by(Composition.name)
    if name is not None:
        statement = statement.where(Composition.name == name)
    # What this transaction wrote by other means must not be hidden by objects that the session still holds.
    rows = session.scalars(statement.execution_options(populate_existing=True)).all()
    adapters = records(session, sorted({member.adapter_id for row in rows for member in row.members}))
    return [
        CompositionRecord(
            name=row.name,
            base_model=row.base_model,
            method=row.method,
            hyperparameters=row.hyperparameters,
            members=tuple(
                CompositionMemberRecord(member.name, adapters[member.adapter_id], member.weights_hash)
                for member in row.members
            ),
        )
        for row in rows
    ]


def _absent(session: Session, name: str) -> str:
    names = session.scalars(select(Composition.name)).all()
    if not names:
        return f"there is no composition {name!r}, nor any other; make one with: hub-router compose {name} ..."
    close = closest(name, names)
    hint = f"; closest: {', '.join(close)}" if close else ""
    return f"there is no composition {name!r} among {len(names)}{hint}; see: hub-router compositions"
