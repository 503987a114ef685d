"""WeChat's cryptography as pure functions: user data, signatures and the messages of the push.

Sources: https://developers.weixin.qq.com/miniprogram/dev/framework/open-ability/signature.html for user data,
https://developers.weixin.qq.com/miniprogram/dev/framework/server-ability/message-push.html for messages.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7, PaddingContext

from errors import ApiError, Code
from wechat import lenient

MAXIMUM_AGE_SECONDS = 600
CLOCK_SKEW_SECONDS = 60
_MESSAGE_PADDING = PKCS7(256)
"""Messages are padded as if AES had blocks of 256 bits. They are 16 random bytes, the text's length in 4 bytes,
big-endian, the text, and the app id."""


def decrypt_user_data(
    encrypted_data: str, iv: str, *, session_key: str, app_id: str, openid: str, now: float, expected: Mapping[str, Any]
) -> dict[str, Any]:
    """Decrypt the `encryptedData` of wx.getUserProfile and the like (AES-128-CBC, PKCS#7) and check its watermark.

    CBC does not authenticate: a change in the iv changes the first 16 bytes of the data. Hence `expected`.

    :param encrypted_data: base64 of some blocks of 16 bytes; how many, the limit of the request bounds.
    :param iv: base64 of 16 bytes.
    :param session_key: as WeChat sends it: base64 of 16 bytes.
    :param app_id: the app id that the watermark must name.
    :param openid: the user's; the data must not name another.
    :param now: seconds since the epoch; the watermark is at most MAXIMUM_AGE_SECONDS older or CLOCK_SKEW_SECONDS newer.
    :param expected: items that the data must contain, such as those of a `rawData` with a valid signature; may
        be empty.
    :raises ApiError: INVALID_INPUT naming encryptedData, iv or both; SESSION_KEY_STALE if the data does not decrypt,
        without a reason, which would make it a padding oracle; SIGNATURE_MISMATCH if the data is for another user or
        app, old or altered.
    """
    ciphertext, initial, key = (_decode_base64(text) for text in (encrypted_data, iv, session_key))
    is_valid = {"encryptedData": len(ciphertext) > 0 and len(ciphertext) % 16 == 0, "iv": len(initial) == 16}
    if not all(is_valid.values()):
        reason = ["Not base64, or of the wrong length: send it as WeChat gave it."]
        raise ApiError(Code.INVALID_INPUT, errors={name: reason for name, valid in is_valid.items() if not valid})
    if len(key) != 16:
        raise ApiError(Code.SESSION_KEY_STALE)
    padded = _process(_aes(key, initial).decryptor(), ciphertext)
    try:
        plaintext, is_padded = _process(PKCS7(128).unpadder(), padded), True
    except ValueError:
        plaintext, is_padded = padded, False  # go on, so that timing does not distinguish bad padding from bad JSON
    try:
        # Where nothing is expected, altered blocks show only by invalid UTF-8 and JSON.
        data = lenient.read(plaintext, "encryptedData") if expected else json.loads(plaintext.decode())
    except (ValueError, RecursionError):
        data = None
    if not is_padded or not isinstance(data, dict):
        raise ApiError(Code.SESSION_KEY_STALE)
    watermark = data.get("watermark")
    timestamp = watermark.get("timestamp") if isinstance(watermark, dict) and watermark.get("appid") == app_id else None
    is_fresh = type(timestamp) is int and now - MAXIMUM_AGE_SECONDS <= timestamp <= now + CLOCK_SKEW_SECONDS
    if not (is_fresh and expected.items() <= data.items() and data.get("openId", openid) == openid):
        raise ApiError(Code.SIGNATURE_MISMATCH)
    return data


def raw_data_signature(raw_data: str, session_key: str) -> str:
    """The `signature` sent with `rawData`: SHA-1 of both texts, in hexadecimal."""
    return hashlib.sha1(_encode(raw_data + session_key), usedforsecurity=False).hexdigest()


def session_signature(session_key: str, body: str = "") -> str:
    """HMAC-SHA-256 in hexadecimal; the key is the session_key as base64 text, not decoded.

    With an empty body it is the `signature` of checksession and resetusersessionkey:
    https://developers.weixin.qq.com/miniprogram/dev/OpenApiDoc/user-login/checkSessionKey.html
    """
    return hmac.new(_encode(session_key), _encode(body), hashlib.sha256).hexdigest()


def push_signature(*parts: str) -> str:
    """The `signature` (of token, timestamp and nonce) or `msg_signature` (of those and Encrypt) of a push.

    :returns: SHA-1 of the sorted, joined parts, in hexadecimal.
    """
    return hashlib.sha1(_encode("".join(sorted(parts))), usedforsecurity=False).hexdigest()


def constant_time_equals(given: str, expected: str) -> bool:
    """Compare two texts of any characters in constant time."""
    return hmac.compare_digest(_encode(given), _encode(expected))


def decode_aes_key(encoding_aes_key: str) -> bytes:
    """Decode an EncodingAESKey, 43 letters and digits, to its 32 bytes; 2 bits of its last character are unused."""
    return base64.b64decode(encoding_aes_key + "=")


def encrypt_message(text: str, aes_key: bytes, app_id: str, random: bytes) -> str:
    """Encrypt a message for the push (AES-256-CBC; the iv is the key's first 16 bytes).

    :param aes_key: 32 bytes.
    :param random: 16 fresh random bytes; as the iv is fixed, they make equal messages differ.
    :returns: base64.
    :raises ValueError: for a text with lone surrogates.
    """
    content = text.encode()
    padded = _process(_MESSAGE_PADDING.padder(), random + len(content).to_bytes(4, "big") + content + app_id.encode())
    return base64.b64encode(_process(_aes(aes_key, aes_key[:16]).encryptor(), padded)).decode()


def decrypt_message(encrypted: str, aes_key: bytes, app_id: str) -> bytes:
    """Undo `encrypt_message`, but for the encoding. It does not detect every change: check msg_signature first.

    :raises ValueError: whatever is wrong.
    """
    padded = _process(_aes(aes_key, aes_key[:16]).decryptor(), _decode_base64(encrypted))
    plaintext = _process(_MESSAGE_PADDING.unpadder(), padded)
    end = 20 + int.from_bytes(plaintext[16:20], "big")
    if end > len(plaintext) or not hmac.compare_digest(plaintext[end:], _encode(app_id)):
        raise ValueError("Wrong length or app id.")
    return plaintext[20:end]


def _encode(text: str) -> bytes:
    """UTF-8 that also accepts lone surrogates, which JSON from a client can contain."""
    return text.encode("utf-8", "surrogatepass")


def _decode_base64(text: str) -> bytes:
    """Decode canonical base64; b"" for anything else."""
    try:
        decoded = base64.b64decode(text)
    except ValueError:
        return b""
    return decoded if base64.b64encode(decoded).decode() == text else b""


def _aes(key: bytes, iv: bytes) -> Cipher[modes.CBC]:
    return Cipher(algorithms.AES(key), modes.CBC(iv))


def _process(context: CipherContext | PaddingContext, data: bytes) -> bytes:
    """Encrypt, decrypt, pad or, in constant time, remove the padding of all of the data.

    :raises ValueError: if the padding or the length is invalid.
    """
    return context.update(data) + context.finalize()
