"""A browser sends its cookie whichever page asks: a write by cookie counts only if a page of ours makes it."""

from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from blueprints.policies import NOT_OUR_ORIGIN
from blueprints.web_login import ATTEMPTS_AT_ONCE
from tests.blueprints.callers import API, Caller, bodies, code_of, data_of, ids_of, operations
from tests.harness import Simulator

LOGIN, LOGOUT, ME, ORDERS = (API + path for path in ("/auth/wechat", "/auth/session", "/users/me", "/orders"))
HTTPS, HTTP = "https://localhost", "http://localhost"
OURS = {"Sec-Fetch-Site": "same-origin"}
ELSEWHERE: list[dict[str, str]] = [
    {"Sec-Fetch-Site": "same-site", "Origin": "https://evil.localhost"},
    {"Sec-Fetch-Site": "cross-site", "Origin": HTTPS},
    {"Sec-Fetch-Site": "none"},
    {"Sec-Fetch-Site": ""},
    {"Origin": "https://evil.localhost"},
    {"Origin": "https://localhost.evil.example.com"},
    {"Origin": "https://localhost:8443"},
    {"Origin": HTTP},
    {"Origin": "null"},
    {"Origin": ""},
    {"Referer": f"{HTTPS}/page"},
    {},
]


def signed_in_browser(user: Caller) -> FlaskClient:
    client = user.app.test_client()
    client.set_cookie("__Host-session", user.headers["Authorization"].split()[1])
    return client


def write(client: FlaskClient, headers: dict[str, str], site: str = HTTPS) -> TestResponse:
    return client.put(f"{ME}/profile", json={"nickname": "小明"}, headers=headers, base_url=site)


def test_every_write_by_cookie_from_another_origin_is_403(app: Flask, simulator: Simulator, admin: Caller) -> None:
    browser = signed_in_browser(admin)
    examples = bodies(simulator, admin.openid)
    public = {"POST /api/auth/wechat", "POST /api/v1/auth/wechat", "POST /api/v1/wechat/messages"}
    writes = {f"{method} {path}" for method, path in operations(app) if method not in ("GET", "HEAD")} - public
    assert len(writes) > 12
    for route in writes:
        method, path = route.format(**ids_of(admin)).split()
        for headers in ELSEWHERE:
            answer = browser.open(path, method=method, json=examples.get(route), headers=headers, base_url=HTTPS)
            assert answer.get_json() == {"code": 403, "message": NOT_OUR_ORIGIN.chinese, "data": None}, (route, headers)
    assert admin.get("/users/me").status_code == 200


def test_an_administrator_on_a_same_site_page_creates_nobody(admin: Caller) -> None:
    browser = signed_in_browser(admin)
    body = b'{"openid": "o-attacker", "role": "admin"}'
    headers = {"Sec-Fetch-Site": "same-site", "Origin": "https://evil.localhost"}
    assert browser.post(f"{API}/users", data=body, headers=headers, base_url=HTTPS).status_code == 403
    assert admin.post("/users", {"openid": "o-attacker"}).status_code == 201


@pytest.mark.parametrize(
    ("public_url", "site", "headers"),
    [
        ("", HTTPS, OURS),
        ("", HTTPS, {"Origin": HTTPS}),
        ("", "https://localhost:8443", {"Origin": "https://localhost:8443"}),
        ("https://Shop.example.com:443/shop/", HTTP, {"Origin": "https://shop.example.com"}),
        ("https://shop.example.com:8443", HTTP, {"Origin": "https://shop.example.com:8443"}),
        ("https://shop.example.com", HTTP, OURS),  # a browser knows best
    ],
)
def test_a_write_by_cookie_from_our_origin_is_done(
    make_app: Callable[..., Flask], simulator: Simulator, public_url: str, site: str, headers: dict[str, str]
) -> None:
    browser = signed_in_browser(Caller(make_app(PUBLIC_URL=public_url), simulator))
    assert data_of(write(browser, headers, site))["nickname"] == "小明"


def test_with_public_url_the_host_of_the_request_is_not_our_origin(
    make_app: Callable[..., Flask], simulator: Simulator
) -> None:
    browser = signed_in_browser(Caller(make_app(PUBLIC_URL="https://shop.example.com"), simulator))
    for origin in (HTTPS, "https://shop.example.com.evil.example.com", "http://shop.example.com"):
        assert write(browser, {"Origin": origin}).status_code == 403, origin


@pytest.mark.parametrize("host", ["[", "a b", "", "[::1", "é"])
def test_a_malformed_host_is_not_our_origin(alice: Caller, host: str) -> None:
    browser = signed_in_browser(alice)
    answer = browser.delete(LOGOUT, base_url=HTTPS, headers={"Host": host, "Origin": "https://"})
    assert answer.status_code in (400, 401, 403), answer.text
    assert alice.get("/users/me").status_code == 200


def test_a_read_by_cookie_and_a_write_by_token_may_come_from_anywhere(alice: Caller) -> None:
    browser = signed_in_browser(alice)
    for headers in ELSEWHERE:
        assert browser.get(ME, headers=headers, base_url=HTTPS).status_code == 200
        assert browser.open(ME, method="HEAD", headers=headers, base_url=HTTPS).status_code == 200
        assert write(browser, {**headers, **alice.headers}).status_code == 200


def test_a_write_without_a_session_from_elsewhere_is_401(client: FlaskClient) -> None:
    for headers in ELSEWHERE:
        assert code_of(write(client, headers)) == (401, 401)


@pytest.mark.parametrize("content_type", [None, "", "text/plain;charset=UTF-8", "application/x-www-form-urlencoded"])
def test_a_write_by_cookie_with_a_body_is_json(alice: Caller, content_type: str | None) -> None:
    browser = signed_in_browser(alice)
    options: dict[str, Any] = {"headers": OURS, "base_url": HTTPS, "content_type": content_type}
    for method, path in (("PUT", f"{ME}/profile"), ("DELETE", LOGOUT), ("POST", ORDERS)):
        answer = browser.open(path, method=method, data=b'{"nickname": "x"}', **options)
        assert code_of(answer) == (415, 415), (method, path)
        chunked = {"Transfer-Encoding": "chunked", **OURS}
        assert browser.open(path, method=method, **{**options, "headers": chunked}).status_code == 415
    assert browser.delete(LOGOUT, **options).status_code == 200  # without a body


def log_in(client: FlaskClient, simulator: Simulator, headers: dict[str, str], site: str = HTTPS) -> TestResponse:
    return client.post(LOGIN, json={"code": simulator.code(openid="o-attacker")}, headers=headers, base_url=site)


@pytest.mark.parametrize(("site", "name"), [(HTTPS, "__Host-session"), (HTTP, "session")])
def test_a_login_from_our_origin_sets_the_cookie(app: Flask, simulator: Simulator, site: str, name: str) -> None:
    for headers in (OURS, {"Origin": site}):
        browser = app.test_client()
        answer = log_in(browser, simulator, headers, site)
        (cookie,) = answer.headers.getlist("Set-Cookie")
        assert cookie.split(";")[0] == f"{name}={data_of(answer)['token']}"
        assert {"HttpOnly", "Secure", "SameSite=Lax", "Path=/"} <= set(cookie.split("; "))
        assert "Domain" not in cookie


def test_a_login_from_elsewhere_gives_the_token_alone_and_ends_no_session_of_the_browser(
    alice: Caller, simulator: Simulator
) -> None:
    browser = signed_in_browser(alice)
    for headers in ELSEWHERE:
        answer = log_in(browser, simulator, headers)
        assert data_of(answer)["token"]
        assert "Set-Cookie" not in answer.headers, headers
    assert data_of(browser.get(ME, base_url=HTTPS))["id"] == alice.id


def test_over_https_a_cookie_that_a_subdomain_can_set_is_ignored(alice: Caller) -> None:
    browser = alice.app.test_client()
    browser.set_cookie("session", alice.headers["Authorization"].split()[1], domain="localhost")
    assert browser.get(ME, base_url=HTTP).status_code == 200
    assert browser.get(ME, base_url=HTTPS).status_code == 401


def test_the_scheme_of_public_url_decides_the_name_behind_a_proxy(
    make_app: Callable[..., Flask], simulator: Simulator
) -> None:
    app = make_app(PUBLIC_URL="HTTPS://shop.example.com")
    assert log_in(app.test_client(), simulator, OURS, HTTP).headers["Set-Cookie"].startswith("__Host-session=")


def test_a_logout_removes_the_cookie_as_browsers_require(alice: Caller) -> None:
    (cookie,) = signed_in_browser(alice).delete(LOGOUT, headers=OURS, base_url=HTTPS).headers.getlist("Set-Cookie")
    assert cookie.startswith("__Host-session=;")
    assert {"Max-Age=0", "Secure", "Path=/"} <= set(cookie.split("; "))


def test_a_browser_keeps_few_attempts_to_log_in_on_the_web(app: Flask) -> None:
    browser = app.test_client()
    for _ in range(3 * ATTEMPTS_AT_ONCE):
        begun = browser.get(f"{LOGIN}/authorize", base_url=HTTPS)
    assert begun.headers.getlist("Set-Cookie")[-1].startswith("__Host-web_login_")
    assert len(browser._cookies) == ATTEMPTS_AT_ONCE
