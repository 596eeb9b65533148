"""Where results go: tables on a terminal, aligned text in a pipe, one JSON document with ``--json``.

Results go to stdout, remarks to stderr. Names and texts come from strangers' repositories, so control characters never
reach the terminal.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import click

# C0 and C1 controls except tab and newline, and the marks that reverse the direction of writing.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text without control characters, each shown as its escape.

    Args:
        text (str): anything, such as a model card or generated text.

    Returns:
        str: text that cannot steer a terminal.
    """
    return _CONTROLS.sub(lambda match: ascii(match.group())[1:-1], text)


def one_line(text: str, width: int) -> str:
    """Text on one line, cut to a width.

    Args:
        text (str): any text.
        width (int): characters allowed, the mark of the cut included.

    Returns:
        str: at most ``width`` characters.
    """
    joined = " ".join(text.split())
    return joined if len(joined) <= width else f"{joined[: width - 1].rstrip()}…"


def plain_data(value: Any) -> Any:
    """A value as JSON can hold it.

    Args:
        value (Any): records, mappings, sequences, paths, numpy arrays and numbers, nested at will.

    Returns:
        Any: dicts, lists, strings, numbers, booleans and None; a number that is not finite becomes None.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_data(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_data(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_data(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, without importing either
        return plain_data(value.tolist())
    return str(value)


def human(value: Any) -> str:
    """A table cell.

    Args:
        value (Any): None, a number, a string or a sequence of these.

    Returns:
        str: one line of text.
    """
    if value is None or (isinstance(value, (str, tuple, list)) and not value):
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, (tuple, list)):
        return ", ".join(human(entry) for entry in value)
    return printable(" ".join(str(value).split()))


@dataclass(frozen=True)
class Output:
    """The sink of one command.

    Commands call :meth:`document` with everything and :meth:`table` or :meth:`text` with what a person reads; only
    the kind asked for is written.

    Args:
        as_json (bool): write the document and nothing else to stdout.
    """

    as_json: bool = False

    @property
    def terminal(self) -> bool:
        """Whether a person watches stdout."""
        return not self.as_json and sys.stdout.isatty()

    def document(self, data: Any) -> None:
        """Write the JSON document, with ``--json`` only."""
        if self.as_json:
            click.echo(json.dumps(plain_data(data), indent=2, allow_nan=False))

    def text(self, text: str) -> None:
        """Write lines for a person."""
        if not self.as_json:
            click.echo(printable(text))

    def remark(self, text: str) -> None:
        """Write a remark to stderr, such as the next command; silent with ``--json``."""
        if not self.as_json:
            click.echo(printable(text), err=True)

    def stream(self, pieces: Iterable[str]) -> str:
        """Write text as it comes, and a newline at its end.

        Args:
            pieces (Iterable[str]): parts of one text.

        Returns:
            str: the whole text.
        """
        parts = []
        for piece in pieces:
            parts.append(piece)
            if not self.as_json:
                click.echo(printable(piece), nl=False)
        self.text("")
        return "".join(parts)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a table for a person; columns of numbers are aligned to the right.

        Args:
            columns (Sequence[str]): headings.
            rows (Sequence[Sequence[Any]]): one value per column.
        """
        if self.as_json:
            return
        right = [
            bool(rows) and all(isinstance(row[i], (int, float)) or row[i] is None for row in rows)
            for i in range(len(columns))
        ]
        cells = [[human(value) for value in row] for row in rows]
        if self.terminal:
            _rich_table(columns, cells, right)
        else:
            click.echo("\n".join(_plain_table(columns, cells, right)))


def _plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> list[str]:
    """Lines of space-separated columns, nothing cut."""
    from rich.cells import cell_len

    lines = [list(columns), *rows]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(columns))]
    return [
        "  ".join(
            " " * (width - cell_len(cell)) + cell if to_right else cell + " " * (width - cell_len(cell))
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    """A table fitted to the terminal; long cells wrap."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for title, to_right in zip(columns, right, strict=True):
        table.add_column(title, justify="right" if to_right else "left", no_wrap=to_right, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(table)
