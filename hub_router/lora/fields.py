"""Checked access to the fields of ``adapter_config.json``: the right type and range, or one line that says why not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hub_router.errors import UnsupportedAdapterError
from hub_router.formats import CONFIG_FILE

MAX_RANK = 1_000_000
MAX_ALPHA = 1e6
MAX_NAMES = 100_000

Fields = Mapping[str, Any]


def flag(fields: Fields, name: str) -> bool:
    """A field that is true or false; absent and null count as false."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return bool(value)


def optional_text(fields: Fields, name: str) -> str | None:
    """A field that is a text; absent and null are None."""
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(name, value, "a string or null")
    return value


def rank(name: str, value: object) -> int:
    """A rank, from 1 to ``MAX_RANK``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise wrong(name, value, f"a whole number from 1 to {MAX_RANK}")
    return value


def number(name: str, value: object) -> float:
    """An alpha or a scale, at most ``MAX_ALPHA`` in size."""
    # The bound also keeps out NaN, infinities and integers that no float holds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -MAX_ALPHA <= value <= MAX_ALPHA:
        raise wrong(name, value, f"a number from {-MAX_ALPHA:.0f} to {MAX_ALPHA:.0f}")
    return float(value)


def names(fields: Fields, name: str, most: int = MAX_NAMES) -> tuple[str, ...]:
    """A field that lists at most so many names, each once; absent and null are empty."""
    value = fields.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > most or not all(isinstance(entry, str) for entry in value):
        raise wrong(name, value, f"a list of names, at most {most}")
    return tuple(dict.fromkeys(value))


def names_or_pattern(fields: Fields, name: str) -> tuple[str, ...] | str:
    """A field that lists names or is one regular expression."""
    value = fields.get(name)
    if value is not None and not isinstance(value, list | str):
        raise wrong(name, value, "a list of names or one string")
    return value if isinstance(value, str) else names(fields, name)


def wrong(name: str, value: object, expected: str) -> UnsupportedAdapterError:
    """The error of a field that cannot be used, to be raised."""
    where = name if name == CONFIG_FILE else f"{CONFIG_FILE}: {name}"
    return UnsupportedAdapterError(f"{where} is {short(value)}, expected {expected}")


def short(value: object) -> str:
    """A value as JSON, on one line and bounded."""
    try:
        text = json.dumps(value)
    # A config that is nested just deep enough to be parsed.
    except RecursionError:
        text = f"a {type(value).__name__} nested too deep to show"
    return text if len(text) <= 80 else text[:77] + "..."
