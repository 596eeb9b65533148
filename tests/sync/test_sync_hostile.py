"""Repositories and folders that want to harm, each beside a good one: one reason each, and nothing else happens."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from hostile_repos import CARD, CONFIG, REPOS, WEIGHTS, Call, Hostile, pickled, sparse, torch_archive
from sync_world import Bench, outcomes, reasons, write_adapter

from hub_router.cli import main
from hub_router.demo.hubfaults import Fault
from hub_router.demo.hubserver import LoopbackHub
from hub_router.errors import SettingsError
from hub_router.store.session import open_store
from hub_router.sync.run import SyncSummary
from hub_router.sync.text import is_plain, plain

LONGEST = 2_000
# What hostile files may add to the memory of a sync, in bytes; and where they are downloaded, for the client reads the
# network in blocks of 10 MB.
MEMORY, DOWNLOADED = 40_000_000, 90_000_000
APART = """
import json, re, sys
from pathlib import Path
from hub_router.hub import Hub
with Hub(sys.argv[1]) as hub:
    summary = hub.sync(*sys.argv[2:], workers=1)
# The peak of this process alone: that of getrusage begins with its parent's.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
outcomes = {line.repo_id: line.outcome for line in summary.outcomes}
print(json.dumps({"outcomes": outcomes, "memory": 1024 * int(peak[1])}))
"""
ENTRY = {"type": "file", "size": 10, "oid": "0" * 40}
# Paths that only a listing can name: repository -> what lies in its folder beside the good adapter.
PATHS = {
    "parent": "../../evil",
    "absolute": "/etc/evil",
    "inside-and-out": "a/../../../evil",
    "backslash": "..\\..\\evil",
    "drive": "C:/evil",
    "surrogate": "\ud800evil",
    "line-break": "a\nevil",
    "steering": "\x1b[2Jevil",
    "long-name": "evil" * 64,
    "long-path": "evil/" * 250 + "evil",
    "checkpoint": "checkpoint-" + "9" * 5000,
}
# Names of folders that are strange and harmless.
FOLDERS = ("a b", "%2e%2e%2fevil", "$(touch evil)", "-rf", "~root", "a;b&c|d", "ü🤖", "con", "checkpoint-" + "9" * 240)


@dataclass(frozen=True)
class Sync:
    """One sync of all hostile repositories and a good one, and what could be seen of it."""

    bench: Bench
    summary: SyncSummary
    before: dict[str, str]
    after: dict[str, str]
    marker: Path


def snapshot(top: Path) -> dict[str, str]:
    """Every file and folder below one, with what tells whether it was changed."""
    found = {}
    for path in sorted(top.rglob("*")):
        info = path.lstat()
        content = hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() and info.st_size < 1_000_000 else ""
        found[str(path.relative_to(top))] = f"{info.st_mode} {info.st_size} {info.st_mtime_ns} {content}"
    return found


def hostile_pickles(marker: Path) -> dict[str, Hostile]:
    """Pickles that would make a file."""
    call = Call(os.system, f"touch {marker}")
    refusal = f"adapter_model.bin is a pickle that asks for {os.name}.system: not loaded"
    plain = pickled(lambda path: path.write_bytes(__import__("pickle").dumps(call)) and None)
    return {
        "pickle": Hostile(plain, "unsupported", refusal),
        "pickle-archive": Hostile(pickled(torch_archive({"a": call})), "unsupported", refusal),
    }


@pytest.fixture(scope="module")
def sync(tmp_path_factory: pytest.TempPathFactory, empty_catalog: Path) -> Iterator[Sync]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "home").mkdir()
    (folder / "empty").mkdir()
    shutil.copy(empty_catalog, folder / "home" / "catalog.db")
    outside = folder / "outside"
    write_adapter(outside / "evil")
    shelf = folder / "outside" / "hub"
    write_adapter(shelf / "ann" / "good")
    every = REPOS | hostile_pickles(folder / "executed")
    for name, hostile in every.items():
        hostile.make(write_adapter(shelf / "evil" / name))
    for number, name in enumerate(FOLDERS):
        write_adapter(shelf / "evil" / f"folder-{number}" / name)
    before_folder = Path.cwd()
    os.chdir(folder / "empty")
    with LoopbackHub(shelf) as hub, open_store(f"sqlite:///{folder / 'home' / 'catalog.db'}") as store:
        for name, path in PATHS.items():
            write_adapter(shelf / "evil" / name)
            repo = hub.shelf.get(f"evil/{name}")
            assert repo is not None
            rows = [file.tree_entry() for file in repo.files.values()]
            rows += [{**ENTRY, "path": f"{path}/{file}"} for file in (CONFIG, WEIGHTS)]
            hub.faults.add(Fault(f"/evil/{name}/tree/", status=200, body=json.dumps(rows).encode()))
        bench = Bench(folder, hub, store)
        asked = [*every, *PATHS, *(f"folder-{number}" for number in range(len(FOLDERS)))]
        before = snapshot(outside)
        summary = bench.sync("ann/good", *(f"evil/{name}" for name in asked))
        try:
            yield Sync(bench, summary, before, snapshot(outside), folder / "executed")
        finally:
            os.chdir(before_folder)


@pytest.mark.parametrize("name", [*REPOS, *hostile_pickles(Path())])
def test_hostile_repository_has_the_expected_outcome(sync: Sync, name: str) -> None:
    hostile = (REPOS | hostile_pickles(Path()))[name]
    line = next(line for line in sync.summary.outcomes if line.repo_id == f"evil/{name}")
    assert line.outcome == hostile.outcome, line.reason
    notes = sync.bench.adapter(f"evil/{name}").notes
    assert any(re.search(hostile.says, text) for text in (line.reason, *notes)), (line.reason, notes)
    assert (line.reason == "") == (line.outcome == "added")


@pytest.mark.parametrize("name", PATHS)
def test_path_that_cannot_be_kept_is_noted_and_never_asked_for(sync: Sync, name: str) -> None:
    lines = [line for line in sync.summary.outcomes if line.repo_id == f"evil/{name}"]
    assert [(line.subfolder, line.outcome) for line in lines] == [("", "added")]
    [note] = sync.bench.adapter(f"evil/{name}").notes
    assert re.fullmatch(r"2 unsafe paths of the repository ignored, such as '.*'", note)
    assert "\\x1b" in note or name != "steering"


@pytest.mark.parametrize("number", range(len(FOLDERS)))
def test_strange_folder_is_used_as_it_is(sync: Sync, number: int) -> None:
    assert outcomes(sync.summary)[f"evil/folder-{number}/{FOLDERS[number]}"] == "added"
    row = sync.bench.adapter(f"evil/folder-{number}", FOLDERS[number])
    assert Path(row.path).is_relative_to(sync.bench.folder / "cache")
    assert (Path(row.path) / WEIGHTS).is_file()


def test_the_good_one_is_added_and_every_reason_is_one_line(sync: Sync) -> None:
    assert outcomes(sync.summary)["ann/good"] == "added"
    assert len(sync.summary.outcomes) == len(REPOS) + len(PATHS) + len(FOLDERS) + 3
    for line in sync.summary.outcomes:
        row = sync.bench.adapter(line.repo_id, line.subfolder)
        for text in (line.repo_id, line.subfolder, line.reason, *row.notes, *row.base_model_evidence):
            assert len(text) <= LONGEST
            assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in text), ascii(text)


def test_nothing_else_on_the_machine_is_made_changed_asked_for_or_executed(sync: Sync) -> None:
    assert sync.after == sync.before
    assert not sync.marker.exists()
    assert {path.name for path in sync.bench.folder.iterdir()} == {"home", "empty", "outside", "cache"}
    assert list((sync.bench.folder / "empty").iterdir()) == []
    assert all(
        path.resolve().is_relative_to(sync.bench.folder / "cache") for path in (sync.bench.folder / "cache").rglob("*")
    )
    asked = [request.path for request in sync.bench.hub.requests if "evil/" in request.path]
    assert asked
    assert not [
        path
        for path in asked
        if "/resolve/" in path and re.search("evil|passwd", path.split("/resolve/")[1]) and "folder-" not in path
    ]
    assert max(path.stat().st_size for path in (sync.bench.folder / "cache").rglob("*") if path.is_file()) < 3_000_000


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_list_and_show_print_nothing_that_steers_a_terminal(sync: Sync, form: tuple[str, ...]) -> None:
    place = ["--home", str(sync.bench.folder / "home")]
    statuses = [part for status in ("ready", "unsupported", "failed") for part in ("--status", status)]
    refs = [f"{line.repo_id}/{line.subfolder}".rstrip("/") for line in sync.summary.outcomes]
    for arguments in (["list", *statuses], *(["show", ref] for ref in refs)):
        done = CliRunner(catch_exceptions=False).invoke(main, [*arguments, *place, *form])
        assert done.exit_code == 0, done.output
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", done.output), arguments
        if form:
            json.loads(done.stdout)
    shown = CliRunner().invoke(main, ["show", "evil/steering-names", *place]).output
    assert [line for line in shown.splitlines() if line.startswith("status")] == ["status        ready"]


def test_second_sync_changes_nothing(sync: Sync) -> None:
    sync.bench.asked()
    again = outcomes(sync.bench.sync("ann/good", *(f"evil/{name}" for name in REPOS)))
    assert again == {
        "ann/good": "unchanged",
        **{f"evil/{name}": "unchanged" if each.outcome == "added" else each.outcome for name, each in REPOS.items()},
    }
    assert not [entry for entry in sync.bench.asked() if "/resolve/" in entry]


def run_apart(bench: Bench, *repo_ids: str) -> tuple[dict[str, str], int]:
    """Sync in a process of its own: outcome by reference, and the most memory it ever had, in bytes."""
    place = bench.folder / ("apart-" + hashlib.sha1("".join(repo_ids).encode()).hexdigest())
    environment = {**os.environ, "HF_ENDPOINT": bench.hub.endpoint, "HF_HOME": str(place), "HOME": str(place / "user")}
    (place / "user").mkdir(parents=True)
    command = [sys.executable, "-c", APART, str(place / "home"), *repo_ids]
    done = subprocess.run(
        command, env=environment, cwd=place / "user", capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list((place / "user").iterdir()) == []
    found = json.loads(done.stdout)
    return found["outcomes"], found["memory"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured as Linux states it")
def test_memory_is_bounded_whatever_the_files_hold(bench: Bench) -> None:
    bench.repo("ann/good")
    heavy = ("readme-of-100-mb", "config-of-50-mb", "header-of-2-60-bytes", "samples-of-nothing", "pickle-of-torch")
    heavy += ("repetitions", "slow-pattern", "legacy-unfilled", "zip-bomb", "yaml-bomb", "headings", "many-targets")
    for name in heavy:
        REPOS[name].make(bench.repo(f"evil/{name}"))
    # A listing that understates: what is downloaded is large, what is read of it is not.
    for name, large in (("card", CARD), ("config", CONFIG)):
        sparse(large, 100_000_000)(bench.repo(f"evil/lying-{name}"))
        repo = bench.hub.shelf.get(f"evil/lying-{name}")
        assert repo is not None
        rows = [{**file.tree_entry(), "size": 10} for file in repo.files.values()]
        bench.hub.faults.add(Fault(f"/evil/lying-{name}/tree/", status=200, body=json.dumps(rows).encode()))
    _, plain = run_apart(bench, "ann/good")
    found, hostile = run_apart(bench, "ann/good", *(f"evil/{name}" for name in heavy))
    assert found == {"ann/good": "added"} | {f"evil/{name}": REPOS[name].outcome for name in heavy}
    assert hostile - plain < MEMORY
    found, lying = run_apart(bench, "evil/lying-card", "evil/lying-config")
    assert found == {"evil/lying-card": "added", "evil/lying-config": "unsupported"}
    assert lying - plain < DOWNLOADED


def test_a_listing_of_100001_files_is_read(bench: Bench) -> None:
    bench.repo("evil/many")
    repo = bench.hub.shelf.get("evil/many")
    assert repo is not None
    rows = [file.tree_entry() for file in repo.files.values()]
    rows += [{**ENTRY, "path": f"evil/{number}/{CONFIG}x"} for number in range(100_001)]
    bench.hub.faults.add(Fault("/evil/many/tree/", status=200, body=json.dumps(rows).encode()))
    assert outcomes(bench.sync("evil/many")) == {"evil/many": "added"}


def replaced(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return path


def link(path: Path, to: str) -> None:
    replaced(path).symlink_to(to)


def pipe(path: Path) -> None:
    os.mkfifo(replaced(path))


def folder_of(path: Path) -> None:
    replaced(path).mkdir()


def bind(path: Path) -> None:
    """A socket; made under a short path, for its path may not be longer than 107 bytes."""
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(path.parent)
        server.bind(replaced(path).name)
        os.chdir(before)


def deep(folder: Path, levels: int) -> None:
    """Folders within each other, more than a path can name."""
    before = Path.cwd()
    os.chdir(folder.parent)
    for _ in range(levels):
        Path(folder.name).mkdir()
        os.chdir(folder.name)
    os.chdir(before)


# What lies in a folder beside good adapters: how it is made of an adapter's folder, and what becomes of it.
LOCAL: dict[str, Hostile] = {
    "config-elsewhere": Hostile(lambda folder: link(folder / CONFIG, "/etc/passwd"), "unsupported", "that leaves"),
    "weights-elsewhere": Hostile(lambda folder: link(folder / WEIGHTS, "/etc/passwd"), "unsupported", "that leaves"),
    "card-elsewhere": Hostile(lambda folder: link(folder / CARD, "/etc/passwd"), "unsupported", "that leaves"),
    "parent": Hostile(lambda folder: link(folder / "up", ".."), "added", ""),
    "itself": Hostile(lambda folder: link(folder / "loop", "loop"), "added", ""),
    "device": Hostile(
        lambda folder: link(folder / WEIGHTS, "/dev/zero"), "unsupported", "no adapter_model.safetensors"
    ),
    "loop": Hostile(lambda folder: link(folder / WEIGHTS, WEIGHTS), "unsupported", "no adapter_model.safetensors or"),
    "pipe": Hostile(lambda folder: pipe(folder / WEIGHTS), "unsupported", "no adapter_model.safetensors or"),
    "pipe-beside": Hostile(lambda folder: pipe(folder / "samples.jsonl"), "added", ""),
    "socket": Hostile(lambda folder: bind(folder / WEIGHTS), "unsupported", "no adapter_model.safetensors or"),
    "folder": Hostile(lambda folder: folder_of(folder / WEIGHTS), "unsupported", "no adapter_model.safetensors or"),
    "line\nbreak": Hostile(lambda folder: None, "unsupported", "the path of this folder within .* has control char"),
    "steering\x1b[2J": Hostile(lambda folder: None, "unsupported", "the path of this folder within .* has control"),
    os.fsdecode(b"bytes\xff"): Hostile(lambda folder: None, "unsupported", "the path of this folder within .* has con"),
    "back\\slash": Hostile(lambda folder: None, "unsupported", "the path of this folder within .* a backslash"),
}


@pytest.mark.timeout(60)
def test_hostile_folders_beside_a_good_one(bench: Bench) -> None:
    top = bench.folder / "many"
    write_adapter(top / "good")
    folder_of(write_adapter(top / "config") / CONFIG)
    for name, hostile in LOCAL.items():
        hostile.make(write_adapter(top / name))
    before = snapshot(top)
    deep(top / "deep", 1200)
    try:
        summary = bench.sync(top)
        again = bench.sync(top)
    finally:
        # shutil.rmtree calls itself once per folder.
        subprocess.run(["rm", "-rf", str(top / "deep")], check=True)
    lines = {line.repo_id.removeprefix(f"{top}/"): line for line in summary.outcomes}
    expected = {plain(name): hostile for name, hostile in LOCAL.items()}
    assert {name: line.outcome for name, line in lines.items() if not name.startswith("deep")} == {
        "good": "added",
        "config": "unsupported",
        **{name: hostile.outcome for name, hostile in expected.items()},
    }
    for name, hostile in expected.items():
        assert re.search(hostile.says, lines[name].reason), lines[name].reason
    [far] = [line for name, line in lines.items() if name.startswith("deep")]
    assert (far.outcome, len(far.repo_id) < len(str(top)) + 250) == ("unsupported", True)
    assert all(is_plain(line.repo_id + line.reason) and len(line.reason) < LONGEST for line in summary.outcomes)
    assert outcomes(again) == {
        name: "unchanged" if news == "added" else news for name, news in outcomes(summary).items()
    }
    assert snapshot(top) == before


def test_folder_of_100001_files_is_too_much_to_look_through(bench: Bench) -> None:
    folder = write_adapter(bench.folder / "many")
    for number in range(100_001):
        os.close(os.open(folder / str(number), os.O_CREAT))
    summary = bench.sync(folder, write_adapter(bench.folder / "good"))
    assert outcomes(summary) == {str(folder): "failed", str(bench.folder / "good"): "added"}
    assert f"{folder} holds more than 100000 files; name a folder further down" in reasons(summary)


@pytest.mark.parametrize("name", [b"bytes\xff", b"line\nbreak"])
def test_folder_whose_own_path_cannot_be_kept_is_no_target(bench: Bench, name: bytes) -> None:
    folder = write_adapter(bench.folder / os.fsdecode(name))
    with pytest.raises(SettingsError, match="its path holds control characters or bytes that are no UTF-8, rename it"):
        bench.sync(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_file_that_cannot_be_read_is_the_reason(bench: Bench) -> None:
    folder = write_adapter(bench.folder / "many" / "closed")
    write_adapter(bench.folder / "many" / "good")
    (folder / WEIGHTS).chmod(0)
    summary = bench.sync(bench.folder / "many")
    assert outcomes(summary) == {str(folder): "failed", str(folder.with_name("good")): "added"}
    assert "Permission denied" in reasons(summary)
