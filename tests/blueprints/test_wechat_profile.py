import base64
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flask import Flask
from redis import Redis
from sqlalchemy import delete

from blueprints.users import MINI_PROGRAM_LOGIN_REQUIRED
from blueprints.wechat_profile import NO_SESSION_KEY
from dev.wechat_simulator import crypto
from storage import database
from storage.models import Identity, User
from tests.blueprints.callers import Caller, code_of, data_of, invalid_fields
from tests.harness import APP_ID, Simulator
from wechat.client import Client
from wechat.errcodes import MESSAGES

PHONE, PROFILE = "/users/me/phone", "/users/me/profile"
CHECK = "/wxa/msg_sec_check"
PHONE_FIELDS = {"code", "encryptedData", "iv"}
PROFILE_FIELDS = {"nickname", "avatar_url", "rawData", "signature", "encryptedData", "iv"}
AVATAR_URL = "https://thirdwx.qlogo.cn/mmopen/vi_32/0/132"


def encrypted_phone(user: Caller, phone: str = "13812345678", country: object = "86", **wanted: Any) -> dict[str, str]:
    data = {"phoneNumber": phone, "purePhoneNumber": phone, "countryCode": country}
    made = user.simulator.user_data(user.openid, data, **wanted)
    return {name: made[name] for name in ("encryptedData", "iv")}


def encrypted_profile(user: Caller, **different: Any) -> dict[str, str]:
    """What wx.getUserProfile gives; a field that is None is left out."""
    data = {"openId": user.openid, "nickName": "阿上", "gender": 0, "language": "zh_CN", "avatarUrl": AVATAR_URL}
    data = {name: value for name, value in {**data, **different}.items() if value is not None}
    return user.simulator.user_data(user.openid, data)


def profile(user: Caller) -> tuple[str | None, str | None]:
    me = user.me()
    return me["nickname"], me["avatar_url"]


@pytest.fixture
def bob(app: Flask, simulator: Simulator) -> Caller:
    return Caller(app, simulator)


def test_a_phone_code_stores_the_number_and_shows_it_masked(alice: Caller, app: Flask) -> None:
    answer = alice.put(PHONE, {"code": alice.simulator.phone_code(openid=alice.openid, phone="13812345678")})
    assert data_of(answer)["phone"] == alice.me()["phone"] == "138****5678"
    assert "13812345678" not in answer.text
    with app.app_context():
        assert database.session.get_one(User, alice.id).phone == "13812345678"


def test_a_phone_code_works_for_its_user_only(alice: Caller, bob: Caller) -> None:
    body = {"code": alice.simulator.phone_code(openid=alice.openid)}
    assert code_of(bob.put(PHONE, body)) == (400, 460)
    assert code_of(alice.put(PHONE, body)) == (200, 200)
    assert code_of(bob.put(PHONE, body)) == (400, 460)
    assert bob.me()["phone"] is None


def test_an_invalid_or_used_phone_code_is_refused(alice: Caller, redis: Redis) -> None:
    simulator = alice.simulator
    used = simulator.phone_code(openid=alice.openid)
    answers = [alice.put(PHONE, {"code": used}) for _ in range(2)]
    assert data_of(answers[0]) == data_of(answers[1])  # the first response may have been lost
    redis.delete(*(mark.removesuffix(b":used") for mark in redis.scan_iter("phone:*:used")))  # as after five seconds
    expired = simulator.phone_code(openid=alice.openid, expires_in=-1)
    for code, number in ((simulator.code(openid=alice.openid), 460), ("unknown", 460), (expired, 460), (used, 461)):
        answer = alice.put(PHONE, {"code": code})
        assert code_of(answer) == (400, number)


def test_simultaneous_requests_with_one_phone_code_all_show_the_number(alice: Caller) -> None:
    alice.simulator.fault("slow", path="/wxa/business/getuserphonenumber", seconds=0.3)
    body = {"code": alice.simulator.phone_code(openid=alice.openid, phone="13812345678")}
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: alice.call("PUT", PHONE, body), range(3)))
    assert [data_of(answer)["phone"] for answer in answers] == ["138****5678"] * 3


def test_a_user_without_an_openid_in_the_mini_program_gets_403(alice: Caller, app: Flask) -> None:
    with app.app_context():
        database.session.execute(delete(Identity).where(Identity.user_id == alice.id))
        database.session.commit()
    answer = alice.put(PHONE, {"code": "any"})
    assert code_of(answer) == (403, 403)
    assert answer.get_json()["message"] == MINI_PROGRAM_LOGIN_REQUIRED.chinese


def test_a_phone_code_is_redeemed_under_a_lock_outside_of_transactions_and_remembered(
    alice: Caller, app: Flask, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lifetime(part: str) -> int:
        (key,) = redis.scan_iter(f"phone:*:{part}")
        return redis.ttl(key)

    redeem, calls = Client.code_to_phone, []

    def watched(*arguments: Any) -> Any:
        calls.append((lifetime("lock"), app.extensions["database"].pool.checkedout()))
        return redeem(*arguments)

    monkeypatch.setattr(Client, "code_to_phone", watched)
    data_of(alice.put(PHONE, {"code": alice.simulator.phone_code(openid=alice.openid)}))
    ((lock_seconds, connections),) = calls
    assert 5 < lock_seconds <= 11  # for as long as the request may take
    assert connections == 0
    assert 240 < lifetime("used") <= 300  # for as long as WeChat takes a code


@pytest.mark.parametrize(
    ("phone", "country", "shown"),
    [("13812345678", "86", "138****5678"), ("13812345678", 86, "138****5678"), ("2025550123", 1, "************")],
)
def test_encrypted_data_stores_a_phone_number(alice: Caller, phone: str, country: Any, shown: str) -> None:
    assert data_of(alice.put(PHONE, encrypted_phone(alice, phone, country)))["phone"] == shown


def test_data_is_decrypted_with_the_key_of_the_newest_login_on_any_device(
    alice: Caller, app: Flask, simulator: Simulator
) -> None:
    other_device = Caller(app, simulator, alice.openid)
    data_of(alice.put(PHONE, encrypted_phone(alice)))
    data_of(other_device.put(PHONE, encrypted_phone(alice, "13987654321")))
    assert alice.me()["phone"] == "139****4321"


def test_data_under_an_old_or_missing_session_key_gets_463_until_the_next_login(alice: Caller, redis: Redis) -> None:
    phone, signed = encrypted_phone(alice), encrypted_profile(alice)
    alice.simulator.code(openid=alice.openid)
    alice.log_in()
    assert code_of(alice.put(PHONE, phone)) == code_of(alice.put(PROFILE, signed)) == (409, 463)
    assert code_of(alice.put(PHONE, encrypted_phone(alice))) == (200, 200)
    redis.delete(f"user:{alice.id}:session_keys")  # then a tap alone helps no more
    answer = alice.put(PHONE, encrypted_phone(alice))
    assert (code_of(answer), answer.get_json()["message"]) == ((409, 463), NO_SESSION_KEY.chinese)


def test_data_of_another_app_time_or_user_is_rejected(alice: Caller, bob: Caller) -> None:
    for different in ({"app_id": "wx-other"}, {"age": 3600}, {"age": -3600}):
        assert code_of(alice.put(PHONE, encrypted_phone(alice, **different))) == (400, 464), different
    assert code_of(alice.put(PHONE, encrypted_phone(bob))) == (409, 463)
    assert code_of(alice.put(PROFILE, encrypted_profile(alice, openId=bob.openid))) == (400, 464)
    assert alice.me()["phone"] is None


@pytest.mark.parametrize("part", ["encryptedData", "iv"])
def test_altered_data_is_rejected(alice: Caller, part: str) -> None:
    body = encrypted_phone(alice)
    letters = list(body[part])
    for position in range(0, len(letters), 5):
        altered = letters.copy()
        altered[position] = "B" if letters[position] == "A" else "A"
        answer = alice.call("PUT", PHONE, {**body, part: "".join(altered)})
        assert code_of(answer) in ((409, 463), (400, 464), (400, 400)), position
    assert alice.me()["phone"] is None


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        (PHONE, {}, PHONE_FIELDS),
        (PHONE, {"iv": "x"}, PHONE_FIELDS),
        (PHONE, {"code": "x", "iv": "x"}, PHONE_FIELDS),
        (PHONE, {"code": 5}, {"code"}),
        (PHONE, {"code": "x y"}, {"code"}),
        (PHONE, {"code": "x", "phone": "13812345678"}, {"phone"}),
        (PHONE, {"encryptedData": "AAAA", "iv": "AAAA"}, {"encryptedData", "iv"}),
        (PHONE, {"encryptedData": "!", "iv": "AAAAAAAAAAAAAAAAAAAAAA=="}, {"encryptedData"}),
        (PROFILE, {}, PROFILE_FIELDS),
        (PROFILE, {"nickname": ""}, {"nickname"}),
        (PROFILE, {"nickname": " "}, {"nickname"}),
        (PROFILE, {"nickname": "x" * 65}, {"nickname"}),
        (PROFILE, {"nickname": "a\x00b"}, {"nickname"}),
        (PROFILE, {"nickname": "x\n"}, {"nickname"}),
        (PROFILE, {"nickname": ["x"]}, {"nickname"}),
        (PROFILE, {"avatar_url": "javascript:alert(1)"}, {"avatar_url"}),
        (PROFILE, {"avatar_url": "https://example.com/" + "x" * 512}, {"avatar_url"}),
        (PROFILE, {"role": "admin", "nickname": "x"}, {"role"}),
        (PROFILE, {"blocked": True, "nickname": "x"}, {"blocked"}),
        (PROFILE, {"rawData": "{}", "signature": "x", "iv": "x"}, PROFILE_FIELDS),
        (
            PROFILE,
            {"rawData": "{}", "signature": "x", "iv": "x", "encryptedData": "x", "nickname": "x"},
            PROFILE_FIELDS,
        ),
        (PROFILE, {"rawData": "[]", "signature": "x", "iv": "x", "encryptedData": "x"}, {"rawData"}),
        (PROFILE, {"rawData": "[" * 50_000, "signature": "x", "iv": "x", "encryptedData": "x"}, {"rawData"}),
        (PROFILE, {"rawData": "{}", "signature": "x", "iv": "x", "encryptedData": "x"}, {"encryptedData", "iv"}),
    ],
)
def test_invalid_input_names_the_fields(alice: Caller, path: str, body: Any, named: set[str]) -> None:
    assert invalid_fields(alice.put(path, body)) == named
    assert profile(alice) == (None, None)


def test_a_body_of_neither_kind_is_told_both(alice: Caller) -> None:
    for path, bodies, reason in (
        (PHONE, ({}, {"iv": "x"}, {"code": "x", "iv": "x"}), "Send code, or all of encryptedData, iv."),
        (
            PROFILE,
            ({}, {"rawData": "{}"}, {"nickname": "x", "iv": "x"}),
            "Send avatar_url and/or nickname, or all of encryptedData, iv, rawData, signature.",
        ),
    ):
        for body in bodies:
            errors = alice.put(path, body).get_json()["data"]["errors"]
            assert set(map(tuple, errors.values())) == {(reason,)}, body


@pytest.mark.parametrize(
    "url",
    [
        *("wxfile://tmp_1.png", "http://tmp/a.png", "ftp://example.com/a.png", "a.png", ""),
        *(
            "https://example.com/a b",
            "https://example.com/a\n",
            "https://example.com\\a",
            "https://.com/",
            "https://a@b.cn/",
        ),
    ],
)
def test_a_picture_that_is_not_uploaded_yet_gets_400_saying_so(alice: Caller, url: str) -> None:
    for path in (PROFILE, "/users/me"):
        (reason,) = alice.put(path, {"avatar_url": url}).get_json()["data"]["errors"]["avatar_url"]
        assert reason == "Must be an http(s) URL: upload the file, then send its URL."


@pytest.mark.parametrize(
    "url",
    ["http://localhost:9000/a", "https://10.0.0.1/a?b#c", "https://cdn.example.com:8443/头像.png", "https://a.cn?b"],
)
def test_the_url_of_an_uploaded_picture_is_stored(alice: Caller, url: str) -> None:
    assert data_of(alice.put("/users/me", {"avatar_url": url}))["avatar_url"] == url


def test_encrypted_data_that_cannot_be_stored_is_400(alice: Caller) -> None:
    without_phone = alice.simulator.user_data(alice.openid, {"nickName": "阿上"})
    body = {name: without_phone[name] for name in ("encryptedData", "iv")}
    assert invalid_fields(alice.put(PHONE, body)) == {"encryptedData"}
    for odd in ({"nickName": "x" * 65}, {"nickName": 5}, {"avatarUrl": "javascript:x"}):
        assert invalid_fields(alice.put(PROFILE, encrypted_profile(alice, **odd))) == {"encryptedData"}, odd


def test_put_a_profile_as_typed_by_the_user(alice: Caller) -> None:
    answer = alice.put(PROFILE, {"nickname": "阿上 🚀", "avatar_url": "https://cdn.example.com/a.png"})
    assert data_of(answer) == alice.me()
    assert profile(alice) == ("阿上 🚀", "https://cdn.example.com/a.png")
    data_of(alice.put(PROFILE, {"avatar_url": None}))
    assert profile(alice) == ("阿上 🚀", None)


def test_put_a_profile_as_signed_and_encrypted_by_wechat(alice: Caller) -> None:
    data_of(alice.put(PROFILE, encrypted_profile(alice)))
    assert profile(alice) == ("阿上", AVATAR_URL)
    data_of(alice.put(PROFILE, encrypted_profile(alice, openId=None, nickName="上", avatarUrl="")))
    assert profile(alice) == ("上", AVATAR_URL)


@pytest.mark.parametrize(
    ("in_json", "stored"),
    [("a\x14b", "a\ufffdb"), (r"a\ud83d", "a\ufffd"), (r"\u0000a", "\ufffda"), (r"\ta\n b ", "a  b"), (r"\n", None)],
)
def test_a_nickname_with_odd_characters_is_stored_without_them(
    alice: Caller, log_lines: Any, in_json: str, stored: str | None
) -> None:
    session_key, iv = alice.simulator.session_key(alice.openid), bytes(16)
    raw_data = f'{{"nickName":"{in_json}","avatarUrl":"{AVATAR_URL}"}}'
    watermark = {"timestamp": int(time.time()), "appid": APP_ID}
    plaintext = f'{raw_data[:-1]},"watermark":{json.dumps(watermark)}}}'
    body = {
        "rawData": raw_data,
        "signature": crypto.raw_data_signature(session_key, raw_data),
        "encryptedData": crypto.encrypt_data(session_key, iv, plaintext),
        "iv": base64.b64encode(iv).decode(),
    }
    assert data_of(alice.put(PROFILE, body))["nickname"] == stored
    assert profile(alice) == (stored, AVATAR_URL)
    reasons = {line["interface"]: line["reason"] for line in log_lines() if line["message"].startswith("WeChat sent")}
    if "\ufffd" in (stored or ""):
        assert reasons == dict.fromkeys(("rawData", "encryptedData"), "characters replaced")


def test_a_forged_profile_gets_464(alice: Caller) -> None:
    made, other = encrypted_profile(alice), encrypted_profile(alice, nickName="another")
    for different in (
        {"signature": "0" * 40},
        {"signature": "é"},
        {"signature": other["signature"]},
        {"rawData": other["rawData"], "signature": other["signature"]},
        {"rawData": json.dumps({**json.loads(made["rawData"]), "nickName": "forged"})},
        {"rawData": made["rawData"] + " "},
    ):
        assert code_of(alice.put(PROFILE, {**made, **different})) == (400, 464), different
    assert profile(alice) == (None, None)


@pytest.fixture
def checked(make_app: Callable[..., Flask], simulator: Simulator) -> Caller:
    """A user whose nicknames go through the content check."""
    return Caller(make_app(WECHAT_CONTENT_CHECK="true"), simulator)


def test_a_risky_nickname_gets_466_and_is_not_stored(checked: Caller) -> None:
    for body in ({"nickname": "违禁"}, encrypted_profile(checked, nickName="违禁")):
        assert code_of(checked.put(PROFILE, body)) == (400, 466)
    assert checked.me()["nickname"] is None
    assert data_of(checked.put(PROFILE, {"nickname": "可疑"}))["nickname"] == "可疑"
    assert len(checked.simulator.calls(CHECK)) == 3


def test_only_a_nickname_is_checked_and_only_if_the_settings_say_so(checked: Caller, alice: Caller) -> None:
    data_of(checked.put(PROFILE, {"avatar_url": "https://example.com/a.png"}))
    data_of(alice.put(PROFILE, {"nickname": "违禁"}))
    assert checked.simulator.calls(CHECK) == []


def test_a_nickname_is_not_stored_if_the_content_check_fails(checked: Caller) -> None:
    checked.simulator.fault("http_500", path=CHECK)
    assert code_of(checked.put(PROFILE, {"nickname": "unchecked"})) == (502, 502)
    checked.simulator.travel(3 * 3600)
    answer = checked.put(PROFILE, {"nickname": "unchecked"})
    assert (code_of(answer), answer.get_json()["message"]) == ((409, 463), MESSAGES[61010].chinese)
    assert checked.me()["nickname"] is None
