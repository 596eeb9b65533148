"""``eval``: what a composition is worth, task by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from hub_router.cli.options import Call, common_options, device_option

if TYPE_CHECKING:
    from hub_router.cli.output import Output
    from hub_router.evaluate.comparison import Comparison

# More columns than this do not fit a terminal; then a line per method shows the means.
_COLUMNS = 8


def _names(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> list[str] | None:
    """Names separated by commas; None where there are none."""
    return [name.strip() for name in (text or "").split(",") if name.strip()] or None


@click.command("eval")
@click.argument("name")
@click.option(
    "--methods",
    metavar="A,B,C",
    callback=_names,
    help="Methods to compare. METHOD:KEY=VALUE sets hyperparameters, e.g. hilora:epsilon=2e-4:gamma=0.5; 'own' runs "
    "each task on its own adapter; 'all' is every method that the pool allows. "
    "Default: base, own, uniform and the stored one.",
)
@click.option(
    "--unseen", is_flag=True, help="Also score each task with its own adapter left out: a new composition per task."
)
@click.option("--tasks", metavar="A,B,C", callback=_names, help="Score the tasks of these members alone. Default: all.")
@click.option(
    "--samples", type=click.IntRange(min=1), metavar="N", help="At most N test samples per task. Default: all."
)
@device_option
@common_options
def evaluate(
    call: Call,
    name: str,
    methods: list[str] | None,
    unseen: bool,
    tasks: list[str] | None,
    samples: int | None,
    device: str | None,
) -> None:
    """Score a composition's pool per task under several methods.

    A task is a member that came with test.jsonl; the score is exact-match accuracy. Of more than 8 methods the means
    alone are shown; --json always holds every task.
    """
    with call.hub() as hub:
        table = hub.evaluate(name, methods, tasks=tasks, samples=samples, unseen=unseen, device=device)
    call.out.document(
        {
            "composition": name,
            "methods": table.methods,
            "rows": table.rows,
            "mean": table.mean,
            "unseen_mean": table.unseen_mean,
            "refused": table.refused,
            "notes": table.notes,
        }
    )
    if len(table.methods) > _COLUMNS:
        _means(call.out, table, unseen)
    else:
        if unseen:
            call.out.text("Each task's own adapter in the pool:")
        _tasks(call.out, table, [row.accuracy for row in table.rows], table.mean)
        if unseen:
            call.out.text("\nEach task's own adapter left out of the pool:")
            _tasks(call.out, table, [row.unseen for row in table.rows], table.unseen_mean)
    _refused(call.out, table.refused)
    for note in table.notes:
        call.out.text(note)


def _refused(out: Output, refused: Mapping[str, str]) -> None:
    """Why methods of ``all`` have no figures, those of one reason in one line; --json holds the adapters as well."""
    reasons: dict[str, list[str]] = {}
    for title, reason in refused.items():
        first = reason.splitlines()[0].rstrip(":").removeprefix(f"method {title!r} ")
        reasons.setdefault(first, []).append(title)
    for reason, titles in reasons.items():
        out.text(f"Not run: {', '.join(titles)} ({reason})")


def _tasks(out: Output, table: Comparison, rows: Sequence[Mapping[str, float]], mean: Mapping[str, float]) -> None:
    """A line per task, a column per method."""
    lines = [
        [row.task, row.samples, *(accuracy.get(method) for method in table.methods)]
        for row, accuracy in zip(table.rows, rows, strict=True)
    ]
    out.table(
        ["task", "samples", *table.methods],
        [*lines, ["mean", None, *(mean.get(method) for method in table.methods)]],
    )


def _means(out: Output, table: Comparison, unseen: bool) -> None:
    """A line per method."""
    samples = sum(row.samples for row in table.rows)
    out.text(f"Mean accuracy (tasks: {len(table.rows)}, samples: {samples}):")
    if unseen:
        lines = [[method, table.mean.get(method), table.unseen_mean.get(method)] for method in table.methods]
        out.table(["method", "seen", "unseen"], lines)
        out.text("seen: the task's own adapter is in the pool; unseen: it is left out.")
    else:
        out.table(["method", "mean"], [[method, table.mean.get(method)] for method in table.methods])
