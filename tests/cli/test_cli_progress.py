"""Progress on stderr: lines in a pipe, bars on a terminal, from many threads."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import click
import pytest
from click.testing import CliRunner

from hub_router.cli.options import Call, common_options
from hub_router.cli.progress import TerminalProgress, _Lines

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


def test_a_long_stage_says_in_a_pipe_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress(seconds=0.05).task("training maple", 100) as advance:
        advance(40)  # what a stopped run had done
        for number in range(30):
            time.sleep(0.01)
            advance(1, f"loss 0.{number + 100}, entropy 1.20")
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "training maple: 100"
    found = [
        re.fullmatch(r"training maple: (\d+)/100, loss 0\.(\d+), entropy 1\.20, 0:0\d left", line) for line in lines
    ]
    assert all(found) and 2 <= len(found) <= 7
    steps = [int(each[1]) for each in found if each]
    assert steps == sorted(steps)
    assert all(int(each[1]) == 41 + int(each[2]) - 100 for each in found if each)


def test_lines_of_a_long_stage_become_rarer(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalProgress(seconds=0.0).task("listing", None) as advance:
        started = time.monotonic()
        while time.monotonic() - started < 0.5:
            advance(1)
    _, *lines = capsys.readouterr().err.splitlines()
    # A tenth of the time at most between two of them: some 80 from 0.1 ms to 0.5 s, of many thousand steps.
    assert 5 < len(lines) < 120
    assert all(re.fullmatch(r"listing: \d+", line) for line in lines)


def test_what_is_left_is_said_in_hours(capsys: pytest.CaptureFixture[str]) -> None:
    _Lines("training", 300, 10.0, started=time.monotonic() - 4000, before=0).advance(100, "loss 1")
    assert capsys.readouterr().err.splitlines() == ["training: 100/300, loss 1, 2:13:20 left"]


@pytest.mark.parametrize("as_json", [True, False])
def test_with_json_a_pipe_gets_nothing(as_json: bool) -> None:
    @click.command()
    @common_options
    def work(call: Call) -> None:
        with TerminalProgress(seconds=0.0).task("stage", 2) as advance:
            advance(1)

    done = CliRunner().invoke(work, ["--json"] if as_json else [])
    assert done.exit_code == 0
    assert bool(done.stderr) is not as_json


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
