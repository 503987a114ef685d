"""The service as it runs in production: gunicorn with several workers, real Redis, HTTP to the simulator."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from redis import Redis

import settings
from dev.redis_server import RedisServer
from settings import Settings
from telemetry import logs
from telemetry.fields import FIELDS
from tests.databases import MariaDB
from tests.harness import METRICS_TOKEN, ROOT, WAIT_SECONDS, Service, Simulator, bearer, migrate, suspend, wait_until

StartService = Callable[..., Service]
Services = tuple[Service, Service]
LOGIN = "/api/v1/auth/wechat"


@pytest.mark.database
def test_many_new_users_who_log_in_at_the_same_moment_all_get_in(services: Services, simulator: Simulator) -> None:
    service = services[0]
    codes = [simulator.code(openid=f"o-new-{number}") for number in range(96)]
    with ThreadPoolExecutor(24) as pool:
        answers = pool.map(lambda code: requests.post(service.url + LOGIN, json={"code": code}, timeout=20), codes)
        assert [answer.status_code for answer in answers] == [200] * 96


def test_sessions_survive_a_restart_of_the_service_and_of_redis(
    start_service: StartService, simulator: Simulator, own_redis: RedisServer
) -> None:
    service = start_service(REDIS_URL=own_redis.url)
    token = service.log_in(simulator)
    own_redis.stop()
    own_redis.start()
    assert {service.read_me(token).status_code for _ in range(10)} == {200}
    service.stop()
    service.start()
    assert service.read_me(token).status_code == 200


def fastest(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and outcome of the fastest of some calls: a busy machine delays a call, and hastens none."""
    outcomes = []
    for _ in range(3):
        started = time.monotonic()
        outcome = call()
        outcomes.append((time.monotonic() - started, outcome))
    return min(outcomes, key=lambda outcome: outcome[0])


def test_without_redis_answers_are_503_within_a_second_and_it_recovers_by_itself(
    start_service: StartService, simulator: Simulator, own_redis: RedisServer
) -> None:
    service = start_service(REDIS_URL=own_redis.url, WEB_CONCURRENCY="1")
    token, code = service.log_in(simulator), simulator.code()

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

    own_redis.stop()
    assert_unavailable()
    own_redis.start()
    wait_until(lambda: service.read_me(token).status_code == 200)
    suspend(own_redis.process)
    assert_unavailable()
    with ThreadPoolExecutor(8) as pool:
        seconds, answers = fastest(lambda: list(pool.map(lambda _: service.read_me(token), range(8))))
    assert seconds < 2  # one after the other they would take more than 3
    assert {answer.status_code for answer in answers} == {503}
    own_redis.process.send_signal(signal.SIGCONT)
    wait_until(lambda: service.read_me(token).status_code == 200)
    assert '"stack"' not in service.log()


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


def test_redis_lost_in_the_middle_of_a_login_is_503_within_a_second_of_it(
    start_service: StartService, simulator: Simulator, own_redis: RedisServer
) -> None:
    service = start_service(REDIS_URL=own_redis.url)

    def lose_redis() -> requests.Response:
        simulator.forget()
        simulator.fault("slow", seconds=1)
        body = {"code": simulator.code()}
        with ThreadPoolExecutor(1) as pool:
            login = pool.submit(requests.post, service.url + LOGIN, json=body, timeout=WAIT_SECONDS)
            wait_until(simulator.calls)
            suspend(own_redis.process)
            answer = login.result()
        own_redis.process.send_signal(signal.SIGCONT)
        return answer

    seconds, answer = fastest(lose_redis)
    assert seconds < 2
    assert (answer.status_code, answer.json()["code"]) == (503, 503)
    assert "token" not in answer.text
    assert '"stack"' not in service.log()


def test_stdout_holds_json_lines_of_one_shape_gunicorn_s_too_and_nothing_else(start_service: StartService) -> None:
    service = start_service(LOG_LEVEL="INFO")
    trace_id = requests.get(f"{service.url}/version", timeout=WAIT_SECONDS).headers["X-Trace-Id"]
    wait_until(lambda: trace_id in service.log())  # it may be in the queue of the one that is killed
    with socket.create_connection(("127.0.0.1", int(service.environ["PORT"])), timeout=WAIT_SECONDS) as connection:
        connection.sendall(b"GET /?token=hunter2&phone=13812345678 HTTP/9.9\r\n\r\n")
        connection.recv(1000)
    wait_until(lambda: "Invalid request" in service.log())
    service.workers()[0].kill()
    wait_until(lambda: "SIGKILL" in service.log())
    service.stop()
    lines = service.log_lines()
    (line,) = [line for line in lines if line["traceId"] == trace_id]
    assert (line["method"], line["route"], line["status"]) == ("GET", "/version", 200)
    assert all(list(line)[:5] == ["timestamp", "level", "service", "traceId", "message"] for line in lines)
    assert all(set(line) <= set(FIELDS) for line in lines)
    assert {line["instance"] for line in lines} == {f"{socket.gethostname()}:{service.environ['PORT']}"}
    assert {line["version"] for line in lines} == {settings.VERSION}
    of_gunicorn = [line["message"] for line in lines if line["logger"] == "gunicorn.error"]
    assert "Shutting down: Master" in of_gunicorn
    assert any(message.startswith("Booting worker") for message in of_gunicorn)
    assert any(message.startswith("Invalid request") for message in of_gunicorn)
    assert "hunter2" not in service.log()
    assert "13812345678" not in service.log()
    assert service.output.with_suffix(".errors").read_text() == ""


QUERY = "token=hunter2&phone=13812345678"
START = f"GET /?{QUERY} HTTP/1.1\r\nHost: x\r\n"
MALFORMED = [
    (400, f"GET /?{QUERY}\r\n"),
    (400, f"G(T /?{QUERY} HTTP/1.1\r\n"),
    (400, f"GET /?{QUERY} HTTP/9.9\r\n"),
    (400, f"{START}Re ferer: /?{QUERY}\r\n"),
    (414, f"GET /?{QUERY}&{'x' * 5000} HTTP/1.1\r\n"),
    (431, START + "".join(f"X-{number}: {QUERY}\r\n" for number in range(101))),
    (501, f"{START}Transfer-Encoding: /?{QUERY}\r\n"),
    (417, f"{START}Expect: /?{QUERY}\r\n"),
]


def test_gunicorn_answers_malformed_requests_itself_and_logs_no_secret(start_service: StartService) -> None:
    service = start_service(LOG_LEVEL="INFO", WEB_CONCURRENCY="1")
    for status, head in MALFORMED:
        with socket.create_connection(("127.0.0.1", int(service.environ["PORT"])), timeout=WAIT_SECONDS) as connection:
            connection.sendall(f"{head}\r\n".encode())
            assert connection.makefile("rb").readline().startswith(f"HTTP/1.1 {status} ".encode()), head
    service.stop()
    lines = [line for line in service.log_lines() if line["message"].startswith("Invalid request")]
    assert {(line["level"], line["logger"]) for line in lines} == {("WARNING", "gunicorn.error")}
    assert len(lines) == len(MALFORMED)
    assert "hunter2" not in service.log()
    assert "13812345678" not in service.log()


def test_a_response_body_that_fails_is_logged_with_its_stack(start_service: StartService) -> None:
    service = start_service("tests.apps.faulty_route", WEB_CONCURRENCY="1")
    assert requests.get(f"{service.url}/faulty/body?{QUERY}", timeout=WAIT_SECONDS).status_code == 500
    assert requests.get(f"{service.url}/livez", timeout=WAIT_SECONDS).status_code == 200
    service.stop()
    (line,) = [line for line in service.log_lines() if "stack" in line]
    assert (line["logger"], line["exceptionType"]) == ("gunicorn.error", "ZeroDivisionError")
    assert "hunter2" not in service.log()


def test_what_python_would_print_on_stderr_is_a_line_of_its_own(start_service: StartService) -> None:
    service = start_service("tests.apps.faulty_route")
    for way, message, level in (
        ("thread", "uncaught in a thread", "CRITICAL"),
        ("finalizer", "ignored", "ERROR"),
        ("warning", "UserWarning", "WARNING"),
    ):
        assert requests.get(f"{service.url}/faulty/{way}", timeout=WAIT_SECONDS).status_code == 200
        wait_until(lambda message=message: message in service.log())
        (line,) = [line for line in service.log_lines() if message in line["message"]]
        assert line["level"] == level
        assert way == "warning" or "ZeroDivisionError" in line["stack"]
    service.stop()
    assert service.output.with_suffix(".errors").read_text() == ""


def test_only_lines_of_the_wanted_level_are_written(start_service: StartService) -> None:
    quiet = start_service(LOG_LEVEL="ERROR")
    requests.get(f"{quiet.url}/version", timeout=WAIT_SECONDS)
    quiet.stop()
    assert quiet.log_lines() == []


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


def test_a_killed_worker_costs_no_session_and_the_next_request_is_served(
    start_service: StartService, simulator: Simulator
) -> None:
    service = start_service()
    token = service.log_in(simulator)
    stop = threading.Event()
    served: list[int] = []

    def load() -> None:
        while not stop.is_set():
            try:
                served.append(service.read_me(token).status_code)
            except requests.ConnectionError:
                served.append(0)  # this one was in the hands of the worker that was killed

    with ThreadPoolExecutor(8) as pool:
        for _ in range(8):
            pool.submit(load)
        for _ in range(3):
            wait_until(lambda: len(service.workers()) == 2)
            served_by_now = len(served)
            while len(served) < served_by_now + 50:
                time.sleep(0.01)
            service.workers()[0].kill()
            assert service.read_me(token).status_code == 200
        wait_until(lambda: len(service.workers()) == 2)
        stop.set()
    assert set(served) <= {200, 0}
    assert served.count(0) <= 3 * 8
    assert service.read_me(token).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_an_oversized_body_is_refused_in_the_envelope(services: Services, chunked: bool) -> None:
    service = services[0]
    body = b" " * 8_000_000
    data = iter([body]) if chunked else body
    headers = {"Content-Type": "application/json"}
    answer = requests.post(service.url + LOGIN, data=data, headers=headers, timeout=WAIT_SECONDS)
    assert (answer.status_code, answer.json()["code"]) == (413, 413)
    assert requests.get(f"{service.url}/livez", timeout=WAIT_SECONDS).status_code == 200


def test_a_body_that_is_not_as_its_headers_say_is_400(services: Services) -> None:
    with socket.create_connection(("127.0.0.1", int(services[0].environ["PORT"])), timeout=WAIT_SECONDS) as connection:
        head = "POST /api/auth/wechat HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(f"{head}ZZZ\r\nx".encode())
        answer = connection.makefile("rb").read().decode()
    assert answer.startswith("HTTP/1.1 400 ")
    assert '"code":400' in answer
    assert "X-Trace-Id" in answer


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


def test_without_its_settings_it_refuses_to_start_with_one_message(tmp_path: Path) -> None:
    started = subprocess.run(
        [sys.executable, "-m", "gunicorn", "wsgi:app"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PORT": "0"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    said = started.stdout + started.stderr
    assert started.returncode != 0
    assert "Traceback" not in said
    for name, field in Settings().fields.items():
        assert said.count(f"{name}: missing ({field.metadata['help']})") == int(field.required)


def test_any_other_server_is_told_the_same(tmp_path: Path) -> None:
    started = subprocess.run(
        [sys.executable, "-c", "import wsgi"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert started.returncode == 1
    assert "REDIS_URL: missing" in started.stderr
    assert "Traceback" not in started.stderr


def test_no_stand_in_starts_in_production(services: Services) -> None:
    family = psutil.Process(services[0].process.popen.pid).children(recursive=True)
    assert all("gunicorn" in " ".join(process.cmdline()) for process in family)


def test_a_stop_finishes_requests_and_messages_that_have_begun(
    start_service: StartService, simulator: Simulator, redis: Redis
) -> None:
    service = start_service("tests.apps.slow_handler", WEB_CONCURRENCY="1")
    message = {"MsgType": "text", "Content": "3"}
    for _ in range(12):  # more than are handled at once
        (answer,) = simulator.push(message, url=f"{service.url}/api/v1/wechat/messages")
        assert (answer["status"], answer["body"]) == (200, "success")
        handled = redis.llen("handled")
    assert handled < 12  # WeChat does not wait for the handlers
    simulator.forget()
    simulator.fault("slow", seconds=1.5)
    with ThreadPoolExecutor(1) as pool:
        body = {"code": simulator.code()}
        login = pool.submit(requests.post, service.url + LOGIN, json=body, timeout=WAIT_SECONDS)
        wait_until(simulator.calls)
        service.stop()
        assert login.result().status_code == 200
    assert redis.llen("handled") == 12
    assert service.process.popen.returncode == 0
