from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from search_world import World
from sqlalchemy import select

from hub_router.encoder import Encoder
from hub_router.progress import Advance
from hub_router.search.embed import embed_missing
from hub_router.search.index import refresh_index
from hub_router.search.ranking import search
from hub_router.search.texts import text_hash
from hub_router.store.features import embedding_state
from hub_router.store.tables import AdapterSample, TextEmbedding

TASKS = {
    "org/weather": ("Answers questions about the weather.", ["Will it rain tomorrow?", "How cold is it in Oslo?"]),
    "org/recipes": ("Suggests recipes for given ingredients.", ["What can I cook with eggs and rice?"]),
    "org/chess": ("Explains chess openings.", []),
}


@pytest.fixture
def filled(world: World) -> World:
    for name, (card, samples) in TASKS.items():
        world.add(name, card=card, samples=samples)
    return world


def rows(world: World) -> dict[tuple[int, str, int], tuple[str, str, bytes]]:
    with world.store.read() as session:
        return {
            (row.adapter_id, row.kind, row.position): (row.text, row.text_hash, row.vector)
            for row in session.scalars(select(TextEmbedding))
        }


def summary(world: World, encoder: Encoder) -> tuple[int, int, int]:
    done = embed_missing(world.store, encoder)
    return done.embedded, done.unchanged, done.texts


def test_vectors_are_those_of_the_texts(filled: World, offline: Encoder) -> None:
    assert summary(filled, offline) == (3, 0, 6)
    stored = rows(filled)
    assert {key: value[0] for key, value in stored.items()} == {
        (1, "card", 0): "Answers questions about the weather.",
        (1, "sample", 0): "Will it rain tomorrow?",
        (1, "sample", 1): "How cold is it in Oslo?",
        (2, "card", 0): "Suggests recipes for given ingredients.",
        (2, "sample", 0): "What can I cook with eggs and rice?",
        (3, "card", 0): "Explains chess openings.",
    }
    for text, digest, vector in stored.values():
        assert digest == text_hash("", text)
        np.testing.assert_allclose(np.frombuffer(vector, "<f4"), offline.encode([text])[0], atol=1e-5)


def test_nothing_is_computed_twice(filled: World, offline: Encoder) -> None:
    embed_missing(filled.store, offline)
    before = rows(filled)
    with filled.store.read() as session:
        state = embedding_state(session, "offline")
    assert summary(filled, offline) == (0, 3, 0)
    with filled.store.read() as session:
        assert embedding_state(session, "offline") == state
    filled.add("org/new", card="Translates menus.")
    assert summary(filled, offline) == (1, 3, 1)
    assert {key: value for key, value in rows(filled).items() if key[0] < 4} == before


def test_only_changed_texts_are_read_again(filled: World, offline: Encoder) -> None:
    embed_missing(filled.store, offline)
    filled.change(1, card_text="Answers questions about storms.")
    with filled.store.write() as session:
        session.delete(session.get_one(AdapterSample, (1, "sample", 1)))
    assert summary(filled, offline) == (1, 2, 1)
    assert [key[1:] for key in sorted(rows(filled)) if key[0] == 1] == [("card", 0), ("sample", 0)]
    assert rows(filled)[1, "card", 0][0] == "Answers questions about storms."


def test_new_revision_keeps_the_vectors_of_its_texts(filled: World, offline: Encoder) -> None:
    embed_missing(filled.store, offline)
    filled.change(1, current=False)
    card, samples = TASKS["org/weather"]
    number = filled.add("org/weather", card=card, samples=[*samples, "Is it windy?"], revision="b" * 40)
    assert summary(filled, offline) == (1, 2, 1)
    stored = rows(filled)
    assert stored[number, "card", 0] == stored[1, "card", 0]
    assert stored[number, "sample", 2][0] == "Is it windy?"


def test_adapters_that_are_not_served_are_not_embedded(world: World, offline: Encoder) -> None:
    world.add("org/gated", card="Secret.", status="gated")
    world.add("org/old", card="Old.", current=False)
    assert summary(world, offline) == (0, 0, 0)
    assert rows(world) == {}


def test_same_text_of_many_adapters_is_read_once(world: World, offline: Encoder) -> None:
    for n in range(5):
        world.add(f"org/{n}", card="One card for all.", samples=["the same input"])
    assert summary(world, offline) == (5, 0, 2)
    assert len(rows(world)) == 10


class Bar:
    """Counts steps, and interrupts like Ctrl-C after some."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.labels: list[tuple[str, int | None]] = []
        self.steps = 0
        self.interrupt_after = interrupt_after

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Advance]:
        self.labels.append((label, total))

        def advance(n: int) -> None:
            self.steps += n
            if self.interrupt_after is not None and self.steps >= self.interrupt_after:
                raise KeyboardInterrupt

        yield advance


def test_interrupted_run_keeps_what_it_finished(world: World, offline: Encoder) -> None:
    for n in range(30):
        world.add(f"org/{n}", card=f"Sorts mail of kind {n}.", samples=[f"Mail {n}"])
    with pytest.raises(KeyboardInterrupt):
        embed_missing(world.store, offline, Bar(interrupt_after=10))
    kept = rows(world)
    done = {key[0] for key in kept}
    assert 10 <= len(done) < 30
    assert len(kept) == 2 * len(done)
    bar = Bar()
    finished = embed_missing(world.store, offline, bar)
    assert (finished.embedded, finished.unchanged, finished.texts) == (30 - len(done), len(done), 2 * (30 - len(done)))
    assert bar.steps == 30 - len(done)
    assert {key: value for key, value in rows(world).items() if key in kept} == kept
    assert len(rows(world)) == 60


def test_a_changed_instruction_makes_everything_stale(filled: World, offline: Encoder) -> None:
    embed_missing(filled.store, offline)
    instructed = Encoder(offline.name, offline.dimension, "Represent: ", offline.model)
    assert summary(filled, instructed) == (3, 0, 6)
    assert summary(filled, instructed) == (0, 3, 0)


@pytest.mark.parametrize(
    ("asked", "expected", "kind"),
    [
        ("meteorology questions", "org/weather", "card"),
        ("How warm is it in Cairo right now?", "org/weather", "sample"),
        ("cooking ideas from what is in the fridge", "org/recipes", "card"),
        ("the Sicilian defence", "org/chess", "card"),
    ],
)
def test_search_in_words(filled: World, offline: Encoder, asked: str, expected: str, kind: str) -> None:
    embed_missing(filled.store, offline)
    refresh_index(filled.store, filled.index_dir, offline.name)
    hits = search(filled.store, filled.index_dir, offline.name, offline.encode([asked])[0])
    assert len(hits) == 3
    assert (hits[0].adapter.repo_id, hits[0].kind) == (expected, kind)
