"""All metrics of the service. Labels hold templates and codes, never what a caller sent.

Under gunicorn every worker counts in files of PROMETHEUS_MULTIPROC_DIR, and the one that is scraped adds them up.
`gunicorn.conf.py` makes the directory and removes it. prometheus_client maps each worker's files there into memory,
where a page for which the disk has no room kills the process (SIGBUS). So room is reserved before a number is placed in
a file; without room it waits in its process, and is placed when a scrape, or another new number, finds some.
https://prometheus.github.io/client_python/multiprocess/

Read against prometheus_client 0.26: values.ValueClass, MultiProcessValue and MutexValue, the names of the files, and
their first 4 bytes, which say how much of a file is used.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from glob import glob
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, values
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"

_in_file = values.MultiProcessValue()
_waiting: list[tuple[Any, ...]] = []
_warn_once = cache(logging.getLogger(__name__).warning)


def number(*args: Any, **kwargs: Any) -> Any:
    """Make a number of a metric, as `values.ValueClass` does."""
    return _place(values.MutexValue(*args), args, kwargs)


def _place(value: Any, args: tuple[str, ...], kwargs: dict[str, str]) -> Any:
    """Let a number go on in its file of this worker, or else wait; return it."""
    try:
        kind = f"gauge_{kwargs['multiprocess_mode']}" if args[0] == "gauge" else args[0]
        with open(f"{os.environ[MULTIPROC_DIR]}/{kind}_{os.getpid()}.db", "ab+") as file:
            used = int.from_bytes(os.pread(file.fileno(), 4, 0), sys.byteorder)
            # prometheus_client doubles a full file; 16 KiB is more than all threads place at one moment.
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, 2 * used + 16384)
        placed = _in_file(*args, **kwargs)
    except Exception as error:  # noqa: BLE001  whatever it is, it must not fail a request
        _waiting.append((value, args, kwargs))
        _warn_once("no room for metrics: serving without them (%s)", str(error))
    else:
        placed.inc(value.get())
        vars(value).update(inc=placed.inc, set=placed.set)
    return value


class Instance(Collector):
    """The metrics of all workers of this instance added up, those of dead workers included."""

    def collect(self) -> Iterable[Metric]:
        for _ in range(len(_waiting)):
            _place(*_waiting.pop(0))
        return MultiProcessCollector.merge(filter(_is_intact, glob(f"{os.environ[MULTIPROC_DIR]}/*.db")))  # type: ignore[no-any-return]


def _is_intact(path: str) -> bool:
    try:
        return bool(os.path.getsize(path) and MultiProcessCollector.merge([path]))  # empty: a worker has just begun it
    except Exception:  # noqa: BLE001  whatever is in it
        if os.path.exists(path):  # or else a gauge of a worker that has just died
            _warn_once("a metrics file is damaged: serving without its numbers (%s)", path)
        return False


REGISTRY = CollectorRegistry()
"""Not the default one: a module that is imported again must not find its metrics registered already."""
SCRAPED: Collector = REGISTRY
"""What a scrape returns: all metrics of this instance, or of this process alone if it shares no directory."""
if MULTIPROC_DIR in os.environ:
    SCRAPED, values.ValueClass = Instance(), number

_counter = partial(Counter, namespace="kuaishang", registry=REGISTRY)
_sum = partial(Gauge, namespace="kuaishang", registry=REGISTRY, multiprocess_mode="livesum")
_latest = partial(Gauge, namespace="kuaishang", registry=REGISTRY, multiprocess_mode="livemostrecent")
_of_each_worker = partial(Gauge, namespace="kuaishang", registry=REGISTRY, multiprocess_mode="liveall")
_seconds = partial(Histogram, namespace="kuaishang", registry=REGISTRY)

Labelled = TypeVar("Labelled", Counter, Gauge)


def _from_0(metric: Labelled, *values: str) -> Labelled:
    """Create series of a metric at 0, or increase() misses the first failure."""
    for value in values:
        metric.labels(value)
    return metric


REQUESTS = _counter("http_requests", "Requests served.", ("route", "method", "status", "code"))
REQUEST_SECONDS = _seconds("http_request_duration_seconds", "Without the wait to be begun.", ("route", "method"))
QUEUE_SECONDS = _seconds("http_queue_seconds", "How late a worker begins what waits, 50 times a second.")
CONNECTIONS = _sum("connections", "Of clients.")
CONNECTIONS_LIMIT = _sum("connections_limit", "So many connections of clients are held at once.")
REQUESTS_IN_FLIGHT = _sum("http_requests_in_flight", "Requests being served.")
DEADLINES_MISSED = _counter("http_deadlines_missed", "Requests that were given up because their time was over.")
# wechat: too many calls of WeChat wait.
SHED = _from_0(_counter("http_requests_shed", "Refused with 503.", ("reason",)), "queue", "in_flight", "wechat")
# address and app: logins.
RATE_LIMITED = _from_0(_counter("http_requests_rate_limited", "Got 429.", ("limit",)), "address", "app", "session")
# errcode: WeChat's number, or timeout, unreachable or invalid; outcome caller: their code or data was rejected.
WECHAT_CALLS = _counter("wechat_calls", "Each try; ok, caller or failure.", ("interface", "errcode", "outcome"))
WECHAT_SECONDS = _seconds("wechat_call_duration_seconds", "Duration of a call of WeChat, each try.", ("interface",))
BREAKER_OPEN = _sum("wechat_breaker_open", "Workers that make no calls of WeChat, as it kept failing.")
TOKEN_REFRESHES = _from_0(_counter("wechat_token_refreshes", "Access tokens.", ("outcome",)), "success", "failure")
MESSAGES_PENDING = _latest("messages_pending", "Messages that WeChat has pushed to any instance, not handled yet.")
# rejected: too many pending; dropped: each process that handled it died, failed, or had no key that decrypts it.
MESSAGES = _from_0(_counter("messages_handled", "Pushed.", ("outcome",)), "success", "failure", "rejected", "dropped")
# Connections, and places for calls of WeChat; the rate of the seconds of waiting is how many wait.
POOL_IN_USE = _from_0(_sum("pool_in_use", "Connections in use.", ("pool",)), "redis", "database", "wechat")
POOL_WAIT_SECONDS = _from_0(_counter("pool_wait_seconds", "Waits for one.", ("pool",)), "redis", "database", "wechat")
LINES_DROPPED = _counter("log_lines_dropped", "Log lines lost because the reader of stdout is too slow or gone.")
DEPENDENCY_UP = _latest("dependency_up", "1 if it responded to the last probe or scrape, else 0.", ("dependency",))
WORKER_STARTS = _counter("worker_starts", "Worker processes started: at a start, a reload, or for one that died.")
WORKER_DEATHS = _counter("worker_deaths", "Worker processes that died, not those stopped or replaced.")
START_TIME = _latest("start_time_seconds", "When the instance started, after a stop or a crash.", ("after",))
BUILD = _latest("build_info", "Always 1; name: the instance in logs and traces.", ("version", "name"))
_process = ProcessCollector(registry=CollectorRegistry())
PROCESS = {measured.name: _of_each_worker(measured.name, measured.documentation) for measured in _process.collect()}
"""CPU time, memory, descriptors and their limit, of each worker; on Linux alone."""
SAMPLED: dict[Gauge, Callable[[], float]] = {}
"""What is measured once a second, and by which function."""


def publish() -> None:
    """Publish what this process uses, for whichever worker is scraped. Raises nothing."""
    with suppress(Exception):
        for measured in _process.collect():
            PROCESS[measured.name].set(measured.samples[0].value)
        for gauge, measure in SAMPLED.items():
            gauge.set(measure())
