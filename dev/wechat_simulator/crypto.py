"""WeChat's cryptography, written from its documentation and not from the service's code."""

import base64
import hashlib
import hmac
import secrets
import struct

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

MESSAGE_BLOCK_BITS = 32 * 8  # the message push pads to 32 bytes, though AES has blocks of 16


def encrypt_data(session_key: str, iv: bytes, plaintext: str) -> str:
    """Encrypt as `encryptedData` is: AES-128-CBC under the decoded session_key."""
    return base64.b64encode(_encrypt(base64.b64decode(session_key), iv, plaintext.encode(), 128)).decode()


def raw_data_signature(session_key: str, raw_data: str) -> str:
    return hashlib.sha1((raw_data + session_key).encode()).hexdigest()


def session_signature(session_key: str, body: bytes = b"") -> str:
    """Sign for checksession and the like; the key is the base64 text itself, not decoded."""
    return hmac.new(session_key.encode(), body, hashlib.sha256).hexdigest()


def push_signature(*parts: str) -> str:
    """Sign a push: the token, timestamp, nonce and, in safe mode, the ciphertext."""
    return hashlib.sha1("".join(sorted(parts)).encode()).hexdigest()


def encrypt_message(aes_key: str, message: bytes, app_id: str, prefix: bytes = b"") -> str:
    """Encrypt for the message push in safe mode.

    :param aes_key: the 43 characters of EncodingAESKey.
    :param prefix: 16 bytes; random if empty.
    """
    key = base64.b64decode(aes_key + "=")
    plaintext = (prefix or secrets.token_bytes(16)) + struct.pack(">I", len(message)) + message + app_id.encode()
    return base64.b64encode(_encrypt(key, key[:16], plaintext, MESSAGE_BLOCK_BITS)).decode()


def decrypt_message(aes_key: str, encrypted: str) -> tuple[bytes, str]:
    """Undo `encrypt_message`, and return the message and its app id.

    :raises ValueError: if it is not such a ciphertext.
    """
    key = base64.b64decode(aes_key + "=")
    decryptor = Cipher(algorithms.AES(key), modes.CBC(key[:16])).decryptor()
    padded = decryptor.update(base64.b64decode(encrypted, validate=True)) + decryptor.finalize()
    unpadder = PKCS7(MESSAGE_BLOCK_BITS).unpadder()
    plaintext = unpadder.update(padded) + unpadder.finalize()
    if len(plaintext) < 20:
        raise ValueError("too short")
    end = 20 + struct.unpack(">I", plaintext[16:20])[0]
    if end > len(plaintext):
        raise ValueError("length beyond the end")
    return plaintext[20:end], plaintext[end:].decode()


def _encrypt(key: bytes, iv: bytes, plaintext: bytes, block_bits: int) -> bytes:
    padder = PKCS7(block_bits).padder()
    encryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
    return encryptor.update(padder.update(plaintext) + padder.finalize()) + encryptor.finalize()
