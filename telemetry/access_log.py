"""The outermost hooks: each request gets a trace id, its answer carries it, and one log line tells how it went."""

import logging
import secrets
import time

from flask import Flask, Response, g, request

from telemetry.logs import trace_id

logger = logging.getLogger(__name__)


def init_app(app: Flask) -> None:
    app.before_request(_begin)
    app.after_request(_add_trace_id)
    app.teardown_request(_log_request)


def _begin() -> None:
    g.started = time.perf_counter()
    trace_id.set(secrets.token_hex(16))


def _add_trace_id(response: Response) -> Response:
    response.headers["X-Trace-Id"] = trace_id.get() or ""
    g.status = response.status_code
    return response


def _log_request(error: BaseException | None) -> None:
    # Not in the after-hook: that one runs a second time where the session then fails to be saved.
    if "started" not in g:
        return  # a context of a shell or a test, in which nothing was served
    logger.info(
        "request",
        extra={
            "method": request.method,
            "route": request.url_rule.rule if request.url_rule else None,  # the template: a raw path may hold secrets
            "status": g.get("status"),
            "code": g.get("code"),  # of an error
            "durationMs": round((time.perf_counter() - g.started) * 1000, 2),
        },
    )
    trace_id.set(None)  # the thread goes on to serve others
