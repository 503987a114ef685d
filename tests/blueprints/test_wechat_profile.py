import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import delete
from werkzeug.test import TestResponse

from blueprints.users import MINI_PROGRAM_LOGIN_REQUIRED
from blueprints.wechat_profile import PHONE_CODE_REQUIRED
from storage import database
from storage.models import Identity, User
from tests.harness import Simulator, bearer, wait_until

ME = "/api/v1/users/me"
PHONE, PROFILE = f"{ME}/phone", f"{ME}/profile"
GET_PHONE, CHECK = "/wxa/business/getuserphonenumber", "/wxa/msg_sec_check"
WECHAT_PROFILE = {
    "openId": "o-alice",
    "nickName": "阿上",
    "gender": 0,
    "language": "zh_CN",
    "city": "",
    "province": "",
    "country": "",
    "avatarUrl": "https://thirdwx.qlogo.cn/mmopen/vi_32/0/132",
}


class Caller:
    """Somebody who is logged in."""

    def __init__(self, client: FlaskClient, simulator: Simulator, openid: str) -> None:
        self.client, self.simulator, self.openid = client, simulator, openid
        self.log_in()

    def log_in(self) -> None:
        login = self.client.post("/api/v1/auth/wechat", json={"code": self.simulator.code(openid=self.openid)})
        self.headers = bearer(login.get_json()["data"]["token"])

    def put(self, path: str, body: Any) -> TestResponse:
        return self.client.put(path, json=body, headers=self.headers)

    def me(self) -> dict[str, Any]:
        return self.client.get(ME, headers=self.headers).get_json()["data"]

    def encrypted(self, data: dict[str, Any], **wanted: Any) -> dict[str, str]:
        return self.simulator.user_data(self.openid, data, **wanted)

    def encrypted_phone(self, phone: str = "13812345678", country: object = "86", **wanted: Any) -> dict[str, str]:
        data = {"phoneNumber": phone, "purePhoneNumber": phone, "countryCode": country}
        made = self.encrypted(data, **wanted)
        return {name: made[name] for name in ("encryptedData", "iv")}


@pytest.fixture
def alice(client: FlaskClient, simulator: Simulator, app: Flask) -> Caller:
    caller = Caller(client, simulator, "o-alice")
    caller.put(PROFILE, {"nickname": None, "avatar_url": None})
    with app.app_context():
        database.session.get_one(User, caller.me()["id"]).phone = None
        database.session.commit()
    return caller


def code_of(answer: TestResponse) -> tuple[int, int]:
    return answer.status_code, answer.get_json()["code"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer"}, {"Authorization": "Basic eDp5"}])
@pytest.mark.parametrize(("method", "path"), [("GET", ME), ("PUT", PHONE), ("PUT", PROFILE)])
def test_without_a_session_nobody_is_read_or_changed(
    client: FlaskClient, headers: dict[str, str], method: str, path: str
) -> None:
    assert code_of(client.open(path, method=method, headers=headers)) == (401, 401)


def test_the_session_of_a_user_who_is_gone_is_nobodys(app: Flask, alice: Caller) -> None:
    with app.app_context():
        database.session.delete(database.session.get_one(User, alice.me()["id"]))
        database.session.commit()
    assert code_of(alice.client.get(ME, headers=alice.headers)) == (401, 401)
    assert code_of(alice.put(PROFILE, {"nickname": "x"})) == (401, 401)


def test_a_phone_number_is_stored_from_a_phone_code_and_shown_masked(alice: Caller, app: Flask) -> None:
    answer = alice.put(PHONE, {"code": alice.simulator.phone_code(openid="o-alice", phone="13812345678")})
    assert code_of(answer) == (200, 200)
    assert answer.get_json()["data"]["phone"] == alice.me()["phone"] == "138****5678"
    assert "13812345678" not in answer.text
    with app.app_context():
        assert database.session.get_one(User, alice.me()["id"]).phone == "13812345678"


def test_wechat_is_told_whose_phone_code_it_should_be(alice: Caller) -> None:
    assert code_of(alice.put(PHONE, {"code": alice.simulator.phone_code(openid="o-bob")})) == (400, 460)
    assert alice.me()["phone"] is None


@pytest.mark.parametrize("wrong", ["a login code", "a used one", "an unknown one", "an old one"])
def test_a_phone_code_that_is_none_gets_a_message_that_says_which_is_wanted(alice: Caller, wrong: str) -> None:
    simulator = alice.simulator
    used = simulator.phone_code(openid="o-alice")
    alice.put(PHONE, {"code": used})
    code = {
        "a login code": simulator.code(openid="o-alice"),
        "a used one": used,
        "an unknown one": "unknown",
        "an old one": simulator.phone_code(openid="o-alice", expires_in=-1),
    }[wrong]
    answer = alice.put(PHONE, {"code": code})
    assert code_of(answer) == (400, 461 if wrong == "a used one" else 460)
    assert answer.get_json()["message"] == PHONE_CODE_REQUIRED.chinese
    assert "getPhoneNumber" in PHONE_CODE_REQUIRED.chinese


def test_a_double_tap_on_the_phone_button_gets_the_same_answer_twice(alice: Caller) -> None:
    alice.simulator.fault("slow", path=GET_PHONE, seconds=0.5)
    code = alice.simulator.phone_code(openid="o-alice", phone="13812345678")
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: alice.put(PHONE, {"code": code}), range(2)))
    assert [code_of(answer) for answer in answers] == [(200, 200)] * 2
    assert [answer.get_json()["data"]["phone"] for answer in answers] == ["138****5678"] * 2
    assert len(alice.simulator.calls(GET_PHONE)) == 1


def test_a_phone_code_that_somebody_else_took_is_not_shared_with_him(alice: Caller) -> None:
    bob = Caller(alice.client, alice.simulator, "o-bob")
    code = alice.simulator.phone_code(openid="o-alice", phone="13812345678")
    assert code_of(alice.put(PHONE, {"code": code})) == (200, 200)
    assert code_of(bob.put(PHONE, {"code": code})) == (400, 460)
    assert bob.me()["phone"] is None


def test_who_never_was_in_the_mini_program_is_sent_there(alice: Caller, app: Flask) -> None:
    with app.app_context():
        database.session.execute(delete(Identity).where(Identity.user_id == alice.me()["id"]))
        database.session.commit()
    answer = alice.put(PHONE, {"code": "any"})
    assert code_of(answer) == (403, 403)
    assert answer.get_json()["message"] == MINI_PROGRAM_LOGIN_REQUIRED.chinese


def test_a_phone_code_is_remembered_for_as_long_as_it_lives_and_a_call_for_as_long_as_it_may_take(
    alice: Caller, redis: Any
) -> None:
    def lifetime(part: str) -> int:
        (key,) = redis.keys(f"phone:*:{part}")
        return redis.ttl(key)

    alice.simulator.fault("slow", path=GET_PHONE, seconds=0.5)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(alice.put, PHONE, {"code": alice.simulator.phone_code(openid="o-alice")})
        wait_until(lambda: alice.simulator.calls(GET_PHONE))
        assert 60 < lifetime("lock") <= 75
        assert code_of(answer.result()) == (200, 200)
    assert 290 < lifetime("pause") <= 300


def test_no_transaction_is_open_while_wechat_is_waited_for(alice: Caller, app: Flask) -> None:
    alice.simulator.fault("slow", path=GET_PHONE, seconds=1)
    code = alice.simulator.phone_code(openid="o-alice")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(alice.put, PHONE, {"code": code})
        wait_until(lambda: alice.simulator.calls(GET_PHONE))
        assert app.extensions["database"].pool.checkedout() == 0
        assert code_of(answer.result()) == (200, 200)


@pytest.mark.parametrize(
    ("phone", "country", "shown"),
    [("13812345678", "86", "138****5678"), ("13812345678", 86, "138****5678"), ("2025550123", 1, "************")],
)
def test_a_phone_number_is_stored_from_encrypted_data(alice: Caller, phone: str, country: Any, shown: str) -> None:
    answer = alice.put(PHONE, alice.encrypted_phone(phone, country))
    assert code_of(answer) == (200, 200)
    assert answer.get_json()["data"]["phone"] == shown


def test_data_is_decrypted_with_the_key_of_the_newest_login_whichever_device_it_was_on(alice: Caller) -> None:
    phone = Caller(alice.client, alice.simulator, "o-alice")  # the same user on another device
    assert code_of(alice.put(PHONE, alice.encrypted_phone())) == (200, 200)
    assert code_of(phone.put(PHONE, alice.encrypted_phone("13987654321"))) == (200, 200)
    assert alice.me()["phone"] == "139****4321"


def test_data_under_a_key_that_a_later_login_replaced_gets_463_and_works_after_a_login(alice: Caller) -> None:
    data = alice.encrypted_phone()
    alice.simulator.code(openid="o-alice")
    alice.log_in()
    assert code_of(alice.put(PHONE, data)) == (401, 463)
    assert code_of(alice.put(PHONE, alice.encrypted_phone())) == (200, 200)


def test_without_a_session_key_data_gets_463(alice: Caller, redis: Any) -> None:
    data = alice.encrypted_phone()
    redis.delete(f"user:{alice.me()['id']}:session_keys")
    assert code_of(alice.put(PHONE, data)) == (401, 463)


@pytest.mark.parametrize("different", [{"app_id": "wx-other"}, {"age": 3600}, {"age": -3600}])
def test_data_of_another_app_or_another_time_gets_464(alice: Caller, different: dict[str, Any]) -> None:
    assert code_of(alice.put(PHONE, alice.encrypted_phone(**different))) == (400, 464)
    assert alice.me()["phone"] is None


def test_data_of_somebody_else_gets_463_or_464(alice: Caller) -> None:
    bob = Caller(alice.client, alice.simulator, "o-bob")
    assert code_of(alice.put(PHONE, bob.encrypted_phone())) == (401, 463)
    data = alice.encrypted({**WECHAT_PROFILE, "openId": "o-bob"})
    assert code_of(alice.put(PROFILE, data)) == (400, 464)


def test_encrypted_data_without_a_phone_number_is_400(alice: Caller) -> None:
    made = alice.encrypted({"nickName": "阿上"})
    answer = alice.put(PHONE, {name: made[name] for name in ("encryptedData", "iv")})
    assert code_of(answer) == (400, 400)
    assert set(answer.get_json()["data"]["errors"]) == {"encryptedData"}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, {"code"}),
        ({"iv": "x"}, {"encryptedData"}),
        ({"code": "x", "iv": "x"}, {"iv"}),
        ({"code": 5}, {"code"}),
        ({"code": "x y"}, {"code"}),
        ({"code": "x", "phone": "13812345678"}, {"phone"}),
        ({"encryptedData": "AAAA", "iv": "AAAA"}, {"encryptedData", "iv"}),
        ({"encryptedData": "!", "iv": "AAAAAAAAAAAAAAAAAAAAAA=="}, {"encryptedData"}),
    ],
)
def test_a_phone_that_cannot_be_is_400_and_the_fields_are_named(alice: Caller, body: Any, named: set[str]) -> None:
    answer = alice.put(PHONE, body)
    assert code_of(answer) == (400, 400)
    assert set(answer.get_json()["data"]["errors"]) == named


@pytest.mark.parametrize("part", ["encryptedData", "iv"])
def test_altered_data_is_refused_and_nothing_is_stored(alice: Caller, part: str) -> None:
    body = alice.encrypted_phone()
    letters = list(body[part])
    for position in range(0, len(letters), 5):
        altered = letters.copy()
        altered[position] = "B" if letters[position] == "A" else "A"
        answer = alice.put(PHONE, {**body, part: "".join(altered)})
        assert code_of(answer) in ((401, 463), (400, 464), (400, 400)), position
    assert alice.me()["phone"] is None


def test_what_the_user_types_in_is_his_profile(alice: Caller) -> None:
    answer = alice.put(PROFILE, {"nickname": "阿上 🚀", "avatar_url": "https://cdn.example.com/a.png"})
    assert code_of(answer) == (200, 200)
    assert alice.me() == answer.get_json()["data"]
    assert (alice.me()["nickname"], alice.me()["avatar_url"]) == ("阿上 🚀", "https://cdn.example.com/a.png")
    alice.put(PROFILE, {"avatar_url": None})
    assert (alice.me()["nickname"], alice.me()["avatar_url"]) == ("阿上 🚀", None)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, {"nickname"}),
        ({"nickname": ""}, {"nickname"}),
        ({"nickname": " "}, {"nickname"}),
        ({"nickname": "x" * 65}, {"nickname"}),
        ({"nickname": "a\x00b"}, {"nickname"}),
        ({"nickname": "x\n"}, {"nickname"}),
        ({"nickname": ["x"]}, {"nickname"}),
        ({"avatar_url": "javascript:alert(1)"}, {"avatar_url"}),
        ({"avatar_url": "https://example.com/" + "x" * 512}, {"avatar_url"}),
        ({"role": "admin", "nickname": "x"}, {"role"}),
        ({"rawData": "{}", "signature": "x", "iv": "x"}, {"encryptedData"}),
        ({"rawData": "{}", "signature": "x", "iv": "x", "encryptedData": "x", "nickname": "x"}, {"nickname"}),
        ({"rawData": "[]", "signature": "x", "iv": "x", "encryptedData": "x"}, {"rawData"}),
        ({"rawData": "[" * 100_000, "signature": "x", "iv": "x", "encryptedData": "x"}, {"rawData"}),
        ({"rawData": "{}", "signature": "x", "iv": "x", "encryptedData": "x"}, {"encryptedData", "iv"}),
    ],
)
def test_a_profile_that_cannot_be_is_400_and_the_fields_are_named(alice: Caller, body: Any, named: set[str]) -> None:
    answer = alice.put(PROFILE, body)
    assert code_of(answer) == (400, 400)
    assert set(answer.get_json()["data"]["errors"]) == named
    assert alice.me()["nickname"] is None


def test_what_wechat_signed_and_encrypted_is_his_profile(alice: Caller) -> None:
    answer = alice.put(PROFILE, alice.encrypted(WECHAT_PROFILE))
    assert code_of(answer) == (200, 200)
    assert (alice.me()["nickname"], alice.me()["avatar_url"]) == ("阿上", WECHAT_PROFILE["avatarUrl"])
    nameless = {name: value for name, value in WECHAT_PROFILE.items() if name != "openId"}
    assert code_of(alice.put(PROFILE, alice.encrypted({**nameless, "nickName": "上", "avatarUrl": ""}))) == (200, 200)
    assert (alice.me()["nickname"], alice.me()["avatar_url"]) == ("上", WECHAT_PROFILE["avatarUrl"])


def test_a_forged_profile_gets_464(alice: Caller) -> None:
    made = alice.encrypted(WECHAT_PROFILE)
    other = alice.encrypted({**WECHAT_PROFILE, "nickName": "another"})
    forged_raw_data = json.dumps({**json.loads(made["rawData"]), "nickName": "forged"})
    for different in (
        {"signature": "0" * 40},
        {"signature": "é"},
        {"signature": other["signature"]},
        {"rawData": other["rawData"], "signature": other["signature"]},
        {"rawData": forged_raw_data},
        {"rawData": made["rawData"] + " "},
    ):
        assert code_of(alice.put(PROFILE, {**made, **different})) == (400, 464), different
    assert alice.me()["nickname"] is None


def test_a_profile_under_a_key_that_was_replaced_gets_463(alice: Caller) -> None:
    made = alice.encrypted(WECHAT_PROFILE)
    alice.log_in()
    assert code_of(alice.put(PROFILE, made)) == (401, 463)


@pytest.mark.parametrize("odd", [{"nickName": "x" * 65}, {"nickName": 5}, {"avatarUrl": "javascript:x"}])
def test_a_profile_of_wechats_that_cannot_be_stored_is_400(alice: Caller, odd: dict[str, Any]) -> None:
    answer = alice.put(PROFILE, alice.encrypted({**WECHAT_PROFILE, **odd}))
    assert code_of(answer) == (400, 400)
    assert set(answer.get_json()["data"]["errors"]) == {"encryptedData"}


@pytest.fixture
def checked(make_app: Callable[..., Flask], simulator: Simulator) -> Caller:
    """Somebody whose nicknames go through the content check."""
    return Caller(make_app(WECHAT_CONTENT_CHECK="true").test_client(use_cookies=False), simulator, "o-checked")


def test_a_risky_nickname_gets_466_and_is_not_stored(checked: Caller) -> None:
    before = checked.me()["nickname"]
    assert code_of(checked.put(PROFILE, {"nickname": "违禁"})) == (400, 466)
    profile = {**WECHAT_PROFILE, "openId": "o-checked", "nickName": "违禁"}
    assert code_of(checked.put(PROFILE, checked.encrypted(profile))) == (400, 466)
    assert checked.me()["nickname"] == before
    assert code_of(checked.put(PROFILE, {"nickname": "可疑"})) == (200, 200)
    assert len(checked.simulator.calls(CHECK)) == 3


def test_only_a_nickname_is_checked_and_only_if_the_setting_says_so(checked: Caller, alice: Caller) -> None:
    checked.put(PROFILE, {"avatar_url": "https://example.com/a.png"})
    assert code_of(alice.put(PROFILE, {"nickname": "违禁"})) == (200, 200)
    assert checked.simulator.calls(CHECK) == []


def test_a_content_check_that_fails_lets_no_nickname_through(checked: Caller) -> None:
    checked.simulator.fault("http_500", path=CHECK)
    before = checked.me()["nickname"]
    assert code_of(checked.put(PROFILE, {"nickname": "unchecked"})) == (502, 502)
    checked.simulator.travel(3 * 3600)
    assert code_of(checked.put(PROFILE, {"nickname": "unchecked"})) == (401, 463)
    assert checked.me()["nickname"] == before
