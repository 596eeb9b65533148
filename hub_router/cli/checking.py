"""``check``: whether adapters can be used, and whether they fit a base model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import click

from hub_router.cli.errors import FAILED
from hub_router.cli.options import Call, common_options
from hub_router.cli.output import Output
from hub_router.names import kind_of, together
from hub_router.records import AdapterCheck, ModuleFit


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--base", "base_model", metavar="MODEL", help="Hub id or folder of the base model; its config is enough.")
@common_options
@click.pass_context
def check(ctx: click.Context, call: Call, adapters: tuple[str, ...], base_model: str | None) -> None:
    """Tell whether adapters can be used and fit a base model; nothing is loaded.

    With --base every module is held against the model's architecture, which its config alone says.

    ADAPTER is as for show, or a folder that is an adapter or holds some, whether it was synced or not. The exit status
    is 0 only if all can be used and fit.
    """
    with call.hub() as hub:
        checks = hub.check(*adapters, base_model=base_model)
    call.out.document({"base_model": base_model, "adapters": [check_data(each) for each in checks]})
    _show(call.out, checks, base_model)
    if any(each.verdict in ("unsupported", "does not fit") for each in checks):
        ctx.exit(FAILED)


def check_data(found: AdapterCheck) -> dict[str, Any]:
    """One adapter for ``--json``: every module on its own.

    Args:
        found (AdapterCheck): any.

    Returns:
        dict[str, Any]: values that JSON can hold, once the output has made them plain.
    """
    return {
        "adapter": found.ref,
        "verdict": found.verdict,
        "reason": reason_of(found),
        "notes": found.notes,
        "modules": found.modules,
    }


def reason_of(found: AdapterCheck) -> str:
    """Why an adapter cannot be used as it is, in one line; empty where it can.

    Args:
        found (AdapterCheck): any.

    Returns:
        str: e.g. ``8 of 224 modules do not fit``.
    """
    wrong = sum(not fit.fits for fit in found.modules)
    return found.reason or (f"{wrong} of {len(found.modules)} modules do not fit" if wrong else "")


def _show(out: Output, checks: Sequence[AdapterCheck], base_model: str | None) -> None:
    out.table(
        ["adapter", "verdict", "reason or notes"],
        [[each.ref, each.verdict, "; ".join(filter(None, (reason_of(each), *each.notes)))] for each in checks],
    )
    rows = [[each.ref, *row] for each in checks for row in grouped(each.modules)]
    if rows:
        out.text(f"\nModules, held against {base_model}")
        out.table(["adapter", "module", "number", "rank", "has", "model has", "verdict", "reason"], rows)


def grouped(modules: Iterable[ModuleFit]) -> list[list[Any]]:
    """Rows of a table in which the layers of one kind of module share a row.

    Args:
        modules (Iterable[ModuleFit]): of one adapter.

    Returns:
        list[list[Any]]: module (its first number as a range), how many, rank, widths, verdict, reason of the first.
    """
    kinds: dict[tuple[Any, ...], list[ModuleFit]] = {}
    for fit in modules:
        kind = (kind_of(fit.module), fit.verdict, fit.rank, fit.got, fit.expected)
        kinds.setdefault(kind, []).append(fit)
    rows = []
    for fits in kinds.values():
        first = fits[0]
        rows.append(
            [
                together([fit.module for fit in fits]),
                len(fits),
                first.rank,
                first.got,
                first.expected,
                first.verdict,
                first.reason,
            ]
        )
    return rows
