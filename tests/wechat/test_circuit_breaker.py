"""How many calls of WeChat are begun, and that none is while WeChat keeps failing."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from flask import Flask
from gevent import GreenletExit

import concurrency
from concurrency import GaveUp
from errors import ApiError, Code
from overload import Door
from tests.harness import WAIT_SECONDS, Simulator, counted, wait_until
from tests.wechat.harness import outcome, refusal, transport_to
from wechat import transport as transport_module
from wechat.transport import FAILURES, Transport

PATH = "/sns/auth"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advance the clock of the breaker."""
    passed: list[float] = []
    monkeypatch.setattr(
        transport_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + sum(passed), sleep=time.sleep)
    )
    return passed.append


@pytest.fixture
def transport(simulator: Simulator) -> Iterator[Transport]:
    transport = transport_to(simulator.url)
    yield transport
    transport._adapter.close()


def call(transport: Transport) -> Any:
    return outcome(transport.call, PATH, {})


def fail(transport: Transport, simulator: Simulator, kind: str, **details: Any) -> None:
    """Let FAILURES calls in a row fail."""
    for _ in range(FAILURES):
        simulator.fault(kind, path=PATH, times=2, **details)
        assert call(transport) in (Code.UPSTREAM_TIMEOUT, Code.UPSTREAM_INVALID, Code.UNAVAILABLE)
    simulator.forget()


@pytest.mark.parametrize(
    ("kind", "details"),
    [("slow", {"seconds": 5}), ("http_500", {}), ("not_json", {}), ("close", {}), ("errcode", {"errcode": -1})],
)
def test_a_wechat_that_keeps_failing_is_not_called(
    transport: Transport,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    details: dict[str, Any],
) -> None:
    for name in ("ANSWER_SECONDS", "FAIR_SECONDS"):
        monkeypatch.setattr(f"wechat.transport.{name}", 0.3)
    monkeypatch.setattr("wechat.transport.RETRY_PAUSE_SECONDS", 0)
    fail(transport, simulator, kind, **details)
    assert [call(transport) for _ in range(3)] == [Code.UNAVAILABLE] * 3
    assert simulator.calls() == []
    assert counted("wechat_breaker_open") == 1
    assert [record.levelname for record in caplog.records if record.msg == "WeChat %s"] == ["ERROR"]


def test_to_be_out_of_descriptors_is_no_failure_of_wechat(
    transport: Transport, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wechat.transport.RETRY_PAUSE_SECONDS", 0)
    with monkeypatch.context() as patch:
        lack = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        patch.setattr("urllib3.util.connection.create_connection", Mock(side_effect=lack))
        assert [call(transport) for _ in range(FAILURES)] == [Code.UNAVAILABLE] * FAILURES
    assert simulator.calls() == []
    assert not transport.is_failing
    assert call(transport) is Code.INTERNAL_ERROR  # it works, and has no token


def test_an_interface_that_fails_stops_no_other(transport: Transport, simulator: Simulator) -> None:
    fail(transport, simulator, "http_500")
    assert outcome(transport.call, "/sns/userinfo", {}) is Code.INTERNAL_ERROR  # it works, and has no token
    assert call(transport) is Code.UNAVAILABLE
    assert transport.is_failing


def test_failures_that_are_not_in_a_row_do_not_count(transport: Transport, simulator: Simulator) -> None:
    for _ in range(2):
        simulator.fault("http_500", path=PATH, times=FAILURES - 1)
        for _ in range(FAILURES - 1):
            assert call(transport) is Code.UPSTREAM_INVALID
        assert call(transport) is Code.INTERNAL_ERROR  # 41001, as there is no token: it works
    assert not transport.is_failing


@pytest.mark.parametrize("errcode", [40029, 40163, 40226, 45009, 40013, 99999])
def test_callers_quotas_and_credentials_are_no_failures_of_wechat(
    transport: Transport, simulator: Simulator, errcode: int
) -> None:
    simulator.fault("errcode", path=PATH, times=FAILURES + 1, errcode=errcode)
    for _ in range(FAILURES + 1):
        assert isinstance(call(transport), Code)
    assert len(simulator.calls()) == FAILURES + 1


@pytest.mark.parametrize("seconds", [0.04, 1])
def test_a_caller_without_time_proves_nothing_against_wechat(
    transport: Transport, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    simulator.fault("slow", path=PATH, times=100, seconds=1.5)
    code = Code.UNAVAILABLE if seconds < 0.05 else Code.UPSTREAM_TIMEOUT

    def call_in_time(_: int) -> Any:
        context = copy_context()
        context.run(concurrency._deadline.set, time.monotonic() + seconds)
        return context.run(call, transport)

    with ThreadPoolExecutor(FAILURES + 1) as pool:
        assert set(pool.map(call_in_time, range(FAILURES + 1))) == {code}
    assert not transport.is_failing
    assert bool(simulator.calls()) == (seconds > 0.05)  # nothing is begun for nothing


def test_one_trial_after_a_pause_decides(
    transport: Transport, simulator: Simulator, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fail(transport, simulator, "http_500")
    clock(4.5)
    assert call(transport) is Code.UNAVAILABLE
    clock(1)
    simulator.fault("http_500", path=PATH)
    assert call(transport) is Code.UPSTREAM_INVALID
    assert call(transport) is Code.UNAVAILABLE
    assert len(simulator.calls()) == 1
    simulator.forget()
    clock(5)
    simulator.fault("slow", path=PATH, seconds=2)
    with ThreadPoolExecutor(1) as pool:
        trial = pool.submit(call, transport)
        wait_until(simulator.calls)
        assert {call(transport) for _ in range(3)} == {Code.UNAVAILABLE}
        assert trial.result(WAIT_SECONDS) is Code.INTERNAL_ERROR
    assert call(transport) is Code.INTERNAL_ERROR
    assert counted("wechat_breaker_open") == 0
    assert [record.levelname for record in caplog.records if record.msg == "WeChat %s"] == ["ERROR", "INFO"]


@pytest.mark.parametrize("error", [GaveUp(Code.UPSTREAM_TIMEOUT), GreenletExit()])
def test_a_trial_whose_caller_gives_up_decides_nothing(error: BaseException, clock: Callable[[float], None]) -> None:
    transport = transport_to("http://wechat.invalid")
    transport._count(PATH, FAILURES)
    clock(5)
    with suppress(type(error)), transport._place(PATH):
        raise error
    assert transport.is_failing
    clock(5)
    with transport._place(PATH):
        transport._count(PATH, 0)
    assert not transport.is_failing


def test_a_clock_that_is_stepped_delays_no_trial(
    transport: Transport, simulator: Simulator, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(transport, simulator, "http_500")
    monkeypatch.setattr("time.time", lambda: 0.0)
    clock(5)
    assert call(transport) is Code.INTERNAL_ERROR


def test_more_calls_than_places_wait_briefly_and_are_shed() -> None:
    transport, gate = Transport("http://wechat.invalid", 2, Door(100, 2)), threading.Event()

    def occupy() -> None:
        with transport._place(PATH):
            gate.wait(WAIT_SECONDS)

    def in_use() -> float:
        return counted("pool_in_use", pool="wechat")

    idle, shed = in_use(), counted("http_requests_shed_total", reason="wechat")
    waited = counted("pool_wait_seconds_sum", pool="wechat")
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(occupy) for _ in range(2)]
        wait_until(lambda: in_use() == idle + 2)
        assert [refusal(occupy) for _ in range(3)] == [Code.UNAVAILABLE] * 3
        assert counted("http_requests_shed_total", reason="wechat") == shed + 3
        assert counted("pool_wait_seconds_sum", pool="wechat") >= waited + 0.3
        gate.set()
        for one in both:
            one.result(WAIT_SECONDS)
    assert in_use() == idle
    for error in (ApiError(Code.WECHAT_CODE_INVALID), GreenletExit(), RuntimeError()):  # none of which keeps its place
        with suppress(BaseException), transport._place(PATH):
            raise error
    occupy()


def test_a_call_keeps_no_other_requests_out(simulator: Simulator) -> None:
    door, during = Door(100, 100), []
    transport = Transport(simulator.url, 2, door)
    with pytest.MonkeyPatch.context() as watched:
        exchange = transport._exchange
        watched.setattr(transport, "_exchange", lambda *args: (during.append(door.in_flight), exchange(*args))[1])
        door.in_flight = 10
        call(transport)
    assert (during, door.in_flight) == ([9], 10)


def test_places_are_a_setting(make_app: Callable[..., Flask], simulator: Simulator) -> None:
    client = make_app(WECHAT_CONCURRENCY="2").test_client(use_cookies=False)
    simulator.fault("slow", times=100, seconds=3)
    log_in = partial(client.post, "/api/v1/auth/wechat")
    codes = [simulator.code() for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda code: log_in(json={"code": code}), codes))
    assert sorted(answer.status_code for answer in answers) == [200] * 2 + [503] * 4
    assert {answer.headers.get("Retry-After") is None for answer in answers if answer.status_code == 503} == {False}
