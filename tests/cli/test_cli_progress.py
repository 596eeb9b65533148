"""Progress on stderr: lines in a pipe, bars on a terminal, from many threads."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from hub_router.cli.progress import TerminalProgress

PROBE = """
from concurrent.futures import ThreadPoolExecutor
from hub_router.cli.progress import TerminalProgress
progress = TerminalProgress()
with progress.task("outer [bold]", 40) as advance:
    with progress.task("inner", None) as other, ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: (advance(1), other(1)), range(40)))
print("result")
"""


def test_one_line_per_stage_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TerminalProgress()
    with progress.task("downloading", 12) as advance, ThreadPoolExecutor(4) as threads:
        list(threads.map(advance, [1] * 12))
    with progress.task("listing", None) as advance:
        advance(3)
    with progress.task("nothing to do", 0):
        pass
    with progress.task("evil\x1b[2J", 1):
        pass
    assert capsys.readouterr() == ("", "downloading: 12\nlisting\nevil\\x1b[2J: 1\n")


def test_an_error_inside_a_stage_passes_and_closes_it(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TerminalProgress()
    with pytest.raises(ValueError, match="inside"), progress.task("stage", 1):
        raise ValueError("inside")
    with progress.task("next", 1):
        pass
    assert capsys.readouterr().err == "stage: 1\nnext: 1\n"


def on_terminal(**environment: str) -> tuple[str, str]:
    """Standard output, and what a terminal on stderr received."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", PROBE],
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm", **environment},
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # how Linux reports that the other end is closed
                break
            if not piece:
                break
            shown += piece
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    return out, shown.decode()


def test_bars_on_a_terminal_count_every_step_of_every_thread() -> None:
    out, shown = on_terminal()
    assert out == "result\n"
    assert "40/40" in shown
    assert "outer [bold]" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is given back


def test_dumb_terminal_gets_lines() -> None:
    _, shown = on_terminal(TERM="dumb")
    assert shown.split("\r\n") == ["outer [bold]: 40", "inner", ""]
