"""How long work reports its progress without knowing who shows it.

Code below the command line takes a :class:`Progress`; the command line passes one that draws bars on stderr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

# Called with the number of steps that were done, and perhaps a note on how it goes, such as a loss.
Advance = Callable[..., None]


class Progress(Protocol):
    """Opens one bar per piece of work."""

    def task(self, label: str, total: int | None) -> AbstractContextManager[Advance]:
        """A bar for ``total`` steps (None: unknown); the context's value advances it by n, from any thread,
        and may show a note.
        """
        ...


class Silent:
    """Shows nothing; the default of the Python API."""

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Advance]:
        """See :class:`Progress`."""
        yield lambda _n, _note="": None


SILENT = Silent()
