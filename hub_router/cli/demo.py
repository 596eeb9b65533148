"""``demo``: the whole main job on the bundled zoo."""

from __future__ import annotations

import io
import json
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

from hub_router.cli.options import Call, common_options


@click.command()
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for the demo's catalog and downloads, kept afterwards. Default: a temporary one.",
)
@common_options
def demo(call: Call, keep: Path | None) -> None:
    """Do the whole main job on bundled adapters, offline.

    Serves them over HTTP on loopback as a Hub, then runs sync, index, search, compose, generate, report and eval
    against it; every command line is shown before it runs. The demo has a catalog of its own, whatever --home and
    --database-url say.
    """
    from hub_router.demo.session import run

    steps: list[dict[str, Any]] = []

    def invoke(arguments: list[str]) -> int:
        if not call.out.as_json:
            return _run_line(arguments)
        captured, started = io.StringIO(), time.monotonic()
        with redirect_stdout(captured):
            status = _run_line([*arguments, "--json"])
        steps.append(
            {
                "command": ["hub-router", *arguments],
                "seconds": time.monotonic() - started,
                "status": status,
                "result": json.loads(captured.getvalue() or "null"),
            }
        )
        return status

    status = run(invoke, call.out.text, keep)
    call.out.document({"steps": steps})
    click.get_current_context().exit(status)


def _run_line(arguments: list[str]) -> int:
    """One command line in this process; its exit status."""
    from hub_router.cli import main

    try:
        main.main(arguments, prog_name="hub-router")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0
