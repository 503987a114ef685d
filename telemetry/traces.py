"""The trace that a request belongs to: W3C trace context in and out, the current ids, and spans.

Spans are recorded if OTEL_EXPORTER_OTLP_ENDPOINT names a collector; otherwise a span is nothing but its ids.
https://www.w3.org/TR/trace-context/
"""

import random
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from flask import Flask
from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Span, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from telemetry.fields import SERVICE

_W3C = TraceContextTextMapPropagator()

_tracer: trace.Tracer = trace.NoOpTracer()


def init_app(app: Flask) -> None:
    """Send spans of requests, and of the app's Redis and database, to OTEL_EXPORTER_OTLP_ENDPOINT.

    Nothing is loaded for it if that is empty.
    """
    global _tracer
    _tracer = trace.NoOpTracer()
    if app.config["OTEL_EXPORTER_OTLP_ENDPOINT"]:
        from telemetry import span_export

        _tracer = span_export.start(app).get_tracer(SERVICE, app.config["VERSION"])


def current_ids() -> dict[str, Any]:
    """Return the trace id, the span id and, if spans are recorded, that of the span above, as the fields of a line."""
    current = trace.get_current_span()
    ids = current.get_span_context()
    if not ids.is_valid:
        return {"traceId": None}
    fields = {"traceId": trace.format_trace_id(ids.trace_id), "spanId": trace.format_span_id(ids.span_id)}
    parent: SpanContext | None = getattr(current, "parent", None)
    return fields | ({"parentSpanId": trace.format_span_id(parent.span_id)} if parent else {})


def span(name: str, kind: SpanKind = SpanKind.INTERNAL, attributes: Attributes = None) -> AbstractContextManager[Span]:
    """Make a span of a part of a request's work; current while it is open, and failed if an exception ends it.

    :param name: is exported as it is, so it must be a constant.
    :param attributes: `span_export.ATTRIBUTES` lists those that are exported.
    """
    return _tracer.start_as_current_span(name, kind=kind, attributes=attributes)


class RequestSpan:
    """The span of a request, current from here to `end`.

    :param method: `OTHER` for one that HTTP does not know.
    :param environ: that of the request; a valid `traceparent` is continued.

    `ids` are the fields of its line, with the span of the caller if there is one.
    """

    def __init__(self, method: str, environ: Mapping[str, Any]) -> None:
        caller = _caller(environ)
        # https://opentelemetry.io/docs/specs/semconv/http/http-spans/ has its own names for unknown methods.
        self._verb, known = ("HTTP", "_OTHER") if method == "OTHER" else (method, method)
        self._span: Span = trace.NonRecordingSpan(_new_ids(caller))
        if not isinstance(_tracer, trace.NoOpTracer):  # which makes no ids, also of a provider by OTEL_SDK_DISABLED
            above = trace.set_span_in_context(trace.NonRecordingSpan(caller), Context())
            self._span = _tracer.start_span(self._verb, above, SpanKind.SERVER, {"http.request.method": known})
        self._token = attach(trace.set_span_in_context(self._span, Context()))
        self.ids = current_ids() | ({"parentSpanId": trace.format_span_id(caller.span_id)} if caller.is_valid else {})

    def end(self, status: int, route: str | None = None) -> None:
        """End it; the span before it is current again.

        :param status: that of the response.
        :param route: the template of the path.
        """
        detach(self._token)
        if route:
            self._span.update_name(f"{self._verb} {route}")
        self._span.set_attributes({"http.response.status_code": status} | ({"http.route": route} if route else {}))
        if status >= 500:
            self._span.set_attribute("error.type", str(status))
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end()


def _caller(environ: Mapping[str, Any]) -> SpanContext:
    """Return the ids in `traceparent`; invalid ones if it is missing, malformed, or came several times."""
    parent = environ.get("HTTP_TRACEPARENT", "")
    if not parent or "," in parent:  # which is how several come
        return trace.INVALID_SPAN_CONTEXT
    extracted = _W3C.extract({"traceparent": parent, "tracestate": environ.get("HTTP_TRACESTATE", "")}, Context())
    return trace.get_current_span(extracted).get_span_context()


def _new_ids(caller: SpanContext) -> SpanContext:
    flags = caller.trace_flags & (TraceFlags.SAMPLED | TraceFlags.RANDOM_TRACE_ID) if caller.is_valid else 1  # sampled
    trace_id = caller.trace_id or random.getrandbits(128)
    return SpanContext(trace_id, random.getrandbits(64), False, TraceFlags(flags), caller.trace_state)
