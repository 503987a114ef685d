"""Two instances of the service share its limits."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import requests

from tests.harness import WAIT_SECONDS, Service, Simulator

AMOUNT, SHARE, WORKERS, CALLERS = 200, 4, 4, 8


def test_two_instances_allow_so_many_requests_together(
    start_service: Callable[..., Service], simulator: Simulator
) -> None:
    services = [
        start_service(SESSION_RATE=f"{AMOUNT}/day", LOGIN_RATE="30/day", APP_LOGIN_RATE="1000/day") for _ in range(2)
    ]
    token = services[0].log_in(simulator)
    with ThreadPoolExecutor(CALLERS) as pool:
        answers = list(pool.map(lambda number: services[number % 2].read_me(token), range(3 * AMOUNT)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    # Each process may exceed it by its share, and each caller by what one process serves until it has settled.
    assert AMOUNT <= statuses[200] <= AMOUNT + WORKERS * SHARE + 2 * CALLERS

    def log_in(number: int) -> int:
        url = f"{services[number % 2].url}/api/v1/auth/wechat"
        return requests.post(url, json={"code": ""}, timeout=WAIT_SECONDS).status_code

    with ThreadPoolExecutor(CALLERS) as pool:
        statuses = Counter(pool.map(log_in, range(120)))
    assert 29 <= statuses[400] <= 29 + WORKERS * 2 + 2 * CALLERS
