import hashlib
import os
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask, session
from flask.testing import FlaskClient
from msgspec import json
from redis import Redis

from storage import sessions
from tests.harness import Simulator, bearer

ME = "/api/v1/users/me"
LIFETIME, ABSOLUTE = 3600, 86400


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
    """Make a stored session older than it is."""
    record = stored(redis, token)
    for field in fields:
        record[field] -= seconds
    redis.set(store_id(token), json.encode(record), ex=record["expires_at"] - int(time.time()))


def commands(redis: Redis) -> dict[str, int]:
    """What Redis has been told since the last reset, without this test's own questions."""
    seen = {name.removeprefix("cmdstat_"): count["calls"] for name, count in redis.info("commandstats").items()}
    return {name: count for name, count in seen.items() if name not in ("info", "config|resetstat", "config")}


def test_a_token_holds_256_random_bits_and_redis_only_its_hash(redis: Redis, token: str) -> None:
    assert len(token) == 43  # 32 bytes in unpadded base64
    assert store_id(token).encode() in redis.keys("*")
    assert not any(token.encode() in key + (redis.dump(key) or b"") for key in redis.scan_iter())


def test_a_bearer_token_counts_before_a_cookie(client: FlaskClient, token: str) -> None:
    assert client.get(ME, headers={**bearer("wrong"), "Cookie": f"session={token}"}).status_code == 401
    assert client.get(ME, headers={**bearer(token), "Cookie": "session=wrong"}).status_code == 200
    assert client.get(ME, headers={"Cookie": f"session={token}"}).status_code == 200
    assert client.get(ME, headers={"Authorization": f"bEARER {token}"}).status_code == 200
    assert client.get(ME, headers={"Authorization": f"Token {token}"}).status_code == 401


@pytest.mark.parametrize("token", ["", " ", "x", "x" * 10_000, "é\xff", "../../etc", "session:", "%00"])
def test_a_token_that_was_never_given_out_is_no_session(client: FlaskClient, token: str) -> None:
    answer = client.get(ME, headers={"Authorization": f"Bearer {token}"})
    assert (answer.status_code, answer.get_json()["code"]) == (401, 401)


def test_no_cookie_is_set_on_a_bearer_request_whatever_it_does(browser: FlaskClient, token: str) -> None:
    assert "Set-Cookie" not in browser.get("/remember", headers=bearer(token)).headers
    assert "Set-Cookie" not in browser.get(ME, headers=bearer(token)).headers
    assert "Set-Cookie" not in browser.delete("/api/v1/auth/session", headers=bearer(token)).headers


def test_no_session_is_made_for_a_request_that_brings_none_and_writes_none(client: FlaskClient, redis: Redis) -> None:
    for path in (ME, "/livez", "/readyz", "/version", "/nowhere", "/openapi.json"):
        assert "Set-Cookie" not in client.get(path).headers
    assert redis.keys() == []


def test_a_browser_gets_a_cookie_that_scripts_and_other_sites_cannot_use(browser: FlaskClient, redis: Redis) -> None:
    first = browser.get("/remember")
    name, *flags = [part.strip() for part in first.headers["Set-Cookie"].split(";")]
    assert name.startswith("session=")
    assert {"HttpOnly", "Secure", "SameSite=Lax"} <= set(flags)
    assert browser.get("/remember").get_json() == {"remembered": 2}
    assert len(redis.keys("session:*")) == 1


def test_an_id_that_the_caller_made_up_is_not_adopted(browser: FlaskClient, redis: Redis) -> None:
    browser.set_cookie("session", "chosen-by-an-attacker")
    browser.get("/remember")
    assert redis.get(store_id("chosen-by-an-attacker")) is None
    assert len(redis.keys("session:*")) == 1


def test_each_login_gets_a_new_id_and_ends_the_session_it_came_with(
    client: FlaskClient, simulator: Simulator, token: str
) -> None:
    again = client.post("/api/v1/auth/wechat", json={"code": simulator.code()}, headers=bearer(token))
    new = again.get_json()["data"]["token"]
    assert new != token
    assert client.get(ME, headers=bearer(token)).status_code == 401
    assert client.get(ME, headers=bearer(new)).status_code == 200


class Exploit:
    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)

    def __init__(self, path: str) -> None:
        self.path = path


def test_a_pickle_is_never_unpickled(client: FlaskClient, redis: Redis, tmp_path: Any) -> None:
    redis.set(store_id("planted"), pickle.dumps(Exploit(str(tmp_path / "exploited"))))
    assert client.get(ME, headers=bearer("planted")).status_code == 401
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"\x81\xa7user_id\x01", b"{}"])
def test_what_cannot_be_read_is_no_session(client: FlaskClient, redis: Redis, content: bytes) -> None:
    redis.set(store_id("planted"), content)
    assert client.get(ME, headers=bearer("planted")).status_code == 401


def test_nothing_of_the_session_before_survives_a_login(app: Flask) -> None:
    with app.test_request_context("/"):
        first = sessions.log_in(1, web_app_id="wx-web")
        assert session["web_app_id"] == "wx-web"
        assert sessions.log_in(2) != first
        assert (session["user_id"], session.get("web_app_id")) == (2, None)


def test_a_plain_read_costs_one_round_trip_and_writes_nothing(client: FlaskClient, redis: Redis, token: str) -> None:
    redis.config_resetstat()
    assert client.get(ME, headers=bearer(token)).status_code == 200
    assert commands(redis) == {"get": 1}


def test_a_request_that_needs_no_session_does_not_ask_redis(client: FlaskClient, redis: Redis, token: str) -> None:
    redis.config_resetstat()
    assert client.get("/livez", headers=bearer(token)).status_code == 200
    assert commands(redis) == {}


def test_a_session_is_prolonged_once_half_of_its_lifetime_is_gone(
    client: FlaskClient, redis: Redis, token: str
) -> None:
    age(redis, token, LIFETIME // 2 - 60, "expires_at")
    client.get(ME, headers=bearer(token))
    assert redis.ttl(store_id(token)) < LIFETIME // 2 + 120
    age(redis, token, 120, "expires_at")
    client.get(ME, headers=bearer(token))
    assert redis.ttl(store_id(token)) > LIFETIME - 60


def test_a_session_is_not_prolonged_beyond_its_absolute_end(client: FlaskClient, redis: Redis, token: str) -> None:
    age(redis, token, LIFETIME // 2 + 60, "expires_at")
    age(redis, token, ABSOLUTE - LIFETIME + 60, "ends_at")
    client.get(ME, headers=bearer(token))
    assert LIFETIME - 120 < redis.ttl(store_id(token)) <= LIFETIME - 60
    redis.config_resetstat()
    age(redis, token, LIFETIME // 2 + 60, "expires_at", "ends_at")
    redis.config_resetstat()
    assert client.get(ME, headers=bearer(token)).status_code == 200
    assert commands(redis) == {"get": 1}


@pytest.mark.parametrize(("lifetime", "absolute"), [(120, 86400), (3600, 120)])
def test_the_lifetimes_are_those_of_the_settings(
    make_app: Callable[..., Flask], redis: Redis, simulator: Simulator, lifetime: int, absolute: int
) -> None:
    app = make_app(SESSION_LIFETIME=str(lifetime), SESSION_ABSOLUTE_LIFETIME=str(absolute))
    login = app.test_client().post("/api/v1/auth/wechat", json={"code": simulator.code()}).get_json()["data"]
    assert 60 < redis.ttl(store_id(login["token"])) <= 120
    assert redis.ttl(f"user:{login['user']['id']}:sessions") <= absolute


def test_a_login_is_stored_before_anybody_is_told_its_token(app: Flask, redis: Redis) -> None:
    with app.test_request_context("/", headers={"Authorization": "Bearer none"}):
        assert redis.get(store_id(sessions.log_in(1))) is not None


def test_a_login_in_the_middle_of_logging_out_everywhere_can_be_logged_out_the_next_time(
    app: Flask, redis: Redis, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = app.test_client(use_cookies=False)

    def log_in() -> str:
        return client.post("/api/v1/auth/wechat", json={"code": simulator.code(openid="o-races")}).get_json()["data"][
            "token"
        ]

    first, raced = log_in(), []
    listed = app.extensions["redis"].zrange

    def list_then_log_in(*args: Any) -> Any:
        members = listed(*args)
        if not raced:
            raced.append(log_in())
        return members

    monkeypatch.setattr(app.extensions["redis"], "zrange", list_then_log_in)
    client.delete("/api/v1/auth/sessions", headers=bearer(first))
    assert client.get(ME, headers=bearer(raced[0])).status_code == 200
    client.delete("/api/v1/auth/sessions", headers=bearer(log_in()))
    assert client.get(ME, headers=bearer(raced[0])).status_code == 401


def test_an_unused_session_expires(client: FlaskClient, redis: Redis, token: str) -> None:
    assert LIFETIME - 60 < redis.ttl(store_id(token)) <= LIFETIME
    redis.pexpire(store_id(token), 1)
    time.sleep(0.01)
    assert client.get(ME, headers=bearer(token)).status_code == 401


def test_logging_out_ends_this_session_alone(client: FlaskClient, simulator: Simulator) -> None:
    one, other = (
        client.post("/api/v1/auth/wechat", json={"code": simulator.code(openid="o-two-devices")}).get_json()["data"][
            "token"
        ]
        for _ in range(2)
    )
    assert client.delete("/api/v1/auth/session", headers=bearer(one)).get_json()["data"] == {}
    assert client.get(ME, headers=bearer(one)).status_code == 401
    assert client.get(ME, headers=bearer(other)).status_code == 200


def test_logging_out_everywhere_ends_all_sessions_of_the_user_and_of_nobody_else(
    client: FlaskClient, redis: Redis, simulator: Simulator, token: str
) -> None:
    logins = [
        client.post("/api/v1/auth/wechat", json={"code": simulator.code(openid="o-many-devices")}).get_json()["data"]
        for _ in range(3)
    ]
    assert client.delete("/api/v1/auth/sessions", headers=bearer(logins[0]["token"])).status_code == 200
    assert [client.get(ME, headers=bearer(login["token"])).status_code for login in logins] == [401] * 3
    assert client.get(ME, headers=bearer(token)).status_code == 200
    assert redis.keys(f"user:{logins[0]['user']['id']}:*") == []


def test_a_slow_request_does_not_bring_a_revoked_session_back(
    make_app: Callable[..., Flask], redis: Redis, simulator: Simulator
) -> None:
    app = make_app()
    client = app.test_client(use_cookies=False)

    def slow() -> dict[str, Any]:
        session["written"] = True
        assert client.delete("/api/v1/auth/sessions", headers=bearer(token)).status_code == 200
        return {}

    app.add_url_rule("/slow", view_func=slow)
    token = client.post("/api/v1/auth/wechat", json={"code": simulator.code()}).get_json()["data"]["token"]
    assert client.get("/slow", headers=bearer(token)).status_code == 200
    assert redis.get(store_id(token)) is None


def test_ended_sessions_leave_the_list_of_the_user(client: FlaskClient, redis: Redis, simulator: Simulator) -> None:
    def log_in() -> dict[str, Any]:
        return client.post("/api/v1/auth/wechat", json={"code": simulator.code(openid="o-often")}).get_json()["data"]

    index = f"user:{log_in()['user']['id']}:sessions"
    redis.zadd(index, dict.fromkeys(redis.zrange(index, 0, -1), 1))
    log_in()
    assert redis.zcard(index) == 1
    assert 0 < redis.ttl(index) <= ABSOLUTE


def test_a_session_that_cannot_be_saved_answers_503_and_logs_one_request(
    browser: FlaskClient, app: Flask, redis: Redis, log_lines: Any
) -> None:
    browser.get("/remember")
    redis.config_set("maxmemory", "1")
    try:
        answer = browser.get("/remember")
    finally:
        redis.config_set("maxmemory", "0")
    assert (answer.status_code, answer.get_json()["code"]) == (503, 503)
    assert [line["status"] for line in log_lines() if line["message"] == "request"] == [200, 503]
