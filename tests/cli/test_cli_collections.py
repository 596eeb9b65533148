"""``collections``: what is bundled, what a manifest names, what of it is in the catalog, and what is wrong with one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_world import invoke
from click.testing import Result

from hub_router.cli.collections import certainty
from hub_router.demo.hubserver import LoopbackHub
from hub_router.hub.collections import bundled_collections
from hub_router.settings import bundled

README = Path(__file__).resolve().parents[2] / "README.md"
NAMES = sorted(path.stem for path in bundled("catalog").glob("*.toml"))
SUMMARY = {"name", "title", "base_model", "entries", "author", "prefix", "licence", "confidence", "uncertain"}
HEAD = 'name = "own"\ntitle = "Mine"\ndescription = "d"\nlicence = "mit"\nconfidence = "A"\n'
Command = Callable[..., Result]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Runs ``collections`` with a home that does not exist yet, and checks its exit status."""

    def call(*arguments: object, status: int = 0) -> Result:
        done = invoke(["collections", *map(str, arguments), "--home", str(tmp_path / "home")])
        assert done.exit_code == status, done.output
        return done

    return call


def sync(home: Path, hub: LoopbackHub, *targets: str) -> None:
    """Bring repositories of a loopback Hub into the catalog of a home."""
    from hub_router.lora.facts import inspect
    from hub_router.store.session import open_store
    from hub_router.sync.run import ClientOptions, SyncRequest
    from hub_router.sync.run import sync as run

    home.mkdir(exist_ok=True)
    options = ClientOptions(endpoint=hub.endpoint, cache_dir=home / "cache", retries=0)
    with open_store(f"sqlite:///{home / 'catalog.db'}") as store:
        run(store, SyncRequest(targets=targets), inspect, options=options)


def test_list_names_every_bundled_collection(command: Command) -> None:
    found = json.loads(command("list", "--json").stdout)["collections"]
    assert [entry["name"] for entry in found] == NAMES
    assert all(set(entry) == SUMMARY for entry in found)
    by_name = {entry["name"]: entry for entry in found}
    assert (by_name["granite"]["base_model"], by_name["lots-of-loras"]["entries"]) == (None, None)
    assert by_name["loraretriever-7b"]["uncertain"] == {"B": 18}
    table = {line.split()[0]: line for line in command("list").stdout.splitlines()[1:]}
    assert list(table) == NAMES
    assert re.search(r"Llama-2-7b-hf +66 +unknown +48 A, 18 B +LoraRetriever", table["loraretriever-7b"])
    assert re.search(r" several +15 ", table["granite"])
    assert "Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16-task*" in table["lots-of-loras"]


@pytest.mark.parametrize("name", NAMES)
def test_show_works_without_a_catalog_and_makes_none(name: str, command: Command, tmp_path: Path) -> None:
    document = json.loads(command("show", name, "--json").stdout)
    assert set(document) == {*SUMMARY, "description", "sample_source", "members"}
    assert len(document["members"]) == (document["entries"] or 0)
    assert all(entry["catalog"] == {} and entry["task"] for entry in document["members"])
    text = command("show", name).stdout
    assert document["description"] in text
    assert all(entry["name"] in text for entry in document["members"])
    assert not (tmp_path / "home").exists()


def test_show_tells_what_the_catalog_holds_of_each_entry(command: Command, tmp_path: Path) -> None:
    zoo = bundled("zoo") / "hub_router"
    shelf = tmp_path / "shelf" / "owner"
    for place in ("lib/x", "lib/deep/y", "lib/deep/z", "closed", "old"):
        shutil.copytree(zoo / "zoo-film", shelf / place)
    shutil.copytree(zoo / "zoo-base", shelf / "no-adapter")
    manifest = tmp_path / "own.toml"
    names = ["lib/x", "lib/deep", "lib/gone", "lib", "closed", "old", "no-adapter", "never"]
    manifest.write_text(HEAD + f"repos = {[f'owner/{name}' for name in names]}\n")
    with LoopbackHub(tmp_path / "shelf") as hub:
        hub.gated["owner/closed"] = {"a-token"}
        sync(tmp_path / "home", hub, *(f"owner/{name}" for name in ("lib", "lib/gone", "closed", "old", "no-adapter")))
        (shelf / "old").rename(shelf / "new")
        hub.renames["owner/old"] = "owner/new"
        sync(tmp_path / "home", hub, "owner/old")
    document = json.loads(command("show", manifest, "--json").stdout)
    assert {entry["name"].removeprefix("owner/"): entry["catalog"] for entry in document["members"]} == {
        "lib/x": {"ready": 1},
        "lib/deep": {"ready": 2},
        "lib/gone": {"missing": 1},
        "lib": {"ready": 3},
        "closed": {"gated": 1},
        "old": {"ready": 1},
        "no-adapter": {"unsupported": 1},
        "never": {},
    }
    lines = [line.split() for line in command("show", manifest).stdout.splitlines() if line.startswith("owner/")]
    assert lines[1] == ["owner/lib/deep", "A", "2", "ready", "-"]
    assert lines[-1] == ["owner/never", "A", "-", "-"]


def test_show_lists_what_the_catalog_holds_of_a_pattern(command: Command, tmp_path: Path) -> None:
    manifest = tmp_path / "own.toml"
    text = 'author = "HUB_router"\nprefix = "Zoo-f"\n[tasks]\n"hub_router/zoo-film" = "films"\n'
    manifest.write_text(HEAD + text)
    with LoopbackHub(bundled("zoo")) as hub:
        sync(tmp_path / "home", hub, "hub_router/zoo-film", "hub_router/zoo-food", "hub_router/zoo-when")
    members = json.loads(command("show", manifest, "--json").stdout)["members"]
    assert [(entry["name"], entry["task"], entry["catalog"]) for entry in members] == [
        ("hub_router/zoo-film", "films", {"ready": 1}),
        ("hub_router/zoo-food", "", {"ready": 1}),
    ]


def test_validate_lists_every_fault_of_every_file(command: Command, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(HEAD + 'repos = ["a/b"]\n')
    bad.write_text(HEAD + 'repos = ["a/b", "c"]\nlicense = "mit"\n')
    assert command("validate", good, "zoo").stdout == f"{good}: no faults\nzoo: no faults\n"
    done = command("validate", good, bad, "nothing", "--json", status=1)
    found: dict[str, Any] = {entry["file"]: entry["faults"] for entry in json.loads(done.stdout)["manifests"]}
    assert list(found) == [str(good), str(bad), "nothing"]
    assert [len(faults) for faults in found.values()] == [0, 2, 1]
    text = command("validate", good, bad, "nothing", status=1).stdout.splitlines()
    assert text[:2] == [f"{good}: no faults", f"{bad}: 2 faults"]
    assert sorted(text[2:4]) == sorted(f"  - {fault}" for fault in found[str(bad)])
    assert text[4] == "nothing: 1 fault"


def test_unknown_collection_names_the_bundled_ones(command: Command) -> None:
    done = command("show", "lorahubs", status=1)
    assert "lorahub, loraretriever-13b" in done.stderr


def test_readme_has_a_row_for_every_collection() -> None:
    text = README.read_text()
    for manifest in bundled_collections():
        entries = f"`{manifest.pattern}*`" if manifest.pattern else len(manifest.repos)
        cells = [f"`{manifest.name}`", manifest.base_model or "several", entries, manifest.licence, certainty(manifest)]
        row = f"\n| {' | '.join(map(str, cells))} |\n"
        assert row in text, f"README.md lacks the row:{row}"
