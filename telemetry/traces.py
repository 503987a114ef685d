"""The trace that a request belongs to: W3C trace context in and out, the ids of the moment, and spans.

Spans are recorded where OTEL_EXPORTER_OTLP_ENDPOINT names a collector; elsewhere a span is nothing but its ids.
https://www.w3.org/TR/trace-context/
"""

import logging
import random
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from flask import Flask
from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from redis import Redis
from sqlalchemy import Engine
from werkzeug.datastructures import Headers

# What it has to say is about what callers send.
logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)

_W3C = TraceContextTextMapPropagator()
_FLAGS = trace.TraceFlags.SAMPLED | trace.TraceFlags.RANDOM_TRACE_ID  # those that are defined
_SAMPLED = trace.TraceFlags(trace.TraceFlags.SAMPLED)
_NO_SPAN = nullcontext(trace.INVALID_SPAN)

_provider: trace.TracerProvider | None = None
_tracer: trace.Tracer | None = None


def init_app(app: Flask) -> None:
    """Send spans to OTEL_EXPORTER_OTLP_ENDPOINT; nothing is loaded for it where that is empty."""
    global _provider, _tracer
    _provider = _tracer = None
    endpoint = app.config["OTEL_EXPORTER_OTLP_ENDPOINT"]
    if endpoint:
        from telemetry import logs, span_export

        provider = span_export.provider(endpoint, app.config["INSTANCE"], app.config["VERSION"])
        tracer = provider.get_tracer(logs.SERVICE, app.config["VERSION"])
        if not isinstance(tracer, trace.NoOpTracer):  # as with OTEL_SDK_DISABLED, which leaves no ids to log
            _provider, _tracer = provider, tracer


def instrument(redis: Redis, engine: Engine) -> None:
    """Let each command of this client be a span, and each statement of this engine and each connection it opens."""
    if _provider:
        from telemetry import span_export

        span_export.instrument_redis(redis, _provider)
        span_export.instrument_sql(engine, _provider)


def ids() -> tuple[str | None, str | None]:
    """The trace id and the span id of this moment, 32 and 16 hex digits; None outside of a trace."""
    now = trace.get_current_span().get_span_context()
    return _digits(now) if now.is_valid else (None, None)


def parent_id() -> str | None:
    """The span around that of this moment, 16 hex digits; None if there is none, or spans are not recorded."""
    parent: trace.SpanContext | None = getattr(trace.get_current_span(), "parent", None)
    return trace.format_span_id(parent.span_id) if parent else None


def outgoing_headers() -> dict[str, str]:
    """What to send along when another service of ours is called, so that it goes on with this trace. Not for others."""
    headers: dict[str, str] = {}
    _W3C.inject(headers)
    return headers


def span(
    name: str, kind: trace.SpanKind = trace.SpanKind.INTERNAL, attributes: Mapping[str, str | int] | None = None
) -> AbstractContextManager[trace.Span]:
    """A span of something that a request does, or begins; current while it is open, and failed if an exception ends it.

    :param name: leaves as it is, so it must stand in the source code.
    :param attributes: `span_export.ATTRIBUTES` says which ones leave.
    """
    return _tracer.start_as_current_span(name, kind=kind, attributes=attributes) if _tracer else _NO_SPAN


class RequestSpan:
    """The span of a request, current from here to `end`.

    :param method: `OTHER` for one that HTTP does not know.
    :param route: the template of the path, if there is one.
    :param headers: those of the request; a `traceparent` that is valid is continued.

    `trace_id`, `span_id`, and `parent_id`, the span of the caller if there is one, are of 32 and 16 hex digits.
    """

    def __init__(self, method: str, route: str | None, headers: Headers) -> None:
        caller = _caller(headers)
        self.parent_id = trace.format_span_id(caller.span_id) if caller else None
        self._span = _begin(method, route, caller, _tracer) if _tracer else _ids_only(caller)
        self.trace_id, self.span_id = _digits(self._span.get_span_context())
        self._token = context.attach(trace.set_span_in_context(self._span, context.Context()))

    def end(self, status: int) -> None:
        """End it with the HTTP status of the answer; whatever was current before is current again."""
        context.detach(self._token)
        if self._span.is_recording():
            self._span.set_attribute("http.response.status_code", status)
            if status >= 500:
                self._span.set_attribute("error.type", str(status))
                self._span.set_status(trace.StatusCode.ERROR)
            self._span.end()


def _digits(ids: trace.SpanContext) -> tuple[str, str]:
    return trace.format_trace_id(ids.trace_id), trace.format_span_id(ids.span_id)


def _caller(headers: Headers) -> trace.SpanContext | None:
    """The span that a valid `traceparent` names."""
    traceparent = headers.get("traceparent")
    if traceparent is None or "," in traceparent:  # several, which the server has joined
        return None
    caller = trace.get_current_span(_W3C.extract(headers)).get_span_context()
    return caller if caller.is_valid else None


def _begin(method: str, route: str | None, caller: trace.SpanContext | None, tracer: trace.Tracer) -> trace.Span:
    # https://opentelemetry.io/docs/specs/semconv/http/http-spans/ has names of its own for what HTTP does not know.
    verb, known = ("HTTP", "_OTHER") if method == "OTHER" else (method, method)
    attributes = {"http.request.method": known}
    if route:
        attributes["http.route"] = route
    above = context.Context()
    if caller:
        above = trace.set_span_in_context(trace.NonRecordingSpan(caller), above)
    return tracer.start_span(f"{verb} {route or ''}".rstrip(), above, trace.SpanKind.SERVER, attributes)


def _ids_only(caller: trace.SpanContext | None) -> trace.Span:
    return trace.NonRecordingSpan(
        trace.SpanContext(
            trace_id=caller.trace_id if caller else random.getrandbits(128) or 1,
            span_id=random.getrandbits(64) or 1,
            is_remote=False,
            trace_flags=trace.TraceFlags(caller.trace_flags & _FLAGS) if caller else _SAMPLED,
            trace_state=caller.trace_state if caller else None,
        )
    )
