"""Ten minutes of mixed load, and whether anything grows: `make soak`.

Logins, orders, reads, lists and strangers come at half of the saturated peak. After a warm-up of a tenth of the time,
and then ten times until the end, it prints each worker's memory, descriptors and threads, and the number of files in
the directory of the metrics. Ends with a status that is not 0 if one of them has grown from the first to the last, or
if more than one request in a thousand has failed.
"""

import argparse
import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path
from typing import NamedTuple

from bench import sign_in
from bench.load import Request, closed_loop, encode, open_loop, quantile, statuses
from bench.overload import served
from bench.speed import USERS, login, order, read, stage
from tests.harness import Service, bearer

ROUND = ("login", "order", "order", "list", "stranger", "stranger", *("read",) * 10)
MEGABYTES, DESCRIPTORS = 8, 8
"""What may come and go: buffers that are in use at the moment, connections that are being replaced."""


class Usage(NamedTuple):
    megabytes: float
    descriptors: int
    threads: int
    files: int


def usage(service: Service) -> Usage:
    """Return what the workers of an instance use together."""
    workers = service.workers()
    files = list(Path("/dev/shm").glob(f"kuaishang-*:{service.environ['PORT']}-*/*"))
    return Usage(
        sum(worker.memory_info().rss for worker in workers) / 1e6,
        sum(worker.num_fds() for worker in workers),
        sum(worker.num_threads() for worker in workers),
        len(files),
    )


def mixed(tokens: list[str]) -> Iterator[Request]:
    numbers, users = count(), cycle(tokens)
    for kind in cycle(ROUND):
        token = next(users)
        content = {
            "login": lambda: login(next(numbers)),
            "order": lambda token=token: order(token),
            "list": lambda token=token: encode("GET", "/api/v1/orders?page_size=20", headers=bearer(token)),
            "stranger": lambda: encode("GET", "/api/v1/users/me"),
            "read": lambda token=token: read(token),
        }[kind]()
        yield Request(kind, content)


def main() -> None:
    options = argparse.ArgumentParser(description="Mixed load, and what grows.")
    options.add_argument("--minutes", type=float, default=10)
    seconds = 60 * options.parse_args().minutes
    with stage() as servers:
        tokens = sign_in(servers.environ, USERS)
        service = servers.service(workers=2)
        port, seen = int(service.environ["PORT"]), []
        rate = len(served(asyncio.run(closed_loop(port, mixed(tokens), 32, 5)))) / 5 / 2
        asyncio.run(open_loop(port, mixed(tokens), rate, seconds / 10))
        over = threading.Event()

        def watch() -> None:
            while True:
                seen.append(usage(service))
                print(f"{seen[-1].megabytes:7.1f} MB {seen[-1][1:]}", flush=True)
                if over.wait(seconds / 10):
                    return

        print(f"{rate:.0f} requests/s; memory, and (descriptors, threads, files):")
        watcher = threading.Thread(target=watch)
        watcher.start()
        outcomes = asyncio.run(open_loop(port, mixed(tokens), rate, seconds))
        over.set()
        watcher.join()
        time.sleep(1)
        first, last = seen[0], usage(service)
    failed = len(outcomes) - len(served(outcomes))
    print("responses: " + ", ".join(f"{status}: {number}" for status, number in statuses(outcomes).items()))
    print(f"p99 {quantile(outcomes, 0.99) * 1e3:.1f} ms; first {first}, last {last}")
    grown = [
        name
        for name, before, after, margin in zip(Usage._fields, first, last, (MEGABYTES, DESCRIPTORS, 2, 0), strict=True)
        if after > before + margin
    ]
    if grown or failed > len(outcomes) / 1000:
        sys.exit(f"grown: {', '.join(grown) or 'nothing'}; failed: {failed}")


if __name__ == "__main__":
    main()
