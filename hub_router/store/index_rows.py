"""What a search index is built from and hits are scored by: embedded texts, and marks that tell which changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session, aliased

from hub_router.store.features import EmbeddingState
from hub_router.store.rows import chunks
from hub_router.store.tables import Adapter, TextEmbedding
from hub_router.store.vectors import from_bytes, matrix_from_bytes

# Made once: building a statement takes longer than SQLite takes to answer it.
_ROWS = (
    select(TextEmbedding.adapter_id, TextEmbedding.kind, TextEmbedding.text, TextEmbedding.vector)
    .where(
        TextEmbedding.encoder == bindparam("encoder"), TextEmbedding.adapter_id.in_(bindparam("ids", expanding=True))
    )
    .order_by(TextEmbedding.adapter_id, TextEmbedding.kind, TextEmbedding.position)
)


@dataclass(frozen=True)
class EmbeddingRows:
    """Embedded texts of some adapters, ordered by adapter, kind and position.

    Args:
        owners (np.ndarray): catalog ids, int64 ``(N,)``.
        cards (np.ndarray): whether a text is the card's, bool ``(N,)``; the others are samples'.
        vectors (np.ndarray): float32 ``(N, D)``.
        texts (tuple[str, ...]): the texts.
    """

    owners: np.ndarray
    cards: np.ndarray
    vectors: np.ndarray
    texts: tuple[str, ...]


def embedding_rows(session: Session, state: EmbeddingState, adapter_ids: np.ndarray) -> Iterator[EmbeddingRows]:
    """Embedded texts of some adapters, a thousand adapters at a time.

    Args:
        session (Session): a session of the store.
        state (EmbeddingState): the encoder's state in this session.
        adapter_ids (np.ndarray): catalog ids, int64 ``(N,)``.

    Returns:
        Iterator[EmbeddingRows]: adapters in ascending order, none of them split between two pieces.
    """
    session.flush()
    for chunk in chunks(np.sort(adapter_ids).tolist()):
        rows = session.connection().execute(_ROWS, {"encoder": state.encoder, "ids": chunk}).all()
        owners, kinds, texts, vectors = zip(*rows, strict=True) if rows else ((), (), (), ())
        yield EmbeddingRows(
            owners=np.array(owners, dtype=np.int64),
            cards=np.array([kind == "card" for kind in kinds], dtype=bool),
            vectors=matrix_from_bytes(vectors, state.dimension),
            texts=texts,
        )


def embedding_marks(session: Session, encoder: str) -> tuple[np.ndarray, np.ndarray]:
    """One number per embedded adapter that changes when any of its texts does.

    Args:
        session (Session): a session of the store.
        encoder (str): the encoder's name.

    Returns:
        tuple[np.ndarray, np.ndarray]: catalog ids int64 ``(N,)`` ascending, marks uint64 ``(N,)``.
    """
    statement = select(TextEmbedding.adapter_id, TextEmbedding.kind, TextEmbedding.position, TextEmbedding.text_hash)
    session.flush()
    rows = session.connection().execute(statement.where(TextEmbedding.encoder == encoder)).all()
    owners, kinds, positions, hashes = zip(*rows, strict=True) if rows else ((), (), (), ())
    ids, places = np.unique(np.array(owners, dtype=np.int64), return_inverse=True)
    parts = np.array([int(text_hash[:16], 16) for text_hash in hashes], dtype=np.uint64)
    # Rows come in any order, so they are added up; odd factors keep texts from changing places unseen.
    factors = 4 * np.array(positions, dtype=np.uint64) + np.array(
        [1 + 2 * (k == "card") for k in kinds], dtype=np.uint64
    )
    marks = np.zeros(len(ids), dtype=np.uint64)
    np.add.at(marks, places, parts * factors)
    return ids, marks


def known_vectors(session: Session, encoder: str, adapter_ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Vectors that need not be computed again: those of the same adapters in any revision.

    Args:
        session (Session): a session of the store.
        encoder (str): the encoder's name.
        adapter_ids (Sequence[int]): catalog ids.

    Returns:
        dict[str, np.ndarray]: by text hash, float32 ``(D,)``.
    """
    other = aliased(Adapter)
    found: dict[str, np.ndarray] = {}
    for chunk in chunks([int(adapter_id) for adapter_id in adapter_ids]):
        statement = (
            select(TextEmbedding.text_hash, TextEmbedding.vector)
            .join(other, other.id == TextEmbedding.adapter_id)
            .join(Adapter, (Adapter.repo_pk == other.repo_pk) & (Adapter.subfolder == other.subfolder))
            .where(TextEmbedding.encoder == encoder, Adapter.id.in_(chunk))
        )
        found.update((text_hash, from_bytes(vector)) for text_hash, vector in session.execute(statement))
    return found
