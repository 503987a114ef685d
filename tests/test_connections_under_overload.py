"""Connections while their worker refuses requests at the door: what was read of them is not taken for another request.

The service as in production, with clients that write bytes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
import requests

from tests.harness import METRICS_TOKEN, WAIT_SECONDS, Service, bearer, wait_until
from tests.test_connections import Client

REFUSED = "GET /nowhere"
LOOKS_LIKE_A_REQUEST = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def full_service(start_service: Callable[..., Service]) -> Iterator[Service]:
    """One that has as many requests in flight as it may, and many clients."""
    service = start_service(
        "tests.apps.crowded", WEB_CONCURRENCY="1", REQUESTS_IN_FLIGHT="10", REQUEST_SECONDS="300", BODY_SECONDS="3"
    )
    with ExitStack() as stack:
        for number in range(30):
            client = Client(service)
            stack.callback(client.socket.close)
            client.send("GET /sleep/300.0" if number < 10 else "GET /livez")
            if number >= 10:
                assert client.response()[0] == 200
        wait_until(lambda: requests.get(f"{service.url}/nowhere", timeout=WAIT_SECONDS).status_code == 503)
        yield service


def shed(service: Service) -> float:
    lines = requests.get(f"{service.url}/metrics", headers=bearer(METRICS_TOKEN), timeout=WAIT_SECONDS).text
    return sum(
        float(line.split()[-1]) for line in lines.splitlines() if line.startswith("kuaishang_http_requests_shed_")
    )


def test_a_client_that_was_refused_goes_on(full_service: Service) -> None:
    client = Client(full_service)
    with closing(client.socket):
        for request, status in (("GET /livez", 200), (REFUSED, 503), ("GET /livez", 200), (REFUSED, 503)) * 2:
            client.send(request)
            number, headers = client.response()
            assert (number, headers["connection"]) == (status, "keep-alive")


@pytest.mark.parametrize("at_once", [True, False])
def test_the_body_of_a_refused_request_is_no_request(full_service: Service, at_once: bool) -> None:
    client = Client(full_service)
    with closing(client.socket):
        body = LOOKS_LIKE_A_REQUEST
        client.send("POST /nowhere", body if at_once else b"", Content_Length=str(len(body)))
        assert client.response()[0] == 503
        if at_once:
            client.send("GET /livez")
            assert client.response()[0] == 200
        else:
            client.socket.sendall(body)
            assert client.all() == b""


def test_a_request_that_is_there_already_comes_to_the_door_too(full_service: Service) -> None:
    client = Client(full_service)
    with closing(client.socket):
        client.send("GET /livez", LOOKS_LIKE_A_REQUEST)
        assert client.response()[0] == 200
        number, headers = client.response()
        assert (number, headers["connection"]) == (503, "close")
        assert client.all() == b""


def test_clients_are_counted(full_service: Service) -> None:
    def value(name: str) -> float:
        url, headers = f"{full_service.url}/metrics", bearer(METRICS_TOKEN)
        lines = requests.get(url, headers=headers, timeout=WAIT_SECONDS).text
        return float(next(line.split()[-1] for line in lines.splitlines() if line.startswith(f"kuaishang_{name} ")))

    wait_until(lambda: 30 <= value("connections") <= 40)
    assert value("connections_limit") == 5000


def test_the_unread_body_of_a_served_request_is_no_request(full_service: Service) -> None:
    client = Client(full_service)
    with closing(client.socket):
        client.send("OPTIONS /livez", Content_Length=str(len(LOOKS_LIKE_A_REQUEST)))  # as a probe it is not refused
        number, headers = client.response()
        assert (number, headers["connection"]) == (204, "keep-alive")
        client.socket.sendall(LOOKS_LIKE_A_REQUEST)
        time.sleep(0.3)
        client.send("GET /livez")
        assert client.response()[0] == 200


def test_an_unread_body_that_does_not_come_ends_the_connection_in_time(full_service: Service) -> None:
    client = Client(full_service)
    with closing(client.socket):
        client.socket.settimeout(20)  # less than a connection may be idle for
        client.send("OPTIONS /livez", Content_Length="10")
        assert client.response()[0] == 204
        assert client.all() == b""


def test_half_a_request_that_came_with_another_one_is_not_dropped(full_service: Service) -> None:
    client = Client(full_service)
    with closing(client.socket):
        client.send("GET /livez", b"GET /livez HTTP/1.1\r\nX: ")
        assert client.response()[0] == 200
        client.socket.sendall(LOOKS_LIKE_A_REQUEST)
        assert client.response()[0] == 200  # to the second one, with a strange header
        client.send("GET /livez")
        assert client.response()[0] == 200


def test_the_end_of_a_connection_is_no_request(full_service: Service) -> None:
    before = shed(full_service)
    for _ in range(10):
        client = Client(full_service)
        client.send("GET /livez")
        assert client.response()[0] == 200
        client.socket.close()
    assert shed(full_service) == before
