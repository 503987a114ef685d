"""The published known answers, and what the tests of the cryptography share."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import settings
from hypothesis import strategies as st

from errors import ApiError, Code

VECTORS = {
    vector["id"]: vector for vector in json.loads(Path(__file__).with_name("vectors.json").read_text())["vectors"]
}

PROPERTY = settings(deadline=None, max_examples=100, database=None)
ANY_TEXT = st.text(st.characters())
"""With halves of surrogate pairs."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
JSON_OBJECTS = st.dictionaries(st.text(), JSON, max_size=4)


def refusal(call: Callable[..., Any], *args: Any, **named: Any) -> Code:
    """The code that the call is refused with; no answer and no other exception will do."""
    with pytest.raises(ApiError) as caught:
        call(*args, **named)
    return caught.value.api_code


def outcome(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """What the call answers, or the code that it is refused with."""
    try:
        return call(*args, **named)
    except ApiError as error:
        return error.api_code


def flipped(data: bytes, masks: tuple[int, ...] = (0x01, 0x02, 0x10, 0x80)) -> Iterator[bytes]:
    """The data with one byte altered, for each byte and each mask."""
    for at in range(len(data)):
        for mask in masks:
            yield data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def encrypt_cbc(padded: bytes, key: bytes, iv: bytes) -> bytes:
    encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    return encryptor.update(padded) + encryptor.finalize()


def decrypt_cbc(ciphertext: bytes, key: bytes, iv: bytes) -> bytes:
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    return decryptor.update(ciphertext) + decryptor.finalize()


def pad(data: bytes, block: int) -> bytes:
    count = block - len(data) % block
    return data + bytes([count]) * count
