"""``search``: adapters by task."""

from __future__ import annotations

from typing import Any

import click

from hub_router.cli.adapters import adapter_data
from hub_router.cli.options import Call, common_options, encoder_option, filter_options
from hub_router.cli.output import one_line
from hub_router.records import SEARCH_BY


@click.command()
@click.argument("text")
@filter_options
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", default=10, show_default=True, help="At most N adapters."
)
@click.option(
    "--by",
    type=click.Choice(SEARCH_BY),
    default=SEARCH_BY[0],
    show_default=True,
    help="What the score is: see above.",
)
@click.option(
    "--epsilon",
    type=click.FloatRange(min=0, min_open=True),
    metavar="E",
    help="With --by likelihood: variance added in every direction. Default: 1e-5.",
)
@encoder_option
@common_options
def search(call: Call, text: str, **options: Any) -> None:
    """Find the adapters nearest to a task described in words.

    TEXT is a task, a question or an example input. The score is the cosine between TEXT and the adapter's nearest
    text, which the last column names.

    With --by likelihood, TEXT is an input, and the score is how likely it is among the samples of the adapter's task:
    the logarithm of their Gaussian's density, per dimension. It takes adapters with two samples or more.
    """
    if options["epsilon"] is not None and options["by"] != "likelihood":
        raise click.UsageError("--epsilon belongs to --by likelihood")
    with call.hub() as hub:
        hits = hub.search(text, **options)
    call.out.document(
        {
            "text": text,
            "by": options["by"],
            "hits": [
                {
                    "adapter": adapter_data(hit.adapter),
                    "score": hit.score,
                    "kind": hit.kind,
                    "matched": hit.text,
                }
                for hit in hits
            ],
        }
    )
    if not hits:
        call.out.remark("No indexed adapter matches these filters; see what there is with: hub-router list")
        return
    call.out.table(
        ["#", "adapter", "score", "base model", "ranks", "licence", "why"],
        [
            [
                position,
                hit.adapter.ref,
                hit.score,
                hit.adapter.base_model_resolved or hit.adapter.base_model,
                hit.adapter.ranks,
                hit.adapter.licence,
                f"{hit.kind}: {one_line(hit.text, 60)}",
            ]
            for position, hit in enumerate(hits, start=1)
        ],
    )
