"""The README names every command, and every command that it shows can be parsed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from hub_router.cli import COMMANDS, main

README = Path(__file__).resolve().parents[2] / "README.md"


def shown_commands() -> list[str]:
    """Command lines of the README's fenced blocks, continuation lines joined."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", README.read_text().replace("\\\n", " "), re.DOTALL)
    lines = (line.strip().removeprefix("$ ") for block in blocks for line in block.splitlines())
    return [line for line in lines if line.startswith("hub-router ")]


@pytest.mark.parametrize("name", COMMANDS)
def test_readme_names_the_command(name: str) -> None:
    assert re.search(rf"hub-router {name}\b", README.read_text()), f"README.md does not show: hub-router {name}"


def test_every_command_line_of_the_readme_parses() -> None:
    wrong = []
    for line in shown_commands():
        context = click.Context(main)
        name, *arguments = shlex.split(line, comments=True)[1:]
        try:
            command = main.get_command(context, name)
            assert command is not None, f"no command {name}"
            if isinstance(command, click.Group) and arguments:
                command, arguments = command.commands[arguments[0]], arguments[1:]
            command.make_context(name, [word for word in arguments if word not in ("--help", "...")], parent=context)
        except (click.UsageError, AssertionError, KeyError) as error:
            wrong.append(f"{line}: {error}")
    assert not wrong, "\n".join(wrong)
