import base64
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from flask import Flask
from sqlalchemy import select, text

from deploy import keys as key_rotation
from storage import database, identities
from storage.models import PERSONAL_FIELDS, Base, Encrypted, Identity, User
from tests.databases import Databases
from tests.harness import PERSON, ROOT, having

OLD, NEW, LOST = (base64.b64encode(secrets.token_bytes(32)).decode() for _ in range(3))
ApplicationWith = Callable[..., Flask]
pytestmark = pytest.mark.database


@pytest.fixture
def application_with(make_app: Callable[..., Flask], databases: Databases) -> ApplicationWith:
    """The application with these keys. Its database has five users under the old key, and is of this test alone."""
    url = databases.create()
    engine = database.engine_for(url)
    Base.metadata.create_all(engine)
    engine.dispose()
    with make_app(DATABASE_URL=url, ENCRYPTION_KEYS=OLD).app_context():
        for number in range(1, 6):
            user = User(app_id="wx1", openid=f"o-{number}", nickname=f"number {number}", **PERSON)
            database.session.add(user)
            database.session.flush()
            # Two apps, so that a batch can end between identities of one app and of the next.
            for app_id in ("wx1", "wx2"):
                identity = Identity(app_id=app_id, openid=f"o-{number}", user_id=user.id)
                identity.authorization = f"token {number}"
                database.session.add(identity)
        database.session.commit()
    return lambda *keys: make_app(DATABASE_URL=url, ENCRYPTION_KEYS=",".join(keys))


@pytest.fixture
def rotating(application_with: ApplicationWith) -> Flask:
    return application_with(NEW, OLD)


def rows(app: Flask, model: type[Base] = User) -> list[dict[str, Any]]:
    with app.app_context():
        table: Any = model.__table__
        found = database.session.execute(select(table).order_by(*table.primary_key))
        return [dict(row) for row in found.mappings()]


def run(app: Flask, *arguments: str) -> Result:
    engine = app.extensions["database"]
    try:
        return app.test_cli_runner().invoke(key_rotation.keys, arguments)
    finally:
        app.extensions["database"].dispose()  # the command's own
        app.extensions["database"] = engine


def is_complete(app: Flask) -> bool:
    """Whether all users can be read, and found by each of their fields."""
    with app.app_context():
        for name, value in PERSON.items():
            users = database.session.scalars(select(User).where(having(name, value))).all()
            if [getattr(user, name) for user in users] != [value] * 5:
                return False
        tokens = {identity.authorization for identity in database.session.scalars(select(Identity))}
        return tokens == {f"token {number}" for number in range(1, 6)}


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_a_rotation_makes_the_old_key_removable_and_changes_nothing_else(
    application_with: ApplicationWith, rotating: Flask, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(key_rotation, "BATCH", batch)

    def columns(encrypted: bool) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in row.items() if name.endswith(("_encrypted", "_index")) == encrypted}
            for model in (User, Identity)
            for row in rows(rotating, model)
        ]

    assert is_complete(rotating)
    before = columns(encrypted=False)
    assert "updated_at" in before[0]
    assert run(rotating, "rotate").exit_code == 0
    values = [value for row in columns(encrypted=True) for value in row.values() if value is not None]
    assert {value.partition(".")[0] for value in values} == {rotating.extensions["cipher"].key_id}
    assert is_complete(application_with(NEW))
    assert columns(encrypted=False) == before


def test_an_interrupted_rotation_can_be_continued(
    application_with: ApplicationWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = application_with(NEW, OLD)
    monkeypatch.setattr(key_rotation, "BATCH", 2)
    rotate_batch, batches = key_rotation._rotate_batch, []

    def stop_in_the_second(*arguments: Any) -> Any:
        batches.append(rotate_batch(*arguments))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return batches[-1]

    with monkeypatch.context() as patch:
        patch.setattr(key_rotation, "_rotate_batch", stop_in_the_second)
        assert run(app, "rotate").exit_code == 1
    halfway, key_id = rows(app), app.extensions["cipher"].key_id
    assert [row["phone_encrypted"].startswith(key_id) for row in halfway] == [True, True, False, False, False]
    assert is_complete(app)
    assert is_complete(application_with(OLD, NEW))
    assert run(app, "rotate").exit_code == 0
    assert [row["phone_encrypted"] for row in rows(app)[:2]] == [row["phone_encrypted"] for row in halfway[:2]]
    assert is_complete(application_with(NEW))


@pytest.mark.parametrize("writer", [[NEW, OLD], [OLD, NEW]], ids=["restarted", "not yet"])
def test_concurrent_changes_are_not_overwritten(
    application_with: ApplicationWith, monkeypatch: pytest.MonkeyPatch, writer: list[str]
) -> None:
    app, service = application_with(NEW, OLD), application_with(*writer)
    written: list[dict[str, Any]] = []

    def change() -> None:
        changed, cleared = database.session.scalars(select(User).order_by(User.id).limit(2).with_for_update())
        changed.phone, cleared.phone = "13900000000", None

    def change_in_service() -> None:
        with service.app_context():
            database.in_transaction(change)
        written.extend(rows(service))

    def open_during_a_change(field: Encrypted, row: Any) -> str | None:
        monkeypatch.undo()
        changes.append(pool.submit(change_in_service))
        wait(changes, 0.5)
        return field.open(row)

    changes: list[Future[None]] = []
    monkeypatch.setattr(Encrypted, "open", open_during_a_change)
    with ThreadPoolExecutor(1) as pool:
        run(app, "rotate")
    changes[0].result()
    for row, before in zip(rows(app)[:2], written[:2], strict=True):
        columns = ("phone_encrypted", "phone_index", "updated_at")
        assert [row[name] for name in columns] == [before[name] for name in columns]
    assert run(app, "rotate").exit_code == 0
    with application_with(NEW).app_context():
        assert database.session.scalars(select(User.openid).where(having("phone", "13900000000"))).all() == ["o-1"]
        phones = [user.phone for user in database.session.scalars(select(User).order_by(User.id))]
    assert phones == ["13900000000", None, *[PERSON["phone"]] * 3]


def test_a_value_that_no_key_decrypts_is_named_and_left_unchanged(
    application_with: ApplicationWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_rotation, "BATCH", 1)
    add_lost = application_with(LOST)
    with add_lost.app_context():
        database.session.get_one(User, 2).phone = "13700000000"
        database.session.get_one(Identity, ("wx1", "o-3")).authorization = "lost"
        database.session.get_one(User, 3).email_encrypted = "not even encrypted"
        database.session.commit()
    app = application_with(NEW, OLD)
    before = rows(app)
    result = run(app, "rotate")
    assert result.exit_code == 1
    assert [line for line in result.stderr.splitlines() if "decrypts" in line] == [
        "users.phone of id 2: no key decrypts it; left as it is",
        "users.email of id 3: no key decrypts it; left as it is",
        "identities.authorization of app_id wx1, openid o-3: no key decrypts it; left as it is",
    ]
    secret = ["not even", "13700000000", *[value for row in before for name, value in row.items() if "_enc" in name]]
    assert not any(value in result.output for value in secret)
    after = rows(app)
    for row, name in ((1, "phone_encrypted"), (1, "phone_index"), (2, "email_encrypted")):
        assert after[row][name] == before[row][name]
    with application_with(NEW).app_context():
        assert database.session.get_one(User, 2).email == PERSON["email"]
        assert database.session.get_one(User, 3).phone == PERSON["phone"]


def test_a_rotation_with_one_key_writes_only_missing_indexes(application_with: ApplicationWith) -> None:
    app = application_with(OLD)
    before = rows(app), rows(app, Identity)
    result = run(app, "rotate")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "All is under the first key.")
    assert (rows(app), rows(app, Identity)) == before
    with app.app_context():
        database.session.execute(text("UPDATE users SET phone_index = NULL"))
        database.session.commit()
    assert (run(app, "status").exit_code, run(app, "rotate").exit_code) == (1, 0)
    assert is_complete(app)


def test_the_status_counts_values_under_other_keys(rotating: Flask) -> None:
    with rotating.app_context():
        database.session.get_one(User, 1).phone = "13900000000"
        database.session.get_one(User, 2).phone = None
        database.session.commit()
    result = run(rotating, "status")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "users.phone: 1 under the first key, 3 not",
        *[f"users.{name}: 0 under the first key, 5 not" for name in PERSONAL_FIELDS[1:]],
        "identities.authorization: 0 under the first key, 10 not",
    ]
    run(rotating, "rotate")
    result = run(rotating, "status")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "users.phone: 4 under the first key, 0 not"


@pytest.mark.parametrize("cwd", [ROOT, None], ids=["here", "elsewhere"])
def test_the_command_of_the_readme_runs_in_production(
    application_with: ApplicationWith, environ: dict[str, str], tmp_path: Path, cwd: Path | None
) -> None:
    app = application_with(NEW, OLD)
    file = tmp_path / "production.env"
    file.write_text(f"DATABASE_URL={app.config['DATABASE_URL']}\nENCRYPTION_KEYS={NEW},{OLD}\n")
    file.chmod(0o600)
    env = {name: value for name, value in environ.items() if name not in ("DATABASE_URL", "ENCRYPTION_KEYS")}
    env |= {"PATH": os.environ["PATH"], "FLASK_APP": "deploy.keys", "PYTHONPATH": str(ROOT), "ENV_FILE": str(file)}
    command = [sys.executable, "-m", "flask", "keys", "rotate"]
    done = subprocess.run(command, cwd=cwd or tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "All is under the first key."
    assert is_complete(application_with(NEW))


def test_blocks_that_depend_on_an_old_key_are_counted(application_with: ApplicationWith) -> None:
    with application_with(OLD).app_context():
        identities.keep_block(database.session.get_one(User, 1))
        database.session.commit()
    assert run(application_with(OLD), "status").exit_code == 0
    result = run(application_with(NEW, OLD), "rotate")
    assert (result.exit_code, "2 kept blocks end with their key" in result.output) == (1, True)
