"""One run of sync: plan, find out what changed, fetch and verify it, write it down.

Worker threads talk to the Hub, hash and read files; the calling thread alone writes to the database, one adapter per
transaction. Whatever goes wrong with one adapter or repository becomes its outcome, and the run goes on.
"""

from __future__ import annotations

import time

from hub_router.progress import SILENT, Progress
from hub_router.store.session import Store
from hub_router.sync.base_model import Fits
from hub_router.sync.client import ClientOptions, HubClient
from hub_router.sync.describe import Inspect
from hub_router.sync.hubrun import HubRun
from hub_router.sync.journal import Journal
from hub_router.sync.localrun import LocalRun
from hub_router.sync.plan import SyncRequest, make_plan
from hub_router.sync.pool import WorkerPool
from hub_router.sync.summary import SyncSummary

__all__ = ["ClientOptions", "SyncRequest", "SyncSummary", "sync"]


def sync(
    store: Store,
    request: SyncRequest,
    inspect: Inspect,
    progress: Progress = SILENT,
    *,
    options: ClientOptions | None = None,
    fits: Fits | None = None,
) -> SyncSummary:
    """Bring the catalog up to date with repositories on the Hub and with local folders.

    A repository whose commit the catalog holds costs no request of its own; interrupted at any moment, the catalog
    holds every adapter finished so far, and the next run does the rest.

    Args:
        store (Store): catalog.
        request (SyncRequest): what to sync.
        inspect (Inspect): reads an adapter folder's config and tensors; raises UnsupportedAdapterError.
        progress (Progress): where to report.
        options (ClientOptions | None): endpoint, cache and patience; default those of huggingface_hub.
        fits (Fits | None): compares an adapter with a base model whose config is on this machine.

    Returns:
        SyncSummary: the outcome of every adapter.

    Raises:
        SettingsError: the request is empty or malformed.
        ManifestError: the collection is malformed.
        HubError: a listing cannot be read or is empty, or the Hub is needed and ``HF_HUB_OFFLINE`` is set.
    """
    began = time.monotonic()
    client = HubClient(options or ClientOptions())
    with progress.task("Reading listings", None):
        plan = make_plan(store, client, request)
    journal = Journal(store, request.as_dict(), request.dry_run)
    journal.record(plan.faults)
    pool = WorkerPool(request.workers)
    try:
        LocalRun(pool, journal, inspect, fits, request.checkpoints).run(plan.folders, progress)
        HubRun(client, pool, journal, inspect, fits, request.checkpoints).run(plan.repos, progress)
    finally:
        # After an interrupt the threads end at their next request, wait or result.
        client.cancel()
        pool.stop()
    journal.close()
    return SyncSummary(
        outcomes=tuple(sorted(journal.outcomes, key=lambda line: (line.source, line.repo_id, line.subfolder))),
        run_id=journal.run_id,
        dry_run=request.dry_run,
        requests=client.requests,
        seconds=time.monotonic() - began,
    )
