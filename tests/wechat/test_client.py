import json
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from errors import ApiError, Code
from tests.harness import Simulator
from wechat.client import Client, is_identifier, phone_number

CHECKSESSION, PHONE = "/wxa/checksession", "/wxa/business/getuserphonenumber"
CHECK, SEND, TOKEN = "/wxa/msg_sec_check", "/cgi-bin/message/subscribe/send", "/cgi-bin/stable_token"
IMAGE = "/wxa/getwxacodeunlimit"
PHONE_INFO = {"phoneNumber": "13812345678", "purePhoneNumber": "13812345678", "countryCode": "86"}


@pytest.fixture
def client(app: Flask) -> Client:
    return app.extensions["wechat"]


@pytest.fixture
def alice(client: Client, simulator: Simulator) -> str:
    """The openid of a user who has just visited."""
    return client.code_to_session(simulator.code(openid="o-alice"))[0]


def code_of(call: Callable[[], Any]) -> Code:
    """The code with which a call fails."""
    with pytest.raises(ApiError) as caught:
        call()
    return caught.value.api_code


def test_a_code_yields_a_session_without_an_access_token(client: Client, simulator: Simulator) -> None:
    session = client.code_to_session(simulator.code(openid="o-alice", unionid="u-alice"))
    assert session == ("o-alice", simulator.session_key("o-alice"), "u-alice")
    (call,) = simulator.calls()
    assert (call["path"], call["parameters"]) == ("/sns/jscode2session", ["appid", "grant_type", "js_code", "secret"])


@pytest.mark.parametrize("name", ["o-1,o-2", "", "o 1", "o" * 65, "ö", "o\n", None, 5])
def test_invalid_openids(name: object) -> None:
    assert not is_identifier(name)
    assert is_identifier("oGZUI0egBJY1zhBYw2KhdUfwVJJE")


def test_unknown_expired_and_used_codes_have_different_codes(client: Client, simulator: Simulator) -> None:
    assert code_of(lambda: client.code_to_session("0unknown")) is Code.WECHAT_CODE_INVALID
    assert code_of(lambda: client.code_to_session(simulator.code(expires_in=-1))) is Code.WECHAT_CODE_INVALID
    code = simulator.code()
    client.code_to_session(code)
    assert code_of(lambda: client.code_to_session(code)) is Code.WECHAT_CODE_USED


def test_a_wrong_app_id_or_secret_needs_an_operator(make_app: Callable[..., Flask], simulator: Simulator) -> None:
    for different in ({"WECHAT_APP_ID": "wx-other"}, {"WECHAT_APP_SECRET": "other"}):
        client = make_app(**different).extensions["wechat"]
        assert code_of(lambda: client.code_to_session(simulator.code())) is Code.WECHAT_REFUSED  # noqa: B023
        assert code_of(lambda: client.is_risky("text", "o-alice")) is Code.WECHAT_REFUSED  # noqa: B023


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"openid": "o-alice", "errcode": 0, "errmsg": "ok"},
        {"openid": "o-alice", "session_key": 5},
        {"openid": "o" * 65, "session_key": "k"},
        {"openid": "o", "session_key": "k", "unionid": 5},
    ],
)
def test_malformed_login_response_is_502_and_its_field_names_are_logged(
    client: Client, monkeypatch: pytest.MonkeyPatch, log_lines: Any, answer: dict[str, Any]
) -> None:
    answer_with(client, monkeypatch, answer)
    assert code_of(lambda: client.code_to_session("0code")) is Code.UPSTREAM_INVALID
    problem = "malformed unionid" if "unionid" in answer else "openid or session_key missing or malformed"
    assert log_lines()[-1]["reason"] == f"{problem}; fields received: {', '.join(sorted(answer)) or 'none'}"


def answer_with(client: Client, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]) -> None:
    monkeypatch.setattr(
        client.transport, "_exchange", lambda *_: (200, "application/json", json.dumps(answer).encode())
    )


def test_wechat_decides_whether_a_session_key_is_valid(client: Client, simulator: Simulator) -> None:
    _, first, _ = client.code_to_session(simulator.code(openid="o-alice"))
    assert client.is_session_key_valid("o-alice", first)
    _, second, _ = client.code_to_session(simulator.code(openid="o-alice"))
    assert not client.is_session_key_valid("o-alice", first)
    assert client.is_session_key_valid("o-alice", second)
    assert not client.is_session_key_valid("o-bob", second)
    for errcode in (40003, 87007):
        simulator.fault("errcode", path=CHECKSESSION, errcode=errcode)
        assert not client.is_session_key_valid("o-alice", second)
    (call, *_) = simulator.calls(CHECKSESSION)
    assert call["parameters"] == ["access_token", "openid", "sig_method", "signature"]


def test_a_phone_code_yields_a_number_for_its_user_once(client: Client, simulator: Simulator) -> None:
    code = simulator.phone_code(openid="o-alice", phone="2025550123", country_code="1")
    assert code_of(lambda: client.code_to_phone(code, "o-bob")) is Code.WECHAT_CODE_INVALID
    assert client.code_to_phone(code, "o-alice") == "+12025550123"
    for invalid in (code, simulator.code()):  # used, and of wx.login
        assert code_of(lambda: client.code_to_phone(invalid, "o-alice")) is Code.WECHAT_CODE_INVALID  # noqa: B023


def test_phone_numbers() -> None:
    assert phone_number(PHONE_INFO) == phone_number({**PHONE_INFO, "countryCode": 86}) == "13812345678"
    abroad = {**PHONE_INFO, "phoneNumber": "85213812345678", "countryCode": 852}
    assert phone_number(abroad) == "+85213812345678"
    for name, invalid in {
        "countryCode": [None, True, {}],
        "purePhoneNumber": [None, "138 1234", "１３８１２３４５６７８", ["13812345678"]],
        "phoneNumber": [None, "13987654321"],
    }.items():
        assert [phone_number({**PHONE_INFO, name: value}) for value in invalid] == [None] * len(invalid)
    assert phone_number({**PHONE_INFO, "phoneNumber": "1" * 16, "purePhoneNumber": "1" * 16}) is None


@pytest.mark.parametrize("info", [None, PHONE_INFO, {**PHONE_INFO, "watermark": {"appid": "wx-other"}}])
def test_a_response_without_a_phone_number_for_our_app_is_invalid(
    client: Client, monkeypatch: pytest.MonkeyPatch, info: dict[str, Any] | None
) -> None:
    monkeypatch.setattr(client._access_token, "get", lambda **_: "token")
    answer_with(client, monkeypatch, {"phone_info": info})
    assert code_of(lambda: client.code_to_phone("code", "o-alice")) is Code.UPSTREAM_INVALID


def test_wechat_decides_which_text_of_a_recent_visitor_is_risky(
    client: Client, simulator: Simulator, alice: str
) -> None:
    texts = ("你好", "可疑", "违禁")
    assert [client.is_risky(text, alice, nickname="某人") for text in texts] == [False, False, True]
    with pytest.raises(ApiError) as caught:
        client.is_risky("text", "o-nobody")
    assert caught.value.api_code is Code.SESSION_KEY_STALE
    assert "wx.login" in str(caught.value.message)  # decrypted data has nothing to do with it
    simulator.fault("errcode", path=CHECK, errcode=87014)
    assert code_of(lambda: client.is_risky("text", alice)) is Code.CONTENT_REFUSED


def test_a_subscribe_message_needs_a_subscription_and_43101_is_not_a_failure(
    client: Client, simulator: Simulator, alice: str, caplog: pytest.LogCaptureFixture
) -> None:
    simulator.accept(alice, "T-paid")
    data = {"thing1": "一杯茶", "amount2": "¥8.00"}
    assert client.send_subscribe_message(alice, "T-paid", data, page="pages/orders/index?id=7", lang="zh_CN")
    (sent,) = simulator.subscribe_messages()
    assert sent["data"] == {"thing1": {"value": "一杯茶"}, "amount2": {"value": "¥8.00"}}
    assert (sent["page"], sent["lang"]) == ("pages/orders/index?id=7", "zh_CN")
    assert "miniprogram_state" not in sent
    caplog.clear()
    assert not client.send_subscribe_message(alice, "T-paid", data)
    assert not [record for record in caplog.records if record.name.startswith("wechat")]


def test_an_invalid_or_lost_subscribe_message_is_not_sent_twice(
    client: Client, simulator: Simulator, alice: str
) -> None:
    assert code_of(lambda: client.send_subscribe_message(alice, "T-none", {})) is Code.INTERNAL_ERROR
    simulator.fault("close", path=SEND)
    assert code_of(lambda: client.send_subscribe_message(alice, "T-paid", {})) is Code.UNAVAILABLE
    assert len(simulator.calls(SEND)) == 2


def test_any_interface_can_be_called(client: Client, simulator: Simulator, alice: str) -> None:
    image = client.call(IMAGE, body={"scene": "id=7", "page": "pages/orders/index"})
    assert (image[:4], image[-2:]) == (b"\xff\xd8\xff\xdb", b"\xff\xd9")  # a JPEG, unchanged
    link = client.call("/wxa/generate_urllink", body={"path": "/pages/orders/index", "query": "id=7"})
    assert link["url_link"].startswith("https://wxaurl.cn/")
    message = {"touser": alice, "msgtype": "text", "text": {"content": "您的订单已发货"}}
    assert client.call("/cgi-bin/message/custom/send", body=message, idempotent=False)["errcode"] == 0
    assert simulator.customer_messages() == [message]
    with_query = {"openid": alice, "signature": "0", "sig_method": "hmac_sha256"}
    assert client.call(CHECKSESSION, with_query, expected={87009})["errcode"] == 87009


@pytest.mark.parametrize(
    ("status", "content_type", "content", "outcome"),
    [
        (200, "image/png", b"\x89PNG", b"\x89PNG"),
        (200, "video/mp4", b"\xff", b"\xff"),
        (200, "image/jpeg", b'{"errcode": 45009, "errmsg": "quota"}', Code.UNAVAILABLE),
        (200, "application/json", b'{"errcode": 41030}', Code.INTERNAL_ERROR),
        (200, "image/jpeg", b'{"errcode": 0}', {"errcode": 0}),
        (500, "image/png", b"\x89PNG", Code.UPSTREAM_INVALID),
        (200, "text/html", b"\xff", Code.UPSTREAM_INVALID),
        (200, "", b"\xff", Code.UPSTREAM_INVALID),
    ],
)
def test_media_is_told_from_errors(
    client: Client, monkeypatch: pytest.MonkeyPatch, status: int, content_type: str, content: bytes, outcome: Any
) -> None:
    monkeypatch.setattr(client._access_token, "get", lambda **_: "token")
    monkeypatch.setattr(client.transport, "_exchange", lambda *_: (status, content_type, content))
    if isinstance(outcome, Code):
        assert code_of(lambda: client.call(IMAGE)) is outcome
    else:
        assert client.call(IMAGE) == outcome
    if isinstance(outcome, bytes):  # where only JSON will do
        assert code_of(lambda: client.is_risky("text", "o-alice")) is Code.UPSTREAM_INVALID


@pytest.mark.parametrize("errcode", [40001, 40014, 42001])
def test_an_invalid_access_token_is_replaced_and_the_call_repeated_once(
    client: Client, simulator: Simulator, alice: str, errcode: int
) -> None:
    client.is_risky("warm", alice)
    simulator.fault("errcode", errcode=errcode, path=CHECK)
    assert client.is_risky("违禁", alice)  # the body is sent the second time too
    simulator.fault("errcode", errcode=errcode, path=IMAGE)
    assert isinstance(client.call(IMAGE, body={"scene": "id=7"}), bytes)
    assert [len(simulator.calls(path)) for path in (CHECK, IMAGE)] == [3, 2]


def test_a_token_that_wechat_always_rejects_costs_two_calls_per_request(client: Client, simulator: Simulator) -> None:
    simulator.fault("errcode", times=100, errcode=40001, path=IMAGE)
    for number in range(1, 6):
        assert code_of(lambda: client.call(IMAGE, body={"scene": "id=7"})) is Code.WECHAT_REFUSED
        assert len(simulator.calls(IMAGE)) == 2 * number
    assert len(simulator.calls(TOKEN)) <= 4  # and WeChat is not asked for a token again and again
