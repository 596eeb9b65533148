"""A folder seen as a Hub repository: its files with the hashes the Hub would state, its commit, and its tags."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt")
_POINTER_SIZE = 134  # a typical size of an LFS pointer file


@dataclass(frozen=True)
class ServedFile:
    """One file of a repository.

    Args:
        path (str): path in the repository, ``/``-separated.
        location (Path): the file on disk.
        size (int): bytes.
        git_oid (str): sha1 of the git blob (of the file itself, also where git would store an LFS pointer).
        sha256 (str | None): sha256 of the contents for LFS files, else None.
    """

    path: str
    location: Path
    size: int
    git_oid: str
    sha256: str | None

    @property
    def etag(self) -> str:
        """What the Hub sends as ETag: sha256 of LFS files, git blob sha1 of others."""
        return self.sha256 or self.git_oid

    def tree_entry(self) -> dict[str, object]:
        """The entry in a ``tree`` or ``paths-info`` answer."""
        entry: dict[str, object] = {"type": "file", "path": self.path, "size": self.size, "oid": self.git_oid}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": _POINTER_SIZE}
        return entry

    def sibling(self, blobs: bool) -> dict[str, object]:
        """The entry in a model's ``siblings``; with ``blobs`` it carries sizes and hashes."""
        entry: dict[str, object] = {"rfilename": self.path}
        if blobs:
            entry |= {"size": self.size, "blobId": self.git_oid}
            if self.sha256:
                entry["lfs"] = {"sha256": self.sha256, "size": self.size, "pointerSize": _POINTER_SIZE}
        return entry


@dataclass(frozen=True)
class ServedRepo:
    """The state of one repository at one commit.

    Args:
        id (str): ``owner/name``.
        files (dict[str, ServedFile]): by path, sorted.
        modified (float): newest modification time of its files, seconds since the epoch.
    """

    id: str
    files: dict[str, ServedFile]
    modified: float

    @cached_property
    def sha(self) -> str:
        """Commit id: a hash of all paths and contents, so a renamed repository keeps it and a changed one does not."""
        digest = hashlib.sha1(usedforsecurity=False)
        for file in self.files.values():
            digest.update(f"\0{file.path}\0{file.etag}".encode())
        return digest.hexdigest()

    @cached_property
    def card(self) -> dict[str, str | list[str]]:
        """Front matter of README.md: scalars and flat lists."""
        readme = self.files.get("README.md")
        return front_matter(readme.location.read_text(encoding="utf-8", errors="replace")) if readme else {}

    @cached_property
    def tags(self) -> list[str]:
        """Tags as the Hub computes them from the card and the file names."""
        tags = list(_values(self.card, "tags"))
        adapter = any(path.rsplit("/", 1)[-1] == "adapter_config.json" for path in self.files)
        tags += ["peft"] if adapter else []
        tags += ["safetensors"] if any(path.endswith(".safetensors") for path in self.files) else []
        tags += [f"dataset:{name}" for name in _values(self.card, "datasets")]
        for base in _values(self.card, "base_model"):
            tags += [f"base_model:{base}", *([f"base_model:adapter:{base}"] if adapter else [])]
        tags += [f"license:{name}" for name in _values(self.card, "license")]
        return [*dict.fromkeys(tags), "region:us"]

    def info(self, gated: bool, blobs: bool = False) -> dict[str, object]:
        """Everything that ``/api/models/{id}`` says about the repository."""
        stamp = datetime.fromtimestamp(self.modified, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        return {
            "_id": self.sha[:24],
            "id": self.id,
            "modelId": self.id,
            "author": self.id.split("/")[0],
            "sha": self.sha,
            "lastModified": stamp,
            "createdAt": stamp,
            "private": False,
            "gated": "manual" if gated else False,
            "disabled": False,
            "downloads": int(self.sha[:4], 16),
            "likes": int(self.sha[4:6], 16),
            "tags": self.tags,
            "library_name": "peft" if "peft" in self.tags else "transformers",
            "pipeline_tag": _first(self.card, "pipeline_tag"),
            "cardData": self.card,
            "siblings": [file.sibling(blobs) for file in self.files.values()],
        }


class RepoShelf:
    """The repositories under one folder, read again when their files change.

    Args:
        root (Path): holds ``<owner>/<repo>/...``; a folder ``<owner>/<repo>@<branch>`` is another branch of that repo.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._cache: dict[str, tuple[object, ServedRepo]] = {}

    def ids(self) -> list[str]:
        """All repository ids, sorted, without branches."""
        owners = sorted(entry for entry in self.root.iterdir() if entry.is_dir())
        return [
            f"{owner.name}/{repo}"
            for owner in owners
            for repo in sorted(entry.name for entry in os.scandir(owner) if entry.is_dir() and "@" not in entry.name)
        ]

    def branches(self, repo_id: str) -> list[str]:
        """Branch names of a repository, ``main`` first."""
        folder = self.root / repo_id
        return ["main", *sorted(entry.name.split("@", 1)[1] for entry in folder.parent.glob(f"{folder.name}@*"))]

    def get(self, repo_id: str, revision: str = "main") -> ServedRepo | None:
        """A repository at a branch or commit; None where there is none.

        Args:
            repo_id (str): ``owner/name``.
            revision (str): branch, or the commit id that a branch has now.
        """
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id):
            return None
        if revision == "main":
            return self._read(repo_id, self.root / repo_id)
        for branch in self.branches(repo_id):
            folder = self.root / (repo_id if branch == "main" else f"{repo_id}@{branch}")
            repo = self._read(repo_id, folder)
            if repo is not None and revision in (branch, repo.sha):
                return repo
        return None

    def _read(self, repo_id: str, folder: Path) -> ServedRepo | None:
        """The repository in a folder; hashes are kept until a file's size or time changes."""
        if not folder.is_dir():
            return None
        found = sorted(_walk(folder, ""))
        seen = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in found]
        with self._lock:
            cached = self._cache.get(str(folder))
        if cached and cached[0] == seen:
            return cached[1]
        files = {path: _served(path, folder / path) for path, _ in found}
        repo = ServedRepo(repo_id, files, max((stat.st_mtime for _, stat in found), default=0.0))
        with self._lock:
            self._cache[str(folder)] = (seen, repo)
        return repo


def front_matter(text: str) -> dict[str, str | list[str]]:
    """Scalars and flat lists of a card's front matter; enough for the cards that are served here.

    Args:
        text (str): contents of a README.md.

    Returns:
        dict[str, str | list[str]]: empty where there is no front matter.
    """
    match = re.match(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", text, re.DOTALL)
    found: dict[str, str | list[str]] = {}
    key = ""
    for line in match[1].splitlines() if match else ():
        item = re.match(r"\s*-\s+(.*)", line)
        pair = re.match(r"(\w+):\s*(.*)", line)
        if item and key:
            before = found.get(key)
            found[key] = [*(before if isinstance(before, list) else []), _unquoted(item[1])]
        elif pair:
            key, value = pair[1], pair[2].strip()
            inline = re.fullmatch(r"\[(.*)\]", value)
            if inline:
                found[key] = [_unquoted(part) for part in inline[1].split(",") if part.strip()]
            elif value:
                found[key] = _unquoted(value)
    return found


def _unquoted(text: str) -> str:
    return text.strip().strip("'\"")


def _values(card: dict[str, str | list[str]], key: str) -> list[str]:
    value = card.get(key, [])
    return value if isinstance(value, list) else [value]


def _first(card: dict[str, str | list[str]], key: str) -> str | None:
    return next(iter(_values(card, key)), None)


def _walk(folder: Path, prefix: str) -> list[tuple[str, os.stat_result]]:
    found: list[tuple[str, os.stat_result]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found += _walk(Path(entry.path), f"{prefix}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                found.append((prefix + entry.name, entry.stat()))
    return found


def _served(path: str, location: Path) -> ServedFile:
    size = location.stat().st_size
    git = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    sha256 = hashlib.sha256()
    with location.open("rb") as stream:
        while block := stream.read(1 << 20):
            git.update(block)
            sha256.update(block)
    lfs = path.endswith(LFS_SUFFIXES)
    return ServedFile(path, location, size, git.hexdigest(), sha256.hexdigest() if lfs else None)
