"""Alembic's entry: brings the database of DATABASE_URL to a revision. `alembic upgrade head` runs before a release.

The old version still runs beside a migration, and after it for as long as the release takes; and it may come back. So a
change is made in steps, each in a release of its own: add (nullable or with a server default), fill, switch the code
over, drop. `alembic upgrade head` of the old version then leaves the newer schema as it is.
Never copy a table that others refer to (`op.batch_alter_table` on SQLite): its AUTOINCREMENT and, through their
ON DELETE, the others' rows are lost. Instead of a constraint add a unique index; instead of a change of type a column.

`deploy/patch/check.py` refuses a release whose new revisions break this: that drop, rename or alter something, delete
rows, add a column that is NOT NULL without a server default, put a constraint or a unique index on a table that exists
(a unique index on a nullable column of the same revision is fine), or refer to one without ON DELETE CASCADE or SET
NULL. The last step, drop, does so all the same, and says when that becomes safe:

    OLD_CODE_LEFT_IN = "0.2.0"

is the first release whose code does without what goes. It must be the one that is running by then, or an earlier one;
the release with the drop is a later one. So raise VERSION in settings.py with both. From then on there is no way back
to a release before 0.2.0. A revision that has run somewhere is never changed: add another.

It also refuses what keeps writes waiting while a large table is changed, whatever code has left. An index on a table
that exists, also by `index=True` or `unique=True` in `op.add_column`: on Galera every commit waits while it is built.
Build it before, node by node, as deploy/galera/README.md says, and write `op.create_index(…, if_not_exists=True)`; so
an index on a new column comes in the release after the column's. With one server, where writes go on meanwhile, only
the latter is needed. And what MariaDB may copy the table for: a foreign key or another constraint on a table that
exists, a stored computed column, a change of a column's type, name or NULL, and `ALTER TABLE` in SQL that does not say
`ALGORITHM=INSTANT`, with which MariaDB refuses to copy. And an `UPDATE` without `WHERE`, whose rows stay locked until
its end.

`make migration NAME=what_it_is` begins one with what storage/models.py has changed. It writes the types that columns
have in the database, as a migration must not change with the code. It cannot write a foreign key of a table that
exists, which SQLite does not add. Where it drops a table, it leaves out what drops its indexes before: MariaDB refuses
that, and drops them with the table.
"""

from alembic import context
from sqlalchemy import MetaData

import settings
from storage.database import engine_for
from storage.models import Base

tables = MetaData()
for table in Base.metadata.sorted_tables:
    for column in table.to_metadata(tables).columns:
        column.type = getattr(column.type, "impl_instance", column.type)  # of a TypeDecorator
engine = engine_for(settings.load(only=["DATABASE_URL"])["DATABASE_URL"])
with engine.connect() as connection:
    # No render_as_batch: what SQLite cannot do in place fails, instead of copying the table.
    context.configure(connection=connection, target_metadata=tables)
    with context.begin_transaction():
        migration, head = context.get_context(), str(context.get_head_revision())
        newer = [current for current in migration.get_current_heads() if current.isdecimal() and current > head]
        if newer and migration.opts.get("destination_rev") == "head":
            print(f"The schema is newer, {newer[0]}, and compatible with this release, {head}: nothing to do.")  # noqa: T201
        else:
            context.run_migrations()
engine.dispose()
