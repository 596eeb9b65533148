from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from hub_router.errors import NotInCatalogError, StaleFeaturesError
from hub_router.records import AdapterRecord
from hub_router.store.prototypes import list_prototypes, load_prototypes, save_prototypes
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
