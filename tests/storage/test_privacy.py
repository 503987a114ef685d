import secrets
from itertools import product

import pytest

from storage.privacy import Cipher, DecryptionError, mask_phone

KEY, OTHER_KEY = secrets.token_bytes(32), secrets.token_bytes(32)


@pytest.mark.parametrize("text", ["", "13812345678", "快上", "\x00", "x" * 10_000])
def test_what_is_encrypted_decrypts_in_its_place(text: str) -> None:
    value = Cipher([KEY]).encrypt(text, "place")
    assert value.isascii()
    assert text not in value or not text
    assert Cipher([KEY]).decrypt(value, "place") == text


def test_the_same_text_never_looks_the_same_twice() -> None:
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


@pytest.mark.parametrize(
    ("phone", "masked"),
    [
        ("13812345678", "138****5678"),
        ("", ""),
        ("110", "***"),
        ("+8613812345678", "**************"),
        ("1381234567a", "***********"),
        ("１３８１２３４５６７８", "***********"),
    ],
)
def test_a_phone_number_shows_seven_of_its_eleven_digits_and_anything_else_nothing(phone: str, masked: str) -> None:
    assert mask_phone(phone) == masked
