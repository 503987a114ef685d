"""What gunicorn does with connections and headers: the service as in production, with clients that write bytes."""

import json
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import flask_swagger_ui
import pytest
import requests

from tests.harness import METRICS_TOKEN, WAIT_SECONDS, Service, Simulator, bearer

StartService = Callable[..., Service]
Services = tuple[Service, Service]

LARGEST_REFUSAL = 16 * 1024
REFUSED = {
    "401": "POST /api/v1/orders",
    "404": "POST /nowhere",
    "405": "POST /livez",
    "413": "POST /api/v1/auth/wechat",
    "503": "POST /fail/UNAVAILABLE",
    "500": "POST /crash",
    "304": "GET /not-modified",
    "302": "POST /redirect",
    "204": "OPTIONS /api/v1/orders",
}


class Client:
    """A connection, and the bytes on it."""

    def __init__(self, service: Service) -> None:
        self.socket = socket.create_connection(("127.0.0.1", int(service.environ["PORT"])), WAIT_SECONDS)
        self.received = b""

    def send(self, request: str, body: bytes = b"", **headers: str) -> None:
        lines = [f"{request} HTTP/1.1", "Host: shop.example.com"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def until(self, end: bytes) -> bytes:
        """What comes up to and with these bytes; all that comes if the connection is closed before."""
        while end not in self.received and (data := self.socket.recv(65536)):
            self.received += data
        before, found, self.received = self.received.partition(end)
        return before + found

    def response(self) -> tuple[int, dict[str, str]]:
        """The status and the headers of a response; its body is read."""
        head = self.until(b"\r\n\r\n").decode()
        status, *lines = head.splitlines()
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        number = int(status.split()[1])
        length = 0 if number in (100, 204, 304) else int(headers.get("content-length", 0))
        while len(self.received) < length:
            data = self.socket.recv(65536)
            assert data, "cut off"
            self.received += data
        self.received = self.received[length:]
        return number, headers

    def all(self) -> bytes:
        while data := self.socket.recv(65536):
            self.received += data
        return self.received


def chunks(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


@pytest.fixture(scope="module")
def faulty_service(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with routes that respond without reading the body."""
    output = tmp_path_factory.mktemp("refusals") / "output"
    service = Service({**environ, "WEB_CONCURRENCY": "1"}, output, "tests.apps.refusals")
    yield service
    service.discard()


@pytest.mark.parametrize("size", [1, 9000, 65535, 65536, 200_000, 8_000_000])
@pytest.mark.parametrize("framing", ["length", "chunked", "expect"])
def test_a_refusal_arrives_and_costs_no_next_request(faulty_service: Service, size: int, framing: str) -> None:
    body = b"x" * size
    for status, request in REFUSED.items():
        if (status, size) == ("413", 1):
            continue
        for _ in range(2):
            client = Client(faulty_service)
            with closing(client.socket):
                if framing == "chunked":
                    client.send(request, chunks(body), Content_Type="application/json", Transfer_Encoding="chunked")
                elif framing == "length":
                    client.send(request, body, Content_Type="application/json", Content_Length=str(size))
                else:
                    expected = {"Content_Length": str(size), "Expect": "100-continue"}
                    client.send(request, Content_Type="application/json", **expected)
                    assert client.response()[0] == 100
                    client.socket.sendall(body)
                number, headers = client.response()
                assert str(number) == status
                assert headers["connection"] == ("keep-alive" if framing == "length" and size < 65536 else "close")
                if headers["connection"] == "keep-alive":
                    client.send("GET /livez")
                    assert client.response()[0] == 200
                else:
                    assert client.all() == b""


def test_a_body_that_is_read_keeps_the_connection(services: Services, simulator: Simulator) -> None:
    client = Client(services[0])
    with closing(client.socket):
        for _ in range(3):
            body = b'{"code": "%s"}' % simulator.code().encode()
            client.send("POST /api/v1/auth/wechat", body, Content_Length=str(len(body)))
            status, headers = client.response()
            assert (status, headers["connection"]) == (200, "keep-alive")
        body = b'{"code": "%s"}' % simulator.code().encode()
        client.send("POST /api/v1/auth/wechat", Content_Length=str(len(body)), Expect="100-continue")
        assert client.response()[0] == 100
        client.socket.sendall(body)
        assert client.response()[0] == 200


def test_clients_that_do_not_close_their_connection_keep_nobody_waiting(start_service: StartService) -> None:
    service = start_service(WEB_CONCURRENCY="1", WEB_THREADS="128")
    (worker,) = service.workers()
    with ExitStack() as stack:
        for request in (b"GET /livez HTTP/1.0\r\n\r\n", b"malformed\r\n\r\n") * 50:
            client = Client(service)
            stack.callback(client.socket.close)
            client.socket.sendall(request)
        # gunicorn's own worker would wait for each of them for 2 s, one after the other, and be killed for it.
        assert requests.get(f"{service.url}/livez", timeout=WAIT_SECONDS).status_code == 200
        time.sleep(2.5)  # also when ours has waited
        assert requests.get(f"{service.url}/livez", timeout=WAIT_SECONDS).status_code == 200
        assert service.workers() == [worker]


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\n" + b"&" * 700_000,
        b"GET / HTTP/1.1\r\n" + b'"' * 700_000 + b": x",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: " + b"&" * 8000,
        b"GET / HTTP/1.1\r\nHost: x\r\nExpect: " + b"&" * 8000,
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"\r\n".join([b"Accept-Language: " + b"zh;q=0.1," * 800] * 5),
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"\r\n".join([b"X-%d: x" % number for number in range(200)]),
        b"GET /" + b"'" * 500_000 + b" HTTP/1.1",
        b"GET " + b"'" * 4000,
        b"'" * 4000 + b" / HTTP/1.1",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"&" * 8000,
    ],
)
def test_what_gunicorn_refuses_it_refuses_in_short(services: Services, request_: bytes) -> None:
    client = Client(services[0])
    with closing(client.socket):
        client.socket.sendall(request_ + b"\r\n\r\n")
        response = client.all()
    assert re.match(rb"HTTP/1.1 [45]\d\d ", response)
    assert len(response) <= LARGEST_REFUSAL


def get(service: Service, path: str, **headers: str) -> int:
    client = Client(service)
    with closing(client.socket):
        client.send(f"GET {path}", **{"Connection": "close", **headers})
        return client.response()[0]


def test_a_file_arrives_whole_and_after_its_head(services: Services) -> None:
    content = requests.get(services[0].url + "/docs/assets/swagger-ui.css", timeout=WAIT_SECONDS).content
    folder = Path(flask_swagger_ui.__file__).parent / "dist"
    assert content == (folder / "swagger-ui.css").read_bytes()


def test_no_header_changes_the_path(services: Services) -> None:
    scraper = bearer(METRICS_TOKEN)
    assert get(services[0], "/metrics", **scraper) == 200
    for headers in ({"SCRIPT_NAME": "/x"}, {"PATH_INFO": "/metrics"}, {"X_Original_URL": "/metrics"}):
        client = Client(services[0])
        with closing(client.socket):
            lines = "".join(f"{name}: {value}\r\n" for name, value in {**headers, **scraper}.items())
            client.socket.sendall(f"GET /x/metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{lines}\r\n".encode())
            assert client.response()[0] == 404


def test_a_path_with_two_slashes_is_404_and_leads_nowhere_else(services: Services) -> None:
    for path in (
        "//metrics",
        "//evil.example.com/livez",
        "/api//v1/orders",
        "/%2Fmetrics",
        "/docs//",
        "//",
        "///livez",
    ):
        client = Client(services[0])
        with closing(client.socket):
            client.send(f"GET {path}", Connection="close", **bearer(METRICS_TOKEN))
            status, headers = client.response()
        assert (status, "location" in headers) == (404, False), path


def test_contradictory_schemes_are_ignored(services: Services) -> None:
    assert get(services[0], "/livez", X_Forwarded_Proto="https", X_Forwarded_Ssl="off") == 200
    assert get(services[0], "/livez", X_Forwarded_Proto="http", X_Forwarded_Protocol="ssl") == 200
    client = Client(services[0])
    with closing(client.socket):
        for scheme in ("http", "https"):
            client.received = b""
            other = {"http": "https", "https": "http"}[scheme]
            lines = f"X-Forwarded-Proto: {scheme}\r\nX-Forwarded-Proto: {other}\r\n"
            client.socket.sendall(f"GET /livez HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
            assert client.response()[0] == 200


@pytest.mark.parametrize(
    "lines",
    [
        "Transfer-Encoding: chunked\r\nContent-Length: 5",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: +5",
        "Content-Length: 5, 5",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: gzip",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding: xchunked",
    ],
)
def test_a_body_of_ambiguous_length_is_refused(services: Services, lines: str) -> None:
    client = Client(services[0])
    with closing(client.socket):
        client.socket.sendall(f"POST /livez HTTP/1.1\r\nHost: x\r\n{lines}\r\n\r\n0\r\n\r\n".encode())
        response = client.all()
    assert re.match(rb"HTTP/1.1 (400|501) ", response)
    assert b"close" in response


def test_users_who_read_at_the_same_moment_each_read_themselves(services: Services, simulator: Simulator) -> None:
    tokens = [services[0].log_in(simulator) for _ in range(20)]
    mine = {token: services[0].read_me(token).json()["data"]["id"] for token in tokens}
    assert len(set(mine.values())) == 20
    clients = [Client(services[0]) for _ in tokens]
    with ExitStack() as stack:
        for client in clients:
            stack.callback(client.socket.close)
        for _ in range(20):
            for client, token in zip(clients, tokens, strict=True):
                client.send("GET /api/v1/users/me", Authorization=f"Bearer {token}")
            for client, token in zip(clients, tokens, strict=True):
                head = client.until(b"\r\n\r\n").decode().lower()
                length = int(head.partition("content-length: ")[2].split()[0])
                while len(client.received) < length:
                    client.received += client.socket.recv(65536)
                body, client.received = client.received[:length], client.received[length:]
                assert json.loads(body)["data"]["id"] == mine[token]


def test_a_client_whose_next_request_is_always_there_keeps_no_other_one_waiting(start_service: StartService) -> None:
    service = start_service(WEB_CONCURRENCY="1")
    requests_ = 5000
    hasty, other = Client(service), Client(service)
    with closing(hasty.socket), closing(other.socket):
        other.send("GET /livez")
        assert other.response()[0] == 200
        sending = threading.Thread(
            target=hasty.socket.sendall, args=(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * requests_,)
        )
        sending.start()
        for number in range(requests_):
            assert hasty.response()[0] == 200
            if number == 100:
                other.send("GET /livez")
            if number > 100 and select.select([other.socket], [], [], 0)[0]:
                break
        assert number < requests_ - 1000
        while sending.is_alive():
            hasty.response()
        sending.join()
