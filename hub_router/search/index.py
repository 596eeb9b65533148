"""The FAISS index of one encoder's task vectors: a cache on disk, rebuilt wherever it does not match the store.

Small catalogs are scanned exactly. Large ones are searched in the nearest cells of an inverted file of float16 that is
mapped into memory, and brought up to date by replacing the rows that changed.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from sqlalchemy.orm import Session

from hub_router.search.cache import UNREADABLE, UNWRITABLE, Build, changes, current_build, home_of, publish
from hub_router.search.cells import laid_out, look_up, remove
from hub_router.search.vectors import CARD, PER_ADAPTER, SAMPLE, adapters_of, row_number, task_vectors
from hub_router.store.features import EmbeddingState, embedding_state, encoders
from hub_router.store.index_rows import embedding_marks, embedding_rows
from hub_router.store.session import Store

EXACT_ROWS = 20_000
PROBED_SHARE = 16
CHANGED_SHARE = 0.2
_VECTORS = "vectors.faiss"
_MARKS = "marks.npy"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchIndex:
    """An opened index.

    Args:
        vectors (Any): FAISS index of inner products over row numbers.
        rows (int): number of vectors.
    """

    vectors: Any
    rows: int

    def nearest(self, query: np.ndarray, limit: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Adapters by their nearer vector, best first.

        Args:
            query (np.ndarray): float32 ``(D,)``, unit length.
            limit (int): number of vectors to look up; an adapter has up to two.
            among (np.ndarray | None): catalog ids to which the search is confined; every one of their vectors is then
                compared. Without it, a large index is searched in a sixteenth of its cells.

        Returns:
            tuple[np.ndarray, np.ndarray]: catalog ids int64 ``(N,)``, each once, and cosines float32 ``(N,)``.
        """
        if not self.rows or (among is not None and not among.size):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        probed = max(1, getattr(self.vectors, "nlist", 0) // PROBED_SHARE)
        rows = None if among is None else np.concatenate([row_number(among, CARD), row_number(among, SAMPLE)])
        numbers, scores = look_up(self.vectors, query, limit, probed, rows)
        ids, first = np.unique(adapters_of(numbers), return_index=True)
        order = np.argsort(first)
        return ids[order], scores[first[order]]


def indexed_encoder(session: Session) -> str | None:
    """The encoder whose embeddings the catalog holds, None where it holds none or several encoders'.

    Args:
        session (Session): a session of the store.

    Returns:
        str | None: name for ``load_encoder``.
    """
    names = encoders(session)
    return names[0] if len(names) == 1 else None


def refresh_index(store: Store, index_dir: Path, encoder: str) -> bool:
    """Brings the index on disk up to date.

    Args:
        store (Store): the catalog.
        index_dir (Path): folder of the caches.
        encoder (str): the encoder's name.

    Returns:
        bool: whether there was anything to do.
    """
    with store.read() as session:
        state = embedding_state(session, encoder)
        if state is None or is_current(index_dir, state):
            return False
        rebuild_index(session, index_dir, state)
    return True


def is_current(index_dir: Path, state: EmbeddingState) -> bool:
    """Whether the index on disk can be read and holds the embeddings of this generation."""
    return _opened(index_dir, state) is not None


def open_index(session: Session, index_dir: Path, state: EmbeddingState) -> SearchIndex:
    """The index of an encoder's embeddings, rebuilt where the one on disk is missing, unreadable or out of date.

    Args:
        session (Session): a session of the store.
        index_dir (Path): folder of the caches.
        state (EmbeddingState): the encoder's state in this session.

    Returns:
        SearchIndex: of exactly this generation.
    """
    return _opened(index_dir, state) or rebuild_index(session, index_dir, state)


def rebuild_index(session: Session, index_dir: Path, state: EmbeddingState, from_scratch: bool = False) -> SearchIndex:
    """Builds the index from the store and publishes it; where the folder cannot be written to, it is used from memory.

    Args:
        session (Session): a session of the store.
        index_dir (Path): folder of the caches.
        state (EmbeddingState): the encoder's state in this session.
        from_scratch (bool): do not start from the rows of the index on disk.

    Returns:
        SearchIndex: of exactly this generation.
    """
    started = time.monotonic()
    home = home_of(index_dir, state.encoder)
    marks = embedding_marks(session, state.encoder)
    built = None if from_scratch else _updated(session, home, state, marks)
    vectors, trained, changed = built or _fresh(session, state, marks[0])
    seconds = time.monotonic() - started
    logger.info("search index of %s: %d rows built in %.1f s", state.encoder, vectors.ntotal, seconds)

    def write(folder: Path) -> Build:
        faiss.write_index(vectors, str(folder / _VECTORS))
        np.save(folder / _MARKS, np.stack([marks[0].astype(np.uint64), marks[1]]))
        return Build(state.encoder, state.generation, state.dimension, vectors.ntotal, trained, changed)

    try:
        publish(home, write)
    except UNWRITABLE as error:
        logger.warning("search index of %s is kept in memory, %s cannot be written: %s", state.encoder, home, error)
    return SearchIndex(vectors, vectors.ntotal)


def _opened(index_dir: Path, state: EmbeddingState) -> SearchIndex | None:
    """The index on disk, None where it is missing, unreadable or of another generation."""
    home = home_of(index_dir, state.encoder)
    build = current_build(home)
    if build is None or (build.generation, build.dimension) != (state.generation, state.dimension):
        return None
    try:
        vectors = _read(home, build, mapped=True)
    except UNREADABLE as error:
        logger.warning("search index of %s is built again: %s", state.encoder, error)
        return None
    return SearchIndex(vectors, build.rows)


def _read(home: Path, build: Build, mapped: bool) -> Any:
    """The FAISS index of a build, mapped or as a copy that may be changed."""
    path = home / build.folder / _VECTORS
    vectors = _mapped(str(path), path.stat().st_mtime_ns) if mapped else faiss.read_index(str(path))
    if (vectors.ntotal, vectors.d) != (build.rows, build.dimension):
        raise OSError(f"{path} holds {(vectors.ntotal, vectors.d)}, expected {(build.rows, build.dimension)}")
    return vectors


@lru_cache(maxsize=4)
def _mapped(path: str, _modified: int) -> Any:
    """A FAISS file mapped into memory; kept open, since mapping hundreds of MB takes longer than a search in them."""
    return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)


def _fresh(session: Session, state: EmbeddingState, adapter_ids: np.ndarray) -> tuple[Any, int, int]:
    """An index of all rows: exact for few, cells around k-means centroids for many."""
    numbers, rows = _rows(session, state, adapter_ids)
    return laid_out(rows, numbers, faiss.METRIC_INNER_PRODUCT, EXACT_ROWS), len(numbers), 0


def _updated(
    session: Session, home: Path, state: EmbeddingState, marks: tuple[np.ndarray, np.ndarray]
) -> tuple[Any, int, int] | None:
    """The index on disk with the rows of changed adapters replaced; None where building anew is better."""
    build = current_build(home)
    if build is None or build.dimension != state.dimension or build.rows <= EXACT_ROWS:
        return None
    try:
        ids, before = np.load(home / build.folder / _MARKS, allow_pickle=False)
        leaving, entering = changes((ids, before), marks)
        changed = build.changed_rows + len(np.union1d(leaving, entering)) * PER_ADAPTER
        # The cells were laid for the rows that they were trained on; too many others make them uneven.
        if changed > CHANGED_SHARE * build.trained_rows:
            return None
        vectors = _read(home, build, mapped=False)
    except (*UNREADABLE, TypeError) as error:
        logger.warning("search index of %s is built anew: %s", state.encoder, error)
        return None
    remove(vectors, np.concatenate([row_number(leaving, CARD), row_number(leaving, SAMPLE)]))
    numbers, rows = _rows(session, state, entering)
    vectors.add_with_ids(rows, numbers)
    return vectors, build.trained_rows, changed


def _rows(session: Session, state: EmbeddingState, adapter_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers and task vectors of adapters."""
    pieces = [task_vectors(piece) for piece in embedding_rows(session, state, adapter_ids)]
    if not pieces:
        return np.empty(0, dtype=np.int64), np.empty((0, state.dimension), dtype=np.float32)
    return np.concatenate([numbers for numbers, _ in pieces]), np.concatenate([vectors for _, vectors in pieces])
