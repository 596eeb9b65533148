"""``sync`` against a Hub on loopback: exit statuses, summaries, interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_world import Run, World, invoke
from click.testing import Result
from huggingface_hub import constants

from hub_router.cli.sync import is_met
from hub_router.demo.hubfaults import Fault
from hub_router.demo.hubserver import LoopbackHub

KEYS = {"run_id", "dry_run", "counts", "outcomes", "requests", "seconds"}
OUTCOMES = ("added", "updated", "unchanged", "unsupported", "gated", "missing", "failed")


@pytest.fixture
def shelf(world: World, tmp_path: Path) -> Path:
    """A Hub's repositories: three good adapters in two repositories, a gated one, one that holds no adapter."""
    top = tmp_path / "shelf"
    shutil.copytree(world.adapters["colours"], top / "owner" / "colours")
    shutil.copytree(world.adapters["sums"], top / "owner" / "many" / "sums")
    shutil.copytree(world.adapters["moods"], top / "owner" / "many" / "moods")
    shutil.copytree(world.adapters["capitals"], top / "owner" / "closed")
    (top / "owner" / "empty").mkdir(parents=True)
    (top / "owner" / "empty" / "README.md").write_text("nothing here")
    return top


@pytest.fixture
def hub(shelf: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(shelf) as hub:
        hub.gated["owner/closed"] = {"a-token"}
        yield hub


class Console:
    """Runs ``hub-router`` against the loopback Hub, with a home and a Hub cache of its own.

    huggingface_hub reads its environment once, so what runs in this process has its constants set instead.
    """

    def __init__(self, hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = folder / "home"
        cache = folder / "huggingface" / "hub"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        self.environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HUB_ROUTER_HOME": str(self.home),
            "NO_PROXY": "127.0.0.1",
        }

    def __call__(self, *arguments: object, status: int = 0) -> Result:
        done = invoke([*map(str, arguments), "--home", str(self.home)])
        assert done.exit_code == status, f"status {done.exit_code}, expected {status}\n{done.output}"
        return done

    def json(self, *arguments: object, status: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", status=status).stdout)

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """The same in a process of its own, which can be stopped."""
        return subprocess.Popen(
            [sys.executable, "-m", "hub_router", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )


@pytest.fixture
def console(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Console:
    return Console(hub, tmp_path, monkeypatch)


def test_targets_and_listings(console: Console, hub: LoopbackHub, world: World) -> None:
    """What was named must have been got; what a listing holds of unusable repositories is only reported."""
    first = console.json("sync", "owner/colours", "owner/many", world.adapters["capitals"])
    assert set(first) == KEYS
    assert tuple(first["counts"]) == OUTCOMES
    assert (first["counts"]["added"], first["run_id"]) == (4, 1)
    again = console.json("sync", "owner/colours", "owner/many/moods")
    assert {outcome["outcome"] for outcome in again["outcomes"]} == {"unchanged"}
    listed = console.json("sync", "--author", "owner")
    reported = {outcome["repo_id"]: outcome["outcome"] for outcome in listed["outcomes"]}
    assert reported == {
        "owner/colours": "unchanged", "owner/many": "unchanged", "owner/closed": "gated", "owner/empty": "unsupported"
    }  # fmt: skip
    done = console("sync", "owner/colours", "owner/closed", "owner/empty", "owner/none", status=1)
    assert "owner/closed, owner/empty, owner/none" in done.stderr
    lines = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    assert {("owner/closed", "gated"), ("owner/empty", "unsupported"), ("owner/none", "missing")} <= lines
    assert "hub-router index" in done.stderr


def test_failed_downloads_of_a_listing_are_status_1(console: Console, hub: LoopbackHub) -> None:
    hub.faults.add(Fault(r"colours/resolve/.*safetensors", flip=100))
    summary = console.json("sync", "--author", "owner", status=1)
    failed = [outcome["repo_id"] for outcome in summary["outcomes"] if outcome["outcome"] == "failed"]
    assert failed == ["owner/colours"]
    assert summary["counts"]["added"] == 2


def test_dry_run_writes_nothing(console: Console) -> None:
    summary = console.json("sync", "owner/colours", "--dry-run")
    assert (summary["dry_run"], summary["run_id"], summary["counts"]["added"]) == (True, None, 1)
    assert console.json("list") == {"adapters": [], "repositories": []}


def test_renamed_repository_counts_as_got(console: Console, hub: LoopbackHub) -> None:
    hub.renames["old/name"] = "owner/colours"
    assert console.json("sync", "old/name")["counts"]["added"] == 1


def test_rename_is_told(console: Console, hub: LoopbackHub, shelf: Path) -> None:
    console("sync", "owner/colours")
    (shelf / "owner" / "colours").rename(shelf / "owner" / "colors")
    hub.renames["owner/colours"] = "owner/colors"
    assert "owner/colors: renamed from owner/colours" in console("sync", "owner/colours").stdout.splitlines()


def test_repositories_that_gave_no_adapter_are_listed(console: Console) -> None:
    """They have no row among the adapters, yet their status and reason can be asked for."""
    console("sync", "--author", "owner")
    assert console.json("list")["repositories"] == []
    document = console.json("list", "--status", "gated", "--status", "unsupported")
    assert document["adapters"] == []
    told = {repo["repo_id"]: (repo["source"], repo["status"]) for repo in document["repositories"]}
    assert told == {"owner/closed": ("hub", "gated"), "owner/empty": ("hub", "unsupported")}
    assert all(repo["reason"] for repo in document["repositories"])
    done = console("list", "--status", "gated")
    heading, line = done.stdout.splitlines()
    assert heading.split() == ["repository", "without", "adapters", "status", "reason"]
    assert line.split()[:2] == ["owner/closed", "gated"]
    assert not line.split()[2].startswith("gated")
    assert done.stderr == ""
    both = console("list", "--status", "ready", "--status", "gated").stdout.splitlines()
    assert both.index("") == 4
    assert len(both) == 7
    assert len(console.json("list", "--status", "ready", "--status", "gated", "--limit", 3)["repositories"]) == 0
    assert console.json("list", "--status", "gated", "--licence", "mit")["repositories"] == []
    for name in ("owner/closed", "closed"):
        assert "ended as gated: " in console("show", name, status=1).stderr


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_sync_is_finished_by_the_next(console: Console, hub: LoopbackHub, stop: signal.Signals) -> None:
    hub.faults.add(Fault(r"many/resolve/.*safetensors", method="GET", delay=30))
    running = console.start("sync", "owner/colours", "owner/many")
    try:
        deadline = time.monotonic() + 60
        while not console.json("list")["adapters"]:
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        running.send_signal(stop)
        out, err = running.communicate(timeout=20)
    finally:
        running.kill()
    assert out == ""
    if stop == signal.SIGINT:
        assert running.returncode == 130
        assert err.splitlines()[-1].startswith("Interrupted: every adapter finished so far is in the catalog")
        assert "Traceback" not in err
    assert sync_check(console) == "warn"
    hub.faults.clear()
    counts = console.json("sync", "owner/colours", "owner/many")["counts"]
    assert (counts["unchanged"], counts["added"]) == (1, 2)
    assert sync_check(console) == "ok"


def sync_check(console: Console) -> str:
    """What the doctor says of the runs."""
    document = json.loads(invoke(["doctor", "--json", "--home", str(console.home)]).stdout)
    return str({check["name"]: check["ok"] for check in document["checks"]}["sync"])


def test_offline_mode_is_one_message(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = console("sync", "--author", "owner", "--json", status=1)
    assert done.stdout == ""
    assert "HF_HUB_OFFLINE" in done.stderr


def test_local_folder_without_an_adapter_is_status_1(run: Run, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    assert str(tmp_path / "nothing") in run("sync", tmp_path / "nothing", status=1).output
    assert run("sync", tmp_path / "not-there", status=1).output


def test_collection_of_local_folders(run: Run, world: World) -> None:
    """A folder of adapters is one target; the text ends in the next command."""
    done = run("sync", next(iter(world.adapters.values())).parent)
    assert ["unchanged", "4"] in [line.split() for line in done.stdout.splitlines()]
    assert done.stderr.endswith("Next: hub-router index\n")


@pytest.mark.parametrize(
    ("target", "outcomes", "met"),
    [
        ("o/r", [("hub", "o/r", "", "added", "")], True),
        ("O/R@main", [("hub", "o/r", "", "unchanged", "")], True),
        ("o/r", [("hub", "o/r", "a", "unsupported", ""), ("hub", "o/r", "b", "added", "")], True),
        ("o/r/a", [("hub", "o/r", "a", "unsupported", ""), ("hub", "o/r", "b", "added", "")], False),
        ("o/r", [("hub", "o/r", "a", "failed", ""), ("hub", "o/r", "b", "added", "")], False),
        ("o/r", [("hub", "o/r2", "", "added", "")], False),
        ("old/r/a", [("hub", "o/r", "a", "added", "renamed from old/r")], True),
        ("/f/x", [("local", "/f/x/one", "", "added", ""), ("local", "/f/x/two", "", "unsupported", "")], True),
        ("/f/x", [("hub", "f/x", "", "added", "")], False),
    ],
)
def test_is_met(target: str, outcomes: list[tuple[str, str, str, str, str]], met: bool) -> None:
    from hub_router.store.runs import Outcome
    from hub_router.sync.summary import SyncSummary

    rows = tuple(Outcome(source, repo, folder, None, kind, why) for source, repo, folder, kind, why in outcomes)
    assert is_met(target, SyncSummary(rows, None, False, 0, 0.0)) == met
