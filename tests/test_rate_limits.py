"""Two instances of the service share its limits."""

import time
from collections import Counter
from collections.abc import Callable

import requests

from tests.harness import WAIT_SECONDS, Service, Simulator

WORKERS, SHARE, LATE = 4, 2, 20
"""A process settles after so many requests; while Redis and the machine are busy, some more may be served."""


def test_two_instances_allow_so_many_requests_together(
    start_service: Callable[..., Service], simulator: Simulator
) -> None:
    services = [start_service(SESSION_RATE="100/day", LOGIN_RATE="60/day", APP_LOGIN_RATE="1000/day") for _ in range(2)]
    token = services[0].log_in(simulator)

    def log_in(service: Service) -> requests.Response:
        return requests.post(f"{service.url}/api/v1/auth/wechat", json={"code": ""}, timeout=WAIT_SECONDS)

    def statuses(send: Callable[[Service], requests.Response], times: int) -> Counter[int]:
        found = Counter[int]()
        for number in range(times):
            found[send(services[number % 2]).status_code] += 1
            time.sleep(0.02)
        return found

    reads = statuses(lambda service: service.read_me(token), 150)
    assert set(reads) == {200, 429}
    assert 100 <= reads[200] <= 100 + WORKERS * SHARE + LATE
    logins = statuses(log_in, 100)  # one more has been before
    assert 59 <= logins[400] <= 59 + WORKERS * SHARE + LATE
