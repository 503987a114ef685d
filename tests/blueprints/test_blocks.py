"""A blocked user is kept out at once, on every instance, whichever way they come; also after their account is gone."""

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask

from tests.blueprints.callers import API, Caller, code_of, data_of, operations
from tests.harness import APP_ID, Simulator

BLOCKED = {"code": 403, "message": "账号已被封禁", "data": None}


@pytest.fixture
def name() -> str:
    """In the ids of this test alone: the tests share a database."""
    return f"o-{secrets.token_hex(8)}"


@pytest.fixture
def mallory(app: Flask, simulator: Simulator, name: str) -> Caller:
    return Caller(app, simulator, openid=name)


def log_in(app: Flask, simulator: Simulator, openid: str, **wanted: Any) -> Any:
    code = simulator.code(openid=openid, **wanted)
    return app.test_client().post(f"{API}/auth/wechat", json={"code": code})


def block(admin: Caller, user: Caller, blocked: bool = True) -> Any:
    answer = admin.put(f"/users/{user.id}", {"blocked": blocked})
    assert answer.status_code == 200, answer.text


def flask(app: Flask, *command: str) -> Any:
    return app.test_cli_runner().invoke(args=["users", *command])


def test_a_blocked_user_is_refused_at_the_next_request_on_every_instance(
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
    block(admin, mallory, False)
    assert mallory.get("/users/me").status_code == 200


def test_a_blocked_user_cannot_log_in(
    app: Flask, simulator: Simulator, admin: Caller, mallory: Caller, name: str
) -> None:
    block(admin, mallory)
    assert log_in(app, simulator, name).get_json() == BLOCKED
    code = simulator.code(openid=name)
    simulator.fault("slow", seconds=0.5)
    with ThreadPoolExecutor(2) as pool:
        tap = lambda _: app.test_client().post(f"{API}/auth/wechat", json={"code": code})  # noqa: E731
        assert [answer.get_json() for answer in pool.map(tap, range(2))] == [BLOCKED] * 2


def test_a_blocked_user_is_refused_on_wechat_cloud_run(
    make_app: Callable[..., Flask], admin: Caller, mallory: Caller, name: str
) -> None:
    block(admin, mallory)
    app = make_app(TRUST_WXCLOUD_HEADERS="true")
    headers = {"X-WX-OPENID": name, "X-WX-APPID": APP_ID}
    assert app.test_client().get(f"{API}/users/me", headers=headers).get_json() == BLOCKED


def test_a_block_outlives_the_account(
    app: Flask, simulator: Simulator, admin: Caller, mallory: Caller, log_lines: Any, name: str
) -> None:
    log_in(app, simulator, name, unionid=f"u{name}")
    block(admin, mallory)
    assert admin.delete(f"/users/{mallory.id}").status_code == 200
    assert log_in(app, simulator, name).get_json() == BLOCKED
    assert log_in(app, simulator, f"{name}-elsewhere", unionid=f"u{name}").get_json() == BLOCKED
    assert log_in(app, simulator, f"{name}-else").status_code == 200
    assert flask(app, "unblock", str(mallory.id)).exit_code == 0
    assert log_in(app, simulator, f"{name}-elsewhere", unionid=f"u{name}").status_code == 200
    audits = [(line["event"], line["aboutUserId"]) for line in log_lines() if line["message"] == "audit"]
    assert audits == [
        ("user blocked", mallory.id),
        ("user deleted", mallory.id),
        ("user unblocked", mallory.id),
    ]


def test_an_account_deleted_without_a_block_may_return(
    app: Flask, simulator: Simulator, admin: Caller, mallory: Caller, name: str
) -> None:
    assert admin.delete(f"/users/{mallory.id}").status_code == 200
    assert log_in(app, simulator, name).status_code == 200


def test_a_block_is_kept_as_a_keyed_hash(
    app: Flask,
    make_app: Callable[..., Flask],
    simulator: Simulator,
    admin: Caller,
    mallory: Caller,
    environ: Any,
    name: str,
) -> None:
    block(admin, mallory)
    admin.delete(f"/users/{mallory.id}")
    with app.app_context(), app.extensions["database"].connect() as connection:
        (row,) = connection.exec_driver_sql(
            f"SELECT fingerprint FROM blocked_identities WHERE former_user_id = {mallory.id}"
        )
    assert name not in row.fingerprint
    new_key = make_app(ENCRYPTION_KEYS=f"{'A' * 43}=,{environ['ENCRYPTION_KEYS']}")
    assert log_in(new_key, simulator, name).get_json() == BLOCKED


def test_merging_with_a_blocked_user_lifts_no_block(
    app: Flask, simulator: Simulator, admin: Caller, mallory: Caller, name: str
) -> None:
    log_in(app, simulator, f"{name}-older", unionid=f"u{name}")
    block(admin, mallory)
    log_in(app, simulator, name, unionid=f"u{name}")
    assert log_in(app, simulator, f"{name}-older", unionid=f"u{name}").get_json() == BLOCKED


def test_only_administrators_block_and_never_themselves(admin: Caller, alice: Caller) -> None:
    refused = alice.put("/users/me", {"blocked": False})
    assert (code_of(refused), refused.get_json()["data"]["errors"]) == ((400, 400), {"blocked": ["Unknown field."]})
    assert code_of(admin.put("/users/me", {"blocked": True})) == (400, 400)
    assert code_of(admin.put(f"/users/{alice.id}", {"blocked": "yes"})) == (400, 400)
    assert code_of(alice.call("PUT", "/users/me/profile", {"blocked": True})) == (400, 400)
    assert data_of(alice.get("/users/me"))["id"] == alice.id


def test_an_operator_blocks_by_command(app: Flask, simulator: Simulator, mallory: Caller) -> None:
    assert flask(app, "block", str(mallory.id)).exit_code == 0
    assert mallory.get("/users/me").get_json() == BLOCKED
    assert flask(app, "unblock", str(mallory.id)).exit_code == 0
    assert mallory.get("/users/me").status_code == 200
    missing = flask(app, "block", str(2**53))
    assert (missing.exit_code, missing.output) == (1, f"Error: There is no user {2**53}.\n")
