"""``list`` and ``show``: the adapters in the catalog."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from hub_router.cli.bases import described, explained
from hub_router.cli.options import Call, common_options, filter_options, limit_option
from hub_router.cli.output import Output, one_line, plain_data
from hub_router.cli.spectrum import chart, summarise
from hub_router.records import STATUSES, bare_reason, standing

if TYPE_CHECKING:
    from hub_router.records import AdapterDetails, AdapterRecord

SAMPLES_SHOWN = 3
VALUES_SHOWN = 12
PLURALS = {"base_model": "base models", "licence": "licences", "rank": "ranks", "target": "targets", "tag": "tags"}


def adapter_data(record: AdapterRecord) -> dict[str, Any]:
    """An adapter for ``--json``: the record's fields, with the name that commands take as ``ref``.

    Args:
        record (AdapterRecord): any adapter.

    Returns:
        dict[str, Any]: values that JSON can hold.
    """
    return {"ref": record.ref, "name": record.name, **plain_data(record)}


def size(count: int) -> str:
    """A number of bytes for a person, in powers of 1000.

    Args:
        count (int): bytes.

    Returns:
        str: e.g. ``19.0 MB``.
    """
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


@click.command("list")
@filter_options
@click.option(
    "--status",
    "statuses",
    type=click.Choice(STATUSES),
    multiple=True,
    default=("ready",),
    show_default=True,
    help="Only adapters, and repositories that gave none, of this status; give it several times for several.",
)
@limit_option
@common_options
def list_adapters(call: Call, statuses: tuple[str, ...], limit: int | None, **filters: Any) -> None:
    """List the adapters in the catalog."""
    given = [name for name, value in filters.items() if value is not None]
    with call.hub() as hub:
        records = hub.list(statuses=statuses, limit=limit, **filters)
        # Nothing is known of a repository without adapters that a filter could be held against.
        repositories = [] if given else list(hub.repositories(statuses))
        values = {} if records or repositories else hub.values(statuses)
    if limit is not None:
        repositories = repositories[: limit - len(records)]
    call.out.document({"adapters": [adapter_data(record) for record in records], "repositories": repositories})
    if records:
        _table(call.out, records, statuses)
    if repositories:
        if records:
            call.out.text("")
        rows = [[repo.repo_id, repo.status, bare_reason(repo.status, repo.reason)] for repo in repositories]
        call.out.table(["repository without adapters", "status", "reason"], rows)
    if not records and not repositories:
        call.out.remark(nothing_matches(values, statuses, given))


def nothing_matches(values: Mapping[str, Mapping[str, int]], statuses: Sequence[str], given: Sequence[str]) -> str:
    """What to say where a list is empty: what there is, by status and by the filters given.

    Args:
        values (Mapping[str, Mapping[str, int]]): from :meth:`hub_router.hub.Hub.values`.
        statuses (Sequence[str]): statuses that were asked for.
        given (Sequence[str]): names of the filters that were given.

    Returns:
        str: one line, or one and a line per filter.
    """
    if not values["status"]:
        return "The catalog holds no adapters; add some with: hub-router sync OWNER/REPO or a folder"
    held = ", ".join(f"{number} {status}" for status, number in values["status"].items())
    lines = [f"No adapter in the catalog matches (status {', '.join(statuses)}); adapters that it holds: {held}"]
    for name in given:
        counted = [f"{value} ({number})" for value, number in values[name].items()]
        more = [f"and {len(counted) - VALUES_SHOWN} more"] if len(counted) > VALUES_SHOWN else []
        lines.append(f"{PLURALS[name]}: {', '.join(counted[:VALUES_SHOWN] + more) or 'none'}")
    return "\n".join(lines)


def _table(out: Output, records: Sequence[AdapterRecord], statuses: tuple[str, ...]) -> None:
    """The adapters for a person; status and reason only where they can differ."""
    columns = ["adapter", "base model", "ranks", "targets", "licence", "size"]
    rows: list[list[Any]] = [
        [
            record.ref,
            described(record),
            record.ranks,
            record.targets,
            record.licence,
            size(record.size_bytes),
        ]
        for record in records
    ]
    if statuses != ("ready",):
        columns += ["status", "reason"]
        rows = [
            [*row, record.status, bare_reason(record.status, record.reason)]
            for row, record in zip(rows, records, strict=True)
        ]
    out.table(columns, rows)


@click.command()
@click.argument("adapter")
@common_options
def show(call: Call, adapter: str) -> None:
    """Show everything known about one adapter.

    ADAPTER is OWNER/REPO, OWNER/REPO/SUBFOLDER, a local folder, a catalog id, or a short name that only one has.
    """
    with call.hub() as hub:
        details = hub.show(adapter)
    spectra = {
        module: {
            "singular_values": spectrum.singular_values,
            "ambiguous": spectrum.ambiguous,
            "zero": spectrum.direction is None,
        }
        for module, spectrum in details.spectra.items()
    }
    call.out.document(
        {
            "adapter": adapter_data(details.record),
            "card": details.card_text,
            "files": details.files,
            "samples": details.samples,
            "spectra": spectra,
            "embeddings": details.embeddings,
        }
    )
    if not call.out.as_json:
        _describe(call.out, details)


def _describe(out: Output, details: AdapterDetails) -> None:
    """The sections of ``show`` for a person."""
    record = details.record
    for label, value in _facts(record).items():
        out.text(f"{label:<14}{value}")
    notes = record.extra.get("notes") or ()
    if notes:
        out.text("\nNotes\n" + "\n".join(f"  {note}" for note in notes))
    if details.files:
        out.text("\nFiles")
        out.table(
            ["file", "size", "sha256"], [[file.path, size(file.size_bytes), file.sha256] for file in details.files]
        )
    if details.card_text.strip():
        out.text("\nCard\n  " + one_line(details.card_text, 600))
    if details.samples:
        tests = sum(sample.split == "test" for sample in details.samples)
        out.text(f"\nSamples ({len(details.samples) - tests} for routing and search, {tests} for evaluation)")
        for sample in details.samples[:SAMPLES_SHOWN]:
            out.text(f"  {one_line(sample.input, 80)} -> {one_line(sample.output, 40)}  ({sample.origin})")
    embedded = ", ".join(f"{count} texts by {encoder}" for encoder, count in details.embeddings.items())
    # Only what is served gets indexed.
    absent = "none yet; run: hub-router index" if record.status == "ready" else "none"
    out.text(f"\nEmbedded: {embedded or absent}")
    if details.spectra:
        out.text("\nSingular values of the update s B A, mean over the modules of a kind, bars per line")
        out.text("\n".join(chart(summarise(details.spectra))))
    else:
        out.text(f"Spectra: {absent}")


def _facts(record: AdapterRecord) -> Mapping[str, str]:
    """One line per fact, empty ones left out."""
    facts = {
        "adapter": f"{record.ref}  (id {record.id}, {record.source})",
        "revision": record.revision,
        "status": standing(record.status, record.reason),
        "folder": str(record.path),
        "base model": explained(record),
        "licence": record.licence,
        "type": ", ".join(filter(None, (record.peft_type, "/".join(record.dtypes)))),
        "ranks": ", ".join(str(rank) for rank in record.ranks),
        "targets": ", ".join(record.targets),
        "modules": f"{record.modules}, {record.parameters:,} weights, {size(record.size_bytes)}"
        if record.modules
        else "",
        "tags": ", ".join(record.tags),
        "datasets": ", ".join(record.datasets),
        "downloads": "" if record.downloads is None else f"{record.downloads:,}",
        "likes": "" if record.likes is None else f"{record.likes:,}",
        "weights hash": record.weights_hash,
    }
    return {label: value for label, value in facts.items() if value}
