"""The Hub's part of a run: which repositories changed, and what becomes of each of their adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from sqlalchemy.orm import Session

from hub_router.errors import GatedError, HubError, HubRouterError, MissingError, NoSuchRevisionError
from hub_router.formats import describe_names
from hub_router.progress import Progress
from hub_router.store import repos as writes
from hub_router.store.known import KnownAdapter, KnownRepo, known_repos
from hub_router.store.labels import Labels, held_labels, save_labels
from hub_router.store.repos import AdapterFields, RepoFields
from hub_router.store.runs import Outcome
from hub_router.store.samples import write_stated
from hub_router.sync.base_model import Fits
from hub_router.sync.client import HubClient
from hub_router.sync.contents import Contents, check_access, fetch, is_on_disk, look
from hub_router.sync.describe import Inspect
from hub_router.sync.discover import ALL, NEWEST, AdapterFolder, is_within
from hub_router.sync.hubrecords import RepoInfo
from hub_router.sync.journal import Journal, Step
from hub_router.sync.plan import Wanted
from hub_router.sync.pool import WorkerPool
from hub_router.sync.relabel import relabel
from hub_router.sync.resolve import resolve


@dataclass
class _Work:
    """A repository under its present name: what was asked, what is known, and what came of it so far."""

    wanted: Wanted
    info: RepoInfo
    known: KnownRepo | None
    renamed_from: str = ""
    renamed_now: bool = False
    checkpoints: str = NEWEST
    contents: Contents | None = None
    left: int = 0
    ready: int = 0
    state: str = ""
    reason: str = ""

    @property
    def fields(self) -> RepoFields:
        """The repository's row as it is to be."""
        before = self.known.requested_subfolders if self.known else ()
        if self.known and self.known.revision != self.info.sha:
            # This run does not look at the other folders, so at this commit nothing is settled about them.
            before = tuple(folder for folder in before if self.is_asked(folder))
        return RepoFields(
            source="hub",
            repo_id=self.info.id,
            revision=self.info.sha,
            requested_revision=self.wanted.revision,
            subfolders=tuple(sorted({*before, *self.wanted.subfolders})),
            checkpoints=self.checkpoints,
            last_modified=self.info.last_modified,
            downloads=self.info.downloads,
            likes=self.info.likes,
        )

    def is_asked(self, folder: str) -> bool:
        """Whether this run is to look at a folder."""
        return any(is_within(folder, top) for top in self.wanted.subfolders)

    def line(self, outcome: str, reason: str = "", subfolder: str = "") -> Outcome:
        """An outcome of this repository or of one of its adapters."""
        renamed = f"renamed from {self.renamed_from}" if self.renamed_from else ""
        if self.renamed_now and outcome == "unchanged":
            outcome = "updated"
        text = "; ".join(part for part in (reason, renamed) if part)
        return Outcome("hub", self.info.id, subfolder, self.info.sha, outcome, text)

    def catalogued(self) -> list[KnownAdapter]:
        """Adapters that the catalog holds of this very commit."""
        rows = self.known.adapters if self.known else ()
        return [row for row in rows if row.revision == self.info.sha and row.status in ("ready", "unsupported")]

    def standing(self, row: KnownAdapter) -> Outcome:
        """The outcome of an adapter that the catalog holds of this very commit."""
        return self.line("unchanged" if row.status == "ready" else row.status, row.reason, row.subfolder)

    def absent(self, subfolders: Sequence[str]) -> list[Outcome]:
        """An outcome for each folder asked for that holds no adapter; ``subfolders`` are those that do."""
        lines = []
        for top in self.wanted.subfolders:
            if any(is_within(folder, top) for folder in subfolders):
                continue
            if top:
                lines.append(self.line("missing", f"no adapter in folder {top}", top))
            else:
                lines.append(self.line("unsupported", self.why_unusable()))
        return lines

    def why_unusable(self) -> str:
        """Why the repository gives no adapter at all."""
        if self.contents is None:
            return self.known.reason if self.known else ""
        if self.contents.folders:
            return "none of its adapters can be used"
        unsafe = f", {self.contents.unsafe} unsafe paths ignored" if self.contents.unsafe else ""
        found = describe_names({path.rsplit("/", 1)[-1] for path in self.contents.tree})
        return f"no adapter_config.json ({len(self.contents.tree)} files{unsafe})" + (
            f", found {found}" if found else ""
        )


class HubRun:
    """Looks at repositories and brings the changed ones into the catalog; used by one thread.

    Args:
        client (HubClient): connection.
        pool (WorkerPool): threads for requests, downloads and hashing.
        journal (Journal): where outcomes and rows go.
        inspect (Inspect): reads an adapter's config and tensors.
        fits (Fits | None): compares an adapter with a base model whose config is on this machine.
        checkpoints (str): ``newest`` or ``all`` of the folders ``checkpoint-N`` that stand for one adapter.
    """

    def __init__(
        self,
        client: HubClient,
        pool: WorkerPool,
        journal: Journal,
        inspect: Inspect,
        fits: Fits | None = None,
        checkpoints: str = NEWEST,
    ) -> None:
        self._client = client
        self._pool = pool
        self._journal = journal
        self._inspect = inspect
        self._fits = fits
        self._checkpoints = checkpoints

    def run(self, asked: Mapping[str, Wanted], progress: Progress) -> None:
        """Sync repositories.

        Args:
            asked (Mapping[str, Wanted]): by id.
            progress (Progress): where to report.
        """
        with progress.task("Checking repositories", len(asked)) as advance:
            found = resolve(self._client, self._pool, asked.values(), advance)
        changed = self._changed(self._present(asked, found))
        with progress.task("Fetching adapters", len(changed)) as advance:
            for work in changed:
                work.left = 1
                self._pool.submit((work, None), partial(self._look, work))
            for (work, folder), value, error in self._pool.results():
                work.left -= 1
                if folder is None:
                    self._on_contents(work, value, error)
                else:
                    self._on_adapter(work, folder, value, error)
                if work.left == 0:
                    self._finish(work)
                    # Listings of thousands of repositories need not stay in memory until the end.
                    work.contents = None
                    advance(1)

    def _known(self, repo_ids: Sequence[str]) -> dict[str, KnownRepo]:
        with self._journal.store.read() as session:
            return known_repos(session, "hub", repo_ids)

    def _present(self, asked: Mapping[str, Wanted], found: Mapping[str, RepoInfo | HubError]) -> list[_Work]:
        """Repositories that exist, under their present names; the others get their outcomes here."""
        infos = {name: info for name, info in found.items() if isinstance(info, RepoInfo)}
        moved = {name: info.id for name, info in infos.items() if info.id != name}
        before = self._known([*asked, *moved.values()])
        for old, new in moved.items():
            self._journal.record([], partial(writes.rename_repo, old=old, new=new))
        known = self._known([*asked, *moved.values()]) if moved else before
        works: dict[str, _Work] = {}
        for name, wanted in asked.items():
            info = found[name]
            if isinstance(info, HubError):
                self._unreached(name, info, before.get(name))
                continue
            renamed_now = name in moved and name in before and before[name].state != "renamed"
            if name in moved and (info.id in asked or info.id in works):
                news = "updated" if renamed_now else "unchanged"
                self._journal.record([Outcome("hub", name, "", info.sha, news, f"renamed to {info.id}")])
                continue
            # A dry run has not moved the rows of a renamed repository.
            row = known.get(info.id) or before.get(name)
            old = name if name in moved else ""
            every = ALL in (self._checkpoints, row.requested_checkpoints if row else NEWEST)
            checkpoints = ALL if every else NEWEST
            works[info.id] = _Work(replace(wanted, repo_id=info.id), info, row, old, renamed_now, checkpoints)
        return list(works.values())

    def _changed(self, works: Sequence[_Work]) -> list[_Work]:
        """The repositories that need a closer look; the others get their outcomes here."""
        changed, settled = [], []
        for work in works:
            if work.known and work.known.state == "gated" and work.info.gated and not self._client.has_token:
                self._journal.record([work.line("gated", work.known.reason)])
            elif not self._is_settled(work):
                changed.append(work)
            elif work.info.gated:
                self._pool.submit(work, partial(check_access, self._client, work.info, work.catalogued()))
            else:
                settled.append(work)
        for work, _value, error in self._pool.results():
            if error is None:
                settled.append(work)
            else:
                self._unreached(work.info.id, error, work.known)
        lines = [line for work in settled for line in self._standing(work)]
        rows = {work.info.id: work.known for work in settled if work.known}
        fields = [work.fields for work in settled]
        steps: list[Step] = [partial(writes.refresh_repos, repos=fields, known=rows)]
        if labels := self._relabelled(settled):
            steps.append(partial(save_labels, labels=labels))
        self._journal.record(lines, *steps, *self._stated(settled))
        return changed

    def _relabelled(self, settled: Sequence[_Work]) -> dict[int, Labels]:
        """Licences and tags that the Hub changed without a new commit, by adapter."""
        cards = {work.known.id: work.info.card for work in settled if work.known}
        with self._journal.store.read() as session:
            held = held_labels(session, list(cards))
        return {
            row.adapter_id: labels
            for row in held
            if (labels := relabel(row, cards[row.repo_pk])) not in (None, row.labels)
        }

    @staticmethod
    def _stated(works: Sequence[_Work]) -> list[Step]:
        """What brings the examples of a manifest to adapters that the catalog holds already."""
        steps: list[Step] = []
        for work in works:
            folders = [row.subfolder for row in work.catalogued() if work.is_asked(row.subfolder)]
            stated = {folder: own for folder in folders if (own := work.wanted.samples_of(folder))}
            if stated and work.known:
                steps.append(partial(write_stated, repo_pk=work.known.id, stated=stated))
        return steps

    @staticmethod
    def _is_settled(work: _Work) -> bool:
        """Whether the catalog holds all that was asked for of this commit, and its files are still there."""
        known, sha = work.known, work.info.sha
        if known is None or known.revision != sha or known.state not in ("ok", "failed", "unsupported"):
            return False
        rows = [row for row in known.adapters if row.status != "missing" and work.is_asked(row.subfolder)]
        return (
            set(work.wanted.subfolders) <= set(known.requested_subfolders)
            and work.checkpoints == known.requested_checkpoints
            and all(row.revision == sha and row.status in ("ready", "unsupported") for row in rows)
            and all(row.resolved and is_on_disk(row) for row in rows if row.status == "ready")
        )

    @staticmethod
    def _standing(work: _Work) -> list[Outcome]:
        rows = [row for row in work.catalogued() if work.is_asked(row.subfolder)]
        return [*map(work.standing, rows), *work.absent([row.subfolder for row in rows])]

    def _look(self, work: _Work) -> Contents:
        if not self._journal.dry_run:
            self._client.sweep(work.info.id)
        return look(self._client, work.info, work.fields.subfolders, work.wanted.subfolders, work.checkpoints)

    def _on_contents(self, work: _Work, contents: Contents, error: BaseException | None) -> None:
        """Note what a repository holds, and queue the adapters that the catalog lacks."""
        if error is not None:
            self._unreached(work.info.id, error, work.known)
            return
        work.contents = contents
        kept = [row for row in work.catalogued() if row.resolved and (row.status != "ready" or is_on_disk(row))]
        rows = {row.subfolder: row for row in kept}
        lines = work.absent([folder.subfolder for folder in contents.folders])
        for folder in contents.folders:
            row = rows.get(folder.subfolder)
            if row is not None:
                work.ready += row.status == "ready"
                lines.append(work.standing(row))
            elif folder.problem:
                self._save(work, AdapterFields(folder.subfolder, "", reason=folder.problem), folder.skipped)
            elif self._journal.dry_run:
                size = sum(contents.tree[path].size for path in folder.files)
                reason = "; ".join(part for part in (f"{size} bytes", folder.skipped) if part)
                lines.append(work.line(self._news(work, folder.subfolder), reason, folder.subfolder))
            else:
                work.left += 1
                job = partial(fetch, self._client, self._inspect, work.wanted, work.info, folder, contents, self._fits)
                self._pool.submit((work, folder), job)
        self._journal.record(lines, *self._stated([work]))

    def _on_adapter(
        self, work: _Work, folder: AdapterFolder, adapter: AdapterFields, error: BaseException | None
    ) -> None:
        if error is None:
            self._save(work, adapter, folder.skipped)
        elif isinstance(error, GatedError):
            work.state, work.reason = "gated", reason_of(error, work.info.id)
            self._journal.record([work.line("gated", work.reason, folder.subfolder)])
        else:
            work.state, work.reason = work.state or "failed", reason_of(error, work.info.id)
            self._journal.record([work.line("failed", _kept(work.reason, work.known), folder.subfolder)])

    @staticmethod
    def _news(work: _Work, subfolder: str) -> str:
        rows = work.known.adapters if work.known else ()
        return "updated" if any(row.subfolder == subfolder for row in rows) else "added"

    def _save(self, work: _Work, adapter: AdapterFields, skipped: str = "") -> None:
        outcome = self._news(work, adapter.subfolder) if adapter.facts else "unsupported"
        work.ready += adapter.facts is not None
        line = work.line(outcome, "; ".join(filter(None, (adapter.reason, skipped))), adapter.subfolder)
        self._journal.record([line], partial(writes.save_adapter, repo=work.fields, adapter=adapter))

    def _finish(self, work: _Work) -> None:
        """Settle a repository whose adapters are all done."""
        if work.contents is None:
            return
        if work.state == "gated":
            self._journal.record([], partial(_mark, repo_id=work.info.id, state="gated", reason=work.reason))
            return
        if work.state == "failed":
            self._journal.record([], partial(writes.finish_repo, repo=work.fields, state="failed", reason=work.reason))
            return
        present = {folder.subfolder for folder in work.contents.folders}
        known = work.known.adapters if work.known else ()
        rows = [row for row in known if work.is_asked(row.subfolder)]
        others = [row for row in known if row.status == "ready" and row not in rows]
        gone = [row.subfolder for row in rows if row.status != "missing" and row.subfolder not in present]
        reason = f"no longer in the repository at {work.info.sha}"
        lines = [work.line("missing", reason, subfolder) for subfolder in gone]
        state, why = ("ok", "") if work.ready or others else ("unsupported", work.why_unusable())
        self._journal.record(
            lines,
            partial(writes.retire_adapters, source="hub", repo_id=work.info.id, subfolders=gone, reason=reason),
            partial(writes.finish_repo, repo=work.fields, state=state, reason=why),
        )

    def _unreached(self, repo_id: str, error: BaseException, known: KnownRepo | None) -> None:
        """Record why a repository could not be looked at."""
        reason, revision = reason_of(error, repo_id), known.revision if known else None
        if isinstance(error, NoSuchRevisionError):
            self._journal.record([Outcome("hub", repo_id, "", None, "missing", reason)])
        elif isinstance(error, GatedError | MissingError):
            state = "gated" if isinstance(error, GatedError) else "missing"
            step = partial(_mark, repo_id=repo_id, state=state, reason=reason)
            self._journal.record([Outcome("hub", repo_id, "", revision, state, reason)], step)
        else:
            step = partial(writes.mark_failed, source="hub", repo_id=repo_id, reason=reason)
            self._journal.record([Outcome("hub", repo_id, "", revision, "failed", _kept(reason, known))], step)


def reason_of(error: BaseException, repo_id: str = "") -> str:
    """One line for a failed job; what is no error of a job's work (an interrupt) is raised.

    Args:
        error (BaseException): as a worker thread met it.
        repo_id (str): repository whose outcome it is; the outcome names it, so the line does not begin with it.

    Returns:
        str: the message, with the exception's name where nobody wrote it for users.
    """
    if not isinstance(error, Exception):
        raise error
    text = " ".join(str(error).split()).removeprefix(f"{repo_id}: ")
    return text if isinstance(error, HubRouterError) else f"{type(error).__name__}: {text}"


def _kept(reason: str, known: KnownRepo | None) -> str:
    ready = [row for row in known.adapters if row.status == "ready"] if known else []
    return f"{reason}; not checked, the catalog keeps revision {ready[0].revision}" if ready else reason


def _mark(session: Session, repo_id: str, state: str, reason: str) -> None:
    writes.mark_unavailable(session, "hub", repo_id, state, reason)
