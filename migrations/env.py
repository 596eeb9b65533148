"""Runs the migrations on the connection that ``hub_router.store.schema`` opened and locked.

Logging is left as the application has it. Without a connection (the ``alembic`` command in a checkout, to write the
next migration) the database is the one that the environment variables of hub_router name.
"""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from hub_router.settings import Settings
from hub_router.store.engine import parse_url
from hub_router.store.schema import transaction
from hub_router.store.tables import Base


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    with transaction(parse_url(Settings.resolve().database_url), write=True) as own:
        run(own)
