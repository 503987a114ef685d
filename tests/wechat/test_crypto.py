import base64
import hashlib
import hmac
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wechatpy.crypto import PrpCrypto, WeChatWxaCrypto
from wechatpy.utils import WeChatSigner

from errors import ApiError, Code
from tests.wechat.harness import (
    ANY_TEXT,
    JSON_OBJECTS,
    VECTORS,
    any_text,
    decrypt_cbc,
    encrypt_cbc,
    flipped,
    outcome,
    pad,
    refusal,
)
from wechat import crypto
from wechat.crypto import (
    CLOCK_SKEW_SECONDS,
    MAXIMUM_AGE_SECONDS,
    constant_time_equals,
    decode_aes_key,
    decrypt_user_data,
    encrypt_message,
    push_signature,
    raw_data_signature,
    session_signature,
)

DEMO = VECTORS["encrypted_data.official_demo"]
DEMO_DATA = json.loads(DEMO["plaintext"])
OPENID, NOW = DEMO_DATA["openId"], DEMO_DATA["watermark"]["timestamp"] + 5
KEY, IV, CIPHERTEXT = (base64.b64decode(DEMO[name]) for name in ("session_key", "iv", "encrypted_data"))

MESSAGES = [VECTORS["push.safe_mode_json"], VECTORS["push.safe_mode_json_reply"]]
EACH_MESSAGE = pytest.mark.parametrize("vector", MESSAGES, ids=lambda vector: vector["id"])
AES_KEY = decode_aes_key(MESSAGES[0]["encoding_aes_key"])
APP_ID = MESSAGES[0]["appid"]

KEYS = st.binary(min_size=16, max_size=16)


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decrypt(ciphertext: bytes = CIPHERTEXT, *, iv: bytes = IV, key: bytes = KEY, **others: Any) -> dict[str, Any]:
    others = {"app_id": DEMO["appid"], "openid": OPENID, "now": NOW, "expected": {}} | others
    return decrypt_user_data(encode(ciphertext), encode(iv), session_key=encode(key), **others)


def decrypt_plaintext(plaintext: bytes, **others: Any) -> dict[str, Any]:
    return decrypt(encrypt_cbc(pad(plaintext, 16), KEY, IV), **others)


def decrypt_data(data: object, **others: Any) -> dict[str, Any]:
    return decrypt_plaintext(json.dumps(data).encode(), **others)


def watermarked(**changes: Any) -> dict[str, Any]:
    return {"watermark": {"timestamp": NOW, "appid": DEMO["appid"]} | changes}


def seal(plaintext: bytes, key: bytes = AES_KEY) -> str:
    """Encrypt any plaintext as a message."""
    return encode(encrypt_cbc(plaintext, key, key[:16]))


def unseal(encrypted: str, key: bytes = AES_KEY) -> bytes:
    return decrypt_cbc(base64.b64decode(encrypted), key, key[:16])


def decrypt_message(encrypted: str, key: bytes, app_id: str) -> str:
    return crypto.decrypt_message(encrypted, key, app_id).decode()


def assert_rejected(encrypted: str, key: bytes, app_id: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the reason is nobody's business
        decrypt_message(encrypted, key, app_id)


# User data


def test_the_demo_data_decrypts() -> None:
    assert decrypt(expected={"openId": OPENID}) == DEMO_DATA
    assert encode(encrypt_cbc(pad(DEMO["plaintext"].encode(), 16), KEY, IV)) == DEMO["encrypted_data"]


def test_a_flipped_bit_of_the_ciphertext_key_or_padding_is_refused() -> None:
    for ciphertext in flipped(CIPHERTEXT):
        assert refusal(decrypt, ciphertext) is Code.SESSION_KEY_STALE
    for key in flipped(KEY, tuple(1 << bit for bit in range(8))):
        assert refusal(decrypt, key=key) is Code.SESSION_KEY_STALE
    plaintext = DEMO["plaintext"].encode()
    padding = pad(plaintext, 16)[len(plaintext) :]
    assert len(padding) > 1
    for altered in flipped(padding, tuple(range(1, 256))):
        ciphertext = encrypt_cbc(plaintext + altered, KEY, IV)
        assert refusal(decrypt, ciphertext) is Code.SESSION_KEY_STALE


def test_malformed_text_is_read_only_as_expected() -> None:
    data = json.dumps(watermarked() | {"nickName": "?"}, separators=(",", ":")).encode()
    for name, read in ((b"a\x14", "a\ufffd"), (b"\xe5\xbe", "\ufffd"), (b"\\ud83d", "\ufffd"), (b"\\u0000", "\ufffd")):
        plaintext = data.replace(b"?", name)
        assert decrypt_plaintext(plaintext, expected={"nickName": read})["nickName"] == read
        assert refusal(decrypt_plaintext, plaintext, expected={"nickName": "?"}) is Code.SIGNATURE_MISMATCH
    assert refusal(decrypt_plaintext, data.replace(b"?", b"\xff")) is Code.SESSION_KEY_STALE


def test_a_flipped_bit_of_the_iv_is_refused_by_expected() -> None:
    """CBC itself accepts those that leave valid JSON, such as with another name for the openid."""
    let_through = 0
    for iv in flipped(IV, tuple(1 << bit for bit in range(8))):
        code = refusal(decrypt, iv=iv, expected={"openId": OPENID})
        assert code in (Code.SESSION_KEY_STALE, Code.SIGNATURE_MISMATCH)
        let_through += isinstance(outcome(decrypt, iv=iv), dict)
    assert let_through > 0


DATA, IV_TEXT = DEMO["encrypted_data"], DEMO["iv"]
LENIENT = IV_TEXT.replace("A==", "B==")  # the same 16 bytes to a lenient decoder
INVALID_DATA = ["", encode(CIPHERTEXT[:-1]), DATA + "\n", DATA.replace("/", "_")]
INVALID_IVS = ["", encode(IV[:-1]), encode(IV + b"\x00"), IV_TEXT.rstrip("="), IV_TEXT + "=", LENIENT]


@pytest.mark.parametrize(
    ("encrypted_data", "iv", "fields"),
    [
        *((invalid, IV_TEXT, ["encryptedData"]) for invalid in INVALID_DATA),
        *((DATA, invalid, ["iv"]) for invalid in INVALID_IVS),
        ("?", "?", ["encryptedData", "iv"]),
    ],
)
def test_an_invalid_ciphertext_or_iv_is_named(encrypted_data: str, iv: str, fields: list[str]) -> None:
    account = {"session_key": DEMO["session_key"], "app_id": DEMO["appid"], "openid": OPENID}
    with pytest.raises(ApiError) as caught:
        decrypt_user_data(encrypted_data, iv, **account, now=NOW, expected={})
    assert caught.value.api_code is Code.INVALID_INPUT
    assert {name: [type(reason) for reason in reasons] for name, reasons in (caught.value.errors or {}).items()} == {
        name: [str] for name in fields
    }


def test_a_session_key_of_other_than_16_bytes_is_stale() -> None:
    assert refusal(decrypt, key=KEY[:-1]) is Code.SESSION_KEY_STALE
    for key in (bytes(24), bytes(32)):  # of a longer AES
        ciphertext = encrypt_cbc(pad(DEMO["plaintext"].encode(), 16), key, IV)
        assert refusal(decrypt, ciphertext, key=key) is Code.SESSION_KEY_STALE


@pytest.mark.parametrize("plaintext", [b"", b"\xff", b"{", b"[]", b"null", b'"text"'])
def test_plaintext_other_than_a_json_object_is_a_stale_session_key(plaintext: bytes) -> None:
    assert refusal(decrypt_plaintext, plaintext) is Code.SESSION_KEY_STALE


def test_bad_padding_is_indistinguishable_from_bad_json(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.dumps(watermarked()).encode()
    whole += b" " * (-len(whole) % 16)
    bad_json = whole[:-4].replace(b"}", b"{")
    parsed = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    errors = []
    for padded in (whole, bad_json + b"\x03\x04\x04\x04", bad_json + b"\x04\x04\x04\x04"):
        with pytest.raises(ApiError) as caught:
            decrypt(encrypt_cbc(padded, KEY, IV))
        errors.append(caught.value)
    assert [len(text) for text in parsed] == [len(whole), len(whole), len(whole) - 4]
    for error in errors:
        assert (error.api_code, error.errors) == (Code.SESSION_KEY_STALE, None)
        assert (error.__cause__, error.__context__) == (None, None)


@pytest.mark.parametrize(
    "data",
    [
        {},
        *({"watermark": value} for value in (None, [NOW, DEMO["appid"]], {"timestamp": NOW}, {"appid": DEMO["appid"]})),
        *(watermarked(appid=value) for value in (None, [DEMO["appid"]], DEMO["appid"].upper(), DEMO["appid"][:-1])),
        *(watermarked(timestamp=value) for value in (str(NOW), float(NOW), None, 10**400)),
        *(watermarked() | {"openId": value} for value in ("o-another", None, "")),
    ],
)
def test_data_of_another_user_or_app_or_without_watermark_is_refused(data: object) -> None:
    assert refusal(decrypt_data, data) is Code.SIGNATURE_MISMATCH
    assert decrypt_data(watermarked()) == watermarked()  # the openId is optional


def test_the_watermark_must_be_recent() -> None:
    for age in (MAXIMUM_AGE_SECONDS, 0, -CLOCK_SKEW_SECONDS):
        assert decrypt_data(watermarked(timestamp=NOW - age)) == watermarked(timestamp=NOW - age)
    for age in (MAXIMUM_AGE_SECONDS + 1, -CLOCK_SKEW_SECONDS - 1):
        assert refusal(decrypt_data, watermarked(timestamp=NOW - age)) is Code.SIGNATURE_MISMATCH
    assert (MAXIMUM_AGE_SECONDS, CLOCK_SKEW_SECONDS) == (600, 60)
    assert refusal(decrypt_data, watermarked(timestamp=True), now=1) is Code.SIGNATURE_MISMATCH


@pytest.mark.parametrize("expected", [{"gender": 2}, {"nickName": "band"}, {"absent": None}, {"gender": 1, "city": ""}])
def test_data_other_than_expected_is_refused(expected: dict[str, Any]) -> None:
    assert decrypt(expected={"nickName": "Band", "gender": 1}) == DEMO_DATA
    assert decrypt(expected={}) == DEMO_DATA
    assert refusal(decrypt, expected=expected) is Code.SIGNATURE_MISMATCH


@given(JSON_OBJECTS, KEYS, KEYS)
def test_any_object_survives_encryption(data: dict[str, Any], key: bytes, iv: bytes) -> None:
    data = {**data, "openId": OPENID} | watermarked()
    ciphertext = encrypt_cbc(pad(json.dumps(data).encode(), 16), key, iv)
    assert decrypt(ciphertext, key=key, iv=iv, expected=data) == data


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_any_text_for_user_data_is_refused(data: str, iv: str, session_key: str, app_id: str, openid: str) -> None:
    def call(encrypted_data: str, iv: str) -> None:
        account = {"session_key": session_key, "app_id": app_id, "openid": openid}
        decrypt_user_data(encrypted_data, iv, **account, now=NOW, expected={})

    assert refusal(call, data, iv) is Code.INVALID_INPUT
    assert refusal(call, DEMO["encrypted_data"], DEMO["iv"]) is Code.SESSION_KEY_STALE


@given(st.binary(min_size=1, max_size=200) | JSON_OBJECTS.map(lambda data: json.dumps(data).encode()), KEYS)
def test_any_plaintext_and_any_ciphertext_are_refused(plaintext: bytes, key: bytes) -> None:
    codes = {Code.SESSION_KEY_STALE, Code.SIGNATURE_MISMATCH}
    blocks = plaintext + b" " * (-len(plaintext) % 16)
    assert refusal(decrypt_plaintext, plaintext) in codes
    assert refusal(decrypt, encrypt_cbc(blocks, KEY, IV)) in codes
    assert refusal(decrypt, blocks, key=key) in codes


def test_user_data_decrypts_as_in_wechatpy() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        key, iv = chance.randbytes(16), chance.randbytes(16)
        data = watermarked() | {"nickName": any_text(chance), "openId": OPENID, "gender": chance.randrange(3)}
        plaintext = json.dumps(data, ensure_ascii=chance.random() < 0.5).encode()
        ciphertext = encrypt_cbc(pad(plaintext, 16), key, iv)
        theirs = WeChatWxaCrypto(encode(key), encode(iv), DEMO["appid"]).decrypt_message(encode(ciphertext))
        assert decrypt(ciphertext, key=key, iv=iv, expected=data) == theirs == data


# Signatures


def test_the_published_signatures() -> None:
    raw_data, session = VECTORS["raw_data.official"], VECTORS["session_signature.post"]
    assert raw_data_signature(raw_data["raw_data"], raw_data["session_key"]) == raw_data["signature"]
    assert session_signature(session["session_key"], session["body"]) == session["signature"]
    assert session_signature("key") == session_signature("key", "")
    for name in ("push.url_verify", "push.plain_mode"):
        vector = VECTORS[name]
        assert push_signature(vector["token"], vector["timestamp"], vector["nonce"]) == vector["signature"]
    for vector in MESSAGES:
        parts = [vector["token"], vector["timestamp"], vector["nonce"]]
        assert push_signature(*parts, vector["encrypt"]) == vector["msg_signature"]
        assert push_signature(*parts) == vector.get("url_signature", push_signature(*parts))


@given(st.lists(st.text(), max_size=5), st.text(), st.text())
def test_signatures_match_wechatpy_and_the_formulas(parts: list[str], data: str, key: str) -> None:
    signer = WeChatSigner()
    signer.add_data(*parts)
    assert push_signature(*parts) == push_signature(*reversed(parts)) == signer.signature
    assert raw_data_signature(data, key) == hashlib.sha1((data + key).encode()).hexdigest()
    assert session_signature(key, data) == hmac.new(key.encode(), data.encode(), "sha256").hexdigest()


@given(ANY_TEXT, ANY_TEXT)
def test_any_texts_can_be_signed_and_compared(one: str, other: str) -> None:
    lengths = [len(sign(one, other)) for sign in (raw_data_signature, push_signature, session_signature)]
    assert lengths == [40, 40, 64]
    assert constant_time_equals(one, other) == (one == other)
    assert constant_time_equals(one, one)
    assert not constant_time_equals(one, one + "\ud800")


# Messages


@EACH_MESSAGE
def test_the_published_messages_decrypt_and_encrypt(vector: dict[str, Any]) -> None:
    key = decode_aes_key(vector["encoding_aes_key"])
    assert decrypt_message(vector["encrypt"], key, vector["appid"]) == vector["plaintext"]
    assert len(vector["plaintext"].encode()) == vector["msg_len"]
    assert encrypt_message(vector["plaintext"], key, vector["appid"], vector["random"].encode()) == vector["encrypt"]


@EACH_MESSAGE
def test_a_flipped_bit_of_an_encrypted_message_is_refused_unless_cbc_hides_it(vector: dict[str, Any]) -> None:
    """A flip in the first block garbles only the random bytes, and alters as many bits in the second, of which the
    last 12 bytes are text. msg_signature detects it: see test_message_push.py."""
    masks = (0x01, 0x02, 0x04, 0x80)
    for at, encrypted in enumerate(flipped(base64.b64decode(vector["encrypt"]), masks)):
        if 4 <= at // len(masks) < 16 and masks[at % len(masks)] < 0x80:
            text = decrypt_message(encode(encrypted), AES_KEY, APP_ID)
            assert sum(one != other for one, other in zip(text, vector["plaintext"], strict=True)) == 1
        else:
            assert_rejected(encode(encrypted), AES_KEY, APP_ID)


@EACH_MESSAGE
def test_a_flipped_bit_of_aes_key_length_app_id_or_padding_is_refused(vector: dict[str, Any]) -> None:
    """The 16 random bytes before them may be any: only msg_signature covers these."""
    for key in flipped(AES_KEY, tuple(1 << bit for bit in range(8))):
        assert_rejected(vector["encrypt"], key, APP_ID)
    plaintext = unseal(vector["encrypt"])
    end = 20 + vector["msg_len"]
    for start, stop in ((16, 20), (end, len(plaintext))):
        for part in flipped(plaintext[start:stop], tuple(range(1, 256))):
            assert_rejected(seal(plaintext[:start] + part + plaintext[stop:]), AES_KEY, APP_ID)
    for prefix in flipped(plaintext[:16]):
        assert decrypt_message(seal(prefix + plaintext[16:]), AES_KEY, APP_ID) == vector["plaintext"]


def test_padding_runs_from_1_to_32_bytes_all_of_which_count() -> None:
    text = "x" * (96 - 20 - len(APP_ID))
    for count in range(1, 33):
        plaintext = unseal(encrypt_message(text[:-count], AES_KEY, APP_ID, bytes(16)))
        assert plaintext[-count:] == bytes([count]) * count
        assert len(plaintext) == 96
        assert decrypt_message(seal(plaintext), AES_KEY, APP_ID) == text[:-count]
        for altered in flipped(plaintext[-count:]):
            assert_rejected(seal(plaintext[:-count] + altered), AES_KEY, APP_ID)


def test_a_malformed_message_or_one_for_another_app_id_is_refused() -> None:
    for app_id in ("", APP_ID[:-1], APP_ID + "0", APP_ID.upper(), "\ud800"):
        assert_rejected(MESSAGES[0]["encrypt"], AES_KEY, app_id)
    for rest in (b"", bytes(3), bytes(4), b"\xff" * 4 + APP_ID.encode()):
        assert_rejected(seal(pad(bytes(16) + rest, 32)), AES_KEY, APP_ID)
    for plaintext in (b"", bytes(15), bytes(16) + b"\x00\x00\x00\x03ab"):  # the length is beyond the end
        assert_rejected(seal(pad(plaintext, 32)), AES_KEY, "")
    encrypt = MESSAGES[1]["encrypt"]
    shorter = encode(base64.b64decode(encrypt)[:-16])
    for encrypted in ("", encrypt + "\n", encrypt.rstrip("="), encrypt.replace("Q==", "R=="), encrypt[:-4], shorter):
        assert_rejected(encrypted, AES_KEY, APP_ID)


@given(st.text(), st.binary(min_size=32, max_size=32), st.text(), KEYS)
def test_any_message_survives_encryption(text: str, key: bytes, app_id: str, random: bytes) -> None:
    assert decrypt_message(encrypt_message(text, key, app_id, random), key, app_id) == text


@given(ANY_TEXT, st.binary(max_size=200), st.binary(min_size=32, max_size=32), ANY_TEXT)
def test_any_text_and_any_plaintext_as_a_message_is_refused(
    text: str, plaintext: bytes, key: bytes, app_id: str
) -> None:
    app_id += "."  # never empty
    blocks = plaintext + bytes(-len(plaintext) % 32)
    for encrypted in (text, encode(plaintext), encode(blocks), seal(blocks, key), seal(pad(plaintext, 32), key)):
        assert_rejected(encrypted, key, app_id)


def test_messages_are_exchanged_with_wechatpy() -> None:
    chance = random.Random(2)
    for _ in range(2000):
        key, app_id, text = chance.randbytes(32), f"wx{chance.randrange(10**16)}", any_text(chance)
        assert PrpCrypto(key).decrypt(encrypt_message(text, key, app_id, chance.randbytes(16)), app_id) == text
        assert decrypt_message(PrpCrypto(key).encrypt(text, app_id).decode(), key, app_id) == text


# EncodingAESKey


def test_two_bits_of_an_encoding_aes_key_are_unused() -> None:
    keys = [decode_aes_key("a" * 42 + last) for last in "ABCD"]
    assert keys == [base64.b64decode("a" * 42 + "A=")] * 4
    assert decode_aes_key("a" * 42 + "E") != keys[0]
