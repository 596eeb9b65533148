"""Reads a folder with ``adapter_config.json`` and weights into a :class:`LoraAdapter`, or says why it cannot.

Ranks, modules and shapes come from the tensors, the scaling from the config. Nothing is skipped silently: a tensor is
part of an update, a parameter saved along (noted), or the reason for a refusal.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.adapter import LoraAdapter, LoraFactors, SavedParameter
from hub_router.lora.assemble import assemble, role_faults, shape_faults, stated_rank
from hub_router.lora.config import AdapterConfig
from hub_router.lora.config_file import read_config
from hub_router.lora.differences import differences
from hub_router.lora.keys import (
    belongs_to,
    foreign_reason,
    is_head,
    is_original,
    is_printable,
    is_saved_apart,
    is_wrapped,
    module_path,
    parse_base,
    parse_factor,
    parse_mlx_factor,
)
from hub_router.lora.text import escaped, listing
from hub_router.lora.weights import find_weights, hash_weights, load_weights
from hub_router.names import compact


@dataclass(frozen=True, eq=False)
class Source:
    """Where an adapter was read from, and what its config said.

    Args:
        files (tuple[Path, ...]): weight files.
        config (AdapterConfig): the config.
    """

    files: tuple[Path, ...]
    config: AdapterConfig


def read_adapter(path: Path, name: str | None = None) -> LoraAdapter:
    """Read an adapter; its tensors stay backed by the file wherever its format allows, in the stored dtypes.

    Args:
        path (Path): folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``, or shards), or
            MLX-LM's ``adapters.safetensors``.
        name (str | None): the user's name for it; the folder's name if None.

    Returns:
        LoraAdapter: factors by module path in the base model, in file order.

    Raises:
        UnsupportedAdapterError: the folder holds no adapter that can be used exactly; names it and the reason.
    """
    path = Path(path)
    (found,) = read_adapters([(path, name or path.name)])
    if isinstance(found, UnsupportedAdapterError):
        raise found
    return found


def read_adapters(folders: Sequence[tuple[Path, str]]) -> list[LoraAdapter | UnsupportedAdapterError]:
    """As :func:`read_adapter`, of many folders: while one is read, a thread hashes the files of those before it.

    Args:
        folders (Sequence[tuple[Path, str]]): each with the user's name for its adapter.

    Returns:
        list[LoraAdapter | UnsupportedAdapterError]: for each folder its adapter, or why there is none.
    """
    found: list[LoraAdapter | UnsupportedAdapterError] = []
    hashes: dict[int, Future[str]] = {}
    with without_collections(), ThreadPoolExecutor(1) as hasher:
        for path, name in folders:
            try:
                with _reading():
                    adapter, source = _read(path, name)
                hashes[len(found)] = hasher.submit(hash_weights, source.files, source.config.function_fields())
                found.append(adapter)
            except UnsupportedAdapterError as error:
                found.append(_named(error, path, name))
        for number, (path, name) in enumerate(folders):
            each = found[number]
            if isinstance(each, LoraAdapter):
                try:
                    with _reading():
                        found[number] = replace(each, weights_hash=hashes[number].result())
                except UnsupportedAdapterError as error:
                    found[number] = _named(error, path, name)
    return found


def read_folder(path: Path, name: str, shown: int | None = None) -> tuple[LoraAdapter, Source]:
    """As :func:`read_adapter`, with messages that hold the reason alone, as the catalog records it.

    Args:
        path (Path): folder of the adapter.
        name (str): the user's name for it.
        shown (int | None): how many offenders of a file the message names before it counts them; None for all.

    Returns:
        tuple[LoraAdapter, Source]: factors by module path in the base model, in file order; and where they came from.

    Raises:
        UnsupportedAdapterError: the folder holds no adapter that can be used exactly; the message is the one reason.
    """
    with _reading():
        adapter, source = _read(path, name, shown)
        return replace(adapter, weights_hash=hash_weights(source.files, source.config.function_fields())), source


def _read(path: Path, name: str, shown: int | None = None) -> tuple[LoraAdapter, Source]:
    """An adapter that lacks its hash."""
    if not path.is_dir():
        raise UnsupportedAdapterError(f"expected a folder, found {'a file' if path.exists() else 'nothing'}")
    config = read_config(path)
    files = find_weights(path, config.kind)
    contents = _Contents(load_weights(files), config, files[0].name, shown)
    adapter = LoraAdapter(
        name,
        path,
        config.base_model,
        contents.modules,
        weights_hash="",
        notes=(*config.notes, *contents.notes),
        copies=contents.copies,
        saved=contents.saved,
        not_stored=contents.not_stored,
    )
    return adapter, Source(files, config)


@contextmanager
def without_collections() -> Iterator[None]:
    """Put Python's search for garbage in cycles off: where many tensors are made that stay, it costs more than they do.

    Each search looks at all objects of the process, and many new ones bring on several.

    Yields:
        None: while it is off.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def _reading() -> Iterator[None]:
    """What the file system refuses is a reason like any other."""
    try:
        yield
    except OSError as error:
        raise UnsupportedAdapterError(f"cannot be read: {error}") from error


def _named(error: UnsupportedAdapterError, path: Path, name: str) -> UnsupportedAdapterError:
    """The same error in a message that says which adapter it is about."""
    named = UnsupportedAdapterError(f"adapter {name!r} ({path}): {error}", error.faults)
    named.__cause__ = error
    return named


# A pool's adapters name the same modules.
_parse_factor = lru_cache(maxsize=8192)(parse_factor)


class _Contents:
    """What the tensors of one adapter are: factors by module, copies of base weights, saved parameters, and notes."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], config: AdapterConfig, file: str, shown: int | None
    ) -> None:
        self._file, self._shown = file, shown
        self._pruned: list[str] = []
        roles, others = self._sort(tensors, config)
        if not roles:
            raise UnsupportedAdapterError(f"{file} holds no LoRA factors, the first tensor is {next(iter(tensors))!r}")
        self.modules = self._factors(roles, tensors, config)
        self.copies, self.saved = self._rest(others, tensors, config, roles)
        self.not_stored = tuple(
            listed for listed in config.modules_to_save if not any(belongs_to(path, listed) for path in self.saved)
        )
        faults, still = _survey(self.modules, self.saved)
        self._refuse(faults)
        self.notes = [
            *self._zero_notes(still),
            *_rest_notes(self.copies, self.saved),
            *differences(self.modules, config),
        ]
        if self.not_stored:
            absent = listing([*map(escaped, self.not_stored)])
            self.notes.append(f"modules_to_save names {absent}, for which there are no tensors")
        if self._pruned:
            self.notes.append(f"{len(self._pruned)} modules were pruned to rank 0: {', '.join(compact(self._pruned))}")

    def _sort(
        self, tensors: Mapping[str, torch.Tensor], config: AdapterConfig
    ) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
        """Tensor names by module and role, and the names that belong to no update."""
        parse = parse_mlx_factor if config.kind == "MLX" else _parse_factor
        roles: dict[str, dict[str, list[str]]] = {}
        others: list[str] = []
        empty: list[tuple[str, str]] = []
        for name in tensors:
            if not is_printable(name):
                raise UnsupportedAdapterError(f"{self._file}: tensor name {name[:80]!r} is too long or not printable")
            key = parse(name)
            if tensors[name].numel() == 0:
                if key is None or config.kind != "ADALORA":
                    shape = tuple(tensors[name].shape)
                    empty.append((name[:200], f"is empty (shape {shape}), a shard was not gathered"))
                elif key.role == "A":
                    self._pruned.append(key.module)
            elif key is None:
                others.append(name)
            else:
                roles.setdefault(key.module, {}).setdefault(key.role, []).append(name)
        self._refuse(empty)
        reason = foreign_reason(others)
        if reason:
            raise UnsupportedAdapterError(f"unsupported: {reason} in {self._file}")
        return roles, others

    def _factors(
        self, roles: Mapping[str, Mapping[str, list[str]]], tensors: Mapping[str, torch.Tensor], config: AdapterConfig
    ) -> dict[str, LoraFactors]:
        self._refuse([(module, fault) for module, held in roles.items() for fault in role_faults(held, config)])
        parts = {module: {role: tensors[names[0]] for role, names in held.items()} for module, held in roles.items()}
        self._refuse([(module, fault) for module, held in parts.items() for fault in shape_faults(held, config)])
        scalings = config.scalings({module: stated_rank(held, config) for module, held in parts.items()})
        return {module: assemble(held, config, scalings[module]) for module, held in parts.items()}

    def _rest(
        self,
        others: Sequence[str],
        tensors: Mapping[str, torch.Tensor],
        config: AdapterConfig,
        adapted: Container[str],
    ) -> tuple[dict[str, torch.Tensor], dict[str, SavedParameter]]:
        """Copies of the weights of adapted modules, and all other parameters, by their paths in the base model."""
        based = {name: place for name in others if (place := parse_base(name)) is not None}
        # A bias alone is a trained one: a copy of a module comes with its weight.
        whole = {module for module, kind in based.values() if kind == "weight" and module in adapted}
        copies: dict[str, torch.Tensor] = {}
        saved: dict[str, SavedParameter] = {}
        stored: dict[str, str] = {}
        faults = []
        # What PEFT trained a copy of comes last, in place of a bias that bias="all" saved of the original.
        for name in sorted((name for name in others if not is_original(name)), key=is_wrapped):
            module, kind = based.get(name, ("", ""))
            path = f"{module}.{kind}" if module else module_path(name)
            if path in stored and is_wrapped(name) == is_wrapped(stored[path]):
                faults.append((path, "is stored twice"))
            elif module in whole and (kind == "weight" or config.bias == "none"):
                copies[path] = tensors[name]
            else:
                saved[path] = SavedParameter(tensors[name], is_saved_apart(name, config.modules_to_save))
            stored[path] = name
        self._refuse(faults)
        return copies, saved

    def _zero_notes(self, still: Sequence[str]) -> list[str]:
        if not still:
            return []
        where = ", ".join(compact(still))
        return [f"{len(still)} of {len(self.modules)} modules have an all-zero B A, no direction: {where}"]

    def _refuse(self, faults: Sequence[tuple[str, str]]) -> None:
        """Raise once for all faults of a file, given by module; the layers that share one are named together."""
        if not faults:
            return
        modules: dict[str, list[str]] = {}
        for module, fault in faults:
            modules.setdefault(fault, []).append(module)
        lines = [f"{name} {fault}" for fault, names in modules.items() for name in compact(names)]
        raise UnsupportedAdapterError(f"{self._file}: {listing(lines, '; ', self._shown)}", lines)


def zero_modules(modules: Mapping[str, LoraFactors]) -> list[str]:
    """Modules whose scaled B A is zero because a factor is.

    Args:
        modules (Mapping[str, LoraFactors]): factors by module.

    Returns:
        list[str]: in order.
    """
    return [name for name, each in modules.items() if not (each.scaling and each.A.any() and each.B.any())]


def _survey(
    modules: Mapping[str, LoraFactors], saved: Mapping[str, SavedParameter]
) -> tuple[list[tuple[str, str]], list[str]]:
    """NaN and infinite values, by module and parameter; and the modules whose scaled B A is zero as a factor is."""
    faults, still = [], []
    for module, factors in modules.items():
        zero = not factors.scaling
        for what, tensor in factors.tensors.items():
            low, high = _extremes(tensor)
            if not (math.isfinite(low) and math.isfinite(high)):
                role = what if len(what) > 1 else f"lora_{what}"
                faults.append((module, f"has NaN or infinite values in {role}"))
            zero |= what in "AB" and low == high == 0.0
        if zero:
            still.append(module)
    for path, parameter in saved.items():
        if not all(map(math.isfinite, _extremes(parameter.value))):
            faults.append((path, "has NaN or infinite values"))
    return faults, still


def _extremes(tensor: torch.Tensor) -> tuple[float, float]:
    # One pass and no temporary of the tensor's size: NaN propagates into both extremes.
    low, high = torch.aminmax(tensor)
    return float(low), float(high)


def _rest_notes(copies: Mapping[str, torch.Tensor], saved: Mapping[str, SavedParameter]) -> Iterator[str]:
    if copies:
        yield f"{listing(list(copies))} saved along as in the base model, compared when composing"
    alone = "applied only where this adapter is used alone"
    heads = dict.fromkeys(path.rpartition(".")[0] for path in saved if is_head(path))
    biases = [path for path in saved if path.endswith(".bias") and not saved[path].apart]
    others = [path for path in saved if not is_head(path) and path not in biases]
    if heads:
        yield f"task head {listing(list(heads))}: {alone}"
    if biases:
        yield f"{len(biases)} trained biases ({listing(biases)}): {alone}"
    if others:
        yield f"saved parameters {listing(others)}: {alone}, or where they equal the base model's"
