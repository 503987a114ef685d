"""Exports spans to a collector over OTLP/HTTP. Loaded only if one is set.

What libraries record of a command, a statement or an exception may hold personal data: nothing is exported but
ATTRIBUTES, and names that are put together here.

Read against opentelemetry-sdk 1.45.1: BatchSpanProcessor._batch_processor, as only its shutdown takes a timeout.
"""

import re
from collections.abc import Sequence

from flask import Flask
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.redis import RedisInstrumentor
from opentelemetry.instrumentation.sqlalchemy.engine import EngineTracer
from opentelemetry.metrics import NoOpMeter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult

from telemetry.fields import SERVICE

ATTRIBUTES = frozenset(
    # http.route is the template. Some have two names: OTEL_SEMCONV_STABILITY_OPT_IN chooses which the libraries use.
    "http.request.method http.route http.response.status_code error.type wechat.interface wechat.errcode "  # noqa: SIM905
    "code.function.name db.system db.system.name db.redis.pipeline_length net.peer.name net.peer.port server.address "
    "server.port".split()
)
"""The attributes that are exported. None of them holds anything that a caller has sent."""

_SAME = "parent", "resource", "kind", "instrumentation_scope", "start_time", "end_time"
_VERBS = re.compile(r"^[A-Z]+(?:[ ._-][A-Z]+)*\b")
_TABLE = re.compile(r"^[^'\"]*?\b(?:FROM|INTO|UPDATE)\s+`?([a-z_]+)\b")  # not in quotes, which may hold data


def start(app: Flask) -> TracerProvider:
    """Record each command of the app's Redis, each statement of its database, and what is made with the provider.

    Spans are sent in a thread; at the end of the process, the rest of them. INSTANCE and VERSION are
    service.instance.id and service.version, unless OTEL_RESOURCE_ATTRIBUTES has others.
    """
    endpoint, instance, version = (app.config[name] for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "INSTANCE", "VERSION"))
    ours = {"service.name": SERVICE, "service.instance.id": instance, "service.version": version}
    provider = TracerProvider(resource=Resource.create({**ours, **OTELResourceDetector().detect().attributes}))
    provider.add_span_processor(_Processor(Exporter(f"{endpoint.rstrip('/')}/v1/traces")))
    RedisInstrumentor.instrument_client(app.extensions["redis"], provider)
    usage = NoOpMeter("sql").create_up_down_counter("db.client.connections.usage")
    # Not by SQLAlchemyInstrumentor, which refuses SQLAlchemy 2.1 and needs greenlet for async engines.
    tracer = provider.get_tracer("opentelemetry.instrumentation.sqlalchemy")
    EngineTracer(tracer, app.extensions["database"], usage)  # type: ignore[no-untyped-call]
    return provider


class _Processor(BatchSpanProcessor):
    def shutdown(self) -> None:
        # OpenTelemetry's own waits for 30 s for a collector, and gunicorn kills earlier.
        self._batch_processor.shutdown(timeout_millis=3000)


class Exporter(OTLPSpanExporter):
    """Exports the permitted part of spans. Made after the fork of a worker, as two must not share a connection."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return super().export([self._permitted(span) for span in spans])

    def _permitted(self, span: ReadableSpan) -> ReadableSpan:
        attributes = {key: value for key, value in (span.attributes or {}).items() if key in ATTRIBUTES}
        for happened in span.events:
            if happened.attributes and "exception.type" in happened.attributes:
                attributes.setdefault("error.type", happened.attributes["exception.type"])
        error = attributes.get("error.type")
        ids = span.get_span_context()
        context = ids and trace.SpanContext(ids.trace_id, ids.span_id, False, ids.trace_flags)
        status = trace.Status(span.status.status_code, str(error) if error and not span.status.is_ok else None)
        same = {name: getattr(span, name) for name in _SAME}
        return ReadableSpan(_name(span), context, attributes=attributes, status=status, **same)


def _name(span: ReadableSpan) -> str:
    """Return our constant, a library's Redis commands, or the verb and the table of its SQL statement."""
    if span.instrumentation_scope and span.instrumentation_scope.name == SERVICE:
        return span.name
    attributes = span.attributes or {}
    statement = str(attributes.get("db.statement") or attributes.get("db.query.text") or "")
    return " ".join([*_VERBS.findall(span.name), *_TABLE.findall(statement)]) or "unknown"
