"""The service behind a real nginx with deploy/nginx/kuaishang.conf; `.ci/run` installs Debian's nginx-light."""

import json
import os
import re
import socket
import ssl
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest
import requests

from errors import Code
from tests.blueprints.callers import ITEM, ORDER
from tests.deploy.load_balancers import NGINX, Nginx
from tests.harness import WAIT_SECONDS, Service, Simulator, bearer, wait_until

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

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


class Behind(Nginx):
    service: Service


@pytest.fixture(scope="module")
def shared_nginx(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    folder = tmp_path_factory.mktemp("nginx")
    settings = {"WEB_CONCURRENCY": "1", "TRUSTED_PROXIES": "127.0.0.1", "LOGIN_RATE": "1000/day"}
    service = Service({**environ, **settings}, folder / "output")
    try:
        nginx = Behind(folder, {"web-1": service.url.removeprefix("http://")})
        try:
            nginx.service = service
            yield nginx
        finally:
            nginx.discard()
    finally:
        service.discard()


@pytest.fixture
def nginx(shared_nginx: Behind, journal: object, simulator: Simulator) -> Behind:
    return shared_nginx


def assert_is_its_own(status: int, headers: Any, body: bytes) -> None:
    """Check that this comes from nginx: the envelope, with the message of errors.py."""
    messages = {code.status: code.message.chinese for code in Code if code.number == code.status}
    message = "无法处理该请求：Bad Request" if status == 400 else messages[status]  # no field is to blame
    assert json.loads(body) == {"code": status, "message": message, "data": None}
    assert list(json.loads(body)) == ["code", "message", "data"]
    assert headers["Content-Type"] == "application/json"
    assert re.fullmatch(r"[0-9a-f]{32}", headers["X-Trace-Id"])
    assert headers.get("Retry-After") == ("2" if status == 503 else None)


REFUSED = {
    "no host": (400, ["GET /livez HTTP/1.1"]),
    "no HTTP": (400, ["hello"]),
    "a header that is too long": (400, ["GET /livez HTTP/1.1", "Host: x", f"X-Long: {'x' * 10_000}"]),
    "a URL that is too long": (400, [f"GET /livez?{'x' * 10_000} HTTP/1.1", "Host: x"]),
    "a method that nginx refuses": (400, ["TRACE /livez HTTP/1.1", "Host: x"]),
    "a version that nginx refuses": (400, ["GET /livez HTTP/3.0", "Host: x"]),
    "a transfer coding that nginx refuses": (400, ["POST /livez HTTP/1.1", "Host: x", "Transfer-Encoding: x"]),
    "a path that is hidden": (404, ["GET /metrics HTTP/1.1", "Host: x"]),
    "a path of nginx's own": (404, ["GET /nginx/error HTTP/1.1", "Host: x"]),
    "a body that is too long": (413, ["POST /livez HTTP/1.1", "Host: x", "Content-Length: 2000000"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_nginx_refuses_comes_in_the_envelope(nginx: Behind, name: str) -> None:
    status, lines = REFUSED[name]
    response, body = nginx.send(*lines)
    assert response.status == status
    assert_is_its_own(status, response.headers, body)


def test_a_request_without_tls_is_refused_at_the_port_for_tls(nginx: Behind) -> None:
    response, body = nginx.send("GET /livez HTTP/1.1", "Host: x", plain=True)
    assert response.status == 400
    assert_is_its_own(400, response.headers, body)


def test_the_plain_port_leads_to_tls_with_method_and_body(nginx: Behind) -> None:
    url, headers = f"http://127.0.0.1:{nginx.plain_port}/api/v1/orders?page=2", {"Host": "shop.example.com:80"}
    answer = requests.post(url, data=b"{}", headers=headers, allow_redirects=False, timeout=WAIT_SECONDS)
    assert (answer.status_code, answer.headers["Location"]) == (308, "https://shop.example.com/api/v1/orders?page=2")


def test_a_service_that_is_away_or_hangs_is_unavailable(tmp_path: Path) -> None:
    with closing(socket.socket()) as service:
        service.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{service.getsockname()[1]}"
        nginx = Nginx(tmp_path, {"web-1": address}, different={"proxy_read_timeout 11s": "proxy_read_timeout 100ms"})
        try:
            for listens in (False, True):
                if listens:
                    service.listen()
                for method in ("GET", "POST"):
                    answer = nginx.request(method, "/api/v1/orders")
                    assert answer.status_code == 503
                    assert_is_its_own(503, answer.headers, answer.content)
        finally:
            nginx.discard()


def test_the_services_own_errors_pass_unchanged(nginx: Behind, simulator: Simulator) -> None:
    login, english = "/api/v1/auth/wechat", {"Accept-Language": "en"}
    simulator.fault("errcode", times=9, errcode=-1)  # WeChat is busy
    for status, method, path, options in (
        (404, "GET", "/nowhere", {}),
        (413, "POST", login, {"data": b"x" * 200_000}),
        (503, "POST", login, {"json": {"code": simulator.code()}}),
    ):
        answer = nginx.request(method, path, headers=english, **options)
        [message] = [code.message.english for code in Code if code.number == status]
        assert (answer.status_code, answer.json()["message"]) == (status, message)
        assert ("Retry-After" in answer.headers) == (status == 503)
        assert answer.headers["Content-Type"] == "application/json"


def test_unread_bodies_of_one_client_cost_no_other_one_a_request(nginx: Behind, simulator: Simulator) -> None:
    token = nginx.service.log_in(simulator)

    def attack(number: int) -> bool:
        (method, path, size), status = list(UNREAD.items())[number % len(UNREAD)]
        headers = {"Content-Type": "application/json"}
        answer = nginx.request(method, path, data=b"x" * size, headers=headers)
        assert answer.json()["code"] == status, answer.text
        return True

    def order(number: int) -> int:
        return nginx.request("POST", "/api/v1/orders", json=ORDER, headers=bearer(token)).status_code

    with ThreadPoolExecutor(8) as attackers, ThreadPoolExecutor(4) as buyers:
        attacks, orders = attackers.map(attack, range(400)), buyers.map(order, range(200))
        assert Counter(orders) == {201: 200}
        assert all(attacks)


def test_an_etag_that_came_through_gzip_changes_what_it_names(nginx: Behind, simulator: Simulator) -> None:
    token = nginx.service.log_in(simulator)
    made = nginx.service.call("POST", "/orders", token, json={"items": [ITEM] * 20})
    path, headers = made.headers["Location"], bearer(token)
    read = nginx.request("GET", path, headers={**headers, "Accept-Encoding": "gzip"})
    etag = read.headers["ETag"]
    assert (read.headers["Content-Encoding"], etag[:2]) == ("gzip", "W/")
    known = nginx.request("GET", path, headers={**headers, "If-None-Match": etag})
    assert known.status_code == 304
    for language, status in (("en", 200), ("zh", 412)):
        named = {**headers, "If-Match": etag, "Accept-Language": language}
        changed = nginx.request("PUT", path, json={"remark": "less sugar"}, headers=named)
        assert changed.status_code == status, changed.text


def test_nginx_hides_the_metrics_however_the_path_is_written(nginx: Behind) -> None:
    for path in ("/metrics", "//metrics", "/%6detrics", "/x/../metrics", "/metrics/", "/./metrics"):
        session = requests.Session()
        request = requests.Request("GET", nginx.url).prepare()
        request.url = nginx.url + path
        for name in ("SCRIPT_NAME", "X-Original-URL"):
            request.headers[name] = "/x"
        answer = session.send(request, verify=str(nginx.certificate), timeout=WAIT_SECONDS)
        assert (answer.status_code, answer.json()["code"]) == (404, 404), path


def test_the_log_has_no_query_string(nginx: Behind) -> None:
    secret = f"secret-{os.urandom(8).hex()}"
    plain = f"http://127.0.0.1:{nginx.plain_port}"
    requests.get(f"{plain}/plain?code={secret}", allow_redirects=False, timeout=WAIT_SECONDS)
    for path in ("/nowhere", "/metrics", "/api/v1/wechat/messages", "/a%3Fb"):
        nginx.request("GET", f"{path}?code={secret}", headers={"Referer": f"https://example.com/?code={secret}"})
    last = nginx.request("GET", f"/livez?signature={secret}").headers["X-Trace-Id"]
    log = nginx.log
    wait_until(lambda: last in log.read_text())
    lines = log.read_text().splitlines()[-6:]
    paths = [re.search(r'"GET (\S*) HTTP/1.1" \d+', line)[1] for line in lines]  # type: ignore[index]
    assert paths == ["/plain", "/nowhere", "/metrics", "/api/v1/wechat/messages", "/a%3Fb", "/livez"]
    assert secret not in log.read_text()


def test_the_service_is_where_nginx_says_and_not_where_its_client_says(nginx: Behind) -> None:
    spoofed = {"X-Forwarded-Proto": "http", "X-Forwarded-Host": "evil.example.com", "Host": "shop.example.com"}
    answer = nginx.request("GET", "/api/v1/auth/wechat/authorize", headers=spoofed, allow_redirects=False)
    assert "redirect_uri=https%3A%2F%2Fshop.example.com%2F" in answer.headers["Location"]
    assert answer.headers["Set-Cookie"].startswith("__Host-")


def test_clients_of_nginx_are_told_apart_whatever_they_say(nginx: Behind) -> None:
    def logins_left(address: str, **headers: str) -> str:
        context = ssl.create_default_context(cafile=nginx.certificate)
        client = HTTPSConnection(
            "127.0.0.1", nginx.port, timeout=WAIT_SECONDS, source_address=(address, 0), context=context
        )
        with closing(client):
            client.request("GET", "/api/v1/auth/wechat/authorize", headers=headers)
            return str(client.getresponse().getheader("RateLimit")).split(";")[1]

    assert logins_left("127.0.0.2") == "r=999"
    assert logins_left("127.0.0.3") == "r=999"
    assert logins_left("127.0.0.2", **{"X-Forwarded-For": "127.0.0.4"}) == "r=998"
