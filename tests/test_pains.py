"""The twelve most common problems of WeChat back ends, which this one does not have: a test for each."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import func, select
from werkzeug.test import TestResponse

from dev.redis_server import RedisServer
from storage.database import engine_for
from storage.models import User
from tests.harness import (
    APP_SECRET,
    WAIT_SECONDS,
    WEB_APP_ID,
    WEB_APP_SECRET,
    Service,
    Simulator,
    bearer,
    wait_until,
)

LOGIN, ME, MESSAGES = "/api/v1/auth/wechat", "/api/v1/users/me", "/api/v1/wechat/messages"
STABLE_TOKEN, GET_PHONE = "/cgi-bin/stable_token", "/wxa/business/getuserphonenumber"


def log_in(client: FlaskClient, simulator: Simulator, **wanted: Any) -> dict[str, str]:
    """Log in, and return the headers that say so."""
    answer = client.post(LOGIN, json={"code": simulator.code(**wanted)})
    return bearer(answer.get_json()["data"]["token"])


def put_phone(client: FlaskClient, headers: dict[str, str], **body: str) -> TestResponse:
    return client.put(f"{ME}/phone", json=body, headers=headers)


def encrypted_phone(simulator: Simulator, openid: str) -> dict[str, str]:
    data = {"phoneNumber": "13812345678", "purePhoneNumber": "13812345678", "countryCode": "86"}
    made = simulator.user_data(openid, data)
    return {name: made[name] for name in ("encryptedData", "iv")}


def test_1_several_workers_do_not_invalidate_each_others_access_token(
    services: tuple[Service, Service], simulator: Simulator
) -> None:
    token = services[0].log_in(simulator, openid="o-alice")

    def call(number: int) -> int:
        code = simulator.phone_code(openid="o-alice")
        return services[number % 2].call("PUT", "/users/me/phone", token, json={"code": code}).status_code

    simulator.fault("slow", path=STABLE_TOKEN, seconds=0.5)
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(call, range(32))) == {200}
        simulator.drop_access_token()
        assert set(pool.map(call, range(32))) == {200}
    assert len(simulator.calls(STABLE_TOKEN)) == 2


def test_2_data_decrypts_after_another_login_replaced_the_key(client: FlaskClient, simulator: Simulator) -> None:
    phone = log_in(client, simulator, openid="o-alice")
    stale = encrypted_phone(simulator, "o-alice")
    log_in(client, simulator, openid="o-alice")  # on a tablet
    assert put_phone(client, phone, **encrypted_phone(simulator, "o-alice")).status_code == 200
    refused = put_phone(client, phone, **stale)
    assert (refused.status_code, refused.get_json()["code"]) == (409, 463)  # not 401: a new login would not help
    assert "重新点按钮获取" in refused.get_json()["message"]


def test_3_a_token_that_is_always_rejected_is_not_retried_for_ever(client: FlaskClient, simulator: Simulator) -> None:
    alice = log_in(client, simulator, openid="o-alice")
    simulator.fault("errcode", times=1000, path=GET_PHONE, errcode=40001)
    assert put_phone(client, alice, code="any").get_json()["code"] == 520
    assert len(simulator.calls(GET_PHONE)) == 2


def test_4_a_double_tap_gets_the_same_response_twice(services: tuple[Service, Service], simulator: Simulator) -> None:
    code = simulator.code()
    simulator.fault("slow", seconds=2)

    def log_in(service: Service) -> requests.Response:
        return requests.post(service.url + LOGIN, json={"code": code}, timeout=WAIT_SECONDS)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(log_in, services)
    assert first.status_code == second.status_code == 200
    assert first.content == second.content
    assert len(simulator.calls()) == 1


def test_5_login_needs_no_access_token(client: FlaskClient, simulator: Simulator) -> None:
    simulator.fault("errcode", times=1000, path=STABLE_TOKEN, errcode=45009)
    assert client.get(ME, headers=log_in(client, simulator)).status_code == 200
    assert simulator.calls(STABLE_TOKEN) == []


def test_6_a_push_that_is_not_signed_by_wechat_is_refused(
    services: tuple[Service, Service], simulator: Simulator
) -> None:
    url = services[0].url + MESSAGES
    event = {"MsgType": "event", "Event": "user_authorization_revoke", "OpenID": "o-alice"}
    assert simulator.verify_push(url=url)["verified"]
    assert simulator.push(event, url=url)[0]["status"] == 200
    for forged in ({"mode": "plain"}, {"signature": "0" * 40}, {"timestamp": 1714036504}, {"app_id": "wx-other"}):
        assert {answer["status"] for answer in simulator.push(event, url=url, **forged)} == {400}, forged


def test_7_a_login_code_sent_as_the_phone_code_is_recognised(client: FlaskClient, simulator: Simulator) -> None:
    alice = log_in(client, simulator, openid="o-alice")
    answer = put_phone(client, alice, code=simulator.code(openid="o-alice")).get_json()
    assert answer["code"] == 460
    assert "getPhoneNumber" in answer["message"]


def test_8_wx_request_keeps_no_cookies_and_needs_none(client: FlaskClient, simulator: Simulator) -> None:
    answer = client.get(ME, headers=log_in(client, simulator))
    assert answer.status_code == 200
    assert "Set-Cookie" not in answer.headers


@pytest.mark.database
def test_9_fifty_first_logins_at_once_make_one_user_and_fifty_sessions(
    services: tuple[Service, Service], simulator: Simulator, environ: dict[str, str]
) -> None:
    def log_in(number: int) -> str:
        return services[number % 2].log_in(simulator, openid="o-pain-9")

    with ThreadPoolExecutor(50) as pool:
        tokens = set(pool.map(log_in, range(50)))
        users = [answer.json()["data"]["id"] for answer in pool.map(services[0].read_me, tokens)]
    assert len(tokens) == 50
    assert len(set(users)) == 1
    engine = engine_for(environ["DATABASE_URL"])
    with engine.connect() as connection:
        assert connection.scalar(select(func.count()).where(User.openid == "o-pain-9")) == 1
    engine.dispose()


def test_10_a_redis_outage_does_not_burn_the_token_quota(
    make_app: Callable[..., Flask], simulator: Simulator, own_redis: RedisServer
) -> None:
    client = make_app(REDIS_URL=own_redis.url).test_client(use_cookies=False)
    alice = log_in(client, simulator, openid="o-alice")

    def call() -> int:
        return put_phone(client, alice, code=simulator.phone_code(openid="o-alice")).status_code

    assert call() == 200
    own_redis.stop()
    assert {call() for _ in range(10)} == {503}
    own_redis.start()
    wait_until(lambda: call() == 200)
    assert len(simulator.calls(STABLE_TOKEN)) == 1


def test_11_no_session_key_token_or_secret_is_in_a_log_line_or_a_response(
    client: FlaskClient, simulator: Simulator, environ: dict[str, str], journal: Any
) -> None:
    alice = log_in(client, simulator, openid="o-alice")
    phone_code, login_code = simulator.phone_code(openid="o-alice", phone="13812345678"), simulator.code()
    profile = simulator.user_data("o-alice", {"openId": "o-alice", "nickName": "阿上", "avatarUrl": ""})
    answers = [
        put_phone(client, alice, code=phone_code),
        put_phone(client, alice, code=login_code),
        put_phone(client, alice, **encrypted_phone(simulator, "o-alice")),
        client.put(f"{ME}/profile", json=profile, headers=alice),
        client.put(f"{ME}/profile", json={**profile, "signature": "0" * 40}, headers=alice),
        client.get(LOGIN, headers=alice),
    ]
    for kind in ("errcode", "http_500", "not_json", "close"):
        simulator.fault(kind, times=2, path=GET_PHONE, errcode=40013)
        answers.append(put_phone(client, alice, code=simulator.phone_code()))
    secrets = {alice["Authorization"].split()[1], phone_code, login_code}
    secrets |= {profile["encryptedData"], profile["signature"]}
    secrets |= {environ["SECRET_KEY"], environ["ENCRYPTION_KEYS"], *simulator.secrets()}
    journal.secrets |= secrets  # which then looks for them in the log lines
    bodies = "".join(answer.text for answer in answers)
    assert "138****5678" in bodies
    assert [secret for secret in {*secrets, APP_SECRET, WEB_APP_SECRET, "13812345678"} if secret in bodies] == []


@pytest.mark.database
@pytest.mark.parametrize("web_first", [False, True])
def test_12_an_openid_means_nothing_without_its_app(
    client: FlaskClient, app: Flask, simulator: Simulator, web_first: bool
) -> None:
    openid, browser, site = f"o-pain-12-{web_first}", app.test_client(), "https://localhost"

    def on_the_web() -> int:
        simulator.web_user(openid=openid)
        query = {"scope": "snsapi_userinfo"}
        away = browser.get(f"{LOGIN}/authorize", query_string=query, base_url=site).headers["Location"]
        assert WEB_APP_ID in away
        browser.get(simulator.sign_in_on_the_web(away).removeprefix(site), base_url=site)
        return browser.get(ME, base_url=site).get_json()["data"]["id"]

    def in_the_mini_program() -> int:
        return client.get(ME, headers=log_in(client, simulator, openid=openid)).get_json()["data"]["id"]

    logins = (on_the_web, in_the_mini_program) if web_first else (in_the_mini_program, on_the_web)
    first, second = (login() for login in logins)
    assert first != second
