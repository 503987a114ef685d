"""The rule of storage/migrations/env.py: one chain of revisions, safe beside the code of another release."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy.exc import OperationalError

from storage.database import engine_for
from storage.models import Base
from tests.databases import Databases
from tests.deploy.patch.test_check import VERSIONS, Tree, check

NEW_TABLE = 'op.create_table("new", sa.Column("id", sa.Integer, primary_key=True))\n'
SAFE = [
    NEW_TABLE,
    'op.add_column("orders", sa.Column("note", sa.String(9)))',
    'op.add_column("orders", sa.Column("note", sa.String(9), nullable=True))',
    'op.add_column("orders", sa.Column("note", sa.String(9), nullable=False, server_default="delete"))',
    'note = sa.Column("note", sa.String(9))\nop.add_column("orders", note)',
    'op.create_index("ix_more", "orders", ["remark"], if_not_exists=True)',
    'op.create_index("ix_more", "orders", ["remark"], if_not_exists=is_mariadb())',
    'op.execute("CREATE INDEX IF NOT EXISTS ix_more ON orders (remark)")',
    f'{NEW_TABLE}op.create_index("ix_more", "new", ["id"])',
    f'{NEW_TABLE}op.execute("CREATE INDEX ix_more ON new (id)")',
    f'{NEW_TABLE}op.add_column("new", sa.Column("note", sa.String(9), index=True))',
    'op.create_table("new", sa.Column("id", sa.Integer, primary_key=True, index=True))',
    f'{NEW_TABLE}op.create_index("uq_more", "new", ["id"], unique=True)',
    f'{NEW_TABLE}op.create_unique_constraint("uq_more", "new", ["id"])',
    f'{NEW_TABLE}op.add_column("new", sa.Column("note", sa.String(9), server_default="x", unique=True))',
    'op.add_column("orders", sa.Column("note", sa.String(9)))\n'
    'op.create_index("uq", "orders", ["note"], unique=True, if_not_exists=True)',
    'op.create_table("new", sa.Column("id", sa.Integer, sa.ForeignKey("users.id", ondelete="CASCADE")))',
    """op.execute("UPDATE orders SET remark = 'ALTER TABLE' WHERE id = 0")""",
    'op.execute("UPDATE orders SET version = (version + 1) WHERE(id = 0)")',
    'op.execute(sa.table("orders", sa.column("version")).update().values(version=1).where(sa.column("id") == 0))',
    '"""DROP TABLE orders is what this does not do."""',
]
UNSAFE = {
    'op.drop_table("orders")': "drop_table takes away",
    'op.drop_column("orders", "remark")': "drop_column takes away",
    'op.drop_index("ix_orders_status", "orders")': "drop_index takes away",
    'op.drop_constraint("fk", "orders")': "drop_constraint takes away",
    'op.alter_column("orders", "remark", nullable=False)': "alter_column takes away",
    'op.rename_table("orders", "sales")': "rename_table takes away",
    'with op.batch_alter_table("orders") as batch:\n    pass': "batch_alter_table takes away",
    'from alembic.op import drop_table\ndrop_table("orders")': "drop_table takes away",
    'drop = op.drop_table\nfor name in ("orders",):\n    drop(name)': "drop_table takes away",
    'op.execute(sa.table("orders").delete())': "delete takes away",
    'op.execute("DROP TABLE orders")': "DROP in SQL",
    'op.execute(sa.text("alter table orders add column a int"))': "ALTER in SQL",
    'op.execute("ALTER TABLE orders RENAME TO sales")': "ALTER in SQL",
    'op.execute("UPDATE orders SET total = 1;\\n DELETE FROM orders")': "DELETE in SQL",
    'op.get_bind().exec_driver_sql("TRUNCATE orders")': "TRUNCATE in SQL",
    'name = "orders"\nop.execute(f"DROP TABLE {name}")': "DROP in SQL",
    'op.execute("CREATE UNIQUE INDEX uq ON orders (remark)")': "CREATE UNIQUE in SQL",
    'op.execute("-- tidy\\n DROP TABLE orders")': "DROP in SQL",
    'op.execute("UPDATE orders SET total = 1; /* and */ # more\\n TRUNCATE orders")': "TRUNCATE in SQL",
    'op.execute("create or replace table orders (id int)")': "CREATE OR REPLACE in SQL",
    'op.add_column("orders", sa.Column("note", sa.String(9), nullable=False))': "NOT NULL and has no server_default",
    'op.add_column("orders", sa.Column("note", sa.String(9), nullable=False, default="x"))': "NOT NULL and has no",
    'op.add_column("orders", sa.Column("note", sa.String(9), nullable=False, server_default=None))': "NOT NULL and",
    'for column in ():\n    op.add_column("orders", column)': "not written out",
    'op.create_table("new", sa.Column("id", sa.Integer, sa.ForeignKey("users.id")))': "ForeignKey without ondelete",
    'op.create_index("uq", "orders", ["remark"], unique=True)': "a unique index on a table that exists",
    'op.create_unique_constraint("uq", "orders", ["remark"])': "create_unique_constraint on a table that exists",
    'op.create_check_constraint("ck", "orders", "total > 0")': "create_check_constraint on a table that exists",
    'op.create_foreign_key("fk", "orders", "users", ["a"], ["id"], ondelete="CASCADE")': "create_foreign_key on",
}
SLOW_IF_OLD_CODE_HAS_LEFT = {
    'op.create_unique_constraint("uq", "orders", ["remark"])': "writes wait: use a unique index, or",
    'op.create_check_constraint("ck", "orders", "version > 0")': "create_check_constraint on a table that",
    'op.create_foreign_key("fk", "orders", "users", ["version"], ["id"])': "create_foreign_key on a table that",
    'op.alter_column("orders", "version", type_=sa.BigInteger)': "alter_column: MariaDB may copy the table",
    'op.alter_column("orders", "remark", nullable=False, existing_type=sa.Text)': "and writes wait: add a column, or",
    'op.alter_column("orders", "remark", new_column_name="note", existing_type=sa.Text)': "alter_column: MariaDB may",
    'op.execute("ALTER TABLE orders MODIFY version BIGINT")': "ALTER in SQL: MariaDB may copy the table",
    'op.execute("CREATE UNIQUE INDEX uq ON orders (version)")': "CREATE INDEX on a table that exists: build it before",
    'op.create_index("uq", "orders", ["version"], unique=True)': "create_index on a table that exists: build it before",
    'op.execute("ALTER ONLINE TABLE orders MODIFY version BIGINT")': "ALTER in SQL",
    'with op.batch_alter_table("orders") as batch:\n    batch.create_unique_constraint("uq", ["version"])': "may copy",
    'with op.batch_alter_table("orders") as batch:\n    batch.create_index("ix", ["version"])': "build it before",
}
QUICK_IF_OLD_CODE_HAS_LEFT = [
    'op.alter_column("orders", "version", server_default="7", existing_type=sa.Integer, existing_nullable=False)',
    'op.execute("ALTER TABLE orders DROP COLUMN remark, ALGORITHM=INSTANT")',
    'op.create_index("uq", "orders", ["version"], unique=True, if_not_exists=True)',
    'op.drop_column("orders", "remark")',
]
SLOW = {
    'op.create_index("ix", "orders", ["remark"])': "create_index on a table that exists: build it before, node by node",
    'op.create_index("ix", "orders", ["remark"], unique=False)': "and say if_not_exists=True here",
    'op.create_index("ix", "orders", ["remark"], if_not_exists=False)': "create_index on a table that exists",
    'op.create_index(columns=["remark"], table_name="orders", index_name="ix")': "create_index on a table that exists",
    f'{NEW_TABLE}op.create_index("ix", "orders", ["remark"])': "create_index on a table that exists",
    'from alembic.op import create_index\ncreate_index("ix", "orders", ["remark"])': "create_index on a table that",
    'op.add_column("orders", sa.Column("note", sa.String(9), index=True))': "use create_index in a later release",
    'note = sa.Column("note", sa.String(9), index=True)\nop.add_column("orders", note)': "index=True on a table that",
    'note = sa.Column("note", sa.String(9))\nop.add_column("orders", note)\n'
    'op.create_index("uq", "orders", ["note"], unique=True)': "create_index on a table that exists",
    'op.add_column("orders", sa.Column("note", sa.String(9), unique=True))': "unique=True on a table that exists",
    'op.add_column("orders", sa.Column("user", sa.Integer, sa.ForeignKey("users.id", ondelete="SET NULL")))': "copy",
    'total = sa.Column("sum", sa.Integer, sa.Computed("version * 2", persisted=True))\n'
    'op.add_column("orders", total)': "Computed on a table that exists: MariaDB may copy",
    'op.execute("OPTIMIZE TABLE orders")': "OPTIMIZE in SQL: MariaDB may copy",
    'op.execute("LOCK TABLES orders WRITE")': "LOCK in SQL",
    'op.execute("UPDATE orders SET version = 1")': "UPDATE without WHERE locks all rows",
    'op.execute("UPDATE orders SET total = (SELECT SUM(sum) FROM items WHERE order_id = orders.id)")': "without WHERE",
    'op.execute(sa.table("orders", sa.column("version")).update().values(version=1))': "UPDATE without WHERE",
    'change = sa.update(sa.table("orders", sa.column("version"))).values(version=1)\n'
    "op.get_bind().execute(change)": "UPDATE without WHERE",
    'op.execute("CREATE INDEX ix ON orders (remark)")': "CREATE INDEX on a table that exists",
    'op.execute("SELECT 1; create fulltext  index ix ON `orders` (remark)")': "CREATE INDEX on a table that exists",
    'name = "ix"\nop.execute(f"CREATE INDEX {name} ON orders (remark)")': "CREATE INDEX on a table that exists",
}


def only(tree: Tree, old: Tree) -> tuple[int, str]:
    outcome = check(tree, "--migrations-only", "--old", old.folder)
    assert outcome.steps == ["migrations"]
    return outcome.status, outcome.last


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("old") / "release")


@pytest.fixture
def new(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "release")


def test_what_the_release_itself_has_is_safe(new: Tree, old: Tree) -> None:
    assert only(new, old)[0] == 0
    assert check(new, "--migrations-only").status == 0


@pytest.mark.parametrize("body", SAFE)
def test_what_leaves_older_code_alone_is_safe(body: str, new: Tree, old: Tree) -> None:
    new.migrate(body)
    assert only(new, old)[0] == 0


@pytest.mark.parametrize("body", UNSAFE | SLOW)
def test_what_breaks_older_code_or_makes_writes_wait_is_refused_with_its_line(body: str, new: Tree, old: Tree) -> None:
    new.migrate(body)
    status, last = only(new, old)
    assert (status, (UNSAFE | SLOW)[body] in last) == (1, True), last
    number = int(last.partition("0008_more.py:")[2].partition(":")[0])
    line = (new.folder / VERSIONS / "0008_more.py").read_text().splitlines()[number - 1]
    assert line.strip() in body


@pytest.mark.parametrize(
    ("left_in", "before", "after", "reason"),
    [
        ("0.2.0", "0.2.0", "0.3.0", None),
        ("0.2.0", "0.10.0", "0.11.0", None),
        ("0.2.0", "0.1.0", "0.3.0", "has left in 0.2.0, and is in 0.1.0"),
        ("0.2.0", "0.1.9", "0.2.0", "is not earlier than this release, 0.2.0"),
        ("0.2.0", "0.2.0", "0.2.0", "is not earlier than this release, 0.2.0"),
        ("soon", "0.2.0", "0.3.0", "is no version"),
    ],
)
def test_something_may_be_dropped_when_the_code_that_used_it_has_left(
    left_in: str, before: str, after: str, reason: str | None, new: Tree, tmp_path: Path
) -> None:
    old = Tree(tmp_path / "old")
    new.migrate('op.drop_column("orders", "remark")', OLD_CODE_LEFT_IN=left_in)
    for tree, version in ((old, before), (new, after)):
        tree.replace("settings.py", 'VERSION = "0.1.0"', f'VERSION = "{version}"')
    status, last = only(new, old)
    assert (status, (reason or "") in last) == (1 if reason else 0, True), last


def test_the_way_back_is_open_as_long_as_the_older_code_can_serve_the_schema(
    new: Tree, old: Tree, tmp_path: Path
) -> None:
    new.migrate(NEW_TABLE)
    assert only(old, new)[0] == 0
    new.migrate('op.drop_column("orders", "remark")', number=9, OLD_CODE_LEFT_IN="0.2.0")
    new.replace("settings.py", 'VERSION = "0.1.0"', 'VERSION = "0.3.0"')
    status, last = only(old, new)
    assert (status, "has left in 0.2.0, and is in 0.1.0" in last) == (1, True), last


@pytest.mark.parametrize("body", SLOW_IF_OLD_CODE_HAS_LEFT)
def test_that_writes_wait_is_no_matter_of_older_code(body: str, new: Tree, old: Tree) -> None:
    """So nothing excuses it, and it is in nobody's way back."""
    new.migrate(body, OLD_CODE_LEFT_IN="0.1.0")
    new.replace("settings.py", 'VERSION = "0.1.0"', 'VERSION = "0.3.0"')
    for status, last in (only(new, old), check(new, "--migrations-only")[::2]):
        assert (status, SLOW_IF_OLD_CODE_HAS_LEFT[body] in last) == (1, True), last
    assert only(old, new)[0] == 0


@pytest.mark.parametrize("body", QUICK_IF_OLD_CODE_HAS_LEFT)
def test_what_keeps_no_writes_waiting_is_safe_when_older_code_has_left(body: str, new: Tree, old: Tree) -> None:
    new.migrate(body, OLD_CODE_LEFT_IN="0.1.0")
    new.replace("settings.py", 'VERSION = "0.1.0"', 'VERSION = "0.3.0"')
    assert only(new, old)[0] == 0


@pytest.mark.only_on("mariadb")
def test_mariadb_takes_for_instant_what_the_check_does(databases: Databases) -> None:
    """On tables that exist, with no index built before. Asked by `alter_algorithm`, which MariaDB heeds until 11.4."""
    quick = [*SAFE, *QUICK_IF_OLD_CODE_HAS_LEFT]
    quick = [body for body in quick if "exists" not in body.lower() and "create_table" not in body]
    slow = [body for body in (*SLOW, *SLOW_IF_OLD_CODE_HAS_LEFT) if not re.search("(?i)lock|optimi|update|;", body)]
    for body in quick + slow:
        engine = engine_for(databases.create())
        with engine.connect() as connection, Operations.context(MigrationContext.configure(connection)) as op:
            Base.metadata.create_all(connection)
            connection.execute(sa.text("SET alter_algorithm = 'INSTANT'"))
            with nullcontext() if body in quick else pytest.raises(OperationalError, match="is not supported"):
                exec(body.removeprefix(NEW_TABLE), {"op": op, "sa": sa, "is_mariadb": lambda: True})
        engine.dispose()


def test_a_revision_that_has_run_does_not_change(new: Tree, old: Tree) -> None:
    path = new.folder / VERSIONS / "0007_index_of_expired_keys.py"
    path.write_text(path.read_text().replace('"""', "'''") + "\n\n# a comment\n")
    assert only(new, old)[0] == 0
    path.write_text(path.read_text().replace('"created_at"', '"status"'))
    status, last = only(new, old)
    assert (status, "0007_index_of_expired_keys.py:1: not the same in" in last) == (1, True), last


@pytest.mark.parametrize(
    ("name", "constants", "reason"),
    [
        ("0008_b.py", {"revision": "0008", "down_revision": "0007"}, "0008_a.py has the same number"),
        ("0009_b.py", {"revision": "0009", "down_revision": "0007"}, "down_revision must be '0008'"),
        ("0010_b.py", {"revision": "0010", "down_revision": "0009"}, "down_revision must be '0008'"),
        ("0009_b.py", {"revision": "0009", "down_revision": None}, "down_revision must be '0008'"),
        ("0009_b.py", {"revision": "abc", "down_revision": "0008"}, "is not what its name begins with"),
        ("more.py", {"revision": "0009", "down_revision": "0008"}, "is not what its name begins with"),
    ],
)
def test_the_revisions_are_one_chain(name: str, constants: dict[str, str], reason: str, new: Tree, old: Tree) -> None:
    new.migrate(NEW_TABLE, name="a")
    new.write(f"{VERSIONS}/{name}", "\n".join(f"{constant} = {value!r}" for constant, value in constants.items()))
    status, last = only(new, old)
    assert (status, reason in last) == (1, True), last
