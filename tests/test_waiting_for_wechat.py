"""A WeChat that is slow, broken or gone, and callers who do not wait for it: the service as in production."""

import json
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests

from dev.redis_server import RedisServer
from tests.harness import WAIT_SECONDS, Service, Simulator, again_if_late, bearer, wait_until
from tests.proxy import Proxy
from wechat.transport import FAILURES

StartService = Callable[..., Service]
LOGIN = "/api/v1/auth/wechat"
SESSION = b'{"openid": "o-alice", "session_key": "MDEyMzQ1Njc4OWFiY2RlZg=="}'
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(SESSION), SESSION)
FAULTS = {
    "silence": b"",
    "headers byte by byte": None,
    "half an answer": WHOLE[:-20],
    "a head alone": WHOLE[:30],
}


@contextmanager
def faulty_wechat(first: bytes | None) -> Iterator[tuple[str, list[int]]]:
    """A WeChat whose first connection is faulty and stays open, and whose others respond properly.

    :param first: what it sends on the first one; None for headers without end.
    :returns: its URL, and the requests of each connection.
    """
    connections: list[int] = []
    over = threading.Event()

    def serve(connection: socket.socket, number: int) -> None:
        with connection:
            while connection.recv(65536):
                connections[number] += 1
                if number:
                    connection.sendall(WHOLE)
                    continue
                connection.sendall(first if first is not None else b"HTTP/1.1 200 OK\r\nX-Slow: ")
                try:
                    while not over.wait(0.05):
                        connection.sendall(b"" if first is not None else b"x")
                except OSError:
                    return

    def accept() -> None:
        while not over.is_set():
            connection, _ = listener.accept()
            connections.append(0)
            threading.Thread(target=serve, args=(connection, len(connections) - 1), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield f"http://127.0.0.1:{port}", connections
        finally:
            over.set()
            socket.create_connection(("127.0.0.1", port)).close()
            accepting.join()


def log_in(service: Service, code: str, **headers: str) -> requests.Response:
    return requests.post(f"{service.url}{LOGIN}", json={"code": code}, headers=headers, timeout=WAIT_SECONDS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_response_that_does_not_come_is_504_before_the_deadline_and_its_connection_is_not_used_again(
    start_service: StartService, fault: str
) -> None:
    for tries_left in (2, 1, 0):  # the response has 50 ms, which may be too little for a machine that has much to do
        with faulty_wechat(FAULTS[fault]) as (url, connections):
            service = start_service(WECHAT_API_BASE_URL=url, WEB_CONCURRENCY="1")
            answer = log_in(service, "one", **{"X-Request-Timeout": "1"})
            if tries_left and answer.status_code == 503:
                continue
            assert (answer.status_code, answer.json()["code"]) == (504, 504)  # and not 503, of the deadline itself
            answers = [log_in(service, f"another-{number}") for number in range(3)]
            assert [answer.status_code for answer in answers] == [200] * 3
            service.tokens += [answer.json()["data"]["token"] for answer in answers]
            assert connections == [1, 3]
            return


def test_each_fault_has_its_code_and_ends_without_a_restart(start_service: StartService, simulator: Simulator) -> None:
    service = start_service(WEB_CONCURRENCY="1")
    for kind, status in {"slow": 504, "trickle": 504, "http_500": 502, "not_json": 502, "close": 503}.items():
        simulator.fault(kind, times=10, seconds=30)
        answer = again_if_late(lambda: log_in(service, simulator.code(), **{"X-Request-Timeout": "3"}), status)
        assert answer.status_code == status, kind
        simulator.forget()
        service.log_in(simulator)


def test_a_login_that_arrives_just_before_a_stop_is_served(start_service: StartService, simulator: Simulator) -> None:
    service = start_service("tests.apps.faulty_route", WEB_CONCURRENCY="1", DRAIN_SECONDS="0")
    address = "127.0.0.1", int(service.environ["PORT"])
    with ExitStack() as stack:
        busy, *clients = [stack.enter_context(socket.create_connection(address, WAIT_SECONDS)) for _ in range(9)]
        for client in clients:
            client.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
        busy.sendall(b"GET /faulty/compute/2.0 HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.5)  # it computes, so what comes now has to wait
        for client in clients:
            body = json.dumps({"code": simulator.code()})
            head = f"POST {LOGIN} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall((head + body).encode())
        service.process.popen.terminate()
        answers = [client.recv(65536) for client in clients]
    assert [answer[9:12] for answer in answers] == [b"200"] * len(clients)
    service.tokens += re.findall(r'"token":"([^"]+)"', b"".join(answers).decode())


def test_a_wechat_that_comes_back_is_called_again(start_service: StartService, simulator: Simulator) -> None:
    service = start_service(WEB_CONCURRENCY="1")
    simulator.fault("http_500", times=1000)
    assert [log_in(service, simulator.code()).status_code for _ in range(FAILURES)] == [502] * FAILURES
    simulator.forget()
    answer = log_in(service, simulator.code())
    assert (answer.status_code, "Retry-After" in answer.headers, simulator.calls()) == (503, True, [])
    assert requests.get(f"{service.url}/readyz", timeout=WAIT_SECONDS).json()["data"]["wechat"] == "down"
    wait_until(lambda: log_in(service, simulator.code()).status_code == 200)
    assert requests.get(f"{service.url}/readyz", timeout=WAIT_SECONDS).json()["data"]["wechat"] == "up"


def test_a_call_with_two_new_tokens_ends_with_its_request(start_service: StartService, simulator: Simulator) -> None:
    service = start_service(WEB_CONCURRENCY="1", REQUEST_SECONDS="3")
    token = service.log_in(simulator, openid="o-alice")
    for path in ("/cgi-bin/stable_token", "/wxa/business/getuserphonenumber"):
        simulator.fault("slow", path=path, times=10, seconds=1.2)

    def set_phone() -> requests.Response:
        simulator.drop_access_token()
        code = simulator.phone_code(openid="o-alice")
        return service.call("PUT", "/users/me/phone", token, json={"code": code})

    assert set_phone().status_code == 200
    assert again_if_late(set_phone, 504).status_code == 504
    assert service.read_me(token).status_code == 200


def test_no_call_is_made_again_for_a_client_that_has_hung_up(start_service: StartService, simulator: Simulator) -> None:
    service = start_service("tests.apps.long_pause", WEB_CONCURRENCY="1")

    def logins() -> list[dict[str, Any]]:
        return [line for line in service.log_lines() if (line["message"], line.get("route")) == ("request", LOGIN)]

    simulator.fault("errcode", times=5, errcode=-1)  # WeChat is busy
    body = b'{"code": "%s"}' % simulator.code().encode()
    head = f"POST {LOGIN} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with closing(socket.create_connection(("127.0.0.1", int(service.environ["PORT"])), WAIT_SECONDS)) as client:
        client.sendall(head + body)
        wait_until(simulator.calls)
    wait_until(logins)
    assert logins()[0]["status"] < 500  # it is no failure of ours
    assert len(simulator.calls()) == 1


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], check=False).returncode != 0,
    reason="needs root, for a name server of its own",
)
def test_a_name_server_that_hangs_stops_no_look_up_of_other_names(
    start_service: StartService, simulator: Simulator, tmp_path: Path, redis_server: RedisServer
) -> None:
    address = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.{random.randint(1, 254)}"
    (tmp_path / "resolv.conf").write_text(f"nameserver {address}\n")
    (tmp_path / "hosts").write_text("127.0.0.1 localhost redis.internal\n")
    mounts = " && ".join(f"mount --bind {tmp_path}/{name} /etc/{name}" for name in ("resolv.conf", "hosts"))
    with (
        closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as hole,
        Proxy(redis_server.socket) as proxy,
        ThreadPoolExecutor(30) as pool,
    ):
        hole.bind((address, 53))
        service = start_service(
            within=["unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh"],
            WEB_CONCURRENCY="1",
            WECHAT_API_BASE_URL="http://wechat.internal",
            REDIS_URL=f"redis://redis.internal:{proxy.port}?socket_timeout=10&socket_connect_timeout=10",
        )
        waiting = [pool.submit(log_in, service, f"code-{number}") for number in range(15)]
        time.sleep(1)
        read = partial(requests.get, f"{service.url}{LOGIN}", headers=bearer("x"), timeout=WAIT_SECONDS)
        reads = [pool.submit(read) for _ in range(8)]
        assert {one.result(WAIT_SECONDS).status_code for one in reads} == {401}  # Redis says so, on new connections
        assert not any(one.done() for one in waiting)
        assert {one.result(WAIT_SECONDS).status_code for one in waiting} == {504}
