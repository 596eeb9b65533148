"""``compose`` and ``compositions``: routed models under a name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub_router.cli.options import Call, common_options

if TYPE_CHECKING:
    from hub_router.hub import Hub
    from hub_router.records import AdapterRecord, CompositionRecord


def composition_data(composition: CompositionRecord) -> dict[str, Any]:
    """A composition for ``--json``.

    Args:
        composition (CompositionRecord): any composition.

    Returns:
        dict[str, Any]: name, base model, method, hyperparameters, members in the order of axis E.
    """
    return {
        "name": composition.name,
        "base_model": composition.base_model,
        "method": composition.method,
        "hyperparameters": composition.hyperparameters,
        "members": [
            {
                "name": member.name,
                "adapter": member.adapter.ref,
                "id": member.adapter.id,
                "revision": member.adapter.revision,
                "weights_hash": member.weights_hash,
            }
            for member in composition.members
        ],
    }


def parse_settings(_ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """``key=value`` pairs as hyperparameters; a value is JSON where it can be read as such, else a string."""
    settings: dict[str, Any] = {}
    for pair in values:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE, e.g. top_k=4")
        if key in settings:
            raise click.BadParameter(f"{key} is set twice")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


@click.command()
@click.argument("name")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...")
@click.option(
    "--adapters",
    "more",
    metavar="ADAPTER",
    multiple=True,
    help="The same as an argument; repeatable, or several with commas.",
)
@click.option("--query", metavar="TEXT", help="Also take the adapters that search finds for TEXT.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=10, show_default=True, help="Adapters to take from --query."
)
@click.option("--method", default="arrow", show_default=True, help="Routing method, one of: hub-router methods.")
@click.option(
    "--base",
    "--base-model",
    "base_model",
    metavar="MODEL",
    help="Hub id or folder. Default: the one that all adapters name.",
)
@click.option(
    "--set",
    "hyperparameters",
    metavar="KEY=VALUE",
    multiple=True,
    callback=parse_settings,
    help="Hyperparameter of the method, e.g. --set top_k=4; repeatable.",
)
@click.option("--replace", is_flag=True, help="Overwrite a composition of the same name.")
@common_options
def compose(
    call: Call,
    name: str,
    adapters: tuple[str, ...],
    more: tuple[str, ...],
    query: str | None,
    limit: int,
    method: str,
    base_model: str | None,
    hyperparameters: dict[str, Any],
    replace: bool,
) -> None:
    """Store a routed model under a name: adapters, base model, method.

    ADAPTER is as for show, or LABEL=ADAPTER to give it a name of your own. Everything is checked against the base
    model's architecture; its weights are first loaded by generate.
    """
    refs = [*adapters, *(ref for each in more for ref in each.split(",") if ref)]
    if not refs and not query:
        raise click.UsageError("name at least one ADAPTER, or let search find some with --query TEXT")
    with call.hub() as hub:
        pool = named_pool(hub, refs)
        if query:
            known = {record.id for _, record in pool}
            found = [hit.adapter for hit in hub.search(query, base_model=hub_id(base_model), limit=limit)]
            pool += [(None, record) for record in found if record.id not in known]
        composition = hub.define(
            name, labelled(pool), method, base_model=base_model, replace=replace, **hyperparameters
        )
    call.out.document({"composition": composition_data(composition)})
    call.out.table(
        ["#", "name", "adapter", "ranks", "licence"],
        [
            [position, member.name, member.adapter.ref, member.adapter.ranks, member.adapter.licence]
            for position, member in enumerate(composition.members)
        ],
    )
    call.out.text(f"Stored {name}: {composition.method}{_settings(composition)} on {composition.base_model}.")
    call.out.remark(f'Next: hub-router generate {shlex.quote(name)} "a prompt"')


def hub_id(base_model: str | None) -> str | None:
    """What a search filters by: adapters state Hub ids of their base models, and a folder is none.

    Args:
        base_model (str | None): Hub id or folder.

    Returns:
        str | None: None for a folder.
    """
    return None if base_model is None or Path(base_model).is_dir() else base_model


def named_pool(hub: Hub, adapters: Sequence[str]) -> list[tuple[str | None, AdapterRecord]]:
    """Adapters as a user names them, LABEL=ADAPTER or ADAPTER.

    Args:
        hub (Hub): the catalog.
        adapters (Sequence[str]): a ``/`` before the ``=`` means that it belongs to a folder's name.

    Returns:
        list[tuple[str | None, AdapterRecord]]: label or None, and record, of each.
    """
    pool: list[tuple[str | None, AdapterRecord]] = []
    for text in adapters:
        label, equals, ref = text.partition("=")
        named = bool(equals and label and "/" not in label)
        pool.append((label if named else None, hub.show(ref if named else text).record))
    return pool


def labelled(
    pool: list[tuple[str | None, AdapterRecord]],
) -> dict[str, AdapterRecord] | list[AdapterRecord]:
    """The pool as :meth:`Hub.define` takes it: names for all as soon as one has a label.

    Args:
        pool (list[tuple[str | None, AdapterRecord]]): from :func:`named_pool`.

    Returns:
        dict[str, AdapterRecord] | list[AdapterRecord]: records, by name where there are labels.
    """
    if not any(label for label, _ in pool):
        return [record for _, record in pool]
    named: dict[str, AdapterRecord] = {}
    for label, record in pool:
        name = label or record.name
        if name in named:
            raise click.UsageError(f"two adapters are called {name!r}; label them with LABEL=ADAPTER")
        named[name] = record
    return named


def _settings(composition: CompositionRecord) -> str:
    """Hyperparameters as ``(top_k=4, ...)``."""
    pairs = ", ".join(f"{key}={json.dumps(value)}" for key, value in composition.hyperparameters.items())
    return f"({pairs})" if pairs else ""


@click.command()
@click.option("--delete", "doomed", metavar="NAME", help="Delete this composition; its adapters stay.")
@common_options
def compositions(call: Call, doomed: str | None) -> None:
    """List the stored compositions, or delete one."""
    with call.hub() as hub:
        if doomed is not None:
            hub.delete_composition(doomed)
            call.out.document({"deleted": doomed})
            call.out.text(f"Deleted {doomed}.")
            return
        stored = hub.compositions()
    call.out.document({"compositions": [composition_data(composition) for composition in stored]})
    if not stored:
        call.out.remark("No compositions yet; store one with: hub-router compose NAME ADAPTER...")
        return
    call.out.table(
        ["name", "method", "base model", "adapters"],
        [
            [
                composition.name,
                composition.method + _settings(composition),
                composition.base_model,
                [member.name for member in composition.members],
            ]
            for composition in stored
        ],
    )
