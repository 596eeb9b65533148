"""The writing end of a run: every outcome goes into the summary and, with the rows it belongs to, into the database."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from hub_router.store import runs
from hub_router.store.runs import Outcome
from hub_router.store.session import Store

Step = Callable[[Session], object]


class Journal:
    """Writes one transaction per call of :meth:`record`; used by one thread.

    Args:
        store (Store): catalog.
        request (Mapping[str, Any]): what was asked, as JSON values.
        dry_run (bool): collect outcomes only.

    Attributes:
        run_id (int | None): the run's record; None for a dry run.
        outcomes (list[Outcome]): all so far.
    """

    def __init__(self, store: Store, request: Mapping[str, Any], dry_run: bool) -> None:
        self.store = store
        self.dry_run = dry_run
        self.outcomes: list[Outcome] = []
        self.run_id: int | None = None
        if not dry_run:
            with store.write() as session:
                self.run_id = runs.start_run(session, request)

    def record(self, outcomes: Sequence[Outcome], *steps: Step) -> None:
        """Write outcomes and what belongs to them, all or nothing.

        Args:
            outcomes (Sequence[Outcome]): lines of the run's record.
            *steps (Step): further writes of the same transaction, in order.
        """
        self.outcomes += outcomes
        if self.run_id is None or not (outcomes or steps):
            return
        try:
            self._write(self.run_id, outcomes, steps)
        except IntegrityError:
            # Another process added the same row in between; now it is there to be updated.
            self._write(self.run_id, outcomes, steps)

    def close(self) -> None:
        """Note that the run ended by itself."""
        if self.run_id is not None:
            with self.store.write() as session:
                runs.finish_run(session, self.run_id)

    def _write(self, run_id: int, outcomes: Sequence[Outcome], steps: Sequence[Step]) -> None:
        with self.store.write() as session:
            for step in steps:
                step(session)
            runs.add_outcomes(session, run_id, outcomes)
