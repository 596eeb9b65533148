"""The vectors that stand for an adapter in search: its card, and the centroid of its sample inputs.

A query is a task in words, which is like a card, or an input of the task, which is like the samples. The centroid of
all texts hides the card among twenty samples, and the nearest single text is often a stray sample of another task; the
larger cosine of the two vectors serves both kinds of query.
"""

from __future__ import annotations

import numpy as np

from hub_router.store.index_rows import EmbeddingRows

CARD, SAMPLE = 0, 1
PER_ADAPTER = 2
# A sum of unit vectors shorter than this part of their number has no direction but rounding.
_CANCELLED = 1e-6


def task_vectors(rows: EmbeddingRows) -> tuple[np.ndarray, np.ndarray]:
    """At most two unit vectors per adapter.

    Args:
        rows (EmbeddingRows): embedded texts, ordered by adapter and kind.

    Returns:
        tuple[np.ndarray, np.ndarray]: row numbers int64 ``(M,)`` ascending, see :func:`row_number`, and vectors float32
            ``(M, D)``; texts whose vectors cancel each other out give none.
    """
    if not len(rows.owners):
        return np.empty(0, dtype=np.int64), rows.vectors
    keys = row_number(rows.owners, np.where(rows.cards, CARD, SAMPLE))
    numbers, starts, counts = np.unique(keys, return_index=True, return_counts=True)
    sums = np.add.reduceat(rows.vectors, starts, axis=0, dtype=np.float64)  # (M, D)
    lengths = np.linalg.norm(sums, axis=1)
    usable = lengths > _CANCELLED * counts
    return numbers[usable], (sums[usable] / lengths[usable, None]).astype(np.float32)


def row_number(adapter_ids: np.ndarray, kinds: np.ndarray | int) -> np.ndarray:
    """Number of a vector in the index: twice the catalog id, plus one for samples."""
    return PER_ADAPTER * adapter_ids + kinds


def adapters_of(numbers: np.ndarray) -> np.ndarray:
    """Catalog ids of row numbers."""
    return numbers // PER_ADAPTER
