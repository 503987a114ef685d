"""All metrics of the service. Labels hold templates and codes, never what a caller sent.

Under gunicorn every worker counts in files of PROMETHEUS_MULTIPROC_DIR, and the one that is scraped adds them up.
"""

import os
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.registry import Collector

from telemetry import multiprocess

REGISTRY = CollectorRegistry()
"""Not the default one: a module that is imported again must not find its metrics registered already."""
SCRAPED: Collector = REGISTRY
"""What a scrape returns: all metrics of this instance, or of this process alone if it shares no directory."""
if multiprocess.MULTIPROC_DIR in os.environ:
    SCRAPED, values.ValueClass = multiprocess.Instance(), multiprocess.number

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

_counter = partial(Counter, namespace="kuaishang", registry=REGISTRY)
_sum = partial(Gauge, namespace="kuaishang", registry=REGISTRY, multiprocess_mode="livesum")
_latest = partial(Gauge, namespace="kuaishang", registry=REGISTRY, multiprocess_mode="livemostrecent")
_of_each_worker = partial(Gauge, namespace="kuaishang", registry=REGISTRY, multiprocess_mode="liveall")
_seconds = partial(Histogram, namespace="kuaishang", registry=REGISTRY, buckets=_SECONDS)

REQUESTS = _counter("http_requests", "Requests served.", ("route", "method", "status", "code"))
REQUEST_SECONDS = _seconds("http_request_duration_seconds", "Without the wait to be begun.", ("route", "method"))
QUEUE_SECONDS = _seconds("http_queue_seconds", "How long requests waited to be begun.")
REQUESTS_IN_FLIGHT = _sum("http_requests_in_flight", "Requests being served.")
DEADLINES_MISSED = _counter("http_deadlines_missed", "Requests that were given up because their time was over.")
# reason: queue, in_flight, or wechat, as too many calls of WeChat wait.
SHED = _counter("http_requests_shed", "Requests refused with 503 at once, as there were too many.", ("reason",))
# limit: address or app, of logins; session.
RATE_LIMITED = _counter("http_requests_rate_limited", "Requests refused with 429.", ("limit",))
# errcode: WeChat's number, or timeout, unreachable or invalid; outcome caller: their code or data was rejected.
WECHAT_CALLS = _counter("wechat_calls", "Each try; ok, caller or failure.", ("interface", "errcode", "outcome"))
WECHAT_SECONDS = _seconds("wechat_call_duration_seconds", "Duration of a call of WeChat, each try.", ("interface",))
BREAKER_OPEN = _sum("wechat_breaker_open", "Workers that make no calls of WeChat, as it kept failing.")
TOKEN_REFRESHES = _counter("wechat_token_refreshes", "Access token requests; success or failure.", ("outcome",))
LOGINS = _counter("logins", "Logins by mini_program or web; success, or the code.", ("kind", "outcome"))
SESSIONS = _counter("sessions_created", "Sessions started.")
MESSAGES_PENDING = _latest("messages_pending", "Messages that WeChat has pushed to any instance, not handled yet.")
# dropped: put aside, as no key decrypts it, or as each process that handled it died.
MESSAGES = _counter("messages_handled", "By handler: success or failure; or rejected or dropped.", ("outcome",))
# pool: redis, database or wechat.
POOL_IN_USE = _sum("pool_in_use", "Connections of a pool, or places for calls of WeChat, in use.", ("pool",))
POOL_WAIT_SECONDS = _counter("pool_wait_seconds", "Waits for one of them; the rate is how many wait.", ("pool",))
LINES_DROPPED = _counter("log_lines_dropped", "Log lines lost because the reader of stdout is too slow or gone.")
DEPENDENCY_UP = _latest("dependency_up", "1 if it responded to the last probe or scrape, else 0.", ("dependency",))
WORKER_STARTS = _counter("worker_starts", "Worker processes started: at a start, a reload, or for one that died.")
WORKER_DEATHS = _counter("worker_deaths", "Worker processes that died, not those stopped or replaced.")
START_TIME = _latest("start_time_seconds", "When the instance started, after a stop or a crash.", ("after",))
BUILD = _latest("build_info", "Always 1; name: the instance in logs and traces.", ("version", "name"))
WORKER_CPU_SECONDS = _of_each_worker("worker_cpu_seconds", "CPU time that a worker has used.")
WORKER_MEMORY = _of_each_worker("worker_resident_memory_bytes", "Memory that a worker occupies.")
WORKER_DESCRIPTORS = _of_each_worker("worker_open_descriptors", "Files and connections that a worker has open.")
WORKER_DESCRIPTORS_LIMIT = _of_each_worker("worker_open_descriptors_limit", "How many it may have open.")
for metric, values_of_label in (  # create the series at 0, or increase() misses the first failure
    (TOKEN_REFRESHES, ("success", "failure")),
    (MESSAGES, ("success", "failure", "rejected", "dropped")),
    (SHED, ("queue", "in_flight", "wechat")),
    (RATE_LIMITED, ("address", "app", "session")),
    (POOL_IN_USE, ("redis", "database", "wechat")),
    (POOL_WAIT_SECONDS, ("redis", "database", "wechat")),
):
    for value in values_of_label:
        metric.labels(value)
