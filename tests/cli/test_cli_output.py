"""The output sink: one document, or tables and text; nothing from outside steers the terminal."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hub_router.cli.output import Output, human, one_line, plain_data, printable


@dataclass(frozen=True)
class Thing:
    path: Path
    values: tuple[float, ...]


def test_plain_data_reaches_into_records_mappings_and_arrays() -> None:
    data = {1: Thing(Path("a/b"), (1.0, float("nan"))), "array": np.array([1.5, float("inf")], dtype=np.float32)}
    assert plain_data(data) == {"1": {"path": "a/b", "values": [1.0, None]}, "array": [1.5, None]}
    assert json.loads(json.dumps(plain_data(np.float32(0.5)))) == 0.5
    assert plain_data({"flag": True, "none": None, "count": np.int64(3)}) == {"flag": True, "none": None, "count": 3}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text\twith\na line", "plain text\twith\na line"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\rb", "a\\rb"),
        ("\x9b31mred", "\\x9b31mred"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("naïve 日本語 🙂", "naïve 日本語 🙂"),
    ],
)
def test_control_characters_are_shown_and_not_sent(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("value", "cell"),
    [(None, "-"), ("", "-"), ((), "-"), ([], "-"), (0.12345, "0.123"), ((4, 8), "4, 8"), ("a\n b", "a b"), (0, "0")],
)
def test_cells(value: object, cell: str) -> None:
    assert human(value) == cell


def test_one_line_cuts_and_marks_the_cut() -> None:
    assert one_line("two\n  words", 20) == "two words"
    assert one_line("abcdef", 6) == "abcdef"
    assert one_line("abcdefg", 6) == "abcde…"


def test_json_writes_the_document_only(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=True)
    out.text("text")
    out.remark("remark")
    out.table(["a"], [[1]])
    out.document({"a": 1})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": 1}
    assert captured.err == ""


def test_without_json_the_document_is_silent_and_remarks_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output()
    out.document({"a": 1})
    out.text("text")
    out.remark("remark")
    assert capsys.readouterr() == ("text\n", "remark\n")


def test_plain_table_aligns_by_display_width(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(["name", "count", "why"], [["日本", 7, "x"], ["b", 123, None]])
    assert capsys.readouterr().out == "name  count  why\n日本      7  x\nb       123  -\n"


def test_table_on_a_terminal_keeps_every_cell_and_takes_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    reference = "owner/" + "a-very-long-repository-name" * 2
    Output().table(["adapter", "why"], [[reference, "[red]not markup[/red]"]])
    shown = capsys.readouterr().out
    first_column = [line.strip().split("  ")[0] for line in shown.splitlines() if not re.search("─|adapter", line)]
    assert "".join(first_column).replace(" ", "") == reference
    assert "[red]" in shown


@pytest.mark.parametrize("columns", [["a"], ["a", "b"]])
def test_empty_table_has_its_headings(columns: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(columns, [])
    assert capsys.readouterr().out.split() == columns
