"""Speed of the catalog: 10,000 adapters with the labels of real cards, 100,000 embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from sqlalchemy import insert

from hub_router.errors import NotInCatalogError
from hub_router.store.adapters import Filters, count, find, ids, list_records
from hub_router.store.features import load_embeddings
from hub_router.store.session import Store, open_store
from hub_router.store.tables import Adapter, AdapterLabel, EncoderState, Repo, TextEmbedding

ADAPTERS = 10_000
EMBEDDINGS = 100_000
WIDTH = 384
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASES = ("mistralai/Mistral-7B-v0.1", "meta-llama/Llama-2-13b-hf", "google/flan-t5-large", "microsoft/phi-2")
TAGS = ("peft", "safetensors", "lora", "text-generation", "en", "region:us", "transformers", "arxiv:2407.00066")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = open_store(f"sqlite:///{tmp_path_factory.mktemp('bench') / 'catalog.db'}")
    numbers = range(1, ADAPTERS + 1)
    now = datetime(2025, 1, 1, tzinfo=UTC)
    with store.write() as session:
        session.execute(
            insert(Repo),
            [
                {"id": n, "source": "hub", "repo_id": f"org{n % 300}/{name(n)}", "author": f"org{n % 300}"}
                for n in numbers
            ],
        )
        session.execute(insert(Adapter), [row(n, now) for n in numbers])
        labels = [
            {"adapter_id": n, "kind": kind, "value": value}
            for n in numbers
            for kind, values in (
                ("tag", (*TAGS, f"base_model:adapter:{BASES[n % 4]}", f"license:{licence(n)}")),
                ("dataset", (f"task{n}",)),
                ("target", TARGETS[: 2 if n % 3 else 7]),
            )
            for value in values
        ]
        session.execute(insert(AdapterLabel), labels)
        session.execute(insert(EncoderState).values(encoder="enc", dimension=WIDTH, generation=1))
        matrix = np.random.default_rng(0).standard_normal((EMBEDDINGS, WIDTH)).astype("<f4")
        session.execute(
            insert(TextEmbedding),
            [
                {
                    "adapter_id": n % ADAPTERS + 1,
                    "encoder": "enc",
                    "kind": "sample",
                    "position": n // ADAPTERS,
                    "text": f"Is the sentence number {n} acceptable English? Answer yes or no.",
                    "text_hash": f"{n:064d}",
                    "vector": matrix[n].tobytes(),
                }
                for n in range(EMBEDDINGS)
            ],
        )
    yield store
    store.close()


def name(number: int) -> str:
    return f"Mistral-7B-Instruct-v0.2-4b-r16-task{number}"


def licence(number: int) -> str:
    return ("mit", "apache-2.0", "unknown")[number % 3]


def row(number: int, now: datetime) -> dict[str, Any]:
    rank = (8, 16, 64)[number % 3]
    return {
        "id": number,
        "repo_pk": number,
        "revision": f"{number:040x}",
        "status": "ready",
        "path": f"/home/me/.cache/huggingface/hub/models--org{number % 300}--{name(number)}/snapshots/{number:040x}",
        "base_model": BASES[number % 4],
        "base_model_resolved": BASES[number % 4],
        "licence": licence(number),
        "peft_type": "LORA",
        "rank_min": rank,
        "rank_max": rank,
        "ranks": [rank],
        "dtypes": ["float32"],
        "module_count": 96,
        "parameters": 9_437_184,
        "size_bytes": 37_748_736,
        "weights_hash": f"{number:064x}",
        "card_text": "This adapter was trained on one task of Natural Instructions. " * 20,
        "notes": [],
        "downloads": number % 977,
        "likes": number % 13,
        "added_at": now,
    }


def listed(store: Store, filters: Filters | None = None, limit: int | None = None) -> int:
    with store.read() as session:
        return len(list_records(session, filters, limit=limit))


def test_list_all(benchmark: Any, large: Store) -> None:
    assert benchmark(listed, large) == ADAPTERS
    assert benchmark.stats.stats.min < 1.0


def test_list_filtered(benchmark: Any, large: Store) -> None:
    filters = Filters(base_model="mistralai/mistral-7b-v0.1", licence="mit", target="down_proj", tag="lora")
    expected = sum(number % 4 == 0 and number % 3 == 0 for number in range(1, ADAPTERS + 1))
    assert benchmark(listed, large, filters) == expected


def test_list_first_page(benchmark: Any, large: Store) -> None:
    assert benchmark(listed, large, None, 50) == 50


def test_count(benchmark: Any, large: Store) -> None:
    expected = sum(licence(number) == "mit" for number in range(1, ADAPTERS + 1))
    with large.read() as session:
        assert benchmark(count, session, Filters(licence="mit")) == expected


def test_ids(benchmark: Any, large: Store) -> None:
    with large.read() as session:
        assert len(benchmark(ids, session)) == ADAPTERS


@pytest.mark.parametrize("ref", [f"org7/{name(7)}", name(9999)], ids=["full name", "short name"])
def test_find(benchmark: Any, large: Store, ref: str) -> None:
    with large.read() as session:
        assert benchmark(find, session, ref).name == ref.rsplit("/", 1)[-1]


def test_find_what_is_not_there(benchmark: Any, large: Store) -> None:
    def miss() -> str:
        with large.read() as session, pytest.raises(NotInCatalogError) as caught:
            find(session, "mistral-7b-instruct-v0.2-4b-r16-tusk7")
        return str(caught.value)

    assert "closest" in benchmark(miss)


def test_load_embeddings(benchmark: Any, large: Store) -> None:
    with large.read() as session:
        owners, matrix = benchmark(load_embeddings, session, "enc")
    assert owners.shape == (EMBEDDINGS,)
    assert matrix.shape == (EMBEDDINGS, WIDTH)
