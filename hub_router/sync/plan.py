"""What a request means: which repositories and folders are to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from hub_router.errors import MissingError, SettingsError, UnreachableError
from hub_router.records import Sample
from hub_router.store.known import KnownRepo, repos_of_author, repos_of_base_model
from hub_router.store.runs import Outcome
from hub_router.store.session import Store
from hub_router.sync.client import HubClient
from hub_router.sync.discover import ALL, NEWEST
from hub_router.sync.hubrecords import RepoInfo
from hub_router.sync.manifest import Manifest, by_folder, load_manifest
from hub_router.sync.targets import HubTarget, LocalTarget, parse_targets

Value = TypeVar("Value")


@dataclass(frozen=True)
class SyncRequest:
    """What to sync.

    Args:
        targets (tuple[str | Path, ...]): ``owner/repo``, ``owner/repo/subfolder``, ``owner/repo@revision``, folders.
        author (str | None): also all repositories of this user or organisation.
        base_model (str | None): also all adapters that the Hub lists for this base model.
        collection (str | Path | None): also the members of a manifest: a bundled name or a TOML file.
        limit (int | None): at most this many repositories of each listing, most downloaded first, and at most this
            many members of a manifest that lists them, in its order.
        revision (str | None): branch, tag or commit, for repositories that name none.
        workers (int): threads that ask the Hub and download.
        dry_run (bool): find out what would be done; nothing is downloaded or written.
        checkpoints (str): of folders ``checkpoint-N`` that stand for one adapter, the ``newest`` or ``all``; once all
            of a repository's were asked for, its later runs look at all of them.
    """

    targets: tuple[str | Path, ...] = ()
    author: str | None = None
    base_model: str | None = None
    collection: str | Path | None = None
    limit: int | None = None
    revision: str | None = None
    workers: int = 8
    dry_run: bool = False
    checkpoints: str = NEWEST

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
        tasks (Mapping[str, str]): tasks that a manifest states, by folder.
        samples (Mapping[str, tuple[Sample, ...]]): examples that a manifest states, by folder.
        base_model (str | None): base model that a manifest states.
    """

    repo_id: str
    subfolders: tuple[str, ...] = ("",)
    revision: str | None = None
    info: RepoInfo | None = None
    tasks: Mapping[str, str] = field(default_factory=dict)
    samples: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)
    base_model: str | None = None

    def task_of(self, subfolder: str) -> str:
        """The task stated for a folder, or else for the nearest folder above it; empty where there is none."""
        return _nearest(self.tasks, subfolder, "")

    def samples_of(self, subfolder: str) -> tuple[Sample, ...]:
        """The examples stated for a folder, or else for the nearest folder above it."""
        return _nearest(self.samples, subfolder, ())


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
        self.repos[wanted.repo_id] = replace(_stated_by(known, wanted), subfolders=folders)


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
    if request.checkpoints not in (NEWEST, ALL):
        faults.append(f"checkpoints is {request.checkpoints!r}, expected {NEWEST!r} or {ALL!r}")
    if faults:
        raise SettingsError("\n".join(faults))


def _wanted(target: HubTarget) -> Wanted:
    return Wanted(target.repo_id, (target.subfolder,), target.revision)


def _add_manifest(plan: Plan, store: Store, client: HubClient, request: SyncRequest, manifest: Manifest) -> None:
    if manifest.author:
        _add_author(plan, store, client, request, manifest.author, manifest)
        return
    state = _statement(manifest)
    folders: dict[tuple[str, str | None], list[str]] = {}
    for target in manifest.repos[: request.limit]:
        folders.setdefault((target.repo_id, target.revision or request.revision), []).append(target.subfolder)
    for (repo_id, revision), subfolders in folders.items():
        plan.add(state(Wanted(repo_id, tuple(sorted(subfolders)), revision)))


def _add_author(
    plan: Plan, store: Store, client: HubClient, request: SyncRequest, author: str, manifest: Manifest | None = None
) -> None:
    prefix = manifest.pattern.lower() if manifest else ""
    state = _statement(manifest)
    # The Hub cannot filter by prefix, so with one its limit would count repositories that are not wanted.
    pages = client.list_repos(author=author, limit=None if prefix else request.limit)
    found = list(_listed(plan, pages, request.limit, prefix))
    for info in found:
        _add_listed(plan, state(_from_listing(info, request)))
    known: list[KnownRepo] = []
    if request.limit is None:
        with store.read() as session:
            known = [repo for repo in repos_of_author(session, author) if repo.repo_id.lower().startswith(prefix)]
    _add_unlisted(plan, known, state)
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
    _add_unlisted(plan, known, _statement(None))
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
    """Add a repository of a listing; one asked for by name stays as it was asked for, and learns what is stated."""
    named = plan.repos.get(wanted.repo_id)
    if named is None:
        plan.add(wanted)
    elif named.revision is None:
        plan.repos[wanted.repo_id] = _stated_by(named, wanted)


def _add_unlisted(plan: Plan, known: list[KnownRepo], state: Callable[[Wanted], Wanted]) -> None:
    for repo in known:
        if repo.repo_id not in plan.repos:
            plan.add(state(Wanted(repo.repo_id, repo.requested_subfolders or ("",), repo.requested_revision)))


def _statement(manifest: Manifest | None) -> Callable[[Wanted], Wanted]:
    """What adds to a repository all that a manifest states about it."""
    if manifest is None:
        return lambda wanted: wanted
    tasks, samples = by_folder(manifest.tasks), by_folder(manifest.samples)
    return lambda wanted: replace(
        wanted,
        tasks=tasks.get(wanted.repo_id, {}),
        samples=samples.get(wanted.repo_id, {}),
        base_model=manifest.base_model,
    )


def _stated_by(known: Wanted, wanted: Wanted) -> Wanted:
    """A repository with the commit, tasks, samples and base model that another mention of it adds."""
    return replace(
        known,
        info=known.info or wanted.info,
        tasks={**wanted.tasks, **known.tasks},
        samples={**wanted.samples, **known.samples},
        base_model=known.base_model or wanted.base_model,
    )


def _nearest(values: Mapping[str, Value], folder: str, default: Value) -> Value:
    while folder and folder not in values:
        folder = folder.rpartition("/")[0]
    return values.get(folder, default)
