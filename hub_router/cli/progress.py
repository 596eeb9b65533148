"""Progress of long work on stderr: bars on a terminal; elsewhere a line per stage, and more in a long one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING

import click

from hub_router.cli.output import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from hub_router.progress import Advance

# Between two lines of a stage where there is no terminal; of a long stage, a share of the time that it has taken.
_SECONDS = 10.0
_SHARE = 0.1


class TerminalProgress:
    """A :class:`hub_router.progress.Progress` for the command line; tasks may nest and advance from any thread.

    Where stderr is no terminal, nothing is written with ``--json``, whose reader wants the document alone.

    Args:
        seconds (float): between two lines of a stage, where there is no terminal.
    """

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        # Asked here, for a context belongs to one thread.
        self._quiet = _as_json()
        self._lock = Lock()
        self._open = 0
        self._bars: Bars | None = None

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Advance]:
        """A bar while the block runs, or a line at its start and now and then; nothing where there is nothing to do."""
        label = printable(label)
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        if total == 0 or (not terminal and self._quiet):
            yield lambda _n, _note="": None
        elif not terminal:
            click.echo(label if total is None else f"{label}: {total}", err=True)
            yield _Lines(label, total, self._seconds).advance
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


@dataclass(eq=False)
class _Lines:
    """A stage that says now and then how far it is.

    Args:
        label (str): what is done.
        total (int | None): steps; None where that is not known.
        seconds (float): between two lines.
    """

    label: str
    total: int | None
    seconds: float
    started: float = field(default_factory=monotonic)
    # What the first call brings without a note may have been done before, by a run that goes on now.
    before: int | None = None
    done: int = 0
    told: float = 0.0
    lock: Lock = field(default_factory=Lock, repr=False)

    def advance(self, n: int, note: str = "") -> None:
        """See :data:`hub_router.progress.Advance`."""
        with self.lock:
            spent = monotonic() - self.started
            if self.before is None:
                self.before = 0 if note else n
            self.done += n
            if spent - self.told < max(self.seconds, _SHARE * spent) or self.done == self.total:
                return
            self.told = spent
            parts = [f"{self.label}: {self.done}" + ("" if self.total is None else f"/{self.total}"), note]
            click.echo(", ".join(printable(part) for part in [*parts, self._left(spent)] if part), err=True)

    def _left(self, spent: float) -> str:
        """Time left at the pace so far, such as ``1:02:03 left``."""
        fresh = self.done - (self.before or 0)
        if self.total is None or fresh <= 0:
            return ""
        seconds = round(spent / fresh * (self.total - self.done))
        hours, minutes = divmod(seconds // 60, 60)
        return f"{f'{hours}:{minutes:02}' if hours else minutes}:{seconds % 60:02} left"


def _as_json() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.params.get("as_json"))


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
