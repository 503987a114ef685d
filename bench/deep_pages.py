"""Compares page 1 and page 800 of a list of 100,000 orders of one user.

Prints the median times of both, by page number and by `after`, and exits with a status other than 0 if a deep page
takes more than twice as long as the first.
"""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

from flask.testing import FlaskClient
from sqlalchemy import insert

from bench import environment
from blueprints.lists import COUNT_LIMIT
from service import create_app
from storage import database, sessions
from storage.identities import get_or_create_user
from storage.models import Order, OrderItem, now
from tests.harness import APP_ID, bearer

ORDERS, PAGE_SIZE, DEEP_PAGE = 100_000, 100, 800
ROUNDS = 60
FACTOR = 2


def fill(user_id: int) -> None:
    """Insert ORDERS orders of two items each for the user, and as many of nobody between them."""
    moment = now()
    for start in range(0, 2 * ORDERS, 10_000):
        ids = range(start + 1, start + 10_001)
        fixed = {"status": "paid", "total": 200, "created_at": moment, "updated_at": moment}
        rows = [{"id": number, "user_id": user_id if number % 2 else None, **fixed} for number in ids]
        database.session.execute(insert(Order), rows)
        line = {"sku": "sku", "name": "name", "quantity": 1, "unit_price": 100}
        database.session.execute(insert(OrderItem), [{"order_id": number, **line} for number in ids for _ in range(2)])
        database.session.commit()


def median_of(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Time the calls in turn, so that other load on the machine affects all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    with ExitStack() as stack:
        environ = stack.enter_context(environment())
        app = create_app({**environ, "LOG_LEVEL": "ERROR"})
        with app.test_request_context():
            user = get_or_create_user(APP_ID, "o-bench", None)
            fill(user.id)
            token = sessions.log_in(user.id)
        client = app.test_client(use_cookies=False)

        def reader(query: str) -> Callable[[], None]:
            return lambda: read(client, token, query)

        first_of_deep = ORDERS * 2 - 1 - 2 * (DEEP_PAGE - 1) * PAGE_SIZE
        taken = median_of(
            {
                "page=1": reader("page=1"),
                f"page={DEEP_PAGE}": reader(f"page={DEEP_PAGE}"),
                f"after=… (page {DEEP_PAGE})": reader(f"after={first_of_deep + 2}"),
            }
        )
    first = taken["page=1"]
    for name, seconds in taken.items():
        print(f"{name:24}{seconds * 1000:8.2f} ms{seconds / first:8.2f} × the first")
    if max(taken.values()) > FACTOR * first:
        sys.exit(f"a deep page takes more than {FACTOR} times as long as the first")


def read(client: FlaskClient, token: str, query: str) -> None:
    answer = client.get(f"/api/v1/orders?page_size={PAGE_SIZE}&{query}", headers=bearer(token))
    page = answer.get_json()["data"]
    if (len(page["items"]), page["total"]) != (PAGE_SIZE, COUNT_LIMIT):
        raise RuntimeError(f"unexpected page: {answer.text[:200]}")


if __name__ == "__main__":
    main()
