"""A loopback Hub, a catalog and tiny adapters; what the sync tests are built from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sqlalchemy import select

from hub_router.demo.hubserver import LoopbackHub
from hub_router.lora.facts import inspect
from hub_router.store.session import Store
from hub_router.store.tables import Adapter, Repo
from hub_router.sync.run import ClientOptions, SyncRequest, SyncSummary, sync

BASE = "owner/base"
CARD = (
    "---\nlicense: MIT\nbase_model: owner/base\ntags:\n- demo\n- sst2\ndatasets: [glue]\n---\n"
    "# Sentiment\n\nFinds moods.\n"
)
PATIENCE = ClientOptions(timeout=1.0, retries=2, backoff=0.01, max_backoff=0.05, max_retry_after=2.0)


def write_adapter(folder: Path, seed: int = 0, rank: int = 2, card: str | None = CARD, width: int = 8) -> Path:
    """A folder as PEFT saves it: config, weights of two projections in one layer, a card and samples."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    tensors = {}
    for name in ("q_proj", "v_proj"):
        stem = f"base_model.model.model.layers.0.self_attn.{name}"
        tensors[f"{stem}.lora_A.weight"] = draw.normal(size=(rank, width)).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = draw.normal(size=(width, rank)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if card is not None:
        (folder / "README.md").write_text(card)
    rows = [{"input": f"review {number}", "output": "good"} for number in range(3)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Bench:
    """A loopback Hub, a catalog, and shortcuts to sync one with the other and to look at the result."""

    def __init__(self, folder: Path, hub: LoopbackHub, store: Store) -> None:
        self.folder = folder
        self.hub = hub
        self.store = store
        self.options = replace(PATIENCE, endpoint=hub.endpoint, cache_dir=folder / "cache")

    def repo(self, repo_id: str, seed: int = 0, **changes: object) -> Path:
        """An adapter's repository on the Hub."""
        return write_adapter(self.folder / "hub" / repo_id, seed, **changes)  # type: ignore[arg-type]

    def sync(self, *targets: str | Path, **asked: object) -> SyncSummary:
        request = SyncRequest(targets=targets, **{"workers": 4, **asked})  # type: ignore[arg-type]
        return sync(self.store, request, inspect, options=self.options)

    def rows(self) -> dict[str, tuple[str, str]]:
        """Current adapters: status and reason by reference."""
        with self.store.read() as session:
            query = select(Repo.repo_id, Adapter).join(Adapter).where(Adapter.current)
            return {
                f"{repo_id}/{row.subfolder}".rstrip("/"): (row.status, row.reason)
                for repo_id, row in session.execute(query)
            }

    def adapter(self, repo_id: str, subfolder: str = "") -> Adapter:
        """The current row of an adapter."""
        with self.store.read() as session:
            query = select(Adapter).join(Repo).where(Repo.repo_id == repo_id, Adapter.subfolder == subfolder)
            return session.scalars(query.where(Adapter.current)).one()

    def state(self, repo_id: str) -> Repo:
        """The row of a repository."""
        with self.store.read() as session:
            return session.scalars(select(Repo).where(Repo.repo_id == repo_id)).one()

    def asked(self) -> list[str]:
        """Requests since the last call, as ``METHOD path``."""
        seen = [f"{entry.method} {entry.path}" for entry in self.hub.requests]
        self.hub.requests.clear()
        return seen


def outcomes(summary: SyncSummary) -> dict[str, str]:
    """Outcome by reference."""
    return {f"{line.repo_id}/{line.subfolder}".rstrip("/"): line.outcome for line in summary.outcomes}


def reasons(summary: SyncSummary) -> str:
    return "\n".join(line.reason for line in summary.outcomes)
