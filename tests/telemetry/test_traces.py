import contextlib
import http.client
import json
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, TraceFlags, TraceState, set_span_in_context
from redis import Redis
from redis.exceptions import ResponseError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from werkzeug.datastructures import Headers

import settings
from dev.redis_server import RedisServer
from dev.run import free_port
from storage.database import engine_for
from telemetry import span_export, traces
from telemetry.logs import SERVICE
from tests.databases import Databases, MariaDB
from tests.harness import PERSON, ROOT, Service, Simulator, bearer, wait_until
from tests.otlp_receiver import OtlpReceiver, Span
from tests.test_journey import Browser
from tests.wechat.harness import PROPERTY

StartService = Callable[..., Service]
LOGIN = "/api/v1/auth/wechat"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


# ---- the context of a request


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
    span = traces.RequestSpan("GET", Headers({"traceparent": traceparent}))
    trace_id, span_id = traces.current_ids().values()
    assert (trace_id, span.trace_id, span.parent_id) == (TRACE, TRACE, CALLER)
    assert span_id != CALLER
    assert traces.outgoing_headers() == {"traceparent": f"00-{TRACE}-{span_id}-{flags}"}
    span.end(200)
    assert traces.current_ids() == {"traceId": None}
    assert traces.outgoing_headers() == {}


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "00",
        f"0-{TRACE}-{CALLER}-01",
        f"00-{TRACE[1:]}-{CALLER}-01",
        f"00-{TRACE}0-{CALLER}-01",
        f"00-{TRACE}-{CALLER[1:]}-01",
        f"00-{TRACE}-{CALLER}0-01",
        f"00-{TRACE}-{CALLER}-1",
        f"00-{TRACE}-{CALLER}-001",
        f"00-{TRACE}-{CALLER}",
        f"00-{TRACE.upper()}-{CALLER}-01",
        f"00-{TRACE}-{CALLER.upper()}-01",
        f"00-{TRACE}-{CALLER}-0A",
        f"00-{'0' * 32}-{CALLER}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}g-{CALLER}-01",
        f"00_{TRACE}_{CALLER}_01",
        f"ff-{TRACE}-{CALLER}-01",
        f"{TRACEPARENT}-",
        f"{TRACEPARENT}-more",
        f"{TRACEPARENT}x",
        f"{TRACEPARENT} {TRACEPARENT}",
        f"{TRACEPARENT},{TRACEPARENT}",
        f"01-{TRACE}-{CALLER}-01.more",
        f"01-{TRACE}-{CALLER}-01-x,01-{TRACE}-{CALLER}-01",
    ],
)
def test_any_other_traceparent_begins_a_new_trace(traceparent: str) -> None:
    span = traces.RequestSpan("GET", Headers({"traceparent": traceparent, "tracestate": "a=1"}))
    assert span.parent_id is None
    assert re.fullmatch("(?!0{32})[0-9a-f]{32}", span.trace_id)
    assert span.trace_id != TRACE
    assert list(traces.outgoing_headers()) == ["traceparent"]
    span.end(200)


@PROPERTY
@given(
    st.text(st.characters(max_codepoint=255), max_size=80)
    | st.from_regex("[0-9a-fx]{2}-[0-9a-fF]{31,33}-[0-9a-f]{15,17}-[0-9a-f]{1,3}(-.*)?", fullmatch=True)
)
def test_whatever_comes_a_trace_has_an_id_and_goes_on_only_if_that_is_valid(traceparent: str) -> None:
    span = traces.RequestSpan("GET", Headers({"traceparent": re.sub("[\r\n]", "", traceparent)}))
    sent = re.fullmatch(
        r"[ \t]*(?!ff)([0-9a-f]{2})-(?!0+-)([0-9a-f]{32})-(?!0+-)([0-9a-f]{16})-[0-9a-f]{2}(-[^,]*)?[ \t]*",
        re.sub("[\r\n]", "", traceparent),
    )
    is_valid = sent is not None and not (sent[1] == "00" and sent[4])
    assert (span.parent_id, span.trace_id == (sent and sent[2])) == ((sent[3], True) if is_valid else (None, False))
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-0[0-3]", traces.outgoing_headers()["traceparent"])
    span.end(200)


def test_the_tracestate_goes_along_if_it_is_valid(journal: Any) -> None:
    for tracestate, goes_along in [
        ("vendor=a,other@vendor=b", {"tracestate": "vendor=a,other@vendor=b"}),
        ("13812345678 is no member", {}),
        ("a=1," * 200, {}),
    ]:
        span = traces.RequestSpan("GET", Headers({"traceparent": TRACEPARENT, "tracestate": tracestate}))
        headers = traces.outgoing_headers()
        span.end(200)
        assert headers.pop("traceparent")
        assert headers == goes_along
    assert journal.text() == ""


def test_without_a_caller_each_request_begins_a_trace_that_others_may_record() -> None:
    sent = []
    for _ in range(2):
        span = traces.RequestSpan("GET", Headers())
        sent.append(traces.outgoing_headers()["traceparent"])
        span.end(200)
    assert all(re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", traceparent) for traceparent in sent)
    assert len({part for traceparent in sent for part in traceparent.split("-")[1:3]}) == 4


@pytest.fixture
def traced_environ(environ: dict[str, str], collector: OtlpReceiver) -> dict[str, str]:
    """The environment of a service that sends its spans to `collector`, and soon."""
    return {
        **environ,
        "PORT": "9123",
        "LOG_LEVEL": "ERROR",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }


# ---- without a collector

LOADED_BY_REDIS = "import sys, redis; print(sorted(sys.modules))"
ASK_EVERYTHING = """
import json, sys
from service import create_app
app = create_app()
client = app.test_client()
ids = [client.get("/livez").headers["X-Trace-Id"] for _ in range(2)]
print(json.dumps({"ids": ids, "ready": client.get("/readyz").status_code, "modules": sorted(sys.modules)}))
"""


def run(script: str, environ: dict[str, str]) -> str:
    """Run a script in the root of the project, and answer the last line that it prints."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()[-1]


def test_without_a_collector_nothing_is_loaded_to_send_spans(environ: dict[str, str]) -> None:
    environ = {**environ, "LOG_LEVEL": "ERROR"}
    answer = json.loads(run(ASK_EVERYTHING, environ))
    assert answer["ready"] == 200
    assert len(set(answer["ids"])) == 2
    loaded = {
        name
        for name in answer["modules"]
        if re.match(r"opentelemetry\.(sdk|exporter|instrumentation|proto)|wrapt|google", name)
    }
    by_redis = set(eval(run(LOADED_BY_REDIS, environ)))
    assert loaded - by_redis == set()
    assert "opentelemetry.sdk.trace" not in loaded


def test_a_disabled_sdk_leaves_the_ids(traced_environ: dict[str, str], collector: OtlpReceiver) -> None:
    answer = json.loads(run(ASK_EVERYTHING, {**traced_environ, "OTEL_SDK_DISABLED": "true"}))
    assert all(re.fullmatch("(?!0{32})[0-9a-f]{32}", trace_id) for trace_id in answer["ids"])
    assert len(set(answer["ids"])) == 2
    assert collector.bodies == []


def test_a_traceparent_that_comes_twice_begins_a_new_trace(start_service: StartService) -> None:
    service = start_service()
    connection = http.client.HTTPConnection("127.0.0.1", int(service.environ["PORT"]), timeout=5)
    sent = {}
    for times in (1, 2):
        connection.putrequest("GET", "/livez")
        for _ in range(times):
            connection.putheader("traceparent", TRACEPARENT)
        connection.endheaders()
        answer = connection.getresponse()
        answer.read()
        sent[times] = answer.headers["X-Trace-Id"]
    connection.close()
    assert sent[1] == TRACE
    assert sent[2] != TRACE


# ---- with a collector


@pytest.fixture
def start_traced(collector: OtlpReceiver, start_service: StartService) -> StartService:
    """As `start_service`, but the service sends its spans to `collector`, and soon."""

    def start(module: str = "wsgi", **different: str) -> Service:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200", **different}
        return start_service(module, **settings)

    return start


def log_in(service: Service, simulator: Simulator, traceparent: str = TRACEPARENT, **wanted: Any) -> requests.Response:
    body = {"code": simulator.code(**wanted)}
    return requests.post(service.url + LOGIN, json=body, headers={"traceparent": traceparent}, timeout=10)


def above(spans: list[Span], span: Span) -> list[str]:
    """The ids from a span's parent up to that which nobody here has."""
    parents = {other.span_id: other.parent_id for other in spans}
    way = [span.parent_id]
    while way[-1] in parents and len(way) <= len(spans):
        way.append(parents[way[-1]])
    return way


def test_one_traceparent_to_two_instances_is_one_connected_tree(
    start_traced: StartService, collector: OtlpReceiver, simulator: Simulator
) -> None:
    services = [start_traced(), start_traced()]
    for service in services:
        assert log_in(service, simulator).headers["X-Trace-Id"] == TRACE
        service.stop()
    spans = collector.spans(TRACE)
    assert len({span.span_id for span in spans}) == len(spans)
    assert {above(spans, span)[-1] for span in spans} == {CALLER}
    for service in services:
        port = service.environ["PORT"]
        mine = [span for span in spans if span.resource["service.instance.id"].endswith(f":{port}")]
        (server,) = [span for span in mine if span.kind == "SERVER"]
        assert (server.name, server.parent_id, server.library) == (f"POST {LOGIN}", CALLER, "kuaishang")
        assert server.attributes == {
            "http.request.method": "POST",
            "http.route": LOGIN,
            "http.response.status_code": 200,
        }
        (line,) = [line for line in service.log_lines() if line["traceId"] == TRACE and line["message"] == "request"]
        assert line["spanId"] == server.span_id
        others = [span for span in mine if span is not server]
        assert {(span.parent_id, span.kind) for span in others} == {(server.span_id, "CLIENT")}
        assert {span.library for span in others} == {"kuaishang", "redis", "sqlalchemy"}
        assert {"WeChat /sns/jscode2session", "SET", "SELECT users", "INSERT users"} <= {span.name for span in others}
    assert sum(len(above(spans, span)) for span in spans) == 2 * len(spans) - 2


def test_a_service_that_calls_another_one_of_ours_stands_above_it(
    start_traced: StartService, collector: OtlpReceiver
) -> None:
    below = start_traced()
    relay = start_traced("tests.apps.relay", RELAY_TO=f"{below.url}/readyz")
    answer = requests.get(f"{relay.url}/relay", headers={"traceparent": TRACEPARENT}, timeout=10)
    assert answer.json() == {"status": 200}
    relay.stop()
    below.stop()
    spans = collector.spans(TRACE)
    by_name = {span.name: span for span in spans}
    first, second = by_name["GET /relay"], by_name["GET /readyz"]
    assert (first.parent_id, second.parent_id) == (CALLER, first.span_id)
    assert first.resource["service.instance.id"] != second.resource["service.instance.id"]
    assert {above(spans, span)[-1] for span in spans} == {CALLER}
    pings = [span for span in spans if span.library in ("redis", "sqlalchemy")]
    assert {span.resource["service.instance.id"] for span in pings} == {
        first.resource["service.instance.id"],
        second.resource["service.instance.id"],
    }


def test_a_line_names_the_span_above_its_own(
    start_traced: StartService, collector: OtlpReceiver, simulator: Simulator
) -> None:
    service = start_traced()
    simulator.fault("not_json")
    assert log_in(service, simulator).status_code == 502
    service.stop()
    spans = {span.name: span for span in collector.spans(TRACE)}
    call, server = spans["WeChat /sns/jscode2session"], spans[f"POST {LOGIN}"]
    lines = [line for line in service.log_lines() if line["traceId"] == TRACE]
    above = {(line["spanId"], line["parentSpanId"]) for line in lines}
    assert above == {(call.span_id, server.span_id), (server.span_id, CALLER)}
    assert all(list(line).index("parentSpanId") == list(line).index("spanId") + 1 for line in lines)


def test_wechat_is_not_told_of_a_trace(start_traced: StartService, simulator: Simulator) -> None:
    assert log_in(start_traced(), simulator).status_code == 200
    assert [call["path"] for call in simulator.calls()] == ["/sns/jscode2session"]
    assert not [name for call in simulator.calls() for name in call["headers"] if "trace" in name.lower()]


ASK_AS_SOMEBODY_WHO_DOES_NOT_SAMPLE = f"""
import json
from service import create_app
from telemetry.traces import outgoing_headers
app = create_app()
app.add_url_rule("/out", view_func=outgoing_headers)
answer = app.test_client().get("/out", headers={{"traceparent": "00-{TRACE}-{CALLER}-00"}})
app.test_client().get("/readyz")
print(json.dumps([answer.headers["X-Trace-Id"], answer.get_json()]))
"""


def test_a_caller_who_does_not_sample_is_heeded(traced_environ: dict[str, str], collector: OtlpReceiver) -> None:
    trace_id, sent = json.loads(run(ASK_AS_SOMEBODY_WHO_DOES_NOT_SAMPLE, traced_environ))
    assert trace_id == TRACE
    assert re.fullmatch(f"00-{TRACE}-(?!{CALLER})[0-9a-f]{{16}}-00", sent["traceparent"])
    assert "GET /readyz" in {span.name for span in collector.spans()}
    assert collector.spans(TRACE) == []


@pytest.mark.parametrize(
    ("sampler", "argument", "sampled"),
    [("always_off", "", False), ("traceidratio", "0", False), ("parentbased_always_on", "", True)],
)
def test_the_sampler_is_opentelemetrys_own(
    traced_environ: dict[str, str], collector: OtlpReceiver, sampler: str, argument: str, sampled: bool
) -> None:
    different = {"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument}
    ids = json.loads(run(ASK_EVERYTHING, {**traced_environ, **different}))["ids"]
    assert all(re.fullmatch("(?!0{32})[0-9a-f]{32}", trace_id) for trace_id in ids)
    assert {span.trace_id for span in collector.spans()}.issuperset(ids) == sampled
    assert bool(collector.spans()) == sampled


def test_spans_say_who_sends_them_unless_the_environment_does(
    traced_environ: dict[str, str], collector: OtlpReceiver
) -> None:
    run(ASK_EVERYTHING, traced_environ)
    (ours,) = {tuple(sorted(span.resource.items())) for span in collector.spans()}
    port = traced_environ["PORT"]
    assert dict(ours) == {
        "service.name": "kuaishang",
        "service.instance.id": settings.instance(int(port)),
        "service.version": settings.VERSION,
        **{name: value for name, value in ours if name.startswith("telemetry.sdk.")},
    }
    collector.bodies.clear()
    different = {
        "OTEL_SERVICE_NAME": "shop",
        "OTEL_RESOURCE_ATTRIBUTES": "service.namespace=shops,service.version=9",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
    }
    run(ASK_EVERYTHING, {**traced_environ, **different})
    assert collector.headers[-1]["content-encoding"] == "gzip"
    theirs = collector.spans()[0].resource
    assert [theirs[f"service.{name}"] for name in ("name", "namespace", "version")] == ["shop", "shops", "9"]


def test_sending_spans_is_no_part_of_a_trace_and_says_nothing_of_us(
    traced_environ: dict[str, str], collector: OtlpReceiver
) -> None:
    run(ASK_EVERYTHING, {**traced_environ, "OTEL_BSP_SCHEDULE_DELAY": "1"})
    assert len(collector.bodies) > 1
    assert {name for headers in collector.headers for name in headers} == {
        *("host", "user-agent", "accept", "accept-encoding", "connection", "content-type", "content-length")
    }
    roots = [span.name for span in collector.spans() if not span.parent_id]
    assert roots == ["GET /livez", "GET /livez", "GET /readyz"]


def test_work_in_the_background_is_part_of_the_trace(
    start_traced: StartService, collector: OtlpReceiver, simulator: Simulator, redis: Redis
) -> None:
    service = start_traced("tests.apps.slow_handler")
    for content in ("0", PERSON["phone"] + "x"):  # the handler takes it for a number of seconds
        message = {"MsgType": "text", "Content": content}
        (answer,) = simulator.push(message, url=f"{service.url}/api/v1/wechat/messages")
        assert answer["status"] == 200
    service.stop()
    work = [span for span in collector.spans() if span.name == "background tests.apps.slow_handler.take_a_while"]
    assert sorted((span.failed, span.description) for span in work) == [(False, ""), (True, "ValueError")]
    for span in work:
        whole = collector.spans(span.trace_id)
        (server,) = [other for other in whole if other.kind == "SERVER"]
        assert (server.name, server.span_id) == ("POST /api/v1/wechat/messages", span.parent_id)
        assert span.attributes["code.function.name"] == "tests.apps.slow_handler.take_a_while"
    (well,) = [span for span in work if not span.failed]
    assert [span.name for span in collector.spans() if span.parent_id == well.span_id] == ["RPUSH"]
    assert redis.llen("handled") == 1


# ---- processes


def test_each_worker_sends_its_own_spans_also_if_gunicorn_has_preloaded_the_service(
    start_traced: StartService, collector: OtlpReceiver
) -> None:
    service = start_traced("tests.speaking_first", GUNICORN_CMD_ARGS="--preload")

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
                    list(pool.map(lambda _: requests.get(f"{service.url}/readyz", timeout=5), range(16)))
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
    assert {span.resource["service.instance.id"] for span in spans} == {settings.instance(int(service.environ["PORT"]))}
    assert len(collector.clients) == 4  # the master and three workers, none over the connection of another


def test_at_a_graceful_stop_all_that_is_in_hand_is_finished_and_sent(
    start_traced: StartService, collector: OtlpReceiver, simulator: Simulator
) -> None:
    service = start_traced("tests.apps.slow_handler", OTEL_BSP_SCHEDULE_DELAY="60000")
    message = {"MsgType": "text", "Content": "1"}
    simulator.push(message, url=f"{service.url}/api/v1/wechat/messages")
    simulator.fault("slow", seconds=1)
    with ThreadPoolExecutor(1) as pool:
        login = pool.submit(log_in, service, simulator)
        wait_until(simulator.calls)
        assert collector.bodies == []
        service.stop()
        assert login.result().status_code == 200
    names = {span.name for span in collector.spans()}
    assert {"background tests.apps.slow_handler.take_a_while", "RPUSH", f"POST {LOGIN}", "GET /livez"} <= names


def test_a_collector_that_hangs_costs_nobody_anything(start_traced: StartService, collector: OtlpReceiver) -> None:
    service = start_traced(
        OTEL_BSP_MAX_QUEUE_SIZE="64", OTEL_BSP_MAX_EXPORT_BATCH_SIZE="16", OTEL_EXPORTER_OTLP_TIMEOUT="20"
    )
    collector.hold.set()
    ask_often(service)
    collector.hold.clear()
    trace_id = requests.get(f"{service.url}/livez", timeout=5).headers["X-Trace-Id"]
    wait_until(lambda: collector.spans(trace_id))
    assert len(collector.spans()) < 400  # what did not fit is lost, not kept
    collector.hold.set()
    ask_often(service)
    started = time.monotonic()
    service.stop()
    assert time.monotonic() - started < 12  # and not the 20 s after which a try is given up


def test_a_collector_that_is_away_costs_nobody_anything(start_traced: StartService) -> None:
    nowhere = f"http://127.0.0.1:{free_port('a port', '0')}"
    service = start_traced(OTEL_EXPORTER_OTLP_ENDPOINT=nowhere, OTEL_EXPORTER_OTLP_TIMEOUT="2")
    ask_often(service)
    wait_until(lambda: "Failed to export" in service.log())
    assert "retrying" not in service.log()
    started = time.monotonic()
    service.stop()
    assert time.monotonic() - started < 12
    assert service.process.popen.returncode == 0


def ask_often(service: Service) -> None:
    """More often than there is room for spans; a request that waited for a collector would not be done in time."""

    def ask(_: int) -> None:
        assert requests.get(f"{service.url}/readyz", timeout=5).status_code == 200

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(400)))


# ---- what spans tell


def test_a_span_tells_that_something_failed_and_why_in_a_word(
    start_traced: StartService, collector: OtlpReceiver, simulator: Simulator, own_redis: RedisServer
) -> None:
    service = start_traced(REDIS_URL=own_redis.url)
    names = ("unknown", "lost", "refused", "absurd", "away")
    traceparents = {name: f"00-{secrets.token_hex(16)}-{CALLER}-01" for name in names}
    simulator.fault("errcode", errcode=40029)
    assert log_in(service, simulator, traceparents["unknown"]).status_code == 400
    simulator.fault("close", times=2)
    assert log_in(service, simulator, traceparents["lost"]).status_code == 503
    simulator.fault("errcode", errcode=40125)
    assert log_in(service, simulator, traceparents["refused"]).status_code == 502
    simulator.fault("errcode", errcode=10**30)  # more than fits into a span, and into the batch of all the others
    assert log_in(service, simulator, traceparents["absurd"]).status_code == 502
    own_redis.stop()
    assert log_in(service, simulator, traceparents["away"]).status_code == 503
    service.stop()

    def told(name: str, kind: str, library: str = "kuaishang") -> list[tuple[Any, ...]]:
        spans = collector.spans(traceparents[name].split("-")[1])
        chosen = [span for span in spans if (span.kind, span.library) == (kind, library)]
        status = "wechat.errcode" if kind == "CLIENT" else "http.response.status_code"
        return [(span.failed, span.attributes.get(status), span.description) for span in chosen]

    assert told("unknown", "SERVER") == [(False, 400, "")]
    assert told("unknown", "CLIENT") == [(True, 40029, "")]
    assert told("lost", "SERVER") == [(True, 503, "503")]
    assert told("lost", "CLIENT") == [(True, None, "requests.exceptions.ConnectionError")] * 2  # each try
    assert told("refused", "SERVER") == [(True, 502, "502")]
    assert told("refused", "CLIENT") == [(True, 40125, "")]
    assert told("absurd", "CLIENT") == [(True, None, "errors.ApiError")]
    assert told("away", "SERVER") == [(True, 503, "503")]
    assert told("away", "CLIENT", "redis") == [(True, None, "redis.exceptions.ConnectionError")]


@pytest.mark.only_on("mariadb")
def test_a_database_that_is_away_is_seen_where_it_is_connected_to(
    start_traced: StartService, collector: OtlpReceiver, own_databases: MariaDB
) -> None:
    database_url = own_databases.create()
    service = start_traced(DATABASE_URL=database_url)
    own_databases.kill()
    answer = requests.get(f"{service.url}/readyz", headers={"traceparent": TRACEPARENT}, timeout=5)
    assert answer.status_code == 503
    service.stop()
    (connect,) = [span for span in collector.spans(TRACE) if span.library == "sqlalchemy"]
    assert (connect.name, connect.attributes["db.system"]) == ("connect", "mysql")
    assert (connect.failed, connect.description) == (True, "pymysql.err.OperationalError")


def test_a_method_that_nobody_knows_is_not_repeated(start_traced: StartService, collector: OtlpReceiver) -> None:
    service = start_traced()
    for path in ("/livez", f"/{PERSON['phone']}?secret={PERSON['phone']}"):
        requests.request("X-MY-OWN", service.url + path, headers={"traceparent": TRACEPARENT}, timeout=5)
    service.stop()
    spans = collector.spans(TRACE)
    assert {span.name for span in spans} == {"HTTP"}
    assert {span.attributes["http.request.method"] for span in spans} == {"_OTHER"}
    assert b"MY-OWN" not in b"".join(collector.bodies)


def test_spans_of_libraries_lose_all_that_might_be_personal(
    collector: OtlpReceiver, own_databases: Databases, redis_server: RedisServer
) -> None:
    personal = PERSON["phone"]
    provider = span_export.provider(collector.url, "here:8000", "0")
    engine = engine_for(own_databases.create())
    with Redis.from_url(redis_server.url) as client:
        span_export.instrument(client, engine, provider)
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


def test_no_secret_that_was_used_leaves_in_a_span(
    start_traced: StartService, collector: OtlpReceiver, simulator: Simulator, journal: Any
) -> None:
    # `journal` searches all that the collector has received.
    service = start_traced()
    token = service.log_in(simulator, openid="o-spans", unionid="u-spans")
    told = {"nickname": "阿上的小名", "remark": "leave it with the neighbour", "item": "a very special tea"}
    log_in(service, simulator)
    simulator.fault("close", times=2)
    log_in(service, simulator, f"00-{PERSON['phone']}-{CALLER}-01")
    code = simulator.code()
    for _ in range(2):  # the second time it is used already
        requests.post(service.url + LOGIN, json={"code": code}, timeout=5)
    me = "/users/me"
    phone = simulator.phone_code(openid="o-spans", phone=PERSON["phone"])
    assert service.call("PUT", f"{me}/phone", token, json={"code": phone}).status_code == 200
    simulator.drop_access_token()
    profile = {"openId": "o-spans", "nickName": told["nickname"], "avatarUrl": "https://thirdwx.qlogo.cn/0/132"}
    sealed = simulator.user_data("o-spans", profile)
    assert service.call("PUT", f"{me}/profile", token, json=sealed).status_code == 200
    assert service.call("GET", "/auth/wechat", token).json()["data"] == {"valid": True}
    etag = service.call("GET", f"{me}/personal-data", token).headers["ETag"]
    known = {name: value for name, value in PERSON.items() if name != "phone"}
    bound = {**bearer(token), "If-Match": etag}
    url = f"{service.url}/api/v1{me}/personal-data"
    stored = requests.put(url, json=known, headers=bound, timeout=5)
    assert stored.status_code == 200
    assert service.call("GET", f"{me}/personal-data/full", token).json()["data"] == PERSON
    order = {
        "remark": told["remark"],
        "items": [{"sku": "a", "name": told["item"], "quantity": 1, "unit_price": 1}],
    }
    assert service.call("POST", "/orders", token, json=order).status_code == 201
    headers = {"tracestate": f"phone={PERSON['phone']}", "traceparent": TRACEPARENT, "Cookie": PERSON["bank_card"]}
    requests.get(f"{service.url}/{PERSON['phone']}?access_token={token}", headers=headers, timeout=5)
    message = {"MsgType": "text", "Content": PERSON["phone"], "FromUserName": "o-spans"}
    simulator.push(message, url=f"{service.url}/api/v1/wechat/messages")
    browser = Browser()
    simulator.web_user(openid="o-spans-web", unionid="u-spans")
    away = browser.get(f"{service.url}{LOGIN}/authorize?return_to=/api/v1/users/me&scope=snsapi_userinfo")
    assert browser.get(simulator.sign_in_on_the_web(away.headers["Location"])).status_code == 302
    assert browser.get(service.url + LOGIN).json()["data"] == {"valid": True}
    service.stop()
    # Whoever cannot connect says so with the whole URL, in which the secret is.
    lonely = start_traced(WECHAT_API_BASE_URL=f"http://127.0.0.1:{free_port('a port', '0')}")
    assert log_in(lonely, simulator).status_code == 503
    lonely.stop()
    assert {"redis", "sqlalchemy", "kuaishang"} == {span.library for span in collector.spans()}
    settings = {service.environ[name] for name in ("SECRET_KEY", "ENCRYPTION_KEYS", "DATABASE_URL")}
    used = {"o-spans", "u-spans", *told.values(), token, code, phone, *sealed.values(), *browser.cookies.values()}
    journal.secrets |= settings | used
