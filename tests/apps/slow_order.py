"""The service, halting in the middle of an order with the remark `slow`: `gunicorn tests.apps.slow_order:app`."""

import logging
import time

from storage import database
from storage.models import Order
from wsgi import app

__all__ = ["app"]

sum_up = Order.sum_up


def stop_for_a_while(order: Order) -> None:
    sum_up(order)
    if order.remark == "slow":
        database.session.add(order)
        database.session.flush()
        logging.getLogger(__name__).info("half made")
        time.sleep(20)


Order.sum_up = stop_for_a_while  # type: ignore[method-assign]
