"""The open catalog: read sessions that never write, and write sessions that are one transaction each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from hub_router.store import schema
from hub_router.store.engine import open_engine, parse_url, reader, shown, translated, writer


class Store:
    """A catalog database; may be used from any thread, with one session per thread.

    Args:
        engine (Engine): from :func:`hub_router.store.engine.open_engine`, on a database at the current schema.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reading = sessionmaker(reader(engine), expire_on_commit=False)
        self._writing = sessionmaker(writer(engine), expire_on_commit=False)

    @property
    def url(self) -> str:
        """The database URL without its password."""
        return shown(self._engine.url)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one unchanging state of the catalog and refuses to write.

        Returns:
            Iterator[Session]: closed at the end of the block.

        Raises:
            StoreError: the database cannot be used.
        """
        with translated(self._engine.url), self._reading() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that is one transaction: committed at the end of the block, rolled back by an exception.

        It takes the catalog's write lock at its first statement and waits for other writers, on SQLite for up to 30 s.
        Do slow work (downloads, tensor reads, encoding) before the block.

        Returns:
            Iterator[Session]: its objects stay readable after the commit.

        Raises:
            StoreError: the database cannot be used, or stayed locked.
        """
        with translated(self._engine.url), self._writing.begin() as session:
            yield session

    def close(self) -> None:
        """Closes the pooled connections; the store must not be used afterwards."""
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_store(database_url: str) -> Store:
    """Opens the catalog; a database that does not exist yet or is empty is created at the current schema.

    Args:
        database_url (str): SQLAlchemy URL.

    Returns:
        Store: close it when done, or use it as a context manager.

    Raises:
        SettingsError: the URL cannot be used.
        SchemaError: the database is at another schema version, or belongs to another application.
        StoreError: the database cannot be opened.
    """
    schema.prepare(database_url)
    return Store(open_engine(parse_url(database_url)))
