"""What every search asks first: whether the query is a vector of the encoder, and whether anything is indexed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sqlalchemy.orm import Session

from hub_router.errors import HubRouterError, NotInCatalogError
from hub_router.store import adapters as adapter_queries
from hub_router.store.features import EmbeddingState, encoders


def unit(vector: Sequence[float] | np.ndarray, state: EmbeddingState) -> np.ndarray:
    """The query as float64 ``(D,)`` of unit length.

    Args:
        vector (Sequence[float] | np.ndarray): of any length but zero.
        state (EmbeddingState): of the encoder.

    Returns:
        np.ndarray: its direction.

    Raises:
        HubRouterError: it has no direction, or another dimension than the encoder's.
    """
    query = np.asarray(vector, dtype=np.float64)
    if query.shape != (state.dimension,):
        raise HubRouterError(
            f"the query vector has shape {query.shape}, expected ({state.dimension},) of encoder {state.encoder!r}"
        )
    length = np.linalg.norm(query)
    if not np.isfinite(length) or length == 0:
        raise HubRouterError(
            f"the query vector has length {length} and points nowhere, expected a finite vector other than zero"
        )
    return query / length


def check_limit(limit: int) -> None:
    """Refuses a number of hits below 1."""
    if limit < 1:
        raise HubRouterError(f"the number of hits must be at least 1, got {limit} (--limit N)")


def not_indexed(session: Session, encoder: str) -> NotInCatalogError:
    """Why an encoder finds nothing, and the command that helps."""
    if not adapter_queries.count(session):
        return NotInCatalogError(
            "the catalog holds no adapter that can be searched; add some with: hub-router sync OWNER/REPO, then: "
            "hub-router index"
        )
    others = ", ".join(encoders(session)) or "none"
    return NotInCatalogError(
        f"nothing is indexed with encoder {encoder!r} (indexed with: {others}); run: "
        f"hub-router index --encoder {encoder}"
    )
