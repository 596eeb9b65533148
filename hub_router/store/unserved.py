"""Repositories that were asked for and gave the catalog no adapter: which, and why."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from hub_router.records import RepoRecord
from hub_router.store.tables import Adapter, Repo


def unserved(session: Session, statuses: Sequence[str], *conditions: ColumnElement[bool]) -> list[RepoRecord]:
    """Repositories without a current adapter whose last look ended as one of some statuses.

    Args:
        session (Session): a session of the store.
        statuses (Sequence[str]): statuses wanted, see :class:`hub_router.store.tables.Repo`.
        *conditions (ColumnElement[bool]): what else a repository's row must fit.

    Returns:
        list[RepoRecord]: by name.
    """
    held = select(Adapter.id).where(Adapter.repo_pk == Repo.id, Adapter.current.is_(True)).exists()
    statement = select(Repo.source, Repo.repo_id, Repo.state, Repo.reason, Repo.renamed_to)
    statement = statement.where(Repo.state.in_(tuple(statuses)), ~held, *conditions)
    return [RepoRecord(*row) for row in session.execute(statement.order_by(Repo.repo_id, Repo.source))]
