"""Administrators: by the setting only for as long as it names them, and each grant and loss in the audit trail."""

import json
import secrets
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from sqlalchemy import text
from sqlalchemy.orm.exc import StaleDataError

from storage import database
from storage.identities import get_or_create_user, set_role
from storage.models import User
from tests.blueprints.callers import API, Caller, code_of, data_of, log_in
from tests.databases import Databases
from tests.harness import APP_ID, WEB_APP_ID, Simulator, migrate


@pytest.fixture
def openid() -> str:
    """Of somebody whom no other test knows."""
    return f"o-{secrets.token_hex(8)}"


def flask(app: Flask, *command: str) -> Any:
    return app.test_cli_runner().invoke(args=["users", *command])


def audits(lines: list[dict[str, Any]]) -> list[tuple[str, int, str, int | None]]:
    """Each change of a role: what, about whom, by what, and who was signed in."""
    found = [line for line in lines if line["message"] == "audit" and line["event"].startswith("admin ")]
    return [(line["event"], line["aboutUserId"], line["by"], line.get("userId")) for line in found]


def test_the_setting_makes_administrators_at_login(make_app: Callable[..., Flask], simulator: Simulator) -> None:
    app = make_app(ADMIN_OPENIDS="o-boss, o-deputy")
    roles = [Caller(app, simulator, openid=openid).me()["role"] for openid in ("o-deputy", "o-bos", "o-boss")]
    assert roles == ["admin", "user", "admin"]


@pytest.mark.parametrize("path", ["/users", "/users/me", "/orders"])
def test_an_administrator_by_setting_loses_the_role_with_the_setting_at_the_next_request(
    app: Flask, make_app: Callable[..., Flask], simulator: Simulator, path: str, openid: str, log_lines: Any
) -> None:
    boss = Caller(make_app(ADMIN_OPENIDS=f"o-other,{openid}"), simulator, openid=openid)
    assert boss.get("/users").status_code == 200
    for without in (app, make_app(ADMIN_OPENIDS=f"{openid}s,x{openid}")):
        boss.client = without.test_client(use_cookies=False)
        assert boss.get(path).status_code == (403 if path == "/users" else 200)
        assert boss.me()["role"] == "user"
    assert audits(log_lines()) == [
        ("admin granted", boss.id, "setting", None),
        ("admin revoked", boss.id, "setting", boss.id),
    ]
    boss.client = make_app(ADMIN_OPENIDS=openid).test_client(use_cookies=False)
    assert boss.me()["role"] == "user"
    boss.app = boss.client.application
    boss.log_in()
    assert boss.me()["role"] == "admin"


def test_a_login_without_the_setting_says_so(
    app: Flask, make_app: Callable[..., Flask], simulator: Simulator, openid: str, log_lines: Any
) -> None:
    boss = Caller(make_app(ADMIN_OPENIDS=openid), simulator, openid=openid)
    assert data_of(log_in(app, simulator, openid))["user"]["role"] == "user"
    assert audits(log_lines()) == [
        ("admin granted", boss.id, "setting", None),
        ("admin revoked", boss.id, "setting", None),
    ]


def test_a_write_by_a_former_administrator_by_setting_is_refused(
    app: Flask, make_app: Callable[..., Flask], simulator: Simulator, alice: Caller, openid: str
) -> None:
    boss = Caller(make_app(ADMIN_OPENIDS=openid), simulator, openid=openid)
    etag = boss.etag(f"/users/{alice.id}")
    boss.client = app.test_client(use_cookies=False)
    assert code_of(boss.call("PUT", f"/users/{alice.id}", {"role": "admin"}, If_Match=etag)) == (400, 400)
    assert code_of(boss.post("/users", {"openid": "o-by-boss", "role": "admin"})) == (403, 403)
    assert alice.me()["role"] == "user"


def test_cloud_run_headers_do_not_keep_an_administrator(
    app: Flask, make_app: Callable[..., Flask], simulator: Simulator
) -> None:
    headers = {"X-WX-OPENID": "o-cloud-boss", "X-WX-APPID": APP_ID}
    for setting, role in (("o-cloud-boss", "admin"), ("", "user")):
        client = make_app(TRUST_WXCLOUD_HEADERS="true", ADMIN_OPENIDS=setting).test_client()
        assert data_of(client.get(f"{API}/users/me", headers=headers))["role"] == role


@pytest.mark.parametrize("way", ["PUT", "command"])
def test_an_explicit_grant_outlives_the_setting(
    app: Flask,
    make_app: Callable[..., Flask],
    simulator: Simulator,
    admin: Caller,
    way: str,
    openid: str,
    log_lines: Any,
) -> None:
    boss = Caller(make_app(ADMIN_OPENIDS=openid), simulator, openid=openid)
    if way == "PUT":
        assert admin.put(f"/users/{boss.id}", {"role": "admin"}).status_code == 200
        by = ("administrator", admin.id)
    else:
        assert flask(app, "grant-admin", str(boss.id)).exit_code == 0
        by = ("command", None)
    boss.client = app.test_client(use_cookies=False)
    assert boss.me()["role"] == "admin"
    assert audits(log_lines())[-1] == ("admin granted", boss.id, *by)
    revoke(app, boss)


def test_an_administrator_who_leaves_is_logged_as_one(admin: Caller, alice: Caller, log_lines: Any) -> None:
    for user in (alice, admin):
        assert user.delete("/users/me").status_code == 200
    assert audits(log_lines()) == [("admin revoked", admin.id, "deletion", admin.id)]


def revoke(app: Flask, user: Caller) -> None:
    assert flask(app, "revoke-admin", str(user.id)).exit_code == 0


def test_an_administrator_from_before_stays_one_without_the_setting(
    make_app: Callable[..., Flask], simulator: Simulator, admin: Caller
) -> None:
    admin.app = make_app(ADMIN_OPENIDS=admin.openid)
    admin.log_in()
    assert admin.get("/users").status_code == 200  # on an instance without the setting


def test_each_grant_and_loss_by_request_or_command_is_logged_once(
    app: Flask, alice: Caller, admin: Caller, log_lines: Any
) -> None:
    path = f"/users/{alice.id}"
    for role in ("user", "admin", "admin", "user"):
        assert admin.put(path, {"role": role, "nickname": "小红"}).status_code == 200
    assert admin.call("PUT", path, {"role": "admin"}, If_Match='"old"').status_code == 412
    new = {"openid": f"{alice.openid}-new"}
    created = data_of(admin.post("/users", {**new, "role": "admin"}, Idempotency_Key="once"), 201)
    assert data_of(admin.post("/users", {**new, "role": "admin"}, Idempotency_Key="once"), 201) == created
    assert admin.post("/users", {"openid": f"{alice.openid}-plain"}).status_code == 201
    for command in ("grant-admin", "grant-admin", "revoke-admin", "revoke-admin"):
        assert flask(app, command, str(alice.id)).exit_code == 0
    assert audits(log_lines()) == [
        ("admin granted", alice.id, "administrator", admin.id),
        ("admin revoked", alice.id, "administrator", admin.id),
        ("admin granted", created["id"], "administrator", admin.id),
        ("admin granted", alice.id, "command", None),
        ("admin revoked", alice.id, "command", None),
    ]


def test_a_creation_that_lost_a_race_keeps_the_role(
    admin: Caller, openid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = []

    def lose_first(user: User, role: str, **options: Any) -> None:
        roles.append(role)
        if len(roles) == 1:
            raise StaleDataError
        set_role(user, role, **options)

    monkeypatch.setattr("storage.identities.set_role", lose_first)
    created = data_of(admin.post("/users", {"openid": openid, "role": "admin"}), 201)
    assert (created["role"], roles) == ("admin", ["admin", "admin"])


@pytest.mark.parametrize(
    ("older", "younger", "merged", "lines"),
    [
        ((), ("admin",), ("admin",), 1),
        ((), ("admin", "by setting"), ("admin", "by setting"), 1),
        (("admin",), ("admin", "by setting"), ("admin",), 0),
        (("admin", "by setting"), ("admin",), ("admin",), 1),
        (("admin", "by setting"), ("admin", "by setting"), ("admin", "by setting"), 0),
        (("admin", "by setting"), (), ("admin", "by setting"), 0),
        ((), (), (), 0),
    ],
)
def test_a_merge_keeps_the_stronger_role_and_logs_a_grant(
    app: Flask, log_lines: Any, older: Any, younger: Any, merged: Any, lines: int, request: pytest.FixtureRequest
) -> None:
    name = f"o-{abs(hash(request.node.name))}"
    with app.app_context():
        users = [get_or_create_user(APP_ID, name, None), get_or_create_user(WEB_APP_ID, name, f"u-{name}")]
        for user, given in zip(users, (older, younger), strict=True):
            user.role, user.admin_by_setting = "admin" if "admin" in given else "user", "by setting" in given
        database.session.commit()
        one = get_or_create_user(APP_ID, name, f"u-{name}")
        assert (one.id, one.role == "admin", one.admin_by_setting) == (
            users[0].id,
            "admin" in merged,
            "by setting" in merged,
        )
    assert audits(log_lines()) == [("admin granted", one.id, "merge", None)] * lines


def test_the_older_version_makes_users_beside_the_migration(databases: Databases) -> None:
    url = databases.create()
    migrate(url)
    engine = database.engine_for(url)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO users (app_id, openid, role, version, created_at, updated_at)"
                " VALUES ('wx', 'o', 'admin', 1, '2026-01-01', '2026-01-01')"
            )
        )
        assert not connection.scalar(text("SELECT admin_by_setting FROM users"))
    engine.dispose()


def listed(app: Flask, *options: str) -> list[dict[str, Any]]:
    done = flask(app, "list", *options)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.output.splitlines()]
    return [line for line in lines if "openid" in line]


def test_an_operator_finds_who_has_just_come_and_makes_them_an_administrator(
    app: Flask, simulator: Simulator, alice: Caller
) -> None:
    bob = Caller(app, simulator, phone="13700001111")
    newest = listed(app, "--limit", "2")
    assert [(user["id"], user["openid"]) for user in newest] == [(bob.id, bob.openid), (alice.id, alice.openid)]
    assert (newest[0]["role"], newest[0]["blocked"], newest[0]["admin_by_setting"]) == ("user", False, False)
    assert "13700001111" not in str(newest)
    assert flask(app, "grant-admin", str(newest[1]["id"])).exit_code == 0
    assert alice.get("/users").status_code == 200
    assert listed(app, "--limit", "2")[1]["role"] == "admin"
    revoke(app, alice)


def test_a_user_of_the_web_alone_is_listed_without_an_openid(app: Flask) -> None:
    with app.app_context():
        user = get_or_create_user(WEB_APP_ID, f"o-{secrets.token_hex(8)}", None)
    (newest,) = listed(app, "--limit", "1")
    assert (newest["id"], newest["openid"]) == (user.id, None)


def test_a_list_is_bounded_and_says_so(app: Flask) -> None:
    for limit in ("0", "x"):
        assert flask(app, "list", "--limit", limit).exit_code == 2


@pytest.mark.parametrize("command", ["grant-admin", "revoke-admin", "block"])
def test_a_command_about_an_unknown_user_fails(app: Flask, command: str) -> None:
    missing = flask(app, command, str(2**53))
    assert (missing.exit_code, missing.output) == (1, f"Error: There is no user {2**53}.\n")
