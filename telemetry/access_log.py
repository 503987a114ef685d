"""The outermost layer: gives each request a span, a trace id in the response, a log line, and counts it."""

import logging
import time
from contextlib import suppress
from functools import partial
from typing import Any

from flask import Flask, request
from werkzeug.datastructures import EnvironHeaders

from telemetry import logs, metrics
from telemetry.traces import RequestSpan

logger = logging.getLogger(__name__)

CODE = "kuaishang.code"
"""Where in a request's environ `errors` puts the business code of an error."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def init_app(app: Flask) -> None:
    app.before_request(_note_route)
    app.wsgi_app = partial(_observe, app, app.wsgi_app)  # type: ignore[method-assign]


def _note_route() -> None:
    """Name the template of the path; the path itself may hold secrets."""
    if request.url_rule:
        logs.bind(route=request.url_rule.rule)


def _observe(app: Flask, wsgi_app: Any, environ: dict[str, Any], start_response: Any) -> Any:
    began, status, sent = time.perf_counter(), 500, environ["REQUEST_METHOD"]
    method = sent if sent in METHODS else "OTHER"  # a method may be any word
    span = RequestSpan(method, EnvironHeaders(environ))
    token = logs.request_fields.set({"method": method} | ({"parentSpanId": span.parent_id} if span.parent_id else {}))
    metrics.REQUESTS_IN_FLIGHT.inc()
    try:
        body, status_line, headers, *exc_info = _run(app, wsgi_app, environ)
        status = int(status_line[:3])
        start_response(status_line, [*headers, ("X-Trace-Id", span.trace_id)], *exc_info)
        return body
    finally:
        seconds, route = time.perf_counter() - began, logs.request_fields.get().get("route")
        code = environ.get(CODE) or (200 if status < 400 else status)
        logs.bind(status=status, code=code, durationMs=round(seconds * 1000, 2))
        # The reasons of /readyz are logged by themselves.
        level = logging.ERROR if status >= 500 and route != "/readyz" else logging.INFO
        if logger.isEnabledFor(level):  # not logger.log, which would look for the line of its caller
            logger.handle(logging.LogRecord(logger.name, level, __file__, 0, "request", (), None))
        logs.request_fields.reset(token)  # the thread goes on to serve others
        metrics.REQUESTS.labels(route or "unmatched", method, status, code).inc()
        metrics.REQUEST_SECONDS.labels(route or "unmatched", method).observe(seconds)
        metrics.REQUESTS_IN_FLIGHT.dec()
        span.end(status, route)


def _run(app: Flask, wsgi_app: Any, environ: dict[str, Any]) -> tuple[Any, ...]:
    """Return the body, and what `start_response` was called with."""
    started: list[Any] = []
    try:
        body = wsgi_app(environ, lambda *sent: started.append(sent))
    except Exception as error:  # of a teardown, after the response was made and before it is sent
        started.clear()
        with suppress(Exception), app.request_context(environ):  # the same teardown again
            body = app.handle_exception(error)(environ, lambda *sent: started.append(sent))  # type: ignore[arg-type]
        if not started:
            raise
    return body, *started[-1]
