from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from hub_router.errors import MethodError, NameTakenError, NotInCatalogError
from hub_router.store import compositions
from hub_router.store.session import Store
from hub_router.store.tables import Adapter, Composition, CompositionMember


@pytest.fixture
def three(store: Store, add_adapter: Any) -> list[int]:
    with store.write() as session:
        return [add_adapter(session, f"org/{name}", weights_hash=f"w-{name}") for name in ("a", "b", "c")]


def save(store: Store, name: str, members: list[tuple[str, int, str]], **changed: Any) -> None:
    given: dict[str, Any] = {"base_model": "org/base", "method": "arrow", "hyperparameters": {"top_k": 4}}
    with store.write() as session:
        compositions.save(session, name, members=members, **(given | changed))


def test_order_names_and_settings_survive(store: Store, three: list[int]) -> None:
    a, b, c = three
    settings = {"top_k": 4, "temperature": 0.5, "merge": "output", "flags": [True, None]}
    save(store, "pool", [("z", c, "w-c"), ("y", a, "w-a"), ("x", b, "w-b")], hyperparameters=settings)
    with store.read() as session:
        found = compositions.load(session, "pool")
    assert (found.name, found.base_model, found.method) == ("pool", "org/base", "arrow")
    assert found.hyperparameters == settings
    assert [(member.name, member.adapter.id, member.weights_hash) for member in found.members] == [
        ("z", c, "w-c"),
        ("y", a, "w-a"),
        ("x", b, "w-b"),
    ]
    assert found.members[0].adapter.ref == "org/c"


def test_readable_in_the_transaction_that_saves(store: Store, three: list[int]) -> None:
    with store.write() as session:
        compositions.save(
            session, "p", base_model="b", method="m", hyperparameters={}, members=[("a", three[0], "w-a")]
        )
        assert [member.name for member in compositions.load(session, "p").members] == ["a"]
        compositions.save(
            session, "p", base_model="b", method="m", hyperparameters={}, members=[("b", three[1], "w-b")], replace=True
        )
        assert [member.name for member in compositions.load(session, "p").members] == ["b"]


def test_taken_name(store: Store, three: list[int]) -> None:
    save(store, "pool", [("a", three[0], "w-a"), ("b", three[1], "w-b")])
    with pytest.raises(NameTakenError, match=r"'pool' exists \(method arrow, base org/base\).*--replace"):
        save(store, "pool", [("c", three[2], "w-c")], method="spectr")
    with store.read() as session:
        assert [member.name for member in compositions.load(session, "pool").members] == ["a", "b"]


def test_replacing_reuses_names_and_places(store: Store, three: list[int]) -> None:
    a, b, c = three
    save(store, "pool", [("a", a, "w-a"), ("b", b, "w-b"), ("c", c, "w-c")])
    with store.read() as session:
        before = session.scalars(select(Composition)).one()
    save(store, "pool", [("c", a, "w-a"), ("a", b, "w-b")], method="spectr", hyperparameters={}, replace=True)
    with store.read() as session:
        (found,) = compositions.list_all(session)
        after = session.scalars(select(Composition)).one()
        assert len(session.scalars(select(CompositionMember)).all()) == 2
    assert (found.method, found.hyperparameters) == ("spectr", {})
    assert [(member.name, member.adapter.id) for member in found.members] == [("c", a), ("a", b)]
    assert after.created_at == before.created_at
    assert after.updated_at > before.updated_at


def test_replace_of_nothing_saves(store: Store, three: list[int]) -> None:
    save(store, "pool", [("a", three[0], "w-a")], replace=True)
    with store.read() as session:
        assert compositions.load(session, "pool").members[0].name == "a"


def test_member_keeps_the_weights_it_was_composed_with(store: Store, three: list[int]) -> None:
    save(store, "pool", [("a", three[0], "w-a")])
    with store.write() as session:
        changed = update(Adapter).where(Adapter.id == three[0])
        session.execute(changed.values(weights_hash="new", current=False, status="missing"))
    with store.read() as session:
        (member,) = compositions.load(session, "pool").members
    assert (member.weights_hash, member.adapter.weights_hash, member.adapter.status) == ("w-a", "new", "missing")


def test_adapter_of_a_composition_cannot_be_deleted(store: Store, three: list[int]) -> None:
    save(store, "pool", [("a", three[0], "w-a")])
    with pytest.raises(IntegrityError), store.write() as session:
        session.delete(session.get_one(Adapter, three[0]))


def test_faults_are_listed_together(store: Store, three: list[int]) -> None:
    with pytest.raises(NotInCatalogError, match=r"x \(id 998\), y \(id 999\)"):
        save(store, "pool", [("x", 998, "w"), ("a", three[0], "w-a"), ("y", 999, "w")])
    with pytest.raises(MethodError, match="names 'a', 'b' twice"):
        save(store, "pool", [(name, adapter, "w") for name in "ab" for adapter in three[:2]])
    with pytest.raises(MethodError, match=r"got gain=nan, what=<object object.*>$"):
        save(store, "pool", [], hyperparameters={"gain": float("nan"), "k": 1, "what": object()})
    with store.read() as session:
        assert compositions.list_all(session) == []


def test_list_and_delete(store: Store, three: list[int]) -> None:
    for name in ("reviews", "grammar"):
        save(store, name, [("a", three[0], "w-a")])
    with store.write() as session:
        assert [entry.name for entry in compositions.list_all(session)] == ["grammar", "reviews"]
        compositions.delete(session, "grammar")
    with store.read() as session:
        assert [entry.name for entry in compositions.list_all(session)] == ["reviews"]
        assert len(session.scalars(select(CompositionMember)).all()) == 1
        assert len(session.scalars(select(Adapter)).all()) == 3


def test_unknown_names(store: Store, three: list[int]) -> None:
    none_yet = "nor any other; make one with: hub-router compose reviws"
    with store.read() as session, pytest.raises(NotInCatalogError, match=none_yet):
        compositions.load(session, "reviws")
    save(store, "reviews", [("a", three[0], "w-a")])
    for action in (compositions.load, compositions.delete):
        closest = "'reviws' among 1; closest: reviews; see: hub-router compositions"
        with store.write() as session, pytest.raises(NotInCatalogError, match=closest):
            action(session, "reviws")
