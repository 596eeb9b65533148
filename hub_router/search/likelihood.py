"""Which of many adapters an input belongs to, by the likelihood of the input among the samples of their tasks.

The score is that of HiLoRA (https://arxiv.org/abs/2510.12266, Sec. 3.2): log N(z; mean, covariance + epsilon I) / d of
the Gaussian of an adapter's embedded samples. The index proposes and the store decides: of the adapters with the nearest
means those whose sketches come close to the best are scored exactly, in float64, from the Gaussians in the database.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sqlalchemy.orm import Session

from hub_router.errors import HubRouterError, NotInCatalogError
from hub_router.gaussian import woodbury
from hub_router.search.gaussian_index import GaussianIndex, Shortlist, open_gaussian_index, rebuild_gaussian_index
from hub_router.search.query import check_limit, not_indexed, unit
from hub_router.search.ranking import NO_FILTERS, PASSING_SHARE, Hit
from hub_router.store import adapters as adapter_queries
from hub_router.store.adapters import Filters
from hub_router.store.features import EmbeddingState
from hub_router.store.gaussians import GaussianRows, gaussian_rows, gaussian_state, has_samples
from hub_router.store.index_rows import embedding_rows
from hub_router.store.session import Store

EPSILON = 1e-5
# Adapters that are scored by their sketches, those with the nearest means.
WIDE = 1_024
# Of these are scored exactly: those within a fifth of the best estimate, some beyond the limit in any case, and no more
# than the last number, which is also that of the adapters among which nothing is estimated.
SLACK = 0.2
SPARE = 6
LONGEST = 64
# How many times as many are looked at where filters will refuse some.
_FILTERED = 4
# Rounding to float16 moves the squared distance of unit vectors by less.
_DISAGREEMENT = 1e-2


@dataclass(frozen=True)
class Likelihood:
    """How well an input fits the samples of an adapter's task.

    Args:
        adapter_id (int): catalog id.
        score (float): log-likelihood divided by the number of dimensions.
    """

    adapter_id: int
    score: float


def search_likelihood(
    store: Store,
    index_dir: Path,
    encoder: str,
    vector: Sequence[float] | np.ndarray,
    filters: Filters = NO_FILTERS,
    limit: int = 10,
    epsilon: float = EPSILON,
) -> list[Hit]:
    """Adapters to whose samples an input fits best, with the sample nearest to it; arguments as for :func:`likeliest`.

    Args:
        store (Store): the catalog.
        index_dir (Path): folder of the caches.
        encoder (str): name of the encoder that made the vector.
        vector (Sequence[float] | np.ndarray): the input.
        filters (Filters): which adapters.
        limit (int): at most this many.
        epsilon (float): ridge.

    Returns:
        list[Hit]: as :func:`likeliest`, all of kind ``sample``.
    """
    with store.read() as session:
        found = likeliest(session, index_dir, encoder, vector, filters, limit, epsilon)
        ids = [each.adapter_id for each in found]
        records = adapter_queries.records(session, ids)
        texts = _nearest_samples(session, encoder, np.asarray(vector, dtype=np.float64), ids)
    return [Hit(records[each.adapter_id], each.score, "sample", texts[each.adapter_id]) for each in found]


def likeliest(
    session: Session,
    index_dir: Path,
    encoder: str,
    vector: Sequence[float] | np.ndarray,
    filters: Filters = NO_FILTERS,
    limit: int = 1,
    epsilon: float = EPSILON,
) -> list[Likelihood]:
    """Adapters to whose samples an input fits best, among those that are served, pass the filters and have two samples.

    Args:
        session (Session): a session of the store.
        index_dir (Path): folder of the caches.
        encoder (str): name of the encoder that made the vector.
        vector (Sequence[float] | np.ndarray): the input ``(D,)``, of any length but zero.
        filters (Filters): which adapters; default all that are served.
        limit (int): at most this many.
        epsilon (float): what is added to the variance in every direction, above 0.

    Returns:
        list[Likelihood]: by score, equal scores by catalog id. Among more than 64 adapters one may be missed whose
        mean or sketch is far from the input.

    Raises:
        NotInCatalogError: the catalog is empty, or holds no Gaussians of this encoder; says what is missing.
        HubRouterError: the vector has no direction or another dimension than the encoder's, the limit is below 1, or
            epsilon is not above 0.
    """
    check_limit(limit)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise HubRouterError(f"epsilon must be a number above 0, got {epsilon} (--epsilon E)")
    state = gaussian_state(session, encoder)
    if state is None:
        raise not_indexed(session, encoder)
    query = unit(vector, state)
    index = open_gaussian_index(session, index_dir, state)
    if not index.rows:
        raise _no_gaussians(session, encoder)
    asked = _Question(query, filters, limit, epsilon)
    scores = _scores(session, index, state, asked)
    if scores is None:
        index = rebuild_gaussian_index(session, index_dir, state, from_scratch=True)
        scores = _scores(session, index, state, asked) or {}
    ranked = sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
    return [Likelihood(adapter_id, score) for adapter_id, score in ranked[:limit]]


def log_likelihoods(query: np.ndarray, rows: GaussianRows, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores in float64 from Gaussians as they are stored.

    Args:
        query (np.ndarray): z, float64 ``(D,)``.
        rows (GaussianRows): of N adapters.
        epsilon (float): ridge, above 0.

    Returns:
        tuple[np.ndarray, np.ndarray]: log-likelihoods divided by D, and ``||z - mean||^2``, both ``(N,)``.
    """
    offsets = query - rows.means  # [N, D]
    lengths = np.square(offsets).sum(axis=-1)
    factors = rows.factors.astype(np.float64)
    projections = (factors @ offsets[..., None])[..., 0]  # [N, K]
    # The rows are orthogonal, so their squared lengths are the eigenvalues.
    variances = np.einsum("nkd,nkd->nk", factors, factors)
    densities = woodbury(lengths, np.square(projections), variances, epsilon, len(query))
    return densities / len(query), lengths


@dataclass(frozen=True, eq=False)
class _Question:
    query: np.ndarray
    filters: Filters
    limit: int
    epsilon: float


def _scores(session: Session, index: GaussianIndex, state: EmbeddingState, asked: _Question) -> dict[int, float] | None:
    """Exact scores of the shortlist; None where the index contradicts the store, which only damaged files do."""
    near = _look_up(index, asked)
    if asked.filters == NO_FILTERS:
        chosen = _closest(near, asked.limit)
        scores = _exact(session, state, asked, chosen)
        # Fewer are served where a sync took some away since the last run of index.
        if scores is None or len(scores) == len(chosen.ids):
            return scores
    looked = near.ids[: _FILTERED * max(LONGEST, asked.limit + SPARE)]
    passing = np.isin(near.ids, adapter_queries.ids(session, asked.filters, among=looked.tolist()))
    if passing.sum() < max(asked.limit, PASSING_SHARE * len(looked)) and len(looked) < index.rows:
        allowed = np.intersect1d(adapter_queries.ids(session, asked.filters), index.ids)
        near = _look_up(index, asked, allowed)
    else:
        near = Shortlist(near.ids[passing], near.lengths[passing], near.estimates[passing])
    return _exact(session, state, asked, _closest(near, asked.limit))


def _look_up(index: GaussianIndex, asked: _Question, among: np.ndarray | None = None) -> Shortlist:
    """The index's proposals, best estimate first; few adapters are all proposed, without any estimate."""
    few = index.ids if among is None else among
    if len(few) <= LONGEST:
        unknown = np.full(len(few), np.nan, dtype=np.float32)
        return Shortlist(few, unknown, unknown)
    wide = max(WIDE, 2 * asked.limit)
    return index.nearest(asked.query.astype(np.float32), wide, asked.epsilon, among)


def _closest(near: Shortlist, limit: int) -> Shortlist:
    """The proposals that are worth an exact score."""
    if len(near.ids) <= LONGEST:
        return near
    close = np.searchsorted(near.estimates, near.estimates[0] + SLACK * abs(near.estimates[0]), side="right")
    count = min(max(int(close), limit + SPARE), max(LONGEST, limit + SPARE))
    return Shortlist(near.ids[:count], near.lengths[:count], near.estimates[:count])


def _exact(session: Session, state: EmbeddingState, asked: _Question, chosen: Shortlist) -> dict[int, float] | None:
    """Scores of those that are served, by catalog id; None where their means are not where the index has them."""
    proposed = dict(zip(chosen.ids.tolist(), chosen.lengths.tolist(), strict=True))
    scores: dict[int, float] = {}
    for rows in gaussian_rows(session, state, chosen.ids, served=True):
        found, lengths = log_likelihoods(asked.query, rows, asked.epsilon)
        owners = rows.owners.tolist()
        off = np.abs(lengths - [proposed[adapter_id] for adapter_id in owners])
        if (off > _DISAGREEMENT).any():
            return None
        scores.update(zip(owners, found.tolist(), strict=True))
    return scores


def _nearest_samples(session: Session, encoder: str, query: np.ndarray, ids: Sequence[int]) -> dict[int, str]:
    """Of each adapter the embedded sample that is most like the input."""
    state = EmbeddingState(encoder, len(query), 0)
    best: dict[int, tuple[float, str]] = {}
    for rows in embedding_rows(session, state, np.array(ids, dtype=np.int64)):
        closeness = (rows.vectors * query).sum(axis=1)
        for place in np.flatnonzero(~rows.cards).tolist():
            candidate = (float(closeness[place]), rows.texts[place])
            owner = int(rows.owners[place])
            best[owner] = max(best.get(owner, candidate), candidate, key=lambda pair: pair[0])
    return {owner: text for owner, (_, text) in best.items()}


def _no_gaussians(session: Session, encoder: str) -> NotInCatalogError:
    if has_samples(session, encoder):
        return NotInCatalogError(
            f"the likelihoods of encoder {encoder!r} are not computed yet; run: hub-router index --encoder {encoder}"
        )
    return NotInCatalogError(
        f"no adapter has the two embedded samples that a likelihood needs (encoder {encoder!r}); add some with: "
        f"hub-router samples add ADAPTER FILE, then: hub-router index --encoder {encoder}"
    )
