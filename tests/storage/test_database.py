import os
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from flask import Flask, g, request
from sqlalchemy import Connection, Engine, TextClause, delete, inspect, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError
from sqlalchemy.orm import Session

from dev.migration import tidy
from errors import ApiError, Code
from storage import database, failures
from storage.models import Base, Order, User, now
from tests.blueprints.callers import ORDER, Caller, data_of
from tests.databases import Databases, MariaDB
from tests.harness import PERSON, ROOT, WAIT_SECONDS, Simulator, migrate


def test_the_migrations_lead_to_the_schema_of_the_models(app: Flask) -> None:
    with app.extensions["database"].connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


@pytest.mark.only_on("sqlite")
def test_no_id_is_reused_on_sqlite(app: Flask) -> None:
    with app.extensions["database"].connect() as connection:
        for table in Base.metadata.sorted_tables:
            if "id" in table.columns:
                statement = connection.scalar(
                    text("SELECT sql FROM sqlite_master WHERE name = :name"), {"name": table.name}
                )
                assert "AUTOINCREMENT" in statement, f"sqlite_autoincrement is missing in the migration of {table.name}"
                assert table.dialect_options["sqlite"]["autoincrement"], table.name


@pytest.mark.only_on("mariadb")
def test_the_migrations_create_exactly_the_tables_of_the_models(app: Flask, databases: Databases) -> None:
    engine = database.engine_for(databases.create())
    Base.metadata.create_all(engine)
    with engine.connect() as made, app.extensions["database"].connect() as migrated:
        for table in Base.metadata.tables:
            assert definition(migrated, table) == definition(made, table)
    engine.dispose()


def definition(connection: Connection, table: str) -> list[str]:
    """MariaDB's description of a table, with collations, keys and references, sorted.

    Without defaults: a migration adds some for the old version, which does not know a new column.
    """
    created = connection.execute(text(f"SHOW CREATE TABLE {table}")).one()[1]
    lines = [line.strip(" ,") for line in created.splitlines()]
    return sorted(re.sub(r" AUTO_INCREMENT=\d+| DEFAULT ('[^']*'|[^ ,]+)", "", line) for line in lines)


def test_the_migrations_go_down_and_up_again_with_a_row_in_each_table(databases: Databases) -> None:
    url = databases.create()
    engine = database.engine_for(url)
    migrate(url)
    fill(engine)
    migrate(url, "downgrade", "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    migrate(url)
    fill(engine)
    engine.dispose()


def fill(engine: Engine) -> None:
    """Insert a row into each table, referenced ones first; every id and every reference is 1."""
    samples = {int: 1, str: "1", bytes: b"1", bool: True}
    with engine.begin() as connection:
        for table in Base.metadata.sorted_tables:
            row = {column.name: samples.get(column.type.python_type, now()) for column in table.columns}
            connection.execute(table.insert().values(row))


def test_a_new_migration_is_empty_and_states_the_rule(tmp_path: Path) -> None:
    for name in ("pyproject.toml", *(path.name for path in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("storage", "telemetry"):
        shutil.copytree(ROOT / name, tmp_path / name)
    env = {**os.environ, "DATABASE_URL": f"sqlite:///{tmp_path / 'test.db'}"}

    def alembic(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "alembic", *words], cwd=tmp_path, env=env, check=True)

    alembic("upgrade", "head")
    alembic("revision", "--autogenerate", "--rev-id", "9999", "-m", "new column")
    new = (tmp_path / "storage/migrations/versions/9999_new_column.py").read_text()
    assert new.count("    pass\n") == 2
    assert "beside the old version" in new
    alembic("upgrade", "head")


MORE_MODELS = """

class Voucher(Versioned, Base):
    __tablename__ = "vouchers"
    __table_args__ = (
        Index("uq_vouchers_code", "code", unique=True),
        {"sqlite_autoincrement": True, "mysql_charset": "utf8mb4"},
    )
    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    user_id: Mapped[int] = mapped_column(BigId, ForeignKey("users.id", ondelete="CASCADE"), index=True)
    code: Mapped[str] = mapped_column(identifier(32))
    phone_encrypted: Mapped[str | None] = mapped_column(Text)
    blob: Mapped[bytes | None] = mapped_column(LargeBinary().with_variant(mysql.MEDIUMBLOB, "mysql"))
    is_used: Mapped[bool] = mapped_column(default=False, server_default=false())
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=now)
"""
MORE_COLUMNS = """
    paid_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    is_gift: Mapped[bool] = mapped_column(default=False, server_default=false())
"""


def test_a_generated_migration_runs_up_and_down_and_needs_no_model(tmp_path: Path, databases: Databases) -> None:
    for name in ("pyproject.toml", *(path.name for path in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("storage", "telemetry"):
        shutil.copytree(ROOT / name, tmp_path / name)
    env = {**os.environ, "DATABASE_URL": databases.create()}

    def alembic(*words: str) -> None:
        command = [sys.executable, "-m", "alembic", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    alembic("upgrade", "head")
    models, versions = tmp_path / "storage/models.py", tmp_path / "storage/migrations/versions"
    before, orders = models.read_text(), '    __tablename__ = "orders"\n'
    assert orders in before
    models.write_text(before.replace(orders, orders + MORE_COLUMNS) + MORE_MODELS)
    alembic("revision", "--autogenerate", "--rev-id", "9998", "-m", "more")
    assert "storage" not in tidy_file(versions / "9998_more.py")
    for words in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *words, versions], cwd=tmp_path, check=True)
    for _ in range(2):
        alembic("upgrade", "head")
        alembic("check")
        alembic("downgrade", "-1")
    alembic("upgrade", "head")
    models.write_text(before)  # and one that drops them again
    alembic("revision", "--autogenerate", "--rev-id", "9999", "-m", "less")
    tidy_file(versions / "9999_less.py")
    alembic("upgrade", "head")
    alembic("downgrade", "-1")


def tidy_file(migration: Path) -> str:
    """Tidy a migration as `make migration` does; return the rest."""
    written = tidy(migration.read_text())
    migration.write_text(written)
    return written


NEWER_MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision = "9999"
down_revision = "{head}"


def upgrade() -> None:
    op.add_column("users", sa.Column("email_checked_at", sa.DateTime()))
    op.add_column("orders", sa.Column("is_gift", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table("vouchers", sa.Column("id", sa.Integer(), primary_key=True))


def downgrade() -> None:
    op.drop_table("vouchers")
    op.drop_column("orders", "is_gift")
    op.drop_column("users", "email_checked_at")
"""


def test_a_release_goes_on_with_a_newer_schema(
    tmp_path: Path, databases: Databases, make_app: Callable[..., Flask], simulator: Simulator
) -> None:
    """As after a roll back of the code alone."""
    newer, url = tmp_path / "newer", databases.create()
    newer.mkdir()
    for name in ("pyproject.toml", *(path.name for path in ROOT.glob("*.py"))):
        shutil.copy(ROOT / name, newer)
    for name in ("storage", "telemetry"):
        shutil.copytree(ROOT / name, newer / name)
    versions = newer / "storage/migrations/versions"
    head = max(path.name for path in versions.glob("*.py")).partition("_")[0]
    (versions / "9999_newer.py").write_text(NEWER_MIGRATION.format(head=head))
    env = {**os.environ, "DATABASE_URL": url}

    def alembic(cwd: Path, *words: str) -> tuple[bool, str]:
        command = [sys.executable, "-m", "alembic", *words]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        return done.returncode == 0, (done.stdout + done.stderr).strip()

    assert alembic(newer, "upgrade", "head") == (True, "")
    said = f"The schema is newer, 9999, and compatible with this release, {head}: nothing to do."
    assert alembic(ROOT, "upgrade", "head") == (True, said)
    unknown = "FAILED: Can't locate revision identified by '{}'"
    for words in (["downgrade", head], ["downgrade", "-1"], ["upgrade", head], ["current"]):
        assert alembic(ROOT, *words) == (False, unknown.format("9999"))

    app = make_app(DATABASE_URL=url)
    assert app.test_client().get("/readyz").status_code == 200
    caller = Caller(app, simulator)
    order = data_of(caller.post("/orders", ORDER), 201)
    assert data_of(caller.get(f"/orders/{order['id']}"))["items"] == order["items"]

    assert alembic(newer, "downgrade", "-1") == (True, "")
    assert alembic(ROOT, "upgrade", "head") == (True, "")
    engine = database.engine_for(url)
    for revision in ("0001", "abcd", "99990x", "f0f0f0f0f0f0"):
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :it"), {"it": revision})
        assert alembic(ROOT, "upgrade", "head") == (False, unknown.format(revision))
    engine.dispose()


@pytest.mark.parametrize("url", [None, "nonsense", "postgresql://localhost/x"])
def test_alembic_names_a_missing_or_invalid_database_url_without_a_traceback(url: str | None) -> None:
    env = {"PATH": os.environ["PATH"], "ENV_FILE": os.devnull, **({"DATABASE_URL": url} if url else {})}
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "DATABASE_URL: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "REDIS_URL" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        pytest.param("PRAGMA journal_mode", "wal", marks=pytest.mark.only_on("sqlite")),
        pytest.param("PRAGMA busy_timeout", 0, marks=pytest.mark.only_on("sqlite")),
        pytest.param("PRAGMA foreign_keys", 1, marks=pytest.mark.only_on("sqlite")),
        pytest.param("SELECT @@tx_isolation", "READ-COMMITTED", marks=pytest.mark.only_on("mariadb")),
        pytest.param("SELECT @@sql_mode LIKE '%STRICT_ALL_TABLES%'", 1, marks=pytest.mark.only_on("mariadb")),
        pytest.param("SELECT @@default_storage_engine", "InnoDB", marks=pytest.mark.only_on("mariadb")),
    ],
)
def test_settings_of_a_connection(app: Flask, setting: str, value: object) -> None:
    with app.app_context():
        assert database.session.scalar(text(setting)) == value


@pytest.mark.only_on("mariadb")
@pytest.mark.parametrize("charset", ["utf8", "latin1", "utf8mb4"])
def test_every_character_is_kept_whatever_charset_the_url_names(databases: Databases, charset: str) -> None:
    url = f"{databases.create()}&charset={charset}"
    migrate(url)
    engine = database.engine_for(url)
    with Session(engine) as session:
        session.add(User(app_id="wx1", openid="o-emoji", nickname="快上👩‍💻𠮷"))
        session.commit()
        assert session.scalar(text("SELECT length(nickname) FROM users")) == 21
        assert session.scalar(select(User.nickname)) == "快上👩‍💻𠮷"
    engine.dispose()


@pytest.mark.parametrize("scheme", ["mysql", "mariadb", "mysql+pymysql"])
def test_mysql_and_mariadb_urls_use_pymysql(scheme: str) -> None:
    engine = database.engine_for(f"{scheme}://user:password@localhost/kuaishang")
    assert (engine.dialect.name, engine.dialect.driver) == ("mysql", "pymysql")


@pytest.mark.parametrize("crash", [False, True])
def test_a_request_has_one_session_which_is_closed_also_after_a_crash(
    make_app: Callable[..., Flask], crash: bool
) -> None:
    app = make_app()
    seen: list[object] = []

    def view() -> dict[str, str]:
        database.session.add(User(app_id="wx1", openid="o-uncommitted"))
        database.session.flush()
        seen.extend([g.database_session, database.session._get_current_object()])  # type: ignore[attr-defined]
        if crash:
            raise RuntimeError
        return {}

    app.add_url_rule("/view", view_func=view)
    assert app.test_client().get("/view").status_code == (500 if crash else 200)
    assert seen[0] is seen[1]
    assert app.extensions["database"].pool.checkedout() == 0
    with app.app_context():
        assert database.session.scalar(select(User).where(User.openid == "o-uncommitted")) is None


@pytest.mark.only_on("mariadb")
@pytest.mark.parametrize(("when", "status"), [("before", 503), ("after", 200)])
def test_a_database_that_dies_during_a_request_fails_that_request_only(
    make_app: Callable[..., Flask], own_databases: MariaDB, when: str, status: int
) -> None:
    """Not even that one, if it has sent its last query."""
    database_url = own_databases.create()
    migrate(database_url)
    app = make_app(DATABASE_URL=database_url)

    def view() -> dict[str, str]:
        database.session.execute(text("SELECT 1"))
        if request.args.get("dies") == "before":
            own_databases.kill()
        database.session.execute(text("SELECT 1"))
        if request.args.get("dies") == "after":
            own_databases.kill()
        return {}

    app.add_url_rule("/view", view_func=view)
    client = app.test_client()
    assert client.get("/view", query_string={"dies": when}).status_code == status
    assert app.extensions["database"].pool.checkedout() == 0
    own_databases.start()
    assert client.get("/view").status_code == 200


@pytest.mark.parametrize("openid", ["o-personal", "o-personal' for key 'o-personal", "'\"\\'\no-personal"])
def test_error_messages_contain_no_parameters(app: Flask, openid: str) -> None:
    with app.app_context():
        database.session.add_all([User(app_id="wx1", openid=openid), User(app_id="wx1", openid=openid)])
        with pytest.raises(IntegrityError) as caught:
            database.session.flush()
    assert "o-personal" not in "".join(traceback.format_exception(caught.value))  # with the driver's own error


@pytest.mark.only_on("mariadb")
def test_errors_of_the_server_name_keys_and_hosts_without_parameters(app: Flask) -> None:
    values = {"name": "o-personal' = '"}  # not in a line of the traceback
    with app.app_context(), pytest.raises(ProgrammingError) as caught:
        database.session.execute(text("SELEC :name"), values)
    assert "o-personal" not in "".join(traceback.format_exception(caught.value))
    with app.app_context():
        database.session.add_all([User(app_id="wx1", openid="o-twice"), User(app_id="wx1", openid="o-twice")])
        with pytest.raises(IntegrityError) as taken:
            database.session.flush()
    assert str(taken.value.orig) == """(1062, "Duplicate entry '…' for key 'uq_users_app_id_openid'")"""
    engine = database.engine_for("mysql://user:password@127.0.0.1:1/kuaishang")
    with pytest.raises(OperationalError, match=r"Can't connect to MySQL server on '127\.0\.0\.1'"):
        engine.connect()


def signal_error(number: int) -> TextClause:
    """A statement that the server responds to with this error, which is hard to cause otherwise."""
    return text(f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'refused'")


@pytest.mark.only_on("mariadb")
@pytest.mark.parametrize("number", [1036, 1047, 1053, 1180, 1290, 1792, 1836, 3032, 3100])
def test_an_error_after_a_failover_replaces_the_connections(databases: Databases, number: int) -> None:
    engine = database.engine_for(databases.create(), pool_size=2)

    def connection_ids() -> set[int | None]:
        """Those of both connections of the pool."""
        with engine.connect() as one, engine.connect() as other:
            return {connection.scalar(text("SELECT connection_id()")) for connection in (one, other)}

    before = connection_ids()
    with engine.connect() as connection, pytest.raises(OperationalError) as caught:
        connection.execute(signal_error(number))
    assert failures.kind(caught.value) in ("Read-only.", "Out of service.")
    assert len(before | connection_ids()) == 4
    engine.dispose()


@pytest.mark.only_on("mariadb")
def test_a_connection_is_replaced_after_a_minute_as_its_name_may_lead_elsewhere_now(
    databases: Databases, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = database.engine_for(databases.create())

    def connection_id() -> int | None:
        with engine.connect() as connection:
            return connection.scalar(text("SELECT connection_id()"))

    first = connection_id()
    assert connection_id() == first
    began = time.time()
    monkeypatch.setattr(time, "time", lambda: began + 61)
    assert connection_id() != first
    engine.dispose()


@pytest.mark.only_on("mariadb")
@pytest.mark.parametrize(
    ("number", "tries"), [(1290, 2), (1792, 2), (1047, 2), (1053, 2), (2006, 2), (2013, 2), (9007, 2), (1205, 1)]
)
def test_a_transaction_that_a_server_refused_or_lost_is_run_again(app: Flask, number: int, tries: int) -> None:
    runs: list[int] = []

    def work() -> None:
        database.session.add(User(app_id="wx1", openid=f"o-refused-{number}"))
        database.session.flush()
        runs.append(number)
        if len(runs) == 1:
            database.session.execute(signal_error(number))

    with app.app_context(), suppress(OperationalError):
        database.in_transaction(work)
    with app.app_context():
        found = database.session.scalars(select(User).where(User.openid == f"o-refused-{number}")).all()
    assert (len(runs), len(found)) == (tries, tries - 1)


@pytest.mark.only_on("mariadb")
@pytest.mark.parametrize("is_keyed", [False, True])
@pytest.mark.parametrize(("number", "is_known"), [(1180, False), (2013, False), (1213, True), (8028, True)])
def test_a_commit_of_unknown_outcome_is_repeated_only_if_that_does_nothing(
    app: Flask, lose_commit: Callable[..., None], number: int, is_known: bool, is_keyed: bool
) -> None:
    lose_commit(number, is_done=not is_known)

    def work() -> None:
        database.session.add(Order(remark=f"commit-{number}", total=1))

    with app.app_context(), suppress(OperationalError):
        database.in_transaction(work, is_keyed=is_keyed)
    with app.app_context():
        made = len(database.session.scalars(select(Order).where(Order.remark == f"commit-{number}")).all())
        database.session.execute(delete(Order).where(Order.remark == f"commit-{number}"))
        database.session.commit()
    # This work is not keyed: where it says so, the second run doubles it.
    assert made == (1 if is_known or not is_keyed else 2)


@pytest.mark.only_on("mariadb")
def test_a_server_that_did_not_respond_in_time_is_not_asked_again(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "STATEMENT_SECONDS", 1)
    runs: list[int] = []

    def work() -> None:
        runs.append(1)
        database.session.execute(text("SELECT SLEEP(2)"))

    with make_app().app_context(), pytest.raises(OperationalError):
        database.in_transaction(work)
    assert len(runs) == 1


@pytest.mark.only_on("mariadb")
def test_a_deadlock_is_a_lost_race(app: Flask) -> None:
    users = [User(app_id="wx1", openid=f"o-deadlock-{number}") for number in range(2)]
    with app.app_context():
        database.session.add_all(users)
        database.session.commit()
        ids = [user.id for user in users]
    both_hold_one = threading.Barrier(2)

    def update_both(order: list[int]) -> bool:
        with app.app_context():
            database.session.execute(update(User).where(User.id == order[0]).values(nickname="first"))
            both_hold_one.wait(WAIT_SECONDS)
            try:
                database.session.execute(update(User).where(User.id == order[1]).values(nickname="second"))
                database.session.commit()
            except OperationalError as error:
                return bool(failures.codes(error.orig) & failures.LOST)
            return False

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(update_both, [ids, ids[::-1]])) == [False, True]  # the other one commits
    with app.app_context():
        names = database.session.scalars(select(User.nickname).where(User.id.in_(ids))).all()
    assert sorted(filter(None, names)) == ["first", "second"]


def test_simultaneous_inserts_of_one_row_make_one_which_is_then_kept(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "STATEMENT_SECONDS", WAIT_SECONDS)  # whoever is last to write SQLite

    def insert(nickname: str) -> None:
        with app.app_context():
            values = {"app_id": "wx1", "openid": "o-crowd", "nickname": nickname}
            database.in_transaction(lambda: database.insert_unless_exists(User, **values))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(insert, ["first"] * 50))
    insert("second")
    with app.app_context():
        assert database.session.scalars(select(User.nickname).where(User.openid == "o-crowd")).all() == ["first"]


@pytest.mark.only_on("mariadb")
def test_a_migration_gives_way_to_who_uses_a_table(databases: Databases) -> None:
    url = databases.create()
    migrate(url)
    service, migration = database.engine_for(url, pool_size=2, seconds=WAIT_SECONDS), database.engine_for(url)
    read = text("SELECT count(*) FROM orders")
    with service.connect() as backup, ThreadPoolExecutor(1) as pool:
        backup.execute(read)  # and its transaction goes on
        with migration.connect() as connection:
            altering = pool.submit(connection.execute, text("ALTER TABLE orders ADD COLUMN note VARCHAR(9)"))
            with service.connect() as other:
                assert other.scalar(read) == 0
            with pytest.raises(OperationalError, match="Lock wait timeout exceeded"):
                altering.result(WAIT_SECONDS)
        assert backup.in_transaction()
    service.dispose()
    migration.dispose()


@pytest.mark.only_on("sqlite")
def test_writers_of_one_process_wait_for_each_other(app: Flask) -> None:
    def write(number: int) -> int:
        def work() -> int:
            database.session.add(User(app_id="wx1", openid=f"o-writer-{number}"))
            database.session.flush()
            time.sleep(0.02)
            return number

        with app.app_context():
            return database.in_transaction(work)

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(write, range(10))) == list(range(10))
    with app.app_context():
        assert database.session.query(User).where(User.openid.startswith("o-writer-")).count() == 10


@pytest.mark.only_on("sqlite")
def test_a_writer_that_fails_passes_the_turn_on(app: Flask) -> None:
    def fail() -> None:
        raise ApiError(Code.CONFLICT)

    with app.app_context():
        with pytest.raises(ApiError):
            database.in_transaction(fail)
        assert database.in_transaction(lambda: "begins") == "begins"


def test_a_snapshot_has_what_the_row_has_as_it_is_committed(app: Flask) -> None:
    with app.app_context():
        user = User(app_id="wx1", openid="o-snapshot", nickname="阿狸", **PERSON)
        database.session.add(user)
        database.session.commit()
        user.nickname = "not committed"
        found = database.find(User, user.id)
        database.session.rollback()
        assert found is not None
        for name in (*inspect(User).columns.keys(), *PERSON, "etag"):
            assert getattr(found, name) == getattr(user, name), name
        assert database.find(User, user.id + 1) is None
        assert User.phone.model is User


def test_a_snapshot_holds_no_connection(app: Flask) -> None:
    with app.app_context():
        database.find(User, 1)
        assert app.extensions["database"].pool.checkedout() == 0
