"""Which adapters a composition takes: references to records, their common base model, and whether they still hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from sqlalchemy.orm import Session

from hub_router.errors import HubRouterError, MethodError, NotInCatalogError
from hub_router.features import PoolFeatures
from hub_router.records import AdapterRecord, CompositionRecord, standing
from hub_router.store import adapters as adapter_queries
from hub_router.store import compositions as composition_queries
from hub_router.store import features as feature_queries
from hub_router.store.gaussians import load_gaussians

AdapterRef = str | Path | AdapterRecord


def select(session: Session, adapters: Mapping[str, AdapterRef] | Iterable[AdapterRef]) -> dict[str, AdapterRecord]:
    """Records by the name that each has in the pool, in the order given.

    Args:
        session (Session): a reading session.
        adapters (Mapping | Iterable): records or references; a mapping gives the names, else the adapters' short names
            are taken (their full references where two short names coincide).

    Returns:
        dict[str, AdapterRecord]: the pool.

    Raises:
        NotInCatalogError: an adapter is unknown or cannot be served; lists all of the latter.
        MethodError: the pool is empty or names an adapter twice.
    """
    given = adapters.items() if isinstance(adapters, Mapping) else ((None, entry) for entry in adapters)
    found = [
        (label, entry if isinstance(entry, AdapterRecord) else adapter_queries.find(session, str(entry)))
        for label, entry in given
    ]
    if not found:
        raise MethodError("a composition needs at least one adapter, got none; find some with: hub-router search TEXT")
    unusable = [
        f"{record.ref}: {standing(record.status, record.reason)}" for _, record in found if record.status != "ready"
    ]
    if unusable:
        raise NotInCatalogError("adapters that cannot be composed:\n" + "\n".join(f"  - {row}" for row in unusable))
    short = Counter(record.name for label, record in found if label is None)
    pool: dict[str, AdapterRecord] = {}
    for label, record in found:
        name = label or (record.name if short[record.name] == 1 else record.ref)
        if name in pool:
            raise MethodError(
                f"the pool names {name!r} twice ({pool[name].ref} and {record.ref}); name each adapter once"
            )
        pool[name] = record
    return pool


def common_base(pool: Mapping[str, AdapterRecord]) -> str:
    """The base model that all adapters of a pool were trained on, as far as the catalog knows.

    One that is only guessed is good enough where all agree, for the tensors are compared with it in any case.

    Args:
        pool (Mapping[str, AdapterRecord]): records by name.

    Returns:
        str: Hub id or folder.

    Raises:
        HubRouterError: an adapter's tensors contradict what it names (with the evidence), or they name none, or
            several; lists every adapter with its base and how sure that is.
    """
    remedy = "choose one with --base-model (base_model=...), or say what is right: hub-router bases set ADAPTER MODEL"
    doubtful = {name: record for name, record in pool.items() if record.base_model_confidence == "contradicted"}
    if doubtful:
        lines = "\n".join(
            f"  - {name}: {record.base_model_resolved} ({'; '.join(record.base_model_evidence)})"
            for name, record in doubtful.items()
        )
        raise HubRouterError(
            f"{len(doubtful)} of {len(pool)} adapters cannot be of the base model that they name:\n{lines}\n{remedy}"
        )
    bases = {name: record.base_model_resolved or _folder(record) for name, record in pool.items()}
    # The Hub does not tell names apart by case; of two spellings the first adapter's is taken.
    named = {base.lower(): base for base in reversed(bases.values()) if base}
    if len(named) == 1 and all(bases.values()):
        return next(iter(named.values()))
    lines = "\n".join(f"  - {name}: {_standing_of(record, bases[name])}" for name, record in pool.items())
    raise HubRouterError(f"the adapters name {len(named)} base models, expected one:\n{lines}\n{remedy}")


def _folder(record: AdapterRecord) -> str | None:
    """The folder that a local adapter names, where it came back after the last sync."""
    stated = record.base_model if record.source == "local" else None
    return stated if stated and Path(stated).is_absolute() and Path(stated).is_dir() else None


def _standing_of(record: AdapterRecord, base: str | None) -> str:
    if base:
        return f"{base} ({record.base_model_confidence})"
    return f"names no base model that is known ({record.base_model})" if record.base_model else "names no base model"


def usable(session: Session, name: str) -> CompositionRecord:
    """A stored composition whose every member is still what it was composed with.

    Args:
        session (Session): a reading session.
        name (str): the composition's name.

    Returns:
        CompositionRecord: safe to build.

    Raises:
        NotInCatalogError: there is none of that name, or members vanished or changed; lists all of them.
    """
    composition = composition_queries.load(session, name)
    faults = []
    for member in composition.members:
        record = member.adapter
        if record.status != "ready":
            faults.append(f"{member.name} ({record.ref}): {standing(record.status, record.reason)}")
        elif record.weights_hash != member.weights_hash:
            faults.append(f"{member.name} ({record.ref}): its weights changed since it was composed")
        elif not record.path.is_dir():
            faults.append(f"{member.name} ({record.ref}): {record.path} is gone; run: hub-router sync {record.ref}")
    if faults:
        lines = "\n".join(f"  - {fault}" for fault in faults)
        raise NotInCatalogError(
            f"composition {name!r} can no longer be built as stored:\n{lines}\n"
            f"compose it anew with: hub-router compose {name} --replace ..."
        )
    return composition


def features(session: Session, members: Mapping[str, AdapterRecord], encoder: str) -> PoolFeatures:
    """What the catalog knows of a pool: current spectra, and Gaussians of the embedded samples.

    Args:
        session (Session): a reading session.
        members (Mapping[str, AdapterRecord]): by the names that they have in the pool.
        encoder (str): name of the sentence encoder.

    Returns:
        PoolFeatures: by the member's name in the pool; empty where not indexed.
    """
    gaussians = load_gaussians(session, encoder, [record.id for record in members.values()])
    return PoolFeatures(
        spectra={name: feature_queries.load_spectra(session, record.id) for name, record in members.items()},
        gaussians={name: gaussians[record.id] for name, record in members.items() if record.id in gaussians},
        encoder=encoder,
    )
