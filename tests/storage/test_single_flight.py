import base64
import hashlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest
from flask import Flask
from gevent import GreenletExit
from redis import Redis
from redis.exceptions import RedisError

import concurrency
from concurrency import GaveUp
from errors import ApiError, Code
from storage.single_flight import single_flight
from tests.harness import WAIT_SECONDS, round_trips, wait_until

KEY = f"flight:{hashlib.sha256(b'code').hexdigest()}"


def ask(app: Flask, call: Any, kind: str = "flight") -> Any:
    with app.app_context():
        return single_flight(kind, "code", call)


def test_simultaneous_callers_share_one_call(app: Flask) -> None:
    calls, callers = [], []

    def call() -> dict[str, int]:
        calls.append(None)
        wait_until(lambda: len(callers) == 8)
        time.sleep(0.5)  # until the last caller has looked
        return {"answer": 42}

    def join(_: int) -> Any:
        callers.append(None)
        return ask(app, call)

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(join, range(8)))
    assert outcomes == [{"answer": 42}] * 8
    assert len(calls) == 1


@pytest.mark.parametrize(
    "error", [ApiError(Code.WECHAT_REFUSED), RuntimeError(), GaveUp(Code.UPSTREAM_TIMEOUT), GreenletExit()], ids=repr
)
def test_a_call_that_fails_is_made_by_the_next_caller(app: Flask, redis: Redis, error: BaseException) -> None:
    started = threading.Event()

    def call() -> None:
        started.set()
        time.sleep(0.3)
        raise error

    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(ask, app, call)
        started.wait(WAIT_SECONDS)
        assert ask(app, lambda: "mine") == "mine"
        with pytest.raises(type(error)):
            leader.result(WAIT_SECONDS)
    assert not redis.exists(f"{KEY}:lock")


def test_a_later_caller_gets_the_result_for_five_seconds_and_then_an_error(app: Flask, redis: Redis) -> None:
    for result in ({"answer": 42}, None):
        redis.flushall()
        assert ask(app, lambda result=result: result) == result
        assert ask(app, fail) == result
        assert 4000 < redis.pttl(KEY) <= 5000
    redis.delete(KEY)
    with pytest.raises(ApiError) as caught:
        ask(app, lambda: None)
    assert caught.value.api_code is Code.WECHAT_CODE_USED


def test_the_lock_expires_soon_after_the_request(app: Flask, redis: Redis) -> None:
    context = copy_context()
    context.run(concurrency._deadline.set, time.monotonic() + 5)
    assert 5000 < context.run(ask, app, lambda: redis.pttl(f"{KEY}:lock")) <= 6000
    redis.flushall()
    assert 60_000 < ask(app, lambda: redis.pttl(f"{KEY}:lock")) <= 61_000


def test_a_killed_process_delays_others_only_until_the_lock_expires(app: Flask, redis: Redis) -> None:
    redis.set(f"{KEY}:lock", "of-a-dead-process", px=300)
    assert ask(app, lambda: "mine") == "mine"


def test_a_hanging_process_is_not_waited_for(app: Flask, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.single_flight._CALL_SECONDS", 0.2)
    redis.set(f"{KEY}:lock", "of-a-hanging-process", ex=60)
    with pytest.raises(RedisError):
        ask(app, lambda: "mine")


def test_result_under_another_encryption_key_counts_as_done(app: Flask, make_app: Callable[..., Flask]) -> None:
    other = make_app(ENCRYPTION_KEYS=base64.b64encode(bytes(32)).decode())
    started = threading.Event()

    def call() -> None:
        started.set()
        time.sleep(0.3)

    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(ask, other, call)
        started.wait(WAIT_SECONDS)
        with pytest.raises(ApiError) as caught:
            ask(app, lambda: "mine")
        leader.result(WAIT_SECONDS)
    assert caught.value.api_code is Code.WECHAT_CODE_USED


def fail() -> None:
    raise ApiError(Code.WECHAT_REFUSED)


def test_results_in_redis_are_encrypted_and_expire(app: Flask, redis: Redis) -> None:
    ask(app, lambda: "the-secret-outcome")
    values = [redis.get(key) for key in redis.scan_iter()]
    assert len(values) == 2
    assert not any(b"the-secret-outcome" in value for value in values)
    assert all(redis.ttl(key) > 0 for key in redis.scan_iter())


def test_a_call_costs_four_round_trips(app: Flask) -> None:
    ask(app, lambda: None, kind="before")  # Redis knows the script that releases a lock from now on
    with round_trips(app.extensions["redis"]) as count:
        ask(app, lambda: None)
    assert count() == 4


def test_a_call_that_outlasts_its_lock_succeeds(app: Flask, redis: Redis) -> None:
    assert ask(app, lambda: redis.delete(f"{KEY}:lock")) == ask(app, fail) == 1
