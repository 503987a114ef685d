"""What the service's work costs beside the floor, a constant response under the same server: `make bench`.

One worker on one core, the load, Redis and the database on another. The rows are measured in turn, in several rounds of
one run, and the medians printed: requests per second, the ratio to the floor, 50th and 99th percentile of the response
times, and the worker's CPU time per request. Everything is on, as in production. The last lines are the memory of a
worker at rest, of each further one, and the time from a start to the first response.

DATABASE_URL measures on another database than SQLite, and PEERS (a folder) adds others that do the same work:
`bare_wsgi.py` and `fastapi_peer.py` there, run by PEERS_PYTHON, which needs gunicorn, fastapi, uvicorn, uvloop,
httptools, redis and orjson.
"""

import argparse
import asyncio
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import requests
from redis import Redis

from bench import SERVER_CORE, environment, pin_load, pinned, sign_in
from bench.load import Request, closed_loop, encode, endless, quantile, statuses
from tests.harness import ROOT, Process, Service, bearer, free_port

USERS, ORDERS_OF_THE_LISTED = 200, 40
FLOOR = "floor"
GUNICORN = ["gunicorn", "--no-control-socket", "--keep-alive", "75", "--workers", "1"]
GEVENT = [*GUNICORN, "--worker-class", "gevent", "--worker-connections", "5000"]
ITEM = {"sku": "tea-01", "name": "大红袍", "quantity": 2, "unit_price": 12800}


class Work(NamedTuple):
    name: str
    port: int
    worker: psutil.Process
    requests: Iterable[Request]
    status: int = 200


class Figures(NamedTuple):
    rate: float
    p50: float
    p99: float
    cpu: float
    other: float
    """The share of responses with another status than the right one, which are not counted in the rate."""


def order(token: str) -> bytes:
    """Return an order of three items, with a key of its own."""
    headers = {**bearer(token), "Idempotency-Key": secrets.token_hex(16)}
    return encode("POST", "/api/v1/orders", {"items": [ITEM] * 3}, headers)


def login(number: int) -> bytes:
    """Return a login of one of the users, with a code of its own, for `bench.wechat_stub`."""
    return encode("POST", "/api/v1/auth/wechat", {"code": f"{secrets.token_hex(14)}{number % USERS:04}"})


def read(token: str, **headers: str) -> bytes:
    return encode("GET", "/api/v1/users/me", headers={**bearer(token), **headers})


def works(service: Service, tokens: list[str]) -> list[Work]:
    """Return what the service is measured by; its users have the tokens, and the first of them orders."""
    port, (worker,) = int(service.environ["PORT"]), service.workers()
    listed = tokens[: len(tokens) // 4]
    for token in listed:
        for _ in range(ORDERS_OF_THE_LISTED // 2):
            requests.post(f"{service.url}/api/v1/orders", json={"items": [ITEM]}, headers=bearer(token), timeout=30)
    etags = {token: service.read_me(token).headers["ETag"] for token in tokens}
    reads = [read(token) for token in tokens]
    conditional = [read(token, **{"If-None-Match": etags[token]}) for token in tokens]
    lists = [encode("GET", "/api/v1/orders?page_size=20", headers=bearer(token)) for token in listed]

    def requests_of(name: str, make: Callable[[int], bytes]) -> Iterable[Request]:
        return endless(lambda number: Request(name, make(number)))

    health = encode("GET", "/livez")
    return [
        Work("health", port, worker, requests_of("health", lambda _: health)),
        Work("authenticated read", port, worker, requests_of("read", lambda n: reads[n % len(reads)])),
        Work("conditional read (304)", port, worker, requests_of("304", lambda n: conditional[n % len(reads)]), 304),
        Work("login", port, worker, requests_of("login", login)),
        Work("order of 3 items, keyed", port, worker, requests_of("order", lambda n: order(tokens[n % USERS])), 201),
        Work("list of 20 orders", port, worker, requests_of("list", lambda n: lists[n % len(lists)])),
    ]


def measure(work: Work, connections: int, seconds: float) -> Figures:
    """Send requests in a closed loop."""
    asyncio.run(closed_loop(work.port, work.requests, connections, seconds / 4))
    before, began = work.worker.cpu_times(), time.monotonic()
    outcomes = asyncio.run(closed_loop(work.port, work.requests, connections, seconds))
    after, taken = work.worker.cpu_times(), time.monotonic() - began
    right = [outcome for outcome in outcomes if outcome.status == work.status]
    if len(right) < len(outcomes) / 2:
        raise RuntimeError(f"{work.name}: {statuses(outcomes)}")
    cpu = after.user + after.system - before.user - before.system
    latencies = quantile(right, 0.5), quantile(right, 0.99)
    return Figures(len(right) / taken, *latencies, cpu / len(right), 1 - len(right) / len(outcomes))


class Servers:
    """Starts servers on the core that is measured, and ends them.

    :param stack: at its end.
    """

    def __init__(self, stack: ExitStack, environ: dict[str, str], folder: Path) -> None:
        self.stack, self.environ, self.folder = stack, environ, folder

    @contextmanager
    def briefly(self) -> Iterator[None]:
        """End what is started in this block at its end."""
        outer = self.stack
        with ExitStack() as self.stack:
            yield
        self.stack = outer

    def service(self, workers: int = 1) -> Service:
        environ = {**self.environ, "WEB_CONCURRENCY": str(workers)}
        service = Service(environ, self.folder / secrets.token_hex(4), within=pinned(SERVER_CORE))
        self.stack.callback(service.discard)
        return service

    def other(
        self, command: list[str], path: str, folder: Path = ROOT / "bench", python: str = sys.executable
    ) -> tuple[int, psutil.Process]:
        """Start another server; `{port}` in its command is its port.

        :returns: the port, and the process that serves.
        """
        port = free_port()
        words = [word.format(port=port) for word in command]
        environ = {"PATH": os.environ["PATH"], "REDIS_URL": self.environ["REDIS_URL"]}
        output, within = self.folder / secrets.token_hex(4), pinned(SERVER_CORE)
        process = Process(words, environ, output, folder, within=within, python=python)
        self.stack.callback(process.kill)
        process.wait_for(f"http://127.0.0.1:{port}{path}")
        started = psutil.Process(process.popen.pid)
        return port, (started.children() or [started])[0]


@contextmanager
def stage(wechat_seconds: float = 0) -> Iterator[Servers]:
    """Keep this process on the core of the load, and start all that the service needs there.

    :param wechat_seconds: how long WeChat takes for a response.
    """
    if not shutil.which("taskset") and (os.cpu_count() or 1) > 1:
        sys.exit("taskset is missing: install util-linux")
    pin_load()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = free_port()
        stub = Process(["bench.wechat_stub", str(port), str(wechat_seconds)], dict(os.environ), folder / "stub")
        stack.callback(stub.kill)
        environ = stack.enter_context(environment())
        yield Servers(stack, {**environ, "WECHAT_API_BASE_URL": f"http://127.0.0.1:{port}"}, folder)


def floor(servers: Servers) -> Work:
    port, worker = servers.other([*GEVENT, "--bind", "127.0.0.1:{port}", "floor:app"], "/")
    request = Request(FLOOR, encode("GET", "/"))
    return Work(f"{FLOOR} (gevent)", port, worker, endless(lambda _: request))


def peers(servers: Servers) -> list[Work]:
    """Return the work of the peers, if PEERS names their folder."""
    if not os.environ.get("PEERS"):
        return []
    folder, python = Path(os.environ["PEERS"]).resolve(), os.environ.get("PEERS_PYTHON") or sys.executable
    with Redis.from_url(servers.environ["REDIS_URL"]) as redis:
        redis.set("session:tok", '{"user_id":1,"nickname":"Alice","phone":"13812345678"}')
    threads = [*GUNICORN, "--worker-class", "gthread", "--threads", "16", "--bind", "127.0.0.1:{port}", "bare_wsgi:app"]
    uvicorn = ["uvicorn", "--port", "{port}", "--no-access-log", "--log-level", "error", "fastapi_peer:app"]
    constant, health, me = encode("GET", "/"), encode("GET", "/healthz"), read("tok")
    bare = servers.other(threads, "/", folder, python)
    fastapi = servers.other(uvicorn, "/healthz", folder, python)
    return [
        Work("peer: bare WSGI (gthread)", *bare, endless(lambda _: Request("peer", constant))),
        Work("peer: FastAPI, health", *fastapi, endless(lambda _: Request("peer", health))),
        Work("peer: FastAPI, read", *fastapi, endless(lambda _: Request("peer", me))),
    ]


def resources(servers: Servers, rounds: int) -> None:
    """Print the memory of the workers, and how long starts take, beside a bare Flask application."""
    flask = [*GEVENT, "--bind", "127.0.0.1:{port}", "bare_flask:app"]
    starts: dict[str, list[float]] = {"service": [], "flask": []}
    for _ in range(rounds):
        for name, start in (("service", servers.service), ("flask", lambda: servers.other(flask, "/livez"))):
            with servers.briefly():
                began = time.monotonic()
                started = start()
                starts[name].append(time.monotonic() - began)
                if isinstance(started, Service):
                    rest = started.workers()[0].memory_info().rss / 1e6
                else:
                    bare = started[1].memory_info().rss / 1e6
    with servers.briefly():
        further = servers.service(3)
        time.sleep(1)
        private = min(worker.memory_full_info().uss for worker in further.workers()) / 1e6
    service, plain = (statistics.median(starts[name]) for name in ("service", "flask"))
    print(f"memory of a worker at rest: {rest:.0f} MB (bare Flask {bare:.0f}); private of each: {private:.0f} MB")
    print(f"start to the first response: {service:.2f} s, bare Flask {plain:.2f} s: {service / plain:.1f} ×")


def main() -> None:
    options = argparse.ArgumentParser(description="Compare the service with the floor.")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=3, help="of each measurement")
    options.add_argument("--connections", type=int, default=32)
    options.add_argument("--only", default="", help="measure only what has this in its name, beside the floor")
    chosen = options.parse_args()
    with stage() as servers:
        if not chosen.only:
            resources(servers, chosen.rounds)
        measured = [floor(servers), *works(servers.service(), sign_in(servers.environ, USERS)), *peers(servers)]
        measured = [work for work in measured if work.name.startswith(FLOOR) or chosen.only in work.name]
        rounds = [
            [measure(work, chosen.connections, chosen.seconds) for work in measured] for _ in range(chosen.rounds)
        ]
    print(f"{'':28}{'req/s':>8}{'to floor':>10}{'p50 ms':>9}{'p99 ms':>9}{'CPU µs':>9}{'refused':>10}")
    base = statistics.median(figures[0].rate for figures in rounds)
    for number, work in enumerate(measured):
        each = zip(*(one[number] for one in rounds), strict=True)
        rate, p50, p99, cpu, other = (statistics.median(values) for values in each)
        row = f"{work.name:28}{rate:8.0f}{rate / base:10.3f}{p50 * 1e3:9.1f}{p99 * 1e3:9.1f}{cpu * 1e6:9.0f}"
        print(f"{row}{other:10.1%}")


if __name__ == "__main__":
    main()
