"""Message push: verify what WeChat sends, keep it until it is handled, and dispatch it to `message_handlers`."""

import logging
import time
from contextlib import suppress
from typing import Any

from flask import Response, current_app, request

import wechat
from blueprints import message_handlers
from blueprints.api import Blueprint
from blueprints.parsing import read_body
from errors import Code
from telemetry import metrics, traces
from wechat import lenient
from wechat.message_push import MAXIMUM_AGE_SECONDS, MessagePush, PushMessage, refused

logger = logging.getLogger(__name__)

CONTENT_TYPES = {"json": "application/json", "xml": "text/xml; charset=utf-8"}
MAXIMUM_BYTES = 64 * 1024
"""A body must be read before its signature can be checked."""
CLOUD_RUN_PROBE = {"action": "CheckContainerPath"}
"""What WeChat cloud run posts, unsigned, to see whether the path is served."""
REMEMBER_SECONDS = 2 * MAXIMUM_AGE_SECONDS
"""Longer than a message is accepted, also one from a clock that is ahead of ours."""

blueprint = Blueprint("messages", __name__, description="消息推送 Message push")


def _parameters(*names: str, required: bool) -> list[dict[str, Any]]:
    return [{"name": name, "in": "query", "required": required, "schema": {"type": "string"}} for name in names]


@blueprint.route("/messages")
@blueprint.doc(parameters=_parameters("signature", "timestamp", "nonce", "echostr", required=True))
@blueprint.response(200, {"type": "string"}, content_type="text/plain", description="`echostr` as it came.")
@blueprint.fails(Code.SIGNATURE_MISMATCH)
@blueprint.fails(Code.NOT_FOUND, message=wechat.PUSH_NOT_CONFIGURED)
def verify_url() -> Response:
    """Prove to WeChat that this address is ours"""
    return _text(wechat.configured_push().verify_url(request.args, time.time()))


@blueprint.route("/messages", methods=["POST"])
@blueprint.doc(
    parameters=_parameters("timestamp", "nonce", required=True)
    + _parameters("signature", "msg_signature", required=False),
    requestBody={
        "description": f"At most {MAXIMUM_BYTES} bytes.",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/xml": {}},
    },
)
@blueprint.response(200, {"type": "string"}, transaction=False, content_type="text/plain")
@blueprint.alt_response(200, schema={"type": "object"}, content_type="application/json")
@blueprint.alt_response(200, schema={"type": "string"}, content_type="text/xml")
@blueprint.fails(Code.INVALID_INPUT, Code.SIGNATURE_MISMATCH, Code.PAYLOAD_TOO_LARGE, Code.UNAVAILABLE)
@blueprint.fails(Code.NOT_FOUND, message=wechat.PUSH_NOT_CONFIGURED)
def receive() -> Response:
    """Receive a message from WeChat

    Its handlers run beside the response. A message that is sent again gets a response again, and is handled once.
    """
    request.max_content_length = MAXIMUM_BYTES
    body = read_body(request)
    if len(body) < 100 and lenient.read(body, source=None) == CLOUD_RUN_PROBE:
        return _text("success")
    push = wechat.configured_push()
    message = push.open(request.args, body, time.time())
    if not message.is_recent(time.time()):
        raise refused("no CreateTime, or an old one, or our clock is wrong")
    handlers = _handlers(message)
    is_new = not handlers or current_app.extensions["messages"].put(message.key, message.fields, REMEMBER_SECONDS)
    fields = {"type": message.type, "event": message.event, "repeat": not is_new, "handlers": len(handlers)}
    logger.info("message received", extra=fields)
    return _reply(push, message) or _text("success")


def _reply(push: MessagePush, message: PushMessage) -> Response | None:
    """Return the reply of a responder; None if there is none or it fails, which must not stop the handlers."""
    of_all = message_handlers.responders.get((message.type, ""))
    responder = message_handlers.responders.get((message.type, message.event), of_all)
    if responder is None:
        return None
    try:
        reply = push.seal(responder(message.fields), message.form, time.time())
    except Exception:
        logger.exception("a responder failed", extra={"type": message.type, "event": message.event})
        return None
    return Response(reply, content_type=CONTENT_TYPES[message.form])


def handle(fields: dict[str, Any]) -> None:
    """Run the handlers of a message, one after another. A failure is logged and counted, and stops no other handler."""
    for handler in _handlers(PushMessage(fields, "json")):
        name = f"{handler.__module__}.{getattr(handler, '__qualname__', '?')}"
        with suppress(Exception, SystemExit), traces.span(f"handler {name}", attributes={"code.function.name": name}):
            try:
                with current_app.app_context():
                    handler(fields)
                metrics.MESSAGES.labels("success").inc()
            except (Exception, SystemExit):
                metrics.MESSAGES.labels("failure").inc()
                logger.exception("a handler failed", extra={"function": name})
                raise  # which fails the span


def _handlers(message: PushMessage) -> list[message_handlers.Handler]:
    names = dict.fromkeys([(message.type, message.event), (message.type, "")])
    return [handler for name in names for handler in message_handlers.handlers.get(name, ())]


def _text(text: str) -> Response:
    return Response(text, content_type="text/plain; charset=utf-8", headers={"X-Content-Type-Options": "nosniff"})
