from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from search_world import ENCODER, World, vector_of
from sqlalchemy import insert, update

from hub_router.errors import HubRouterError, NotInCatalogError
from hub_router.gaussian import fit, log_density, stack
from hub_router.progress import Advance
from hub_router.search.gaussian_index import EXACT_ROWS, gaussians_are_current, open_gaussian_index
from hub_router.search.gaussian_index import rebuild_gaussian_index as rebuild
from hub_router.search.gaussian_index import refresh_gaussian_index as refresh
from hub_router.search.gaussians import fit_missing
from hub_router.search.likelihood import LONGEST, Likelihood, likeliest, search_likelihood
from hub_router.search.sketch import Sketches, axes_count, estimates, principal_axes, sketch
from hub_router.store.adapters import Filters
from hub_router.store.features import EmbeddingState
from hub_router.store.gaussians import GaussianRows, StoredGaussian, gaussian_state, save_gaussians
from hub_router.store.session import open_store
from hub_router.store.tables import Adapter, AdapterGaussian, AdapterLabel, EncoderState, Repo

EPSILONS = (1e-5, 1e-2, 1.0)


def score_of(samples: Sequence[np.ndarray], query: np.ndarray, epsilon: float) -> float:
    """HiLoRA, Eq. 3 and the score below it, with the dense covariance written out element by element."""
    rows = [[float(value) for value in sample] for sample in samples]
    m, d = len(rows), len(rows[0])
    z = [float(value) / math.sqrt(sum(float(value) ** 2 for value in query)) for value in query]
    mean = [sum(row[i] for row in rows) / m for i in range(d)]
    covariance = np.zeros((d, d))
    for i in range(d):
        for j in range(d):
            covariance[i, j] = sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows) / (m - 1)
        covariance[i, i] += epsilon
    offset = np.array([z[i] - mean[i] for i in range(d)])
    distance = float(offset @ np.linalg.solve(covariance, offset))
    log_volume = float(np.linalg.slogdet(covariance)[1])
    return -0.5 * (d * math.log(2 * math.pi) + log_volume + distance) / d


def ask(world: World, query: np.ndarray, limit: int = 10, epsilon: float = 1e-5, **filters: Any) -> list[Likelihood]:
    with world.store.read() as session:
        return likeliest(session, world.index_dir, ENCODER, query, Filters(**filters), limit, epsilon)


def pairs(found: list[Likelihood]) -> list[tuple[int, float]]:
    return [(each.adapter_id, pytest.approx(each.score, rel=1e-4, abs=1e-5)) for each in found]


def expected(world: World, query: np.ndarray, epsilon: float = 1e-5) -> list[tuple[int, float]]:
    """Ids and scores by the definition, of those that are served and have two samples."""
    scored = []
    for entry in world.entries.values():
        samples = [vector for (kind, _), vector in entry.texts.items() if kind == "sample"]
        if entry.columns["status"] == "ready" and entry.columns.get("current", True) and len(samples) > 1:
            scored.append((entry.id, score_of(samples, query, epsilon)))
    return sorted(scored, key=lambda pair: (-pair[1], pair[0]))


@pytest.fixture
def tasks(world: World) -> World:
    """Adapters with none to six samples, fitted."""
    for n in range(35):
        number = world.add(
            f"org/{n}", licence=("mit", "unknown")[n % 2], labels={"tag": ("rare",)} if n % 9 == 0 else {}
        )
        world.embed(number, card=f"card {n}", samples=[f"sample {n} {place}" for place in range(n % 7)])
    assert fit_missing(world.store, ENCODER) == 30
    return world


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_ranking_equals_the_definition(tasks: World, query: np.ndarray, epsilon: float) -> None:
    truth = expected(tasks, query, epsilon)
    assert len(truth) == 25
    for limit in (1, 7, 500):
        assert truth[:limit] == pairs(ask(tasks, query, limit, epsilon))
    near = vector_of("sample 5 0") + 0.1 * vector_of("anything")
    assert expected(tasks, near, epsilon)[:3] == pairs(ask(tasks, near, 3, epsilon))
    assert ask(tasks, near, 1)[0].adapter_id == 6


def test_filters_are_exact(tasks: World, query: np.ndarray) -> None:
    truth = expected(tasks, query)
    unknown = [pair for pair in truth if tasks.entries[pair[0]].columns["licence"] == "unknown"]
    rare = [pair for pair in truth if tasks.entries[pair[0]].labels]
    assert 0 < len(rare) < len(unknown) < len(truth)
    assert unknown == pairs(ask(tasks, query, 99, licence="unknown"))
    assert rare[:2] == pairs(ask(tasks, query, 2, tag="rare"))
    assert ask(tasks, query, tag="no such tag") == []


def test_adapters_no_longer_served_are_left_out_at_once(tasks: World, query: np.ndarray) -> None:
    best = [each.adapter_id for each in ask(tasks, query, 3)]
    tasks.change(best[0], status="gated")
    tasks.change(best[1], current=False)
    assert ask(tasks, query, 1)[0].adapter_id == best[2]
    with tasks.store.write() as session:
        session.delete(session.get_one(Adapter, best[2]))
    del tasks.entries[best[2]]
    assert expected(tasks, query) == pairs(ask(tasks, query, 99))
    with tasks.store.write() as session:
        session.execute(update(Adapter).values(status="missing"))
    assert ask(tasks, query) == []


def test_hit_shows_the_nearest_sample(tasks: World) -> None:
    asked = vector_of("sample 12 3") + 0.2 * vector_of("card 12")
    hits = search_likelihood(tasks.store, tasks.index_dir, ENCODER, asked, limit=2)
    assert (hits[0].adapter.repo_id, hits[0].kind, hits[0].text) == ("org/12", "sample", "sample 12 3")
    assert [hit.score for hit in hits] == [each.score for each in ask(tasks, asked, 2)]


def test_equal_scores_come_by_id(world: World, query: np.ndarray) -> None:
    numbers = [world.add(f"org/copy-{n}") for n in range(5)]
    for number in reversed(numbers):
        world.embed(number, samples=["same", "samples"])
    fit_missing(world.store, ENCODER)
    assert [each.adapter_id for each in ask(world, query)] == numbers


def test_only_what_changed_is_fitted(tasks: World) -> None:
    bar = Bar()
    assert fit_missing(tasks.store, ENCODER, bar) == 0
    assert bar.steps == []
    tasks.embed(3, samples=["a", "b", "c"])
    tasks.embed(4, card="only a card is left")
    assert fit_missing(tasks.store, ENCODER, bar) == 1
    assert expected(tasks, vector_of("a")) == pairs(ask(tasks, vector_of("a"), 99))


class Bar:
    """Counts steps, and interrupts like Ctrl-C after the first."""

    def __init__(self, interrupt: bool = False) -> None:
        self.steps: list[int] = []
        self.interrupt = interrupt

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Advance]:
        def advance(n: int) -> None:
            self.steps.append(n)
            if self.interrupt:
                raise KeyboardInterrupt

        yield advance


def test_interrupted_run_keeps_what_it_finished(world: World, query: np.ndarray) -> None:
    for n in range(100):
        world.embed(world.add(f"org/{n}"), samples=[f"sample {n} 0", f"sample {n} 1"])
    with pytest.raises(KeyboardInterrupt):
        fit_missing(world.store, ENCODER, Bar(interrupt=True))
    done = len(ask(world, query, 200))
    assert 0 < done < 100
    assert fit_missing(world.store, ENCODER) == 100 - done
    assert expected(world, query) == pairs(ask(world, query, 200))


def test_sketches_stay_close_to_the_distance() -> None:
    rng = np.random.default_rng(0)
    width, factors = 96, 5
    samples = rng.standard_normal((40, factors + 1, width)) * np.arange(1, width + 1) ** -0.5
    samples /= np.linalg.norm(samples, axis=-1, keepdims=True)
    fits = [fit(own[: 2 + place % factors]) for place, own in enumerate(samples)]
    means, stacked = stack(fits)
    rows = GaussianRows(np.arange(40), means.astype(np.float32), stacked.astype(np.float32))
    axes = principal_axes([rows], width)
    assert axes.shape == (width, axes_count(width)) == (96, 32)
    np.testing.assert_allclose(axes.T @ axes, np.eye(32), atol=1e-5)
    query = samples[3, factors]
    lengths = np.square(query - means).sum(axis=1)
    for epsilon in EPSILONS:
        # The head of the sketches' module: -2 epsilon times the logarithm of the density, without its constant.
        densities = log_density(query[None], means, stacked, epsilon)[0]
        exact = -2 * epsilon * densities - epsilon * width * math.log(2 * math.pi * epsilon)
        off = {}
        for name, along, kept, z in (("fine", None, factors, query), ("coarse", axes, 4, query @ axes)):
            into = Sketches(np.zeros((40, kept, len(z)), np.int8), np.zeros((40, 3, kept), np.float32))
            sketch(rows, along, into)
            estimated = estimates(into, np.arange(40), lengths.astype(np.float32), z.astype(np.float32), epsilon)
            off[name] = np.abs(estimated - exact).max() / exact.max()
        assert off["fine"] < 0.01
        assert off["fine"] < off["coarse"] < 0.6


WIDTH = 48
LARGE = EXACT_ROWS + 400
SAMPLES = 5


@dataclass
class Pool:
    """A catalog too large to compare every adapter, filled without any text."""

    world: World
    samples: dict[int, np.ndarray]

    def put(self, numbers: Sequence[int], samples: np.ndarray) -> None:
        rows = [
            StoredGaussian(number, fit(own), hashlib.sha256(own.tobytes()).hexdigest())
            for number, own in zip(numbers, samples, strict=True)
        ]
        with self.world.store.write() as session:
            save_gaussians(session, ENCODER, rows)
        self.samples.update(zip(numbers, samples, strict=True))

    def ranked(self, queries: np.ndarray, among: Sequence[int] | None = None, epsilon: float = 1e-5) -> np.ndarray:
        """Ids by exact score, best first, one row per query."""
        numbers = np.array(list(self.samples if among is None else among))
        means, factors = stack([fit(self.samples[number]) for number in numbers.tolist()])
        return numbers[np.argsort(-log_density(queries, means, factors, epsilon), axis=1, kind="stable")]

    def best(self, query: np.ndarray) -> int:
        """Id of the best by exact score."""
        return int(self.ranked(query[None])[0, 0])


def drawn(count: int, seed: int) -> np.ndarray:
    """Samples of tasks in clusters, whose inputs differ in some directions more than in others."""
    rng = np.random.default_rng(seed)
    topics = np.random.default_rng(0).standard_normal((40, WIDTH))[rng.integers(0, 40, count)]
    spread = 0.6 * np.arange(1, WIDTH + 1) ** -0.6
    inputs = (topics + 0.6 * rng.standard_normal((count, WIDTH)))[:, None]
    inputs = inputs + rng.standard_normal((count, SAMPLES + 1, WIDTH)) * spread * 2
    return (inputs / np.linalg.norm(inputs, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    folder = tmp_path_factory.mktemp("pool")
    with open_store(f"sqlite:///{folder / 'catalog.db'}") as store:
        numbers = range(1, LARGE + 1)
        columns = {"status": "ready", "path": "/data", "licence": "mit", "base_model": "org/base", "revision": "a"}
        with store.write() as session:
            session.execute(insert(Repo), [{"id": n, "source": "hub", "repo_id": f"org/{n}"} for n in numbers])
            session.execute(insert(Adapter), [columns | {"id": n, "repo_pk": n} for n in numbers])
            tags = [{"adapter_id": n, "kind": "tag", "value": "third"} for n in numbers if n % 3 == 0]
            tags += [{"adapter_id": n, "kind": "tag", "value": "rare"} for n in numbers if n % 100 == 0]
            tags += [{"adapter_id": n, "kind": "tag", "value": "some"} for n in numbers if n % 20 == 0]
            session.execute(insert(AdapterLabel), tags)
            session.execute(insert(EncoderState), {"encoder": ENCODER, "dimension": WIDTH, "generation": 1})
        pool = Pool(World(store, folder / "faiss"), {})
        pool.put(numbers, drawn(LARGE, 1)[:, :SAMPLES])
        assert refresh(store, folder / "faiss", ENCODER)
    return pool


@pytest.fixture
def large(template: Pool, tmp_path: Path) -> Iterator[Pool]:
    shutil.copy(template.world.index_dir.parent / "catalog.db", tmp_path / "large.db")
    shutil.copytree(template.world.index_dir, tmp_path / "large-faiss")
    with open_store(f"sqlite:///{tmp_path / 'large.db'}") as store:
        yield Pool(World(store, tmp_path / "large-faiss"), dict(template.samples))


def state_of(pool: Pool) -> EmbeddingState:
    with pool.world.store.read() as session:
        state = gaussian_state(session, ENCODER)
    assert state is not None
    return state


def build_of(pool: Pool) -> tuple[Path, dict[str, Any]]:
    """Folder and description of the current build."""
    (home,) = pool.world.index_dir.glob("*-gaussians")
    described = json.loads((home / "current.json").read_text())
    return home / described["folder"], described


def test_large_pool_against_the_exact_scan(large: Pool) -> None:
    """Inputs of tasks in the pool, and of tasks of the same topics that no adapter was trained on."""
    queries = np.concatenate([drawn(LARGE, 1)[:60, SAMPLES], drawn(60, 2)[:, SAMPLES]])
    found = [[each.adapter_id for each in ask(large.world, query, 5)] for query in queries]
    truth = large.ranked(queries)[:, :5].tolist()
    assert np.mean([own[0] == best[0] for own, best in zip(found, truth, strict=True)]) >= 0.99
    assert np.mean([len(set(own) & set(best)) for own, best in zip(found, truth, strict=True)]) >= 4.9


@pytest.mark.parametrize("epsilon", [1e-3, 1e-1])
def test_large_pool_at_another_epsilon(large: Pool, epsilon: float) -> None:
    queries = drawn(40, 3)[:, SAMPLES]
    found = [ask(large.world, query, 1, epsilon)[0].adapter_id for query in queries]
    assert np.mean(np.array(found) == large.ranked(queries, epsilon=epsilon)[:, 0]) >= 0.95


@pytest.mark.parametrize(("tag", "step"), [("third", 3), ("some", 20), ("rare", 100)])
def test_large_pool_under_filters(large: Pool, tag: str, step: int) -> None:
    passing = range(step, LARGE + 1, step)
    assert (len(passing) <= LONGEST) == (tag == "rare")
    queries = drawn(10, 4)[:, SAMPLES]
    truth = large.ranked(queries, passing)
    for query, best in zip(queries, truth.tolist(), strict=True):
        found = [each.adapter_id for each in ask(large.world, query, 12, tag=tag)]
        assert found[0] == best[0]
        assert len(found) == 12
        if tag == "rare":
            assert found == best[:12]


def test_many_unserved_do_not_hide_the_rest(large: Pool) -> None:
    query = drawn(1, 6)[0, SAMPLES]
    served = large.ranked(query[None])[0, 19::20].tolist()
    assert len(served) > LONGEST
    with large.world.store.write() as session:
        session.execute(update(Adapter).where(Adapter.id.not_in(served)).values(status="missing"))
    assert ask(large.world, query, 1)[0].adapter_id == served[0]
    with large.world.store.write() as session:
        session.execute(update(Adapter).where(Adapter.id.not_in(served[-3:])).values(current=False))
    assert [each.adapter_id for each in ask(large.world, query)] == served[-3:]


def test_large_index_is_brought_up_to_date_in_place(large: Pool) -> None:
    before = build_of(large)[1]
    changed = drawn(4, 7)
    with large.world.store.write() as session:
        session.execute(insert(Repo), {"id": LARGE + 1, "source": "hub", "repo_id": "org/new"})
        new = {"id": LARGE + 1, "repo_pk": LARGE + 1, "revision": "a", "status": "ready", "path": "/", "licence": "mit"}
        session.execute(insert(Adapter), new)
    large.put([17, 18, LARGE + 1], changed[:3, :SAMPLES])
    large.put([20], changed[3:, :2])
    with large.world.store.write() as session:
        session.delete(session.get_one(Adapter, 19))
    del large.samples[19]
    for place, number in enumerate((17, 18, LARGE + 1, 20)):
        assert ask(large.world, changed[place, 0], 1)[0].adapter_id == number
    after = build_of(large)[1]
    assert (before["changed_rows"], after["changed_rows"]) == (0, 5)
    assert (after["trained_rows"], after["rows"]) == (LARGE, LARGE)
    with large.world.store.read() as session:
        updated = open_gaussian_index(session, large.world.index_dir, state_of(large))
        fresh = rebuild(session, large.world.index_dir, state_of(large), from_scratch=True)
    np.testing.assert_array_equal(updated.ids, fresh.ids)
    np.testing.assert_array_equal(updated.fine.directions, fresh.fine.directions)
    np.testing.assert_array_equal(updated.fine.numbers, fresh.fine.numbers)
    assert updated.means.ntotal == fresh.means.ntotal


def test_large_index_is_built_anew_after_many_changes_or_more_samples(large: Pool) -> None:
    more = drawn(1, 8)
    large.put([5], more)
    assert ask(large.world, more[0, 0], 1)[0].adapter_id == 5
    assert build_of(large)[1]["changed_rows"] == 0
    large.put(range(1, 601), drawn(600, 9)[:, :SAMPLES])
    assert refresh(large.world.store, large.world.index_dir, ENCODER)
    assert build_of(large)[1]["changed_rows"] == 0
    assert not refresh(large.world.store, large.world.index_dir, ENCODER)


def damage(pool: Pool, how: str) -> None:
    folder, described = build_of(pool)
    size = (folder / "fine-directions.npy").stat().st_size
    match how:
        case "truncated":
            with (folder / "fine-directions.npy").open("r+b") as handle:
                handle.truncate(size // 2)
        case "truncated means":
            with (folder / "means.faiss").open("r+b") as handle:
                handle.truncate(5000)
        case "noise of the same size":
            (folder / "coarse-numbers.npy").write_bytes(
                np.random.default_rng(0).bytes((folder / "coarse-numbers.npy").stat().st_size)
            )
        case "noise in the numbers":
            numbers = np.load(folder / "fine-numbers.npy")
            numbers[:, 0] *= 50
            np.save(folder / "fine-numbers.npy", numbers)
        case "no numbers":
            numbers = np.load(folder / "coarse-numbers.npy")
            numbers[:] = np.nan
            np.save(folder / "coarse-numbers.npy", numbers)
        case "no axes":
            (folder / "axes.npy").unlink()
        case "axes of another shape":
            np.save(folder / "axes.npy", np.zeros((3, 3), np.float32))
        case "no folder":
            shutil.rmtree(folder)
        case "pointer that is no JSON":
            (folder.parent / "current.json").write_text("{")
        case "pointer out of the folder":
            shutil.copytree(folder, pool.world.index_dir.parent / "elsewhere")
            (folder.parent / "current.json").write_text(json.dumps(described | {"folder": "../../elsewhere"}))


FAULTS = [
    *("truncated", "truncated means", "noise of the same size", "no axes", "axes of another shape", "no folder"),
    *("pointer that is no JSON", "pointer out of the folder"),
]


@pytest.mark.parametrize("how", [*FAULTS, "noise in the numbers", "no numbers"])
def test_damaged_files_are_replaced(large: Pool, how: str) -> None:
    query = drawn(1, 10)[0, SAMPLES]
    best = large.best(query)
    damage(large, how)
    assert ask(large.world, query, 1)[0].adapter_id == best
    assert gaussians_are_current(large.world.index_dir, state_of(large))
    assert ask(large.world, query, 1)[0].adapter_id == best


@pytest.mark.parametrize("how", FAULTS)
def test_damaged_files_are_no_basis_for_an_update(large: Pool, how: str) -> None:
    damage(large, how)
    new = drawn(1, 12)
    large.put([7], new[:, :SAMPLES])
    assert ask(large.world, new[0, 0], 1)[0].adapter_id == 7
    assert gaussians_are_current(large.world.index_dir, state_of(large))


def test_means_of_other_gaussians_are_noticed(large: Pool) -> None:
    kept = (build_of(large)[0] / "means.faiss").read_bytes()
    large.put(range(1, LARGE + 1), drawn(LARGE, 11)[:, :SAMPLES])
    refresh(large.world.store, large.world.index_dir, ENCODER)
    (build_of(large)[0] / "means.faiss").write_bytes(kept)
    query = drawn(LARGE, 11)[0, SAMPLES]
    assert ask(large.world, query, 1)[0].adapter_id == large.best(query)
    assert (build_of(large)[0] / "means.faiss").read_bytes() != kept


def test_folder_that_cannot_be_written_to(large: Pool, caplog: pytest.LogCaptureFixture) -> None:
    query = drawn(1, 13)[0, SAMPLES]
    shutil.rmtree(large.world.index_dir)
    large.world.index_dir.write_text("a file where the folder should be")
    assert ask(large.world, query, 1)[0].adapter_id == large.best(query)
    assert "kept in memory" in caplog.text


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_epsilon_that_is_no_variance(tasks: World, query: np.ndarray, epsilon: float) -> None:
    with pytest.raises(HubRouterError, match=r"epsilon must be a number above 0.*--epsilon"):
        ask(tasks, query, epsilon=epsilon)


def test_what_is_missing_is_named(world: World, query: np.ndarray) -> None:
    with pytest.raises(NotInCatalogError, match=r"hub-router sync .*hub-router index"):
        ask(world, query)
    number = world.add("org/one")
    with pytest.raises(NotInCatalogError, match=r"hub-router index --encoder synthetic"):
        ask(world, query)
    world.embed(number, card="card", samples=["a single sample"])
    fit_missing(world.store, ENCODER)
    with pytest.raises(NotInCatalogError, match=r"two embedded samples.*hub-router samples add ADAPTER FILE"):
        ask(world, query)
    world.embed(number, card="card", samples=["a sample", "and another"])
    with pytest.raises(NotInCatalogError, match=r"not computed yet; run: hub-router index --encoder synthetic"):
        ask(world, query)
    fit_missing(world.store, ENCODER)
    assert len(ask(world, query)) == 1
    with pytest.raises(HubRouterError, match="at least 1, got 0"):
        ask(world, query, 0)
    with pytest.raises(HubRouterError, match=r"shape \(8,\), expected \(16,\)"):
        ask(world, np.ones(8))


def test_small_catalogs_need_no_estimates(tasks: World, query: np.ndarray) -> None:
    """Few adapters are compared one by one, whatever the files say."""
    refresh(tasks.store, tasks.index_dir, ENCODER)
    with tasks.store.read() as session:
        assert session.query(AdapterGaussian).count() == 30 <= LONGEST
    (folder,) = tasks.index_dir.glob("*-gaussians/build-*")
    np.save(folder / "fine-numbers.npy", 50 * np.load(folder / "fine-numbers.npy"))
    assert expected(tasks, query) == pairs(ask(tasks, query, 99))
