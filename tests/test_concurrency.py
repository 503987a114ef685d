import threading
from typing import Any

import pytest
from flask import Flask, g

from concurrency import FanOut, fan_out
from storage import database
from telemetry.traces import RequestSpan, current_ids
from tests.harness import WAIT_SECONDS


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

    span = RequestSpan("GET", {"HTTP_TRACEPARENT": f"00-{'a' * 32}-{'b' * 16}-01"})
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
