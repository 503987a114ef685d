"""Messages in Redis, taken and left by several queues in this process, which have no threads."""

import threading
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
from flask import Flask
from redis import Redis
from redis.exceptions import ConnectionError as NoRedis

from errors import ApiError, Code
from storage import message_queue
from storage.message_queue import MessageQueue
from telemetry.traces import RequestSpan, current_ids
from tests.harness import WAIT_SECONDS, counted, let_claims_be_due, wait_until

Handle = Callable[[Any], object]
MakeQueue = Callable[[Handle], MessageQueue]


class Death(BaseException):
    """Leaves a message as a process does that dies with it."""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_queue, "POLL_SECONDS", 0.1)


@pytest.fixture
def put(app: Flask) -> Callable[..., bool]:
    def put(key: str, message: Any = "message") -> bool:
        with app.app_context():
            return MessageQueue(app, lambda message: None).put(key, message, 60)

    return put


def die(message: Any) -> None:
    raise Death


def left_by_the_dead(app: Flask, redis: Redis) -> None:
    """Let a process take a message, and die with it; returns when it can be claimed."""
    with pytest.raises(Death):
        MessageQueue(app, die).handle_next(claim=True)
    let_claims_be_due(redis)


def test_a_message_is_handled_once_however_often_it_is_put(app: Flask, put: Any, redis: Redis) -> None:
    seen: list[Any] = []
    queues = [MessageQueue(app, seen.append) for _ in range(2)]
    assert [put("a", {"to": "阿上"}), put("a", {"to": "阿上"}), put("b", 1)] == [True, False, True]
    assert [queue.handle_next() for queue in (*queues, *queues)] == [True, True, False, False]
    assert put("a", {"to": "阿上"}) is False
    assert seen == [{"to": "阿上"}, 1]
    assert redis.xlen(message_queue.STREAM) == 0


def test_concurrent_repeats_are_put_once(app: Flask, put: Any) -> None:
    outcomes: list[bool] = []
    threads = [threading.Thread(target=lambda: outcomes.append(put("a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 7 + [True]


def test_a_message_is_handled_in_the_trace_of_its_request(app: Flask, put: Any) -> None:
    seen: list[Any] = []
    request = RequestSpan("POST", {"HTTP_TRACEPARENT": f"00-{'a' * 32}-{'b' * 16}-01"})
    put("a")
    request.end(200)
    MessageQueue(app, lambda message: seen.append(current_ids()["traceId"])).handle_next()
    assert seen == ["a" * 32]
    assert current_ids() == {"traceId": None}  # the next message is of another request


def test_what_a_dead_process_left_is_taken_when_its_time_is_over(app: Flask, put: Any, redis: Redis) -> None:
    seen: list[Any] = []
    queue = MessageQueue(app, seen.append)
    put("a")
    with pytest.raises(Death):
        MessageQueue(app, die).handle_next()
    assert not queue.handle_next(claim=True)  # too early
    let_claims_be_due(redis)
    assert not queue.handle_next()  # is not a new one
    assert queue.handle_next(claim=True)
    assert (seen, redis.xlen(message_queue.STREAM)) == (["message"], 0)


def test_only_one_of_two_claims_what_was_left(app: Flask, put: Any, redis: Redis) -> None:
    gate, begun = threading.Event(), threading.Semaphore(0)

    def wait(message: Any) -> None:
        begun.release()
        gate.wait(WAIT_SECONDS)

    put("a")
    left_by_the_dead(app, redis)
    queue = MessageQueue(app, wait)
    claims = threading.Thread(target=queue.handle_next, kwargs={"claim": True})
    claims.start()
    assert begun.acquire(timeout=WAIT_SECONDS)
    assert not MessageQueue(app, wait).handle_next(claim=True)
    gate.set()
    claims.join()


def test_a_message_that_each_process_dies_with_is_dropped_and_logged(
    app: Flask, put: Any, redis: Redis, log_lines: Any
) -> None:
    seen: list[Any] = []
    before = counted("messages_handled_total", outcome="dropped")
    request = RequestSpan("POST", {"HTTP_TRACEPARENT": f"00-{'c' * 32}-{'b' * 16}-01"})
    put("bad")
    request.end(200)
    for _ in range(message_queue.TRIES):
        left_by_the_dead(app, redis)
    put("good")
    queue = MessageQueue(app, seen.append)
    assert [queue.handle_next(claim=True) for _ in range(3)] == [True, True, False]
    assert seen == ["message"]
    (line,) = [line for line in log_lines() if line["message"] == "message dropped"]
    assert (line["level"], line["traceId"]) == ("ERROR", "c" * 32)
    assert counted("messages_handled_total", outcome="dropped") == before + 1
    assert (redis.xlen(message_queue.STREAM), redis.xpending(message_queue.STREAM, "workers")["pending"]) == (0, 0)


def test_what_no_key_decrypts_waits_for_a_process_that_has_the_key_and_is_dropped_in_the_end(
    app: Flask, make_app: Callable[..., Flask], redis: Redis
) -> None:
    other = make_app(ENCRYPTION_KEYS="A" * 43 + "=")
    seen: list[Any] = []
    for number, tries in enumerate([1, message_queue.TRIES]):
        with other.app_context():
            MessageQueue(other, seen.append).put(str(number), number, 60)
        for _ in range(tries):
            with pytest.raises(ValueError, match="not decrypt"):
                MessageQueue(app, seen.append).handle_next(claim=True)
            let_claims_be_due(redis)
        assert MessageQueue(other, seen.append).handle_next(claim=True)
    assert (seen, redis.xlen(message_queue.STREAM)) == ([0], 0)


def test_too_many_are_refused(app: Flask, put: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_queue, "BACKLOG", 2)
    assert put("a")
    assert put("b")
    with pytest.raises(ApiError) as caught:
        put("c")
    assert caught.value.api_code is Code.UNAVAILABLE
    MessageQueue(app, lambda message: None).handle_next()
    assert put("c")


def test_a_message_that_cannot_be_removed_is_handled_again(
    app: Flask, put: Any, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    put("a")
    seen: list[Any] = []
    queue = MessageQueue(app, seen.append)
    with monkeypatch.context() as away:
        away.setattr(queue._redis, "pipeline", Mock(side_effect=NoRedis))
        with pytest.raises(NoRedis):
            queue.handle_next()
    let_claims_be_due(redis)
    assert queue.handle_next(claim=True)
    assert (seen, redis.xlen(message_queue.STREAM)) == (["message", "message"], 0)


def test_threads_handle_a_bounded_number_at_once_and_a_stop_waits_for_these_alone(
    app: Flask, put: Any, redis: Redis
) -> None:
    gate, begun, done = threading.Event(), [], []

    def work(message: Any) -> None:
        begun.append(message)
        gate.wait(WAIT_SECONDS)
        done.append(message)

    queue = MessageQueue(app, work)
    for number in range(message_queue.THREADS + 3):
        put(str(number), number)
    queue.start()
    try:
        wait_until(lambda: len(begun) == message_queue.THREADS)
        threading.Timer(0.3, gate.set).start()
    finally:
        queue.stop()
    assert len(done) == len(begun) == message_queue.THREADS
    assert redis.xlen(message_queue.STREAM) == 3
    other = MessageQueue(app, work)
    other.start()
    try:
        wait_until(lambda: len(done) == message_queue.THREADS + 3)
    finally:
        other.stop()
    assert (sorted(done), redis.xlen(message_queue.STREAM)) == ([*range(message_queue.THREADS + 3)], 0)


def test_without_redis_and_after_its_data_are_lost_the_threads_go_on(
    app: Flask, put: Any, redis: Redis, log_lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    queue = MessageQueue(app, seen.append)
    xlen = queue._redis.xlen
    monkeypatch.setattr(queue._redis, "xlen", Mock(side_effect=NoRedis("away")))
    queue.start()
    try:
        wait_until(lambda: [line for line in log_lines() if line["message"] == "messages cannot be handled"])
        monkeypatch.setattr(queue._redis, "xlen", xlen)
        put("a")
        wait_until(lambda: seen and not redis.xlen(message_queue.STREAM))
        redis.flushall()
        time.sleep(0.3)  # a thread that saw the message just before may say once that there is no stream
        said = log_lines()
        time.sleep(0.3)  # it is looked for several times
        assert log_lines() == said
        put("a")
        wait_until(lambda: len(seen) == 2)
    finally:
        queue.stop()


def test_a_bug_in_what_runs_the_handlers_ends_no_thread_and_loses_nothing(
    app: Flask, put: Any, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_queue, "CLAIM_MILLISECONDS", 200)
    seen: list[Any] = []

    def fail_first(message: Any) -> None:
        seen.append(message)
        if len(seen) <= 2:
            raise TypeError

    queue = MessageQueue(app, fail_first)
    put("a")
    queue.start()
    try:
        wait_until(lambda: len(seen) == 3)
        wait_until(lambda: redis.xlen(message_queue.STREAM) == 0)
    finally:
        queue.stop()
