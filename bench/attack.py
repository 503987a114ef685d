"""Requests that are cheap to send, and what they cost those beside them.

`python -m bench.attack` lets one worker serve reads of the signed-in user: quiet, then while 20 order lists of 1 MB
arrive each second, and quiet again. It prints the 99th percentiles of the reads and the worker's memory. Ends with a
status that is not 0 if under attack the reads take more than 3 times as long, the memory changes by more than 20 MB,
a list gets no response, or /readyz responds with anything but 200.
"""

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path

import requests

from bench import environment
from service import create_app
from storage import sessions
from storage.identities import get_or_create_user
from tests.harness import APP_ID, Service, bearer

ATTACKS_A_SECOND, READS_A_SECOND, PROBES_A_SECOND = 20, 50, 5
ATTACK_SECONDS, QUIET_SECONDS = 30, 10
FACTOR, MEGABYTES = 3, 20
BODY = b'{"items":[%s]}' % b",".join([b"{}"] * 345_000)


def beats(a_second: float, seconds: float) -> Iterator[None]:
    """Let this many rounds a second begin; one that comes late makes none of the others late."""
    began = time.monotonic()
    for number in range(round(a_second * seconds)):
        time.sleep(max(0.0, began + number / a_second - time.monotonic()))
        yield


def attack(url: str, headers: dict[str, str]) -> None:
    """Send the lists, in a process of its own, without waiting for responses to earlier ones."""
    send = partial(requests.post, f"{url}/api/v1/orders", BODY, headers=headers, timeout=60)
    with ThreadPoolExecutor(ATTACKS_A_SECOND) as pool:
        sent = [pool.submit(send) for _ in beats(ATTACKS_A_SECOND, ATTACK_SECONDS)]
    statuses = Counter(one.result().status_code for one in sent)
    print(f"attacks: {sum(statuses.values())}, responses: {dict(statuses)}")


def probe(url: str, over: Event) -> None:
    """Ask /readyz until it is over; ends with a status that is not 0 if a response is anything but 200."""
    statuses: Counter[int] = Counter()
    while not over.wait(1 / PROBES_A_SECOND):
        statuses[requests.get(f"{url}/readyz", timeout=60).status_code] += 1
    print(f"/readyz: {dict(statuses)}")
    sys.exit(set(statuses) != {200})


def read(url: str, headers: dict[str, str], seconds: float) -> list[float]:
    """Read the signed-in user for so long, and return the seconds of each read."""
    taken = []
    with requests.Session() as session:
        for _ in beats(READS_A_SECOND, seconds):
            began = time.perf_counter()
            answer = session.get(f"{url}/api/v1/users/me", headers=headers, timeout=60)
            taken.append(time.perf_counter() - began)
            answer.raise_for_status()
    return taken


def p99(taken: list[float]) -> float:
    return statistics.quantiles(taken, n=100)[98]


def main() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environ = stack.enter_context(environment())
        with create_app({**environ, "LOG_LEVEL": "ERROR"}).test_request_context():
            token = sessions.log_in(get_or_create_user(APP_ID, "o-bench", None).id)
        service = Service({**environ, "WEB_CONCURRENCY": "1"}, folder / "output")
        stack.callback(service.discard)
        (worker,) = service.workers()
        headers = {**bearer(token), "Content-Type": "application/json"}
        read(service.url, headers, 2)
        quiet, before = read(service.url, headers, QUIET_SECONDS), worker.memory_info().rss
        processes = multiprocessing.get_context("spawn")  # no fork of a process with threads
        over = processes.Event()
        attacker = processes.Process(target=attack, args=(service.url, headers))
        prober = processes.Process(target=probe, args=(service.url, over))
        attacker.start()
        prober.start()
        attacked, after = read(service.url, headers, ATTACK_SECONDS), worker.memory_info().rss
        attacker.join()
        over.set()
        prober.join()
        quiet += read(service.url, headers, QUIET_SECONDS)
    ratio, growth = p99(attacked) / p99(quiet), (after - before) / 1e6
    print(f"reads: p99 {p99(quiet) * 1000:.1f} ms quiet, {p99(attacked) * 1000:.1f} ms under attack: {ratio:.2f} ×")
    print(f"memory: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after: {growth:+.1f} MB")
    if ratio > FACTOR or abs(growth) > MEGABYTES or attacker.exitcode or prober.exitcode:
        sys.exit("the attack costs those beside it more than it may")


if __name__ == "__main__":
    main()
