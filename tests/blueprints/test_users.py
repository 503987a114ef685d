"""Users as a resource: who may read and change whom."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from redis import Redis
from sqlalchemy import select

from storage import database, ownership
from storage.models import Identity, Order, User
from tests.blueprints.callers import Caller, code_of, data_of
from tests.harness import APP_ID, Simulator, bearer


def test_get_me(client: FlaskClient, token: str) -> None:
    user = client.get("/api/v1/users/me", headers=bearer(token)).get_json()["data"]
    assert list(user) == ["id", "nickname", "avatar_url", "phone", "role", "created_at", "updated_at"]
    assert (user["nickname"], user["avatar_url"], user["phone"], user["role"]) == (None, None, None, "user")
    created = datetime.fromisoformat(user["created_at"])
    assert created.utcoffset() == timedelta(0)
    assert timedelta(0) <= datetime.now(UTC) - created < timedelta(minutes=1)


def test_me_is_the_id_of_oneself(alice: Caller) -> None:
    assert data_of(alice.get("/users/me")) == data_of(alice.get(f"/users/{alice.id}"))
    assert alice.etag("/users/me") == alice.etag(f"/users/{alice.id}")


@pytest.mark.parametrize("user_id", ["0", "-1", "x", "ME", "1.0", "01", "9" * 18, "9" * 30])
def test_what_is_no_users_id_is_404(alice: Caller, admin: Caller, user_id: str) -> None:
    for caller in (alice, admin):
        assert code_of(caller.get(f"/users/{user_id}")) == (404, 404)


def test_one_changes_oneself_but_not_ones_role(alice: Caller) -> None:
    changed = data_of(alice.put("/users/me", {"nickname": "阿上"}))
    assert (changed["nickname"], changed["avatar_url"]) == ("阿上", None)
    answer = alice.put("/users/me", {"role": "admin"})
    assert code_of(answer) == (400, 400)
    assert set(answer.get_json()["data"]["errors"]) == {"role"}
    assert code_of(alice.put(f"/users/{alice.id}", {"role": "admin"})) == (400, 400)
    for body in ({"id": 1}, {"phone": "13812345678"}, {"nickname": ""}, {"avatar_url": "x"}):
        assert code_of(alice.put("/users/me", body)) == (400, 400), body
    assert data_of(alice.get("/users/me"))["role"] == "user"


def test_a_change_of_oneself_needs_the_etag(alice: Caller) -> None:
    stale = alice.etag("/users/me")
    alice.put("/users/me", {"nickname": "first"})
    assert code_of(alice.call("PUT", "/users/me", {"nickname": "second"})) == (428, 428)
    assert code_of(alice.call("PUT", "/users/me", {"nickname": "second"}, If_Match=stale)) == (412, 412)
    assert code_of(alice.call("DELETE", "/users/me")) == (428, 428)
    assert code_of(alice.call("DELETE", "/users/me", If_Match=stale)) == (412, 412)
    assert data_of(alice.get("/users/me"))["nickname"] == "first"


def test_a_nickname_goes_through_the_content_check_on_this_way_too(
    make_app: Callable[..., Flask], simulator: Simulator
) -> None:
    caller = Caller(make_app(WECHAT_CONTENT_CHECK="true"), simulator)
    assert code_of(caller.put("/users/me", {"nickname": "违禁"})) == (400, 466)
    assert data_of(caller.put("/users/me", {"nickname": "好"}))["nickname"] == "好"


def test_only_administrators_list_and_make_users(alice: Caller, admin: Caller) -> None:
    assert code_of(alice.get("/users")) == (403, 403)
    assert code_of(alice.post("/users", {"openid": "o-new-1"})) == (403, 403)
    listed = data_of(admin.get("/users?page_size=2"))
    assert [user["id"] for user in listed["items"]] == sorted([alice.id, admin.id], reverse=True)
    assert listed["total"] >= 2


def test_a_user_is_found_by_the_full_phone_number(admin: Caller, alice: Caller, app: Flask) -> None:
    with app.app_context():
        database.session.get_one(User, alice.id).phone = "13711112222"
        database.session.commit()
    found = data_of(admin.get("/users?phone=13711112222"))
    assert [(user["id"], user["phone"]) for user in found["items"]] == [(alice.id, "137****2222")]
    assert data_of(admin.get("/users?phone=1371111222"))["items"] == []


def test_a_user_is_made_before_the_first_login_and_is_the_one_who_then_logs_in(
    admin: Caller, app: Flask, simulator: Simulator
) -> None:
    answer = admin.post("/users", {"openid": "o-made", "nickname": "新来的", "role": "admin"})
    made = data_of(answer, 201)
    assert answer.headers["Location"] == f"/api/v1/users/{made['id']}"
    newcomer = Caller(app, simulator, openid="o-made")
    assert newcomer.id == made["id"]
    assert data_of(newcomer.get("/users/me"))["role"] == "admin"
    assert code_of(admin.post("/users", {"openid": "o-made"})) == (409, 409)
    for body in ({}, {"openid": ""}, {"openid": "ö"}, {"openid": "o-x", "role": "king"}, {"openid": "o-x", "id": 5}):
        assert code_of(admin.post("/users", body)) == (400, 400), body


def test_a_change_of_role_takes_effect_on_sessions_that_are_open(admin: Caller, alice: Caller) -> None:
    assert code_of(alice.get("/users")) == (403, 403)
    assert data_of(admin.put(f"/users/{alice.id}", {"role": "admin"}))["role"] == "admin"
    assert code_of(alice.get("/users")) == (200, 200)
    data_of(admin.put(f"/users/{alice.id}", {"role": "user"}))
    assert code_of(alice.get("/users")) == (403, 403)


def test_who_is_named_in_the_settings_is_an_administrator_from_the_next_login_on(
    make_app: Callable[..., Flask], simulator: Simulator
) -> None:
    app = make_app(ADMIN_OPENIDS="o-boss, o-deputy")
    roles = [
        data_of(Caller(app, simulator, openid=openid).get("/users/me"))["role"] for openid in ("o-deputy", "o-bos")
    ]
    assert roles == ["admin", "user"]


def test_an_etag_is_that_of_one_user_in_one_language(alice: Caller, app: Flask, simulator: Simulator) -> None:
    bob = Caller(app, simulator)
    for path in ("/users/me", "/users/me/personal-data", "/users/me/personal-data/full"):
        etag = alice.etag(path)
        assert bob.get(path, If_None_Match=etag).status_code == 200
        assert alice.get(path, If_None_Match=etag, Accept_Language="en").status_code == 200
        assert alice.call("HEAD", path, If_None_Match=etag).status_code == 304
    for method in ("PUT", "DELETE"):
        assert code_of(bob.call(method, "/users/me", {}, If_Match=alice.etag("/users/me"))) == (412, 412)
    english = alice.get("/users/me", Accept_Language="en").headers["ETag"]
    assert alice.call("PUT", "/users/me", {}, If_Match=english).status_code == 200


def test_what_is_private_is_kept_out_of_shared_caches(alice: Caller) -> None:
    answer = alice.get("/users/me")
    assert {"private", "no-cache"} <= set(answer.headers["Cache-Control"].split(", "))
    assert {"Authorization", "Cookie", "Accept-Language"} <= set(answer.headers["Vary"].split(", "))
    for path in ("/users/me/personal-data/full", "/users/me/export"):
        assert "no-store" in alice.get(path).headers["Cache-Control"]


def test_an_administrator_deletes_anybody_and_it_takes_effect_at_once(admin: Caller, alice: Caller) -> None:
    assert data_of(admin.delete(f"/users/{alice.id}")) == {}
    assert code_of(alice.get("/users/me")) == (401, 401)
    assert code_of(admin.get(f"/users/{alice.id}")) == (404, 404)


def test_a_user_who_changed_meanwhile_is_not_deleted_and_keeps_the_orders(alice: Caller) -> None:
    order, stale = alice.order(), alice.etag("/users/me")
    alice.put("/users/me", {"nickname": "changed my mind"})
    assert code_of(alice.call("DELETE", "/users/me", If_Match=stale)) == (412, 412)
    assert data_of(alice.get("/orders"))["items"] == [order]


def test_who_leaves_takes_all_that_is_personal_along_and_the_orders_stay(
    app: Flask, simulator: Simulator, admin: Caller, redis: Redis, log_lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "DETACHED_AT_ONCE", 1)
    leaver, elsewhere = (Caller(app, simulator, openid="o-leaver") for _ in range(2))
    order = leaver.order()
    seen = admin.etag(f"/orders/{order['id']}")
    leaver.put("/users/me/personal-data", {"real_name": "张三丰"})
    leaver.order()
    assert data_of(leaver.delete("/users/me")) == {}
    for caller in (leaver, elsewhere):
        assert code_of(caller.get("/users/me")) == (401, 401)
    with app.app_context():
        assert database.session.get(User, leaver.id) is None
        assert database.session.get(Identity, (APP_ID, "o-leaver")) is None
        kept = database.session.scalars(select(Order).where(Order.id == order["id"])).one()
        assert (kept.user_id, kept.remark, kept.total) == (None, None, order["total"])
    assert not list(redis.scan_iter(f"user:{leaver.id}:*"))
    assert len(list(redis.scan_iter("session:*"))) == 1  # the administrator's
    assert [(line["event"], line["userId"]) for line in log_lines() if line["message"] == "audit"][-1] == (
        "user deleted",
        leaver.id,
    )
    assert admin.get(f"/orders/{order['id']}", If_None_Match=seen).status_code == 200  # it is another version
    assert data_of(admin.get(f"/orders/{order['id']}"))["user_id"] is None
    assert Caller(app, simulator, openid="o-leaver").id != leaver.id
