"""``index``: everything that search and routing need to have computed."""

from __future__ import annotations

import click

from hub_router.cli.errors import FAILED
from hub_router.cli.options import Call, common_options, encoder_option


@click.command()
@encoder_option
@common_options
def index(call: Call, encoder: str | None) -> None:
    """Compute what search and routing need; nothing is computed twice.

    Per adapter: the spectrum and leading direction of every module, the embeddings of its card and samples, and the
    Gaussian of the samples' embeddings. Then the search indexes. Ends with status 1 if an adapter could not be
    indexed; the others are.
    """
    with call.hub() as hub:
        summary = hub.index(encoder)
    call.out.document(summary)
    call.out.text(
        f"Spectra computed for {summary.spectra} adapters, texts embedded for {summary.embedded}, "
        f"Gaussians fitted for {summary.gaussians}, nothing missing for {summary.unchanged}; encoder {summary.encoder}."
    )
    if summary.failed:
        call.out.table(["not indexed", "reason"], summary.failed)
        click.get_current_context().exit(FAILED)
    if summary.embedded or summary.unchanged:
        call.out.remark('Next: hub-router search "a task in words"')
    else:
        call.out.remark("The catalog is empty; add adapters with: hub-router sync OWNER/REPO or a folder")
