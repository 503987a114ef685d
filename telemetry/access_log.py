"""The outermost layer: gives each request a span, a trace id in the response, a log line, and counts it."""

import logging
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.datastructures import EnvironHeaders

from telemetry import logs, metrics
from telemetry.traces import RequestSpan

logger = logging.getLogger(__name__)

OBSERVED = "kuaishang.request"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def init_app(app: Flask) -> None:
    app.before_request(lambda: request.environ[OBSERVED].set_route(request.url_rule and request.url_rule.rule))
    app.after_request(_note_code)
    app.wsgi_app = _Middleware(app)  # type: ignore[method-assign]


def _note_code(response: Response) -> Response:
    observed: _Request = request.environ[OBSERVED]
    observed.code, observed.stopping = g.get("code"), g.get("stopping", False)
    return response


class _Request:
    """A request that is being served."""

    def __init__(self, environ: dict[str, Any]) -> None:
        self._started = time.perf_counter()
        sent = environ["REQUEST_METHOD"]
        self._method = sent if sent in METHODS else "OTHER"  # a method may be any word
        self._route: str | None = None
        self.span = RequestSpan(self._method, EnvironHeaders(environ))
        self._fields = logs.request_fields.set({"parentSpanId": self.span.parent_id, "method": self._method})
        self.status = 500
        self.code: int | None = None
        self.stopping = False
        metrics.REQUESTS_IN_FLIGHT.inc()

    def set_route(self, route: str | None) -> None:
        """Name the template of the path; the path itself may hold secrets."""
        if route:
            self._route = route
            self.span.set_route(route)
            logs.request_fields.set({**logs.request_fields.get(), "route": route})

    def end(self) -> None:
        seconds = time.perf_counter() - self._started
        code = self.code or (200 if self.status < 400 else self.status)
        level = logging.ERROR if self.status >= 500 and not self.stopping else logging.INFO
        extra = {"status": self.status, "code": code, "durationMs": round(seconds * 1000, 2)}
        logger.log(level, "request", extra=extra)
        route = self._route or "unmatched"
        metrics.REQUESTS.labels(route, self._method, self.status, code).inc()
        metrics.REQUEST_SECONDS.labels(route, self._method).observe(seconds)
        metrics.REQUESTS_IN_FLIGHT.dec()
        logs.request_fields.reset(self._fields)  # the thread goes on to serve others
        self.span.end(self.status)


class _Middleware:
    """Observes each request, whichever hook fails."""

    def __init__(self, app: Flask) -> None:
        self._app = app
        self._wsgi_app = app.wsgi_app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        observed = environ[OBSERVED] = _Request(environ)
        started: list[Any] = []

        def remember(*status_and_headers: Any) -> Any:
            started[:] = status_and_headers

        try:
            try:
                body = self._wsgi_app(environ, remember)
            except Exception as error:  # of a teardown, after the response was made and before it is sent
                started.clear()
                with suppress(Exception), self._app.request_context(environ):  # the same teardown again
                    body = self._app.handle_exception(error)(environ, remember)
                if not started:
                    raise
            status, headers, *exc_info = started
            observed.status = int(status[:3])
            start_response(status, [*headers, ("X-Trace-Id", observed.span.trace_id)], *exc_info)
            return body
        finally:
            observed.end()
