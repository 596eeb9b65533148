"""A catalog filled by hand, and what search must find in it, computed with plain loops."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import insert, select

from hub_router.search.ranking import Hit, search
from hub_router.store.adapters import Filters
from hub_router.store.features import Embedding, save_embeddings
from hub_router.store.session import Store
from hub_router.store.tables import Adapter, AdapterLabel, AdapterSample, EncoderState, Repo, TextEmbedding

ENCODER = "synthetic"
DIMENSION = 16


def vector_of(name: str, dimension: int = DIMENSION) -> np.ndarray:
    """A unit vector that depends on nothing but a name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    drawn = np.random.default_rng(seed).standard_normal(dimension)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


@dataclass(frozen=True)
class Entry:
    """One adapter as a test made it."""

    id: int
    columns: dict[str, Any]
    labels: dict[str, tuple[str, ...]]
    texts: dict[tuple[str, int], np.ndarray]


@dataclass
class World:
    """A catalog and a record of what was put into it.

    Args:
        store (Store): the catalog.
        index_dir (Path): folder of the FAISS caches.
        entries (dict[int, Entry]): by catalog id.
    """

    store: Store
    index_dir: Path
    entries: dict[int, Entry] = field(default_factory=dict)

    def add(
        self,
        name: str,
        *,
        card: str = "",
        samples: Sequence[str] = (),
        subfolder: str = "",
        labels: dict[str, tuple[str, ...]] | None = None,
        revision: str = "a" * 40,
        **columns: Any,
    ) -> int:
        """An adapter row with its samples and labels, without embeddings."""
        values: dict[str, Any] = {
            "status": "ready",
            "path": f"/data/{name}",
            "base_model": "org/base",
            "base_model_resolved": "org/base",
            "licence": "mit",
            "ranks": [8],
            "rank_min": 8,
            "rank_max": 8,
        } | columns
        with self.store.write() as session:
            repo = session.scalars(select(Repo).where(Repo.repo_id == name)).one_or_none()
            repo = repo or Repo(source="hub", repo_id=name)
            adapter = Adapter(repo=repo, revision=revision, subfolder=subfolder, card_text=card, **values)
            adapter.labels = [AdapterLabel(kind=kind, value=v) for kind, many in (labels or {}).items() for v in many]
            adapter.samples = [
                AdapterSample(split="sample", position=place, input=text, origin="samples.jsonl")
                for place, text in enumerate(samples)
            ]
            session.add(adapter)
            session.flush()
            number = adapter.id
        self.entries[number] = Entry(number, values, labels or {}, {})
        return number

    def embed(self, number: int, card: str | None = None, samples: Sequence[str] = ()) -> None:
        """Embeddings of an adapter, as vectors of the given names."""
        named = ([("card", 0, card)] if card is not None else []) + [("sample", n, t) for n, t in enumerate(samples)]
        self.embed_vectors(number, {(kind, place): (name, vector_of(name)) for kind, place, name in named})

    def embed_vectors(self, number: int, texts: dict[tuple[str, int], tuple[str, np.ndarray]]) -> None:
        rows = [
            Embedding(number, kind, place, text, hashlib.sha256(text.encode()).hexdigest(), vector)
            for (kind, place), (text, vector) in texts.items()
        ]
        with self.store.write() as session:
            save_embeddings(session, ENCODER, rows)
        self.entries[number].texts.clear()
        self.entries[number].texts.update({key: vector for key, (_, vector) in texts.items()})

    def change(self, number: int, **columns: Any) -> None:
        with self.store.write() as session:
            adapter = session.get_one(Adapter, number)
            for column, value in columns.items():
                setattr(adapter, column, value)
        self.entries[number].columns.update(columns)

    def search(self, query: np.ndarray, limit: int = 10, **filters: Any) -> list[Hit]:
        return search(self.store, self.index_dir, ENCODER, query, Filters(**filters), limit)

    def expected(
        self, query: np.ndarray, limit: int = 10, passes: Callable[[Entry], bool] = lambda entry: True
    ) -> list[tuple[int, float]]:
        """Ids and scores by the definition: the larger cosine of the card and of the samples' centroid."""
        scored = []
        for entry in self.entries.values():
            served = entry.columns["status"] == "ready" and entry.columns.get("current", True)
            if served and passes(entry) and entry.texts:
                scored.append((entry.id, score_of(entry.texts, query)))
        return sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:limit]

    def fill(self, count: int, seed: int = 0) -> None:
        """Many adapters at once, in clusters, each with a card and a sample; every fiftieth has the tag ``rare``."""
        rng = np.random.default_rng(seed)
        centres = rng.standard_normal((60, DIMENSION))
        cards, samples = (
            centres[np.arange(count) % 60] + 0.7 * rng.standard_normal((count, DIMENSION)) for _ in range(2)
        )
        numbers = range(1, count + 1)
        with self.store.write() as session:
            session.execute(insert(Repo), [{"id": n, "source": "hub", "repo_id": f"org/{n}"} for n in numbers])
            columns = {"status": "ready", "path": "/data", "licence": "mit", "base_model": "org/base", "revision": "a"}
            session.execute(insert(Adapter), [columns | {"id": n, "repo_pk": n} for n in numbers])
            session.execute(
                insert(AdapterLabel),
                [{"adapter_id": n, "kind": "tag", "value": "rare"} for n in numbers if n % 50 == 0],
            )
            session.execute(insert(EncoderState), {"encoder": ENCODER, "dimension": DIMENSION, "generation": 1})
            rows = []
            for n in numbers:
                texts = {}
                for kind, vectors in (("card", cards), ("sample", samples)):
                    vector = (vectors[n - 1] / np.linalg.norm(vectors[n - 1])).astype(np.float32)
                    texts[kind, 0] = vector
                    text = f"{kind} {n} {seed}"
                    rows.append(
                        {"adapter_id": n, "encoder": ENCODER, "kind": kind, "position": 0, "text": text}
                        | {"text_hash": hashlib.sha256(text.encode()).hexdigest(), "vector": vector.tobytes()}
                    )
                labels = {"tag": ("rare",)} if n % 50 == 0 else {}
                self.entries[n] = Entry(n, dict(columns), labels, texts)
            session.execute(insert(TextEmbedding), rows)


def score_of(texts: dict[tuple[str, int], np.ndarray], query: np.ndarray) -> float:
    """Score of one adapter in float64, element by element."""
    wanted = [float(value) for value in query]
    length = math.sqrt(sum(value * value for value in wanted))
    best = -2.0
    for kind in ("card", "sample"):
        own = [vector for (of, _), vector in texts.items() if of == kind]
        if not own:
            continue
        centroid = [sum(float(vector[place]) for vector in own) / len(own) for place in range(len(wanted))]
        size = math.sqrt(sum(value * value for value in centroid))
        if size > 1e-6:
            product = sum(a * b for a, b in zip(centroid, wanted, strict=True))
            best = max(best, product / size / length)
    return best
