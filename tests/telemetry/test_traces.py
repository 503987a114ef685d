import contextlib
import http.client
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

import pytest
import requests
from flask import Flask
from flask.testing import FlaskClient
from opentelemetry import propagate
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, TraceFlags, TraceState, set_span_in_context
from redis import Redis
from redis.exceptions import ResponseError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from dev.redis_server import RedisServer
from storage.database import engine_for
from telemetry import span_export, traces
from telemetry.fields import SERVICE
from tests import test_journey
from tests.databases import Databases
from tests.harness import PERSON, ROOT, WAIT_SECONDS, Service, Simulator, bearer, bound_to_this_process, wait_until
from tests.otlp_receiver import OtlpReceiver, Span

StartService = Callable[..., Service]
LOGIN = "/api/v1/auth/wechat"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


# ---- the context of a request


def outgoing_headers() -> dict[str, str]:
    """The headers with which another service continues this trace."""
    headers: dict[str, str] = {}
    propagate.inject(headers)
    return headers


@pytest.mark.parametrize(
    ("traceparent", "flags"),
    [
        (TRACEPARENT, "01"),
        (f"00-{TRACE}-{CALLER}-00", "00"),  # not sampled: who began the trace has decided so
        (f"00-{TRACE}-{CALLER}-ff", "03"),  # only those flags go along that are defined
        (f"cc-{TRACE}-{CALLER}-01", "01"),
        (f"01-{TRACE}-{CALLER}-01-what-the-future-will-bring", "01"),
    ],
)
def test_a_valid_traceparent_is_continued(traceparent: str, flags: str) -> None:
    span = traces.RequestSpan("GET", {"HTTP_TRACEPARENT": traceparent})
    trace_id, span_id = traces.current_ids().values()
    assert (trace_id, span.ids["traceId"], span.ids["parentSpanId"]) == (TRACE, TRACE, CALLER)
    assert span_id != CALLER
    assert outgoing_headers() == {"traceparent": f"00-{TRACE}-{span_id}-{flags}"}
    span.end(200)
    assert traces.current_ids() == {"traceId": None}
    assert outgoing_headers() == {}


def test_any_other_traceparent_begins_a_new_trace() -> None:
    for traceparent in (
        "",
        "00",
        f"00-{TRACE[1:]}-{CALLER}-01",
        f"00-{TRACE}-{CALLER}0-01",
        f"00-{TRACE}-{CALLER}-1",
        f"00-{TRACE.upper()}-{CALLER}-01",
        f"00-{'0' * 32}-{CALLER}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{CALLER}-01",
        f"{TRACEPARENT}-more",
        f"{TRACEPARENT},{TRACEPARENT}",
        f"01-{TRACE}-{CALLER}-01-x,01-{TRACE}-{CALLER}-01",
        "\xff" * 80,
    ):
        span = traces.RequestSpan("GET", {"HTTP_TRACEPARENT": traceparent, "HTTP_TRACESTATE": "a=1"})
        sent = outgoing_headers()
        span.end(200)
        assert "parentSpanId" not in span.ids, traceparent
        assert span.ids["traceId"] != TRACE
        assert sent.keys() == {"traceparent"}
        # Others may record what begins here.
        assert re.fullmatch(f"00-(?!0{{32}}){span.ids['traceId']}-(?!0{{16}})[0-9a-f]{{16}}-01", sent["traceparent"])


def test_the_tracestate_goes_along_if_it_is_valid(journal: Any) -> None:
    for tracestate, goes_along in [
        ("vendor=a,other@vendor=b", {"tracestate": "vendor=a,other@vendor=b"}),
        ("13812345678 is no member", {}),
        ("a=1," * 200, {}),
    ]:
        span = traces.RequestSpan("GET", {"HTTP_TRACEPARENT": TRACEPARENT, "HTTP_TRACESTATE": tracestate})
        headers = outgoing_headers()
        span.end(200)
        assert headers.pop("traceparent")
        assert headers == goes_along
    assert journal.text() == ""


# ---- without a collector

MODULES_LOADED = """
import sys, redis
loaded = set(sys.modules)  # redis loads some, too
from service import create_app
create_app().test_client().get("/readyz")
print(*sorted(set(sys.modules) - loaded))
"""


def test_without_a_collector_nothing_is_loaded_to_send_spans(environ: dict[str, str]) -> None:
    command = [sys.executable, "-c", MODULES_LOADED]
    env = {**environ, "LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "telemetry.traces" in done.stdout.split()
    assert (
        re.findall(r"\S*(?:opentelemetry\.(?:sdk|exporter|instrumentation|proto)|wrapt|google)\S*", done.stdout) == []
    )


# ---- an application that sends its spans


@pytest.fixture
def make_traced(
    make_app: Callable[..., Flask], collector: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., FlaskClient]]:
    """Create a client of an application that sends its spans to `collector` at once."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")

    def make(**different: str) -> FlaskClient:
        for name, value in different.items():
            monkeypatch.setenv(name, value)  # OpenTelemetry itself reads it there
        return make_app(PORT="9123", OTEL_EXPORTER_OTLP_ENDPOINT=collector.url).test_client()

    yield make
    make_app()  # from now on no spans are recorded


def spans_of(collector: OtlpReceiver, trace_id: str, requests: int = 1) -> list[Span]:
    """Wait for all spans of a trace: that of a request is sent after those within it."""

    def complete() -> list[Span]:
        spans = collector.spans(trace_id)
        return spans if sum(span.kind == "SERVER" for span in spans) == requests else []

    spans: list[Span] = wait_until(complete)
    return spans


def test_spans_name_their_sender_and_their_export_is_no_part_of_a_trace(
    make_traced: Callable[..., FlaskClient], collector: OtlpReceiver
) -> None:
    client = make_traced()
    paths = ("/livez", "/livez", "/readyz")
    for path in paths:
        spans = spans_of(collector, client.get(path).headers["X-Trace-Id"])
    assert [span.name for span in collector.spans() if not span.parent_id] == [f"GET {path}" for path in paths]
    assert {name for headers in collector.headers for name in headers} == {
        *("host", "user-agent", "accept", "accept-encoding", "connection", "content-type", "content-length")
    }
    assert {name: value for name, value in spans[0].resource.items() if not name.startswith("telemetry.sdk.")} == {
        "service.name": "kuaishang",
        "service.instance.id": f"{socket.gethostname()}:9123",
        "service.version": client.application.config["VERSION"],
    }


def test_the_environment_may_name_the_sender(make_traced: Callable[..., FlaskClient], collector: OtlpReceiver) -> None:
    client = make_traced(
        OTEL_SERVICE_NAME="shop",
        OTEL_RESOURCE_ATTRIBUTES="service.namespace=shops,service.version=9",
        OTEL_EXPORTER_OTLP_COMPRESSION="gzip",
    )
    (span,) = spans_of(collector, client.get("/livez").headers["X-Trace-Id"])
    assert collector.headers[-1]["content-encoding"] == "gzip"
    assert [span.resource[f"service.{name}"] for name in ("name", "namespace", "version")] == ["shop", "shops", "9"]


@pytest.mark.parametrize("different", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_SAMPLER": "always_off"}])
def test_without_spans_the_ids_remain(
    make_traced: Callable[..., FlaskClient],
    collector: OtlpReceiver,
    monkeypatch: pytest.MonkeyPatch,
    different: dict[str, str],
) -> None:
    start, made = span_export.start, []
    monkeypatch.setattr(span_export, "start", lambda *args: made.append(start(*args)) or made[-1])
    client = make_traced(**different)
    ids = [client.get("/livez").headers["X-Trace-Id"] for _ in range(2)]
    assert all(re.fullmatch("(?!0{32})[0-9a-f]{32}", trace_id) for trace_id in ids)
    assert ids[0] != ids[1]
    made[0].force_flush()
    assert collector.bodies == []


def test_a_trace_that_its_caller_does_not_sample_is_not_recorded(
    make_traced: Callable[..., FlaskClient], collector: OtlpReceiver
) -> None:
    client = make_traced()
    client.application.add_url_rule("/out", view_func=outgoing_headers)
    answer = client.get("/out", headers={"traceparent": f"00-{TRACE}-{CALLER}-00"})
    assert answer.headers["X-Trace-Id"] == TRACE
    assert re.fullmatch(f"00-{TRACE}-(?!{CALLER})[0-9a-f]{{16}}-00", answer.get_json()["traceparent"])
    spans_of(collector, client.get("/livez").headers["X-Trace-Id"])
    assert collector.spans(TRACE) == []


# ---- services that send their spans


class Traced(NamedTuple):
    """Two services that send their spans to one collector, and the Redis of both."""

    collector: OtlpReceiver
    redis: RedisServer
    relay: Service
    service: Service
    """Its handlers of messages are slow; the relay calls it."""


@pytest.fixture(scope="module")
def shared_traced(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("traced")
    with ExitStack() as stack:
        collector = stack.enter_context(closing(OtlpReceiver()))
        redis = stack.enter_context(closing(RedisServer(folder / "redis", bound_to_this_process())))
        redis.start()

        def start(module: str, **different: str) -> Service:
            spans = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
            patient = f"{redis.url}?socket_timeout=10&socket_connect_timeout=10"  # on a busy machine
            env = {**environ, **spans, "REDIS_URL": patient, "WEB_CONCURRENCY": "1", **different}
            service = Service(env, folder / module, module)
            stack.callback(service.discard)
            return service

        service = start("tests.apps.slow_handler")
        yield Traced(collector, redis, start("tests.apps.relay", RELAY_TO=f"{service.url}/readyz"), service)


@pytest.fixture
def traced(shared_traced: Traced, journal: Any) -> Traced:
    """Other tests use them too: leave them running."""
    journal.collectors.append(shared_traced.collector)
    for service in (shared_traced.relay, shared_traced.service):
        service.clear_log()
        journal.services.append(service)
    return shared_traced


def begin_trace() -> tuple[str, str]:
    """Return the id of a new trace, and its traceparent."""
    trace_id = secrets.token_hex(16)
    return trace_id, f"00-{trace_id}-{CALLER}-01"


def log_in(service: Service, simulator: Simulator, traceparent: str) -> requests.Response:
    body = {"code": simulator.code()}
    return requests.post(service.url + LOGIN, json=body, headers={"traceparent": traceparent}, timeout=WAIT_SECONDS)


def ancestors(spans: list[Span], span: Span) -> list[str]:
    """The ids from a span's parent up to the one that belongs to none of these spans."""
    parents = {other.span_id: other.parent_id for other in spans}
    way = [span.parent_id]
    while way[-1] in parents and len(way) <= len(spans):
        way.append(parents[way[-1]])
    return way


def test_one_trace_over_two_instances_is_one_connected_tree(traced: Traced, simulator: Simulator) -> None:
    trace_id, traceparent = begin_trace()
    for service in (traced.relay, traced.service):
        assert log_in(service, simulator, traceparent).headers["X-Trace-Id"] == trace_id
    answer = requests.get(f"{traced.relay.url}/relay", headers={"traceparent": traceparent}, timeout=WAIT_SECONDS)
    assert answer.json() == {"status": 200}
    spans = spans_of(traced.collector, trace_id, requests=4)
    assert len({span.span_id for span in spans}) == len(spans)
    assert {ancestors(spans, span)[-1] for span in spans} == {CALLER}
    for service in (traced.relay, traced.service):
        port = service.environ["PORT"]
        mine = [span for span in spans if span.resource["service.instance.id"].endswith(f":{port}")]
        (server,) = [span for span in mine if span.name == f"POST {LOGIN}"]
        assert (server.kind, server.parent_id, server.library) == ("SERVER", CALLER, "kuaishang")
        assert server.attributes == {
            "http.request.method": "POST",
            "http.route": LOGIN,
            "http.response.status_code": 200,
        }
        others = [span for span in mine if span.parent_id == server.span_id]
        assert {span.kind for span in others} == {"CLIENT"}
        assert {span.library for span in others} == {"kuaishang", "redis", "sqlalchemy"}
        assert {"WeChat /sns/jscode2session", "SET", "SELECT users", "INSERT users"} <= {span.name for span in others}
    by_name = {span.name: span for span in spans}
    relayed, served = by_name["GET /relay"], by_name["GET /readyz"]
    assert (relayed.parent_id, served.parent_id) == (CALLER, relayed.span_id)
    assert relayed.resource["service.instance.id"] != served.resource["service.instance.id"]
    # WeChat gets nothing of it.
    assert [call["path"] for call in simulator.calls()] == ["/sns/jscode2session"] * 2
    assert not [name for call in simulator.calls() for name in call["headers"] if "trace" in name.lower()]


def test_a_line_names_its_span_and_the_one_above(traced: Traced, simulator: Simulator) -> None:
    trace_id, traceparent = begin_trace()
    simulator.fault("not_json")
    assert log_in(traced.service, simulator, traceparent).status_code == 502
    spans = {span.name: span for span in spans_of(traced.collector, trace_id)}
    call, server = spans["WeChat /sns/jscode2session"], spans[f"POST {LOGIN}"]

    def lines() -> list[dict[str, Any]]:
        lines = [line for line in traced.service.log_lines() if line["traceId"] == trace_id]
        return lines if lines and lines[-1]["message"] == "request" else []

    above = {(line["spanId"], line["parentSpanId"]) for line in wait_until(lines)}
    assert above == {(call.span_id, server.span_id), (server.span_id, CALLER)}


def test_a_handler_is_part_of_the_trace(traced: Traced, simulator: Simulator) -> None:
    name, url = "tests.apps.slow_handler.take_a_while", f"{traced.service.url}/api/v1/wechat/messages"

    def work() -> list[Span]:
        return [span for span in traced.collector.spans() if span.name == f"handler {name}"]

    for content in ("0", PERSON["phone"] + "x"):  # the handler takes it for a number of seconds
        (answer,) = simulator.push({"MsgType": "text", "Content": content}, url=url)
        assert answer["status"] == 200
    done = wait_until(lambda: len(work()) == 2 and work())
    assert sorted((span.failed, span.description) for span in done) == [(False, ""), (True, "ValueError")]
    for span in done:
        (server,) = [span for span in spans_of(traced.collector, span.trace_id) if span.kind == "SERVER"]
        assert (server.name, server.span_id) == ("POST /api/v1/wechat/messages", span.parent_id)
        assert span.attributes["code.function.name"] == name
        within = [other.name for other in traced.collector.spans() if other.parent_id == span.span_id]
        assert within == ([] if span.failed else ["RPUSH"])


def test_a_repeated_traceparent_begins_a_new_trace(traced: Traced) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(traced.service.environ["PORT"]), timeout=WAIT_SECONDS)
    with closing(connection):
        connection.putrequest("GET", "/livez")
        for _ in range(2):
            connection.putheader("traceparent", TRACEPARENT)
        connection.endheaders()
        assert connection.getresponse().headers["X-Trace-Id"] != TRACE


def test_an_unknown_method_is_not_exported(traced: Traced) -> None:
    trace_id, traceparent = begin_trace()
    for path in ("/livez", f"/{PERSON['phone']}?secret={PERSON['phone']}"):
        requests.request(
            "X-MY-OWN", traced.service.url + path, headers={"traceparent": traceparent}, timeout=WAIT_SECONDS
        )
    spans = spans_of(traced.collector, trace_id, requests=2)
    assert {span.name for span in spans} == {"HTTP"}
    assert {span.attributes["http.request.method"] for span in spans} == {"_OTHER"}
    assert b"MY-OWN" not in b"".join(traced.collector.bodies)


def test_a_failed_span_has_its_reason_in_one_word(traced: Traced, simulator: Simulator) -> None:
    def log_in_during(kind: str | None, status: int, **details: Any) -> str:
        trace_id, traceparent = begin_trace()
        if kind:
            simulator.fault(kind, **details)
        assert log_in(traced.service, simulator, traceparent).status_code == status
        return trace_id

    unknown = log_in_during("errcode", 400, errcode=40029)
    lost = log_in_during("close", 503, times=2)
    refused = log_in_during("errcode", 502, errcode=40125)
    # More than fits into a span, and into the batch of all the others.
    absurd = log_in_during("errcode", 502, errcode=10**30)
    traced.redis.stop()
    away = log_in_during(None, 503)
    traced.redis.start()

    def spans(trace_id: str, kind: str, library: str = "kuaishang") -> list[tuple[Any, ...]]:
        chosen = [span for span in spans_of(traced.collector, trace_id) if (span.kind, span.library) == (kind, library)]
        status = "wechat.errcode" if kind == "CLIENT" else "http.response.status_code"
        return [(span.failed, span.attributes.get(status), span.description) for span in chosen]

    assert spans(unknown, "SERVER") == [(False, 400, "")]
    assert spans(unknown, "CLIENT") == [(True, 40029, "")]
    assert spans(lost, "SERVER") == [(True, 503, "503")]
    assert spans(lost, "CLIENT") == [(True, None, "requests.exceptions.ConnectionError")] * 2  # each try
    assert spans(refused, "SERVER") == [(True, 502, "502")]
    assert spans(refused, "CLIENT") == [(True, 40125, "")]
    assert spans(absurd, "CLIENT") == [(True, None, "wechat.transport.Failed")]
    assert spans(away, "SERVER") == [(True, 503, "503")]
    assert spans(away, "CLIENT", "redis") == [(True, None, "redis.exceptions.ConnectionError")]


def test_no_secret_and_nothing_personal_leaves_in_a_span(traced: Traced, simulator: Simulator, journal: Any) -> None:
    # `journal` searches all that the collector has received.
    service = traced.service
    test_journey.test_the_journey_of_a_user_on_two_instances((traced.relay, service), simulator)
    token = service.log_in(simulator, openid="o-spans")
    me = f"{service.url}/api/v1/users/me"
    phone = simulator.phone_code(openid="o-spans", phone=PERSON["phone"])
    assert service.call("PUT", "/users/me/phone", token, json={"code": phone}).status_code == 200
    known = {name: value for name, value in PERSON.items() if name != "phone"}
    etag = service.call("GET", "/users/me/personal-data", token).headers["ETag"]
    bound = {**bearer(token), "If-Match": etag}
    assert requests.put(f"{me}/personal-data", json=known, headers=bound, timeout=WAIT_SECONDS).status_code == 200
    full = service.call("GET", "/users/me/personal-data/full", token).json()["data"]
    assert {name: value for name, value in full.items() if name != "version"} == PERSON
    item = {"sku": "a", "name": "a very special tea", "quantity": 1, "unit_price": 1}
    order = {"remark": "leave it with the neighbour", "items": [item]}
    assert service.call("POST", "/orders", token, json=order).status_code == 201
    trace_id, traceparent = begin_trace()
    headers = {"tracestate": f"phone={PERSON['phone']}", "traceparent": traceparent, "Cookie": PERSON["bank_card"]}
    requests.get(f"{service.url}/{PERSON['phone']}?access_token={token}", headers=headers, timeout=WAIT_SECONDS)
    spans_of(traced.collector, trace_id)
    journal.secrets |= {service.environ[name] for name in ("SECRET_KEY", "ENCRYPTION_KEYS", "DATABASE_URL")}
    journal.secrets |= {"o-journey", "u-journey", "阿上", "o-spans", phone, order["remark"], item["name"]}


def test_spans_of_libraries_lose_all_that_might_be_personal(
    collector: OtlpReceiver, own_databases: Databases, redis_server: RedisServer
) -> None:
    personal = PERSON["phone"]
    engine = engine_for(own_databases.create())
    with Redis.from_url(redis_server.url) as client:
        app = Flask("service")
        app.config.update(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, INSTANCE="here:8000", VERSION="0")
        app.extensions.update(redis=client, database=engine)
        provider = span_export.start(app)
        client.set(personal, personal)
        client.pipeline().get(personal).rpush(personal, personal).execute(raise_on_error=False)
        with pytest.raises(ResponseError, match=personal):
            client.execute_command(personal)
        client.execute_command(f"GET {personal}")

    inserted = f"INSERT INTO notes VALUES ('{personal} FROM {personal}')"
    for statement in (
        "CREATE TABLE notes (note VARCHAR(99) UNIQUE)",
        inserted,
        inserted,
        f"SELECT '{personal}', 'FROM ouyang', {personal} FROM notes",
        f'UPDATE notes SET note = "x" WHERE note = {personal}',
    ):
        with contextlib.suppress(DBAPIError), engine.begin() as connection:
            connection.execute(text(statement))
    engine.dispose()

    tracer = provider.get_tracer(SERVICE)
    state = TraceState([("vendor", personal)])
    caller = NonRecordingSpan(SpanContext(int(TRACE, 16), int(CALLER, 16), True, TraceFlags(1), state))
    link = Link(caller.get_span_context(), {"phone": personal})
    above = set_span_in_context(caller)
    attributes = {"phone": personal, "db.statement": personal, "http.route": "/livez"}
    with (
        contextlib.suppress(ValueError),
        tracer.start_as_current_span("ours", above, attributes=attributes, links=[link]) as span,
    ):
        span.add_event(personal, {"exception.message": personal})
        raise ValueError(personal)
    provider.get_tracer("of somebody else").start_span(personal).end()
    provider.shutdown()

    assert personal.encode() not in b"".join(collector.bodies)
    assert b"ouyang" not in b"".join(collector.bodies)
    (ours,) = collector.spans(TRACE)
    assert (ours.attributes, ours.description) == ({"http.route": "/livez", "error.type": "ValueError"}, "ValueError")
    assert [span.name for span in collector.spans()] == [
        "SET",
        "GET RPUSH",
        "unknown",
        "GET",
        "CREATE",
        "INSERT notes",
        "INSERT notes",
        "SELECT",
        "UPDATE notes",
        "ours",
        "unknown",
    ]


# ---- processes and a collector that fails


@pytest.fixture
def start_traced(collector: OtlpReceiver, start_service: StartService) -> StartService:
    """As `start_service`, but the service sends its spans to `collector`, and soon."""

    def start(module: str = "wsgi", **different: str) -> Service:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200", **different}
        return start_service(module, **settings)

    return start


def test_each_worker_sends_its_own_spans(start_traced: StartService, collector: OtlpReceiver) -> None:
    service = start_traced()

    def served() -> dict[int, set[str]]:
        """The traces by the process that served them."""
        by_process: dict[int, set[str]] = {}
        for line in service.log_lines():
            if line["message"] == "request" and line["route"] == "/readyz":
                by_process.setdefault(line["pid"], set()).add(line["traceId"])
        return by_process

    def serve_until(processes: int) -> None:
        with ThreadPoolExecutor(8) as pool:
            wait_until(
                lambda: (
                    list(pool.map(lambda _: requests.get(f"{service.url}/readyz", timeout=WAIT_SECONDS), range(16)))
                    and len(served()) >= processes
                )
            )

    serve_until(2)
    wait_until(lambda: all(ids & {span.trace_id for span in collector.spans()} for ids in served().values()))
    service.workers()[0].kill()  # and another one is forked in its place
    serve_until(3)
    service.stop()
    spans = collector.spans()
    sent = {span.trace_id for span in spans}
    assert sorted(ids <= sent for ids in served().values())[1:] == [True, True]  # the one killed had no time for all
    assert len({span.span_id for span in spans}) == len(spans)
    instance = f"{socket.gethostname()}:{service.environ['PORT']}"
    assert {span.resource["service.instance.id"] for span in spans} == {instance}
    assert len(collector.clients) == 3  # none over the connection of another


def test_a_failing_collector_delays_neither_requests_nor_the_stop(
    start_traced: StartService, collector: OtlpReceiver
) -> None:
    service = start_traced(
        WEB_CONCURRENCY="1",
        OTEL_BSP_MAX_QUEUE_SIZE="512",
        OTEL_BSP_MAX_EXPORT_BATCH_SIZE="16",
        OTEL_EXPORTER_OTLP_TIMEOUT="2",
    )

    def send_many_requests() -> None:
        """More than there is room for spans; a request that waited for the collector would time out."""
        with ThreadPoolExecutor(4) as pool:
            answers = pool.map(lambda _: requests.get(f"{service.url}/readyz", timeout=WAIT_SECONDS), range(400))
            # A busy machine may leave a few probes too little time.
            assert [answer.status_code for answer in answers].count(200) > 380

    collector.hold.set()
    send_many_requests()
    collector.hold.clear()
    trace_id = requests.get(f"{service.url}/livez", timeout=WAIT_SECONDS).headers["X-Trace-Id"]
    wait_until(lambda: collector.spans(trace_id))
    assert len(collector.spans()) < 1000  # of 1200: what did not fit is lost, not kept
    collector.close()
    send_many_requests()
    wait_until(lambda: "Failed to export" in service.log())
    assert "retrying" not in service.log()
    address = ("127.0.0.1", int(collector.url.rpartition(":")[2]))
    with socket.create_server(address):  # takes connections, and never answers
        send_many_requests()
        service.process.popen.terminate()
        # The queue would take 64 s, and gunicorn kills after 28 s.
        assert service.process.popen.wait(20) == 0
