from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from search_world import ENCODER, World, vector_of
from sqlalchemy import and_, delete, update

from hub_router.search.index import (
    EXACT_ROWS,
    indexed_encoder,
    is_current,
    open_index,
    rebuild_index,
    refresh_index,
)
from hub_router.store.features import Embedding, EmbeddingState, embedding_state, save_embeddings
from hub_router.store.session import Store, open_store
from hub_router.store.tables import Adapter, TextEmbedding

LARGE = EXACT_ROWS // 2 + 500


def small(world: World, count: int = 12) -> World:
    for n in range(count):
        world.embed(world.add(f"org/{n}"), card=f"card {n}", samples=[f"sample {n}"])
    return world


def state_of(world: World) -> EmbeddingState:
    with world.store.read() as session:
        state = embedding_state(session, ENCODER)
    assert state is not None
    return state


def home_of(world: World) -> Path:
    (home,) = world.index_dir.iterdir()
    return home


def build_of(world: World) -> dict[str, object]:
    return json.loads((home_of(world) / "current.json").read_text())


def vectors_file(world: World) -> Path:
    return home_of(world) / str(build_of(world)["folder"]) / "vectors.faiss"


def found(world: World, query: np.ndarray, limit: int = 10) -> list[tuple[int, float]]:
    return [(hit.adapter.id, round(hit.score, 5)) for hit in world.search(query, limit)]


def expected(world: World, query: np.ndarray, limit: int = 10) -> list[tuple[int, float]]:
    return [(number, round(score, 5)) for number, score in world.expected(query, limit)]


@pytest.fixture(scope="module")
def large_template(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A catalog too large for an exact scan, and its index."""
    folder = tmp_path_factory.mktemp("large")
    with open_store(f"sqlite:///{folder / 'catalog.db'}") as store:
        world = World(store, folder / "faiss")
        world.fill(LARGE)
        assert refresh_index(store, world.index_dir, ENCODER)
    return world


@pytest.fixture
def large(large_template: World, tmp_path: Path) -> World:
    shutil.copy(large_template.index_dir.parent / "catalog.db", tmp_path / "large.db")
    shutil.copytree(large_template.index_dir, tmp_path / "large-faiss")
    return World(
        open_store(f"sqlite:///{tmp_path / 'large.db'}"), tmp_path / "large-faiss", dict(large_template.entries)
    )


def test_refresh_builds_once(world: World) -> None:
    assert not refresh_index(world.store, world.index_dir, ENCODER)
    assert not world.index_dir.exists()
    small(world)
    assert not is_current(world.index_dir, state_of(world))
    assert refresh_index(world.store, world.index_dir, ENCODER)
    assert is_current(world.index_dir, state_of(world))
    before = build_of(world)
    assert not refresh_index(world.store, world.index_dir, ENCODER)
    assert build_of(world) == before
    assert before["rows"] == 24


def test_every_change_reaches_the_next_search(world: World, query: np.ndarray) -> None:
    small(world)
    assert found(world, query) == expected(world, query)
    number = world.add("org/new")
    world.embed(number, card="query itself")
    world.embed(next(iter(world.entries)), card="other words", samples=["other", "inputs"])
    assert found(world, vector_of("query itself"))[0] == (number, 1.0)
    assert found(world, query) == expected(world, query)
    assert len(list(home_of(world).glob("build-*"))) == 1


def test_indexes_of_two_encoders_do_not_mix(world: World, query: np.ndarray) -> None:
    small(world)
    with world.store.read() as session:
        assert indexed_encoder(session) == ENCODER
    with world.store.write() as session:
        save_embeddings(session, "org/other", [Embedding(1, "card", 0, "text", "0" * 64, vector_of("text", 8))])
    assert refresh_index(world.store, world.index_dir, "org/other")
    assert found(world, query) == expected(world, query)
    assert len(list(world.index_dir.iterdir())) == 2
    with world.store.read() as session:
        assert indexed_encoder(session) is None


def damage(world: World, how: str) -> None:
    file = vectors_file(world)
    pointer = home_of(world) / "current.json"
    size = file.stat().st_size
    match how:
        case "truncated":
            with file.open("r+b") as handle:
                handle.truncate(size // 2)
        case "empty":
            file.write_bytes(b"")
        case "noise of the same size":
            file.write_bytes(np.random.default_rng(0).bytes(size))
        case "zeros of the same size":
            file.write_bytes(bytes(size))
        case "noise in the vectors":
            held = bytearray(file.read_bytes())
            held[size // 2 : size // 2 + 400] = np.random.default_rng(1).standard_normal(100).astype("<f4").tobytes()
            file.write_bytes(held)
        case "no vectors file":
            file.unlink()
        case "no folder":
            shutil.rmtree(file.parent)
        case "no marks":
            (file.parent / "marks.npy").unlink()
        case "pointer that is no JSON":
            pointer.write_text("{")
        case "pointer of another shape":
            pointer.write_text("[1, 2]")
        case "pointer out of the folder":
            shutil.copytree(file.parent, world.index_dir.parent / "elsewhere")
            pointer.write_text(json.dumps(build_of(world) | {"folder": "../../elsewhere"}))


FAULTS = [
    *("truncated", "empty", "noise of the same size", "zeros of the same size", "no vectors file", "no folder"),
    *("no marks", "pointer that is no JSON", "pointer of another shape", "pointer out of the folder"),
]


@pytest.mark.parametrize("how", [*FAULTS, "noise in the vectors"])
def test_damaged_files_are_replaced(world: World, query: np.ndarray, how: str) -> None:
    small(world)
    assert found(world, query, 24) == expected(world, query, 24)
    damage(world, how)
    assert found(world, query, 24) == expected(world, query, 24)
    assert is_current(world.index_dir, state_of(world))
    assert found(world, query, 24) == expected(world, query, 24)


@pytest.mark.parametrize("how", FAULTS)
def test_damaged_files_of_a_large_index_are_no_basis_for_an_update(large: World, how: str) -> None:
    damage(large, how)
    number = large.add("org/new")
    large.embed(number, card="something new")
    assert found(large, vector_of("something new"), 1) == [(number, 1.0)]
    assert is_current(large.index_dir, state_of(large))
    assert build_of(large)["rows"] == 2 * LARGE + 1


def test_file_that_is_cut_while_it_is_mapped(large: World, query: np.ndarray) -> None:
    hits = found(large, query)
    damage(large, "truncated")
    assert found(large, query) == hits


def test_index_of_other_vectors_is_noticed(world: World, query: np.ndarray) -> None:
    small(world, 80)
    refresh_index(world.store, world.index_dir, ENCODER)
    kept = vectors_file(world).read_bytes()
    for n, number in enumerate(list(world.entries)):
        world.embed(number, card=f"quite another card {n}", samples=[f"quite another sample {n}"])
    refresh_index(world.store, world.index_dir, ENCODER)
    vectors_file(world).write_bytes(kept)
    assert found(world, query, 3) == expected(world, query, 3)
    assert vectors_file(world).read_bytes() != kept


def test_catalog_that_was_deleted_and_made_anew(tmp_path: Path, query: np.ndarray) -> None:
    for round_ in ("first", "second"):
        (tmp_path / "catalog.db").unlink(missing_ok=True)
        with open_store(f"sqlite:///{tmp_path / 'catalog.db'}") as store:
            world = World(store, tmp_path / "faiss")
            for n in range(5 if round_ == "first" else 8):
                world.embed(world.add(f"org/{n}"), card=f"card {n}")
            assert found(world, query) == expected(world, query)
        time.sleep(0.002)


def test_folder_that_cannot_be_written_to(world: World, query: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    small(world)
    world.index_dir.write_text("a file where the folder should be")
    assert found(world, query) == expected(world, query)
    assert "kept in memory" in caplog.text


def test_leftovers_of_killed_builds_are_removed_once_old(world: World) -> None:
    small(world)
    refresh_index(world.store, world.index_dir, ENCODER)
    old, young = (home_of(world) / f"build-{letter * 12}" for letter in "ab")
    for folder in (old, young):
        folder.mkdir()
        (folder / "vectors.faiss").write_bytes(b"half")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    world.embed(world.add("org/new"), card="new")
    refresh_index(world.store, world.index_dir, ENCODER)
    assert young.exists()
    assert not old.exists()
    assert len(list(home_of(world).glob("build-*"))) == 2


def test_large_index_against_the_definition(large: World) -> None:
    """The nearest cells hold nearly all that an exact scan finds; with few adapters to choose from, all of it."""
    rng = np.random.default_rng(5)
    shared, best = 0, 0
    for start in rng.choice(LARGE, 10, replace=False):
        query = large.entries[int(start) + 1].texts["sample", 0] + 0.5 * vector_of(str(start))
        truth = [number for number, _ in large.expected(query, 10)]
        hits = [hit.adapter.id for hit in large.search(query, 10)]
        shared += len(set(truth) & set(hits))
        best += truth[0] == hits[0]
        rare = large.expected(query, 10, lambda entry: "rare" in entry.labels.get("tag", ()))
        assert [hit.adapter.id for hit in large.search(query, 10, tag="rare")] == [number for number, _ in rare]
    assert shared >= 95
    assert best == 10


def test_large_index_is_brought_up_to_date_in_place(large: World, query: np.ndarray) -> None:
    before = build_of(large)
    large.embed(17, card="changed card", samples=["changed sample", "and another"])
    large.embed(18, samples=["only a sample left"])
    added = large.add("org/new")
    large.embed(added, card="new card")
    with large.store.write() as session:
        session.delete(session.get_one(Adapter, 19))
    del large.entries[19]
    assert refresh_index(large.store, large.index_dir, ENCODER)
    after = build_of(large)
    assert after["trained_rows"] == before["trained_rows"]
    assert (before["changed_rows"], after["changed_rows"]) == (0, 8)
    assert after["rows"] == before["rows"] - 1 + 1 - 2
    state = state_of(large)
    with large.store.read() as session:
        updated = open_index(session, large.index_dir, state)
        fresh = rebuild_index(session, large.index_dir, state, from_scratch=True)
    assert updated.rows == fresh.rows
    ids = np.array([16, 17, 18, 19, 20, added])
    for name in ("changed card", "and another", "only a sample left", "new card"):
        vector = vector_of(name)
        for one, other in zip(
            updated.nearest(vector, 12, among=ids), fresh.nearest(vector, 12, among=ids), strict=True
        ):
            np.testing.assert_allclose(one, other, atol=1e-6)
        assert found(large, vector, 3) == expected(large, vector, 3)
    assert 19 not in updated.nearest(query.astype(np.float32), 12, among=ids)[0]


def test_large_index_is_built_anew_after_many_changes(large: World) -> None:
    with large.store.write() as session:
        late = and_(TextEmbedding.adapter_id > LARGE - 300, TextEmbedding.kind == "card")
        session.execute(delete(TextEmbedding).where(late))
        early = TextEmbedding.adapter_id <= LARGE // 4
        session.execute(update(TextEmbedding).where(early).values(text_hash="f" * 64))
    large.embed(1, card="one more")
    assert refresh_index(large.store, large.index_dir, ENCODER)
    assert build_of(large)["changed_rows"] == 0
    assert build_of(large)["trained_rows"] == 2 * LARGE - 300 - 1


WORKER = """
import sys
from pathlib import Path
import numpy as np
from hub_router.search.index import refresh_index
from hub_router.search.ranking import search
from hub_router.store.session import open_store

url, folder, encoder = sys.argv[1:]
query = np.array([float(value) for value in sys.stdin.readline().split()])
with open_store(url) as store:
    refresh_index(store, Path(folder), encoder)
    for _ in range(20):
        hits = search(store, Path(folder), encoder, query)
    print([hit.adapter.id for hit in hits])
"""


def test_processes_that_build_at_once(world: World, query: np.ndarray) -> None:
    small(world, 40)
    arguments = [sys.executable, "-c", WORKER, world.store.url, str(world.index_dir), ENCODER]
    workers = [
        subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    # They wait for the query once all are imported, so that they start together.
    time.sleep(2)
    line = " ".join(repr(float(value)) for value in query) + "\n"
    answers = []
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(line)
        worker.stdin.flush()
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        answers.append(out.strip())
    assert set(answers) == {str([number for number, _ in expected(world, query)])}
    assert is_current(world.index_dir, state_of(world))


def test_store_is_reopened_by_a_new_process(store: Store, tmp_path: Path, query: np.ndarray) -> None:
    world = small(World(store, tmp_path / "faiss"))
    refresh_index(store, world.index_dir, ENCODER)
    before = build_of(world)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, store.url, str(world.index_dir), ENCODER],
        input=" ".join(repr(float(value)) for value in query) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str([number for number, _ in expected(world, query)])
    assert build_of(world) == before
