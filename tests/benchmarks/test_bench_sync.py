"""A run that finds nothing to do, over 1,000 repositories on a loopback Hub: less than 10 s.

Not part of the default run; start it with: pytest tests/benchmarks/test_bench_sync.py -m '' -o addopts=
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

# Read once, when huggingface_hub is imported.
os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}

from safetensors.numpy import save_file

from hub_router.demo.hubserver import LoopbackHub
from hub_router.lora.facts import inspect
from hub_router.store.session import Store, open_store
from hub_router.sync.run import ClientOptions, SyncRequest, SyncSummary, sync

REPOS = 1_000
LIMIT_SECONDS = 10.0


def write_hub(root: Path) -> list[str]:
    """1,000 repositories of one author and one each of 1,000 authors, all with the same tiny adapter."""
    first = root / "first"
    first.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{stem}.lora_A.weight": np.ones((1, 4), np.float32),
        f"{stem}.lora_B.weight": np.ones((4, 1), np.float32),
    }
    save_file(factors, first / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "owner/base", "r": 1, "lora_alpha": 1}
    (first / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    ids = [f"ann/task{number}" for number in range(REPOS)] + [f"author{number}/task" for number in range(REPOS)]
    for repo_id in ids:
        folder = root / "hub" / repo_id
        folder.mkdir(parents=True)
        for path in first.iterdir():
            os.link(path, folder / path.name)
        (folder / "README.md").write_text(f"---\nbase_model: owner/base\n---\n{repo_id}\n")
    return ids


class World:
    """A served Hub and a catalog that already holds all of it."""

    def __init__(self, hub: LoopbackHub, store: Store, cache: Path, ids: list[str]) -> None:
        self.hub, self.store, self.ids = hub, store, ids
        self.options = ClientOptions(endpoint=hub.endpoint, cache_dir=cache)

    def sync(self, request: SyncRequest) -> SyncSummary:
        return sync(self.store, request, inspect, options=self.options)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("bench")
    ids = write_hub(root)
    with LoopbackHub(root / "hub") as hub, open_store(f"sqlite:///{root / 'catalog.db'}") as store:
        made = World(hub, store, root / "cache", ids)
        first = made.sync(SyncRequest(base_model="owner/base"))
        assert first.counts["added"] == 2 * REPOS
        yield made


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", ["by author", "by ids of one author", "by ids of 1,000 authors"])
def test_no_op_sync_of_1000_repositories(benchmark: object, world: World, way: str) -> None:
    request, requests = {
        "by author": (SyncRequest(author="ann"), 1),
        "by ids of one author": (SyncRequest(tuple(world.ids[:REPOS])), 1),
        "by ids of 1,000 authors": (SyncRequest(tuple(world.ids[REPOS:])), REPOS),
    }[way]
    summary = benchmark.pedantic(world.sync, args=(request,), rounds=3)  # type: ignore[attr-defined]
    assert summary.counts["unchanged"] == REPOS
    assert summary.requests == requests
    assert benchmark.stats["max"] < LIMIT_SECONDS  # type: ignore[attr-defined]
    benchmark.extra_info["requests"] = summary.requests  # type: ignore[attr-defined]
