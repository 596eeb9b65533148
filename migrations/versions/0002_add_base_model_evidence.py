"""Adds how sure a base model is and why, the user's choices of base models, given samples and checkpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "base_model_choices",
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("pattern", sa.String(length=1024), nullable=False),
        sa.Column("base_model", sa.String(length=1024), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("kind", "pattern", name="pk_base_model_choices"),
    )
    with op.batch_alter_table("repos") as batch:
        batch.add_column(
            sa.Column("requested_checkpoints", sa.String(length=16), nullable=False, server_default="newest")
        )
    with op.batch_alter_table("adapters") as batch:
        batch.add_column(sa.Column("base_model_revision", sa.String(length=64), nullable=True))
        batch.add_column(
            sa.Column("base_model_confidence", sa.String(length=16), nullable=False, server_default="none")
        )
        batch.add_column(sa.Column("base_model_evidence", sa.JSON(), nullable=False, server_default="[]"))
    with op.batch_alter_table("adapter_samples") as batch:
        batch.add_column(sa.Column("given", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    with op.batch_alter_table("adapter_samples") as batch:
        batch.drop_column("given")
    with op.batch_alter_table("adapters") as batch:
        batch.drop_column("base_model_evidence")
        batch.drop_column("base_model_confidence")
        batch.drop_column("base_model_revision")
    with op.batch_alter_table("repos") as batch:
        batch.drop_column("requested_checkpoints")
    op.drop_table("base_model_choices")
