"""The cached files that Gaussians are shortlisted from: a FAISS index of their means, and their sketches.

They are rebuilt wherever they do not match the store. Both are mapped into memory; of a large catalog the index is
searched in its nearest cells, and brought up to date by replacing the rows that changed.
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
from hub_router.search.sketch import axes_count, estimates, principal_axes, sketch, sketch_type
from hub_router.store.features import EmbeddingState
from hub_router.store.gaussians import gaussian_marks, gaussian_rows, gaussian_state
from hub_router.store.session import Store

EXACT_ROWS = 2_000
PROBED_SHARE = 16
PROBED_LEAST = 16
CHANGED_SHARE = 0.2
# Gaussians that the axes of the sketches are found from.
AXES_FROM = 2_000
_KIND = "gaussians"
_MEANS, _SKETCHES, _AXES, _MARKS = "means.faiss", "sketches.npy", "axes.npy", "marks.npy"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Shortlist:
    """Adapters, best first as far as their sketches tell.

    Args:
        ids (np.ndarray): catalog ids, int64 ``(N,)``.
        lengths (np.ndarray): ``||z - mean||^2`` within rounding to float16, float32 ``(N,)``.
        estimates (np.ndarray): ascending, see :mod:`hub_router.search.sketch`, float32 ``(N,)``.
    """

    ids: np.ndarray
    lengths: np.ndarray
    estimates: np.ndarray


@dataclass(frozen=True, eq=False)
class GaussianIndex:
    """An opened index of Gaussians.

    Args:
        means (Any): FAISS index of Euclidean distances over catalog ids.
        ids (np.ndarray): catalog ids, int64 ``(N,)``, ascending.
        sketches (np.ndarray): one per id.
        axes (np.ndarray): of the sketches, float32 ``(D, P)``.
    """

    means: Any
    ids: np.ndarray
    sketches: np.ndarray
    axes: np.ndarray

    @property
    def rows(self) -> int:
        """Number of Gaussians."""
        return len(self.ids)

    def nearest(self, query: np.ndarray, limit: int, epsilon: float, among: np.ndarray | None = None) -> Shortlist:
        """The adapters with the nearest means, in the order of their estimates.

        Args:
            query (np.ndarray): z, float32 ``(D,)``.
            limit (int): number of means to look up.
            epsilon (float): ridge.
            among (np.ndarray | None): catalog ids to which the search is confined; every mean of theirs is then
                compared. Without it, a large index is searched in a sixteenth of its cells.

        Returns:
            Shortlist: at most ``limit`` adapters.
        """
        probed = max(PROBED_LEAST, getattr(self.means, "nlist", 0) // PROBED_SHARE)
        ids, lengths = look_up(self.means, query, limit, probed, among)
        sketches = self.sketches[np.searchsorted(self.ids, ids)]
        estimated = estimates(sketches, lengths, query @ self.axes, epsilon)
        order = np.argsort(estimated, kind="stable")
        return Shortlist(ids[order], lengths[order], estimated[order])


def refresh_gaussian_index(store: Store, index_dir: Path, encoder: str) -> bool:
    """Brings the files on disk up to date.

    Args:
        store (Store): the catalog.
        index_dir (Path): folder of the caches.
        encoder (str): the encoder's name.

    Returns:
        bool: whether there was anything to do.
    """
    with store.read() as session:
        state = gaussian_state(session, encoder)
        if state is None or not state.generation or gaussians_are_current(index_dir, state):
            return False
        rebuild_gaussian_index(session, index_dir, state)
    return True


def gaussians_are_current(index_dir: Path, state: EmbeddingState) -> bool:
    """Whether the files on disk can be read and hold the Gaussians of this generation."""
    return _opened(index_dir, state) is not None


def open_gaussian_index(session: Session, index_dir: Path, state: EmbeddingState) -> GaussianIndex:
    """The index of an encoder's Gaussians, rebuilt where that on disk is missing, unreadable or out of date.

    Args:
        session (Session): a session of the store.
        index_dir (Path): folder of the caches.
        state (EmbeddingState): of the Gaussians in this session.

    Returns:
        GaussianIndex: of exactly this generation.
    """
    return _opened(index_dir, state) or rebuild_gaussian_index(session, index_dir, state)


def rebuild_gaussian_index(
    session: Session, index_dir: Path, state: EmbeddingState, from_scratch: bool = False
) -> GaussianIndex:
    """Builds the index from the store and publishes it; where the folder cannot be written to, it is used from memory.

    Args:
        session (Session): a session of the store.
        index_dir (Path): folder of the caches.
        state (EmbeddingState): of the Gaussians in this session.
        from_scratch (bool): do not start from the rows of the index on disk.

    Returns:
        GaussianIndex: of exactly this generation.
    """
    started = time.monotonic()
    home = home_of(index_dir, state.encoder, _KIND)
    ids, marks, samples = gaussian_marks(session, state.encoder)
    factors = min(max(samples - 1, 0), state.dimension)
    built = None if from_scratch else _updated(session, home, state, (ids, marks), factors)
    index, trained, changed = built or _fresh(session, state, ids, factors)
    seconds = time.monotonic() - started
    logger.info("Gaussians of %s: %d sketches built in %.1f s", state.encoder, index.rows, seconds)

    def write(folder: Path) -> None:
        faiss.write_index(index.means, str(folder / _MEANS))
        np.save(folder / _SKETCHES, index.sketches)
        np.save(folder / _AXES, index.axes)
        np.save(folder / _MARKS, np.stack([ids.astype(np.uint64), marks]))

    try:
        publish(home, Build(state.encoder, state.generation, state.dimension, index.rows, trained, changed), write)
    except UNWRITABLE as error:
        logger.warning("Gaussians of %s are kept in memory, %s cannot be written: %s", state.encoder, home, error)
    return index


def _opened(index_dir: Path, state: EmbeddingState) -> GaussianIndex | None:
    """The index on disk, None where it is missing, unreadable or of another generation."""
    home = home_of(index_dir, state.encoder, _KIND)
    build = current_build(home)
    if build is None or (build.generation, build.dimension) != (state.generation, state.dimension):
        return None
    try:
        return _read(home, build)
    except UNREADABLE as error:
        logger.warning("index of the Gaussians of %s is built again: %s", state.encoder, error)
        return None


def _read(home: Path, build: Build) -> GaussianIndex:
    folder = home / build.folder
    index = _mapped(folder, (folder / _MEANS).stat().st_mtime_ns, (folder / _SKETCHES).stat().st_mtime_ns)
    axes = axes_count(build.dimension)
    found = (index.means.ntotal, index.means.d, index.rows, index.axes.shape, index.sketches.shape)
    expected = (build.rows, build.dimension, build.rows, (build.dimension, axes), (build.rows,))
    layout = index.sketches.dtype
    if found != expected or layout != sketch_type(layout["directions"].shape[0], axes):
        raise OSError(f"{folder} holds {found}, expected {expected}")
    return index


@lru_cache(maxsize=4)
def _mapped(folder: Path, _means_modified: int, _sketches_modified: int) -> GaussianIndex:
    """The files of a build mapped into memory; kept open, since opening them takes longer than a search in them."""
    ids, _ = np.load(folder / _MARKS, allow_pickle=False)
    sketches = np.load(folder / _SKETCHES, mmap_mode="r", allow_pickle=False)
    # A plain view: every fancy index of a memmap would first look up its file.
    return GaussianIndex(
        means=faiss.read_index(str(folder / _MEANS), faiss.IO_FLAG_MMAP_IFC),
        ids=ids.astype(np.int64),
        sketches=sketches.view(np.ndarray),
        axes=np.load(folder / _AXES, allow_pickle=False),
    )


def _fresh(session: Session, state: EmbeddingState, ids: np.ndarray, factors: int) -> tuple[GaussianIndex, int, int]:
    """An index of all Gaussians: exact over few means, cells around k-means centroids for many."""
    chosen = np.sort(np.random.default_rng(0).choice(ids, min(len(ids), AXES_FROM), replace=False))
    axes = principal_axes(gaussian_rows(session, state, chosen), state.dimension)
    rows, sketches = _rows(session, state, ids, axes, factors)
    means = laid_out(rows, ids, faiss.METRIC_L2, EXACT_ROWS)
    return GaussianIndex(means, ids, sketches, axes), len(ids), 0


def _updated(
    session: Session, home: Path, state: EmbeddingState, marks: tuple[np.ndarray, np.ndarray], factors: int
) -> tuple[GaussianIndex, int, int] | None:
    """The index on disk with the rows of changed adapters replaced; None where building anew is better."""
    build = current_build(home)
    if build is None or build.dimension != state.dimension or build.rows <= EXACT_ROWS:
        return None
    try:
        before = _read(home, build)
        _, old = np.load(home / build.folder / _MARKS, allow_pickle=False)
        layout = before.sketches.dtype
        leaving, entering = changes((before.ids, old), marks)
        changed = build.changed_rows + len(np.union1d(leaving, entering))
        # Cells and axes were laid for the rows of their time.
        if changed > CHANGED_SHARE * build.trained_rows or factors > layout["directions"].shape[0]:
            return None
        means = faiss.read_index(str(home / build.folder / _MEANS))
    except (*UNREADABLE, TypeError) as error:
        logger.warning("index of the Gaussians of %s is built anew: %s", state.encoder, error)
        return None
    remove(means, leaving)
    rows, sketches = _rows(session, state, entering, before.axes, layout["directions"].shape[0])
    means.add_with_ids(rows, entering)
    staying = ~np.isin(before.ids, leaving)
    ids = np.concatenate([before.ids[staying], entering])
    order = np.argsort(ids)
    merged = np.concatenate([before.sketches[staying], sketches])[order]
    return GaussianIndex(means, ids[order], merged, before.axes), build.trained_rows, changed


def _rows(
    session: Session, state: EmbeddingState, ids: np.ndarray, axes: np.ndarray, factors: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means float32 ``(N, D)`` and sketches of the adapters given in ascending order."""
    means = np.empty((len(ids), state.dimension), dtype=np.float32)
    sketches = np.empty(len(ids), dtype=sketch_type(factors, axes.shape[1]))
    done = 0
    for piece in gaussian_rows(session, state, ids):
        stop = done + len(piece.owners)
        means[done:stop] = piece.means
        sketches[done:stop] = sketch(piece, axes, sketches.dtype)
        done = stop
    return means, sketches
