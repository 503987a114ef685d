import threading
from typing import Any

import pytest
from flask import Flask, current_app, g
from werkzeug.datastructures import Headers

from concurrency import Background, FanOut, background, fan_out
from errors import ApiError, Code
from storage import database
from telemetry.traces import RequestSpan, current_ids
from tests.harness import WAIT_SECONDS, counted, wait_until


@pytest.fixture
def small(app: Flask) -> Any:
    background = Background(app, threads=2, backlog=3)
    yield background
    background.pool.shutdown()


def test_work_has_an_application_context_and_the_trace_id_of_its_request(small: Background, app: Flask) -> None:
    seen = []

    def work(argument: str) -> None:
        database.ping()
        seen.append((argument, current_app.name, current_ids()["traceId"]))

    request = RequestSpan("GET", Headers({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}))
    small.submit(work, "argument")
    request.end(200)
    small.pool.shutdown()
    assert seen == [("argument", "service", "a" * 32)]
    assert app.extensions["database"].pool.checkedout() == 0


def test_a_failure_is_logged_with_its_trace_id_and_counted_and_the_next_one_runs(app: Flask, log_lines: Any) -> None:
    done = threading.Event()

    def fail() -> None:
        raise RuntimeError("the reason")

    request = RequestSpan("GET", Headers({"traceparent": f"00-{'b' * 32}-{'b' * 16}-01"}))
    with app.app_context():
        background.submit(fail)
        background.submit(done.set)
        request.end(200)
        assert done.wait(WAIT_SECONDS)
        wait_until(lambda: not background.pending)
    (line,) = [line for line in log_lines() if line["message"] == "background work failed"]
    assert line["traceId"] == "b" * 32
    assert line["function"].endswith("fail")
    assert line["stack"].endswith("RuntimeError: the reason\n")


def test_the_backlog_is_bounded_and_two_functions_run_at_a_time(small: Background) -> None:
    gate, running = threading.Event(), threading.Semaphore(0)

    def work() -> None:
        running.release()
        gate.wait(WAIT_SECONDS)

    for _ in range(3):
        small.ensure_capacity()
        small.submit(work)
    assert running.acquire(timeout=WAIT_SECONDS)
    assert running.acquire(timeout=WAIT_SECONDS)
    assert not running.acquire(timeout=0.2)
    with pytest.raises(ApiError) as caught:
        small.ensure_capacity()
    assert caught.value.api_code is Code.UNAVAILABLE
    gate.set()
    wait_until(lambda: not small.pending)
    small.ensure_capacity()


def test_work_is_counted_by_outcome_and_closing_finishes_it(small: Background) -> None:
    def counts() -> list[float]:
        outcomes = [counted("background_work_total", outcome=outcome) for outcome in ("success", "failure", "rejected")]
        return [counted("background_work_pending"), *outcomes]

    before, gate = counts(), threading.Event()
    for work in (lambda: gate.wait(WAIT_SECONDS), lambda: gate.wait(WAIT_SECONDS), lambda: 1 / 0):
        small.submit(work)
    assert counts()[0] == before[0] + 3
    with pytest.raises(ApiError):
        small.ensure_capacity()
    gate.set()
    small.pool.shutdown()
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [0, 2, 1, 1]


@pytest.fixture
def small_fan_out(app: Flask) -> Any:
    fan_out = FanOut(app, threads=2)
    yield fan_out
    fan_out.pool.shutdown()


def test_functions_run_concurrently_in_contexts_of_their_own_with_the_trace_id_of_the_caller(app: Flask) -> None:
    together = threading.Barrier(2)

    def work() -> Any:
        together.wait(WAIT_SECONDS)
        database.ping()
        return g._get_current_object(), current_ids()["traceId"]

    span = RequestSpan("GET", Headers({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}))
    with app.app_context():
        outcomes = fan_out.run({"one": work, "other": lambda: work()}, WAIT_SECONDS)
        contexts = [*(context for context, _ in outcomes.values()), g._get_current_object()]
    span.end(200)
    assert len({id(context) for context in contexts}) == 3
    assert {trace_id for _, trace_id in outcomes.values()} == {"a" * 32}
    assert app.extensions["database"].pool.checkedout() == 0


def test_an_exception_is_the_outcome_of_its_function_alone(small_fan_out: FanOut) -> None:
    error = RuntimeError("the reason")

    def fail() -> None:
        raise error

    assert small_fan_out.run({"bad": fail, "good": lambda: None, "better": lambda: 1}, WAIT_SECONDS) == {
        "bad": error,
        "good": None,
        "better": 1,
    }


def test_a_function_that_hangs_occupies_one_thread(small_fan_out: FanOut) -> None:
    gate, begun = threading.Event(), []

    def hang() -> str:
        begun.append(threading.current_thread())
        gate.wait(WAIT_SECONDS)
        return "done"

    for _ in range(2):
        outcomes = small_fan_out.run({"hangs": hang, "answers": lambda: 1}, 1)
        assert isinstance(outcomes["hangs"], TimeoutError)
        assert outcomes["answers"] == 1
    assert len(begun) == 1
    threading.Timer(0.1, gate.set).start()
    assert small_fan_out.run({"hangs": hang}, WAIT_SECONDS) == {"hangs": "done"}  # the call that started first
    assert len(begun) == 1
    assert small_fan_out.run({"hangs": hang}, WAIT_SECONDS) == {"hangs": "done"}
    assert len(begun) == 2


def test_a_function_not_started_by_the_deadline_never_runs(small_fan_out: FanOut) -> None:
    gate, begun, running = threading.Event(), [], []
    hanging = {str(number): lambda: running.append(1) or gate.wait(WAIT_SECONDS) for number in range(2)}
    while len(running) < 2:
        small_fan_out.run(hanging, 0.1)
    outcomes = small_fan_out.run({"late": lambda: begun.append(1)}, 0.1)
    assert isinstance(outcomes["late"], TimeoutError)
    gate.set()
    small_fan_out.pool.shutdown()
    assert begun == []
