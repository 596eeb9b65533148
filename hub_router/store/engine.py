"""Database engines: URL checks, and the settings that let several processes share one catalog.

Readers see one state of the catalog for the length of their transaction, and writers come one after the other, on both
databases. Python's sqlite3 driver opens transactions by rules of its own; it is told to keep out, and SQLAlchemy's
``begin`` event opens them: ``BEGIN IMMEDIATE`` for a writer, so that two writers queue instead of failing when the
second one tries to upgrade its read lock. On PostgreSQL a writer first takes a lock that ends with its transaction.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError

from hub_router.errors import SettingsError, StoreError

BUSY_SECONDS = 30.0
_WRITER = "hub_router_writer"
# Any constant will do; it names the lock under which PostgreSQL writers queue.
_POSTGRESQL_LOCK = 4_711_002


def parse_url(database_url: str) -> URL:
    """The database URL, checked.

    Args:
        database_url (str): SQLAlchemy URL, e.g. ``sqlite:////home/me/catalog.db`` or ``postgresql://host/catalog``.

    Returns:
        URL: parsed.

    Raises:
        SettingsError: it is no URL, or an in-memory SQLite database, which threads and processes cannot share.
    """
    try:
        url = make_url(database_url)
    except (ArgumentError, ValueError) as error:
        raise SettingsError(
            "the database URL cannot be parsed; expected the form sqlite:////absolute/path/catalog.db or "
            "postgresql://user@host/name in --database-url or HUB_ROUTER_DATABASE_URL"
        ) from error
    if url.get_backend_name() == "sqlite":
        on_disk = url.database and ":memory:" not in url.database and "uri" not in url.query
        if not on_disk or url.drivername not in ("sqlite", "sqlite+pysqlite"):
            raise SettingsError(
                f"the database URL {shown(url)} names an in-memory database, a file: URI or another driver, which "
                "threads and processes cannot share; expected sqlite:////absolute/path/catalog.db"
            )
    return url


def shown(url: URL) -> str:
    """The URL without its password, for messages."""
    return url.render_as_string(hide_password=True)


def sqlite_file(url: URL) -> Path | None:
    """The file of a SQLite database, None for a server."""
    if url.get_backend_name() != "sqlite":
        return None
    return Path(url.database or "").absolute()


def open_engine(url: URL) -> Engine:
    """An engine on the database; nothing is connected yet.

    Args:
        url (URL): from :func:`parse_url`.

    Returns:
        Engine: thread-safe; SQLite connections run in WAL mode with foreign keys and a busy timeout of 30 s.

    Raises:
        SettingsError: the database's driver is not installed.
    """
    sqlite = url.get_backend_name() == "sqlite"
    # Threads of a sync hold a connection each for moments, so a limit on connections would only make them wait.
    options: dict[str, object] = {"max_overflow": -1, "pool_pre_ping": not sqlite}
    if sqlite:
        options["connect_args"] = {"timeout": BUSY_SECONDS}
    try:
        engine = create_engine(url, **options)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise SettingsError(
            f"no driver for the database URL {shown(url)}: {error}; install the driver (for PostgreSQL: "
            "pip install 'psycopg[binary]') or use sqlite:////absolute/path/catalog.db"
        ) from error
    if sqlite:
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    elif engine.dialect.name == "postgresql":
        event.listen(engine, "begin", _begin_postgresql)
    return engine


def reader(engine: Engine) -> Engine:
    """The same engine and pool, for transactions that may not write."""
    if engine.dialect.name == "postgresql":
        return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return engine.execution_options()


def writer(engine: Engine) -> Engine:
    """The same engine and pool, for transactions that write, which hold the write lock from their start."""
    return engine.execution_options(**{_WRITER: True})


@contextmanager
def translated(url: URL) -> Iterator[None]:
    """Turns the driver's operational errors (locked, full, malformed, unreachable) into one that a user can act on.

    Args:
        url (URL): database, for the message.

    Raises:
        StoreError: the database cannot be used.
    """
    try:
        yield
    except DatabaseError as error:
        # Subclasses other than OperationalError (a broken constraint, wrong SQL) are mistakes of the code above.
        if not isinstance(error, OperationalError) and type(error) is not DatabaseError:
            raise
        text = str(error.orig)
        if "locked" in text:
            hint = f"another process held it for {BUSY_SECONDS:.0f} s; run the command again when that one is done"
        elif "not a database" in text or "malformed" in text:
            hint = "restore it from a backup, or move it aside and run hub-router sync again"
        else:
            hint = "check --database-url, free space and permissions with: hub-router doctor"
        raise StoreError(f"catalog database {shown(url)}: {text}; {hint}") from error


def _configure_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None
    # Switching a new file to WAL can fail at once in spite of the busy timeout when processes meet on first use.
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get(_WRITER, False)
    connection.exec_driver_sql(f"PRAGMA query_only={'OFF' if writing else 'ON'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get(_WRITER, False):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRESQL_LOCK})")
