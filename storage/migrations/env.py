"""Alembic's entry: brings the database of DATABASE_URL to a revision. `alembic upgrade head` runs before a release."""

import os

from alembic import context

import settings
from storage.database import engine_for
from storage.models import Base


def migrate() -> None:
    engine = engine_for(settings.load(os.environ, only=["DATABASE_URL"])["DATABASE_URL"])
    with engine.connect() as connection:
        # SQLite cannot alter most of a table in place: Alembic then copies it.
        context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


migrate()
