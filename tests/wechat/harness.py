"""The published known answers, and helpers for the tests of WeChat's protocols."""

import json
import random
import string
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import strategies as st
from werkzeug import Request, Response
from werkzeug.serving import make_server

from errors import ApiError, Code
from overload import Door
from wechat.transport import Transport

VECTORS = {
    vector["id"]: vector for vector in json.loads(Path(__file__).with_name("vectors.json").read_text())["vectors"]
}

ANY_TEXT = st.text(st.characters())
"""Including lone surrogates."""

STORABLE = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff") | st.sampled_from("\t\n\r")
)
"""Text that is read as it is."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | STORABLE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STORABLE, inner, max_size=3),
    max_leaves=8,
)
JSON_OBJECTS = st.dictionaries(STORABLE, JSON, max_size=4)


def refusal(call: Callable[..., Any], *args: Any, **named: Any) -> Code:
    """The code of the ApiError that the call raises."""
    with pytest.raises(ApiError) as caught:
        call(*args, **named)
    return caught.value.api_code


def outcome(call: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """What the call returns, or the code of the ApiError that it raises."""
    try:
        return call(*args, **named)
    except ApiError as error:
        return error.api_code


def any_text(chance: random.Random) -> str:
    """Empty, short or long; Chinese, emoji, ASCII or all of them."""
    printable = string.printable.translate({11: None, 12: None})
    alphabet = chance.choice(["微信快上你好世界，。", "😀👨‍👩‍👧🇨🇳𠮷", printable, "a微😀\u202e<&]]>\"'\\"])
    return "".join(chance.choices(alphabet, k=chance.choice([0, 1, 7, 50, 500])))


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


def transport_to(base_url: str) -> Transport:
    return Transport(base_url, places=1000, door=Door(100, 1000))


@contextmanager
def server(view: Callable[[Request], Response]) -> Iterator[str]:
    """Run a server with one view on a free port."""
    server = make_server("127.0.0.1", 0, Request.application(view))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
