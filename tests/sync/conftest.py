from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empty_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated catalog without rows; tests copy it, which is faster than migrating."""
    from hub_router.store.session import open_store

    path = tmp_path_factory.mktemp("empty") / "catalog.db"
    open_store(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def bench(tmp_path: Path, empty_catalog: Path) -> Iterator[object]:
    from sync_world import Bench

    from hub_router.demo.hubserver import LoopbackHub
    from hub_router.store.session import open_store

    (tmp_path / "hub").mkdir()
    shutil.copy(empty_catalog, tmp_path / "catalog.db")
    with LoopbackHub(tmp_path / "hub") as hub, open_store(f"sqlite:///{tmp_path / 'catalog.db'}") as store:
        yield Bench(tmp_path, hub, store)
