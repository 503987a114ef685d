"""What is counted and measured, all of it declared here. Labels hold templates and codes, never what a caller sent.

Under gunicorn every worker counts in files of PROMETHEUS_MULTIPROC_DIR, and whichever is asked adds them up.
"""

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()
"""Our own: a worker that reads this module anew, after a patch, must not find its metrics registered already."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(name, text, labels, namespace="kuaishang", registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str, mode: Literal["livesum", "livemostrecent"] = "livesum") -> Gauge:
    return Gauge(name, text, labels, namespace="kuaishang", registry=REGISTRY, multiprocess_mode=mode)


def _seconds(name: str, text: str, *labels: str) -> Histogram:
    return Histogram(name, text, labels, namespace="kuaishang", registry=REGISTRY, buckets=_SECONDS)


REQUESTS = _counter("http_requests", "Requests that were answered.", "route", "method", "status", "code")
REQUEST_SECONDS = _seconds("http_request_duration_seconds", "From a thread on, without the wait.", "route", "method")
REQUESTS_IN_FLIGHT = _gauge("http_requests_in_flight", "Requests that are being served.")
# errcode: WeChat's number, or timeout, unreachable or invalid; outcome caller: their code or data was rejected.
WECHAT_CALLS = _counter("wechat_calls", "Each try; ok, caller or failure.", "interface", "errcode", "outcome")
WECHAT_SECONDS = _seconds("wechat_call_duration_seconds", "What a call of WeChat took, each try.", "interface")
TOKEN_REFRESHES = _counter("wechat_token_refreshes", "Access tokens asked for; success or failure.", "outcome")
LOGINS = _counter("logins", "Logins by mini_program or web; success, or the code.", "kind", "outcome")
SESSIONS = _counter("sessions_created", "Sessions that were begun.")
BACKGROUND_PENDING = _gauge("background_work_pending", "Background functions that run or wait for a thread.")
BACKGROUND = _counter("background_work", "Functions that ended; success or failure, or refused.", "outcome")
for outcome in ("success", "failure"):  # create the series at 0, or increase() misses the first failure
    TOKEN_REFRESHES.labels(outcome)
    BACKGROUND.labels(outcome)
LINES_DROPPED = _counter("log_lines_dropped", "Log lines lost because whoever reads stdout is too slow, or gone.")
DEPENDENCY_UP = _gauge(
    "dependency_up", "1 if it answered a probe or scrape, else 0.", "dependency", mode="livemostrecent"
)
WORKER_STARTS = _counter("worker_starts", "Worker processes begun, at a start or reload, or for one that died.")
WORKER_DEATHS = _counter("worker_deaths", "Worker processes that ended though nobody reloaded or stopped the instance.")
START_TIME = _gauge("start_time_seconds", "When the instance started, since the epoch.", mode="livemostrecent")
BUILD = _gauge("build_info", "Always 1, for the version that runs.", "version", mode="livemostrecent")
