"""``sync``: the catalog, brought up to date."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub_router.cli.errors import FAILED
from hub_router.cli.options import Call, common_options
from hub_router.records import bare_reason

if TYPE_CHECKING:
    from hub_router.sync.run import SyncSummary

USABLE = ("added", "updated", "unchanged")


@click.command()
@click.argument("targets", nargs=-1, metavar="[TARGET]...")
@click.option("--author", metavar="NAME", help="Also every adapter of this user or organisation.")
@click.option("--base-model", metavar="MODEL", help="Also every adapter that the Hub lists for this base model.")
@click.option("--collection", metavar="NAME|FILE", help="Also the members of a manifest: bundled, or a TOML file.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most N repositories of each listing, most downloaded first.",
)
@click.option("--revision", metavar="REV", help="Branch, tag or commit. Default: the main branch.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Downloads at the same time.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done; download and write nothing.")
@common_options
def sync(call: Call, targets: tuple[str, ...], **options: Any) -> None:
    """Bring adapters from the Hub and from local folders into the catalog.

    TARGET is OWNER/REPO, OWNER/REPO/SUBFOLDER, either with @REVISION, or a folder; what exists here as a folder is
    taken as one. What has not changed since the last sync is not downloaded again, and an interrupted sync is finished
    by the next.

    Ends with status 1 if anything failed, or if a TARGET gave no usable adapter because it is gated, missing or
    unsupported. What a listing (--author, --base-model, --collection) holds of such is only reported.
    """
    if not targets and not any(options[name] for name in ("author", "base_model", "collection")):
        raise click.UsageError("name a TARGET, or give --author, --base-model or --collection")
    with call.hub() as hub:
        summary = hub.sync(*targets, **options)
    call.out.document(summary.as_dict())
    call.out.table(["outcome", "adapters"], [[name, count] for name, count in summary.counts.items()])
    rest = [outcome for outcome in summary.outcomes if outcome.outcome not in USABLE]
    if rest:
        call.out.text("")
        call.out.table(
            ["not in the catalog", "outcome", "reason"],
            [[_ref(outcome), outcome.outcome, bare_reason(outcome.outcome, outcome.reason)] for outcome in rest],
        )
    remarked = [outcome for outcome in summary.outcomes if outcome.outcome in USABLE and outcome.reason]
    if remarked:
        call.out.text("\n" + "\n".join(f"{_ref(outcome)}: {outcome.reason}" for outcome in remarked))
    unmet = [target for target in targets if not is_met(target, summary)]
    if unmet:
        call.out.remark(f"Gave no usable adapter, or not all that they hold: {', '.join(unmet)}")
    if any(summary.counts[name] for name in USABLE):
        call.out.remark("Next: " + ("the same without --dry-run" if summary.dry_run else "hub-router index"))
    if unmet or summary.counts["failed"]:
        click.get_current_context().exit(FAILED)


def is_met(target: str, summary: SyncSummary) -> bool:
    """Whether a target that the user named gave at least one usable adapter, and nothing of it failed.

    Args:
        target (str): as typed.
        summary (SyncSummary): of the run.

    Returns:
        bool: False too where the run says nothing about the target.
    """
    folder = Path(target).expanduser()
    local = folder.is_dir() or target.startswith((".", "/", "~"))
    wanted = _parts(str(folder.resolve())) if local else _parts(target.partition("@")[0])
    own = [
        outcome.outcome
        for outcome in summary.outcomes
        if (outcome.source == "local") == local
        and (
            _parts(_ref(outcome))[: len(wanted)] == wanted
            # A renamed repository is reported under its new name.
            or f"renamed from {'/'.join(target.partition('@')[0].split('/')[:2])}" in outcome.reason
        )
    ]
    return "failed" not in own and any(outcome in USABLE for outcome in own)


def _parts(ref: str) -> Sequence[str]:
    """A reference's parts; the Hub does not tell names apart by case."""
    return ref.strip("/").lower().split("/")


def _ref(outcome: Any) -> str:
    return f"{outcome.repo_id}/{outcome.subfolder}" if outcome.subfolder else outcome.repo_id
