"""``train``: gates of a method, learned over catalogued adapters."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import click

from hub_router.cli.compositions import hub_id, labelled, named_pool, parse_settings
from hub_router.cli.options import Call, common_options, device_option

# Methods that train an adapter of PEFT, not gates.
_ADAPTERS = ("shared", "ewora")


@click.command()
@click.argument("method")
@click.option("--name", metavar="SET", help="Prototype set that gets the next version. Default: the method's name.")
@click.option(
    "--adapters",
    metavar="ADAPTER",
    multiple=True,
    help="Adapter of the pool, or LABEL=ADAPTER; repeatable, or several with commas.",
)
@click.option("--query", metavar="TEXT", help="Also take the adapters that search finds for TEXT.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=10, show_default=True, help="Adapters to take from --query."
)
@click.option("--composition", metavar="NAME", help="Take the adapters of a stored composition.")
@click.option("--base", "--base-model", "base_model", metavar="MODEL", help="Hub id or folder. Default: the adapters'.")
@click.option(
    "--data",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="JSONL of input, output and adapter. Default: the catalog's samples of the adapters' tasks.",
)
@click.option(
    "--set",
    "options",
    metavar="KEY=VALUE",
    multiple=True,
    callback=parse_settings,
    help="Setting of the training or the method, e.g. --set epochs=2 --set mask=none; repeatable.",
)
@click.option("--log", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="JSON line per step.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the adapter that METHOD shared or ewora trains; must not exist.",
)
@click.option("--restart", is_flag=True, help="Begin anew where a stopped run of the same name would go on.")
@click.option("--dry-run", is_flag=True, help="Check adapters, base model, data and settings; train nothing.")
@device_option
@common_options
def train(
    call: Call,
    method: str,
    name: str | None,
    adapters: tuple[str, ...],
    query: str | None,
    limit: int,
    composition: str | None,
    base_model: str | None,
    data: Path | None,
    options: dict[str, Any],
    log: Path | None,
    out: Path | None,
    restart: bool,
    dry_run: bool,
    device: str | None,
) -> None:
    """Train the gates of a method over a pool; they become a prototype set.

    METHOD is phatgoose, maple, lora-mixer, lorahub or mole. Base model and adapters stay as they are. The gates
    become the next version of the set, for compose --set prototypes=SET. METHOD may also be shared or ewora, an adapter
    of PEFT for all tasks together. A run that was stopped goes on when the same command is given again.
    """
    refs = [ref for given in adapters for ref in given.split(",") if ref]
    adapter = method in _ADAPTERS
    if adapter != (out is not None) or (adapter and (name or dry_run)):
        raise click.UsageError(
            f"{' and '.join(_ADAPTERS)} train an adapter into --out DIR, other methods a set, --name"
        )
    if not (refs or query or composition or (adapter and base_model and data)):
        raise click.UsageError("name the pool: --adapters ADAPTER, --query TEXT or --composition NAME")
    with call.hub() as hub:
        pool = named_pool(hub, refs)
        if composition:
            pool += [(member.name, member.adapter) for member in hub.composition(composition).members]
        if query:
            known = {record.id for _, record in pool}
            hits = hub.search(query, base_model=hub_id(base_model), limit=limit)
            pool += [(None, hit.adapter) for hit in hits if hit.adapter.id not in known]
        if out is not None:
            trained = hub.train_adapter(
                method, out, labelled(pool), base_model=base_model, data=data, log=log, device=device, **options
            )
            call.out.document({**dataclasses.asdict(trained), "out": str(trained.out)})
            call.out.text(
                f"Wrote {trained.out}: {trained.kind}, {trained.steps} steps on {trained.examples} examples, loss "
                f"{trained.loss:.3f}."
            )
            return
        made = hub.train(
            method,
            labelled(pool),
            name=name,
            base_model=base_model,
            data=data,
            log=log,
            device=device,
            dry_run=dry_run,
            restart=restart,
            **options,
        )
    ref = None if dry_run else f"{made.name}@{made.version}"
    call.out.document({"prototypes": ref, **dataclasses.asdict(made)})
    if dry_run:
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
