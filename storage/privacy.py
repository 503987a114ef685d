"""Masks for what people may see of personal data, and the cipher for what is kept of it."""

import base64
import binascii
import hashlib
import os
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES = 12


class DecryptionError(ValueError):
    """The value was not encrypted by one of these keys for this context, or has been altered since."""


class Cipher:
    """AES-256-GCM (NIST SP 800-38D) with a random nonce and the key's id in each value.

    :param keys: 32 bytes each; the first encrypts, all decrypt.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = {hashlib.sha256(key).hexdigest()[:8]: AESGCM(key) for key in keys}
        self._current = next(iter(self._keys))

    def encrypt(self, text: str, context: str) -> str:
        """Encrypt a text for one place.

        :param context: where the value is kept, such as a key or a row and column; it decrypts nowhere else.
        :returns: ASCII: the key's id, a dot, and base64 of nonce, ciphertext and tag.
        """
        nonce = os.urandom(_NONCE_BYTES)
        sealed = self._keys[self._current].encrypt(nonce, text.encode(), context.encode())
        return f"{self._current}.{base64.b64encode(nonce + sealed).decode()}"

    def decrypt(self, value: str, context: str) -> str:
        """Undo `encrypt`.

        :raises DecryptionError: if the value, the context or the key is another.
        """
        key_id, _, payload = value.partition(".")
        try:
            raw = base64.b64decode(payload, validate=True)
            return self._keys[key_id].decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], context.encode()).decode()
        except (KeyError, ValueError, binascii.Error, InvalidTag):
            raise DecryptionError("The value does not decrypt here.") from None


def mask_phone(phone: str) -> str:
    """`138****5678` for 11 digits; anything else shows no character at all, only that there is something."""
    if len(phone) == 11 and phone.isascii() and phone.isdigit():
        return f"{phone[:3]}****{phone[-4:]}"
    return "*" * len(phone)
