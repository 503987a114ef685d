"""How long requests and clients may take: the service as in production, with requests that wait for ever."""

import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress

import psutil
import pytest
import requests
from sqlalchemy import make_url

from concurrency import seconds_left
from dev.redis_server import RedisServer
from tests.harness import METRICS_TOKEN, WAIT_SECONDS, Service, Simulator, again_if_late, bearer, suspend, wait_until
from tests.test_connections import Client

StartService = Callable[..., Service]


@pytest.fixture(scope="module")
def service(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One worker with short times."""
    output = tmp_path_factory.mktemp("waiting") / "output"
    seconds = {"REQUEST_SECONDS": "2", "HEAD_SECONDS": "1", "BODY_SECONDS": "1"}
    service = Service({**environ, **seconds, "WEB_CONCURRENCY": "1"}, output, "tests.apps.waiting")
    yield service
    service.discard()


def get(service: Service, path: str, **headers: str) -> requests.Response:
    return requests.get(f"{service.url}{path}", headers=headers, timeout=WAIT_SECONDS)


def connect(service: Service, request: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", int(service.environ["PORT"])), WAIT_SECONDS)
    client.sendall(request)
    return client


def test_a_request_ends_in_the_envelope_when_its_time_is_over(service: Service) -> None:
    service.clear_log()
    response = get(service, "/sleep/600.0")
    assert response.status_code == 503
    assert response.json() == {"code": 503, "message": "服务暂时不可用，请稍后再试", "data": None}
    assert response.headers["Retry-After"]
    assert "sleep: TimeOver" in get(service, "/given-up").json()
    wait_until(lambda: any(line.get("route") == "/given-up" for line in service.log_lines()))
    (line,) = [line for line in service.log_lines() if line.get("route") == "/sleep/<float:seconds>"]
    assert (line["status"], line["traceId"]) == (503, response.headers["X-Trace-Id"])


def test_a_caller_may_ask_for_less_and_never_for_more(service: Service) -> None:
    assert again_if_late(lambda: get(service, "/sleep/1.0"), 200).status_code == 200
    assert get(service, "/sleep/1.0", **{"X-Request-Timeout": "0.1"}).status_code == 503
    assert get(service, "/sleep/600.0", **{"X-Request-Timeout": "500"}).status_code == 503
    assert again_if_late(lambda: get(service, "/sleep/0.1", **{"X-Request-Timeout": "1.5"}), 200).status_code == 200


def test_the_time_of_a_request_begins_with_its_first_byte_or_when_the_one_before_it_has_ended(service: Service) -> None:
    def request(path: str, seconds: float) -> bytes:
        return f"GET {path} HTTP/1.1\r\nHost: x\r\nX-Request-Timeout: {seconds}\r\n\r\n".encode()

    client = Client(service)
    with closing(client.socket):
        client.socket.sendall(request("/sleep/0.45", 0.6)[:-2])
        time.sleep(0.3)
        client.socket.sendall(b"\r\n")
        assert client.response()[0] == 503
        time.sleep(1)
        client.socket.sendall(request("/sleep/0.1", 0.9))
        assert client.response()[0] == 200
        client.socket.sendall(request("/sleep/0.9", 2) + request("/sleep/0.1", 0.9))
        assert [client.response()[0] for _ in range(2)] == [200, 200]


def missed(service: Service) -> float:
    text = get(service, "/metrics", **bearer(METRICS_TOKEN)).text
    (line,) = [line for line in text.splitlines() if line.startswith("kuaishang_http_deadlines_missed_total ")]
    return float(line.split()[1])


def log_in(service: Service, simulator: Simulator, **headers: str) -> int:
    login = {"code": simulator.code()}
    url = f"{service.url}/api/v1/auth/wechat"
    return requests.post(url, json=login, headers=headers, timeout=WAIT_SECONDS).status_code


@pytest.mark.parametrize("seconds", ["0.3", "2.3"])  # for WeChat no fair time, and one that is
def test_a_deadline_that_is_missed_while_wechat_is_waited_for_is_counted_once(
    start_service: StartService, simulator: Simulator, seconds: str
) -> None:
    service = start_service(WEB_CONCURRENCY="1")
    simulator.fault("slow", times=5, seconds=60)
    # On a busy machine the deadline may be over before WeChat is asked, which is a 503.
    tries = next(n for n in range(1, 6) if log_in(service, simulator, **{"X-Request-Timeout": seconds}) == 504)
    assert missed(service) == tries


def test_each_deadline_that_is_missed_is_counted_once_and_no_other_failure(
    service: Service, simulator: Simulator
) -> None:
    before = missed(service)
    assert get(service, "/sleep/600.0", **{"X-Request-Timeout": "0.2"}).status_code == 503
    assert get(service, "/sleep-on/5.0", **{"X-Request-Timeout": "0.2"}).status_code == 503
    assert missed(service) == before + 2
    rest = b" HTTP/1.1\r\nHost: x\r\nX-Request-Timeout: 0.2\r\n"
    login = f'{{"code": "{simulator.code()}"}}'.encode()
    length = b"Content-Length: %d\r\n\r\n" % len(login)
    for request in (b"GET /sleep/0.1" + rest + b"\r\n", b"POST /api/v1/auth/wechat" + rest + length + login):
        with closing(connect(service, request[:40])) as client:
            time.sleep(0.4)
            client.sendall(request[40:])
            assert client.recv(65536).startswith(b"HTTP/1.1 503")
    assert missed(service) == before + 4
    assert get(service, "/sleep/0.1", **{"X-Request-Timeout": "1.5"}).status_code == 200
    simulator.fault("http_500")
    assert log_in(service, simulator) == 502
    assert missed(service) == before + 4


@pytest.mark.parametrize("value", ["", "soon", "-1", "1e9", "nan", "1,2", "9" * 5000])
def test_a_malformed_timeout_is_refused_with_the_reason(service: Service, value: str) -> None:
    response = get(service, "/livez", **{"X-Request-Timeout": value})
    assert response.status_code == (200 if value == "" else 400)
    assert value == "" or list(response.json()["data"]["errors"]) == ["X-Request-Timeout"]


def test_the_caller_does_not_wait_for_what_is_cleaned_up(service: Service) -> None:
    began = time.monotonic()
    assert get(service, "/sleep-on/5.0", **{"X-Request-Timeout": "0.5"}).status_code == 503
    assert time.monotonic() - began < 4  # and not 5.5


def test_a_redis_and_a_database_that_hang_are_given_up_with_the_request(
    start_service: StartService, own_redis: RedisServer, simulator: Simulator
) -> None:
    service = start_service(REDIS_URL=own_redis.url + "?socket_timeout=30")
    token = service.log_in(simulator)
    suspend(own_redis.process)
    headers = bearer(token) | {"X-Request-Timeout": "0.5"}
    response = get(service, "/api/v1/users/me", **headers)
    assert (response.status_code, response.json()["code"]) == (503, 503)
    own_redis.process.send_signal(18)
    assert service.read_me(token).status_code == 200


def test_a_writer_that_waits_for_sqlite_holds_nobody_else_up(
    service: Service, simulator: Simulator, environ: dict[str, str]
) -> None:
    url = make_url(environ["DATABASE_URL"])
    if url.get_backend_name() != "sqlite":
        pytest.skip("about SQLite")
    token = service.log_in(simulator)
    order = {"items": [{"sku": "a", "name": "a", "quantity": 1, "unit_price": 1}]}
    with ThreadPoolExecutor() as pool, closing(sqlite3.connect(str(url.database), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        late = pool.submit(service.call, "POST", "/orders", token, json=order)
        for _ in range(5):
            assert service.read_me(token).status_code == 200
        assert not late.done()
        assert late.result().status_code == 503
        written = pool.submit(service.call, "POST", "/orders", token, json=order)
        time.sleep(0.2)
        other.execute("COMMIT")
        assert written.result().status_code == 201


def test_half_sent_heads_and_bodies_end_after_their_time_and_leave_others_alone(service: Service) -> None:
    head = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
    body = b"POST /api/v1/auth/wechat HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf"
    chunked = b"POST /api/v1/auth/wechat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe"
    with ExitStack() as stack:
        clients = [connect(service, sent) for sent in (head, body, chunked) for _ in range(30)]
        for client in clients:
            stack.callback(client.close)
        for _ in range(10):
            assert get(service, "/livez").status_code == 200
        responses = [client.recv(65536) for client in clients]  # b"" at the end of the connection
    assert set(responses[:30]) == {b""}
    assert {response.split(b"\r\n")[0] for response in responses[30:]} == {b"HTTP/1.1 400 BAD REQUEST"}


def test_a_client_that_is_slow_twice_gets_400_and_not_503(start_service: StartService) -> None:
    service = start_service(REQUEST_SECONDS="8", HEAD_SECONDS="8", BODY_SECONDS="8")
    head = b"POST /api/v1/auth/wechat HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n"
    with closing(connect(service, head)) as client:
        time.sleep(4)
        client.sendall(b"\r\nhalf")
        assert client.recv(65536).startswith(b"HTTP/1.1 400")


def test_a_connection_that_sends_nothing_is_not_kept_for_as_long_as_one_that_has(service: Service) -> None:
    with closing(connect(service, b"")) as client:
        assert client.recv(65536) == b""


def test_nothing_is_begun_for_a_client_that_has_hung_up(start_service: StartService, simulator: Simulator) -> None:
    service = start_service(WEB_CONCURRENCY="1")
    token = service.log_in(simulator)
    body = b'{"items": [{"sku": "tea", "name": "tea", "quantity": 1, "unit_price": 1}]}'
    head = f"POST /api/v1/orders HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    (worker,) = service.workers()
    worker.suspend()
    wait_until(lambda: worker.status() == psutil.STATUS_STOPPED)
    for _ in range(20):
        connect(service, request).close()
    with closing(connect(service, request)) as waiting:
        worker.resume()
        assert waiting.recv(65536).startswith(b"HTTP/1.1 201")
    assert service.call("GET", "/orders", token).json()["data"]["total"] == 1


def test_a_head_that_trickles_ends_too(service: Service) -> None:
    with closing(connect(service, b"GET /livez HTTP/1.1\r\n")) as client:
        client.setblocking(False)
        for _ in range(100):
            with suppress(BlockingIOError):
                assert client.recv(100) == b""  # the end of the connection
                break
            client.send(b"X: y\r\n")
            time.sleep(0.1)
        else:
            pytest.fail("a head of 10 s")


def test_a_client_that_does_not_read_its_response_is_ended(service: Service) -> None:
    (worker,) = service.workers()
    with closing(connect(service, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")) as client:

        def is_open() -> bool:
            return client.getsockname() in [connection.raddr for connection in worker.net_connections()]

        assert client.recv(1)  # the response has begun
        wait_until(lambda: not is_open())  # ours is open still
    assert get(service, "/livez").status_code == 200


def test_a_worker_uses_all_the_descriptors_that_it_may_have(start_service: StartService) -> None:
    within = ("prlimit", "--nofile=64:4096")  # as a shell or a service manager may leave it
    service = start_service(WEB_CONCURRENCY="1", within=within)
    with ExitStack() as stack:
        for _ in range(200):
            client = connect(service, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            stack.callback(client.close)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.database
def test_without_a_descriptor_requests_are_503_and_it_recovers_by_itself(
    start_service: StartService, simulator: Simulator
) -> None:
    token = start_service().log_in(simulator)
    service = start_service(WEB_CONCURRENCY="1")  # which has opened nothing yet
    (worker,) = service.workers()
    limit = worker.rlimit(psutil.RLIMIT_NOFILE)
    requests_ = {
        "GET /api/v1/users/me": "",
        "GET /api/v1/orders": "",
        "POST /api/v1/orders": '{"items": [{"sku": "tea", "name": "tea", "quantity": 1, "unit_price": 1}]}',
        "POST /api/v1/auth/wechat": f'{{"code": "{simulator.code()}"}}',
        "GET /docs": "",
        "GET /docs/assets/swagger-ui.css": "",
        "GET /readyz": "",
    }
    head = "{} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Length: {}\r\n\r\n{}"
    sent = {name: head.format(name, token, len(body), body).encode() for name, body in requests_.items()}
    with ExitStack() as stack:
        clients = {name: stack.enter_context(closing(connect(service, b""))) for name in sent}
        for client in clients.values():
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        used = min(worker.num_fds() for _ in range(20))  # without what it opens for a moment to measure itself
        worker.rlimit(psutil.RLIMIT_NOFILE, (used, limit[1]))
        for name, client in clients.items():
            client.sendall(sent[name])
            response = client.recv(65536)
            assert response.startswith(b"HTTP/1.1 503 "), name
            assert b"\r\nRetry-After: " in response
            assert b'{"code":503,' in response
        worker.rlimit(psutil.RLIMIT_NOFILE, limit)
    for name, content in sent.items():
        with closing(connect(service, content)) as client:
            assert client.recv(65536)[9:12] in (b"200", b"201"), name


def test_an_idle_connection_is_kept(service: Service) -> None:
    with closing(connect(service, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")) as client:
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        time.sleep(2.5)  # longer than a head or a body may take
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_stop_waits_for_requests_and_not_for_idle_connections(start_service: StartService) -> None:
    service = start_service("tests.apps.waiting", DRAIN_SECONDS="0", WEB_CONCURRENCY="1")
    with ExitStack() as stack:
        for _ in range(20):
            client = connect(service, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            stack.callback(client.close)
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        pool = stack.enter_context(ThreadPoolExecutor())
        under_way = pool.submit(get, service, "/sleep/4.0")
        wait_until(lambda: "sleep" not in get(service, "/given-up").text)
        time.sleep(2)
        service.process.popen.terminate()
        assert under_way.result().status_code == 200
        service.process.popen.wait(12)  # graceful_timeout is 28


def test_outside_of_a_request_a_wait_may_take_what_it_takes() -> None:
    assert seconds_left(5) == 5


def test_a_probe_that_nobody_waits_for_calls_no_dependency_down(service: Service) -> None:
    for _ in range(20):
        get(service, "/readyz", **{"X-Request-Timeout": "0.0001"})
    time.sleep(1)
    metrics = get(service, "/metrics", Authorization=f"Bearer {METRICS_TOKEN}").text
    assert 'kuaishang_dependency_up{dependency="redis"} 1.0' in metrics
    wait_until(lambda: any(line.get("route") == "/readyz" for line in service.log_lines()))
    assert not [line for line in service.log_lines() if "cannot serve" in line["message"]]
