"""What telemetry costs a request: trace ids, log lines, metrics and exported traces, each on top of the one before.

`python -m bench.telemetry_cost` lets processes read the signed-in user in turns, and prints the ratios of what
they spent: CPU seconds of the whole process, its threads included, so that neither the machine's other work nor
the waiting for Redis makes a difference. One process serves log lines and trace ids alone, each in turns of its own.
Ends with a status that is not 0 if a log line costs more than 5 %.
"""

import logging
import operator
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from werkzeug.datastructures import Headers
from werkzeug.test import EnvironBuilder, run_wsgi_app

import telemetry
from bench import environment
from service import create_app
from storage import sessions
from storage.identities import get_or_create_user
from telemetry import access_log
from tests.harness import APP_ID, bearer
from tests.otlp_receiver import OtlpReceiver

NOTHING, IDS, LINES, METRICS, TRACES = VARIANTS = ("nothing", "trace ids", "+ log lines", "+ metrics", "+ traces")
ROUNDS, TURNS, REQUESTS = 6, 12, 200
"""Each round has processes of its own: where in memory things happen to lie makes a percent or two."""
PAUSE_SECONDS = 0.15
"""Longer than lines are gathered: what a turn leaves to the threads is part of it."""
LIMIT = 1.05


class Uncounted:
    """Stands in for a series."""

    def inc(self, *amount: float) -> None:
        pass

    observe = inc


class Server:
    """A process that serves this variant.

    :param lines: where it writes its log.
    """

    def __init__(self, variant: str, env: dict[str, str], lines: Any) -> None:
        command = [sys.executable, "-m", "bench.telemetry_cost", variant]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=lines, stderr=pipe, text=True)

    def turn(self, command: str) -> float:
        """Have REQUESTS requests served, and answer the seconds of CPU since the last turn.

        :param command: `with lines` or `quiet`.
        """
        assert self.process.stdin is not None
        assert self.process.stderr is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return float(self.process.stderr.readline())

    def stop(self) -> None:
        self.process.communicate(timeout=30)


def serve(variant: str) -> None:
    """For each line of stdin serve REQUESTS requests, and answer on stderr the seconds of CPU since the last time."""
    if variant == NOTHING:
        telemetry.init_app = lambda app: None
    if variant == LINES:
        access_log._count = access_log._duration = lambda *labels: Uncounted()  # type: ignore[assignment]
    app = create_app()
    with app.test_request_context():
        token = sessions.log_in(get_or_create_user(APP_ID, "o-bench", None).id)
    environ = EnvironBuilder("/api/v1/users/me", headers=Headers(bearer(token))).get_environ()
    before = time.process_time()
    for command in sys.stdin:
        logging.disable(logging.NOTSET if command == "with lines\n" else logging.CRITICAL)
        for _ in range(REQUESTS):
            _, status, _ = run_wsgi_app(app.wsgi_app, dict(environ))
            if status != "200 OK":
                raise RuntimeError(status)
        time.sleep(PAUSE_SECONDS)
        now = time.process_time()
        print(now - before, file=sys.stderr, flush=True)
        before = now


def play(taken: dict[str, list[float]]) -> None:
    """One round: add to what is known of each variant the seconds of CPU of the best of its TURNS.

    The best, as whatever else happens on the machine can only add to it.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        collector = OtlpReceiver()
        stack.callback(collector.close)
        # One session sends all requests, and each counts for its limit.
        env = {**os.environ, **stack.enter_context(environment()), "SESSION_RATE": "999999999/day"}
        reader = stack.enter_context(subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL))
        turn = {}
        for variant in (NOTHING, LINES, METRICS, TRACES):
            if variant == METRICS:
                env["PROMETHEUS_MULTIPROC_DIR"] = str(folder)  # as under gunicorn
            if variant == TRACES:
                env["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector.url
            server = Server(variant, env, reader.stdin)
            stack.callback(server.stop)
            server.turn("warm up")
            turn[variant] = partial(server.turn, "with lines")
            if variant == LINES:
                turn[IDS] = partial(server.turn, "quiet")
        turns: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for number in range(TURNS):
            for variant in VARIANTS if number % 2 else reversed(VARIANTS):
                turns[variant].append(turn[variant]())
        for variant in VARIANTS:
            taken[variant].append(min(turns[variant]))


def main() -> None:
    taken: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(ROUNDS):
        play(taken)
    before = NOTHING
    for variant, seconds in taken.items():
        print(
            f"{variant:17}{statistics.median(seconds) / REQUESTS * 1e6:7.0f} µs of CPU a request"
            f"{ratio(seconds, taken[NOTHING]):8.3f} × nothing{ratio(seconds, taken[before]):8.3f} × the one before"
        )
        before = variant
    if ratio(taken[LINES], taken[IDS]) > LIMIT:
        sys.exit(f"a log line costs a request more than {LIMIT - 1:.0%} of its time")


def ratio(seconds: list[float], others: list[float]) -> float:
    """Compare within each round, in which IDS and LINES are one process."""
    return statistics.median(map(operator.truediv, seconds, others))


if __name__ == "__main__":
    serve(sys.argv[1]) if sys.argv[1:] else main()
