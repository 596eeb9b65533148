"""What ``index`` computes from adapters: spectra per module, text embeddings per encoder, and what of it is stale.

A spectrum is stale when the adapter's weights hash is another than the one it was computed from; an embedding is stale
when the hash of instruction and text is. An adapter's features of one kind are replaced together, in the caller's
transaction, so a reader sees the old ones or the new ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import ColumnElement, and_, case, delete, func, insert, select, update
from sqlalchemy.orm import Session

from hub_router.errors import StoreError
from hub_router.records import AdapterRecord, Spectrum
from hub_router.store.rows import adapter_rows, chunks, fetch, plain
from hub_router.store.tables import (
    Adapter,
    AdapterLabel,
    AdapterSample,
    AdapterSpectrum,
    EncoderState,
    Repo,
    TextEmbedding,
)
from hub_router.store.vectors import from_bytes, matrix_from_bytes, to_bytes


@dataclass(frozen=True)
class Embedding:
    """One embedded text of an adapter.

    Args:
        adapter_id (int): catalog id.
        kind (str): ``card`` or ``sample``.
        position (int): number of the text within its kind.
        text (str): the text, shown as the reason of a hit.
        text_hash (str): sha256 of instruction and text.
        vector (np.ndarray): float32 ``(D,)``, unit length.
    """

    adapter_id: int
    kind: str
    position: int
    text: str
    text_hash: str
    vector: np.ndarray


@dataclass(frozen=True)
class EmbeddingState:
    """State of one encoder's embeddings.

    Args:
        encoder (str): the encoder's name.
        dimension (int): D.
        generation (int): grows with every change, so that a FAISS file can be matched.
    """

    encoder: str
    dimension: int
    generation: int


@dataclass(frozen=True)
class AdapterTexts:
    """The texts of an adapter that search embeds.

    Args:
        adapter_id (int): catalog id.
        ref (str): full name.
        card_text (str): prose of the card, empty where there is none.
        samples (tuple[str, ...]): inputs of the samples that may be used for search, in order.
        subfolder (str): folder of the adapter inside its repository, the last part of ``ref``.
        base_model (str | None): base model as resolved, else as written.
        labels (tuple[str, ...]): tags and datasets of the card, sorted.
    """

    adapter_id: int
    ref: str
    card_text: str
    samples: tuple[str, ...]
    subfolder: str = ""
    base_model: str | None = None
    labels: tuple[str, ...] = ()


def save_spectra(session: Session, adapter_id: int, weights_hash: str, spectra: Sequence[Spectrum]) -> None:
    """Replaces an adapter's spectra.

    Args:
        session (Session): a writing session.
        adapter_id (int): catalog id.
        weights_hash (str): identity of the weights that the spectra were computed from.
        spectra (Sequence[Spectrum]): one per module.
    """
    session.execute(delete(AdapterSpectrum).where(AdapterSpectrum.adapter_id == adapter_id))
    rows = [
        {
            "adapter_id": adapter_id,
            "module": spectrum.module,
            "singular_values": to_bytes(spectrum.singular_values),
            "direction": None if spectrum.direction is None else to_bytes(spectrum.direction),
            "ambiguous": spectrum.ambiguous,
            "weights_hash": weights_hash,
        }
        for spectrum in spectra
    ]
    if rows:
        session.execute(insert(AdapterSpectrum), rows)


def load_spectra(session: Session, adapter_id: int) -> dict[str, Spectrum]:
    """An adapter's spectra that belong to its present weights.

    Args:
        session (Session): a session of the store.
        adapter_id (int): catalog id.

    Returns:
        dict[str, Spectrum]: by module, sorted; empty where ``index`` has not run or the weights changed since.
    """
    statement = (
        select(
            AdapterSpectrum.module,
            AdapterSpectrum.singular_values,
            AdapterSpectrum.direction,
            AdapterSpectrum.ambiguous,
        )
        .join(Adapter, _spectrum_is_current())
        .where(Adapter.id == adapter_id)
        .order_by(AdapterSpectrum.module)
    )
    return {
        module: Spectrum(
            module=module,
            singular_values=from_bytes(values),
            direction=None if direction is None else from_bytes(direction),
            ambiguous=ambiguous,
        )
        for module, values, direction, ambiguous in session.execute(statement)
    }


def stale_spectra(session: Session) -> list[AdapterRecord]:
    """Ready adapters in their newest revision that have no spectra of their present weights."""
    current = select(AdapterSpectrum.adapter_id).where(_spectrum_is_current()).exists()
    statement = adapter_rows().where(Adapter.current.is_(True), Adapter.status == "ready", ~current)
    return fetch(session, statement.order_by(Adapter.id))


def adapter_texts(session: Session) -> list[AdapterTexts]:
    """Card, labels and sample inputs of every ready adapter in its newest revision, by catalog id.

    Samples of the ``test`` split are left out: evaluation would otherwise find what search was told.
    """
    served = and_(Adapter.current.is_(True), Adapter.status == "ready")
    inputs: dict[int, dict[str, None]] = {}
    statement = (
        select(AdapterSample.adapter_id, AdapterSample.input)
        .join(Adapter, Adapter.id == AdapterSample.adapter_id)
        .where(served, AdapterSample.split == "sample")
        .order_by(AdapterSample.adapter_id, AdapterSample.position)
    )
    for adapter_id, text in session.execute(statement):
        # What a user gave may repeat what the repository brought.
        inputs.setdefault(adapter_id, {})[text] = None
    labels: dict[int, list[str]] = {}
    statement = (
        select(AdapterLabel.adapter_id, AdapterLabel.value)
        .join(Adapter, Adapter.id == AdapterLabel.adapter_id)
        .where(served, AdapterLabel.kind.in_(("tag", "dataset")))
        .order_by(AdapterLabel.adapter_id, AdapterLabel.kind, AdapterLabel.value)
    )
    for adapter_id, label in session.execute(statement):
        labels.setdefault(adapter_id, []).append(label)
    base = func.coalesce(Adapter.base_model_resolved, Adapter.base_model)
    adapters = select(Adapter.id, Repo.repo_id, Adapter.subfolder, Adapter.card_text, base)
    adapters = adapters.join(Repo, Repo.id == Adapter.repo_pk).where(served).order_by(Adapter.id)
    return [
        AdapterTexts(
            adapter_id=adapter_id,
            ref=f"{repo_id}/{folder}" if folder else repo_id,
            card_text=card,
            samples=tuple(inputs.get(adapter_id, ())),
            subfolder=folder,
            base_model=base_model,
            labels=tuple(labels.get(adapter_id, ())),
        )
        for adapter_id, repo_id, folder, card, base_model in session.execute(adapters)
    ]


def stale_embeddings(session: Session, encoder: str, wanted: Mapping[int, Mapping[tuple[str, int], str]]) -> list[int]:
    """Adapters whose stored embeddings are not exactly those of the wanted texts.

    Args:
        session (Session): a session of the store.
        encoder (str): the encoder's name.
        wanted (Mapping): by catalog id: text hash by (kind, position).

    Returns:
        list[int]: catalog ids in the order of ``wanted``.
    """
    stored: dict[int, dict[tuple[str, int], str]] = {}
    statement = select(
        TextEmbedding.adapter_id, TextEmbedding.kind, TextEmbedding.position, TextEmbedding.text_hash
    ).where(TextEmbedding.encoder == encoder)
    for adapter_id, kind, position, text_hash in session.execute(statement):
        stored.setdefault(adapter_id, {})[kind, position] = text_hash
    return [adapter_id for adapter_id, hashes in wanted.items() if stored.get(adapter_id, {}) != dict(hashes)]


def save_embeddings(session: Session, encoder: str, rows: Sequence[Embedding]) -> None:
    """Replaces the embeddings of every adapter that occurs in ``rows``, and moves the encoder's generation on.

    Args:
        session (Session): a writing session.
        encoder (str): the encoder's name.
        rows (Sequence[Embedding]): for each adapter all of its texts.

    Raises:
        StoreError: vectors of another dimension than the encoder's others, or not finite; lists the adapters.
    """
    if not rows:
        return
    dimension = _advance(session, encoder, rows[0].vector.shape[-1])
    unusable = sorted({r.adapter_id for r in rows if r.vector.shape != (dimension,) or not np.isfinite(r.vector).all()})
    if unusable:
        raise StoreError(
            f"encoder {encoder!r} gave adapters {unusable[:10]} vectors that are not finite or not of the shape "
            f"({dimension},) of its others; if the model behind this name was replaced, index under another name with "
            "--encoder"
        )
    for chunk in chunks(sorted({row.adapter_id for row in rows})):
        session.execute(
            delete(TextEmbedding).where(TextEmbedding.encoder == encoder, TextEmbedding.adapter_id.in_(chunk))
        )
    session.execute(
        insert(TextEmbedding),
        [
            {
                "adapter_id": row.adapter_id,
                "encoder": encoder,
                "kind": row.kind,
                "position": row.position,
                "text": row.text,
                "text_hash": row.text_hash,
                "vector": to_bytes(row.vector),
            }
            for row in rows
        ],
    )


def embedding_state(session: Session, encoder: str) -> EmbeddingState | None:
    """The encoder's dimension and generation; None before its first embedding."""
    statement = select(EncoderState.encoder, EncoderState.dimension, EncoderState.generation)
    row = session.execute(statement.where(EncoderState.encoder == encoder)).one_or_none()
    return None if row is None else EmbeddingState(*row)


def encoders(session: Session) -> list[str]:
    """Encoders that the catalog holds embeddings of, by name."""
    return list(session.scalars(select(EncoderState.encoder).order_by(EncoderState.encoder)))


def load_embeddings(
    session: Session, encoder: str, adapter_ids: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """All vectors of one encoder.

    Args:
        session (Session): a session of the store.
        encoder (str): the encoder's name.
        adapter_ids (Sequence[int] | None): only these adapters; default all, served or not.

    Returns:
        tuple[np.ndarray, np.ndarray]: catalog ids int64 ``(N,)``, vectors float32 ``(N, D)``; ordered by adapter, kind
        and position.
    """
    state = embedding_state(session, encoder)
    statement = select(TextEmbedding.adapter_id, TextEmbedding.vector).where(TextEmbedding.encoder == encoder)
    order = (TextEmbedding.adapter_id, TextEmbedding.kind, TextEmbedding.position)
    if adapter_ids is None:
        rows = list(plain(session, statement.order_by(*order)).all())
    else:
        rows = []
        for chunk in chunks(sorted({int(adapter_id) for adapter_id in adapter_ids})):
            rows += plain(session, statement.where(TextEmbedding.adapter_id.in_(chunk)).order_by(*order)).all()
    owners = np.fromiter((row[0] for row in rows), dtype=np.int64, count=len(rows))
    return owners, matrix_from_bytes([row[1] for row in rows], state.dimension if state else 0)


def embedding_counts(session: Session, adapter_id: int) -> dict[str, int]:
    """Number of an adapter's embedded texts by encoder."""
    statement = (
        select(TextEmbedding.encoder, func.count())
        .where(TextEmbedding.adapter_id == adapter_id)
        .group_by(TextEmbedding.encoder)
        .order_by(TextEmbedding.encoder)
    )
    return {row.encoder: row[1] for row in session.execute(statement)}


def _spectrum_is_current() -> ColumnElement[bool]:
    return and_(AdapterSpectrum.adapter_id == Adapter.id, AdapterSpectrum.weights_hash == Adapter.weights_hash)


def _advance(session: Session, encoder: str, dimension: int) -> int:
    """Moves the encoder's generation on; the dimension of its stored vectors, the given one for a new encoder."""
    # Milliseconds, and never the same twice: a catalog that was deleted and made anew, or restored from a backup, must
    # not come to a number that a FAISS file of its earlier life bears.
    now = time.time_ns() // 1_000_000
    state = embedding_state(session, encoder)
    if state is None:
        session.execute(insert(EncoderState).values(encoder=encoder, dimension=dimension, generation=now))
        return dimension
    session.execute(
        update(EncoderState)
        .where(EncoderState.encoder == encoder)
        .values(generation=case((EncoderState.generation < now, now), else_=EncoderState.generation + 1))
        .execution_options(synchronize_session=False)
    )
    return state.dimension
