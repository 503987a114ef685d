"""Routes that an operator switches off: 503 for everybody, on every instance, until they are switched on again."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import Result
from flask import Flask
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import event
from werkzeug.test import TestResponse

from blueprints import switches
from dev.redis_server import RedisServer
from tests.blueprints.callers import API, ORDER, Caller, code_of, each_operation, log_in, operations
from tests.harness import METRICS_TOKEN, PUSH_TOKEN, Simulator, bearer, counted, round_trips
from wechat.crypto import push_signature

OFF = {"code": 503, "message": "该功能暂时关闭，请稍后再试", "data": None}
OFF_IN_ENGLISH = OFF | {"message": "This function is switched off for now: retry later"}
CREATE_ORDER = "POST /api/v1/orders"


@pytest.fixture(autouse=True)
def _no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of these tests look when they are told to; tests/test_switches.py has real ones."""
    monkeypatch.setattr(switches, "WAIT_SECONDS", 0)


@pytest.fixture
def apps(make_app: Callable[..., Flask], redis: Redis) -> Iterator[list[Flask]]:
    """Two instances."""
    apps = [make_app(), make_app()]
    yield apps
    redis.flushall()
    look(*apps)  # which sets the metrics back


def flask(app: Flask, *words: str, **environ: str) -> Result:
    return app.test_cli_runner().invoke(args=["switch", *words], env={"SUDO_USER": "", "USER": "alice", **environ})


def switch(apps: list[Flask], *words: str) -> None:
    outcome = flask(apps[0], *words)
    assert outcome.exit_code == 0, outcome.output
    look(*apps)


def look(*apps: Flask) -> None:
    """Do what each worker does once a second."""
    for app in apps:
        app.extensions["switches"].read()


def is_off(answer: TestResponse) -> bool:
    return (answer.status_code, answer.get_json(silent=True)) == (503, OFF)


def test_a_route_that_is_off_is_503_for_everybody_on_every_instance(apps: list[Flask], simulator: Simulator) -> None:
    alice, admin = Caller(apps[0], simulator), Caller(apps[0], simulator, role="admin")
    switch(apps, "off", CREATE_ORDER, "--reason", "wrong prices")
    for app in apps:
        client = app.test_client(use_cookies=False)
        for headers in ({}, bearer("of-nobody"), alice.headers, admin.headers):
            answer = client.post(f"{API}/orders", json=ORDER, headers=headers)
            assert is_off(answer), answer.text
            assert answer.content_type == "application/json"
            assert 1 <= int(answer.headers["Retry-After"]) <= 5
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Trace-Id"])
        english = client.post(f"{API}/orders", headers={"Accept-Language": "en"})
        assert english.get_json() == OFF_IN_ENGLISH
        assert client.get(f"{API}/orders", headers=alice.headers).status_code == 200
        assert client.options(f"{API}/orders").status_code == 204
    switch(apps, "on", CREATE_ORDER)
    for app in apps:
        client = app.test_client(use_cookies=False)
        assert client.post(f"{API}/orders", json=ORDER, headers=alice.headers).status_code == 201


def test_it_is_decided_before_everything_else(make_app: Callable[..., Flask], simulator: Simulator) -> None:
    app = make_app(SESSION_RATE="3/hour")
    alice = Caller(app, simulator)
    switch([app], "off", CREATE_ORDER)
    statements: list[str] = []
    event.listen(app.extensions["database"], "before_cursor_execute", lambda *args: statements.append(args[2]))
    with round_trips(app.extensions["redis"]) as count:
        for body in ("{", "{}", "[" * 100_000):
            answer = alice.client.post(f"{API}/orders", data=body, headers={**alice.headers, "Idempotency-Key": "é"})
            assert is_off(answer), answer.text
        assert is_off(alice.post("/orders", ORDER, Content_Type="text/plain"))
    assert (count(), statements) == (0, [])
    switch([app], "on", CREATE_ORDER)
    assert [alice.post("/orders", ORDER).status_code for _ in range(3)] == [201] * 3  # nothing was counted


def test_no_request_costs_a_round_trip_more(apps: list[Flask], simulator: Simulator) -> None:
    alice = Caller(apps[0], simulator)

    def costs() -> list[int]:
        counts = []
        for path in ("/users/me", "/orders"):
            with round_trips(apps[0].extensions["redis"]) as count:
                assert alice.get(path).status_code == 200
            counts.append(count())
        return counts

    before = costs()
    assert before == [1, 1]  # the session
    switch(apps, "off", CREATE_ORDER)
    assert costs() == before


def test_every_route_of_the_api_can_be_switched_off_and_documents_it(apps: list[Flask], simulator: Simulator) -> None:
    app, alice = apps[0], Caller(apps[0], simulator)
    document = app.test_client().get("/openapi.json").get_json()
    documented = {
        f"{method.upper()} {path}": operation["responses"]
        for path, method, operation in each_operation(document)
        if path.startswith("/api/")
    }
    # The login without a version is not documented.
    assert app.extensions["switches"].routes.keys() == documented.keys() | {"POST /api/auth/wechat"}
    assert [name for name, responses in documented.items() if "503" not in responses] == []
    switch(apps, "off", "* *")
    there = [(method, path) for method, path in operations(app) if path.startswith("/api/")]
    assert len(there) > len(documented)  # with HEAD
    for method, path in there:
        sent = re.sub(r"{\w+}", "1", path.replace("{user_id}", "me"))
        answer = app.test_client().open(sent, method=method, headers=alice.headers)
        assert (answer.status_code, answer.headers["Retry-After"] in "12345") == (503, True), (method, path)
        if method != "HEAD" and not path.endswith(("/authorize", "/callback")):
            assert answer.get_json() == OFF, (method, path)
    for path in ("/livez", "/readyz", "/version", "/metrics", "/openapi.json"):
        assert app.test_client().get(path, headers=bearer(METRICS_TOKEN)).status_code == 200, path


def test_a_page_of_the_web_login_says_it_to_people(apps: list[Flask]) -> None:
    switch(apps, "off", "GET /api/v1/auth/wechat/authorize")
    answer = apps[1].test_client().get(f"{API}/auth/wechat/authorize")
    assert (answer.status_code, answer.mimetype) == (503, "text/html")
    assert OFF["message"] in answer.text
    assert answer.headers["Retry-After"]


def test_both_addresses_of_the_login_are_off(apps: list[Flask], simulator: Simulator) -> None:
    switch(apps, "off", "POST /api/v1/auth/wechat")
    assert is_off(log_in(apps[0], simulator, "o-new"))
    old = apps[0].test_client().post("/api/auth/wechat", json={"code": simulator.code()})
    assert is_off(old)
    for route in ("/api/v1/auth/wechat", "/api/auth/wechat"):  # so that neither counts for the objectives
        assert counted("switched_off", method="POST", route=route) == 1
    assert simulator.calls() == []
    switch(apps, "on", "POST /api/v1/auth/wechat")
    assert log_in(apps[0], simulator, "o-new").status_code == 200


def test_the_login_is_on_again_among_all_that_is_off(apps: list[Flask], simulator: Simulator) -> None:
    switch(apps, "off", "* /api/*")
    switch(apps, "on", "POST /api/v1/auth/wechat")
    old = apps[0].test_client().post("/api/auth/wechat", json={"code": simulator.code()})
    assert (log_in(apps[0], simulator, "o-new").status_code, old.status_code) == (200, 200)
    assert is_off(apps[0].test_client().get("/api/v1/users/me"))


def test_a_pushed_message_can_be_refused(apps: list[Flask]) -> None:
    query = {"timestamp": "1", "nonce": "2", "signature": push_signature(PUSH_TOKEN, "1", "2")}
    switch(apps, "off", "POST /api/v1/wechat/messages")
    assert is_off(apps[0].test_client().post(f"{API}/wechat/messages", query_string=query, data="{}"))


def test_a_star_switches_several_at_once(apps: list[Flask], simulator: Simulator) -> None:
    alice = Caller(apps[0], simulator)
    order = alice.order()["id"]
    switch(apps, "off", "* /api/v1/orders*")
    for method, path in (("GET", "/orders"), ("POST", "/orders"), ("GET", f"/orders/{order}/items")):
        assert is_off(alice.call(method, path)), (method, path)
    assert alice.get("/users/me").status_code == 200
    switch(apps, "on", "GET *")
    assert alice.get(f"/orders/{order}/items").status_code == 200
    assert is_off(alice.delete(f"/orders/{order}"))


def test_the_list_says_since_when_by_whom_and_why(apps: list[Flask]) -> None:
    assert flask(apps[0], "list").output == "Nothing is switched off.\n"
    switch(apps, "off", "PUT /api/v1/orders/{order_id}")
    outcome = flask(apps[0], "off", CREATE_ORDER, "--reason", "价格有误", SUDO_USER="bob")
    assert (outcome.exit_code, outcome.output) == (0, "")
    moment = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    first, second = flask(apps[1], "list").output.splitlines()
    assert re.fullmatch(rf"POST /api/v1/orders: off since {moment} by bob: 价格有误", first)
    expected = rf"PUT /api/v1/orders/\{{order_id\}}: off since {moment} by alice: no reason given"
    assert re.fullmatch(expected, second)
    switch(apps, "on", CREATE_ORDER)
    assert flask(apps[1], "list").output.splitlines() == [second]


def audits(lines: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    assert [line for line in lines if "undeclared" in line] == []
    names = ("event", "route", "by", "reason")
    return [tuple(line.get(name, "") for name in names) for line in lines if line["message"] == "audit"]


def test_each_change_is_an_audit_line_of_each_worker_that_notices_it(
    make_app: Callable[..., Flask], apps: list[Flask], log_lines: Any
) -> None:
    route = "/api/v1/users/{user_id}"
    assert flask(apps[0], "off", f"* {route}", "--reason", "wrong prices", "--by", "carol").exit_code == 0
    expected = [("route off", f"{method} {route}", "carol", "wrong prices") for method in ("DELETE", "GET", "PUT")]
    assert audits(log_lines()) == expected  # of the process of the command
    since = {line["since"] for line in log_lines()}
    look(apps[1])
    look(apps[1])
    assert audits(log_lines())[3:] == expected
    flask(apps[0], "off", f"PUT {route}", "--reason", "no stock", "--by", "carol")
    look(apps[1])
    flask(apps[0], "on", f"PUT {route}")
    look(apps[1])
    flask(make_app(), "list")  # changes nothing
    again, lifted = (
        ("route off", expected[2][1], "carol", "no stock"),
        ("route on", expected[2][1], "alice", "no reason given"),
    )
    assert audits(log_lines())[6:] == [again, again, lifted, lifted]
    look(make_app())  # a worker that begins: it may not have run at the change
    assert audits(log_lines())[10:] == expected[:2]
    assert {line["since"] for line in log_lines()[10:]} == since


def test_a_change_is_noticed_also_if_redis_loses_its_data(apps: list[Flask], redis: Redis, log_lines: Any) -> None:
    switch(apps, "off", CREATE_ORDER)
    redis.flushall()
    look(apps[0])
    assert audits(log_lines())[-1] == ("route on", CREATE_ORDER, "", "")


@pytest.mark.parametrize(
    "unknown",
    [
        "POST /api/v1/order",
        "post /api/v1/orders",
        "POST /api/v1/orders/",
        "HEAD /api/v1/orders",
        "/api/v1/orders/{order_id}",
        "PUT /api/v1/orders/{id}",
        "PUT /api/v1/orders/<id:order_id>",
        "GET /livez",
        "GET /metrics",
        "* /readyz",
        "",
    ],
)
@pytest.mark.parametrize("action", ["off", "on"])
def test_an_unknown_route_is_an_error_that_names_the_known_ones(
    apps: list[Flask], redis: Redis, action: str, unknown: str
) -> None:
    outcome = flask(apps[0], action, unknown)
    first, *names = outcome.output.splitlines()
    assert (outcome.exit_code, first) == (1, "Error: No such route. Known routes:")
    assert names == [f"  {name}" for name in sorted(apps[0].extensions["switches"].routes)]
    assert redis.hgetall(switches.KEY) == {}


def test_without_redis_nothing_changes_and_a_restart_keeps_what_is_off(
    make_app: Callable[..., Flask], own_redis: RedisServer
) -> None:
    app = make_app(REDIS_URL=own_redis.url)
    switch([app], "off", CREATE_ORDER)
    own_redis.stop()
    with pytest.raises(RedisError):
        look(app)
    client = app.test_client()
    assert is_off(client.post(f"{API}/orders"))
    assert code_of(client.get(f"{API}/orders")) == (401, 401)
    for words in (("list",), ("on", CREATE_ORDER), ("off", "GET /api/v1/orders")):
        outcome = flask(app, *words)
        assert (outcome.exit_code, outcome.output) == (1, "Error: Redis is unavailable: Refuses connections.\n"), words
    own_redis.start()
    later = make_app(REDIS_URL=own_redis.url)
    assert not is_off(later.test_client().post(f"{API}/orders"))
    look(app, later)
    assert is_off(later.test_client().post(f"{API}/orders"))
    assert is_off(client.post(f"{API}/orders"))
    switch([app, later], "on", CREATE_ORDER)
    assert code_of(later.test_client().post(f"{API}/orders")) == (401, 401)


def test_the_gauge_is_labelled_as_the_requests_are(apps: list[Flask]) -> None:
    labels = {"method": "PUT", "route": "/api/v1/orders/<id:order_id>"}
    assert counted("switched_off", **labels) == 0
    switch(apps, "off", "PUT /api/v1/orders/{order_id}")
    assert counted("switched_off", **labels) == 1
    assert counted("switched_off", **{**labels, "method": "GET"}) == 0
    before = counted("http_requests_total", **labels, status="503", code="503")
    assert is_off(apps[0].test_client().put(f"{API}/orders/7"))
    assert counted("http_requests_total", **labels, status="503", code="503") == before + 1
    switch(apps, "on", "PUT /api/v1/orders/{order_id}")
    assert counted("switched_off", **labels) == 0


def test_what_another_version_had_switched_off_can_be_switched_on(apps: list[Flask], redis: Redis) -> None:
    change = {"event": "route off", "since": "2026-11-27T03:00:00Z", "by": "alice", "reason": "no reason given"}
    redis.hset(switches.KEY, "GET /api/v1/gone", json.dumps(change))
    look(*apps)
    assert flask(apps[0], "list").output.startswith("GET /api/v1/gone: off since 2026-11-27T03:00:00Z")
    switch(apps, "on", "GET /api/v1/gone")
    assert flask(apps[0], "list").output == "Nothing is switched off.\n"
