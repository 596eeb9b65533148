"""Reports on a pool of catalogued adapters, from the embedded samples of their tasks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hub_router.errors import NotInCatalogError
from hub_router.settings import DEFAULT_ENCODER
from hub_router.store import compositions as composition_queries
from hub_router.store import selection
from hub_router.store.gaussians import sample_vectors
from hub_router.store.selection import AdapterRef
from hub_router.store.session import Store

if TYPE_CHECKING:
    from hub_router.evaluate.pool import PoolReport


def report_pool(store: Store, pool: str | Iterable[AdapterRef], epsilon: float | None, top_k: int | None) -> PoolReport:
    """See :meth:`hub_router.hub.Hub.report_pool`."""
    import numpy as np

    from hub_router.evaluate.pool import report_pool
    from hub_router.search.index import indexed_encoder

    with store.read() as session:
        if isinstance(pool, str):
            try:
                composition = composition_queries.load(session, pool)
            except NotInCatalogError as error:
                raise NotInCatalogError(f"{error}; a single NAME is a composition, adapters are two or more") from error
            members = {member.name: member.adapter for member in composition.members}
        else:
            members = selection.select(session, pool)
        encoder = indexed_encoder(session) or DEFAULT_ENCODER
        vectors = sample_vectors(session, encoder, [record.id for record in members.values()])
    none = np.empty((0, 0), dtype=np.float32)
    samples = {name: vectors.get(record.id, none) for name, record in members.items()}
    return report_pool(samples, encoder, epsilon=epsilon, top_k=top_k)
