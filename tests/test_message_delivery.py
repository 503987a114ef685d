"""No message that was confirmed to WeChat is lost, and none is handled twice without need: with real processes."""

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import pytest
import requests
from redis import Redis
from sqlalchemy import make_url

from dev.redis_server import RedisServer
from storage.message_queue import STREAM
from tests.harness import APP_ID, PUSH_AES_KEY, PUSH_TOKEN, WAIT_SECONDS, Service, Simulator, wait_until
from wechat.crypto import push_signature
from wechat.message_push import MessagePush

APP = "tests.apps.fragile_handler"
StartService = Callable[..., Service]
WECHAT = MessagePush(PUSH_TOKEN, PUSH_AES_KEY, APP_ID)


@pytest.fixture
def redis(own_redis: RedisServer) -> Iterator[Redis]:
    """One of the test's own: instances of other tests would take its messages."""
    with closing(Redis.from_url(own_redis.url)) as client:
        yield client


@pytest.fixture
def start_service(start_service: StartService, own_redis: RedisServer) -> StartService:
    return partial(start_service, REDIS_URL=own_redis.url)


def push(service: Service, number: int, content: str) -> bool:
    """Post a text once, as WeChat does; returns whether its receipt was confirmed."""
    return post(service, {"MsgType": "text", "MsgId": number, "Content": content})


def post(service: Service, message: dict[str, Any]) -> bool:
    message = {"ToUserName": "a", "FromUserName": "o-alice", "CreateTime": int(time.time()), **message}
    sealed = WECHAT.seal(message, "xml", time.time())
    encrypted = sealed.partition("<Encrypt>")[2].partition("</Encrypt>")[0]
    query = {"timestamp": str(int(time.time())), "nonce": "n"}
    query["msg_signature"] = push_signature(PUSH_TOKEN, query["timestamp"], "n", encrypted)
    url = f"{service.url}/api/v1/wechat/messages"
    try:
        return requests.post(url, params=query, data=sealed.encode(), timeout=WAIT_SECONDS).text == "success"
    except requests.RequestException:
        return False


def deliver(service: Service, number: int, content: str) -> bool:
    """Post a text until its receipt is confirmed, as WeChat does, too; returns True."""
    return wait_until(lambda: push(service, number, content))


def ensure_handled_once(redis: Redis, numbers: Iterable[int], *services: Service) -> None:
    """Make sure that all of these were handled, and none again unless Redis took too long to hear of it."""
    handled = done(redis)
    assert set(handled) == set(numbers)
    unheard = sum(service.log().count("messages cannot be handled") for service in services)
    assert sum(handled.values()) - len(handled) <= unheard


def done(redis: Redis, name: str = "handled") -> Counter[int]:
    return Counter(int(number) for number in redis.lrange(name, 0, -1))


def kill_a_worker(service: Service) -> None:
    worker = service.workers()[0]
    worker.kill()
    worker.wait(WAIT_SECONDS)


def test_what_a_killed_worker_was_handling_is_handled_again_and_nothing_else(
    start_service: StartService, redis: Redis
) -> None:
    service = start_service(APP, WEB_CONCURRENCY="1")
    assert all(deliver(service, number, "2.5") for number in range(12))
    wait_until(lambda: redis.llen("begun") == 8)
    kill_a_worker(service)
    handled = wait_until(lambda: len(done(redis)) == 12 and done(redis))
    wait_until(lambda: redis.xlen(STREAM) == 0)
    assert handled == done(redis) == Counter(range(12))
    assert sorted(done(redis, "begun").values()) == [1] * 4 + [2] * 8


def test_another_instance_handles_what_a_dead_one_has_left(start_service: StartService, redis: Redis) -> None:
    one = start_service(APP)
    assert all(deliver(one, number, "2") for number in range(20))
    wait_until(lambda: redis.llen("begun") >= 16)
    one.kill()
    other = start_service(APP, WEB_CONCURRENCY="1")
    wait_until(lambda: redis.xlen(STREAM) == 0)
    ensure_handled_once(redis, range(20), one, other)


def test_a_message_that_kills_each_worker_is_dropped_and_all_others_are_handled(
    start_service: StartService, redis: Redis
) -> None:
    service = start_service(APP, WEB_CONCURRENCY="1")
    assert all(deliver(service, number, "0.3") for number in range(8))
    wait_until(lambda: push(service, 100, "die"))  # which may die before it has responded
    confirmed = [number for number in range(8, 20) if push(service, number, "0.3")]
    wait_until(lambda: redis.xlen(STREAM) == 0)
    assert done(redis, "begun")[100] == 3
    assert set(done(redis)) >= {*range(8), *confirmed}
    (line,) = wait_until(lambda: [line for line in service.log_lines() if line["message"] == "message dropped"])
    received = [line["traceId"] for line in service.log_lines() if line["message"] == "message received"]
    assert line["traceId"] in received
    assert deliver(service, 200, "0")
    wait_until(lambda: done(redis)[200])


def test_two_instances_share_messages_and_repeats_are_handled_once(start_service: StartService, redis: Redis) -> None:
    both = [start_service(APP, WEB_CONCURRENCY="1") for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        repeated = [(service, number) for number in range(40) for service in both]
        assert all(pool.map(lambda one: deliver(one[0], one[1], "0.1"), repeated))
    wait_until(lambda: redis.xlen(STREAM) == 0)
    ensure_handled_once(redis, range(40), *both)


@pytest.fixture
def load() -> Iterator[Callable[[list[Service]], list[int]]]:
    """Push messages to these services until the end of the test, or `stop`; fills the list of the confirmed ones."""
    stopped = threading.Event()
    with ThreadPoolExecutor(4) as pool:

        def begin(services: list[Service]) -> Any:
            confirmed: list[int] = []

            def work(first: int) -> None:
                number = first
                while not stopped.is_set():
                    for service in services:
                        if push(service, number, "0.2"):
                            confirmed.append(number)
                        number += 4
                    stopped.wait(0.05)

            runs = [pool.submit(work, first) for first in range(4)]

            def finish() -> list[int]:
                stopped.set()
                for run in runs:
                    run.result()
                return confirmed

            return finish

        yield begin
        stopped.set()


def test_a_stop_under_load_loses_no_message_and_handles_none_twice(
    start_service: StartService, redis: Redis, load: Any
) -> None:
    one, other = (start_service(APP, WEB_CONCURRENCY="1") for _ in range(2))
    finish = load([one, other])
    wait_until(lambda: redis.llen("handled") > 20)
    one.stop()
    handled = redis.llen("handled")
    wait_until(lambda: redis.llen("handled") > handled + 20)
    confirmed = finish()
    wait_until(lambda: redis.xlen(STREAM) == 0)
    ensure_handled_once(redis, {*confirmed, *done(redis)}, one, other)


def test_workers_killed_under_load_lose_no_message(start_service: StartService, redis: Redis, load: Any) -> None:
    services = [start_service(APP, WEB_CONCURRENCY="1") for _ in range(2)]
    finish = load(services)
    for turn in range(4):
        handled = redis.llen("handled")
        wait_until(lambda: redis.llen("handled") > handled + 10)  # noqa: B023
        kill_a_worker(services[turn % 2])
    confirmed = finish()
    wait_until(lambda: redis.xlen(STREAM) == 0)
    assert set(confirmed) <= set(done(redis))
    # Each death leaves at most what its threads were handling.
    assert done(redis).total() - len(done(redis)) <= 4 * 8
    assert "message dropped" not in {line["message"] for service in services for line in service.log_lines()}


def test_while_redis_is_away_no_message_is_lost(start_service: StartService, own_redis: RedisServer) -> None:
    service, _ = (start_service(APP, REDIS_URL=own_redis.url, WEB_CONCURRENCY="1") for _ in range(2))
    with closing(Redis.from_url(own_redis.url)) as redis:
        assert all(deliver(service, number, "1.5") for number in range(24))
        wait_until(lambda: redis.llen("begun") >= 16)
        own_redis.stop()
        time.sleep(5)  # longer than what a dead process has taken is waited for
        assert not push(service, 100, "0")
        own_redis.start()
        wait_until(lambda: redis.xlen(STREAM) == 0)
        assert set(done(redis)) == {*range(24)}
        assert push(service, 100, "0")
        wait_until(lambda: done(redis)[100] == 1)


def test_a_cancellation_that_meets_a_locked_database_is_done_when_it_is_free(
    start_service: StartService, redis: Redis, simulator: Simulator, environ: dict[str, str]
) -> None:
    service = start_service(APP)
    token = service.log_in(simulator, openid="o-cancels")
    database = make_url(environ["DATABASE_URL"]).database
    with closing(sqlite3.connect(str(database), timeout=WAIT_SECONDS, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        cancellation = {"MsgType": "event", "Event": "user_authorization_cancellation", "OpenID": "o-cancels"}
        assert post(service, cancellation)
        wait_until(lambda: "a handler failed" in service.log())
        other.execute("COMMIT")
    assert service.read_me(token).status_code == 200
    wait_until(lambda: redis.xlen(STREAM) == 0)
    assert service.read_me(token).status_code == 401
    deleted = wait_until(lambda: [line for line in service.log_lines() if line.get("event") == "user deleted"])
    assert len(deleted) == 1


def test_a_service_without_a_token_reads_no_messages(start_service: StartService, redis: Redis) -> None:
    start_service(APP, WECHAT_PUSH_TOKEN="", WECHAT_PUSH_AES_KEY="")
    redis.config_resetstat()
    time.sleep(2)
    assert "cmdstat_xreadgroup" not in redis.info("commandstats")
