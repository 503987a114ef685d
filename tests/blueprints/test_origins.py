"""OPTIONS on every route, and what pages of other origins may do."""

import re
from collections.abc import Callable

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from tests.blueprints.callers import Caller, operations
from tests.harness import Simulator, bearer

ORIGIN = "https://h5.example.com"
OTHER = "http://localhost:5173"


def test_options_is_204_with_allow_on_every_route_without_a_session(app: Flask, client: FlaskClient) -> None:
    methods: dict[str, set[str]] = {}
    for method, path in operations(app):
        methods.setdefault(re.sub(r"{\w+}", "1", path), set()).add(method)
    assert "/api/v1/orders" in methods
    for path, served in methods.items():
        answer = client.options(path)
        assert (answer.status_code, answer.data) == (204, b""), path
        assert served | {"OPTIONS"} <= set(answer.headers["Allow"].split(", "))
        assert len(answer.headers["X-Trace-Id"]) == 32
        assert "Set-Cookie" not in answer.headers
    assert client.options("/nowhere").status_code == 404


@pytest.fixture
def shop(make_app: Callable[..., Flask]) -> FlaskClient:
    return make_app(CORS_ORIGINS=f"{ORIGIN} , {OTHER}").test_client(use_cookies=False)


def allowed(answer: TestResponse) -> str | None:
    assert "Access-Control-Allow-Credentials" not in answer.headers
    assert not [value for value in answer.headers.getlist("Access-Control-Allow-Origin") if "*" in value]
    return answer.headers.get("Access-Control-Allow-Origin")


def listed(answer: TestResponse, name: str) -> set[str]:
    return set(answer.headers[f"Access-Control-{name}"].lower().split(", "))


@pytest.mark.parametrize("origin", [ORIGIN, OTHER])
def test_a_page_of_a_named_origin_may_call_every_route(shop: FlaskClient, origin: str) -> None:
    sent = "authorization,content-type,if-match,if-none-match,idempotency-key,traceparent,x-request-timeout"
    for path in ("/api/v1/orders", "/api/v1/orders/1", "/api/v1/auth/wechat", "/livez"):
        for method in ("GET", "POST", "PUT", "DELETE"):
            asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": sent}
            answer = shop.options(path, headers={"Origin": origin, **asked})
            assert (answer.status_code, allowed(answer)) == (204, origin)
            assert method.lower() in listed(answer, "Allow-Methods")
            assert listed(answer, "Allow-Headers") == set(sent.split(","))
            assert answer.headers.getlist("Vary") == ["Origin"]
            assert answer.headers["Access-Control-Max-Age"] == "600"
    for path, status in (("/livez", 200), ("/api/v1/orders", 401), ("/nowhere", 404)):
        answer = shop.get(path, headers={"Origin": origin, **bearer("unknown")})
        assert (answer.status_code, allowed(answer)) == (status, origin)
        exposed = {"etag", "location", "ratelimit", "ratelimit-policy", "retry-after", "x-trace-id"}
        assert listed(answer, "Expose-Headers") == exposed
        assert "Origin" in answer.vary


@pytest.mark.parametrize("origins", [ORIGIN, f"{ORIGIN},{OTHER}"])
@pytest.mark.parametrize("origin", [None, ORIGIN, "https://evil.example.com"])
def test_what_a_browser_keeps_varies_by_origin(
    make_app: Callable[..., Flask], simulator: Simulator, origins: str, origin: str | None
) -> None:
    user = Caller(make_app(CORS_ORIGINS=origins), simulator)
    answer = user.get("/users/me", **({"Origin": origin} if origin else {}))
    assert {"Authorization", "Origin"} <= set(", ".join(answer.headers.getlist("Vary")).split(", "))
    assert answer.headers["Cache-Control"] == "private, no-cache"


def test_a_header_that_no_client_needs_is_not_allowed(shop: FlaskClient) -> None:
    asked = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "x-wx-openid, authorization"}
    answer = shop.options("/api/v1/orders", headers={"Origin": ORIGIN, **asked})
    assert listed(answer, "Allow-Headers") == {"authorization"}


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example.com",
        "https://h5.example.com.evil.com",
        "https://h5xexample.com",
        "http://h5.example.com",
        "https://h5.example.com:8443",
        "http://localhost",
        "null",
        "*",
        None,
    ],
)
def test_any_other_origin_gets_no_permission(shop: FlaskClient, origin: str | None) -> None:
    headers = {"Access-Control-Request-Method": "GET", **({"Origin": origin} if origin else {})}
    for answer in (shop.options("/api/v1/orders", headers=headers), shop.get("/livez", headers=headers)):
        assert [name for name, _ in answer.headers if name.startswith("Access-Control")] == []


def test_no_origin_is_allowed_by_default(client: FlaskClient) -> None:
    assert allowed(client.get("/livez", headers={"Origin": ORIGIN})) is None


def test_a_crash_can_be_read_by_the_page(make_app: Callable[..., Flask]) -> None:
    app = make_app(CORS_ORIGINS=ORIGIN)
    app.add_url_rule("/crash", view_func=lambda: 1 // 0)
    answer = app.test_client().get("/crash", headers={"Origin": ORIGIN})
    assert (answer.status_code, allowed(answer), answer.get_json()["code"]) == (500, ORIGIN, 500)
