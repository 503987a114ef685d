"""nginx as deploy/nginx configures it: what is not as with HAProxy, for which test_load_balancers.py is."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.load_balancers import NGINX, Instance, Nginx
from tests.deploy.test_load_balancers import assert_is_its_own

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

REFUSED = {
    "no HTTP": (400, ["hello"]),
    "a header that is too long": (400, ["GET /livez HTTP/1.1", "Host: x", f"X-Long: {'x' * 10_000}"]),
    "a URL that is too long": (400, [f"GET /livez?{'x' * 10_000} HTTP/1.1", "Host: x"]),
    "a method that nginx refuses": (400, ["TRACE /livez HTTP/1.1", "Host: x"]),
    "a version that nginx refuses": (400, ["GET /livez HTTP/3.0", "Host: x"]),
    "a transfer coding that nginx refuses": (400, ["POST /livez HTTP/1.1", "Host: x", "Transfer-Encoding: x"]),
    "a path of nginx's own": (404, ["GET /nginx/error HTTP/1.1", "Host: x"]),
    "another path of nginx's own": (404, ["POST /nginx/keyed HTTP/1.1", "Host: x", "Content-Length: 0"]),
    "a third path of nginx's own": (404, ["PUT /nginx/once HTTP/1.1", "Host: x", "Content-Length: 0"]),
    "a hidden path with a key": (404, ["POST /metrics HTTP/1.1", "Host: x", "Idempotency-Key: x", "Content-Length: 0"]),
}


@pytest.fixture
def nginx(instances: list[Instance], tmp_path: Path) -> Iterator[Nginx]:
    servers = {f"web-{number}": instance.address for number, instance in enumerate(instances, 1)}
    nginx = Nginx(tmp_path, servers)
    yield nginx
    nginx.discard()


@pytest.mark.parametrize("name", REFUSED)
def test_what_nginx_refuses_comes_in_the_envelope(nginx: Nginx, instances: list[Instance], name: str) -> None:
    status, lines = REFUSED[name]
    response, body = nginx.send(*lines)
    assert response.status == status
    assert_is_its_own(status, response.headers, body)
    assert [instance.came for instance in instances] == [[], []]


def test_a_request_without_tls_is_refused_at_the_port_for_tls(nginx: Nginx) -> None:
    response, body = nginx.send("GET /livez HTTP/1.1", "Host: x", plain=True)
    assert response.status == 400
    assert_is_its_own(400, response.headers, body)


def test_a_write_with_a_key_keeps_its_path(nginx: Nginx, instances: list[Instance]) -> None:
    path = "/a%2Fb/./c//d?e=%2F&e=2"
    assert nginx.request("POST", path, headers={"Idempotency-Key": "x"}).status_code == 200
    assert nginx.request("POST", path).status_code == 200
    [with_key, without] = instances[0].came + instances[1].came
    assert with_key == without


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
def test_what_a_version_protects_is_repeated(nginx: Nginx, instances: list[Instance], method: str) -> None:
    path = "/a%2Fb/c//d?e=%2F&e=2"
    instances[0].closes = 1
    for headers, sent in (({"If-Match": '"1", "2"'}, 3), ({}, 5)):
        assert [nginx.request(method, path, headers=headers).status_code for _ in range(2)] == [200, 200]
        assert instances[0].came + instances[1].came == [f"{method} {path}"] * sent


def test_what_nothing_protects_is_not_even_repeated_if_it_was_refused(nginx: Nginx, instances: list[Instance]) -> None:
    instances[0].refuse()
    assert sorted(nginx.request("PUT", "/").status_code for _ in range(2)) == [200, 503]
    assert [len(instance.came) for instance in instances] == [0, 1]


def test_if_all_instances_are_left_out_all_are_asked(nginx: Nginx, instances: list[Instance]) -> None:
    """As when one is restarted soon after the other: both have refused connections a moment ago."""
    for instance in instances:
        instance.closes = 4
    assert {nginx.request("POST", "/").status_code for _ in range(8)} == {503}
    assert {nginx.request("POST", "/").status_code for _ in range(8)} == {200}
