import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from flask import Flask
from flask.testing import FlaskClient
from redis import Redis
from sqlalchemy import select

from storage import database, wechat_session_keys
from storage.models import User
from tests.harness import APP_ID, APP_SECRET, Simulator, bearer

LOGIN = "/api/v1/auth/wechat"


def test_logging_in_answers_a_token_its_lifetime_and_the_user(client: FlaskClient, simulator: Simulator) -> None:
    answer = client.post(LOGIN, json={"code": simulator.code()})
    assert answer.status_code == 200
    body = answer.get_json()
    assert (body["code"], body["message"]) == (200, "操作成功")
    assert set(body["data"]) == {"token", "expires_in", "user"}
    assert body["data"]["expires_in"] == 3600
    assert (
        client.get("/api/v1/users/me", headers=bearer(body["data"]["token"])).get_json()["data"] == body["data"]["user"]
    )


def test_a_session_is_not_promised_for_longer_than_it_can_last(
    make_app: Callable[..., Flask], simulator: Simulator
) -> None:
    app = make_app(SESSION_ABSOLUTE_LIFETIME="60")
    answer = app.test_client().post(LOGIN, json={"code": simulator.code()})
    assert answer.get_json()["data"]["expires_in"] == 60


def test_a_browser_that_logs_in_gets_the_token_in_a_cookie_too(client: FlaskClient, simulator: Simulator) -> None:
    answer = client.post(LOGIN, json={"code": simulator.code()})
    cookie = answer.headers["Set-Cookie"].split(";")[0]
    assert cookie == f"session={answer.get_json()['data']['token']}"
    again = client.post(LOGIN, json={"code": simulator.code()}, headers=bearer("one-that-has-expired"))
    assert again.status_code == 200
    assert "Set-Cookie" not in again.headers


def test_the_unionid_is_kept(app: Flask, client: FlaskClient, simulator: Simulator) -> None:
    for wanted, kept in ({}, None), ({"unionid": "u-alice"}, "u-alice"), ({}, "u-alice"):
        code = simulator.code(openid="o-with-unionid", **wanted)
        assert client.post(LOGIN, json={"code": code}).status_code == 200
        with app.app_context():
            user = database.session.scalars(select(User).where(User.openid == "o-with-unionid")).one()
            assert user.unionid == kept


def test_client_code_in_the_field_works_as_it_stands(client: FlaskClient, simulator: Simulator) -> None:
    answer = client.post("/api/auth/wechat", data=json.dumps({"code": simulator.code()}))
    assert answer.request.content_type is None
    assert answer.status_code == 200
    assert answer.get_json()["data"]["token"]


def test_the_same_openid_is_the_same_user_at_each_login(client: FlaskClient, simulator: Simulator) -> None:
    def user_id(openid: str) -> int:
        return client.post(LOGIN, json={"code": simulator.code(openid=openid)}).get_json()["data"]["user"]["id"]

    assert user_id("o-alice") == user_id("o-alice")
    assert user_id("o-alice") != user_id("o-ALICE")


def test_a_double_tap_shares_one_call_and_one_answer(client: FlaskClient, simulator: Simulator, redis: Redis) -> None:
    code = simulator.code()
    simulator.fault("slow", seconds=0.5)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.post(LOGIN, json={"code": code}), range(4)))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.data for answer in answers}) == 1
    assert len(simulator.calls()) == 1
    assert len(redis.keys("session:*")) == 1


def test_a_code_that_comes_again_later_gets_461(client: FlaskClient, simulator: Simulator, redis: Redis) -> None:
    code = simulator.code()
    assert client.post(LOGIN, json={"code": code}).status_code == 200
    again = client.post(LOGIN, json={"code": code})
    assert (again.status_code, again.get_json()["code"]) == (400, 461)
    (mark,) = redis.keys("login:*:pause")
    assert 290 < redis.ttl(mark) <= 300  # then WeChat itself no longer takes the code
    assert len(simulator.calls()) == 1


def test_a_login_that_failed_can_be_tried_again_with_the_same_code(client: FlaskClient, simulator: Simulator) -> None:
    code = simulator.code()
    simulator.fault("errcode", times=2, errcode=-1)
    assert client.post(LOGIN, json={"code": code}).get_json()["code"] == 503
    assert client.post(LOGIN, json={"code": code}).status_code == 200


@pytest.mark.parametrize(
    ("errcode", "status", "number"),
    [
        (-1, 503, 503),
        (40029, 400, 460),
        (40163, 400, 461),
        (40226, 403, 462),
        (41002, 502, 520),
        (41004, 502, 520),
        (41008, 400, 460),
        (40013, 502, 520),
        (40125, 502, 520),
        (40164, 502, 520),
        (45009, 503, 503),
        (45011, 503, 503),
        (48001, 502, 520),
        (99999, 502, 502),
    ],
)
def test_each_errcode_that_login_can_meet_answers_its_code(
    client: FlaskClient, simulator: Simulator, errcode: int, status: int, number: int
) -> None:
    simulator.fault("errcode", times=2, errcode=errcode)
    answer = client.post(LOGIN, json={"code": simulator.code()})
    assert (answer.status_code, answer.get_json()["code"]) == (status, number)
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert "rid" not in answer.text


@pytest.mark.parametrize(("kind", "status"), [("slow", 504), ("http_500", 502), ("not_json", 502), ("close", 503)])
def test_each_fault_of_wechat_answers_its_code_within_the_timeout(
    client: FlaskClient, simulator: Simulator, kind: str, status: int
) -> None:
    simulator.fault(kind, times=2, seconds=5)
    started = time.monotonic()
    answer = client.post(LOGIN, json={"code": simulator.code()})
    assert (answer.status_code, answer.get_json()["code"]) == (status, status)
    assert time.monotonic() - started < 4.5


@pytest.mark.parametrize(
    "code", [None, 1, "", " ", [], {}, True, "has space", "new\nline", "tail\n", "x" * 129, "中文", "\x00"]
)
def test_what_cannot_be_a_code_is_refused_without_asking_wechat(
    client: FlaskClient, simulator: Simulator, code: Any
) -> None:
    answer = client.post(LOGIN, json={"code": code})
    assert (answer.status_code, answer.get_json()["code"]) == (400, 400)
    assert list(answer.get_json()["data"]["errors"]) == ["code"]
    assert simulator.calls() == []


def test_a_code_adds_no_parameter_to_the_call(client: FlaskClient, simulator: Simulator) -> None:
    answer = client.post(LOGIN, json={"code": "x&openid=o-alice#?%26"})
    assert answer.get_json()["code"] == 460
    assert simulator.calls()[0]["parameters"] == ["appid", "grant_type", "js_code", "secret"]


@pytest.mark.parametrize("path", ["/api/v1/auth/session", "/api/v1/auth/sessions"])
def test_logging_out_needs_a_session(client: FlaskClient, path: str) -> None:
    answer = client.delete(path)
    assert (answer.status_code, answer.get_json()["code"]) == (401, 401)


def test_whether_the_session_key_holds_is_asked_of_wechat(client: FlaskClient, simulator: Simulator) -> None:
    def log_in() -> dict[str, str]:
        answer = client.post(LOGIN, json={"code": simulator.code(openid="o-alice")})
        return bearer(answer.get_json()["data"]["token"])

    phone = log_in()
    assert client.get(LOGIN, headers=phone).get_json()["data"] == {"valid": True}
    code = simulator.code(openid="o-alice")
    requests.get(  # a login on another device that never came to us
        f"{simulator.url}/sns/jscode2session",
        {"appid": APP_ID, "secret": APP_SECRET, "js_code": code, "grant_type": "authorization_code"},
        timeout=5,
    )
    assert client.get(LOGIN, headers=phone).get_json()["data"] == {"valid": False}
    tablet = log_in()
    assert [client.get(LOGIN, headers=device).get_json()["data"] for device in (phone, tablet)] == [{"valid": True}] * 2


def test_a_session_key_that_is_gone_does_not_hold_and_wechat_need_not_be_asked(
    client: FlaskClient, simulator: Simulator, token: str, redis: Redis
) -> None:
    redis.delete(*redis.scan_iter("user:*:session_keys"))
    assert client.get(LOGIN, headers=bearer(token)).get_json()["data"] == {"valid": False}
    assert simulator.calls("/wxa/checksession") == []


def test_two_logins_of_a_user_at_once_leave_the_session_key_that_counts(
    client: FlaskClient, simulator: Simulator, app: Flask
) -> None:
    for _ in range(10):
        codes = [simulator.code(openid="o-alice") for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            logins = list(pool.map(lambda code: client.post(LOGIN, json={"code": code}).get_json()["data"], codes))
        with app.app_context():
            assert simulator.session_key("o-alice") in wechat_session_keys.newest(logins[0]["user"]["id"])
        assert client.get(LOGIN, headers=bearer(logins[0]["token"])).get_json()["data"] == {"valid": True}


CLOUD_RUN = {"X-WX-OPENID": "o-cloud", "X-WX-APPID": APP_ID, "X-WX-SOURCE": "wx_client"}


def test_what_anybody_can_type_into_x_wx_openid_is_ignored(client: FlaskClient, token: str) -> None:
    assert client.get("/api/v1/users/me", headers=CLOUD_RUN).status_code == 401
    mine = client.get("/api/v1/users/me", headers=bearer(token)).get_json()
    assert client.get("/api/v1/users/me", headers={**bearer(token), **CLOUD_RUN}).get_json() == mine


def test_behind_wechat_cloud_run_the_header_says_who_calls(
    make_app: Callable[..., Flask], simulator: Simulator
) -> None:
    client = make_app(TRUST_WXCLOUD_HEADERS="true").test_client(use_cookies=False)
    user = client.get("/api/v1/users/me", headers=CLOUD_RUN).get_json()["data"]
    login = client.post(LOGIN, json={"code": simulator.code(openid="o-cloud")}).get_json()["data"]
    assert user["id"] == login["user"]["id"]
    other = client.post(LOGIN, json={"code": simulator.code()}).get_json()["data"]
    answer = client.get("/api/v1/users/me", headers={**bearer(other["token"]), **CLOUD_RUN})
    assert answer.get_json()["data"]["id"] == other["user"]["id"]  # a session of ours comes first
    for different in (
        {"X-WX-APPID": "wx-other"},
        {"X-WX-OPENID": ""},
        {"X-WX-OPENID": "o" * 65},
        {"X-WX-UNIONID": " "},
    ):
        answer = client.get("/api/v1/users/me", headers={**CLOUD_RUN, **different})
        assert answer.status_code == 401, different
    assert client.get("/api/v1/users/me").status_code == 401
