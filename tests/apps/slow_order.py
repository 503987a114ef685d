"""The service, pausing before an order with the remark `slow` is complete: `gunicorn tests.apps.slow_order:app`."""

import logging
import time

from storage import database
from storage.models import Order
from wsgi import app

__all__ = ["app"]

sum_up = Order.sum_up


def sum_up_slowly(order: Order) -> None:
    sum_up(order)
    if order.remark == "slow":
        database.session.add(order)
        database.session.flush()
        logging.getLogger(__name__).info("order is incomplete")
        time.sleep(20)


Order.sum_up = sum_up_slowly  # type: ignore[method-assign]
