"""What a request means: which repositories and folders are to be looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from hub_router.errors import MissingError, SettingsError, UnreachableError
from hub_router.store.known import KnownRepo, repos_of_author, repos_of_base_model
from hub_router.store.runs import Outcome
from hub_router.store.session import Store
from hub_router.sync.client import HubClient
from hub_router.sync.hubrecords import RepoInfo
from hub_router.sync.manifest import Manifest, load_manifest
from hub_router.sync.targets import HubTarget, LocalTarget, parse_targets


@dataclass(frozen=True)
class SyncRequest:
    """What to sync.

    Args:
        targets (tuple[str | Path, ...]): ``owner/repo``, ``owner/repo/subfolder``, ``owner/repo@revision``, folders.
        author (str | None): also all repositories of this user or organisation.
        base_model (str | None): also all adapters that the Hub lists for this base model.
        collection (str | Path | None): also the members of a manifest: a bundled name or a TOML file.
        limit (int | None): at most this many repositories of each listing and manifest, most downloaded first.
        revision (str | None): branch, tag or commit, for repositories that name none.
        workers (int): threads that ask the Hub and download.
        dry_run (bool): find out what would be done; nothing is downloaded or written.
    """

    targets: tuple[str | Path, ...] = ()
    author: str | None = None
    base_model: str | None = None
    collection: str | Path | None = None
    limit: int | None = None
    revision: str | None = None
    workers: int = 8
    dry_run: bool = False

    def as_dict(self) -> dict[str, object]:
        """What was asked for as JSON values, without how it was to be done."""
        collection = str(self.collection) if self.collection is not None else None
        # Two runs that differ in these ask for the same, so one finishes what the other began.
        asked = {name: value for name, value in vars(self).items() if name not in ("workers", "dry_run")}
        return {**asked, "targets": [str(target) for target in self.targets], "collection": collection}


@dataclass(frozen=True)
class Wanted:
    """One repository to look at.

    Args:
        repo_id (str): id that was asked for.
        subfolders (tuple[str, ...]): folders of it; the empty one is its top.
        revision (str | None): branch, tag or commit.
        info (RepoInfo | None): what a listing said about it.
        task (str): task that a manifest states.
        base_model (str | None): base model that a manifest states.
    """

    repo_id: str
    subfolders: tuple[str, ...] = ("",)
    revision: str | None = None
    info: RepoInfo | None = None
    task: str = ""
    base_model: str | None = None


@dataclass
class Plan:
    """Everything to look at, each repository once; ``faults`` are entries of listings that cannot be used."""

    repos: dict[str, Wanted] = field(default_factory=dict)
    folders: list[Path] = field(default_factory=list)
    faults: list[Outcome] = field(default_factory=list)

    def add(self, wanted: Wanted) -> None:
        """Add a repository, or more folders of one that is already there.

        Raises:
            SettingsError: it is already there at another revision.
        """
        known = self.repos.get(wanted.repo_id)
        if known is None:
            self.repos[wanted.repo_id] = wanted
            return
        if known.revision != wanted.revision:
            revisions = " and ".join(entry.revision or "the main branch" for entry in (known, wanted))
            raise SettingsError(f"{wanted.repo_id} is asked for at two revisions, {revisions}; sync them one by one")
        folders = tuple(sorted({*known.subfolders, *wanted.subfolders}))
        self.repos[wanted.repo_id] = replace(known, subfolders=folders, info=known.info or wanted.info)


def make_plan(store: Store, client: HubClient, request: SyncRequest) -> Plan:
    """Turn a request into repositories and folders; asks the Hub for its listings.

    A complete listing also says what is gone: repositories of the same author or base model that the catalog holds and
    the listing lacks are looked at one by one.

    Args:
        store (Store): catalog.
        client (HubClient): connection; not used for local folders.
        request (SyncRequest): what was asked.

    Returns:
        Plan: without repetitions.

    Raises:
        SettingsError: the request is empty or malformed.
        ManifestError: the collection is malformed.
        HubError: a listing cannot be read or is empty, or the Hub is needed and ``HF_HUB_OFFLINE`` is set.
    """
    _check(request)
    plan = Plan()
    manifest = load_manifest(request.collection) if request.collection is not None else None
    for target in parse_targets(request.targets, request.revision):
        if isinstance(target, LocalTarget):
            plan.folders.append(target.path)
        else:
            plan.add(_wanted(target))
    if client.offline and (plan.repos or request.author or request.base_model or manifest):
        raise UnreachableError(
            "HF_HUB_OFFLINE is set, so nothing on the Hub can be synced; unset it, or name local folders only"
        )
    if manifest:
        _add_manifest(plan, store, client, request, manifest)
    if request.author:
        _add_author(plan, store, client, request, request.author)
    if request.base_model:
        _add_base_model(plan, store, client, request, request.base_model)
    return plan


def _check(request: SyncRequest) -> None:
    faults = []
    if not (request.targets or request.author or request.base_model or request.collection is not None):
        faults.append("nothing to sync; name repositories, folders, an author, a base model or a collection")
    faults += [
        f"{name} is {value}, expected at least 1"
        for name, value in (("limit", request.limit), ("workers", request.workers))
        if value is not None and value < 1
    ]
    if faults:
        raise SettingsError("\n".join(faults))


def _wanted(target: HubTarget) -> Wanted:
    return Wanted(target.repo_id, (target.subfolder,), target.revision)


def _add_manifest(plan: Plan, store: Store, client: HubClient, request: SyncRequest, manifest: Manifest) -> None:
    if manifest.author:
        _add_author(plan, store, client, request, manifest.author, manifest)
        return
    for target in manifest.repos[: request.limit]:
        wanted = _wanted(replace(target, revision=target.revision or request.revision))
        plan.add(replace(wanted, task=_task(manifest, target.repo_id), base_model=manifest.base_model))


def _add_author(
    plan: Plan, store: Store, client: HubClient, request: SyncRequest, author: str, manifest: Manifest | None = None
) -> None:
    prefix = f"{author}/{manifest.prefix}".lower() if manifest else ""
    # The Hub cannot filter by prefix, so with one its limit would count repositories that are not wanted.
    pages = client.list_repos(author=author, limit=None if prefix else request.limit)
    found = list(_listed(plan, pages, request.limit, prefix))
    for info in found:
        wanted = _from_listing(info, request)
        if manifest:
            wanted = replace(wanted, task=_task(manifest, info.id), base_model=manifest.base_model)
        _add_listed(plan, wanted)
    known: list[KnownRepo] = []
    if request.limit is None:
        with store.read() as session:
            known = [repo for repo in repos_of_author(session, author) if repo.repo_id.lower().startswith(prefix)]
    _add_unlisted(plan, known)
    if not (found or known or plan.faults):
        raise MissingError(f"the Hub lists no repository {prefix or author + '/'}...; check the spelling")


def _add_base_model(plan: Plan, store: Store, client: HubClient, request: SyncRequest, base_model: str) -> None:
    pages = client.list_repos(tag=f"base_model:adapter:{base_model}", limit=request.limit)
    found = list(_listed(plan, pages, request.limit))
    for info in found:
        _add_listed(plan, _from_listing(info, request))
    known: list[KnownRepo] = []
    if request.limit is None:
        with store.read() as session:
            known = repos_of_base_model(session, base_model)
    _add_unlisted(plan, known)
    if not (found or known or plan.faults):
        raise MissingError(
            f"the Hub lists no adapter of {base_model}; check the spelling, or sync adapters that do not name their "
            "base model by author, id or collection"
        )


def _listed(
    plan: Plan, pages: Iterator[tuple[list[RepoInfo], list[str]]], limit: int | None, prefix: str = ""
) -> Iterator[RepoInfo]:
    """Repositories of a listing, at most ``limit``; malformed entries become faults of the plan."""
    count = 0
    for infos, faults in pages:
        for fault in faults:
            name, _, reason = fault.partition(": ")
            plan.faults.append(Outcome("hub", name, "", None, "failed", reason))
        for info in infos:
            if info.id.lower().startswith(prefix):
                yield info
                count += 1
            if count == limit:
                return


def _from_listing(info: RepoInfo, request: SyncRequest) -> Wanted:
    # A listing tells the commit of the main branch only.
    return Wanted(info.id, revision=request.revision, info=None if request.revision else info)


def _add_listed(plan: Plan, wanted: Wanted) -> None:
    """Add a repository of a listing; for one asked for by name, which may have said more, only the commit is taken."""
    named = plan.repos.get(wanted.repo_id)
    if named is None:
        plan.add(wanted)
    elif named.revision is None:
        plan.repos[wanted.repo_id] = replace(named, info=named.info or wanted.info)


def _add_unlisted(plan: Plan, known: list[KnownRepo]) -> None:
    for repo in known:
        if repo.repo_id not in plan.repos:
            plan.add(Wanted(repo.repo_id, repo.requested_subfolders or ("",), repo.requested_revision))


def _task(manifest: Manifest, repo_id: str) -> str:
    return manifest.tasks.get(repo_id, "")
