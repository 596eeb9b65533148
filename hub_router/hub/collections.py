"""Published collections of adapters: which are bundled, what a manifest names, and what of it is in the catalog."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hub_router.settings import Settings
from hub_router.store import schema
from hub_router.store.known import KnownRepo, known_repos, repos_of_author
from hub_router.store.session import open_store
from hub_router.sync import manifest as manifests
from hub_router.sync.discover import is_within
from hub_router.sync.manifest import Manifest, by_folder, member_name
from hub_router.sync.manifestcheck import CONFIDENCE
from hub_router.sync.targets import HubTarget

__all__ = ["CONFIDENCE", "CollectionMember", "bundled_collections", "collection", "collection_faults", "members"]


@dataclass(frozen=True)
class CollectionMember:
    """One entry of a collection.

    Args:
        name (str): ``owner/repo`` or ``owner/repo/subfolder``; a folder may hold several adapters.
        task (str): task that the manifest states.
        confidence (str): how sure the id is: a letter of ``CONFIDENCE``.
        samples (int): number of examples in the manifest.
        catalog (Mapping[str, int]): its adapters in the catalog, counted by status; for a repository that gave none
            the repository's own status. Empty if it was never synced.
    """

    name: str
    task: str
    confidence: str
    samples: int = 0
    catalog: Mapping[str, int] = field(default_factory=dict)


def bundled_collections() -> Sequence[Manifest]:
    """The collections that ship with this release, by name.

    Raises:
        ManifestError: one is malformed.
    """
    return [manifests.load_manifest(path) for path in manifests.bundled_manifests().values()]


def collection(name: str | Path) -> Manifest:
    """One collection.

    Args:
        name (str | Path): name of a bundled collection, or a TOML file.

    Returns:
        Manifest: checked.

    Raises:
        ManifestError: there is none of that name, or it is malformed; lists the names or the faults.
    """
    return manifests.load_manifest(name)


def collection_faults(name: str | Path) -> Sequence[str]:
    """Everything wrong with a manifest.

    Args:
        name (str | Path): name of a bundled collection, or a TOML file.

    Returns:
        Sequence[str]: one line each; empty for a manifest that can be synced.
    """
    return manifests.manifest_faults(name)


def members(
    manifest: Manifest, home: str | Path | None = None, database_url: str | None = None
) -> Sequence[CollectionMember]:
    """The entries of a collection, with what the catalog holds of each; asks nothing of the Hub.

    Args:
        manifest (Manifest): from :func:`collection`.
        home (str | Path | None): as for :class:`hub_router.hub.Hub`; a catalog that does not exist is not created.
        database_url (str | None): as for :class:`hub_router.hub.Hub`.

    Returns:
        Sequence[CollectionMember]: in the manifest's order. Where a pattern names the members, those in the catalog.

    Raises:
        SchemaError: the database belongs to another release.
        StoreError: the database cannot be opened.
    """
    known = _known(manifest, Settings.resolve(home, database_url).database_url)
    targets = manifest.repos or tuple(HubTarget(name) for name in sorted(known))
    confidences, tasks = manifest.confidences(), by_folder(manifest.tasks)
    found = []
    for target in targets:
        name = member_name(target)
        repo = known.get(target.repo_id)
        found.append(
            CollectionMember(
                name,
                tasks.get(target.repo_id, {}).get(target.subfolder, ""),
                confidences.get(name, manifest.confidence),
                len(manifest.samples.get(name, ())),
                _statuses(repo, target.subfolder) if repo else {},
            )
        )
    return found


def _known(manifest: Manifest, database_url: str) -> Mapping[str, KnownRepo]:
    """The repositories of a collection that the catalog holds, by the id that the manifest gives."""
    if schema.status(database_url).state == "empty":
        return {}
    with open_store(database_url) as store, store.read() as session:
        if manifest.author:
            prefix = manifest.pattern.lower()
            of_author = repos_of_author(session, manifest.author)
            return {repo.repo_id: repo for repo in of_author if repo.repo_id.lower().startswith(prefix)}
        known = known_repos(session, "hub", [target.repo_id for target in manifest.repos])
        moved = known_repos(session, "hub", [repo.renamed_to for repo in known.values() if repo.renamed_to])
    return {name: moved.get(repo.renamed_to or "", repo) for name, repo in known.items()}


def _statuses(repo: KnownRepo, top: str) -> Mapping[str, int]:
    rows = Counter(row.status for row in repo.adapters if is_within(row.subfolder, top))
    if rows:
        return dict(sorted(rows.items()))
    if repo.state not in ("ok", "renamed"):
        return {repo.state: 1}
    asked = any(is_within(top, folder) for folder in repo.requested_subfolders)
    return {"missing": 1} if asked else {}
