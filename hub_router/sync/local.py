"""Adapters in folders on this machine: found, hashed and used in place.

Each local adapter is a repository of its own, named by its absolute folder; its revision is a hash of its contents.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hub_router.errors import MissingError, UnsupportedAdapterError
from hub_router.formats import describe_names, is_foreign_adapter
from hub_router.sync.discover import CONFIG, CONFIG_BYTES, NEWEST, AdapterFolder, find_adapters
from hub_router.sync.download import HashedFile, hash_file
from hub_router.sync.targets import MAX_PATH, is_safe_path
from hub_router.sync.text import plain

MAX_FILES = 100_000
_SHOWN = 200


@dataclass(frozen=True)
class LocalAdapter:
    """One adapter folder.

    Args:
        path (Path): the folder.
        folder (AdapterFolder): what discovery says about it, paths relative to that folder.
        leaves (bool): a file that it needs is a link to somewhere else.
    """

    path: Path
    folder: AdapterFolder
    leaves: bool = False


def scan(top: Path, checkpoints: str = NEWEST) -> list[LocalAdapter]:
    """Adapters in a folder and below it.

    Args:
        top (Path): absolute folder.
        checkpoints (str): ``newest`` or ``all`` of the folders ``checkpoint-N`` that stand for one adapter.

    Returns:
        list[LocalAdapter]: by path, may be empty; those whose files leave the folder by a link come with a problem, and
            so do those whose path cannot be kept, under a path with escapes; last, folders of other formats, each with
            what it is.

    Raises:
        MissingError: there is no such folder.
        UnsupportedAdapterError: it holds too many files to look through.
        OSError: a folder cannot be read.
    """
    if not top.is_dir():
        raise MissingError(f"no folder {top}")
    sizes, outside, unfit = _walk(top)
    found = [_unfit(top, folder) for folder in unfit]
    for folder in find_adapters(sizes, checkpoints=checkpoints):
        prefix = f"{folder.subfolder}/" if folder.subfolder else ""
        # Cards of parent folders are left out: the adapter is the same whichever folder above it was asked for.
        files = tuple(path.removeprefix(prefix) for path in folder.files if path.startswith(prefix))
        links = [path for path in files if prefix + path in outside]
        problem = f"{links[0]} is a link that leaves {top}" if links else folder.problem
        path = top.joinpath(*folder.subfolder.split("/")) if folder.subfolder else top
        if problem and f"{prefix}{CONFIG}" not in outside and sizes[f"{prefix}{CONFIG}"] <= CONFIG_BYTES:
            problem = "; ".join(part for part in (_config_fault(path / CONFIG), problem) if part)
        found.append(LocalAdapter(path, replace(folder, subfolder="", files=files, problem=problem), bool(links)))
    return found + list(_strays(top, sizes))


def _strays(top: Path, sizes: Mapping[str, int]) -> Iterator[LocalAdapter]:
    """Folders that hold an adapter of another format, or one without its config, each with what it is."""
    names: dict[str, set[str]] = {}
    for path in sizes:
        folder, _, name = path.rpartition("/")
        names.setdefault(folder, set()).add(name)
    for folder in sorted(names):
        if is_foreign_adapter(names[folder]):
            problem = f"no {CONFIG}, found {describe_names(names[folder])}"
            yield LocalAdapter(top / folder, AdapterFolder("", (), problem))


def content_revision(adapter: LocalAdapter) -> tuple[str, tuple[HashedFile, ...]]:
    """Hash an adapter's files.

    Args:
        adapter (LocalAdapter): from :func:`scan`.

    Returns:
        tuple[str, tuple[HashedFile, ...]]: a sha256 over all of its names and contents, and the files; for an adapter
            with a problem, a hash of the problem and no files.
    """
    if adapter.folder.problem:
        return hashlib.sha256(adapter.folder.problem.encode()).hexdigest(), ()
    files = tuple(hash_file(adapter.path / path, path) for path in adapter.folder.files)
    return _digest(files), files


def _config_fault(location: Path) -> str:
    """Why a config is no JSON, empty if it is."""
    try:
        json.loads(location.read_bytes())
    except (ValueError, RecursionError) as error:
        return f"{CONFIG} is not JSON: {' '.join(str(error).split())}"
    return ""


def _unfit(top: Path, folder: str) -> LocalAdapter:
    """What the catalog holds of a folder that it cannot hold."""
    problem = (
        f"the path of this folder within {top} has control characters, a backslash, a drive letter or more than "
        f"{MAX_PATH} characters; rename it, or name a folder further down"
    )
    return LocalAdapter(top / plain(folder)[:_SHOWN], AdapterFolder("", (), problem))


def _digest(files: Sequence[HashedFile]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        digest.update(f"{file.path}\0{file.sha256}\n".encode())
    return digest.hexdigest()


def _walk(top: Path) -> tuple[dict[str, int], set[str], list[str]]:
    """Size of every file by its path from the top, files that are links to somewhere else, and unfit folders.

    A folder is unfit where its path cannot be kept; there it counts if it is an adapter or too deep to look into.
    """
    sizes: dict[str, int] = {}
    outside: set[str] = set()
    unfit: list[str] = []
    home, seen, folders = _home(top), 0, [""]
    # Not os.walk, which calls itself once per level.
    while folders:
        place = folders.pop()
        with os.scandir(top / place) as entries:
            for entry in entries:
                seen += 1
                if seen > MAX_FILES:
                    raise UnsupportedAdapterError(
                        f"{top} holds more than {MAX_FILES} files; name a folder further down"
                    )
                path = f"{place}/{entry.name}" if place else entry.name
                if entry.is_dir(follow_symlinks=False):
                    if len(path) > MAX_PATH:
                        unfit.append(path)
                    elif not entry.name.startswith("."):
                        folders.append(path)
                elif (size := _size(entry)) is None:
                    continue
                elif is_safe_path(path):
                    sizes[path] = size
                    if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(home):
                        outside.add(path)
                elif entry.name == CONFIG:
                    unfit.append(place)
    return sizes, outside, unfit


def _size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of a file; None for what is none: a pipe, a device, a link that leads to no file or nowhere."""
    try:
        info = entry.stat()
    except FileNotFoundError:
        return None
    except OSError:
        # Such as a link to itself.
        if entry.is_symlink():
            return None
        raise
    return info.st_size if stat.S_ISREG(info.st_mode) else None


def _home(top: Path) -> Path:
    """The folder that links must not leave; a snapshot in the Hub cache links to its repository's blobs."""
    for parent in top.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return top
