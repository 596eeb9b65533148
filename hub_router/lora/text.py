"""How lists of module names are shown in one line."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 3


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
