"""The message push: WeChat calls the service."""

import json
import secrets
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import requests
from flask import Blueprint

from dev.wechat_simulator import crypto
from dev.wechat_simulator.wire import control_body
from dev.wechat_simulator.world import World, new_openid

ANSWER_SECONDS = 5
ATTEMPTS = 3
CONTENT_TYPE = {"json": "application/json", "xml": "text/xml"}


@dataclass(frozen=True)
class PushSettings:
    """The account's settings for the message push.

    :param aes_key: the 43 characters of EncodingAESKey, for safe mode.
    :param url: the default address.
    """

    token: str = ""
    aes_key: str = ""
    url: str = ""


def message_push(world: World, settings: PushSettings) -> Blueprint:
    """Make the routes that make WeChat push."""
    blueprint = Blueprint("push", __name__, url_prefix="/simulator/push")

    @blueprint.post("")
    def push() -> tuple[dict[str, Any], int]:
        wanted = control_body()
        url = wanted.get("url") or settings.url
        wire_format = wanted.get("format", "json")
        mode = wanted.get("mode") or ("safe" if settings.aes_key else "plain")
        if not settings.token or not url or wire_format not in CONTENT_TYPE or mode not in ("safe", "plain"):
            return {"error": "requires a --push-token, a url, format json or xml, and mode safe or plain"}, 400
        if mode == "safe" and not settings.aes_key:
            return {"error": "safe mode requires a --push-aes-key"}, 400
        message = complete(wanted.get("message") or {})
        attempts = []
        with requests.Session() as http:
            http.trust_env = False
            for _ in range(wanted.get("attempts", ATTEMPTS)):
                query = signed_query(wanted)
                query["openid"] = message["FromUserName"]
                body = _write(message, wire_format)
                if mode == "safe":
                    encrypted = crypto.encrypt_message(settings.aes_key, body, wanted.get("app_id", world.app_id))
                    parts = settings.token, query["timestamp"], query["nonce"], encrypted
                    query |= {"encrypt_type": "aes", "msg_signature": crypto.push_signature(*parts)}
                    body = _write({"ToUserName": message["ToUserName"], "Encrypt": encrypted}, wire_format)
                if "signature" in wanted:  # the one that is checked in this mode
                    query["msg_signature" if mode == "safe" else "signature"] = wanted["signature"]
                attempt = _exchange(http, "POST", url, query, body, CONTENT_TYPE[wire_format])
                reply = _open_reply(attempt["body"], settings, world.app_id) if mode == "safe" else None
                attempts.append(attempt | {"reply": reply})
                if attempt["status"] == 200:
                    break
        return {"answers": attempts}, 200

    @blueprint.post("/verify")
    def verify() -> tuple[dict[str, Any], int]:
        wanted = control_body()
        url = wanted.get("url") or settings.url
        if not settings.token or not url:
            return {"error": "requires a --push-token and a url"}, 400
        query = signed_query(wanted) | {"echostr": str(secrets.randbelow(2**63))}
        if "signature" in wanted:
            query["signature"] = wanted["signature"]
        with requests.Session() as http:
            http.trust_env = False
            attempt = _exchange(http, "GET", url, query)
        verified = attempt["status"] == 200 and attempt["body"] == query["echostr"]
        return {"verified": verified, "status": attempt["status"], "body": attempt["body"]}, 200

    def signed_query(wanted: dict[str, Any]) -> dict[str, str]:
        timestamp = str(wanted.get("timestamp", int(world.now())))
        nonce = str(wanted.get("nonce", secrets.randbelow(2**31)))
        signature = crypto.push_signature(settings.token, timestamp, nonce)
        return {"signature": signature, "timestamp": timestamp, "nonce": nonce}

    def complete(message: dict[str, Any]) -> dict[str, Any]:
        filled = {
            "ToUserName": "gh_" + world.app_id[-12:],
            "FromUserName": new_openid(),
            "CreateTime": int(world.now()),
        }
        filled |= message
        if message.get("MsgType") != "event":
            filled.setdefault("MsgId", secrets.randbelow(2**63))
        return filled

    return blueprint


def _exchange(
    http: requests.Session, method: str, url: str, query: dict[str, str], body: bytes = b"", content_type: str = ""
) -> dict[str, Any]:
    """Call the service and return its response; the status is None if there is none in time."""
    headers = {"Content-Type": content_type} if content_type else {}
    started = time.monotonic()
    status, content = None, None
    try:
        answer = http.request(
            method, url, params=query, data=body, headers=headers, timeout=ANSWER_SECONDS, allow_redirects=False
        )
        status, content = answer.status_code, answer.content.decode(errors="replace")
    except requests.RequestException:
        pass
    return {"status": status, "seconds": round(time.monotonic() - started, 3), "body": content}


def _open_reply(body: str | None, settings: PushSettings, app_id: str) -> dict[str, Any] | None:
    """Read an encrypted reply; None unless it is signed and from this app."""
    try:
        outer = _read(body or "")
        encrypted, signature = outer["Encrypt"], outer["MsgSignature"]
        expected = crypto.push_signature(settings.token, str(outer["TimeStamp"]), str(outer["Nonce"]), encrypted)
        message, sender = crypto.decrypt_message(settings.aes_key, encrypted)
        return _read(message.decode()) if signature == expected and sender == app_id else None
    except (ValueError, KeyError, TypeError):
        return None


def _write(message: dict[str, Any], wire_format: str) -> bytes:
    if wire_format == "xml":
        return f"<xml>{_elements(message)}</xml>".encode()
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode()


def _elements(message: dict[str, Any]) -> str:
    """XML as WeChat writes it: text as CDATA, numbers bare, a list as repeated elements."""
    written = ""
    for name, value in message.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                inner = _elements(item)
            elif isinstance(item, str):
                inner = "<![CDATA[" + item.replace("]]>", "]]]]><![CDATA[>") + "]]>"
            else:
                inner = escape(str(item))
            written += f"<{name}>{inner}</{name}>"
    return written


def _read(body: str) -> dict[str, Any]:
    """Read JSON or XML.

    :raises ValueError: if it is neither.
    """
    if body.lstrip().startswith("<"):
        try:
            root = ET.fromstring(body)
        except ET.ParseError:
            raise ValueError("broken XML") from None
        return {child.tag: _content(child) for child in root}
    message = json.loads(body)
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def _content(element: ET.Element) -> Any:
    return {child.tag: _content(child) for child in element} if len(element) else element.text or ""
