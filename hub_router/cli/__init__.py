"""The command line, ``hub-router``: one file per noun, each imported when one of its commands is called.

``--help`` must not pay for the libraries that the commands use, so the table below carries each command's one line.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module

import click

from hub_router import __version__
from hub_router.cli.errors import report
from hub_router.cli.options import Place, database_url_option, home_option

# Command -> (file in this folder, object in it, one-line help), in the order in which a user meets them.
COMMANDS = {
    "demo": ("demo", "demo", "Do the whole main job on bundled adapters, offline."),
    "sync": ("sync", "sync", "Bring adapters from the Hub and from local folders into the catalog."),
    "index": ("index", "index", "Compute what search and routing need; nothing is computed twice."),
    "search": ("search", "search", "Find the adapters nearest to a task described in words."),
    "list": ("adapters", "list_adapters", "List the adapters in the catalog."),
    "show": ("adapters", "show", "Show everything known about one adapter."),
    "samples": ("samples", "samples", "List, add and remove examples of an adapter's task."),
    "collections": ("collections", "collections", "Look at curated collections of adapters, check your own."),
    "check": ("checking", "check", "Tell whether adapters can be used and fit a base model; nothing is loaded."),
    "bases": ("bases", "bases", "Say which base model adapters have, where you know better."),
    "methods": ("methods", "methods", "List the routing methods and their hyperparameters."),
    "compose": ("compositions", "compose", "Store a routed model under a name: adapters, base model, method."),
    "compositions": ("compositions", "compositions", "List the stored compositions, or delete one."),
    "train": ("training", "train", "Train the gates of a method over a pool; they become a prototype set."),
    "prototypes": ("prototypes", "prototypes", "List, compare, export and import trained prototype sets."),
    "generate": ("generate", "generate", "Generate text with a stored composition."),
    "eval": ("evaluation", "evaluate", "Score a composition's pool per task under several methods."),
    "report": ("reporting", "report", "Report on a pool: HiLoRA's epsilon, distances between tasks, error bounds."),
    "db": ("database", "database", "Look after the catalog's database."),
    "doctor": ("doctor", "doctor", "Check the installation and the catalog, and say what mends each fault."),
}


class LazyGroup(click.Group):
    """Group whose commands are imported when they are called, and whose errors become text and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f"hub_router.cli.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in ``--help``, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, _, summary) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name; an unknown name is answered with the nearest ones, or all."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = get_close_matches(name, COMMANDS)
            hint = f"did you mean {' or '.join(near)}?" if near else f"commands: {', '.join(COMMANDS)}"
            ctx.fail(f"no such command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; whatever it raises ends as text on stderr and an exit status."""
        for stream in (sys.stdout, sys.stderr):
            # Card texts hold characters that a terminal's encoding may lack; losing a glyph beats losing the output.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise  # click turns these into an exit status itself
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the outermost edge: nothing is swallowed
            ctx.exit(report(error, ctx.invoked_subcommand, debug=ctx.params["debug"]))


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 when what was asked was done, 1 when not, 2 for wrong usage, 70 for a fault of "
    "hub-router itself, 130 when interrupted. With --json a command writes one JSON document to stdout and nothing "
    "else there; errors go to stderr as text in every case.",
)
@home_option
@database_url_option
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(__version__, prog_name="hub-router", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context, home: str | None, database_url: str | None, debug: bool) -> None:
    """Find LoRA adapters on the Hugging Face Hub and run one model that routes over them.

    A first session: sync, index, search, compose, generate. "hub-router demo" shows it, offline.
    """
    ctx.obj = Place(home, database_url)
