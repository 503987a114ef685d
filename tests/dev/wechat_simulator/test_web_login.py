"""The web login where the service's tests do not exercise it: pages, errors and lifetimes."""

import html
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from flask.testing import FlaskClient

from tests.dev.wechat_simulator.conftest import CREDENTIAL_ERRORS, read
from tests.harness import APP_ID, APP_SECRET, WEB_APP_ID, WEB_APP_SECRET

Control = Callable[..., Any]
AUTHORIZE, TOKEN, REFRESH = "/connect/oauth2/authorize", "/sns/oauth2/access_token", "/sns/oauth2/refresh_token"
BACK = "https://example.com/back?from=微信&n=1"
VISIT = {"appid": WEB_APP_ID, "redirect_uri": BACK, "response_type": "code", "scope": "snsapi_userinfo", "state": "s&1"}


def choose(wechat: FlaskClient, choice: str = "agree", path: str = AUTHORIZE, **different: str) -> dict[str, str]:
    """The query of the link that the user's choice opens."""
    page = wechat.get(path, query_string={**VISIT, **different})
    found = re.search(rf'<a id="{choice}" href="([^"]*)"', page.text)
    link = page.headers["Location"] if page.status_code == 302 else html.unescape(found[1] if found else "")
    assert link.startswith("https://example.com/back?from=")
    return {name: values[0] for name, values in parse_qs(urlsplit(link).query, keep_blank_values=True).items()}


def get(wechat: FlaskClient, path: str, **query: str) -> dict[str, Any]:
    return read(wechat.get(path, query_string=query))


def redeem(wechat: FlaskClient, code: str, **different: str) -> dict[str, Any]:
    query = {"appid": WEB_APP_ID, "secret": WEB_APP_SECRET, "code": code, "grant_type": "authorization_code"}
    return get(wechat, TOKEN, **{**query, **different})


@pytest.mark.parametrize(
    ("path", "scope"),
    [(AUTHORIZE, "snsapi_base"), (AUTHORIZE, "snsapi_userinfo"), ("/connect/qrconnect", "snsapi_login")],
)
def test_the_links_lead_back_to_the_app(wechat: FlaskClient, path: str, scope: str) -> None:
    agreed = choose(wechat, path=path, scope=scope)
    assert agreed.pop("code")
    assert agreed == {"from": "微信", "n": "1", "state": "s&1"}
    if scope != "snsapi_base":  # which asks for no consent
        assert choose(wechat, "decline", path=path, scope=scope) == agreed
    assert choose(wechat, path=path, scope=scope, state="s" * 128)["state"] == "s" * 128


def test_the_page_is_escaped(wechat: FlaskClient, control: Control) -> None:
    control("web_user", nickname="<script>")
    page = wechat.get(AUTHORIZE, query_string={**VISIT, "state": '"><script>'})
    assert page.content_type == "text/html; charset=utf-8"
    assert "<script" not in page.text
    assert "允许" in page.text


@pytest.mark.parametrize(
    "different",
    [
        {"appid": "wx-other"},
        *[{"redirect_uri": address} for address in ("", "javascript:alert(1)", "http://[broken")],
        {"response_type": "token"},
        *[{"scope": scope} for scope in ("", "snsapi_login")],
        {"state": "长" * 43},
    ],
)
def test_an_invalid_link_opens_an_error_page(wechat: FlaskClient, different: dict[str, str]) -> None:
    page = wechat.get(AUTHORIZE, query_string={**VISIT, **different})
    assert (page.status_code, page.content_type) == (200, "text/html; charset=utf-8")
    assert "参数" in page.text
    assert "<a " not in page.text


@pytest.mark.parametrize(
    ("different", "errcode"),
    [
        *CREDENTIAL_ERRORS,
        ({"code": ""}, 41008),
        ({"code": "unknown"}, 40029),
        ({"appid": APP_ID, "secret": APP_SECRET}, 40029),
    ],
)
def test_code_errors(wechat: FlaskClient, different: dict[str, str], errcode: int) -> None:
    assert redeem(wechat, **{"code": choose(wechat)["code"], **different})["errcode"] == errcode


def test_codes_work_once_and_for_five_minutes(wechat: FlaskClient, control: Control) -> None:
    code, late = choose(wechat)["code"], choose(wechat)["code"]
    control("clock", advance=299)
    assert redeem(wechat, code)["openid"]
    assert redeem(wechat, code)["errcode"] == 40163
    control("clock", advance=2)
    assert redeem(wechat, late)["errcode"] == 40029


def test_a_refresh_token_works_for_thirty_days(wechat: FlaskClient, control: Control) -> None:
    login = redeem(wechat, choose(wechat)["code"])
    query = {"appid": WEB_APP_ID, "grant_type": "refresh_token", "refresh_token": login["refresh_token"]}
    for name, value, errcode in (
        ("appid", "", 41002),
        ("refresh_token", "", 41003),
        ("grant_type", "authorization_code", 40002),
        ("appid", "wx-other", 40013),
        ("appid", APP_ID, 40030),
        ("refresh_token", "unknown", 40030),
    ):
        assert get(wechat, REFRESH, **{**query, name: value})["errcode"] == errcode
    control("clock", advance=30 * 86400 - 60)
    new = get(wechat, REFRESH, **query)
    assert new == {**login, "access_token": new["access_token"]}
    for token, errcode in ((login["access_token"], 42001), (new["access_token"], 0)):
        assert get(wechat, "/sns/auth", access_token=token, openid=login["openid"])["errcode"] == errcode
    control("clock", advance=120)
    assert get(wechat, REFRESH, **query)["errcode"] == 42002


@pytest.mark.parametrize("path", ["/sns/userinfo", "/sns/auth"])
def test_errors_of_the_user_s_access_token(wechat: FlaskClient, path: str) -> None:
    login = redeem(wechat, choose(wechat)["code"])
    token, openid = login["access_token"], login["openid"]
    assert get(wechat, path, openid=openid)["errcode"] == 41001
    assert get(wechat, path, access_token=token)["errcode"] == 41009
    assert get(wechat, path, access_token="unknown", openid=openid)["errcode"] == 40001
    assert get(wechat, path, access_token=token, openid="o-bob")["errcode"] == 40003
