"""From what a caller names as adapters to a pool: read, named uniquely, in the caller's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hub_router.errors import MethodError, UnsupportedAdapterError
from hub_router.lora.adapter import LoraAdapter
from hub_router.lora.reader import read_adapter

AdapterSource = str | Path | LoraAdapter


def read_pool(adapters: Mapping[str, AdapterSource] | Sequence[AdapterSource]) -> tuple[LoraAdapter, ...]:
    """Read all adapters of a pool.

    Args:
        adapters (Mapping | Sequence): folders or adapters in memory, by name; or in order, then a folder's name becomes
            the adapter's, with ``-2``, ``-3`` where it was taken.

    Returns:
        tuple[LoraAdapter, ...]: the pool in the order of axis E, names unique.

    Raises:
        MethodError: there is none, or ``adapters`` is no pool.
        UnsupportedAdapterError: names every adapter that cannot be used, and why.
    """
    if isinstance(adapters, str | Path | LoraAdapter):
        raise MethodError(f"adapters is {adapters!r}, expected a mapping of name to folder or a list of folders")
    named = list(adapters.items()) if isinstance(adapters, Mapping) else _named(adapters)
    if not named:
        raise MethodError("adapters is empty, expected at least one adapter")
    pool, faults = [], []
    for name, source in named:
        try:
            pool.append(
                replace(source, name=name)
                if isinstance(source, LoraAdapter)
                else read_adapter(Path(source).expanduser(), name)
            )
        except UnsupportedAdapterError as error:
            faults.append(str(error))
    if faults:
        raise UnsupportedAdapterError("\n".join(faults))
    return tuple(pool)


def _named(adapters: Sequence[AdapterSource]) -> list[tuple[str, AdapterSource]]:
    """Names for a sequence; a name that an adapter in memory brings counts as its folder's would."""
    taken: set[str] = set()
    named = []
    for source in adapters:
        stem = source.name if isinstance(source, LoraAdapter) else Path(source).expanduser().absolute().name
        name, count = stem, 1
        while name in taken:
            count += 1
            name = f"{stem}-{count}"
        taken.add(name)
        named.append((name, source))
    return named
