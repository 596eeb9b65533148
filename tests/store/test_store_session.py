from __future__ import annotations

import re
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError

from hub_router.errors import StoreError
from hub_router.store.engine import parse_url
from hub_router.store.session import Store, open_store
from hub_router.store.tables import AdapterLabel, EncoderState, Repo


def repos(store: Store) -> int:
    with store.read() as session:
        return session.scalar(select(func.count()).select_from(Repo)) or 0


@pytest.mark.parametrize("kind", ["read", "write"])
def test_sqlite_settings(store: Store, kind: str) -> None:
    with getattr(store, kind)() as session:
        found = {
            name: session.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "synchronous": 1, "foreign_keys": 1, "busy_timeout": 30_000}


def test_write_commits_and_rows_stay_readable(store: Store) -> None:
    with store.write() as session:
        repo = Repo(source="hub", repo_id="org/one")
        session.add(repo)
    assert repo.repo_id == "org/one"
    assert repos(store) == 1


def test_write_is_undone_by_an_exception(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.write() as session:
        session.add(Repo(source="hub", repo_id="org/one"))
        session.flush()
        1 / 0  # noqa: B018
    assert repos(store) == 0


def test_read_refuses_to_write_and_later_writes_work(store: Store) -> None:
    with pytest.raises(StoreError, match="readonly"), store.read() as session:
        session.add(Repo(source="hub", repo_id="org/one"))
        session.flush()
    with store.write() as session:
        session.add(Repo(source="hub", repo_id="org/two"))
    assert repos(store) == 1


def test_reader_sees_one_state_while_others_write(store: Store) -> None:
    statement = select(func.count()).select_from(Repo)
    with store.read() as reading:
        assert reading.scalar(statement) == 0
        with store.write() as session:
            session.add(Repo(source="hub", repo_id="org/one"))
        assert reading.scalar(statement) == 0
    assert repos(store) == 1


def test_broken_constraint_is_not_taken_for_a_broken_database(store: Store) -> None:
    with pytest.raises(IntegrityError), store.write() as session:
        session.add(AdapterLabel(adapter_id=17, kind="tag", value="orphan"))


def test_threads_that_read_then_write_lose_nothing(store: Store) -> None:
    with store.write() as session:
        session.add(EncoderState(encoder="e", dimension=1, generation=0))

    def work(_: int) -> None:
        for _ in range(20):
            with store.write() as session:
                seen = session.scalar(select(EncoderState.generation))
                assert seen is not None
                session.execute(update(EncoderState).values(generation=seen + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    with store.read() as session:
        assert session.scalar(select(EncoderState.generation)) == 8 * 20


def test_lock_held_by_another_process_is_one_clear_error(store: Store) -> None:
    with store.read() as session:
        session.execute(text("PRAGMA busy_timeout=50"))
    other = sqlite3.connect(parse_url(store.url).database or "", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    locked = r"catalog\.db: database is locked; another process held it"
    with pytest.raises(StoreError, match=locked), store.write() as session:
        session.add(Repo(source="hub", repo_id="org/one"))
    assert time.monotonic() - started < 10
    assert repos(store) == 0
    other.close()


def test_url_shows_no_password(store: Store) -> None:
    assert store.url.startswith("sqlite:///")


KILLED = """
import sys
from hub_router.store.session import open_store
from hub_router.store.tables import Repo
store = open_store(sys.argv[1])
for number in range(10**9):
    with store.write() as session:
        session.add_all(Repo(source="hub", repo_id=f"org/{number}-{part}") for part in range(10))
        session.flush()
        if number == 5:
            print("in the middle of", number, flush=True)
            if sys.argv[2] == "open":
                sys.stdin.read()
    if number >= 5:
        print("committed", number, flush=True)
"""


@pytest.mark.parametrize("moment", ["open", "busy"])
def test_killed_writer_leaves_a_usable_catalog(database_url: str, moment: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, database_url, moment],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "in the middle of 5\n"
    if moment == "busy":
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    said = process.stdout.read()
    process.stdin.close()
    process.stdout.close()
    process.wait(timeout=30)
    committed = [int(number) for number in re.findall(r"committed (\d+)\n", said)]
    least = committed[-1] + 1 if committed else 5

    started = time.monotonic()
    with open_store(database_url) as store:
        left = repos(store)
        with store.write() as session:
            session.add(Repo(source="hub", repo_id="org/after"))
        assert repos(store) == left + 1
    assert time.monotonic() - started < 10
    # Whole transactions only, and every one that was reported committed.
    assert left % 10 == 0
    assert left in ((50,) if moment == "open" else (10 * least, 10 * (least + 1)))
    with sqlite3.connect(Path(parse_url(database_url).database or "")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
