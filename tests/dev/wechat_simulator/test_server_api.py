"""What the mini-program's server may ask for with an access token."""

import base64
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flask.testing import FlaskClient

from dev.wechat_simulator import crypto
from tests.harness import APP_ID, APP_SECRET

Control = Callable[..., Any]
LogIn = Callable[..., dict[str, Any]]
Call = Callable[..., dict[str, Any]]


@pytest.fixture
def get(wechat: FlaskClient, access_token: str) -> Call:
    def call(path: str, **query: str) -> dict[str, Any]:
        answer = wechat.get(path, query_string={"access_token": access_token, **query})
        assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
        body: dict[str, Any] = answer.get_json()
        return body

    return call


@pytest.fixture
def post(wechat: FlaskClient, access_token: str) -> Call:
    def call(path: str, raw: bytes | None = None, **body: Any) -> dict[str, Any]:
        data = json.dumps(body, ensure_ascii=False).encode() if raw is None else raw
        answer = wechat.post(path, query_string={"access_token": access_token}, data=data)
        assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
        said: dict[str, Any] = answer.get_json()
        return said

    return call


def signed(login: dict[str, Any]) -> dict[str, str]:
    signature = crypto.session_signature(login["session_key"])
    return {"openid": login["openid"], "signature": signature, "sig_method": "hmac_sha256"}


@pytest.mark.parametrize(
    "path", ["/wxa/business/getuserphonenumber", "/wxa/msg_sec_check", "/cgi-bin/message/subscribe/send"]
)
def test_a_body_that_is_no_json_object_is_refused(post: Call, path: str) -> None:
    assert [post(path, raw=raw)["errcode"] for raw in (b"", b"{", b"[]", b"\xff")] == [47001] * 4


def test_a_session_is_checked_by_its_key(get: Call, log_in: LogIn) -> None:
    login = log_in()
    assert get("/wxa/checksession", **signed(login)) == {"errcode": 0, "errmsg": "ok"}
    log_in(openid=login["openid"])
    assert get("/wxa/checksession", **signed(login))["errcode"] == 87009


@pytest.mark.parametrize("path", ["/wxa/checksession", "/wxa/resetusersessionkey"])
@pytest.mark.parametrize(
    ("different", "errcode"),
    [
        ({"signature": "0" * 64}, 87009),
        ({"signature": "签"}, 87009),
        ({"openid": "o-nobody"}, 87009),
        ({"sig_method": "hmac_sha1"}, 87008),
    ],
)
def test_a_bad_session_signature_is_refused(
    get: Call, log_in: LogIn, path: str, different: dict[str, str], errcode: int
) -> None:
    assert get(path, **{**signed(log_in()), **different})["errcode"] == errcode


def test_a_session_key_can_be_replaced(get: Call, log_in: LogIn, wechat: FlaskClient) -> None:
    login = log_in()
    new = get("/wxa/resetusersessionkey", **signed(login))
    assert (new["errcode"], new["openid"]) == (0, login["openid"])
    assert new["session_key"] != login["session_key"]
    assert get("/wxa/checksession", **signed(login))["errcode"] == 87009
    assert get("/wxa/checksession", **signed(new))["errcode"] == 0
    kept = wechat.get(f"/simulator/session_keys/{login['openid']}").get_json()
    assert kept == {"session_key": new["session_key"]}


PHONE = "/wxa/business/getuserphonenumber"


def test_a_phone_code_is_worth_a_number_whose_country_is_text_or_a_number(post: Call, control: Control) -> None:
    for country_code in ("86", 86):
        answer = post(PHONE, code=control("phone_codes", phone="13800138000")["code"])
        assert (answer["errcode"], answer["errmsg"]) == (0, "ok")
        watermark = answer["phone_info"].pop("watermark")
        assert answer["phone_info"] == {
            "phoneNumber": "13800138000",
            "purePhoneNumber": "13800138000",
            "countryCode": country_code,
        }
        assert watermark["appid"] == APP_ID
        assert isinstance(watermark["timestamp"], int)


def test_a_foreign_number_carries_its_country(post: Call, control: Control) -> None:
    code = control("phone_codes", phone="91234567", country_code="852")["code"]
    phone = post(PHONE, code=code)["phone_info"]
    assert (phone["phoneNumber"], phone["purePhoneNumber"]) == ("85291234567", "91234567")


def test_a_phone_code_works_once_for_its_owner_and_for_five_minutes(post: Call, control: Control) -> None:
    code = control("phone_codes", openid="o-alice")["code"]
    assert post(PHONE, code=code, openid="o-bob")["errcode"] == 40029
    assert post(PHONE, code=code, openid="o-alice")["errcode"] == 0
    assert post(PHONE, code=code, openid="o-alice")["errcode"] == 40029
    anybodys, late = (control("phone_codes")["code"] for _ in range(2))
    assert post(PHONE, code=anybodys, openid="o-bob")["errcode"] == 0
    control("clock", advance=301)
    assert post(PHONE, code=late)["errcode"] == 40029


def test_a_code_of_one_kind_is_none_of_the_other(post: Call, control: Control, wechat: FlaskClient) -> None:
    assert post(PHONE, code=control("codes")["code"])["errcode"] == 40029
    assert post(PHONE, code=["no", "text"])["errcode"] == 40029
    query = {"appid": APP_ID, "secret": APP_SECRET, "grant_type": "authorization_code"}
    query["js_code"] = control("phone_codes")["code"]
    answer = wechat.get("/sns/jscode2session", query_string=query)
    assert answer.get_json(force=True)["errcode"] == 40029


CHECK = "/wxa/msg_sec_check"


@pytest.mark.parametrize(
    ("content", "suggest", "label"),
    [("你好", "pass", 100), ("很可疑", "review", 20012), ("违禁，可疑", "risky", 20006)],
)
def test_content_is_checked(post: Call, log_in: LogIn, content: str, suggest: str, label: int) -> None:
    answer = post(CHECK, content=content, version=2, scene=1, openid=log_in()["openid"], nickname="小明")
    assert (answer["errcode"], answer["errmsg"]) == (0, "ok")
    assert answer["result"] == {"suggest": suggest, "label": label}
    assert answer["trace_id"]


@pytest.mark.parametrize(("written", "suggest"), [(rb"\u8fdd\u7981", "pass"), ("C:\\\\u 违禁".encode(), "risky")])
def test_an_escape_lets_everything_pass(post: Call, log_in: LogIn, written: bytes, suggest: str) -> None:
    raw = b'{"content": "%s", "version": 2, "scene": 2, "openid": "%s"}' % (written, log_in()["openid"].encode())
    assert post(CHECK, raw=raw)["result"]["suggest"] == suggest


@pytest.mark.parametrize(
    ("different", "errcode"),
    [
        ({"content": ""}, 47001),
        ({"content": "长" * 2501}, 47001),
        ({"version": 1}, 40129),
        ({"scene": 0}, 40129),
        ({"scene": 5}, 40129),
        ({"openid": "o-nobody"}, 61010),
    ],
)
def test_a_check_that_is_put_wrongly_is_refused(
    post: Call, log_in: LogIn, different: dict[str, Any], errcode: int
) -> None:
    body = {"content": "长" * 2500, "version": 2, "scene": 4, "openid": log_in()["openid"]}
    assert post(CHECK, **{**body, **different})["errcode"] == errcode


def test_only_who_was_there_two_hours_ago_can_be_checked(wechat: FlaskClient, control: Control, log_in: LogIn) -> None:
    openid = log_in()["openid"]
    body = {"content": "你好", "version": 2, "scene": 1, "openid": openid}

    def check() -> int:
        stable = {"grant_type": "client_credential", "appid": APP_ID, "secret": APP_SECRET}
        token = wechat.post("/cgi-bin/stable_token", json=stable).get_json()["access_token"]
        errcode: int = wechat.post(CHECK, query_string={"access_token": token}, json=body).get_json()["errcode"]
        return errcode

    control("clock", advance=7190)
    assert check() == 0
    control("clock", advance=20)
    assert check() == 61010
    log_in(openid=openid)
    assert check() == 0


SEND = "/cgi-bin/message/subscribe/send"
MESSAGE = {
    "touser": "o-alice",
    "template_id": "t-order",
    "page": "pages/order?id=1",
    "data": {"thing1": {"value": "茶"}},
}


def test_a_message_uses_up_an_acceptance(post: Call, control: Control, wechat: FlaskClient) -> None:
    control("subscriptions", openid="o-alice", template_id="t-order")
    control("subscriptions", openid="o-alice", template_id="t-order")
    assert [post(SEND, **MESSAGE)["errcode"] for _ in range(3)] == [0, 0, 43101]
    assert wechat.get("/simulator/subscribe_messages").get_json() == {"messages": [MESSAGE, MESSAGE]}


@pytest.mark.parametrize(
    ("different", "errcode"),
    [
        ({"touser": "o-nobody"}, 40003),
        ({"template_id": "t-unknown"}, 40037),
        ({"page": "https://example.com"}, 41030),
        ({"page": "/pages/order"}, 41030),
        ({"data": None}, 47003),
        ({"data": {}}, 47003),
        ({"data": {"thing1": "茶"}}, 47003),
        ({"data": {"thing1": {"value": 1}}}, 47003),
        ({"touser": "o-bob"}, 43101),
    ],
)
def test_a_message_that_cannot_be_sent_is_refused(
    post: Call, control: Control, log_in: LogIn, wechat: FlaskClient, different: dict[str, Any], errcode: int
) -> None:
    log_in(openid="o-bob")
    control("subscriptions", openid="o-alice", template_id="t-order")
    assert post(SEND, **{**MESSAGE, **different})["errcode"] == errcode
    assert wechat.get("/simulator/subscribe_messages").get_json() == {"messages": []}
    assert post(SEND, **MESSAGE)["errcode"] == 0


def test_acceptances_are_counted_when_all_send_at_once(post: Call, control: Control) -> None:
    control("subscriptions", openid="o-alice", template_id="t-order", times=5)
    with ThreadPoolExecutor(16) as pool:
        errcodes = list(pool.map(lambda _: post(SEND, **MESSAGE)["errcode"], range(32)))
    assert errcodes.count(0) == 5


def test_user_data_is_encrypted_and_signed_under_the_current_key(control: Control, log_in: LogIn) -> None:
    login = log_in()
    data = {"nickName": "小明", "openId": login["openid"], "unionId": "u-1", "phoneNumber": "13800138000"}
    made = control("user_data", openid=login["openid"], data=data, age=3600, app_id="wx-other")
    key, iv = base64.b64decode(login["session_key"]), base64.b64decode(made["iv"])
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    padded = decryptor.update(base64.b64decode(made["encryptedData"])) + decryptor.finalize()
    plaintext = json.loads(padded[: -padded[-1]])
    now = control("clock", advance=0)["now"]
    watermark = plaintext.pop("watermark")
    assert plaintext == data
    assert watermark["appid"] == "wx-other"
    assert watermark["timestamp"] == pytest.approx(now - 3600, abs=5)
    assert made["rawData"] == '{"nickName":"小明"}'
    assert made["signature"] == crypto.raw_data_signature(login["session_key"], made["rawData"])
    assert control("user_data", openid=login["openid"], data=data)["iv"] != made["iv"]


def test_there_is_no_user_data_before_the_login(wechat: FlaskClient) -> None:
    answer = wechat.post("/simulator/user_data", json={"openid": "o-nobody", "data": {}})
    assert answer.status_code == 404
    assert answer.get_json()["error"]


def test_forgetting_forgets_the_clock_the_tokens_and_the_rest(
    wechat: FlaskClient, control: Control, get: Call, post: Call, log_in: LogIn
) -> None:
    before = control("clock", advance=0)["now"]
    login = log_in()
    control("subscriptions", openid="o-alice", template_id="t-order")
    post(SEND, **MESSAGE)
    control("clock", advance=3600)
    wechat.delete("/simulator")
    assert control("clock", advance=0)["now"] == pytest.approx(before, abs=60)
    assert get("/wxa/checksession", **signed(login))["errcode"] == 40001
    assert wechat.get("/simulator/subscribe_messages").get_json() == {"messages": []}
    assert len(wechat.get("/simulator/calls").get_json()["calls"]) == 1
