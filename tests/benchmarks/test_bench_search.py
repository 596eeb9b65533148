"""Search over 100,000 adapters without the encoder: time per query, recall against an exact scan, cost of a change.

Synthetic rows: adapters gather around topics of unequal size, a card and a sample of one adapter are two views of its
task, and a query is a third view, so that the nearest adapter has a cosine of about 0.6, as between real task texts.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from sqlalchemy import insert

from hub_router.search.index import refresh_index
from hub_router.search.ranking import search
from hub_router.store.adapters import Filters
from hub_router.store.features import Embedding, save_embeddings
from hub_router.store.session import Store, open_store
from hub_router.store.tables import Adapter, AdapterLabel, EncoderState, Repo, TextEmbedding

ADAPTERS = 100_000
TOPICS = 600
QUERIES = 200
ENCODER = "synthetic"
NUMBERS = np.arange(1, ADAPTERS + 1)


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


def base_of(number: int) -> str:
    return "org/rare-base" if number % 100 == 0 else ("org/base-large", "org/base-small")[number % 2]


def fill(store: Store, cards: np.ndarray, samples: np.ndarray) -> None:
    """Ready adapters of two common base models and a rare one; every hundredth has the tag ``rare``."""
    numbers = NUMBERS.tolist()
    common = {"status": "ready", "rank_min": 8, "rank_max": 8, "ranks": [8], "card_text": "A usual card. " * 50}
    with store.write() as session:
        session.execute(insert(Repo), [{"id": n, "source": "hub", "repo_id": f"org/adapter-{n}"} for n in numbers])
        session.execute(
            insert(Adapter),
            [
                common
                | {"id": n, "repo_pk": n, "revision": f"{n:040x}", "path": f"/data/{n}", "base_model": base_of(n)}
                | {"base_model_resolved": base_of(n), "licence": "mit" if n % 3 else "apache-2.0"}
                for n in numbers
            ],
        )
        targets = [{"adapter_id": n, "kind": "target", "value": name} for n in numbers for name in ("q_proj", "v_proj")]
        rare = [{"adapter_id": n, "kind": "tag", "value": "rare"} for n in numbers if n % 100 == 0]
        session.execute(insert(AdapterLabel), [*targets, *rare])
        session.execute(insert(EncoderState), {"encoder": ENCODER, "dimension": cards.shape[1], "generation": 1})
        for kind, vectors in (("card", cards), ("sample", samples)):
            of_kind = {"encoder": ENCODER, "kind": kind, "position": 0}
            session.execute(
                insert(TextEmbedding),
                [
                    of_kind
                    | {"adapter_id": n, "text": f"{kind} of adapter {n}", "vector": vectors[n - 1].tobytes()}
                    | {"text_hash": f"{2 * n + (kind == 'card'):016x}".ljust(64, "0")}
                    for n in numbers
                ],
            )


@pytest.fixture(scope="module", params=[384, 768])
def catalog(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    folder = tmp_path_factory.mktemp(f"catalog-{request.param}")
    cards, samples, queries = synthetic(request.param)
    with open_store(f"sqlite:///{folder / 'catalog.db'}") as store:
        fill(store, cards, samples)
        started = time.perf_counter()
        refresh_index(store, folder / "faiss", ENCODER)
        seconds = time.perf_counter() - started
        yield Catalog(store, folder / "faiss", cards, samples, queries, seconds)


def exact(catalog: Catalog, query: np.ndarray, passing: np.ndarray) -> list[int]:
    """Catalog ids of the ten best, from every vector."""
    scores = np.maximum(catalog.cards @ query, catalog.samples @ query)
    scores[~passing] = -2
    return (np.argsort(-scores, kind="stable")[:10] + 1).tolist()


CASES = {
    "no filter": (Filters(), NUMBERS > 0),
    "a third passes": (
        Filters(base_model="org/base-large", licence="mit", target="q_proj"),
        (NUMBERS % 2 == 0) & (NUMBERS % 100 != 0) & (NUMBERS % 3 != 0),
    ),
    "tag of 1%": (Filters(tag="rare"), NUMBERS % 100 == 0),
    "base of 1%": (Filters(base_model="org/rare-base"), NUMBERS % 100 == 0),
}


@pytest.mark.parametrize("case", CASES)
def test_search(catalog: Catalog, benchmark: BenchmarkFixture, case: str) -> None:
    filters, passing = CASES[case]
    turn = iter(range(10**9))
    found: dict[int, list[int]] = {}

    def one() -> None:
        place = next(turn) % QUERIES
        hits = search(catalog.store, catalog.index_dir, ENCODER, catalog.queries[place], filters, 10)
        found[place] = [hit.adapter.id for hit in hits]

    benchmark.pedantic(one, rounds=QUERIES, warmup_rounds=20)
    truths = {place: exact(catalog, catalog.queries[place], passing) for place in found}
    recall = np.mean([len(set(truths[place]) & set(found[place])) / 10 for place in found])
    top = np.mean([truths[place][0] == found[place][0] for place in found])
    benchmark.extra_info |= {"recall@10": float(recall), "top-1": float(top)}
    print(
        f"\n{case}, D={catalog.cards.shape[1]}: p50 {benchmark.stats.stats.median * 1e3:.2f} ms, {benchmark.extra_info}"
    )
    assert recall >= 0.98
    assert top >= 0.98


def test_changing_one_adapter(catalog: Catalog, benchmark: BenchmarkFixture) -> None:
    turn = iter(range(1, 100))

    def change() -> None:
        number = next(turn)
        row = Embedding(number, "card", 0, f"changed {number}", f"{-number & (2**64 - 1):064x}", catalog.cards[0])
        other = Embedding(number, "sample", 0, "sample", "a" * 64, catalog.samples[number - 1])
        with catalog.store.write() as session:
            save_embeddings(session, ENCODER, [row, other])
        assert refresh_index(catalog.store, catalog.index_dir, ENCODER)

    benchmark.pedantic(change, rounds=3)
    size = sum(file.stat().st_size for file in catalog.index_dir.rglob("*") if file.is_file())
    benchmark.extra_info |= {"build from nothing, s": round(catalog.build_seconds, 1), "files, MB": round(size / 1e6)}
    print(f"\none change, D={catalog.cards.shape[1]}: {benchmark.stats.stats.median:.2f} s, {benchmark.extra_info}")


FRESH = """
import sys, time
from pathlib import Path
import numpy as np
from hub_router.search.ranking import search
from hub_router.store.session import open_store
with open_store(sys.argv[1]) as store:
    query = np.random.default_rng(0).standard_normal(int(sys.argv[3]))
    started = time.perf_counter()
    search(store, Path(sys.argv[2]), "synthetic", query)
    print(time.perf_counter() - started)
"""


def test_first_search_of_a_process(catalog: Catalog, benchmark: BenchmarkFixture) -> None:
    seconds: list[float] = []
    arguments = [catalog.store.url, str(catalog.index_dir), str(catalog.cards.shape[1])]

    def one() -> None:
        command = [sys.executable, "-c", FRESH, *arguments]
        seconds.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))

    benchmark.pedantic(one, rounds=5)
    benchmark.extra_info["open and search, ms"] = round(1e3 * float(np.median(seconds)), 1)
    print(f"\nfresh process, D={catalog.cards.shape[1]}: {benchmark.extra_info}")
