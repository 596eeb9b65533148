from __future__ import annotations

import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session
from sync_world import Bench

from hub_router.store.runs import Outcome
from hub_router.store.tables import Repo, SyncOutcome
from hub_router.sync.journal import Journal

LINE = Outcome("hub", "a/b", "", None, "added", "")


def test_row_that_another_process_added_first_is_met_by_a_second_try(bench: Bench) -> None:
    journal = Journal(bench.store, {}, dry_run=False)
    with bench.store.write() as session:
        session.add(Repo(source="hub", repo_id="a/b"))
    tries: list[str] = []

    def step(session: Session) -> None:
        tries.append("try")
        if len(tries) == 1:
            session.add(Repo(source="hub", repo_id="a/b"))
            session.flush()

    journal.record([LINE], step)
    assert tries == ["try", "try"]
    with bench.store.read() as session:
        assert len(list(session.scalars(select(SyncOutcome)))) == 1
    assert journal.outcomes == [LINE]


def test_lasting_conflict_is_an_error_and_leaves_nothing(bench: Bench) -> None:
    journal = Journal(bench.store, {}, dry_run=False)

    def step(session: Session) -> None:
        session.add_all([Repo(source="hub", repo_id="a/b"), Repo(source="hub", repo_id="a/b")])
        session.flush()

    with pytest.raises(IntegrityError):
        journal.record([LINE], step)
    with bench.store.read() as session:
        assert list(session.scalars(select(Repo))) == []
        assert list(session.scalars(select(SyncOutcome))) == []


def test_dry_run_collects_and_runs_no_step(bench: Bench) -> None:
    journal = Journal(bench.store, {}, dry_run=True)

    def step(session: Session) -> None:
        raise AssertionError("a dry run writes nothing")

    journal.record([LINE], step)
    journal.close()
    assert journal.outcomes == [LINE]
    assert journal.run_id is None
