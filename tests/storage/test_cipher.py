import base64
import hashlib
import hmac
import secrets
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.cipher import Cipher, DecryptionError

KEY, OTHER_KEY = secrets.token_bytes(32), secrets.token_bytes(32)


@pytest.mark.parametrize("text", ["", "13812345678", "快上", "\x00", "x" * 10_000])
def test_encrypted_text_decrypts_in_its_place(text: str) -> None:
    value = Cipher([KEY]).encrypt(text, "place")
    assert value.isascii()
    assert text not in value or not text
    assert Cipher([KEY]).decrypt(value, "place") == text


def test_the_same_text_is_encrypted_differently_each_time() -> None:
    assert Cipher([KEY]).encrypt("text", "place") != Cipher([KEY]).encrypt("text", "place")


def test_a_value_copied_to_another_place_does_not_decrypt() -> None:
    with pytest.raises(DecryptionError):
        Cipher([KEY]).decrypt(Cipher([KEY]).encrypt("text", "place"), "another place")


def test_the_first_key_encrypts_and_all_decrypt() -> None:
    old = Cipher([KEY]).encrypt("text", "place")
    rotated = Cipher([OTHER_KEY, KEY])
    assert rotated.decrypt(old, "place") == "text"
    assert Cipher([OTHER_KEY]).decrypt(rotated.encrypt("text", "place"), "place") == "text"
    with pytest.raises(DecryptionError):
        Cipher([OTHER_KEY]).decrypt(old, "place")


def test_a_value_with_any_character_changed_or_missing_does_not_decrypt() -> None:
    value = Cipher([KEY]).encrypt("text", "place")
    for position, replacement in product(range(len(value)), ("", "A", "%", "é")):
        altered = value[:position] + replacement + value[position + 1 :]
        if altered == value:
            continue
        with pytest.raises(DecryptionError):
            Cipher([KEY]).decrypt(altered, "place")


def hkdf(key: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, no salt and one block, spelt out."""
    extracted = hmac.digest(bytes(32), key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def blind_index(keys: list[bytes], text: str, context: str) -> str:
    """The one that is stored."""
    return next(Cipher(keys).blind_indexes(text, context))


@given(st.text(), st.text())
def test_a_blind_index_is_an_hmac_under_a_key_of_its_own(text: str, context: str) -> None:
    digest = hmac.digest(hkdf(KEY, f"blind index:{context}".encode()), text.encode(), "sha256")
    key_id = hashlib.sha256(KEY).hexdigest()[:8]
    index = blind_index([KEY, OTHER_KEY], text, context)
    assert index == f"{key_id}.{base64.b64encode(digest).decode()}"
    assert len(index) == 53
    assert index.isascii()


def test_equal_texts_have_equal_indexes_in_one_column_and_others_in_another() -> None:
    index = blind_index([KEY], "text", "users.phone")
    assert blind_index([KEY], "text", "users.phone") == index
    others = [("text", "users.email"), ("Text", "users.phone"), ("text ", "users.phone"), ("etext", "users.phon")]
    assert index not in [blind_index([KEY], *other) for other in others]
    assert blind_index([OTHER_KEY], "text", "users.phone").partition(".")[2] != index.partition(".")[2]


def test_a_search_uses_the_indexes_of_all_keys_and_the_first_one_is_stored() -> None:
    old, new = (blind_index([key], "text", "users.phone") for key in (KEY, OTHER_KEY))
    assert list(Cipher([OTHER_KEY, KEY]).blind_indexes("text", "users.phone")) == [new, old]


def test_values_and_indexes_begin_with_the_id_of_the_first_key() -> None:
    cipher = Cipher([OTHER_KEY, KEY])
    assert cipher.key_id == hashlib.sha256(OTHER_KEY).hexdigest()[:8]
    assert cipher.encrypt("text", "place").startswith(f"{cipher.key_id}.")
    assert next(cipher.blind_indexes("text", "place")).startswith(f"{cipher.key_id}.")
