"""The cached files that Gaussians are shortlisted from: a FAISS index of their means, and their sketches.

They are rebuilt wherever they do not match the store. All are mapped into memory; of a large catalog the index is
searched in its nearest cells, and brought up to date by replacing the rows that changed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from sqlalchemy.orm import Session

from hub_router.search.cache import UNREADABLE, UNWRITABLE, Build, changes, current_build, home_of, publish
from hub_router.search.cells import laid_out, look_up, remove
from hub_router.search.sketch import COARSE_FACTORS, Sketches, axes_count, estimates, principal_axes, sketch
from hub_router.store.features import EmbeddingState
from hub_router.store.gaussians import gaussian_marks, gaussian_rows, gaussian_state
from hub_router.store.session import Store

EXACT_ROWS = 2_000
# Many small cells: more of the nearest means lie in those that are searched, for the time that laying them takes once.
FINER = 1.5
PROBED_SHARE = 12
PROBED_LEAST = 24
CHANGED_SHARE = 0.2
# Gaussians that the axes of the coarse sketches are found from.
AXES_FROM = 2_000
# Rows that are copied at a time, for all together may be gigabytes.
_BLOCK = 4_096
_KIND = "gaussians"
_MEANS, _AXES, _MARKS = "means.faiss", "axes.npy", "marks.npy"
_SKETCHED = ("coarse", "fine")
_MAPPED = tuple(f"{name}-{part}.npy" for name in _SKETCHED for part in ("directions", "numbers"))

logger = logging.getLogger(__name__)

NewArray = Callable[[str, tuple[int, ...], Any], np.ndarray]


@dataclass(frozen=True, eq=False)
class Shortlist:
    """Adapters, best first as far as their sketches tell.

    Args:
        ids (np.ndarray): catalog ids, int64 ``(N,)``.
        lengths (np.ndarray): ``||z - mean||^2`` within rounding to float16, float32 ``(N,)``.
        estimates (np.ndarray): by coarse sketches, see :mod:`hub_router.search.sketch`, float32 ``(N,)``.
    """

    ids: np.ndarray
    lengths: np.ndarray
    estimates: np.ndarray

    def only(self, which: slice | np.ndarray) -> Shortlist:
        """Some of the adapters, in their order."""
        return Shortlist(self.ids[which], self.lengths[which], self.estimates[which])


@dataclass(frozen=True, eq=False)
class GaussianIndex:
    """An opened index of N Gaussians.

    Args:
        means (Any): FAISS index of Euclidean distances over catalog ids.
        ids (np.ndarray): catalog ids, int64 ``(N,)``, ascending.
        axes (np.ndarray): of the coarse sketches, float32 ``(D, P)``.
        coarse (Sketches): of the largest factors along the axes.
        fine (Sketches): of all factors.
    """

    means: Any
    ids: np.ndarray
    axes: np.ndarray
    coarse: Sketches
    fine: Sketches

    @property
    def rows(self) -> int:
        """Number of Gaussians."""
        return len(self.ids)

    def propose(self, query: np.ndarray, limit: int, epsilon: float, among: np.ndarray | None = None) -> Shortlist:
        """The adapters with the nearest means, in the order of their coarse estimates.

        Args:
            query (np.ndarray): z, float32 ``(D,)``.
            limit (int): number of means to look up.
            epsilon (float): ridge.
            among (np.ndarray | None): catalog ids to which the search is confined; every mean of theirs is then
                compared. Without it, a large index is searched in a twelfth of its cells.

        Returns:
            Shortlist: at most ``limit`` adapters.
        """
        probed = max(PROBED_LEAST, getattr(self.means, "nlist", 0) // PROBED_SHARE)
        ids, lengths = look_up(self.means, query, limit, probed, among)
        places = np.searchsorted(self.ids, ids)
        estimated = estimates(self.coarse, places, lengths, query @ self.axes, epsilon)
        return Shortlist(ids, lengths, estimated).only(np.argsort(estimated, kind="stable"))

    def refined(self, proposed: Shortlist, query: np.ndarray, epsilon: float) -> np.ndarray:
        """Fine estimates of proposals, in their order.

        Args:
            proposed (Shortlist): from :meth:`propose`.
            query (np.ndarray): z, float32 ``(D,)``.
            epsilon (float): ridge.

        Returns:
            np.ndarray: float32 ``(N,)``.
        """
        return estimates(self.fine, np.searchsorted(self.ids, proposed.ids), proposed.lengths, query, epsilon)


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
    built: list[GaussianIndex] = []

    def build(new: NewArray) -> Build:
        updated = None if from_scratch else _updated(session, home, state, (ids, marks), factors, new)
        index, trained, changed = updated or _fresh(session, state, ids, factors, new)
        built[:] = [index]
        return Build(state.encoder, state.generation, state.dimension, index.rows, trained, changed)

    def write(folder: Path) -> Build:
        described = build(lambda name, shape, dtype: np.lib.format.open_memmap(folder / name, "w+", dtype, shape))
        faiss.write_index(built[0].means, str(folder / _MEANS))
        np.save(folder / _AXES, built[0].axes)
        np.save(folder / _MARKS, np.stack([ids.astype(np.uint64), marks]))
        return described

    try:
        publish(home, write)
    except UNWRITABLE as error:
        logger.warning("Gaussians of %s are kept in memory, %s cannot be written: %s", state.encoder, home, error)
        build(_in_memory)
    seconds = time.monotonic() - started
    logger.info("Gaussians of %s: sketches of %d built in %.1f s", state.encoder, len(ids), seconds)
    return built[0]


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
    """The files of a build; kept open, since opening them takes longer than a search in them."""
    files = _files(home / build.folder)
    return _mapped(home / build.folder, build, *(file.stat().st_mtime_ns for file in files))


@lru_cache(maxsize=16)
def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(folder / name for name in (_MEANS, *_MAPPED))


@lru_cache(maxsize=4)
def _mapped(folder: Path, build: Build, *_modified: int) -> GaussianIndex:
    """The files of a build mapped into memory."""
    # Plain views: each fancy index of a memmap would make another one.
    held = {name: np.load(folder / name, mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in _MAPPED}
    marks, turn = (np.load(folder / name, allow_pickle=False) for name in (_MARKS, _AXES))
    means = faiss.read_index(str(folder / _MEANS), faiss.IO_FLAG_MMAP_IFC)
    coarse, fine = (Sketches(held[f"{name}-directions.npy"], held[f"{name}-numbers.npy"]) for name in _SKETCHED)
    rows, dimension, factors = build.rows, build.dimension, fine.factors
    axes, kept = axes_count(dimension), min(factors, COARSE_FACTORS)
    found = [means.ntotal, means.d, marks.shape, turn.shape]
    expected: list[Any] = [rows, dimension, (2, rows), (dimension, axes)]
    for part in (coarse, fine):
        found += [part.directions.shape, part.directions.dtype, part.numbers.shape, part.numbers.dtype]
    expected += [(rows, kept, axes), np.int8, (rows, 3, kept), np.float32]
    expected += [(rows, factors, dimension), np.int8, (rows, 3, factors), np.float32]
    if found != expected:
        raise OSError(f"{folder} holds {found}, expected {expected}")
    return GaussianIndex(means, marks[0].astype(np.int64), turn, coarse, fine)


def _fresh(
    session: Session, state: EmbeddingState, ids: np.ndarray, factors: int, new: NewArray
) -> tuple[GaussianIndex, int, int]:
    """An index of all Gaussians."""
    chosen = np.random.default_rng(0).choice(ids, min(len(ids), AXES_FROM), replace=False)
    axes = principal_axes(gaussian_rows(session, state, chosen), state.dimension)
    coarse, fine = _new_sketches(len(ids), factors, state.dimension, new)
    rows = _fill(session, state, ids, axes, (coarse, fine))
    return GaussianIndex(laid_out(rows, ids, faiss.METRIC_L2, EXACT_ROWS, FINER), ids, axes, coarse, fine), len(ids), 0


def _updated(
    session: Session,
    home: Path,
    state: EmbeddingState,
    marks: tuple[np.ndarray, np.ndarray],
    factors: int,
    new: NewArray,
) -> tuple[GaussianIndex, int, int] | None:
    """The index on disk with the rows of changed adapters replaced; None where building anew is better."""
    build = current_build(home)
    if build is None or build.dimension != state.dimension or build.rows <= EXACT_ROWS:
        return None
    try:
        before = _read(home, build)
        _, old = np.load(home / build.folder / _MARKS, allow_pickle=False)
        leaving, entering = changes((before.ids, old), marks)
        changed = build.changed_rows + len(np.union1d(leaving, entering))
        # Cells and axes were laid for the rows of their time.
        if changed > CHANGED_SHARE * build.trained_rows or factors > before.fine.factors:
            return None
        means = faiss.read_index(str(home / build.folder / _MEANS))
    except (*UNREADABLE, TypeError) as error:
        logger.warning("index of the Gaussians of %s is built anew: %s", state.encoder, error)
        return None
    ids = marks[0]
    entered = _new_sketches(len(entering), before.fine.factors, state.dimension, _in_memory)
    rows = _fill(session, state, entering, before.axes, entered)
    remove(means, leaving)
    means.add_with_ids(rows, entering)
    merged = _new_sketches(len(ids), before.fine.factors, state.dimension, new)
    for target, own, held in zip(merged, entered, (before.coarse, before.fine), strict=True):
        _merge(target.directions, ids, (own.directions, entering), (held.directions, before.ids))
        _merge(target.numbers, ids, (own.numbers, entering), (held.numbers, before.ids))
    return GaussianIndex(means, ids, before.axes, *merged), build.trained_rows, changed


def _merge(
    target: np.ndarray,
    ids: np.ndarray,
    entered: tuple[np.ndarray, np.ndarray],
    held: tuple[np.ndarray, np.ndarray],
) -> None:
    """Fills an array with one row per id: from those that entered, each with its id, else from those held."""
    for start in range(0, len(ids), _BLOCK):
        own = ids[start : start + _BLOCK]
        fresh = np.isin(own, entered[1])
        target[start : start + _BLOCK][fresh] = entered[0][np.searchsorted(entered[1], own[fresh])]
        target[start : start + _BLOCK][~fresh] = held[0][np.searchsorted(held[1], own[~fresh])]


def _new_sketches(count: int, factors: int, dimension: int, new: NewArray) -> tuple[Sketches, Sketches]:
    """Coarse and fine sketches to be filled."""
    shapes = {"coarse": (min(factors, COARSE_FACTORS), axes_count(dimension)), "fine": (factors, dimension)}
    coarse, fine = (
        Sketches(
            new(f"{name}-directions.npy", (count, *shape), np.int8),
            new(f"{name}-numbers.npy", (count, 3, shape[0]), "<f4"),
        )
        for name, shape in shapes.items()
    )
    return coarse, fine


def _fill(
    session: Session, state: EmbeddingState, ids: np.ndarray, axes: np.ndarray, into: tuple[Sketches, Sketches]
) -> np.ndarray:
    """Sketches adapters given in ascending order; their means float32 ``(N, D)``."""
    means = np.empty((len(ids), state.dimension), dtype=np.float32)
    done = 0
    for piece in gaussian_rows(session, state, ids):
        own = slice(done, done + len(piece.owners))
        means[own] = piece.means
        for sketches, along in zip(into, (axes, None), strict=True):
            sketch(piece, along, Sketches(sketches.directions[own], sketches.numbers[own]))
        done = own.stop
    return means


def _in_memory(_name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.zeros(shape, dtype)
