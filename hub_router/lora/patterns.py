"""Regular expressions from adapter configs: matched as PEFT does, but with a limit on the time that they may take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import regex

from hub_router.errors import UnsupportedAdapterError

MAX_PATTERN = 10_000
SECONDS = 2.0

_FAULTS = (regex.error, TimeoutError, OverflowError, RecursionError, MemoryError)


@dataclass(frozen=True)
class PatternValue:
    """One entry of ``rank_pattern`` or ``alpha_pattern``.

    Args:
        text (str): the pattern as written.
        value (float): the rank or alpha of the modules that it is meant for.
    """

    text: str
    value: float


def first_values(patterns: Sequence[PatternValue], modules: Sequence[str], field: str) -> dict[str, float]:
    """Value of the first pattern that matches each module, as PEFT's ``get_pattern_key`` chooses it.

    A pattern matches where it ends the module path and begins it or follows a dot.

    Args:
        patterns (Sequence[PatternValue]): in file order.
        modules (Sequence[str]): module paths.
        field (str): the config's field, for messages.

    Returns:
        dict[str, float]: by module; modules that none matches are absent.

    Raises:
        UnsupportedAdapterError: a pattern is no regular expression, or all together take longer than ``SECONDS``.
    """
    found: dict[str, float] = {}
    deadline = time.monotonic() + SECONDS
    for entry in patterns:
        try:
            if len(entry.text) > MAX_PATTERN:
                raise OverflowError(f"it has {len(entry.text)} characters, expected at most {MAX_PATTERN}")
            matcher = regex.compile(rf"(.*\.)?({entry.text})$")
            for module in modules:
                if module not in found and matcher.match(module, timeout=_left(deadline)):
                    found[module] = entry.value
        except _FAULTS as error:
            raise UnsupportedAdapterError(
                f"adapter_config.json: {field} pattern {_short(entry.text)} cannot be matched: {_reason(error)}"
            ) from error
    return found


def unmatched(pattern: str, modules: Sequence[str]) -> tuple[str, ...] | None:
    """Modules that a regular expression of ``target_modules`` or ``exclude_modules`` does not match as a whole.

    Args:
        pattern (str): as written.
        modules (Sequence[str]): module paths.

    Returns:
        tuple[str, ...] | None: None where the expression is faulty or takes too long, so that nothing can be said.
    """
    deadline = time.monotonic() + SECONDS
    try:
        if len(pattern) > MAX_PATTERN:
            return None
        matcher = regex.compile(pattern)
        return tuple(module for module in modules if not matcher.fullmatch(module, timeout=_left(deadline)))
    except _FAULTS:
        return None


def _left(deadline: float) -> float:
    """Seconds until the deadline; no match is started after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"it takes longer than {SECONDS:.0f} seconds"
    return str(error) or type(error).__name__


def _short(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
