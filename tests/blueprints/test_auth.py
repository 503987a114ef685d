import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from flask import Flask
from flask.testing import FlaskClient
from redis import Redis
from sqlalchemy import select
from werkzeug.test import TestResponse

from storage import database, wechat_session_keys
from storage.models import User
from tests.blueprints.callers import API, Caller, code_of, data_of, invalid_fields, log_in, log_in_together
from tests.harness import APP_ID, APP_SECRET, Simulator, bearer, round_trips

LOGIN, ME = f"{API}/auth/wechat", f"{API}/users/me"


def post_code(client: FlaskClient, simulator: Simulator, **headers: str) -> TestResponse:
    return client.post(LOGIN, json={"code": simulator.code()}, headers=headers)


def is_valid(user: Caller) -> bool:
    return data_of(user.get("/auth/wechat"))["valid"]


def test_a_login_returns_a_token_its_lifetime_and_the_user(client: FlaskClient, simulator: Simulator) -> None:
    answer = post_code(client, simulator)
    assert (answer.status_code, answer.get_json()["code"], answer.get_json()["message"]) == (200, 200, "操作成功")
    login = answer.get_json()["data"]
    assert list(login) == ["token", "expires_in", "user"]
    assert login["expires_in"] == 3600
    assert data_of(client.get(ME, headers=bearer(login["token"]))) == login["user"]
    assert "Set-Cookie" not in answer.headers
    again = post_code(client, simulator, Authorization="Bearer expired")
    assert again.status_code == 200
    assert "Set-Cookie" not in again.headers


def test_an_openid_is_one_user_and_a_unionid_is_kept(app: Flask, simulator: Simulator) -> None:
    ids = set()
    for unionids, kept in ({}, None), ({"unionid": "u-alice"}, "u-alice"), ({}, "u-alice"):
        ids.add(data_of(log_in(app, simulator, "o-with-unionid", **unionids))["user"]["id"])
        with app.app_context():
            user = database.session.scalars(select(User).where(User.openid == "o-with-unionid")).one()
            assert user.unionid == kept
    assert len(ids) == 1
    assert data_of(log_in(app, simulator, "o-WITH-unionid"))["user"]["id"] not in ids


def test_client_code_in_the_field_works_unchanged(client: FlaskClient, simulator: Simulator) -> None:
    answer = client.post("/api/auth/wechat", data=json.dumps({"code": simulator.code()}))
    assert answer.request.content_type is None
    assert data_of(answer)["token"]


def test_simultaneous_logins_with_one_code_share_one_call(
    app: Flask, simulator: Simulator, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator.fault("slow", seconds=0.2)
    answers = log_in_together(app, simulator.code(), 4, monkeypatch)
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len({answer.data for answer in answers}) == 1
    assert len(simulator.calls()) == 1
    assert len(redis.keys("session:*")) == 1


def test_a_login_costs_seven_round_trips_to_redis(app: Flask, client: FlaskClient, simulator: Simulator) -> None:
    codes = [simulator.code(), simulator.code()]
    client.post(LOGIN, json={"code": codes[0]})  # Redis knows the script that releases a lock from now on
    with round_trips(app.extensions["redis"]) as count:
        assert client.post(LOGIN, json={"code": codes[1]}).status_code == 200
    assert count() == 7  # four for the code, and one each for the time, the session_key and the session


def expire_results(redis: Redis) -> None:
    """Do as Redis does five seconds after a call that succeeded."""
    (mark,) = redis.keys("login:*:used")
    result = mark.removesuffix(b":used")
    assert 0 < redis.pttl(result) <= 5000
    redis.delete(result)
    assert 240 < redis.ttl(mark) <= 300  # after that WeChat rejects the code


def test_a_code_sent_again_within_five_seconds_gets_the_same_response_and_later_461(
    app: Flask, make_app: Callable[..., Flask], simulator: Simulator, redis: Redis
) -> None:
    code = simulator.code()
    instances = [made.test_client(use_cookies=False) for made in (app, make_app(), app)]
    answers = [client.post(LOGIN, json={"code": code}) for client in instances]
    assert [(answer.status_code, answer.data) for answer in answers] == [(200, answers[0].data)] * 3
    expire_results(redis)
    assert [code_of(client.post(LOGIN, json={"code": code})) for client in instances] == [(400, 461)] * 3
    assert len(simulator.calls()) == 1
    assert len(redis.keys("session:*")) == 1
    assert instances[0].get(ME, headers=bearer(data_of(answers[0])["token"])).status_code == 200


def test_a_browser_that_sends_a_code_again_gets_the_same_cookie(app: Flask, simulator: Simulator) -> None:
    code, ours = simulator.code(), {"Sec-Fetch-Site": "same-origin"}
    answers = [app.test_client().post(LOGIN, json={"code": code}, headers=ours) for _ in range(2)]
    first, again = (answer.headers["Set-Cookie"].split(";")[0] for answer in answers)
    assert first == again == f"session={data_of(answers[0])['token']}"
    assert "Set-Cookie" not in app.test_client().post(LOGIN, json={"code": code}).headers


@pytest.mark.parametrize(
    ("end", "expected"),
    [("/auth/session", (400, 461)), ("/auth/sessions", (400, 461)), ("/users/me", (400, 461)), (None, (403, 403))],
)
def test_a_code_sent_again_begins_nothing_that_has_ended_meanwhile(
    client: FlaskClient, app: Flask, simulator: Simulator, end: str | None, expected: tuple[int, int], redis: Redis
) -> None:
    user = Caller(app, simulator)
    code = simulator.code(openid=user.openid)
    login = data_of(client.post(LOGIN, json={"code": code}))
    user.headers = bearer(login["token"])
    if end:
        assert user.delete(end).status_code == 200
    else:
        user.store(blocked=True)
    for headers in ({}, {"Sec-Fetch-Site": "same-origin"}):
        answer = client.post(LOGIN, json={"code": code}, headers=headers)
        assert code_of(answer) == expected
        assert login["token"] not in answer.text + str(answer.headers)
    assert user.get("/users/me").status_code == (401 if end else 403)


def test_a_code_can_be_sent_again_after_a_failed_login(client: FlaskClient, simulator: Simulator) -> None:
    code = simulator.code()
    simulator.fault("errcode", times=2, errcode=-1)
    assert client.post(LOGIN, json={"code": code}).get_json()["code"] == 503
    assert client.post(LOGIN, json={"code": code}).status_code == 200


ERRCODES = {
    (400, 460): [40029, 41008, 42003],
    (400, 461): [40163],
    (403, 462): [40226],
    (502, 502): [99999],
    (500, 500): [40002, 47001],
    (502, 520): [40001, 40013, 40125, 40164, 40243, 41002, 41004, 48001, 48004, 50002, 89503],
    (503, 503): [-1, 44990, 45009, 45011],
}


def test_each_errcode_of_a_login_has_its_code(client: FlaskClient, simulator: Simulator) -> None:
    for expected, errcodes in ERRCODES.items():
        for errcode in errcodes:
            simulator.forget()
            simulator.fault("errcode", times=2, errcode=errcode)
            answer = post_code(client, simulator)
            assert code_of(answer) == expected, errcode
            assert ("Retry-After" in answer.headers) == (answer.status_code == 503)
            assert "rid" not in answer.text


@pytest.mark.parametrize(("kind", "status"), [("slow", 504), ("http_500", 502), ("not_json", 502), ("close", 503)])
def test_each_fault_of_wechat_has_its_code(client: FlaskClient, simulator: Simulator, kind: str, status: int) -> None:
    simulator.fault(kind, times=2, seconds=6)
    assert code_of(post_code(client, simulator)) == (status, status)


def test_a_malformed_code_is_rejected_without_a_call(client: FlaskClient, simulator: Simulator) -> None:
    codes = [None, 1, "", " ", [], {}, True, "has space", "new\nline", "tail\n", "x" * 129, "中文", "\x00"]
    for code in codes:
        assert invalid_fields(client.post(LOGIN, json={"code": code})) == {"code"}, code
    assert simulator.calls() == []


def test_a_code_adds_no_parameter_to_the_call(client: FlaskClient, simulator: Simulator) -> None:
    assert client.post(LOGIN, json={"code": "x&openid=o-alice#?%26"}).get_json()["code"] == 460
    assert simulator.calls()[0]["parameters"] == ["appid", "grant_type", "js_code", "secret"]


def test_wechat_says_whether_the_session_key_is_valid(
    alice: Caller, app: Flask, simulator: Simulator, redis: Redis
) -> None:
    assert is_valid(alice)
    code = simulator.code(openid=alice.openid)
    requests.get(  # a login on another device that never reached the service
        f"{simulator.url}/sns/jscode2session",
        {"appid": APP_ID, "secret": APP_SECRET, "js_code": code, "grant_type": "authorization_code"},
        timeout=5,
    )
    assert not is_valid(alice)
    other_device = Caller(app, simulator, alice.openid)
    assert is_valid(alice)
    assert is_valid(other_device)
    calls = simulator.calls("/wxa/checksession")
    redis.delete(f"user:{alice.id}:session_keys")
    assert not is_valid(alice)
    assert simulator.calls("/wxa/checksession") == calls  # there is nothing to ask about


def test_simultaneous_logins_of_a_user_keep_the_session_key_that_is_valid(
    client: FlaskClient, simulator: Simulator, app: Flask
) -> None:
    for _ in range(10):
        codes = [simulator.code(openid="o-alice") for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            logins = list(pool.map(lambda code: client.post(LOGIN, json={"code": code}).get_json()["data"], codes))
        with app.app_context():
            assert simulator.session_key("o-alice") in wechat_session_keys.candidates(logins[0]["user"]["id"])
        assert data_of(client.get(LOGIN, headers=bearer(logins[0]["token"]))) == {"valid": True}


CLOUD_RUN = {"X-WX-OPENID": "o-cloud", "X-WX-APPID": APP_ID, "X-WX-SOURCE": "wx_client"}


def test_cloud_run_headers_are_ignored_by_default(client: FlaskClient, token: str) -> None:
    assert client.get(ME, headers=CLOUD_RUN).status_code == 401
    mine = client.get(ME, headers=bearer(token)).get_json()
    assert client.get(ME, headers={**bearer(token), **CLOUD_RUN}).get_json() == mine


def test_cloud_run_headers_name_the_user_if_they_are_trusted(
    make_app: Callable[..., Flask], simulator: Simulator
) -> None:
    app = make_app(TRUST_WXCLOUD_HEADERS="true")
    client = app.test_client(use_cookies=False)
    user = data_of(client.get(ME, headers=CLOUD_RUN))
    assert user["id"] == Caller(app, simulator, "o-cloud").id
    other = Caller(app, simulator)
    assert data_of(client.get(ME, headers={**other.headers, **CLOUD_RUN}))["id"] == other.id  # a session comes first
    for different in (
        {"X-WX-APPID": "wx-other"},
        {"X-WX-OPENID": ""},
        {"X-WX-OPENID": "o" * 65},
        {"X-WX-UNIONID": " "},
    ):
        assert client.get(ME, headers={**CLOUD_RUN, **different}).status_code == 401, different
    assert client.get(ME).status_code == 401
