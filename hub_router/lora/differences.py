"""Where an adapter's config says something else than its tensors, which are believed: one note each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from hub_router.lora.adapter import LoraFactors
from hub_router.lora.config import AdapterConfig
from hub_router.lora.patterns import unmatched
from hub_router.lora.text import escaped, listing

# PEFT's shorthand for every linear map but the output head.
_ALL_LINEAR = "all-linear"
_LAYER = re.compile(r".*\.[^.]*\.(\d+)\.")


def differences(modules: Mapping[str, LoraFactors], config: AdapterConfig) -> Iterator[str]:
    """Compare ranks, targets, exclusions and layers of the config with the modules that there are tensors for.

    Args:
        modules (Mapping[str, LoraFactors]): factors by module.
        config (AdapterConfig): its config.

    Yields:
        str: a note.
    """
    names = list(modules)
    yield from _ranks(modules, config)
    if config.kind == "MLX":
        return
    if isinstance(config.target_modules, str):
        yield from _by_pattern(names, config.target_modules)
    elif config.target_modules:
        yield from _by_names(names, config.target_modules)
    yield from _excluded(names, config.exclude_modules)
    if config.layers:
        layers = set(config.layers)
        beyond = [name for name in names if (match := _LAYER.match(name)) and int(match[1]) not in layers]
        if beyond:
            yield f"{len(beyond)} modules are in layers that layers_to_transform leaves out: {listing(beyond)}"


def _ranks(modules: Mapping[str, LoraFactors], config: AdapterConfig) -> Iterator[str]:
    stated = config.ranks(list(modules))
    parts = sum(config.enable_lora) or 1
    ranks = [
        f"{module} {factors.rank // parts} (config {stated[module]})"
        for module, factors in modules.items()
        if module in stated and stated[module] * parts != factors.rank
    ]
    if ranks:
        yield (
            f"{len(ranks)} modules have another rank than the config states, by which they are scaled all the same: "
            f"{listing(ranks)}"
        )


def _by_pattern(names: Sequence[str], pattern: str) -> Iterator[str]:
    if pattern == _ALL_LINEAR:
        return
    left = unmatched(pattern, names)
    if left is None:
        yield "target_modules is a regular expression that is faulty or too slow, not compared with the tensors"
    elif left:
        yield f"{len(left)} modules have tensors but do not match target_modules: {listing(left)}"


def _by_names(names: Sequence[str], targets: Sequence[str]) -> Iterator[str]:
    listed = set(targets)
    means = {name: listed.intersection(_endings(name)) for name in names}
    seen = set().union(*means.values())
    absent = [target for target in targets if target not in seen and target != _ALL_LINEAR]
    unlisted = [name for name, meant in means.items() if not meant]
    if absent:
        yield f"target_modules names {listing([*map(escaped, absent)])}, for which there are no tensors"
    if unlisted and _ALL_LINEAR not in targets:
        yield f"{len(unlisted)} modules have tensors but are no target_modules: {listing(unlisted)}"


def _excluded(names: Sequence[str], excluded: tuple[str, ...] | str) -> Iterator[str]:
    if not excluded:
        return
    if isinstance(excluded, str):
        left = unmatched(excluded, names)
        others = set(names if left is None else left)
        held = [name for name in names if name not in others]
    else:
        listed = set(excluded)
        held = [name for name in names if not listed.isdisjoint(_endings(name))]
    if held:
        yield f"{len(held)} modules have tensors but are in exclude_modules: {listing(held)}"


def _endings(module: str) -> Iterator[str]:
    """Every dotted ending of a module path: what a listed target may be to mean this module."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module
