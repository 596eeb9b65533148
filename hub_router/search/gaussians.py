"""Fits the Gaussians of the adapters' sample embeddings, those that are missing or stale and no others."""

from __future__ import annotations

from hub_router.gaussian import fit
from hub_router.progress import SILENT, Progress
from hub_router.store.gaussians import (
    StoredGaussian,
    sample_fingerprints,
    sample_vectors,
    save_gaussians,
    stale_gaussians,
)
from hub_router.store.session import Store

# One transaction each, of 4 MB at 768 dimensions; a process that is killed loses the work of one.
_ADAPTERS_PER_STEP = 64


def fit_missing(store: Store, encoder: str, progress: Progress = SILENT) -> int:
    """Fits what is missing of the adapters that are served, and removes what no longer belongs to any sample.

    An adapter is stale when the samples that are embedded are not those that its Gaussian was fitted to.

    Args:
        store (Store): the catalog.
        encoder (str): name of the encoder whose embeddings are taken.
        progress (Progress): where to report; counts adapters.

    Returns:
        int: number of adapters whose Gaussians were fitted.
    """
    with store.read() as session:
        stale, gone = stale_gaussians(session, encoder)
    if gone:
        with store.write() as session:
            save_gaussians(session, encoder, [], gone)
    ids = list(stale)
    fitted = 0
    with progress.task("Gaussians", len(ids)) as advance:
        for start in range(0, len(ids), _ADAPTERS_PER_STEP):
            step = ids[start : start + _ADAPTERS_PER_STEP]
            with store.read() as session:
                # Of the vectors read here: another process may have embedded other samples since.
                fingerprints = sample_fingerprints(session, encoder, step)
                vectors = sample_vectors(session, encoder, step)
            rows = [StoredGaussian(number, fit(own), fingerprints[number]) for number, own in vectors.items()]
            with store.write() as session:
                save_gaussians(session, encoder, rows)
            fitted += len(rows)
            advance(len(step))
    return fitted
