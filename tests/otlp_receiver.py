"""A collector as OpenTelemetry's protocol has it: takes spans over OTLP/HTTP, and shows them to the tests.

https://opentelemetry.io/docs/specs/otlp/#otlphttp
"""

import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span as SentSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status


class Span(NamedTuple):
    """A span as it was received; the ids in hex digits, and `parent_id` empty for a root."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    failed: bool
    description: str
    """What the status says beside that."""
    library: str
    """What made it: `kuaishang`, or the last part of the instrumentation's name."""
    resource: dict[str, Any]


class OtlpReceiver:
    """Listens on a port of its own until it is closed. While `hold` is set, it takes requests and does not answer."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        """All that was received, unpacked."""
        self.headers: list[dict[str, str]] = []
        """The headers of each request, their names in lower case."""
        self.clients: set[int] = set()
        """The ports of those who have sent something: one for each connection."""
        self.hold = threading.Event()
        self._closed = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                receiver._receive(self)

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def spans(self, trace_id: str | None = None) -> list[Span]:
        """Those received so far, or those of one trace."""
        spans = [span for body in list(self.bodies) for span in _decode(body)]
        return [span for span in spans if trace_id in (None, span.trace_id)]

    def _receive(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["Content-Length"]))
        while self.hold.is_set() and not self._closed.wait(0.05):
            pass
        if self._closed.is_set():
            return
        if request.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        is_right = request.path == "/v1/traces" and request.headers["Content-Type"] == "application/x-protobuf"
        if is_right:
            self.clients.add(request.client_address[1])
            self.headers.append({name.lower(): value for name, value in request.headers.items()})
            self.bodies.append(body)
        answer = ExportTraceServiceResponse().SerializeToString()
        request.send_response(200 if is_right else 404)
        request.send_header("Content-Type", "application/x-protobuf")
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        request.wfile.write(answer)


def _decode(body: bytes) -> list[Span]:
    return [
        Span(
            name=span.name,
            kind=SentSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            attributes=_values(span.attributes),
            failed=span.status.code == Status.STATUS_CODE_ERROR,
            description=span.status.message,
            library=of_scope.scope.name.rpartition(".")[2],
            resource=_values(of_resource.resource.attributes),
        )
        for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def _values(attributes: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in attributes}
