"""What a run does when the Hub behaves: every kind of target, incremental runs, and what changes between runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select
from sync_world import CARD, Bench, outcomes, reasons, write_adapter

from hub_router.demo.hubfaults import Fault
from hub_router.errors import MissingError, SettingsError, UnreachableError
from hub_router.lora.facts import inspect
from hub_router.store.tables import (
    Adapter,
    AdapterFile,
    AdapterLabel,
    AdapterSample,
    Composition,
    CompositionMember,
    SyncOutcome,
    SyncRun,
)
from hub_router.sync.run import SyncRequest, sync


def test_adapter_is_stored_with_everything_its_files_say(bench: Bench) -> None:
    folder = bench.repo("ann/sst2", rank=3)
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "test.jsonl").write_text('{"input": "held out", "output": "bad"}\n')
    summary = bench.sync("ann/sst2")
    assert outcomes(summary) == {"ann/sst2": "added"}
    row = bench.adapter("ann/sst2")
    repo = bench.hub.shelf.get("ann/sst2")
    assert repo is not None
    assert row.revision == repo.sha == bench.state("ann/sst2").revision
    assert (row.status, row.licence, row.base_model, row.base_model_resolved) == (
        "ready",
        "mit",
        "owner/base",
        "owner/base",
    )
    assert (row.ranks, row.module_count, row.parameters) == ([3], 2, 2 * 2 * 3 * 8)
    assert (row.downloads, row.likes) == (repo.info(False)["downloads"], repo.info(False)["likes"])
    with bench.store.read() as session:
        labels = {(row.kind, row.value) for row in session.execute(select(AdapterLabel.kind, AdapterLabel.value))}
        files = {file.path: file for file in session.scalars(select(AdapterFile))}
        samples = list(session.execute(select(AdapterSample.split, AdapterSample.position, AdapterSample.input)))
        text = session.scalars(select(Adapter.card_text)).one()
    assert labels == {
        ("base_model", "card owner/base"),
        *(("tag", value) for value in ("demo", "sst2")),
        ("dataset", "glue"),
        *(("target", value) for value in ("q_proj", "v_proj")),
    }
    assert set(files) == {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "samples.jsonl", "test.jsonl")
    }
    assert files["adapter_model.safetensors"].hub_hash == files["adapter_model.safetensors"].sha256
    assert files["README.md"].hub_hash == repo.files["README.md"].git_oid
    assert samples == [
        *(("sample", number, f"review {number}") for number in range(3)),
        ("test", 0, "held out"),
    ]
    assert text == "# Sentiment\n\nFinds moods."
    cached = Path(row.path)
    assert cached.is_relative_to(bench.folder / "cache" / "models--ann--sst2" / "snapshots" / row.revision)
    assert not (cached / "training_args.bin").exists()


def test_second_run_costs_one_request_per_page(bench: Bench) -> None:
    for number in range(7):
        bench.repo(f"ann/task{number}", seed=number)
    bench.hub.page_size = 3
    assert bench.sync(author="ann").counts["added"] == 7
    bench.asked()
    again = bench.sync(author="ann")
    assert set(outcomes(again).values()) == {"unchanged"}
    assert len(again.outcomes) == 7
    assert again.requests == 3
    assert [entry.split("?")[0] for entry in bench.asked()] == ["GET /api/models"] * 3


def test_by_base_model(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.repo("bob/two")
    bench.repo("bob/other", card=CARD.replace("owner/base", "owner/else"))
    (bench.folder / "hub/owner/base").mkdir(parents=True)
    (bench.folder / "hub/owner/base/README.md").write_text("---\nbase_model: owner/base\n---\n")
    assert outcomes(bench.sync(base_model="owner/base")) == {"ann/one": "added", "bob/two": "added"}
    bench.asked()
    assert bench.sync(base_model="owner/base").requests == 1


def test_explicit_ids_of_one_author_are_read_from_its_listing(bench: Bench) -> None:
    ids = [f"ann/task{number}" for number in range(6)]
    for repo_id in ids:
        bench.repo(repo_id)
    bench.sync(*ids)
    bench.asked()
    assert bench.sync(*ids).requests == 1
    assert bench.sync(*ids[:3]).requests == 3


def test_listing_of_a_prolific_author_is_not_read_to_its_end(bench: Bench) -> None:
    for number in range(12):
        bench.repo(f"ann/task{number}", seed=number)
    repos = [repo for number in range(12) if (repo := bench.hub.shelf.get(f"ann/task{number}"))]
    last = sorted(repos, key=lambda repo: int(str(repo.info(False)["downloads"])))[:4]
    bench.hub.page_size = 1
    bench.sync(*(repo.id for repo in last))
    bench.asked()
    assert set(outcomes(bench.sync(*(repo.id for repo in last))).values()) == {"unchanged"}
    asked = bench.asked()
    assert sum(entry.startswith("GET /api/models?") for entry in asked) == 4
    assert len(asked) == 8


def test_subfolder_and_later_another_one(bench: Bench) -> None:
    for name in ("x", "y", "z"):
        bench.repo(f"ann/many/{name}", seed=ord(name))
    assert outcomes(bench.sync("ann/many/x")) == {"ann/many/x": "added"}
    assert outcomes(bench.sync("ann/many/y")) == {"ann/many/y": "added"}
    bench.asked()
    assert outcomes(bench.sync("ann/many/x", "ann/many/y")) == {"ann/many/x": "unchanged", "ann/many/y": "unchanged"}
    assert len(bench.asked()) == 1
    assert outcomes(bench.sync("ann/many"))["ann/many/z"] == "added"
    assert set(bench.rows()) == {"ann/many/x", "ann/many/y", "ann/many/z"}


def test_subfolder_without_adapter_is_missing_and_stays_so_without_requests(bench: Bench) -> None:
    bench.repo("ann/many/x")
    first = bench.sync("ann/many/nothing")
    assert outcomes(first) == {"ann/many/nothing": "missing"}
    assert reasons(first) == "no adapter in folder nothing"
    bench.asked()
    assert outcomes(bench.sync("ann/many/nothing")) == {"ann/many/nothing": "missing"}
    assert len(bench.asked()) == 1


def test_adapter_of_a_subfolder_takes_what_its_card_lacks_from_the_top(bench: Bench) -> None:
    folder = bench.repo("ann/many/x", card="# Only prose")
    (folder.parent / "README.md").write_text("---\nlicense: apache-2.0\n---\nAll of them.")
    bench.sync("ann/many")
    assert bench.adapter("ann/many", "x").licence == "apache-2.0"


def test_adapter_beside_a_full_model_leaves_the_model_alone(bench: Bench) -> None:
    folder = bench.repo("ann/both")
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "config.json").write_text("{}")
    assert outcomes(bench.sync("ann/both")) == {"ann/both": "added"}
    assert not any("/model.safetensors" in entry for entry in bench.asked())


def test_full_model_is_unsupported_and_not_looked_at_again(bench: Bench) -> None:
    folder = bench.folder / "hub/ann/full"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(1000))
    first = bench.sync(author="ann")
    assert outcomes(first) == {"ann/full": "unsupported"}
    assert reasons(first) == "no adapter_config.json (1 files), found a full model (model.safetensors)"
    bench.asked()
    again = bench.sync(author="ann")
    assert outcomes(again) == {"ann/full": "unsupported"}
    assert reasons(again) == "no adapter_config.json (1 files), found a full model (model.safetensors)"
    assert len(bench.asked()) == 1
    write_adapter(folder)
    assert outcomes(bench.sync(author="ann")) == {"ann/full": "added"}


def test_broken_adapters_are_unsupported_with_their_reason_and_the_rest_is_added(bench: Bench) -> None:
    bench.repo("ann/good")
    (bench.repo("ann/garbage") / "adapter_config.json").write_text('{"peft": {"task_type": "classification"}}')
    (bench.repo("ann/noise") / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    (bench.repo("ann/bare") / "adapter_model.safetensors").unlink()
    config = bench.repo("ann/prompt") / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "PROMPT_TUNING"}))
    summary = bench.sync(author="ann")
    assert outcomes(summary) == {
        "ann/good": "added",
        **dict.fromkeys(("ann/garbage", "ann/noise", "ann/bare", "ann/prompt"), "unsupported"),
    }
    assert all(line.reason for line in summary.outcomes if line.outcome == "unsupported")
    assert summary.ok
    bench.asked()
    assert outcomes(bench.sync(author="ann")) == outcomes(summary) | {"ann/good": "unchanged"}
    assert len(bench.asked()) == 1


def test_changed_weights_make_a_new_row_and_the_old_one_is_kept(bench: Bench) -> None:
    bench.repo("ann/one", seed=1)
    bench.sync("ann/one")
    old = bench.adapter("ann/one")
    bench.repo("ann/one", seed=2)
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "updated"}
    new = bench.adapter("ann/one")
    assert new.id != old.id
    assert new.weights_hash != old.weights_hash
    with bench.store.read() as session:
        kept = session.get_one(Adapter, old.id)
        assert (kept.current, kept.status, kept.revision) == (False, "ready", old.revision)
    assert inspect(Path(old.path)).weights_hash == old.weights_hash


def test_changed_card_keeps_the_row_and_what_belongs_to_it(bench: Bench) -> None:
    folder = bench.repo("ann/one")
    bench.sync("ann/one")
    old = bench.adapter("ann/one")
    with bench.store.write() as session:
        member = CompositionMember(position=0, adapter_id=old.id, name="one", weights_hash=old.weights_hash)
        session.add(Composition(name="c", base_model="owner/base", method="arrow", members=[member]))
    (folder / "README.md").write_text(CARD.replace("MIT", "apache-2.0").replace("moods", "feelings"))
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "updated"}
    new = bench.adapter("ann/one")
    assert (new.id, new.licence) == (old.id, "apache-2.0")
    assert new.revision != old.revision
    assert new.revision in new.path


def test_return_to_an_earlier_revision(bench: Bench) -> None:
    bench.repo("ann/one", seed=1)
    bench.sync("ann/one")
    first = bench.adapter("ann/one")
    bench.repo("ann/one", seed=2)
    bench.sync("ann/one")
    bench.repo("ann/one", seed=1)
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "updated"}
    assert bench.adapter("ann/one").id == first.id


def test_adapter_that_left_its_repository_is_missing(bench: Bench) -> None:
    bench.repo("ann/many/x")
    bench.repo("ann/many/y")
    bench.sync("ann/many")
    shutil.rmtree(bench.folder / "hub/ann/many/y")
    summary = bench.sync("ann/many")
    assert outcomes(summary) == {"ann/many/x": "updated", "ann/many/y": "missing"}
    assert bench.rows()["ann/many/y"][0] == "missing"
    assert "no longer in the repository" in bench.rows()["ann/many/y"][1]
    assert outcomes(bench.sync("ann/many")) == {"ann/many/x": "unchanged"}


def test_revision_by_branch_commit_and_request(bench: Bench) -> None:
    bench.repo("ann/one", seed=1)
    write_adapter(bench.folder / "hub/ann/one@v1", seed=2)
    main, branch = (bench.hub.shelf.get("ann/one", name) for name in ("main", "v1"))
    assert main and branch
    bench.sync("ann/one@v1")
    assert bench.adapter("ann/one").revision == branch.sha
    assert bench.state("ann/one").requested_revision == "v1"
    bench.sync(f"ann/one@{main.sha}")
    assert bench.adapter("ann/one").revision == main.sha
    bench.sync("ann/one", revision="v1")
    assert bench.adapter("ann/one").revision == branch.sha
    bench.sync("ann/one")
    assert bench.adapter("ann/one").revision == main.sha


def test_revision_that_does_not_exist_changes_nothing(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.sync("ann/one")
    summary = bench.sync("ann/one@nope")
    assert outcomes(summary) == {"ann/one": "missing"}
    assert reasons(summary) == "no such revision: nope"
    assert bench.rows() == {"ann/one": ("ready", "")}


def test_wider_request_cut_short_is_not_taken_for_done(bench: Bench) -> None:
    for name in ("x", "y/1", "y/2"):
        bench.repo(f"ann/many/{name}", seed=len(name))
    bench.sync("ann/many/x")
    bench.hub.faults.add(Fault("/y/2/adapter_model", status=503))
    assert outcomes(bench.sync("ann/many/y"))["ann/many/y/2"] == "failed"
    bench.hub.faults.clear()
    assert outcomes(bench.sync("ann/many/y")) == {
        "ann/many/y/1": "unchanged",
        "ann/many/y/2": "added",
    }


def test_listing_without_anything_is_an_error(bench: Bench) -> None:
    with pytest.raises(MissingError, match=r"no repository nobody/\.\.\."):
        bench.sync(author="nobody")
    with pytest.raises(MissingError, match="no adapter of owner/else"):
        bench.sync(base_model="owner/else")


def test_limit_takes_the_most_downloaded(bench: Bench) -> None:
    for number in range(5):
        bench.repo(f"ann/task{number}", seed=number)
    repos = [bench.hub.shelf.get(f"ann/task{number}") for number in range(5)]
    counts = {repo.id: int(str(repo.info(False)["downloads"])) for repo in repos if repo}
    best = sorted(counts, key=lambda name: counts[name], reverse=True)[:2]
    assert set(outcomes(bench.sync(author="ann", limit=2))) == set(best)
    bench.hub.page_size = 1
    assert set(outcomes(bench.sync(author="ann", limit=2))) == set(best)


def test_collection_by_list_gives_tasks_to_empty_cards_and_a_base_model(bench: Bench) -> None:
    folder = bench.repo("ann/one", card=None)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/data/llama"}))
    bench.repo("ann/two")
    path = bench.folder / "c.toml"
    path.write_text(
        'name = "c"\ntitle = "C"\ndescription = "d"\nbase_model = "owner/base"\nlicence = "unknown"\nconfidence = "A"\n'
        'repos = ["ann/one", "ann/two"]\n[tasks]\n"ann/one" = "moods of films"\n'
    )
    assert outcomes(bench.sync(collection=path)) == {"ann/one": "added", "ann/two": "added"}
    row = bench.adapter("ann/one")
    assert (row.base_model, row.base_model_resolved) == ("/data/llama", "owner/base")
    with bench.store.read() as session:
        assert session.scalars(select(Adapter.card_text).where(Adapter.id == row.id)).one() == "Task: moods of films"
    assert set(outcomes(bench.sync(collection=path, limit=1))) == {"ann/one"}


def test_collection_by_author_and_prefix(bench: Bench) -> None:
    for name in ("zoo-a", "zoo-b", "other"):
        bench.repo(f"ann/{name}")
    path = bench.folder / "c.toml"
    path.write_text(
        'name = "c"\ntitle = "C"\ndescription = "d"\nbase_model = "owner/base"\nlicence = "unknown"\nconfidence = "A"\n'
        'author = "ann"\nprefix = "zoo-"\n'
    )
    assert set(outcomes(bench.sync(collection=path))) == {"ann/zoo-a", "ann/zoo-b"}
    shutil.rmtree(bench.folder / "hub/ann/zoo-a")
    assert outcomes(bench.sync(collection=path)) == {"ann/zoo-a": "missing", "ann/zoo-b": "unchanged"}


def test_counts_of_the_hub_are_kept_up_to_date_on_unchanged_repositories(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.sync("ann/one")
    with bench.store.write() as session:
        session.get_one(Adapter, bench.adapter("ann/one").id).downloads = 0
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "unchanged"}
    repo = bench.hub.shelf.get("ann/one")
    assert repo and bench.adapter("ann/one").downloads == repo.info(False)["downloads"]


def test_files_lost_from_the_cache_are_fetched_again(bench: Bench) -> None:
    bench.repo("ann/one")
    bench.sync("ann/one")
    path = Path(bench.adapter("ann/one").path)
    shutil.rmtree(bench.folder / "cache")
    assert outcomes(bench.sync("ann/one")) == {"ann/one": "updated"}
    assert (path / "adapter_model.safetensors").exists()


def test_dry_run_downloads_and_writes_nothing(bench: Bench) -> None:
    bench.repo("ann/old")
    bench.repo("ann/same", seed=5)
    bench.sync(author="ann")
    bench.repo("ann/new")
    bench.repo("ann/old", seed=9)
    bench.asked()
    before = (bench.folder / "catalog.db").stat().st_mtime_ns, sorted((bench.folder / "cache").rglob("*"))
    summary = bench.sync(bench.folder / "hub/ann/new", author="ann", dry_run=True)
    assert outcomes(summary) == {
        "ann/new": "added",
        "ann/old": "updated",
        "ann/same": "unchanged",
        str(bench.folder / "hub/ann/new"): "added",
    }
    assert summary.dry_run
    assert summary.run_id is None
    assert not any("/resolve/" in entry for entry in bench.asked())
    assert ((bench.folder / "catalog.db").stat().st_mtime_ns, sorted((bench.folder / "cache").rglob("*"))) == before
    with bench.store.read() as session:
        assert len(list(session.scalars(select(SyncRun)))) == 1


def test_run_is_recorded_with_request_and_outcomes(bench: Bench) -> None:
    bench.repo("ann/one")
    summary = bench.sync("ann/one", "ann/none")
    with bench.store.read() as session:
        run = session.get_one(SyncRun, summary.run_id)
        lines = session.scalars(select(SyncOutcome).where(SyncOutcome.run_id == run.id))
        assert {(line.repo_id, line.outcome) for line in lines} == {("ann/one", "added"), ("ann/none", "missing")}
    assert run.finished_at is not None
    assert run.request["targets"] == ["ann/one", "ann/none"]
    data = json.loads(json.dumps(summary.as_dict()))
    names = ("added", "updated", "unchanged", "unsupported", "gated", "missing", "failed")
    assert data["counts"] == dict.fromkeys(names, 0) | {"added": 1, "missing": 1}
    assert data["outcomes"][1]["repo_id"] == "ann/one"


def test_malformed_requests_are_refused_before_anything_happens(bench: Bench) -> None:
    for asked, text in (
        ({}, "nothing to sync"),
        ({"author": "ann", "limit": 0}, "limit is 0"),
        ({"author": "ann", "workers": -1}, "workers is -1"),
    ):
        with pytest.raises(SettingsError, match=text):
            bench.sync(**asked)
    with pytest.raises(SettingsError, match="two revisions, v1 and v2"):
        bench.sync("ann/one@v1", "ann/one@v2")
    assert bench.asked() == []


def test_offline_is_one_clear_error_for_the_hub_and_none_for_folders(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = write_adapter(bench.folder / "mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE is set"):
        bench.sync("ann/one", local)
    assert outcomes(bench.sync(local)) == {str(local): "added"}
    assert bench.asked() == []


def test_inspect_that_breaks_costs_its_adapter_only(bench: Bench) -> None:
    bench.repo("ann/good")
    bench.repo("ann/odd", card=CARD + "odd")

    def fragile(path: Path) -> object:
        if "odd" in (path / "README.md").read_text():
            raise ZeroDivisionError("by zero")
        return inspect(path)

    request = SyncRequest(author="ann")
    summary = sync(bench.store, request, fragile, options=bench.options)  # type: ignore[arg-type]
    assert outcomes(summary) == {"ann/good": "added", "ann/odd": "failed"}
    assert reasons(summary).strip() == "ZeroDivisionError: by zero"
    assert outcomes(bench.sync(author="ann")) == {"ann/good": "unchanged", "ann/odd": "added"}


def test_one_worker_is_enough(bench: Bench) -> None:
    for number in range(5):
        bench.repo(f"ann/task{number}")
    assert bench.sync(author="ann", workers=1).counts["added"] == 5


def test_texts_of_a_config_that_no_database_holds(bench: Bench) -> None:
    folder = bench.repo("ann/one")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "a\0b\ud800"}))
    bench.sync("ann/one")
    assert bench.adapter("ann/one").base_model in ("a?b?", None)


def test_progress_is_reported_per_repository(bench: Bench) -> None:
    for number in range(3):
        bench.repo(f"ann/task{number}")
    bars: dict[str, list[int]] = {}

    class Bars:
        @contextmanager
        def task(self, label: str, total: int | None) -> Iterator[Callable[[int], None]]:
            steps = bars.setdefault(f"{label} {total}", [])
            yield steps.append

    sync(bench.store, SyncRequest(author="ann"), inspect, Bars(), options=replace(bench.options))
    assert {label: sum(steps) for label, steps in bars.items()} == {
        "Reading listings None": 0,
        "Reading folders 0": 0,
        "Checking repositories 3": 3,
        "Fetching adapters 3": 3,
    }


def test_named_folder_of_a_known_repository_is_all_that_is_reported_and_fetched(bench: Bench) -> None:
    for name in ("run", "other"):
        bench.repo(f"ann/many/{name}", seed=ord(name[0]))
    bench.sync("ann/many")
    assert outcomes(bench.sync("ann/many/zz")) == {"ann/many/zz": "missing"}
    for name in ("run", "other"):
        bench.repo(f"ann/many/{name}", seed=ord(name[0]) + 1)
    bench.asked()
    assert outcomes(bench.sync("ann/many/run")) == {"ann/many/run": "updated"}
    assert not any("/other/" in entry for entry in bench.asked())
    assert set(bench.rows().values()) == {("ready", "")}
    assert outcomes(bench.sync("ann/many")) == {
        "ann/many/run": "unchanged",
        "ann/many/other": "updated",
    }


def test_older_checkpoints_are_named_by_the_one_that_is_kept(bench: Bench) -> None:
    for step in (10, 9, 20):
        bench.repo(f"ann/run/out/checkpoint-{step}", seed=step)
    summary = bench.sync("ann/run")
    hint = "name one to sync it, or ask for all checkpoints"
    text = f"older checkpoints skipped: out/checkpoint-9, out/checkpoint-10; {hint}"
    assert outcomes(summary) == {"ann/run/out/checkpoint-20": "added"}
    assert reasons(summary) == text
    assert text in bench.adapter("ann/run", "out/checkpoint-20").notes
    assert outcomes(bench.sync("ann/run/out/checkpoint-9")) == {"ann/run/out/checkpoint-9": "added"}
    local = bench.sync(bench.folder / "hub/ann/run/out")
    assert reasons(local) == f"older checkpoints skipped: checkpoint-9, checkpoint-10; {hint}"
