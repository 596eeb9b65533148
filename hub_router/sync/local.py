"""Adapters in folders on this machine: found, hashed and used in place.

Each local adapter is a repository of its own, named by its absolute folder; its revision is a hash of its contents.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hub_router.errors import MissingError, UnsupportedAdapterError
from hub_router.sync.discover import CONFIG, CONFIG_BYTES, NEWEST, AdapterFolder, find_adapters
from hub_router.sync.download import HashedFile, hash_file

MAX_FILES = 100_000


@dataclass(frozen=True)
class LocalAdapter:
    """One adapter folder: its path, and what discovery says about it (paths relative to that folder)."""

    path: Path
    folder: AdapterFolder


def scan(top: Path, checkpoints: str = NEWEST) -> list[LocalAdapter]:
    """Adapters in a folder and below it.

    Args:
        top (Path): absolute folder.
        checkpoints (str): ``newest`` or ``all`` of the folders ``checkpoint-N`` that stand for one adapter.

    Returns:
        list[LocalAdapter]: by path, may be empty; those whose files leave the folder by a link come with a problem.

    Raises:
        MissingError: there is no such folder.
        UnsupportedAdapterError: it holds too many files to look through.
        OSError: a folder cannot be read.
    """
    if not top.is_dir():
        raise MissingError(f"no folder {top}")
    sizes, outside = _walk(top)
    found = []
    for folder in find_adapters(sizes, checkpoints=checkpoints):
        prefix = f"{folder.subfolder}/" if folder.subfolder else ""
        # Cards of parent folders are left out: the adapter is the same whichever folder above it was asked for.
        files = tuple(path.removeprefix(prefix) for path in folder.files if path.startswith(prefix))
        links = [path for path in files if prefix + path in outside]
        problem = f"{links[0]} is a link that leaves {top}" if links else folder.problem
        path = top.joinpath(*folder.subfolder.split("/")) if folder.subfolder else top
        if problem and f"{prefix}{CONFIG}" not in outside and sizes[f"{prefix}{CONFIG}"] <= CONFIG_BYTES:
            problem = "; ".join(part for part in (_config_fault(path / CONFIG), problem) if part)
        found.append(LocalAdapter(path, replace(folder, subfolder="", files=files, problem=problem)))
    return found


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


def _digest(files: Sequence[HashedFile]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        digest.update(f"{file.path}\0{file.sha256}\n".encode())
    return digest.hexdigest()


def _walk(top: Path) -> tuple[dict[str, int], set[str]]:
    """Size of every file by its path from the top, and the files that are links to somewhere else."""
    sizes: dict[str, int] = {}
    outside: set[str] = set()
    home = _home(top)
    for root, folders, names in os.walk(top, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        place = Path(root)
        for name in names:
            location = place / name
            path = location.relative_to(top).as_posix()
            try:
                info = location.stat()
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(info.st_mode):
                continue
            sizes[path] = info.st_size
            if location.is_symlink() and not location.resolve().is_relative_to(home):
                outside.add(path)
        if len(sizes) > MAX_FILES:
            raise UnsupportedAdapterError(f"{top} holds more than {MAX_FILES} files; name a folder further down")
    return sizes, outside


def _home(top: Path) -> Path:
    """The folder that links must not leave; a snapshot in the Hub cache links to its repository's blobs."""
    for parent in top.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return top


def _raise(error: OSError) -> None:
    raise error
