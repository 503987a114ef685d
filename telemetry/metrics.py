"""All metrics of the service. Labels hold templates and codes, never what a caller sent.

Under gunicorn every worker counts in files of PROMETHEUS_MULTIPROC_DIR, and the one that is scraped adds them up.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, Summary, values
from prometheus_client.registry import Collector

from telemetry import multiprocess

REGISTRY = CollectorRegistry()
"""Not the default one: a module that is imported again must not find its metrics registered already."""
SCRAPED: Collector = REGISTRY
"""What a scrape returns: all metrics of this instance, or of this process alone if it shares no directory."""
if multiprocess.MULTIPROC_DIR in os.environ:
    SCRAPED, values.ValueClass = multiprocess.Instance(), multiprocess.number

_sum = partial(Gauge, namespace="kuaishang", registry=REGISTRY, multiprocess_mode="livesum")
_latest = partial(Gauge, namespace="kuaishang", registry=REGISTRY, multiprocess_mode="livemostrecent")
_of_each_worker = partial(Gauge, namespace="kuaishang", registry=REGISTRY, multiprocess_mode="liveall")
_seconds = partial(Histogram, namespace="kuaishang", registry=REGISTRY)


def _counter(name: str, documentation: str, labels: Sequence[str] = (), *values: str) -> Counter:
    """Make a counter; with series of these values of its label at 0, or increase() misses the first failure."""
    made = Counter(name, documentation, labels, namespace="kuaishang", registry=REGISTRY)
    for value in values:
        made.labels(value)
    return made


REQUESTS = _counter("http_requests", "Requests served.", ("route", "method", "status", "code"))
REQUEST_SECONDS = _seconds("http_request_duration_seconds", "Without the wait to be begun.", ("route", "method"))
QUEUE_SECONDS = _seconds("http_queue_seconds", "How late a worker begins what waits, 50 times a second.")
CONNECTIONS = _sum("connections", "Of clients.")
CONNECTIONS_LIMIT = _sum("connections_limit", "So many connections of clients are held at once.")
REQUESTS_IN_FLIGHT = _sum("http_requests_in_flight", "Requests being served.")
DEADLINES_MISSED = _counter("http_deadlines_missed", "Requests that were given up because their time was over.")
# wechat: too many calls of WeChat wait.
SHED = _counter("http_requests_shed", "Refused with 503.", ("reason",), "queue", "in_flight", "wechat")
# address and app: logins.
RATE_LIMITED = _counter("http_requests_rate_limited", "Got 429.", ("limit",), "address", "app", "session")
# errcode: WeChat's number, or timeout, unreachable or invalid; outcome caller: their code or data was rejected.
WECHAT_CALLS = _counter("wechat_calls", "Each try; ok, caller or failure.", ("interface", "errcode", "outcome"))
WECHAT_SECONDS = _seconds("wechat_call_duration_seconds", "Duration of a call of WeChat, each try.", ("interface",))
BREAKER_OPEN = _sum("wechat_breaker_open", "Workers that make no calls of WeChat, as it kept failing.")
TOKEN_REFRESHES = _counter("wechat_token_refreshes", "Access tokens.", ("outcome",), "success", "failure")
MESSAGES_PENDING = _latest("messages_pending", "Messages that WeChat has pushed to any instance, not handled yet.")
# rejected: too many pending; dropped: each process that handled it died, failed, or had no key that decrypts it.
MESSAGES = _counter("messages_handled", "Pushed.", ("outcome",), "success", "failure", "rejected", "dropped")
# Connections, and places for calls of WeChat; the rate of the seconds of waiting is how many wait.
POOL_IN_USE = _sum("pool_in_use", "Connections in use.", ("pool",))
POOL_WAIT_SECONDS = Summary("pool_wait_seconds", "Waits.", ("pool",), namespace="kuaishang", registry=REGISTRY)
SWITCHED_OFF = _latest("switched_off", "1 while a route is switched off, else 0.", ("method", "route"))
LINES_DROPPED = _counter("log_lines_dropped", "Log lines lost because the reader of stdout is too slow or gone.")
DEPENDENCY_UP = _latest("dependency_up", "1 if it responded to the last probe or scrape, else 0.", ("dependency",))
WORKER_STARTS = _counter("worker_starts", "Worker processes started: at a start, a reload, or for one that died.")
WORKER_DEATHS = _counter("worker_deaths", "Worker processes that died, not those stopped or replaced.")
RELOAD_REFUSED = _latest("reload_refused", "1 while older code serves, as what was to replace it cannot.")
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
