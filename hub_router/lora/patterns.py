"""Regular expressions from adapter configs: matched as PEFT does, but within bounds of time and memory.

PEFT matches with Python's ``re``, which nothing can stop. The package ``regex`` stops at a deadline, but it knows more
syntax (recursion, fuzzy matching), and it writes repetitions out before it matches: ``((a{9}){9}){9}`` is a thousand
parts, a few more levels are all of the memory. Both are looked for first.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

import regex

from hub_router.errors import UnsupportedAdapterError

MAX_PATTERN = 10_000
MAX_PARTS = 50_000
SECONDS = 2.0

_TOKEN = re.compile(
    r"""(?:
        (?P<open> \( (?: \? (?: [:=!>] | <[=!] | P<\w+> | P= | \( | [aimsLu]*(?:-[ims]+)?(?=[:)]) ) )? )
        (?P<odd> [?*] )?
      | (?P<close> \) )
      | (?P<class> \[ \^? \]? (?: \\. | [^\]\\] )* \] )
      | \\ (?P<escape> . )
      | (?P<brace> \{ )
      | .
    )(?P<more> \+ | \{ (?P<least> \d* ) (?: ,\d* )? \} )?""",
    re.DOTALL | re.VERBOSE,
)
# In a class: a letter that re does not escape, or a class of POSIX.
_ODD_CLASS = re.compile(r"(?<!\\)(?:\\\\)*\\[CE-RTVX-Zceg-mopqyz]|\[:")
_ESCAPES = frozenset("AbBdDsSwWZafnrtvxuU")

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
            matcher = _compile(rf"(.*\.)?({entry.text})$")
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
        matcher = _compile(pattern)
        return tuple(module for module in modules if not matcher.fullmatch(module, timeout=_left(deadline)))
    except _FAULTS:
        return None


def _compile(pattern: str) -> regex.Pattern[str]:
    """A pattern that ``re`` knows too, of bounded size.

    Raises:
        OverflowError: it is too long, as it is or with its repetitions written out.
        regex.error: it is faulty, or ``re`` does not know its syntax.
    """
    if len(pattern) > MAX_PATTERN:
        raise OverflowError(f"it has {len(pattern)} characters, expected at most {MAX_PATTERN}")
    sizes = [0]
    for token in _TOKEN.finditer(pattern):
        if token["odd"] or token["brace"] or _is_odd(token["escape"], token["class"]):
            raise regex.error("no syntax of Python's re", pattern, token.start())
        if token["open"]:
            sizes.append(0)
            continue
        size = sizes.pop() + 1 if token["close"] and len(sizes) > 1 else 1
        # What must come n times is written out n times, and once more for what may follow.
        least = "1" if token["more"] == "+" else (token["least"] or "0").lstrip("0")
        sizes[-1] += size * (int(least[:9] or "0") + 1)
        if sizes[-1] > MAX_PARTS:
            raise OverflowError(f"its repetitions come to more than {MAX_PARTS} parts")
    return regex.compile(pattern)


def _is_odd(escape: str | None, inside: str | None) -> bool:
    """Whether an escape or a character class means something to ``regex`` that it does not mean to ``re``."""
    if escape is not None:
        return escape.isalpha() and escape.isascii() and escape not in _ESCAPES
    return inside is not None and _ODD_CLASS.search(inside) is not None


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
