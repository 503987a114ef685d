"""Twice what one worker can serve, for a minute: `make overload`.

A mix of orders (keyed), reads by signed-in users, and requests of strangers comes at a constant rate, whatever becomes
of those before; times count from when a request was due. First come the saturated peak (a closed loop), what each class
costs (the same, alone), and the times at a fifth of the peak.

Goodput is what was served, each class weighted by its cost: an order costs as much as several requests of strangers, so
a service that serves the orders and sheds the strangers serves fewer requests, and does no less. Ends with a status
that is not 0 if a goal is missed.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

from bench import sign_in
from bench.load import HUNG, Outcome, Request, closed_loop, encode, open_loop, quantile, statuses
from bench.speed import USERS, order, read, stage

FIRST = "order"
WEIGHTS = {FIRST: 5, "read": 60, "stranger": 35}
CONNECTIONS = 64
PHASE_SECONDS = 6
FACTOR, GOODPUT, FIRST_SHARE, TAIL, REFUSAL_SECONDS, MEMORY = 2, 0.9, 0.994, 3, 0.1, 0.1


def mixed(tokens: list[str], weights: dict[str, int]) -> Iterator[Request]:
    """Return requests without end, of these kinds by these weights."""
    stranger = encode("GET", "/api/v1/users/me")
    reads = [read(token) for token in tokens]
    chance = random.Random(0)
    while True:
        (kind,) = chance.choices(list(weights), weights.values())
        if kind == FIRST:
            yield Request(kind, order(chance.choice(tokens)))
        else:
            yield Request(kind, stranger if kind == "stranger" else chance.choice(reads))


def is_served(outcome: Outcome) -> bool:
    return isinstance(outcome.status, int) and outcome.status < 500 and outcome.status != 429


def served(outcomes: Iterable[Outcome]) -> list[Outcome]:
    return list(filter(is_served, outcomes))


def main() -> None:
    options = argparse.ArgumentParser(description="Twice the capacity.")
    options.add_argument("--seconds", type=float, default=60)
    seconds = options.parse_args().seconds
    with stage() as servers:
        tokens = sign_in(servers.environ, USERS)
        service = servers.service()
        port, (worker,) = int(service.environ["PORT"]), service.workers()
        cost = {}
        for kind in WEIGHTS:
            alone = asyncio.run(closed_loop(port, mixed(tokens, {kind: 1}), CONNECTIONS, PHASE_SECONDS / 2))
            cost[kind] = PHASE_SECONDS / 2 / max(len(served(alone)), 1)
        peak = served(asyncio.run(closed_loop(port, mixed(tokens, WEIGHTS), CONNECTIONS, PHASE_SECONDS)))
        peak_rate = len(peak) / PHASE_SECONDS
        quiet = served(asyncio.run(open_loop(port, mixed(tokens, WEIGHTS), peak_rate / 5, PHASE_SECONDS * 2)))
        before, cpu = worker.memory_info().rss, time.process_time()
        load = open_loop(port, mixed(tokens, WEIGHTS), FACTOR * peak_rate, seconds)
        outcomes = asyncio.run(load)
        cpu, after = time.process_time() - cpu, worker.memory_info().rss
    good = served(outcomes)
    refused = [one for one in outcomes if one.status in (429, 503)]
    lost = [one for one in outcomes if not is_served(one) and one.status not in (429, 503)]
    by_kind: dict[str, list[Outcome]] = defaultdict(list)
    for one in outcomes:
        by_kind[one.request.kind].append(one)
    work = sum(cost[one.request.kind] for one in good) / seconds
    peak_work = sum(cost[one.request.kind] for one in peak) / PHASE_SECONDS
    shares = {kind: len(served(of_kind)) / len(of_kind) for kind, of_kind in by_kind.items()}
    tail = quantile(good, 0.99) / quantile(quiet, 0.99)
    refusals = quantile(refused, 0.99) if len(refused) > 1 else 0.0
    print(f"peak: {peak_rate:.0f} requests/s; cost: " + ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in cost.items()))
    print(f"sent: {len(outcomes)} at {FACTOR * peak_rate:.0f}/s; the sender used {cpu / seconds:.0%} of its core")
    print("responses: " + ", ".join(f"{status}: {count}" for status, count in statuses(outcomes).items()))
    goals = [
        ("goodput / peak", work / peak_work, f"≥ {GOODPUT}", work / peak_work >= GOODPUT),
        ("goodput / peak, in requests", len(good) / seconds / peak_rate, "", True),
        ("p99 of the served / unloaded", tail, f"≤ {TAIL}", tail <= TAIL),
        (f"served of {FIRST}", shares[FIRST], f"≥ {FIRST_SHARE}", shares[FIRST] >= FIRST_SHARE),
        *((f"served of {kind}", share, "", True) for kind, share in shares.items() if kind != FIRST),
        ("p99 of refusals, s", refusals, f"≤ {REFUSAL_SECONDS}", refusals <= REFUSAL_SECONDS),
        ("neither served nor refused", len(lost), "0", not lost),
        ("of these hung", sum(one.status == HUNG for one in lost), "0", True),
        ("memory after / before", after / before, f"≤ {1 + MEMORY}", after / before <= 1 + MEMORY),
    ]
    print(
        f"unloaded p99: {quantile(quiet, 0.99) * 1e3:.1f} ms; worker: {before / 1e6:.0f} MB, then {after / 1e6:.0f} MB"
    )
    for name, value, goal, met in goals:
        print(f"{name:32}{value:10.3f}   {goal:8}{'' if met else 'MISSED'}")
    if not all(met for *_, met in goals):
        sys.exit("a goal is missed")


if __name__ == "__main__":
    main()
