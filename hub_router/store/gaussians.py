"""Gaussians of the adapters' sample embeddings: saved, read by many, and which of them other samples made stale.

They follow from embeddings in the store, so a Gaussian is stale when the text hashes of its adapter's embedded samples
are not those that it was fitted to. The encoder's ``gaussian_generation`` moves on with every change.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from sqlalchemy import Integer, Select, and_, bindparam, case, delete, func, insert, select, update
from sqlalchemy.orm import Session

from hub_router.errors import StoreError
from hub_router.gaussian import Gaussian, fit
from hub_router.store.features import EmbeddingState
from hub_router.store.rows import chunks, plain
from hub_router.store.tables import Adapter, AdapterGaussian, EncoderState, TextEmbedding
from hub_router.store.vectors import from_bytes, matrix_from_bytes, to_bytes, view_of

# Fewer have no covariance; what compares means alone takes one.
LEAST_SAMPLES = 2
# 15 MB at 768 dimensions and 19 factors.
_PIECE = 256

# Up to so many at a time where one after the other is wanted.
_STEP = 64

_SERVED = and_(Adapter.current.is_(True), Adapter.status == "ready")
# Made once: building a statement takes longer than SQLite takes to answer it.
_STATE = select(EncoderState.encoder, EncoderState.dimension, EncoderState.gaussian_generation).where(
    EncoderState.encoder == bindparam("encoder")
)
_ROWS = (
    select(AdapterGaussian.adapter_id, AdapterGaussian.mean, AdapterGaussian.factors)
    .join(Adapter, Adapter.id == AdapterGaussian.adapter_id)
    .where(AdapterGaussian.encoder == bindparam("encoder"), AdapterGaussian.samples >= LEAST_SAMPLES)
    .order_by(AdapterGaussian.adapter_id)
)
_CHOSEN_ROWS = _ROWS.where(AdapterGaussian.adapter_id.in_(bindparam("ids", expanding=True)))


@cache
def _served_rows(count: int) -> Select[int, bytes, bytes]:
    """A statement for so many ids, which unlike a list of any length is not rendered anew each time."""
    numbered = AdapterGaussian.adapter_id.in_([bindparam(f"id{place}", type_=Integer) for place in range(count)])
    # As an expression, for SQLite would rather walk along all of the index on current than look up a few ids.
    return _ROWS.where(numbered, case((_SERVED, 1), else_=0) == 1)


@dataclass(frozen=True, eq=False)
class StoredGaussian:
    """A Gaussian and what it was fitted to.

    Args:
        adapter_id (int): catalog id.
        gaussian (Gaussian): mean and factors.
        fingerprint (str): of the samples, from :func:`sample_fingerprints`.
    """

    adapter_id: int
    gaussian: Gaussian
    fingerprint: str


@dataclass(frozen=True, eq=False)
class GaussianRows:
    """Gaussians of at least two samples of some adapters, as arrays.

    Args:
        owners (np.ndarray): catalog ids, int64 ``(N,)``, ascending.
        means (np.ndarray): float32 ``(N, D)``.
        factors (np.ndarray): float32 ``(N, K, D)``, orthogonal rows; zeros where an adapter has fewer than K.
    """

    owners: np.ndarray
    means: np.ndarray
    factors: np.ndarray


def save_gaussians(session: Session, encoder: str, rows: Sequence[StoredGaussian], gone: Sequence[int] = ()) -> None:
    """Replaces the Gaussians of some adapters and removes those of others, and moves the generation on.

    Args:
        session (Session): a writing session.
        encoder (str): the encoder's name.
        rows (Sequence[StoredGaussian]): what to keep, as float32.
        gone (Sequence[int]): catalog ids of adapters that have none any more.

    Raises:
        StoreError: the catalog holds no embeddings of this encoder, or a Gaussian has another dimension than they or
            is not finite; lists the adapters.
    """
    if not rows and not gone:
        return
    state = gaussian_state(session, encoder)
    if state is None:
        raise StoreError(f"the catalog holds no embeddings of encoder {encoder!r}; run: hub-router index")
    unusable = [row.adapter_id for row in rows if not _fits(row.gaussian, state.dimension)]
    if unusable:
        raise StoreError(
            f"the Gaussians of adapters {unusable[:10]} are not finite or not of the dimension {state.dimension} of "
            f"encoder {encoder!r}"
        )
    for chunk in chunks([*(row.adapter_id for row in rows), *(int(adapter_id) for adapter_id in gone)]):
        owned = AdapterGaussian.adapter_id.in_(chunk)
        session.execute(delete(AdapterGaussian).where(AdapterGaussian.encoder == encoder, owned))
    if rows:
        session.execute(
            insert(AdapterGaussian),
            [
                {
                    "adapter_id": row.adapter_id,
                    "encoder": encoder,
                    "samples": row.gaussian.samples,
                    "fingerprint": row.fingerprint,
                    "mean": to_bytes(row.gaussian.mean),
                    "factors": to_bytes(row.gaussian.factors),
                }
                for row in rows
            ],
        )
    # In milliseconds and never the same twice, for the reason given where embeddings are saved.
    now, last = time.time_ns() // 1_000_000, EncoderState.gaussian_generation
    session.execute(
        update(EncoderState)
        .where(EncoderState.encoder == encoder)
        .values(gaussian_generation=case((last < now, now), else_=last + 1))
        .execution_options(synchronize_session=False)
    )


def gaussian_state(session: Session, encoder: str) -> EmbeddingState | None:
    """The encoder's dimension and the generation of its Gaussians, 0 before the first; None without embeddings."""
    session.flush()
    row = session.connection().execute(_STATE, {"encoder": encoder}).one_or_none()
    return None if row is None else EmbeddingState(*row)


def load_gaussians(session: Session, encoder: str, adapter_ids: Sequence[int]) -> dict[int, Gaussian]:
    """Gaussians of the sample embeddings that the store holds now, of any revision.

    What ``index`` did not save, or saved of other samples, is fitted here, which takes a millisecond each.

    Args:
        session (Session): a session of the store.
        encoder (str): the encoder's name.
        adapter_ids (Sequence[int]): catalog ids.

    Returns:
        dict[int, Gaussian]: by catalog id, in the order given; without adapters that have no embedded sample. One of a
        single sample has no factors.
    """
    wanted = [int(adapter_id) for adapter_id in adapter_ids]
    found: dict[int, Gaussian] = {}
    for chunk in chunks(wanted):
        now = sample_fingerprints(session, encoder, chunk)
        found |= _saved(session, encoder, chunk, now)
        vectors = sample_vectors(session, encoder, [adapter_id for adapter_id in now if adapter_id not in found])
        found |= {adapter_id: fit(own) for adapter_id, own in vectors.items()}
    return {adapter_id: found[adapter_id] for adapter_id in wanted if adapter_id in found}


def sample_vectors(session: Session, encoder: str, adapter_ids: Sequence[int]) -> dict[int, np.ndarray]:
    """Embedded samples by catalog id, float32 ``(m, D)`` by position; adapters that have none are left out."""
    row = TextEmbedding
    columns = select(row.adapter_id, row.vector).where(row.encoder == encoder, row.kind == "sample")
    stored: dict[int, list[bytes]] = {}
    for chunk in chunks([int(adapter_id) for adapter_id in adapter_ids]):
        ordered = columns.where(row.adapter_id.in_(chunk)).order_by(row.adapter_id, row.position)
        for adapter_id, vector in plain(session, ordered):
            stored.setdefault(adapter_id, []).append(vector)
    return {adapter_id: np.stack([from_bytes(vector) for vector in own]) for adapter_id, own in stored.items()}


def served_gaussians(
    session: Session, state: EmbeddingState, adapter_ids: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Gaussians of at least two samples of the adapters that are ready in their newest revision, one at a time.

    One at a time, since memory that was just given back is quicker to fill than new memory.

    Args:
        session (Session): a session of the store.
        state (EmbeddingState): from :func:`gaussian_state`.
        adapter_ids (np.ndarray): catalog ids, int64 ``(N,)``.

    Returns:
        Iterator[tuple[int, np.ndarray, np.ndarray]]: catalog ids in ascending order, means float32 ``(D,)`` and factors
        float32 ``(K, D)``, whose rows are orthogonal.
    """
    session.flush()
    ids = np.sort(adapter_ids).tolist()
    for start in range(0, len(ids), _STEP):
        step = ids[start : start + _STEP]
        # Filled up with the last one to the next power of two, for there are to be few statements.
        count = 1 << (len(step) - 1).bit_length()
        chosen = {f"id{place}": step[min(place, len(step) - 1)] for place in range(count)}
        for owner, mean, factors in session.connection().execute(
            _served_rows(count), {"encoder": state.encoder, **chosen}
        ):
            yield owner, view_of(mean), view_of(factors).reshape(-1, state.dimension)


def gaussian_rows(session: Session, state: EmbeddingState, adapter_ids: np.ndarray) -> Iterator[GaussianRows]:
    """Gaussians of at least two samples of some adapters, served or not, 256 at a time.

    Args:
        session (Session): a session of the store.
        state (EmbeddingState): from :func:`gaussian_state`.
        adapter_ids (np.ndarray): catalog ids, int64 ``(N,)``.

    Returns:
        Iterator[GaussianRows]: adapters in ascending order.
    """
    session.flush()
    ids = np.sort(adapter_ids).tolist()
    for start in range(0, len(ids), _PIECE):
        chosen = {"encoder": state.encoder, "ids": ids[start : start + _PIECE]}
        rows = session.connection().execute(_CHOSEN_ROWS, chosen).all()
        owners, means, factors = zip(*rows, strict=True) if rows else ((), (), ())
        yield GaussianRows(
            owners=np.array(owners, dtype=np.int64),
            means=matrix_from_bytes(means, state.dimension),
            factors=_padded(factors, state.dimension),
        )


def gaussian_marks(session: Session, encoder: str) -> tuple[np.ndarray, np.ndarray, int]:
    """One number per Gaussian of at least two samples, that changes when its samples do.

    Args:
        session (Session): a session of the store.
        encoder (str): the encoder's name.

    Returns:
        tuple[np.ndarray, np.ndarray, int]: catalog ids int64 ``(N,)`` ascending, marks uint64 ``(N,)``, and the largest
        number of samples, 0 where there are none.
    """
    row = AdapterGaussian
    statement = select(row.adapter_id, row.fingerprint, row.samples).where(
        row.encoder == encoder, row.samples >= LEAST_SAMPLES
    )
    rows = plain(session, statement.order_by(row.adapter_id)).all()
    owners, fingerprints, samples = zip(*rows, strict=True) if rows else ((), (), ())
    marks = np.array([int(fingerprint[:16], 16) for fingerprint in fingerprints], dtype=np.uint64)
    return np.array(owners, dtype=np.int64), marks, max(samples, default=0)


def stale_gaussians(session: Session, encoder: str) -> tuple[dict[int, str], list[int]]:
    """What ``index`` has to do.

    Args:
        session (Session): a session of the store.
        encoder (str): the encoder's name.

    Returns:
        tuple[dict[int, str], list[int]]: fingerprints by catalog id of served adapters with embedded samples and no
        Gaussian of them, and catalog ids of those whose Gaussian has to go: no samples are left, or they are no longer
        served.
    """
    wanted = sample_fingerprints(session, encoder)
    statement = select(AdapterGaussian.adapter_id, AdapterGaussian.fingerprint)
    rows = plain(session, statement.where(AdapterGaussian.encoder == encoder)).all()
    stored: dict[int, str] = dict(rows)
    stale = {adapter_id: now for adapter_id, now in wanted.items() if stored.get(adapter_id) != now}
    return stale, sorted(stored.keys() - wanted.keys())


def sample_fingerprints(session: Session, encoder: str, adapter_ids: Sequence[int] | None = None) -> dict[int, str]:
    """What Gaussians of the present sample embeddings are known by.

    Args:
        session (Session): a session of the store.
        encoder (str): the encoder's name.
        adapter_ids (Sequence[int] | None): these adapters, served or not; default all that are served.

    Returns:
        dict[int, str]: sha256 of the samples' text hashes, by catalog id, ascending; without adapters that have none.
    """
    row = TextEmbedding
    statement = select(row.adapter_id, row.text_hash).where(row.encoder == encoder, row.kind == "sample")
    if adapter_ids is None:
        statement = statement.join(Adapter, Adapter.id == row.adapter_id).where(_SERVED)
    else:
        statement = statement.where(row.adapter_id.in_(list(adapter_ids)))
    hashes: dict[int, list[str]] = {}
    for adapter_id, text_hash in plain(session, statement.order_by(row.adapter_id, row.position)):
        hashes.setdefault(adapter_id, []).append(text_hash)
    return {adapter_id: hashlib.sha256("\n".join(own).encode()).hexdigest() for adapter_id, own in hashes.items()}


def has_samples(session: Session, encoder: str) -> bool:
    """Whether any served adapter has as many embedded samples as a Gaussian needs."""
    row = TextEmbedding
    enough = (
        select(row.adapter_id)
        .join(Adapter, Adapter.id == row.adapter_id)
        .where(row.encoder == encoder, row.kind == "sample", _SERVED)
        .group_by(row.adapter_id)
        .having(func.count() >= LEAST_SAMPLES)
    )
    return session.execute(enough.limit(1)).first() is not None


def _saved(session: Session, encoder: str, adapter_ids: Sequence[int], now: Mapping[int, str]) -> dict[int, Gaussian]:
    """Saved Gaussians whose fingerprints are those of now."""
    row = AdapterGaussian
    columns = select(row.adapter_id, row.samples, row.fingerprint, row.mean, row.factors)
    chosen = columns.where(row.encoder == encoder, row.adapter_id.in_(adapter_ids))
    found = {}
    for adapter_id, samples, fingerprint, stored, factors in plain(session, chosen):
        if fingerprint == now.get(adapter_id):
            mean = from_bytes(stored).astype(np.float64)
            rows = from_bytes(factors).astype(np.float64).reshape(-1, len(mean))
            found[adapter_id] = Gaussian(mean, rows, samples)
    return found


def _fits(gaussian: Gaussian, dimension: int) -> bool:
    mean, factors = gaussian.mean, gaussian.factors
    shaped = mean.shape == (dimension,) and factors.ndim == 2 and factors.shape[1] == dimension
    return shaped and bool(np.isfinite(mean).all() and np.isfinite(factors).all())


def _padded(stored: Sequence[bytes], width: int) -> np.ndarray:
    """Factors of one width stacked to float32 ``(N, K, width)`` with the largest K."""
    longest = max(map(len, stored), default=0)
    return matrix_from_bytes([rows.ljust(longest, b"\0") for rows in stored], longest // 4).reshape(
        len(stored), longest // (4 * width), width
    )
