"""Collection manifests: TOML files that name the adapters of a published collection.

A manifest lists repositories one by one (``repos``), or names an author and a common prefix of repository names.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hub_router.errors import ManifestError, SettingsError
from hub_router.settings import bundled
from hub_router.sync.targets import HubTarget, is_repo_id, parse_repo

_TEXTS = ("name", "title", "description", "base_model", "licence", "confidence", "author", "prefix")
_KEYS = (*_TEXTS, "repos", "tasks")
_REQUIRED = ("name", "title", "description", "base_model", "licence", "confidence")
# How sure the list is: seen on the Hub or in code that downloads it, built from a documented pattern, inferred.
_CONFIDENCE = ("A", "B", "C")


@dataclass(frozen=True)
class Manifest:
    """One collection.

    Args:
        name (str): short name, the file's stem.
        title (str): one line.
        description (str): where the collection comes from.
        base_model (str): Hub id of the base model that all members adapt.
        licence (str): licence that the members state, ``unknown`` where they state none.
        confidence (str): ``A``, ``B`` or ``C``.
        repos (tuple[HubTarget, ...]): members, where they are listed.
        author (str): author of the members, where a pattern names them.
        prefix (str): what the members' repository names begin with.
        tasks (Mapping[str, str]): task by repository id; gives search a text where a card is empty.
    """

    name: str
    title: str
    description: str
    base_model: str
    licence: str
    confidence: str
    repos: tuple[HubTarget, ...] = ()
    author: str = ""
    prefix: str = ""
    tasks: Mapping[str, str] = field(default_factory=dict)


def find_manifest(collection: str | Path) -> Path:
    """The file of a collection.

    Args:
        collection (str | Path): path of a TOML file, or the name of a bundled collection.

    Returns:
        Path: an existing file.

    Raises:
        ManifestError: there is no such file or name; lists the bundled names.
    """
    path = Path(collection)
    if path.is_file():
        return path
    names = _bundled_names()
    if str(collection) in names:
        return names[str(collection)]
    raise ManifestError(
        f"collection {str(collection)!r} is neither a TOML file nor a bundled collection; "
        f"bundled are: {', '.join(sorted(names)) or 'none'}"
    )


def load_manifest(collection: str | Path) -> Manifest:
    """Read and check a manifest.

    Args:
        collection (str | Path): as for :func:`find_manifest`.

    Returns:
        Manifest: checked.

    Raises:
        ManifestError: lists every fault of the file.
    """
    path = find_manifest(collection)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ManifestError(f"manifest {path} cannot be read: {error}") from error
    faults = _faults(data)
    repos: list[HubTarget] = []
    for entry in data.get("repos", []) if isinstance(data.get("repos"), list) else []:
        target = _repo(entry)
        if target is None:
            faults.append(f"repos: {entry!r} is not owner/repo, owner/repo/subfolder or owner/repo@revision")
        elif target in repos:
            faults.append(f"repos: {entry!r} is listed twice")
        else:
            repos.append(target)
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise ManifestError(f"manifest {path} has {len(faults)} faults:\n{lines}")
    texts = {key: data[key] for key in _TEXTS if key in data}
    return Manifest(**texts, repos=tuple(repos), tasks=data.get("tasks", {}))


def _faults(data: Mapping[str, Any]) -> list[str]:
    """Everything wrong with a manifest, except single entries of ``repos``."""
    faults = [f"unknown key {key!r}; keys are: {', '.join(_KEYS)}" for key in data if key not in _KEYS]
    faults += [f"{key} is missing" for key in _REQUIRED if key not in data]
    for key in _TEXTS:
        if key in data and not (isinstance(data[key], str) and (data[key].strip() or key == "prefix")):
            faults.append(f"{key} is {data[key]!r}, expected a text")
    base, confidence = data.get("base_model"), data.get("confidence")
    if isinstance(base, str) and not is_repo_id(base):
        faults.append(f"base_model is {base!r}, expected owner/name")
    if isinstance(confidence, str) and confidence not in _CONFIDENCE:
        faults.append(f"confidence is {confidence!r}, expected one of {', '.join(_CONFIDENCE)}")
    if ("repos" in data) == ("author" in data):
        faults.append("expected either repos, or author and prefix")
    if "prefix" in data and "author" not in data:
        faults.append("prefix without author")
    if "repos" in data and not (isinstance(data["repos"], list) and data["repos"]):
        faults.append("repos is empty or no list, expected a list of repository ids")
    tasks = data.get("tasks", {})
    if not isinstance(tasks, dict) or not all(isinstance(task, str) for task in tasks.values()):
        faults.append('tasks is no table of texts, expected "owner/repo" = "task"')
    elif "repos" in data and isinstance(data["repos"], list):
        listed = {str(entry).partition("@")[0] for entry in data["repos"]}
        faults += [f"tasks: {name!r} is not among repos" for name in tasks if name not in listed]
    return faults


def _repo(entry: object) -> HubTarget | None:
    if not isinstance(entry, str):
        return None
    try:
        return parse_repo(entry)
    except SettingsError:
        return None


def _bundled_names() -> dict[str, Path]:
    return {path.stem: path for path in bundled("catalog").glob("*.toml")}
