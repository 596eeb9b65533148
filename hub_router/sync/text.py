"""Texts from outside that a database can hold: JSON and YAML can spell characters that UTF-8 and PostgreSQL cannot."""

from __future__ import annotations

import re

# What neither a terminal nor UTF-8 can show: control characters, and halves of surrogate pairs, as which Python spells
# the bytes of a file name that are no UTF-8.
_UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def is_storable(text: str) -> bool:
    """Whether a text has no NUL character and no lone surrogate."""
    return "\0" not in text and text == storable(text)


def is_plain(text: str) -> bool:
    """Whether a text has no control characters, line breaks among them, and no lone surrogates."""
    return _UNSHOWN.search(text) is None


def plain(text: str) -> str:
    """The text with such characters written as escapes."""
    return _UNSHOWN.sub(lambda match: ascii(match[0])[1:-1], text)


def storable(text: str) -> str:
    """The text with such characters replaced by ``?``."""
    return text.replace("\0", "?").encode("utf-8", "replace").decode()
