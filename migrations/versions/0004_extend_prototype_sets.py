"""Adds what a prototype set was made from: the hash of its training data, its seed, and the method it refines."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("prototype_sets") as batch:
        batch.add_column(sa.Column("data_hash", sa.String(length=64), nullable=False, server_default=""))
        batch.add_column(sa.Column("seed", sa.Integer(), nullable=True))
        batch.add_column(sa.Column("parent_method", sa.String(length=64), nullable=False, server_default=""))


def downgrade() -> None:
    with op.batch_alter_table("prototype_sets") as batch:
        batch.drop_column("parent_method")
        batch.drop_column("seed")
        batch.drop_column("data_hash")
