"""What the user says about base models, and its effect on the adapters' rows.

A choice for one adapter comes before every rule; of the rules that fit what an adapter states, the longest pattern
counts. A choice is applied when it is made and whenever sync writes an adapter; what the adapter itself says is kept
beside it, so that it can be resolved anew once the choice is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from hub_router.records import BaseChoice, BaseModel
from hub_router.store.known import CHUNK
from hub_router.store.lookup import full_name
from hub_router.store.tables import STATEMENT, Adapter, AdapterLabel, BaseModelChoice, Repo, utcnow

ADAPTER, RULE = "adapter", "rule"


@dataclass(frozen=True)
class HeldBase:
    """What a catalogued adapter says about its base model: in its config (``stated``), elsewhere, and by its files."""

    adapter_id: int
    source: str
    path: str
    stated: str | None
    statements: tuple[str, ...]


def choices(session: Session) -> list[BaseChoice]:
    """Every choice, those for adapters first, then by pattern; ``adapters`` is not counted.

    Args:
        session (Session): a session of the store.
    """
    order = (BaseModelChoice.kind, BaseModelChoice.pattern)
    rows = session.execute(select(*order, BaseModelChoice.base_model).order_by(*order))
    return [BaseChoice(*row) for row in rows]


def counted(session: Session) -> list[BaseChoice]:
    """:func:`choices` with the number of current adapters that each decides."""
    known = choices(session)
    counts = Counter(choice for _, choice in _decided(session, known))
    return [replace(choice, adapters=counts[choice]) for choice in known]


def decided(session: Session, kind: str, pattern: str) -> list[int]:
    """Catalog ids of the current adapters that a choice decides.

    Args:
        session (Session): a session of the store.
        kind (str): ``adapter`` or ``rule``.
        pattern (str): its pattern.
    """
    pairs = _decided(session, choices(session))
    return [adapter_id for adapter_id, choice in pairs if (choice.kind, choice.pattern) == (kind, pattern)]


def choose(known: Sequence[BaseChoice], ref: str, stated: str | None) -> BaseModel | None:
    """What the user says about an adapter.

    Args:
        known (Sequence[BaseChoice]): from :func:`choices`.
        ref (str): the adapter's reference.
        stated (str | None): ``base_model_name_or_path`` of its config.

    Returns:
        BaseModel | None: None where the user says nothing.
    """
    choice = _choice(known, ref, stated)
    return _said(choice) if choice else None


def save_choice(session: Session, kind: str, pattern: str, base_model: str) -> list[int]:
    """Write a choice, in place of one of the same pattern, and apply it.

    Args:
        session (Session): a writing session.
        kind (str): ``adapter`` or ``rule``.
        pattern (str): an adapter's reference, or a shell pattern.
        base_model (str): Hub id or folder.

    Returns:
        list[int]: catalog ids of the adapters that it decides.
    """
    row = session.get(BaseModelChoice, (kind, pattern))
    if row is None:
        session.add(BaseModelChoice(kind=kind, pattern=pattern, base_model=base_model))
    else:
        row.base_model, row.created_at = base_model, utcnow()
    session.flush()
    return _apply(session, kind, pattern)


def delete_choice(session: Session, kind: str, pattern: str, resolved: Mapping[int, BaseModel]) -> list[int]:
    """Forget a choice; the adapters that it decided are decided by the next choice that fits, or by ``resolved``.

    Args:
        session (Session): a writing session.
        kind (str): ``adapter`` or ``rule``.
        pattern (str): its pattern.
        resolved (Mapping[int, BaseModel]): what these adapters themselves say, by catalog id.

    Returns:
        list[int]: catalog ids of the adapters that it decided.
    """
    freed = decided(session, kind, pattern)
    session.execute(delete(BaseModelChoice).where(BaseModelChoice.kind == kind, BaseModelChoice.pattern == pattern))
    remaining = choices(session)
    for adapter_id, ref, stated in _adapters(session, freed):
        found = choose(remaining, ref, stated) or resolved.get(adapter_id)
        # One that a sync added in between keeps the choice until it is synced again.
        if found is not None:
            write(session, [adapter_id], found)
    return freed


def follow_rename(session: Session, old: str, new: str) -> None:
    """Keep the choices for a renamed repository's adapters.

    Args:
        session (Session): a writing session.
        old (str): id that the choices name.
        new (str): id that the Hub gives now.
    """
    for choice in choices(session):
        if choice.kind != ADAPTER or not (choice.pattern == old or choice.pattern.startswith(f"{old}/")):
            continue
        moved = new + choice.pattern[len(old) :]
        session.execute(
            delete(BaseModelChoice).where(BaseModelChoice.kind == ADAPTER, BaseModelChoice.pattern == choice.pattern)
        )
        if session.get(BaseModelChoice, (ADAPTER, moved)) is None:
            save_choice(session, ADAPTER, moved, choice.base_model)


def held(session: Session, adapter_ids: Sequence[int]) -> list[HeldBase]:
    """What adapters say about their base models.

    Args:
        session (Session): a reading session.
        adapter_ids (Sequence[int]): catalog ids.
    """
    found: list[HeldBase] = []
    for start in range(0, len(adapter_ids), CHUNK):
        chunk = adapter_ids[start : start + CHUNK]
        statements: dict[int, list[str]] = {}
        labels = select(AdapterLabel.adapter_id, AdapterLabel.value).where(AdapterLabel.adapter_id.in_(chunk))
        for adapter_id, value in session.execute(labels.where(AdapterLabel.kind == STATEMENT)):
            statements.setdefault(adapter_id, []).append(value)
        rows = select(Adapter.id, Repo.source, Adapter.path, Adapter.base_model).join(Repo, Repo.id == Adapter.repo_pk)
        found += [
            HeldBase(*row, tuple(sorted(statements.get(row[0], ()))))
            for row in session.execute(rows.where(Adapter.id.in_(chunk)).order_by(Adapter.id))
        ]
    return found


def write(session: Session, adapter_ids: Sequence[int], found: BaseModel) -> None:
    """Set the base model of adapters.

    Args:
        session (Session): a writing session.
        adapter_ids (Sequence[int]): catalog ids.
        found (BaseModel): what they get.
    """
    values = {
        "base_model_resolved": found.id,
        "base_model_revision": found.revision,
        "base_model_confidence": found.confidence,
        "base_model_evidence": list(found.evidence),
    }
    for start in range(0, len(adapter_ids), CHUNK):
        chunk = adapter_ids[start : start + CHUNK]
        session.execute(update(Adapter).where(Adapter.id.in_(chunk)).values(values))


def _apply(session: Session, kind: str, pattern: str) -> list[int]:
    found = decided(session, kind, pattern)
    choice = next(choice for choice in choices(session) if (choice.kind, choice.pattern) == (kind, pattern))
    write(session, found, _said(choice))
    return found


def _said(choice: BaseChoice) -> BaseModel:
    reason = "set by the user" if choice.kind == ADAPTER else f"rule {choice.pattern!r} of the user"
    return BaseModel(choice.base_model, "certain", (reason,))


def _decided(session: Session, known: Sequence[BaseChoice]) -> Iterator[tuple[int, BaseChoice]]:
    """(catalog id, choice) of every current adapter that one decides."""
    if not known:
        return
    for adapter_id, ref, stated in _adapters(session):
        choice = _choice(known, ref, stated)
        if choice is not None:
            yield adapter_id, choice


def _choice(known: Sequence[BaseChoice], ref: str, stated: str | None) -> BaseChoice | None:
    own = [choice for choice in known if choice.kind == ADAPTER and choice.pattern == ref]
    if own or not stated:
        return own[0] if own else None
    fitting = [
        choice for choice in known if choice.kind == RULE and fnmatchcase(stated.lower(), choice.pattern.lower())
    ]
    return max(fitting, key=lambda choice: (len(choice.pattern), choice.pattern), default=None)


def _adapters(session: Session, adapter_ids: Sequence[int] | None = None) -> list[tuple[int, str, str | None]]:
    """(catalog id, reference, what the config states) of current adapters."""
    statement = select(Adapter.id, full_name(), Adapter.base_model).join(Repo, Repo.id == Adapter.repo_pk)
    if adapter_ids is None:
        return [(key, ref, stated) for key, ref, stated in session.execute(statement.where(Adapter.current.is_(True)))]
    found: list[tuple[int, str, str | None]] = []
    for start in range(0, len(adapter_ids), CHUNK):
        chunk = adapter_ids[start : start + CHUNK]
        rows = session.execute(statement.where(Adapter.id.in_(chunk)))
        found += [(key, ref, stated) for key, ref, stated in rows]
    return found
