"""What sync writes, row by row, in a real database."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial

import pytest
from sqlalchemy import select

from hub_router.records import AdapterFacts, BaseModel, ModuleFacts, Sample
from hub_router.store.known import known_repos, local_adapters_under, repos_of_author, repos_of_base_model
from hub_router.store.repos import (
    AdapterFields,
    FileFields,
    RepoFields,
    finish_repo,
    mark_failed,
    mark_unavailable,
    refresh_repos,
    rename_repo,
    retire_adapters,
    save_adapter,
)
from hub_router.store.runs import Outcome, add_outcomes, finish_run, start_run
from hub_router.store.session import Store
from hub_router.store.tables import Adapter, AdapterLabel, AdapterSample, Repo, SyncOutcome, SyncRun


def facts(weights_hash: str = "w1", target: str = "q_proj") -> AdapterFacts:
    module = ModuleFacts(f"model.layers.0.self_attn.{target}", 4, 8, 8, 2.0)
    return AdapterFacts("LORA", "a/base", (module,), ("float32",), 64, 256, weights_hash, notes=("read",))


def repo(revision: str = "r1", repo_id: str = "ann/one", **changes: object) -> RepoFields:
    return RepoFields("hub", repo_id, revision, **changes)  # type: ignore[arg-type]


def adapter(weights_hash: str = "w1", subfolder: str = "", **changes: object) -> AdapterFields:
    known = {"facts": facts(weights_hash), "base_model": BaseModel("a/base", "high", ("stated",)), **changes}
    return AdapterFields(subfolder, f"/cache/{weights_hash}", **known)  # type: ignore[arg-type]


def save(store: Store, fields: RepoFields, *adapters: AdapterFields) -> list[int]:
    with store.write() as session:
        ids = [save_adapter(session, fields, entry) for entry in adapters]
        finish_repo(session, fields, "ok")
        return ids


def current(store: Store) -> dict[str, tuple[str, str]]:
    with store.read() as session:
        rows = session.scalars(select(Adapter).where(Adapter.current))
        return {row.subfolder: (row.revision, row.status) for row in rows}


def test_details_are_replaced_not_added_to(store: Store) -> None:
    samples = (Sample("a", "b"), Sample("c", "d", "test", "test.jsonl"), Sample("e", "f"))
    files = (FileFields("README.md", 3, "s", "h"),)
    first = adapter(tags=("x", "y"), datasets=("glue",), samples=samples, files=files)
    [old] = save(store, repo(), first)
    [new] = save(store, repo("r2"), adapter(tags=("y",), notes=("more",)))
    assert new == old
    with store.read() as session:
        labels = {(row.kind, row.value) for row in session.scalars(select(AdapterLabel))}
        assert labels == {("tag", "y"), ("target", "q_proj")}
        assert list(session.scalars(select(AdapterSample))) == []
        row = session.get_one(Adapter, new)
        assert (row.notes, row.rank_min, row.rank_max) == (["read", "more"], 4, 4)


def test_positions_of_samples_count_within_their_split(store: Store) -> None:
    save(store, repo(), adapter(samples=(Sample("a", "b"), Sample("c", "d", "test", "t"), Sample("e", "f"))))
    with store.read() as session:
        rows = session.execute(select(AdapterSample.split, AdapterSample.position, AdapterSample.input))
        assert sorted(map(tuple, rows)) == [("sample", 0, "a"), ("sample", 1, "e"), ("test", 0, "c")]


def test_other_weights_make_a_new_row(store: Store) -> None:
    [old] = save(store, repo(), adapter("w1"))
    [new] = save(store, repo("r2"), adapter("w2"))
    assert new != old
    assert current(store) == {"": ("r2", "ready")}


def test_unusable_adapter_has_its_reason_and_no_ranks(store: Store) -> None:
    save(store, repo(), AdapterFields("", "", reason="no weights"))
    with store.read() as session:
        row = session.scalars(select(Adapter)).one()
    assert (row.status, row.reason, row.ranks, row.rank_min, row.weights_hash) == (
        "unsupported",
        "no weights",
        [],
        None,
        "",
    )


def test_repository_is_settled_only_by_its_end(store: Store) -> None:
    fields = repo(requested_revision="v1", subfolders=("x",))
    with store.write() as session:
        save_adapter(session, fields, adapter(subfolder="x"))
    with store.read() as session:
        known = known_repos(session, "hub", ["ann/one", "ann/none"])["ann/one"]
    assert (known.revision, known.state, known.requested_subfolders) == (None, "failed", ())
    with store.write() as session:
        finish_repo(session, fields, "ok")
    with store.read() as session:
        known = known_repos(session, "hub", ["ann/one"])["ann/one"]
    assert (known.revision, known.state, known.requested_subfolders) == ("r1", "ok", ("x",))
    assert known.requested_revision == "v1"
    with store.write() as session:
        finish_repo(session, repo("r2"), "failed", "down")
    with store.read() as session:
        known = known_repos(session, "hub", ["ann/one"])["ann/one"]
    assert (known.revision, known.state, known.reason) == ("r1", "failed", "down")


@pytest.mark.parametrize("state", ["missing", "gated"])
def test_unavailable_repository_takes_its_adapters_along(store: Store, state: str) -> None:
    save(store, repo(), adapter("w1", "x"), adapter("w2", "y"))
    with store.write() as session:
        mark_unavailable(session, "hub", "ann/one", state, "why")
        mark_failed(session, "hub", "ann/one", "not asked")
    assert set(current(store).values()) == {("r1", state)}
    with store.read() as session:
        assert known_repos(session, "hub", ["ann/one"])["ann/one"].reason == "why"


def test_unknown_missing_repository_gets_no_row_but_a_gated_one_does(store: Store) -> None:
    with store.write() as session:
        mark_unavailable(session, "hub", "ann/typo", "missing", "why")
        mark_unavailable(session, "hub", "ann/closed", "gated", "why")
        mark_failed(session, "hub", "ann/other", "why")
    with store.read() as session:
        assert [row.repo_id for row in session.scalars(select(Repo))] == ["ann/closed"]


def test_retired_adapters_only(store: Store) -> None:
    save(store, repo(), adapter("w1", "x"), adapter("w2", "y"))
    with store.write() as session:
        retire_adapters(session, "hub", "ann/one", ["y"], "gone")
        retire_adapters(session, "hub", "ann/none", ["y"], "gone")
    assert current(store) == {"x": ("r1", "ready"), "y": ("r1", "missing")}


def test_rename_moves_everything_once(store: Store) -> None:
    [kept] = save(store, repo(requested_revision="v1"), adapter())
    rename = partial(rename_repo, old="ann/one", new="bob/two")
    with store.write() as session:
        assert rename(session)
        assert not rename(session)
        assert not rename_repo(session, "ann/none", "bob/two")
    with store.read() as session:
        rows = known_repos(session, "hub", ["ann/one", "bob/two"])
        assert session.get_one(Adapter, kept).repo.repo_id == "bob/two"
        assert [entry.repo_id for entry in repos_of_author(session, "BOB")] == ["bob/two"]
        assert repos_of_author(session, "ann") == []
    assert (rows["ann/one"].state, rows["ann/one"].renamed_to, rows["ann/one"].adapters) == ("renamed", "bob/two", ())
    assert (rows["bob/two"].state, rows["bob/two"].revision, rows["bob/two"].requested_revision) == ("ok", "r1", "v1")


def test_refresh_updates_counts_and_forgives_a_failed_look(store: Store) -> None:
    fields = repo(downloads=1, likes=2)
    [pk] = save(store, fields, adapter())
    with store.write() as session:
        mark_failed(session, "hub", "ann/one", "down")
    with store.read() as session:
        known = known_repos(session, "hub", ["ann/one"])
    with store.write() as session:
        refresh_repos(session, [repo(downloads=5, likes=None)], known)
        refresh_repos(session, [], {})
    with store.read() as session:
        row = session.get_one(Adapter, pk)
        assert (row.downloads, row.likes) == (5, None)
        assert known_repos(session, "hub", ["ann/one"])["ann/one"].state == "ok"


def test_lookups_by_base_model_and_folder(store: Store) -> None:
    save(store, repo(), adapter())
    save(store, repo(repo_id="ann/two"), adapter("w9", base_model=BaseModel("a/other", "high")))
    for path in ("/data/many/x", "/data/many/y/z", "/data/manyx"):
        save(store, RepoFields("local", path, "r"), adapter(path))
    with store.read() as session:
        assert [row.repo_id for row in repos_of_base_model(session, "A/Base")] == ["ann/one"]
        found = {row.repo_id for row in local_adapters_under(session, "/data/many")}
        assert found == {"/data/many/x", "/data/many/y/z"}
        assert [row.repo_id for row in local_adapters_under(session, "/data/many/x")] == ["/data/many/x"]
        assert {row.repo_id for row in local_adapters_under(session, "/")} == found | {"/data/manyx"}


def test_many_repositories_are_looked_up_in_portions(store: Store) -> None:
    with store.write() as session:
        for number in range(1200):
            session.add(Repo(source="hub", repo_id=f"ann/{number}", state="ok"))
    with store.read() as session:
        assert len(known_repos(session, "hub", [f"ann/{number}" for number in range(2000)])) == 1200


def test_record_of_a_run(store: Store) -> None:
    with store.write() as session:
        run_id = start_run(session, {"targets": ["a/b"]})
        add_outcomes(session, run_id, [])
        add_outcomes(session, run_id, [Outcome("hub", "a/b", "x", "r1", "added", "")])
    with store.read() as session:
        assert session.get_one(SyncRun, run_id).finished_at is None
        assert session.scalars(select(SyncOutcome)).one().subfolder == "x"
    with store.write() as session:
        finish_run(session, run_id)
    with store.read() as session:
        finished = session.get_one(SyncRun, run_id).finished_at
        assert finished is not None
        assert finished.replace(tzinfo=UTC) <= datetime.now(UTC)
