import json
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask

from errors import ApiError, Code
from tests.harness import Simulator, counted
from wechat.client import Client, is_identifier, phone_number

CHECKSESSION, PHONE = "/wxa/checksession", "/wxa/business/getuserphonenumber"
CHECK, SEND, TOKEN = "/wxa/msg_sec_check", "/cgi-bin/message/subscribe/send", "/cgi-bin/stable_token"
IMAGE = "/wxa/getwxacodeunlimit"
MALFORMED_LOGIN = "openid or session_key missing or malformed"
PHONE_INFO = {"phoneNumber": "13812345678", "purePhoneNumber": "13812345678", "countryCode": "86"}


@pytest.fixture
def client(app: Flask) -> Client:
    return app.extensions["wechat"].client


def code_of(call: Callable[[], Any]) -> Code:
    """The code with which a call fails."""
    with pytest.raises(ApiError) as caught:
        call()
    return caught.value.api_code


def test_a_code_yields_an_openid_and_a_session_key(client: Client, simulator: Simulator) -> None:
    session = client.code_to_session(simulator.code(openid="o-alice", unionid="u-alice"))
    assert (session.openid, session.unionid) == ("o-alice", "u-alice")
    assert session.session_key == simulator.session_key("o-alice")


@pytest.mark.parametrize("name", ["o-1,o-2", "", "o 1", "o" * 65, "ö", "o\n", None, 5])
def test_invalid_openids(name: object) -> None:
    assert not is_identifier(name)
    assert is_identifier("oGZUI0egBJY1zhBYw2KhdUfwVJJE")


def test_login_takes_no_access_token(client: Client, simulator: Simulator) -> None:
    client.code_to_session(simulator.code())
    (call,) = simulator.calls()
    assert (call["path"], call["parameters"]) == ("/sns/jscode2session", ["appid", "grant_type", "js_code", "secret"])


def test_unknown_expired_and_used_codes_have_different_codes(client: Client, simulator: Simulator) -> None:
    assert code_of(lambda: client.code_to_session("0unknown")) is Code.WECHAT_CODE_INVALID
    assert code_of(lambda: client.code_to_session(simulator.code(expires_in=-1))) is Code.WECHAT_CODE_INVALID
    code = simulator.code()
    client.code_to_session(code)
    assert code_of(lambda: client.code_to_session(code)) is Code.WECHAT_CODE_USED


def test_a_wrong_app_id_or_secret_needs_an_operator(make_app: Callable[..., Flask], simulator: Simulator) -> None:
    for different in ({"WECHAT_APP_ID": "wx-other"}, {"WECHAT_APP_SECRET": "other"}):
        client = make_app(**different).extensions["wechat"].client
        assert code_of(lambda: client.code_to_session(simulator.code())) is Code.WECHAT_REFUSED  # noqa: B023
        assert code_of(lambda: client.is_risky("text", "o-alice")) is Code.WECHAT_REFUSED  # noqa: B023


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({}, MALFORMED_LOGIN),
        ({"openid": "o-alice", "errcode": 0, "errmsg": "ok"}, MALFORMED_LOGIN),
        ({"openid": "o-alice", "session_key": 5}, MALFORMED_LOGIN),
        ({"openid": 1, "session_key": "k"}, MALFORMED_LOGIN),
        ({"openid": "\ud800", "session_key": "k"}, MALFORMED_LOGIN),
        ({"openid": "o" * 65, "session_key": "k"}, MALFORMED_LOGIN),
        ({"openid": "o", "session_key": "k", "unionid": 5}, "malformed unionid"),
    ],
)
def test_malformed_login_response_is_502_and_its_field_names_are_logged(
    client: Client, monkeypatch: pytest.MonkeyPatch, log_lines: Any, answer: dict[str, Any], reason: str
) -> None:
    answer_with(client, monkeypatch, answer)
    assert code_of(lambda: client.code_to_session("0code")) is Code.UPSTREAM_INVALID
    names = ", ".join(sorted(answer)) or "none"
    assert log_lines()[-1]["reason"] == f"{reason}; fields received: {names}"


def answer_with(client: Client, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]) -> None:
    monkeypatch.setattr(
        client._transport, "_exchange", lambda *_: (200, "application/json", json.dumps(answer).encode())
    )


def test_wechat_decides_whether_a_session_key_is_valid(client: Client, simulator: Simulator) -> None:
    first = client.code_to_session(simulator.code(openid="o-alice"))
    assert client.is_session_key_valid("o-alice", first.session_key)
    second = client.code_to_session(simulator.code(openid="o-alice"))
    assert not client.is_session_key_valid("o-alice", first.session_key)
    assert client.is_session_key_valid("o-alice", second.session_key)
    assert not client.is_session_key_valid("o-bob", second.session_key)
    (call, *_) = simulator.calls(CHECKSESSION)
    assert call["parameters"] == ["access_token", "openid", "sig_method", "signature"]


@pytest.mark.parametrize(
    ("wanted", "number"),
    [
        ({"phone": "13812345678"}, "13812345678"),
        ({"phone": "13812345678", "country_code": 86}, "13812345678"),
        ({"phone": "2025550123", "country_code": "1"}, "+12025550123"),
    ],
)
def test_a_phone_code_yields_a_number(
    client: Client, simulator: Simulator, wanted: dict[str, Any], number: str
) -> None:
    for _ in range(2):  # the country code comes as a string and as a number in turn
        code = simulator.phone_code(openid="o-alice", **wanted)
        assert client.code_to_phone(code, "o-alice") == number


def test_a_phone_code_belongs_to_one_user_and_works_once(client: Client, simulator: Simulator) -> None:
    code = simulator.phone_code(openid="o-alice")
    assert code_of(lambda: client.code_to_phone(code, "o-bob")) is Code.WECHAT_CODE_INVALID
    assert client.code_to_phone(code, "o-alice")
    assert code_of(lambda: client.code_to_phone(code, "o-alice")) is Code.WECHAT_CODE_INVALID
    assert code_of(lambda: client.code_to_phone(simulator.code(), "o-alice")) is Code.WECHAT_CODE_INVALID


@pytest.mark.parametrize(
    ("different", "number"),
    [
        ({}, "13812345678"),
        ({"countryCode": 86}, "13812345678"),
        ({"phoneNumber": "85213812345678", "countryCode": 852}, "+85213812345678"),
        ({"countryCode": None}, None),
        ({"countryCode": True}, None),
        ({"countryCode": {}}, None),
        ({"purePhoneNumber": None}, None),
        ({"purePhoneNumber": "138 1234"}, None),
        ({"purePhoneNumber": "１３８１２３４５６７８"}, None),
        ({"phoneNumber": "1" * 16, "purePhoneNumber": "1" * 16}, None),
        ({"purePhoneNumber": ["13812345678"]}, None),
        ({"phoneNumber": None}, None),
        ({"phoneNumber": "13987654321"}, None),
    ],
)
def test_phone_numbers(different: dict[str, Any], number: str | None) -> None:
    assert phone_number({**PHONE_INFO, **different}) == number


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"phone_info": None},
        {"phone_info": PHONE_INFO},
        {"phone_info": {**PHONE_INFO, "watermark": {"appid": "wx-other"}}},
    ],
)
def test_a_response_without_a_phone_number_for_our_app_is_invalid(
    client: Client, simulator: Simulator, monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any]
) -> None:
    monkeypatch.setattr(client._access_token, "get", lambda **_: "token")
    answer_with(client, monkeypatch, answer)
    assert code_of(lambda: client.code_to_phone("code", "o-alice")) is Code.UPSTREAM_INVALID


@pytest.mark.parametrize(("text", "risky"), [("你好", False), ("可疑", False), ("违禁", True)])
def test_wechat_decides_which_text_is_risky(client: Client, simulator: Simulator, text: str, risky: bool) -> None:
    client.code_to_session(simulator.code(openid="o-alice"))
    assert client.is_risky(text, "o-alice", nickname="某人") is risky


def test_the_author_of_a_text_must_have_visited_recently(client: Client, simulator: Simulator) -> None:
    assert code_of(lambda: client.is_risky("text", "o-nobody")) is Code.SESSION_KEY_STALE


def test_a_subscribe_message_needs_a_subscription_and_43101_is_not_a_failure(
    client: Client, simulator: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    client.code_to_session(simulator.code(openid="o-alice"))
    simulator.accept("o-alice", "T-paid")
    data = {"thing1": "一杯茶", "amount2": "¥8.00"}
    assert client.send_subscribe_message("o-alice", "T-paid", data, page="pages/orders/index?id=7", lang="zh_CN")
    (sent,) = simulator.subscribe_messages()
    assert sent["data"] == {"thing1": {"value": "一杯茶"}, "amount2": {"value": "¥8.00"}}
    assert (sent["page"], sent["lang"]) == ("pages/orders/index?id=7", "zh_CN")
    assert "miniprogram_state" not in sent
    caplog.clear()
    assert not client.send_subscribe_message("o-alice", "T-paid", data)
    assert not [record for record in caplog.records if record.name.startswith("wechat")]


def test_an_invalid_subscribe_message_is_a_failure(client: Client, simulator: Simulator) -> None:
    client.code_to_session(simulator.code(openid="o-alice"))
    assert code_of(lambda: client.send_subscribe_message("o-alice", "T-none", {})) is Code.UPSTREAM_INVALID


def test_a_subscribe_message_is_not_sent_twice_if_the_response_is_lost(client: Client, simulator: Simulator) -> None:
    client.code_to_session(simulator.code(openid="o-alice"))
    simulator.accept("o-alice", "T-paid")
    simulator.fault("close", path=SEND)
    assert code_of(lambda: client.send_subscribe_message("o-alice", "T-paid", {})) is Code.UNAVAILABLE
    assert len(simulator.calls(SEND)) == 1


def test_any_interface_can_be_called(client: Client, simulator: Simulator) -> None:
    image = client.call(IMAGE, body={"scene": "id=7", "page": "pages/orders/index"})
    assert image[:4] == b"\xff\xd8\xff\xdb"  # a JPEG, unchanged
    assert image[-2:] == b"\xff\xd9"
    link = client.call("/wxa/generate_urllink", body={"path": "/pages/orders/index", "query": "id=7"})
    assert link["url_link"].startswith("https://wxaurl.cn/")
    client.code_to_session(simulator.code(openid="o-alice"))
    message = {"touser": "o-alice", "msgtype": "text", "text": {"content": "您的订单已发货"}}
    assert client.call("/cgi-bin/message/custom/send", body=message, idempotent=False)["errcode"] == 0
    assert simulator.customer_messages() == [message]
    with_query = {"openid": "o-alice", "signature": "0", "sig_method": "hmac_sha256"}
    assert client.call(CHECKSESSION, with_query, expected={87009})["errcode"] == 87009


def test_token_is_replaced_once_for_an_image(client: Client, simulator: Simulator) -> None:
    body = {"scene": "id=7"}
    client.call(IMAGE, body=body)
    simulator.drop_access_token()
    assert isinstance(client.call(IMAGE, body=body), bytes)
    assert len(simulator.calls(IMAGE)) == 3
    simulator.fault("errcode", times=100, errcode=40001, path=IMAGE)
    assert code_of(lambda: client.call(IMAGE, body=body)) is Code.UPSTREAM_INVALID
    assert len(simulator.calls(IMAGE)) == 5


def test_error_instead_of_an_image(client: Client, simulator: Simulator, log_lines: Any) -> None:
    before = counted("wechat_calls_total", interface=IMAGE, errcode="41030", outcome="failure")
    assert code_of(lambda: client.call(IMAGE, body={"scene": "id=7", "page": "/pages"})) is Code.UPSTREAM_INVALID
    assert log_lines()[-1]["reason"].startswith("errcode 41030: invalid page, rid: ")
    assert counted("wechat_calls_total", interface=IMAGE, errcode="41030", outcome="failure") == before + 1
    for kind in ("http_500", "not_json"):
        simulator.fault(kind, path=IMAGE)
        assert code_of(lambda: client.call(IMAGE, body={"scene": "id=7"})) is Code.UPSTREAM_INVALID


@pytest.mark.parametrize(
    ("status", "content_type", "content", "outcome"),
    [
        (200, "image/png", b"\x89PNG", b"\x89PNG"),
        (200, "video/mp4", b"\xff", b"\xff"),
        (200, "image/jpeg", b'{"errcode": 45009, "errmsg": "quota"}', Code.UNAVAILABLE),
        (200, "image/jpeg", b'{"errcode": 0}', {"errcode": 0}),
        (500, "image/png", b"\x89PNG", Code.UPSTREAM_INVALID),
        (200, "text/html", b"\xff", Code.UPSTREAM_INVALID),
        (200, "", b"\xff", Code.UPSTREAM_INVALID),
    ],
)
def test_media_is_told_from_errors(
    client: Client,
    simulator: Simulator,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    content_type: str,
    content: bytes,
    outcome: Any,
) -> None:
    monkeypatch.setattr(client._access_token, "get", lambda **_: "token")
    monkeypatch.setattr(client._transport, "_exchange", lambda *_: (status, content_type, content))
    if isinstance(outcome, Code):
        assert code_of(lambda: client.call(IMAGE)) is outcome
    else:
        assert client.call(IMAGE) == outcome
    if isinstance(outcome, bytes):  # where only JSON will do
        assert code_of(lambda: client.is_risky("text", "o-alice")) is Code.UPSTREAM_INVALID


def test_too_large_an_image_is_an_error(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.call(IMAGE, body={"scene": "id=7"})
    monkeypatch.setattr("wechat.transport.MAXIMUM_ANSWER_BYTES", 100)
    assert code_of(lambda: client.call(IMAGE, body={"scene": "id=7"})) is Code.UPSTREAM_INVALID


@pytest.mark.parametrize("errcode", [40001, 40014, 42001])
def test_an_invalid_access_token_is_replaced_and_the_call_repeated_once(
    client: Client, simulator: Simulator, errcode: int
) -> None:
    client.code_to_session(simulator.code(openid="o-alice"))
    client.is_risky("warm", "o-alice")
    simulator.fault("errcode", errcode=errcode, path=CHECK)
    assert client.is_risky("违禁", "o-alice")  # the body went along the second time
    assert len(simulator.calls(CHECK)) == 3


def test_a_token_that_wechat_always_rejects_costs_two_calls_per_request(client: Client, simulator: Simulator) -> None:
    simulator.fault("errcode", times=100, errcode=40001, path=CHECK)
    for number in range(1, 6):
        assert code_of(lambda: client.is_risky("text", "o-alice")) is Code.UPSTREAM_INVALID
        assert len(simulator.calls(CHECK)) == 2 * number
    assert len(simulator.calls(TOKEN)) <= 4  # and WeChat is not asked for a token again and again
