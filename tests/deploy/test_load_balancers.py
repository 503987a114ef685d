"""The service behind a real HAProxy and behind a real nginx, as deploy/haproxy and deploy/nginx configure them."""

import json
import os
import re
import socket
import ssl
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
import requests

from errors import Code
from tests.blueprints.callers import ITEM, ORDER
from tests.deploy.load_balancers import HAPROXY, NGINX, HAProxy, Instance, LoadBalancer, Nginx
from tests.harness import WAIT_SECONDS, Service, Simulator, bearer, wait_until

KINDS = [
    pytest.param(HAProxy, marks=pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")),
    pytest.param(Nginx, marks=pytest.mark.skipif(NGINX is None, reason="nginx is not installed")),
]

EMPTY_SETTINGS = b"\0\0\0\4\0\0\0\0\0"
"""A frame of HTTP/2: its length, 0; its type, 4; its flags and its stream, 0."""
UNREAD = {
    ("POST", "/api/v1/orders", 200_000): 401,
    ("POST", "/api/v1/orders", 60_000): 401,
    ("PUT", "/api/v1/users/me", 1_000_000): 401,
    ("POST", "/nowhere", 200_000): 404,
    ("POST", "/livez", 200_000): 405,
    ("POST", "/api/v1/auth/wechat", 200_000): 413,
    ("POST", "/api/v1/auth/wechat", 1_000_000): 413,
    ("POST", "/api/v1/wechat/messages", 300_000): 413,
}


@pytest.fixture(scope="module")
def service(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = {"WEB_CONCURRENCY": "1", "TRUSTED_PROXIES": "127.0.0.1", "LOGIN_RATE": "1000/day"}
    service = Service({**environ, **settings}, tmp_path_factory.mktemp("service") / "output")
    yield service
    service.discard()


@pytest.fixture(scope="module", params=KINDS)
def shared_front(
    request: pytest.FixtureRequest, service: Service, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoadBalancer]:
    folder = tmp_path_factory.mktemp("front")
    front: LoadBalancer = request.param(folder, {"web-1": service.url.removeprefix("http://")})
    yield front
    front.discard()


@pytest.fixture
def front(shared_front: LoadBalancer, journal: object, simulator: Simulator) -> LoadBalancer:
    return shared_front


def assert_is_its_own(status: int, headers: Any, body: bytes) -> None:
    """Check that this does not come from the service: the envelope, with the message of errors.py."""
    messages = {code.status: code.message.chinese for code in Code if code.number == code.status}
    message = "无法处理该请求：Bad Request" if status == 400 else messages[status]  # no field is to blame
    assert json.loads(body) == {"code": status, "message": message, "data": None}
    assert list(json.loads(body)) == ["code", "message", "data"]
    assert headers["Content-Type"] == "application/json"
    assert re.fullmatch(r"[0-9a-f]{32}", headers["X-Trace-Id"])
    assert headers.get("Retry-After") == ("2" if status == 503 else None)


REFUSED = {
    "no host": (400, ["GET /livez HTTP/1.1"]),
    "a path that is hidden": (404, ["GET /metrics HTTP/1.1", "Host: x"]),
    "a body that is too long": (413, ["POST /livez HTTP/1.1", "Host: x", "Content-Length: 2000000"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses_comes_in_the_envelope(front: LoadBalancer, name: str) -> None:
    status, lines = REFUSED[name]
    response, body = front.send(*lines)
    assert response.status == status
    assert_is_its_own(status, response.headers, body)


@pytest.mark.parametrize("version", ["TLSv1_1", "TLSv1_2", "TLSv1_3"])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_it_speaks_http_2_and_no_tls_before_1_2(front: LoadBalancer, version: str) -> None:
    context = ssl.create_default_context(cafile=front.certificate)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # the client itself would take TLS 1.1
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    context.set_alpn_protocols(["h2", "http/1.1"])
    with socket.create_connection((front.host, front.port), WAIT_SECONDS) as connection:
        if version == "TLSv1_1":
            with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
                context.wrap_socket(connection, server_hostname=front.host)
            return
        with context.wrap_socket(connection, server_hostname=front.host) as client:
            assert client.selected_alpn_protocol() == "h2"
            client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + EMPTY_SETTINGS)
            assert client.recv(65536)[3] == EMPTY_SETTINGS[3]  # it begins with settings of its own


def test_the_plain_port_leads_to_tls_with_method_and_body(front: LoadBalancer) -> None:
    url, headers = f"http://127.0.0.1:{front.plain_port}/api/v1/orders?page=2", {"Host": "shop.example.com:80"}
    answer = requests.post(url, data=b"{}", headers=headers, allow_redirects=False, timeout=WAIT_SECONDS)
    assert (answer.status_code, answer.headers["Location"]) == (308, "https://shop.example.com/api/v1/orders?page=2")


@pytest.mark.parametrize("kind", KINDS)
def test_a_service_that_is_away_or_hangs_is_unavailable(kind: type[LoadBalancer], tmp_path: Path) -> None:
    with closing(socket.socket()) as service:
        service.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{service.getsockname()[1]}"
        front = kind(tmp_path, {"web-1": address}, different=kind.answers_within("100ms"))
        try:
            for listens in (False, True):
                if listens:
                    service.listen()
                for method in ("GET", "POST"):
                    answer = front.request(method, "/api/v1/orders")
                    assert answer.status_code == 503
                    assert_is_its_own(503, answer.headers, answer.content)
                    wait_until(lambda: answer.headers["X-Trace-Id"] in front.log.read_text())  # noqa: B023
                    [line] = [one for one in front.log.read_text().splitlines() if answer.headers["X-Trace-Id"] in one]
                    assert f'"{method} /api/v1/orders HTTP/1.1" 503' in line
        finally:
            front.discard()


def test_the_services_own_errors_pass_unchanged(front: LoadBalancer, simulator: Simulator) -> None:
    login, english = "/api/v1/auth/wechat", {"Accept-Language": "en"}
    simulator.fault("errcode", times=9, errcode=-1)  # WeChat is busy
    for status, method, path, options in (
        (404, "GET", "/nowhere", {}),
        (413, "POST", login, {"data": b"x" * 200_000}),
        (503, "POST", login, {"json": {"code": simulator.code()}}),
    ):
        answer = front.request(method, path, headers=english, **options)
        [message] = [code.message.english for code in Code if code.number == status]
        assert (answer.status_code, answer.json()["message"]) == (status, message)
        assert ("Retry-After" in answer.headers) == (status == 503)
        assert answer.headers["Content-Type"] == "application/json"


def test_unread_bodies_of_one_client_cost_no_other_one_a_request(
    front: LoadBalancer, service: Service, simulator: Simulator
) -> None:
    token = service.log_in(simulator)

    def attack(number: int) -> bool:
        (method, path, size), status = list(UNREAD.items())[number % len(UNREAD)]
        headers = {"Content-Type": "application/json"}
        answer = front.request(method, path, data=b"x" * size, headers=headers)
        assert answer.json()["code"] == status, answer.text
        return True

    def order(number: int) -> int:
        return front.request("POST", "/api/v1/orders", json=ORDER, headers=bearer(token)).status_code

    with ThreadPoolExecutor(8) as attackers, ThreadPoolExecutor(4) as buyers:
        attacks, orders = attackers.map(attack, range(400)), buyers.map(order, range(200))
        assert Counter(orders) == {201: 200}
        assert all(attacks)


def test_an_etag_that_came_through_gzip_changes_what_it_names(
    front: LoadBalancer, service: Service, simulator: Simulator
) -> None:
    token = service.log_in(simulator)
    made = service.call("POST", "/orders", token, json={"items": [ITEM] * 20})
    path, headers = made.headers["Location"], bearer(token)
    read = front.request("GET", path, headers={**headers, "Accept-Encoding": "gzip"})
    etag = read.headers["ETag"]
    assert (read.headers["Content-Encoding"], etag[:2]) == ("gzip", "W/")
    known = front.request("GET", path, headers={**headers, "If-None-Match": etag})
    assert known.status_code == 304
    for language, status in (("en", 200), ("zh", 412)):
        named = {**headers, "If-Match": etag, "Accept-Language": language}
        changed = front.request("PUT", path, json={"remark": "less sugar"}, headers=named)
        assert changed.status_code == status, changed.text


def test_it_hides_the_metrics_however_the_path_is_written(front: LoadBalancer) -> None:
    for path in ("/metrics", "//metrics", "/%6detrics", "/x/../metrics", "/metrics/", "/./metrics"):
        session = requests.Session()
        request = requests.Request("GET", front.url).prepare()
        request.url = front.url + path
        for name in ("SCRIPT_NAME", "X-Original-URL"):
            request.headers[name] = "/x"
        answer = session.send(request, verify=str(front.certificate), timeout=WAIT_SECONDS)
        assert (answer.status_code, answer.json()["code"]) == (404, 404), path


def test_the_log_has_no_query_string(front: LoadBalancer) -> None:
    secret = f"secret-{os.urandom(8).hex()}"
    plain = f"http://127.0.0.1:{front.plain_port}"
    requests.get(f"{plain}/plain?code={secret}", allow_redirects=False, timeout=WAIT_SECONDS)
    for path in ("/nowhere", "/metrics", "/api/v1/wechat/messages", "/a%3Fb"):
        front.request("GET", f"{path}?code={secret}", headers={"Referer": f"https://example.com/?code={secret}"})
    front.request("GET", f"/livez?signature={secret}")

    def paths() -> set[str]:
        lines = front.log.read_text().splitlines()[-6:]  # those of two threads may change places
        return {path for line in lines for path in re.findall(r'"GET (\S*) HTTP/1.1" \d+', line)}

    wait_until(lambda: paths() == {"/plain", "/nowhere", "/metrics", "/api/v1/wechat/messages", "/a%3Fb", "/livez"})
    assert secret not in front.log.read_text()


def test_the_service_is_where_the_proxy_says_and_not_where_its_client_says(front: LoadBalancer) -> None:
    spoofed = {"X-Forwarded-Proto": "http", "X-Forwarded-Host": "evil.example.com", "Host": "shop.example.com"}
    answer = front.request("GET", "/api/v1/auth/wechat/authorize", headers=spoofed, allow_redirects=False)
    assert "redirect_uri=https%3A%2F%2Fshop.example.com%2F" in answer.headers["Location"]
    assert answer.headers["Set-Cookie"].startswith("__Host-")


def test_clients_are_told_apart_whatever_they_say(front: LoadBalancer) -> None:
    def logins_left(address: str, **headers: str) -> str:
        context = ssl.create_default_context(cafile=front.certificate)
        client = HTTPSConnection(
            "127.0.0.1", front.port, timeout=WAIT_SECONDS, source_address=(address, 0), context=context
        )
        with closing(client):
            client.request("GET", "/api/v1/auth/wechat/authorize", headers=headers)
            return str(client.getresponse().getheader("RateLimit")).split(";")[1]

    one, other = (f"127.0.{1 + isinstance(front, Nginx)}.{number}" for number in (2, 3))
    assert logins_left(one) == "r=999"
    assert logins_left(other) == "r=999"
    assert logins_left(one, **{"X-Forwarded-For": "127.0.0.4"}) == "r=998"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> type[LoadBalancer]:
    return request.param


@pytest.fixture
def in_front(kind: type[LoadBalancer], instances: list[Instance], tmp_path: Path) -> Iterator[LoadBalancer]:
    """It counts an instance that does not answer within 3 s as one that hangs; the other one is never so slow."""
    servers = {f"web-{number}": instance.address for number, instance in enumerate(instances, 1)}
    front = kind(tmp_path, servers, different=kind.answers_within("3s"))
    yield front
    front.discard()


REPEATED = {
    "a read": ("GET", "/api/v1/orders", {}),
    "a write with a key": ("POST", "/api/v1/orders", {"Idempotency-Key": "a-key-of-the-client"}),
    "a login": ("POST", "/api/v1/auth/wechat", {}),
    "a login without a version": ("POST", "/api/auth/wechat", {}),
}
ONCE = {
    "a write without a key": ("POST", "/api/v1/orders", {}),
    "a write whose key is empty": ("POST", "/api/v1/orders", {"Idempotency-Key": ""}),
    "what only looks like a login": ("POST", "/api/v1/auth/wechat/phone", {}),
    "a phone code": ("PUT", "/api/v1/users/me/phone", {}),
    "a logout": ("DELETE", "/api/v1/auth/session", {}),
}
SLOW = [
    b"GET / HTTP/1.1\r\nHost: x\r\n",  # its headers
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n",  # its body
]
FEW = 2
"""So many requests reach both instances, in turns."""


def send_a_few(front: LoadBalancer, method: str, path: str, headers: dict[str, str]) -> list[int]:
    return sorted(front.request(method, path, headers=headers).status_code for _ in range(FEW))


@pytest.fixture(params=["ends its connections", "hangs"])
def broken(request: pytest.FixtureRequest, instances: list[Instance]) -> None:
    """One of both instances does this with requests that it has read."""
    if request.param == "hangs":
        instances[0].may_answer.clear()
    else:
        instances[0].closes = FEW


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", REPEATED)
def test_what_is_safe_to_repeat_is_repeated(in_front: LoadBalancer, instances: list[Instance], name: str) -> None:
    assert send_a_few(in_front, *REPEATED[name]) == [200, 200]
    assert instances[0].came
    assert len(instances[1].came) == FEW


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("name", ONCE)
def test_what_is_not_safe_to_repeat_is_sent_once(in_front: LoadBalancer, instances: list[Instance], name: str) -> None:
    assert send_a_few(in_front, *ONCE[name]) == [200, 503]
    assert [len(instance.came) for instance in instances] == [1, 1]


def test_what_was_refused_is_always_sent_to_another(in_front: LoadBalancer, instances: list[Instance]) -> None:
    instances[0].refuse()
    assert send_a_few(in_front, *ONCE["a write without a key"]) == [200, 200]
    assert [len(instance.came) for instance in instances] == [0, 2]


def test_slow_clients_are_refused_and_keep_no_instance_busy(
    kind: type[LoadBalancer], instances: list[Instance], tmp_path: Path
) -> None:
    front = kind(tmp_path, {"web-1": instances[0].address}, different=kind.waits_for_clients("3s"))
    try:
        with ExitStack() as stack:
            clients = [stack.enter_context(front.connect()) for _ in SLOW]
            for client, part in zip(clients, SLOW, strict=True):
                client.sendall(part)
            assert [b" 200 " in client.recv(65536) for client in clients] == [False, False]
        assert front.request("GET", "/quick").status_code == 200
        assert instances[0].came == ["GET /quick"]
    finally:
        front.discard()
