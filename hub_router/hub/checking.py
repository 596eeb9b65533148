"""Whether adapters can be used, and whether they fit a base model, told before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hub_router.errors import MissingError, NotInCatalogError, UnsupportedAdapterError
from hub_router.progress import Progress
from hub_router.records import STATUSES, AdapterCheck, AdapterFacts, ModuleFit, standing
from hub_router.store import adapters as adapter_queries
from hub_router.store.session import Store

# Holds an adapter against a base model: every module and every parameter beside them.
Hold = Callable[[AdapterFacts], tuple[ModuleFit, ...]]


def check(store: Store, refs: Sequence[str | Path], base_model: str | None, progress: Progress) -> list[AdapterCheck]:
    """See :meth:`hub_router.hub.Hub.check`."""
    places = [place for ref in refs for place in _places(store, ref)]
    hold = None if base_model is None else _holder(base_model)
    found = []
    with progress.task("Checking adapters", len(places)) as advance:
        for ref, folder in places:
            found.append(_check(ref, folder, base_model, hold))
            advance(1)
    return found


def _holder(base_model: str) -> Hold:
    """What holds an adapter against a base model, whose architecture is built once."""
    from hub_router.composition.architecture import any_model
    from hub_router.composition.fit import BaseModules
    from hub_router.composition.saved import fit_parameter

    model = any_model(base_model)
    modules = BaseModules(model)

    def hold(facts: AdapterFacts) -> tuple[ModuleFit, ...]:
        beside = (fit_parameter(model, path, shape) for path, shape in facts.saved.items())
        return (*modules.fit(facts.modules), *beside)

    return hold


def _check(ref: str, folder: Path | str, base_model: str | None, hold: Hold | None) -> AdapterCheck:
    from hub_router.lora.facts import inspect

    if isinstance(folder, str):
        return AdapterCheck(ref, folder)
    try:
        facts = inspect(folder)
    except UnsupportedAdapterError as error:
        return AdapterCheck(ref, str(error).removeprefix("unsupported: "))
    return AdapterCheck(ref, "", facts.notes, base_model, hold(facts) if hold else (), facts)


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
            away = adapter.leaves or not adapter.path.is_dir()
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
