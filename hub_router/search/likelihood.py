"""Which of many adapters an input belongs to, by the likelihood of the input among the samples of their tasks.

The score is that of HiLoRA (https://arxiv.org/abs/2510.12266, Sec. 3.2): log N(z; mean, covariance + epsilon I) / d of
the Gaussian of an adapter's embedded samples. The index proposes and the store decides: of the adapters with the
nearest means, those whose sketches come close to the best are scored in float64 from the Gaussians in the database.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
from hub_router.store.gaussians import gaussian_state, has_samples, served_gaussians
from hub_router.store.index_rows import embedding_rows
from hub_router.store.session import Store

EPSILON = 1e-5
# Adapters that are compared by their coarse sketches: those with the nearest means, this share of all but no fewer than
# the number beside it.
WIDE_SHARE, WIDE = 100, 512
# By the fine sketches: so many at a time, until the coarse estimates of the others are too far above the best fine one,
# and this share of all at most.
STEP, MARGIN, NARROW_SHARE, NARROW = 32, 1.15, 200, 256
# And exactly: those whose fine estimates come so close to the best, and some beyond the limit. Of so few adapters in
# all nothing is estimated.
SLACK, SPARE, LONGEST = 0.03, 2, 64
# How many times as many are looked at where filters will refuse some.
_FILTERED = 4
# Rounding to float16 moves the squared distance of unit vectors by less.
_DISAGREEMENT = 1e-2
# No more of a distance can be explained than there is, and 8 bits overstate it by less than this.
_OVERSHOT = 0.1
_TINY = 1e-6


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
    return [Hit(records[each.adapter_id], each.score, "sample", texts.get(each.adapter_id, "")) for each in found]


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
        list[Likelihood]: by score, equal scores by catalog id. Among more than 64 adapters one may be missed whose mean
        is far from the input, and of several those after the first that score nearly alike.

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


def log_likelihoods(
    query: np.ndarray, gaussians: Iterable[tuple[int, np.ndarray, np.ndarray]], epsilon: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores in float64 from Gaussians as they are stored.

    Args:
        query (np.ndarray): z, float64 ``(D,)``.
        gaussians (Iterable[tuple[int, np.ndarray, np.ndarray]]): catalog id, mean ``(D,)`` and factors ``(K, D)`` of N
            adapters; the factors of one are orthogonal.
        epsilon (float): ridge, above 0.

    Returns:
        tuple[np.ndarray, np.ndarray, np.ndarray]: catalog ids, log-likelihoods divided by D, and ``||z - mean||^2``,
        all ``(N,)``.
    """
    terms = []
    for adapter_id, mean, stored in gaussians:
        offset, factors = query - mean, stored.astype(np.float64)
        # Orthogonal, so their squared lengths are the eigenvalues.
        variances = np.einsum("kd,kd->k", factors, factors)
        terms.append((adapter_id, offset @ offset, np.square(factors @ offset), variances))
    longest = max((len(term[3]) for term in terms), default=0)
    squares, variances = np.zeros((2, len(terms), longest))
    for place, (_, _, own_squares, own_variances) in enumerate(terms):
        squares[place, : len(own_squares)], variances[place, : len(own_variances)] = own_squares, own_variances
    lengths = np.array([term[1] for term in terms])
    densities = woodbury(lengths, squares, variances, epsilon, len(query))
    return np.array([term[0] for term in terms], dtype=np.int64), densities / len(query), lengths


@dataclass(frozen=True, eq=False)
class _Question:
    query: np.ndarray
    filters: Filters
    limit: int
    epsilon: float


def _scores(session: Session, index: GaussianIndex, state: EmbeddingState, asked: _Question) -> dict[int, float] | None:
    """Exact scores of the shortlist; None where the index contradicts the store, which only damaged files do."""
    near = _propose(index, asked)
    if asked.filters == NO_FILTERS:
        chosen = _closest(index, near, asked)
        scores = None if chosen is None else _exact(session, state, asked, chosen)
        # Fewer are served where a sync took some away since the last run of index.
        if chosen is None or scores is None or len(scores) == len(chosen.ids):
            return scores
    looked = near.ids[: _FILTERED * max(NARROW, asked.limit)]
    passing = np.isin(near.ids, adapter_queries.ids(session, asked.filters, among=looked.tolist()))
    if passing.sum() < max(asked.limit, PASSING_SHARE * len(looked)) and len(looked) < index.rows:
        allowed = np.intersect1d(adapter_queries.ids(session, asked.filters), index.ids)
        near = _propose(index, asked, allowed)
    else:
        near = near.only(passing)
    chosen = _closest(index, near, asked)
    return None if chosen is None else _exact(session, state, asked, chosen)


def _propose(index: GaussianIndex, asked: _Question, among: np.ndarray | None = None) -> Shortlist:
    """Adapters by their coarse sketches; few adapters are all proposed, without any estimate."""
    few = index.ids if among is None else among
    if len(few) <= LONGEST:
        unknown = np.full(len(few), np.nan, dtype=np.float32)
        return Shortlist(few, unknown, unknown)
    wide = max(WIDE, index.rows // WIDE_SHARE, 4 * asked.limit)
    return index.propose(asked.query.astype(np.float32), wide, asked.epsilon, among)


def _closest(index: GaussianIndex, near: Shortlist, asked: _Question) -> Shortlist | None:
    """The proposals that are worth an exact score, by their fine sketches; None where a sketch cannot be true."""
    if len(near.ids) <= LONGEST:
        return near
    most = min(len(near.ids), max(NARROW, index.rows // NARROW_SHARE, 2 * asked.limit))
    query = asked.query.astype(np.float32)
    fine = np.empty(most, dtype=np.float32)
    done, overstated, lowest = 0, 1.0, np.inf
    believable = bool((near.estimates > -_OVERSHOT).all())
    while believable and done < most and near.estimates[done] < MARGIN * overstated * lowest:
        step = slice(done, min(max(done + STEP, 2 * asked.limit), most))
        fine[step] = index.refined(near.only(step), query, asked.epsilon)
        believable = bool((fine[step] > -_OVERSHOT).all())
        done = step.stop
        overstated = max(overstated, float((near.estimates[step] / np.maximum(fine[step], _TINY)).max()))
        lowest = min(lowest, float(fine[step].min()))
    if not believable:
        return None
    close = int((fine[:done] <= lowest + SLACK * abs(lowest)).sum())
    least = asked.limit + (SPARE if asked.limit > 1 else 0)
    return near.only(np.argsort(fine[:done], kind="stable")[: min(max(close, least), max(LONGEST, least))])


def _exact(session: Session, state: EmbeddingState, asked: _Question, chosen: Shortlist) -> dict[int, float] | None:
    """Scores of those that are served, by catalog id; None where their means are not where the index has them."""
    proposed = dict(zip(chosen.ids.tolist(), chosen.lengths.tolist(), strict=True))
    stored = served_gaussians(session, state, chosen.ids)
    ids, scores, lengths = log_likelihoods(asked.query, stored, asked.epsilon)
    off = np.abs(lengths - [proposed[adapter_id] for adapter_id in ids.tolist()])
    if (off > _DISAGREEMENT).any():
        return None
    return dict(zip(ids.tolist(), scores.tolist(), strict=True))


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
