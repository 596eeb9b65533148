"""Verified download: every file's contents are hashed and compared with the hash that the Hub states.

The client library compares sizes only, so a flipped byte would stay in the Hub cache for good. A file that differs is
removed from the cache, blob and link, and fetched once more.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hub_router.errors import CorruptFileError, HubError
from hub_router.sync.client import HubClient
from hub_router.sync.discover import AdapterFolder
from hub_router.sync.hubrecords import TreeFile

_BLOCK = 1 << 20


@dataclass(frozen=True)
class HashedFile:
    """A file whose contents were read and hashed.

    Args:
        path (str): path from the top of the repository or local folder.
        size (int): bytes.
        sha256 (str): of the contents.
        git_sha1 (str): id that git gives a blob of these contents.
        hub_hash (str | None): the hash that the Hub states and that was found equal; None for local files.
    """

    path: str
    size: int
    sha256: str
    git_sha1: str
    hub_hash: str | None = None


def hash_file(location: Path, path: str, hub_hash: str | None = None) -> HashedFile:
    """Read a file and hash it both ways.

    Args:
        location (Path): the file.
        path (str): its name in the result.
        hub_hash (str | None): recorded in the result as it is.

    Returns:
        HashedFile: what was read.
    """
    with location.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        while block := stream.read(_BLOCK):
            sha256.update(block)
            git.update(block)
    return HashedFile(path, size, sha256.hexdigest(), git.hexdigest(), hub_hash)


def download_adapter(
    client: HubClient, repo_id: str, sha: str, folder: AdapterFolder, tree: Mapping[str, TreeFile]
) -> tuple[Path, tuple[HashedFile, ...]]:
    """Bring one adapter's files into the Hub cache and verify them.

    Args:
        client (HubClient): connection.
        repo_id (str): ``owner/repo``.
        sha (str): commit.
        folder (AdapterFolder): the files needed; not empty.
        tree (Mapping[str, TreeFile]): what the Hub states about them.

    Returns:
        tuple[Path, tuple[HashedFile, ...]]: the adapter's folder in the cache, and its files.

    Raises:
        CorruptFileError: a file's contents differ from the Hub's hash, twice.
        HubError: a file cannot be downloaded.
    """
    files = []
    top = Path()
    for path in folder.files:
        location, hashed = _verified(client, repo_id, sha, tree[path])
        files.append(hashed)
        top = location.parents[path.count("/")]
    return top.joinpath(*folder.subfolder.split("/")), tuple(files)


def _verified(client: HubClient, repo_id: str, sha: str, file: TreeFile) -> tuple[Path, HashedFile]:
    if not file.hub_hash:
        raise HubError(f"{repo_id}: {file.path}: the Hub states no hash, so the file cannot be verified")
    kind = "sha256" if file.lfs else "git blob sha1"
    for _ in range(2):
        location = client.download(repo_id, sha, file.path)
        hashed = hash_file(location, file.path, file.hub_hash)
        found = hashed.sha256 if file.lfs else hashed.git_sha1
        if found == file.hub_hash:
            return location, hashed
        _discard(location)
    raise CorruptFileError(
        f"{repo_id}: {file.path}: {kind} is {found} ({hashed.size} bytes), the Hub states {file.hub_hash} "
        f"({file.size} bytes); downloaded twice, not kept"
    )


def _discard(link: Path) -> None:
    """Remove a file of the Hub cache and every link on the way to it."""
    chain = [link]
    while chain[-1].is_symlink():
        chain.append(chain[-1].parent / chain[-1].readlink())
    for entry in chain:
        entry.unlink(missing_ok=True)
