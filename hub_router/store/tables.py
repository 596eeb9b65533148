"""The catalog's tables (SQLAlchemy 2, portable SQL: SQLite by default, PostgreSQL by URL).

A repository row remembers the last revision seen, so that an unchanged repository costs no download; an adapter row is
one (repository, revision, subfolder). Every feature row carries what it was computed from, so ``index`` knows what is
stale. Vectors are little-endian float32 bytes.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    false,
    text,
    true,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

# Constraint names must be known for batch migrations to alter them on SQLite.
NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


# Kind of the labels that keep what a card, tags and a manifest say about the base model.
STATEMENT = "base_model"


def utcnow() -> datetime:
    """Current time, UTC, with time zone."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """Declarative base with named constraints."""

    metadata = MetaData(naming_convention=NAMING)


class Repo(Base):
    """A Hub repository or a local folder that was asked for at least once.

    ``state`` is the outcome of the last look: ``ok gated missing renamed failed unsupported``. ``revision`` is the sha
    whose contents the adapter rows describe; it is only set after all of its files were verified.
    """

    __tablename__ = "repos"
    __table_args__ = (UniqueConstraint("source", "repo_id"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    source: Mapped[str] = mapped_column(String(16))
    repo_id: Mapped[str] = mapped_column(String(1024))
    revision: Mapped[str | None] = mapped_column(String(64))
    requested_revision: Mapped[str | None] = mapped_column(String(255))
    requested_subfolders: Mapped[list[str] | None] = mapped_column(JSON)
    requested_checkpoints: Mapped[str] = mapped_column(String(16), default="newest", server_default="newest")
    state: Mapped[str] = mapped_column(String(16), default="ok")
    reason: Mapped[str] = mapped_column(Text, default="")
    renamed_to: Mapped[str | None] = mapped_column(String(1024))
    author: Mapped[str | None] = mapped_column(String(255), index=True)
    last_modified: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    first_seen: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=utcnow)
    last_seen: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=utcnow)

    adapters: Mapped[list[Adapter]] = relationship(back_populates="repo", cascade="all, delete-orphan")


class Adapter(Base):
    """One adapter at one revision. ``current`` marks the revision that search and compose offer."""

    __tablename__ = "adapters"
    __table_args__ = (
        UniqueConstraint("repo_pk", "revision", "subfolder"),
        Index("ix_adapters_current_base", "current", "status", "base_model_resolved"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    repo_pk: Mapped[int] = mapped_column(ForeignKey("repos.id", ondelete="CASCADE"), index=True)
    revision: Mapped[str] = mapped_column(String(64))
    subfolder: Mapped[str] = mapped_column(String(1024), default="")
    current: Mapped[bool] = mapped_column(Boolean, default=True, server_default=true())
    status: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text, default="")
    path: Mapped[str] = mapped_column(Text)
    base_model: Mapped[str | None] = mapped_column(String(1024))
    base_model_resolved: Mapped[str | None] = mapped_column(String(1024))
    base_model_revision: Mapped[str | None] = mapped_column(String(64))
    base_model_confidence: Mapped[str] = mapped_column(String(16), default="none", server_default="none")
    base_model_evidence: Mapped[list[str]] = mapped_column(JSON, default=list, server_default="[]")
    licence: Mapped[str] = mapped_column(String(255), default="unknown", index=True)
    peft_type: Mapped[str] = mapped_column(String(64), default="")
    rank_min: Mapped[int | None] = mapped_column(Integer)
    rank_max: Mapped[int | None] = mapped_column(Integer)
    ranks: Mapped[list[int]] = mapped_column(JSON, default=list)
    dtypes: Mapped[list[str]] = mapped_column(JSON, default=list)
    module_count: Mapped[int] = mapped_column(Integer, default=0)
    parameters: Mapped[int] = mapped_column(BigInteger, default=0)
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    weights_hash: Mapped[str] = mapped_column(String(64), default="", index=True)
    rslora: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    card_text: Mapped[str] = mapped_column(Text, default="", deferred=True)
    notes: Mapped[list[str]] = mapped_column(JSON, default=list)
    downloads: Mapped[int | None] = mapped_column(BigInteger)
    likes: Mapped[int | None] = mapped_column(BigInteger)
    added_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=utcnow)

    repo: Mapped[Repo] = relationship(back_populates="adapters")
    labels: Mapped[list[AdapterLabel]] = relationship(cascade="all, delete-orphan")
    files: Mapped[list[AdapterFile]] = relationship(cascade="all, delete-orphan")
    samples: Mapped[list[AdapterSample]] = relationship(cascade="all, delete-orphan", order_by="AdapterSample.position")


class AdapterLabel(Base):
    """A value that adapters are filtered by: ``kind`` is ``tag``, ``dataset`` or ``target``.

    Of kind ``base_model`` it is no filter, but what a card, a tag or a manifest says about the base model, kept for the
    day on which a choice of the user is withdrawn.
    """

    __tablename__ = "adapter_labels"
    __table_args__ = (Index("ix_adapter_labels_kind_value", "kind", "value"),)

    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    value: Mapped[str] = mapped_column(String(512), primary_key=True)


class AdapterFile(Base):
    """A verified file. ``hub_hash`` is the hash the Hub states: sha256 for LFS files, git blob sha1 otherwise."""

    __tablename__ = "adapter_files"

    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    path: Mapped[str] = mapped_column(String(1024), primary_key=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    hub_hash: Mapped[str | None] = mapped_column(String(64))


class BaseModelChoice(Base):
    """What the user says about base models: ``kind`` is ``adapter`` (``pattern`` is its reference) or ``rule``.

    A rule's ``pattern`` is a shell pattern for ``base_model_name_or_path`` as adapters state it.
    """

    __tablename__ = "base_model_choices"

    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    pattern: Mapped[str] = mapped_column(String(1024), primary_key=True)
    base_model: Mapped[str] = mapped_column(String(1024))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=utcnow)


class AdapterSample(Base):
    """An example of the adapter's task; ``split`` is ``sample`` (routing, search) or ``test`` (evaluation).

    ``given`` marks what a user added: it stays when the repository brings other samples.
    """

    __tablename__ = "adapter_samples"

    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    split: Mapped[str] = mapped_column(String(16), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    input: Mapped[str] = mapped_column(Text)
    output: Mapped[str] = mapped_column(Text, default="")
    origin: Mapped[str] = mapped_column(String(255))
    given: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())


class AdapterSpectrum(Base):
    """Singular values and leading right singular vector of one module (the Arrow prototype)."""

    __tablename__ = "adapter_spectra"

    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    module: Mapped[str] = mapped_column(String(512), primary_key=True)
    singular_values: Mapped[bytes] = mapped_column(LargeBinary)
    direction: Mapped[bytes | None] = mapped_column(LargeBinary)
    ambiguous: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    weights_hash: Mapped[str] = mapped_column(String(64))


class TextEmbedding(Base):
    """Unit-length embedding of one text of an adapter by one encoder.

    ``kind`` is ``card`` or ``sample``; ``position`` numbers the texts of a kind; ``text_hash`` is the sha256 of the
    instruction and the text, so a changed text or instruction makes the row stale.
    """

    __tablename__ = "text_embeddings"
    __table_args__ = (Index("ix_text_embeddings_encoder_adapter", "encoder", "adapter_id"),)

    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    encoder: Mapped[str] = mapped_column(String(255), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    text: Mapped[str] = mapped_column(Text)
    text_hash: Mapped[str] = mapped_column(String(64))
    vector: Mapped[bytes] = mapped_column(LargeBinary)


class AdapterGaussian(Base):
    """Mean and low-rank covariance of an adapter's sample embeddings by one encoder, never a D x D matrix.

    ``factors`` are the eigenvectors of the sample covariance, each times the square root of its eigenvalue, row after
    row; ``fingerprint`` is the sha256 of the text hashes of the samples, so other samples make the row stale.
    """

    __tablename__ = "adapter_gaussians"

    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    encoder: Mapped[str] = mapped_column(String(255), primary_key=True)
    samples: Mapped[int] = mapped_column(Integer)
    fingerprint: Mapped[str] = mapped_column(String(64))
    mean: Mapped[bytes] = mapped_column(LargeBinary)
    factors: Mapped[bytes] = mapped_column(LargeBinary)


class EncoderState(Base):
    """One row per encoder, so that cached files can be matched.

    ``generation`` grows with every change of its embeddings, ``gaussian_generation`` with every change of the Gaussians
    that were fitted to them.
    """

    __tablename__ = "encoder_states"

    encoder: Mapped[str] = mapped_column(String(255), primary_key=True)
    dimension: Mapped[int] = mapped_column(Integer)
    generation: Mapped[int] = mapped_column(BigInteger, default=0)
    gaussian_generation: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")


class PrototypeSet(Base):
    """A named, versioned set of routing prototypes, such as a MAPLE-refined child of the Arrow prototypes.

    ``parent_method`` is the method that it was refined from where no set is its parent; ``data_hash`` is the sha256 of
    the training data.
    """

    __tablename__ = "prototype_sets"
    __table_args__ = (UniqueConstraint("name", "version"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255))
    version: Mapped[int] = mapped_column(Integer, default=1)
    method: Mapped[str] = mapped_column(String(64))
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("prototype_sets.id", ondelete="SET NULL"))
    # Defaults as SQL, for alembic cannot compare an empty string with what the database reports.
    parent_method: Mapped[str] = mapped_column(String(64), default="", server_default=text("''"))
    base_model: Mapped[str] = mapped_column(String(1024))
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    metrics: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    data_hash: Mapped[str] = mapped_column(String(64), default="", server_default=text("''"))
    seed: Mapped[int | None] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=utcnow)

    vectors: Mapped[list[PrototypeVector]] = relationship(cascade="all, delete-orphan")


class PrototypeVector(Base):
    """One prototype of a set: adapter, module, vector, and the weights it was made for."""

    __tablename__ = "prototype_vectors"

    set_id: Mapped[int] = mapped_column(ForeignKey("prototype_sets.id", ondelete="CASCADE"), primary_key=True)
    adapter_id: Mapped[int] = mapped_column(
        ForeignKey("adapters.id", ondelete="RESTRICT"), primary_key=True, index=True
    )
    module: Mapped[str] = mapped_column(String(512), primary_key=True)
    vector: Mapped[bytes] = mapped_column(LargeBinary)
    weights_hash: Mapped[str] = mapped_column(String(64))


class Composition(Base):
    """A routed model's recipe under a name: base, method, hyperparameters, members in pool order."""

    __tablename__ = "compositions"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255), unique=True)
    base_model: Mapped[str] = mapped_column(String(1024))
    method: Mapped[str] = mapped_column(String(64))
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=utcnow)
    updated_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=utcnow, onupdate=utcnow)

    members: Mapped[list[CompositionMember]] = relationship(
        cascade="all, delete-orphan", order_by="CompositionMember.position"
    )


class CompositionMember(Base):
    """One adapter of a composition: its place on axis E, the user's name, and the weights it was composed with."""

    __tablename__ = "composition_members"
    __table_args__ = (UniqueConstraint("composition_id", "name"),)

    composition_id: Mapped[int] = mapped_column(ForeignKey("compositions.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    adapter_id: Mapped[int] = mapped_column(ForeignKey("adapters.id", ondelete="RESTRICT"), index=True)
    name: Mapped[str] = mapped_column(String(255))
    weights_hash: Mapped[str] = mapped_column(String(64))

    adapter: Mapped[Adapter] = relationship()


class SyncRun(Base):
    """One call of ``sync``: what was asked, and when it ended (null while running or after a kill)."""

    __tablename__ = "sync_runs"

    id: Mapped[int] = mapped_column(primary_key=True)
    request: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    started_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), default=utcnow)
    finished_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))

    outcomes: Mapped[list[SyncOutcome]] = relationship(cascade="all, delete-orphan")


class SyncOutcome(Base):
    """What became of one adapter or repository in one run.

    ``outcome`` is one of ``added updated unchanged unsupported gated missing failed``.
    """

    __tablename__ = "sync_outcomes"

    id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("sync_runs.id", ondelete="CASCADE"), index=True)
    source: Mapped[str] = mapped_column(String(16))
    repo_id: Mapped[str] = mapped_column(String(1024))
    subfolder: Mapped[str] = mapped_column(String(1024), default="")
    revision: Mapped[str | None] = mapped_column(String(64))
    outcome: Mapped[str] = mapped_column(String(16))
    reason: Mapped[str] = mapped_column(Text, default="")
