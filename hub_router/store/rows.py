"""Adapter rows as records: one query for the rows, one per thousand of them for their labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import CursorResult, Row, Select, Text, cast, select
from sqlalchemy.orm import Session
from sqlalchemy.sql.functions import aggregate_strings

from hub_router.records import AdapterRecord
from hub_router.store.tables import STATEMENT, Adapter, AdapterLabel, Repo

# Below the number of bound values that SQLite and PostgreSQL take in one statement.
_CHUNK = 1000
# ASCII's unit separator, which no tag, data set or module name holds.
_SEPARATOR = "\x1f"
_NO_LABELS: Mapping[str, tuple[str, ...]] = {}


@cache
def adapter_rows() -> Select[*tuple[Any, ...]]:
    """A statement for adapters and their repositories, to be narrowed and given to :func:`fetch`."""
    return select(
        Adapter.id,
        Repo.source,
        Repo.repo_id,
        Adapter.revision,
        Adapter.subfolder,
        Adapter.path,
        Adapter.status,
        Adapter.reason,
        Adapter.base_model,
        Adapter.base_model_resolved,
        Adapter.licence,
        Adapter.peft_type,
        cast(Adapter.ranks, Text),
        cast(Adapter.dtypes, Text),
        Adapter.module_count,
        Adapter.parameters,
        Adapter.size_bytes,
        Adapter.weights_hash,
        Adapter.downloads,
        Adapter.likes,
        cast(Adapter.notes, Text),
        Adapter.rslora,
        Adapter.current,
        Adapter.added_at,
        Repo.author,
        Repo.last_modified,
        Adapter.base_model_confidence,
        cast(Adapter.base_model_evidence, Text),
        Adapter.base_model_revision,
    ).join(Repo, Repo.id == Adapter.repo_pk)


def fetch(session: Session, statement: Select[*tuple[Any, ...]]) -> list[AdapterRecord]:
    """Runs a statement made from :func:`adapter_rows`.

    Args:
        session (Session): a session of the store.
        statement (Select): narrowed and ordered.

    Returns:
        list[AdapterRecord]: in the statement's order.
    """
    rows = plain(session, statement).all()
    labels = _labels(session, [row[0] for row in rows])
    return [to_record(row, labels.get(row[0], _NO_LABELS)) for row in rows]


def plain(session: Session, statement: Select[*tuple[Any, ...]]) -> CursorResult[*tuple[Any, ...]]:
    """Runs a statement for columns without the session's own handling of rows, which doubles the time of long lists."""
    session.flush()
    return session.connection().execute(statement)


def records(session: Session, ids: Sequence[int]) -> dict[int, AdapterRecord]:
    """Records by catalog id, of any status and revision.

    Args:
        session (Session): a session of the store.
        ids (Sequence[int]): catalog ids; those that do not exist are left out.

    Returns:
        dict[int, AdapterRecord]: in the order of ``ids``.
    """
    wanted = [int(adapter_id) for adapter_id in ids]
    found: dict[int, AdapterRecord] = {}
    for chunk in chunks(wanted):
        found.update((record.id, record) for record in fetch(session, adapter_rows().where(Adapter.id.in_(chunk))))
    return {adapter_id: found[adapter_id] for adapter_id in wanted if adapter_id in found}


def chunks(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    """The ids in pieces that one statement can bind."""
    for start in range(0, len(ids), _CHUNK):
        yield ids[start : start + _CHUNK]


def to_record(row: Row[*tuple[Any, ...]], labels: Mapping[str, tuple[str, ...]]) -> AdapterRecord:
    """One adapter as the rest of the application sees it.

    Args:
        row (Row): a row of :func:`adapter_rows`.
        labels (Mapping[str, tuple[str, ...]]): its label values by kind: ``tag``, ``dataset``, ``target``.

    Returns:
        AdapterRecord: ``extra`` holds notes, rslora, current, added_at, author and last_modified, all JSON values.
    """
    # Unpacked, for a row's attributes cost more than all else here.
    (
        adapter_id,
        source,
        repo_id,
        revision,
        subfolder,
        path,
        status,
        reason,
        base_model,
        base_model_resolved,
        licence,
        peft_type,
        ranks,
        dtypes,
        modules,
        parameters,
        size_bytes,
        weights_hash,
        downloads,
        likes,
        notes,
        rslora,
        current,
        added_at,
        author,
        last_modified,
        base_model_confidence,
        base_model_evidence,
        base_model_revision,
    ) = row
    return AdapterRecord(
        id=adapter_id,
        source=source,
        repo_id=repo_id,
        revision=revision,
        subfolder=subfolder,
        path=Path(path),
        status=status,
        reason=reason,
        base_model=base_model,
        base_model_resolved=base_model_resolved,
        licence=licence,
        peft_type=peft_type,
        ranks=_listed(ranks),
        targets=labels.get("target", ()),
        dtypes=_listed(dtypes),
        modules=modules,
        parameters=parameters,
        size_bytes=size_bytes,
        weights_hash=weights_hash,
        tags=labels.get("tag", ()),
        datasets=labels.get("dataset", ()),
        downloads=downloads,
        likes=likes,
        extra={
            "notes": list(_listed(notes)),
            "rslora": rslora,
            "current": current,
            "added_at": _iso(added_at),
            "author": author,
            "last_modified": _iso(last_modified),
        },
        base_model_confidence=base_model_confidence,
        # Not cached: most adapters have evidence of their own.
        base_model_evidence=tuple(json.loads(base_model_evidence)),
        base_model_revision=base_model_revision,
    )


@lru_cache(maxsize=1024)
def _listed(stored: str) -> tuple[Any, ...]:
    """A JSON list; thousands of adapters share a few, so they are read as text and parsed once."""
    return tuple(json.loads(stored))


def _iso(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    # SQLite forgets the time zone; everything stored is UTC.
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).isoformat(timespec="seconds")


def _labels(session: Session, ids: Sequence[int]) -> dict[int, dict[str, tuple[str, ...]]]:
    """Label values by adapter and kind, sorted."""
    gathered: dict[int, dict[str, tuple[str, ...]]] = {}
    # Joined by the database: a row per label would take most of a list's time.
    joined = select(AdapterLabel.adapter_id, AdapterLabel.kind, aggregate_strings(AdapterLabel.value, _SEPARATOR))
    # By what is left out: SQLite would walk along the index on kinds for those that are wanted.
    joined = joined.where(AdapterLabel.kind != STATEMENT)
    for chunk in chunks(sorted(ids)):
        # A few labels too many cost less than binding a thousand ids.
        dense = chunk[-1] - chunk[0] < 2 * len(chunk)
        owner = AdapterLabel.adapter_id
        wanted = owner.between(chunk[0], chunk[-1]) if dense else owner.in_(chunk)
        statement = joined.where(wanted).group_by(owner, AdapterLabel.kind)
        for adapter_id, kind, values in plain(session, statement).all():
            gathered.setdefault(adapter_id, {})[kind] = tuple(sorted(values.split(_SEPARATOR)))
    return gathered
