"""Texts from outside that a database can hold: JSON and YAML can spell characters that UTF-8 and PostgreSQL cannot."""

from __future__ import annotations


def is_storable(text: str) -> bool:
    """Whether a text has no NUL character and no lone surrogate."""
    return "\0" not in text and text == storable(text)


def storable(text: str) -> str:
    """The text with such characters replaced by ``?``."""
    return text.replace("\0", "?").encode("utf-8", "replace").decode()
