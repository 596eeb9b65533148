"""``eval``: what a composition is worth, task by task."""

from __future__ import annotations

import click

from hub_router.cli.options import Call, common_options, device_option


@click.command("eval")
@click.argument("name")
@click.option(
    "--methods",
    metavar="A,B,C",
    help="Methods to compare; 'own' runs each task on its own adapter. Default: base, own, uniform and the stored one.",
)
@click.option(
    "--samples", type=click.IntRange(min=1), metavar="N", help="At most N test samples per task. Default: all."
)
@device_option
@common_options
def evaluate(call: Call, name: str, methods: str | None, samples: int | None, device: str | None) -> None:
    """Score a composition's pool per task under several methods.

    A task is a member that came with test.jsonl; the score is exact-match accuracy.
    """
    chosen = [method.strip() for method in methods.split(",") if method.strip()] if methods else None
    with call.hub() as hub:
        comparison = hub.evaluate(name, chosen, samples=samples, device=device)
    call.out.document(
        {
            "composition": name,
            "methods": comparison.methods,
            "rows": comparison.rows,
            "mean": comparison.mean,
        }
    )
    call.out.table(
        ["task", "samples", *comparison.methods],
        [
            *(
                [row.task, row.samples, *(row.accuracy[method] for method in comparison.methods)]
                for row in comparison.rows
            ),
            ["mean", None, *(comparison.mean[method] for method in comparison.methods)],
        ],
    )
