"""The one table that turns exceptions into text and an exit status."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import click

from hub_router.cli.output import printable
from hub_router.errors import HubRouterError

FAILED = 1
BUG = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# What an interrupted command leaves behind; every other command only reads.
KEPT = {
    "sync": "every adapter finished so far is in the catalog; the same command again does the rest",
    "index": "every feature computed so far is in the catalog; hub-router index again does the rest",
    "compose": "compositions stored before are unchanged",
    "train": "the same command again goes on from the last checkpoint, if there was one",
    "demo": "your own catalog was not touched",
}


# Errors of other libraries that a user can act on, by qualified name, so that none of them is imported here.
FOREIGN: dict[str, Callable[[Exception], str]] = {
    "torch.OutOfMemoryError": lambda error: (
        f"the device ran out of memory ({error}); choose another with --device, or compose fewer adapters"
    ),
    "builtins.MemoryError": lambda _: "this machine ran out of memory; compose fewer adapters",
    "builtins.ModuleNotFoundError": lambda error: f"{error}; the installation is incomplete, run: hub-router doctor",
    "builtins.OSError": str,
}


def explain(error: BaseException, command: str | None) -> tuple[str, int]:
    """Message and exit status of an exception.

    Args:
        error (BaseException): what a command raised.
        command (str | None): name of the command.

    Returns:
        tuple[str, int]: text for the user, exit status.
    """
    if isinstance(error, KeyboardInterrupt):
        return f"Interrupted: {KEPT.get(command or '', 'the catalog is unchanged')}.", INTERRUPTED
    if isinstance(error, HubRouterError):
        return f"Error: {error}", FAILED
    for kind in type(error).__mro__:
        render = FOREIGN.get(f"{kind.__module__}.{kind.__qualname__}")
        if render is not None and isinstance(error, Exception):
            return f"Error: {render(error)}", FAILED
    again = f"hub-router --debug {command or ''}".rstrip()
    return (
        f"Error: unexpected {type(error).__name__}: {error}\n"
        f"This is a fault of hub-router, not of your command; its traceback: {again} ...",
        BUG,
    )


def report(error: BaseException, command: str | None, *, debug: bool) -> int:
    """Write an exception to stderr as text.

    Args:
        error (BaseException): what a command raised.
        command (str | None): name of the command.
        debug (bool): also write the traceback.

    Returns:
        int: exit status.
    """
    message, status = explain(error, command)
    if debug:
        click.echo("".join(traceback.format_exception(error)), err=True)
    click.echo(printable(message), err=True)
    return status
