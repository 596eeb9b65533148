"""On and off a model: a child module and a forward hook per adapted linear map.

The linear maps stay the objects they were, so the model's class, parameters, ``state_dict`` and ``.weight`` attributes
are those of the base model. Compile after attaching: a graph that was compiled before does not know the hooks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hub_router.composition.bypass import is_read_past
from hub_router.composition.layer import RoutedUpdate
from hub_router.composition.outer import install_outer
from hub_router.composition.plan import Planner, install, uninstall
from hub_router.errors import RoutedStateError

CHILD = "hub_router_update"


def routed_updates(model: nn.Module) -> Iterator[tuple[nn.Module, RoutedUpdate]]:
    """All linear maps of a model that carry a routed update, with it.

    Args:
        model (nn.Module): any model.

    Yields:
        tuple[nn.Module, RoutedUpdate]: in the order of ``model.modules()``.
    """
    for module in model.modules():
        child = module._modules.get(CHILD)
        if isinstance(child, RoutedUpdate):
            yield module, child


def need_unrouted(model: nn.Module) -> None:
    """Refuse a model that carries adapters, of an earlier composition or of PEFT.

    Args:
        model (nn.Module): any model.

    Raises:
        RoutedStateError: it is routed already, or has PEFT's layers.
    """
    injected = [name for name, module in model.named_modules() if type(module).__module__.startswith("peft.")]
    if injected:
        raise RoutedStateError(
            f"the model carries adapters of PEFT: {len(injected)} modules, the first is {injected[0]}; merge or unload "
            "them first, with merge_and_unload() or unload()"
        )
    names = [update.module for _, update in routed_updates(model)]
    if names:
        raise RoutedStateError(
            f"the model is routed already: {len(names)} modules carry adapters, the first is {names[0]}; "
            "call detach() on the routed model that holds it, then compose again"
        )


def attach(model: nn.Module, updates: Mapping[str, RoutedUpdate], planner: Planner | None = None) -> None:
    """Add each update to the output of its linear map; all or none.

    Args:
        model (nn.Module): the base model.
        updates (Mapping[str, RoutedUpdate]): by module path.
        planner (Planner | None): asks their router, where it decides per sequence.

    Raises:
        RoutedStateError: the model is routed already.
    """
    need_unrouted(model)
    try:
        for name, update in updates.items():
            linear = model.get_submodule(name)
            linear.add_module(CHILD, update)
            update.handles.append(linear.register_forward_hook(_add_update, with_kwargs=True))
            owner, _, leaf = name.rpartition(".")
            if is_read_past(parent := model.get_submodule(owner), leaf):
                update.handles += _guard(parent, leaf, update)
        if planner is not None:
            install(model, planner)
        install_outer(model, list(updates.values()))
    except BaseException:
        detach(model)
        raise


def detach(model: nn.Module) -> None:
    """Take all updates and hooks off; the base model is as it was.

    Args:
        model (nn.Module): routed or not.
    """
    for linear, update in list(routed_updates(model)):
        if update.planner is not None:
            uninstall(model, update.planner)
        if update.outer is not None:
            update.outer.uninstall(model)
            update.outer = None
        while update.handles:
            update.handles.pop().remove()
        del linear._modules[CHILD]


def _add_update(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    """Forward hook: the module's output plus what the adapters add."""
    routed = cast(RoutedUpdate, module._modules[CHILD])
    if not isinstance(output, torch.Tensor):
        raise RoutedStateError(
            f"module {routed.module}: {type(module).__qualname__} gives a {type(output).__name__}, expected one tensor "
            "as from torch.nn.Linear; leave adapters of this module out"
        )
    x = args[0] if args else next(iter(kwargs.values()))
    # A module of a model that is spread over devices, or a quantised one, sees to its input by itself.
    A = routed.whole.A
    if x.device != A.device:
        x = x.to(A.device)
    if x.dtype != A.dtype and x.is_floating_point():
        x = x.to(A.dtype)
    base = None
    if routed.has_gains:
        bias = getattr(module, "bias", None)
        base = output if bias is None else output - bias
    # Not through __call__, which looks for hooks that nobody sets here, once per module and token.
    update = routed.forward(x, base, getattr(module, "embed_scale", None) if routed.lookup else None)
    if update is None:
        return output
    return output + (update if update.dtype == output.dtype else update.to(output.dtype))


def _guard(parent: nn.Module, leaf: str, update: RoutedUpdate) -> list[RemovableHandle]:
    """Hooks on a module that also reads the weight of its adapted child: a forward that never calls it is an error."""
    update.ran = set()
    # Partial functions of this module, so that a routed model can be copied and pickled.
    return [
        parent.register_forward_pre_hook(partial(_before_parent, leaf)),
        parent.register_forward_hook(partial(_after_parent, leaf)),
    ]


@torch.compiler.disable
def _before_parent(leaf: str, parent: nn.Module, *_ignored: Any) -> None:
    update: RoutedUpdate = parent.get_submodule(leaf).hub_router_update  # type: ignore[assignment]
    assert update.ran is not None
    update.ran.discard(threading.get_ident())


@torch.compiler.disable
def _after_parent(leaf: str, parent: nn.Module, *_ignored: Any) -> None:
    update: RoutedUpdate = parent.get_submodule(leaf).hub_router_update  # type: ignore[assignment]
    assert update.ran is not None
    if threading.get_ident() not in update.ran:
        raise RoutedStateError(
            f"module {update.module}: {type(parent).__qualname__} used its weight without calling it, so its adapters "
            "would have had no effect; leave adapters of this module out, or, where a fused kernel does it, use "
            "evaluation mode or uninstall the kernel"
        )
