from __future__ import annotations

import math

import numpy as np
import pytest
from search_world import vector_of

from hub_router.search.vectors import adapters_of, row_number, task_vectors
from hub_router.store.index_rows import EmbeddingRows


def rows_of(texts: list[tuple[int, str, np.ndarray]]) -> EmbeddingRows:
    owners, kinds, vectors = zip(*texts, strict=True)
    return EmbeddingRows(
        owners=np.array(owners, dtype=np.int64),
        cards=np.array([kind == "card" for kind in kinds]),
        vectors=np.stack(vectors),
        texts=tuple(f"{owner} {kind}" for owner, kind in zip(owners, kinds, strict=True)),
    )


def test_card_and_centroid_of_samples() -> None:
    samples = [vector_of(f"sample {n}") for n in range(3)]
    texts = [(7, "card", vector_of("card")), *((7, "sample", vector) for vector in samples), (9, "sample", samples[0])]
    numbers, vectors = task_vectors(rows_of(texts))
    assert numbers.tolist() == [14, 15, 19]
    assert vectors.dtype == np.float32
    mean = [sum(float(vector[place]) for vector in samples) / 3 for place in range(16)]
    length = math.sqrt(sum(value * value for value in mean))
    np.testing.assert_allclose(vectors[0], vector_of("card"), atol=1e-7)
    np.testing.assert_allclose(vectors[1], [value / length for value in mean], atol=1e-6)
    np.testing.assert_allclose(vectors[2], samples[0], atol=1e-7)


def test_samples_that_cancel_out_give_no_vector() -> None:
    one = vector_of("one")
    numbers, vectors = task_vectors(rows_of([(1, "card", one), (1, "sample", one), (1, "sample", -one)]))
    assert numbers.tolist() == [2]
    np.testing.assert_allclose(vectors, one[None], atol=1e-7)


def test_no_rows() -> None:
    empty = EmbeddingRows(np.empty(0, np.int64), np.empty(0, bool), np.empty((0, 5), np.float32), ())
    numbers, vectors = task_vectors(empty)
    assert numbers.shape == (0,)
    assert vectors.shape == (0, 5)


@pytest.mark.parametrize("kind", [0, 1])
def test_row_numbers_name_their_adapter(kind: int) -> None:
    ids = np.array([1, 2, 100_000])
    np.testing.assert_array_equal(adapters_of(row_number(ids, kind)), ids)
