"""The record of each sync: what was asked, and what became of every adapter and repository."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import insert, update
from sqlalchemy.orm import Session

from hub_router.store.tables import SyncOutcome, SyncRun, utcnow


@dataclass(frozen=True)
class Outcome:
    """One line of a run's record; see :class:`hub_router.store.tables.SyncOutcome`."""

    source: str
    repo_id: str
    subfolder: str
    revision: str | None
    outcome: str
    reason: str


def start_run(session: Session, request: Mapping[str, Any]) -> int:
    """Open the record of a run; ``finished_at`` stays empty until :func:`finish_run`.

    Args:
        session (Session): a writing session.
        request (Mapping[str, Any]): what was asked, as JSON values.

    Returns:
        int: id of the run.
    """
    run = SyncRun(request=dict(request))
    session.add(run)
    session.flush()
    return run.id


def add_outcomes(session: Session, run_id: int, outcomes: Sequence[Outcome]) -> None:
    """Append lines to a run's record.

    Args:
        session (Session): a writing session.
        run_id (int): from :func:`start_run`.
        outcomes (Sequence[Outcome]): what became of adapters or repositories.
    """
    if outcomes:
        session.execute(insert(SyncOutcome), [{"run_id": run_id, **vars(outcome)} for outcome in outcomes])


def finish_run(session: Session, run_id: int) -> None:
    """Close the record of a run.

    Args:
        session (Session): a writing session.
        run_id (int): from :func:`start_run`.
    """
    session.execute(update(SyncRun).where(SyncRun.id == run_id).values(finished_at=utcnow()))
