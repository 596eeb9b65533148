"""``search``: adapters by task."""

from __future__ import annotations

from typing import Any

import click

from hub_router.cli.adapters import adapter_data
from hub_router.cli.options import Call, common_options, encoder_option, filter_options
from hub_router.cli.output import one_line


@click.command()
@click.argument("text")
@filter_options
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", default=10, show_default=True, help="At most N adapters."
)
@encoder_option
@common_options
def search(call: Call, text: str, **options: Any) -> None:
    """Find the adapters nearest to a task described in words.

    TEXT is a task, a question or an example input. The score is the cosine between TEXT and the adapter's nearest
    text, which the last column names.
    """
    with call.hub() as hub:
        hits = hub.search(text, **options)
    call.out.document(
        {
            "text": text,
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
