"""Repositories that vanish, move or close between two runs, and unsafe or gated ones."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select
from sync_world import Bench, outcomes, reasons

from hub_router.demo.hubfaults import Fault
from hub_router.store.tables import Adapter, Repo


@pytest.mark.parametrize("asked", [{"author": "ann"}, {"base_model": "owner/base"}, {}])
def test_deleted_repository_is_no_longer_offered(bench: Bench, asked: dict[str, object]) -> None:
    bench.repo("ann/one")
    bench.repo("ann/two")
    targets = () if asked else ("ann/one", "ann/two")
    bench.sync(*targets, **asked)
    shutil.rmtree(bench.folder / "hub/ann/two")
    summary = bench.sync(*targets, **asked)
    assert outcomes(summary) == {"ann/one": "unchanged", "ann/two": "missing"}
    assert "not on the Hub, or private" in reasons(summary)
    assert bench.rows() == {"ann/one": ("ready", ""), "ann/two": ("missing", "not on the Hub, or private")}
    assert bench.state("ann/two").state == "missing"
    if asked:
        bench.asked()
        assert outcomes(bench.sync(**asked)) == {"ann/one": "unchanged"}
        assert len(bench.asked()) == 1


def test_deleted_repository_that_comes_back_is_offered_again_without_download(bench: Bench) -> None:
    folder = bench.repo("ann/one")
    bench.sync("ann/one")
    folder.rename(bench.folder / "aside")
    bench.sync("ann/one")
    (bench.folder / "aside").rename(folder)
    bench.asked()
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "updated"}
    assert bench.rows() == {"ann/one": ("ready", "")}
    assert bench.state("ann/one").state == "ok"
    assert not any("/resolve/" in entry for entry in bench.asked())


def test_unknown_repository_is_missing_and_leaves_no_row(bench: Bench) -> None:
    assert outcomes(bench.sync("ann/none")) == {"ann/none": "missing"}
    with bench.store.read() as session:
        assert list(session.scalars(select(Repo))) == []


def test_gated_repository_without_token_is_asked_once(bench: Bench) -> None:
    bench.repo("ann/open")
    bench.repo("ann/closed")
    bench.hub.gated["ann/closed"] = {"good"}
    summary = bench.sync(author="ann")
    assert outcomes(summary) == {"ann/closed": "gated", "ann/open": "added"}
    assert f"accept its licence at {bench.hub.endpoint}/ann/closed (no token was sent" in reasons(summary)
    assert bench.state("ann/closed").state == "gated"
    bench.asked()
    assert outcomes(bench.sync(author="ann")) == {"ann/closed": "gated", "ann/open": "unchanged"}
    assert len(bench.asked()) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_gated_repository_of_a_mirror_that_names_no_error_code(bench: Bench, status: int) -> None:
    bench.repo("ann/closed")
    bench.hub.gated["ann/closed"] = set()
    bench.hub.faults.add(Fault("/resolve/", status=status))
    assert outcomes(bench.sync(author="ann")) == {"ann/closed": "gated"}


def test_gated_repository_of_many_adapters_is_asked_for_one_file(bench: Bench) -> None:
    for name in ("x", "y", "z"):
        bench.repo(f"ann/many/{name}")
    bench.hub.gated["ann/many"] = set()
    assert outcomes(bench.sync("ann/many")) == {"ann/many": "gated"}
    assert sum("/resolve/" in entry for entry in bench.asked()) == 1


def test_gated_repository_opens_with_a_token(bench: Bench) -> None:
    bench.repo("ann/closed")
    bench.hub.gated["ann/closed"] = {"good"}
    bench.sync("ann/closed")
    options = bench.options
    bench.options = replace(options, token="bad")
    summary = bench.sync("ann/closed")
    assert outcomes(summary) == {"ann/closed": "gated"}
    assert "the token has no access" in reasons(summary)
    bench.options = replace(options, token="good")
    assert outcomes(bench.sync("ann/closed")) == {"ann/closed": "added"}
    bench.asked()
    assert outcomes(bench.sync("ann/closed")) == {"ann/closed": "unchanged"}
    assert len(bench.asked()) == 2


def test_repository_that_becomes_gated_is_no_longer_offered_until_it_opens(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.sync(author="ann")
    bench.hub.gated["ann/one"] = set()
    assert outcomes(bench.sync(author="ann")) == {"ann/one": "gated"}
    assert bench.rows()["ann/one"][0] == "gated"
    bench.hub.gated.clear()
    assert outcomes(bench.sync(author="ann")) == {"ann/one": "updated"}
    assert bench.rows() == {"ann/one": ("ready", "")}


def test_gating_met_at_the_first_download(bench: Bench) -> None:
    """A listing may lag behind: it says open, the file says gated."""
    bench.repo("ann/one")
    refusal = {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}
    bench.hub.faults.add(Fault("/resolve/", status=401, headers=refusal))
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "gated"}
    assert bench.state("ann/one").state == "gated"
    assert bench.rows() == {}


@pytest.mark.parametrize("asked", [{"author": "ann"}, {}])
def test_renamed_repository_keeps_its_adapters_without_download(bench: Bench, asked: dict[str, object]) -> None:
    bench.repo("ann/old")
    bench.sync("ann/old")
    before = bench.adapter("ann/old")
    (bench.folder / "hub/ann/old").rename(bench.folder / "hub/ann/new")
    bench.hub.renames["ann/old"] = "ann/new"
    bench.asked()
    summary = bench.sync(*(() if asked else ("ann/old",)), **asked)
    assert not any("/resolve/" in entry for entry in bench.asked())
    assert {line.reason for line in summary.outcomes} & {"renamed from ann/old", "renamed to ann/new"}
    assert "updated" in outcomes(summary).values()
    assert bench.rows() == {"ann/new": ("ready", "")}
    assert bench.adapter("ann/new").id == before.id
    old = bench.state("ann/old")
    assert (old.state, old.renamed_to) == ("renamed", "ann/new")
    again = bench.sync(*(() if asked else ("ann/old",)), **asked)
    assert set(outcomes(again).values()) == {"unchanged"}
    if asked:
        bench.asked()
        bench.sync(**asked)
        assert len(bench.asked()) == 1


def test_renamed_and_changed(bench: Bench) -> None:
    bench.repo("ann/old", seed=1)
    bench.sync("ann/old")
    shutil.rmtree(bench.folder / "hub/ann/old")
    bench.repo("bob/new", seed=2)
    bench.hub.renames["ann/old"] = "bob/new"
    assert outcomes(bench.sync("ann/old")) == {"bob/new": "updated"}
    assert bench.rows() == {"bob/new": ("ready", "")}
    assert bench.state("bob/new").author == "bob"


def test_renamed_to_an_id_that_the_catalog_already_holds(bench: Bench) -> None:
    bench.repo("ann/old", seed=1)
    bench.repo("ann/new", seed=2)
    bench.sync("ann/old", "ann/new")
    shutil.rmtree(bench.folder / "hub/ann/old")
    bench.hub.renames["ann/old"] = "ann/new"
    assert outcomes(bench.sync("ann/old", "ann/new")) == {"ann/old": "updated", "ann/new": "unchanged"}
    assert bench.rows() == {"ann/new": ("ready", "")}
    with bench.store.read() as session:
        gone = session.scalars(select(Adapter).where(Adapter.current.is_(False))).one()
    assert (gone.status, gone.reason) == ("missing", "renamed to ann/new")


def test_unknown_old_name_is_followed(bench: Bench) -> None:
    bench.repo("ann/new")
    bench.hub.renames["ann/old"] = "ann/new"
    summary = bench.sync("ann/old")
    assert outcomes(summary) == {"ann/new": "added"}
    assert reasons(summary) == "renamed from ann/old"


def test_paths_that_leave_the_repository_are_never_written(bench: Bench) -> None:
    bench.repo("ann/one")
    repo = bench.hub.shelf.get("ann/one")
    assert repo is not None
    entries = [file.tree_entry() for file in repo.files.values()]
    evil = [{**entry, "path": f"../../evil/{entry['path']}"} for entry in entries]
    evil += [{**entry, "path": f"/evil-elsewhere/{entry['path']}"} for entry in entries]
    bench.hub.faults.add(Fault("/tree/", status=200, body=json.dumps(entries + evil).encode()))
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "added"}
    assert not any("evil" in entry for entry in bench.asked())
    assert list(bench.folder.rglob("*evil*")) == []
    bench.hub.faults.clear()
    bench.hub.faults.add(Fault("/tree/", status=200, body=json.dumps(evil).encode()))
    bench.repo("ann/two")
    summary = bench.sync("ann/two")
    assert outcomes(summary) == {"ann/two": "unsupported"}
    assert "8 unsafe paths ignored" in reasons(summary)
    assert not Path("/evil-elsewhere").exists()


def test_malformed_entries_of_a_listing_cost_only_themselves(bench: Bench) -> None:
    for name in ("one", "two"):
        bench.repo(f"ann/{name}")
    good = [bench.hub.shelf.get(f"ann/{name}") for name in ("one", "two")]
    items = [repo.info(False) for repo in good if repo]
    odd = [
        {**items[0], "lastModified": "yesterday", "downloads": "many", "cardData": {"ignore_metadata_errors": 1}},
        {key: value for key, value in items[1].items() if key != "id"},
        {**items[1], "id": "ann/three", "sha": None},
        "text",
        {**items[1], "likes": -1, "tags": 3},
    ]
    bench.hub.faults.add(Fault("/api/models[?]", status=200, body=json.dumps(odd).encode()))
    summary = bench.sync(author="ann")
    assert outcomes(summary) == {"ann/one": "added", "ann/two": "added", "ann/three": "failed", "an item": "failed"}
    assert not summary.ok
    row = bench.adapter("ann/one")
    assert row.downloads is None
