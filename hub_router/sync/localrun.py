"""The local part of a run: folders on this machine, hashed and read in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hub_router.errors import MissingError, UnsupportedAdapterError
from hub_router.formats import describe_names
from hub_router.progress import Progress
from hub_router.store import repos as writes
from hub_router.store.known import KnownRepo, known_repos, local_adapters_under
from hub_router.store.repos import AdapterFields, RepoFields
from hub_router.store.runs import Outcome
from hub_router.sync.base_model import Fits
from hub_router.sync.describe import Inspect, describe
from hub_router.sync.discover import ALL, NEWEST
from hub_router.sync.hubrun import reason_of
from hub_router.sync.journal import Journal
from hub_router.sync.local import LocalAdapter, content_revision, scan
from hub_router.sync.pool import WorkerPool


def examine(
    adapter: LocalAdapter, known: KnownRepo | None, inspect: Inspect, fits: Fits | None = None
) -> tuple[str, AdapterFields | None]:
    """Hash a local adapter, and read it if its contents are new.

    Args:
        adapter (LocalAdapter): from :func:`hub_router.sync.local.scan`.
        known (KnownRepo | None): its row.
        inspect (Inspect): reads config and tensors.
        fits (Fits | None): compares the adapter with a base model whose config is on this machine.

    Returns:
        tuple[str, AdapterFields | None]: revision, and what the catalog stores; None if it holds that revision.
    """
    revision, files = content_revision(adapter)
    held = known.adapters if known and known.revision == revision and known.state in ("ok", "unsupported") else ()
    if held and all(row.resolved for row in held):
        return revision, None
    if adapter.folder.problem:
        return revision, AdapterFields("", str(adapter.path), reason=adapter.folder.problem)
    return revision, describe(adapter.path, adapter.folder, files, inspect, fits=fits)


class LocalRun:
    """Brings the adapters of local folders into the catalog; used by one thread.

    Args:
        pool (WorkerPool): threads for hashing and reading.
        journal (Journal): where outcomes and rows go.
        inspect (Inspect): reads an adapter's config and tensors.
        fits (Fits | None): compares an adapter with a base model whose config is on this machine.
        checkpoints (str): ``newest`` or ``all`` of the folders ``checkpoint-N`` that stand for one adapter.
    """

    def __init__(
        self,
        pool: WorkerPool,
        journal: Journal,
        inspect: Inspect,
        fits: Fits | None = None,
        checkpoints: str = NEWEST,
    ) -> None:
        self._pool = pool
        self._journal = journal
        self._inspect = inspect
        self._fits = fits
        self._checkpoints = checkpoints

    def run(self, folders: Sequence[Path], progress: Progress) -> None:
        """Sync folders.

        Args:
            folders (Sequence[Path]): absolute; each is an adapter or holds adapters.
            progress (Progress): where to report.
        """
        found: dict[str, LocalAdapter] = {}
        for top in folders:
            found |= {str(adapter.path): adapter for adapter in self._scan(top)}
        with self._journal.store.read() as session:
            known = known_repos(session, "local", found)
        with progress.task("Reading folders", len(found)) as advance:
            for name, adapter in found.items():
                self._pool.submit(name, partial(examine, adapter, known.get(name), self._inspect, self._fits))
            for name, value, error in self._pool.results():
                self._on_adapter(name, known.get(name), found[name].folder.skipped, value, error)
                advance(1)

    def _scan(self, top: Path) -> list[LocalAdapter]:
        """Adapters of a folder; those that the catalog holds and the folder has no more are recorded as missing."""
        try:
            every = scan(top, ALL)
            found = every if self._checkpoints == ALL else scan(top)
        except MissingError as error:
            self._gone(top, [], str(error), Outcome("local", str(top), "", None, "missing", str(error)))
            return []
        except (OSError, UnsupportedAdapterError) as error:
            self._journal.record([Outcome("local", str(top), "", None, "failed", reason_of(error))])
            return []
        what = None if found else describe_names({entry.name for entry in top.iterdir()})
        nothing = f"no adapter_config.json in {top} or below" + (f", found {what}" if what else "")
        empty = None if found else Outcome("local", str(top), "", None, "unsupported", nothing)
        self._gone(top, every, "no adapter in this folder any more", empty)
        return found

    def _gone(self, top: Path, found: Sequence[LocalAdapter], reason: str, otherwise: Outcome | None) -> None:
        """Record the adapters of a folder that are no more there, or ``otherwise`` if there were none."""
        with self._journal.store.read() as session:
            known = local_adapters_under(session, str(top))
        present = {str(adapter.path) for adapter in found}
        gone = [repo.repo_id for repo in known if repo.repo_id not in present]
        for name in gone:
            step = partial(writes.mark_unavailable, source="local", repo_id=name, state="missing", reason=reason)
            self._journal.record([Outcome("local", name, "", None, "missing", reason)], step)
        if otherwise is not None and str(top) not in gone:
            self._journal.record([otherwise])

    def _on_adapter(
        self,
        name: str,
        known: KnownRepo | None,
        skipped: str,
        value: tuple[str, AdapterFields | None],
        error: BaseException | None,
    ) -> None:
        if error is not None:
            reason = reason_of(error)
            step = partial(writes.mark_failed, source="local", repo_id=name, reason=reason)
            self._journal.record([Outcome("local", name, "", None, "failed", reason)], step)
            return
        revision, adapter = value
        if adapter is None and known is not None:
            row = known.adapters[0]
            outcome = "unchanged" if row.status == "ready" else row.status
            self._journal.record([Outcome("local", name, "", revision, outcome, row.reason)])
        elif adapter is not None:
            news = "updated" if known and known.adapters else "added"
            outcome = news if adapter.facts else "unsupported"
            reason = "; ".join(filter(None, (adapter.reason, skipped)))
            line = Outcome("local", name, "", revision, outcome, reason)
            fields = RepoFields("local", name, revision)
            state = "ok" if adapter.facts else "unsupported"
            self._journal.record(
                [line],
                partial(writes.save_adapter, repo=fields, adapter=adapter),
                partial(writes.finish_repo, repo=fields, state=state, reason=adapter.reason),
            )
