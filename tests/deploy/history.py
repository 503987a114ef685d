"""The load of tests/faults, with more writes, and a verdict on its history: what is lost, doubled, stale, overwritten.

Each write names itself, and is looked for afterwards: an order by its remark, an item by its sku.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from sqlalchemy import func, select

from bench.load import Outcome, Request, encode
from storage.database import engine_for
from storage.models import Order, OrderItem
from tests.faults.load import ITEM, Load, in_background, is_right
from tests.faults.stage import Stage
from tests.harness import bearer

ITEMS_OF_AN_ORDER = 80
"""After so many, items go into a new order; the service takes 100."""


class Verdict(NamedTuple):
    """What became of the writes.

    :param lost: that were acknowledged, and are not there.
    :param doubled: that are there more than once, acknowledged or not.
    :param stale: that were acknowledged, and the next read of the same client did not find.
    :param overwritten: orders whose total or version does not count all of their items.
    """

    lost: int
    doubled: int
    stale: int
    overwritten: int


SOUND = Verdict(0, 0, 0, 0)


class History(Load):
    """Beside keyed orders, which are sent until they are acknowledged: orders without a key, which are sent once,
    whatever the response; and items that several clients add to one order.
    """

    clients = {"read": 2, "login": 1, "order": 3, "once": 2, "item": 2}  # noqa: RUF012
    keyed = ("order", "item")

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.stale = 0
        self._shared, self._room = 0, 0
        """The order that gets items, and for how many more."""
        self._order_of: dict[str, int] = {}

    async def send(self, kind: str, token: str, key: str) -> Outcome:
        if kind == "item":
            return await self.add_item(self.tokens[0], key)
        if kind not in ("order", "once"):
            return await super().send(kind, token, key)
        outcome = await self.order(token, key, kind)
        if is_right(outcome):
            made = self._id(outcome)
            seen = await self.service.send(
                Request("read", encode("GET", f"/api/v1/orders/{made}", headers=bearer(token)))
            )
            self.stale += seen.status == 404
        return outcome

    async def add_item(self, token: str, key: str) -> Outcome:
        """Add an item to the order that others add to; again to the same one, as a key belongs to one request."""
        if key not in self._order_of:
            if not self._room:
                made = await self.order(token, f"shared-{key}")
                if not is_right(made):
                    return made._replace(request=made.request._replace(kind="item"))
                self._shared, self._room = self._id(made), ITEMS_OF_AN_ORDER
            self._room -= 1
            self._order_of[key] = self._shared
        self.asked.add(key)
        headers = {**bearer(token), "Idempotency-Key": key}
        content = encode("POST", f"/api/v1/orders/{self._order_of[key]}/items", {**ITEM, "sku": key}, headers)
        outcome = await self.service.send(Request("item", content, key))
        if is_right(outcome):
            self.acknowledged.add(key)
        return outcome

    @staticmethod
    def _id(outcome: Outcome) -> int:
        assert outcome.answer
        return int(json.loads(outcome.answer.body)["data"]["id"])

    def verdict(self, url: str = "") -> Verdict:
        """Look at all that was acknowledged until now.

        :param url: of the database, by default the service's.
        """
        acknowledged, asked = set(self.acknowledged), set(self.asked)
        engine = engine_for(url or self.stage.database_url)
        sums = func.count().label("items"), func.sum(OrderItem.quantity * OrderItem.unit_price).label("total")
        made_of = select(OrderItem.order_id, *sums).group_by(OrderItem.order_id).subquery()
        # An order begins with one item and version 1; each item adds to both.
        wrong = (made_of.c.total != Order.total) | (made_of.c["items"] != Order.version)
        orders = select(func.count()).select_from(Order).join(made_of, made_of.c.order_id == Order.id).where(wrong)
        with engine.connect() as connection:
            found = Counter(connection.scalars(select(Order.remark)).all())
            found.update(connection.scalars(select(OrderItem.sku).where(OrderItem.sku != ITEM["sku"])).all())
            overwritten = connection.scalar(orders) or 0
        engine.dispose()
        lost, doubled = len(acknowledged - set(found)), sum(found[key] > 1 for key in asked)
        return Verdict(lost, doubled, self.stale, overwritten)


@contextmanager
def history(stage: Stage, **clients: int) -> Iterator[History]:
    """Load the service until the end of the block; everything that has a key is acknowledged then.

    :param clients: how many there are of each kind, if not the usual ones.
    """
    running = History(stage)
    running.clients = clients or running.clients
    with in_background(running):
        yield running
