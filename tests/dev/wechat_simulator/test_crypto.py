"""The simulator's cryptography against the published examples."""

import base64

import pytest

from dev.wechat_simulator import crypto
from tests.wechat.harness import VECTORS

SAFE, REPLY = VECTORS["push.safe_mode_json"], VECTORS["push.safe_mode_json_reply"]


def test_user_data_is_encrypted_and_signed_as_published() -> None:
    demo, raw, session = (
        VECTORS[name] for name in ("encrypted_data.official_demo", "raw_data.official", "session_signature.post")
    )
    iv = base64.b64decode(demo["iv"])
    assert crypto.encrypt_data(demo["session_key"], iv, demo["plaintext"]) == demo["encrypted_data"]
    assert crypto.raw_data_signature(raw["session_key"], raw["raw_data"]) == raw["signature"]
    assert crypto.session_signature(session["session_key"], session["body"].encode()) == session["signature"]


@pytest.mark.parametrize("vector", [SAFE, REPLY], ids=["message", "reply"])
def test_pushes_are_encrypted_and_signed_as_published(vector: dict[str, str]) -> None:
    key, message, app_id = vector["encoding_aes_key"], vector["plaintext"].encode(), vector["appid"]
    assert crypto.encrypt_message(key, message, app_id, vector["random"].encode()) == vector["encrypt"]
    assert crypto.decrypt_message(key, vector["encrypt"]) == (message, app_id)
    assert crypto.encrypt_message(key, message, app_id) != crypto.encrypt_message(key, message, app_id)
    parts = vector["token"], vector["timestamp"], vector["nonce"], vector["encrypt"]
    assert crypto.push_signature(*parts) == vector["msg_signature"]


@pytest.mark.parametrize("encrypted", ["", "AAAA", "A" * 43 + "=", "not base64!", SAFE["encrypt"][:-24]])
def test_invalid_ciphertext_is_rejected(encrypted: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        crypto.decrypt_message(SAFE["encoding_aes_key"], encrypted)
