from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event
from sqlalchemy.orm import Session

from hub_router.records import AdapterRecord, FileFacts, Sample, Spectrum
from hub_router.store.adapters import Filters, count, details, find, ids, list_records, records, samples, values
from hub_router.store.features import Embedding, save_embeddings, save_spectra
from hub_router.store.session import Store
from hub_router.store.tables import Adapter, AdapterFile, AdapterSample


@contextmanager
def statements(session: Session) -> Iterator[list[str]]:
    """The SQL that reaches the database inside the block."""
    seen: list[str] = []
    connection = session.connection()

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        seen.append(statement)

    event.listen(connection, "before_cursor_execute", note)
    yield seen
    event.remove(connection, "before_cursor_execute", note)


@pytest.fixture
def pool(store: Store, add_adapter: Any) -> dict[str, int]:
    """Five served adapters that differ in everything that can be filtered, and three that are not served."""
    with store.write() as session:
        return {
            "sst2": add_adapter(
                session,
                "alice/Sst2",
                ranks=(8,),
                licence="apache-2.0",
                base_model="Mistral-7B",
                base_model_resolved="mistralai/Mistral-7B-v0.1",
                labels={"tag": ("sentiment", "peft"), "target": ("q_proj", "v_proj"), "dataset": ("glue",)},
            ),
            "cola": add_adapter(
                session,
                "alice/cola",
                ranks=(16,),
                base_model="mistralai/mistral-7b-v0.1",
                base_model_resolved=None,
                labels={"tag": ("grammar",), "target": ("q_proj", "o_proj"), "dataset": ("glue", "cola_100%")},
            ),
            "mixed": add_adapter(session, "bob/mixed", ranks=(4, 8, 64), author="bob", licence="unknown"),
            "nested": add_adapter(session, "bob/library", "rag/lora", ranks=(128,), author="bob"),
            "local": add_adapter(
                session,
                "/home/me/adapters",
                "mine",
                source="local",
                base_model=None,
                base_model_resolved=None,
                labels={"target": ("q_proj_2",)},
            ),
            "old": add_adapter(session, "bob/mixed", revision="b" * 40, current=False),
            "gated": add_adapter(session, "carol/gated", status="gated", reason="accept the licence"),
            "failed": add_adapter(session, "carol/failed", status="failed", reason="hash"),
        }


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(), ("sst2", "cola", "mixed", "nested", "local")),
        (Filters(base_model="MistralAI/mistral-7b-V0.1"), ("sst2", "cola")),
        (Filters(base_model="mistral-7b"), ("sst2",)),
        (Filters(base_model="org/base"), ("mixed", "nested")),
        (Filters(base_model="org/bas"), ()),
        (Filters(licence="Apache-2.0"), ("sst2",)),
        (Filters(licence="unknown"), ("mixed",)),
        (Filters(rank=8), ("sst2", "mixed", "local")),
        (Filters(rank=64), ("mixed",)),
        (Filters(rank=6), ()),
        (Filters(rank=28), ()),
        (Filters(target="q_proj"), ("sst2", "cola")),
        (Filters(target="V_proj"), ("sst2",)),
        (Filters(tag="q_proj"), ()),
        (Filters(tag="Sentiment"), ("sst2",)),
        (Filters(base_model="mistralai/mistral-7b-v0.1", rank=16, target="o_proj", tag="grammar"), ("cola",)),
    ],
)
def test_filters(store: Store, pool: dict[str, int], filters: Filters, expected: tuple[str, ...]) -> None:
    wanted = {pool[name] for name in expected}
    with store.read() as session:
        assert {record.id for record in list_records(session, filters)} == wanted
        assert count(session, filters) == len(wanted)
        found = ids(session, filters)
        every = [*range(100, 0, -1), *range(101, 2500)]
        assert ids(session, filters, among=every).tolist() == sorted(wanted)
        assert ids(session, filters, among=[pool["sst2"], 999]).tolist() == sorted(wanted & {pool["sst2"]})
        assert ids(session, filters, among=[]).tolist() == []
    assert found.dtype == np.int64
    assert found.tolist() == sorted(wanted)


def test_statuses(store: Store, pool: dict[str, int]) -> None:
    with store.read() as session:
        unserved = list_records(session, statuses=("gated", "failed"))
        assert [(record.name, record.reason) for record in unserved] == [
            ("failed", "hash"),
            ("gated", "accept the licence"),
        ]
        assert count(session, statuses=("gated", "failed")) == 2
        assert ids(session, statuses=("gated",)).tolist() == [pool["gated"]]


def test_order_and_pages(store: Store, pool: dict[str, int]) -> None:
    with store.read() as session:
        refs = [record.ref for record in list_records(session)]
        assert refs == ["/home/me/adapters/mine", "alice/Sst2", "alice/cola", "bob/library/rag/lora", "bob/mixed"]
        pages = [list_records(session, limit=2, offset=offset) for offset in (0, 2, 4, 6)]
    assert [record.ref for page in pages for record in page] == refs
    assert [len(page) for page in pages] == [2, 2, 1, 0]


def test_record_holds_every_column(store: Store, add_adapter: Any) -> None:
    with store.write() as session:
        adapter_id = add_adapter(
            session,
            "alice/one",
            "sub",
            author="alice",
            revision="c" * 40,
            path="/cache/one",
            ranks=(4, 8),
            base_model="written",
            base_model_resolved="org/resolved",
            dtypes=["bfloat16", "float32"],
            module_count=7,
            parameters=3_000_000_000,
            size_bytes=6_000_000_000,
            weights_hash="hash",
            downloads=12,
            likes=0,
            notes=["all-zero B in one module"],
            rslora=True,
            added_at=datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC),
            labels={"tag": ("b", "a"), "dataset": ("d",), "target": ("v_proj", "q_proj")},
        )
    with store.read() as session:
        (record,) = list_records(session)
    assert record == AdapterRecord(
        id=adapter_id,
        source="hub",
        repo_id="alice/one",
        revision="c" * 40,
        subfolder="sub",
        path=Path("/cache/one"),
        status="ready",
        reason="",
        base_model="written",
        base_model_resolved="org/resolved",
        licence="mit",
        peft_type="LORA",
        ranks=(4, 8),
        targets=("q_proj", "v_proj"),
        dtypes=("bfloat16", "float32"),
        modules=7,
        parameters=3_000_000_000,
        size_bytes=6_000_000_000,
        weights_hash="hash",
        tags=("a", "b"),
        datasets=("d",),
        downloads=12,
        likes=0,
        extra={
            "notes": ["all-zero B in one module"],
            "rslora": True,
            "current": True,
            "added_at": "2025-01-02T03:04:05+00:00",
            "author": "alice",
            "last_modified": None,
        },
    )


def test_listing_costs_two_statements(store: Store, add_adapter: Any) -> None:
    with store.write() as session:
        for number in range(60):
            add_adapter(session, f"org/{number}", labels={"tag": (f"tag {number}",)})
    with store.read() as session, statements(session) as seen:
        listed = list_records(session)
    assert [record.tags for record in listed] == [(f"tag {record.name}",) for record in listed]
    assert len(seen) == 2


def test_records_by_id(store: Store, pool: dict[str, int]) -> None:
    asked = [pool["mixed"], 999, pool["old"], pool["gated"], pool["sst2"]]
    with store.read() as session:
        found = records(session, asked)
        assert records(session, []) == {}
    assert list(found) == [pool["mixed"], pool["old"], pool["gated"], pool["sst2"]]
    assert all(adapter_id == record.id for adapter_id, record in found.items())
    assert found[pool["old"]].extra["current"] is False


def test_more_ids_than_one_statement_binds(store: Store, add_adapter: Any) -> None:
    with store.write() as session:
        repo = session.get_one(Adapter, add_adapter(session, "org/all", "0", labels={"tag": ("x",)})).repo
        session.add_all(
            Adapter(repo=repo, revision="a", subfolder=str(n), status="ready", path="/p") for n in range(1, 2500)
        )
    with store.read() as session:
        everything = ids(session)
        found = records(session, everything)
    assert len(found) == 2500
    assert {record.subfolder for record in found.values()} == {str(number) for number in range(2500)}


def test_details(store: Store, add_adapter: Any) -> None:
    spectrum = Spectrum("m", np.array([2.0, 1.0], np.float32), np.array([0.6, 0.8], np.float32), ambiguous=False)
    with store.write() as session:
        adapter_id = add_adapter(session, "alice/one", card_text="A card.", weights_hash="hash")
        add_adapter(session, "alice/other", card_text="Not this one.")
        session.add_all(
            AdapterSample(adapter_id=adapter_id, split=split, position=n, input=f"{split} {n}", output="y", origin="o")
            for n in (1, 0)
            for split in ("test", "sample")
        )
        session.add_all(
            AdapterFile(adapter_id=adapter_id, path=path, size_bytes=5, sha256=path * 2) for path in ("b", "a")
        )
        save_spectra(session, adapter_id, "hash", [spectrum])
        save_embeddings(
            session, "enc", [Embedding(adapter_id, "card", n, "t", "h", np.ones(2, np.float32)) for n in range(3)]
        )
    with store.read() as session:
        found = details(session, find(session, "alice/one"))
        assert samples(session, adapter_id, "test") == [
            Sample("test 0", "y", "test", "o"),
            Sample("test 1", "y", "test", "o"),
        ]
    assert found.card_text == "A card."
    assert found.files == (FileFacts("a", 5, "aa"), FileFacts("b", 5, "bb"))
    assert [sample.input for sample in found.samples] == ["sample 0", "sample 1", "test 0", "test 1"]
    assert list(found.spectra) == ["m"]
    assert found.embeddings == {"enc": 3}


def test_values_of_the_filters(store: Store, add_adapter: Any) -> None:
    with store.write() as session:
        add_adapter(session, "a/one", ranks=(4, 8), labels={"tag": ("x", "y"), "target": ("q_proj",)})
        add_adapter(session, "a/two", ranks=(8,), licence="apache-2.0", labels={"tag": ("y",)})
        add_adapter(session, "a/three", licence="apache-2.0", base_model="Other", base_model_resolved=None)
        add_adapter(session, "a/old", licence="gpl", current=False)
        add_adapter(session, "a/gated", licence="bsd", ranks=(64,), status="gated")
    with store.read() as session:
        found = values(session)
        gated = values(session, ("gated",))
    assert {name: list(counts.items()) for name, counts in found.items()} == {
        "status": [("ready", 3), ("gated", 1)],
        "base_model": [("org/base", 2), ("Other", 1)],
        "licence": [("apache-2.0", 2), ("mit", 1)],
        "rank": [("8", 3), ("4", 1)],
        "target": [("q_proj", 1)],
        "tag": [("y", 2), ("x", 1)],
    }
    assert (gated["licence"], gated["rank"], gated["tag"]) == ({"bsd": 1}, {"64": 1}, {})
