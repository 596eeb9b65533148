"""The pool of a training run: adapters of a collection, what their samples are, and what no run can do with them."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hub_router.errors import NotInCatalogError, TrainingError
from hub_router.store import adapters as adapter_queries
from hub_router.store.known import KnownRepo, known_repos, repos_of_author
from hub_router.store.session import Store

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from hub_router.records import AdapterRecord, Sample
    from hub_router.sync.manifest import Manifest

_LOG = logging.getLogger(__name__)
_NAMED = 10


def collection_pool(store: Store, name: str | Path) -> list[AdapterRecord]:
    """The adapters of a collection that the catalog holds; asks nothing of the Hub.

    Those that a sync refused (gated, unsupported, gone) are left out with a warning.

    Args:
        store (Store): catalog.
        name (str | Path): name of a bundled collection, or a TOML file.

    Returns:
        list[AdapterRecord]: in the manifest's order; where a pattern names the members, by name.

    Raises:
        ManifestError: there is no such collection, or it is malformed.
        NotInCatalogError: members were never synced, or none can be used; names the command.
    """
    from hub_router.sync.manifest import load_manifest

    manifest = load_manifest(name)
    with store.read() as session:
        ready, refused, unknown = _standing(session, manifest)
        records = [adapter_queries.find(session, ref) for ref in ready]
    command = f"hub-router sync --collection {shlex.quote(str(name))}"
    if unknown:
        every = f"{len(unknown)} of {len(ready) + len(refused) + len(unknown)} adapters"
        raise NotInCatalogError(
            f"{every} of collection {manifest.name!r} are not in the catalog: {_some(unknown)}; run: {command}"
        )
    if not records:
        what = f"those there are were refused: {_some(refused)}" if refused else "it holds none"
        raise NotInCatalogError(
            f"the catalog holds no adapter of collection {manifest.name!r} ({what}); run: {command}"
        )
    if refused:
        _LOG.warning("collection %s: left out, for a sync refused them: %s", manifest.name, _some(refused))
    return records


def _standing(session: Session, manifest: Manifest) -> tuple[list[str], list[str], list[str]]:
    """References of the adapters that can be used, and members that were refused, or never synced."""
    from hub_router.sync.discover import is_within
    from hub_router.sync.manifest import member_name
    from hub_router.sync.targets import HubTarget

    if manifest.author:
        prefix = manifest.pattern.lower()
        known = {each.repo_id: each for each in repos_of_author(session, manifest.author)}
        known = {name: each for name, each in sorted(known.items()) if name.lower().startswith(prefix)}
        targets: Sequence[HubTarget] = [HubTarget(name) for name in known]
    else:
        targets = manifest.repos
        known = _known(session, [target.repo_id for target in targets])
    ready: list[str] = []
    refused, unknown = [], []
    for target in targets:
        repo = known.get(target.repo_id)
        rows = [] if repo is None else [row for row in repo.adapters if is_within(row.subfolder, target.subfolder)]
        usable = [row.subfolder for row in rows if row.status == "ready"]
        if repo is not None and usable:
            ready += [f"{repo.repo_id}/{folder}" if folder else repo.repo_id for folder in usable]
        elif repo is not None and (rows or repo.state != "ok" or _asked(repo, target.subfolder)):
            refused.append(member_name(target))
        else:
            unknown.append(member_name(target))
    return list(dict.fromkeys(ready)), refused, unknown


def _asked(repo: KnownRepo, top: str) -> bool:
    """Whether a sync looked for a folder, and found nothing there."""
    from hub_router.sync.discover import is_within

    return not top or any(is_within(top, folder) for folder in repo.requested_subfolders)


def _known(session: Session, names: Sequence[str]) -> dict[str, KnownRepo]:
    """Repositories by the id that the manifest gives, also those that were renamed since."""
    known = known_repos(session, "hub", names)
    moved = known_repos(session, "hub", [repo.renamed_to for repo in known.values() if repo.renamed_to])
    return {name: moved.get(repo.renamed_to or "", repo) for name, repo in known.items()}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def refuse_doubles(members: Mapping[str, AdapterRecord]) -> None:
    """Refuse a pool that has an adapter under two names: a set could not hold both.

    Args:
        members (Mapping[str, AdapterRecord]): by name in the pool.

    Raises:
        TrainingError: names all of them.
    """
    names: dict[int, list[str]] = {}
    for name, record in members.items():
        names.setdefault(record.id, []).append(name)
    doubled = [" and ".join(each) for each in names.values() if len(each) > 1]
    if doubled:
        raise TrainingError(f"one adapter stands in the pool under several names: {'; '.join(doubled)}; name it once")


def samples_of(session: Session, members: Mapping[str, AdapterRecord]) -> dict[str, list[Sample]]:
    """The catalog's samples of a pool's tasks.

    Args:
        session (Session): a reading session.
        members (Mapping[str, AdapterRecord]): by name in the pool.

    Returns:
        dict[str, list[Sample]]: by name; those held out for tests are not among them.
    """
    return {name: list(adapter_queries.samples(session, record.id, split="sample")) for name, record in members.items()}
