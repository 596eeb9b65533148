"""Whether adapters can be used, and whether they fit a base model, told before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hub_router.errors import MissingError, NotInCatalogError, UnsupportedAdapterError
from hub_router.progress import Progress
from hub_router.records import AdapterCheck, standing
from hub_router.store import adapters as adapter_queries
from hub_router.store.session import Store

if TYPE_CHECKING:
    from torch import nn

STATUSES = ("ready", "unsupported", "gated", "missing", "failed")


def check(store: Store, refs: Sequence[str | Path], base_model: str | None, progress: Progress) -> list[AdapterCheck]:
    """See :meth:`hub_router.hub.Hub.check`."""
    places = [place for ref in refs for place in _places(store, ref)]
    model = None
    if base_model is not None:
        from hub_router.composition.architecture import any_model

        model = any_model(base_model)
    found = []
    with progress.task("Checking adapters", len(places)) as advance:
        for ref, folder in places:
            found.append(_check(ref, folder, base_model, model))
            advance(1)
    return found


def _check(ref: str, folder: Path | str, base_model: str | None, model: nn.Module | None) -> AdapterCheck:
    from hub_router.lora.facts import inspect

    if isinstance(folder, str):
        return AdapterCheck(ref, folder)
    try:
        facts = inspect(folder)
    except UnsupportedAdapterError as error:
        return AdapterCheck(ref, str(error).removeprefix("unsupported: "))
    fits: tuple[Any, ...] = ()
    if model is not None:
        from hub_router.composition.fit import BaseModules, check_saved

        fits = (*BaseModules(model).fit(facts.modules), *check_saved(model, facts.saved))
    return AdapterCheck(ref, "", facts.notes, base_model, fits, facts)


def _places(store: Store, ref: str | Path) -> Iterator[tuple[str, Path | str]]:
    """Name and folder of every adapter that a reference means, or the reason why there is none."""
    from hub_router.sync.local import scan

    folder = Path(ref).expanduser()
    if isinstance(ref, Path) or folder.is_dir():
        top = folder.absolute()
        try:
            adapters = scan(top)
        except (MissingError, UnsupportedAdapterError, OSError) as error:
            yield str(ref), " ".join(str(error).split())
            return
        for adapter in adapters:
            below = adapter.path.relative_to(top).as_posix()
            name = str(ref) if below == "." else f"{str(ref).rstrip('/')}/{below}"
            # What leads out of the folder is not followed here either.
            away = "is a link that leaves" in adapter.folder.problem or not adapter.path.is_dir()
            yield name, adapter.folder.problem if away else adapter.path
        if not adapters:
            yield str(ref), top
        return
    with store.read() as session:
        try:
            records = [adapter_queries.find(session, str(ref))]
        except NotInCatalogError as error:
            # A repository may hold several, none of which its name alone means.
            every = adapter_queries.list_records(session, statuses=STATUSES)
            records = [record for record in every if record.repo_id.lower() == str(ref).lower()]
            if not records:
                raise NotInCatalogError(f"{error}; or name a folder") from error
    for record in records:
        usable = record.status == "ready" and record.path.is_dir()
        yield record.ref, record.path if usable else standing(record.status, record.reason)
