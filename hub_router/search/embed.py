"""Embeds the texts of the catalog's adapters, those that are missing or stale and no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hub_router.encoder import Encoder
from hub_router.progress import SILENT, Progress
from hub_router.search.texts import TaskText, task_texts, text_hash
from hub_router.store.features import Embedding, adapter_texts, save_embeddings, stale_embeddings
from hub_router.store.index_rows import known_vectors
from hub_router.store.session import Store

# One transaction each; a process that is killed loses the work of one.
_ADAPTERS_PER_STEP = 8


@dataclass(frozen=True)
class EmbedSummary:
    """What one call did.

    Args:
        embedded (int): adapters whose embeddings were written.
        unchanged (int): adapters whose embeddings were current.
        texts (int): texts that the encoder had to read.
    """

    embedded: int
    unchanged: int
    texts: int


def embed_missing(store: Store, encoder: Encoder, progress: Progress = SILENT) -> EmbedSummary:
    """Embeds what the encoder has not embedded yet of the adapters that are served.

    An adapter is stale when one of its texts, or the encoder's instruction, is not what its embeddings were made from.
    Of a stale adapter only the texts that changed are read again, and its rows are replaced together.

    Args:
        store (Store): the catalog.
        encoder (Encoder): the encoder.
        progress (Progress): where to report; counts adapters.

    Returns:
        EmbedSummary: numbers of adapters and texts.
    """
    with store.read() as session:
        texts = {adapter.adapter_id: task_texts(adapter) for adapter in adapter_texts(session)}
        wanted = {
            adapter_id: {(text.kind, text.position): text_hash(encoder.instruction, text.text) for text in own}
            for adapter_id, own in texts.items()
        }
        stale = stale_embeddings(session, encoder.name, wanted)
    read = 0
    with progress.task("embeddings", len(stale)) as advance:
        for start in range(0, len(stale), _ADAPTERS_PER_STEP):
            step = stale[start : start + _ADAPTERS_PER_STEP]
            read += _embed(store, encoder, {adapter_id: texts[adapter_id] for adapter_id in step})
            advance(len(step))
    return EmbedSummary(embedded=len(stale), unchanged=len(texts) - len(stale), texts=read)


def _embed(store: Store, encoder: Encoder, texts: Mapping[int, tuple[TaskText, ...]]) -> int:
    """Embeds and saves the texts of a few adapters; the number of texts that were not known already."""
    with store.read() as session:
        vectors = known_vectors(session, encoder.name, list(texts))
    hashes = {text.text: text_hash(encoder.instruction, text.text) for own in texts.values() for text in own}
    unknown = [text for text, digest in hashes.items() if digest not in vectors]
    if unknown:
        computed: np.ndarray = encoder.encode(unknown)
        vectors |= {hashes[text]: vector for text, vector in zip(unknown, computed, strict=True)}
    rows = [
        Embedding(adapter_id, text.kind, text.position, text.text, hashes[text.text], vectors[hashes[text.text]])
        for adapter_id, own in texts.items()
        for text in own
    ]
    with store.write() as session:
        save_embeddings(session, encoder.name, rows)
    return len(unknown)
