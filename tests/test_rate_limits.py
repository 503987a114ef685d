"""Two instances of the service share its limits."""

from collections import Counter
from collections.abc import Callable

import requests
from redis import Redis

from tests.harness import WAIT_SECONDS, Service, Simulator, wait_until

WORKERS, SHARE = 4, 2
"""A process settles after so many requests. Each may exceed a limit by those, and by one that comes before it knows."""


def test_two_instances_allow_so_many_requests_together(
    start_service: Callable[..., Service], simulator: Simulator, redis: Redis
) -> None:
    services = [start_service(SESSION_RATE="100/day", LOGIN_RATE="60/day", APP_LOGIN_RATE="1000/day") for _ in range(2)]
    token = services[0].log_in(simulator)

    def log_in(service: Service) -> requests.Response:
        return requests.post(f"{service.url}/api/v1/auth/wechat", json={"code": ""}, timeout=WAIT_SECONDS)

    def settled(limit: str) -> int:
        return sum(int(count) for key in redis.keys(f"rate:{limit}:*") for count in redis.hvals(key))

    def statuses(limit: str, send: Callable[[Service], requests.Response], times: int) -> Counter[int]:
        found = Counter[int]()
        for number in range(times):
            found[(response := send(services[number % 2])).status_code] += 1
            if response.status_code != 429:
                wait_until(lambda: settled(limit) >= found.total() - found[429] - WORKERS * (SHARE - 1))
        return found

    reads = statuses("session", lambda service: service.read_me(token), 150)
    assert set(reads) == {200, 429}
    assert 100 <= reads[200] <= 100 + WORKERS * (SHARE + 1)
    logins = statuses("address", log_in, 100)  # one more has been before
    assert 59 <= logins[400] <= 59 + WORKERS * (SHARE + 1)
