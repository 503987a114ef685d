"""Spans on their way to a collector, over OTLP/HTTP. Loaded only where one is named.

What libraries say of a command, a statement or an exception may hold personal data: nothing leaves but ATTRIBUTES, and
names that are put together here.
"""

import logging
import os
import re
from collections.abc import Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.redis import RedisInstrumentor
from opentelemetry.instrumentation.sqlalchemy.engine import EngineTracer
from opentelemetry.metrics import NoOpMeter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanContext, Status, StatusCode
from redis import Redis
from sqlalchemy import Dialect, Engine, event

from telemetry.logs import SERVICE

REDIS, SQL = "opentelemetry.instrumentation.redis", "opentelemetry.instrumentation.sqlalchemy"
STOP_SECONDS = 3
"""How long the end of the process waits for a collector."""
ATTRIBUTES = frozenset(
    {
        "http.request.method",
        "http.route",  # the template
        "http.response.status_code",
        "error.type",
        "wechat.interface",
        "wechat.errcode",
        "code.function.name",
        # Some under two names: OTEL_SEMCONV_STABILITY_OPT_IN chooses the one that the libraries use.
        "db.system",
        "db.system.name",
        "db.redis.pipeline_length",
        "net.peer.name",
        "net.peer.port",
        "server.address",
        "server.port",
    }
)
"""What a span may tell. None of them holds anything that a caller has sent."""

_COMMANDS = re.compile(r"[A-Z]+(?:[ ._-][A-Z]+)*")
_VERB = re.compile(r"\s*([A-Z]+)\b")
_TABLE = re.compile(r"\b(?:FROM|INTO|UPDATE)\s+`?([a-z_]+)\b")

# It shows a malformed OTEL_EXPORTER_OTLP_HEADERS in full.
logging.getLogger("opentelemetry.util.re").setLevel(logging.ERROR)
# It tells each of its new tries; that it gave up, it tells as an error.
logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)


def provider(endpoint: str, instance: str, version: str) -> TracerProvider:
    """Make what records spans, and sends them in a thread; at the end of the process, those that are left.

    :param endpoint: the URL of the collector, without /v1/traces.
    :param instance: becomes service.instance.id, as `version` service.version, unless OTEL_RESOURCE_ATTRIBUTES has one.
    """
    ours = {"service.name": SERVICE, "service.instance.id": instance, "service.version": version}
    resource = Resource.create({**ours, **OTELResourceDetector().detect().attributes})
    made = TracerProvider(resource=resource)
    made.add_span_processor(_Processor(Exporter(f"{endpoint.rstrip('/')}/v1/traces", resource)))
    return made


def instrument_redis(client: Redis, tracers: trace.TracerProvider) -> None:
    RedisInstrumentor.instrument_client(client, tracers)


def instrument_sql(engine: Engine, tracers: trace.TracerProvider) -> None:
    tracer = tracers.get_tracer(SQL)
    usage = NoOpMeter(SQL).create_up_down_counter("db.client.connections.usage")
    # Not by SQLAlchemyInstrumentor, which refuses SQLAlchemy 2.1, and needs greenlet for engines that nobody has here.
    EngineTracer(tracer, engine, usage)  # type: ignore[no-untyped-call]

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Dialect, _: object, args: Any, options: Any) -> Any:
        kind, attributes = trace.SpanKind.CLIENT, {"db.system": dialect.name}
        with tracer.start_as_current_span("connect", kind=kind, attributes=attributes):
            return dialect.connect(*args, **options)


class _Processor(BatchSpanProcessor):
    def shutdown(self) -> None:
        # OpenTelemetry's own waits for 30 s, and gunicorn for 25 until it kills.
        self._batch_processor.shutdown(timeout_millis=STOP_SECONDS * 1000)


class Exporter(SpanExporter):
    """Sends what may leave of spans.

    :param endpoint: where they are posted to.
    :param resource: who sends them. That which spans bring is not used: after a fork, the SDK puts a random
        service.instance.id into it.
    """

    def __init__(self, endpoint: str, resource: Resource) -> None:
        self._endpoint = endpoint
        self._resource = resource
        self._otlp = OTLPSpanExporter(endpoint)
        self._pid = os.getpid()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._pid != os.getpid():
            # Forked: two processes must not speak over one connection.
            self._otlp, self._pid = OTLPSpanExporter(self._endpoint), os.getpid()
        return self._otlp.export([self._fit_to_leave(span) for span in spans])

    def shutdown(self) -> None:
        self._otlp.shutdown()  # type: ignore[no-untyped-call]

    def _fit_to_leave(self, span: ReadableSpan) -> ReadableSpan:
        attributes = {key: value for key, value in (span.attributes or {}).items() if key in ATTRIBUTES}
        for told in span.events:
            if told.attributes and "exception.type" in told.attributes:
                attributes.setdefault("error.type", told.attributes["exception.type"])
        status = Status(span.status.status_code)
        if not status.is_ok and "error.type" in attributes:
            status = Status(StatusCode.ERROR, str(attributes["error.type"]))
        context = span.get_span_context()
        return ReadableSpan(
            name=_name(span),
            context=context and SpanContext(context.trace_id, context.span_id, False, context.trace_flags),
            parent=span.parent,
            resource=self._resource,
            attributes=attributes,
            kind=span.kind,
            instrumentation_scope=span.instrumentation_scope,
            status=status,
            start_time=span.start_time,
            end_time=span.end_time,
        )


def _name(span: ReadableSpan) -> str:
    """Ours are constants; of a library's, the commands for Redis, and the verb and the table for SQL."""
    scope = span.instrumentation_scope.name if span.instrumentation_scope else ""
    if scope == SERVICE:
        return span.name
    if scope == REDIS:
        return span.name if _COMMANDS.fullmatch(span.name) else "redis"
    if scope != SQL:
        return "unknown"
    attributes = span.attributes or {}
    statement = str(attributes.get("db.statement") or attributes.get("db.query.text") or "")
    syntax = re.split("['\"]", statement, maxsplit=1)[0]  # what comes after a quote may be data
    words = [found[1] for pattern in (_VERB, _TABLE) if (found := pattern.search(syntax))]
    return " ".join(words) or "connect"
