import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from flask import Flask, g
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.schema import CreateTable

from storage import database
from storage.models import Base, User
from tests.harness import ROOT, migrate


def test_the_migrations_lead_to_the_schema_of_the_models(app: Flask) -> None:
    with app.extensions["database"].connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_the_migrations_go_down_and_up_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'migrated.db'}"
    engine = database.engine_for(url)
    migrate(url)
    assert "users" in inspect(engine).get_table_names()
    migrate(url, "downgrade", "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    migrate(url)
    assert "users" in inspect(engine).get_table_names()
    engine.dispose()


def test_users_get_their_identities_when_they_are_migrated_and_a_unionid_stays_with_one(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'migrated.db'}"
    engine = database.engine_for(url)
    migrate(url, "upgrade", "0001")
    rows = [("o-one", "u-twice"), ("o-two", "u-twice"), ("o-three", "u-once"), ("o-four", None)]
    with engine.begin() as connection:
        for openid, unionid in rows:
            values = {"openid": openid, "unionid": unionid}
            connection.execute(
                text(
                    "INSERT INTO users (app_id, openid, unionid, role, created_at, updated_at)"
                    " VALUES ('wx', :openid, :unionid, 'user', '2026-01-01', '2026-01-01')"
                ),
                values,
            )
    for _ in range(2):
        migrate(url)
        with engine.connect() as connection:
            identities = connection.execute(text("SELECT openid, user_id FROM identities ORDER BY user_id")).all()
            assert identities == [("o-one", 1), ("o-two", 2), ("o-three", 3), ("o-four", 4)]
            unionids = connection.scalars(text("SELECT unionid FROM users ORDER BY id")).all()
            assert unionids == ["u-twice", None, "u-once", None]
        migrate(url, "downgrade", "0001")
        with engine.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM users")) == 4
    engine.dispose()


@pytest.mark.parametrize("url", [None, "nonsense", "postgresql://localhost/x"])
def test_without_a_database_to_migrate_it_is_said_so_without_a_traceback(url: str | None) -> None:
    env = {"PATH": os.environ["PATH"], **({"DATABASE_URL": url} if url else {})}
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "DATABASE_URL: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "REDIS_URL" not in done.stderr


def test_sqlite_writes_ahead_and_waits_for_its_lock(app: Flask) -> None:
    with app.app_context():
        assert database.session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert database.session.scalar(text("PRAGMA busy_timeout")) == 3000
        assert database.session.scalar(text("PRAGMA foreign_keys")) == 1


@pytest.mark.parametrize("scheme", ["mysql", "mariadb", "mysql+pymysql"])
def test_mysql_and_mariadb_are_spoken_by_pymysql(scheme: str) -> None:
    engine = database.engine_for(f"{scheme}://user:password@localhost/kuaishang")
    assert (engine.dialect.name, engine.dialect.driver) == ("mysql", "pymysql")


@pytest.mark.parametrize("crash", [False, True])
def test_a_request_has_one_session_and_it_is_closed_whatever_happens(app: Flask, crash: bool) -> None:
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


def test_an_error_message_holds_no_parameter(app: Flask) -> None:
    with app.app_context():
        database.session.add_all([User(app_id="wx1", openid="o-personal"), User(app_id="wx1", openid="o-personal")])
        with pytest.raises(IntegrityError) as caught:
            database.session.flush()
    assert "o-personal" not in str(caught.value)


def test_a_row_that_exists_is_left_as_it_is(app: Flask) -> None:
    with app.app_context():
        for nickname in ("first", "second"):
            database.insert_unless_exists(User, app_id="wx1", openid="o-once", nickname=nickname)
            database.session.commit()
        assert database.session.scalars(select(User.nickname).where(User.openid == "o-once")).all() == ["first"]


def test_many_inserts_of_one_row_at_once_make_one_row(app: Flask) -> None:
    def insert(_: int) -> None:
        with app.app_context():
            database.insert_unless_exists(User, app_id="wx1", openid="o-crowd")
            database.session.commit()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(insert, range(50)))
    with app.app_context():
        assert len(database.session.scalars(select(User).where(User.openid == "o-crowd")).all()) == 1


def test_the_id_of_a_deleted_user_is_not_given_out_again(app: Flask) -> None:
    with app.app_context():
        first, second = User(app_id="wx1", openid="o-leaves"), User(app_id="wx1", openid="o-comes")
        database.session.add(first)
        database.session.commit()
        database.session.delete(first)
        database.session.commit()
        database.session.add(second)
        database.session.commit()
        assert second.id > first.id


def test_mysql_tells_openids_apart_by_case_and_leaves_a_row_that_exists() -> None:
    dialect = database.engine_for("mysql://localhost/kuaishang").dialect
    table = CreateTable(User.__table__).compile(dialect=dialect)
    assert "openid VARCHAR(64) COLLATE utf8mb4_bin NOT NULL" in str(table)
    insert = database.insert_statement("mysql", User, {"app_id": "wx1", "openid": "o-once"}).compile(dialect=dialect)
    assert str(insert).endswith("ON DUPLICATE KEY UPDATE app_id = users.app_id, openid = users.openid")


def test_a_phone_number_can_be_set_before_the_row_is_stored_and_taken_away_again(app: Flask) -> None:
    with app.app_context():
        user = User(app_id="wx1", openid="o-new", phone="13812345678")
        database.session.add(user)
        database.session.commit()
        assert user.phone == "13812345678"
        user.phone = None
        assert user.phone_encrypted is None


def test_a_phone_number_is_stored_encrypted_for_its_row_alone(app: Flask) -> None:
    with app.app_context():
        users = [User(app_id="wx1", openid=f"o-phone-{number}") for number in range(2)]
        database.session.add_all(users)
        database.session.commit()
        users[0].phone = "13812345678"
        database.session.commit()
        assert users[0].phone == "13812345678"
        assert "13812345678" not in (users[0].phone_encrypted or "")
        users[1].phone_encrypted = users[0].phone_encrypted
        with pytest.raises(ValueError, match="does not decrypt"):
            _ = users[1].phone
