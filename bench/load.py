"""Load over HTTP from one process: a closed loop, or a constant rate whatever the responses do."""

import asyncio
import gc
import itertools
import json
import re
import ssl
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
HUNG, UNREACHED = "hung", "unreached"


class Request(NamedTuple):
    kind: str
    content: bytes
    key: str = ""
    """Tells this request from others."""


class Answer(NamedTuple):
    status: int
    head: bytes
    body: bytes


class Outcome(NamedTuple):
    """What became of a request.

    :param status: of the response, or what happened instead of one: HUNG, UNREACHED, or an exception's name.
    :param began: when it was sent, or was due to be sent, by the monotonic clock.
    :param seconds: from then until the response was complete.
    """

    request: Request
    status: int | str
    began: float
    seconds: float
    answer: Answer | None


def encode(
    method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, host: str = "localhost"
) -> bytes:
    """Return a request as it is sent."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *(f"{k}: {v}" for k, v in (headers or {}).items())]
    content = b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
    return "\r\n".join([*lines, "", ""]).encode() + content


class Connection(asyncio.Protocol):
    """A connection that is kept, for one request after the other. The responses need a Content-Length."""

    def __init__(self) -> None:
        self.usable = True
        self._received = b""
        self._waiting: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, complete, body = self._received.partition(b"\r\n\r\n")
        if not complete:
            return
        status, length = int(head[9:12]), LENGTH.search(head)
        if len(body) >= (int(length[1]) if length and status != 304 else 0):
            self._received = b""
            if b"onnection: close" in head:
                self.usable = False
            if self._waiting and not self._waiting.done():
                self._waiting.set_result(Answer(status, head, body))

    def connection_lost(self, error: Exception | None) -> None:
        self.usable = False
        if self._waiting and not self._waiting.done():
            self._waiting.set_exception(error or ConnectionResetError())

    async def ask(self, content: bytes) -> Answer:
        """Send a request and return the response.

        :raises ConnectionError: if the connection ends before that.
        """
        self._waiting = asyncio.get_running_loop().create_future()
        self.transport.write(content)
        return await self._waiting


class Pool:
    """Connections to one server, used by one request at a time.

    :param seconds: how long a response may take.
    :param tls: with which it is encrypted.
    :param connect_seconds: how long a connection may take; then the request is UNREACHED.
    """

    def __init__(
        self,
        port: int,
        seconds: float = 30,
        host: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
        connect_seconds: float | None = None,
    ) -> None:
        self.port, self.seconds, self.host, self.tls = port, seconds, host, tls
        self.connect_seconds = connect_seconds
        self.idle: list[Connection] = []

    async def send(self, request: Request, due: float = 0) -> Outcome:
        """Send a request on an idle connection, or a new one.

        :param due: when it should have been sent, if that is not now.
        """
        began = due or time.monotonic()
        connection = None
        answer: Answer | None = None
        status: int | str
        try:
            async with asyncio.timeout(self.seconds):
                while self.idle and not (connection and connection.usable):
                    connection = self.idle.pop()
                if not (connection and connection.usable):
                    connection = None
                    loop = asyncio.get_running_loop()
                    async with asyncio.timeout(self.connect_seconds):
                        _, connection = await loop.create_connection(Connection, self.host, self.port, ssl=self.tls)
                answer = await connection.ask(request.content)
            status = answer.status
        except TimeoutError:
            status = HUNG if connection or self.connect_seconds is None else UNREACHED
        except OSError as error:
            status = type(error).__name__
        if connection and connection.usable and answer:
            self.idle.append(connection)
        elif connection:
            connection.transport.abort()
        return Outcome(request, status, began, time.monotonic() - began, answer)

    def close(self) -> None:
        for connection in self.idle:
            connection.transport.abort()


@asynccontextmanager
async def pool(
    port: int, seconds: float = 30, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Pool]:
    opened = Pool(port, seconds, host, tls)
    try:
        yield opened
    finally:
        opened.close()


async def closed_loop(
    port: int, requests: Iterable[Request], connections: int, seconds: float, patience: float = 30
) -> list[Outcome]:
    """Send the next request as soon as a connection has its response, for so long."""
    requests, outcomes, end = iter(requests), [], time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end:
            outcome = await opened.send(next(requests))
            outcomes.append(outcome._replace(answer=None))
            if isinstance(outcome.status, str):
                await asyncio.sleep(0.01)

    async with pool(port, patience) as opened:
        await asyncio.gather(*(client() for _ in range(connections)))
    return outcomes


async def open_loop(
    port: int, requests: Iterable[Request], rate: float, seconds: float, patience: float = 30
) -> list[Outcome]:
    """Send so many requests each second, whatever becomes of those before."""
    gc.disable()  # its pauses, longer with each outcome that is kept, would count as the server's
    outcomes, running, began = [], set(), time.monotonic()

    async def send(request: Request, due: float) -> None:
        outcomes.append((await opened.send(request, due))._replace(answer=None))

    async with pool(port, patience) as opened:
        for number, request in enumerate(itertools.islice(requests, int(rate * seconds))):
            due = began + number / rate
            if due > time.monotonic():
                await asyncio.sleep(due - time.monotonic())
            elif number % 64 == 0:
                await asyncio.sleep(0)
            task = asyncio.ensure_future(send(request, due))
            running.add(task)
            task.add_done_callback(running.discard)
        if running:
            await asyncio.wait(running)
    gc.enable()
    return outcomes


def quantile(outcomes: Collection[Outcome], part: float) -> float:
    """Return the seconds within which this part of the responses came."""
    return statistics.quantiles([outcome.seconds for outcome in outcomes], n=1000)[round(part * 1000) - 1]


def statuses(outcomes: Iterable[Outcome]) -> dict[int | str, int]:
    """Return the number of responses by status."""
    return dict(sorted(Counter(outcome.status for outcome in outcomes).items(), key=str))


def endless(make: Callable[[int], Request]) -> Iterable[Request]:
    """Return requests without end, each made from its number."""
    return map(make, itertools.count())
