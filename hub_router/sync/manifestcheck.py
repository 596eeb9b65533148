"""What may stand in a collection manifest; every fault is named, and every text and list has a bound."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hub_router.errors import SettingsError
from hub_router.sync.samples import SAMPLES_PER_SPLIT, TEXT_CHARACTERS
from hub_router.sync.targets import HubTarget, is_repo_id, parse_repo
from hub_router.sync.text import is_storable

# Key -> characters allowed.
TEXTS = {
    "name": 64,
    "title": 200,
    "description": 4_000,
    "base_model": 200,
    "licence": 100,
    "confidence": 1,
    "author": 96,
    "prefix": 96,
    "sample_source": 2_000,
}
KEYS = (*TEXTS, "repos", "tasks", "samples", "uncertain")
REQUIRED = ("name", "title", "description", "licence", "confidence")
CONFIDENCE = {
    "A": "seen on the Hub, or in code that downloads it",
    "B": "built from a documented pattern of names and list of tasks",
    "C": "inferred",
}
TASK_CHARACTERS = 500
# The largest published collection known has about 900.
MEMBERS = 10_000
ENTRY_CHARACTERS = 1_000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

Check = Callable[[Mapping[str, Any]], Iterator[str]]


def faults_of(data: Mapping[str, Any]) -> list[str]:
    """Everything wrong with a manifest.

    Args:
        data (Mapping[str, Any]): as TOML spells it.

    Returns:
        list[str]: one line each.
    """
    checks: tuple[Check, ...] = (_keys, _texts, _forms, _pattern, _repos, _tasks, _uncertain, _samples)
    return [fault for check in checks for fault in check(data)]


def listed(data: Mapping[str, Any]) -> dict[HubTarget, None]:
    """The members that a manifest lists, in its order, each once.

    Args:
        data (Mapping[str, Any]): as TOML spells it; entries that cannot be used are left out.
    """
    entries = data.get("repos")
    targets = map(_target, entries[:MEMBERS] if isinstance(entries, list) else [])
    return {target: None for target in targets if target is not None}


def without_revision(entry: str) -> str:
    """A member's name from an entry that may end in ``@revision``."""
    return entry.partition("@")[0]


def _keys(data: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"unknown key {_short(key)}; keys are: {', '.join(KEYS)}" for key in data if key not in KEYS)
    yield from (f"{key} is missing" for key in REQUIRED if key not in data)


def _texts(data: Mapping[str, Any]) -> Iterator[str]:
    for key, most in TEXTS.items():
        if key in data and (fault := _text_fault(data[key], most, empty=key == "prefix")):
            yield f"{key} {fault}"


def _forms(data: Mapping[str, Any]) -> Iterator[str]:
    name, base, confidence = (_text(data, key) for key in ("name", "base_model", "confidence"))
    if name and not _NAME.fullmatch(name):
        yield f"name is {_short(name)}, expected letters, digits, '.', '_' and '-'"
    if base and not is_repo_id(base):
        yield f"base_model is {_short(base)}, expected owner/name"
    if confidence and confidence not in CONFIDENCE:
        yield f"confidence is {_short(confidence)}, expected one of {', '.join(CONFIDENCE)}"


def _pattern(data: Mapping[str, Any]) -> Iterator[str]:
    if ("repos" in data) == ("author" in data):
        yield "expected either repos, or author and prefix"
    if "prefix" in data and "author" not in data:
        yield "prefix without author"
    author, prefix = _text(data, "author"), _text(data, "prefix")
    if author and not is_repo_id(f"{author}/x"):
        yield f"author is {_short(author)}, expected a user or organisation of the Hub"
    elif author and not is_repo_id(f"{author}/{prefix}x"):
        yield f"prefix is {_short(prefix)}, expected what names of repositories can begin with"


def _repos(data: Mapping[str, Any]) -> Iterator[str]:
    if "repos" not in data:
        return
    entries = data["repos"]
    if not isinstance(entries, list) or not entries:
        yield "repos is empty or no list, expected a list of repository ids"
        return
    if len(entries) > MEMBERS:
        yield f"repos has {len(entries)} entries, at most {MEMBERS} are read"
    seen: set[tuple[str, str]] = set()
    revisions: dict[str, str | None] = {}
    for entry in entries[:MEMBERS]:
        target = _target(entry)
        if target is None:
            yield f"repos: {_short(entry)} is not owner/repo, owner/repo/subfolder or owner/repo@revision"
        elif (target.repo_id, target.subfolder) in seen:
            yield f"repos: {_short(entry)} is listed twice"
        elif revisions.setdefault(target.repo_id, target.revision) != target.revision:
            yield f"repos: {_short(entry)} names another revision than an entry above, expected one per repository"
        else:
            seen.add((target.repo_id, target.subfolder))


def _tasks(data: Mapping[str, Any]) -> Iterator[str]:
    tasks = data.get("tasks", {})
    if not isinstance(tasks, dict):
        yield 'tasks is no table of texts, expected "owner/repo" = "task"'
        return
    is_member = _membership(data)
    for name, task in tasks.items():
        if not is_member(name):
            yield f"tasks: {_short(name)} is not among {_members(data)}"
        if fault := _text_fault(task, TASK_CHARACTERS):
            yield f"tasks: {_short(name)} {fault}"


def _uncertain(data: Mapping[str, Any]) -> Iterator[str]:
    table = data.get("uncertain", {})
    if not isinstance(table, dict):
        yield 'uncertain is no table of lists, expected B = ["owner/repo", ...]'
        return
    is_member = _membership(data)
    seen: set[str] = set()
    for letter, names in table.items():
        if letter not in CONFIDENCE or letter <= _text(data, "confidence"):
            yield f"uncertain: {_short(letter)} is no confidence below that of the manifest"
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            yield f"uncertain: {_short(letter)} is no list of texts"
            continue
        for name in map(without_revision, names):
            if not is_member(name):
                yield f"uncertain: {_short(name)} is not among {_members(data)}"
            elif name in seen:
                yield f"uncertain: {_short(name)} is listed twice"
            seen.add(name)


def _samples(data: Mapping[str, Any]) -> Iterator[str]:
    rows = data.get("samples", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        yield "samples is no list of tables, expected [[samples]] with repo, input and output"
        return
    is_member = _membership(data)
    counts: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        name = row.get("repo")
        if not isinstance(name, str) or not is_member(name):
            yield f"samples: repo of number {number} is {_short(name)}, which is not among {_members(data)}"
        else:
            counts[without_revision(name)] += 1
        for key in row.keys() - {"repo", "input", "output"}:
            yield f"samples: number {number} has unknown key {_short(key)}; keys are: repo, input, output"
        for key, value in (("input", row.get("input")), ("output", row.get("output", ""))):
            if fault := _text_fault(value, TEXT_CHARACTERS, empty=key == "output"):
                yield f"samples: {key} of number {number} {fault}"
    for name, count in counts.items():
        if count > SAMPLES_PER_SPLIT:
            yield f"samples: {_short(name)} has {count}, at most {SAMPLES_PER_SPLIT} are kept"


def _membership(data: Mapping[str, Any]) -> Callable[[str], bool]:
    """Tells whether a name is that of a member, as far as the manifest can know."""
    if "repos" in data:
        entries = data["repos"] if isinstance(data["repos"], list) else []
        names = {without_revision(entry) for entry in entries if isinstance(entry, str)}
        return lambda name: without_revision(name) in names
    prefix = f"{_text(data, 'author')}/{_text(data, 'prefix')}".lower()
    # The Hub's listing is searched without regard to case.
    return lambda name: _target(name) is not None and name.lower().startswith(prefix)


def _members(data: Mapping[str, Any]) -> str:
    return "repos" if "repos" in data else "the repositories of author and prefix"


def _target(entry: object) -> HubTarget | None:
    if not isinstance(entry, str) or len(entry) > ENTRY_CHARACTERS or not is_storable(entry):
        return None
    try:
        return parse_repo(entry)
    except SettingsError:
        return None


def _text(data: Mapping[str, Any], key: str) -> str:
    """A text of the manifest, empty where it has another type; what is wrong with that is told elsewhere."""
    value = data.get(key, "")
    return value.strip() if isinstance(value, str) else ""


def _text_fault(value: object, most: int, *, empty: bool = False) -> str:
    """What is wrong with a text, to follow its name."""
    if not isinstance(value, str) or not (value.strip() or empty):
        return f"is {_short(value)}, expected a text"
    if len(value) > most:
        return f"has {len(value)} characters, at most {most} are allowed"
    return "" if is_storable(value) else "holds a NUL character"


def _short(value: object) -> str:
    """A value as a message can show it; that of a stranger may be megabytes long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:99]}…"
