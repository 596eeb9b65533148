"""``bases``: which base model an adapter has, where you know better than its config."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from hub_router.cli.options import Call, common_options

if TYPE_CHECKING:
    from hub_router.records import AdapterRecord


@click.group()
def bases() -> None:
    """Say which base model adapters have, where you know better."""


@bases.command("list")
@common_options
def list_bases(call: Call) -> None:
    """List what you set, for adapters and by rules."""
    with call.hub() as hub:
        choices = hub.bases.list()
    call.out.document({"choices": choices})
    if not choices:
        call.out.remark("Nothing is set; set one with: hub-router bases set ADAPTER MODEL, or bases rule PATTERN MODEL")
        return
    call.out.table(
        ["kind", "adapter or pattern", "base model", "adapters"],
        [[choice.kind, choice.pattern, choice.base_model, choice.adapters] for choice in choices],
    )


@bases.command("set")
@click.argument("adapter")
@click.argument("model")
@common_options
def set_base(call: Call, adapter: str, model: str) -> None:
    """Set the base model of ADAPTER to MODEL, a Hub id or the folder of a model; it stays through every sync."""
    with call.hub() as hub:
        record = hub.bases.set(adapter, model)
    call.out.document({"adapter": record.ref, "base_model": record.base_model_resolved})
    call.out.text(f"{record.ref}: base model {record.base_model_resolved}.")


@bases.command()
@click.argument("pattern")
@click.argument("model")
@common_options
def rule(call: Call, pattern: str, model: str) -> None:
    """Set MODEL for every adapter whose config names a base model that fits PATTERN.

    PATTERN is a shell pattern such as "*/my-llama*", compared without case. Of several rules the longest pattern
    counts, and what was set for one adapter comes before them all.
    """
    with call.hub() as hub:
        choice = hub.bases.add_rule(pattern, model)
    call.out.document({"rule": choice})
    call.out.text(f"Rule {choice.pattern}: base model {choice.base_model} ({_adapters(choice.adapters)}).")


@bases.command()
@click.argument("choice", metavar="ADAPTER|PATTERN")
@common_options
def unset(call: Call, choice: str) -> None:
    """Forget what was set for ADAPTER, or the rule of PATTERN; the adapters' own statements count again."""
    with call.hub() as hub:
        removed = hub.bases.remove(choice)
    call.out.document({"removed": removed})
    call.out.text(f"Removed {removed.kind} {removed.pattern} ({_adapters(removed.adapters)}).")


def described(record: AdapterRecord) -> str:
    """An adapter's base model for a table: how sure it is, where that asks for a look.

    Args:
        record (AdapterRecord): any adapter.

    Returns:
        str: empty where it names none.
    """
    base = record.base_model_resolved or record.base_model or ""
    doubtful = record.base_model_confidence in ("low", "contradicted")
    return f"{base} ({record.base_model_confidence})" if base and doubtful else base


def explained(record: AdapterRecord) -> str:
    """An adapter's base model with the evidence, for ``show``.

    Args:
        record (AdapterRecord): any adapter.

    Returns:
        str: one line.
    """
    base = record.base_model_resolved or record.base_model or "not stated"
    base += f"@{record.base_model_revision}" if record.base_model_revision else ""
    if record.base_model_evidence:
        return f"{base} ({record.base_model_confidence}: {'; '.join(record.base_model_evidence)})"
    return base if record.base_model in (None, base) else f"{base} (written as {record.base_model})"


def _adapters(count: int) -> str:
    return f"{count} adapter{'s' if count != 1 else ''}"
