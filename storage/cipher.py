"""Encrypts personal data and secrets at rest, and makes the blind indexes that find them."""

import base64
import hashlib
import hmac
import os
from collections.abc import Iterator, Sequence
from typing import cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flask import current_app
from werkzeug.local import LocalProxy

_NONCE_BYTES = 12


class DecryptionError(ValueError):
    """The value was not encrypted with one of these keys for this context, or has been altered."""


class Cipher:
    """AES-256-GCM (NIST SP 800-38D) with a random nonce, and blind indexes; each value starts with the id of its key.

    :param keys: 32 bytes each; the first encrypts, all decrypt.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = {hashlib.sha256(key).hexdigest()[:8]: key for key in keys}
        self.key_id = next(iter(self._keys))
        """The id of the first key, 8 hex digits: values of this cipher start with it and a dot."""

    def encrypt(self, text: str, context: str) -> str:
        """Encrypt a text for one place.

        :param context: where the value is stored, such as a key or a row and column; it decrypts nowhere else.
        :returns: ASCII: the key's id, a dot, and base64 of nonce, ciphertext and tag: 155 bytes of UTF-8 make 253
            characters, 347 make 509.
        :raises UnicodeEncodeError: if the text holds half a surrogate pair.
        """
        nonce = os.urandom(_NONCE_BYTES)
        sealed = AESGCM(self._keys[self.key_id]).encrypt(nonce, text.encode(), context.encode())
        return f"{self.key_id}.{base64.b64encode(nonce + sealed).decode()}"

    def decrypt(self, value: str, context: str) -> str:
        """Undo `encrypt`.

        :raises DecryptionError: if the value, the context or the key is another.
        """
        key_id, _, payload = value.partition(".")
        try:
            raw = base64.b64decode(payload, validate=True)
            return AESGCM(self._keys[key_id]).decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], context.encode()).decode()
        except (KeyError, ValueError, InvalidTag):
            raise DecryptionError("The value does not decrypt here.") from None

    def blind_indexes(self, text: str, context: str) -> Iterator[str]:
        """Make the HMAC-SHA-256 of a text under each key, the first key's first: to find equal texts unrevealed.

        What is stored has that of the first key; a search looks for all of them, as keys change.

        Nothing is normalised: `A@b.cn` and `a@b.cn`, or `138 1234 5678` and `13812345678`, are not equal.

        :param context: the table and column; the same text has another index in another column.
        :returns: each ASCII, 53 characters: the key's id, a dot, and base64.
        :raises UnicodeEncodeError: if the text holds half a surrogate pair.
        """
        for key_id, key in self._keys.items():
            # RFC 5869: a key for this column alone, which does not reveal the encryption key.
            kdf = HKDF(SHA256(), length=32, salt=None, info=f"blind index:{context}".encode())
            yield f"{key_id}.{base64.b64encode(hmac.digest(kdf.derive(key), text.encode(), 'sha256')).decode()}"


cipher = cast(Cipher, LocalProxy(lambda: current_app.extensions["cipher"]))
"""Encrypts with the first of ENCRYPTION_KEYS."""
