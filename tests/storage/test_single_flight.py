import base64
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
from dev.redis_server import RedisServer
from errors import ApiError, Code, Message
from storage.single_flight import single_flight
from tests.harness import WAIT_SECONDS, round_trips, suspend, wait_until

REFUSED = Message("被拒", "Refused")


def ask(app: Flask, call: Any, key: str = "flight") -> Any:
    with app.app_context():
        return single_flight(key, call, remember=60, messages={Code.WECHAT_REFUSED: REFUSED})


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


def test_waiting_callers_share_the_error_and_the_next_one_calls_again(app: Flask) -> None:
    calls, callers = [], []

    def call() -> None:
        calls.append(None)
        wait_until(lambda: len(callers) == 4)
        time.sleep(0.5)  # until the last caller has looked
        raise ApiError(Code.WECHAT_REFUSED)

    def failure(_: int) -> tuple[Code, Message | None]:
        callers.append(None)
        with pytest.raises(ApiError) as caught:
            ask(app, call)
        return caught.value.api_code, caught.value.message

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(failure, range(4))) == [(Code.WECHAT_REFUSED, REFUSED)] * 4
    assert len(calls) == 1
    assert ask(app, lambda: "now it works") == "now it works"


def test_a_later_caller_gets_the_result_for_five_seconds_and_then_an_error(app: Flask, redis: Redis) -> None:
    for result in ({"answer": 42}, None):
        redis.flushall()
        assert ask(app, lambda result=result: result) == result
        assert ask(app, fail) == result
        assert 4000 < redis.pttl("flight") <= 5000
    redis.delete("flight")
    with pytest.raises(ApiError) as caught:
        ask(app, lambda: None)
    assert caught.value.api_code is Code.WECHAT_CODE_USED


def test_waiting_callers_learn_of_a_crash_and_the_next_one_calls_again(app: Flask) -> None:
    started = threading.Event()

    def crash() -> None:
        started.set()
        time.sleep(0.3)
        raise RuntimeError

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, app, crash)
        started.wait(WAIT_SECONDS)
        second = pool.submit(ask, app, lambda: pytest.fail("the call may have been made"))
        with pytest.raises(ApiError) as caught:
            second.result(WAIT_SECONDS)
        with pytest.raises(RuntimeError):
            first.result(WAIT_SECONDS)
    assert caught.value.api_code is Code.UNAVAILABLE
    assert ask(app, lambda: "now it works") == "now it works"


def test_the_lock_expires_soon_after_the_request(app: Flask, redis: Redis) -> None:
    context = copy_context()
    context.run(concurrency._deadline.set, time.monotonic() + 5)
    assert 5000 < context.run(ask, app, lambda: redis.pttl("flight:lock")) <= 6000
    redis.flushall()
    assert 60_000 < ask(app, lambda: redis.pttl("flight:lock")) <= 61_000


def test_a_caller_who_gives_up_is_no_reason_for_others_to_give_up(app: Flask, redis: Redis) -> None:
    for error in (GaveUp(Code.UPSTREAM_TIMEOUT), GreenletExit()):
        started = threading.Event()

        def give_up(error: BaseException = error, started: threading.Event = started) -> None:
            started.set()
            time.sleep(0.3)
            raise error

        with ThreadPoolExecutor(1) as pool:
            leader = pool.submit(ask, app, give_up)
            started.wait(WAIT_SECONDS)
            assert ask(app, lambda: "mine") == "mine"
            with pytest.raises(type(error)):
                leader.result(WAIT_SECONDS)
        assert not redis.exists("flight:lock")
        redis.flushall()


def test_a_killed_process_delays_others_only_until_the_lock_expires(app: Flask, redis: Redis) -> None:
    redis.set("flight:lock", "of-a-dead-process", px=300)
    assert ask(app, lambda: "mine") == "mine"


def test_a_hanging_process_is_not_waited_for(app: Flask, redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.single_flight._FOLLOW_SECONDS", 0.2)
    redis.set("flight:lock", "of-a-hanging-process", ex=60)
    with pytest.raises(ApiError) as caught:
        ask(app, lambda: "mine")
    assert caught.value.api_code is Code.UNAVAILABLE


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


def test_a_new_call_does_not_share_the_error_of_an_earlier_one(app: Flask) -> None:
    with pytest.raises(ApiError):
        ask(app, fail)
    started = threading.Event()

    def call() -> str:
        started.set()
        time.sleep(0.3)
        return "now it works"

    with ThreadPoolExecutor(1) as pool:
        leader = pool.submit(ask, app, call)
        started.wait(WAIT_SECONDS)
        assert ask(app, fail) == leader.result(WAIT_SECONDS) == "now it works"


def fail() -> None:
    raise ApiError(Code.WECHAT_REFUSED)


def test_results_in_redis_are_encrypted_and_expire(app: Flask, redis: Redis) -> None:
    ask(app, lambda: "the-secret-outcome")
    values = [redis.get(key) for key in redis.scan_iter()]
    assert len(values) == 2
    assert not any(b"the-secret-outcome" in value for value in values)
    assert all(redis.ttl(key) > 0 for key in redis.scan_iter())


def test_a_call_costs_four_round_trips_and_one_more_after_a_failure(app: Flask) -> None:
    ask(app, lambda: None, key="before")  # Redis knows the script that releases a lock from now on
    with round_trips(app.extensions["redis"]) as count:
        ask(app, lambda: None)
    assert count() == 4
    with pytest.raises(ApiError):
        ask(app, fail, key="another")
    with round_trips(app.extensions["redis"]) as count:
        ask(app, lambda: None, key="another")
    assert count() == 5


def test_a_redis_that_hangs_during_the_call_is_waited_for_once(
    make_app: Callable[..., Flask], own_redis: RedisServer
) -> None:
    app = make_app(REDIS_URL=own_redis.url)
    ask(app, lambda: None, key="before")
    assert own_redis.process
    with round_trips(app.extensions["redis"]) as count, pytest.raises(RedisError):
        ask(app, lambda: suspend(own_redis.process))
    assert count() == 3  # the lock, what is kept, and the result
