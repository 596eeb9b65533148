"""What methods with trained gates share: a vector per candidate, taken from a prototype set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hub_router.errors import MethodError
from hub_router.features import ModuleFeatures
from hub_router.lora.bank import ModuleBank

# Name of the trained tensor ``(C, D)``, of most methods ``(C, D_in)``, in a method's state.
PROTOTYPES = "P"
# Of a variance, so that a vector of equal entries stays zero.
_SMALLEST = 1e-12


def trained_vectors(
    bank: ModuleBank,
    adapters: Sequence[str],
    known: ModuleFeatures,
    prototypes: str,
    method: str,
    start: torch.Tensor,
    *,
    kind: str = "",
    advice: str = "train a set over this pool with hub-router train, or leave these adapters out",
) -> torch.Tensor:
    """The vectors of a module's candidates from a prototype set, or of a pool that is trained in place.

    In place, candidates that were not trained yet have their start.

    Args:
        bank (ModuleBank): the candidates.
        adapters (Sequence[str]): names of the pool.
        known (ModuleFeatures): of the module.
        prototypes (str): the set's name; empty for a pool that is trained in place.
        method (str): registry name of what needs them.
        start (torch.Tensor): the vectors before training, ``(C, D)``.
        kind (str): of vectors, where it is not the method's name alone that says it.
        advice (str): what to do about vectors that are missing or of another length.

    Returns:
        torch.Tensor: float32 ``(C, D)``.

    Raises:
        MethodError: the set is not at hand, lacks candidates, or has vectors of another length; names all of them.
    """
    key = prototypes or in_place(kind or method)
    if not prototypes:
        return _in_place(bank, adapters, known.prototypes.get(key, {}), start)
    if key not in known.prototypes:
        raise MethodError(
            f"method {method!r}: prototype set {prototypes!r} is not at hand; in the catalog: hub-router prototypes "
            "list, in Python: prototypes='FILE.safetensors'"
        )
    vectors, shape = known.prototypes[key], tuple(start.shape[1:])
    names = [adapters[expert] for expert in bank.experts]
    wrong = [
        f"{name!r} has {'none' if name not in vectors else f'one of shape {vectors[name].shape}'}"
        for name in names
        if name not in vectors or vectors[name].shape != shape
    ]
    if wrong:
        raise MethodError(
            f"method {method!r}, module {bank.module}: prototype set {prototypes!r} must hold a vector of shape "
            f"{shape} for every adapter, but {', '.join(wrong)}; {advice}"
        )
    return torch.stack([torch.as_tensor(vectors[name], dtype=torch.float32) for name in names])


def _in_place(
    bank: ModuleBank, adapters: Sequence[str], vectors: Mapping[str, np.ndarray], start: torch.Tensor
) -> torch.Tensor:
    """What was trained, as far as it fits, in the place of the start."""
    rows = start.to(torch.float32).clone()
    for row, expert in zip(rows, bank.experts, strict=True):
        vector = vectors.get(adapters[expert])
        if vector is not None and vector.shape == tuple(row.shape):
            row.copy_(torch.as_tensor(vector))
    return rows


def in_place(kind: str) -> str:
    """The name under which vectors are known that a pool was trained to in place; no set of a catalog has such a name.

    Args:
        kind (str): the method's name, or what else says what the vectors are.

    Returns:
        str: a key of the features' prototypes.
    """
    return f"@{kind}"


def standardise(vectors: torch.Tensor) -> torch.Tensor:
    """Subtract the mean over the last axis and divide by the standard deviation, in float32 or wider.

    Args:
        vectors (torch.Tensor): ``(..., D)``.

    Returns:
        torch.Tensor: ``(..., D)``; zeros where all entries of a vector are equal.
    """
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return torch.nn.functional.layer_norm(wide, wide.shape[-1:], eps=_SMALLEST)
