"""What clients may send, and what must become of it: a refusal, and no harm to others."""

import json
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, repeat
from typing import Any, NamedTuple

from tests.faults.experiment import Row
from tests.faults.load import ITEM, Load, is_right, load
from tests.faults.stage import SLOW_CLIENT_SECONDS, Stage

AT_ONCE = 20
SETTLE_SECONDS = 0.3
PATIENCE_SECONDS = SLOW_CLIENT_SECONDS + 15
ENDED = "ended"
"""The connection was closed without a response."""


class Client(NamedTuple):
    """Something that a client sends.

    :param parts: what it sends, given a token.
    :param expected: the statuses with which it may be answered; ENDED for a connection that is closed without one.
    """

    name: str
    parts: Callable[[str], Iterable[bytes]]
    expected: tuple[int | str, ...] = (400,)


def head(method: str, path: str, *lines: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def order(body: bytes) -> Callable[[str], Iterable[bytes]]:
    """Send this as the body of an order."""
    length = f"Content-Length: {len(body)}"
    return lambda token: [head("POST", "/api/v1/orders", f"Authorization: Bearer {token}", length), body]


def item(**different: Any) -> bytes:
    return json.dumps({"items": [{**ITEM, **different}]}).encode()


def sends(*parts: bytes) -> Callable[[str], Iterable[bytes]]:
    return lambda token: parts


def smuggled(*lines: str, body: str) -> Callable[[str], Iterable[bytes]]:
    """Send a second request in a place where only one of two servers would see it."""
    return sends(head("POST", "/api/v1/auth/wechat", *lines) + body.format(inner="GET /livez HTTP/1.1").encode())


def million_headers(token: str) -> Iterator[bytes]:
    yield b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
    for number in range(0, 1_000_000, 1000):
        yield b"".join(b"X-%d: 1\r\n" % (number + one) for one in range(1000))


def gigabyte(*lines: str) -> Callable[[str], Iterable[bytes]]:
    chunked = any("chunked" in line for line in lines)
    part = (b"10000\r\n" + b" " * 65536 + b"\r\n") if chunked else b" " * 65536
    return lambda token: chain([head("POST", "/api/v1/auth/wechat", *lines)], repeat(part, 1 << 14))


INNER = "0\r\n\r\n{inner}\r\nHost: x\r\n\r\n"
CLIENTS = [
    Client("half a head", sends(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Half: "), (ENDED, 408)),
    Client("half a body", lambda token: list(order(item() + b" " * 100)(token))[:1], (ENDED, 400, 408)),
    Client("a million headers", million_headers, (ENDED, 400, 431)),
    Client("a body of 1 GB", gigabyte(f"Content-Length: {1 << 30}"), (413,)),
    Client("a body of 1 GB in chunks", gigabyte("Transfer-Encoding: chunked"), (413,)),
    Client("deep JSON", order(b"[" * 4000)),
    Client("deep JSON in an object", order(b'{"items":' * 800)),
    Client("invalid UTF-8", order(b'{"remark":"\xff\xfe"}')),
    Client("a key twice", order(b'{"items":[],"items":[]}')),
    Client("NaN", order(item(unit_price=float("nan")))),
    Client("Infinity", order(item(unit_price=float("inf")))),
    Client("a huge integer", order(item(unit_price=0).replace(b'"unit_price": 0', b'"unit_price": ' + b"9" * 5000))),
    Client("a huge exponent", order(item(unit_price=0).replace(b'"unit_price": 0', b'"unit_price": 1e999999'))),
    Client("NUL in a text", order(item(name="\0"))),
    Client("NUL in a path", sends(head("GET", "/api/v1/users/%00")), (400, 401, 404)),
    Client("NUL in a header", sends(head("GET", "/livez", "X-Nul: a\0b"))),
    Client(
        "smuggling: CL.TE",
        smuggled("Content-Length: 48", "Transfer-Encoding: chunked", body=INNER),
    ),
    Client(
        "smuggling: TE.CL",
        smuggled("Transfer-Encoding: chunked", "Content-Length: 3", body="20\r\n{inner}\r\n0\r\n\r\n"),
    ),
    Client(
        "smuggling: an unknown transfer coding",
        smuggled("Transfer-Encoding: xchunked", "Content-Length: 3", body=INNER),
        (400, 501),
    ),
    Client("smuggling: two lengths", smuggled("Content-Length: 3", "Content-Length: 48", body=INNER)),
    Client("smuggling: a list of lengths", smuggled("Content-Length: 3, 48", body=INNER)),
    Client("smuggling: a folded header", smuggled("X-Folded: a", " b", "Content-Length: 0", body="{inner}\r\n\r\n")),
    Client("smuggling: a space before the colon", smuggled("Transfer-Encoding : chunked", body=INNER)),
    Client("smuggling: a length with a sign", smuggled("Content-Length: +3", body=INNER)),
]


def send(port: int, client: Client, token: str) -> tuple[int | str, bytes]:
    """Send it, and return the status of the response, or ENDED, or what happened; and all that came."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as connection:
        with suppress(ConnectionError):  # the response may be there all the same
            for part in client.parts(token):
                connection.sendall(part)
        end = time.monotonic() + PATIENCE_SECONDS
        try:
            while not _complete(received) and time.monotonic() < end:
                data = connection.recv(65536)
                received += data
                if not data:
                    break
        except ConnectionError:
            pass
        except TimeoutError:
            return "hung", received
    found = re.match(rb"HTTP/1\.1 (\d{3}) ", received)
    return int(found[1]) if found else ENDED, received


def _complete(received: bytes) -> bool:
    header, complete, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)", header, re.IGNORECASE)
    # What closes the connection is read to its end: there may be a second response.
    return bool(complete and length and len(body) >= int(length[1]) and b"onnection: close" not in header)


def run(stage: Stage, clients: Iterable[Client] = CLIENTS) -> list[Row]:
    """Let clients send what they must not, many at once, beside the load; return a row for each kind."""
    rows: list[Row] = []
    stage.serve()
    with load(stage) as running:
        running.recovered(time.monotonic())
        rows += [_misbehave(stage, running, client) for client in clients]
    lost, doubled = running.count_orders()
    for row in rows:
        row.lost, row.doubled = lost + running.missing_sessions, doubled
        row.problems += ["lost or doubled"] if row.lost or row.doubled else []
    return rows


def _misbehave(stage: Stage, running: Load, client: Client) -> Row:
    assert stage.service
    row, began, port = Row(f"client: {client.name}"), time.monotonic(), int(stage.service.environ["PORT"])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        many = 2 if "GB" in client.name or "million" in client.name else AT_ONCE
        answers = list(pool.map(lambda _: send(port, client, running.tokens[0]), range(many)))
    healed = time.monotonic()
    row.recovery = running.recovered(healed, SETTLE_SECONDS)
    row.answers = dict(Counter(status for status, _ in answers))
    if set(row.answers) - set(client.expected):
        row.problems.append(f"expected only {client.expected}")
    if any(content.count(b"HTTP/1.1 ") > 1 for _, content in answers):
        row.problems.append("a second request was seen")
    beside = [outcome for outcome in running.since(began) if not is_right(outcome)]
    if len(beside) > 2:
        row.problems.append(f"beside it: {dict(Counter(f'{one.request.kind}: {one.status}' for one in beside))}")
    return row
