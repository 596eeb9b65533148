"""Reads a folder with ``adapter_config.json`` and weights into a :class:`LoraAdapter`, or says why it cannot.

Ranks, modules and shapes come from the tensors, the scaling from the config. Nothing is skipped silently: a tensor is a
LoRA factor, a task head or a copy of a base weight (both noted), or the reason for a refusal.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from hub_router.errors import UnsupportedAdapterError
from hub_router.lora.adapter import LoraAdapter, LoraFactors
from hub_router.lora.config import AdapterConfig, read_config
from hub_router.lora.keys import foreign_reason, is_head, is_printable, module_path, parse_copy, parse_factor
from hub_router.lora.weights import find_weights, hash_weights, load_tensors

SHOWN = 3


def read_adapter(path: Path, name: str | None = None) -> LoraAdapter:
    """Read a PEFT LoRA adapter; its tensors stay backed by the file, in the stored dtypes.

    Args:
        path (Path): folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
        name (str | None): the user's name for it; the folder's name if None.

    Returns:
        LoraAdapter: factors by module path in the base model, in file order.

    Raises:
        UnsupportedAdapterError: the folder holds no adapter that can be used exactly; names it and the reason.
    """
    path = Path(path)
    chosen = name or path.name
    try:
        return read_folder(path, chosen)
    except UnsupportedAdapterError as error:
        raise UnsupportedAdapterError(f"adapter {chosen!r} ({path}): {error}") from error


def read_folder(path: Path, name: str, shown: int | None = None) -> LoraAdapter:
    """As :func:`read_adapter`, with messages that hold the reason alone, as the catalog records it.

    Args:
        path (Path): folder of the adapter.
        name (str): the user's name for it.
        shown (int | None): how many offenders of a file the message names before it counts them; None for all.

    Returns:
        LoraAdapter: factors by module path in the base model, in file order.

    Raises:
        UnsupportedAdapterError: the folder holds no adapter that can be used exactly; the message is the one reason.
    """
    try:
        if not path.is_dir():
            raise UnsupportedAdapterError(f"expected a folder, found {'a file' if path.exists() else 'nothing'}")
        config = read_config(path)
        file = find_weights(path)
        modules, copies, notes = _modules(file, load_tensors(file), config, shown)
        digest = hash_weights(file, config.function_fields())
    except OSError as error:
        raise UnsupportedAdapterError(f"cannot be read: {error}") from error
    return LoraAdapter(name, path, config.base_model, modules, digest, (*config.notes, *notes), copies)


def _modules(
    file: Path, tensors: Mapping[str, torch.Tensor], config: AdapterConfig, shown: int | None
) -> tuple[dict[str, LoraFactors], dict[str, torch.Tensor], list[str]]:
    """Factors by module, copies of base weights by parameter path, and notes."""
    pairs, others = _sort(file, tensors)
    copied = _copies(others, pairs)
    notes = _check_others(file, [name for name in others if name not in copied], shown)
    if copied:
        notes.append(f"{_list(list(copied.values()))} saved along as in the base model, compared when composing")
    if not pairs:
        raise UnsupportedAdapterError(f"{file.name} holds no LoRA factors, the first tensor is {next(iter(tensors))!r}")
    _refuse(file, [fault for module, pair in pairs.items() for fault in _pair_faults(module, pair, tensors)], shown)
    factors = {module: (tensors[pair["A"][0]], tensors[pair["B"][0]]) for module, pair in pairs.items()}
    faults, still = _value_faults(factors)
    _refuse(file, faults, shown)
    if still:
        notes.append(f"{len(still)} of {len(factors)} modules have an all-zero B A, no direction: {_list(still)}")
    modules = {module: LoraFactors(A, B, config.scaling(module, A.shape[0])) for module, (A, B) in factors.items()}
    copies = {path: tensors[name] for name, path in copied.items()}
    return modules, copies, notes + _differences(modules, config)


def _sort(file: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """Tensor names by module and factor, and the names that are no LoRA factors."""
    pairs: dict[str, dict[str, list[str]]] = {}
    others = []
    for name in tensors:
        if not is_printable(name):
            raise UnsupportedAdapterError(f"{file.name}: tensor name {name[:80]!r} is too long or not printable")
        key = parse_factor(name)
        if key is None:
            others.append(name)
        else:
            pairs.setdefault(key.module, {}).setdefault(key.factor, []).append(name)
    return pairs, others


def _copies(others: Sequence[str], adapted: Container[str]) -> dict[str, str]:
    """Parameter path in the base model by tensor name, for frozen weights of adapted modules that were saved along."""
    found = {name: place for name in others if (place := parse_copy(name)) is not None and place[0] in adapted}
    # A bias alone is a trained one: a copy of a module comes with its weight.
    whole = {module for module, kind in found.values() if kind == "weight"}
    return {name: f"{module}.{kind}" for name, (module, kind) in found.items() if module in whole}


def _check_others(file: Path, others: Sequence[str], shown: int | None) -> list[str]:
    """Notes on tensors that are no LoRA factors; refuses those that change what is computed."""
    reason = foreign_reason(others)
    if reason:
        raise UnsupportedAdapterError(f"unsupported: {reason} in {file.name}")
    replaced = [module_path(name) for name in others if not is_head(name)]
    if replaced:
        raise UnsupportedAdapterError(
            f"unsupported: {file.name} replaces base weights (modules_to_save, trained biases, or embeddings that "
            "save_pretrained(..., save_embedding_layers=False) would leave out), which a mix of adapters cannot apply: "
            f"{_list(replaced, shown=shown)}"
        )
    heads = dict.fromkeys(module_path(name).rsplit(".", 1)[0] for name in others)
    return [f"modules_to_save: {_list(list(heads))} ignored, a mix has no task head"] if heads else []


def _pair_faults(module: str, pair: Mapping[str, Sequence[str]], tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """What keeps a module's tensors from being one A ``(r, D_in)`` and one B ``(D_out, r)``."""
    for factor, names in pair.items():
        if len(names) > 1:
            yield f"{module} has {len(names)} tensors for lora_{factor} ({_list(names)})"
    for present, missing in (("A", "B"), ("B", "A")):
        if missing not in pair:
            yield f"{module} has lora_{present} without lora_{missing}"
            return
    A, B = (tuple(tensors[pair[factor][0]].shape) for factor in ("A", "B"))
    if len(A) == 4 or len(B) == 4:
        yield f"{module} is a convolution (A {A}, B {B}), expected a linear map"
    elif len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        yield f"{module} has A {A} and B {B} that do not chain, expected (r, D_in) and (D_out, r)"


def _value_faults(factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[str], list[str]]:
    """Modules with NaN or infinite weights, and modules where a factor is all zero."""
    faults, still = [], []
    for module, pair in factors.items():
        zero = False
        for factor, tensor in zip("AB", pair, strict=True):
            # One pass and no temporary of the tensor's size: NaN propagates into both extremes.
            low, high = (float(extreme) for extreme in torch.aminmax(tensor))
            if not (math.isfinite(low) and math.isfinite(high)):
                faults.append(f"{module} has NaN or infinite values in lora_{factor}")
            zero = zero or low == high == 0.0
        if zero:
            still.append(module)
    return faults, still


def _differences(modules: Mapping[str, LoraFactors], config: AdapterConfig) -> list[str]:
    """Notes where the config says something else than the tensors, which are believed."""
    notes = []
    ranks = [
        f"{module} {factors.rank} (config {stated})"
        for module, factors in modules.items()
        if (stated := config.rank(module)) is not None and stated != factors.rank
    ]
    if ranks:
        notes.append(f"{len(ranks)} modules have another rank than the config states: {_list(ranks)}")
    if config.target_modules:
        ends = {module: _endings(module) for module in modules}
        seen = set().union(*ends.values())
        absent = [target for target in config.target_modules if target not in seen]
        unlisted = [module for module, endings in ends.items() if endings.isdisjoint(config.target_modules)]
        if absent:
            notes.append(f"target_modules names {_list(absent)}, for which there are no tensors")
        if unlisted:
            notes.append(f"{len(unlisted)} modules have tensors but are no target_modules: {_list(unlisted)}")
    return notes


def _endings(module: str) -> set[str]:
    """Every dotted ending of a module path: what a listed target may be to mean this module."""
    parts = module.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def _refuse(file: Path, faults: Sequence[str], shown: int | None) -> None:
    """Raise once for all faults of a file."""
    if faults:
        raise UnsupportedAdapterError(f"{file.name}: {_list(faults, '; ', shown)}")


def _list(items: Sequence[str], separator: str = ", ", shown: int | None = SHOWN) -> str:
    """The first few of many, with how many are left; all where ``shown`` is None."""
    left = 0 if shown is None else len(items) - shown
    return separator.join(items[:shown]) + (f"{separator}and {left} more" if left > 0 else "")
