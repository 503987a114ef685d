from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from flask import Flask

from errors import Code
from tests.harness import APP_ID, WEB_APP_ID, Simulator
from tests.wechat.harness import refusal
from wechat.oauth import Grant, WebApp

TOKEN, REFRESH, USERINFO = (f"/sns/{name}" for name in ("oauth2/access_token", "oauth2/refresh_token", "userinfo"))
BACK = "https://example.com/back?n=1"
TOKENS = {"openid": "o-alice", "access_token": "a", "refresh_token": "r", "scope": "snsapi_userinfo"}
GRANT = Grant("o-alice", "a", "r", None, False)


@pytest.fixture
def web_app(app: Flask) -> WebApp:
    return app.extensions["web_apps"]["snsapi_userinfo"]


@pytest.fixture
def log_in(web_app: WebApp, simulator: Simulator) -> Callable[..., Grant]:
    """Let a user consent, and redeem the code."""

    def redeem(scope: str = "snsapi_userinfo", **person: Any) -> Grant:
        simulator.web_user(openid="o-alice", **person)
        back = simulator.sign_in_on_the_web(web_app.authorize_url(scope, BACK, "state"))
        query = dict(parse_qsl(urlsplit(back).query))
        assert query == {"n": "1", "state": "state", "code": query["code"]}
        return web_app.redeem(query["code"])

    return redeem


def respond(web_app: WebApp, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]) -> None:
    monkeypatch.setattr(web_app._transport, "call", lambda *_, **__: answer)


@pytest.mark.parametrize(
    ("scope", "path", "app_id"),
    [
        ("snsapi_base", "/connect/oauth2/authorize", WEB_APP_ID),
        ("snsapi_userinfo", "/connect/oauth2/authorize", WEB_APP_ID),
        ("snsapi_login", "/connect/qrconnect", APP_ID),
    ],
)
def test_authorize_url(app: Flask, simulator: Simulator, scope: str, path: str, app_id: str) -> None:
    url = app.extensions["web_apps"][scope].authorize_url(scope, BACK, "s&1")
    parts = urlsplit(url)
    assert (f"{parts.scheme}://{parts.netloc}", parts.path) == (simulator.url, path)
    assert parts.fragment == "wechat_redirect"
    names = ("appid", "redirect_uri", "response_type", "scope", "state")  # in this order
    assert parse_qsl(parts.query) == list(zip(names, (app_id, BACK, "code", scope, "s&1"), strict=True))


def test_redeem(web_app: WebApp, log_in: Callable[..., Grant]) -> None:
    grant = log_in(unionid="u-alice")
    assert grant.openid == "o-alice"
    assert (grant.unionid, grant.is_snapshot_user) == ("u-alice", False)
    assert log_in("snsapi_base").unionid is None
    assert log_in(snapshot=True).is_snapshot_user
    assert refusal(web_app.redeem, "0unknown") is Code.WECHAT_CODE_INVALID


def test_a_code_works_once(web_app: WebApp, simulator: Simulator) -> None:
    back = simulator.sign_in_on_the_web(web_app.authorize_url("snsapi_base", BACK, "state"))
    code = dict(parse_qsl(urlsplit(back).query))["code"]
    web_app.redeem(code)
    assert refusal(web_app.redeem, code) is Code.WECHAT_CODE_USED


def test_userinfo(web_app: WebApp, log_in: Callable[..., Grant], simulator: Simulator) -> None:
    grant = log_in(nickname="爱丽丝", avatar_url="https://example.com/a.png", unionid="u-alice")
    assert web_app.userinfo(grant) == ({"nickname": "爱丽丝", "avatar_url": "https://example.com/a.png"}, "u-alice")
    (call,) = simulator.calls(USERINFO)
    assert call["parameters"] == ["access_token", "lang", "openid"]
    assert web_app.userinfo(log_in(nickname=""))[0]["nickname"] is None
    assert refusal(web_app.userinfo, log_in("snsapi_base")) is Code.WECHAT_REFUSED


def test_an_authorization_is_valid_for_as_long_as_it_can_be_refreshed(
    web_app: WebApp, log_in: Callable[..., Grant], simulator: Simulator
) -> None:
    token = log_in().refresh_token
    for _ in range(2):
        assert web_app.is_valid(token)
        simulator.travel(7201)  # the access token has expired
    (first, *_) = simulator.calls(REFRESH)
    assert first["parameters"] == ["appid", "grant_type", "refresh_token"]
    simulator.travel(31 * 86400)  # and the refresh token
    assert not web_app.is_valid(token)
    assert not web_app.is_valid("unknown")


@pytest.mark.parametrize("errcode", [40001, 40003, 40029, 40030, 42002, 42003, 42007, 50001])
def test_a_refused_refresh_means_that_the_authorization_has_ended(
    web_app: WebApp, log_in: Callable[..., Grant], simulator: Simulator, errcode: int
) -> None:
    token = log_in().refresh_token
    simulator.fault("errcode", path=REFRESH, errcode=errcode)
    assert not web_app.is_valid(token)
    assert web_app.is_valid(token)


@pytest.mark.parametrize(
    ("errcode", "code"), [(-1, Code.UNAVAILABLE), (45009, Code.UNAVAILABLE), (40013, Code.WECHAT_REFUSED)]
)
def test_a_refresh_that_fails_does_not_mean_that_the_authorization_has_ended(
    web_app: WebApp, log_in: Callable[..., Grant], simulator: Simulator, errcode: int, code: Code
) -> None:
    token = log_in().refresh_token
    simulator.fault("errcode", times=2 if errcode == -1 else 1, path=REFRESH, errcode=errcode)
    assert refusal(web_app.is_valid, token) is code
    assert web_app.is_valid(token)


@pytest.mark.parametrize(
    ("different", "reason"),
    [
        ({"openid": None}, "openid or tokens"),
        ({"openid": "o alice"}, "openid or tokens"),
        ({"access_token": 1}, "openid or tokens"),
        ({"access_token": "x" * 513}, "openid or tokens"),
        ({"refresh_token": ""}, "openid or tokens"),
        ({"unionid": 5}, "malformed unionid"),
        ({"unionid": "u" * 65}, "malformed unionid"),
    ],
)
def test_malformed_tokens_are_502_and_their_field_names_are_logged(
    web_app: WebApp, monkeypatch: pytest.MonkeyPatch, log_lines: Any, different: dict[str, Any], reason: str
) -> None:
    answer = {**TOKENS, **different}
    respond(web_app, monkeypatch, answer)
    assert refusal(web_app.redeem, "0code") is Code.UPSTREAM_INVALID
    line = log_lines()[-1]
    assert line["interface"] == TOKEN
    assert line["reason"].startswith(reason)
    assert line["reason"].endswith(f"; fields received: {', '.join(sorted(answer))}")


@pytest.mark.parametrize(
    "answer", [{}, {"openid": "o-bob"}, {"openid": ["o-alice"]}, {"openid": "o-alice", "unionid": 5}]
)
def test_a_malformed_profile_or_another_user_s_is_502(
    web_app: WebApp, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]
) -> None:
    respond(web_app, monkeypatch, answer)
    assert refusal(web_app.userinfo, GRANT) is Code.UPSTREAM_INVALID
