"""Module names of deep models in few words: the layers of one kind of module as ranges of numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# A whole component of a dotted path that is a number: the layer, where it is the first one.
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def kind_of(name: str) -> str:
    """A module's name without the number of its layer.

    Args:
        name (str): module path, e.g. ``model.layers.7.self_attn.q_proj``.

    Returns:
        str: e.g. ``model.layers.#.self_attn.q_proj``.
    """
    return _NUMBER.sub("#", name, count=1)


def together(names: Sequence[str]) -> str:
    """Names of one kind as one.

    Args:
        names (Sequence[str]): of equal :func:`kind_of`, at least one.

    Returns:
        str: e.g. ``model.layers.{0-3,7}.self_attn.q_proj``; a single name stays as it is.
    """
    numbers = sorted({int(match[0]) for name in names if (match := _NUMBER.search(name))})
    if len(numbers) < 2:
        return names[0]
    return _NUMBER.sub("{" + _ranges(numbers) + "}", names[0], count=1)


def compact(names: Iterable[str]) -> list[str]:
    """All names, those of one kind as one.

    Args:
        names (Iterable[str]): module paths.

    Returns:
        list[str]: in order of first appearance; nothing is left out.
    """
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(kind_of(name), []).append(name)
    return [together(alike) for alike in kinds.values()]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ``0-3,7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][-1] = number
        else:
            parts.append([number, number])
    return ",".join(str(start) if start == stop else f"{start}-{stop}" for start, stop in parts)
