"""What sync writes about repositories and adapters.

Sync writes one adapter per transaction, so a crash loses at most the adapter in hand. What it reads is in
:mod:`hub_router.store.known`, the record of each run in :mod:`hub_router.store.runs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from sqlalchemy import BigInteger, and_, bindparam, delete, insert, or_, select, update
from sqlalchemy.orm import Session, aliased

from hub_router.records import UNKNOWN_LICENCE, AdapterFacts, BaseModel, Sample
from hub_router.store.base_choices import choices, choose, follow_rename
from hub_router.store.known import CHUNK, KnownRepo
from hub_router.store.samples import hand_over, write_found
from hub_router.store.tables import STATEMENT, Adapter, AdapterFile, AdapterLabel, Repo, utcnow


@dataclass(frozen=True)
class RepoFields:
    """A repository as its source describes it now, and what was asked for of it.

    ``subfolders`` are the folders asked for, empty for its top; ``checkpoints`` is ``newest`` or ``all``.
    """

    source: str
    repo_id: str
    revision: str
    requested_revision: str | None = None
    subfolders: tuple[str, ...] = ("",)
    checkpoints: str = "newest"
    last_modified: datetime | None = None
    downloads: int | None = None
    likes: int | None = None


@dataclass(frozen=True)
class FileFields:
    """A verified file: path from the top of the repository, bytes, sha256, and the hash that the Hub states."""

    path: str
    size_bytes: int
    sha256: str
    hub_hash: str | None


@dataclass(frozen=True)
class AdapterFields:
    """All that sync found out about one adapter.

    ``facts`` is None where it cannot be used; then ``reason`` says why, and the stated type and base model are what its
    config says all the same.
    """

    subfolder: str
    path: str
    facts: AdapterFacts | None = None
    reason: str = ""
    stated_type: str = ""
    stated_base: str | None = None
    base_model: BaseModel = field(default_factory=BaseModel)
    base_statements: tuple[str, ...] = ()
    licence: str = UNKNOWN_LICENCE
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    card_text: str = ""
    notes: tuple[str, ...] = ()
    files: tuple[FileFields, ...] = ()
    samples: tuple[Sample, ...] = ()


def save_adapter(session: Session, repo: RepoFields, adapter: AdapterFields) -> int:
    """Write one adapter and make it the current one of its folder.

    Where the current row computes the same function (equal weights hash), that row is moved to the new revision, so
    compositions and features that belong to it stay valid; otherwise the old row stays, no longer current. The samples
    that the user gave go along in either case.

    Args:
        session (Session): a writing session.
        repo (RepoFields): its repository.
        adapter (AdapterFields): what was found.

    Returns:
        int: catalog id.
    """
    parent = _repo_row(session, repo)
    weights_hash = adapter.facts.weights_hash if adapter.facts else ""
    rows = list(
        session.scalars(select(Adapter).where(Adapter.repo_pk == parent.id, Adapter.subfolder == adapter.subfolder))
    )
    before = next((row for row in rows if row.current), None)
    ref = f"{repo.repo_id}/{adapter.subfolder}" if adapter.subfolder else repo.repo_id
    chosen = choose(choices(session), ref, adapter.facts.base_model if adapter.facts else None)
    exact = [row for row in rows if row.revision == repo.revision]
    same = [row for row in rows if row.current and row.weights_hash == weights_hash]
    row = next(iter(exact or same), None)
    if row is None:
        row = Adapter(repo_pk=parent.id, subfolder=adapter.subfolder)
        session.add(row)
    for other in rows:
        other.current = other is row
    row.revision, row.current = repo.revision, True
    _fill(row, repo, adapter, chosen)
    session.flush()
    if before is not None and before is not row:
        hand_over(session, before.id, row.id)
    _replace_details(session, row.id, adapter)
    return row.id


def finish_repo(session: Session, repo: RepoFields, state: str, reason: str = "") -> None:
    """Record that a repository was looked at; for the states ``ok`` and ``unsupported`` its revision is then settled.

    Args:
        session (Session): a writing session.
        repo (RepoFields): repository.
        state (str): see :class:`hub_router.store.tables.Repo`.
        reason (str): one line for every state but ``ok``.
    """
    row = _repo_row(session, repo)
    row.state, row.reason = state, reason
    if state in ("ok", "unsupported"):
        # Only now: a run that ended early must not look as if it had covered these folders at this revision.
        row.revision, row.requested_revision = repo.revision, repo.requested_revision
        row.requested_subfolders, row.requested_checkpoints = list(repo.subfolders), repo.checkpoints


def retire_adapters(session: Session, source: str, repo_id: str, subfolders: Sequence[str], reason: str) -> None:
    """Mark adapters of a repository that its new revision no longer holds.

    Args:
        session (Session): a writing session.
        source (str): ``hub`` or ``local``.
        repo_id (str): repository.
        subfolders (Sequence[str]): their folders.
        reason (str): one line.
    """
    repo = _find(session, source, repo_id)
    if repo is not None:
        session.execute(
            update(Adapter)
            .where(Adapter.repo_pk == repo.id, Adapter.current, Adapter.subfolder.in_(subfolders))
            .values(status="missing", reason=reason)
        )


def mark_unavailable(session: Session, source: str, repo_id: str, state: str, reason: str) -> None:
    """Record that a repository is missing or gated; its adapters are no longer offered.

    Args:
        session (Session): a writing session.
        source (str): ``hub`` or ``local``.
        repo_id (str): repository; a gated one gets a row if it has none, so that it is remembered.
        state (str): ``missing`` or ``gated``.
        reason (str): one line.
    """
    row = _find(session, source, repo_id)
    if row is None:
        if state == "missing":
            return
        row = Repo(source=source, repo_id=repo_id, author=_author(source, repo_id))
        session.add(row)
    row.state, row.reason, row.last_seen = state, reason, utcnow()
    session.flush()
    session.execute(
        update(Adapter).where(Adapter.repo_pk == row.id, Adapter.current).values(status=state, reason=reason)
    )


def mark_failed(session: Session, source: str, repo_id: str, reason: str) -> None:
    """Record that a known repository could not be checked; its verified adapters stay on offer.

    Args:
        session (Session): a writing session.
        source (str): ``hub`` or ``local``.
        repo_id (str): repository; one without a row is not recorded.
        reason (str): one line.
    """
    row = _find(session, source, repo_id)
    # That a repository is missing, gated or without adapters outweighs that it could not be asked again.
    if row is not None and row.state in ("ok", "failed"):
        row.state, row.reason = "failed", reason


def rename_repo(session: Session, old: str, new: str) -> bool:
    """Move a renamed Hub repository's adapters to its new id; they keep their catalog ids.

    Args:
        session (Session): a writing session.
        old (str): id that the catalog knows.
        new (str): id that the Hub gives now.

    Returns:
        bool: whether the old id was known under its own name until now.
    """
    row = _find(session, "hub", old)
    if row is None or (row.state == "renamed" and row.renamed_to == new):
        return False
    target = _find(session, "hub", new)
    if target is None:
        target = Repo(source="hub", repo_id=new, author=_author("hub", new), state=row.state, reason=row.reason)
        target.revision, target.requested_revision = row.revision, row.requested_revision
        target.requested_subfolders, target.last_modified = row.requested_subfolders, row.last_modified
        target.requested_checkpoints = row.requested_checkpoints
        session.add(target)
        session.flush()
        session.execute(update(Adapter).where(Adapter.repo_pk == row.id).values(repo_pk=target.id))
    else:
        _hand_over_samples(session, row.id, target.id)
        reason = f"renamed to {new}"
        session.execute(
            update(Adapter).where(Adapter.repo_pk == row.id).values(current=False, status="missing", reason=reason)
        )
    follow_rename(session, old, new)
    row.state, row.renamed_to, row.reason, row.revision = "renamed", new, f"renamed to {new}", None
    return True


def refresh_repos(session: Session, repos: Sequence[RepoFields], known: Mapping[str, KnownRepo]) -> None:
    """Note that unchanged repositories were seen, with the Hub's present counts.

    Args:
        session (Session): a writing session.
        repos (Sequence[RepoFields]): as the source describes them now.
        known (Mapping[str, KnownRepo]): their rows, by id.
    """
    now = utcnow()
    seen = [
        {"id": known[repo.repo_id].id, "last_seen": now, "requested_revision": repo.requested_revision}
        for repo in repos
    ]
    back = [known[repo.repo_id].id for repo in repos if known[repo.repo_id].state == "failed"]
    counts = [
        {"repo": known[repo.repo_id].id, "now_downloads": repo.downloads, "now_likes": repo.likes}
        for repo in repos
        if repo.downloads is not None
    ]
    if seen:
        session.execute(update(Repo), seen)
    for start in range(0, len(back), CHUNK):
        session.execute(update(Repo).where(Repo.id.in_(back[start : start + CHUNK])).values(state="ok", reason=""))
    if counts:
        downloads, likes = bindparam("now_downloads", type_=BigInteger), bindparam("now_likes", type_=BigInteger)
        outdated = or_(Adapter.downloads.is_distinct_from(downloads), Adapter.likes.is_distinct_from(likes))
        statement = update(Adapter).where(Adapter.repo_pk == bindparam("repo"), Adapter.current, outdated)
        # Through the connection: the session would run it once per repository.
        session.connection().execute(statement.values(downloads=downloads, likes=likes), counts)


def _find(session: Session, source: str, repo_id: str) -> Repo | None:
    return session.scalar(select(Repo).where(Repo.source == source, Repo.repo_id == repo_id))


def _author(source: str, repo_id: str) -> str | None:
    return repo_id.split("/")[0] if source == "hub" else None


def _repo_row(session: Session, repo: RepoFields) -> Repo:
    """The repository's row, made or brought up to date."""
    row = _find(session, repo.source, repo.repo_id)
    if row is None:
        row = Repo(source=repo.source, repo_id=repo.repo_id, state="failed", reason="not finished yet")
        session.add(row)
    elif row.state in ("missing", "gated", "renamed"):
        row.state, row.reason, row.renamed_to = "failed", "not finished yet", None
    row.author, row.last_modified, row.last_seen = _author(repo.source, repo.repo_id), repo.last_modified, utcnow()
    session.flush()
    return row


def _hand_over_samples(session: Session, old_repo: int, new_repo: int) -> None:
    """Give what the user gave to a repository's adapters to those of the same folders in another."""
    old, new = aliased(Adapter), aliased(Adapter)
    same = and_(old.subfolder == new.subfolder, old.current, new.current)
    pairs = select(old.id, new.id).join(new, same).where(old.repo_pk == old_repo, new.repo_pk == new_repo)
    for source_id, target_id in session.execute(pairs).all():
        hand_over(session, source_id, target_id, join=True)


def _fill(row: Adapter, repo: RepoFields, adapter: AdapterFields, chosen: BaseModel | None) -> None:
    facts = adapter.facts
    row.status, row.reason, row.path = ("ready" if facts else "unsupported"), adapter.reason, adapter.path
    row.base_model = facts.base_model if facts else adapter.stated_base
    base = chosen or adapter.base_model
    row.base_model_resolved, row.base_model_revision = base.id, base.revision
    row.base_model_confidence, row.base_model_evidence = base.confidence, list(base.evidence)
    row.licence = adapter.licence
    row.peft_type = facts.peft_type if facts else adapter.stated_type
    row.ranks = list(facts.ranks) if facts else []
    row.rank_min, row.rank_max = (row.ranks[0], row.ranks[-1]) if row.ranks else (None, None)
    row.dtypes = list(facts.dtypes) if facts else []
    row.module_count = len(facts.modules) if facts else 0
    row.parameters, row.size_bytes = (facts.parameters, facts.size_bytes) if facts else (0, 0)
    row.weights_hash, row.rslora = (facts.weights_hash, facts.rslora) if facts else ("", False)
    row.card_text = adapter.card_text
    row.notes = [*(facts.notes if facts else ()), *adapter.notes]
    row.downloads, row.likes = repo.downloads, repo.likes


def _replace_details(session: Session, adapter_id: int, adapter: AdapterFields) -> None:
    """Labels, files and samples of an adapter, in place of those it had; samples that the user gave stay."""
    for table in (AdapterLabel, AdapterFile):
        session.execute(delete(table).where(table.adapter_id == adapter_id))
    targets = adapter.facts.targets if adapter.facts else ()
    labels = {"tag": adapter.tags, "dataset": adapter.datasets, "target": targets, STATEMENT: adapter.base_statements}
    labelled = [
        {"adapter_id": adapter_id, "kind": kind, "value": value} for kind, values in labels.items() for value in values
    ]
    files = [{"adapter_id": adapter_id, **vars(file)} for file in adapter.files]
    for table, rows in ((AdapterLabel, labelled), (AdapterFile, files)):
        if rows:
            session.execute(insert(table), rows)
    write_found(session, adapter_id, adapter.samples)
