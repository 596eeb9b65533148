"""What a worker thread finds out about one repository, and what it fetches of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hub_router.errors import HubError, MissingError
from hub_router.store.known import KnownAdapter
from hub_router.store.repos import AdapterFields
from hub_router.sync.base_model import Fits
from hub_router.sync.client import HubClient
from hub_router.sync.describe import Inspect, describe
from hub_router.sync.discover import NEWEST, AdapterFolder, find_adapters, is_within, unsafe_paths
from hub_router.sync.download import download_adapter
from hub_router.sync.hubrecords import RepoInfo, TreeFile
from hub_router.sync.plan import Wanted
from hub_router.sync.text import plain

_SHOWN = 80


@dataclass(frozen=True)
class Contents:
    """What a repository holds at one commit.

    Args:
        tree (Mapping[str, TreeFile]): every file, by path.
        folders (tuple[AdapterFolder, ...]): adapters in the folders asked for.
        unsafe (int): number of paths that would leave the repository's folder or cannot be kept; never touched.
    """

    tree: Mapping[str, TreeFile]
    folders: tuple[AdapterFolder, ...]
    unsafe: int = 0


def look(
    client: HubClient, info: RepoInfo, within: Sequence[str], asked: Sequence[str], checkpoints: str = NEWEST
) -> Contents:
    """Find the adapters of a repository at a commit; for a gated one, find out whether it lets this user in.

    Args:
        client (HubClient): connection.
        info (RepoInfo): repository and commit.
        within (Sequence[str]): folders asked for now or before, which name the checkpoints to keep.
        asked (Sequence[str]): folders asked for now.
        checkpoints (str): ``newest`` or ``all``.

    Returns:
        Contents: adapters, and the listing to verify downloads against.

    Raises:
        GatedError: no access.
        MissingError: the repository is gone.
        HubError: the Hub cannot be reached, or the commit is gone.
    """
    try:
        tree = client.tree(info.id, info.sha)
    except MissingError:
        # Raises if the repository itself is gone.
        client.repo_info(info.id)
        raise HubError(f"{info.id}: commit {info.sha} is gone, the repository changed just now; sync again") from None
    sizes = {path: file.size for path, file in tree.items()}
    folders = tuple(
        folder
        for folder in find_adapters(sizes, within, checkpoints)
        if any(is_within(folder.subfolder, top) for top in asked)
    )
    first = next((path for folder in folders for path in folder.files), None)
    if info.gated and first is not None:
        client.check_access(info.id, info.sha, first)
    unsafe = unsafe_paths(sizes)
    if unsafe:
        note = f"{len(unsafe)} unsafe paths of the repository ignored, such as {plain(unsafe[0])[:_SHOWN]!r}"
        folders = tuple(replace(folder, notes=(*folder.notes, note)) for folder in folders)
    return Contents(tree, folders, len(unsafe))


def check_access(client: HubClient, info: RepoInfo, adapters: Sequence[KnownAdapter]) -> None:
    """Find out whether a gated repository whose adapters are in the catalog still lets this user in.

    Args:
        client (HubClient): connection.
        info (RepoInfo): repository and commit.
        adapters (Sequence[KnownAdapter]): its adapters.

    Raises:
        GatedError: no access.
        HubError: the Hub cannot be reached.
    """
    path = next((path for adapter in adapters for path in adapter.files), None)
    if path is not None:
        client.check_access(info.id, info.sha, path)


def fetch(
    client: HubClient,
    inspect: Inspect,
    wanted: Wanted,
    info: RepoInfo,
    folder: AdapterFolder,
    contents: Contents,
    fits: Fits | None = None,
) -> AdapterFields:
    """Download, verify and describe one adapter.

    Args:
        client (HubClient): connection.
        inspect (Inspect): reads config and tensors.
        wanted (Wanted): what was asked for.
        info (RepoInfo): repository and commit.
        folder (AdapterFolder): the adapter.
        contents (Contents): the repository's listing.
        fits (Fits | None): compares the adapter with a base model whose config is on this machine.

    Returns:
        AdapterFields: what the catalog stores.

    Raises:
        HubError: a file cannot be downloaded or verified.
    """
    path, files = download_adapter(client, wanted.repo_id, info.sha, folder, contents.tree)
    task = wanted.task_of(folder.subfolder)
    return describe(
        path,
        folder,
        files,
        inspect,
        task=task,
        base_model=wanted.base_model,
        hub=info.card,
        samples=wanted.samples_of(folder.subfolder),
        fits=fits,
    )


def is_on_disk(adapter: KnownAdapter) -> bool:
    """Whether all files of a catalogued adapter are still there with their sizes.

    Args:
        adapter (KnownAdapter): one without files counts as there.
    """
    path = Path(adapter.path)
    top = path.parents[adapter.subfolder.count("/")] if adapter.subfolder else path
    try:
        return all((top / name).stat().st_size == size for name, size in adapter.files.items())
    except OSError:
        return False
