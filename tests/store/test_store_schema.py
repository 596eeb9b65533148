from __future__ import annotations

import logging
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, func, inspect, select

from hub_router.errors import SchemaError, SettingsError, StoreError
from hub_router.settings import bundled
from hub_router.store import schema
from hub_router.store.engine import open_engine, parse_url, writer
from hub_router.store.session import open_store
from hub_router.store.tables import (
    AdapterFile,
    AdapterSample,
    AdapterSpectrum,
    Base,
    Composition,
    CompositionMember,
    EncoderState,
    PrototypeSet,
    PrototypeVector,
    SyncOutcome,
    SyncRun,
    TextEmbedding,
)

# A later migration in miniature: rebuilding the parent of most tables is what loses rows when done wrongly.
SECOND = """
import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade():
    sqlite = op.get_context().dialect.name == "sqlite"
    with op.batch_alter_table("adapters", recreate="always" if sqlite else "never") as batch:
        batch.add_column(sa.Column("note", sa.Text(), nullable=False, server_default=""))
    {extra}


def downgrade():
    with op.batch_alter_table("adapters") as batch:
        batch.drop_column("note")
"""


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """The application's migrations and one more."""
    return with_second(tmp_path / "newer", extra="pass")


def with_second(folder: Path, extra: str) -> Path:
    shutil.copytree(bundled("migrations"), folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / "0002_add_note.py").write_text(SECOND.format(extra=extra))
    return folder


def described(url: str) -> dict[str, Any]:
    """Every table's columns, keys, indexes and constraints, as the database itself reports them."""
    engine = create_engine(url)
    seen = inspect(engine)
    found = {
        table: {
            "columns": [
                (c["name"], str(c["type"]), c["nullable"], c["default"], c["primary_key"])
                for c in sorted(seen.get_columns(table), key=lambda c: c["name"])
            ],
            "primary key": seen.get_pk_constraint(table),
            "foreign keys": sorted(seen.get_foreign_keys(table), key=lambda key: key["name"]),
            "uniques": sorted(seen.get_unique_constraints(table), key=lambda key: key["name"]),
            "indexes": sorted(seen.get_indexes(table), key=lambda key: key["name"]),
            "checks": seen.get_check_constraints(table),
        }
        for table in seen.get_table_names()
        if table != "alembic_version"
    }
    engine.dispose()
    return found


def migrate(url: str, target: str) -> None:
    engine = open_engine(parse_url(url))
    with writer(engine).begin() as connection:
        run = command.downgrade if target == "base" else command.upgrade
        run(schema.alembic_config(connection=connection), target)
    engine.dispose()


def fill(url: str, add_adapter: Any) -> None:
    """One row or more in every table."""
    with open_store(url) as store, store.write() as session:
        adapter = add_adapter(session, "org/one", labels={"tag": ("lora",), "target": ("q_proj", "v_proj")})
        key = {"adapter_id": adapter, "weights_hash": "w"}
        run = SyncRun(request={"targets": ["org/one"]})
        run.outcomes = [SyncOutcome(source="hub", repo_id="org/one", outcome="added")]
        pool = Composition(name="pool", base_model="org/base", method="arrow", hyperparameters={"top_k": 4})
        pool.members = [CompositionMember(position=0, name="one", **key)]
        prototypes = PrototypeSet(name="set", method="maple", base_model="org/base")
        prototypes.vectors = [PrototypeVector(module="m", vector=b"\0\0\0\0", **key)]
        session.add_all(
            [
                run,
                pool,
                prototypes,
                AdapterFile(adapter_id=adapter, path="adapter_config.json", size_bytes=2**40, sha256="f"),
                AdapterSample(adapter_id=adapter, split="sample", position=0, input="in", output="out", origin="o"),
                AdapterSpectrum(module="m", singular_values=b"\0\0\0\0", **key),
                EncoderState(encoder="e", dimension=1, generation=3),
                TextEmbedding(
                    adapter_id=adapter, encoder="e", kind="card", position=0, text="t", text_hash="h", vector=b"1234"
                ),
            ]
        )


def counts(url: str) -> dict[str, int]:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one()
            for table in Base.metadata.sorted_tables
        }
    engine.dispose()
    return found


def test_migrated_database_equals_the_models(database_url: str, tmp_path: Path) -> None:
    schema.prepare(database_url)
    engine = create_engine(database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()
    modelled = f"sqlite:///{tmp_path / 'modelled.db'}"
    Base.metadata.create_all(create_engine(modelled))
    assert described(database_url) == described(modelled)
    assert len(described(modelled)) == len(Base.metadata.tables)


def test_a_difference_would_be_seen(database_url: str) -> None:
    schema.prepare(database_url)
    before = described(database_url)
    with sqlite3.connect(parse_url(database_url).database or "") as connection:
        connection.execute("DROP INDEX ix_adapters_repo_pk")
    assert described(database_url) != before


def test_one_head_and_numbered_names() -> None:
    scripts = ScriptDirectory.from_config(schema.alembic_config())
    assert len(scripts.get_heads()) == 1
    names = sorted(path.stem for path in (bundled("migrations") / "versions").glob("*.py"))
    assert all(re.fullmatch(r"\d{4}_[a-z]+(_[a-z]+)+", name) for name in names)
    assert [name[:4] for name in names] == [f"{number:04d}" for number in range(1, len(names) + 1)]
    assert {script.revision for script in scripts.walk_revisions()} == {name[:4] for name in names}


def test_down_to_base_and_up_again(database_url: str) -> None:
    schema.prepare(database_url)
    before = described(database_url)
    migrate(database_url, "base")
    assert described(database_url) == {}
    assert schema.status(database_url).state == "empty"
    schema.prepare(database_url)
    assert described(database_url) == before


def test_upgrade_of_a_filled_database_keeps_every_row(database_url: str, newer: Path, add_adapter: Any) -> None:
    fill(database_url, add_adapter)
    before = counts(database_url)
    assert min(before.values()) >= 1
    status = schema.upgrade(database_url, newer)
    assert (status.state, status.current, status.head) == ("current", "0002", "0002")
    assert counts(database_url) == before
    engine = open_engine(parse_url(database_url))
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT note FROM adapters").all() == [("",)]
        assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
    engine.dispose()


def test_upgrade_of_a_current_database_changes_nothing(database_url: str, add_adapter: Any) -> None:
    fill(database_url, add_adapter)
    before = counts(database_url)
    assert schema.upgrade(database_url).state == "current"
    assert counts(database_url) == before


def test_behind_is_refused_with_the_way_out(database_url: str, newer: Path) -> None:
    schema.prepare(database_url)
    status = schema.status(database_url, newer)
    assert (status.state, status.current, status.head, status.pending) == ("behind", "0001", "0002", ("0002",))
    with pytest.raises(SchemaError) as caught:
        schema.prepare(database_url, newer)
    message = str(caught.value)
    file = parse_url(database_url).database
    for part in ("0001", "0002", f"copy {file}", "hub-router db upgrade"):
        assert part in message
    assert schema.status(database_url).state == "current"


def test_ahead_is_refused_with_the_way_out(database_url: str, newer: Path) -> None:
    schema.upgrade(database_url, newer)
    assert schema.status(database_url).state == "ahead"
    for refused in (schema.prepare, schema.upgrade, open_store):
        with pytest.raises(SchemaError) as caught:
            refused(database_url)
        for part in ("0001", "0002", "backup", "hub-router db upgrade", "pip install --upgrade hub-router"):
            assert part in str(caught.value)


@pytest.mark.parametrize("with_revision", [False, True])
def test_foreign_database_is_left_alone(tmp_path: Path, with_revision: bool) -> None:
    file = tmp_path / "other.db"
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE invoices (id INTEGER)")
        if with_revision:
            connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
            connection.execute("INSERT INTO alembic_version VALUES ('9f3c')")
    url = f"sqlite:///{file}"
    before = described(url)
    for refused in (schema.prepare, schema.upgrade):
        with pytest.raises(SchemaError) as caught:
            refused(url)
        for part in ("9f3c" if with_revision else "none", "0001", "not a catalog's", "hub-router db upgrade", "-wal"):
            assert part in str(caught.value)
    assert schema.status(url).state == "foreign"
    assert described(url) == before


def test_failed_migration_leaves_the_database_as_it_was(database_url: str, tmp_path: Path, add_adapter: Any) -> None:
    fill(database_url, add_adapter)
    before, rows = described(database_url), counts(database_url)
    broken = with_second(tmp_path / "broken", extra='raise RuntimeError("half-way")')
    with pytest.raises(RuntimeError, match="half-way"):
        schema.upgrade(database_url, broken)
    assert described(database_url) == before
    assert counts(database_url) == rows
    assert schema.status(database_url).state == "current"


def test_migration_that_orphans_rows_is_undone(database_url: str, tmp_path: Path, add_adapter: Any) -> None:
    fill(database_url, add_adapter)
    rows = counts(database_url)
    orphaning = with_second(tmp_path / "orphaning", extra='op.execute("DELETE FROM repos")')
    with pytest.raises(SchemaError, match=r"1 rows refer to rows that do not exist \(adapters -> repos\)"):
        schema.upgrade(database_url, orphaning)
    assert counts(database_url) == rows
    assert schema.status(database_url).state == "current"


def test_status_creates_nothing(tmp_path: Path) -> None:
    status = schema.status(f"sqlite:///{tmp_path / 'home' / 'catalog.db'}")
    assert (status.state, status.current, status.head, status.pending) == ("empty", None, "0001", ("0001",))
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_no_database(tmp_path: Path) -> None:
    file = tmp_path / "catalog.db"
    file.write_text("this is a diary, not a database\n" * 100)
    with pytest.raises(StoreError, match=r"not a database; restore it from a backup, or move it aside"):
        schema.prepare(f"sqlite:///{file}")
    assert file.read_text().startswith("this is a diary")


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(SettingsError, match=r"home of the catalog database cannot be created.*--home DIR"):
        schema.prepare(f"sqlite:///{tmp_path / 'home' / 'catalog.db'}")


def test_odd_folder_names(tmp_path: Path) -> None:
    folder = tmp_path / "50% of my adapters; part 2"
    migrations = shutil.copytree(bundled("migrations"), folder / "migrations")
    schema.prepare(f"sqlite:///{folder / 'catalog.db'}", migrations)
    assert schema.status(f"sqlite:///{folder / 'catalog.db'}", migrations).state == "current"


def test_logging_is_left_alone(database_url: str) -> None:
    root, mine = logging.getLogger(), logging.getLogger("test_store_schema.some_application")
    before = (root.level, list(root.handlers), mine.disabled, logging.getLogger("alembic").level)
    schema.prepare(database_url)
    assert (root.level, list(root.handlers), mine.disabled, logging.getLogger("alembic").level) == before


FIRST_USE = """
import sys, time
from pathlib import Path
from hub_router.store.session import open_store
from hub_router.store.tables import Repo
url, name, go = sys.argv[1], sys.argv[2], Path(sys.argv[3])
print("waiting", flush=True)
while not go.exists():
    time.sleep(0.001)
with open_store(url) as store:
    with store.write() as session:
        session.add(Repo(source="hub", repo_id=name))
"""


def test_processes_that_meet_on_first_use(database_url: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_USE, database_url, f"org/{number}", str(go)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
    time.sleep(0.05)
    go.touch()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert counts(database_url)["repos"] == 4
    with sqlite3.connect(parse_url(database_url).database or "") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert schema.status(database_url).state == "current"
