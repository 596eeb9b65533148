"""The schema version of a catalog database: created on first use, checked ever after, upgraded only on request.

Migrations run in one transaction that holds the database's write lock, so processes that meet on first use queue up,
and a process that is killed half-way leaves the database as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, inspect

from hub_router.errors import SchemaError, SettingsError
from hub_router.settings import bundled
from hub_router.store.engine import open_engine, parse_url, reader, shown, sqlite_file, translated, writer

_VERSION_TABLE = "alembic_version"


@dataclass(frozen=True)
class SchemaStatus:
    """Where a database stands.

    Args:
        url (str): database URL without its password.
        state (str): ``empty`` (created on first use), ``current``, ``behind``, ``ahead`` (written by a newer release)
            or ``foreign`` (holds tables that are not a catalog's).
        current (str | None): the database's revision.
        head (str): the revision that this release needs.
        pending (tuple[str, ...]): revisions that an upgrade would apply, oldest first.
    """

    url: str
    state: str
    current: str | None
    head: str
    pending: tuple[str, ...] = ()


def status(database_url: str, folder: Path | None = None) -> SchemaStatus:
    """Where the database stands; changes and creates nothing.

    Args:
        database_url (str): SQLAlchemy URL.
        folder (Path | None): folder of the migrations; default the application's own.

    Returns:
        SchemaStatus: for a SQLite file that does not exist, ``empty``.

    Raises:
        SettingsError: the URL cannot be used.
        StoreError: the database cannot be opened.
    """
    url = parse_url(database_url)
    file = sqlite_file(url)
    if file is not None and not file.exists():
        scripts = ScriptDirectory.from_config(alembic_config(folder))
        return _classified(url, scripts, current=(), tables=set())
    with transaction(url, write=False) as connection:
        return _status(connection, folder)


def prepare(database_url: str, folder: Path | None = None) -> None:
    """Makes sure that the database is at the schema of this release; creates it when it is empty.

    Args:
        database_url (str): SQLAlchemy URL; the parent folder of a SQLite file is created.
        folder (Path | None): folder of the migrations; default the application's own.

    Raises:
        SettingsError: the URL cannot be used.
        SchemaError: the database is behind, ahead, or another application's.
        StoreError: the database cannot be opened.
    """
    url = parse_url(database_url)
    _make_parent(url)
    with transaction(url, write=False) as connection:
        found = _status(connection, folder)
    if found.state == "empty":
        # Another process may have been quicker: look again under the write lock.
        with transaction(url, write=True) as connection:
            found = _status(connection, folder)
            if found.state == "empty":
                found = _migrate(connection, folder)
    if found.state != "current":
        raise SchemaError(_refusal(found, sqlite_file(url)))


def upgrade(database_url: str, folder: Path | None = None) -> SchemaStatus:
    """Brings the database to the schema of this release, all or nothing; its rows are kept.

    Args:
        database_url (str): SQLAlchemy URL; the parent folder of a SQLite file is created.
        folder (Path | None): folder of the migrations; default the application's own.

    Returns:
        SchemaStatus: of the upgraded database.

    Raises:
        SettingsError: the URL cannot be used.
        SchemaError: the database is ahead, another application's, or rows break a foreign key after the upgrade.
        StoreError: the database cannot be opened.
    """
    url = parse_url(database_url)
    _make_parent(url)
    with transaction(url, write=True) as connection:
        found = _status(connection, folder)
        if found.state in ("empty", "behind"):
            found = _migrate(connection, folder)
    if found.state != "current":
        raise SchemaError(_refusal(found, sqlite_file(url)))
    return found


def alembic_config(folder: Path | None = None, connection: Connection | None = None) -> Config:
    """Alembic's configuration, without an ini file.

    Args:
        folder (Path | None): folder of the migrations; default the application's own.
        connection (Connection | None): where ``env.py`` runs the migrations.

    Returns:
        Config: for ``alembic.command``.
    """
    config = Config()
    # The file format doubles % signs, which a folder's name may hold.
    config.set_main_option("script_location", str(folder or bundled("migrations")).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


@contextmanager
def transaction(url: URL, write: bool) -> Iterator[Connection]:
    """A connection in one transaction, for looking at the schema or, with ``write``, for changing it.

    Args:
        url (URL): from :func:`hub_router.store.engine.parse_url`.
        write (bool): hold the write lock, with foreign keys unenforced.

    Returns:
        Iterator[Connection]: committed at the end of the block, rolled back by an exception.

    Raises:
        StoreError: the database cannot be used.
    """
    with translated(url):
        engine = open_engine(url)
        try:
            with (writer(engine) if write else reader(engine)).connect() as connection:
                if write and connection.dialect.name == "sqlite":
                    # Batch migrations drop and rebuild tables, and with enforcement on a drop deletes the rows that
                    # refer to it. The pragma does nothing inside a transaction, hence on the driver's connection.
                    connection.connection.cursor().execute("PRAGMA foreign_keys=OFF")
                with connection.begin():
                    yield connection
        finally:
            engine.dispose()


def _migrate(connection: Connection, folder: Path | None) -> SchemaStatus:
    command.upgrade(alembic_config(folder, connection), "head")
    if connection.dialect.name == "sqlite":
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
        if broken:
            tables = ", ".join(sorted({f"{row[0]} -> {row[2]}" for row in broken}))
            raise SchemaError(
                f"the upgrade of {shown(connection.engine.url)} was undone: {len(broken)} rows refer to rows that do "
                f"not exist ({tables}); restore a backup, or sync into a new home with --home DIR"
            )
    return _status(connection, folder)


def _status(connection: Connection, folder: Path | None) -> SchemaStatus:
    scripts = ScriptDirectory.from_config(alembic_config(folder))
    current = MigrationContext.configure(connection).get_current_heads()
    tables = set(inspect(connection).get_table_names()) - {_VERSION_TABLE}
    return _classified(connection.engine.url, scripts, current, tables)


def _classified(url: URL, scripts: ScriptDirectory, current: tuple[str, ...], tables: set[str]) -> SchemaStatus:
    head = scripts.get_current_head() or ""
    order = [script.revision for script in scripts.walk_revisions()][::-1]
    revision = ", ".join(current) or None
    if revision is None:
        return SchemaStatus(shown(url), "foreign" if tables else "empty", None, head, () if tables else tuple(order))
    if revision == head:
        return SchemaStatus(shown(url), "current", revision, head)
    if revision in order:
        pending = tuple(order[order.index(revision) + 1 :])
        return SchemaStatus(shown(url), "behind", revision, head, pending)
    ours = {"repos", "adapters"} <= tables
    return SchemaStatus(shown(url), "ahead" if ours else "foreign", revision, head)


def _refusal(found: SchemaStatus, file: Path | None) -> str:
    backup = f"copy {file} together with its -wal and -shm files" if file else "make a backup (pg_dump)"
    where = f"catalog database {found.url} is at schema revision {found.current or 'none'}"
    if found.state == "behind":
        return (
            f"{where}, this release needs {found.head}; {backup} first, then run: hub-router db upgrade "
            f"(applies {', '.join(found.pending)})"
        )
    if found.state == "ahead":
        return (
            f"{where}, which is newer than the {found.head} of this release; install the newer release with "
            "pip install --upgrade hub-router (hub-router db upgrade never goes back), or restore the backup made "
            f"before the upgrade; before you try anything, {backup}"
        )
    return (
        f"{where} and holds tables that are not a catalog's, this release needs {found.head}; hub-router db upgrade "
        f"leaves such a database alone; name another with --database-url or --home (and before you empty this one, "
        f"{backup})"
    )


def _make_parent(url: URL) -> None:
    file = sqlite_file(url)
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"the folder {file.parent} of the catalog database cannot be created: {error}; "
            "choose another with --home DIR"
        ) from error
