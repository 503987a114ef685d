import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from flask import Flask, g

import concurrency
from concurrency import ROOM, FanOut, GaveUp, context_for, ensure_somebody_waits, fan_out, room, seconds_left
from errors import ApiError, Code
from storage import database
from telemetry.traces import RequestSpan, current_ids
from tests.harness import ROOT, WAIT_SECONDS, wait_until


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


def test_functions_have_the_deadline_of_the_call_and_not_that_of_the_request_that_began_them(
    small_fan_out: FanOut,
) -> None:
    left: list[float] = []

    def hang() -> str:
        left.append(seconds_left(1000))
        time.sleep(0.5)
        return "done"

    with pytest.raises(ApiError) as caught:
        context_for(-1).run(small_fan_out.run, {"hangs": hang}, WAIT_SECONDS)
    assert caught.value.api_code is Code.UNAVAILABLE
    outcome = context_for(0.1).run(small_fan_out.run, {"hangs": hang}, WAIT_SECONDS)["hangs"]
    assert isinstance(outcome, TimeoutError)
    assert small_fan_out.run({"hangs": hang}, WAIT_SECONDS) == {"hangs": "done"}  # another request, the same call
    (seconds,) = left
    assert WAIT_SECONDS - 5 < seconds <= WAIT_SECONDS


def test_no_more_functions_are_kept_than_the_backlog_and_none_that_is_done(
    small_fan_out: FanOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrency, "BACKLOG", 3)
    gate = threading.Event()
    hanging = {str(number): lambda: gate.wait(WAIT_SECONDS) for number in range(3)}
    small_fan_out.run(hanging, 0.1)
    with pytest.raises(ApiError) as caught:
        small_fan_out.run({"more": lambda: 1}, WAIT_SECONDS)
    assert caught.value.api_code is Code.UNAVAILABLE
    gate.set()
    wait_until(lambda: not [future for future in small_fan_out._futures.values() if not future.done()])
    for number in range(10):
        assert small_fan_out.run({f"name-{number}": lambda: 1}, WAIT_SECONDS) == {f"name-{number}": 1}
    assert len(small_fan_out._futures) == 1


def is_free(weight: int) -> bool:
    try:
        with room(weight, 0):
            return True
    except ApiError:
        return False


def test_room_is_taken_by_weight_and_given_back_also_after_a_failure() -> None:
    with room(ROOM - 3):
        assert is_free(3)
        assert not is_free(4)
        with room(3):
            assert not is_free(1)
        with pytest.raises(RuntimeError), room(2):
            raise RuntimeError
        with pytest.raises(ApiError) as caught, room(4, 0):
            pass
        assert caught.value.api_code is Code.UNAVAILABLE
        assert is_free(3)
    assert is_free(ROOM)
    assert not is_free(ROOM + 1)
    assert is_free(ROOM)


def test_a_wait_for_room_ends_with_the_request() -> None:
    began = time.monotonic()
    with room(ROOM), pytest.raises(ApiError):
        context_for(0.1).run(lambda: room(1, WAIT_SECONDS).__enter__())
    assert time.monotonic() - began < WAIT_SECONDS / 2
    assert is_free(ROOM)


def test_what_is_heavy_is_not_overtaken_by_what_comes_later() -> None:
    order: list[str] = []

    def take(name: str, weight: int) -> None:
        with room(weight, WAIT_SECONDS):
            order.append(name)

    heavy, light = (threading.Thread(target=take, args=args) for args in (("heavy", ROOM), ("light", 1)))
    with room(1):
        heavy.start()
        wait_until(lambda: not is_free(1))  # it waits for its turn, though there would be room for less
        light.start()
        time.sleep(0.2)
        assert order == []
    heavy.join()
    light.join()
    assert order == ["heavy", "light"]
    assert is_free(ROOM)


def test_two_that_take_much_do_not_block_each_other() -> None:
    taken: list[int] = []

    def take(number: int) -> None:
        with room(ROOM, 5):
            taken.append(number)

    threads = [threading.Thread(target=take, args=[number]) for number in range(2)]
    parts = [room(1) for _ in range(ROOM)]
    for part in parts:
        part.__enter__()
    for thread in threads:
        thread.start()
    for part in parts:  # both wait, and would get half of it each
        time.sleep(0.02)
        part.__exit__(None, None, None)
    for thread in threads:
        thread.join()
    assert sorted(taken) == [0, 1]


def test_a_request_that_is_given_up_gives_its_room_back() -> None:
    script = """
from gevent import monkey; monkey.patch_all()
import gevent, time
from concurrency import ROOM, room

def take(weight):
    with room(weight, 60):
        time.sleep(60)

holder, heavy, light = gevent.spawn(take, 1), gevent.spawn(take, ROOM), gevent.spawn(take, 1)
gevent.sleep(0.1)
for greenlet in (light, heavy, holder):
    greenlet.kill()
with room(ROOM, 0):
    print("free")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=WAIT_SECONDS
    )
    assert done.stdout == "free\n", done.stderr


def test_a_client_that_has_hung_up_is_noticed_and_one_that_is_there_is_not_disturbed(
    app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = socket.socketpair()
    with server, app.test_request_context(environ_overrides={"gunicorn.socket": server}):
        ensure_somebody_waits()
        client.sendall(b"the next request")
        ensure_somebody_waits()
        assert server.recv(100) == b"the next request"
        client.close()
        with monkeypatch.context() as patch:
            patch.setattr("os.dup", lambda number: os.open("/nowhere", 0))  # fails, as where descriptors run out
            ensure_somebody_waits()
        with pytest.raises(GaveUp) as caught:
            ensure_somebody_waits()
        assert caught.value.api_code.number < 500
    ensure_somebody_waits()  # outside of a request
