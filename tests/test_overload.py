"""The door of a worker, with a clock of the test's own."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from http.client import HTTPResponse
from io import BytesIO
from typing import Any, cast

import gevent
import pytest
from gevent.event import Event

import overload
from overload import (
    AT_ONCE,
    FEW_A_SECOND,
    KNOWN_SESSIONS,
    LITTLE_PATIENCE_SECONDS,
    LOGINS,
    PATIENCE_SECONDS,
    PROBES_A_SECOND,
    READS,
    STRANGERS,
    WRITES,
    Door,
    _repeat,
)
from tests.harness import WAIT_SECONDS, counted

LIMIT = 200
LOGINS_AT_ONCE = 3
REQUEST_SECONDS = 5


class Clock:
    now = 1000.0
    time = staticmethod(time.time)

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(overload, "time", clock)
    return clock


@pytest.fixture
def door(clock: Clock) -> Door:
    """One with many clients, and many requests a second."""
    door = Door(LIMIT, LOGINS_AT_ONCE, LOGINS_AT_ONCE)
    door.remember("mine", 1)
    ask_often(door)
    door.clients = range(LIMIT + 1)
    return door


@pytest.fixture
def opened(door: Door) -> Iterator[Door]:
    """One that begins what waits."""
    greenlet = begin_what_waits(door)
    yield door
    greenlet.kill()


def begin_what_waits(door: Door) -> Any:
    return gevent.spawn(_repeat, door.begin, 0)


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


def ask_often(door: Door) -> None:
    for _ in range(FEW_A_SECOND):
        door.refusal(head("GET", path="/livez"))


STRANGER = head("GET")
READ, WRITE = head("GET", "mine"), head("POST", "mine")
LOGIN = head("POST", path="/api/v1/auth/wechat")
CLASSES = {WRITES: WRITE, READS: READ, STRANGERS: STRANGER, LOGINS: LOGIN}


def ask(door: Door, request: bytes) -> Any:
    """Bring a request to the door, where it waits; returns the greenlet that has the refusal, or None."""
    asked = gevent.spawn(door.refusal, request)
    gevent.sleep(0)
    return asked


def pass_time(seconds: float) -> None:
    cast(Clock, overload.time).now += seconds


def ensure_refused_after(door: Door, asked: Any, seconds: float) -> None:
    """Make sure that a request that waits is refused when so many seconds are over, and not a millisecond before."""
    pass_time(seconds - 0.001)
    door.refuse()
    gevent.sleep(0)
    assert not asked.ready()
    pass_time(0.002)
    door.refuse()
    asked.join(WAIT_SECONDS)
    assert parse(asked.value)[0].status == 503


def test_the_most_important_request_is_begun_first(door: Door) -> None:
    order: list[int] = []
    door.in_flight = AT_ONCE  # one after the other
    waiting = {kind: ask(door, CLASSES[kind]) for kind in (LOGINS, READS, WRITES, STRANGERS)}
    for kind, asked in waiting.items():
        asked.link(lambda asked, kind=kind: order.append(kind))
    assert len(door._waiting) == len(CLASSES)
    begins = begin_what_waits(door)
    gevent.joinall(waiting.values(), WAIT_SECONDS)
    begins.kill()
    assert order == [WRITES, READS, STRANGERS, LOGINS]


def test_of_the_same_place_the_first_comes_first(door: Door) -> None:
    order: list[int] = []
    door.in_flight = AT_ONCE
    waiting = [ask(door, READ) for _ in range(5)]
    for number, asked in enumerate(waiting):
        asked.link(lambda asked, number=number: order.append(number))
    begins = begin_what_waits(door)
    gevent.joinall(waiting, WAIT_SECONDS)
    begins.kill()
    assert order == [0, 1, 2, 3, 4]


def test_what_was_begun_goes_on_before_the_next_begins(opened: Door) -> None:
    order: list[str] = []

    def serve(name: str) -> None:
        assert opened.refusal(READ) is None
        opened.in_flight += 1
        for step in range(3):
            order.append(f"{name} {step}")
            gevent.sleep(0)
        opened.in_flight -= 1

    opened.in_flight = AT_ONCE
    gevent.joinall([gevent.spawn(serve, name) for name in "ab"], WAIT_SECONDS, raise_error=True)
    assert order == ["a 0", "a 1", "a 2", "b 0", "b 1", "b 2"]


def test_a_worker_that_is_never_idle_begins_something_all_the_same(opened: Door) -> None:
    asked = ask(opened, READ)
    ends = time.monotonic() + WAIT_SECONDS
    while not asked.ready() and time.monotonic() < ends:
        gevent.sleep(0)
    assert (asked.ready(), asked.value) == (True, None)


@pytest.mark.parametrize(("kind", "request_"), CLASSES.items())
def test_who_waits_too_long_is_refused(door: Door, kind: int, request_: bytes) -> None:
    door.refuse()
    asked = ask(door, request_)
    missed = counted("http_deadlines_missed_total")
    ensure_refused_after(door, asked, PATIENCE_SECONDS[kind])
    assert not door._waiting
    assert counted("http_deadlines_missed_total") == missed + (
        kind == LOGINS
    )  # they may wait for as long as they may take


@pytest.mark.parametrize(
    ("asked", "seconds"), [("", 1), ("X-Request-Timeout: 0.05", 0.05), ("x-request-timeout: 9", 1)]
)
def test_nobody_waits_longer_than_the_request_may_take(door: Door, asked: str, seconds: float) -> None:
    door._seconds = 1
    missed = counted("http_deadlines_missed_total")
    door.refuse()
    login = ask(door, head("POST", "", *[asked] * bool(asked), path="/api/v1/auth/wechat"))
    ensure_refused_after(door, login, seconds)
    assert counted("http_deadlines_missed_total") == missed + 1


@pytest.mark.parametrize(("kind", "request_"), CLASSES.items())
def test_if_somebody_always_waits_patience_is_less(door: Door, kind: int, request_: bytes) -> None:
    door.refuse()
    always = [ask(door, STRANGER)]
    pass_time(PATIENCE_SECONDS[STRANGERS] + 0.001)
    always.append(ask(door, STRANGER))
    asked = ask(door, request_)
    ensure_refused_after(door, asked, LITTLE_PATIENCE_SECONDS[kind])
    gevent.joinall(always, WAIT_SECONDS)
    assert LITTLE_PATIENCE_SECONDS[WRITES] == PATIENCE_SECONDS[WRITES]
    assert LITTLE_PATIENCE_SECONDS[READS] < PATIENCE_SECONDS[READS]
    while door.level < LOGINS:
        door.refuse()  # nobody waits now
    asked = ask(door, READ)
    pass_time(PATIENCE_SECONDS[READS] - 0.001)
    assert door.refuse() == pytest.approx(PATIENCE_SECONDS[READS] - 0.001)
    gevent.sleep(0)
    assert not asked.ready()


def test_who_would_be_refused_anyway_is_refused_at_once_until_fewer_come(door: Door) -> None:
    asked = ask(door, READ)
    pass_time(PATIENCE_SECONDS[READS] + 0.001)
    door.refuse()
    asked.join(WAIT_SECONDS)
    assert {kind: ask(door, request_).ready() for kind, request_ in CLASSES.items()} == {
        WRITES: False,
        READS: True,
        STRANGERS: True,
        LOGINS: False,
    }
    levels = [door.level]
    while door.level < LOGINS:
        door.refuse()
        levels.append(door.level)
    assert int(levels[0]) == READS
    assert 10 < len(levels) < 30  # not all of them at once
    assert not ask(door, STRANGER).ready()


def test_who_asks_for_little_time_makes_nobody_else_refused(door: Door) -> None:
    hasty = ask(door, head("POST", "mine", "X-Request-Timeout: 0.01"))
    pass_time(0.02)
    door.refuse()
    hasty.join(WAIT_SECONDS)
    assert hasty.value
    assert not ask(door, STRANGER).ready()
    assert door.level == LOGINS


def test_who_has_waited_too_long_is_not_begun(opened: Door) -> None:
    opened.in_flight = AT_ONCE
    asked = ask(opened, READ)
    pass_time(PATIENCE_SECONDS[READS] + 0.001)
    asked.join(WAIT_SECONDS)
    assert parse(asked.value)[0].status == 503


def test_nobody_is_refused_for_a_worker_that_stood_still(door: Door) -> None:
    asked = ask(door, READ)
    pass_time(0.5)
    assert door.refuse(0.49) == pytest.approx(0.01)
    gevent.sleep(0)
    assert not asked.ready()
    door.refuse(0.3)
    asked.join(WAIT_SECONDS)
    assert asked.value


def test_logins_that_wait_are_no_reason_for_less_patience(door: Door) -> None:
    ask(door, LOGIN)
    pass_time(1)
    assert door.refuse() == 0
    asked = ask(door, READ)
    pass_time(PATIENCE_SECONDS[READS] - 0.001)
    door.refuse()
    gevent.sleep(0)
    assert not asked.ready()


def test_an_open_door_lets_in_refuses_and_reports_each_second(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured = counted("http_queue_seconds_count")
    door, spawn, begun = Door(LIMIT, LOGINS_AT_ONCE), gevent.spawn, []
    with monkeypatch.context() as patch:
        patch.setattr(gevent, "spawn", lambda *args: begun.append(spawn(*args)))
        door.start(range(LIMIT + 1))
    ask_often(door)
    assert ask(door, STRANGER).get(timeout=WAIT_SECONDS) is None
    door.in_flight = LIMIT
    with gevent.Timeout(WAIT_SECONDS):
        while not caplog.records:
            if refusal := ask(door, STRANGER).get():
                assert parse(refusal)[0].status == 503
            gevent.sleep(0.05)
    assert counted("http_queue_seconds_count") > measured
    gevent.killall(begun)


def test_the_watch_refuses_a_beat_later(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overload, "time", time)
    watch = gevent.spawn(_repeat, door.watch, 0)
    try:
        assert parse(ask(door, READ).get(timeout=WAIT_SECONDS))[0].status == 503
    finally:
        watch.kill()


def test_the_door_goes_on_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    errors = [MemoryError(), ValueError(), gevent.GreenletExit()]

    def step() -> None:
        raise errors.pop(0)

    with pytest.raises(gevent.GreenletExit):
        _repeat(step, 0)
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 2


def test_what_a_start_begins_goes_on_after_an_error(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def fail_once(name: str) -> None:
        begun.append(name)
        raise ValueError if begun.count(name) == 1 else gevent.GreenletExit

    for name in ("begin", "watch"):
        monkeypatch.setattr(door, name, partial(fail_once, name))
    door.start([])
    with gevent.Timeout(WAIT_SECONDS):
        while len(begun) < 4:
            gevent.sleep(0.01)
    assert sorted(begun) == ["begin", "begin", "watch", "watch"]


def test_a_browser_s_cookie_is_a_session_too(door: Door) -> None:
    assert int(door._place(head("GET", "", "Cookie: a=b; __Host-session=mine; c=d"))) == READS
    assert int(door._place(head("GET", "", "cookie: session=other"))) == STRANGERS


def test_it_is_the_user_who_counts_not_the_session(door: Door) -> None:
    for user in range(50):
        for session in range(3):
            door.remember(f"{user}-{session}", user)
    places = {user: {door._place(head("GET", f"{user}-{session}")) for session in range(3)} for user in range(50)}
    assert all(len(of_user) == 1 for of_user in places.values())
    assert len(set.union(*places.values())) > 25  # not all are struck a little


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_probes_and_the_scrape_never_wait(door: Door, path: str) -> None:
    door.in_flight = 10 * LIMIT
    for method in ("GET", "HEAD", "OPTIONS"):
        assert door.refusal(head(method, path=path)) is None
        assert door.refusal(head(method, path=f"{path}?verbose")) is None
        assert door.refusal(head(method, path=f"{path}/../api")) is not None


def test_probes_beyond_so_many_a_second_wait_behind_users_and_are_not_refused(door: Door) -> None:
    door.in_flight, door.level = LIMIT, WRITES
    for _ in range(PROBES_A_SECOND - FEW_A_SECOND):
        assert door.refusal(head("GET", path="/livez")) is None
    order: list[str] = []
    flood = [ask(door, head("GET", path="/readyz")) for _ in range(3)]
    pass_time(2.5)
    door.refuse()
    door.level, door.in_flight = LOGINS, 0
    asked = [*flood, ask(door, READ)]
    for name, one in zip(("probe", "probe", "probe", "read"), asked, strict=True):
        one.link(lambda one, name=name: order.append(name))
    begins = begin_what_waits(door)
    gevent.joinall(asked, WAIT_SECONDS)
    begins.kill()
    assert [one.value for one in asked] == [None] * 4
    assert order == ["read", "probe", "probe", "probe"]
    door.report()
    with gevent.Timeout(WAIT_SECONDS):
        assert [door.refusal(head("GET", path="/livez")) for _ in range(PROBES_A_SECOND)] == [None] * PROBES_A_SECOND


def test_few_requests_a_second_never_wait(door: Door) -> None:
    door.in_flight = 10 * LIMIT
    door.report()  # which ends a second
    for _ in range(20):
        door.report()
        for _ in range(FEW_A_SECOND):
            assert door.refusal(STRANGER) is None
    assert door.refusal(STRANGER) is not None
    door.report()
    assert door.refusal(STRANGER) is not None  # after a second with many it takes one with few
    door.report()
    assert door.refusal(STRANGER) is None


def test_requests_of_few_clients_never_wait(door: Door) -> None:
    door.clients, door.in_flight = range(LIMIT), 10 * LIMIT
    assert door.refusal(STRANGER) is None


def test_the_less_important_leave_room_in_flight_for_the_others(opened: Door) -> None:
    allowed = {}
    for kind, request_ in CLASSES.items():
        for opened.in_flight in range(LIMIT, 0, -1):
            if ask(opened, request_).get(timeout=WAIT_SECONDS) is None:
                allowed[kind] = opened.in_flight
                break
    assert LIMIT > allowed[WRITES] > allowed[READS] > allowed[STRANGERS] > allowed[LOGINS] > LIMIT / 2


@pytest.mark.parametrize(
    ("request_", "expected"),
    [(LOGIN, ["stranger", "back", "login"]), (WRITE, ["back", "stranger", "login"])],
    ids=["login", "write"],
)
def test_who_waits_for_wechat_is_not_in_flight_and_comes_back_to_its_place(
    door: Door, request_: bytes, expected: list[str]
) -> None:
    order, answered = [], Event()
    door.in_flight = AT_ONCE + 1

    def call() -> None:
        door.refusal(request_)
        with door.elsewhere():
            answered.wait()
        order.append("back")

    begins = begin_what_waits(door)
    calling = gevent.spawn(call)
    with gevent.Timeout(WAIT_SECONDS):
        while door.in_flight > AT_ONCE:
            gevent.sleep(0.01)
    begins.kill()
    others = {"login": ask(door, LOGIN), "stranger": ask(door, STRANGER)}
    for name, asked in others.items():
        asked.link(lambda asked, name=name: order.append(name))
    answered.set()
    gevent.sleep(0)
    begins = begin_what_waits(door)
    gevent.joinall([calling, *others.values()], WAIT_SECONDS)
    begins.kill()
    assert order == expected
    assert door.in_flight == AT_ONCE + 1


def test_a_call_that_fails_or_is_given_up_does_not_wait_for_its_turn(door: Door) -> None:
    door.in_flight = 1
    with pytest.raises(RuntimeError), door.elsewhere():
        raise RuntimeError
    assert (door.in_flight, door._elsewhere, door._waiting) == (1, 0, [])


def test_logins_that_are_too_many_are_refused_before_the_others_begin(door: Door) -> None:
    before = counted("http_requests_shed_total", reason="wechat")
    door.in_flight = AT_ONCE
    waiting = [ask(door, LOGIN) for _ in range(LOGINS_AT_ONCE)]
    late = ask(door, LOGIN)
    late.link(lambda asked: order.append("late"))
    order: list[str] = []
    for asked in waiting:
        asked.link(lambda asked: order.append("login"))
    begins = begin_what_waits(door)
    gevent.joinall([*waiting, late], WAIT_SECONDS)
    begins.kill()
    assert order == ["late", *["login"] * LOGINS_AT_ONCE]
    assert [asked.value for asked in waiting] == [None] * LOGINS_AT_ONCE
    response, body = parse(late.value)
    assert (response.status, body["code"]) == (503, 503)
    assert response.headers["Connection"] == "close"  # it would be idle until then
    assert 1 <= int(response.headers["Retry-After"]) <= 5
    assert counted("http_requests_shed_total", reason="wechat") == before + 1


def test_logins_that_wait_for_wechat_count_too(door: Door) -> None:
    door.clients = ()
    with ExitStack() as calls:
        for _ in range(LOGINS_AT_ONCE):
            assert door.refusal(LOGIN) is None
            calls.enter_context(door.elsewhere())
        refused = door.refusal(LOGIN)
        assert door.refusal(STRANGER) is None
    assert refused
    assert door.refusal(LOGIN) is None
    assert parse(refused)[0].status == 503


def test_a_refusal_is_an_envelope_that_says_when_to_retry_and_leads_to_a_line(
    door: Door, journal: Any, caplog: pytest.LogCaptureFixture
) -> None:
    door.report()
    ask_often(door)
    door.in_flight = LIMIT
    half_a_body = head("POST", "", "Content-Length: 9") + b"{"
    responses = [parse(refusal) for _ in range(60) if (refusal := door.refusal(half_a_body))]
    english = door.refusal(head("GET", "", "Accept-Language: en-US,en;q=0.9"))
    assert english
    assert parse(english)[0].headers["Connection"] == "keep-alive"
    assert parse(english)[1]["message"] == "Too many requests at the moment: retry later"
    assert len(responses) == 60
    response, body = responses[0]
    assert response.status == 503
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Connection"] == "close"  # the rest of the body may follow
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


@pytest.mark.parametrize(
    "request_",
    [
        head("GET")[:-1],
        head("GET") + b"x",
        head("GET").replace(b"1.1", b"1.0"),
        head("GET", "", "Connection: close"),
        head("GET", "", "Content-Length: 5"),
        head("GET", "", "Transfer-Encoding: chunked"),
        head("GET").replace(b"Host: x\r\n", b"Host: x\nContent-Length: 5\r\n"),
        head("POST", "", "Content-Length: 5") + b"four",
        head("POST", "", "Content-Length: 5") + b"longer",
        head("POST", "", "Content-Length: 4", "Content-Length: 5") + b"five!",
        head("POST", "", "Content-Length: 4", "Content-Length: 4") + b"four",
        head("POST", "", "Content-Length : 4") + b"four",
        head("POST", "", "Content-Length: 4, 4") + b"four",
        head("POST", "", "Content-Length: +4") + b"four",
        head("POST", "", "Content-Length: 4", "transfer-encoding: chunked") + b"four",
        head("POST", "", "Content-Length: 4", "Expect: 100-continue") + b"four",
        head("HEAD"),
    ],
)
def test_a_refusal_closes_unless_it_is_certain_where_the_next_request_begins(door: Door, request_: bytes) -> None:
    door.in_flight = LIMIT
    refusal = door.refusal(request_)
    assert refusal
    assert parse(refusal)[0].headers["Connection"] == "close"


@pytest.mark.parametrize(
    "request_",
    [head("GET"), head("DELETE"), head("POST", "", "content-length: 4") + b"four"],
    ids=["GET", "DELETE", "POST"],
)
def test_a_refusal_of_a_whole_request_keeps_the_connection(door: Door, request_: bytes) -> None:
    door.in_flight = LIMIT
    refusal = door.refusal(request_)
    assert refusal
    assert parse(refusal)[0].headers["Connection"] == "keep-alive"


def test_refusals_are_counted_by_what_was_too_much(door: Door) -> None:
    before = {reason: counted("http_requests_shed_total", reason=reason) for reason in ("queue", "in_flight")}
    asked = ask(door, STRANGER)
    pass_time(1)
    door.refuse()
    asked.join(WAIT_SECONDS)
    door.level, door.in_flight = LOGINS, LIMIT
    door.refusal(STRANGER)
    for reason, count in before.items():
        assert counted("http_requests_shed_total", reason=reason) == count + 1


def test_no_token_is_kept_and_whom_it_has_not_seen_for_longest_it_forgets(door: Door) -> None:
    for number in range(KNOWN_SESSIONS):
        door.remember(f"token-{number}", number)
    door.remember("token-0", 0)
    door.remember("another", 7)
    door.remember("another", 7)
    assert len(door._users) == KNOWN_SESSIONS
    assert [door._users.get(hash(f"token-{number}".encode())) for number in range(3)] == [0, None, 2]
    assert "token-1" not in repr(vars(door))


def test_a_served_request_makes_its_session_known(client: Any, token: str, app: Any) -> None:
    door: Door = app.extensions["door"]
    client.get("/api/v1/users/me", headers={"Authorization": f"Bearer {token}"})
    assert hash(token.encode()) in door._users
    assert door.in_flight == 0
