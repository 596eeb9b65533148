"""``db``: the schema's state, and the way up."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import Run, invoke


def head(home: Path) -> str:
    return str(json.loads(invoke(["db", "status", "--json", "--home", str(home)]).stdout)["head"])


def set_revision(home: Path, revision: str) -> None:
    with sqlite3.connect(home / "catalog.db") as database:
        database.execute("update alembic_version set version_num = ?", (revision,))


def test_status_of_a_catalog_that_does_not_exist_creates_nothing(tmp_path: Path) -> None:
    done = invoke(["db", "status", "--json", "--home", str(tmp_path / "home")])
    document = json.loads(done.stdout)
    assert set(document) == {"url", "state", "current", "head", "pending"}
    assert (document["state"], document["current"], done.exit_code) == ("empty", None, 0)
    assert not (tmp_path / "home").exists()


def test_status_of_a_current_catalog(run: Run, run_json: Callable[..., Any], home: Path) -> None:
    document = run_json("db", "status")
    assert document["state"] == "current"
    assert document["current"] == document["head"]
    assert document["url"] == f"sqlite:///{home / 'catalog.db'}"
    assert "current" in run("db", "status").stdout


def test_upgrade_creates_and_is_idempotent(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for before, applied in ((None, True), (head(home), False)):
        document = json.loads(invoke(["db", "upgrade", "--json", "--home", str(home)]).stdout)
        assert set(document) == {"url", "before", "after", "applied"}
        assert (document["before"], document["after"]) == (before, head(home))
        assert bool(document["applied"]) == applied
    assert json.loads(invoke(["list", "--json", "--home", str(home)]).stdout) == {"adapters": [], "repositories": []}


def test_a_newer_database_is_refused_everywhere(run: Run, home: Path) -> None:
    set_revision(home, "9999")
    assert run("db", "status", status=1).stdout.splitlines()[1].split() == ["state", "ahead"]
    for arguments in (["list"], ["db", "upgrade"], ["search", "x"]):
        done = run(*arguments, status=1)
        assert "9999" in done.stderr
        assert done.stdout == ""


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    url = "postgresql+no_such_driver://user:top-secret@localhost/catalog"
    for arguments in (["list"], ["db", "status"], ["db", "upgrade"], ["doctor"]):
        done = invoke([*arguments, "--database-url", url, "--home", str(tmp_path)])
        assert done.exit_code == 1
        assert "top-secret" not in done.output


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "sqlite:///:memory:"])
def test_urls_that_cannot_be_used(url: str, tmp_path: Path) -> None:
    done = invoke(["list", "--database-url", url, "--home", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").write_bytes(b"not a database" * 100)
    done = invoke(["list", "--home", str(tmp_path)])
    assert done.exit_code == 1
    assert "not a database" in done.stderr
