"""Which of 10,000 or 100,000 adapters an input fits: time per query, agreement with an exact scan, size on disk.

Synthetic embeddings that share what sentence embeddings show: few coordinates vary much and many little; tasks gather
around topics of unequal size; two inputs of one task have a cosine of 0.5 to 0.9; and inputs of a task differ in some
directions much more than in others, most of which other tasks of the topic have, too, so that 20 samples explain about
two thirds of the distance of another input from their mean. Half of the queries are further inputs of tasks in the
pool, half are inputs of tasks that no adapter was trained on.
"""

from __future__ import annotations

import shutil
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

from hub_router.gaussian import woodbury
from hub_router.search.gaussian_index import refresh_gaussian_index
from hub_router.search.likelihood import EPSILON, likeliest, log_likelihoods
from hub_router.store import adapters as adapter_queries
from hub_router.store.gaussians import gaussian_rows, gaussian_state, served_gaussians
from hub_router.store.session import Store, open_store
from hub_router.store.tables import Adapter, AdapterGaussian, EncoderState, Repo

DIMENSION = 768
SAMPLES = 20
SPREAD = 48
PER_TOPIC = 100
BLOCK = 500
QUERIES = 1_000
ENCODER = "synthetic"


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


@dataclass(frozen=True)
class Tasks:
    """Draws tasks, a block at a time; each block by its own seed."""

    topics: np.ndarray
    directions: np.ndarray
    shares: np.ndarray

    @staticmethod
    def about(topics: int) -> Tasks:
        rng = np.random.default_rng(0)
        sizes = 1 / np.arange(1, topics + 1) ** 0.7
        return Tasks(
            directional(rng, (topics,)),
            directional(rng, (topics, SPREAD)),
            sizes / sizes.sum(),
        )

    def inputs(self, block: int, tasks: int) -> np.ndarray:
        """One input more than samples of each task, ``(tasks, SAMPLES + 1, D)``."""
        rng = np.random.default_rng([1, block])
        topic = rng.choice(len(self.topics), tasks, p=self.shares)
        task = unit(0.85 * self.topics[topic] + np.sqrt(1 - 0.85**2) * directional(rng, (tasks,)))
        spread = directional(rng, (tasks, SPREAD))
        shared = rng.random((tasks, SPREAD)) < 0.7
        spread[shared] = self.directions[topic][shared]
        scale = np.arange(1, SPREAD + 1) ** -0.6
        drawn = rng.standard_normal((tasks, SAMPLES + 1, SPREAD)) * (scale / np.linalg.norm(scale))
        cosine = rng.uniform(0.5, 0.9, (tasks, 1, 1)).astype(np.float32)
        return unit(np.sqrt(cosine) * task[:, None] + np.sqrt(1 - cosine) * (drawn.astype(np.float32) @ spread))


def directional(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Unit vectors whose coordinates vary less and less."""
    drawn = rng.standard_normal((*shape, DIMENSION), dtype=np.float32)
    return unit(drawn / np.sqrt(np.arange(DIMENSION, dtype=np.float32) + 20))


@dataclass(frozen=True)
class Catalog:
    store: Store
    folder: Path
    adapters: int
    queries: np.ndarray
    best: np.ndarray
    known: np.ndarray
    build_seconds: float
    scan_seconds: float

    def size(self, pattern: str) -> int:
        """Bytes of the files that match."""
        return sum(file.stat().st_size for file in self.folder.rglob(pattern) if file.is_file())


def fitted(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and factors of many adapters at once, by the Gram matrices of their samples."""
    rows = samples.astype(np.float64)
    means = rows.mean(axis=1)
    offsets = (rows - means[:, None]) / np.sqrt(SAMPLES - 1)
    _, turns = np.linalg.eigh(offsets @ offsets.swapaxes(1, 2))
    return means, turns[..., :0:-1].swapaxes(1, 2) @ offsets


def fill(store: Store, adapters: int, tasks: Tasks) -> np.ndarray:
    """Ready adapters with a Gaussian each; a further input of the first tasks of every block."""
    held_out = []
    asked = -(-QUERIES // 2 * BLOCK // adapters)
    with store.write() as session:
        session.execute(insert(EncoderState).values(encoder=ENCODER, dimension=DIMENSION, gaussian_generation=1))
    for block, first in enumerate(range(1, adapters + 1, BLOCK)):
        inputs = tasks.inputs(block, BLOCK)
        means, factors = (each.astype("<f4") for each in fitted(inputs[:, :SAMPLES]))
        numbers = range(first, first + BLOCK)
        common = {"status": "ready", "path": "/data", "licence": "mit", "base_model": "org/base", "revision": "a" * 40}
        fits = {"encoder": ENCODER, "samples": SAMPLES}
        with store.write() as session:
            session.execute(insert(Repo), [{"id": n, "source": "hub", "repo_id": f"org/adapter-{n}"} for n in numbers])
            session.execute(insert(Adapter), [common | {"id": n, "repo_pk": n} for n in numbers])
            session.execute(
                insert(AdapterGaussian),
                [
                    fits
                    | {"adapter_id": n, "fingerprint": f"{n:064x}", "mean": means[place].tobytes()}
                    | {"factors": factors[place].tobytes()}
                    for place, n in enumerate(numbers)
                ],
            )
        held_out.append(inputs[:asked, SAMPLES].copy())
    return np.concatenate(held_out)[: QUERIES // 2]


def scan(store: Store, queries: np.ndarray) -> np.ndarray:
    """Catalog ids of the best by the exact score of every adapter, float64."""
    best = np.full(len(queries), -np.inf)
    ids = np.zeros(len(queries), dtype=np.int64)
    with store.read() as session:
        state = gaussian_state(session, ENCODER)
        assert state is not None
        for rows in gaussian_rows(session, state, adapter_queries.ids(session)):
            factors = rows.factors.astype(np.float64)
            means = rows.means.astype(np.float64)
            products = (factors.reshape(-1, DIMENSION) @ queries.T).reshape(*factors.shape[:2], -1)
            products -= factors @ means[..., None]
            lengths = np.square(queries).sum(axis=1) - 2 * means @ queries.T + np.square(means).sum(axis=1)[:, None]
            variances = np.square(factors).sum(axis=-1)[:, None]
            scores = woodbury(lengths, np.square(products).swapaxes(1, 2), variances, EPSILON, DIMENSION)  # [N, Q]
            place = scores.argmax(axis=0)
            better = scores.max(axis=0) > best
            best = np.maximum(best, scores.max(axis=0))
            ids[better] = rows.owners[place[better]]
    return ids


@pytest.fixture(scope="module", params=[10_000, 100_000])
def catalog(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    adapters = request.param
    folder = tmp_path_factory.mktemp(f"likelihood-{adapters}")
    tasks = Tasks.about(adapters // PER_TOPIC)
    try:
        with open_store(f"sqlite:///{folder / 'catalog.db'}") as store:
            known = fill(store, adapters, tasks)
            strange = tasks.inputs(10**6, QUERIES // 2)[:, SAMPLES]
            queries = np.concatenate([known, strange]).astype(np.float64)
            started = time.perf_counter()
            refresh_gaussian_index(store, folder / "faiss", ENCODER)
            built = time.perf_counter() - started
            started = time.perf_counter()
            with store.read() as session:
                state = gaussian_state(session, ENCODER)
                assert state is not None
                log_likelihoods(queries[0], served_gaussians(session, state, adapter_queries.ids(session)), EPSILON)
            scanned = time.perf_counter() - started
            best = scan(store, queries)
            yield Catalog(store, folder, adapters, queries, best, np.arange(QUERIES) < QUERIES // 2, built, scanned)
    finally:
        # Six gigabytes, of which pytest would keep three.
        shutil.rmtree(folder)


@pytest.mark.parametrize("limit", [1, 10])
def test_selection(catalog: Catalog, benchmark: BenchmarkFixture, limit: int) -> None:
    turn = iter(range(10**9))
    found: dict[int, int] = {}

    def one() -> None:
        place = next(turn) % QUERIES
        with catalog.store.read() as session:
            hits = likeliest(session, catalog.folder / "faiss", ENCODER, catalog.queries[place], limit=limit)
        found[place] = hits[0].adapter_id

    benchmark.pedantic(one, rounds=QUERIES, warmup_rounds=20)
    agree = np.array([found[place] == catalog.best[place] for place in range(QUERIES)])
    benchmark.extra_info |= {
        "agreement, task in the pool": float(agree[catalog.known].mean()),
        "agreement, task of no adapter": float(agree[~catalog.known].mean()),
        "exact scan of one query, s": round(catalog.scan_seconds, 2),
        "built in, s": round(catalog.build_seconds, 1),
        "cached files, MB": round(catalog.size("build-*/*") / 1e6),
        "database, MB": round(catalog.size("catalog.db*") / 1e6),
    }
    times = np.array(benchmark.stats.stats.data) * 1e3
    print(
        f"\n{catalog.adapters} adapters, limit {limit}: p50 {np.median(times):.2f} ms, "
        f"p99 {np.percentile(times, 99):.2f} ms, {benchmark.extra_info}"
    )
    assert agree.mean() >= 0.99


FRESH = """
import sys, time
from pathlib import Path
import numpy as np
from hub_router.search.likelihood import likeliest
from hub_router.store.session import open_store

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return [int(line.split()[1]) / 1e3 for line in lines if line.startswith(("RssAnon", "RssFile"))]

before = resident()
with open_store(sys.argv[1]) as store:
    queries = np.load(sys.argv[3])
    started = time.perf_counter()
    for place, query in enumerate(queries):
        with store.read() as session:
            likeliest(session, Path(sys.argv[2]), "synthetic", query)
        if not place:
            print(time.perf_counter() - started)
print(*(round(now - then) for now, then in zip(resident(), before)))
"""


def test_memory_of_a_process(catalog: Catalog, benchmark: BenchmarkFixture) -> None:
    """What a process needs for all the queries: its own memory, and pages of the cached files, which are shared."""
    np.save(catalog.folder / "queries.npy", catalog.queries)
    places = [catalog.folder / "faiss", catalog.folder / "queries.npy"]
    command = [sys.executable, "-c", FRESH, f"sqlite:///{catalog.folder / 'catalog.db'}", *map(str, places)]
    done = benchmark.pedantic(subprocess.run, (command,), {"capture_output": True, "text": True, "check": True})
    first, resident = done.stdout.splitlines()
    benchmark.extra_info |= {"first query, s": round(float(first), 3), "own and mapped memory, MB": resident}
    print(f"\n{catalog.adapters} adapters, fresh process: {benchmark.extra_info}")
