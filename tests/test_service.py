"""The service as it runs in production: gunicorn with several workers, real Redis, HTTP to the simulator."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from redis import Redis
from werkzeug.exceptions import default_exceptions

import settings
from dev.redis_server import RedisServer
from errors import code_and_message
from settings import Settings
from storage.message_queue import STREAM
from telemetry import logs
from telemetry.fields import FIELDS
from tests.databases import MariaDB
from tests.harness import (
    METRICS_TOKEN,
    ROOT,
    WAIT_SECONDS,
    Service,
    Simulator,
    bearer,
    bound_to_this_process,
    migrate,
    suspend,
    until_available,
    wait_until,
)
from tests.otlp_receiver import OtlpReceiver

StartService = Callable[..., Service]
Services = tuple[Service, Service]
Frail = tuple[Service, RedisServer]
LOGIN = "/api/v1/auth/wechat"


@pytest.mark.database
def test_many_new_users_who_log_in_at_the_same_moment_all_get_in(services: Services, simulator: Simulator) -> None:
    service = services[0]
    codes = [simulator.code(openid=f"o-new-{number}") for number in range(96)]
    with ThreadPoolExecutor(24) as pool:
        answers = pool.map(
            lambda code: requests.post(service.url + LOGIN, json={"code": code}, timeout=WAIT_SECONDS), codes
        )
        assert [answer.status_code for answer in answers] == [200] * 96


@pytest.fixture(scope="module")
def shared_frail(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Frail]:
    folder = tmp_path_factory.mktemp("frail")
    with closing(RedisServer(folder / "redis", bound_to_this_process())) as server:
        server.start()
        service = Service({**environ, "REDIS_URL": server.url, "WEB_CONCURRENCY": "1"}, folder / "output")
        yield service, server
        service.kill()


@pytest.fixture
def frail(shared_frail: Frail, journal: Any) -> Iterator[Frail]:
    """A service and a Redis of its own, which may be stopped and hang; no exception is logged because of it."""
    service, server = shared_frail
    journal.services.append(service)
    yield shared_frail
    server.process.send_signal(signal.SIGCONT)
    assert '"stack"' not in service.log()


def test_sessions_survive_a_restart_of_the_service_and_of_redis(frail: Frail, simulator: Simulator) -> None:
    service, server = frail
    token = service.log_in_when_available(simulator)
    server.stop()
    server.start()
    assert {until_available(lambda: service.read_me(token)).status_code for _ in range(10)} == {200}
    service.stop()
    service.start()
    assert until_available(lambda: service.read_me(token)).status_code == 200


def fastest(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and outcome of the fastest of some calls: a busy machine delays a call, and hastens none."""
    outcomes = []
    for _ in range(3):
        started = time.monotonic()
        outcome = call()
        outcomes.append((time.monotonic() - started, outcome))
    return min(outcomes, key=lambda outcome: outcome[0])


def test_without_redis_answers_are_503_within_a_second_and_it_recovers_by_itself(
    frail: Frail, simulator: Simulator
) -> None:
    service, server = frail
    token, code = service.log_in_when_available(simulator), simulator.code()

    def assert_unavailable() -> None:
        for call in (
            lambda: service.read_me(token),
            lambda: requests.post(service.url + LOGIN, json={"code": code}, timeout=WAIT_SECONDS),
            lambda: requests.get(f"{service.url}/readyz", timeout=WAIT_SECONDS),
        ):
            seconds, answer = fastest(call)
            assert seconds < 1
            assert (answer.status_code, answer.json()["code"]) == (503, 503)
            assert "Retry-After" in answer.headers
            assert len(answer.headers["X-Trace-Id"]) == 32
        answer = requests.get(f"{service.url}/livez", headers=bearer(token), timeout=WAIT_SECONDS)
        assert answer.status_code == 200

    server.stop()
    assert_unavailable()
    server.start()
    wait_until(lambda: service.read_me(token).status_code == 200)
    suspend(server.process)
    assert_unavailable()
    with ThreadPoolExecutor(8) as pool:
        seconds, answers = fastest(lambda: list(pool.map(lambda _: service.read_me(token), range(8))))
    assert seconds < 2  # one after the other they would take more than 3
    assert {answer.status_code for answer in answers} == {503}
    server.process.send_signal(signal.SIGCONT)
    wait_until(lambda: service.read_me(token).status_code == 200)


def test_redis_lost_in_the_middle_of_a_login_is_503_within_a_second_of_it(frail: Frail, simulator: Simulator) -> None:
    service, server = frail

    def lose_redis() -> requests.Response:
        simulator.forget()
        simulator.fault("slow", seconds=3)
        body = {"code": simulator.code()}
        with ThreadPoolExecutor(1) as pool:
            login = pool.submit(requests.post, service.url + LOGIN, json=body, timeout=WAIT_SECONDS)
            wait_until(simulator.calls)
            suspend(server.process)
            answer = login.result()
        server.process.send_signal(signal.SIGCONT)
        return answer

    seconds, answer = fastest(lose_redis)
    assert seconds < 4
    assert (answer.status_code, answer.json()["code"]) == (503, 503)
    assert "token" not in answer.text


@pytest.mark.only_on("mariadb")
def test_without_mariadb_answers_are_503_within_seconds_and_it_recovers_by_itself(
    start_service: StartService, simulator: Simulator, own_databases: MariaDB
) -> None:
    database_url = own_databases.create()
    migrate(database_url)
    service = start_service(DATABASE_URL=database_url)
    token = service.log_in(simulator)
    with ThreadPoolExecutor(16) as pool:  # a connection in each place of the pools
        assert set(pool.map(lambda _: service.read_me(token).status_code, range(64))) == {200}
        for _ in range(2):
            own_databases.kill()
            answers = list(pool.map(lambda _: service.read_me(token), range(32)))
            for call in (
                lambda: requests.post(service.url + LOGIN, json={"code": simulator.code()}, timeout=WAIT_SECONDS),
                lambda: requests.get(f"{service.url}/readyz", timeout=WAIT_SECONDS),
            ):
                seconds, answer = fastest(call)
                assert seconds < 2
                answers.append(answer)
            assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(503, 503)}
            assert all("Retry-After" in answer.headers for answer in answers)
            own_databases.start()
            answers = list(pool.map(lambda _: service.read_me(token), range(32)))
            assert {answer.status_code for answer in answers} == {200}  # from the first one on
        own_databases.kill()
        own_databases.start()  # before anybody has noticed
        assert set(pool.map(lambda _: service.read_me(token).status_code, range(32))) == {200}
    assert service.log_in(simulator)
    assert '"stack"' not in service.log()


QUERY = "token=hunter2&phone=13812345678"
START = f"GET /?{QUERY} HTTP/1.1\r\nHost: x\r\n"
MALFORMED = [
    (400, f"GET /?{QUERY}\r\n"),
    (400, f"G(T /?{QUERY} HTTP/1.1\r\n"),
    (400, f"GET /?{QUERY} HTTP/9.9\r\n"),
    (400, f"{START}Re ferer: /?{QUERY}\r\n"),
    (414, f"GET /?{QUERY}&{'x' * 5000} HTTP/1.1\r\n"),
    (431, START + "".join(f"X-{number}: {QUERY}\r\n" for number in range(101))),
    (400, f"{START}Transfer-Encoding: /?{QUERY}\r\n"),
    (417, f"{START}Expect: /?{QUERY}\r\n"),
]
FAULTS = {
    "thread": ("uncaught in a thread", "CRITICAL"),
    "finalizer": ("ignored", "ERROR"),
    "warning": ("UserWarning", "WARNING"),
}


@pytest.fixture(scope="module")
def ended(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that was asked for `FAULTS`, got `MALFORMED`, lost its worker and was stopped: read its lines."""
    env = {**environ, "LOG_LEVEL": "INFO", "WEB_CONCURRENCY": "1"}
    service = Service(env, tmp_path_factory.mktemp("ended") / "output", "tests.apps.faulty_route")
    try:
        assert requests.get(f"{service.url}/version", timeout=WAIT_SECONDS).status_code == 200
        for path, (message, _) in FAULTS.items():
            assert requests.get(f"{service.url}/faulty/{path}", timeout=WAIT_SECONDS).status_code == 200
            wait_until(lambda message=message: message in service.log())
        assert requests.get(f"{service.url}/faulty/body?{QUERY}", timeout=WAIT_SECONDS).status_code == 500
        for status, head in MALFORMED:
            address = ("127.0.0.1", int(service.environ["PORT"]))
            with socket.create_connection(address, timeout=WAIT_SECONDS) as connection:
                connection.sendall(f"{head}\r\n".encode())
                answer, body = connection.makefile("rb").read().decode().split("\r\n\r\n")
            assert answer.startswith(f"HTTP/1.1 {status} "), head
            assert "\r\nContent-Type: application/json\r\n" in answer
            envelope = json.loads(body)
            _, message = code_and_message(default_exceptions[status]())
            assert envelope == {"code": 400, "message": str(message), "data": None}
            (trace_id,) = re.findall("X-Trace-Id: ([0-9a-f]{32})", answer)
            wait_until(lambda trace_id=trace_id: trace_id in service.log())
        # What is in the queue of a killed worker is lost.
        wait_until(lambda: service.log().count("Invalid request") == len(MALFORMED))
        service.workers()[0].kill()
        wait_until(lambda: "SIGKILL" in service.log())
        service.stop()
        yield service
    finally:
        service.kill()


def test_stdout_holds_json_lines_of_one_shape_gunicorn_s_too_and_nothing_else(ended: Service) -> None:
    lines = ended.log_lines()
    (line,) = [line for line in lines if line.get("route") == "/version"]
    assert (line["message"], line["method"], line["status"]) == ("request", "GET", 200)
    assert all(list(line)[:5] == ["timestamp", "level", "service", "traceId", "message"] for line in lines)
    assert all(set(line) <= set(FIELDS) for line in lines)
    assert {line["instance"] for line in lines} == {f"{socket.gethostname()}:{ended.environ['PORT']}"}
    (version,) = {line["version"] for line in lines}
    assert re.fullmatch(rf"{settings.VERSION}\+[0-9a-f]{{12}}", version)
    of_gunicorn = [line["message"] for line in lines if line["logger"] == "gunicorn.error"]
    assert "Shutting down: Master" in of_gunicorn
    assert any(message.startswith("Booting worker") for message in of_gunicorn)
    assert "hunter2" not in ended.log()
    assert "13812345678" not in ended.log()
    assert ended.output.with_suffix(".errors").read_text() == ""


def test_malformed_requests_and_failing_bodies_are_lines_of_gunicorn(ended: Service) -> None:
    invalid = [line for line in ended.log_lines() if line["message"].startswith("Invalid request")]
    assert {(line["level"], line["logger"]) for line in invalid} == {("WARNING", "gunicorn.error")}
    (failed,) = [line for line in ended.log_lines() if "stack" in line and line["logger"] == "gunicorn.error"]
    assert failed["exceptionType"] == "ZeroDivisionError"


def test_what_python_would_print_on_stderr_is_a_line_of_its_own(ended: Service) -> None:
    for message, level in FAULTS.values():
        (line,) = [line for line in ended.log_lines() if message in line["message"]]
        assert line["level"] == level
        assert level == "WARNING" or "ZeroDivisionError" in line["stack"]


def test_without_a_reader_of_its_lines_it_goes_on_serving_and_stops(environ: dict[str, str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "output")
    reader = os.open(tmp_path / "output", os.O_RDONLY | os.O_NONBLOCK)
    service = Service({**environ, "WEB_CONCURRENCY": "1"}, tmp_path / "output", "tests.apps.faulty_route")
    try:
        with requests.Session() as session:
            for _ in range(2):  # the pipe takes some hundred lines
                url = f"{service.url}/faulty/chatty/{logs.CAPACITY}"
                assert session.get(url, timeout=WAIT_SECONDS).status_code == 200
            metrics = session.get(f"{service.url}/metrics", headers=bearer(METRICS_TOKEN), timeout=WAIT_SECONDS).text
        assert re.search(r"^kuaishang_log_lines_dropped_total [1-9]", metrics, re.MULTILINE)
    finally:
        service.stop()
        os.close(reader)
    assert service.process.popen.returncode == 0


def test_a_body_that_is_too_large_or_malformed_is_refused_in_the_envelope(services: Services) -> None:
    service = services[0]
    body = b" " * 8_000_000
    headers = {"Content-Type": "application/json"}
    for data in (body, iter([body])):  # with a length, and in chunks
        answer = requests.post(service.url + LOGIN, data=data, headers=headers, timeout=WAIT_SECONDS)
        assert (answer.status_code, answer.json()["code"]) == (413, 413)
    with socket.create_connection(("127.0.0.1", int(service.environ["PORT"])), timeout=WAIT_SECONDS) as connection:
        head = "POST /api/auth/wechat HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(f"{head}ZZZ\r\nx".encode())
        refused = connection.makefile("rb").read().decode()
    assert refused.startswith("HTTP/1.1 400 ")
    assert '"code":400' in refused
    assert "X-Trace-Id" in refused
    assert requests.get(f"{service.url}/livez", timeout=WAIT_SECONDS).status_code == 200


@pytest.mark.database
def test_a_client_that_sends_its_body_slowly_delays_no_other_order(services: Services, simulator: Simulator) -> None:
    service = services[0]
    token = service.log_in(simulator)
    order = {"items": [{"sku": "tea", "name": "茶", "quantity": 1, "unit_price": 1}]}
    head = f"POST /api/v1/orders HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: 500\r\n"
    for key in ("", "Idempotency-Key: slow\r\n"):
        with socket.create_connection(("127.0.0.1", int(service.environ["PORT"])), timeout=WAIT_SECONDS) as slow:
            slow.sendall(f"{head}{key}\r\n{{".encode())
            time.sleep(0.5)
            assert service.call("POST", "/orders", token, json=order).status_code == 201


def test_without_its_settings_no_server_starts_and_all_are_named() -> None:
    for command in (["-m", "gunicorn", "wsgi:app"], ["-c", "import wsgi"]):
        started = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "ENV_FILE": os.devnull, "PORT": "0"},
            capture_output=True,
            text=True,
            timeout=WAIT_SECONDS,
        )
        printed = started.stdout + started.stderr
        assert started.returncode != 0
        assert "Traceback" not in printed
        for name, field in Settings().fields.items():
            assert printed.count(f"{name}: missing ({field.metadata['help']})") == int(field.required)


def test_no_stand_in_starts_in_production(services: Services) -> None:
    family = psutil.Process(services[0].process.popen.pid).children(recursive=True)
    assert all("gunicorn" in " ".join(process.cmdline()) for process in family)


def test_a_stop_finishes_requests_and_messages_and_sends_their_spans(
    start_service: StartService, simulator: Simulator, own_redis: RedisServer, collector: OtlpReceiver
) -> None:
    service = start_service(
        "tests.apps.slow_handler",
        REDIS_URL=f"{own_redis.url}?socket_timeout=10&socket_connect_timeout=10",
        WEB_CONCURRENCY="1",
        LOG_LEVEL="ERROR",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="60000",
    )
    message = {"MsgType": "text", "Content": "2"}
    for _ in range(12):  # more than are handled at once
        (answer,) = simulator.push(message, url=f"{service.url}/api/v1/wechat/messages")
        assert (answer["status"], answer["body"]) == (200, "success")
    simulator.forget()
    simulator.fault("slow", seconds=1)
    with ThreadPoolExecutor(1) as pool:
        body = {"code": simulator.code()}
        login = pool.submit(requests.post, service.url + LOGIN, json=body, timeout=WAIT_SECONDS)
        wait_until(simulator.calls)
        assert collector.bodies == []
        service.stop()
        assert login.result().status_code == 200
    with closing(Redis.from_url(own_redis.url)) as redis:
        handled, left = redis.llen("handled"), redis.xlen(STREAM)
    assert handled + left == 12  # what was begun is handled, and the next start handles what is left
    assert handled >= 1
    assert service.process.popen.returncode == 0
    names = Counter(span.name for span in collector.spans())
    assert (names[f"POST {LOGIN}"], names["RPUSH"]) == (1, handled)
    assert names["handler tests.apps.slow_handler.take_a_while"] == handled
    assert service.log_lines() == []  # as LOG_LEVEL says
