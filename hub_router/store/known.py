"""What sync reads: the repositories and current adapters that the catalog already knows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import and_, func, not_, or_, select
from sqlalchemy.orm import Session

from hub_router.store.tables import STATEMENT, Adapter, AdapterFile, AdapterLabel, Repo

# Portable databases take at least this many parameters in one statement.
CHUNK = 500


@dataclass(frozen=True)
class KnownAdapter:
    """A current adapter row: where it lies and which files it needs (name from the top of the repository -> bytes).

    ``resolved`` is False for a row that an earlier release wrote, which looked for no evidence of the base model.
    """

    subfolder: str
    revision: str
    status: str
    reason: str
    path: str
    files: Mapping[str, int]
    resolved: bool = True


@dataclass(frozen=True)
class KnownRepo:
    """A repository row and its current adapters."""

    id: int
    source: str
    repo_id: str
    revision: str | None
    requested_revision: str | None
    requested_subfolders: tuple[str, ...]
    requested_checkpoints: str
    state: str
    reason: str
    renamed_to: str | None
    adapters: tuple[KnownAdapter, ...]


def known_repos(session: Session, source: str, repo_ids: Iterable[str]) -> dict[str, KnownRepo]:
    """The rows of repositories, with their current adapters.

    Args:
        session (Session): a reading session.
        source (str): ``hub`` or ``local``.
        repo_ids (Iterable[str]): ids to look up.

    Returns:
        dict[str, KnownRepo]: by id; unknown ones are absent.
    """
    wanted = list(dict.fromkeys(repo_ids))
    rows: list[Repo] = []
    for start in range(0, len(wanted), CHUNK):
        chunk = wanted[start : start + CHUNK]
        rows += session.scalars(select(Repo).where(Repo.source == source, Repo.repo_id.in_(chunk)))
    return {repo.repo_id: repo for repo in _with_adapters(session, rows)}


def repos_of_author(session: Session, author: str) -> list[KnownRepo]:
    """The Hub repositories of an author that the catalog holds and believes to exist.

    Args:
        session (Session): a reading session.
        author (str): user or organisation, compared without case.
    """
    query = select(Repo).where(
        Repo.source == "hub", func.lower(Repo.author) == author.lower(), Repo.state.not_in(("missing", "renamed"))
    )
    return _with_adapters(session, list(session.scalars(query)))


def repos_of_base_model(session: Session, base_model: str) -> list[KnownRepo]:
    """The Hub repositories that the Hub listed for a base model, as far as the catalog believes them to exist.

    The Hub goes by what the card states, so a quantised copy and its original are two base models here. What states
    nothing goes by the base model that was found.

    Args:
        session (Session): a reading session.
        base_model (str): Hub id, compared without case.
    """
    asked = base_model.lower()
    said = select(AdapterLabel.adapter_id).where(AdapterLabel.adapter_id == Adapter.id, AdapterLabel.kind == STATEMENT)
    listed = func.lower(AdapterLabel.value).in_((f"card {asked}", f"tag base_model:adapter:{asked}"))
    query = (
        select(Repo)
        .join(Adapter)
        .where(Repo.source == "hub", Repo.state.not_in(("missing", "renamed")), Adapter.current)
        .where(
            or_(
                said.where(listed).exists(),
                and_(func.lower(Adapter.base_model_resolved) == asked, not_(said.exists())),
            )
        )
        .distinct()
    )
    return _with_adapters(session, list(session.scalars(query)))


def local_adapters_under(session: Session, folder: str) -> list[KnownRepo]:
    """The local adapters in a folder or below it that the catalog believes to exist.

    Args:
        session (Session): a reading session.
        folder (str): absolute path.
    """
    below = folder.rstrip(os.sep) + os.sep
    query = select(Repo).where(
        Repo.source == "local",
        Repo.state != "missing",
        or_(Repo.repo_id == folder, func.substr(Repo.repo_id, 1, len(below)) == below),
    )
    return _with_adapters(session, list(session.scalars(query)))


def _with_adapters(session: Session, repos: Sequence[Repo]) -> list[KnownRepo]:
    by_id: dict[int, list[Adapter]] = {repo.id: [] for repo in repos}
    files: dict[int, dict[str, int]] = {}
    ids = list(by_id)
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        for row in session.scalars(select(Adapter).where(Adapter.repo_pk.in_(chunk), Adapter.current)):
            by_id[row.repo_pk].append(row)
        query = select(AdapterFile.adapter_id, AdapterFile.path, AdapterFile.size_bytes).join(
            Adapter, Adapter.id == AdapterFile.adapter_id
        )
        for adapter_id, path, size in session.execute(query.where(Adapter.repo_pk.in_(chunk), Adapter.current)):
            files.setdefault(adapter_id, {})[path] = size
    return [_known(repo, by_id[repo.id], files) for repo in repos]


def _known(repo: Repo, adapters: Sequence[Adapter], files: Mapping[int, Mapping[str, int]]) -> KnownRepo:
    return KnownRepo(
        id=repo.id,
        source=repo.source,
        repo_id=repo.repo_id,
        revision=repo.revision,
        requested_revision=repo.requested_revision,
        requested_subfolders=tuple(repo.requested_subfolders or ()),
        requested_checkpoints=repo.requested_checkpoints,
        state=repo.state,
        reason=repo.reason,
        renamed_to=repo.renamed_to,
        adapters=tuple(
            KnownAdapter(
                row.subfolder,
                row.revision,
                row.status,
                row.reason,
                row.path,
                files.get(row.id, {}),
                row.status != "ready" or bool(row.base_model_evidence),
            )
            for row in sorted(adapters, key=lambda row: row.subfolder)
        ),
    )
