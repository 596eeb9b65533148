"""What the Hub says about repositories and files, read from its JSON without trusting any of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hub_router.sync.card import Card, hub_card
from hub_router.sync.targets import is_repo_id

_SHA = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class RepoInfo:
    """A repository as the Hub describes it.

    Args:
        id (str): ``owner/repo``, the present one where the repository was renamed.
        sha (str): commit.
        gated (bool): whether files need an accepted licence.
        last_modified (datetime | None): time of the last commit.
        downloads (int | None): downloads of the last 30 days.
        likes (int | None): likes.
        card (Card): licence and tags that the Hub states.
    """

    id: str
    sha: str
    gated: bool = False
    last_modified: datetime | None = None
    downloads: int | None = None
    likes: int | None = None
    card: Card = field(default_factory=Card)


@dataclass(frozen=True)
class TreeFile:
    """A file in a repository's listing.

    Args:
        path (str): as the Hub wrote it; may be unsafe.
        size (int): bytes.
        hub_hash (str): sha256 of LFS files, git blob sha1 of others; empty if the Hub states none.
        lfs (bool): which of the two.
    """

    path: str
    size: int
    hub_hash: str
    lfs: bool


def parse_repo_info(item: Any) -> RepoInfo | None:
    """A repository from an item of ``/api/models``.

    Args:
        item (Any): decoded JSON.

    Returns:
        RepoInfo | None: None if it has no usable id and commit; other values of wrong types count as missing.
    """
    if not isinstance(item, dict):
        return None
    name, sha = item.get("id"), item.get("sha")
    if not isinstance(name, str) or not is_repo_id(name) or not isinstance(sha, str) or not _SHA.fullmatch(sha):
        return None
    return RepoInfo(
        id=name,
        sha=sha,
        gated=item.get("gated") not in (None, False, "false", "False"),
        last_modified=_time(item.get("lastModified")),
        downloads=_count(item.get("downloads")),
        likes=_count(item.get("likes")),
        card=hub_card(item.get("cardData"), item.get("tags")),
    )


def parse_tree_file(entry: Any) -> TreeFile | None:
    """A file from an entry of ``/api/models/{id}/tree``.

    Args:
        entry (Any): decoded JSON.

    Returns:
        TreeFile | None: None for folders and malformed entries.
    """
    if not isinstance(entry, dict) or entry.get("type") != "file":
        return None
    path, size, lfs = entry.get("path"), _count(entry.get("size")), entry.get("lfs")
    if not isinstance(path, str) or size is None:
        return None
    stated = lfs.get("oid") if isinstance(lfs, dict) else entry.get("oid")
    stated = stated if isinstance(stated, str) and _SHA.fullmatch(stated) else ""
    return TreeFile(path, size, stated, isinstance(lfs, dict))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _time(value: object) -> datetime | None:
    try:
        found = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return found if found and found.tzinfo else None
