"""Parameters that an adapter brings beside its factors: task heads, embeddings, biases.

They replace the base model's own, so they take effect only where one adapter is used alone; a mix has no way to be
partly one head and partly another. The base model's parameters are kept aside and put back by ``restore``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hub_router.lora.adapter import LoraAdapter, SavedParameter
from hub_router.lora.keys import is_head
from hub_router.records import ModuleFit


@dataclass(frozen=True, eq=False)
class SavedPlan:
    """What becomes of a pool's saved parameters.

    Args:
        replace (Mapping[str, SavedParameter]): by parameter path, those that replace the base model's.
        faults (tuple[str, ...]): why the pool cannot be composed, a line each.
        notes (tuple[str, ...]): what is left out, and why, a line each.
    """

    replace: Mapping[str, SavedParameter] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan_saved(model: nn.Module, pool: Sequence[LoraAdapter], members: Sequence[str]) -> SavedPlan:
    """Decide what becomes of the parameters that a pool's adapters bring.

    Args:
        model (nn.Module): the base model; without weights, what PEFT trains (copies of modules, biases) is taken to
            differ from it, and the rest is left for later.
        pool (Sequence[LoraAdapter]): the adapters.
        members (Sequence[str]): names of those that the method can use.

    Returns:
        SavedPlan: replacements only where one adapter is used alone.
    """
    replace: dict[str, SavedParameter] = {}
    faults: list[str] = []
    notes: list[str] = []
    alone = len(members) == 1
    for adapter in (adapter for adapter in pool if adapter.name in members):
        faults += _missing(model, adapter)
        for path, parameter in adapter.saved.items():
            where = f"adapter {adapter.name!r}, parameter {path}"
            fit = fit_parameter(model, path, parameter.value.shape)
            held = parameter_at(model, path)
            if held is None and fit.fits:
                notes.append(f"{where} is {fit.reason}")
            elif held is None or not fit.fits:
                faults.append(f"{where}: {fit.reason}")
            elif parameter.apart and (others := _other_names(model, path)):
                faults.append(
                    f"{where}: the model holds this very module as {', '.join(others)} as well, of which PEFT would "
                    "replace one; untie it first"
                )
            elif held.is_meta and alone:
                continue
            elif held.is_meta and not (parameter.apart or path.endswith(".bias")):
                notes.append(f"{where} is compared with the model's when its weights are loaded; a mix needs it equal")
            elif not held.is_meta and same_values(parameter.value, held):
                continue
            elif alone:
                replace[path] = parameter
            else:
                faults.append(
                    f"{where}: it was trained, which only one adapter alone can bring; leave the adapter out, or use "
                    f"method 'single' with adapter={adapter.name!r}"
                )
    return SavedPlan(replace, tuple(faults), tuple(notes))


def _other_names(model: nn.Module, path: str) -> list[str]:
    """Other names under which a model holds the module of a parameter."""
    owner = path.rpartition(".")[0]
    module = model.get_submodule(owner)
    return [name for name, each in model.named_modules(remove_duplicate=False) if each is module and name != owner]


def _missing(model: nn.Module, adapter: LoraAdapter) -> Iterator[str]:
    """A line for every trained module that the adapter names, the model has, and the adapter's file does not hold."""
    for listed in adapter.not_stored:
        for name, module in model.named_modules():
            if name.endswith(listed) and any(True for _ in module.parameters()):
                yield (
                    f"adapter {adapter.name!r}: its config says that {name} was trained (modules_to_save), but its "
                    "weights hold no such tensor; the model's own, which may be untrained, would take its place"
                )


def fit_parameter(model: nn.Module, path: str, shape: Sequence[int]) -> ModuleFit:
    """Hold a parameter that an adapter brings beside its factors against a base model.

    Args:
        model (nn.Module): the base model, or one without weights.
        path (str): parameter path in the base model.
        shape (Sequence[int]): of the saved parameter.

    Returns:
        ModuleFit: ``no head`` for a task head that the model does not have, which is left out.
    """
    got, held = str(tuple(shape)), parameter_at(model, path)
    if held is None and is_head(path):
        reason = f"left out: {type(model).__name__} has no such task head"
        return ModuleFit(path, "no head", None, got, reason=reason)
    if held is None:
        return ModuleFit(path, "absent", None, got, reason="the model has no such parameter")
    expected = str(tuple(held.shape))
    if got != expected:
        return ModuleFit(path, "shape", None, got, expected, f"got shape {got}, expected {expected} as in the model")
    return ModuleFit(path, "fits", None, got, expected)


class Replacement:
    """The base model's parameters that were replaced, and their places.

    Args:
        model (nn.Module): the base model; changed at once.
        values (Mapping[str, SavedParameter]): by parameter path, checked.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, SavedParameter]) -> None:
        self._places: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] = []
        for path, parameter in values.items():
            owner, _, leaf = path.rpartition(".")
            module = model.get_submodule(owner)
            held = parameter_at(model, path)
            assert held is not None
            # A copy: the adapter's own tensor is a view of its file, and may serve another model as well.
            value: torch.Tensor = parameter.value.to(device=held.device, dtype=held.dtype, copy=True)
            if isinstance(held, nn.Parameter):
                value = nn.Parameter(value, requires_grad=held.requires_grad)
            owners = [module] if parameter.apart else list(model.modules())
            for each in owners:
                table: dict[str, Any] = each._parameters if isinstance(held, nn.Parameter) else each._buffers
                names = [leaf] if parameter.apart else [name for name, tensor in table.items() if tensor is held]
                self._places += [(table, name, held, value) for name in names]
        for table, name, _, value in self._places:
            table[name] = value

    def restore(self) -> Callable[[], None]:
        """Put the base model's own parameters back: the objects that they were, in the place and dtype of now.

        Returns:
            Callable[[], None]: replaces them again.
        """
        live: list[tuple[dict[str, Any], str, torch.Tensor]] = [
            (table, name, table[name]) for table, name, _, _ in self._places
        ]
        for table, name, held, _ in self._places:
            now = table[name]
            if (held.device, held.dtype) != (now.device, now.dtype):
                held.data = held.data.to(device=now.device, dtype=now.dtype)
            table[name] = held

        def again() -> None:
            for table, name, now in live:
                table[name] = now

        return again

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The base model's own parameters, for the length of a with-block."""
        again = self.restore()
        try:
            yield
        finally:
            again()


def same_values(stored: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether one tensor is the other, or the other rounded to its dtype.

    Args:
        stored (torch.Tensor): of an adapter.
        held (torch.Tensor): of a model, of equal shape.

    Returns:
        bool: so.
    """
    stored, held = stored.to(held.device), held.detach()
    return torch.equal(held.to(stored.dtype), stored) or torch.equal(held, stored.to(held.dtype))


def parameter_at(model: nn.Module, path: str) -> torch.Tensor | None:
    """A parameter or buffer of a model by its path.

    Args:
        model (nn.Module): any model.
        path (str): e.g. ``score.weight``.

    Returns:
        torch.Tensor | None: None where there is none.
    """
    owner, _, leaf = path.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    found = module._parameters.get(leaf)
    return found if found is not None else module._buffers.get(leaf)
