"""``doctor``: what is wrong, and what mends it."""

from __future__ import annotations

import click

from hub_router.cli.errors import FAILED
from hub_router.cli.options import Call, common_options, encoder_option


@click.command()
@encoder_option
@common_options
def doctor(call: Call, encoder: str | None) -> None:
    """Check the installation and the catalog, and say what mends each fault.

    Changes nothing. Ends with status 1 if a check failed; warnings alone end with 0.
    """
    from hub_router.doctor import diagnose
    from hub_router.settings import Settings

    checks = diagnose(Settings.resolve(call.place.home, call.place.database_url), encoder)
    failed = sum(check.ok == "fail" for check in checks)
    call.out.document({"checks": checks, "failed": failed})
    for check in checks:
        mend = f"\n{'':<20}mend: {check.fix}" if check.fix else ""
        call.out.text(f"{check.ok:<5} {check.name:<13} {check.detail}{mend}")
    if failed:
        click.get_current_context().exit(FAILED)
