from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select, update

from hub_router.errors import StoreError
from hub_router.records import Spectrum
from hub_router.store import features
from hub_router.store.features import AdapterTexts, Embedding, EmbeddingState
from hub_router.store.session import Store, open_store
from hub_router.store.tables import Adapter, AdapterSample, AdapterSpectrum, TextEmbedding


def spectrum(module: str, *values: float, direction: tuple[float, ...] | None = (0.6, -0.8)) -> Spectrum:
    unit = None if direction is None else np.array(direction, np.float32)
    return Spectrum(module, np.array(values, np.float32), unit, ambiguous=len(set(values)) < len(values))


def embedding(adapter_id: int, kind: str = "card", position: int = 0, seed: int = 0) -> Embedding:
    vector = np.random.default_rng([adapter_id, position, seed]).standard_normal(4).astype(np.float32)
    text = f"{kind} {position} of {adapter_id}"
    return Embedding(adapter_id, kind, position, text, f"hash of {text} {seed}", vector / np.linalg.norm(vector))


@pytest.fixture
def pair(store: Store, add_adapter: Any) -> tuple[int, int]:
    with store.write() as session:
        return add_adapter(session, "org/one", weights_hash="w1"), add_adapter(session, "org/two", weights_hash="w2")


def stale(store: Store) -> list[int]:
    with store.read() as session:
        return [record.id for record in features.stale_spectra(session)]


def test_spectra_come_back_exactly(store: Store, pair: tuple[int, int]) -> None:
    given = [spectrum("b", 3.25, 1e-30), spectrum("a", 0.0, 0.0, direction=None), spectrum("c", 2.0, 2.0)]
    with store.write() as session:
        features.save_spectra(session, pair[0], "w1", given)
    with store.read() as session:
        found = features.load_spectra(session, pair[0])
        assert features.load_spectra(session, pair[1]) == {}
    assert list(found) == ["a", "b", "c"]
    for entry in given:
        got = found[entry.module]
        assert (got.module, got.ambiguous) == (entry.module, entry.ambiguous)
        assert got.singular_values.dtype == np.float32
        np.testing.assert_array_equal(got.singular_values, entry.singular_values)
        if entry.direction is None:
            assert got.direction is None
        else:
            np.testing.assert_array_equal(got.direction, entry.direction)


def test_spectra_are_replaced_together(store: Store, pair: tuple[int, int]) -> None:
    with store.write() as session:
        features.save_spectra(session, pair[0], "w1", [spectrum("a", 1.0), spectrum("b", 2.0)])
        features.save_spectra(session, pair[1], "w2", [spectrum("a", 9.0)])
    for _ in range(2):
        with store.write() as session:
            features.save_spectra(session, pair[0], "w1", [spectrum("b", 5.0), spectrum("c", 6.0)])
    with store.read() as session:
        found = features.load_spectra(session, pair[0])
        assert {module: entry.singular_values.tolist() for module, entry in found.items()} == {"b": [5.0], "c": [6.0]}
        assert features.load_spectra(session, pair[1])["a"].singular_values.tolist() == [9.0]


def test_half_saved_spectra_do_not_exist(store: Store, pair: tuple[int, int]) -> None:
    with store.write() as session:
        features.save_spectra(session, pair[0], "w1", [spectrum("a", 1.0)])
    with pytest.raises(AttributeError), store.write() as session:
        features.save_spectra(session, pair[0], "w1", [spectrum("a", 7.0), None])  # type: ignore[list-item]
    with store.read() as session:
        assert features.load_spectra(session, pair[0])["a"].singular_values.tolist() == [1.0]


def test_spectra_go_stale_with_the_weights(store: Store, pair: tuple[int, int]) -> None:
    assert stale(store) == list(pair)
    with store.write() as session:
        features.save_spectra(session, pair[0], "w1", [spectrum("a", 1.0)])
        features.save_spectra(session, pair[1], "of other weights", [spectrum("a", 1.0)])
    assert stale(store) == [pair[1]]
    with store.write() as session:
        session.execute(update(Adapter).where(Adapter.id == pair[0]).values(weights_hash="new"))
    assert stale(store) == list(pair)
    with store.read() as session:
        assert features.load_spectra(session, pair[0]) == {}


def test_only_served_adapters_are_stale(store: Store, pair: tuple[int, int], add_adapter: Any) -> None:
    with store.write() as session:
        add_adapter(session, "org/gated", status="gated")
        add_adapter(session, "org/one", revision="old", current=False)
    assert stale(store) == list(pair)


def test_embeddings_come_back_in_order(store: Store, pair: tuple[int, int]) -> None:
    one, two = pair
    given = [
        embedding(two, "sample", 10),
        embedding(two, "sample", 9),
        embedding(one, "sample", 0),
        embedding(two, "card", 0),
        embedding(one, "card", 0),
    ]
    with store.write() as session:
        features.save_embeddings(session, "enc", given)
        features.save_embeddings(session, "other", [replace(embedding(one), vector=np.ones(7, np.float32))])
    expected = [given[4], given[2], given[3], given[1], given[0]]
    with store.read() as session:
        owners, matrix = features.load_embeddings(session, "enc")
        assert features.embedding_counts(session, two) == {"enc": 3}
        assert features.encoders(session) == ["enc", "other"]
    assert (owners.dtype, matrix.dtype) == (np.int64, np.float32)
    assert owners.tolist() == [one, one, two, two, two]
    np.testing.assert_array_equal(matrix, np.stack([row.vector for row in expected]))
    matrix[0] = 0  # callers normalise in place


def test_embeddings_of_some_adapters(store: Store, pair: tuple[int, int]) -> None:
    with store.write() as session:
        features.save_embeddings(session, "enc", [embedding(adapter_id) for adapter_id in pair])
    with store.read() as session:
        owners, matrix = features.load_embeddings(session, "enc", [pair[1], 999, pair[1]])
        assert owners.tolist() == [pair[1]]
        np.testing.assert_array_equal(matrix[0], embedding(pair[1]).vector)
        owners, matrix = features.load_embeddings(session, "enc", [])
        assert (owners.shape, matrix.shape) == ((0,), (0, 4))


def test_a_new_catalog_does_not_repeat_the_generations_of_a_deleted_one(
    store: Store, pair: tuple[int, int], tmp_path: Path, add_adapter: Any
) -> None:
    with store.write() as session:
        features.save_embeddings(session, "enc", [embedding(pair[0])])
        first = features.embedding_state(session, "enc")
    time.sleep(0.002)
    with open_store(f"sqlite:///{tmp_path / 'again.db'}") as anew, anew.write() as session:
        features.save_embeddings(session, "enc", [embedding(add_adapter(session, "org/one"))])
        second = features.embedding_state(session, "enc")
    assert first is not None and second is not None and second.generation > first.generation


def test_encoder_that_was_never_used(store: Store) -> None:
    with store.read() as session:
        assert features.embedding_state(session, "enc") is None
        owners, matrix = features.load_embeddings(session, "enc")
    assert (owners.shape, matrix.shape) == ((0,), (0, 0))


def test_generation_moves_with_every_change(store: Store, pair: tuple[int, int]) -> None:
    generations: list[int] = []
    for _ in range(3):
        with store.write() as session:
            features.save_embeddings(session, "enc", [embedding(pair[0])])
            state = features.embedding_state(session, "enc")
        assert state is not None
        assert state == EmbeddingState("enc", 4, state.generation)
        generations.append(state.generation)
    assert generations[0] < generations[1] < generations[2]
    with store.write() as session:
        features.save_embeddings(session, "enc", [])
        features.save_embeddings(session, "other", [embedding(pair[0])])
    with pytest.raises(ZeroDivisionError), store.write() as session:
        features.save_embeddings(session, "enc", [embedding(pair[1])])
        1 / 0  # noqa: B018
    with store.read() as session:
        assert features.embedding_state(session, "enc") == EmbeddingState("enc", 4, generations[-1])
        other = features.embedding_state(session, "other")
        assert other is not None and other.dimension == 4
        assert features.load_embeddings(session, "enc")[0].tolist() == [pair[0]]


def test_texts_that_vanished_leave_no_vector(store: Store, pair: tuple[int, int]) -> None:
    with store.write() as session:
        features.save_embeddings(session, "enc", [embedding(pair[0], "sample", n) for n in range(5)])
        features.save_embeddings(session, "enc", [embedding(pair[1], "sample", n) for n in range(2)])
        features.save_embeddings(session, "enc", [embedding(pair[0], "sample", n, seed=1) for n in range(3)])
    with store.read() as session:
        owners, matrix = features.load_embeddings(session, "enc")
    assert owners.tolist() == [pair[0]] * 3 + [pair[1]] * 2
    np.testing.assert_array_equal(matrix[2], embedding(pair[0], "sample", 2, seed=1).vector)


@pytest.mark.parametrize("fault", ["width", "shape", "nan"])
def test_unusable_vectors_are_refused_and_nothing_is_kept(store: Store, pair: tuple[int, int], fault: str) -> None:
    with store.write() as session:
        features.save_embeddings(session, "enc", [embedding(pair[0])])
        state = features.embedding_state(session, "enc")
    vector = {"width": np.ones(5), "shape": np.ones((4, 1)), "nan": np.array([1, np.nan, 0, 0])}[fault]
    rows = [embedding(pair[0], seed=1), replace(embedding(pair[1]), vector=vector.astype(np.float32))]
    refusal = rf"encoder 'enc' gave adapters \[{pair[1]}\].*\(4,\).*--encoder"
    with pytest.raises(StoreError, match=refusal), store.write() as session:
        features.save_embeddings(session, "enc", rows)
    with store.read() as session:
        assert features.embedding_state(session, "enc") == state
        np.testing.assert_array_equal(features.load_embeddings(session, "enc")[1], embedding(pair[0]).vector[None])
        assert session.scalar(select(func.count()).select_from(TextEmbedding)) == 1


def test_stale_embeddings(store: Store, pair: tuple[int, int]) -> None:
    one, two = pair
    with store.write() as session:
        features.save_embeddings(session, "enc", [embedding(one), embedding(one, "sample"), embedding(two)])
    kept = {("card", 0): f"hash of card 0 of {one} 0", ("sample", 0): f"hash of sample 0 of {one} 0"}
    card = {("card", 0): f"hash of card 0 of {two} 0"}
    with store.read() as session:
        assert features.stale_embeddings(session, "enc", {two: card, one: kept}) == []
        assert features.stale_embeddings(session, "enc", {two: {("card", 0): "x"}, one: kept}) == [two]
        assert features.stale_embeddings(session, "enc", {two: {("card", 1): card["card", 0]}}) == [two]
        assert features.stale_embeddings(session, "enc", {two: {**card, ("sample", 0): "x"}}) == [two]
        assert features.stale_embeddings(session, "enc", {one: card, two: {}}) == [one, two]
        assert features.stale_embeddings(session, "other", {two: card, one: kept}) == [two, one]
        assert features.stale_embeddings(session, "enc", {999: {}}) == []


def test_adapter_texts(store: Store, pair: tuple[int, int], add_adapter: Any) -> None:
    with store.write() as session:
        labels = {"tag": ("reviews",), "dataset": ("glue",), "target": ("q_proj",)}
        third = add_adapter(session, "org/three", "sub", card_text="Sorts reviews.", labels=labels)
        gated = add_adapter(session, "org/gated", status="gated", card_text="hidden")
        for adapter_id in (third, gated):
            session.add_all(
                AdapterSample(adapter_id=adapter_id, split=split, position=n, input=f"{split} {n}", origin="o")
                for n in (2, 0, 1)
                for split in ("sample", "test")
            )
    with store.read() as session:
        assert features.adapter_texts(session) == [
            AdapterTexts(pair[0], "org/one", "", (), "", "org/base"),
            AdapterTexts(pair[1], "org/two", "", (), "", "org/base"),
            AdapterTexts(
                third,
                "org/three/sub",
                "Sorts reviews.",
                ("sample 0", "sample 1", "sample 2"),
                "sub",
                "org/base",
                ("glue", "reviews"),
            ),
        ]


def test_features_go_with_their_adapter(store: Store, pair: tuple[int, int]) -> None:
    with store.write() as session:
        for adapter_id in pair:
            features.save_spectra(session, adapter_id, "w", [spectrum("a", 1.0)])
        features.save_embeddings(session, "enc", [embedding(adapter_id) for adapter_id in pair])
        session.delete(session.get_one(Adapter, pair[0]))
    with store.read() as session:
        assert session.scalars(select(AdapterSpectrum.adapter_id)).all() == [pair[1]]
        assert session.scalars(select(TextEmbedding.adapter_id)).all() == [pair[1]]


def test_vectors_are_little_endian_float32(store: Store, pair: tuple[int, int]) -> None:
    with store.write() as session:
        features.save_spectra(session, pair[0], "w1", [spectrum("a", 1.0, direction=(-2.0,))])
    with store.read() as session:
        values, direction = session.execute(select(AdapterSpectrum.singular_values, AdapterSpectrum.direction)).one()
    assert (bytes(values), bytes(direction)) == (b"\x00\x00\x80\x3f", b"\x00\x00\x00\xc0")
