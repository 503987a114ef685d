"""The load that runs while a fault happens, and the record of what was acknowledged."""

import asyncio
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager
from itertools import count
from typing import Any, Protocol

from sqlalchemy import select

from bench.load import HUNG, Outcome, Pool, Request, encode, pool
from storage.database import engine_for
from storage.models import Order
from tests.faults.stage import REQUEST_SECONDS, Stage
from tests.harness import bearer

RIGHT = {"read": 200, "login": 200, "order": 201, "once": 201, "unkeyed order": 201, "item": 201}
TEMPORARY = (429, 502, 503, 504)
CODE_USED = 461
"""What a login is told whose code WeChat has taken, in a response that was lost."""
CLIENTS = {"read": 3, "login": 2, "order": 3}
PAUSE_SECONDS = 0.03
PATIENCE_SECONDS = REQUEST_SECONDS + 4
"""A response that takes longer than its deadline and a busy machine together counts as hung."""
SETTLE_SECONDS, RECOVERY_SECONDS = 1, 30
ITEM = {"sku": "tea", "name": "茶", "quantity": 1, "unit_price": 100}


def is_right(outcome: Outcome) -> bool:
    return outcome.status == RIGHT[outcome.request.kind]


def complaint(outcome: Outcome) -> str | None:
    """Return what is wrong with a response, whatever fault there is; None for one that says to try again later."""
    if outcome.answer is None or outcome.status == HUNG:
        return None  # no response, which some faults excuse
    kind, status = outcome.request.kind, outcome.status
    try:
        body = json.loads(outcome.answer.body)
    except ValueError:
        return f"{kind}: {status} is not JSON"
    if set(body) != {"code", "message", "data"}:
        return f"{kind}: {status} is not the envelope"
    if kind == "login" and body["code"] == CODE_USED:
        return None
    if not is_right(outcome) and status not in TEMPORARY:
        return f"{kind}: {status}"
    if status in (429, 503) and b"retry-after:" not in outcome.answer.head.lower():
        return f"{kind}: {status} without Retry-After"
    return None


class Sender(Protocol):
    """Sends a request to the service."""

    async def send(self, request: Request) -> Outcome: ...


class Load:
    """Users who read, log in, and order. An order that was not acknowledged is sent again, with its key."""

    clients = CLIENTS
    """How many there are of each kind."""
    keyed: tuple[str, ...] = ("order",)
    """The kinds that are sent again until they are acknowledged."""
    service: Sender
    simulator: Pool
    over = False
    items = (ITEM,)
    """Of each order."""
    missing_sessions = 0
    """Logins that were acknowledged, and whose session is no more at the end."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.tokens: list[str] = []
        self.outcomes: list[Outcome] = []
        self.asked: set[str] = set()
        self.acknowledged: set[str] = set()
        self.issued: list[str] = []
        self._numbers = count()

    def connections(self) -> AbstractAsyncContextManager[Pool]:
        """Open those to the service."""
        assert self.stage.service
        return pool(int(self.stage.service.environ["PORT"]), PATIENCE_SECONDS)

    async def log_in(self) -> Outcome:
        number = next(self._numbers)
        made = await self.simulator.send(
            Request("code", encode("POST", "/simulator/codes", {"openid": f"o-fault-{number % 20}"}))
        )
        assert made.answer, made
        code = json.loads(made.answer.body)["code"]
        outcome = await self.service.send(Request("login", encode("POST", "/api/v1/auth/wechat", {"code": code})))
        if is_right(outcome):
            self.issued.append(json.loads(outcome.answer.body)["data"]["token"])  # type: ignore[union-attr]
        return outcome

    async def read(self, token: str) -> Outcome:
        return await self.service.send(Request("read", encode("GET", "/api/v1/users/me", headers=bearer(token))))

    async def order(self, token: str, key: str, kind: str = "order") -> Outcome:
        self.asked.add(key)
        headers = bearer(token) | ({"Idempotency-Key": key} if kind in self.keyed else {})
        content = encode("POST", "/api/v1/orders", {"items": self.items, "remark": key}, headers)
        outcome = await self.service.send(Request(kind, content, key))
        if is_right(outcome):
            self.acknowledged.add(key)
        return outcome

    async def client(self, kind: str, number: int) -> None:
        token, pending = self.tokens[number % len(self.tokens)], list[str]()
        while not self.over:
            key = pending.pop(0) if len(pending) > 3 else secrets.token_hex(16)
            outcome = await self.send(kind, token, key)
            if kind in self.keyed and not is_right(outcome):
                pending.append(key)
            self.outcomes.append(outcome)
            await asyncio.sleep(PAUSE_SECONDS)
        for key in pending:
            await self.settle(kind, token, key)

    async def send(self, kind: str, token: str, key: str) -> Outcome:
        if kind == "login":
            return await self.log_in()
        return await (self.read(token) if kind == "read" else self.order(token, key, kind))

    async def settle(self, kind: str, token: str, key: str) -> None:
        """Send what has a key until it is acknowledged."""
        end = time.monotonic() + RECOVERY_SECONDS
        while not is_right(outcome := await self.send(kind, token, key)):
            if time.monotonic() > end:
                raise AssertionError(f"{kind} {key}: {outcome.status}")
            await asyncio.sleep(0.2)

    async def has_session(self, token: str) -> bool:
        """Ask until the response is not one that says to try again later."""
        end = time.monotonic() + RECOVERY_SECONDS
        while (outcome := await self.read(token)).status in TEMPORARY and time.monotonic() < end:
            await asyncio.sleep(0.2)
        return is_right(outcome)

    def since(self, moment: float) -> list[Outcome]:
        """Return what was sent since then."""
        return [outcome for outcome in list(self.outcomes) if outcome.began >= moment]

    def recovered(self, since: float, settle: float = SETTLE_SECONDS) -> float | None:
        """Wait until all kinds of requests have been right for so many seconds.

        :returns: the seconds from then until the last one that was not, or None if it does not recover in time.
        """
        while time.monotonic() < since + RECOVERY_SECONDS:
            time.sleep(0.1)
            last = max((one.began + one.seconds for one in list(self.outcomes) if not is_right(one)), default=since)
            last = max(last, since)
            kinds = Counter(outcome.request.kind for outcome in self.since(last) if is_right(outcome))
            if time.monotonic() > last + settle and set(kinds) == set(self.clients):
                return last - since
        return None

    def count_orders(self, url: str | None = None) -> tuple[int, int]:
        """Return how many acknowledged orders are missing, and how many exist more than once.

        :param url: of the database; by default the stage's.
        """
        engine = engine_for(url or self.stage.database_url)
        with engine.connect() as connection:
            found = Counter(connection.scalars(select(Order.remark)).all())
        engine.dispose()
        return len(self.acknowledged - set(found)), sum(found[key] > 1 for key in self.asked)

    async def run(self, ready: threading.Event) -> None:
        """Send requests until it is over, then what was not acknowledged until it is, and ask for all sessions."""
        async with self.connections() as self.service, pool(self.stage.simulator_port) as self.simulator:
            await self.sign_in(max(self.clients.values()))
            ready.set()
            clients = [self.client(kind, number) for kind, many in self.clients.items() for number in range(many)]
            await asyncio.gather(*clients)
            await self.look_for_sessions()

    async def sign_in(self, users: int) -> None:
        """Get the tokens of so many users who read and order."""
        # With patience: a worker that made no call since the last fault pauses its calls for some seconds more.
        end = time.monotonic() + RECOVERY_SECONDS
        while len(self.issued) < users:
            outcome = await self.log_in()
            assert is_right(outcome) or (complaint(outcome) is None and time.monotonic() < end), outcome
        self.tokens = list(self.issued)

    async def look_for_sessions(self) -> None:
        """Count the logins that were acknowledged, and whose session is no more."""
        found: list[bool] = []
        for start in range(0, len(self.issued), 16):
            found += await asyncio.gather(*map(self.has_session, self.issued[start : start + 16]))
        self.missing_sessions = found.count(False)


@contextmanager
def load(stage: Stage, items: Sequence[dict[str, Any]] = Load.items) -> Iterator[Load]:
    """Load the service until the end of the block, with orders of these items."""
    running = Load(stage)
    running.items = tuple(items)
    with in_background(running):
        yield running


@contextmanager
def in_background(running: Load) -> Iterator[None]:
    """Let a load run until the end of the block.

    In a thread of its own, as what the block starts in the main thread would end with another one.
    """
    ready = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        done = executor.submit(asyncio.run, running.run(ready))
        while not ready.wait(0.1):
            if done.done():
                done.result()
        try:
            yield
        finally:
            running.over = True
        done.result()


def codes(outcomes: Iterable[Outcome]) -> dict[Any, int]:
    """Return the number of responses by business code, and of requests without any by what happened."""
    return dict(Counter(_code(outcome) for outcome in outcomes).most_common())


def _code(outcome: Outcome) -> Any:
    try:
        return json.loads(outcome.answer.body)["code"]  # type: ignore[union-attr]
    except (ValueError, KeyError, AttributeError, TypeError):
        return outcome.status
