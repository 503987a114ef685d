"""Orders on the service as in production: many at once, and a database that is killed meanwhile."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from sqlalchemy import select

from storage.database import engine_for
from storage.models import Order
from tests.blueprints.callers import ORDER
from tests.databases import Databases, MariaDB
from tests.harness import WAIT_SECONDS, Service, Simulator, bearer, migrate, until_available, wait_until

pytestmark = pytest.mark.database
StartService = Callable[..., Service]


def test_exactly_one_of_many_writers_of_a_version_wins(services: tuple[Service, Service], simulator: Simulator) -> None:
    token = services[0].log_in(simulator)
    made = services[0].call("POST", "/orders", token, json=ORDER)
    path, etag = made.headers["Location"].removeprefix("/api/v1"), made.headers["ETag"]

    def put(number: int) -> requests.Response:
        headers = {**bearer(token), "If-Match": etag}
        url = f"{services[number % 2].url}/api/v1{path}"
        body = {"remark": str(number)}
        return until_available(lambda: requests.put(url, json=body, headers=headers, timeout=WAIT_SECONDS))

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(put, range(60)))
    assert Counter(answer.status_code for answer in answers) == {200: 1, 412: 59}
    (won,) = [answer for answer in answers if answer.status_code == 200]
    assert services[1].call("GET", path, token).json()["data"] == won.json()["data"]


def test_posts_with_one_key_make_one_order_and_get_the_same_response(
    services: tuple[Service, Service], simulator: Simulator
) -> None:
    token = services[0].log_in(simulator)

    def post(number: int) -> requests.Response:
        headers = {**bearer(token), "Idempotency-Key": "tap"}
        url = f"{services[number % 2].url}/api/v1/orders"
        return until_available(lambda: requests.post(url, json=ORDER, headers=headers, timeout=WAIT_SECONDS))

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(post, range(50)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert services[1].call("GET", "/orders", token).json()["data"]["total"] == 1


def test_an_acknowledged_order_survives_a_killed_database_once(
    start_service: StartService, simulator: Simulator, own_databases: Databases
) -> None:
    url = own_databases.create()
    migrate(url)
    service = start_service(DATABASE_URL=url)
    token = service.log_in(simulator)
    asked: list[str] = []
    answered: set[str] = set()
    stop = threading.Event()

    def post(name: str) -> bool:
        headers = {**bearer(token), "Idempotency-Key": name}
        try:
            answer = requests.post(
                f"{service.url}/api/v1/orders", json={**ORDER, "remark": name}, headers=headers, timeout=WAIT_SECONDS
            )
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            return False  # also in the middle of the response
        assert answer.status_code in (201, 500, 503), answer.text
        return answer.status_code == 201

    def load(client: int) -> None:
        number = 0
        while not stop.is_set():
            name = f"{client}-{number}"
            number += 1
            asked.append(name)
            if post(name):
                answered.add(name)

    with ThreadPoolExecutor(8) as pool:
        loads = [pool.submit(load, client) for client in range(8)]
        for _ in range(2):
            by_now = len(answered)
            wait_until(lambda: len(answered) > by_now + 40)  # noqa: B023
            crash(own_databases, service)
        by_now = len(answered)
        wait_until(lambda: len(answered) > by_now + 40)
        stop.set()
        for done in loads:
            done.result()
    there = remarks(url)
    assert set(there.values()) == {1}
    assert answered <= set(there) <= set(asked)
    # Clients that got no response retry with the same key, and get one order.
    for name in set(asked) - answered:
        wait_until(lambda: post(name))  # noqa: B023
    assert remarks(url) == dict.fromkeys(asked, 1)


def crash(databases: Databases, service: Service) -> None:
    """Kill the database as a crash would: SQLite is a part of the service's processes."""
    if isinstance(databases, MariaDB):
        databases.kill()
        time.sleep(0.3)
        databases.start()
    else:
        crash_of_workers(service)


def remarks(url: str) -> Counter[str | None]:
    engine = engine_for(url)
    with engine.connect() as connection:
        found = Counter(connection.scalars(select(Order.remark)).all())
    engine.dispose()
    return found


def test_a_worker_killed_during_a_request_leaves_no_partial_order(
    start_service: StartService, simulator: Simulator, environ: dict[str, str]
) -> None:
    service = start_service("tests.apps.slow_order", WEB_CONCURRENCY="1")
    token = service.log_in(simulator)
    headers = {**bearer(token), "Idempotency-Key": "tap"}
    url = f"{service.url}/api/v1/orders"

    def post(remark: str) -> requests.Response:
        return requests.post(url, json={**ORDER, "remark": remark}, headers=headers, timeout=WAIT_SECONDS)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, "slow")
        wait_until(lambda: any(line["message"] == "order is incomplete" for line in service.log_lines()))
        crash_of_workers(service)
        with pytest.raises(requests.RequestException):
            first.result()
    assert service.call("GET", "/orders", token).json()["data"]["total"] == 0
    assert post("again").status_code == 201  # the key is free
    assert service.call("GET", "/orders", token).json()["data"]["total"] == 1


def crash_of_workers(service: Service) -> None:
    for worker in service.workers():
        worker.kill()
