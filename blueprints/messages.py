"""Message push: verify what WeChat sends, keep it until it is handled, and dispatch it to `message_handlers`."""

import logging
import time
from typing import Any

import gevent
from flask import Response, current_app, request

import wechat
from blueprints import message_handlers
from blueprints.api import Blueprint
from blueprints.parsing import read_body
from errors import Code, Message, is_temporary
from telemetry import metrics, traces
from wechat.message_push import MAXIMUM_AGE_SECONDS, PUSH_NOT_CONFIGURED, PushMessage, refused

logger = logging.getLogger(__name__)

CONTENT_TYPES = {"json": "application/json", "xml": "text/xml; charset=utf-8"}
MAXIMUM_BYTES = 64 * 1024
"""A body must be read before its signature can be checked."""
CLOUD_RUN_PROBE = b'{"action":"CheckContainerPath"}'
"""What WeChat cloud run posts, unsigned, to see whether the path is served."""
HANDLERS_SECONDS = 120
"""What the handlers of a message share; less than `CLAIM_MILLISECONDS` of storage/message_queue.py."""
REMEMBER_SECONDS = 2 * MAXIMUM_AGE_SECONDS
"""Longer than a message is accepted, also one from a clock that is ahead of ours."""

blueprint = Blueprint("messages", __name__, title=Message("消息推送", "Message push"))


@blueprint.route("/messages")
@blueprint.response(200, {"type": "string", "examples": ["5838479218127813673"]}, content_type="text/plain")
@blueprint.fails(Code.SIGNATURE_MISMATCH, Code.UNAVAILABLE, NOT_FOUND=PUSH_NOT_CONFIGURED)
def verify_message_url() -> Response:
    """向微信证明此地址属于我们 | Prove to WeChat that this address is ours

    在 mp.weixin.qq.com 保存推送设置时，由微信调用。

    WeChat calls it when the push settings are saved at mp.weixin.qq.com.
    """
    wechat.push.verify(request.args, "signature", now=time.time())
    return _text(request.args.get("echostr", ""))


@blueprint.route("/messages", methods=["POST"])
@blueprint.response(200, {"type": "string", "examples": ["success"]}, transaction=False, content_type="text/plain")
@blueprint.fails(Code.INVALID_INPUT, Code.SIGNATURE_MISMATCH, Code.PAYLOAD_TOO_LARGE, Code.UNAVAILABLE)
@blueprint.fails(NOT_FOUND=PUSH_NOT_CONFIGURED)
def receive_message() -> Response:
    """接收微信推送的消息 | Receive a message from WeChat

    消息的处理函数在响应之外运行。重发的消息会再次得到响应，但只处理一次。
    查询参数、请求体（JSON 或 XML，最大 64 KiB）和对某些消息的回复见微信文档。

    Handlers run independently of the response. A message that is sent again gets a response again, and is handled once.
    The query, the body, JSON or XML of at most 64 KiB, and the reply to some are as WeChat's documentation says.
    """
    request.max_content_length = MAXIMUM_BYTES
    body = read_body(request)
    if body.replace(b" ", b"") == CLOUD_RUN_PROBE:
        return _text("success")
    message = wechat.push.open(request.args, body, time.time())
    if not message.is_recent(time.time()):
        raise refused("CreateTime is missing or old, the body encrypted without a key, or our clock wrong")
    handlers = _registered(message_handlers.handlers, message)
    is_new = not handlers or current_app.extensions["messages"].put(message.key, message.fields, REMEMBER_SECONDS)
    fields = {"type": message.kind[0], "event": message.kind[1], "repeat": not is_new, "handlers": len(handlers)}
    logger.info("message received", extra=fields)
    for responder in _registered(message_handlers.responders, message):
        try:
            reply = wechat.push.seal(responder(message.fields), message.form, time.time())
            return Response(reply, content_type=CONTENT_TYPES[message.form])
        except Exception:  # which must not stop the handlers
            logger.exception("a responder failed")
    return _text("success")


def handle(fields: dict[str, Any]) -> None:
    """Run the handlers of a message, one after another. A failure is logged and counted, and stops no other handler.

    :raises Exception: the last failure that is temporary. All handlers should run again.
    """
    reason: BaseException | None = None
    handlers = _registered(message_handlers.handlers, PushMessage(fields, "json"))
    for handler in handlers:
        name = f"{handler.__module__}.{getattr(handler, '__qualname__', '?')}"
        span = traces.span(f"handler {name}", attributes={"code.function.name": name})
        try:
            with span, current_app.app_context(), gevent.Timeout(HANDLERS_SECONDS / len(handlers)):
                handler(fields)
        except (Exception, SystemExit, gevent.Timeout) as error:
            metrics.MESSAGES.labels("failure").inc()
            logger.exception("a handler failed", extra={"function": name})
            reason = error if is_temporary(error) else reason
        else:
            metrics.MESSAGES.labels("success").inc()
    if reason:
        raise reason


def _registered(functions: message_handlers.Registry, message: PushMessage) -> list[message_handlers.Handler]:
    """Return the functions for an event, and then those for all messages of its type."""
    kinds = dict.fromkeys([message.kind, (message.kind[0], "")])
    return [function for kind in kinds for function in functions.get(kind, ())]


def _text(text: str) -> Response:
    return Response(text, content_type="text/plain; charset=utf-8", headers={"X-Content-Type-Options": "nosniff"})
