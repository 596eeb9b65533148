from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete, func, select

from hub_router.errors import StoreError
from hub_router.gaussian import Gaussian, fit
from hub_router.store.features import Embedding, EmbeddingState, save_embeddings
from hub_router.store.gaussians import (
    StoredGaussian,
    gaussian_marks,
    gaussian_rows,
    gaussian_state,
    has_samples,
    load_gaussians,
    sample_fingerprints,
    sample_vectors,
    save_gaussians,
    served_gaussians,
    stale_gaussians,
)
from hub_router.store.session import Store
from hub_router.store.tables import Adapter, AdapterGaussian, TextEmbedding

WIDTH = 6


def vector_of(text: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    drawn = np.random.default_rng(seed).standard_normal(WIDTH)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


def embed(store: Store, adapter_id: int, *samples: str, encoder: str = "enc") -> None:
    """A card and samples, each with a vector that depends on its text alone."""
    texts = [("card", 0, f"card {adapter_id}"), *(("sample", place, text) for place, text in enumerate(samples))]
    rows = [
        Embedding(adapter_id, kind, place, text, hashlib.sha256(text.encode()).hexdigest(), vector_of(text))
        for kind, place, text in texts
    ]
    with store.write() as session:
        save_embeddings(session, encoder, rows)


def fit_all(store: Store, encoder: str = "enc") -> list[int]:
    with store.write() as session:
        stale, gone = stale_gaussians(session, encoder)
        vectors = sample_vectors(session, encoder, list(stale))
        rows = [StoredGaussian(number, fit(own), stale[number]) for number, own in vectors.items()]
        save_gaussians(session, encoder, rows, gone)
    return list(stale)


@pytest.fixture
def three(store: Store, add_adapter: Any) -> list[int]:
    """An adapter with four samples, one with two, one with one."""
    with store.write() as session:
        ids = [add_adapter(session, f"org/{name}") for name in ("four", "two", "one")]
    for number, count in zip(ids, (4, 2, 1), strict=True):
        embed(store, number, *(f"input {place} of {number}" for place in range(count)))
    return ids


def state_of(store: Store) -> EmbeddingState:
    with store.read() as session:
        state = gaussian_state(session, "enc")
    assert state is not None
    return state


def test_gaussians_come_back_as_float32(store: Store, three: list[int]) -> None:
    assert fit_all(store) == three
    with store.read() as session:
        loaded = load_gaussians(session, "enc", [three[2], 999, three[0], three[1]])
        (rows,) = gaussian_rows(session, state_of(store), np.array(three[::-1]))
        one_by_one = list(served_gaussians(session, state_of(store), np.array(three[::-1])))
        column = session.execute(
            select(AdapterGaussian.mean).where(AdapterGaussian.adapter_id == three[0])
        ).scalar_one()
    assert list(loaded) == [three[2], three[0], three[1]]
    for number, count in zip(three, (4, 2, 1), strict=True):
        expected = fit(np.stack([vector_of(f"input {place} of {number}") for place in range(count)]))
        got = loaded[number]
        assert (got.samples, got.mean.dtype, got.factors.shape) == (count, np.float64, (count - 1, WIDTH))
        np.testing.assert_array_equal(got.mean, expected.mean.astype(np.float32))
        np.testing.assert_array_equal(got.factors, expected.factors.astype(np.float32))
    assert column == loaded[three[0]].mean.astype("<f4").tobytes()
    # One sample has no covariance, so arrays for likelihoods leave it out; where factors are missing they are zeros.
    assert rows.owners.tolist() == three[:2]
    assert (rows.factors.shape, rows.factors.dtype) == ((2, 3, WIDTH), np.float32)
    np.testing.assert_array_equal(rows.factors[1, 1:], 0)
    assert [owner for owner, _, _ in one_by_one] == three[:2]
    for place, (owner, mean, factors) in enumerate(one_by_one):
        np.testing.assert_array_equal(mean, loaded[owner].mean)
        np.testing.assert_array_equal(factors, loaded[owner].factors)
        np.testing.assert_array_equal(rows.means[place], mean)
        np.testing.assert_array_equal(rows.factors[place, : len(factors)], factors)


def test_stale_with_the_samples_and_only_with_them(store: Store, three: list[int]) -> None:
    fit_all(store)
    before = state_of(store).generation
    assert fit_all(store) == []
    assert state_of(store).generation == before
    embed(store, three[0], *(f"input {place} of {three[0]}" for place in range(4)))
    assert fit_all(store) == []
    embed(store, three[0], "input 0 of it", "another input")
    embed(store, three[1], f"input 1 of {three[1]}", f"input 0 of {three[1]}")
    assert fit_all(store) == three[:2]
    assert state_of(store).generation > before
    with store.read() as session:
        assert load_gaussians(session, "enc", three[:1])[three[0]].samples == 2


def test_what_belongs_to_no_served_sample_goes(store: Store, three: list[int]) -> None:
    fit_all(store)
    embed(store, three[0])
    with store.write() as session:
        session.get_one(Adapter, three[1]).current = False
        session.get_one(Adapter, three[2]).status = "gated"
        assert stale_gaussians(session, "enc") == ({}, three)
    assert fit_all(store) == []
    with store.read() as session:
        assert session.scalar(select(func.count()).select_from(AdapterGaussian)) == 0
        assert gaussian_marks(session, "enc")[0].tolist() == []


def test_load_fits_what_index_has_not_seen(store: Store, three: list[int]) -> None:
    """A composition's adapter may have samples newer than the last run of index, or be of an old revision."""
    fit_all(store)
    embed(store, three[0], "new", "newer", "newest")
    with store.write() as session:
        session.get_one(Adapter, three[1]).current = False
        session.execute(delete(AdapterGaussian).where(AdapterGaussian.adapter_id == three[1]))
    with store.read() as session:
        loaded = load_gaussians(session, "enc", three)
    expected = fit(np.stack([vector_of(text) for text in ("new", "newer", "newest")]))
    np.testing.assert_array_equal(loaded[three[0]].mean, expected.mean)
    np.testing.assert_array_equal(loaded[three[0]].factors, expected.factors)
    assert loaded[three[1]].samples == 2


def test_encoders_do_not_mix(store: Store, three: list[int]) -> None:
    fit_all(store)
    embed(store, three[2], "other input", "and another", encoder="other")
    assert fit_all(store, "other") == [three[2]]
    with store.read() as session:
        assert list(load_gaussians(session, "other", three)) == [three[2]]
        assert load_gaussians(session, "enc", three)[three[2]].samples == 1
        assert gaussian_marks(session, "other")[0].tolist() == [three[2]]
        assert gaussian_state(session, "unknown") is None
        assert load_gaussians(session, "unknown", three) == {}


def test_served_ones_only_where_asked(store: Store, three: list[int]) -> None:
    fit_all(store)
    with store.write() as session:
        session.get_one(Adapter, three[0]).status = "missing"
    with store.read() as session:
        state, ids = state_of(store), np.array(three)
        assert [owner for owner, _, _ in served_gaussians(session, state, ids)] == [three[1]]
        assert [rows.owners.tolist() for rows in gaussian_rows(session, state, ids)] == [three[:2]]
        assert list(served_gaussians(session, state, ids[:0])) == []
        assert list(gaussian_rows(session, state, ids[:0])) == []


def test_marks_change_with_the_samples(store: Store, three: list[int]) -> None:
    fit_all(store)
    with store.read() as session:
        ids, before, samples = gaussian_marks(session, "enc")
    assert (ids.tolist(), samples) == (three[:2], 4)
    embed(store, three[1], "a", "b")
    fit_all(store)
    with store.read() as session:
        _, after, samples = gaussian_marks(session, "enc")
    assert (before == after).tolist() == [True, False]
    assert samples == 4


def test_generation_moves_and_leaves_that_of_embeddings_alone(store: Store, three: list[int]) -> None:
    assert state_of(store) == EmbeddingState("enc", WIDTH, 0)
    with store.read() as session:
        now = sample_fingerprints(session, "enc")
    generations = []
    for _ in range(3):
        with store.write() as session:
            save_gaussians(session, "enc", [StoredGaussian(three[0], fit(np.eye(2, WIDTH)), now[three[0]])])
        generations.append(state_of(store).generation)
    assert 0 < generations[0] < generations[1] < generations[2]
    with store.write() as session:
        save_gaussians(session, "enc", [])
    assert state_of(store).generation == generations[-1]


@pytest.mark.parametrize("fault", ["width", "shape", "nan", "factors"])
def test_unusable_gaussians_are_refused_and_nothing_is_kept(store: Store, three: list[int], fault: str) -> None:
    mean, factors = np.ones(WIDTH), np.ones((1, WIDTH))
    match fault:
        case "width":
            mean, factors = np.ones(WIDTH + 1), np.ones((1, WIDTH + 1))
        case "shape":
            mean = np.ones((1, WIDTH))
        case "nan":
            mean[0] = np.nan
        case "factors":
            factors = np.ones((1, WIDTH + 1))
    rows = [
        StoredGaussian(three[0], fit(np.eye(2, WIDTH)), "f"),
        StoredGaussian(three[1], Gaussian(mean, factors, 2), "f"),
    ]
    with (
        pytest.raises(StoreError, match=rf"\[{three[1]}\].*dimension {WIDTH} of encoder 'enc'"),
        store.write() as session,
    ):
        save_gaussians(session, "enc", rows)
    with store.read() as session:
        assert session.scalar(select(func.count()).select_from(AdapterGaussian)) == 0
    with (
        pytest.raises(StoreError, match=r"no embeddings of encoder 'other'.*hub-router index"),
        store.write() as session,
    ):
        save_gaussians(session, "other", rows[:1])


def test_gaussians_go_with_their_adapter(store: Store, three: list[int]) -> None:
    fit_all(store)
    with store.write() as session:
        session.delete(session.get_one(Adapter, three[0]))
    with store.read() as session:
        assert session.scalars(select(AdapterGaussian.adapter_id)).all() == three[1:]


def test_whether_there_are_samples_at_all(store: Store, three: list[int]) -> None:
    with store.read() as session:
        assert has_samples(session, "enc")
        assert not has_samples(session, "other")
    with store.write() as session:
        session.execute(delete(TextEmbedding).where(TextEmbedding.kind == "sample", TextEmbedding.position > 0))
    with store.read() as session:
        assert not has_samples(session, "enc")
