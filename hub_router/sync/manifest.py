"""Collection manifests: TOML files that name the adapters of a published collection.

A manifest lists repositories and folders of repositories one by one (``repos``), or names an author and a common prefix
of repository names. What may stand in one is checked in :mod:`hub_router.sync.manifestcheck`.
"""

from __future__ import annotations

import os.path
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hub_router.errors import ManifestError
from hub_router.records import Sample
from hub_router.settings import bundled
from hub_router.sync.manifestcheck import TEXTS, faults_of, listed, without_revision
from hub_router.sync.targets import HubTarget, parse_repo

# The largest bundled one takes 30 kB.
MANIFEST_BYTES = 5_000_000
_SHOWN = 50
Value = TypeVar("Value")


@dataclass(frozen=True)
class Manifest:
    """One collection.

    A member's name is its entry in ``repos`` without a revision: ``owner/repo`` or ``owner/repo/subfolder``.

    Args:
        name (str): short name, the file's stem.
        title (str): one line.
        description (str): where the collection comes from.
        licence (str): licence that the members state, ``unknown`` where they state none, ``mixed`` where they differ.
        confidence (str): how sure the ids are, ``A`` to ``C``: see ``CONFIDENCE``.
        base_model (str | None): Hub id of the base model that all members adapt; None where they differ.
        repos (tuple[HubTarget, ...]): members, where they are listed.
        author (str): author of the members, where a pattern names them.
        prefix (str): what the members' repository names begin with.
        tasks (Mapping[str, str]): task by member; gives search a text where a card is empty.
        sample_source (str): where inputs of the tasks can be had.
        samples (Mapping[str, tuple[Sample, ...]]): examples by member, written in the manifest itself.
        uncertain (Mapping[str, tuple[str, ...]]): members whose ids are less sure than ``confidence``, by letter.
    """

    name: str
    title: str
    description: str
    licence: str
    confidence: str
    base_model: str | None = None
    repos: tuple[HubTarget, ...] = ()
    author: str = ""
    prefix: str = ""
    tasks: Mapping[str, str] = field(default_factory=dict)
    sample_source: str = ""
    samples: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict)
    uncertain: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the members, where they are listed."""
        return tuple(member_name(target) for target in self.repos)

    @property
    def pattern(self) -> str:
        """What the members' repository ids begin with, where an author and a prefix name them."""
        return f"{self.author}/{self.prefix}" if self.author else ""

    def confidences(self) -> Mapping[str, str]:
        """How sure the id of each listed member is, by name."""
        less = {name: letter for letter, names in self.uncertain.items() for name in names}
        return {name: less.get(name, self.confidence) for name in self.members}


def member_name(target: HubTarget) -> str:
    """The name of a member: its entry without the revision."""
    return f"{target.repo_id}/{target.subfolder}" if target.subfolder else target.repo_id


def by_folder(entries: Mapping[str, Value]) -> dict[str, dict[str, Value]]:
    """What a manifest states by member, as repository -> folder -> value.

    Args:
        entries (Mapping[str, Value]): by member's name.

    Returns:
        dict[str, dict[str, Value]]: the empty folder is the repository's top.
    """
    found: dict[str, dict[str, Value]] = {}
    for name, value in entries.items():
        target = parse_repo(name)
        found.setdefault(target.repo_id, {})[target.subfolder] = value
    return found


def find_manifest(collection: str | Path) -> Path:
    """The file of a collection.

    Args:
        collection (str | Path): path of a TOML file, or the name of a bundled collection.

    Returns:
        Path: an existing file.

    Raises:
        ManifestError: there is no such file or name; lists the bundled names.
    """
    # os.path, for pathlib raises where a name is too long for the file system.
    if os.path.isfile(collection):  # noqa: PTH113
        return Path(collection)
    names = bundled_manifests()
    if str(collection) in names:
        return names[str(collection)]
    raise ManifestError(
        f"collection {str(collection)!r} is neither a TOML file nor a bundled collection; "
        f"bundled are: {', '.join(names) or 'none'}"
    )


def bundled_manifests() -> dict[str, Path]:
    """Files of the bundled collections, by name in alphabetical order."""
    return {path.stem: path for path in sorted(bundled("catalog").glob("*.toml"))}


def load_manifest(collection: str | Path) -> Manifest:
    """Read and check a manifest.

    Args:
        collection (str | Path): as for :func:`find_manifest`.

    Returns:
        Manifest: checked.

    Raises:
        ManifestError: lists the faults of the file.
    """
    path = find_manifest(collection)
    data = _read(path)
    faults = faults_of(data)
    if faults:
        lines = [f"  - {fault}" for fault in faults[:_SHOWN]]
        lines += [f"  - and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ManifestError("\n".join([f"manifest {path} has {count}:", *lines]))
    return _manifest(data)


def manifest_faults(collection: str | Path) -> tuple[str, ...]:
    """Everything wrong with a manifest.

    Args:
        collection (str | Path): as for :func:`find_manifest`.

    Returns:
        tuple[str, ...]: one line each; empty for a manifest that can be used. That there is no such file, or that it
            cannot be read, is a fault too.
    """
    try:
        return tuple(faults_of(_read(find_manifest(collection))))
    except ManifestError as error:
        return (str(error),)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MANIFEST_BYTES + 1)
        if len(raw) > MANIFEST_BYTES:
            raise ManifestError(f"manifest {path} is longer than {MANIFEST_BYTES} bytes, expected a list of adapters")
        return tomllib.loads(raw.decode("utf-8"))
    # ValueError: no UTF-8, no TOML, or a number of thousands of digits. RecursionError: thousands of brackets.
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"manifest {path} cannot be read: {error}") from error


def _manifest(data: Mapping[str, Any]) -> Manifest:
    """The manifest that checked data spell."""
    texts = {key: data[key].strip() for key in TEXTS if key in data}
    samples: dict[str, tuple[Sample, ...]] = {}
    for row in data.get("samples", []):
        sample = Sample(row["input"], row.get("output", ""), "sample", f"manifest {texts['name']}")
        name = without_revision(row["repo"])
        samples[name] = (*samples.get(name, ()), sample)
    return Manifest(
        **texts,
        repos=tuple(listed(data)),
        tasks={without_revision(name): task.strip() for name, task in data.get("tasks", {}).items()},
        samples=samples,
        uncertain={
            letter: tuple(without_revision(name) for name in names)
            for letter, names in data.get("uncertain", {}).items()
        },
    )
