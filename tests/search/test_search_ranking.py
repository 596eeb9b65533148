from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from search_world import ENCODER, Entry, World, vector_of

from hub_router.errors import HubRouterError, NotInCatalogError
from hub_router.search.ranking import Hit, search
from hub_router.store.adapters import Filters
from hub_router.store.tables import Adapter

LICENCES = ("mit", "apache-2.0", "unknown")
BASES = ("org/Large", "org/small")
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture
def varied(world: World) -> World:
    """Sixty adapters of several licences, bases, ranks, targets and tags; some have a card only, some samples only."""
    for n in range(60):
        number = world.add(
            f"org/{n}",
            licence=LICENCES[n % 3],
            base_model=BASES[n % 2],
            base_model_resolved=None if n % 7 == 0 else BASES[n % 2],
            ranks=[4, 16] if n % 5 == 0 else [8],
            rank_min=4 if n % 5 == 0 else 8,
            rank_max=16 if n % 5 == 0 else 8,
            labels={"target": TARGETS[: 1 + n % 3], "tag": ("Reviews",) if n % 4 == 0 else ("lora",)},
        )
        samples = [f"sample {n} {place}" for place in range(n % 4)]
        world.embed(number, card=None if samples and n % 6 == 1 else f"card {n}", samples=samples)
    return world


def pairs(hits: list[Hit]) -> list[tuple[int, float]]:
    return [(hit.adapter.id, pytest.approx(hit.score, abs=1e-6)) for hit in hits]


def test_ranking_equals_the_definition(varied: World, query: np.ndarray) -> None:
    for limit in (1, 7, 60, 500):
        hits = varied.search(query, limit)
        assert varied.expected(query, limit) == pairs(hits)
    assert len(varied.search(query, 500)) == 60


FILTERS: dict[str, tuple[dict[str, Any], Callable[[Entry], bool]]] = {
    "base": ({"base_model": "ORG/large"}, lambda entry: entry.columns["base_model"] == "org/Large"),
    "licence": ({"licence": "unknown"}, lambda entry: entry.columns["licence"] == "unknown"),
    "rank": ({"rank": 16}, lambda entry: 16 in entry.columns["ranks"]),
    "target": ({"target": "down_proj"}, lambda entry: "down_proj" in entry.labels["target"]),
    "tag": ({"tag": "reviews"}, lambda entry: "Reviews" in entry.labels["tag"]),
    "all": (
        {"base_model": "org/small", "licence": "apache-2.0", "rank": 8, "target": "v_proj", "tag": "lora"},
        lambda entry: (
            entry.columns["base_model"] == "org/small"
            and entry.columns["licence"] == "apache-2.0"
            and entry.columns["ranks"] == [8]
            and "v_proj" in entry.labels["target"]
            and "lora" in entry.labels["tag"]
        ),
    ),
    "nothing": ({"tag": "no such tag"}, lambda entry: False),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_are_exact(varied: World, query: np.ndarray, name: str) -> None:
    filters, passes = FILTERS[name]
    assert bool(varied.expected(query, 60, passes)) == (name != "nothing")
    for limit in (2, 60):
        assert varied.expected(query, limit, passes) == pairs(varied.search(query, limit, **filters))


def test_hit_says_which_text_was_nearest(world: World) -> None:
    card, inputs = vector_of("card"), [vector_of(f"input {n}") for n in range(3)]
    number = world.add("org/one")
    world.embed(number, card="card", samples=["input 0", "input 1", "input 2"])
    (hit,) = world.search(card)
    assert (hit.kind, hit.text, hit.adapter.repo_id) == ("card", "card", "org/one")
    assert hit.score == pytest.approx(1, abs=1e-6)
    asked = inputs[0] + inputs[1] + 2 * inputs[2]
    assert max(range(3), key=lambda n: float(asked @ inputs[n])) == 2
    (hit,) = world.search(asked)
    assert (hit.kind, hit.text) == ("sample", "input 2")


def test_equal_scores_come_by_id_beyond_every_window(world: World) -> None:
    numbers = [world.add(f"org/copy-{n}") for n in range(200)]
    for number in reversed(numbers):
        world.embed(number, card="the same card")
    nearest = world.add("org/nearest")
    world.embed(nearest, card="asked")
    asked = vector_of("asked") + 0.01 * vector_of("the same card")
    assert [hit.adapter.id for hit in world.search(asked, 5)] == [nearest, *numbers[:4]]
    assert [hit.adapter.id for hit in world.search(asked, 3, licence="mit")] == [nearest, *numbers[:2]]


def test_adapters_no_longer_served_are_left_out_at_once(varied: World, query: np.ndarray) -> None:
    best = [hit.adapter.id for hit in varied.search(query, 3)]
    varied.change(best[0], status="gated")
    varied.change(best[1], current=False)
    assert [hit.adapter.id for hit in varied.search(query, 1)] == [best[2]]
    assert varied.expected(query, 60) == pairs(varied.search(query, 60))
    varied.change(best[0], status="ready")
    assert varied.search(query, 1)[0].adapter.id == best[0]


def test_many_unserved_do_not_hide_the_rest(world: World, query: np.ndarray) -> None:
    numbers = [world.add(f"org/{n}") for n in range(120)]
    for number in numbers:
        world.embed(number, card=f"card {number}")
    ranked = [number for number, _ in world.expected(query, 120)]
    for number in ranked[:115]:
        world.change(number, status="missing")
    assert [hit.adapter.id for hit in world.search(query, 5)] == ranked[115:]
    for number in ranked[115:]:
        world.change(number, status="missing")
    assert world.search(query, 5) == []


def test_query_of_any_length_gives_cosines(varied: World, query: np.ndarray) -> None:
    small = [(hit.adapter.id, hit.score) for hit in varied.search(1e-6 * query)]
    large = [(hit.adapter.id, hit.score) for hit in varied.search(1e6 * query.astype(np.float32))]
    assert [pair[0] for pair in small] == [pair[0] for pair in large]
    np.testing.assert_allclose([pair[1] for pair in small], [pair[1] for pair in large], atol=1e-6)


@pytest.mark.parametrize("fault", [np.nan, np.inf, 0.0])
def test_query_without_direction(varied: World, fault: float) -> None:
    vector = np.zeros(16)
    vector[3] = fault
    with pytest.raises(HubRouterError, match="points nowhere"):
        varied.search(vector)


def test_query_of_another_dimension(varied: World) -> None:
    with pytest.raises(HubRouterError, match=r"shape \(8,\), expected \(16,\) of encoder 'synthetic'"):
        varied.search(np.ones(8))


def test_limit_below_one(varied: World, query: np.ndarray) -> None:
    with pytest.raises(HubRouterError, match="at least 1, got 0"):
        varied.search(query, 0)


def test_empty_catalog_names_sync(world: World, query: np.ndarray) -> None:
    with pytest.raises(NotInCatalogError, match=r"hub-router sync .*hub-router index"):
        world.search(query)


def test_catalog_without_embeddings_names_index(world: World, query: np.ndarray) -> None:
    world.add("org/one")
    with pytest.raises(NotInCatalogError, match=r"indexed with: none.*hub-router index --encoder synthetic"):
        world.search(query)


def test_another_encoder_names_those_there_are(varied: World, query: np.ndarray) -> None:
    with pytest.raises(NotInCatalogError, match=r"encoder 'other' \(indexed with: synthetic\).*--encoder other"):
        search(varied.store, varied.index_dir, "other", query, Filters(), 10)


def test_embeddings_of_deleted_adapters(world: World, query: np.ndarray) -> None:
    number = world.add("org/one")
    world.embed(number, card="card")
    with world.store.write() as session:
        session.delete(session.get_one(Adapter, number))
    world.add("org/two")
    with pytest.raises(NotInCatalogError, match=f"nothing is indexed with encoder '{ENCODER}'"):
        world.search(query)
