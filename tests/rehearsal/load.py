"""The load of a rehearsal: so many requests a second from several clients, whatever becomes of those before."""

import asyncio
import secrets
import ssl
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from bench.load import Outcome, Pool, Request, pool
from tests.faults.load import Load, complaint, is_right
from tests.rehearsal.verdict import RESENT, Sent

if TYPE_CHECKING:
    from tests.rehearsal.stage import Stage

Address = tuple[str, int]

MIX = ("read", "order", "read", "login", "read", "order", "unkeyed order", "read")
"""The kinds of requests, in turn."""
PHONES, USERS = 6, 12
PATIENCE_SECONDS = 15
"""For a response: longer than HAProxy takes to ask a second instance after the first one has hung."""
CONNECT_SECONDS = 2
RETRY_SECONDS, PAUSE_SECONDS = 30, 0.5
"""For how long, and how often, what is RESENT is sent again, an order with its key. As the mini-program's client does,
whose user would tap on a login again."""


class Phone:
    """A client that resolves the name and keeps its connections.

    :param resolve: returns the address; raises LookupError.
    """

    def __init__(self, resolve: Callable[[], Address], tls: ssl.SSLContext) -> None:
        self._resolve, self._tls = resolve, tls
        self._pools: dict[Address, Pool] = {}

    async def send(self, request: Request) -> Outcome:
        began = time.monotonic()
        try:
            host, port = await asyncio.to_thread(self._resolve)
        except LookupError:
            return Outcome(request, "unresolved", began, time.monotonic() - began, None)
        if (host, port) not in self._pools:
            self._pools[host, port] = Pool(port, PATIENCE_SECONDS, host, self._tls, CONNECT_SECONDS)
        return await self._pools[host, port].send(request, began)

    def close(self) -> None:
        for known in self._pools.values():
            known.close()


class InTurn:
    """Sends each request by the next of several clients."""

    def __init__(self, phones: Sequence[Phone]) -> None:
        self._turn = cycle(phones)

    async def send(self, request: Request) -> Outcome:
        return await next(self._turn).send(request)


class OpenLoad(Load):
    """Requests at a constant rate, each from the next of several clients.

    :param rate: requests a second.
    """

    clients = dict.fromkeys(MIX, 1)

    def __init__(self, stage: "Stage", rate: float) -> None:
        super().__init__(stage)  # type: ignore[arg-type]  # it has what is used of a stage
        self._rate, self._phones = rate, [stage.phone() for _ in range(PHONES)]
        self.service = InTurn(self._phones)
        self.sent: list[Sent] = []
        self.complaints: list[str] = []

    async def run(self, ready: object) -> None:
        async with pool(self.stage.simulator_port, host=self.stage.simulator_host) as self.simulator:  # type: ignore[attr-defined]
            await self.sign_in(USERS)
            ready.set()  # type: ignore[attr-defined]
            began, number, running = time.monotonic(), 0, set[asyncio.Task[None]]()
            while not self.over:
                task = asyncio.create_task(self._request(number))
                running.add(task)
                task.add_done_callback(running.discard)
                number += 1
                await asyncio.sleep(max(0, began + number / self._rate - time.monotonic()))
            await asyncio.gather(*running)
            await self.look_for_sessions()
        for phone in self._phones:
            phone.close()

    async def _request(self, number: int) -> None:
        kind, token, key = MIX[number % len(MIX)], self.tokens[number % USERS], secrets.token_hex(16)
        first = outcome = await self.send(kind, token, key)
        self.outcomes.append(first)
        self.complaints += filter(None, [complaint(first)])
        end = time.monotonic() + RETRY_SECONDS
        while kind in RESENT and not is_right(outcome) and time.monotonic() < end:
            await asyncio.sleep(PAUSE_SECONDS)
            outcome = await self.send(kind, token, key)
            self.complaints += filter(None, [complaint(outcome)])
        ended = first.began + first.seconds
        self.sent.append(Sent(kind, first.began, ended, first.status, is_right(first), is_right(outcome)))
