"""From a query vector to adapters, best first, each with its score and the text that explains it.

The index proposes and the store decides: proposals are checked against the filters, and scored anew from the embeddings
in the database, in the same transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sqlalchemy.orm import Session

from hub_router.records import AdapterRecord
from hub_router.search.index import SearchIndex, open_index, rebuild_index
from hub_router.search.query import check_limit, not_indexed, unit
from hub_router.search.vectors import CARD, PER_ADAPTER, SAMPLE, row_number, task_vectors
from hub_router.store import adapters as adapter_queries
from hub_router.store.adapters import Filters
from hub_router.store.features import EmbeddingState, embedding_state
from hub_router.store.index_rows import embedding_rows
from hub_router.store.session import Store

NO_FILTERS = Filters()
# Adapters scored beyond the limit, for those that tie with the last and for those whose nearer vector was overlooked.
SPARE = 16
# How many times as many are proposed where filters will refuse some, and the share that must pass for the rest of the
# index to hold nothing better; below it every adapter that passes is compared.
FILTERED = 8
PASSING_SHARE = 1 / 6
# Equal vectors come out of FAISS within the first of these; rounding to float16 moves a cosine by less than the second.
_TIE = 1e-5
_DISAGREEMENT = 1e-3


@dataclass(frozen=True)
class Hit:
    """An adapter that was found, and why.

    Args:
        adapter (AdapterRecord): the adapter.
        score (float): cosine between the query and the adapter's card or the centroid of its sample inputs, whichever
            is larger; or the log-likelihood of the query among the samples, per dimension.
        kind (str): which of the two: ``card`` or ``sample``; ``sample`` for a likelihood.
        text (str): the card's text, or the sample input nearest to the query.
    """

    adapter: AdapterRecord
    score: float
    kind: str
    text: str


@dataclass(frozen=True)
class _Match:
    adapter_id: int
    score: float
    kind: str
    text: str


def search(
    store: Store,
    index_dir: Path,
    encoder: str,
    vector: Sequence[float] | np.ndarray,
    filters: Filters = NO_FILTERS,
    limit: int = 10,
) -> list[Hit]:
    """Adapters nearest to a query, among those that are served and pass the filters.

    Args:
        store (Store): the catalog.
        index_dir (Path): folder of the FAISS caches.
        encoder (str): name of the encoder that made the vector.
        vector (Sequence[float] | np.ndarray): the query ``(D,)``, of any length but zero.
        filters (Filters): which adapters; default all that are served.
        limit (int): at most this many.

    Returns:
        list[Hit]: by score, equal scores by catalog id; fewer than ``limit`` only where no more adapters pass.

    Raises:
        NotInCatalogError: the catalog is empty, or holds no embeddings of this encoder.
        HubRouterError: the vector has no direction or another dimension than the encoder's, or the limit is below 1.
    """
    check_limit(limit)
    with store.read() as session:
        state = embedding_state(session, encoder)
        if state is None:
            raise not_indexed(session, encoder)
        query = unit(vector, state)
        index = open_index(session, index_dir, state)
        if not index.rows:
            raise not_indexed(session, encoder)
        matches = _matches(session, index, state, query, filters, limit)
        if matches is None:
            index = rebuild_index(session, index_dir, state, from_scratch=True)
            matches = _matches(session, index, state, query, filters, limit) or []
        records = adapter_queries.records(session, [match.adapter_id for match in matches])
    return [Hit(records[match.adapter_id], match.score, match.kind, match.text) for match in matches]


def _matches(
    session: Session, index: SearchIndex, state: EmbeddingState, query: np.ndarray, filters: Filters, limit: int
) -> list[_Match] | None:
    """The best adapters; None where the index contradicts the store, which only a damaged file does."""
    ids, proposed = _proposals(session, index, query.astype(np.float32), filters, limit)
    matches = _scored(session, state, query, ids)
    scores = np.array([matches[adapter_id].score if adapter_id in matches else -np.inf for adapter_id in ids.tolist()])
    # An adapter may score higher than proposed, when the nearer of its vectors lies in a cell that was not searched.
    if (proposed > scores + _DISAGREEMENT).any():
        return None
    return sorted(matches.values(), key=lambda match: (-match.score, match.adapter_id))[:limit]


def _proposals(
    session: Session, index: SearchIndex, query: np.ndarray, filters: Filters, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Catalog ids and scores of adapters that pass: the best ``limit``, some to spare, all that tie with the last."""
    window = PER_ADAPTER * (limit + SPARE) * (1 if filters == NO_FILTERS else FILTERED)
    allowed: np.ndarray | None = None
    while True:
        ids, scores = index.nearest(query, window, among=allowed)
        lowest = scores[-1] if len(scores) else 0.0
        if allowed is None:
            passing = np.isin(ids, adapter_queries.ids(session, filters, among=ids.tolist()))
            if passing.sum() < max(limit, PASSING_SHARE * len(ids)) and window < index.rows:
                allowed = adapter_queries.ids(session, filters)
                continue
            ids, scores = ids[passing], scores[passing]
        cut = scores[limit - 1] - _TIE if len(ids) > limit else -np.inf
        if lowest < cut or window >= index.rows or len(ids) <= limit:
            kept = (scores >= cut) | (np.arange(len(ids)) < limit + SPARE)
            return ids[kept], scores[kept]
        window *= 4


def _scored(session: Session, state: EmbeddingState, query: np.ndarray, ids: np.ndarray) -> dict[int, _Match]:
    """Scores and reasons from the embeddings in the store."""
    best: dict[int, _Match] = {}
    for rows in embedding_rows(session, state, ids):
        numbers, vectors = task_vectors(rows)
        owners = row_number(rows.owners, np.where(rows.cards, CARD, SAMPLE))
        closeness = _cosines(rows.vectors, query)
        for number, score in zip(numbers.tolist(), _cosines(vectors, query).tolist(), strict=True):
            adapter_id, kind = divmod(number, PER_ADAPTER)
            if adapter_id not in best or best[adapter_id].score < score:
                own = np.flatnonzero(owners == number)
                nearest = rows.texts[own[closeness[own].argmax()]]
                best[adapter_id] = _Match(adapter_id, score, "card" if kind == CARD else "sample", nearest)
    return best


def _cosines(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Row by row in float64, so that equal vectors score equally wherever they stand: ``(N, D), (D,) -> (N,)``."""
    return (vectors * query).sum(axis=1)
