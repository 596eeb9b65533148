"""From what a caller names as adapters to a pool: named uniquely, read, and checked against the base model as one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hub_router.composition.check import check_fit
from hub_router.composition.saved import SavedPlan, plan_saved, same_values
from hub_router.errors import IncompatibleAdaptersError, MethodError, UnsupportedAdapterError
from hub_router.lora.adapter import LoraAdapter
from hub_router.lora.reader import read_adapters

AdapterSource = str | Path | LoraAdapter

_EXPECTED = "a mapping of name to folder, such as {'sst2': 'adapters/sst2'}, or a list of folders"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_pool(
    adapters: Mapping[str, AdapterSource] | Sequence[AdapterSource],
) -> tuple[tuple[LoraAdapter, ...], tuple[str, ...]]:
    """Read all adapters of a pool that can be read; :func:`check_pool` raises for the others.

    Args:
        adapters (Mapping | Sequence): folders or adapters in memory, by name; or in order, then a folder's name becomes
            the adapter's, with ``-2``, ``-3`` where it was taken.

    Returns:
        tuple: ``(pool, unreadable)``: the adapters in the order of axis E, names unique; and a line for each one that
        cannot be used, with the reason.

    Raises:
        MethodError: there is none, or ``adapters`` is no pool; lists every bad entry or name.
    """
    named = _named(adapters)
    folders = [(_folder(source), name) for name, source in named if not isinstance(source, LoraAdapter)]
    read = iter(read_adapters(folders))
    pool, unreadable = [], []
    for name, source in named:
        found = replace(source, name=name) if isinstance(source, LoraAdapter) else next(read)
        if isinstance(found, LoraAdapter):
            pool.append(found)
        else:
            unreadable.append(_refusal(found, source))
    return tuple(pool), tuple(unreadable)


def check_pool(
    model: nn.Module,
    base: str,
    pool: Sequence[LoraAdapter],
    unreadable: Sequence[str] = (),
    members: Sequence[str] = (),
) -> SavedPlan:
    """Refuse a pool for all of its faults at once.

    Args:
        model (nn.Module): the base model, or one without weights, to which saved weights are not compared.
        base (str): what to call it in the message.
        pool (Sequence[LoraAdapter]): the adapters that could be read.
        unreadable (Sequence[str]): a line for each of the others.
        members (Sequence[str]): names of the adapters that the method can use.

    Returns:
        SavedPlan: what becomes of the parameters that the adapters bring beside their factors.

    Raises:
        IncompatibleAdaptersError: adapters do not fit the model; lists them and those that cannot be read.
        UnsupportedAdapterError: all fit that can be read, but some cannot.
    """
    misfits: list[str] = []
    try:
        check_fit(model, base, pool)
    except IncompatibleAdaptersError as error:
        misfits += error.mismatches
    misfits += _other_weights(model, pool)
    plan = plan_saved(model, pool, members)
    misfits += plan.faults
    if misfits:
        raise IncompatibleAdaptersError(base, [*unreadable, *misfits])
    if unreadable:
        raise UnsupportedAdapterError("\n".join(unreadable))
    return plan


def standing(
    adapters: Mapping[str, AdapterSource] | Sequence[AdapterSource], pool: Sequence[LoraAdapter]
) -> Mapping[str, AdapterSource] | Sequence[AdapterSource]:
    """A pool as a caller names it, with the adapters for which names of another pool stand.

    Args:
        adapters (Mapping | Sequence): as for :func:`read_pool`, or anything else, which it refuses.
        pool (Sequence[LoraAdapter]): the other pool.

    Returns:
        Mapping | Sequence: for :func:`read_pool`, which reads the rest.
    """
    known = {adapter.name: adapter for adapter in pool}

    def found(source: AdapterSource) -> AdapterSource:
        return known.get(source, source) if isinstance(source, str) else source

    if isinstance(adapters, Mapping):
        return {name: found(source) for name, source in adapters.items()}
    if isinstance(adapters, str | bytes) or not isinstance(adapters, Sequence):
        return adapters
    return [found(source) for source in adapters]


def _named(adapters: Any) -> list[tuple[str, AdapterSource]]:
    """Names and sources of a pool, all of the right types."""
    if isinstance(adapters, str | bytes | Path) or not isinstance(adapters, Mapping | Sequence):
        raise MethodError(f"adapters is {adapters!r}, expected {_EXPECTED}")
    if not adapters:
        raise MethodError("adapters is empty, expected at least one adapter")
    entries = list(adapters.items() if isinstance(adapters, Mapping) else enumerate(adapters))
    faults = [
        f"adapters[{key!r}] is {source!r}, expected the path of an adapter's folder or a LoraAdapter"
        for key, source in entries
        if not isinstance(source, str | Path | LoraAdapter) or source == ""
    ]
    if isinstance(adapters, Mapping):
        named = entries
        faults += [f"{name!r} is no name for an adapter" for name, _ in entries if not _is_name(name)]
    else:
        named = [] if faults else _name_folders(adapters)
        faults += [f"{source!r} gives no name, pass a mapping" for name, source in named if not _is_name(name)]
    if faults:
        raise MethodError(f"{'; '.join(faults)}; adapters takes {_EXPECTED}, names are strings that are not empty")
    return named


def _is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name.strip())


def _name_folders(adapters: Sequence[AdapterSource]) -> list[tuple[str, AdapterSource]]:
    """Names for a sequence; a name that an adapter in memory brings counts as its folder's would."""
    taken: set[str] = set()
    named = []
    for source in adapters:
        stem = source.name if isinstance(source, LoraAdapter) else _folder(source).absolute().name
        name, count = stem, 1
        while name in taken:
            count += 1
            name = f"{stem}-{count}"
        taken.add(name)
        named.append((name, source))
    return named


def _folder(source: str | Path) -> Path:
    """The path that a caller means; ``~`` of a user that does not exist stays as written, and is not found later."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def _refusal(error: UnsupportedAdapterError, source: AdapterSource) -> str:
    """Why a folder cannot be used; what a Hub id looks like is known."""
    if isinstance(source, LoraAdapter) or not _HUB_ID.fullmatch(str(source)) or Path(source).exists():
        return str(error)
    return (
        f"{error}; compose() takes folders: if {source} is a Hub id, `hub-router sync {source}` brings it into the "
        "catalog, and Hub.compose takes ids"
    )


def _other_weights(model: nn.Module, pool: Sequence[LoraAdapter]) -> Iterator[str]:
    """A line for every copy of a base weight in an adapter that is not the model's weight."""
    modules = dict(model.named_modules())
    for adapter in pool:
        for name, copy in adapter.copies.items():
            module, _, kind = name.rpartition(".")
            held = getattr(modules.get(module), kind, None)
            # Where the factors do not fit either, check_fit has said so.
            if module not in modules or (kind == "weight" and held is not None and held.shape != copy.shape):
                continue
            if held is None or not (held.is_meta or (held.shape == copy.shape and same_values(copy, held))):
                yield (
                    f"adapter {adapter.name!r}, module {module}: the adapter was trained with another {kind} of this "
                    f"module, of which it holds a copy that differs from the model's, expected equal values"
                )
