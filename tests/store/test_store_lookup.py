from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, update

from hub_router.errors import NotInCatalogError
from hub_router.store.adapters import find
from hub_router.store.lookup import closest
from hub_router.store.session import Store
from hub_router.store.tables import Repo

NEW, OLD, TWIN = "abcdef12" + "0" * 32, "1234567890" + "0" * 30, "1234567890" + "f" * 30


@pytest.fixture
def pool(store: Store, add_adapter: Any, tmp_path: Path) -> dict[str, int]:
    with store.write() as session:
        return {
            "coqa": add_adapter(session, "lorahub/flan_t5_large-coqa"),
            "quac": add_adapter(session, "lorahub/flan_t5_large-quac"),
            "answers": add_adapter(session, "granite/library", "answerability/lora"),
            "citations": add_adapter(session, "granite/library", "citations/lora"),
            "only": add_adapter(session, "peft/one-inside", "checkpoint-17"),
            "sst2 of a": add_adapter(session, "a/sst2"),
            "sst2 of b": add_adapter(session, "b/sst2"),
            "rte, ready": add_adapter(session, "a/rte"),
            "rte, gated": add_adapter(session, "b/rte", status="gated"),
            "versioned": add_adapter(session, "org/versioned", revision=NEW),
            "versioned, old": add_adapter(session, "org/versioned", revision=OLD, current=False),
            "versioned, twin": add_adapter(session, "org/versioned", revision=TWIN, current=False),
            "superseded": add_adapter(session, "org/superseded", revision=OLD, current=False),
            "local": add_adapter(session, str(tmp_path / "pool"), "mine", source="local"),
            "at": add_adapter(session, str(tmp_path / "mail@abcd"), source="local"),
        }


def found(store: Store, ref: str | int) -> int:
    with store.read() as session:
        return find(session, ref).id


def refused(store: Store, ref: str) -> str:
    with pytest.raises(NotInCatalogError) as caught:
        found(store, ref)
    return str(caught.value)


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("lorahub/flan_t5_large-coqa", "coqa"),
        (" lorahub/flan_t5_large-coqa/ ", "coqa"),
        ("LoraHub/FLAN_t5_large-coqa", "coqa"),
        ("flan_t5_large-quac", "quac"),
        ("granite/library/citations/lora", "citations"),
        ("library/citations/lora", "citations"),
        ("answerability/lora", "answers"),
        ("peft/one-inside", "only"),
        ("peft/one-inside/checkpoint-17", "only"),
        ("checkpoint-17", "only"),
        ("a/sst2", "sst2 of a"),
        ("rte", "rte, ready"),
        ("b/rte", "rte, gated"),
        ("org/versioned", "versioned"),
        ("org/versioned@abcdef", "versioned"),
        ("org/versioned@ABCDEF12", "versioned"),
        (f"org/versioned@{OLD}", "versioned, old"),
        ("versioned@1234567890f", "versioned, twin"),
        ("org/superseded@1234", "superseded"),
        ("granite/library/citations/lora@aaaa", "citations"),
    ],
)
def test_names_that_fit_one(store: Store, pool: dict[str, int], ref: str, expected: str) -> None:
    assert found(store, ref) == pool[expected]


def test_ids(store: Store, pool: dict[str, int]) -> None:
    for adapter_id in pool.values():
        assert found(store, adapter_id) == found(store, str(adapter_id)) == adapter_id


def test_local_folders(store: Store, pool: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pool").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pool")
    for ref in (f"{tmp_path}/pool/mine", "pool/mine", "./pool/mine/", "link/mine", "~/pool/mine", "x/../pool/mine"):
        assert found(store, ref) == pool["local"], ref
    assert found(store, "mail@abcd") == pool["at"]


def test_repository_of_several_adapters(store: Store, pool: dict[str, int]) -> None:
    message = refused(store, "granite/library")
    assert "names 2 adapters" in message
    assert "granite/library/answerability/lora, granite/library/citations/lora" in message


def test_short_name_of_several_adapters(store: Store, pool: dict[str, int]) -> None:
    assert refused(store, "sst2") == (
        "'sst2' names 2 adapters, expected one; give the full name of one of: a/sst2, b/sst2"
    )


def test_revision_that_fits_two(store: Store, pool: dict[str, int]) -> None:
    message = refused(store, "org/versioned@1234")
    assert "org/versioned@123456789000" in message
    assert "org/versioned@1234567890ff" in message


@pytest.mark.parametrize("ref", ["org/versioned@ffff", "org/superseded"])
def test_revisions_that_there_are(store: Store, pool: dict[str, int], ref: str) -> None:
    message = refused(store, ref)
    assert message.startswith(f"{ref!r} is not among the revisions in the catalog; it holds: org/")
    assert "@123456789000" in message


def test_closest_names(store: Store, pool: dict[str, int]) -> None:
    message = refused(store, "flan_t5_large-coca")
    assert "closest: lorahub/flan_t5_large-coqa" in message
    assert message.endswith("add it with: hub-router sync OWNER/REPO, or a folder")
    assert "closest" not in refused(store, "zzzzzzzz")


def test_part_of_a_name_is_no_short_name(store: Store, pool: dict[str, int]) -> None:
    assert "hub-router list" in refused(store, "coqa")
    assert "hub-router list" in refused(store, "%coqa")


@pytest.mark.parametrize("ref", ["", "/", "@", "@abcd", "~", "~nobody/x", "a\0b", "9" * 30, "..", "a//sst2@", "\u0663"])
def test_odd_references(store: Store, pool: dict[str, int], ref: str) -> None:
    assert "catalog" in refused(store, ref)


def test_empty_catalog(store: Store) -> None:
    assert refused(store, "a/b") == "'a/b' is not in the catalog, which is empty; add it with: hub-router sync a/b"


def test_repository_that_is_gone(store: Store, pool: dict[str, int]) -> None:
    with store.write() as session:
        session.execute(
            update(Repo)
            .where(Repo.repo_id == "org/superseded")
            .values(state="renamed", renamed_to="org/moved", reason="moved on the Hub")
        )
    message = refused(store, "org/superseded")
    assert message.endswith("its last sync ended as renamed, it is now org/moved: moved on the Hub")


def test_closest() -> None:
    names = ["reviews", "review", "grammar"]
    assert closest("Reviews", names) == ["reviews", "review"]
    assert closest("grammer", names) == ["grammar"]
    assert closest("qqq", names) == []


REPOS = [
    ("hub", "zoo/film", "gated", "gated: accept its licence at the Hub", None),
    ("hub", "zoo/empty", "unsupported", "no adapter_config.json", None),
    ("hub", "zoo/old", "renamed", "renamed to zoo/new", "zoo/new"),
    ("hub", "other/empty", "failed", "", None),
]


@pytest.mark.parametrize(
    ("ref", "end"),
    [
        ("zoo/film", "its last sync ended as gated: accept its licence at the Hub"),
        ("Zoo/Film/", "its last sync ended as gated: accept its licence at the Hub"),
        ("zoo/film@abcd", "its last sync ended as gated: accept its licence at the Hub"),
        ("film", "the last sync of zoo/film ended as gated: accept its licence at the Hub"),
        ("zoo/film/part", "the last sync of zoo/film ended as gated: accept its licence at the Hub"),
        ("old", "the last sync of zoo/old ended as renamed, it is now zoo/new"),
        (
            "empty",
            "the last sync of other/empty ended as failed; the last sync of zoo/empty ended as unsupported: "
            "no adapter_config.json",
        ),
    ],
)
def test_repository_that_never_gave_an_adapter(store: Store, pool: dict[str, int], ref: str, end: str) -> None:
    columns = ("source", "repo_id", "state", "reason", "renamed_to")
    with store.write() as session:
        session.execute(insert(Repo), [dict(zip(columns, row, strict=True)) for row in REPOS])
    assert refused(store, ref) == f"{ref.strip()!r} has no adapter in the catalog; {end}"


def test_failed_check_does_not_hide_what_a_repository_holds(store: Store, pool: dict[str, int]) -> None:
    with store.write() as session:
        session.execute(update(Repo).where(Repo.repo_id == "granite/library").values(state="failed", reason="busy"))
    assert "closest: granite/library/citations/lora" in refused(store, "granite/library/citation/lora")


def test_choices_leave_out_what_is_gone(store: Store, pool: dict[str, int], add_adapter: Any) -> None:
    with store.write() as session:
        add_adapter(session, "c/sst2", status="missing")
        gated = add_adapter(session, "a/cola", status="gated")
        add_adapter(session, "b/cola", status="missing")
    assert refused(store, "sst2").endswith(
        "'sst2' names 2 adapters, expected one; give the full name of one of: a/sst2, b/sst2"
    )
    assert found(store, "cola") == gated


@pytest.mark.parametrize(
    ("ref", "command"),
    [
        ("multi", "hub-router sync OWNER/REPO, or a folder"),
        ("999", "hub-router sync OWNER/REPO, or a folder"),
        ("./here", "hub-router sync OWNER/REPO, or a folder"),
        ("two words/here", "hub-router sync OWNER/REPO, or a folder"),
        ("o/r", "hub-router sync o/r"),
        ("o-1/r_2.x/sub", "hub-router sync o-1/r_2.x/sub"),
    ],
)
def test_command_that_can_work(store: Store, pool: dict[str, int], ref: str, command: str) -> None:
    assert refused(store, ref).endswith(f"add it with: {command}")


def test_closest_among_many_compares_few() -> None:
    """Comparing each of these letter by letter takes several times as long as is allowed here."""
    names = [f"organisation-{i % 97}/flan_t5_large-task-{i:05d}-of-many" for i in range(20_000)]
    names[12_345] = "lorahub/film-reviews"
    started = time.process_time()
    assert closest("film-revuews", names, short=lambda name: name.rsplit("/", 1)[-1])[0] == "lorahub/film-reviews"
    assert time.process_time() - started < 0.4
