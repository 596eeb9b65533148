"""Samples in a real database: what sync found and what the user gave stay apart, and reading shows each input once."""

from __future__ import annotations

import hashlib
import random

import pytest
from sqlalchemy import select

from hub_router.errors import SamplesError
from hub_router.records import SAMPLES_PER_SPLIT, AdapterFacts, ModuleFacts, Sample
from hub_router.store.features import adapter_texts
from hub_router.store.repos import AdapterFields, RepoFields, finish_repo, rename_repo, save_adapter
from hub_router.store.samples import Addition, add_given, choose, remove_given, samples, write_found
from hub_router.store.session import Store
from hub_router.store.tables import Adapter, AdapterSample


def found(*inputs: str, split: str = "sample") -> tuple[Sample, ...]:
    return tuple(Sample(text, "found", split) for text in inputs)


def given(*inputs: str, split: str = "sample", origin: str = "file mine.jsonl") -> tuple[Sample, ...]:
    return tuple(Sample(text, "mine", split, origin) for text in inputs)


def save(store: Store, revision: str, weights: str = "w", repo_id: str = "ann/one", *rows: Sample) -> int:
    """An adapter at a revision, as sync writes it."""
    module = ModuleFacts("model.layers.0.self_attn.q_proj", 4, 8, 8, 2.0)
    facts = AdapterFacts("LORA", "a/base", (module,), ("float32",), 64, 256, weights)
    repo = RepoFields("hub", repo_id, revision)
    with store.write() as session:
        adapter_id = save_adapter(session, repo, AdapterFields("", "/cache", facts=facts, samples=rows))
        finish_repo(session, repo, "ok")
        return adapter_id


def add(store: Store, adapter_id: int, rows: tuple[Sample, ...], *, replace: bool = False) -> Addition:
    with store.write() as session:
        return add_given(session, adapter_id, rows, replace_origin=replace)


def shown(store: Store, adapter_id: int, split: str | None = None) -> list[tuple[str, str, str]]:
    """Split, input and output of what is read; checks that positions are dense."""
    with store.read() as session:
        columns = select(AdapterSample.split, AdapterSample.position).where(AdapterSample.adapter_id == adapter_id)
        places: dict[str, list[int]] = {}
        for name, position in session.execute(columns):
            places.setdefault(name, []).append(position)
        for numbers in places.values():
            assert sorted(numbers) == list(range(len(numbers)))
        return [(row.split, row.input, row.output) for row in samples(session, adapter_id, split)]


def inputs(store: Store, adapter_id: int, split: str | None = None) -> list[str]:
    return [text for _, text, _ in shown(store, adapter_id, split)]


def test_given_samples_come_first_and_win_a_repeated_input(store: Store) -> None:
    adapter_id = save(store, "r1", "w", "ann/one", *found("a", "b", "b"), *found("a", split="test"))
    assert add(store, adapter_id, given("b", "c")) == Addition(2, 0, 0)
    assert shown(store, adapter_id) == [
        ("sample", "b", "mine"),
        ("sample", "c", "mine"),
        ("sample", "a", "found"),
        ("test", "a", "found"),
    ]
    assert inputs(store, adapter_id, "test") == ["a"]
    with store.read() as session:
        assert [row.given for row in samples(session, adapter_id, "sample")] == [True, True, False]
        assert [text.samples for text in adapter_texts(session)] == [("b", "c", "a")]


def test_removing_brings_back_what_stood_behind(store: Store) -> None:
    adapter_id = save(store, "r1", "w", "ann/one", *found("a", "b"))
    before = shown(store, adapter_id)
    add(store, adapter_id, given("b", "c"))
    add(store, adapter_id, given("d", origin="dataset x/train: q"))
    with store.write() as session:
        assert remove_given(session, adapter_id, "file mine.jsonl") == 2
    assert inputs(store, adapter_id) == ["d", "a", "b"]
    with store.write() as session:
        assert remove_given(session, adapter_id, "dataset x/train: q") == 1
    assert shown(store, adapter_id) == before


@pytest.mark.parametrize("origin", ["samples.jsonl", "file other.jsonl"])
def test_only_what_was_given_can_be_removed(store: Store, origin: str) -> None:
    adapter_id = save(store, "r1", "w", "ann/one", *found("a"))
    add(store, adapter_id, given("b"))
    with pytest.raises(SamplesError, match=r"given are: 'file mine\.jsonl'"), store.write() as session:
        remove_given(session, adapter_id, origin)
    assert inputs(store, adapter_id) == ["b", "a"]


def test_adding_twice_keeps_the_first_and_replacing_takes_only_its_own_origin_and_split(store: Store) -> None:
    adapter_id = save(store, "r1")
    add(store, adapter_id, given("a", "b"))
    add(store, adapter_id, given("c", origin="file other.jsonl"))
    add(store, adapter_id, given("a", split="test"))
    again = tuple(Sample(text, "new", "sample", "file mine.jsonl") for text in ("a", "c", "d"))
    assert add(store, adapter_id, again) == Addition(1, 2, 0)
    assert [row[1:] for row in shown(store, adapter_id, "sample")] == [
        ("a", "mine"),
        ("b", "mine"),
        ("c", "mine"),
        ("d", "new"),
    ]
    assert add(store, adapter_id, again, replace=True) == Addition(2, 1, 3)
    assert [row[1:] for row in shown(store, adapter_id, "sample")] == [("c", "mine"), ("a", "new"), ("d", "new")]
    assert inputs(store, adapter_id, "test") == ["a"]


def test_what_sync_finds_replaces_only_what_it_found(store: Store) -> None:
    adapter_id = save(store, "r1", "w", "ann/one", *found("a", "b"))
    add(store, adapter_id, given("c"))
    with store.write() as session:
        write_found(session, adapter_id, found("d"))
    assert inputs(store, adapter_id) == ["c", "d"]


def test_given_samples_are_capped_and_a_refused_addition_changes_nothing(store: Store) -> None:
    adapter_id = save(store, "r1", "w", "ann/one", *found("a"))
    add(store, adapter_id, given(*(str(number) for number in range(SAMPLES_PER_SPLIT - 1))))
    add(store, adapter_id, given("x", split="test"))
    before = shown(store, adapter_id)
    message = "would have 1001 given samples in split 'sample', at most 1000"
    with pytest.raises(SamplesError, match=message):
        add(store, adapter_id, given("y", "z"))
    assert shown(store, adapter_id) == before
    assert add(store, adapter_id, given("0", "y")) == Addition(1, 1, 0)
    assert len(inputs(store, adapter_id, "sample")) == SAMPLES_PER_SPLIT
    assert "a" not in inputs(store, adapter_id)


def test_found_samples_fill_what_given_ones_leave(store: Store) -> None:
    adapter_id = save(store, "r1", "w", "ann/one", *found(*(f"f{number}" for number in range(SAMPLES_PER_SPLIT))))
    add(store, adapter_id, given("a", "b"))
    read = inputs(store, adapter_id)
    assert (len(read), read[:2]) == (SAMPLES_PER_SPLIT, ["a", "b"])
    with store.write() as session:
        remove_given(session, adapter_id, "file mine.jsonl")
    assert inputs(store, adapter_id) == [f"f{number}" for number in range(SAMPLES_PER_SPLIT)]


def test_a_new_row_takes_the_given_samples_of_the_one_before(store: Store) -> None:
    first = save(store, "r1", "w1", "ann/one", *found("a"))
    add(store, first, given("old", "both"))
    second = save(store, "r2", "w2", "ann/one", *found("b", "both"))
    assert second != first
    assert inputs(store, second) == ["old", "both", "b"]
    with store.write() as session:
        remove_given(session, second, "file mine.jsonl")
    add(store, second, given("new"))
    # Back to the old revision: what was removed since stays removed.
    assert save(store, "r1", "w1", "ann/one", *found("a")) == first
    assert inputs(store, first) == ["new", "a"]
    assert save(store, "r3", "w1", "ann/one", *found("c")) == first
    assert inputs(store, first) == ["new", "c"]


def test_a_revision_that_cannot_be_used_does_not_lose_given_samples(store: Store) -> None:
    first = save(store, "r1", "w1", "ann/one", *found("a"))
    add(store, first, given("mine"))
    with store.write() as session:
        save_adapter(session, RepoFields("hub", "ann/one", "r2"), AdapterFields("", "", reason="no weights"))
    third = save(store, "r3", "w3", "ann/one", *found("b"))
    assert inputs(store, third) == ["mine", "b"]


def test_a_rename_keeps_given_samples(store: Store) -> None:
    adapter_id = save(store, "r1", "w1", "ann/old", *found("a"))
    add(store, adapter_id, given("mine"))
    with store.write() as session:
        assert rename_repo(session, "ann/old", "ann/new")
    assert inputs(store, adapter_id) == ["mine", "a"]


def test_a_rename_to_a_known_repository_joins_given_samples(store: Store) -> None:
    old = save(store, "r1", "w1", "ann/old", *found("a"))
    new = save(store, "r1", "w1", "ann/new", *found("a"))
    add(store, old, given("mine", "both"))
    add(store, new, tuple(Sample(text, "newer", "sample", "file mine.jsonl") for text in ("both", "other")))
    with store.write() as session:
        rename_repo(session, "ann/old", "ann/new")
        assert not session.get_one(Adapter, old).current
    assert [row[1:] for row in shown(store, new)] == [
        ("both", "newer"),
        ("other", "newer"),
        ("mine", "mine"),
        ("a", "found"),
    ]


def test_choice_is_that_of_the_smallest_digests() -> None:
    rows = [Sample(f"row {number % 400}", str(number)) for number in range(1000)]
    random.Random(0).shuffle(rows)
    firsts: dict[str, Sample] = {}
    for row in rows:
        firsts.setdefault(row.input, row)
    ranked = sorted(firsts.values(), key=lambda row: hashlib.sha256(row.input.encode()).hexdigest())
    for limit in (1, 20, 399):
        chosen, left_out = choose(rows, limit)
        assert [row.input for row in chosen] == [row.input for row in ranked[:limit]]
        assert left_out >= 400 - limit
    assert choose(rows, 400) == (list(firsts.values()), 0)
    assert choose(rows[:5], 0) == ([], 5)
