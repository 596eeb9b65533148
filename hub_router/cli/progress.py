"""Progress of long work on stderr: bars on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

import click

from hub_router.cli.output import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from hub_router.progress import Advance


class TerminalProgress:
    """A :class:`hub_router.progress.Progress` for the command line; tasks may nest and advance from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._open = 0
        self._bars: Bars | None = None

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Advance]:
        """A bar while the block runs, or one line at its start; nothing where there is nothing to do."""
        label = printable(label)
        if total == 0:
            yield lambda _n, _note="": None
        elif not (sys.stderr.isatty() and os.environ.get("TERM") != "dumb"):
            click.echo(label if total is None else f"{label}: {total}", err=True)
            yield lambda _n, _note="": None
        else:
            bars = self._enter()
            task = bars.add_task(label, total=total)
            try:
                yield lambda n, note="": bars.update(task, advance=n, description=f"{label} {printable(note)}".rstrip())
            finally:
                self._leave()

    def _enter(self) -> Bars:
        """The live display, started by the first task; all open tasks share it."""
        with self._lock:
            if self._bars is None:
                self._bars = _bars()
                self._bars.start()
            self._open += 1
            return self._bars

    def _leave(self) -> None:
        """Close the live display with the last task, so that nothing redraws over what is printed next."""
        with self._lock:
            self._open -= 1
            if self._open == 0 and self._bars is not None:
                self._bars.stop()
                self._bars = None


def _bars() -> Bars:
    """Columns: label, bar, count, time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=Console(stderr=True),
    )
