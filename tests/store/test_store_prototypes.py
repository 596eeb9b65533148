from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from hub_router.errors import NotInCatalogError, StaleFeaturesError
from hub_router.records import AdapterFacts, AdapterRecord
from hub_router.store.prototypes import (
    find_prototypes,
    list_prototypes,
    load_prototypes,
    save_prototypes,
    served_by_name,
    served_by_weights,
)
from hub_router.store.repos import AdapterFields, RepoFields, mark_unavailable, save_adapter
from hub_router.store.rows import records
from hub_router.store.session import Store
from hub_router.store.tables import Adapter

Members = list[tuple[AdapterRecord, dict[str, np.ndarray]]]


@pytest.fixture
def members(store: Store, add_adapter: Any) -> Members:
    generator = np.random.default_rng(0)
    with store.write() as session:
        ids = [add_adapter(session, f"org/{name}", weights_hash=f"w-{name}") for name in ("a", "b")]
        return [
            (record, {module: generator.standard_normal(width).astype(np.float32) for module, width in widths})
            for record, widths in zip(
                records(session, ids).values(), [[("m1", 3), ("m0", 5)], [("m0", 5)]], strict=True
            )
        ]


def save(store: Store, name: str, members: Members, **given: Any) -> int:
    with store.write() as session:
        return save_prototypes(session, name, method="maple", base_model="org/base", members=members, **given)


def test_versions_count_up_and_keep_their_vectors(store: Store, members: Members) -> None:
    assert save(store, "flan", members, hyperparameters={"steps": 10}, metrics={"loss": 0.5}) == 1
    assert save(store, "other", members) == 1
    doubled = [(record, {module: 2 * vector for module, vector in vectors.items()}) for record, vectors in members]
    assert save(store, "flan", doubled[:1], parent=("flan", 1)) == 2
    with store.read() as session:
        first = load_prototypes(session, "flan", 1)
        newest = load_prototypes(session, "flan")
    assert [record.ref for record, _ in first.members] == ["org/a", "org/b"]
    for (_, found), (_, given) in zip(first.members, members, strict=True):
        assert list(found) == sorted(given)
        for module, vector in given.items():
            assert found[module].dtype == np.float32
            np.testing.assert_array_equal(found[module], vector)
    np.testing.assert_array_equal(newest.members[0][1]["m0"], 2 * members[0][1]["m0"])
    assert (newest.summary.version, newest.summary.parent) == (2, ("flan", 1))
    assert (first.summary.hyperparameters, first.summary.metrics) == ({"steps": 10}, {"loss": 0.5})


def test_list(store: Store, members: Members) -> None:
    for name in ("flan", "flan", "aaa"):
        save(store, name, members)
    save(store, "empty", [])
    with store.read() as session:
        listed = list_prototypes(session)
    assert [(entry.name, entry.version, entry.adapters, entry.vectors) for entry in listed] == [
        ("aaa", 1, 2, 3),
        ("empty", 1, 0, 0),
        ("flan", 1, 2, 3),
        ("flan", 2, 2, 3),
    ]
    assert {(entry.method, entry.base_model, entry.parent) for entry in listed} == {("maple", "org/base", None)}


def test_changed_weights_are_refused_by_name(store: Store, members: Members) -> None:
    save(store, "flan", members)
    save(store, "only b", members[1:])
    with store.write() as session:
        session.execute(update(Adapter).where(Adapter.id == members[0][0].id).values(weights_hash="new"))
    with store.read() as session:
        with pytest.raises(StaleFeaturesError, match=r"'flan' version 1 was made for other weights of: org/a;"):
            load_prototypes(session, "flan")
        assert len(load_prototypes(session, "only b").members) == 1


def test_adapter_of_a_set_cannot_be_deleted(store: Store, members: Members) -> None:
    save(store, "flan", members)
    with pytest.raises(IntegrityError), store.write() as session:
        session.delete(session.get_one(Adapter, members[0][0].id))


def test_unknown_names_and_versions(store: Store, members: Members) -> None:
    save(store, "flan", members)
    save(store, "flan", members)
    with store.write() as session:
        with pytest.raises(NotInCatalogError, match="has no version 7; it has: 1, 2"):
            load_prototypes(session, "flan", 7)
        with pytest.raises(NotInCatalogError, match="no prototype set 'flam' among 1; closest: flan"):
            load_prototypes(session, "flam")
        with pytest.raises(NotInCatalogError, match="no version 3"):
            save_prototypes(session, "x", method="m", base_model="b", members=[], parent=("flan", 3))


def test_what_a_set_was_made_from_is_kept(store: Store, members: Members) -> None:
    save(store, "flan", members, parent_method="arrow", data_hash="d" * 64, seed=7)
    save(store, "flan", members, parent=("flan", 1))
    with store.read() as session:
        first, second = list_prototypes(session)
        assert (first.ref, first.origin, first.parent) == ("flan@1", "arrow", None)
        assert (first.data_hash, first.seed, first.stale) == ("d" * 64, 7, ())
        assert (second.origin, second.parent_method, second.data_hash, second.seed) == ("flan@1", "", "", None)
        summary, found = find_prototypes(session, "flan", 1)
        record = load_prototypes(session, "flan", 1)
    assert summary == first == record.summary
    assert [(one.adapter.ref, one.weights_hash, one.vectors, one.stale) for one in found] == [
        ("org/a", "w-a", 2, False),
        ("org/b", "w-b", 1, False),
    ]
    assert record.made_for == {one.adapter.id: one.weights_hash for one in found}


def sync_again(store: Store, repo_id: str, revision: str, weights_hash: str) -> int:
    """What sync writes for a new revision of an adapter."""
    facts = AdapterFacts("LORA", "org/base", (), ("float32",), 1, 2, weights_hash)
    with store.write() as session:
        fields = AdapterFields(subfolder="", path="/data", facts=facts)
        return save_adapter(session, RepoFields("hub", repo_id, revision), fields)


def test_a_new_revision_with_other_weights_makes_a_set_stale(store: Store, members: Members) -> None:
    save(store, "flan", members)
    save(store, "only b", members[1:])
    before = members[0][0].id
    assert sync_again(store, "org/a", "b" * 40, "w-a") == before
    with store.read() as session:
        assert len(load_prototypes(session, "flan").members) == 2
    assert sync_again(store, "org/a", "c" * 40, "new") != before
    with store.read() as session:
        with pytest.raises(StaleFeaturesError, match=r"'flan' version 1 was made for other weights of: org/a;"):
            load_prototypes(session, "flan")
        record = load_prototypes(session, "flan", stale=True)
        assert [entry.stale for entry in list_prototypes(session)] == [("org/a",), ()]
        summary, found = find_prototypes(session, "flan")
    assert summary.stale == record.summary.stale == ("org/a",)
    assert [(one.weights_hash, one.stale) for one in found] == [("w-a", True), ("w-b", False)]
    for (_, given), (_, kept) in zip(members, record.members, strict=True):
        for module, vector in given.items():
            np.testing.assert_array_equal(kept[module], vector)
    assert sync_again(store, "org/a", "b" * 40, "w-a") == before
    with store.read() as session:
        assert load_prototypes(session, "flan").summary.stale == ()


def test_an_adapter_that_is_gone_or_unusable(store: Store, members: Members) -> None:
    save(store, "flan", members)
    with store.write() as session:
        mark_unavailable(session, "hub", "org/a", "gated", "accept its licence")
    with store.read() as session:
        assert load_prototypes(session, "flan").summary.stale == ()
    with store.write() as session:
        save_adapter(
            session, RepoFields("hub", "org/b", "d" * 40), AdapterFields("", "/data", reason="unsupported: no")
        )
    with store.read() as session:
        assert list_prototypes(session)[0].stale == ("org/b",)


def test_adapters_by_weights_and_by_name(store: Store, add_adapter: Any) -> None:
    with store.write() as session:
        ids = [
            add_adapter(session, "org/x", weights_hash="same", status="missing"),
            add_adapter(session, "org/y", "sub", weights_hash="same"),
            add_adapter(session, "org/y", "old", weights_hash="gone", current=False),
        ]
        found = served_by_weights(session, ["same", "gone", "never", "same"])
        assert {key: [record.id for record in rows] for key, rows in found.items()} == {"same": [ids[1], ids[0]]}
        named = served_by_name(session, ["org/y/sub", "org/x", "org/y", "org/y/old", "x"])
        assert {name: record.id for name, record in named.items()} == {"org/x": ids[0], "org/y/sub": ids[1]}
        many = served_by_weights(session, [f"h{number}" for number in range(2000)] + ["same"])
        assert list(many) == ["same"]
