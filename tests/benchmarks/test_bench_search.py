"""Search over 100,000 adapters without the encoder: time per query, recall against an exact scan, and what a change costs.

Synthetic rows: adapters gather around topics of unequal size, a card and a sample of one adapter are two views of its
task, and a query is a third view, so that the nearest adapter has a cosine of about 0.6 as between real task texts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from sqlalchemy import insert

from hub_router.search import index as search_index
from hub_router.search.ranking import search
from hub_router.store.adapters import Filters
from hub_router.store.session import Store, open_store
from hub_router.store.tables import Adapter, AdapterLabel, EncoderState, Repo, TextEmbedding

ADAPTERS = 100_000
TOPICS = 600
QUERIES = 200
ENCODER = "synthetic"
BASES = ("org/base-large", "org/base-small", "org/rare-base")


@dataclass(frozen=True)
class Catalog:
    store: Store
    index_dir: Path
    cards: np.ndarray
    samples: np.ndarray
    queries: np.ndarray
    build_seconds: float


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def views(tasks: np.ndarray, closeness: float, rng: np.random.Generator) -> np.ndarray:
    """Vectors of about the given cosine with the tasks."""
    noise = unit(rng.standard_normal(tasks.shape, dtype=np.float32))
    return unit(closeness * tasks + np.sqrt(1 - closeness**2) * noise)


def synthetic(dimension: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(dimension)
    sizes = 1 / np.arange(1, TOPICS + 1) ** 0.7
    topics = unit(rng.standard_normal((TOPICS, dimension)))[rng.choice(TOPICS, ADAPTERS, p=sizes / sizes.sum())]
    tasks = views(topics, 0.7, rng)
    asked = tasks[rng.choice(ADAPTERS, QUERIES, replace=False)]
    return views(tasks, 0.8, rng), views(tasks, 0.8, rng), views(asked, 0.75, rng)


def fill(store: Store, cards: np.ndarray, samples: np.ndarray) -> None:
    """Rows of 100,000 ready adapters; every hundredth is of a rare base model and has a rare tag."""
    ids = range(1, ADAPTERS + 1)
    with store.write() as session:
        session.execute(insert(Repo), [{"id": n, "source": "hub", "repo_id": f"org/adapter-{n}"} for n in ids])
        session.execute(
            insert(Adapter),
            [
                {
                    "id": n,
                    "repo_pk": n,
                    "revision": f"{n:040x}",
                    "status": "ready",
                    "path": f"/data/{n}",
                    "base_model": BASES[2 if n % 100 == 0 else n % 2],
                    "base_model_resolved": BASES[2 if n % 100 == 0 else n % 2],
                    "licence": "mit" if n % 3 else "apache-2.0",
                    "rank_min": 8,
                    "rank_max": 8,
                    "ranks": [8],
                    "card_text": "A card of about the usual length. " * 20,
                }
                for n in ids
            ],
        )
        session.execute(
            insert(AdapterLabel),
            [{"adapter_id": n, "kind": "target", "value": target} for n in ids for target in ("q_proj", "v_proj")]
            + [{"adapter_id": n, "kind": "tag", "value": "rare"} for n in ids if n % 100 == 0],
        )
        session.execute(insert(EncoderState), {"encoder": ENCODER, "dimension": cards.shape[1], "generation": 1})
        for kind, vectors in (("card", cards), ("sample", samples)):
            session.execute(
                insert(TextEmbedding),
                [
                    {
                        "adapter_id": n,
                        "encoder": ENCODER,
                        "kind": kind,
                        "position": 0,
                        "text": f"{kind} of adapter {n}",
                        "text_hash": f"{n:060x}{kind[:4]}".replace("c", "0").replace("s", "1")[:64],
                        "vector": vectors[n - 1].tobytes(),
                    }
                    for n in ids
                ],
            )


@pytest.fixture(scope="module", params=[384, 768])
def catalog(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    folder = tmp_path_factory.mktemp(f"catalog-{request.param}")
    cards, samples, queries = synthetic(request.param)
    with open_store(f"sqlite:///{folder / 'catalog.db'}") as store:
        fill(store, cards, samples)
        started = time.perf_counter()
        search_index.refresh_index(store, folder / "faiss", ENCODER)
        seconds = time.perf_counter() - started
        yield Catalog(store, folder / "faiss", cards, samples, queries, seconds)


def exact(catalog: Catalog, query: np.ndarray, passing: np.ndarray | None = None) -> np.ndarray:
    """Catalog ids by score, from every vector."""
    scores = np.maximum(catalog.cards @ query, catalog.samples @ query)
    if passing is not None:
        scores[~passing] = -2
    return np.argsort(-scores, kind="stable")[:10] + 1


CASES = {
    "all": (Filters(), None),
    "base": (Filters(base_model="org/base-large", licence="mit", target="q_proj"), None),
    "rare": (Filters(tag="rare"), 100),
}


@pytest.mark.parametrize("case", CASES)
def test_search(catalog: Catalog, benchmark: BenchmarkFixture, case: str) -> None:
    filters = CASES[case][0]
    numbers = np.arange(1, ADAPTERS + 1)
    passing = {
        "all": numbers > 0,
        "base": (numbers % 2 == 0) & (numbers % 100 != 0) & (numbers % 3 != 0),
        "rare": numbers % 100 == 0,
    }[case]
    asked = iter(range(10**9))
    found: dict[int, list[int]] = {}

    def one() -> None:
        place = next(asked) % QUERIES
        hits = search(catalog.store, catalog.index_dir, ENCODER, catalog.queries[place], filters, 10)
        found[place] = [hit.adapter.id for hit in hits]

    benchmark.pedantic(one, rounds=QUERIES, warmup_rounds=5)
    truths = {place: exact(catalog, catalog.queries[place], passing).tolist() for place in found}
    recall = np.mean([len(set(truths[place]) & set(found[place])) / 10 for place in found])
    top = np.mean([truths[place][0] == found[place][0] for place in found])
    size = sum(file.stat().st_size for file in catalog.index_dir.rglob("*") if file.is_file())
    benchmark.extra_info |= {
        "recall@10": float(recall),
        "top-1": float(top),
        "build_s": round(catalog.build_seconds, 2),
        "file_MB": round(size / 1e6),
    }
    median = benchmark.stats.stats.median
    print(f"\n{case} d={catalog.cards.shape[1]}: median {median * 1e3:.2f} ms, {benchmark.extra_info}")
    assert recall >= 0.95
    assert top >= 0.95
