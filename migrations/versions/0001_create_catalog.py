"""Creates the catalog: repositories, adapters, features, prototype sets, compositions and sync runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "compositions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("base_model", sa.String(length=1024), nullable=False),
        sa.Column("method", sa.String(length=64), nullable=False),
        sa.Column("hyperparameters", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_compositions"),
        sa.UniqueConstraint("name", name="uq_compositions_name"),
    )
    op.create_table(
        "encoder_states",
        sa.Column("encoder", sa.String(length=255), nullable=False),
        sa.Column("dimension", sa.Integer(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("encoder", name="pk_encoder_states"),
    )
    op.create_table(
        "prototype_sets",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("method", sa.String(length=64), nullable=False),
        sa.Column("parent_id", sa.Integer(), nullable=True),
        sa.Column("base_model", sa.String(length=1024), nullable=False),
        sa.Column("hyperparameters", sa.JSON(), nullable=False),
        sa.Column("metrics", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["parent_id"], ["prototype_sets.id"], name="fk_prototype_sets_parent_id_prototype_sets", ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_prototype_sets"),
        sa.UniqueConstraint("name", "version", name="uq_prototype_sets_name"),
    )
    op.create_table(
        "repos",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("repo_id", sa.String(length=1024), nullable=False),
        sa.Column("revision", sa.String(length=64), nullable=True),
        sa.Column("requested_revision", sa.String(length=255), nullable=True),
        sa.Column("requested_subfolders", sa.JSON(), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("renamed_to", sa.String(length=1024), nullable=True),
        sa.Column("author", sa.String(length=255), nullable=True),
        sa.Column("last_modified", sa.DateTime(timezone=True), nullable=True),
        sa.Column("first_seen", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_seen", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_repos"),
        sa.UniqueConstraint("source", "repo_id", name="uq_repos_source"),
    )
    op.create_index("ix_repos_author", "repos", ["author"])
    op.create_table(
        "sync_runs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_sync_runs"),
    )
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("repo_pk", sa.Integer(), nullable=False),
        sa.Column("revision", sa.String(length=64), nullable=False),
        sa.Column("subfolder", sa.String(length=1024), nullable=False),
        sa.Column("current", sa.Boolean(), server_default=sa.true(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("base_model", sa.String(length=1024), nullable=True),
        sa.Column("base_model_resolved", sa.String(length=1024), nullable=True),
        sa.Column("licence", sa.String(length=255), nullable=False),
        sa.Column("peft_type", sa.String(length=64), nullable=False),
        sa.Column("rank_min", sa.Integer(), nullable=True),
        sa.Column("rank_max", sa.Integer(), nullable=True),
        sa.Column("ranks", sa.JSON(), nullable=False),
        sa.Column("dtypes", sa.JSON(), nullable=False),
        sa.Column("module_count", sa.Integer(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("weights_hash", sa.String(length=64), nullable=False),
        sa.Column("rslora", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("card_text", sa.Text(), nullable=False),
        sa.Column("notes", sa.JSON(), nullable=False),
        sa.Column("downloads", sa.BigInteger(), nullable=True),
        sa.Column("likes", sa.BigInteger(), nullable=True),
        sa.Column("added_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["repo_pk"], ["repos.id"], name="fk_adapters_repo_pk_repos", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_adapters"),
        sa.UniqueConstraint("repo_pk", "revision", "subfolder", name="uq_adapters_repo_pk"),
    )
    op.create_index("ix_adapters_licence", "adapters", ["licence"])
    op.create_index("ix_adapters_repo_pk", "adapters", ["repo_pk"])
    op.create_index("ix_adapters_weights_hash", "adapters", ["weights_hash"])
    op.create_index("ix_adapters_current_base", "adapters", ["current", "status", "base_model_resolved"])
    op.create_table(
        "sync_outcomes",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(length=16), nullable=False),
        sa.Column("repo_id", sa.String(length=1024), nullable=False),
        sa.Column("subfolder", sa.String(length=1024), nullable=False),
        sa.Column("revision", sa.String(length=64), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["sync_runs.id"], name="fk_sync_outcomes_run_id_sync_runs", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_sync_outcomes"),
    )
    op.create_index("ix_sync_outcomes_run_id", "sync_outcomes", ["run_id"])
    op.create_table(
        "adapter_files",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("path", sa.String(length=1024), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("hub_hash", sa.String(length=64), nullable=True),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_adapter_files_adapter_id_adapters", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("adapter_id", "path", name="pk_adapter_files"),
    )
    op.create_table(
        "adapter_labels",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("value", sa.String(length=512), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_adapter_labels_adapter_id_adapters", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("adapter_id", "kind", "value", name="pk_adapter_labels"),
    )
    op.create_index("ix_adapter_labels_kind_value", "adapter_labels", ["kind", "value"])
    op.create_table(
        "adapter_samples",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("split", sa.String(length=16), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("input", sa.Text(), nullable=False),
        sa.Column("output", sa.Text(), nullable=False),
        sa.Column("origin", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_adapter_samples_adapter_id_adapters", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("adapter_id", "split", "position", name="pk_adapter_samples"),
    )
    op.create_table(
        "adapter_spectra",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("module", sa.String(length=512), nullable=False),
        sa.Column("singular_values", sa.LargeBinary(), nullable=False),
        sa.Column("direction", sa.LargeBinary(), nullable=True),
        sa.Column("ambiguous", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("weights_hash", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_adapter_spectra_adapter_id_adapters", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("adapter_id", "module", name="pk_adapter_spectra"),
    )
    op.create_table(
        "composition_members",
        sa.Column("composition_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("weights_hash", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_composition_members_adapter_id_adapters", ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["composition_id"],
            ["compositions.id"],
            name="fk_composition_members_composition_id_compositions",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("composition_id", "position", name="pk_composition_members"),
        sa.UniqueConstraint("composition_id", "name", name="uq_composition_members_composition_id"),
    )
    op.create_index("ix_composition_members_adapter_id", "composition_members", ["adapter_id"])
    op.create_table(
        "prototype_vectors",
        sa.Column("set_id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("module", sa.String(length=512), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.Column("weights_hash", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_prototype_vectors_adapter_id_adapters", ondelete="RESTRICT"
        ),
        sa.ForeignKeyConstraint(
            ["set_id"], ["prototype_sets.id"], name="fk_prototype_vectors_set_id_prototype_sets", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("set_id", "adapter_id", "module", name="pk_prototype_vectors"),
    )
    op.create_index("ix_prototype_vectors_adapter_id", "prototype_vectors", ["adapter_id"])
    op.create_table(
        "text_embeddings",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("encoder", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("text_hash", sa.String(length=64), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_text_embeddings_adapter_id_adapters", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("adapter_id", "encoder", "kind", "position", name="pk_text_embeddings"),
    )
    op.create_index("ix_text_embeddings_encoder_adapter", "text_embeddings", ["encoder", "adapter_id"])


def downgrade() -> None:
    for table in (
        "text_embeddings",
        "prototype_vectors",
        "composition_members",
        "adapter_spectra",
        "adapter_samples",
        "adapter_labels",
        "adapter_files",
        "sync_outcomes",
        "adapters",
        "sync_runs",
        "repos",
        "prototype_sets",
        "encoder_states",
        "compositions",
    ):
        op.drop_table(table)
