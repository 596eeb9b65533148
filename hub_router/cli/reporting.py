"""``report``: what is known of a pool before any model runs."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import click

from hub_router.cli.options import Call, common_options

if TYPE_CHECKING:
    from hub_router.cli.output import Output
    from hub_router.evaluate.calibration import Calibration
    from hub_router.evaluate.pool import PoolReport

_PAIRS = 8
# Of the calibration's curve, this many points apart.
_STEP = 5


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME|ADAPTER...")
@click.option("--pool", is_flag=True, help="HiLoRA's epsilon, distances between tasks, and bounds on its errors.")
@click.option(
    "--epsilon",
    type=click.FloatRange(min=0, min_open=True),
    metavar="E",
    help="Ridge for distances and bounds. Default: the calibrated one.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    metavar="K",
    help="K of the bounds, fewer than the adapters. Default: 3, or what the pool allows.",
)
@common_options
def report(call: Call, names: tuple[str, ...], pool: bool, epsilon: float | None, top_k: int | None) -> None:
    """Report on a pool: HiLoRA's epsilon, distances between tasks, error bounds.

    One NAME is a stored composition, several are adapters, as for show. Everything comes from the samples of the
    adapters' tasks that index embedded, at least 3 per adapter; nothing is loaded.
    """
    if not pool:
        raise click.UsageError("say what to report on; there is --pool: epsilon, distances and bounds of a pool")
    with call.hub() as hub:
        found = hub.report_pool(names[0] if len(names) == 1 else names, epsilon=epsilon, top_k=top_k)
    call.out.document(found)
    _calibration(call.out, found.calibration, found.encoder)
    _distances(call.out, found)
    _bounds(call.out, found)
    chosen, name = f"epsilon={found.calibration.chosen.epsilon:g}", shlex.quote(names[0])
    call.out.remark(f"Next: hub-router compose NAME ADAPTER... --method hilora --set {chosen}")
    if len(names) == 1:
        call.out.remark(f"Its worth: hub-router eval {name} --methods own,hilora,hilora:{chosen} --unseen")


def _calibration(out: Output, found: Calibration, encoder: str) -> None:
    """The curve where it moves, with the published and the chosen point."""
    moving = [each for each in found.curve[::_STEP] if each.own_above > 0 and each.others_below > 0]
    shown = sorted({*moving, found.published, found.chosen}, key=lambda each: each.epsilon)
    marks = {found.published: " published", found.chosen: " calibrated"}
    out.text(
        f"HiLoRA's epsilon, calibrated on {found.samples} samples of {found.adapters} adapters (encoder {encoder}).\n"
        "Each sample is scored with all adapters, its own fitted without it. Those above 0 are candidates;\n"
        "where none is, the best few are. Own first: the sample's own adapter has the best score of all."
    )
    out.table(
        ["epsilon", "own above 0", "others below 0", "own first", "candidates", "candidates, own left out"],
        [
            [
                f"{each.epsilon:g}{marks.get(each, '')}",
                *(f"{share:.1%}" for share in (each.own_above, each.others_below, each.own_first)),
                *(f"{count:.1f}" for count in (each.candidates_seen, each.candidates_unseen)),
            ]
            for each in shown
        ],
    )


def _distances(out: Output, found: PoolReport) -> None:
    """The pairs of tasks that are hardest to tell apart."""
    out.text(f"\nNearest tasks, in nats at epsilon {found.epsilon:g}:")
    out.table(
        ["adapter", "other", "Bhattacharyya", "KL(adapter || other)", "KL(other || adapter)"],
        [
            [found.adapters[i], found.adapters[j], *(f"{each:.1f}" for each in (found.bhattacharyya[i, j], *both))]
            for i, j in found.nearest_pairs(_PAIRS)
            for both in [(found.kl[i, j], found.kl[j, i])]
        ],
    )


def _bounds(out: Output, found: PoolReport) -> None:
    """Theorems 1 and 2 by task."""
    out.text(
        f"\nBounds on HiLoRA's errors, k = {found.top_k}, epsilon {found.epsilon:g}. Above 1 a bound says nothing.\n"
        "Seen: how often an input does not find its own adapter among the top k (Theorem 1). Unseen: how\n"
        "often, with that one left out, it does not find the nearest other (Theorem 2). Both take inputs to be\n"
        "drawn from these Gaussians; what was measured is 'own first' above."
    )
    out.table(
        ["adapter", "samples", "seen", "nearest other", "KL", "unseen"],
        [
            [
                task.adapter,
                task.samples,
                f"{task.error_bound:.2g}",
                task.nearest,
                f"{task.divergence:.1f}",
                "no bound" if task.unbounded_by else f"{task.unseen_bound:.2g}",
            ]
            for task in found.tasks
        ],
    )
    for task in found.tasks:
        if task.unbounded_by:
            out.text(f"  {task.adapter}: no bound, M_alpha is not positive definite for {', '.join(task.unbounded_by)}")
