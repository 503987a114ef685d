"""Message push: what WeChat sends by itself, and the functions that handle it.

A handler is a plain function that takes WeChat's fields. It runs after WeChat has had its answer:

    @on("event", "subscribe_msg_popup_event")
    def remember_subscription(message): ...

A responder answers at once, in the format and mode of the account, and must be quick. It may be asked again, and where
it fails WeChat gets its `success`:

    @answers("text")
    def hand_over(message): return {"MsgType": "transfer_customer_service", ...}
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import partial
from typing import Any

from flask import Response, request
from redis.exceptions import RedisError
from sqlalchemy import update

import errors
import wechat
from blueprints.api import Blueprint, read_body
from concurrency import background
from errors import ApiError, Code
from storage import database, redis, sessions
from storage.models import PROFILE_FIELDS, Identity, User
from telemetry.redaction import hide
from wechat.push import Message, MessagePush

logger = logging.getLogger(__name__)

Fields = dict[str, Any]

NOT_CONFIGURED = errors.Message("未配置消息推送", "Message push is not configured")
CONTENT_TYPES = {"json": "application/json", "xml": "text/xml; charset=utf-8"}
MAXIMUM_BYTES = 128 * 1024
"""A body has to be read before its signature can be checked."""
PENDING_SECONDS = 4
"""Less than the 5 s after which WeChat sends again what it got no answer to: a process that died may have taken it."""
HANDLED = b"handled"
REMEMBER_SECONDS = 86400
COLUMNS_BY_REVOKE_INFO = {
    "6": ("nickname", "avatar_url"),
    "8": ("phone",),
    "19": ("nickname",),
    "20": ("avatar_url",),
}
"""What the numbers of RevokeInfo mean for us; the others are of things that we do not keep."""

blueprint = Blueprint("messages", __name__, description="消息推送 Message push")
handlers: dict[tuple[str, str], list[Callable[[Fields], object]]] = {}
responders: dict[tuple[str, str], Callable[[Fields], Fields]] = {}


def on(message_type: str, event: str = "") -> Callable[[Callable[[Fields], object]], Callable[[Fields], object]]:
    """Register a handler for a MsgType, or for one Event of the MsgType `event`.

    It is called once, and not again if it fails: WeChat has had its answer by then.
    """

    def register(handler: Callable[[Fields], object]) -> Callable[[Fields], object]:
        handlers.setdefault((message_type, event), []).append(handler)
        return handler

    return register


def answers(message_type: str, event: str = "") -> Callable[[Callable[[Fields], Fields]], Callable[[Fields], Fields]]:
    """Register the responder for a MsgType, or for one Event of the MsgType `event`."""

    def register(responder: Callable[[Fields], Fields]) -> Callable[[Fields], Fields]:
        responders[message_type, event] = responder
        return responder

    return register


def _parameters(*names: str, required: bool) -> list[dict[str, Any]]:
    return [{"name": name, "in": "query", "required": required, "schema": {"type": "string"}} for name in names]


@blueprint.route("/messages")
@blueprint.doc(parameters=_parameters("signature", "timestamp", "nonce", "echostr", required=True))
@blueprint.response(200, {"type": "string"}, content_type="text/plain", description="`echostr` as it came.")
@blueprint.fails(Code.INVALID_INPUT, Code.SIGNATURE_MISMATCH)
@blueprint.fails(Code.NOT_FOUND, message=NOT_CONFIGURED)
def verify_url() -> Response:
    """Show WeChat that this address is ours"""
    return _text(_push().verify_url(request.args, time.time()))


@blueprint.route("/messages", methods=["POST"])
@blueprint.doc(
    parameters=_parameters("timestamp", "nonce", required=True)
    + _parameters("signature", "msg_signature", required=False),
    requestBody={"content": {"application/json": {"schema": {"type": "object"}}, "text/xml": {}}},
)
@blueprint.response(
    200,
    {"type": "string"},
    transaction=False,
    content_type="text/plain",
    description="`success`, or a responder's reply.",
)
@blueprint.alt_response(200, schema={"type": "object"}, content_type="application/json")
@blueprint.alt_response(200, schema={"type": "string"}, content_type="text/xml")
@blueprint.fails(Code.INVALID_INPUT, Code.SIGNATURE_MISMATCH, Code.PAYLOAD_TOO_LARGE, Code.UNAVAILABLE)
@blueprint.fails(Code.NOT_FOUND, message=NOT_CONFIGURED)
def receive() -> Response:
    """Take a message of WeChat's

    Its handlers run after the answer. A message that comes again is answered again, and handled once.
    """
    request.max_content_length = MAXIMUM_BYTES
    body = read_body(request)
    if _is_probe(body):
        return _text("success")
    push = _push()
    message = push.open(request.args, body, time.time())
    hide(*(value for name, value in message.fields.items() if name not in ("MsgType", "Event")))
    background.require_room()
    response = _reply(push, message) or _text("success")
    key = f"message:{message.key}"
    is_new = bool(redis.set(key, b"received", nx=True, ex=PENDING_SECONDS))
    if not is_new and redis.get(key) != HANDLED:
        raise ApiError(Code.UNAVAILABLE)  # whoever has it may have died: WeChat is to send it once more
    told = {"type": message.type, "event": message.event, "repeat": not is_new, "handlers": len(_handlers(message))}
    logger.info("message received", extra=told)
    if is_new:
        # In this request's context: by then the next one has begun, or none.
        response.call_on_close(partial(copy_context().run, _begin, key, message))
    return response


def _reply(push: MessagePush, message: Message) -> Response | None:
    """What a responder answers; None if there is none, or it fails, which the handlers must not suffer from."""
    responder = next((responders[name] for name in _names(message) if name in responders), None)
    if responder is None:
        return None
    try:
        reply = push.seal(responder(message.fields), message.form, time.time())
    except Exception:
        logger.exception("a responder failed", extra={"type": message.type, "event": message.event})
        return None
    return Response(reply, content_type=CONTENT_TYPES[message.form])


def _begin(key: str, message: Message) -> None:
    """Begin to handle a message whose answer has gone out, unless another one with the same message did so already."""
    try:
        is_first = redis.set(key, HANDLED, ex=REMEMBER_SECONDS, get=True) != HANDLED
    except RedisError as error:
        logger.error("a message may be handled twice", extra={"reason": type(error).__name__})
        is_first = True
    if is_first:
        for handler in _handlers(message):
            background.submit(handler, message.fields)


def _handlers(message: Message) -> list[Callable[[Fields], object]]:
    return [handler for name in dict.fromkeys(_names(message)) for handler in handlers.get(name, ())]


def _names(message: Message) -> list[tuple[str, str]]:
    """Under which names there may be functions for a message: of its own event first, then of all events."""
    return [(message.type, message.event), (message.type, "")]


def _push() -> MessagePush:
    push = wechat.message_push()
    if push is None:
        raise ApiError(Code.NOT_FOUND, message=NOT_CONFIGURED)
    return push


def _is_probe(body: bytes) -> bool:
    """Whether WeChat cloud run asks if the path is there, which it does unsigned."""
    try:
        return len(body) < 100 and json.loads(body) == {"action": "CheckContainerPath"}
    except ValueError:
        return False


def _text(text: str) -> Response:
    return Response(text, content_type="text/plain; charset=utf-8", headers={"X-Content-Type-Options": "nosniff"})


@on("event", "user_authorization_revoke")
def erase_what_was_taken_back(message: Fields) -> None:
    """Erase what the user no longer lets us have.

    Source: https://developers.weixin.qq.com/miniprogram/dev/framework/security.authorize_change.html
    """
    if "PluginID" not in message:
        _erase(message, COLUMNS_BY_REVOKE_INFO.get(str(message.get("RevokeInfo")), ()))


@on("event", "user_authorization_cancellation")
def erase_personal_data(message: Fields) -> None:
    """Erase all that we know of somebody who is no user of WeChat any more, and end all sessions."""
    user_id = _erase(message, PROFILE_FIELDS, with_authorizations=True)
    if user_id is not None:
        sessions.revoke_sessions(user_id)


def _erase(message: Fields, names: Sequence[str], *, with_authorizations: bool = False) -> int | None:
    """Erase some of what we know of the user whom a message is about, and answer the id; None if there is none."""

    def erase() -> int | None:
        identity = database.session.get(Identity, (wechat.api.app_id, str(message.get("OpenID"))))
        if identity is None or not names:
            return None
        user = database.session.get_one(User, identity.user_id)
        for name in names:
            setattr(user, name, None)
        if with_authorizations:
            granted = update(Identity).where(Identity.user_id == user.id)
            database.session.execute(granted.values(authorization_encrypted=None))
        return user.id

    user_id = database.in_transaction(erase)
    if user_id is not None:
        logger.info("personal data erased", extra={"userId": user_id, "columns": names})
    return user_id
