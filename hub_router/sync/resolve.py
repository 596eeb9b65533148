"""From ids to commits with few requests: many repositories of one author are read from a listing.

The Hub allows 500 API requests in five minutes without a token, so a collection of 900 repositories cannot be asked for
one by one; a page of an author's listing tells the commits of up to a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from hub_router.errors import HubError, MissingError, NoSuchRevisionError
from hub_router.sync.client import HubClient
from hub_router.sync.hubrecords import RepoInfo
from hub_router.sync.plan import Wanted
from hub_router.sync.pool import WorkerPool

# From this many repositories of one author on, its listing is read instead.
GROUP = 4


def resolve(
    client: HubClient, pool: WorkerPool, wanted: Iterable[Wanted], advance: Callable[[int], None]
) -> dict[str, RepoInfo | HubError]:
    """The present commit of every repository.

    Args:
        client (HubClient): connection.
        pool (WorkerPool): threads; must be idle.
        wanted (Iterable[Wanted]): repositories; those that a listing described cost no request.
        advance (Callable[[int], None]): told the number of repositories settled.

    Returns:
        dict[str, RepoInfo | HubError]: by the id that was asked for. A MissingError says that the repository is
            gone, a NoSuchRevisionError that only the revision is.
    """
    found: dict[str, RepoInfo | HubError] = {}
    single: list[Wanted] = []
    groups: dict[str, list[str]] = {}
    for entry in wanted:
        if entry.info is not None:
            found[entry.repo_id] = entry.info
        elif entry.revision is not None:
            single.append(entry)
        else:
            groups.setdefault(entry.repo_id.split("/")[0], []).append(entry.repo_id)
    for author, ids in groups.items():
        if len(ids) < GROUP:
            single += [Wanted(repo_id) for repo_id in ids]
        else:
            pool.submit(author, partial(_from_listing, client, author, set(ids)))
    advance(len(found))
    for author, listed, error in pool.results():
        # Whatever the listing did not tell is asked for by name, where a failure gets its reason.
        told = {} if isinstance(error, HubError) else _value(listed, error)
        found |= told
        single += [Wanted(repo_id) for repo_id in groups[author] if repo_id not in told]
        advance(len(told))
    for entry in single:
        pool.submit(entry.repo_id, partial(_by_name, client, entry))
    for repo_id, info, error in pool.results():
        found[repo_id] = error if isinstance(error, HubError) else _value(info, error)
        advance(1)
    return found


def _value(value: Any, error: BaseException | None) -> Any:
    if error is not None:
        raise error
    return value


def _from_listing(client: HubClient, author: str, ids: set[str]) -> dict[str, RepoInfo]:
    """Commits from an author's listing; never more pages than asking one by one would cost requests."""
    found: dict[str, RepoInfo] = {}
    for number, (infos, _faults) in enumerate(client.list_repos(author=author), 1):
        found |= {info.id: info for info in infos if info.id in ids}
        if len(found) == len(ids) or number == len(ids):
            break
    return found


def _by_name(client: HubClient, wanted: Wanted) -> RepoInfo:
    try:
        return client.repo_info(wanted.repo_id, wanted.revision)
    except MissingError:
        if wanted.revision is None:
            raise
        # Raises if the repository itself is gone.
        client.repo_info(wanted.repo_id)
        raise NoSuchRevisionError(f"{wanted.repo_id}: no such revision: {wanted.revision}") from None
