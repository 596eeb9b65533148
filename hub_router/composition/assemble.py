"""From a pool and a method to the updates of a model: checked first, prepared next, attached last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.maps import need_linear_map
from hub_router.composition.plan import Planner
from hub_router.errors import MissingError
from hub_router.features import PoolFeatures
from hub_router.lora.adapter import LoraAdapter
from hub_router.lora.bank import AdapterBank, build_bank
from hub_router.routing.base import Prepared, Router
from hub_router.routing.candidates import without_zero_updates


def stack(adapters: Sequence[LoraAdapter]) -> AdapterBank:
    """The pool's stacked factors, with the candidates of every module.

    Args:
        adapters (Sequence[LoraAdapter]): the pool.

    Returns:
        AdapterBank: float32 on the CPU; adapters with a zero update in a module are no candidates there.
    """
    return without_zero_updates(build_bank(adapters))


def prepare(router: Router, bank: AdapterBank, features: PoolFeatures) -> dict[str, Prepared]:
    """Let a method make its state for every module.

    Args:
        router (Router): the method.
        bank (AdapterBank): from :func:`stack`.
        features (PoolFeatures): of a catalog; may lack adapters and modules, and hold others.

    Returns:
        dict[str, Prepared]: by module path, for every module that any adapter adapts.
    """
    return {
        name: router.prepare(module, bank.adapters, features.of_module(name, bank.adapters))
        if module.ranks
        else Prepared(module, {})
        for name, module in bank.modules.items()
    }


def make_updates(
    model: nn.Module, router: Router, prepared: Mapping[str, Prepared], pool: int, planner: Planner | None = None
) -> dict[str, RoutedUpdate]:
    """Put each module's state where its linear map is.

    Args:
        model (nn.Module): the base model; not changed.
        router (Router): the method.
        prepared (Mapping[str, Prepared]): by module path.
        pool (int): number E of adapters.
        planner (Planner | None): asks a router that decides per sequence.

    Returns:
        dict[str, RoutedUpdate]: ready to attach, in the device and dtype of each linear map's weight.

    Raises:
        MissingError: weights of the base model are not loaded.
    """
    updates = {}
    for name, state in prepared.items():
        adapted = need_linear_map(model, name)
        if adapted.device.type == "meta":
            raise MissingError(
                f"module {name}: the base model's weight is on the meta device (offloaded, or not loaded); "
                "load the base model onto a real device first"
            )
        updates[name] = RoutedUpdate(router, state, pool, adapted, planner)
    return updates
