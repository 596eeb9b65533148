"""What a user asks to sync, parsed: ``owner/repo``, ``owner/repo/sub/folder``, ``owner/repo@revision``, or a folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hub_router.errors import SettingsError
from hub_router.sync.text import is_plain

# One part of a repository id, as the Hub allows it.
_PART = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[\w-])?", re.ASCII)
# What the catalog holds of a path, and what file systems hold of a name, in bytes.
MAX_PATH = 1000
_MAX_NAME = 255
_EXPECTED = "expected owner/repo, owner/repo/subfolder, owner/repo@revision or an existing folder"


@dataclass(frozen=True)
class HubTarget:
    """A repository on the Hub, or one folder of it.

    Args:
        repo_id (str): ``owner/repo``.
        subfolder (str): folder inside the repository, empty for all of it.
        revision (str | None): branch, tag or commit; None for the main branch.
    """

    repo_id: str
    subfolder: str = ""
    revision: str | None = None


@dataclass(frozen=True)
class LocalTarget:
    """A folder on this machine that is an adapter or holds adapters; ``path`` is absolute."""

    path: Path


Target = HubTarget | LocalTarget


def is_repo_id(text: str) -> bool:
    """Whether a text has the form ``owner/repo`` of a Hub id."""
    parts = text.split("/")
    return len(parts) == 2 and all(_PART.fullmatch(part) for part in parts)


def is_safe_path(path: str) -> bool:
    """Whether a path from outside stays inside the folder it is relative to, on every platform, and can be kept.

    Args:
        path (str): ``/``-separated path of a file in a repository or of a subfolder.
    """
    if "\\" in path or re.match(r"[A-Za-z]:", path) or len(path) > MAX_PATH or not is_plain(path):
        return False
    return all(part not in ("", ".", "..") and len(part.encode()) <= _MAX_NAME for part in path.split("/"))


def parse_target(given: str | Path, revision: str | None = None) -> Target:
    """Parse one target; a text that names an existing folder is that folder.

    Args:
        given (str | Path): what the user wrote; a ``Path`` is always a folder.
        revision (str | None): revision for a repository that names none itself.

    Returns:
        Target: repository or folder; a folder need not exist where it is unmistakably a path.

    Raises:
        SettingsError: the text is neither; the message says what was expected.
    """
    text = os.fspath(given)
    looks_local = isinstance(given, Path) or text.startswith((".", "~")) or Path(text).is_absolute()
    try:
        if text and (looks_local or Path(text).is_dir()):
            return LocalTarget(_plain(Path(text).expanduser().resolve()))
    # A name longer than the file system allows, an unknown ~user, a NUL character.
    except (OSError, RuntimeError, ValueError) as error:
        raise SettingsError(f"target {text!r} cannot be a folder: {error}; {_EXPECTED}") from error
    return parse_repo(text, revision)


def _plain(path: Path) -> Path:
    """The path, if it can be shown and stored."""
    if not is_plain(str(path)):
        raise ValueError("its path holds control characters or bytes that are no UTF-8, rename it")
    return path


def parse_repo(text: str, revision: str | None = None) -> HubTarget:
    """Parse ``owner/repo``, ``owner/repo/sub/folder``, either with ``@revision``.

    Args:
        text (str): what the user wrote.
        revision (str | None): revision if the text names none.

    Returns:
        HubTarget: well-formed; whether it exists only the Hub knows.

    Raises:
        SettingsError: the text has another form.
    """
    name, at, stated = text.partition("@")
    parts = name.split("/")
    repo_id, subfolder = "/".join(parts[:2]), "/".join(parts[2:])
    if at and not stated:
        raise SettingsError(f"target {text!r} ends in '@' without a revision; {_EXPECTED}")
    if not is_repo_id(repo_id) or (len(parts) > 2 and not is_safe_path(subfolder)):
        raise SettingsError(f"target {text!r} is neither a repository nor a folder here; {_EXPECTED}")
    return HubTarget(repo_id, subfolder, stated or revision)


def parse_targets(given: Iterable[str | Path], revision: str | None = None) -> tuple[Target, ...]:
    """Parse several targets, each once.

    Args:
        given (Iterable[str | Path]): what the user wrote.
        revision (str | None): revision for repositories that name none themselves.

    Returns:
        tuple[Target, ...]: in the order given, without repetitions.

    Raises:
        SettingsError: lists every target that cannot be used.
    """
    found: dict[Target, None] = {}
    faults: list[str] = []
    for entry in given:
        try:
            found[parse_target(entry, revision)] = None
        except SettingsError as error:
            faults.append(str(error))
    if faults:
        raise SettingsError("\n".join(faults))
    return tuple(found)
