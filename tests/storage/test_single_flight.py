import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask
from redis import Redis

from errors import ApiError, Code
from storage.cipher import Cipher
from storage.single_flight import AlreadyDone, single_flight


def ask(app: Flask, call: Any, patience: int = 5) -> Any:
    with app.app_context():
        return single_flight("flight", call, patience=patience, remember=60)


def test_all_who_ask_at_the_same_moment_share_one_call(app: Flask) -> None:
    calls = []

    def call() -> dict[str, int]:
        calls.append(None)
        time.sleep(0.3)
        return {"answer": 42}

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda _: ask(app, call), range(8)))
    assert outcomes == [{"answer": 42}] * 8
    assert len(calls) == 1


def test_all_who_wait_get_the_error_and_the_next_one_calls_again(app: Flask) -> None:
    calls = []

    def call() -> None:
        calls.append(None)
        time.sleep(0.3)
        raise ApiError(Code.WECHAT_REFUSED)

    def code(_: int) -> Code:
        with pytest.raises(ApiError) as caught:
            ask(app, call)
        return caught.value.api_code

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(code, range(4))) == [Code.WECHAT_REFUSED] * 4
    assert len(calls) == 1
    assert ask(app, lambda: "now it works") == "now it works"


def test_one_who_asks_later_is_told_that_it_is_done(app: Flask) -> None:
    assert ask(app, lambda: None) is None
    with pytest.raises(AlreadyDone):
        ask(app, lambda: None)


def test_a_crash_of_the_caller_is_told_to_those_who_wait_and_the_next_one_calls_again(app: Flask) -> None:
    started = threading.Event()

    def crash() -> None:
        started.set()
        time.sleep(0.3)
        raise RuntimeError

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, app, crash)
        started.wait(5)
        second = pool.submit(ask, app, lambda: pytest.fail("the call may have been made"))
        with pytest.raises(ApiError) as caught:
            second.result(5)
        with pytest.raises(RuntimeError):
            first.result(5)
    assert caught.value.api_code is Code.UNAVAILABLE
    assert ask(app, lambda: "now it works") == "now it works"


def test_a_call_is_taken_for_dead_after_its_patience(app: Flask, redis: Redis) -> None:
    assert 0 < ask(app, lambda: redis.ttl("flight"), patience=5) <= 5


def test_a_caller_that_was_killed_is_given_up_after_its_patience(app: Flask, redis: Redis) -> None:
    redis.set("flight", "of-a-dead-process", px=300)
    assert ask(app, lambda: "mine") == "mine"


def test_a_caller_that_hangs_is_not_waited_for_to_its_end(
    app: Flask, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.single_flight._FOLLOW_SECONDS", 0.2)
    redis.set("flight", "of-one-who-hangs", ex=60)
    with pytest.raises(ApiError) as caught:
        ask(app, lambda: "mine")
    assert caught.value.api_code is Code.UNAVAILABLE


def test_an_outcome_under_a_key_that_is_not_ours_yet_is_one_that_is_done(app: Flask, redis: Redis) -> None:
    redis.set("flight", "elsewhere", ex=60)
    redis.set("flight:elsewhere", Cipher([bytes(32)]).encrypt('{"result": 1}', "flight:elsewhere"))
    with pytest.raises(AlreadyDone):
        ask(app, lambda: "mine")


def test_what_waits_in_redis_to_be_read_is_encrypted(app: Flask, redis: Redis) -> None:
    ask(app, lambda: "the-secret-outcome")
    values = [redis.get(key) for key in redis.scan_iter()]
    assert len(values) == 2
    assert not any(b"the-secret-outcome" in value for value in values)
    assert all(redis.ttl(key) > 0 for key in redis.scan_iter())
