import hashlib
import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest
from flask import Flask
from redis import Redis
from redis.exceptions import RedisError

import concurrency
from dev.redis_server import RedisServer
from errors import ApiError, Code
from service import create_app
from tests.harness import APP_ID, APP_SECRET, WAIT_SECONDS, Simulator, counted, round_trips, wait_until
from tests.wechat.harness import outcome, refusal
from wechat.access_token import AccessToken

PATH, CHECK = "/cgi-bin/stable_token", "/wxa/msg_sec_check"
KEY = f"wechat:{APP_ID}:access_token"
PAUSE = f"{KEY}:pause:{hashlib.sha256(APP_SECRET.encode()).hexdigest()[:8]}"


@pytest.fixture
def access_token(app: Flask, simulator: Simulator) -> AccessToken:
    return app.extensions["wechat"]._access_token


def at_once(call: Callable[[], Any], times: int = 8) -> list[Any]:
    """Make a call in several threads at the same moment, and return the results and codes."""
    barrier = threading.Barrier(times)

    def call_together(_: int) -> Any:
        barrier.wait()
        return outcome(call)

    with ThreadPoolExecutor(times) as pool:
        return list(pool.map(call_together, range(times)))


def hammer(environ: dict[str, str], openid: str, start: Any, stop: Any, outcomes: Any) -> None:
    """Call in eight threads from a cold start until stopped, in each of the processes."""
    app = create_app(environ)
    client = app.extensions["wechat"]
    codes: list[str] = []

    def call(_: int) -> None:
        while not stop.is_set():
            try:
                client.is_risky("text", openid)
                codes.append("done")
                time.sleep(0.01)  # the machine has to do the rest of the suite too
            except ApiError as error:
                codes.append(error.api_code.name)

    start.wait()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(8)))
    outcomes.put(codes)


@pytest.mark.xdist_group("launch")
def test_eight_processes_of_eight_threads_get_one_token_and_replace_it_once(
    app: Flask, environ: dict[str, str], simulator: Simulator
) -> None:
    app.extensions["wechat"].code_to_session(simulator.code(openid="o-alice"))
    context = multiprocessing.get_context("spawn")
    start, stop, outcomes = context.Barrier(9), context.Event(), context.Queue()
    processes = [
        context.Process(target=hammer, args=(environ, "o-alice", start, stop, outcomes), daemon=True) for _ in range(8)
    ]
    for process in processes:
        process.start()
    start.wait(3 * WAIT_SECONDS)  # until all have imported all
    wait_until(lambda: len(simulator.calls(CHECK)) > 200, 60)
    from_cold = len(simulator.calls(PATH))
    simulator.drop_access_token()
    calls = len(simulator.calls(CHECK))
    wait_until(lambda: len(simulator.calls(CHECK)) > calls + 200, 60)
    stop.set()
    codes = [code for _ in processes for code in outcomes.get(timeout=60)]
    for process in processes:
        process.join(60)
    assert from_cold == 1
    assert len(simulator.calls(PATH)) == 2
    assert len(codes) > 400
    assert set(codes) == {"done"}


def test_refreshes_are_counted_by_outcome(access_token: AccessToken, simulator: Simulator) -> None:
    def counts() -> list[float]:
        return [counted("wechat_token_refreshes_total", outcome=outcome) for outcome in ("success", "failure")]

    before = counts()
    simulator.fault("errcode", errcode=40125, path=PATH)
    refusal(access_token.get)
    access_token._redis.flushall()
    access_token.get(refused=access_token.get())  # which WeChat gives out again until it is forced
    after = counts()
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 1]


def test_a_valid_token_is_shared_and_kept_encrypted_for_its_lifetime(
    access_token: AccessToken, simulator: Simulator, redis: Redis
) -> None:
    token = access_token.get()
    assert access_token.get() == token == simulator.access_token()
    assert len(simulator.calls(PATH)) == 1
    assert 7200 - 10 <= redis.ttl(KEY) <= 7200
    assert not any(token.encode() in (redis.dump(key) or b"") for key in redis.scan_iter())
    redis.set(KEY, "00000000.AAAA", ex=7200)  # under a lost encryption key
    assert access_token.get() == token
    assert len(simulator.calls(PATH)) == 2


def test_near_its_end_one_caller_refreshes_while_the_others_use_the_old_token(
    access_token: AccessToken, simulator: Simulator, redis: Redis
) -> None:
    old = access_token.get()
    simulator.travel(7200 - 200)
    redis.expire(KEY, 200)
    simulator.fault("slow", path=PATH, seconds=2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(access_token.get)
        wait_until(lambda: len(simulator.calls(PATH)) == 2)
        assert [access_token.get() for _ in range(5)] == [old] * 5
        assert first.result(WAIT_SECONDS) == simulator.access_token()
    assert access_token.get() == simulator.access_token() != old
    assert len(simulator.calls(PATH)) == 2


@pytest.mark.parametrize("fails", [True, False])
def test_near_its_end_a_token_is_used_while_wechat_fails_or_gives_no_other(
    access_token: AccessToken, simulator: Simulator, redis: Redis, fails: bool
) -> None:
    old = access_token.get()
    redis.expire(KEY, 200)
    if fails:
        simulator.fault("errcode", path=PATH, times=100, errcode=45009)
    else:
        simulator.travel(7200 - 302)  # two seconds before WeChat issues another
    assert [access_token.get() for _ in range(5)] == [old] * 5
    assert len(simulator.calls(PATH)) == 2


@pytest.mark.parametrize("is_refused", [False, True])
def test_simultaneous_callers_share_a_failure_until_the_pause_is_over(
    access_token: AccessToken, simulator: Simulator, redis: Redis, is_refused: bool
) -> None:
    refused = access_token.get() if is_refused else None
    simulator.fault("errcode", path=PATH, times=100, errcode=40164)
    for calls in (1, 2):
        assert at_once(lambda: access_token.get(refused)) == [Code.WECHAT_REFUSED] * 8
        assert len(simulator.calls(PATH)) == is_refused + calls
        assert 0 < redis.pttl(PAUSE) <= 3000
        redis.delete(PAUSE)


def test_a_failure_with_another_secret_is_not_shared(
    access_token: AccessToken, make_app: Callable[..., Flask], simulator: Simulator
) -> None:
    """As of an instance that has not reloaded yet after the secret was reset."""
    before = make_app(WECHAT_APP_SECRET="the-one-before").extensions["wechat"]._access_token
    for _ in range(3):
        assert outcome(before.get) == Code.WECHAT_REFUSED
    assert len(simulator.calls(PATH)) == 1
    assert access_token.get() == before.get() == simulator.access_token()


def test_others_wait_for_a_refresh_of_two_slow_calls(
    access_token: AccessToken, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wechat.transport.ANSWER_SECONDS", 8)  # a busy machine makes slow calls slower
    refused = access_token.get()
    simulator.fault("slow", path=PATH, times=2, seconds=2.6)
    tokens = set(at_once(lambda: access_token.get(refused=refused)))
    assert tokens == {simulator.access_token()} != {refused}


def test_a_refused_token_is_replaced_but_a_newer_one_is_kept(access_token: AccessToken, simulator: Simulator) -> None:
    old = access_token.get()
    simulator.drop_access_token()
    new = access_token.get(refused=old)
    assert new == simulator.access_token() != old
    assert [access_token.get(refused=old) for _ in range(3)] == [new] * 3
    assert len(simulator.calls(PATH)) == 2


def test_a_token_that_wechat_refuses_but_keeps_issuing_is_replaced_by_force_20_times_a_day(
    access_token: AccessToken, simulator: Simulator, redis: Redis
) -> None:
    first = access_token.get()
    second = access_token.get(refused=first)
    assert second == simulator.access_token() != first
    assert len(simulator.calls(PATH)) == 3  # the same one, and a new one by force
    assert [access_token.get(refused=second) for _ in range(5)] == [second] * 5
    assert len(simulator.calls(PATH)) == 4
    redis.delete(PAUSE)
    assert access_token.get(refused=second) == second
    assert len(simulator.calls(PATH)) == 5  # it is not time yet
    assert 86400 / 20 - 60 < redis.ttl(f"{KEY}:forced") <= 86400 / 20
    redis.delete(f"{KEY}:forced", PAUSE)
    simulator.travel(31)
    assert access_token.get(refused=second) not in (first, second)


def test_a_token_that_is_still_refused_does_not_replace_a_newer_one(access_token: AccessToken, redis: Redis) -> None:
    first = access_token.get()
    redis.set(f"{KEY}:forced", "")  # another process forces a refresh

    def fetch() -> tuple[str, int]:
        redis.set(KEY, access_token._cipher.encrypt("newer", KEY), ex=7200)
        return first, 7200

    access_token._fetch = fetch  # type: ignore[method-assign]
    access_token.get(refused=first)
    assert access_token.get(refused=first) == "newer"


@pytest.mark.parametrize("is_away", [True, False])
def test_a_redis_that_is_away_or_takes_no_writes_costs_wechat_no_call(
    make_app: Callable[..., Flask], own_redis: RedisServer, simulator: Simulator, is_away: bool
) -> None:
    access_token = make_app(REDIS_URL=own_redis.url).extensions["wechat"]._access_token
    if is_away:
        access_token.get()
        own_redis.stop()
    else:
        with Redis.from_url(own_redis.url) as redis:
            redis.config_set("maxmemory", 1)
    for _ in range(3):
        with pytest.raises(RedisError):
            access_token.get()
    assert len(simulator.calls(PATH)) == is_away


def test_one_caller_of_a_process_asks_redis_while_others_wait(
    app: Flask, access_token: AccessToken, simulator: Simulator
) -> None:
    simulator.fault("slow", path=PATH, seconds=1)
    with round_trips(app.extensions["redis"]) as count:
        assert set(at_once(access_token.get, times=32)) == {simulator.access_token()}
    assert count() <= 2 * 32 + 4  # each reads twice; one takes the lock, reads again, stores and releases


def test_a_caller_who_gives_up_leaves_the_refresh_to_the_next_one(
    access_token: AccessToken, simulator: Simulator
) -> None:
    simulator.fault("slow", path=PATH, seconds=5)
    context = copy_context()
    context.run(concurrency._deadline.set, time.monotonic() + 0.5)
    assert context.run(refusal, access_token.get) is Code.UPSTREAM_TIMEOUT
    assert access_token.get() == simulator.access_token()


@pytest.mark.parametrize(
    "answer",
    [
        {},
        *({"access_token": token, "expires_in": 7200} for token in ("", 5, "x" * 2049)),
        *({"access_token": "token", "expires_in": seconds} for seconds in (0, "7200")),
    ],
)
def test_a_response_without_a_token_is_invalid(
    access_token: AccessToken, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]
) -> None:
    monkeypatch.setattr(access_token._transport, "call", lambda *_: answer)
    assert refusal(access_token.get) is Code.UPSTREAM_INVALID


def test_a_refresh_that_outlasts_its_lock_is_no_failure(
    access_token: AccessToken, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = access_token._fetch

    def outlast() -> tuple[str, int]:
        redis.delete(f"{KEY}:lock")
        return fetch()

    monkeypatch.setattr(access_token, "_fetch", outlast)
    token = access_token.get()
    assert access_token.get() == token


def test_while_another_process_refreshes_the_old_token_is_used_or_waited_for(
    access_token: AccessToken, simulator: Simulator, redis: Redis
) -> None:
    old = access_token.get()
    redis.set(f"{KEY}:lock", "another process")
    redis.expire(KEY, 200)
    assert access_token.get() == old
    redis.delete(KEY)
    context = copy_context()
    context.run(concurrency._deadline.set, time.monotonic() + 0.5)
    assert context.run(refusal, access_token.get) is Code.UNAVAILABLE
    assert len(simulator.calls(PATH)) == 1
