"""The outermost layer: each request has a span, a line that tells how it went, and is counted."""

import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from contextvars import Token
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, g, request

from telemetry import logs, metrics, redaction
from telemetry.traces import RequestSpan

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)

IN_HAND = "kuaishang.request"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def init_app(app: Flask) -> None:
    app.before_request(_begin)
    app.after_request(_note_code)
    app.wsgi_app = _Middleware(app)  # type: ignore[method-assign]


@dataclass
class _Request:
    """A request that is being served."""

    started: float
    method: str
    route: str | None
    span: RequestSpan
    tokens: tuple[Token[Any], Token[Any]]
    status: int = 500
    code: int | None = None
    stopping: bool = False


class _Middleware:
    """Gives each answer its trace id, and ends what `_begin` began, whichever hook of whoever fails."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._wsgi_app: WSGIApplication = app.wsgi_app

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        answer: list[Any] = []

        def respond(*status_and_headers: Any) -> Any:
            answer[:] = status_and_headers

        try:
            try:
                body = self._wsgi_app(environ, respond)
            except Exception as error:  # of a teardown, after the answer was made and before it is sent
                if IN_HAND not in environ:
                    raise
                body = self._answer_of_crash(error, environ)(environ, respond)
            status, headers, *exc_info = answer
            in_hand: _Request | None = environ.get(IN_HAND)
            if in_hand:
                in_hand.status = int(status[:3])
                headers = [*headers, ("X-Trace-Id", in_hand.span.trace_id)]
            start_response(status, headers, *exc_info)
            return body
        finally:
            if IN_HAND in environ:
                _end(environ.pop(IN_HAND))

    def _answer_of_crash(self, error: Exception, environ: "WSGIEnvironment") -> Response:
        context = self._app.request_context(environ)
        context.push()
        try:
            return self._app.handle_exception(error)
        finally:
            with suppress(Exception):  # the same teardown
                context.pop()


def _begin() -> None:
    # The template: a raw path may hold secrets. And a method may be any word that somebody sends.
    route = request.url_rule.rule if request.url_rule else None
    method = request.method if request.method in METHODS else "OTHER"
    started = time.perf_counter()
    span = RequestSpan(method, route, request.headers)
    fields = {"parentSpanId": span.parent_id, "method": method, "route": route}
    tokens = (
        logs.request_fields.set({name: value for name, value in fields.items() if value}),
        redaction.begin(request),
    )
    request.environ[IN_HAND] = _Request(started, method, route, span, tokens)
    metrics.REQUESTS_IN_FLIGHT.inc()


def _note_code(response: Response) -> Response:
    in_hand: _Request = request.environ[IN_HAND]
    in_hand.code, in_hand.stopping = g.get("code"), g.get("stopping", False)
    return response


def _end(ended: _Request) -> None:
    seconds = time.perf_counter() - ended.started
    code = ended.code or (200 if ended.status < 400 else ended.status)
    level = logging.ERROR if ended.status >= 500 and not ended.stopping else logging.INFO
    if logger.isEnabledFor(level):
        fields = {"status": ended.status, "code": code, "durationMs": round(seconds * 1000, 2)}
        logger.handle(logs.RequestRecord(logger.name, level, (ended.span.trace_id, ended.span.span_id), fields))
    route = ended.route or "unmatched"
    metrics.REQUESTS.labels(route, ended.method, ended.status, code).inc()
    metrics.REQUEST_SECONDS.labels(route, ended.method).observe(seconds)
    metrics.REQUESTS_IN_FLIGHT.dec()
    # The thread goes on to serve others.
    request_fields, in_hand = ended.tokens
    logs.request_fields.reset(request_fields)
    redaction.end(in_hand)
    ended.span.end(ended.status)
