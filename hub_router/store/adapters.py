"""Reading the catalog's adapters: lists under filters, one by name, everything about one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, SQLColumnExpression, Text, case, cast, func, or_, select
from sqlalchemy.orm import Session

from hub_router.records import AdapterDetails, AdapterRecord, FileFacts
from hub_router.store import lookup
from hub_router.store.features import embedding_counts, load_spectra
from hub_router.store.rows import adapter_rows, chunks, fetch, plain, records, to_record
from hub_router.store.samples import samples
from hub_router.store.tables import Adapter, AdapterFile, AdapterLabel, Repo

__all__ = ["Filters", "count", "details", "find", "ids", "list_records", "records", "samples", "to_record", "values"]

READY = ("ready",)


@dataclass(frozen=True)
class Filters:
    """Which adapters are wanted; None asks nothing. Text is compared without regard to case.

    Args:
        base_model (str | None): base model as resolved, or as the adapter's config writes it.
        licence (str | None): licence id; ``unknown`` is a value.
        rank (int | None): a rank that occurs in the adapter.
        target (str | None): last component of an adapted module's name, such as ``q_proj``.
        tag (str | None): a tag of the card.
        base_model_id (str | None): another name of that base model as resolved, such as that of a copy's original.
    """

    base_model: str | None = None
    licence: str | None = None
    rank: int | None = None
    target: str | None = None
    tag: str | None = None
    base_model_id: str | None = None


def list_records(
    session: Session,
    filters: Filters | None = None,
    limit: int | None = None,
    offset: int = 0,
    statuses: Sequence[str] = READY,
) -> list[AdapterRecord]:
    """Adapters in their newest revision, by name.

    Args:
        session (Session): a session of the store.
        filters (Filters | None): which; default all.
        limit (int | None): at most this many.
        offset (int): how many to skip.
        statuses (Sequence[str]): statuses wanted.

    Returns:
        list[AdapterRecord]: ordered by repository and subfolder.
    """
    statement = adapter_rows().where(Adapter.current.is_(True), *_conditions(filters, statuses))
    statement = statement.order_by(Repo.repo_id, Adapter.subfolder, Adapter.id).limit(limit).offset(offset or None)
    return fetch(session, statement)


def count(session: Session, filters: Filters | None = None, statuses: Sequence[str] = READY) -> int:
    """How many adapters :func:`list_records` would list without a limit."""
    statement = select(func.count()).select_from(Adapter)
    statement = statement.where(Adapter.current.is_(True), *_conditions(filters, statuses))
    return session.execute(statement).scalar_one()


def values(session: Session, statuses: Sequence[str] = READY) -> dict[str, Mapping[str, int]]:
    """Which values each filter can be given, with the number of adapters that have it.

    Args:
        session (Session): a session of the store.
        statuses (Sequence[str]): statuses of the adapters counted.

    Returns:
        dict[str, Mapping[str, int]]: by field of :class:`Filters`, most frequent values first; ``status`` counts the
        adapters of every status.
    """
    current = Adapter.current.is_(True)
    wanted = (current, Adapter.status.in_(tuple(statuses)))

    def counts(value: SQLColumnExpression[Any], *conditions: ColumnElement[bool]) -> Counter[str]:
        statement = select(value, func.count()).select_from(Adapter).where(*conditions, value.is_not(None))
        return Counter({row[0]: row[1] for row in plain(session, statement.group_by(value))})

    def label_counts(kind: str) -> Counter[str]:
        return counts(AdapterLabel.value, AdapterLabel.adapter_id == Adapter.id, AdapterLabel.kind == kind, *wanted)

    ranks: Counter[str] = Counter()
    for listed, number in counts(cast(Adapter.ranks, Text), *wanted).items():
        ranks.update({str(rank): number for rank in json.loads(listed)})
    found = {
        "status": counts(Adapter.status, current),
        "base_model": counts(func.coalesce(Adapter.base_model_resolved, Adapter.base_model), *wanted),
        "licence": counts(Adapter.licence, *wanted),
        "rank": ranks,
        "target": label_counts("target"),
        "tag": label_counts("tag"),
    }
    # By name first, for sorting by number keeps the order of equal ones.
    return {name: dict(Counter(dict(sorted(counted.items()))).most_common()) for name, counted in found.items()}


def ids(
    session: Session,
    filters: Filters | None = None,
    statuses: Sequence[str] = READY,
    among: Sequence[int] | None = None,
) -> np.ndarray:
    """Catalog ids of the adapters that :func:`list_records` would list.

    Args:
        session (Session): a session of the store.
        filters (Filters | None): which; default all.
        statuses (Sequence[str]): statuses wanted.
        among (Sequence[int] | None): only these adapters are looked at; default all.

    Returns:
        np.ndarray: int64 ``(N,)``, ascending.
    """
    # As an expression, for SQLite would rather walk along all of the index on current than look up a few ids or labels.
    current = case((Adapter.current.is_(True), 1), else_=0) == 1
    statement = select(Adapter.id).where(current, *_conditions(filters, statuses, few=among is not None))
    pieces = [statement] if among is None else [statement.where(Adapter.id.in_(chunk)) for chunk in chunks(among)]
    found = [adapter_id for piece in pieces for adapter_id in plain(session, piece).scalars()]
    return np.sort(np.array(found, dtype=np.int64))


def find(session: Session, ref: str | int) -> AdapterRecord:
    """One adapter by what a user types.

    Args:
        session (Session): a session of the store.
        ref (str | int): a catalog id, ``repo``, ``repo/subfolder``, either with ``@`` and the first characters of a
            revision, a local folder, or a short name (the last parts of the name) that only one adapter has.

    Returns:
        AdapterRecord: of any status; superseded revisions only where a revision or an id was given.

    Raises:
        NotInCatalogError: there is none, or several; names the nearest ones or the choices.
    """
    adapter_id = lookup.resolve(session, str(ref))
    return records(session, [adapter_id])[adapter_id]


def details(session: Session, record: AdapterRecord) -> AdapterDetails:
    """Everything that the catalog knows of one adapter.

    Args:
        session (Session): a session of the store.
        record (AdapterRecord): from :func:`find` or a list.

    Returns:
        AdapterDetails: card, verified files, samples, current spectra and numbers of embedded texts.
    """
    card = session.execute(select(Adapter.card_text).where(Adapter.id == record.id)).scalar_one()
    files = select(AdapterFile.path, AdapterFile.size_bytes, AdapterFile.sha256)
    return AdapterDetails(
        record=record,
        card_text=card,
        files=tuple(
            FileFacts(*row)
            for row in session.execute(files.where(AdapterFile.adapter_id == record.id).order_by(AdapterFile.path))
        ),
        samples=tuple(samples(session, record.id)),
        spectra=load_spectra(session, record.id),
        embeddings=embedding_counts(session, record.id),
    )


def _conditions(filters: Filters | None, statuses: Sequence[str], few: bool = False) -> list[ColumnElement[bool]]:
    """What the adapters must be; ``few`` where the statement names the ids to look at."""
    wanted = filters or Filters()
    found: list[ColumnElement[bool]] = [Adapter.status.in_(tuple(statuses))]
    if wanted.base_model is not None:
        base = wanted.base_model.lower()
        names = sorted({base, (wanted.base_model_id or base).lower()})
        found.append(or_(func.lower(Adapter.base_model_resolved).in_(names), func.lower(Adapter.base_model) == base))
    if wanted.licence is not None:
        found.append(func.lower(Adapter.licence) == wanted.licence.lower())
    if wanted.rank is not None:
        # The list of ranks is JSON, for which no SQL is portable; its text is, once its brackets are commas.
        listed = func.replace(func.replace(func.replace(cast(Adapter.ranks, Text), " ", ""), "[", ","), "]", ",")
        found.append(listed.like(f"%,{int(wanted.rank)},%"))
    if wanted.target is not None:
        found.append(_has_label("target", wanted.target, few))
    if wanted.tag is not None:
        found.append(_has_label("tag", wanted.tag, few))
    return found


def _has_label(kind: str, value: str, few: bool) -> ColumnElement[bool]:
    """Looks up the labels of each of few adapters, else the adapters of the label."""
    labelled = select(AdapterLabel.adapter_id).where(
        AdapterLabel.kind == kind, func.lower(AdapterLabel.value) == value.lower()
    )
    if few:
        return labelled.where(AdapterLabel.adapter_id == Adapter.id).exists()
    return Adapter.id.in_(labelled)
