"""Which modules of an adapter fit a base model: each one compared by name, kind and shape, nothing loaded."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property

from torch import nn

from hub_router.composition.architecture import any_model
from hub_router.composition.bypass import bypassed
from hub_router.composition.maps import LinearMap, linear_map
from hub_router.composition.saved import parameter_at
from hub_router.lora.keys import is_head
from hub_router.records import AdapterFacts, ModuleFacts, ModuleFit

_LOG = logging.getLogger(__name__)
_NUMBER = re.compile(r"\d+")
_SHOWN = 3


class BaseModules:
    """The modules of a base model, to hold adapters against.

    Args:
        model (nn.Module): the base model, or one without weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held = dict(model.named_modules(remove_duplicate=False))
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, module in self._held.items():
            self._names[id(module)].append(name)
        self._nearest = _Nearest(self._held)

    def fit(self, modules: Sequence[ModuleFacts]) -> tuple[ModuleFit, ...]:
        """Hold every module of an adapter against the base model.

        Args:
            modules (Sequence[ModuleFacts]): what the adapter adapts.

        Returns:
            tuple[ModuleFit, ...]: one per module, in order.
        """
        held = [facts.name for facts in modules if facts.name in self._held]
        skipped = bypassed(self._model, held)
        for name in held:
            others = [other for other in self._names[id(self._held[name])] if other != name]
            if others:
                skipped[name] = (
                    f"the model holds this very module as {', '.join(others)} as well, and PEFT would adapt it "
                    "under one of the names alone; untie it first"
                )
        return tuple(_fit(self._held, facts, self._nearest, skipped) for facts in modules)


def check_saved(model: nn.Module, saved: Mapping[str, tuple[int, ...]]) -> tuple[ModuleFit, ...]:
    """Hold the parameters that an adapter brings beside its factors against a base model.

    Args:
        model (nn.Module): the base model, or one without weights.
        saved (Mapping[str, tuple[int, ...]]): shapes by parameter path.

    Returns:
        tuple[ModuleFit, ...]: one per parameter, in order.
    """
    found = []
    for path, shape in saved.items():
        got, held = str(shape), parameter_at(model, path)
        if held is None and is_head(path):
            reason = f"left out: {type(model).__name__} has no such task head"
            found.append(ModuleFit(path, "no head", None, got, reason=reason))
        elif held is None:
            found.append(ModuleFit(path, "absent", None, got, reason="the model has no such parameter"))
        else:
            expected = str(tuple(held.shape))
            same = got == expected
            reason = "" if same else f"got shape {got}, expected {expected} as in the model"
            found.append(ModuleFit(path, "fits" if same else "shape", None, got, expected, reason))
    return tuple(found)


def fits_locally(facts: AdapterFacts, reference: str) -> str | None:
    """Whether an adapter fits the architecture of a base model whose config is at hand on this machine.

    Args:
        facts (AdapterFacts): what the adapter adapts.
        reference (str): folder or Hub id of the base model; the Hub is not asked.

    Returns:
        str | None: empty where all modules fit; one line with the misfit where shapes differ or the architecture knows
        no module of that name; None where nothing can be said, also where a module only has another path.
    """
    try:
        model = any_model(reference, local_only=True)
        fits = BaseModules(model).fit(facts.modules)
    except Exception as error:  # noqa: BLE001 - a config that nobody asked for may hold anything
        _LOG.debug("%s cannot be compared with %s: %s", facts.base_model, reference, error)
        return None
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    wrong = [fit for fit in fits if fit.verdict in ("shape", "kind")]
    unknown = [fit for fit in fits if fit.verdict == "absent" and fit.module.rpartition(".")[2] not in leaves]
    if wrong or unknown:
        first = (wrong or unknown)[0]
        return f"{len(wrong) + len(unknown)} of {len(fits)} modules do not fit: {first.module}: {first.reason}"
    return "" if all(fit.fits for fit in fits) else None


def _fit(held: Mapping[str, nn.Module], facts: ModuleFacts, nearest: _Nearest, skipped: Mapping[str, str]) -> ModuleFit:
    got = f"{facts.d_in} x {facts.d_out}"
    module = held.get(facts.name)
    if module is None:
        reason = f"the model has no such module; the nearest are {nearest(facts.name)}"
        return ModuleFit(facts.name, "absent", facts.rank, got, reason=reason)
    found = linear_map(module)
    if isinstance(found, str):
        return ModuleFit(facts.name, "kind", facts.rank, got, reason=found)
    expected = f"{found.d_in} x {found.d_out}"
    if (facts.d_in, facts.d_out) != (found.d_in, found.d_out):
        reason = f"got D_in x D_out {got}, expected {expected} as in the model"
        return ModuleFit(facts.name, "shape", facts.rank, got, expected, reason)
    if facts.name in skipped:
        return ModuleFit(facts.name, "bypassed", facts.rank, got, expected, skipped[facts.name])
    fault = _kind_fault(found, facts)
    return ModuleFit(facts.name, "kind" if fault else "fits", facts.rank, got, expected, fault)


def _kind_fault(found: LinearMap, facts: ModuleFacts) -> str:
    """What is wrong with a module of the right widths, empty if nothing."""
    if found.lookup != facts.lookup:
        kinds = {True: "an embedding", False: "a linear map"}
        return f"the adapter's factors are those of {kinds[facts.lookup]}, the module is {kinds[found.lookup]}"
    if facts.dora and hasattr(found.module, "embed_scale"):
        return "DoRA on an embedding that scales its output is not defined"
    return ""


class _Nearest:
    """Names of adaptable modules that resemble a missing one.

    Names are compared as patterns with the layer numbers left out, because a deep model repeats a handful of patterns
    and an adapter that does not fit misses all of them.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._close: dict[str, list[str]] = {}
        self._answers: dict[str, str] = {}

    def __call__(self, missing: str) -> str:
        if missing not in self._answers:
            wanted = _numbers(missing)
            names = [
                min(self._patterns[pattern], key=lambda each: _distance(each[0], wanted))[1]
                for pattern in self._alike(_NUMBER.sub("#", missing))
            ]
            self._answers[missing] = ", ".join(names) or "none"
        return self._answers[missing]

    @cached_property
    def _patterns(self) -> Mapping[str, list[tuple[list[int], str]]]:
        found: dict[str, list[tuple[list[int], str]]] = defaultdict(list)
        for name, module in self._modules.items():
            if isinstance(linear_map(module), LinearMap):
                found[_NUMBER.sub("#", name)].append((_numbers(name), name))
        return found

    def _alike(self, pattern: str) -> list[str]:
        if pattern not in self._close:
            self._close[pattern] = get_close_matches(pattern, self._patterns, n=_SHOWN, cutoff=0.4)
        return self._close[pattern]


def _numbers(name: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(name)]


def _distance(numbers: Sequence[int], wanted: Sequence[int]) -> int:
    return sum(abs(a - b) for a, b in zip(numbers, wanted, strict=False))
