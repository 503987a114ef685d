import html
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urljoin, urlsplit

import pytest
from flask import Flask
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import select
from werkzeug.test import TestResponse

from blueprints import web_login
from dev.redis_server import RedisServer
from errors import Message
from storage import database, identities
from storage.models import Identity, User
from storage.sessions import SessionInterface
from tests.blueprints.callers import data_of, log_in
from tests.harness import APP_ID, WEB_APP_ID, Simulator
from wechat.oauth import WebApp
from wechat.transport import Transport

AUTHORIZE, CALLBACK, ME = "/api/v1/auth/wechat/authorize", "/api/v1/auth/wechat/callback", "/api/v1/users/me"
SITE = "https://localhost"
TOKEN, USERINFO, REFRESH = "/sns/oauth2/access_token", "/sns/userinfo", "/sns/oauth2/refresh_token"
IN_WECHAT = {"User-Agent": "Mozilla/5.0 (iPhone) MicroMessenger/8.0.50"}


class Browser:
    """A browser, which keeps cookies, and its user."""

    def __init__(self, app: Flask, simulator: Simulator) -> None:
        self.client = app.test_client()
        self.simulator = simulator

    def get(self, url: str, **options: Any) -> TestResponse:
        return self.client.get(url, base_url=SITE, **options)

    def begin(self, **query: str) -> str:
        """The page of WeChat that the service redirects to."""
        answer = self.get(AUTHORIZE, query_string=query, headers=IN_WECHAT)
        assert answer.status_code == 302, answer.text
        return answer.headers["Location"]

    def call_back(self, url: str) -> TestResponse:
        assert url.startswith(SITE + CALLBACK)
        return self.get(url.removeprefix(SITE))

    def log_in(self, agree: bool = True, **query: str) -> TestResponse:
        return self.call_back(self.simulator.sign_in_on_the_web(self.begin(**query), agree))

    def me(self) -> dict[str, Any] | None:
        return self.get(ME).get_json()["data"]


@pytest.fixture
def browser(app: Flask, simulator: Simulator) -> Browser:
    return Browser(app, simulator)


def page_of(answer: TestResponse, status: int = 400) -> set[str]:
    """Check that a response is a page for people with a link to begin again; return the fields to blame."""
    assert (answer.status_code, answer.content_type) == (status, "text/html; charset=utf-8"), answer.text
    assert "重新登录" in answer.text
    assert "Log in again" in answer.text
    assert "<script" not in answer.text
    assert answer.headers["Content-Security-Policy"] == "default-src 'none'"
    assert "no-store" in answer.headers["Cache-Control"]
    assert len(answer.headers["X-Trace-Id"]) == 32
    errors = re.search("<pre>(.*)</pre>", answer.text)
    return set(json.loads(errors[1])) if errors else set()


def link_of(answer: TestResponse) -> str:
    """The address at which a page lets the user begin again."""
    link = re.search('<a href="([^"]*)"', answer.text)
    assert link
    return urljoin(SITE + CALLBACK, html.unescape(link[1]))


def query_of(url: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}


@pytest.mark.parametrize("scope", ["snsapi_base", "snsapi_userinfo", "snsapi_login"])
def test_a_user_who_agrees_is_logged_in_with_a_cookie_and_redirected(
    browser: Browser, scope: str, simulator: Simulator
) -> None:
    simulator.web_user(nickname="网上的人", avatar_url="https://thirdwx.qlogo.cn/mmopen/0/132")
    answer = browser.log_in(scope=scope, return_to="/orders/7?tab=items#top")
    assert answer.status_code == 302
    assert answer.headers["Location"] == f"{SITE}/orders/7?tab=items#top"
    me = browser.me()
    assert me is not None
    assert me["nickname"] == (None if scope == "snsapi_base" else "网上的人")
    session = next(cookie for cookie in answer.headers.getlist("Set-Cookie") if cookie.startswith("__Host-session="))
    assert all(flag in session for flag in ("HttpOnly", "Secure", "SameSite=Lax"))


def test_the_authorize_url_is_as_wechat_documents_it(browser: Browser) -> None:
    inside, outside = browser.begin(), browser.get(AUTHORIZE).headers["Location"]
    assert urlsplit(inside).path == "/connect/oauth2/authorize"
    assert urlsplit(outside).path == "/connect/qrconnect"
    for url, scope, app_id in ((inside, "snsapi_userinfo", WEB_APP_ID), (outside, "snsapi_login", APP_ID)):
        assert urlsplit(url).fragment == "wechat_redirect"
        query = query_of(url)
        assert list(query) == ["appid", "redirect_uri", "response_type", "scope", "state"]
        assert (query["appid"], query["response_type"], query["scope"]) == (app_id, "code", scope)
        assert query["redirect_uri"] == SITE + CALLBACK
        assert 32 <= len(query["state"]) <= 128


def test_public_url_replaces_the_host(make_app: Callable[..., Flask], simulator: Simulator) -> None:
    browser = Browser(make_app(PUBLIC_URL="https://shop.example.com/"), simulator)
    url = browser.begin(return_to="/docs")
    assert query_of(url)["redirect_uri"] == f"https://shop.example.com{CALLBACK}"
    back = simulator.sign_in_on_the_web(url).replace("https://shop.example.com", SITE)
    assert browser.call_back(back).headers["Location"] == "https://shop.example.com/docs"


def test_public_url_may_have_a_path_that_a_proxy_removes(make_app: Callable[..., Flask]) -> None:
    answer = make_app(PUBLIC_URL="https://example.com/shop").test_client().get(AUTHORIZE)
    assert query_of(answer.headers["Location"])["redirect_uri"] == f"https://example.com/shop{CALLBACK}"


def test_a_login_goes_on_under_another_secret_key_that_is_accepted(
    make_app: Callable[..., Flask], simulator: Simulator
) -> None:
    old, new = "o" * 31 + "1", "n" * 31 + "1"
    steps = [{"SECRET_KEY": old, "SECRET_KEY_FALLBACKS": new}, {"SECRET_KEY": new, "SECRET_KEY_FALLBACKS": old}]
    apps = [make_app(**step) for step in steps]
    for begins, ends in (apps, apps[::-1]):
        browser = Browser(begins, simulator)
        back = simulator.sign_in_on_the_web(browser.begin())
        browser.client.application = make_app(SECRET_KEY="x" * 31 + "1")
        assert page_of(browser.call_back(back)) == {"state"}
        browser.client.application = ends
        assert browser.call_back(back).status_code == 302


def test_a_return_to_that_is_not_a_path_is_400(browser: Browser) -> None:
    elsewhere = ["https://evil.example.com/", "//evil.example.com", "/\\evil.example.com", "\\\\evil.example.com"]
    elsewhere += ["/\t/evil.example.com", "/\n/evil.example.com", "/x\r\nSet-Cookie: a=b", "javascript:alert(1)"]
    for return_to in (*elsewhere, "", "orders", "/x\\y", " /x", "/x y", "/中文", "/" + "x" * 512):
        answer = browser.get(AUTHORIZE, query_string={"return_to": return_to})
        assert page_of(answer) == {"return_to"}, return_to


def test_a_return_to_that_is_an_odd_path_stays_on_the_site(browser: Browser) -> None:
    for return_to in ("/", "/a//b", "/%2F%2Fevil.example.com", "/.//x", "/@evil.example.com", "/?a=b"):
        location = browser.log_in(return_to=return_to).headers["Location"]
        assert location == SITE + return_to
        assert urlsplit(location).netloc == "localhost"


def test_an_unknown_scope_is_400(browser: Browser) -> None:
    assert page_of(browser.get(AUTHORIZE, query_string={"scope": "snsapi_all"})) == {"scope"}


def test_a_state_works_once(browser: Browser) -> None:
    url = browser.simulator.sign_in_on_the_web(browser.begin())
    cookies = browser.client._cookies.copy()
    assert browser.call_back(url).status_code == 302
    browser.client._cookies = cookies
    assert len(browser.simulator.calls(TOKEN)) == 1


def test_a_state_sent_to_two_instances_simultaneously_begins_one_session(
    make_app: Callable[..., Flask], simulator: Simulator, redis: Redis
) -> None:
    browsers = [Browser(make_app(), simulator) for _ in range(2)]
    url = simulator.sign_in_on_the_web(browsers[0].begin())
    browsers[1].client._cookies = browsers[0].client._cookies.copy()
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda browser: browser.call_back(url), browsers))
    assert [answer.headers["Location"] for answer in answers] == [f"{SITE}/"] * 2
    assert browsers[0].me() == browsers[1].me() is not None
    assert len(simulator.calls(TOKEN)) == len(redis.keys("session:*")) == 1


def test_redis_stores_a_state_once_it_is_used_for_as_long_as_a_code_lives(browser: Browser, redis: Redis) -> None:
    browser.begin()
    assert redis.dbsize() == 0
    browser.log_in()
    (mark,) = redis.scan_iter("web_login:*:used")
    assert 240 < redis.ttl(mark) <= 300


def test_the_cookie_of_a_state_is_out_of_reach_and_expires_with_it(browser: Browser) -> None:
    (cookie,) = browser.get(AUTHORIZE).headers.getlist("Set-Cookie")
    assert {"HttpOnly", "Secure", "SameSite=Lax", "Max-Age=3600", "Path=/"} <= set(cookie.split("; "))
    assert cookie.startswith("__Host-web_login_")


def test_a_state_works_only_in_the_browser_that_began(browser: Browser, app: Flask, simulator: Simulator) -> None:
    attackers = simulator.sign_in_on_the_web(browser.begin())
    victim = Browser(app, simulator)
    for _ in range(2):
        assert page_of(victim.call_back(attackers)) == {"state"}
        victim.begin()
    assert victim.me() is None
    assert browser.call_back(attackers).status_code == 302  # it is not used up


def test_a_forged_state_or_cookie_is_400(browser: Browser) -> None:
    url = browser.simulator.sign_in_on_the_web(browser.begin())
    query = query_of(url)
    for state in ("x" * 43, "é"):
        forged_url = f"{SITE}{CALLBACK}?{urlencode({**query, 'state': state})}"
        assert page_of(browser.call_back(forged_url)) == {"state"}
    (cookie,) = (cookie for cookie in browser.client._cookies.values() if cookie.key.startswith("__Host-web_login_"))
    forged = json.dumps({"state": query["state"], "scope": "snsapi_base", "return_to": "//evil.example.com"})
    content, _, signature = cookie.value.rpartition(".")
    altered = f"{content}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}"
    for value in ("", "x", forged, altered):
        browser.client.set_cookie(cookie.key, value, domain="localhost", path=cookie.path)
        assert page_of(browser.call_back(url)) == {"state"}
    assert browser.simulator.calls(TOKEN) == []


def test_the_cookie_of_one_state_does_not_serve_another(browser: Browser) -> None:
    _, second = (browser.simulator.sign_in_on_the_web(browser.begin()) for _ in range(2))
    names = [cookie.key for cookie in browser.client._cookies.values()]
    browser.client.set_cookie(names[1], browser.client.get_cookie(names[0]).value)
    assert page_of(browser.call_back(second)) == {"state"}


def test_a_callback_opened_again_leads_on_for_as_long_as_the_session_is_there(browser: Browser, redis: Redis) -> None:
    url = browser.simulator.sign_in_on_the_web(browser.begin(return_to="/orders/7"))
    for answer in (browser.call_back(url), browser.call_back(url)):
        assert (answer.status_code, answer.headers["Location"]) == (302, f"{SITE}/orders/7")
        assert "no-store" in answer.headers["Cache-Control"]
    redis.delete(*redis.keys("web_login:*"))  # late
    for again in (url, url.replace("code=", "code=another"), re.sub("code=[^&]*&", "", url)):
        assert browser.call_back(again).headers["Location"] == f"{SITE}/orders/7"
    assert len(browser.simulator.calls(TOKEN)) == 1
    redis.delete(*redis.keys("session:*"))
    assert page_of(browser.call_back(url)) == {"state"}


def test_the_session_of_another_login_leads_nowhere(browser: Browser) -> None:
    first = browser.simulator.sign_in_on_the_web(browser.begin(return_to="/1"))
    browser.call_back(first)
    browser.log_in(return_to="/2")
    assert page_of(browser.call_back(first)) == {"state"}
    assert browser.me() is not None


def test_a_used_state_begins_no_session_after_five_seconds(browser: Browser, redis: Redis) -> None:
    url = browser.simulator.sign_in_on_the_web(browser.begin(return_to="/orders?a=1&b=2"))
    cookies = browser.client._cookies.copy()
    browser.call_back(url)
    (result,) = (key for key in redis.keys("web_login:*") if not key.endswith(b":used"))
    assert 0 < redis.pttl(result) <= 5000
    redis.delete(result)
    browser.client._cookies = cookies
    answer = browser.call_back(url)
    assert_not_logged_in(browser, answer, 400, 461, web_login.BEGIN_AGAIN)
    assert query_of(link_of(answer)) == {"return_to": "/orders?a=1&b=2", "scope": "snsapi_userinfo"}


def test_a_user_who_declined_can_go_back_and_agree(browser: Browser) -> None:
    page = browser.begin(return_to="/orders")
    declined = browser.call_back(browser.simulator.sign_in_on_the_web(page, agree=False))
    assert query_of(link_of(declined))["return_to"] == "/orders"
    agreed = browser.call_back(browser.simulator.sign_in_on_the_web(page))
    assert agreed.headers["Location"] == f"{SITE}/orders"


def test_a_page_shows_nothing_of_its_address_and_begins_again_only_on_this_site(browser: Browser) -> None:
    for path in (AUTHORIZE, CALLBACK):
        for return_to in ("//evil.example.com", '"><script>alert(1)</script>', r"/\evil.example.com"):
            query = {"return_to": return_to, "scope": "snsapi_all", "state": "<script>", "code": "<script>"}
            answer = browser.get(path, query_string={**query, "error": "<script>"})
            page_of(answer)
            assert link_of(answer) == SITE + AUTHORIZE
            assert "evil" not in answer.text


def test_a_wrong_method_gets_a_page(browser: Browser) -> None:
    query = query_of(browser.simulator.sign_in_on_the_web(browser.begin(return_to="/orders")))
    for path in (AUTHORIZE, CALLBACK):
        answer = browser.client.post(f"{path}?{urlencode(query)}", base_url=SITE)
        assert page_of(answer, 405) == set()
        assert "GET" in answer.headers["Allow"]
        assert query_of(link_of(answer))["return_to"] == "/orders"


def test_the_page_is_in_the_language_of_the_browser(browser: Browser) -> None:
    answer = browser.get(CALLBACK, headers={"Accept-Language": "en"})
    assert page_of(answer) == {"state"}
    assert web_login.BEGIN_AGAIN.english in answer.text


def test_a_failure_of_redis_of_the_database_or_of_ours_is_a_page(
    make_app: Callable[..., Flask],
    simulator: Simulator,
    own_redis: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_database = Browser(make_app(DATABASE_URL=f"sqlite:///{tmp_path}/no/such/folder.db"), simulator)
    page_of(without_database.log_in(), 503)
    browser = Browser(make_app(REDIS_URL=own_redis.url), simulator)
    url = simulator.sign_in_on_the_web(browser.begin(return_to="/orders"))
    monkeypatch.setattr(web_login, "_log_in", lambda *_, **__: 1 / 0)
    crashed = browser.call_back(url)
    page_of(crashed, 500)
    own_redis.stop()
    answer = browser.call_back(url)
    page_of(answer, 503)
    assert query_of(link_of(answer))["return_to"] == "/orders"


def test_a_session_that_cannot_be_saved_after_the_view_is_a_page(
    browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = browser.simulator.sign_in_on_the_web(browser.begin(return_to="/orders"))

    def fail(*_: Any) -> None:
        raise RedisError

    monkeypatch.setattr(SessionInterface, "save_session", fail)
    answer = browser.call_back(url)
    page_of(answer, 503)
    assert query_of(link_of(answer))["return_to"] == "/orders"


def test_a_blocked_user_gets_a_page(browser: Browser, app: Flask) -> None:
    browser.simulator.web_user(openid="o-blocked-web")
    browser.log_in()
    user_id = (browser.me() or {})["id"]
    with app.app_context():
        database.session.get_one(User, user_id).blocked = True
        database.session.commit()
    answer = browser.log_in()
    page_of(answer, 403)
    assert identities.BLOCKED.chinese in answer.text


def test_two_tabs_can_log_in_at_the_same_time(browser: Browser) -> None:
    first, second = (browser.simulator.sign_in_on_the_web(browser.begin(return_to=path)) for path in ("/1", "/2"))
    assert [browser.call_back(url).headers["Location"] for url in (first, second)] == [f"{SITE}/1", f"{SITE}/2"]
    assert not [name for _, _, name in browser.client._cookies if "web_login_" in name]


def test_a_callback_without_a_valid_state_is_400(browser: Browser) -> None:
    for query in ({}, {"code": "x"}, {"state": ""}, {"state": "x" * 129, "code": "x"}):
        assert "state" in page_of(browser.get(CALLBACK, query_string=query)), query


def assert_not_logged_in(browser: Browser, answer: TestResponse, status: int, code: int, message: Message) -> None:
    assert page_of(answer, status) == set()
    assert f"<p>{message.chinese}</p>" in answer.text
    assert f"<small>{code}</small>" in answer.text
    assert browser.me() is None


@pytest.mark.parametrize("scope", ["snsapi_userinfo", "snsapi_login"])
def test_a_user_who_declines_is_not_logged_in(browser: Browser, scope: str) -> None:
    assert_not_logged_in(browser, browser.log_in(agree=False, scope=scope), 403, 403, web_login.DECLINED)


def test_an_invalid_code_gets_a_message_about_the_web(browser: Browser) -> None:
    state = query_of(browser.begin())["state"]
    answer = browser.call_back(f"{SITE}{CALLBACK}?{urlencode({'code': 'unknown', 'state': state})}")
    assert_not_logged_in(browser, answer, 400, 460, web_login.BEGIN_AGAIN)


def test_a_snapshot_user_gets_no_account(browser: Browser, app: Flask) -> None:
    browser.simulator.web_user(openid="o-snapshot", snapshot=True)
    assert_not_logged_in(browser, browser.log_in(), 403, 403, web_login.SNAPSHOT_USER)
    with app.app_context():
        assert database.session.scalar(select(Identity).where(Identity.openid == "o-snapshot")) is None


@pytest.mark.parametrize(
    ("kind", "path", "status"),
    [("http_500", TOKEN, 502), ("not_json", USERINFO, 502), ("close", USERINFO, 503), ("errcode", TOKEN, 503)],
)
def test_a_failure_of_wechat_logs_no_user_in(browser: Browser, kind: str, path: str, status: int) -> None:
    browser.simulator.fault(kind, times=2, path=path)
    answer = browser.log_in(return_to="/orders")
    page_of(answer, status)
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert browser.me() is None
    assert query_of(link_of(answer))["return_to"] == "/orders"
    assert browser.get(link_of(answer).removeprefix(SITE)).status_code == 302


@pytest.mark.parametrize("only_in_userinfo", [False, True])
def test_the_same_unionid_on_the_web_and_in_the_mini_program_is_one_user(
    browser: Browser, app: Flask, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, only_in_userinfo: bool
) -> None:
    call, unionid = Transport.call, f"u-{only_in_userinfo}"

    def call_without(self: Transport, path: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        answer = call(self, path, *arguments, **options)
        return {name: value for name, value in answer.items() if (path, name) != (TOKEN, "unionid")}

    if only_in_userinfo:
        monkeypatch.setattr(Transport, "call", call_without)
    login = log_in(app, simulator, f"o-mini-{unionid}", unionid=unionid)
    simulator.web_user(openid=f"o-web-{unionid}", unionid=unionid)
    browser.log_in()
    assert (browser.me() or {})["id"] == data_of(login)["user"]["id"]


def test_a_login_on_the_web_keeps_the_nickname_typed_by_the_user(browser: Browser, simulator: Simulator) -> None:
    simulator.web_user(openid="o-named", nickname="网上的人", avatar_url="not a URL")
    browser.log_in()
    assert (browser.me() or {})["avatar_url"] is None
    browser.client.put(
        f"{ME}/profile", json={"nickname": "自己的名字"}, base_url=SITE, headers={"Sec-Fetch-Site": "same-origin"}
    )
    browser.log_in()
    assert (browser.me() or {})["nickname"] == "自己的名字"


def test_a_nickname_with_a_raw_control_character_is_stored_without_it(
    browser: Browser, simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = Transport._exchange

    def exchange_raw(self: Transport, path: str, *arguments: Any) -> tuple[int, str, bytes]:
        status, content_type, content = exchange(self, path, *arguments)
        return status, content_type, content.replace(rb"\u0014", b"\x14")

    monkeypatch.setattr(Transport, "_exchange", exchange_raw)
    simulator.web_user(nickname="a\x14b\n")
    browser.log_in()
    assert (browser.me() or {})["nickname"] == "a\ufffdb"


def stored_authorization(app: Flask, openid: str) -> str | None:
    with app.app_context():
        return database.session.get_one(Identity, (WEB_APP_ID, openid)).authorization


def test_the_refresh_token_is_stored_encrypted(browser: Browser, app: Flask) -> None:
    browser.simulator.web_user(openid="o-tokens")
    browser.log_in()
    refresh_token = stored_authorization(app, "o-tokens")
    assert refresh_token
    with app.app_context():
        row = database.session.get_one(Identity, (WEB_APP_ID, "o-tokens")).authorization_encrypted
    assert row is not None
    assert refresh_token not in row


def test_an_authorization_that_ends_during_the_login_gets_a_message_about_the_web(browser: Browser) -> None:
    browser.simulator.fault("errcode", path=USERINFO, errcode=42007)
    assert_not_logged_in(browser, browser.log_in(), 400, 460, web_login.BEGIN_AGAIN)


def is_valid(browser: Browser) -> bool:
    return data_of(browser.get("/api/v1/auth/wechat"))["valid"]


def test_wechat_says_whether_the_authorization_is_valid(
    browser: Browser, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser.simulator.web_user(openid="o-granted")
    browser.log_in()
    ask, connections = WebApp.is_valid, []

    def watched(*arguments: Any) -> Any:
        connections.append(app.extensions["database"].pool.checkedout())
        return ask(*arguments)

    monkeypatch.setattr(WebApp, "is_valid", watched)
    assert is_valid(browser)
    browser.simulator.travel(7201)
    assert is_valid(browser)
    browser.simulator.travel(31 * 86400)
    assert not is_valid(browser)
    assert connections == [0, 0, 0]  # no transaction waits for WeChat


def test_userinfo_of_another_user_logs_no_user_in(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Transport.call

    def call_for_another(self: Transport, path: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        answer = call(self, path, *arguments, **options)
        return {**answer, "openid": "o-another"} if path == USERINFO else answer

    monkeypatch.setattr(Transport, "call", call_for_another)
    assert browser.log_in().status_code == 502
    assert browser.me() is None


@pytest.mark.parametrize("errcode", [40003, 42007, 42003, 40029])
def test_an_authorization_that_wechat_refuses_is_not_valid(browser: Browser, errcode: int) -> None:
    browser.log_in()
    browser.simulator.fault("errcode", path=REFRESH, errcode=errcode)
    assert not is_valid(browser)


def test_the_authorization_of_a_removed_app_is_not_valid(browser: Browser, make_app: Callable[..., Flask]) -> None:
    browser.log_in()
    elsewhere = Browser(make_app(WECHAT_ACCOUNT_APP_ID="wx-other"), browser.simulator)
    elsewhere.client._cookies = browser.client._cookies
    assert not is_valid(elsewhere)


def test_a_state_is_not_logged(browser: Browser, log_lines: Any) -> None:
    url = browser.simulator.sign_in_on_the_web(browser.begin())
    browser.simulator.fault("errcode", path=USERINFO, errcode=48001)
    assert browser.call_back(url).status_code == 502
    assert query_of(url)["state"] not in str(log_lines())
