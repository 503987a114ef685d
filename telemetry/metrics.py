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
_seconds = partial(Histogram, namespace="kuaishang", registry=REGISTRY, buckets=_SECONDS)

REQUESTS = _counter("http_requests", "Requests served.", ("route", "method", "status", "code"))
REQUEST_SECONDS = _seconds("http_request_duration_seconds", "Without the wait for a thread.", ("route", "method"))
REQUESTS_IN_FLIGHT = _sum("http_requests_in_flight", "Requests being served.")
DEADLINES_MISSED = _counter("http_deadlines_missed", "Requests that were given up because their time was over.")
# errcode: WeChat's number, or timeout, unreachable or invalid; outcome caller: their code or data was rejected.
WECHAT_CALLS = _counter("wechat_calls", "Each try; ok, caller or failure.", ("interface", "errcode", "outcome"))
WECHAT_SECONDS = _seconds("wechat_call_duration_seconds", "Duration of a call of WeChat, each try.", ("interface",))
TOKEN_REFRESHES = _counter("wechat_token_refreshes", "Access token requests; success or failure.", ("outcome",))
LOGINS = _counter("logins", "Logins by mini_program or web; success, or the code.", ("kind", "outcome"))
SESSIONS = _counter("sessions_created", "Sessions started.")
BACKGROUND_PENDING = _sum("background_work_pending", "Background functions that run or wait for a thread.")
BACKGROUND = _counter("background_work", "Background functions; success, failure or rejected.", ("outcome",))
for outcome in ("success", "failure"):  # create the series at 0, or increase() misses the first failure
    _ = TOKEN_REFRESHES.labels(outcome), BACKGROUND.labels(outcome)
LINES_DROPPED = _counter("log_lines_dropped", "Log lines lost because the reader of stdout is too slow or gone.")
DEPENDENCY_UP = _latest("dependency_up", "1 if it responded to the last probe or scrape, else 0.", ("dependency",))
WORKER_STARTS = _counter("worker_starts", "Worker processes started: at a start, a reload, or for one that died.")
WORKER_DEATHS = _counter("worker_deaths", "Worker processes that died, not those stopped or replaced.")
START_TIME = _latest("start_time_seconds", "When the instance started, after a stop or a crash.", ("after",))
BUILD = _latest("build_info", "Always 1; name: the instance in logs and traces.", ("version", "name"))
