"""The outermost layer: gives each request a span, a trace id in the response, a log line, and counts it."""

import logging
import time
from functools import cache, partial
from typing import Any

from flask import Flask, request

from telemetry import logs, metrics, traces

logger = logging.getLogger(__name__)

CODE = "kuaishang.code"
"""Where in a request's environ `errors` puts the business code of an error."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# To look for a series by its labels takes longer than to count.
_count, _duration = cache(metrics.REQUESTS.labels), cache(metrics.REQUEST_SECONDS.labels)


def init_app(app: Flask) -> None:
    app.before_request(_note_route)
    app.wsgi_app = partial(_observe, app.wsgi_app)  # type: ignore[method-assign]


def _note_route() -> None:
    """Name the template of the path; the path itself may hold secrets."""
    if rule := request.url_rule:
        logs.bind(route=rule.rule)


def _observe(wsgi_app: Any, environ: dict[str, Any], start_response: Any) -> Any:
    began, status, sent = time.perf_counter(), 500, environ["REQUEST_METHOD"]
    method = sent if sent in METHODS else "OTHER"  # a method may be any word
    span = traces.RequestSpan(method, environ)
    fields: dict[str, Any] = {"method": method, **span.ids}
    token = logs.request_fields.set(fields)
    started: list[Any] = []
    try:
        body = wsgi_app(environ, lambda *sent: started.append(sent))
        status_line, headers, *exc_info = started[-1]
        status = int(status_line[:3])
        start_response(status_line, [*headers, ("X-Trace-Id", span.ids["traceId"])], *exc_info)
        return body
    finally:
        seconds, route = time.perf_counter() - began, fields.get("route")
        code = environ.get(CODE) or (200 if status < 400 else status)
        # The reasons of /readyz are logged by themselves.
        level = logging.ERROR if status >= 500 and route != "/readyz" else logging.INFO
        if logger.isEnabledFor(level):
            # Not bound: the fields are also those of work that goes on in the background.
            more = {"status": status, "code": code, "durationMs": round(seconds * 1000, 2)}
            logs.write_request(level, logger.name, {**fields, **more})
        logs.request_fields.reset(token)  # the greenlet goes on to serve its client
        _count(route or "unmatched", method, status, code).inc()
        _duration(route or "unmatched", method).observe(seconds)
        span.end(status, route)
