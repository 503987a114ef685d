import base64
from collections.abc import Callable

from flask import Flask
from flask.testing import FlaskClient
from redis import Redis

from storage import wechat_session_keys
from tests.harness import Simulator

ABSOLUTE = 86400


def test_a_session_key_is_stored_encrypted(app: Flask, client: FlaskClient, redis: Redis, simulator: Simulator) -> None:
    login = client.post("/api/v1/auth/wechat", json={"code": simulator.code()}).get_json()["data"]
    with app.app_context():
        (session_key,) = wechat_session_keys.candidates(login["user"]["id"])
    assert len(session_key) == 24
    assert ABSOLUTE - 60 < redis.ttl(f"user:{login['user']['id']}:session_keys") <= ABSOLUTE
    assert not any(session_key.encode() in (redis.dump(key) or b"") for key in redis.scan_iter())


def test_the_clock_is_redis_time(app: Flask, redis: Redis) -> None:
    with app.app_context():
        assert redis.time()[0] - 1 <= wechat_session_keys.clock() <= redis.time()[0] + 1


def test_the_session_key_of_the_last_login_is_the_newest_in_any_order_of_storage(app: Flask) -> None:
    with app.app_context():
        assert wechat_session_keys.candidates(1) == []
        for session_key, asked_at, answered_at in (("old", 1, 2), ("newest", 5, 6), ("newer", 3, 4)):
            wechat_session_keys.keep(1, session_key, asked_at, answered_at)
        assert wechat_session_keys.candidates(1) == ["newest"]


def test_all_session_keys_of_overlapping_logins_are_returned(app: Flask) -> None:
    with app.app_context():
        for session_key, asked_at, answered_at in (("before", 1, 2), ("one", 3, 5), ("other", 4, 6)):
            wechat_session_keys.keep(1, session_key, asked_at, answered_at)
        assert wechat_session_keys.candidates(1) == ["other", "one"]
        for number in range(20):
            wechat_session_keys.keep(1, f"at the same moment {number}", 7, 8)
        assert len(wechat_session_keys.candidates(1)) == 8


def test_a_session_key_under_a_removed_key_is_ignored(app: Flask, make_app: Callable[..., Flask]) -> None:
    with app.app_context():
        wechat_session_keys.keep(1, "of-old", 1, 2)
    with make_app(ENCRYPTION_KEYS=base64.b64encode(bytes(32)).decode()).app_context():
        assert wechat_session_keys.candidates(1) == []
