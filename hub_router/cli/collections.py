"""``collections``: the published collections that ``sync --collection`` knows, and manifests of your own."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from hub_router.cli.errors import FAILED
from hub_router.cli.options import Call, common_options

if TYPE_CHECKING:
    from hub_router.sync.manifest import Manifest


@click.group()
def collections() -> None:
    """Look at curated collections of adapters, check your own."""


@collections.command("list")
@common_options
def list_collections(call: Call) -> None:
    """List the bundled collections."""
    from hub_router.hub.collections import bundled_collections

    found = bundled_collections()
    call.out.document({"collections": [summary(manifest) for manifest in found]})
    call.out.table(
        ["name", "base model", "entries", "licence", "certainty", "title"],
        [
            [
                manifest.name,
                manifest.base_model or "several",
                manifest.pattern + "*" if manifest.pattern else len(manifest.repos),
                manifest.licence,
                certainty(manifest),
                manifest.title,
            ]
            for manifest in found
        ],
    )
    call.out.remark("Next: hub-router collections show NAME, or hub-router sync --collection NAME")


@collections.command()
@click.argument("collection", metavar="NAME|FILE")
@common_options
def show(call: Call, collection: str) -> None:
    """Show a collection: what is known about it, its entries, and which of them are in the catalog."""
    from hub_router.hub.collections import CONFIDENCE, members
    from hub_router.hub.collections import collection as read

    manifest = read(collection)
    entries = members(manifest, call.place.home, call.place.database_url)
    details = {"description": manifest.description, "sample_source": manifest.sample_source}
    call.out.document({**summary(manifest), **details, "members": entries})
    facts = {
        "base model": manifest.base_model or "several: each adapter's own config decides",
        "licence": manifest.licence,
        "entries": f"all that the Hub lists as {manifest.pattern}*" if manifest.pattern else str(len(manifest.repos)),
        "samples": " ".join(manifest.sample_source.split()) or "not stated",
    }
    lines = [f"{key:<11} {value}" for key, value in facts.items()]
    lines += [f"{'ids, ' + letter:<11} {CONFIDENCE[letter]}" for letter in (manifest.confidence, *manifest.uncertain)]
    call.out.text("\n".join([f"{manifest.name}: {manifest.title}", manifest.description, "", *lines, ""]))
    rows = [[entry.name, entry.confidence, counted(entry.catalog), entry.task] for entry in entries]
    if rows:
        call.out.table(["entry", "certainty", "in the catalog", "task"], rows)
    call.out.remark(f"Next: hub-router sync --collection {shlex.quote(collection)}")


@collections.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@common_options
def validate(call: Call, files: tuple[str, ...]) -> None:
    """Check manifests and say everything that is wrong with each; FILE may also be the name of a bundled one.

    Ends with status 1 if there is any fault. Whether the adapters exist only the Hub knows: sync --dry-run asks it.
    """
    from hub_router.hub.collections import collection_faults

    found = {file: collection_faults(file) for file in files}
    call.out.document({"manifests": [{"file": file, "faults": faults} for file, faults in found.items()]})
    for file, faults in found.items():
        call.out.text("\n  - ".join([f"{file}: {len(faults) or 'no'} fault{'s' if len(faults) != 1 else ''}", *faults]))
    if any(found.values()):
        click.get_current_context().exit(FAILED)


def summary(manifest: Manifest) -> dict[str, Any]:
    """A collection in short, for ``--json``.

    Args:
        manifest (Manifest): any collection.

    Returns:
        dict[str, Any]: facts, without the members.
    """
    return {
        "name": manifest.name,
        "title": manifest.title,
        "base_model": manifest.base_model,
        "entries": len(manifest.repos) if manifest.repos else None,
        "author": manifest.author or None,
        "prefix": manifest.prefix or None,
        "licence": manifest.licence,
        "confidence": manifest.confidence,
        "uncertain": {letter: len(names) for letter, names in manifest.uncertain.items()},
    }


def certainty(manifest: Manifest) -> str:
    """How sure the ids are, as one table cell.

    Args:
        manifest (Manifest): any collection.

    Returns:
        str: a letter, or such as ``48 A, 18 B``.
    """
    counts = Counter(manifest.confidences().values())
    return counted(dict(sorted(counts.items()))) if manifest.uncertain else manifest.confidence


def counted(counts: Mapping[str, int]) -> str:
    """Counts as one table cell.

    Args:
        counts (Mapping[str, int]): by name.

    Returns:
        str: such as ``ready`` or ``3 ready, 1 gated``; empty where there are none.
    """
    if list(counts.values()) == [1]:
        return next(iter(counts))
    return ", ".join(f"{count} {name}" for name, count in counts.items())
