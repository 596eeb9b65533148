"""Spectra of catalogued adapters, computed by the engine and kept by the catalog."""

from __future__ import annotations

from hub_router.errors import UnsupportedAdapterError
from hub_router.progress import Progress
from hub_router.store import features as feature_queries
from hub_router.store.session import Store


def index_spectra(store: Store, progress: Progress) -> tuple[int, tuple[tuple[str, str], ...]]:
    """Compute the spectra of every adapter that lacks current ones; one that cannot be read does not stop the rest.

    Args:
        store (Store): catalog.
        progress (Progress): where to report.

    Returns:
        tuple[int, tuple[tuple[str, str], ...]]: how many were computed, and (adapter, reason) of those that failed.
    """
    from hub_router.lora.reader import read_adapter
    from hub_router.lora.spectrum import spectra

    with store.read() as session:
        stale = feature_queries.stale_spectra(session)
    failed: list[tuple[str, str]] = []
    with progress.task("spectra", len(stale)) as advance:
        for record in stale:
            try:
                adapter = read_adapter(record.path, record.name)
                if adapter.weights_hash != record.weights_hash:
                    raise UnsupportedAdapterError(f"its files changed since; run: hub-router sync {record.ref}")
                computed = list(spectra(adapter))
            except (UnsupportedAdapterError, OSError) as error:
                failed.append((record.ref, str(error)))
            else:
                with store.write() as session:
                    feature_queries.save_spectra(session, record.id, adapter.weights_hash, computed)
            advance(1)
    return len(stale) - len(failed), tuple(failed)
