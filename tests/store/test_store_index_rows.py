from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hub_router.store.features import Embedding, embedding_state, save_embeddings
from hub_router.store.index_rows import embedding_marks, embedding_rows, known_vectors
from hub_router.store.session import Store


def embedding(adapter_id: int, kind: str, position: int, text: str) -> Embedding:
    digest = f"{sum(text.encode()) * 7919:016x}{'0' * 48}"
    vector = np.array([adapter_id, position, kind == "card", len(text)], dtype=np.float32)
    return Embedding(adapter_id, kind, position, text, digest, vector)


@pytest.fixture
def three(store: Store, add_adapter: Any) -> list[int]:
    with store.write() as session:
        ids = [add_adapter(session, f"org/{n}") for n in range(3)]
        for n in ids:
            texts = [("sample", 1, "second"), ("card", 0, f"card {n}"), ("sample", 0, "first")]
            save_embeddings(session, "enc", [embedding(n, *text) for text in texts])
        save_embeddings(session, "other", [embedding(ids[0], "card", 0, "card")])
    return ids


def marks(store: Store) -> dict[int, int]:
    with store.read() as session:
        ids, found = embedding_marks(session, "enc")
    return dict(zip(ids.tolist(), found.tolist(), strict=True))


def test_rows_come_whole_and_in_order(store: Store, three: list[int]) -> None:
    with store.read() as session:
        state = embedding_state(session, "enc")
        assert state is not None
        (rows,) = embedding_rows(session, state, np.array([three[2], three[0]]))
        assert list(embedding_rows(session, state, np.array([], dtype=np.int64))) == []
        (unknown,) = embedding_rows(session, state, np.array([999]))
    assert rows.owners.tolist() == [three[0]] * 3 + [three[2]] * 3
    assert rows.cards.tolist() == [True, False, False] * 2
    assert rows.texts == (f"card {three[0]}", "first", "second", f"card {three[2]}", "first", "second")
    np.testing.assert_array_equal(rows.vectors[:, 1], [0, 0, 1] * 2)
    assert (unknown.vectors.shape, unknown.texts) == ((0, 4), ())


def test_marks_change_with_any_text_and_only_then(store: Store, three: list[int]) -> None:
    before = marks(store)
    assert sorted(before) == three
    one, two, three_ = three
    with store.write() as session:
        same = [("sample", 0, "first"), ("sample", 1, "second"), ("card", 0, f"card {one}")]
        save_embeddings(session, "enc", [embedding(one, *text) for text in same])
        swapped = [("sample", 0, "second"), ("sample", 1, "first"), ("card", 0, f"card {two}")]
        save_embeddings(session, "enc", [embedding(two, *text) for text in swapped])
        moved = [("sample", 0, f"card {three_}"), ("sample", 1, "second"), ("card", 0, "first")]
        save_embeddings(session, "enc", [embedding(three_, *text) for text in moved])
    after = marks(store)
    assert after[one] == before[one]
    assert after[two] != before[two]
    assert after[three_] != before[three_]


def test_no_marks_without_embeddings(store: Store) -> None:
    assert marks(store) == {}


def test_known_vectors_are_those_of_any_revision(store: Store, three: list[int], add_adapter: Any) -> None:
    with store.write() as session:
        newer = add_adapter(session, "org/0", revision="b" * 40)
        beside = add_adapter(session, "org/0", "folder")
    with store.read() as session:
        found = known_vectors(session, "enc", [newer])
        assert known_vectors(session, "enc", [beside]) == {}
        assert known_vectors(session, "unknown", [newer]) == {}
    expected = [
        embedding(three[0], "card", 0, f"card {three[0]}"),
        embedding(three[0], "sample", 0, "first"),
        embedding(three[0], "sample", 1, "second"),
    ]
    assert sorted(found) == sorted(row.text_hash for row in expected)
    for row in expected:
        np.testing.assert_array_equal(found[row.text_hash], row.vector)
