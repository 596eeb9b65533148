"""Which modules of an adapter fit a base model: each one compared by name, kind and shape, nothing loaded."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache

from torch import nn

from hub_router.composition.architecture import any_model
from hub_router.composition.bypass import bypassed
from hub_router.composition.maps import LinearMap, linear_map
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
        # Found once for all adapters of the model: modules as maps, and why one cannot be adapted, empty if it can.
        self._maps: dict[str, _Map | str] = {}
        self._judged: dict[str, str] = {}

    def fit(self, modules: Sequence[ModuleFacts]) -> tuple[ModuleFit, ...]:
        """Hold every module of an adapter against the base model.

        Args:
            modules (Sequence[ModuleFacts]): what the adapter adapts.

        Returns:
            tuple[ModuleFit, ...]: one per module, in order.
        """
        fresh = [each.name for each in modules if each.name in self._held and each.name not in self._judged]
        skipped = bypassed(self._model, fresh) if fresh else {}
        self._judged |= {name: self._aliased(name) or skipped.get(name, "") for name in fresh}
        for name in fresh:
            found = linear_map(self._held[name])
            self._maps[name] = found if isinstance(found, str) else _Map(found, found.d_in, found.d_out)
        return tuple(_fit(self._maps, facts, self._nearest, self._judged) for facts in modules)

    @cached_property
    def leaves(self) -> frozenset[str]:
        """Last components of all module names."""
        return frozenset(name.rpartition(".")[2] for name in self._held)

    def _aliased(self, name: str) -> str:
        """Why a module of several names cannot be adapted, empty for one of a single name."""
        others = [other for other in self._names[id(self._held[name])] if other != name]
        if not others:
            return ""
        return (
            f"the model holds this very module as {', '.join(others)} as well, and PEFT would adapt it under one of "
            "the names alone; untie it first"
        )


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
        base = _local_modules(reference)
        fits = base.fit(facts.modules)
    except Exception as error:  # noqa: BLE001 - a config that nobody asked for may hold anything
        _LOG.debug("%s cannot be compared with %s: %s", facts.base_model, reference, error)
        return None
    wrong = [fit for fit in fits if fit.verdict in ("shape", "kind")]
    unknown = [fit for fit in fits if fit.verdict == "absent" and fit.module.rpartition(".")[2] not in base.leaves]
    if wrong or unknown:
        first = (wrong or unknown)[0]
        return f"{len(wrong) + len(unknown)} of {len(fits)} modules do not fit: {first.module}: {first.reason}"
    return "" if all(fit.fits for fit in fits) else None


@lru_cache(maxsize=8)
def _local_modules(reference: str) -> BaseModules:
    return BaseModules(any_model(reference, local_only=True))


@dataclass(frozen=True)
class _Map:
    """A linear map and its widths."""

    found: LinearMap
    d_in: int
    d_out: int


def _fit(maps: Mapping[str, _Map | str], facts: ModuleFacts, nearest: _Nearest, judged: Mapping[str, str]) -> ModuleFit:
    got = f"{facts.d_in} x {facts.d_out}"
    held = maps.get(facts.name)
    if held is None:
        reason = f"the model has no such module; the nearest are {nearest(facts.name)}"
        return ModuleFit(facts.name, "absent", facts.rank, got, reason=reason)
    if isinstance(held, str):
        return ModuleFit(facts.name, "kind", facts.rank, got, reason=held)
    expected = f"{held.d_in} x {held.d_out}"
    if (facts.d_in, facts.d_out) != (held.d_in, held.d_out):
        reason = f"got D_in x D_out {got}, expected {expected} as in the model"
        return ModuleFit(facts.name, "shape", facts.rank, got, expected, reason)
    if judged.get(facts.name):
        return ModuleFit(facts.name, "bypassed", facts.rank, got, expected, judged[facts.name])
    fault = _kind_fault(held.found, facts)
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
