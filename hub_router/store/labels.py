"""Licence and tags of catalogued adapters, which the Hub can change without a new commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from hub_router.store.known import CHUNK
from hub_router.store.tables import Adapter, AdapterFile, AdapterLabel


@dataclass(frozen=True)
class Labels:
    """A licence, and tags in any order."""

    licence: str
    tags: frozenset[str]


@dataclass(frozen=True)
class HeldLabels:
    """A current, ready adapter's labels, and where its files lie (``files`` from the top of the repository)."""

    adapter_id: int
    repo_pk: int
    subfolder: str
    path: str
    files: tuple[str, ...]
    labels: Labels


def held_labels(session: Session, repo_pks: Sequence[int]) -> list[HeldLabels]:
    """The labels of the current adapters of repositories.

    Args:
        session (Session): a reading session.
        repo_pks (Sequence[int]): keys of the repositories' rows.

    Returns:
        list[HeldLabels]: ready adapters only.
    """
    held: list[HeldLabels] = []
    for start in range(0, len(repo_pks), CHUNK):
        wanted = (Adapter.repo_pk.in_(repo_pks[start : start + CHUNK]), Adapter.current, Adapter.status == "ready")
        tags: dict[int, set[str]] = {}
        labelled = select(AdapterLabel.adapter_id, AdapterLabel.value).join(
            Adapter, Adapter.id == AdapterLabel.adapter_id
        )
        for adapter_id, value in session.execute(labelled.where(AdapterLabel.kind == "tag", *wanted)):
            tags.setdefault(adapter_id, set()).add(value)
        files: dict[int, list[str]] = {}
        listed = select(AdapterFile.adapter_id, AdapterFile.path).join(Adapter, Adapter.id == AdapterFile.adapter_id)
        for adapter_id, path in session.execute(listed.where(*wanted)):
            files.setdefault(adapter_id, []).append(path)
        query = select(Adapter.id, Adapter.repo_pk, Adapter.subfolder, Adapter.path, Adapter.licence).where(*wanted)
        held += [
            HeldLabels(
                key, repo, subfolder, path, tuple(files.get(key, ())), Labels(licence, frozenset(tags.get(key, ())))
            )
            for key, repo, subfolder, path, licence in session.execute(query)
        ]
    return held


def save_labels(session: Session, labels: Mapping[int, Labels]) -> None:
    """Replace licence and tags of adapters.

    Args:
        session (Session): a writing session.
        labels (Mapping[int, Labels]): by adapter id.
    """
    for adapter_id, new in labels.items():
        session.execute(update(Adapter).where(Adapter.id == adapter_id).values(licence=new.licence))
        session.execute(delete(AdapterLabel).where(AdapterLabel.adapter_id == adapter_id, AdapterLabel.kind == "tag"))
        rows = [{"adapter_id": adapter_id, "kind": "tag", "value": tag} for tag in sorted(new.tags)]
        if rows:
            session.execute(insert(AdapterLabel), rows)
