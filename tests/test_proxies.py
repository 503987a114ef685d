"""What proxies say of a request counts from TRUSTED_PROXIES alone, and no client can say it for them."""

from collections.abc import Callable
from contextlib import closing

import pytest
from flask import Flask, request

from tests.harness import Service
from tests.test_connections import Client

AUTHORIZE = "/api/v1/auth/wechat/authorize"


@pytest.fixture
def seen(make_app: Callable[..., Flask]) -> Callable[..., tuple[str, str]]:
    """Return the address and the URL that the application sees of a request to http://shop.example.com."""

    def look(trusted: str, peer: str, **headers: str) -> tuple[str, str]:
        app = make_app(TRUSTED_PROXIES=trusted)
        app.add_url_rule("/seen", view_func=lambda: [request.remote_addr, request.host_url])
        named = {f"X-Forwarded-{name}": value for name, value in headers.items()}
        client = app.test_client()
        answer = client.get(
            "/seen", headers=named, base_url="http://shop.example.com", environ_overrides={"REMOTE_ADDR": peer}
        )
        address, url = answer.get_json()
        return address, url

    return look


HERE = "http://shop.example.com/"
PROXIES = "10.0.0.0/8, 192.0.2.7, 2001:db8:5::/48"


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("10.0.0.1", "198.51.100.4", "198.51.100.4"),
        ("192.0.2.7", "198.51.100.4", "198.51.100.4"),
        ("192.0.2.8", "198.51.100.4", "192.0.2.8"),  # no proxy of ours
        ("10.0.0.1", "1.1.1.1, 198.51.100.4", "198.51.100.4"),  # the client sent the first
        ("10.0.0.1", "10.9.9.9,198.51.100.4", "198.51.100.4"),
        ("10.0.0.1", "198.51.100.4, 10.0.0.3,192.0.2.7", "198.51.100.4"),
        ("10.0.0.1", "1.1.1.1, 198.51.100.4 , 10.0.0.3", "198.51.100.4"),
        ("10.0.0.1", "10.0.0.4, 10.0.0.3", "10.0.0.4"),  # a client that is a proxy itself
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "unknown", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.4, unknown, 10.0.0.3", "10.0.0.3"),
        ("10.0.0.1", "198.51.100.4,", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.4:4711", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.04", "10.0.0.1"),
        ("10.0.0.1", "3325256708", "10.0.0.1"),
        ("2001:db8:5::1", "2001:db8:9::4", "2001:db8:9::4"),
        ("2001:db8:6::1", "2001:db8:9::4", "2001:db8:6::1"),
        ("10.0.0.1", "2001:DB8:9:0::4, 2001:db8:5::2", "2001:db8:9::4"),
        ("10.0.0.1", "[2001:db8:9::4]", "10.0.0.1"),
        ("::ffff:10.0.0.1", "198.51.100.4", "198.51.100.4"),
        ("::ffff:192.0.2.8", "198.51.100.4", "::ffff:192.0.2.8"),
        ("10.0.0.1", "198.51.100.4, ::ffff:10.0.0.3", "198.51.100.4"),
        ("10.0.0.1", "::ffff:198.51.100.4", "198.51.100.4"),
        ("", "198.51.100.4", "198.51.100.4"),  # a Unix socket
        ("", "", ""),
    ],
)
def test_the_client_is_the_last_one_that_is_no_proxy(
    seen: Callable[..., tuple[str, str]], peer: str, forwarded: str, client: str
) -> None:
    assert seen(PROXIES, peer, For=forwarded) == (client, HERE)


@pytest.mark.parametrize(
    ("scheme", "host", "url"),
    [
        ("https", "www.example.com", "https://www.example.com/"),
        ("https", "www.example.com:8443", "https://www.example.com:8443/"),
        ("https", "[2001:db8::1]:8443", "https://[2001:db8::1]:8443/"),
        ("https, http", "evil.example.com, www.example.com", "http://www.example.com/"),  # the last is the proxy's own
        ("http,https", "", "https://shop.example.com/"),
        ("", "www.example.com", "http://www.example.com/"),
        ("https,", "www.example.com,", HERE),
    ],
)
def test_the_scheme_and_the_host_are_what_the_proxy_says(
    seen: Callable[..., tuple[str, str]], scheme: str, host: str, url: str
) -> None:
    assert seen(PROXIES, "10.0.0.1", Proto=scheme, Host=host) == ("10.0.0.1", url)
    for trusted, peer in ((PROXIES, "192.0.2.8"), ("", "10.0.0.1"), ("", "")):
        assert seen(trusted, peer, Proto=scheme, Host=host, For="198.51.100.4") == (peer, HERE)


def test_cookies_and_links_are_those_of_https_behind_a_proxy_that_says_so(
    start_service: Callable[..., Service],
) -> None:
    service = start_service(TRUSTED_PROXIES="127.0.0.1", WEB_CONCURRENCY="1")

    def authorize(*lines: str) -> tuple[bool, str]:
        client = Client(service)
        with closing(client.socket):
            head = "\r\n".join([f"GET {AUTHORIZE} HTTP/1.1", "Host: inside", *lines, "", ""])
            client.socket.sendall(head.encode())
            status, headers = client.response()
            assert status == 302
            return headers["set-cookie"].startswith("__Host-"), headers["location"].partition("redirect_uri=")[2]

    plain = (False, "http%3A%2F%2Finside%2F")
    https, www = "X-Forwarded-Proto: https", "X-Forwarded-Host: www.example.com"
    for lines, (secure, url) in {
        (): plain,
        (https, www): (True, "https%3A%2F%2Fwww.example.com%2F"),
        (https, "X-Forwarded-Proto: http"): plain,  # the client's line, and the proxy's
        ("X-Forwarded-Proto: http", https): (True, "https%3A%2F%2Finside%2F"),
        ("X-Forwarded-Host: evil.example.com", www): (False, "http%3A%2F%2Fwww.example.com%2F"),
        ("X_Forwarded_Proto: https", "X_Forwarded_Host: evil.example.com"): plain,  # in the environ the same name
        ("Forwarded: proto=https;host=evil.example.com",): plain,
        ("X-Forwarded-Ssl: on", "X-Forwarded-Protocol: ssl", "X-Forwarded-Prefix: /x", "Script-Name: /x"): plain,
    }.items():
        found_secure, found_url = authorize(*lines)
        assert (found_secure, found_url.startswith(url)) == (secure, True), (lines, found_url)
    for line in ("", f"{https}\r\n"):  # of a load balancer, which may name no host
        client = Client(service)
        with closing(client.socket):
            client.socket.sendall(f"GET /livez HTTP/1.0\r\n{line}\r\n".encode())
            assert client.response()[0] == 200
