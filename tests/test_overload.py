"""The door of a worker, with a clock of the test's own."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from io import BytesIO
from typing import Any, cast

import pytest

from overload import (
    BEAT_SECONDS,
    EVERYTHING,
    FEW_A_SECOND,
    FEW_IN_FLIGHT,
    HOLD_SECONDS,
    KNOWN_SESSIONS,
    TARGET_SECONDS,
    Door,
)
from tests.harness import counted, wait_until

LIMIT = 200


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


@pytest.fixture
def door() -> Iterator[Door]:
    """One with many requests in flight, and many a second."""
    door = Door(LIMIT, Clock())
    door.in_flight = FEW_IN_FLIGHT
    for _ in range(FEW_A_SECOND):
        assert door.refusal(head("GET")) is None
    return door


def head(method: str, token: str = "", *lines: str, path: str = "/api/v1/users/me") -> bytes:
    authorization = [f"Authorization: Bearer {token}"] if token else []
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *authorization, *lines, "", ""]).encode()


def parse(response: bytes) -> tuple[HTTPResponse, dict[str, Any]]:
    class Socket:
        def makefile(self, mode: str) -> BytesIO:
            return BytesIO(response)

    parsed = HTTPResponse(cast(Any, Socket()))
    parsed.begin()
    return parsed, json.loads(parsed.read())


def test_strangers_are_refused_before_users_and_what_users_read_before_what_they_write(door: Door) -> None:
    door.remember("mine", 1)
    requests = {"write": head("POST", "mine"), "read": head("GET", "mine"), "stranger": head("POST", "unknown")}
    served = {}
    for level in (EVERYTHING, 2, 1, 0):
        door.level = level
        served[level] = {name for name, request in requests.items() if door.refusal(request) is None}
    assert served == {EVERYTHING: {"write", "read", "stranger"}, 2: {"write", "read"}, 1: {"write"}, 0: set()}


def test_a_browser_s_cookie_is_a_session_too(door: Door) -> None:
    door.remember("mine", 1)
    door.level = 2
    assert door.refusal(head("GET", "", "Cookie: a=b; __Host-session=mine; c=d")) is None
    assert door.refusal(head("GET", "", "cookie: session=other")) is not None


def test_it_is_the_user_who_counts_not_the_session(door: Door) -> None:
    for user in range(50):
        for session in range(3):
            door.remember(f"{user}-{session}", user)
    door.level = 1.5
    served = {
        user: {door.refusal(head("GET", f"{user}-{session}")) is None for session in range(3)} for user in range(50)
    }
    assert all(len(outcomes) == 1 for outcomes in served.values())
    assert {True} in served.values()
    assert {False} in served.values()


def test_logins_wait_for_their_turn_behind_a_late_worker(door: Door) -> None:
    login = head("POST", path="/api/v1/auth/wechat")
    assert door.refusal(login) is None
    door.beat(2 * TARGET_SECONDS)
    with ThreadPoolExecutor(10) as pool:
        waiting = [pool.submit(door.refusal, login) for _ in range(10)]
        wait_until(lambda: door._logins == 10)
        for late, begun in ((2 * TARGET_SECONDS, 1), (0, 3), (0, 6), (0, 10)):  # more with each beat in time
            door.beat(late)
            wait_until(lambda begun=begun: sum(one.done() for one in waiting) == begun)
        assert {one.result() for one in waiting} == {None}


def test_a_login_that_waits_too_long_is_refused(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("overload.LOGIN_SECONDS", 0.01)
    door.beat(2 * TARGET_SECONDS)
    refusal = door.refusal(head("POST", path="/api/auth/wechat"))
    assert refusal
    assert parse(refusal)[0].status == 503
    assert door._logins == 0


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_probes_and_the_scrape_are_never_refused(door: Door, path: str) -> None:
    door.level, door.in_flight = 0, 10 * LIMIT
    assert door.refusal(head("GET", path=path)) is None
    assert door.refusal(head("GET", path=f"{path}/../api")) is not None


def test_few_requests_a_second_are_never_refused(door: Door) -> None:
    door.level, door.in_flight = 0, 10 * LIMIT
    clock = cast(Clock, door._clock)
    clock.now += 1
    for _ in range(20):
        clock.now += 1 / FEW_A_SECOND
        assert door.refusal(head("GET")) is None
    for _ in range(FEW_A_SECOND):
        last = door.refusal(head("GET"))
    assert last is not None


def test_few_requests_in_flight_are_never_an_overload(door: Door) -> None:
    door.level, door.in_flight = 0, FEW_IN_FLIGHT - 1
    assert door.refusal(head("GET")) is None


def test_the_less_important_leave_room_in_flight_for_the_others(door: Door) -> None:
    door.remember("mine", 1)
    door.in_flight = LIMIT * 2 // 3 + 1
    assert door.refusal(head("GET")) is not None
    assert door.refusal(head("GET", "mine")) is None
    door.in_flight = LIMIT * 5 // 6 + 1
    assert door.refusal(head("GET", "mine")) is not None
    assert door.refusal(head("POST", "mine")) is None
    door.in_flight = LIMIT
    assert door.refusal(head("POST", "mine")) is not None


def test_the_level_goes_down_while_the_worker_is_late_and_up_again_more_slowly(door: Door) -> None:
    clock = cast(Clock, door._clock)
    levels = []
    for _ in range(400):
        clock.now += BEAT_SECONDS
        door.beat(2 * TARGET_SECONDS)
        levels.append(door.level)
    assert door.level == 0
    for boundary in (2.0, 1.0):  # what was begun may end before the next class is refused
        assert levels.count(boundary) * BEAT_SECONDS > 0.9 * HOLD_SECONDS
    door.beat(TARGET_SECONDS / 2)
    once = door.level
    assert once > 0
    clock.now += 2 * HOLD_SECONDS
    door.beat(2 * TARGET_SECONDS)
    assert door.level == 0
    for _ in range(2000):
        door.beat(0)
    assert door.level == EVERYTHING


def test_a_late_worker_with_few_requests_is_not_overloaded(door: Door) -> None:
    door.in_flight = FEW_IN_FLIGHT - 1
    for _ in range(100):
        door.beat(2 * TARGET_SECONDS)
    assert door.level == EVERYTHING


def test_a_refusal_is_an_envelope_that_says_when_to_retry_and_leads_to_a_line(
    door: Door, journal: Any, caplog: pytest.LogCaptureFixture
) -> None:
    door.report()
    door.level = 0
    responses = [parse(refusal) for _ in range(60) if (refusal := door.refusal(head("POST")))]
    english = door.refusal(head("GET", "", "Accept-Language: en-US,en;q=0.9"))
    assert english
    assert parse(english)[0].headers["Connection"] == "keep-alive"
    assert parse(english)[1]["message"] == "Too many requests at the moment: retry later"
    assert len(responses) == 60
    response, body = responses[0]
    assert response.status == 503
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Connection"] == "close"  # a body may follow
    assert body == {"code": 503, "message": "服务繁忙，请稍后再试", "data": None}
    waits = {int(parsed.headers["Retry-After"]) for parsed, _ in responses}
    assert waits <= set(range(1, 6))
    assert len(waits) > 2  # clients do not come back together
    door.report()
    (record,) = [record for record in caplog.records if record.name == "overload"]
    assert vars(record)["traceId"] == response.headers["X-Trace-Id"]
    assert vars(record)["reason"].startswith("61 refused;")
    door.report()
    assert len([record for record in caplog.records if record.name == "overload"]) == 1


def test_refusals_are_counted_by_what_was_too_much(door: Door) -> None:
    before = {reason: counted("http_requests_shed_total", reason=reason) for reason in ("queue", "in_flight")}
    door.level = 0
    door.refusal(head("GET"))
    door.level, door.in_flight = EVERYTHING, LIMIT
    door.refusal(head("GET"))
    for reason, count in before.items():
        assert counted("http_requests_shed_total", reason=reason) == count + 1


def test_no_token_is_kept_and_not_too_many_users(door: Door) -> None:
    for number in range(KNOWN_SESSIONS + 2):
        door.remember(f"token-{number}", number)
    assert len(door._users) <= KNOWN_SESSIONS
    assert "token-1" not in repr(vars(door))


def test_a_served_request_makes_its_session_known(client: Any, token: str, app: Any) -> None:
    door: Door = app.extensions["door"]
    client.get("/api/v1/users/me", headers={"Authorization": f"Bearer {token}"})
    assert hash(token.encode()) in door._users
    assert door.in_flight == 0


def test_measuring_goes_on_while_the_worker_works(monkeypatch: pytest.MonkeyPatch) -> None:
    late: list[float] = []

    class Stop(Exception): ...

    class Busy(Door):
        def beat(self, seconds: float) -> None:
            late.append(seconds)
            if len(late) == 3:
                raise Stop

    def work(seconds: float) -> None:
        """Instead of sleeping, use the CPU for longer than that."""
        began = times()
        while times() - began < seconds + 0.03:
            pass

    times: Callable[[], float] = time.monotonic
    monkeypatch.setattr("overload.time.sleep", work)
    with pytest.raises(Stop):
        Busy(LIMIT).watch()
    assert min(late) > TARGET_SECONDS
