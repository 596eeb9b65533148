"""How lists of module names are shown in one line."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 3
_NAME = 80


def escaped(text: str, most: int = _NAME) -> str:
    """A text from a stranger's file on one line, cut to a length, and what is not printable in it written as escapes.

    Args:
        text (str): any.
        most (int): characters.

    Returns:
        str: at most so many characters.
    """
    kept = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:most])
    return kept if len(kept) <= most and len(text) <= most else f"{kept[: most - 3]}..."


def listing(items: Sequence[str], separator: str = ", ", shown: int | None = SHOWN) -> str:
    """The first few of many, with how many are left.

    Args:
        items (Sequence[str]): names or lines.
        separator (str): between them.
        shown (int | None): how many; None for all.

    Returns:
        str: one line.
    """
    left = 0 if shown is None else len(items) - shown
    return separator.join(items[:shown]) + (f"{separator}and {left} more" if left > 0 else "")
