"""Adds the Gaussians of the adapters' sample embeddings, and the number that tells cached files of them apart."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "adapter_gaussians",
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("encoder", sa.String(length=255), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("mean", sa.LargeBinary(), nullable=False),
        sa.Column("factors", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name="fk_adapter_gaussians_adapter_id_adapters", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("adapter_id", "encoder", name="pk_adapter_gaussians"),
    )
    with op.batch_alter_table("encoder_states") as batch:
        batch.add_column(sa.Column("gaussian_generation", sa.BigInteger(), nullable=False, server_default="0"))


def downgrade() -> None:
    with op.batch_alter_table("encoder_states") as batch:
        batch.drop_column("gaussian_generation")
    op.drop_table("adapter_gaussians")
