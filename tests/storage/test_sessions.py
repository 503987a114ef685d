import hashlib
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, session
from flask.testing import FlaskClient
from msgspec import json
from redis import Redis

from storage import sessions
from tests.blueprints.callers import Caller, code_of, data_of, log_in
from tests.harness import Simulator, bearer

ME, LOGIN = "/api/v1/users/me", "/api/v1/auth/wechat"
LIFETIME, ABSOLUTE = 3600, 86400


@pytest.fixture
def alice(app: Flask, simulator: Simulator) -> Caller:
    return Caller(app, simulator)


@pytest.fixture
def browser(make_app: Callable[..., Flask]) -> FlaskClient:
    """A client of an application with one more route, which writes to the session; it keeps cookies over HTTPS."""
    app = make_app()

    def remember() -> dict[str, Any]:
        session["remembered"] = session.get("remembered", 0) + 1
        return {"remembered": session["remembered"]}

    app.add_url_rule("/remember", view_func=remember)
    client = app.test_client()
    client.environ_base["wsgi.url_scheme"] = "https"
    return client


def store_id(token: str) -> str:
    return "session:" + hashlib.sha256(token.encode()).hexdigest()


def stored(redis: Redis, token: str) -> dict[str, Any]:
    return json.decode(redis.get(store_id(token)))


def age(redis: Redis, token: str, seconds: int, *fields: str) -> None:
    """Make a stored session older."""
    record = stored(redis, token)
    for field in fields:
        record[field] -= seconds
    redis.set(store_id(token), json.encode(record), ex=record["expires_at"] - int(time.time()))


def commands(redis: Redis) -> dict[str, int]:
    """The commands that Redis has received since the last reset, without those of this test."""
    seen = {name.removeprefix("cmdstat_"): count["calls"] for name, count in redis.info("commandstats").items()}
    return {name: count for name, count in seen.items() if name not in ("info", "config|resetstat", "config")}


def test_a_token_has_256_random_bits_and_redis_stores_its_hash(redis: Redis, token: str) -> None:
    assert len(token) == 43  # 32 bytes in unpadded base64
    assert store_id(token).encode() in redis.keys("*")
    assert not any(token.encode() in key + (redis.dump(key) or b"") for key in redis.scan_iter())


def test_a_bearer_token_precedes_a_cookie(client: FlaskClient, token: str) -> None:
    for headers, status in (
        ({**bearer("wrong"), "Cookie": f"session={token}"}, 401),
        ({**bearer(token), "Cookie": "session=wrong"}, 200),
        ({"Cookie": f"session={token}"}, 200),
        ({"Authorization": f"bEARER {token}"}, 200),
        ({"Authorization": f"Token {token}"}, 401),
        ({"Authorization": "Bearer"}, 401),
    ):
        assert client.get(ME, headers=headers).status_code == status, headers


def test_an_unknown_token_or_unreadable_session_is_401(client: FlaskClient, redis: Redis, tmp_path: Path) -> None:
    for token in ("", " ", "x", "x" * 10_000, "é\xff", "../../etc", "session:", "%00"):
        assert code_of(client.get(ME, headers=bearer(token))) == (401, 401), token
    pickled = pickle.dumps(Exploit(str(tmp_path / "exploited")))
    for content in (b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"\x81\xa7user_id\x01", b"{}", pickled):
        redis.set(store_id("planted"), content)
        assert client.get(ME, headers=bearer("planted")).status_code == 401, content
    assert not (tmp_path / "exploited").exists()


class Exploit:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_bearer_request_sets_no_cookie(browser: FlaskClient, token: str) -> None:
    assert "Set-Cookie" not in browser.get("/remember", headers=bearer(token)).headers
    assert "Set-Cookie" not in browser.get(ME, headers=bearer(token)).headers
    assert "Set-Cookie" not in browser.delete("/api/v1/auth/session", headers=bearer(token)).headers


def test_a_request_without_a_session_that_writes_none_creates_none(client: FlaskClient, redis: Redis) -> None:
    for path in (ME, "/livez", "/readyz", "/version", "/nowhere", "/openapi.json"):
        assert "Set-Cookie" not in client.get(path).headers
    assert redis.keys() == [b"readiness"]  # which /readyz writes


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(browser: FlaskClient, redis: Redis) -> None:
    first = browser.get("/remember")
    name, *flags = [part.strip() for part in first.headers["Set-Cookie"].split(";")]
    assert name.startswith("session=")
    assert {"HttpOnly", "Secure", "SameSite=Lax"} <= set(flags)
    assert browser.get("/remember").get_json() == {"remembered": 2}
    assert len(redis.keys("session:*")) == 1


def test_a_session_id_chosen_by_the_client_is_not_adopted(browser: FlaskClient, redis: Redis) -> None:
    browser.set_cookie("session", "chosen-by-an-attacker")
    browser.get("/remember")
    assert redis.get(store_id("chosen-by-an-attacker")) is None
    assert len(redis.keys("session:*")) == 1


def test_a_login_ends_the_session_it_came_with(client: FlaskClient, simulator: Simulator, token: str) -> None:
    login = client.post(LOGIN, json={"code": simulator.code()}, headers=bearer(token))
    assert client.get(ME, headers=bearer(token)).status_code == 401
    assert client.get(ME, headers=bearer(data_of(login)["token"])).status_code == 200


def test_a_login_keeps_no_data_of_the_previous_session(app: Flask) -> None:
    with app.test_request_context("/"):
        first = sessions.log_in(1, web_app_id="wx-web")
        assert session["web_app_id"] == "wx-web"
        assert sessions.log_in(2) != first
        assert (session["user_id"], session.get("web_app_id")) == (2, None)


def test_a_read_needs_one_command_of_redis_and_a_probe_none(client: FlaskClient, redis: Redis, token: str) -> None:
    for path, expected in ((ME, {"mget": 1}), ("/livez", {})):
        redis.config_resetstat()
        assert client.get(path, headers=bearer(token)).status_code == 200
        assert commands(redis) == expected


def test_a_session_is_extended_after_half_of_its_lifetime(client: FlaskClient, redis: Redis, token: str) -> None:
    age(redis, token, LIFETIME // 2 - 60, "expires_at")
    client.get(ME, headers=bearer(token))
    assert redis.ttl(store_id(token)) < LIFETIME // 2 + 120
    age(redis, token, 120, "expires_at")
    client.get(ME, headers=bearer(token))
    assert redis.ttl(store_id(token)) > LIFETIME - 60


def test_a_session_is_not_extended_beyond_its_absolute_end(client: FlaskClient, redis: Redis, token: str) -> None:
    age(redis, token, LIFETIME // 2 + 60, "expires_at")
    age(redis, token, ABSOLUTE - LIFETIME + 60, "ends_at")
    client.get(ME, headers=bearer(token))
    assert LIFETIME - 120 < redis.ttl(store_id(token)) <= LIFETIME - 60
    age(redis, token, LIFETIME // 2 + 60, "expires_at", "ends_at")
    redis.config_resetstat()
    assert client.get(ME, headers=bearer(token)).status_code == 200
    assert commands(redis) == {"mget": 1}


@pytest.mark.parametrize(("lifetime", "absolute"), [(120, 86400), (120, 120)])
def test_lifetimes_come_from_the_settings(
    make_app: Callable[..., Flask], redis: Redis, simulator: Simulator, lifetime: int, absolute: int
) -> None:
    app = make_app(SESSION_LIFETIME=str(lifetime), SESSION_ABSOLUTE_LIFETIME=str(absolute))
    login = data_of(log_in(app, simulator, "o-lives"))
    assert 60 < redis.ttl(store_id(login["token"])) <= 120
    assert redis.ttl(f"user:{login['user']['id']}:sessions") <= absolute


def test_a_login_is_stored_before_its_token_is_returned(app: Flask, redis: Redis) -> None:
    with app.test_request_context("/", headers={"Authorization": "Bearer none"}):
        assert redis.get(store_id(sessions.log_in(1))) is not None


def test_a_login_during_a_logout_everywhere_is_ended_by_the_next_one(
    app: Flask, alice: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    raced: list[Caller] = []
    list_sessions = app.extensions["redis"].zrange

    def list_then_log_in(*args: Any) -> Any:
        members = list_sessions(*args)
        if not raced:
            raced.append(Caller(app, alice.simulator, alice.openid))
        return members

    monkeypatch.setattr(app.extensions["redis"], "zrange", list_then_log_in)
    alice.delete("/auth/sessions")
    assert raced[0].get("/users/me").status_code == 200
    alice.log_in()
    alice.delete("/auth/sessions")
    assert raced[0].get("/users/me").status_code == 401


def test_an_unused_session_expires(client: FlaskClient, redis: Redis, token: str) -> None:
    assert LIFETIME - 60 < redis.ttl(store_id(token)) <= LIFETIME
    redis.pexpire(store_id(token), 1)
    time.sleep(0.01)
    assert client.get(ME, headers=bearer(token)).status_code == 401


@pytest.mark.parametrize(("path", "left"), [("/auth/session", [401, 200, 200]), ("/auth/sessions", [401, 401, 200])])
def test_a_logout_ends_one_session_or_all_of_the_user(
    app: Flask, alice: Caller, redis: Redis, path: str, left: list[int]
) -> None:
    other_device, other_user = Caller(app, alice.simulator, alice.openid), Caller(app, alice.simulator)
    assert data_of(alice.delete(path)) == {}
    assert [user.get("/users/me").status_code for user in (alice, other_device, other_user)] == left
    order = {"items": [{"sku": "tea", "name": "茶", "quantity": 1, "unit_price": 1}]}
    written = [user.post("/orders", order).status_code for user in (alice, other_device, other_user)]
    assert written == [201 if status == 200 else status for status in left]
    assert bool(redis.keys(f"user:{alice.id}:*")) == (200 in left[:2])


def test_a_slow_request_does_not_restore_a_revoked_session(
    make_app: Callable[..., Flask], redis: Redis, simulator: Simulator
) -> None:
    app = make_app()

    def slow() -> dict[str, Any]:
        session["written"] = True
        assert user.delete("/auth/sessions").status_code == 200
        return {}

    app.add_url_rule("/api/v1/slow", view_func=slow)
    user = Caller(app, simulator)
    assert user.get("/slow").status_code == 200
    assert list(redis.scan_iter("session:*")) == []


def test_expired_sessions_are_removed_from_the_list_of_the_user(alice: Caller, redis: Redis) -> None:
    index = f"user:{alice.id}:sessions"
    redis.zadd(index, dict.fromkeys(redis.zrange(index, 0, -1), 1))
    alice.log_in()
    assert redis.zcard(index) == 1
    assert 0 < redis.ttl(index) <= ABSOLUTE


def test_a_session_that_cannot_be_saved_is_503_and_logged_once(
    browser: FlaskClient, app: Flask, redis: Redis, log_lines: Any
) -> None:
    browser.get("/remember")
    redis.config_set("maxmemory", "1")
    try:
        answer = browser.get("/remember")
    finally:
        redis.config_set("maxmemory", "0")
    assert code_of(answer) == (503, 503)
    assert [line["status"] for line in log_lines() if line["message"] == "request"] == [200, 503]
