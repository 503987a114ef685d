import threading
from typing import Any

import pytest
from flask import Flask, current_app

from concurrency import Background, background
from errors import ApiError, Code
from storage import database
from telemetry.logs import trace_id
from tests.harness import wait_until


@pytest.fixture
def small(app: Flask) -> Any:
    background = Background(app, threads=2, backlog=3)
    yield background
    background.close()


def test_work_has_an_application_context_and_the_trace_id_of_who_submitted_it(small: Background, app: Flask) -> None:
    seen = []

    def work(argument: str) -> None:
        database.ping()
        seen.append((argument, current_app.name, trace_id.get()))

    trace_id.set("a" * 32)
    small.submit(work, "argument")
    trace_id.set(None)
    small.close()
    assert seen == [("argument", "service", "a" * 32)]
    assert app.extensions["database"].pool.checkedout() == 0


def test_a_failure_is_logged_with_its_trace_id_and_counted_and_the_next_one_runs(app: Flask, log_lines: Any) -> None:
    done = threading.Event()

    def fail() -> None:
        raise RuntimeError("the reason")

    trace_id.set("b" * 32)
    with app.app_context():
        background.submit(fail)
        background.submit(done.set)
        trace_id.set(None)
        assert done.wait(5)
        wait_until(lambda: background.pending == 0)
        assert background.failures == 1
    (line,) = [line for line in log_lines() if line["message"] == "background work failed"]
    assert line["traceId"] == "b" * 32
    assert line["function"].endswith("fail")
    assert line["failures"] == 1
    assert "RuntimeError: the reason" in line["exc_info"]


def test_what_is_in_hand_is_bounded_and_runs_two_at_a_time(small: Background) -> None:
    gate, running = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        running.release()
        gate.wait(5)

    for _ in range(3):
        small.require_room()
        small.submit(work)
    assert running.acquire(timeout=5)
    assert running.acquire(timeout=5)
    assert not running.acquire(timeout=0.2)
    with pytest.raises(ApiError) as caught:
        small.require_room()
    assert caught.value.api_code is Code.UNAVAILABLE
    gate.set()
    wait_until(lambda: small.pending == 0)
    small.require_room()


def test_closing_finishes_what_is_in_hand(small: Background) -> None:
    done = []
    gate = threading.Event()
    small.submit(lambda: gate.wait(5))
    for number in range(2):
        small.submit(done.append, number)
    gate.set()
    small.close()
    assert sorted(done) == [0, 1]
