"""Limits that processes share: each of these has a RateLimit of its own, as in processes of their own."""

import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import Flask
from redis import Redis

from dev.redis_server import RedisServer
from storage import rate_limits
from storage.rate_limits import RateLimit

AMOUNT, SHARE = 100, 2
Process = Callable[..., RateLimit]


class Clock:
    now = 1_000_000 * 3600.0  # where an hour begins


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rate_limits.time, "time", lambda: clock.now)
    return clock


def process_on(url: str, number: int, amount: int = AMOUNT, seconds: int = 3600) -> RateLimit:
    app = Flask("process")
    app.config.update(SECRET_KEY="k" * 32, INSTANCE=f"host-{number}:8000")
    app.extensions["redis"] = Redis.from_url(url, socket_timeout=0.4, socket_connect_timeout=0.4)
    return RateLimit(app, "session", amount, seconds)


@pytest.fixture
def process(redis: Redis, redis_server: RedisServer) -> Iterator[Process]:
    limits: list[RateLimit] = []

    def begin(number: int = 0, *args: int) -> RateLimit:
        limits.append(process_on(redis_server.url, number, *args))
        return limits[-1]

    yield begin
    for limit in limits:
        settled(limit)  # not in Redis of the next test


def settled(limit: RateLimit) -> None:
    """Wait until everything that a process has to settle is settled, or has failed."""
    limit._settler.submit(int).result()


def allowed(limit: RateLimit, times: int, caller: str = "alice") -> int:
    count = 0
    for _ in range(times):
        count += limit.take(caller)[0] >= 0
        settled(limit)
    return count


def test_so_many_are_allowed_and_what_is_left_is_counted_down(process: Process, clock: Clock) -> None:
    limit = process(0, 3, 60)
    clock.now += 18.5
    assert [limit.take("alice") for _ in range(3)] == [(2, 42), (1, 42), (0, 42)]
    assert limit.take("alice")[0] == limit.take("alice")[0] == -1
    assert limit.take("bob") == (2, 42)


@pytest.mark.parametrize("begin", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("amount", [1, 7, 100])
def test_the_window_moves(process: Process, clock: Clock, begin: float, amount: int) -> None:
    limit = process(0, amount, 3600)
    clock.now += begin * 3600
    times = []
    for _ in range(3 * 360):  # a request each ten seconds, for three hours
        if limit.take("alice")[0] >= 0:
            times.append(clock.now)
        clock.now += 10
    most = max(sum(1 for time in times if start <= time < start + 3600) for start in times)
    # Two fixed windows are an estimate, as they do not say when in them the requests came.
    assert amount <= most <= 1.3 * amount + 1
    assert 2 * amount <= len(times) <= 4 * amount


def test_a_burst_at_the_end_of_a_window_leaves_nothing_for_the_next_one(process: Process, clock: Clock) -> None:
    limit = process()
    clock.now += 3599
    assert allowed(limit, 2 * AMOUNT) == AMOUNT
    clock.now += 2
    assert allowed(limit, 2 * AMOUNT) == 0
    clock.now += 1800
    assert allowed(limit, 2 * AMOUNT) == AMOUNT // 2
    clock.now += 2 * 3600
    assert allowed(limit, 2 * AMOUNT) == AMOUNT


@pytest.mark.parametrize("begin", [0.4, 100.4, 3599.4])
@pytest.mark.parametrize("pause", [0, 900, 3600])
def test_there_is_room_when_it_says_so_and_not_before(process: Process, clock: Clock, begin: float, pause: int) -> None:
    limit = process(0, 10, 3600)
    clock.now += begin
    for _ in range(10):
        limit.take("alice")
    clock.now += pause
    for _ in range(10):
        left, wait = limit.take("alice")
    if left >= 0:
        return  # enough of the earlier ones are over
    assert wait > 0
    clock.now += wait - 2
    assert limit.take("alice")[0] == -1
    clock.now += 2
    assert limit.take("alice")[0] >= 0


def test_more_than_so_many_of_several_processes_are_waited_for_too(process: Process, clock: Clock) -> None:
    one, other = process(1, 10), process(2, 10)
    clock.now += 0.4
    assert allowed(one, 5) == 5
    clock.now += 3600 + 3000
    assert sum(allowed(limit, 1) for _ in range(20) for limit in (one, other)) > 10
    left, wait = one.take("alice")
    assert left == -1
    clock.now += wait - 2
    assert one.take("alice")[0] == -1
    clock.now += 2
    assert one.take("alice")[0] >= 0


def test_processes_share_a_limit_within_what_each_may_keep_to_itself(process: Process, clock: Clock) -> None:
    limits = [process(number) for number in range(4)]
    count = sum(allowed(limit, 1) for _ in range(AMOUNT) for limit in limits)
    assert AMOUNT <= count <= AMOUNT + 4 * SHARE
    newcomer = process(9)
    assert allowed(newcomer, AMOUNT) <= SHARE
    clock.now += 3600  # a process that has not seen the caller in the window before learns of it
    assert allowed(process(10), AMOUNT) <= SHARE + 1
    assert allowed(process(11), AMOUNT, "bob") == AMOUNT


def test_a_process_that_is_alone_allows_exactly_so_many(process: Process, clock: Clock) -> None:
    assert allowed(process(), 2 * AMOUNT) == AMOUNT


@pytest.mark.parametrize("fault", ["frozen", "away"])
def test_without_redis_each_process_keeps_to_the_limit_and_settles_later(
    own_redis: RedisServer, clock: Clock, fault: str
) -> None:
    one, other = (process_on(own_redis.url, number) for number in (1, 2))
    assert allowed(one, 10) == allowed(other, 10) == 10
    pool = one._app.extensions["redis"].connection_pool
    for connection in [pool.get_connection() for _ in range(8)]:  # of requests; a frozen Redis reads what they bring
        pool.release(connection)
    assert own_redis.process
    if fault == "frozen":
        own_redis.process.send_signal(signal.SIGSTOP)
    else:
        own_redis.stop()
    began = time.monotonic()
    counts = [sum(limit.take("alice")[0] >= 0 for _ in range(50)) for limit in (one, other)]
    assert time.monotonic() - began < 10
    assert counts == [50, 50]
    assert sum(one.take("alice")[0] >= 0 for _ in range(500)) == AMOUNT - 60  # it knows of its own alone
    assert allowed(one, 5) == 0  # it tries to settle each time
    settled(other)
    if fault == "frozen":
        own_redis.process.send_signal(signal.SIGCONT)
    else:
        own_redis.start()
    assert allowed(one, 3) == 0
    assert allowed(other, 50) <= 2 * SHARE  # it would allow 30 more if it did not learn what the other one has counted
    clock.now += 3600 + 3000  # what was sent more than once counts once, or the gate would be shut
    assert allowed(other, AMOUNT) >= 70  # a sixth of 161 is still within the hour


def test_a_flood_of_callers_fills_neither_the_process_nor_redis(
    process: Process, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_limits, "CALLERS", 50)
    limit = process(0, 10)
    assert allowed(limit, 11) == 10
    for number in range(1000):
        limit.take(f"stranger {number}")
        assert limit.take("alice")[0] == -1  # whoever comes often is not forgotten
    settled(limit)
    assert len(limit._counts) <= 50
    assert redis.dbsize() <= 2  # of alice


def test_what_redis_holds_expires_and_names_nobody(process: Process, redis: Redis) -> None:
    limit = process(0, 100, 60)
    allowed(limit, 10, "198.51.100.4/32")
    keys: Any = redis.keys()
    assert keys
    for key in keys:
        assert 0 < redis.ttl(key) <= 120
        assert b"198.51.100.4" not in key + b"".join(redis.hgetall(key))  # type: ignore[operator]


def test_a_clock_that_is_set_shuts_nobody_out(process: Process, clock: Clock) -> None:
    limit = process()
    assert allowed(limit, AMOUNT) == AMOUNT
    for step in (3 * 3600, -2 * 3600 * 3):
        clock.now += step
        assert allowed(limit, AMOUNT) == AMOUNT
