"""A real SQLite catalog per test, and a builder of adapter rows."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from hub_router.store.session import Store, open_store
from hub_router.store.tables import Adapter, AdapterLabel, Repo

AddAdapter = Callable[..., int]


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'home' / 'catalog.db'}"


@pytest.fixture(scope="session")
def empty_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database file without rows; copying it is quicker than migrating anew for every test."""
    file = tmp_path_factory.mktemp("store") / "catalog.db"
    open_store(f"sqlite:///{file}").close()
    return file


@pytest.fixture
def store(database_url: str, empty_catalog: Path) -> Iterator[Store]:
    file = Path(database_url.removeprefix("sqlite:///"))
    file.parent.mkdir()
    shutil.copy(empty_catalog, file)
    with open_store(database_url) as opened:
        yield opened


@pytest.fixture
def add_adapter() -> AddAdapter:
    """Adds one adapter row (and its repository) and gives its id; keywords override columns and give labels."""

    def add(
        session: Session,
        repo_id: str,
        subfolder: str = "",
        *,
        source: str = "hub",
        ranks: tuple[int, ...] = (8,),
        labels: dict[str, tuple[str, ...]] | None = None,
        author: str | None = None,
        **columns: Any,
    ) -> int:
        repo = session.scalars(select(Repo).where(Repo.source == source, Repo.repo_id == repo_id)).one_or_none()
        if repo is None:
            repo = Repo(source=source, repo_id=repo_id, author=author)
            session.add(repo)
        values: dict[str, Any] = {
            "revision": "a" * 40,
            "status": "ready",
            "path": f"/data/{repo_id}/{subfolder}",
            "base_model": "org/base",
            "base_model_resolved": "org/base",
            "licence": "mit",
            "peft_type": "LORA",
            "ranks": list(ranks),
            "rank_min": min(ranks),
            "rank_max": max(ranks),
            "dtypes": ["float32"],
            "module_count": 2,
            "parameters": 1024,
            "size_bytes": 4096,
            "weights_hash": hashlib.sha256(f"{repo_id}/{subfolder}".encode()).hexdigest(),
            "card_text": "",
            "notes": [],
        }
        adapter = Adapter(repo=repo, subfolder=subfolder, **(values | columns))
        adapter.labels = [
            AdapterLabel(kind=kind, value=value) for kind, entries in (labels or {}).items() for value in entries
        ]
        session.add(adapter)
        session.flush()
        return adapter.id

    return add
