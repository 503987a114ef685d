"""A blocked user is rejected at once, on every instance and in every way; also after the account has been deleted."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from flask import Flask

from storage import database, identities
from storage.models import User
from tests.blueprints.callers import API, Caller, code_of, invalid_fields, log_in, log_in_together, operations
from tests.harness import APP_ID, Simulator

BLOCKED = {"code": 403, "message": "账号已被封禁", "data": None}


@pytest.fixture
def mallory(app: Flask, simulator: Simulator) -> Caller:
    return Caller(app, simulator)


def block(admin: Caller, user: Caller, blocked: bool = True) -> None:
    assert admin.put(f"/users/{user.id}", {"blocked": blocked}).status_code == 200


def flask(app: Flask, *command: str) -> Any:
    return app.test_cli_runner().invoke(args=["users", *command])


@pytest.mark.parametrize("blocked", [1, 0, 1.0, "true", "True", None, []])
def test_only_a_boolean_blocks(admin: Caller, mallory: Caller, blocked: Any) -> None:
    assert invalid_fields(admin.put(f"/users/{mallory.id}", {"blocked": blocked})) == {"blocked"}


@pytest.mark.only_on("mariadb")  # SQLite has one writer at a time
def test_a_user_who_writes_all_the_time_can_be_blocked(
    app: Flask, admin: Caller, mallory: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "in_transaction", partial(database.in_transaction, tries=1))
    with app.app_context(), ThreadPoolExecutor(1) as pool:
        database.session.get_one(User, mallory.id, with_for_update=True).nickname = "again"
        database.session.flush()
        blocking = pool.submit(admin.call, "PUT", f"/users/{mallory.id}", {"blocked": True}, If_Match="*")
        time.sleep(0.5)
        database.session.commit()
        assert blocking.result().status_code == 200


def test_a_blocked_user_is_rejected_by_every_route_on_every_instance(
    app: Flask, make_app: Callable[..., Flask], admin: Caller, mallory: Caller
) -> None:
    other_instance = make_app().test_client()
    assert other_instance.get(f"{API}/users/me", headers=mallory.headers).status_code == 200
    block(admin, mallory)
    assert other_instance.get(f"{API}/users/me", headers=mallory.headers).get_json() == BLOCKED
    secured = [(method, path) for method, path in operations(app) if path.startswith((f"{API}/users", f"{API}/orders"))]
    assert len(secured) > 20
    for method, path in secured:
        answer = mallory.call(method, path.removeprefix(API).format(user_id=mallory.id, order_id=1, item_id=1), {})
        assert answer.status_code == 403, (method, path)
    assert mallory.get("/auth/wechat").status_code == 403
    block(admin, mallory, False)
    assert mallory.get("/users/me").status_code == 200


def test_a_blocked_user_can_log_out(admin: Caller, mallory: Caller) -> None:
    block(admin, mallory)
    assert mallory.delete("/auth/session").status_code == 200
    assert mallory.get("/users/me").status_code == 401


def test_no_account_is_created_for_the_openid_of_a_kept_block(admin: Caller, mallory: Caller) -> None:
    block(admin, mallory)
    assert admin.delete(f"/users/{mallory.id}").status_code == 200
    assert admin.post("/users", {"openid": mallory.openid}).get_json() == BLOCKED


@pytest.mark.only_on("mariadb")  # on SQLite it waits until the login has committed
def test_a_deletion_during_the_login_loses_no_block(
    app: Flask, simulator: Simulator, admin: Caller, mallory: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    block(admin, mallory)
    etag = admin.etag(f"/users/{mallory.id}")
    make_or_merge = identities._make_or_merge

    def delete_first(*arguments: Any) -> User:
        monkeypatch.setattr(identities, "_make_or_merge", make_or_merge)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(admin.call, "DELETE", f"/users/{mallory.id}", If_Match=etag).result()
        return make_or_merge(*arguments)

    monkeypatch.setattr(identities, "_make_or_merge", delete_first)
    assert log_in(app, simulator, mallory.openid, unionid="u-new").get_json() == BLOCKED


def test_a_blocked_user_cannot_log_in(
    app: Flask,
    make_app: Callable[..., Flask],
    simulator: Simulator,
    admin: Caller,
    mallory: Caller,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block(admin, mallory)
    simulator.fault("slow", seconds=0.2)
    answers = log_in_together(app, simulator.code(openid=mallory.openid), 2, monkeypatch)
    assert [answer.get_json() for answer in answers] == [BLOCKED] * 2
    cloud_run = make_app(TRUST_WXCLOUD_HEADERS="true").test_client()
    headers = {"X-WX-OPENID": mallory.openid, "X-WX-APPID": APP_ID}
    assert cloud_run.get(f"{API}/users/me", headers=headers).get_json() == BLOCKED


def test_a_block_outlives_the_account_and_a_new_key(
    app: Flask,
    make_app: Callable[..., Flask],
    simulator: Simulator,
    admin: Caller,
    mallory: Caller,
    log_lines: Any,
    environ: dict[str, str],
) -> None:
    openid, unionid = mallory.openid, f"u-{mallory.openid}"
    log_in(app, simulator, openid, unionid=unionid)
    block(admin, mallory)
    assert admin.delete(f"/users/{mallory.id}").status_code == 200
    new_key = make_app(ENCRYPTION_KEYS=f"{'A' * 43}=,{environ['ENCRYPTION_KEYS']}")
    for instance in (app, new_key):
        assert log_in(instance, simulator, openid).get_json() == BLOCKED
        assert log_in(instance, simulator, f"{openid}-elsewhere", unionid=unionid).get_json() == BLOCKED
    assert log_in(app, simulator, f"{openid}-else").status_code == 200
    with app.app_context(), app.extensions["database"].connect() as connection:
        kept = connection.exec_driver_sql(
            f"SELECT fingerprint FROM blocked_identities WHERE former_user_id = {mallory.id}"
        ).all()
    assert len(kept) == 2  # openid and unionid, as keyed hashes
    assert openid not in str(kept)
    assert flask(app, "unblock", str(mallory.id)).exit_code == 0
    assert log_in(app, simulator, f"{openid}-elsewhere", unionid=unionid).status_code == 200
    audits = [(line["event"], line["aboutUserId"]) for line in log_lines() if line["message"] == "audit"]
    assert audits == [(f"user {event}", mallory.id) for event in ("blocked", "deleted", "unblocked")]


def test_an_account_deleted_without_a_block_can_return(
    app: Flask, simulator: Simulator, admin: Caller, mallory: Caller
) -> None:
    assert admin.delete(f"/users/{mallory.id}").status_code == 200
    assert log_in(app, simulator, mallory.openid).status_code == 200


@pytest.mark.parametrize("blocked", [0, 1], ids=["older", "newer"])
def test_merging_with_a_blocked_user_lifts_no_block(
    app: Flask, simulator: Simulator, admin: Caller, blocked: int
) -> None:
    users = [Caller(app, simulator) for _ in range(2)]
    block(admin, users[blocked])
    for user in (users[1 - blocked], *users):  # the last two are one user
        answer = log_in(app, simulator, user.openid, unionid=f"u-{users[0].openid}")
    assert answer.get_json() == BLOCKED
    assert [log_in(app, simulator, user.openid).get_json() for user in users] == [BLOCKED] * 2


def test_only_administrators_block_and_never_themselves(admin: Caller, alice: Caller) -> None:
    refused = alice.put("/users/me", {"blocked": False})
    assert (code_of(refused), refused.get_json()["data"]["errors"]) == (
        (400, 400),
        {"blocked": ["Only administrators can set this."]},
    )
    for path, value in (("/users/me", True), (f"/users/{alice.id}", "yes")):
        assert invalid_fields(admin.put(path, {"blocked": value})) == {"blocked"}
    assert alice.me()["id"] == alice.id


def test_an_operator_blocks_by_command(app: Flask, mallory: Caller) -> None:
    for command, status in (("block", 403), ("unblock", 200)):
        assert flask(app, command, str(mallory.id)).exit_code == 0
        assert mallory.get("/users/me").status_code == status
    missing = flask(app, "block", str(2**53))
    assert (missing.exit_code, missing.output) == (1, f"Error: There is no user {2**53}.\n")
