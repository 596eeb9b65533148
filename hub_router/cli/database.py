"""``db``: the schema of the catalog's database."""

from __future__ import annotations

import click

from hub_router.cli.errors import FAILED
from hub_router.cli.options import Call, common_options

# State of the database -> what to do about it.
REMEDIES = {
    "empty": "It is created by the first command that needs it.",
    "behind": "Make a backup, then run: hub-router db upgrade",
    "ahead": "A newer hub-router wrote it; run: pip install --upgrade hub-router",
    "foreign": "It belongs to another application; name another with --database-url or --home",
}


@click.group("db")
def database() -> None:
    """Look after the catalog's database."""


@database.command()
@common_options
def status(call: Call) -> None:
    """Show the database's schema version and what an upgrade would apply; status 1 unless it can be used as it is."""
    from hub_router.hub import database_status

    found = database_status(call.place.home, call.place.database_url)
    call.out.document(found)
    call.out.text(f"database  {found.url}\nstate     {found.state}")
    call.out.text(f"schema    {found.current or 'none'}, this release needs {found.head}")
    if found.pending and found.current:
        call.out.text(f"pending   {', '.join(found.pending)}")
    if found.state in REMEDIES:
        call.out.remark(REMEDIES[found.state])
    if found.state not in ("current", "empty"):
        click.get_current_context().exit(FAILED)


@database.command()
@common_options
def upgrade(call: Call) -> None:
    """Bring the database to the schema of this release, all or nothing; its rows are kept."""
    from hub_router.hub import database_status, upgrade_database

    before = database_status(call.place.home, call.place.database_url)
    after = upgrade_database(call.place.home, call.place.database_url)
    applied = before.pending if before.current != after.current else ()
    call.out.document({"url": after.url, "before": before.current, "after": after.current, "applied": applied})
    call.out.text(f"{after.url} is at {after.current}; applied: {', '.join(applied) or 'nothing, it was current'}.")
