"""``prototypes``: trained prototype sets, their versions, and files of them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub_router.cli.options import Call, common_options

if TYPE_CHECKING:
    from hub_router.store.prototypes import PrototypeSetSummary


@click.group()
def prototypes() -> None:
    """List, compare, export and import trained prototype sets.

    NAME is a set's name, which stands for its newest version, or NAME@VERSION. Versions are kept.
    """


@prototypes.command("list")
@common_options
def list_sets(call: Call) -> None:
    """List every version of every set, and of how many adapters the weights changed since."""
    with call.hub() as hub:
        found = hub.prototypes.list()
    call.out.document({"sets": [summary_data(summary) for summary in found]})
    if not found:
        call.out.remark("No prototype sets; train one with: hub-router train METHOD, or prototypes import FILE NAME")
        return
    call.out.table(
        ["set", "method", "refined from", "base model", "adapters", "vectors", "changed since"],
        [
            [
                summary.ref,
                summary.method,
                summary.origin,
                summary.base_model,
                summary.adapters,
                summary.vectors,
                len(summary.stale),
            ]
            for summary in found
        ],
    )


@prototypes.command()
@click.argument("name")
@common_options
def show(call: Call, name: str) -> None:
    """Show what a set was made from, and its adapters."""
    with call.hub() as hub:
        details = hub.prototypes.show(name)
    summary = details.summary
    members = [
        {
            "adapter": member.adapter.ref,
            "id": member.adapter.id,
            "revision": member.adapter.revision,
            "weights_hash": member.weights_hash,
            "vectors": member.vectors,
            "stale": member.stale,
        }
        for member in details.members
    ]
    call.out.document({**summary_data(summary), "members": members})
    facts = {
        "method": summary.method,
        "refined from": summary.origin or "nothing",
        "base model": summary.base_model,
        "settings": _settings(summary.hyperparameters),
        "metrics": _settings(summary.metrics),
        "seed": "none" if summary.seed is None else str(summary.seed),
        "data": f"sha256 {summary.data_hash}" if summary.data_hash else "none",
    }
    call.out.text("\n".join([summary.ref, *(f"{key:<12} {value}" for key, value in facts.items()), ""]))
    call.out.table(
        ["adapter", "weights", "vectors", "now"],
        [
            [
                member.adapter.ref,
                member.weights_hash[:12],
                member.vectors,
                "other weights" if member.stale else "the same",
            ]
            for member in details.members
        ],
    )
    _warn(call, summary)


@prototypes.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path))
@common_options
def export(call: Call, name: str, file: Path) -> None:
    """Write a set to FILE, one safetensors file with everything that "show" shows.

    An older export is replaced; a file of another kind is left as it is.
    """
    with call.hub() as hub:
        summary = hub.prototypes.export(name, file)
    call.out.document({**summary_data(summary), "file": file})
    call.out.text(f"Wrote {summary.ref} to {file}: {_size(summary)}.")
    _warn(call, summary)


@prototypes.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("name")
@common_options
def import_set(call: Call, file: Path, name: str) -> None:
    """Store the set of FILE as the next version of NAME.

    Its adapters must be in the catalog with the weights that it was made for; they may have other names here.
    """
    with call.hub() as hub:
        summary = hub.prototypes.import_(file, name)
    call.out.document(summary_data(summary))
    call.out.text(f"Stored {summary.ref}, method {summary.method}: {_size(summary)}.")
    call.out.remark(f"Next: hub-router prototypes show {shlex.quote(summary.ref)}")


@prototypes.command()
@click.argument("name")
@click.argument("other", required=False)
@common_options
def diff(call: Call, name: str, other: str | None) -> None:
    """Show how far a set is from OTHER, by default what it was refined from.

    OTHER is a set, or "arrow" for the leading directions that "index" stored, whose sign is free. Per module: the
    cosine between the two vectors of each adapter that both have, its mean and minimum, and the number of adapters.
    """
    with call.hub() as hub:
        found = hub.prototypes.diff(name, other)
    call.out.document(found)
    call.out.table(
        ["module", "mean cosine", "min cosine", "adapters"],
        [[module.module, module.mean, module.min, module.shared] for module in found.modules],
    )
    call.out.text(f"\n{found.child} and {found.parent}: mean cosine {found.mean:.4f} over all modules and adapters.")
    for note in found.notes:
        call.out.remark(f"Note: {note}")


def summary_data(summary: PrototypeSetSummary) -> dict[str, Any]:
    """A prototype set for ``--json``.

    Args:
        summary (PrototypeSetSummary): any version of any set.

    Returns:
        dict[str, Any]: everything but its members and vectors; ``stale`` names the adapters whose weights changed.
    """
    return {
        "set": summary.ref,
        "name": summary.name,
        "version": summary.version,
        "method": summary.method,
        "parent": summary.origin or None,
        "base_model": summary.base_model,
        "hyperparameters": summary.hyperparameters,
        "metrics": summary.metrics,
        "data_hash": summary.data_hash or None,
        "seed": summary.seed,
        "adapters": summary.adapters,
        "vectors": summary.vectors,
        "stale": summary.stale,
    }


def _settings(values: Mapping[str, Any]) -> str:
    """Settings on one line, as ``--set`` takes them."""
    return (
        " ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())
        or "none"
    )


def _size(summary: PrototypeSetSummary) -> str:
    return f"{summary.vectors} vectors of {summary.adapters} adapters"


def _warn(call: Call, summary: PrototypeSetSummary) -> None:
    """Says that a set cannot be used as it is."""
    if summary.stale:
        call.out.remark(
            f"Note: {summary.ref} was made for other weights of: {', '.join(summary.stale)}. It is refused until it is "
            "trained anew: hub-router train"
        )
