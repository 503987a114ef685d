"""The service behind a real nginx with deploy/nginx/kuaishang.conf; `.ci/run` installs Debian's nginx-light."""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests

from dev.run import free_port
from tests.blueprints.callers import ITEM, ORDER
from tests.harness import ROOT, WAIT_SECONDS, Service, Simulator, answers, bearer, bound_to_this_process, wait_until

CONFIGURATION = ROOT / "deploy" / "nginx" / "kuaishang.conf"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
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


class Nginx(SimpleNamespace):
    url: str
    service: Service


@pytest.fixture(scope="module")
def shared_nginx(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    folder = tmp_path_factory.mktemp("nginx")
    settings = {"WEB_CONCURRENCY": "1", "TRUSTED_PROXIES": "127.0.0.1", "LOGIN_RATE": "1000/day"}
    service = Service({**environ, **settings}, folder / "output")
    port = free_port("nginx's port", "0")
    text = CONFIGURATION.read_text()
    for shipped, here in (("127.0.0.1:8000", service.url.removeprefix("http://")), ("listen 80", f"listen {port}")):
        assert text.count(shipped) == 1
        text = text.replace(shipped, here)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    main = f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/errors;\n"
    main += "user root;\n" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(f"{main}events {{}}\nhttp {{\naccess_log off;\n{paths}{text}\n}}\n")
    command = [*bound_to_this_process(), str(NGINX), "-p", str(folder), "-e", f"{folder}/errors", "-c", "nginx.conf"]
    with subprocess.Popen(command) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: answers(f"{url}/livez") or process.poll() is not None)
            assert process.poll() is None, Path(folder, "errors").read_text()
            yield Nginx(url=url, service=service)
        finally:
            process.terminate()
            service.discard()


@pytest.fixture
def nginx(shared_nginx: Nginx, journal: object, simulator: Simulator) -> Nginx:
    return shared_nginx


def test_unread_bodies_of_one_client_cost_no_other_one_a_request(nginx: Nginx, simulator: Simulator) -> None:
    token = nginx.service.log_in(simulator)

    def attack(number: int) -> bool:
        (method, path, size), status = list(UNREAD.items())[number % len(UNREAD)]
        headers = {"Content-Type": "application/json"}
        answer = requests.request(method, nginx.url + path, data=b"x" * size, headers=headers, timeout=WAIT_SECONDS)
        assert answer.json()["code"] == status, answer.text
        return True

    def order(number: int) -> int:
        url = f"{nginx.url}/api/v1/orders"
        return requests.post(url, json=ORDER, headers=bearer(token), timeout=WAIT_SECONDS).status_code

    with ThreadPoolExecutor(8) as attackers, ThreadPoolExecutor(4) as buyers:
        attacks, orders = attackers.map(attack, range(400)), buyers.map(order, range(200))
        assert Counter(orders) == {201: 200}
        assert all(attacks)


def test_an_etag_that_came_through_gzip_changes_what_it_names(nginx: Nginx, simulator: Simulator) -> None:
    token = nginx.service.log_in(simulator)
    made = nginx.service.call("POST", "/orders", token, json={"items": [ITEM] * 20})
    url, headers = nginx.url + made.headers["Location"], bearer(token)
    read = requests.get(url, headers={**headers, "Accept-Encoding": "gzip"}, timeout=WAIT_SECONDS)
    etag = read.headers["ETag"]
    assert (read.headers["Content-Encoding"], etag[:2]) == ("gzip", "W/")
    known = requests.get(url, headers={**headers, "If-None-Match": etag}, timeout=WAIT_SECONDS)
    assert known.status_code == 304
    for language, status in (("en", 200), ("zh", 412)):
        named = {**headers, "If-Match": etag, "Accept-Language": language}
        changed = requests.put(url, json={"remark": "less sugar"}, headers=named, timeout=WAIT_SECONDS)
        assert changed.status_code == status, changed.text


def test_nginx_hides_the_metrics_however_the_path_is_written(nginx: Nginx) -> None:
    for path in ("/metrics", "//metrics", "/%6detrics", "/x/../metrics", "/metrics/", "/./metrics"):
        session = requests.Session()
        request = requests.Request("GET", nginx.url).prepare()
        request.url = nginx.url + path
        for name in ("SCRIPT_NAME", "X-Original-URL"):
            request.headers[name] = "/x"
        assert session.send(request, timeout=WAIT_SECONDS).status_code == 404, path


def test_the_service_is_where_nginx_says_and_not_where_its_client_says(nginx: Nginx) -> None:
    spoofed = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example.com", "Host": "shop.example.com"}
    answer = requests.get(
        f"{nginx.url}/api/v1/auth/wechat/authorize", headers=spoofed, allow_redirects=False, timeout=WAIT_SECONDS
    )
    assert "redirect_uri=http%3A%2F%2Fshop.example.com%2F" in answer.headers["Location"]
    assert not answer.headers["Set-Cookie"].startswith("__Host-")


def test_clients_of_nginx_are_told_apart_whatever_they_say(nginx: Nginx) -> None:
    def logins_left(address: str, **headers: str) -> str:
        host, port = nginx.url.removeprefix("http://").split(":")
        client = HTTPConnection(host, int(port), WAIT_SECONDS, source_address=(address, 0))
        with closing(client):
            client.request("GET", "/api/v1/auth/wechat/authorize", headers=headers)
            return str(client.getresponse().getheader("RateLimit")).split(";")[1]

    assert logins_left("127.0.0.2") == "r=999"
    assert logins_left("127.0.0.3") == "r=999"
    assert logins_left("127.0.0.2", **{"X-Forwarded-For": "127.0.0.4"}) == "r=998"
