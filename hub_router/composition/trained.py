"""Trained vectors of a pool: out of a prototype set's file, and out of what is attached to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hub_router.composition.layer import RoutedUpdate
from hub_router.errors import ArtifactError, MethodError, StaleFeaturesError
from hub_router.features import PoolFeatures, Vectors
from hub_router.lora.adapter import LoraAdapter
from hub_router.prototypes import read_prototypes
from hub_router.routing.base import Prepared, Router
from hub_router.routing.maple import Maple
from hub_router.routing.phatgoose import Phatgoose
from hub_router.routing.trained import PROTOTYPES, in_place


def set_of(router: Router) -> str | None:
    """The prototype set that a method names.

    Args:
        router (Router): the method.

    Returns:
        str | None: empty where it was trained in place, or not yet; None for a method without trained vectors.
    """
    return getattr(router, "prototypes", None)


def is_set_file(name: str) -> bool:
    """Whether the name of a prototype set is that of a file; no set of a catalog has such a name.

    Args:
        name (str): as a method has it.

    Returns:
        bool: whether it has a folder in it, or ends in .safetensors.
    """
    return name.endswith(".safetensors") or "/" in name or "\\" in name


def trained_key(router: Router) -> str | None:
    """The name under which a method's vectors are known.

    Args:
        router (Router): the method.

    Returns:
        str | None: of its set, or of a training in place; None for a method without trained vectors.
    """
    name = set_of(router)
    return name or in_place(_kind(router)) if name is not None else None


def need_kind(router: Router, prototypes: str, method: str, hyperparameters: Mapping[str, Any]) -> None:
    """Refuse a set whose vectors mean something else to the method that made them.

    Args:
        router (Router): that names the set.
        prototypes (str): the set's name.
        method (str): that made it.
        hyperparameters (Mapping[str, Any]): of the making.

    Raises:
        MethodError: says what the set is of.
    """
    made = Maple(parent=hyperparameters.get("parent", "arrow")).kind if method == Maple.name else method
    wanted = _kind(router)
    refined = isinstance(router, Maple) and router.parent == made == Phatgoose.name
    if made != wanted and not refined:
        raise MethodError(
            f"prototype set {prototypes!r} was made by {made!r}, whose vectors mean nothing to {wanted!r}; choose "
            f"a set that {router.name} made, or train one: hub-router train {router.name}"
        )


def _kind(router: Router) -> str:
    """What a method's vectors are: its name says it, where nothing else does."""
    return getattr(router, "kind", router.name)


def with_set_file(features: PoolFeatures, router: Router, pool: Sequence[LoraAdapter]) -> PoolFeatures:
    """Add the vectors of a file, where a method names one that is not known already.

    Args:
        features (PoolFeatures): what is known.
        router (Router): the method.
        pool (Sequence[LoraAdapter]): whose vectors are wanted; members are found by their weights, not their names.

    Returns:
        PoolFeatures: with the set under the name that the method has for it.

    Raises:
        ArtifactError: the file is no prototype set.
        StaleFeaturesError: adapters have other weights than the members of their names; names all of them.
    """
    name = set_of(router) or ""
    known = features.prototypes.get(name, {})
    if not is_set_file(name) or all(each.name in known for each in pool):
        return features
    if not Path(name).expanduser().is_file():
        if known:
            return features
        raise ArtifactError(f"prototype set {name} is no file; write one with hub-router prototypes export SET {name}")
    found = read_prototypes(Path(name).expanduser())
    need_kind(router, name, found.method, found.hyperparameters)
    by_weights = {member.weights_hash: member for member in found.members}
    # A catalog's sets call them by their references, whose last part a pool's name often is.
    named = {part for member in found.members for part in (member.name, member.name.rpartition("/")[2])}
    changed = [each.name for each in pool if each.weights_hash not in by_weights and each.name in named]
    if changed:
        raise StaleFeaturesError(
            f"prototype set {name} was made for other weights of: {', '.join(changed)}; train it anew with: hub-router "
            "train, or use the adapters that it was made for"
        )
    vectors = {each.name: by_weights[each.weights_hash].vectors for each in pool if each.weights_hash in by_weights}
    return replace(features, prototypes={**features.prototypes, name: {**known, **vectors}})


def vectors_of_updates(updates: Iterable[RoutedUpdate], adapters: Sequence[str]) -> Vectors:
    """The vectors that a routed model holds.

    Args:
        updates (Iterable[RoutedUpdate]): of its modules.
        adapters (Sequence[str]): names of the pool.

    Returns:
        Vectors: float32 ``(D_in,)`` by adapter and module; empty where its method has none.
    """
    rows = ((each.module, each.experts.tolist(), each.state().get(PROTOTYPES)) for each in updates if each.candidates)
    return _by_adapter(rows, adapters)


def vectors_of_prepared(prepared: Mapping[str, Prepared], adapters: Sequence[str]) -> Vectors:
    """The same of a method's state that is not attached yet.

    Args:
        prepared (Mapping[str, Prepared]): by module path.
        adapters (Sequence[str]): names of the pool.

    Returns:
        Vectors: as :func:`vectors_of_updates`.
    """
    rows = ((name, each.bank.experts, each.tensors.get(PROTOTYPES)) for name, each in prepared.items())
    return _by_adapter(rows, adapters)


def _by_adapter(
    modules: Iterable[tuple[str, Sequence[int], torch.Tensor | None]], adapters: Sequence[str]
) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for module, experts, vectors in modules:
        if vectors is not None:
            for expert, vector in zip(experts, vectors.detach().to("cpu", torch.float32).numpy(), strict=True):
                found.setdefault(adapters[expert], {})[module] = vector.copy()
    return found
