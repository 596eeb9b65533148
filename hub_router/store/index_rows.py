"""What a search index is built from: embeddings in pieces that fit in memory, and marks that tell what changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session, aliased

from hub_router.store.features import EmbeddingState
from hub_router.store.rows import chunks
from hub_router.store.tables import Adapter, TextEmbedding
from hub_router.store.vectors import from_bytes, matrix_from_bytes


@dataclass(frozen=True)
class EmbeddingRows:
    """Embedded texts of some adapters, ordered by adapter, kind and position.

    Args:
        owners (np.ndarray): catalog ids, int64 ``(N,)``.
        cards (np.ndarray): whether a row is the card's, bool ``(N,)``; the others are samples'.
        vectors (np.ndarray): float32 ``(N, D)``.
    """

    owners: np.ndarray
    cards: np.ndarray
    vectors: np.ndarray


def embedding_marks(session: Session, encoder: str) -> tuple[np.ndarray, np.ndarray]:
    """One number per embedded adapter that changes when any of its texts does.

    Args:
        session (Session): a session of the store.
        encoder (str): the encoder's name.

    Returns:
        tuple[np.ndarray, np.ndarray]: catalog ids int64 ``(N,)`` ascending, marks uint64 ``(N,)``.
    """
    statement = select(TextEmbedding.adapter_id, TextEmbedding.kind, TextEmbedding.position, TextEmbedding.text_hash)
    rows = session.execute(statement.where(TextEmbedding.encoder == encoder)).all()
    owners = np.fromiter((row[0] for row in rows), dtype=np.int64, count=len(rows))
    # A sum does not depend on the order of the rows; the factor keeps two texts from changing places unseen.
    hashes = np.fromiter((int(row[3][:16], 16) for row in rows), dtype=np.uint64, count=len(rows))
    places = np.fromiter((2 * row[2] + (row[1] == "card") + 1 for row in rows), dtype=np.uint64, count=len(rows))
    ids, positions = np.unique(owners, return_inverse=True)
    marks = np.zeros(len(ids), dtype=np.uint64)
    np.add.at(marks, positions, hashes * (2 * places + 1))
    return ids, marks


def embedding_rows(session: Session, state: EmbeddingState, adapter_ids: np.ndarray) -> Iterator[EmbeddingRows]:
    """Embedded texts of some adapters, a thousand adapters at a time.

    Args:
        session (Session): a session of the store.
        state (EmbeddingState): the encoder's state in this session.
        adapter_ids (np.ndarray): catalog ids, int64 ``(N,)``.

    Returns:
        Iterator[EmbeddingRows]: adapters in ascending order, none of them split between two pieces.
    """
    statement = select(TextEmbedding.adapter_id, TextEmbedding.kind, TextEmbedding.vector).where(
        TextEmbedding.encoder == state.encoder
    )
    order = (TextEmbedding.adapter_id, TextEmbedding.kind, TextEmbedding.position)
    for chunk in chunks(np.sort(adapter_ids).tolist()):
        rows = session.execute(statement.where(TextEmbedding.adapter_id.in_(chunk)).order_by(*order)).all()
        yield EmbeddingRows(
            owners=np.fromiter((row[0] for row in rows), dtype=np.int64, count=len(rows)),
            cards=np.fromiter((row[1] == "card" for row in rows), dtype=bool, count=len(rows)),
            vectors=matrix_from_bytes([row[2] for row in rows], state.dimension),
        )


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
