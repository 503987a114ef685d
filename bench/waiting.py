"""2,000 logins at once on a WeChat that takes 3 s, 1,000 slow clients, and reads beside them: `make waiting`.

One worker. First come the reads alone. The slow clients send half a head, or half a body, and begin again when the
service has ended their connection. Ends with a status that is not 0 if fewer than 1,000 logins succeed, another one
has any other response than a 503 with Retry-After, the 99th percentile of the reads is more than twice the quiet one,
or a waiting login costs more than 30 KB.
"""

import argparse
import asyncio
import contextlib
import itertools
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context

import psutil

from bench import sign_in
from bench.load import Outcome, Request, encode, open_loop, pool, quantile, statuses
from bench.speed import USERS, login, read, stage
from tests.harness import bearer

WECHAT_SECONDS = 3
READS_A_SECOND = 50
QUIET_SECONDS = 10
SLOW_COME_SECONDS = 5
SERVED, FACTOR, KILOBYTES = 1000, 2, 30


async def burst(port: int, logins: int, seconds: float) -> list[Outcome]:
    """Send so many logins, spread over so many seconds, each on a connection of its own."""
    async with pool(port) as opened:

        async def send(number: int) -> Outcome:
            await asyncio.sleep(number / logins * seconds)
            return await opened.send(Request("login", login(number)))

        return await asyncio.gather(*map(send, range(logins)))


def read_at(port: int, reads: Sequence[Request], seconds: float) -> list[Outcome]:
    """Send reads at a constant rate."""
    return asyncio.run(open_loop(port, itertools.cycle(reads), READS_A_SECOND, seconds))


async def slow_client(port: int, content: bytes, pause: float, ended: list[float]) -> None:
    """Send this after a pause, and wait until the service ends the connection, again and again.

    :param ended: gets the seconds that each took.
    """
    await asyncio.sleep(pause)
    while True:
        began = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(1)
            continue
        try:
            writer.write(content)
            with contextlib.suppress(OSError):
                await reader.read()
            ended.append(time.monotonic() - began)
        finally:
            writer.transport.abort()
        await asyncio.sleep(1)  # slow, not many


def slow_clients(port: int, token: str, count: int, ended: list[float]) -> list[asyncio.Task[None]]:
    """Start so many slow clients within SLOW_COME_SECONDS: half of them send half a head, the others half a body."""
    head = encode("GET", "/api/v1/users/me")[:-20]
    body = encode("POST", "/api/v1/orders", {"remark": "x" * 100}, bearer(token))[:-50]
    pauses = [SLOW_COME_SECONDS * number / count for number in range(count)]
    return [
        asyncio.ensure_future(slow_client(port, (head, body)[number % 2], pause, ended))
        for number, pause in enumerate(pauses)
    ]


async def both(
    port: int,
    worker: psutil.Process,
    reader: Executor,
    reads: Sequence[Request],
    logins: int,
    seconds: float,
    slow: int,
    token: str,
) -> tuple[list[Outcome], list[Outcome], int, list[float]]:
    """Send logins, and reads until all of those have a response, while there are slow clients.

    :param reader: sends the reads from a process of its own: its own delays by the logins it must not measure.
    :returns: the outcomes of the logins and of the reads, the most memory of the worker beside the slow clients', and
        the seconds after which slow clients were ended.
    """
    ended: list[float] = []
    slow_ones = slow_clients(port, token, slow, ended)
    await asyncio.sleep(SLOW_COME_SECONDS + 0.5)
    peak = held = worker.memory_info().rss

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, worker.memory_info().rss)
            await asyncio.sleep(0.1)

    watching = asyncio.ensure_future(watch())
    reading = reader.submit(read_at, port, reads, seconds + WECHAT_SECONDS + 2)
    outcomes = await burst(port, logins, seconds)
    beside = await asyncio.wrap_future(reading)
    for task in (watching, *slow_ones):
        task.cancel()
    await asyncio.gather(watching, *slow_ones, return_exceptions=True)
    return outcomes, beside, peak - held, ended


def main() -> None:
    options = argparse.ArgumentParser(description="Logins that wait for WeChat.")
    options.add_argument("--logins", type=int, default=2000)
    options.add_argument("--seconds", type=float, default=0, help="in which they come")
    options.add_argument("--slow", type=int, default=1000, help="slow clients")
    options = options.parse_args()
    with stage(WECHAT_SECONDS) as servers, ProcessPoolExecutor(1, get_context("spawn")) as reader:
        tokens = sign_in(servers.environ, USERS)
        service = servers.service()
        port, (worker,) = int(service.environ["PORT"]), service.workers()
        reads = [Request("read", read(token)) for token in tokens]
        reader.submit(read_at, port, reads, 2).result()
        asyncio.run(burst(port, 50, 1))  # whatever a first login loads
        quiet = reader.submit(read_at, port, reads, QUIET_SECONDS).result()
        before, began = worker.memory_info().rss, time.monotonic()
        load = both(port, worker, reader, reads, options.logins, options.seconds, options.slow, tokens[0])
        logins, beside, grown, ended = asyncio.run(load)
        taken = max(outcome.began + outcome.seconds for outcome in logins) - began
    served = [outcome for outcome in logins if outcome.status == 200]
    refused = [outcome for outcome in logins if outcome.status == 503]
    events = [(one.began, 1) for one in logins] + [(one.began + one.seconds, -1) for one in logins]
    waiting = max(itertools.accumulate(change for _, change in sorted(events)))  # at the door or for WeChat
    kilobytes = grown / 1024 / waiting
    ratio = quantile(beside, 0.99) / quantile(quiet, 0.99)
    print(f"logins: {statuses(logins)} in {taken:.1f} s")
    for name, outcomes in (("served", served), ("refused", refused)):
        if len(outcomes) > 1:
            print(f"  {name}: p50 {quantile(outcomes, 0.5):.3f} s, p99 {quantile(outcomes, 0.99):.3f} s")
    print(f"reads: quiet {statuses(quiet)}, p50 {quantile(quiet, 0.5) * 1000:.1f} ms, ", end="")
    print(f"p99 {quantile(quiet, 0.99) * 1000:.1f} ms; beside the logins {statuses(beside)}, ", end="")
    print(f"p50 {quantile(beside, 0.5) * 1000:.1f} ms, p99 {quantile(beside, 0.99) * 1000:.1f} ms: {ratio:.2f} ×")
    print(f"memory: {before / 1e6:.1f} MB before, {grown / 1e6:.1f} MB more: {kilobytes:.1f} KB a login, of {waiting}")
    if ended:
        print(f"slow clients ended: {len(ended)}, after {min(ended):.1f} to {max(ended):.1f} s")
    hinted = all(outcome.answer and b"Retry-After" in outcome.answer.head for outcome in refused)
    if len(served) < SERVED or len(served) + len(refused) < len(logins) or not hinted:
        sys.exit("too few logins, or one without a proper response")
    if ratio > FACTOR or kilobytes > KILOBYTES:
        sys.exit("those that wait cost too much")


if __name__ == "__main__":
    main()
