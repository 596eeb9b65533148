"""From what a user types to one adapter's catalog id."""

from __future__ import annotations

import difflib
import heapq
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sqlalchemy import ColumnElement, and_, case, func, or_, select
from sqlalchemy.orm import Session

from hub_router.errors import NotInCatalogError
from hub_router.records import RepoRecord, standing
from hub_router.store.tables import Adapter, Repo
from hub_router.store.unserved import unserved

_REVISION = re.compile(r"[0-9a-f]{4,64}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)+", re.ASCII)
_FAULTS = ("unsupported", "gated", "missing", "failed", "renamed")
_SHOWN = 10
# Names that a misspelt one is compared with letter by letter, which takes a good part of a millisecond each.
_COMPARED = 100


class _Candidate(NamedTuple):
    id: int
    repo_id: str
    subfolder: str
    revision: str
    status: str
    current: bool

    @property
    def ref(self) -> str:
        return f"{self.repo_id}/{self.subfolder}" if self.subfolder else self.repo_id


def full_name() -> ColumnElement[str]:
    """SQL for the name a user types: ``repo_id`` or ``repo_id/subfolder``."""
    return case((Adapter.subfolder == "", Repo.repo_id), else_=Repo.repo_id + "/" + Adapter.subfolder)


def resolve(session: Session, ref: str) -> int:
    """The catalog id of the one adapter that ``ref`` names; the first of these readings that fits counts.

    A catalog id; a full name or local folder; the same without regard to case; a repository of one adapter; the last
    parts of a name that only one adapter (or only one ready adapter) has. Each may end in ``@`` and the first four or
    more characters of a revision.

    Args:
        session (Session): a session of the store.
        ref (str): as typed.

    Returns:
        int: catalog id.

    Raises:
        NotInCatalogError: none fits (names the closest), or several do (names them).
    """
    wanted = ref.strip()
    if re.fullmatch(r"[0-9]{1,18}", wanted):
        known = session.scalar(select(Adapter.id).where(Adapter.id == int(wanted)))
        if known is not None:
            return known
    readings: list[tuple[str, str | None]] = [(wanted, None)]
    name, at, revision = wanted.rpartition("@")
    if at and _REVISION.fullmatch(revision.lower()):
        readings.append((name, revision.lower()))
    for asked, version in readings:
        for matches in _stages(asked):
            found = _candidates(session, matches, version)
            if found:
                return _only(ref, found, version)
    raise NotInCatalogError(_absent(session, *readings[-1]))


def _stages(name: str) -> list[ColumnElement[bool]]:
    """Conditions for the readings of a name, strictest first."""
    spellings = _spellings(name)
    if not spellings:
        return []
    splits = [split for spelling in spellings for split in _splits(spelling)]
    # The first two conditions follow from the third; they let the database use its index of repositories.
    exact = and_(
        Repo.source.in_(("hub", "local")),
        Repo.repo_id.in_([repo for repo, _ in splits]),
        or_(*(and_(Repo.repo_id == repo, Adapter.subfolder == folder) for repo, folder in splits)),
    )
    folded = or_(
        *(
            and_(func.lower(Repo.repo_id) == repo.lower(), func.lower(Adapter.subfolder) == folder.lower())
            for repo, folder in splits
        )
    )
    whole = or_(*(func.lower(Repo.repo_id) == spelling.lower() for spelling in spellings))
    ending = full_name().iendswith(f"/{spellings[0].lstrip('/')}", autoescape=True)
    return [exact, folded, whole, ending]


def _spellings(name: str) -> list[str]:
    """The name as typed, and as the absolute folder that it may stand for."""
    typed = name.rstrip("/")
    if not typed or "\0" in typed:
        return []
    # os.path, for pathlib raises on "~nobody" and on loops of links, and neither is an error in a name.
    folder = os.path.expanduser(typed)  # noqa: PTH111
    return list(dict.fromkeys([typed, os.path.abspath(folder), os.path.realpath(folder)]))  # noqa: PTH100


def _splits(name: str) -> list[tuple[str, str]]:
    """Every way to read a name as (repository, subfolder)."""
    parts = name.split("/")
    return [("/".join(parts[:end]), "/".join(parts[end:])) for end in range(len(parts), 0, -1) if parts[end - 1]]


def _candidates(session: Session, matches: ColumnElement[bool], revision: str | None) -> list[_Candidate]:
    statement = (
        select(Adapter.id, Repo.repo_id, Adapter.subfolder, Adapter.revision, Adapter.status, Adapter.current)
        .join(Repo, Repo.id == Adapter.repo_pk)
        .where(matches)
        .order_by(Repo.repo_id, Adapter.subfolder, Adapter.id)
    )
    found = [_Candidate(*row) for row in session.execute(statement)]
    # Not in SQL: SQLite would take the index on "current", which nearly every row fits, for the best one.
    return [entry for entry in found if (entry.revision.startswith(revision) if revision else entry.current)]


def _only(ref: str, found: Sequence[_Candidate], revision: str | None) -> int:
    if len(found) > 1:
        ready = [candidate for candidate in found if candidate.status == "ready"]
        there = [candidate for candidate in found if candidate.status != "missing"]
        found = ready if len(ready) == 1 else there or found
    if len(found) == 1:
        return found[0].id
    names = [f"{entry.ref}@{entry.revision[:12]}" if revision else entry.ref for entry in found]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise NotInCatalogError(
        f"{ref!r} names {len(found)} adapters, expected one; give the full name of one of: "
        f"{', '.join(names[:_SHOWN])}{more}"
    )


def _absent(session: Session, name: str, revision: str | None) -> str:
    """Why nothing fits: never seen, superseded, or gone from the Hub; with the names that come closest."""
    asked = f"{name}@{revision}" if revision else name
    spellings = _spellings(name)
    known = _without_adapters(session, spellings)
    if known:
        whole = {spelling.lower() for spelling in spellings}
        ends = "; ".join(
            f"{'its last sync' if repo.repo_id.lower() in whole else f'the last sync of {repo.repo_id}'} ended as "
            f"{_end(repo)}"
            for repo in known[:_SHOWN]
        )
        return f"{asked!r} has no adapter in the catalog; {ends}"
    splits = [split for spelling in spellings for split in _splits(spelling)]
    versions = session.scalars(
        select(Adapter.revision)
        .join(Repo, Repo.id == Adapter.repo_pk)
        .where(or_(False, *(and_(Repo.repo_id == repo, Adapter.subfolder == folder) for repo, folder in splits)))
        .order_by(Adapter.id.desc())
    ).all()
    if versions:
        listed = ", ".join(f"{name}@{version[:12]}" for version in versions[:_SHOWN])
        return f"{asked!r} is not among the revisions in the catalog; it holds: {listed}"
    names = session.scalars(
        select(full_name()).select_from(Adapter).join(Repo, Repo.id == Adapter.repo_pk).where(Adapter.current.is_(True))
    ).all()
    add = f"hub-router sync {name if _HUB_NAME.fullmatch(name) else 'OWNER/REPO, or a folder'}"
    if not names:
        return f"{asked!r} is not in the catalog, which is empty; add it with: {add}"
    close = closest(name, names, short=lambda entry: entry.rsplit("/", 1)[-1])
    hint = f"; closest: {', '.join(close)}" if close else ""
    return (
        f"{asked!r} is not among the {len(names)} adapters in the catalog{hint}; see: hub-router list, or add it with: "
        f"{add}"
    )


def _without_adapters(session: Session, spellings: Sequence[str]) -> list[RepoRecord]:
    """The repositories without adapters that a name may stand for: by full name, else by the last parts of one."""
    if not spellings:
        return []
    name = func.lower(Repo.repo_id)
    owned = ["/".join(spelling.lower().split("/")[:2]) for spelling in spellings]
    whole = or_(name.in_([entry.lower() for entry in spellings]), and_(Repo.source == "hub", name.in_(owned)))
    ending = Repo.repo_id.iendswith(f"/{spellings[0].lstrip('/')}", autoescape=True)
    return unserved(session, _FAULTS, whole) or unserved(session, _FAULTS, ending)


def _end(repo: RepoRecord) -> str:
    if repo.renamed_to is None:
        return standing(repo.status, repo.reason)
    reason = "" if repo.renamed_to in repo.reason else f": {repo.reason}"
    return f"{repo.status}, it is now {repo.renamed_to}{reason}"


def closest(wanted: str, names: Sequence[str], short: Callable[[str], str] = str) -> list[str]:
    """Up to five names that look like the one asked for.

    Args:
        wanted (str): as typed.
        names (Sequence[str]): what there is.
        short (Callable[[str], str]): part of a name that people type for the whole.

    Returns:
        list[str]: best first.
    """
    spelled: dict[str, str] = {}
    for name in names:
        spelled.setdefault(name.lower(), name)
        spelled.setdefault(short(name).lower(), name)
    asked = wanted.lower()
    pairs = {asked[i : i + 2] for i in range(len(asked) - 1)}

    def alike(name: str) -> float:
        return sum(pair in name for pair in pairs) / (len(asked) + len(name))

    likely = heapq.nlargest(_COMPARED, spelled, key=alike)
    close = difflib.get_close_matches(asked, likely, n=5, cutoff=0.6)
    return list(dict.fromkeys(spelled[entry] for entry in close))
