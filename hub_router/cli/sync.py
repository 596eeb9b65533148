"""``sync``: the catalog, brought up to date."""

from __future__ import annotations

import shlex
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


def _number(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> int | float | None:
    """A whole number, else one with a fraction; which of them can be used, the catalog says."""
    try:
        return None if text is None else int(text) if text.strip().isdecimal() else float(text)
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is no number, expected a rank such as 16, or a share such as 0.99"
        ) from error


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
@click.option(
    "--checkpoints",
    type=click.Choice(("newest", "all")),
    default="newest",
    show_default=True,
    help="Of folders checkpoint-N that stand for one adapter, the newest or all.",
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
@click.option(
    "--convert-rank",
    callback=_number,
    metavar="R",
    help="Also convert other PEFT types (LoHa, LoKr, ...) to LoRA of rank R; R below 1 is the share of energy to keep.",
)
@common_options
def sync(call: Call, targets: tuple[str, ...], **options: Any) -> None:
    """Bring adapters from the Hub and from local folders into the catalog.

    TARGET is OWNER/REPO, OWNER/REPO/SUBFOLDER, either with @REVISION, or a folder; what exists here as a folder is
    taken as one. What has not changed since the last sync is not downloaded again, and an interrupted sync is finished
    by the next. An adapter that is converted (--convert-rank) is added as a local one, under the catalog's home.

    Ends with status 1 if anything failed, or if a TARGET gave no usable adapter because it is gated, missing or
    unsupported. What a listing (--author, --base-model, --collection) holds of such is only reported.
    """
    if not targets and not any(options[name] for name in ("author", "base_model", "collection")):
        raise click.UsageError("name a TARGET, or give --author, --base-model or --collection")
    with call.hub() as hub:
        summary = hub.sync(*targets, **options)
        waiting = hub.convertible(summary) if options["convert_rank"] is None else ()
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
    if waiting:
        command = f"hub-router sync {shlex.quote(waiting[0])} --convert-rank 16"
        call.out.remark(f"Of other PEFT types that can be converted to LoRA: {len(waiting)}; try: {command}")
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
    from hub_router.hub.conversion import answers

    folder = Path(target).expanduser()
    local = folder.is_dir() or target.startswith((".", "/", "~"))
    wanted = _parts(str(folder.resolve())) if local else _parts(target.partition("@")[0])
    lines = [
        outcome
        for outcome in summary.outcomes
        if (outcome.source == "local") == local
        and (
            _parts(_ref(outcome))[: len(wanted)] == wanted
            # A renamed repository is reported under its new name.
            or f"renamed from {'/'.join(target.partition('@')[0].split('/')[:2])}" in outcome.reason
        )
    ]
    refs = [_ref(outcome) for outcome in lines if outcome.outcome == "unsupported"]
    # An adapter of another type is met by its conversion.
    own = [outcome.outcome for outcome in (*lines, *(each for each in summary.outcomes if answers(each, refs)))]
    return "failed" not in own and any(outcome in USABLE for outcome in own)


def _parts(ref: str) -> Sequence[str]:
    """A reference's parts; the Hub does not tell names apart by case."""
    return ref.strip("/").lower().split("/")


def _ref(outcome: Any) -> str:
    return f"{outcome.repo_id}/{outcome.subfolder}" if outcome.subfolder else outcome.repo_id
