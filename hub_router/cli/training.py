"""``train``: gates of a method, learned over catalogued adapters."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hub_router.cli.compositions import hub_id, labelled, named_pool
from hub_router.cli.options import Call, common_options, device_option
from hub_router.cli.trainconfig import COLUMNS, POOL, merged_settings, read_config, without_replaced

if TYPE_CHECKING:
    from hub_router.hub import Hub
    from hub_router.hub.training import AdapterSummary, DataColumns, TrainingSummary
    from hub_router.records import AdapterRecord

Function = TypeVar("Function", bound=Callable[..., Any])

# What trains adapters of PEFT, not gates, and what trains them as well, where a folder is named.
_ADAPTERS, _BOTH = ("shared", "ewora", "experts"), ("lora-mixer", "mixlora")
_GATES = "gates.safetensors"
# What the columns of a dataset are called in Python.
_FIELDS = dict(zip(COLUMNS, ("input", "output", "adapter", "config", "split"), strict=True))


def _pool_options(function: Function) -> Function:
    """Options that say which adapters, and on what base model."""
    for decorate in (
        click.option(
            "--base", "--base-model", "base_model", metavar="MODEL", help="Hub id or folder. Default: the adapters'."
        ),
        click.option("--collection", metavar="NAME|FILE", help="Take the catalogued adapters of a collection."),
        click.option("--composition", metavar="NAME", help="Take the adapters of a stored composition."),
        click.option(
            "--limit", type=click.IntRange(min=1), default=10, show_default=True, help="Adapters to take from --query."
        ),
        click.option("--query", metavar="TEXT", help="Also take the adapters that search finds for TEXT."),
        click.option(
            "--adapters",
            metavar="ADAPTER",
            multiple=True,
            help="The same as an argument; repeatable, or several with commas.",
        ),
    ):
        function = decorate(function)
    return function


def _data_options(function: Function) -> Function:
    """Options that say what is learned from; columns are called as by ``samples add``."""
    for decorate in (
        click.option(
            "--per-task",
            type=click.IntRange(min=1),
            metavar="N",
            help="At most N examples of each task, the same choice every time.",
        ),
        click.option(
            "--dataset-split",
            "--split",
            "dataset_split",
            metavar="NAME",
            help="The dataset's own split. Default: train.",
        ),
        click.option("--dataset-config", metavar="NAME", help="Configuration of the dataset, where it has several."),
        click.option(
            "--adapter-column",
            metavar="NAME",
            help="Column of the dataset with the adapter or its task. Default: adapter or task, if there is one.",
        ),
        click.option(
            "--output-column", metavar="NAME", help="Column of the dataset with the outputs. Default: output."
        ),
        click.option(
            "--column", "--input-column", "column", metavar="NAME", help="Column with the inputs. Default: input."
        ),
        click.option(
            "--data",
            metavar="FILE|DATASET",
            help="JSONL of input, output and adapter, or a dataset: OWNER/NAME on the Hub, a folder, a csv, tsv or "
            "parquet file. Default: the catalog's samples of the adapters' tasks.",
        ),
    ):
        function = decorate(function)
    return function


@click.command()
@click.argument("method")
@click.argument("more", nargs=-1, metavar="[ADAPTER]...")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    is_eager=True,
    callback=read_config,
    help="TOML file of these options, without their dashes, and of method; what is typed here wins over it.",
)
@click.option("--settings", is_flag=True, help="List what --set takes for METHOD, with the defaults; train nothing.")
@click.option("--name", metavar="SET", help="Prototype set that gets the next version. Default: the method's name.")
@_pool_options
@_data_options
@click.option(
    "--set",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    callback=merged_settings,
    help="Setting of the training or the method, e.g. --set epochs=2 --set mask=none; repeatable.",
)
@click.option("--log", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="JSON line per step.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the adapter that METHOD shared or ewora trains, or of several: experts, and with their gates "
    "lora-mixer or mixlora; must not exist.",
)
@click.option("--restart", is_flag=True, help="Begin anew where a stopped run of the same name would go on.")
@click.option("--dry-run", is_flag=True, help="Check everything but the base model's weights; train nothing.")
@device_option
@common_options
def train(call: Call, method: str, settings: bool, config: Path | None, **given: Any) -> None:
    """Train the gates of a method over a pool; they become a prototype set.

    METHOD is phatgoose, maple, lora-mixer, lorahub, mole, xlora or mixlora. Base model and adapters stay as they are.
    The gates become the next version of the set, for compose --set prototypes=SET. ADAPTER is as for show, or
    LABEL=ADAPTER. A run that was stopped goes on when the same command is given again.

    With --out DIR adapters are trained: by METHOD shared or ewora one of PEFT for all tasks together, by experts one
    for each task, in one run, and by lora-mixer or mixlora several along with their gates.

    What --set takes, and the defaults: hub-router train METHOD --settings
    """
    if settings:
        _list_settings(call, method, given["out"] is not None)
        return
    given = without_replaced(click.get_current_context(), given)
    _check_usage(method, given)
    common = {
        **{key: given[key] for key in ("base_model", "data", "per_task", "log", "device", "dry_run", "restart")},
        **given["options"],
    }
    with call.hub() as hub:
        pool = labelled(_pool(hub, given))
        columns = _columns(given)
        if given["out"] is not None:
            _tell_adapter(call, hub.train_adapter(method, given["out"], pool, columns=columns, **common), given)
            return
        made = hub.train(method, pool, name=given["name"], columns=columns, **common)
    _tell_set(call, made, given)


def _check_usage(method: str, given: Mapping[str, Any]) -> None:
    adapter = given["out"] is not None
    if (adapter and (given["name"] or method not in (*_ADAPTERS, *_BOTH))) or (method in _ADAPTERS and not adapter):
        raise click.UsageError(
            f"{', '.join(_ADAPTERS)}, and where they are to train adapters as well {' and '.join(_BOTH)}, write into "
            "--out DIR; other methods make a set, --name"
        )
    if not (given["more"] or any(given[each] for each in POOL)) and not (
        adapter and given["base_model"] and given["data"]
    ):
        raise click.UsageError(
            "name the pool: ADAPTER..., --query TEXT, --composition NAME or --collection NAME (or all of it in a file: "
            "--config FILE)"
        )


def _columns(given: Mapping[str, Any]) -> DataColumns | None:
    """Where a dataset holds its examples, as far as that was said."""
    from hub_router.hub.training import DataColumns

    said = {field: given[option] for option, field in _FIELDS.items() if given[option] is not None}
    return DataColumns(**said) if said else None


def _pool(hub: Hub, given: Mapping[str, Any]) -> list[tuple[str | None, AdapterRecord]]:
    """The adapters of all options together, each once unless it was named twice."""
    refs = [ref for each in (*given["more"], *given["adapters"]) for ref in each.split(",") if ref]
    pool = named_pool(hub, refs)
    if given["composition"]:
        pool += [(member.name, member.adapter) for member in hub.composition(given["composition"]).members]
    if given["collection"]:
        from hub_router.hub.trainingpool import collection_pool

        known = {record.id for _, record in pool}
        pool += [(None, each) for each in collection_pool(hub.store, given["collection"]) if each.id not in known]
    if given["query"]:
        known = {record.id for _, record in pool}
        hits = hub.search(given["query"], base_model=hub_id(given["base_model"]), limit=given["limit"])
        pool += [(None, hit.adapter) for hit in hits if hit.adapter.id not in known]
    return pool


def _tell_adapter(call: Call, made: AdapterSummary, given: Mapping[str, Any]) -> None:
    call.out.document({**dataclasses.asdict(made), "out": str(made.out)})
    for note in made.notes:
        call.out.remark(f"Note: {note}.")
    if given["dry_run"]:
        call.out.text(f"Would train {made.kind} into {made.out}: {made.steps} steps on {made.examples} examples.")
        return
    several = f" ({len(made.adapters)} adapters)" if made.adapters else ""
    call.out.text(
        f"Wrote {made.out}: {made.kind}{several}, {made.steps} steps on {made.examples} examples, loss {made.loss:.3f}."
    )
    if made.adapters:
        folders = " ".join(shlex.quote(str(made.out / name)) for name in made.adapters)
        pool = " ".join(shlex.quote(f"{name}={made.out / name}") for name in made.adapters)
        gated = f" --method {made.kind} --set {shlex.quote(f'prototypes={made.out / _GATES}')}"
        call.out.remark(f"Next: hub-router sync {folders}")
        call.out.remark(f"Then: hub-router compose NAME {pool}{gated if made.kind in _BOTH else ''}")


def _tell_set(call: Call, made: TrainingSummary, given: Mapping[str, Any]) -> None:
    ref = None if given["dry_run"] else f"{made.name}@{made.version}"
    call.out.document({"prototypes": ref, **dataclasses.asdict(made)})
    for note in made.notes:
        call.out.remark(f"Note: {note}.")
    if ref is None:
        plan = f"{made.steps} steps on {made.examples} examples"
        call.out.text(f"Would train {made.method} over {len(made.adapters)} adapters: {plan}.")
        return
    aside = "" if made.validation is None else f", {made.validation:.3f} on examples set aside"
    call.out.text(
        f"Stored {ref}: {made.method} over {len(made.adapters)} adapters, {made.steps} steps on "
        f"{made.examples} examples, loss {made.loss:.3f}{aside}."
    )
    chosen = shlex.quote(f"prototypes={ref}")
    call.out.remark(f"Next: hub-router compose NAME ADAPTER... --method {made.method} --set {chosen}")


def _list_settings(call: Call, method: str, adapters: bool) -> None:
    """The table of ``--settings``."""
    from hub_router.hub.trainingoptions import training_settings

    found = training_settings(method, adapters=adapters)
    call.out.document({"method": method, "settings": found})
    call.out.table(
        ["setting", "default", "of", "what"],
        [[each.name, json.dumps(each.default, default=str), each.of, each.help] for each in found],
    )
