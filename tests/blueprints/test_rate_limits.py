"""Who may call how often, and what the responses say of it."""

import re
from collections.abc import Callable

import pytest
from flask import Flask
from redis import Redis
from werkzeug.test import TestResponse

from tests.blueprints.callers import API, Caller, code_of, operations
from tests.blueprints.test_api import each_operation
from tests.blueprints.test_web_login import AUTHORIZE, CALLBACK, Browser
from tests.harness import APP_ID, METRICS_TOKEN, Simulator, bearer, counted, round_trips

LOGIN, ME = f"{API}/auth/wechat", f"{API}/users/me"
MakeApp = Callable[..., Flask]


def send_code(app: Flask, code: str, address: str = "198.51.100.4", **headers: str) -> TestResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    client = app.test_client(use_cookies=False)
    return client.post(LOGIN, json={"code": code}, headers=named, environ_overrides={"REMOTE_ADDR": address})


def refused(answer: TestResponse, limit: str, policy: str) -> bool:
    """Whether a response is a complete 429 of this limit."""
    if answer.status_code != 429:
        return False
    assert answer.get_json() == {"code": 429, "message": "请求过于频繁，请稍后再试", "data": None}
    assert answer.headers["RateLimit-Policy"] == f'"{limit}";{policy}'
    wait = answer.headers["Retry-After"]
    assert answer.headers["RateLimit"] == f'"{limit}";r=0;t={wait}'
    assert int(wait) > 0
    return True


def test_a_session_may_make_so_many_requests_and_others_too(make_app: MakeApp, simulator: Simulator) -> None:
    app = make_app(SESSION_RATE="3/day")
    alice, bob = Caller(app, simulator), Caller(app, simulator)
    before = counted("http_requests_rate_limited_total", limit="session")
    for left, path in ((2, "/users/me"), (1, "/orders"), (0, "/orders/999")):
        answer = alice.get(path)
        assert answer.status_code in (200, 404)
        assert answer.headers["RateLimit-Policy"] == '"session";q=3;w=86400'
        assert re.fullmatch(rf'"session";r={left};t=\d+', answer.headers["RateLimit"])
    assert refused(alice.get("/users/me"), "session", "q=3;w=86400")
    assert refused(alice.post("/orders", {}), "session", "q=3;w=86400")
    english = alice.get("/users/me", Accept_Language="en").get_json()
    assert english["message"] == "Too many requests: retry later"
    assert counted("http_requests_rate_limited_total", limit="session") == before + 3
    assert bob.get("/users/me").status_code == 200
    alice.log_in()  # as another session
    assert alice.get("/users/me").status_code == 200


def test_every_route_of_a_session_counts_and_what_is_public_does_not(make_app: MakeApp, simulator: Simulator) -> None:
    app = make_app(SESSION_RATE="1/day", LOGIN_RATE="1000/day")
    alice = Caller(app, simulator)
    assert alice.get("/users/me").status_code == 200
    ours = {"GET", "POST", "PUT", "DELETE"}
    public = (
        "/livez",
        "/readyz",
        "/version",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/api/auth/wechat",
        f"{API}/wechat",
    )
    for method, path in sorted(operations(app)):
        answer = alice.client.open(re.sub(r"{\w+}", "1", path), method=method, json={}, headers=alice.headers)
        is_login = path.startswith(LOGIN) and (method, path) not in (("GET", LOGIN), ("HEAD", LOGIN))
        assert (answer.status_code == 429) == (not path.startswith(public) and not is_login), (method, path)
        assert answer.status_code != 429 or method not in ours or refused(answer, "session", "q=1;w=86400")
    for path in ("/livez", "/readyz", "/version", "/docs", "/openapi.json", "/nowhere"):
        answers = [app.test_client().get(path, headers=alice.headers) for _ in range(5)]
        assert {answer.status_code for answer in answers} <= {200, 404}
        assert not [answer for answer in answers if "RateLimit" in answer.headers]
    assert app.test_client().get("/metrics", headers=bearer(METRICS_TOKEN)).status_code == 200


def test_a_stranger_uses_up_nothing_of_a_user(make_app: MakeApp, simulator: Simulator) -> None:
    app = make_app(SESSION_RATE="2/day")
    alice = Caller(app, simulator)
    for wrong in ("unknown", alice.headers["Authorization"].split()[1][:-1], ""):
        for _ in range(5):
            answer = app.test_client().get(ME, headers=bearer(wrong))
            assert answer.status_code == 401
            assert "RateLimit" not in answer.headers
    assert [alice.get("/users/me").status_code for _ in range(3)] == [200, 200, 429]


def test_users_of_cloud_run_have_a_limit_each(make_app: MakeApp) -> None:
    client = make_app(SESSION_RATE="2/day", TRUST_WXCLOUD_HEADERS="true").test_client()
    for openid in ("o-alice", "o-bob"):
        headers = {"X-WX-OPENID": openid, "X-WX-APPID": APP_ID}
        assert [client.get(ME, headers=headers).status_code for _ in range(3)] == [200, 200, 429]


def test_logins_are_counted_by_address_before_the_body_is_read(make_app: MakeApp, simulator: Simulator) -> None:
    app = make_app(LOGIN_RATE="3/day")
    before = counted("http_requests_rate_limited_total", limit="address")
    first = send_code(app, simulator.code())
    assert first.status_code == 200
    assert re.fullmatch(r'"address";r=2;t=\d+', first.headers["RateLimit"])
    assert send_code(app, "").status_code == 400
    malformed = app.test_client().post(LOGIN, data=b"{", environ_overrides={"REMOTE_ADDR": "198.51.100.4"})
    assert malformed.status_code == 400
    assert refused(send_code(app, simulator.code()), "address", "q=3;w=86400")
    alias = app.test_client().post("/api/auth/wechat", environ_overrides={"REMOTE_ADDR": "198.51.100.4"})
    assert refused(alias, "address", "q=3;w=86400")
    assert counted("http_requests_rate_limited_total", limit="address") == before + 2
    assert send_code(app, simulator.code(), X_Forwarded_For="203.0.113.9").status_code == 429
    assert send_code(app, simulator.code(), "198.51.100.5").status_code == 200


@pytest.mark.parametrize(
    ("address", "same", "other"),
    [
        ("198.51.100.4", "::ffff:198.51.100.4", "198.51.100.5"),
        ("2001:db8:1:2::3", "2001:db8:1:2:ffff::", "2001:db8:1:3::3"),
    ],
)
def test_an_address_of_ipv6_is_its_network(
    make_app: MakeApp, simulator: Simulator, address: str, same: str, other: str
) -> None:
    app = make_app(LOGIN_RATE="1/day")
    assert [send_code(app, "", each).status_code for each in (address, same, other)] == [400, 429, 400]


def test_behind_a_proxy_clients_are_told_apart(make_app: MakeApp) -> None:
    app = make_app(LOGIN_RATE="1/day", TRUSTED_PROXIES="10.0.0.0/8")
    for forwarded, status in {
        "198.51.100.4": 400,
        "198.51.100.5": 400,
        "1.1.1.1, 198.51.100.5": 429,
        "10.1.1.1, 198.51.100.4": 429,
    }.items():
        assert send_code(app, "", "10.0.0.1", X_Forwarded_For=forwarded).status_code == status, forwarded


def test_the_limit_of_the_app_counts_what_wechat_is_asked(make_app: MakeApp, simulator: Simulator) -> None:
    app = make_app(APP_LOGIN_RATE="3/day", LOGIN_RATE="100/day")
    code = simulator.code()
    for _ in range(3):
        assert send_code(app, code).status_code == 200  # the first response again
        assert send_code(app, "").status_code == 400
    assert code_of(send_code(app, "unknown")) == (400, 460)
    third = send_code(app, simulator.code())
    assert third.status_code == 200
    assert third.headers["RateLimit"].startswith('"address";r=92;')  # and nothing about others
    calls = len(simulator.calls())
    before = counted("http_requests_rate_limited_total", limit="app")
    for address in ("198.51.100.4", "198.51.100.5"):
        assert refused(send_code(app, simulator.code(), address), "app", "q=3;w=86400")
    assert counted("http_requests_rate_limited_total", limit="app") == before + 2
    assert len(simulator.calls()) == calls


def test_logins_on_the_web_count_too(make_app: MakeApp, simulator: Simulator) -> None:
    app = make_app(APP_LOGIN_RATE="1/day")
    assert Browser(app, simulator).log_in().status_code == 302
    page = Browser(app, simulator).log_in()
    assert (page.status_code, page.content_type) == (429, "text/html; charset=utf-8")
    assert "请求过于频繁，请稍后再试" in page.text
    assert page.headers["RateLimit-Policy"] == '"app";q=1;w=86400'
    app = make_app(LOGIN_RATE="2/day")
    client = app.test_client()
    assert [client.get(path).status_code for path in (AUTHORIZE, CALLBACK, AUTHORIZE)] == [302, 400, 429]


def test_a_limit_that_is_off_shows_in_no_header(make_app: MakeApp, simulator: Simulator, redis: Redis) -> None:
    alice = Caller(make_app(), simulator)
    assert [answer.status_code for answer in (alice.get("/users/me") for _ in range(50))] == [200] * 50
    assert "RateLimit" not in alice.get("/users/me").headers
    assert not redis.keys("rate:*")


def test_a_limit_costs_a_read_no_round_trip(make_app: MakeApp, simulator: Simulator) -> None:
    trips = []
    for rate in ("off", "1000/day"):
        app = make_app(SESSION_RATE=rate)
        alice = Caller(app, simulator)
        with round_trips(app.extensions["redis"]) as count:
            assert [alice.get("/users/me").status_code for _ in range(10)] == [200] * 10
            trips.append(count())
    assert trips[0] == trips[1] > 0


def test_429_is_documented_where_a_limit_applies(app: Flask) -> None:
    for path, _, operation in each_operation(app.test_client().get("/openapi.json").get_json()):
        limited = {"bearer": []} in operation["security"] or path.startswith(LOGIN)
        assert ("429" in operation["responses"]) == limited, path
        if limited:
            headers = operation["responses"]["429"]["headers"]
            assert set(headers) == {"RateLimit", "RateLimit-Policy", "Retry-After", "X-Trace-Id"}
