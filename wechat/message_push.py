"""WeChat's message push: events and messages in, replies out, in the account's format and mode.

Source: https://developers.weixin.qq.com/miniprogram/dev/framework/server-ability/message-push.html
"""

import hashlib
import json
import logging
import math
import re
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from errors import ApiError, Code, Message
from wechat.crypto import constant_time_equals, decode_aes_key, decrypt_message, encrypt_message, push_signature
from wechat.lenient import UNSTORABLE, Form, read

logger = logging.getLogger(__name__)

PUSH_NOT_CONFIGURED = Message("未配置消息推送", "Message push is not configured")
WINDOW_SECONDS = 300
"""The largest difference between a timestamp and our clock, in either direction."""
MAXIMUM_AGE_SECONDS = 86400
"""The largest age of a message: in safe mode too, a recorded one can be sent with timestamp and nonce exchanged."""


class PushMessage(NamedTuple):
    """A message or event that WeChat has pushed."""

    fields: dict[str, Any]
    """Named as WeChat names them. In XML every value is a str or dict, or a list of these for repeated elements."""

    form: Form
    """The format of the body, and of the reply."""

    @property
    def kind(self) -> tuple[str, str]:
        """MsgType, such as `event` or `text`, and Event; each is empty if there is none."""
        return str(self.fields.get("MsgType", "")), str(self.fields.get("Event", ""))

    @property
    def key(self) -> str:
        """Identifies the message, also when WeChat sends it again: 64 hexadecimal digits.

        A hash of MsgId or, without one, of all fields: FromUserName, CreateTime and Event are the same for two users
        about whom WeChat itself sends an event in the same second.
        """
        message_id = self.fields.get("MsgId")
        identity = {"MsgId": message_id} if message_id else self.fields
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def is_recent(self, now: float) -> bool:
        """Whether CreateTime is near our clock, or at most MAXIMUM_AGE_SECONDS before it; False if there is none."""
        return -WINDOW_SECONDS <= _age(str(self.fields.get("CreateTime")).strip(), now) <= MAXIMUM_AGE_SECONDS


class MessagePush:
    """One account's message push. Our settings decide the mode, never the request's `encrypt_type`.

    :param token: the account's token, which WeChat signs with; empty if push is not configured.
    :param encoding_aes_key: 43 letters and digits for an account in safe mode or compatibility mode: only encrypted
        messages are accepted. Empty for an account in plain mode.
    :param app_id: the app id that encrypted messages must name.
    """

    def __init__(self, token: str, encoding_aes_key: str, app_id: str) -> None:
        self._token, self._app_id = token, app_id
        self._aes_key = decode_aes_key(encoding_aes_key) if encoding_aes_key else None

    def verify(self, query: Mapping[str, str], name: str, *encrypted: str, now: float) -> None:
        """Verify a request: the GET request, too, that WeChat sends when the address is configured.

        :param name: of the signature: `signature`, or `msg_signature`, which is also over what is encrypted.
        :param now: seconds since the epoch.
        :raises ApiError: SIGNATURE_MISMATCH if it is missing, wrong or old; NOT_FOUND if push is not configured.
        """
        if not self._token:  # with which anybody could sign
            raise ApiError(Code.NOT_FOUND, message=PUSH_NOT_CONFIGURED)
        timestamp, nonce = query.get("timestamp", ""), query.get("nonce", "")
        if not constant_time_equals(query.get(name, ""), push_signature(self._token, timestamp, nonce, *encrypted)):
            raise refused("wrong token, or altered")
        if abs(_age(timestamp, now)) > WINDOW_SECONDS:
            raise refused("old timestamp, or our clock is wrong")

    def open(self, query: Mapping[str, str], body: bytes, now: float) -> PushMessage:
        """Verify and read a POST request. A replay has the same `PushMessage.key`, as long as it `is_recent`.

        In plain mode the signature does not cover the body: anybody who sees a request can send another body with it.

        :param now: seconds since the epoch.
        :raises ApiError: INVALID_INPUT for malformed bodies; SIGNATURE_MISMATCH if the signature is missing, wrong, old
            or for another account, or the body is plain in safe mode; NOT_FOUND as `verify` does.
        """
        if self._aes_key is None:
            self.verify(query, "signature", now=now)
            return _parse(body)
        envelope = _parse(body, source=None)
        encrypted = envelope.fields.get("Encrypt")
        if not isinstance(encrypted, str):
            raise refused("plain, but an EncodingAESKey is set")
        self.verify(query, "msg_signature", encrypted, now=now)
        try:
            content = decrypt_message(encrypted, self._aes_key, self._app_id)
        except ValueError:
            raise refused("wrong EncodingAESKey or app id") from None
        return _parse(content)._replace(form=envelope.form)

    def seal(self, reply: Mapping[str, Any], form: Form, now: float) -> str:
        """Compose the reply to a message, encrypted and signed in safe mode.

        Characters that XML cannot hold are dropped.

        :param reply: in XML a dict nests, a list repeats its element, None is empty, and anything else is its `str`;
            its names must be XML's.
        :param now: seconds since the epoch.
        :raises ValueError: for NaN, infinity, or half a surrogate pair in JSON.
        """
        body = _compose(reply, form)
        body.encode()  # or the response would fail
        if self._aes_key is None:
            return body
        encrypted = encrypt_message(body, self._aes_key, self._app_id, secrets.token_bytes(16))
        timestamp, nonce = int(now), secrets.token_hex(8)
        signature = push_signature(self._token, str(timestamp), nonce, encrypted)
        return _compose({"Encrypt": encrypted, "MsgSignature": signature, "TimeStamp": timestamp, "Nonce": nonce}, form)


def _age(timestamp: str, now: float) -> float:
    """The seconds since a timestamp; infinitely many since anything else."""
    return now - int(timestamp) if re.fullmatch("[0-9]{1,12}", timestamp) else math.inf


def refused(why: str) -> ApiError:
    """Log the reason, which the response does not reveal."""
    logger.warning("message push refused", extra={"reason": why})
    return ApiError(Code.SIGNATURE_MISMATCH)


def _parse(body: bytes, source: str | None = "message push") -> PushMessage:
    """Read a JSON object or an <xml> element; the first character that is not blank decides which."""
    form: Form = "xml" if body.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") else "json"
    fields = read(body, source, form)
    if fields is None:
        logger.warning("message push refused", extra={"reason": "neither a JSON object nor an <xml> element"})
        raise ApiError(Code.INVALID_INPUT, errors={"body": ["Neither a JSON object nor an <xml> element."]})
    return PushMessage(fields, form)


def _compose(reply: Mapping[str, Any], form: Form) -> str:
    if form == "xml":
        return _compose_xml("xml", reply)
    return json.dumps(reply, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _compose_xml(name: str, value: Any) -> str:
    if isinstance(value, list):
        return "".join(_compose_xml(name, item) for item in value)
    if isinstance(value, Mapping):
        content = "".join(_compose_xml(child, item) for child, item in value.items())
    else:
        text = UNSTORABLE.sub("", "" if value is None else str(value))
        content = escape(text, {"\r": "&#13;"})  # parsers turn a bare one into a line feed
    return f"<{name}>{content}</{name}>"
