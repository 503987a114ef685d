"""Users as a resource: reading and changing them, and for administrators creating and deleting them."""

import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flask import Flask
from redis import Redis
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from storage import database, ownership
from storage.masks import mask_phone
from storage.models import Identity, User
from tests.blueprints.callers import Caller, code_of, data_of, invalid_fields
from tests.harness import APP_ID, Simulator


def test_get_me(alice: Caller) -> None:
    user = alice.me()
    assert list(user) == ["id", "nickname", "avatar_url", "phone", "role", "created_at", "updated_at", "version"]
    assert (user["nickname"], user["avatar_url"], user["phone"], user["role"]) == (None, None, None, "user")
    created = datetime.fromisoformat(user["created_at"])
    assert created.utcoffset() == timedelta(0)
    assert timedelta(0) <= datetime.now(UTC) - created < timedelta(hours=1)
    assert data_of(alice.get(f"/users/{alice.id}")) == user
    assert alice.etag(f"/users/{alice.id}") == alice.etag("/users/me")


def test_a_read_of_oneself_is_one_statement_and_fresh(app: Flask, alice: Caller) -> None:
    statements: list[str] = []
    listen = app.extensions["database"], "before_cursor_execute", lambda *executed: statements.append(executed[2])
    for nickname in ("first", "second"):
        alice.put("/users/me", {"nickname": nickname})
        event.listen(*listen)
        assert alice.get("/users/me").get_json()["data"]["nickname"] == nickname
        event.remove(*listen)
    assert len(statements) == 2
    assert all(statement.startswith("SELECT") for statement in statements)


def test_a_malformed_id_is_404(alice: Caller, admin: Caller) -> None:
    for user_id in ("0", "-1", "x", "ME", "1.0", "01", "9" * 18, "9" * 30):
        for caller in (alice, admin):
            assert code_of(caller.get(f"/users/{user_id}")) == (404, 404), user_id


def test_put_me_changes_profile_fields_only(alice: Caller) -> None:
    changed = data_of(alice.put("/users/me", {"nickname": "阿上"}))
    assert (changed["nickname"], changed["avatar_url"]) == ("阿上", None)
    invalid = [{"role": "admin"}, {"id": 1}, {"phone": "13812345678"}, {"nickname": ""}, {"avatar_url": "x"}]
    for body in invalid:
        for path in ("/users/me", f"/users/{alice.id}"):
            assert invalid_fields(alice.put(path, body)) == set(body)
    assert alice.me() == changed


def test_put_me_runs_the_content_check(make_app: Callable[..., Flask], simulator: Simulator) -> None:
    caller = Caller(make_app(WECHAT_CONTENT_CHECK="true"), simulator)
    assert code_of(caller.put("/users/me", {"nickname": "违禁"})) == (400, 466)
    assert data_of(caller.put("/users/me", {"nickname": "好"}))["nickname"] == "好"


def test_only_administrators_list_and_create_users_from_the_moment_of_the_change(alice: Caller, admin: Caller) -> None:
    for role, allowed in (("user", False), ("admin", True), ("user", False)):
        assert data_of(admin.put(f"/users/{alice.id}", {"role": role}))["role"] == role
        assert alice.get("/users").status_code == (200 if allowed else 403)
        assert alice.post("/users", {"openid": "o-by-alice"}).status_code == (201 if allowed else 403)


def test_users_are_listed_newest_first(alice: Caller, admin: Caller) -> None:
    listed = data_of(admin.get("/users?page_size=2"))
    assert [user["id"] for user in listed["items"]] == sorted([alice.id, admin.id], reverse=True)
    assert listed["total"] >= 2


def test_administrators_find_users_by_a_phone_number_in_the_body(
    alice: Caller, admin: Caller, app: Flask, simulator: Simulator, log_lines: Any
) -> None:
    phone, abroad = f"137{secrets.randbelow(10**8):08}", f"+1202{secrets.randbelow(10**7):07}"
    other = Caller(app, simulator, phone=phone)
    alice.store(phone=phone)
    foreign = Caller(app, simulator, phone=abroad)

    def found(**body: Any) -> tuple[list[int], int]:
        answer = data_of(admin.post("/users/search", body, Idempotency_Key="not taken"))
        assert {user["phone"] for user in answer["items"]} <= {mask_phone(phone), mask_phone(abroad)}
        return [user["id"] for user in answer["items"]], answer["total"]

    newest, oldest = max(alice.id, other.id), min(alice.id, other.id)
    assert found(phone=phone) == ([newest, oldest], 2)
    assert found(phone=phone, page=2, page_size=1) == ([oldest], 2)
    assert found(phone=phone, after=newest) == ([oldest], 2)
    assert found(phone=abroad) == ([foreign.id], 1)
    assert found(phone=phone[:-1]) == ([], 0)
    invalid = [{"phone": "137-1111-2222"}, {"phone": ""}, {"phone": None}, {"phone": "1\n"}, {"name": "x"}, {"page": 0}]
    for body in invalid:
        assert invalid_fields(admin.post("/users/search", {"phone": phone, **body})) == set(body)
    for odd in ("2", 1.5, True, None):
        assert invalid_fields(admin.post("/users/search", {"phone": phone, "page": odd})) == {"page"}
    assert invalid_fields(admin.post("/users/search", {})) == {"phone"}
    assert invalid_fields(admin.get(f"/users?phone={phone}")) == {"phone"}
    assert code_of(alice.post("/users/search", {"phone": phone})) == (403, 403)
    assert code_of(admin.get("/users/search")) == (405, 405)
    assert phone not in str(log_lines())


def test_a_user_created_by_an_administrator_is_the_one_who_logs_in(
    admin: Caller, app: Flask, simulator: Simulator
) -> None:
    answer = admin.post("/users", {"openid": "o-made", "nickname": "新来的", "role": "admin"})
    created = data_of(answer, 201)
    assert answer.headers["Location"] == f"/api/v1/users/{created['id']}"
    assert Caller(app, simulator, openid="o-made").me() == created
    assert created["role"] == "admin"
    assert code_of(admin.post("/users", {"openid": "o-made"})) == (409, 409)
    for body in ({"openid": ""}, {"openid": "ö"}, {"role": "king"}, {"id": 5}, {"blocked": True}):
        assert invalid_fields(admin.post("/users", {"openid": "o-x", **body})) == set(body)
    assert invalid_fields(admin.post("/users", {})) == {"openid"}


def test_an_etag_belongs_to_one_user_in_one_language(alice: Caller, app: Flask, simulator: Simulator) -> None:
    bob = Caller(app, simulator)
    for path in ("/users/me", "/users/me/personal-data", "/users/me/personal-data/full"):
        etag = alice.etag(path)
        assert bob.get(path, If_None_Match=etag).status_code == 200
        assert alice.get(path, If_None_Match=etag, Accept_Language="en").status_code == 200
    for method in ("PUT", "DELETE"):
        assert code_of(bob.call(method, "/users/me", {}, If_Match=alice.etag("/users/me"))) == (412, 412)
    english = alice.get("/users/me", Accept_Language="en").headers["ETag"]
    assert alice.call("PUT", "/users/me", {}, If_Match=english).status_code == 200


def test_private_responses_are_kept_out_of_shared_caches(alice: Caller) -> None:
    answer = alice.get("/users/me")
    assert {"private", "no-cache"} <= set(answer.headers["Cache-Control"].split(", "))
    assert {"Authorization", "Cookie", "Accept-Language"} <= set(answer.headers["Vary"].split(", "))
    for path in ("/users/me/personal-data/full", "/users/me/export"):
        assert "no-store" in alice.get(path).headers["Cache-Control"]


def test_an_administrator_deletes_a_user_at_once(admin: Caller, alice: Caller) -> None:
    assert data_of(admin.delete(f"/users/{alice.id}")) == {}
    assert code_of(alice.get("/users/me")) == (401, 401)
    assert code_of(admin.get(f"/users/{alice.id}")) == (404, 404)


def test_deleting_a_user_erases_personal_data_and_keeps_the_orders(
    app: Flask, simulator: Simulator, admin: Caller, redis: Redis, log_lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "DETACHED_AT_ONCE", 1)
    leaver, elsewhere = (Caller(app, simulator, openid="o-leaver") for _ in range(2))
    orders = [leaver.order() for _ in range(2)]
    paths = [f"/orders/{order['id']}" for order in orders]
    etags = [admin.etag(path) for path in paths]
    leaver.put("/users/me/personal-data", {"real_name": "张三丰"})
    assert data_of(leaver.delete("/users/me")) == {}
    for caller in (leaver, elsewhere):
        assert code_of(caller.get("/users/me")) == (401, 401)
    with app.app_context():
        assert database.session.get(User, leaver.id) is None
        assert database.session.get(Identity, (APP_ID, "o-leaver")) is None
    for path, order, etag in zip(paths, orders, etags, strict=True):
        kept = data_of(admin.get(path, If_None_Match=etag))  # as another version
        assert (kept["user_id"], kept["remark"], kept["total"]) == (None, None, order["total"])
    assert not list(redis.scan_iter(f"user:{leaver.id}:*"))
    assert len(list(redis.scan_iter("session:*"))) == 1  # the administrator's
    audits = [(line["event"], line["userId"]) for line in log_lines() if line["message"] == "audit"]
    assert audits[-1] == ("user deleted", leaver.id)
    assert Caller(app, simulator, openid="o-leaver").id != leaver.id


def test_a_deletion_that_fails_erases_nothing_and_ends_no_session(
    app: Flask, alice: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = alice.order()
    erase_all = ownership.erase_all

    def erase_then_fail(user: User) -> None:
        erase_all(user)
        raise OperationalError("UPDATE", {}, Exception("gone"))

    monkeypatch.setattr(ownership, "erase_all", erase_then_fail)
    assert code_of(alice.delete("/users/me")) == (503, 503)
    assert data_of(alice.get(f"/orders/{order['id']}")) == order


def test_the_session_of_a_user_without_a_row_is_401(app: Flask, alice: Caller) -> None:
    with app.app_context():
        database.session.delete(database.session.get_one(User, alice.id))
        database.session.commit()
    for answer in (alice.get("/users/me"), alice.put("/users/me/profile", {"nickname": "x"})):
        assert code_of(answer) == (401, 401)
