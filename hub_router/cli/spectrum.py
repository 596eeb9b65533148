"""The spectrum of an adapter as a small bar chart of text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hub_router.records import Spectrum

BARS = "▁▂▃▄▅▆▇█"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class ModuleKind:
    """Modules that differ only in the number of their layer.

    Args:
        modules (str): their common path, layer numbers in braces, e.g. ``model.layers.{0-3}.self_attn.q_proj``.
        count (int): number of modules.
        singular_values (tuple[float, ...]): mean over the modules, descending, one per component.
        ambiguous (int): modules whose two largest singular values coincide.
        zero (int): modules whose update is zero.
    """

    modules: str
    count: int
    singular_values: tuple[float, ...]
    ambiguous: int
    zero: int


def summarise(spectra: Mapping[str, Spectrum]) -> list[ModuleKind]:
    """Group modules by kind and rank.

    Args:
        spectra (Mapping[str, Spectrum]): by module path.

    Returns:
        list[ModuleKind]: in the order in which the kinds first occur.
    """
    groups: dict[tuple[str, int], list[Spectrum]] = {}
    for module, spectrum in spectra.items():
        groups.setdefault((_NUMBER.sub("*", module), len(spectrum.singular_values)), []).append(spectrum)
    return [
        ModuleKind(
            modules=_pattern([spectrum.module for spectrum in members]),
            count=len(members),
            singular_values=tuple(
                sum(float(spectrum.singular_values[i]) for spectrum in members) / len(members) for i in range(rank)
            ),
            ambiguous=sum(spectrum.ambiguous for spectrum in members),
            zero=sum(spectrum.direction is None for spectrum in members),
        )
        for (_, rank), members in groups.items()
    ]


def chart(kinds: Sequence[ModuleKind]) -> list[str]:
    """One line per kind: its modules, a bar per singular value, the largest and the smallest value.

    Args:
        kinds (Sequence[ModuleKind]): from :func:`summarise`.

    Returns:
        list[str]: aligned lines; bars are relative to the largest value of their own line.
    """
    names = max((len(kind.modules) for kind in kinds), default=0)
    ranks = max((len(kind.singular_values) for kind in kinds), default=0)
    lines = []
    for kind in kinds:
        remarks = [f"{kind.zero} without direction"] if kind.zero else []
        remarks += [f"{kind.ambiguous} with two equal largest values"] if kind.ambiguous else []
        values = kind.singular_values
        span = f"{values[0]:.3g} to {values[-1]:.3g}" if values else ""
        lines.append(
            f"  {kind.modules:<{names}}  {bars(values):<{ranks}}  {span}"
            + (f"  ({', '.join(remarks)})" if remarks else "")
        )
    return lines


def bars(values: Sequence[float]) -> str:
    """A bar per value, as high as its share of the largest.

    Args:
        values (Sequence[float]): not negative.

    Returns:
        str: one character per value.
    """
    largest = max(values, default=0.0)
    if largest <= 0:
        return BARS[0] * len(values)
    return "".join(BARS[min(int(value / largest * len(BARS)), len(BARS) - 1)] for value in values)


def _pattern(modules: Sequence[str]) -> str:
    """The modules' common path; where layer numbers differ, their ranges in braces."""
    columns = list(zip(*(module.split(".") for module in modules), strict=True))
    parts = []
    for column in columns:
        distinct = list(dict.fromkeys(column))
        parts.append(distinct[0] if len(distinct) == 1 else "{" + _ranges([int(entry) for entry in distinct]) + "}")
    return ".".join(parts)


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2,5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
