"""The frame of the command line: help without imports, usage errors, exit statuses, what is printed where."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hub_router import __version__
from hub_router.cli import COMMANDS, main
from hub_router.cli.options import Call, common_options

HEAVY = ("torch", "transformers", "faiss", "sentence_transformers", "peft", "huggingface_hub", "sqlalchemy", "rich")


def leaves() -> list[tuple[list[str], click.Command]]:
    """Every command that does something, with its words."""
    found: list[tuple[list[str], click.Command]] = []
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        if isinstance(command, click.Group):
            found += [([name, verb], command.commands[verb]) for verb in command.commands]
        elif command is not None:
            found.append(([name], command))
    return found


LEAVES = leaves()


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], []])
def test_help_and_version_import_no_library(arguments: list[str]) -> None:
    probe = (
        "import sys\nfrom hub_router.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    status = stop.code\n"
        f"print(status, [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    # Without a command click shows the help and reports wrong usage.
    assert done.stdout.splitlines()[-1] == f"{0 if arguments else 2} []"


@pytest.mark.parametrize("words", [words for words, _ in LEAVES], ids=" ".join)
def test_command_help_imports_no_library(words: list[str]) -> None:
    probe = (
        "import sys\nfrom hub_router.cli import main\n"
        f"try:\n    main({[*words, '--help']!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_group_help_lists_every_command_with_its_line() -> None:
    done = CliRunner().invoke(main, ["--help"], terminal_width=200)
    assert done.exit_code == 0
    for name, (_, _, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", done.stdout, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_table_line_is_the_first_line_of_the_command_help(name: str) -> None:
    module, attribute, summary = COMMANDS[name]
    command = getattr(import_module(f"hub_router.cli.{module}"), attribute)
    assert command.name == name
    assert command.help.splitlines()[0] == summary


@pytest.mark.parametrize(("words", "command"), LEAVES, ids=[" ".join(words) for words, _ in LEAVES])
def test_every_command_has_help_and_the_common_options(words: list[str], command: click.Command) -> None:
    options = {name for parameter in command.params for name in parameter.opts}
    assert {"--home", "--database-url", "--json"} <= options
    undocumented = [
        parameter.name for parameter in command.params if isinstance(parameter, click.Option) and not parameter.help
    ]
    assert not undocumented, f"{' '.join(words)}: options without help"
    assert command.help


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["serach", "x"], "did you mean search?"),
        (["zzz"], "commands: demo, sync, index"),
        (["list", "--rank", "many"], "--rank"),
        (["show"], "ADAPTER"),
        (["list", "--limit", "0"], "--limit"),
        (["compose", "x"], "--query"),
        (["compose", "x", "y", "--set", "top_k"], "KEY=VALUE"),
        (["compose", "x", "y", "--set", "top_k=1", "--set", "top_k=2"], "twice"),
        (["list", "--status", "lost"], "unsupported"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what_is_right(arguments: list[str], text: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [*arguments, "--home", str(tmp_path / "home")])
    assert done.exit_code == 2
    assert text in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "home").exists()


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).stdout.strip() == f"hub-router {__version__}"


@pytest.mark.parametrize("before", [True, False])
def test_home_may_stand_before_or_after_the_command(before: bool, tmp_path: Path) -> None:
    home = tmp_path / "home"
    arguments = ["--home", str(home), "list"] if before else ["list", "--home", str(home)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert (home / "catalog.db").is_file()


def test_home_after_the_command_wins_and_the_environment_comes_last(tmp_path: Path) -> None:
    homes = {name: tmp_path / name for name in ("environment", "group", "command")}
    environment = {"HUB_ROUTER_HOME": str(homes["environment"])}
    arguments = ["--home", str(homes["group"]), "list", "--home", str(homes["command"])]
    assert CliRunner().invoke(main, arguments, env=environment).exit_code == 0
    assert [name for name, home in homes.items() if home.exists()] == ["command"]
    assert CliRunner().invoke(main, ["list"], env=environment).exit_code == 0
    assert homes["environment"].is_dir()


def test_database_url_is_used(tmp_path: Path) -> None:
    file = tmp_path / "elsewhere.db"
    arguments = ["list", "--home", str(tmp_path / "home"), "--database-url", f"sqlite:///{file}"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert file.is_file()


def test_home_that_is_a_file_is_one_line_on_stderr(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = CliRunner().invoke(main, ["list", "--json", "--home", str(file)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert "--home" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback_before_the_message(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = CliRunner().invoke(main, ["--debug", "list", "--home", str(file)])
    assert done.exit_code == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert "\nError: " in done.stderr


@pytest.fixture
def with_command(monkeypatch: pytest.MonkeyPatch) -> type[None]:
    """Commands that raise, in the place of a real one, so that the frame itself is what is tested."""
    module = type(sys)("hub_router.cli.probe")

    @click.command("probe")
    @click.argument("kind")
    @common_options
    def probe(call: Call, kind: str) -> None:
        """Raise."""
        if kind == "bug":
            raise KeyError("no_such_key")
        if kind == "interrupt":
            raise KeyboardInterrupt
        if kind == "pipe":
            raise BrokenPipeError(32, "Broken pipe")
        if kind == "memory":
            raise MemoryError
        raise OSError(28, "No space left on device", "/somewhere")

    module.probe = probe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hub_router.cli.probe", module)
    monkeypatch.setitem(COMMANDS, "probe", ("probe", "probe", "Raise."))
    return type(None)


@pytest.mark.parametrize(
    ("kind", "status", "text"),
    [
        ("bug", 70, "unexpected KeyError: 'no_such_key'"),
        ("interrupt", 130, "Interrupted: the catalog is unchanged."),
        ("memory", 1, "out of memory"),
        ("disk", 1, "No space left on device"),
        ("pipe", 1, ""),
    ],
)
def test_whatever_is_raised_ends_as_text(with_command: object, kind: str, status: int, text: str) -> None:
    done = CliRunner().invoke(main, ["probe", kind])
    assert done.exit_code == status
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_bug_names_the_way_to_its_traceback(with_command: object) -> None:
    assert "hub-router --debug probe ..." in CliRunner().invoke(main, ["probe", "bug"]).stderr
    done = CliRunner().invoke(main, ["--debug", "probe", "bug"])
    assert done.exit_code == 70
    assert 'raise KeyError("no_such_key")' in done.stderr


def test_module_entry_point(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hub_router", "list", "--json", "--home", str(tmp_path / "home")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"adapters": [], "repositories": []}


def test_ctrl_c_in_a_real_process_is_status_130(tmp_path: Path) -> None:
    """SIGINT while a command waits for its input."""
    environment = {**os.environ, "HUB_ROUTER_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(
        [sys.executable, "-m", "hub_router", "generate", "nothing", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    try:
        process.stdin.write("a prompt")
        process.stdin.flush()
        deadline = time.monotonic() + 60
        while _unread(process.stdin.fileno()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert err.strip() == "Interrupted: the catalog is unchanged."


def _unread(pipe: int) -> int:
    """Bytes in a pipe that its reader has not taken yet."""
    return int(struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0])


def test_a_reader_that_stops_early_is_not_an_error(tmp_path: Path) -> None:
    """``hub-router ... | head -1``: no traceback, no message."""
    process = subprocess.Popen(
        [sys.executable, "-m", "hub_router", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.wait(timeout=30)
