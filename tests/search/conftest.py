"""A real SQLite catalog per test, vectors that only depend on their name, and the packaged encoder once per session."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from search_world import World

from hub_router.store.session import Store, open_store

# huggingface_hub reads these once, when it is imported.
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(f"sqlite:///{tmp_path / 'catalog.db'}") as opened:
        yield opened


@pytest.fixture
def world(store: Store, tmp_path: Path) -> World:
    return World(store, tmp_path / "faiss")


@pytest.fixture(scope="session")
def offline():
    from hub_router.encoder import load_encoder

    return load_encoder("offline")


@pytest.fixture
def query() -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(b"query").digest()[:8])
    return np.random.default_rng(seed).standard_normal(16)
