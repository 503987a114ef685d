"""The access token of the server API: one pool, quotas, and what a bad one is answered with."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from dev.wechat_simulator import tokens
from tests.harness import WEB_APP_ID, WEB_APP_SECRET

Ask = Callable[..., TestResponse]
Control = Callable[..., Any]

TAKE_AN_ACCESS_TOKEN = [
    ("GET", "/wxa/checksession"),
    ("GET", "/wxa/resetusersessionkey"),
    ("POST", "/wxa/business/getuserphonenumber"),
    ("POST", "/wxa/msg_sec_check"),
    ("POST", "/cgi-bin/message/subscribe/send"),
]


def use(wechat: FlaskClient, token: str | None) -> int:
    """The errcode of a call that fails for another reason when the token is alive: 87008."""
    errcode: int = wechat.get("/wxa/checksession", query_string={"access_token": token}).get_json()["errcode"]
    return errcode


ALIVE = 87008


def test_the_answer_is_json_and_the_token_is_long(stable_token: Ask) -> None:
    answer = stable_token()
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert answer.get_json().keys() == {"access_token", "expires_in"}
    assert answer.get_json()["expires_in"] == 7200
    assert 300 <= len(answer.get_json()["access_token"]) <= 512


@pytest.mark.parametrize(
    ("different", "errcode"),
    [
        ({"appid": ""}, 41002),
        ({"secret": None}, 41004),
        ({"grant_type": "authorization_code"}, 40002),
        ({"appid": "wx-other"}, 40013),
        ({"appid": WEB_APP_ID, "secret": WEB_APP_SECRET}, 40013),
        ({"secret": "other"}, 40125),
    ],
)
def test_errors_are_http_200_with_errcode_and_a_request_id(
    stable_token: Ask, different: dict[str, Any], errcode: int
) -> None:
    answer = stable_token(**different)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert answer.get_json()["errcode"] == errcode
    assert ", rid: " in answer.get_json()["errmsg"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"grant_type=client_credential"])
def test_a_body_that_is_no_json_object_is_refused(wechat: FlaskClient, body: bytes) -> None:
    assert wechat.post("/cgi-bin/stable_token", data=body).get_json()["errcode"] == 47001


def test_a_token_is_the_same_until_five_minutes_before_its_end(
    stable_token: Ask, control: Control, wechat: FlaskClient
) -> None:
    old = stable_token().get_json()["access_token"]
    control("clock", advance=6890)
    again = stable_token().get_json()
    assert again["access_token"] == old
    assert 300 < again["expires_in"] <= 310
    control("clock", advance=11)
    new = stable_token().get_json()
    assert new["access_token"] != old
    assert new["expires_in"] == 7200
    assert (use(wechat, old), use(wechat, new["access_token"])) == (ALIVE, ALIVE)
    control("clock", advance=300)
    assert (use(wechat, old), use(wechat, new["access_token"])) == (42001, ALIVE)


def test_a_forced_refresh_kills_the_old_token_at_once(stable_token: Ask, wechat: FlaskClient) -> None:
    old = stable_token().get_json()["access_token"]
    new = stable_token(force_refresh=True).get_json()
    assert new["expires_in"] == 7200
    assert (use(wechat, old), use(wechat, new["access_token"])) == (40001, ALIVE)
    assert stable_token().get_json()["access_token"] == new["access_token"]


def test_forced_refreshes_are_thirty_seconds_apart_and_twenty_a_day(stable_token: Ask, control: Control) -> None:
    control("clock", advance=86400 - control("clock", advance=0)["now"] % 86400)  # 8 o'clock in Beijing
    current = stable_token(force_refresh=True).get_json()["access_token"]
    assert stable_token(force_refresh=True).get_json()["errcode"] == 45011
    assert stable_token().get_json()["access_token"] == current
    for _ in range(19):
        control("clock", advance=30)
        assert "errcode" not in stable_token(force_refresh=True).get_json()
    control("clock", advance=30)
    current = stable_token().get_json()["access_token"]
    assert stable_token(force_refresh=True).get_json()["errcode"] == 45009
    assert stable_token().get_json()["access_token"] == current
    control("clock", advance=86400)
    assert "errcode" not in stable_token(force_refresh=True).get_json()


def test_there_are_so_many_calls_a_minute_and_a_day(
    stable_token: Ask, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (tokens.CALLS_A_MINUTE, tokens.CALLS_A_DAY) == (10_000, 500_000)
    monkeypatch.setattr(tokens, "CALLS_A_MINUTE", 2)
    monkeypatch.setattr(tokens, "CALLS_A_DAY", 3)
    control("clock", advance=86400 - control("clock", advance=0)["now"] % 86400)
    assert [stable_token().get_json().get("errcode") for _ in range(3)] == [None, None, 45011]
    control("clock", advance=60)
    assert [stable_token().get_json().get("errcode") for _ in range(2)] == [None, 45009]
    control("clock", advance=86400)
    assert stable_token().get_json().get("errcode") is None


def test_all_who_ask_at_once_get_the_same_token(stable_token: Ask) -> None:
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: stable_token().get_json()["access_token"], range(64)))
    assert len(set(answers)) == 1


@pytest.mark.parametrize(("method", "path"), TAKE_AN_ACCESS_TOKEN)
@pytest.mark.parametrize(("token", "errcode"), [(None, 41001), ("", 41001), ("x" * 99, 40014), ("x" * 512, 40001)])
def test_a_bad_token_is_refused_before_all_else(
    wechat: FlaskClient, method: str, path: str, token: str | None, errcode: int
) -> None:
    answer = wechat.open(path, method=method, query_string={} if token is None else {"access_token": token})
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json; charset=utf-8")
    assert answer.get_json()["errcode"] == errcode


def test_the_token_can_be_seen_and_dropped(stable_token: Ask, wechat: FlaskClient, control: Control) -> None:
    nothing = {"access_token": None, "expires_in": None}
    assert wechat.get("/simulator/access_token").get_json() == nothing
    token = stable_token().get_json()["access_token"]
    assert wechat.get("/simulator/access_token").get_json()["access_token"] == token
    wechat.delete("/simulator/access_token")
    assert wechat.get("/simulator/access_token").get_json() == nothing
    assert use(wechat, token) == 40001
    assert stable_token().get_json()["access_token"] != token
    control("clock", advance=7200)
    assert wechat.get("/simulator/access_token").get_json() == nothing
