"""The simulator says what WeChat says, byte for byte where a client could stumble."""

import json
import time
from typing import Any

import pytest
import requests

from dev.wechat_simulator import create_simulator
from tests.harness import APP_ID, APP_SECRET, Simulator


def redeem(simulator: Simulator, code: str, **different: str | None) -> requests.Response:
    parameters = {"appid": APP_ID, "secret": APP_SECRET, "js_code": code, "grant_type": "authorization_code"}
    return requests.get(f"{simulator.url}/sns/jscode2session", params={**parameters, **different}, timeout=5)


def test_success_is_json_that_says_it_is_text_with_errcode_or_without(simulator: Simulator) -> None:
    seen = set()
    for _ in range(2):
        answer = redeem(simulator, simulator.code(openid="o-alice"))
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/plain")
        body = json.loads(answer.content.decode())
        assert body["openid"] == "o-alice"
        assert body.get("errcode", 0) == 0
        seen.add("errcode" in body)
    assert seen == {True, False}


def test_each_login_replaces_the_session_key(simulator: Simulator) -> None:
    keys = [redeem(simulator, simulator.code(openid="o-alice")).json()["session_key"] for _ in range(3)]
    assert len(set(keys)) == 3
    assert simulator.session_key("o-alice") == keys[-1]


def test_without_a_wish_each_code_is_somebody_else(simulator: Simulator) -> None:
    answers = [requests.post(f"{simulator.url}/simulator/codes", timeout=5) for _ in range(2)]
    first, second = (redeem(simulator, answer.json()["code"]).json()["openid"] for answer in answers)
    assert first != second
    assert len(first) == 28


def test_a_code_lives_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    client = create_simulator(APP_ID, APP_SECRET).test_client()
    codes = [client.post("/simulator/codes").get_json()["code"] for _ in range(2)]
    parameters = {"appid": APP_ID, "secret": APP_SECRET, "grant_type": "authorization_code"}
    now = time.time()
    for code, age, errcode in ((codes[0], 299, 0), (codes[1], 301, 40029)):
        monkeypatch.setattr(time, "time", lambda age=age: now + age)
        answer = client.get("/sns/jscode2session", query_string={**parameters, "js_code": code})
        assert json.loads(answer.data).get("errcode", 0) == errcode


def test_a_wish_is_read_whatever_curl_calls_its_body(simulator: Simulator) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = requests.post(f"{simulator.url}/simulator/codes", '{"openid": "o-alice"}', headers=form, timeout=5)
    assert redeem(simulator, answer.json()["code"]).json()["openid"] == "o-alice"


@pytest.mark.parametrize(
    ("different", "errcode"),
    [
        ({"appid": None}, 41002),
        ({"secret": None}, 41004),
        ({"js_code": None}, 41008),
        ({"grant_type": "client_credential"}, 40002),
        ({"appid": "wx-other"}, 40013),
        ({"secret": "other"}, 40125),
        ({"js_code": "unknown"}, 40029),
    ],
)
def test_errors_are_http_200_with_errcode_and_a_request_id(
    simulator: Simulator, different: dict[str, Any], errcode: int
) -> None:
    answer = redeem(simulator, simulator.code(), **different)
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/plain")
    assert answer.json()["errcode"] == errcode
    assert ", rid: " in answer.json()["errmsg"]


def test_a_code_works_once(simulator: Simulator) -> None:
    code = simulator.code()
    assert "openid" in redeem(simulator, code).json()
    assert redeem(simulator, code).json()["errcode"] == 40163


def test_faults_spoil_the_next_calls_and_no_more(simulator: Simulator) -> None:
    simulator.fault("errcode", times=2, errcode=-1)
    code = simulator.code()
    assert [redeem(simulator, code).json().get("errcode", 0) for _ in range(3)] == [-1, -1, 0]


def test_each_kind_of_fault_is_what_it_says(simulator: Simulator) -> None:
    simulator.fault("http_500")
    assert redeem(simulator, "x").status_code == 500
    simulator.fault("not_json")
    with pytest.raises(ValueError, match="Expecting value"):
        redeem(simulator, "x").json()
    simulator.fault("close")
    with pytest.raises(requests.ConnectionError):
        redeem(simulator, "x")
    simulator.fault("slow", seconds=0.3)
    started = time.monotonic()
    redeem(simulator, "x")
    assert time.monotonic() - started >= 0.3
    simulator.fault("trickle", seconds=0.5)
    started = time.monotonic()
    assert redeem(simulator, "x").content.strip() == b""
    assert time.monotonic() - started >= 0.5


@pytest.mark.parametrize(
    "fault", [{}, {"path": "/sns/jscode2session", "kind": "odd"}, {"path": "/odd", "kind": "slow"}]
)
def test_a_fault_that_could_never_happen_is_refused(simulator: Simulator, fault: dict[str, str]) -> None:
    assert requests.post(f"{simulator.url}/simulator/faults", json=fault, timeout=5).status_code == 400


def test_the_harness_steers_the_server_api(simulator: Simulator) -> None:
    def post(path: str, **body: Any) -> dict[str, Any]:
        query = {"access_token": simulator.access_token()}
        answer: dict[str, Any] = requests.post(simulator.url + path, params=query, json=body, timeout=5).json()
        return answer

    stable = {"grant_type": "client_credential", "appid": APP_ID, "secret": APP_SECRET}
    assert simulator.access_token() is None
    first = post("/cgi-bin/stable_token", **stable)["access_token"]
    assert simulator.access_token() == first
    simulator.drop_access_token()
    assert post("/cgi-bin/stable_token", **stable)["access_token"] != first
    message = {"touser": "o-alice", "template_id": "t-order", "data": {"thing1": {"value": "茶"}}}
    simulator.accept("o-alice", "t-order", times=2)
    assert post("/cgi-bin/message/subscribe/send", **message)["errcode"] == 0
    assert simulator.subscribe_messages() == [message]
    simulator.fault("errcode", path="/wxa/business/getuserphonenumber", errcode=-1)
    code = simulator.phone_code(phone="13800138000")
    answers = [post("/wxa/business/getuserphonenumber", code=code) for _ in range(2)]
    assert [answer["errcode"] for answer in answers] == [-1, 0]
    assert [call["parameters"] for call in simulator.calls("/wxa/business/getuserphonenumber")] == [
        ["access_token"]
    ] * 2
    redeem(simulator, simulator.code(openid="o-alice"))
    assert simulator.user_data("o-alice", {"nickName": "小明"})["rawData"] == '{"nickName":"小明"}'
    simulator.travel(7200)
    assert simulator.access_token() is None
