"""The web login: what the browser sees, and what the code is worth."""

import html
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import requests
from flask.testing import FlaskClient

from tests.harness import APP_ID, APP_SECRET, WEB_APP_ID, WEB_APP_SECRET, Simulator

Control = Callable[..., Any]
AUTHORIZE, QRCONNECT = "/connect/oauth2/authorize", "/connect/qrconnect"
BACK = "https://example.com/back?from=微信&n=1"
VISIT = {"appid": WEB_APP_ID, "redirect_uri": BACK, "response_type": "code", "scope": "snsapi_userinfo", "state": "s&1"}
PAGES = pytest.mark.parametrize(
    ("path", "scope"), [(AUTHORIZE, "snsapi_base"), (AUTHORIZE, "snsapi_userinfo"), (QRCONNECT, "snsapi_login")]
)


def link(wechat: FlaskClient, path: str = AUTHORIZE, choice: str = "agree", **different: str) -> str:
    """Where the person's choice leads."""
    page = wechat.get(path, query_string={**VISIT, **different})
    if page.status_code == 302:
        return page.headers["Location"]
    found = re.search(rf'<a id="{choice}" href="([^"]*)"', page.text)
    assert found, page.text
    return html.unescape(found[1])


def get(wechat: FlaskClient, path: str, **query: str) -> dict[str, Any]:
    answer = wechat.get(path, query_string=query)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/plain")
    body: dict[str, Any] = answer.get_json(force=True)
    return body


def redeem(wechat: FlaskClient, url: str, app_id: str = WEB_APP_ID, secret: str = WEB_APP_SECRET) -> dict[str, Any]:
    (code,) = parse_qs(urlsplit(url).query)["code"]
    given = {"appid": app_id, "secret": secret, "code": code, "grant_type": "authorization_code"}
    return get(wechat, "/sns/oauth2/access_token", **given)


@PAGES
def test_who_agrees_comes_back_with_code_and_state(wechat: FlaskClient, path: str, scope: str) -> None:
    parts = urlsplit(link(wechat, path, scope=scope))
    query = parse_qs(parts.query)
    assert (parts.netloc, parts.path) == ("example.com", "/back")
    assert query.keys() == {"from", "n", "code", "state"}
    assert (query["from"], query["state"]) == (["微信"], ["s&1"])


@pytest.mark.parametrize(("path", "scope"), [(AUTHORIZE, "snsapi_userinfo"), (QRCONNECT, "snsapi_login")])
def test_who_declines_comes_back_with_the_state_alone(wechat: FlaskClient, path: str, scope: str) -> None:
    query = parse_qs(urlsplit(link(wechat, path, "decline", scope=scope)).query)
    assert query.keys() == {"from", "n", "state"}


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
        {"redirect_uri": ""},
        {"redirect_uri": "javascript:alert(1)"},
        {"redirect_uri": "http://[broken"},
        {"response_type": "token"},
        {"scope": "snsapi_login"},
        {"scope": ""},
        {"state": "长" * 43},
    ],
)
def test_a_wrong_link_ends_at_a_page_that_says_so(wechat: FlaskClient, different: dict[str, str]) -> None:
    page = wechat.get(AUTHORIZE, query_string={**VISIT, **different})
    assert (page.status_code, page.content_type) == (200, "text/html; charset=utf-8")
    assert "参数" in page.text
    assert "<a " not in page.text


def test_a_scope_belongs_to_its_page_and_a_state_may_be_long_or_missing(wechat: FlaskClient) -> None:
    assert "Scope" in wechat.get(QRCONNECT, query_string=VISIT).text
    assert parse_qs(urlsplit(link(wechat, state="s" * 128)).query)["state"] == ["s" * 128]
    assert link(wechat, state="").endswith("&state=")


@PAGES
@pytest.mark.parametrize("unionid", ["u-alice", None])
def test_a_code_is_worth_tokens_and_an_openid(
    wechat: FlaskClient, control: Control, path: str, scope: str, unionid: str | None
) -> None:
    control("web_user", openid="o-alice", unionid=unionid)
    answer = redeem(wechat, link(wechat, path, scope=scope))
    assert len({answer.pop("access_token"), answer.pop("refresh_token")}) == 2
    expected: dict[str, Any] = {"expires_in": 7200, "openid": "o-alice", "scope": scope}
    if unionid and scope != "snsapi_base":
        expected["unionid"] = unionid
    assert answer == expected


def test_a_snapshot_user_is_marked(wechat: FlaskClient, control: Control) -> None:
    control("web_user", snapshot=True)
    assert redeem(wechat, link(wechat))["is_snapshotuser"] == 1


def test_each_visit_is_by_somebody_else_until_somebody_sits_down(wechat: FlaskClient, control: Control) -> None:
    assert len({redeem(wechat, link(wechat))["openid"] for _ in range(2)}) == 2
    alice = control("web_user")
    assert {redeem(wechat, link(wechat))["openid"] for _ in range(2)} == {alice["openid"]}
    assert control("web_user")["openid"] != alice["openid"]


def test_an_app_knows_a_person_by_a_name_of_its_own(wechat: FlaskClient, control: Control) -> None:
    control("web_user", openid="o-alice", unionid="u-alice")
    in_web_app = redeem(wechat, link(wechat))
    in_mini_program, again = (redeem(wechat, link(wechat, appid=APP_ID), APP_ID, APP_SECRET) for _ in range(2))
    assert in_web_app["openid"] != in_mini_program["openid"] == again["openid"]
    assert len(in_mini_program["openid"]) == 28
    assert in_web_app["unionid"] == in_mini_program["unionid"]


@pytest.mark.parametrize(
    ("different", "errcode"),
    [
        ({"appid": ""}, 41002),
        ({"secret": ""}, 41004),
        ({"code": ""}, 41008),
        ({"grant_type": "refresh_token"}, 40002),
        ({"appid": "wx-other"}, 40013),
        ({"secret": APP_SECRET}, 40125),
        ({"code": "unknown"}, 40029),
        ({"appid": APP_ID, "secret": APP_SECRET}, 40029),
    ],
)
def test_a_bad_exchange_is_refused(wechat: FlaskClient, different: dict[str, str], errcode: int) -> None:
    (code,) = parse_qs(urlsplit(link(wechat)).query)["code"]
    given = {"appid": WEB_APP_ID, "secret": WEB_APP_SECRET, "code": code, "grant_type": "authorization_code"}
    answer = get(wechat, "/sns/oauth2/access_token", **{**given, **different})
    assert answer["errcode"] == errcode
    assert ", rid: " in answer["errmsg"]


def test_a_code_works_once_and_for_five_minutes(wechat: FlaskClient, control: Control) -> None:
    url, late = link(wechat), link(wechat)
    assert "openid" in redeem(wechat, url)
    assert redeem(wechat, url)["errcode"] == 40163
    control("clock", advance=301)
    assert redeem(wechat, late)["errcode"] == 40029


def test_a_refresh_token_gives_access_tokens_for_thirty_days(wechat: FlaskClient, control: Control) -> None:
    login = redeem(wechat, link(wechat))
    given = {"appid": WEB_APP_ID, "grant_type": "refresh_token", "refresh_token": login["refresh_token"]}
    control("clock", advance=30 * 86400 - 60)
    new = get(wechat, "/sns/oauth2/refresh_token", **given)
    assert new == {**login, "access_token": new["access_token"]}
    assert new["access_token"] != login["access_token"]
    for token, errcode in ((login["access_token"], 42001), (new["access_token"], 0)):
        answer = get(wechat, "/sns/auth", access_token=token, openid=login["openid"])
        assert answer["errcode"] == errcode
    control("clock", advance=120)
    assert get(wechat, "/sns/oauth2/refresh_token", **given)["errcode"] == 42002


@pytest.mark.parametrize(
    ("different", "errcode"),
    [
        ({"appid": ""}, 41002),
        ({"refresh_token": ""}, 41003),
        ({"grant_type": "authorization_code"}, 40002),
        ({"appid": "wx-other"}, 40013),
        ({"appid": APP_ID}, 40030),
        ({"refresh_token": "unknown"}, 40030),
    ],
)
def test_a_bad_refresh_is_refused(wechat: FlaskClient, different: dict[str, str], errcode: int) -> None:
    refresh_token = redeem(wechat, link(wechat))["refresh_token"]
    given = {"appid": WEB_APP_ID, "grant_type": "refresh_token", "refresh_token": refresh_token, **different}
    assert get(wechat, "/sns/oauth2/refresh_token", **given)["errcode"] == errcode


@pytest.mark.parametrize("unionid", ["u-alice", None])
def test_userinfo_says_who_it_is(wechat: FlaskClient, control: Control, unionid: str | None) -> None:
    control("web_user", openid="o-alice", unionid=unionid, nickname="爱丽丝", avatar_url="https://example.com/a.png")
    token = redeem(wechat, link(wechat))["access_token"]
    answer = get(wechat, "/sns/userinfo", access_token=token, openid="o-alice", lang="zh_CN")
    assert answer.pop("unionid", None) == unionid
    assert answer == {
        "openid": "o-alice",
        "nickname": "爱丽丝",
        "sex": 0,
        "province": "",
        "city": "",
        "country": "",
        "headimgurl": "https://example.com/a.png",
        "privilege": [],
    }


@pytest.mark.parametrize("path", ["/sns/userinfo", "/sns/auth"])
def test_a_bad_token_or_another_openid_is_refused(wechat: FlaskClient, control: Control, path: str) -> None:
    login = redeem(wechat, link(wechat))
    token, openid = login["access_token"], login["openid"]
    assert get(wechat, path, openid=openid)["errcode"] == 41001
    assert get(wechat, path, access_token=token)["errcode"] == 41009
    assert get(wechat, path, access_token="unknown", openid=openid)["errcode"] == 40001
    assert get(wechat, path, access_token=token, openid="o-bob")["errcode"] == 40003
    control("clock", advance=7201)
    assert get(wechat, path, access_token=token, openid=openid)["errcode"] == 42001


def test_the_silent_scope_tells_no_name(wechat: FlaskClient) -> None:
    login = redeem(wechat, link(wechat, scope="snsapi_base"))
    given = {"access_token": login["access_token"], "openid": login["openid"]}
    assert get(wechat, "/sns/userinfo", **given)["errcode"] == 48001
    assert get(wechat, "/sns/auth", **given) == {"errcode": 0, "errmsg": "ok"}


@pytest.mark.parametrize("scope", ["snsapi_base", "snsapi_userinfo"])
def test_the_harness_signs_in_without_going_back(simulator: Simulator, scope: str) -> None:
    alice = simulator.web_user(unionid="u-alice")
    visit = f"{simulator.url}{AUTHORIZE}?{urlencode({**VISIT, 'scope': scope})}#wechat_redirect"
    back = simulator.sign_in_on_the_web(visit)
    assert back.startswith("https://example.com/back?from=")
    query = parse_qs(urlsplit(back).query)
    given = {"appid": WEB_APP_ID, "secret": WEB_APP_SECRET, "grant_type": "authorization_code"}
    given["code"] = query["code"][0]
    answer = requests.get(f"{simulator.url}/sns/oauth2/access_token", params=given, timeout=5).json()
    assert answer["openid"] == alice["openid"]
    if scope == "snsapi_userinfo":
        assert "code" not in parse_qs(urlsplit(simulator.sign_in_on_the_web(visit, agree=False)).query)
