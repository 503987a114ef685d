"""Alembic's entry: brings the database of DATABASE_URL to a revision. `alembic upgrade head` runs before a release.

The old version still runs beside a migration, and after it for as long as the release takes. So a change is made in
steps, each in a release of its own: add (nullable or with a server default), fill, switch the code over, drop.
Never copy a table that others refer to (`op.batch_alter_table` on SQLite): its AUTOINCREMENT and, through their
ON DELETE, the others' rows are lost. Instead of a constraint add a unique index; instead of a change of type a column.

`alembic revision --autogenerate --rev-id 0009 -m "what it is"` begins one, with the database at the last revision. It
writes the types that columns have in the database, as a migration must not change with the code. It cannot write a
foreign key of a table that exists, which SQLite does not add.
"""

import os
from typing import Any

from alembic import context
from alembic.operations.ops import DropTableOp, MigrationScript, ModifyTableOps
from sqlalchemy import MetaData

import settings
from storage.database import engine_for
from storage.models import Base


def keep_indexes(_: Any, __: Any, scripts: list[MigrationScript]) -> None:
    """Let a table that is dropped take its indexes along: MariaDB does not drop one that a foreign key needs."""
    for steps in scripts[0].upgrade_ops_list + scripts[0].downgrade_ops_list:
        dropped = {step.table_name for step in steps.ops if isinstance(step, DropTableOp)}
        steps.ops = [one for one in steps.ops if not (isinstance(one, ModifyTableOps) and one.table_name in dropped)]


def migrate() -> None:
    tables = MetaData()
    for table in Base.metadata.sorted_tables:
        for column in table.to_metadata(tables).columns:
            column.type = getattr(column.type, "impl_instance", column.type)  # of a TypeDecorator
    engine = engine_for(settings.load(os.environ, only=["DATABASE_URL"])["DATABASE_URL"])
    with engine.connect() as connection:
        # No render_as_batch: what SQLite cannot do in place fails, instead of copying the table.
        context.configure(connection=connection, target_metadata=tables, process_revision_directives=keep_indexes)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


migrate()
