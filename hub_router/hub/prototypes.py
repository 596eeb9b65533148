"""Trained prototype sets of the catalog: stored, looked at, compared, carried to another catalog and back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from hub_router.errors import HubRouterError, NotInCatalogError
from hub_router.prototypes import (
    ModuleCosines,
    PrototypeMember,
    Prototypes,
    as_lines,
    cosines,
    mean_cosine,
    prototype_faults,
    read_prototypes,
    write_prototypes,
)
from hub_router.records import AdapterRecord
from hub_router.store import prototypes as queries
from hub_router.store.features import load_spectra
from hub_router.store.prototypes import PrototypeSetMember, PrototypeSetRecord, PrototypeSetSummary
from hub_router.store.session import Store

# The method whose prototypes every indexed adapter has, and its name in :meth:`PrototypeSets.diff`.
ARROW = "arrow"
# Together with a version it is the parent of a set, for which the catalog holds 64 characters.
_LONGEST_NAME = 54
_VERSIONED = re.compile(r"(.+)@([0-9]{1,9})")


@dataclass(frozen=True)
class PrototypeSetDetails:
    """A prototype set and its adapters, without the vectors.

    Args:
        summary (PrototypeSetSummary): name, version and what it was made from.
        members (tuple[PrototypeSetMember, ...]): its adapters, by catalog id.
    """

    summary: PrototypeSetSummary
    members: tuple[PrototypeSetMember, ...]


@dataclass(frozen=True)
class PrototypeDiff:
    """How far a prototype set is from another.

    Args:
        child (str): the set, as ``name@version``.
        parent (str): the other, or ``arrow``.
        mean (float): cosine, over all modules and shared adapters; of Arrow's vectors, whose sign is free, the absolute
            value.
        modules (tuple[ModuleCosines, ...]): the same by module.
        notes (tuple[str, ...]): what to know of it, such as adapters whose weights changed since, a line each.
    """

    child: str
    parent: str
    mean: float
    modules: tuple[ModuleCosines, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class PrototypeSets:
    """The prototype sets of a catalog; :attr:`hub_router.hub.Hub.prototypes` gives one.

    A set is named ``name`` (its newest version) or ``name@version``. Versions are never changed or removed.

    Args:
        store (Store): catalog.
    """

    store: Store

    def list(self) -> Sequence[PrototypeSetSummary]:
        """Every version of every set, by name and version, with the adapters whose weights changed since."""
        with self.store.read() as session:
            return queries.list_prototypes(session)

    def show(self, name: str) -> PrototypeSetDetails:
        """What a set was made from and for.

        Args:
            name (str): ``name`` or ``name@version``.

        Returns:
            PrototypeSetDetails: may be stale.

        Raises:
            NotInCatalogError: no such set or version.
        """
        with self.store.read() as session:
            return PrototypeSetDetails(*queries.find_prototypes(session, *parse_name(name)))

    def get(self, name: str, *, stale: bool = False) -> Prototypes:
        """A set with its vectors.

        Args:
            name (str): ``name`` or ``name@version``.
            stale (bool): take it also where adapters have other weights by now than those that it was made for.

        Returns:
            Prototypes: members under their references, where one reference stands for two revisions with ``@`` and
            the revision's first characters; ``weights_hash`` is that of the weights that the vectors were made for.

        Raises:
            NotInCatalogError: no such set or version.
            StaleFeaturesError: weights of members changed since; names all of them.
        """
        with self.store.read() as session:
            return _outside(queries.load_prototypes(session, *parse_name(name), stale=stale))

    def save(self, name: str, prototypes: Prototypes, members: Mapping[str, AdapterRecord]) -> int:
        """Store a set as the next version of its name.

        Args:
            name (str): without a version.
            prototypes (Prototypes): the set; a ``parent`` with a version is a set of the catalog, another is a method.
            members (Mapping[str, AdapterRecord]): the adapter of every member, as it was when it was trained.

        Returns:
            int: the version.

        Raises:
            HubRouterError: the name or the set cannot be stored, or a record is missing or of other weights; names all.
            NotInCatalogError: the parent set is not in the catalog.
        """
        check_name(name)
        _refuse(
            f"prototype set {name!r} cannot be stored", [*prototype_faults(prototypes), *_unlike(prototypes, members)]
        )
        parent, version = parse_name(prototypes.parent)
        with self.store.write() as session:
            return _save(session, name, prototypes, members, None if version is None else (parent, version))

    def export(self, name: str, path: str | Path) -> PrototypeSetSummary:
        """Write a set to one file, stale or not.

        Args:
            name (str): ``name`` or ``name@version``.
            path (str | Path): a safetensors file; an older export there is replaced, nothing else is.

        Returns:
            PrototypeSetSummary: the set.

        Raises:
            NotInCatalogError: no such set or version.
            ArtifactError: the file holds something else, or its folder does not exist.
        """
        with self.store.read() as session:
            record = queries.load_prototypes(session, *parse_name(name), stale=True)
        write_prototypes(Path(path), _outside(record))
        return record.summary

    def import_(self, path: str | Path, name: str) -> PrototypeSetSummary:
        """Store the set of a file as the next version of a name, all or nothing.

        A member is the adapter of the catalog that has its weights, whatever that is called here; of several with equal
        weights the one of the same name. The parent set is linked where the catalog holds it for the same adapters.

        Args:
            path (str | Path): from :meth:`export`.
            name (str): without a version.

        Returns:
            PrototypeSetSummary: the set as stored.

        Raises:
            ArtifactError: the file is no such set.
            HubRouterError: the name cannot be used.
            NotInCatalogError: members are missing or have other weights here; names all of them.
        """
        check_name(name)
        prototypes = read_prototypes(Path(path))
        with self.store.write() as session:
            members = _matched(session, prototypes, Path(path))
            version = _save(session, name, prototypes, members, _known_parent(session, prototypes, members))
            return queries.find_prototypes(session, name, version)[0]

    def diff(self, child: str, parent: str | None = None) -> PrototypeDiff:
        """How far a set is from another, by the cosines between the vectors of the adapters that both have.

        Args:
            child (str): ``name`` or ``name@version``.
            parent (str | None): the other set, or ``arrow`` for the leading directions that ``index`` stored; default
                what the set was refined from.

        Returns:
            PrototypeDiff: per module and over all.

        Raises:
            NotInCatalogError: no such set or version.
            HubRouterError: the set's parent is not in the catalog, or the two share nothing or differ in width.
        """
        with self.store.read() as session:
            own = queries.load_prototypes(session, *parse_name(child), stale=True)
            named = parent or _parent_name(own.summary)
            if named == ARROW:
                other, notes = _arrow(session, own)
            else:
                record = queries.load_prototypes(session, *parse_name(named), stale=True)
                named, other, notes = record.summary.ref, _outside(record), _notes(own, record)
        modules = cosines(_outside(own), other, signed=named != ARROW)
        if not modules:
            raise HubRouterError(
                f"{own.summary.ref} and {named} share no adapter with vectors of one module:\n"
                + as_lines([*notes, f"{own.summary.ref}: {_names(_outside(own))}", f"{named}: {_names(other)}"])
            )
        return PrototypeDiff(own.summary.ref, named, mean_cosine(modules), modules, tuple(notes))


def parse_name(text: str) -> tuple[str, int | None]:
    """Name and version of a set as a user writes it.

    Args:
        text (str): ``name`` or ``name@version``.

    Returns:
        tuple[str, int | None]: without a version None, which stands for the newest.
    """
    versioned = _VERSIONED.fullmatch(text)
    return (versioned[1], int(versioned[2])) if versioned else (text, None)


def check_name(name: str) -> None:
    """Refuse a name that no set can have.

    Args:
        name (str): without a version.

    Raises:
        HubRouterError: says what a name may be.
    """
    odd = "@" in name or "/" in name or name.endswith(".safetensors") or name == ARROW
    if odd or name != name.strip() or not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
        raise HubRouterError(
            f"prototype set name {name!r:.200} cannot be used: expected 1 to {_LONGEST_NAME} characters such as "
            f"'flan-maple', without '@', '/' or '.safetensors' at its end, and not {ARROW!r}"
        )


def _refuse(what: str, faults: Sequence[str]) -> None:
    if faults:
        raise HubRouterError(f"{what}:\n{as_lines(faults)}")


def _unlike(prototypes: Prototypes, members: Mapping[str, AdapterRecord]) -> list[str]:
    """Members without a record, with one of other weights, or with one that another member has as well."""
    found = []
    for member in prototypes.members:
        record = members.get(member.name)
        if record is None:
            found.append(f"member {member.name!r} has no adapter record; those given: {', '.join(members) or 'none'}")
        elif record.weights_hash != member.weights_hash:
            found.append(
                f"member {member.name!r} was made for weights {member.weights_hash:.12}, but {record.ref} has "
                f"{record.weights_hash:.12}"
            )
    return found or _doubled({member.name: members[member.name] for member in prototypes.members})


def _doubled(members: Mapping[str, AdapterRecord]) -> list[str]:
    """Adapters that several members stand for."""
    names: dict[int, list[str]] = {}
    for name, record in members.items():
        names.setdefault(record.id, []).append(name)
    return [
        f"members {' and '.join(map(repr, same))} are one adapter here, {members[same[0]].ref}"
        for same in names.values()
        if len(same) > 1
    ]


def _save(
    session: Session,
    name: str,
    prototypes: Prototypes,
    members: Mapping[str, AdapterRecord],
    parent: tuple[str, int] | None,
) -> int:
    return queries.save_prototypes(
        session,
        name,
        method=prototypes.method,
        base_model=prototypes.base_model,
        members=[(members[member.name], member.vectors) for member in prototypes.members],
        parent=parent,
        parent_method="" if parent else prototypes.parent,
        hyperparameters=prototypes.hyperparameters,
        metrics=prototypes.metrics,
        data_hash=prototypes.data_hash,
        seed=prototypes.seed,
    )


def _outside(record: PrototypeSetRecord) -> Prototypes:
    """A stored set as the rest of the application, and a file, sees it."""
    summary = record.summary
    refs = Counter(adapter.ref for adapter, _ in record.members)
    return Prototypes(
        method=summary.method,
        base_model=summary.base_model,
        members=tuple(
            PrototypeMember(_name(adapter, refs), record.made_for[adapter.id], vectors)
            for adapter, vectors in record.members
        ),
        parent=summary.origin,
        hyperparameters=summary.hyperparameters,
        metrics=summary.metrics,
        data_hash=summary.data_hash,
        seed=summary.seed,
    )


def _name(adapter: AdapterRecord, refs: Mapping[str, int]) -> str:
    """An adapter's reference, with the revision where a set holds two of them."""
    return adapter.ref if refs[adapter.ref] == 1 else f"{adapter.ref}@{adapter.revision[:12]}"


def _matched(session: Session, prototypes: Prototypes, path: Path) -> dict[str, AdapterRecord]:
    """The catalog's adapter of every member of a file."""
    alike = queries.served_by_weights(session, [member.weights_hash for member in prototypes.members])
    lost = [member.name for member in prototypes.members if member.weights_hash not in alike]
    named = queries.served_by_name(session, lost)
    faults = []
    found: dict[str, AdapterRecord] = {}
    for member in prototypes.members:
        same = alike.get(member.weights_hash, [])
        if same:
            found[member.name] = next((record for record in same if record.ref == member.name), same[0])
        elif member.name in named:
            here = named[member.name].weights_hash
            faults.append(
                f"{member.name} has other weights here: sha256 {here[:12] or 'unknown'}, expected "
                f"{member.weights_hash:.12}"
            )
        else:
            faults.append(f"{member.name} is not in the catalog, nor is another adapter with its weights")
    faults += _doubled(found)
    if faults:
        raise NotInCatalogError(
            f"{path} cannot be imported, {len(faults)} of its {len(prototypes.members)} adapters are not as they were "
            f"when it was made:\n{as_lines(faults)}\nadd them with: hub-router sync OWNER/REPO --revision REVISION"
        )
    return found


def _known_parent(
    session: Session, prototypes: Prototypes, members: Mapping[str, AdapterRecord]
) -> tuple[str, int] | None:
    """The set that a file names as its parent, if the catalog's set of that name holds the same adapters' vectors."""
    name, version = parse_name(prototypes.parent)
    if version is None:
        return None
    try:
        summary, theirs = queries.find_prototypes(session, name, version)
    except NotInCatalogError:
        return None
    held = {(member.adapter.id, member.weights_hash) for member in theirs}
    wanted = {(record.id, record.weights_hash) for record in members.values()}
    return (summary.name, summary.version) if wanted <= held else None


def _parent_name(summary: PrototypeSetSummary) -> str:
    """What a set is compared with where the user names nothing."""
    if summary.parent is not None or summary.parent_method == ARROW:
        return summary.origin
    why = (
        f"was refined from {summary.origin}, whose vectors the catalog does not hold"
        if summary.origin
        else "was refined from no other set"
    )
    raise HubRouterError(
        f"{summary.ref} {why}; name the set to compare it with, or {ARROW!r}: hub-router prototypes diff {summary.ref} "
        "OTHER"
    )


def _arrow(session: Session, own: PrototypeSetRecord) -> tuple[Prototypes, list[str]]:
    """Arrow's prototypes of a set's adapters, as far as they are of the weights that the set was made for."""
    refs = Counter(adapter.ref for adapter, _ in own.members)
    members, notes = [], _changed(own.summary)
    for adapter, _ in own.members:
        made_for = own.made_for[adapter.id]
        spectra = load_spectra(session, adapter.id) if adapter.weights_hash == made_for else {}
        directions = {
            module: spectrum.direction for module, spectrum in spectra.items() if spectrum.direction is not None
        }
        if directions:
            members.append(PrototypeMember(_name(adapter, refs), made_for, directions))
        else:
            notes.append(
                f"{_name(adapter, refs)} is left out: no spectra of the weights that the set was made for; run: "
                "hub-router index"
            )
    return Prototypes(method=ARROW, base_model=own.summary.base_model, members=tuple(members)), notes


def _notes(own: PrototypeSetRecord, other: PrototypeSetRecord) -> list[str]:
    """What to know of a comparison of two sets."""
    notes = _changed(own.summary) + _changed(other.summary)
    if own.summary.base_model != other.summary.base_model:
        notes.append(f"the base models differ: {own.summary.base_model} and {other.summary.base_model}")
    theirs = {member.name: member.weights_hash for member in _outside(other).members}
    for member in _outside(own).members:
        if theirs.get(member.name, member.weights_hash) != member.weights_hash:
            notes.append(f"{member.name}: the two sets were made for different weights of it")
    return notes


def _changed(summary: PrototypeSetSummary) -> list[str]:
    if not summary.stale:
        return []
    return [f"{summary.ref} was made for other weights of: {', '.join(summary.stale)}"]


def _names(prototypes: Prototypes) -> str:
    names = [member.name for member in prototypes.members]
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "no adapters") + more
