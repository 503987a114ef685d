import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from flask import Flask
from flask.testing import FlaskClient
from itsdangerous import TimestampSigner
from redis import Redis
from sqlalchemy import select
from werkzeug.test import TestResponse

from blueprints import web_login
from errors import Message
from storage import database
from storage.models import Identity
from tests.harness import APP_ID, WEB_APP_ID, Simulator, wait_until
from wechat.oauth import Authorization, WebApp
from wechat.transport import Transport

AUTHORIZE, CALLBACK, ME = "/api/v1/auth/wechat/authorize", "/api/v1/auth/wechat/callback", "/api/v1/users/me"
SITE, FOLDER = "https://localhost", "/api/v1/auth/wechat"
TOKEN, USERINFO, REFRESH = "/sns/oauth2/access_token", "/sns/userinfo", "/sns/oauth2/refresh_token"
IN_WECHAT = {"User-Agent": "Mozilla/5.0 (iPhone) MicroMessenger/8.0.50"}


class Browser:
    """A browser, which keeps cookies, and the person in front of it."""

    def __init__(self, app: Flask, simulator: Simulator) -> None:
        self.client = app.test_client()
        self.simulator = simulator

    def get(self, url: str, **options: Any) -> TestResponse:
        return self.client.get(url, base_url=SITE, **options)

    def begin(self, **query: str) -> str:
        """Where the service sends the browser to."""
        answer = self.get(AUTHORIZE, query_string=query, headers=IN_WECHAT)
        assert answer.status_code == 302, answer.text
        return answer.headers["Location"]

    def come_back(self, url: str) -> TestResponse:
        assert url.startswith(SITE + CALLBACK)
        return self.get(url.removeprefix(SITE))

    def log_in(self, agree: bool = True, **query: str) -> TestResponse:
        return self.come_back(self.simulator.sign_in_on_the_web(self.begin(**query), agree))

    def me(self) -> dict[str, Any] | None:
        return self.get(ME).get_json()["data"]


@pytest.fixture
def browser(app: Flask, simulator: Simulator) -> Browser:
    return Browser(app, simulator)


@pytest.fixture
def new_browser(app: Flask, simulator: Simulator) -> Callable[[], Browser]:
    return lambda: Browser(app, simulator)


def code_of(answer: TestResponse) -> tuple[int, int]:
    return answer.status_code, answer.get_json()["code"]


def query_of(url: str) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}


@pytest.mark.parametrize("scope", ["snsapi_base", "snsapi_userinfo", "snsapi_login"])
def test_whoever_agrees_is_logged_in_with_a_cookie_and_goes_where_he_wanted(
    browser: Browser, scope: str, simulator: Simulator
) -> None:
    simulator.web_user(nickname="网上的人", avatar_url="https://thirdwx.qlogo.cn/mmopen/0/132")
    answer = browser.log_in(scope=scope, return_to="/orders/7?tab=items#top")
    assert answer.status_code == 302
    assert answer.headers["Location"] == f"{SITE}/orders/7?tab=items#top"
    me = browser.me()
    assert me is not None
    assert me["nickname"] == (None if scope == "snsapi_base" else "网上的人")
    session = next(cookie for cookie in answer.headers.getlist("Set-Cookie") if cookie.startswith("session="))
    assert all(flag in session for flag in ("HttpOnly", "Secure", "SameSite=Lax"))


def test_wechat_is_asked_as_it_wants_to_be(browser: Browser) -> None:
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


def test_public_url_says_where_browsers_reach_us(make_app: Callable[..., Flask], simulator: Simulator) -> None:
    browser = Browser(make_app(PUBLIC_URL="https://shop.example.com/"), simulator)
    url = browser.begin(return_to="/docs")
    assert query_of(url)["redirect_uri"] == f"https://shop.example.com{CALLBACK}"
    back = simulator.sign_in_on_the_web(url).replace("https://shop.example.com", SITE)
    assert browser.come_back(back).headers["Location"] == "https://shop.example.com/docs"


def test_public_url_may_have_a_path_which_a_proxy_takes_away(make_app: Callable[..., Flask]) -> None:
    answer = make_app(PUBLIC_URL="https://example.com/shop").test_client().get(AUTHORIZE)
    assert query_of(answer.headers["Location"])["redirect_uri"] == f"https://example.com/shop{CALLBACK}"
    assert f"Path=/shop{FOLDER}" in answer.headers["Set-Cookie"]


@pytest.mark.parametrize(
    "return_to",
    [
        "",
        "orders",
        "https://evil.example.com/",
        "//evil.example.com",
        "/\\evil.example.com",
        "\\\\evil.example.com",
        "/x\\y",
        "/\t/evil.example.com",
        "/\n/evil.example.com",
        " /x",
        "/x y",
        "/x\r\nSet-Cookie: a=b",
        "/中文",
        "javascript:alert(1)",
        "/" + "x" * 512,
    ],
)
def test_a_return_to_that_is_no_path_of_ours_is_refused(browser: Browser, return_to: str) -> None:
    answer = browser.get(AUTHORIZE, query_string={"return_to": return_to})
    assert code_of(answer) == (400, 400)
    assert set(answer.get_json()["data"]["errors"]) == {"return_to"}


@pytest.mark.parametrize("return_to", ["/", "/a//b", "/%2F%2Fevil.example.com", "/.//x", "/@evil.example.com", "/?a=b"])
def test_an_odd_path_of_ours_stays_ours(browser: Browser, return_to: str) -> None:
    location = browser.log_in(return_to=return_to).headers["Location"]
    assert location == SITE + return_to
    assert urlsplit(location).netloc == "localhost"


def test_a_scope_that_is_none_is_refused(browser: Browser) -> None:
    assert code_of(browser.get(AUTHORIZE, query_string={"scope": "snsapi_all"})) == (400, 400)


def assert_refused(answer: TestResponse) -> None:
    assert code_of(answer) == (400, 400)
    assert set(answer.get_json()["data"]["errors"]) == {"state"}


def test_a_state_works_once(browser: Browser) -> None:
    url = browser.simulator.sign_in_on_the_web(browser.begin())
    cookies = browser.client._cookies.copy()
    assert browser.come_back(url).status_code == 302
    browser.client._cookies = cookies
    assert_refused(browser.come_back(url))
    assert len(browser.simulator.calls(TOKEN)) == 1


def test_a_state_works_once_also_when_it_comes_to_all_instances_at_once(
    make_app: Callable[..., Flask], simulator: Simulator
) -> None:
    browsers = [Browser(make_app(), simulator) for _ in range(2)]
    for browser in browsers:
        browser.client.application.config["SECRET_KEY"] = browsers[0].client.application.config["SECRET_KEY"]
    url = simulator.sign_in_on_the_web(browsers[0].begin())
    browsers[1].client._cookies = browsers[0].client._cookies.copy()
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda browser: browser.come_back(url).status_code, browsers))
    assert sorted(answers) == [302, 400]


def test_a_state_lives_ten_minutes(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    now = TimestampSigner.get_timestamp
    for age, status in ((598, 302), (602, 400), (-5, 302)):  # the last by an instance whose clock is ahead
        monkeypatch.setattr(TimestampSigner, "get_timestamp", lambda signer, age=age: now(signer) - age)
        url = browser.simulator.sign_in_on_the_web(browser.begin())
        assert browser.come_back(url).status_code == status


def test_a_used_state_is_remembered_for_as_long_as_it_lives(browser: Browser, redis: Redis) -> None:
    browser.log_in()
    (mark,) = redis.scan_iter("web_login:*")
    assert 590 < redis.ttl(mark) <= 600


def test_nothing_is_kept_for_those_who_never_come_back(browser: Browser, redis: Redis) -> None:
    browser.begin()
    assert redis.dbsize() == 0


def test_what_the_browser_keeps_meanwhile_is_out_of_reach_and_ends_with_the_state(browser: Browser) -> None:
    answer = browser.get(AUTHORIZE)
    (cookie,) = answer.headers.getlist("Set-Cookie")
    assert {"HttpOnly", "Secure", "SameSite=Lax", "Max-Age=600", f"Path={FOLDER}"} <= set(cookie.split("; "))


def test_a_state_belongs_to_the_browser_that_began(browser: Browser, new_browser: Callable[[], Browser]) -> None:
    attackers = browser.simulator.sign_in_on_the_web(browser.begin())
    victim = new_browser()
    assert_refused(victim.come_back(attackers))
    victim.begin()
    assert_refused(victim.come_back(attackers))
    assert victim.me() is None
    assert browser.come_back(attackers).status_code == 302  # nobody used it up


def test_a_forged_state_or_cookie_is_refused(browser: Browser) -> None:
    url = browser.simulator.sign_in_on_the_web(browser.begin())
    query = query_of(url)
    assert_refused(browser.come_back(f"{SITE}{CALLBACK}?{urlencode({**query, 'state': 'x' * 43})}"))
    assert_refused(browser.come_back(f"{SITE}{CALLBACK}?{urlencode({**query, 'state': 'é'})}"))
    (cookie,) = (cookie for cookie in browser.client._cookies.values() if cookie.key.startswith("web_login_"))
    forged = json.dumps({"state": query["state"], "scope": "snsapi_base", "return_to": "//evil.example.com"})
    content, _, signature = cookie.value.rpartition(".")
    altered = f"{content}.{'A' if signature[0] != 'A' else 'B'}{signature[1:]}"
    for value in ("", "x", forged, altered):
        browser.client.set_cookie(cookie.key, value, domain="localhost", path=cookie.path)
        assert_refused(browser.come_back(url))
    assert browser.simulator.calls(TOKEN) == []


def test_what_the_browser_keeps_for_one_state_is_worth_nothing_for_another(browser: Browser) -> None:
    first, second = (browser.simulator.sign_in_on_the_web(browser.begin()) for _ in range(2))
    names = [web_login._cookie(query_of(url)["state"]) for url in (first, second)]
    value = browser.client.get_cookie(names[0], "localhost", FOLDER).value
    browser.client.set_cookie(names[1], value, domain="localhost", path=FOLDER)
    assert_refused(browser.come_back(second))


def test_two_tabs_can_log_in_side_by_side(browser: Browser) -> None:
    first, second = (browser.simulator.sign_in_on_the_web(browser.begin(return_to=path)) for path in ("/1", "/2"))
    assert [browser.come_back(url).headers["Location"] for url in (first, second)] == [f"{SITE}/1", f"{SITE}/2"]
    assert not [name for _, _, name in browser.client._cookies if name.startswith("web_login_")]


@pytest.mark.parametrize("query", [{}, {"code": "x"}, {"state": ""}, {"state": "x" * 129, "code": "x"}])
def test_a_callback_without_a_state_that_can_be_is_400(browser: Browser, query: dict[str, str]) -> None:
    assert code_of(browser.get(CALLBACK, query_string=query)) == (400, 400)


def assert_says(answer: TestResponse, status: int, code: int, message: Message) -> None:
    assert code_of(answer) == (status, code)
    assert answer.get_json()["message"] == message.chinese


@pytest.mark.parametrize("scope", ["snsapi_userinfo", "snsapi_login"])
def test_whoever_declines_is_told_so_and_not_logged_in(browser: Browser, scope: str) -> None:
    assert_says(browser.log_in(agree=False, scope=scope), 403, 403, web_login.DECLINED)
    assert browser.me() is None


def test_a_code_that_is_none_gets_a_message_that_fits_the_web(browser: Browser) -> None:
    state = query_of(browser.begin())["state"]
    answer = browser.come_back(f"{SITE}{CALLBACK}?{urlencode({'code': 'unknown', 'state': state})}")
    assert_says(answer, 400, 460, web_login.BEGIN_AGAIN)
    assert browser.me() is None


def test_a_snapshot_user_gets_no_account(browser: Browser, app: Flask) -> None:
    browser.simulator.web_user(openid="o-snapshot", snapshot=True)
    assert_says(browser.log_in(), 403, 403, web_login.SNAPSHOT_USER)
    assert browser.me() is None
    with app.app_context():
        assert database.session.scalar(select(Identity).where(Identity.openid == "o-snapshot")) is None


@pytest.mark.parametrize(
    ("kind", "path", "status"),
    [("http_500", TOKEN, 502), ("not_json", USERINFO, 502), ("close", USERINFO, 503), ("errcode", TOKEN, 503)],
)
def test_a_wechat_that_fails_logs_nobody_in(browser: Browser, kind: str, path: str, status: int) -> None:
    browser.simulator.fault(kind, times=2, path=path)
    assert browser.log_in().status_code == status
    assert browser.me() is None


def test_the_same_unionid_on_the_web_and_in_the_mini_program_is_one_user(
    browser: Browser, client: FlaskClient, simulator: Simulator
) -> None:
    login = client.post("/api/v1/auth/wechat", json={"code": simulator.code(openid="o-mini", unionid="u-one")})
    simulator.web_user(openid="o-web", unionid="u-one")
    browser.log_in()
    me = browser.me()
    assert me is not None
    assert me["id"] == login.get_json()["data"]["user"]["id"]


def test_what_the_user_typed_in_is_kept_at_a_login_on_the_web(browser: Browser, simulator: Simulator) -> None:
    simulator.web_user(openid="o-named", nickname="网上的人", avatar_url="not a URL")
    browser.log_in()
    assert (browser.me() or {})["avatar_url"] is None
    browser.client.put(f"{ME}/profile", json={"nickname": "自己的名字"}, base_url=SITE)
    browser.log_in()
    assert (browser.me() or {})["nickname"] == "自己的名字"


def kept(app: Flask, openid: str) -> list[str]:
    with app.app_context():
        authorization = database.session.get_one(Identity, (WEB_APP_ID, openid)).authorization
        assert authorization is not None
        return json.loads(authorization)


def test_the_tokens_are_kept_encrypted(browser: Browser, app: Flask) -> None:
    browser.simulator.web_user(openid="o-tokens")
    browser.log_in()
    openid, access_token, refresh_token, scope = kept(app, "o-tokens")
    assert (openid, scope) == ("o-tokens", "snsapi_userinfo")
    assert access_token != refresh_token
    with app.app_context():
        row = database.session.get_one(Identity, (WEB_APP_ID, "o-tokens")).authorization_encrypted
    assert row is not None
    assert access_token not in row
    assert refresh_token not in row


def test_an_access_token_that_ends_in_mid_login_is_refreshed_once(browser: Browser, app: Flask) -> None:
    browser.simulator.web_user(openid="o-ends")
    browser.simulator.fault("errcode", path=USERINFO, errcode=42001)
    assert browser.log_in().status_code == 302
    assert len(browser.simulator.calls(REFRESH)) == 1
    assert len(browser.simulator.calls(USERINFO)) == 2


def test_a_wechat_that_always_calls_the_access_token_old_is_asked_twice(browser: Browser) -> None:
    browser.simulator.fault("errcode", times=100, path=USERINFO, errcode=42001)
    assert browser.log_in().status_code == 502
    assert len(browser.simulator.calls(USERINFO)) == 2


def holds(browser: Browser) -> bool:
    return browser.get("/api/v1/auth/wechat").get_json()["data"]["valid"]


def test_whether_what_was_granted_still_holds_is_asked_of_wechat(browser: Browser, app: Flask) -> None:
    browser.simulator.web_user(openid="o-granted")
    browser.log_in()
    assert holds(browser)
    before = kept(app, "o-granted")
    browser.simulator.travel(7201)
    browser.simulator.fault("slow", path="/sns/auth", seconds=1)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(holds, browser)
        wait_until(lambda: len(browser.simulator.calls("/sns/auth")) > 1)
        assert app.extensions["database"].pool.checkedout() == 0  # no transaction waits for WeChat
        assert answer.result()
    after = kept(app, "o-granted")
    assert before[1] != after[1]  # the access token was refreshed, and is kept
    assert before[2] == after[2]
    browser.simulator.travel(31 * 86400)
    assert not holds(browser)


def test_a_refreshed_token_does_not_replace_that_of_a_later_login(
    browser: Browser, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser.simulator.web_user(openid="o-later")
    browser.log_in()
    later = json.dumps(["o-later", "later", "later", "snsapi_userinfo"])

    def log_in_meanwhile(self: WebApp, authorization: Authorization) -> tuple[bool, Authorization]:
        with app.app_context():
            database.session.get_one(Identity, (WEB_APP_ID, "o-later")).authorization = later
            database.session.commit()
        return True, authorization._replace(access_token="refreshed")

    monkeypatch.setattr(WebApp, "is_valid", log_in_meanwhile)
    assert holds(browser)
    assert json.dumps(kept(app, "o-later")) == later


def test_an_answer_for_somebody_else_logs_nobody_in(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Transport.call

    def call_for_another(self: Transport, path: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        answer = call(self, path, *arguments, **options)
        return {**answer, "openid": "o-another"} if path == USERINFO else answer

    monkeypatch.setattr(Transport, "call", call_for_another)
    assert browser.log_in().status_code == 502
    assert browser.me() is None


def test_a_unionid_that_only_userinfo_tells_counts(
    browser: Browser, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator, call = browser.simulator, Transport.call
    login = client.post("/api/v1/auth/wechat", json={"code": simulator.code(openid="o-mini-2", unionid="u-two")})
    simulator.web_user(openid="o-web-2", unionid="u-two")

    def call_without(self: Transport, path: str, *arguments: Any, **options: Any) -> dict[str, Any]:
        answer = call(self, path, *arguments, **options)
        return {name: value for name, value in answer.items() if (path, name) != (TOKEN, "unionid")}

    monkeypatch.setattr(Transport, "call", call_without)
    browser.log_in()
    assert (browser.me() or {})["id"] == login.get_json()["data"]["user"]["id"]


def test_an_openid_that_wechat_knows_no_more_grants_nothing(browser: Browser) -> None:
    browser.log_in()
    browser.simulator.fault("errcode", path="/sns/auth", errcode=40003)
    assert not holds(browser)
    assert holds(browser)


def test_what_was_granted_to_an_app_that_is_ours_no_more_does_not_hold(
    browser: Browser, make_app: Callable[..., Flask], app: Flask
) -> None:
    browser.log_in()
    other = make_app(WECHAT_ACCOUNT_APP_ID="wx-other", SECRET_KEY=app.config["SECRET_KEY"])
    elsewhere = Browser(other, browser.simulator)
    elsewhere.client._cookies = browser.client._cookies
    assert not holds(elsewhere)


def test_tokens_and_codes_of_the_web_are_in_no_log_line(browser: Browser, app: Flask, log_lines: Any) -> None:
    browser.simulator.web_user(openid="o-logged")
    url = browser.simulator.sign_in_on_the_web(browser.begin())
    browser.come_back(url)
    browser.simulator.fault("errcode", path=USERINFO, errcode=40003)
    browser.log_in()
    logged = json.dumps(log_lines())
    for secret in (*kept(app, "o-logged")[1:3], query_of(url)["code"], query_of(url)["state"]):
        assert secret not in logged
