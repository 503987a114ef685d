"""HTTP to WeChat: deadlines, one retry, errcode to error code, and which calls are begun."""

import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gevent
import requests
import urllib3
from opentelemetry.trace import SpanKind, StatusCode
from requests.adapters import HTTPAdapter

from concurrency import GaveUp, ensure_somebody_waits, seconds_left
from errors import NO_DESCRIPTOR, ApiError, Code
from telemetry import metrics, traces
from wechat import lenient
from wechat.errcodes import MESSAGES, code_of

logger = logging.getLogger(__name__)
# urllib3 logs whole URLs, even in warnings about headers, and WeChat's URLs contain secrets and tokens.
logging.getLogger("urllib3").setLevel(logging.CRITICAL)

ANSWER_SECONDS = 5
"""For a try as a whole, from the name server to the end of the body."""
FAIR_SECONDS = 2
"""A try that had less time proves nothing."""
RESPOND_SECONDS = 0.05
"""Before a request's deadline, so that it still ends with 504."""
MAXIMUM_ANSWER_BYTES = 1024 * 1024
RETRY_PAUSE_SECONDS = 0.2
PLACE_SECONDS = 0.1
"""How long to wait for a place."""
FAILURES = 10
"""So many in a row open the circuit breaker of an interface."""
PAUSE_SECONDS = 5
"""From one trial, or a failure, to the next trial while it is open. A trial ends before, unless it is made twice."""

CONNECTIONS = 100
"""How many are kept open between calls."""
MEDIA_TYPES = ("image/", "audio/", "video/", "application/octet-stream")
BUSY = -1

Query = Mapping[str, str] | None
Body = Mapping[str, Any] | None
Codes = Collection[int]


class Failed(ApiError):
    """WeChat is to blame: no response in time, none that makes sense, or it is busy."""


class Transport:
    """Calls WeChat's API: so many calls at a time, and few of an interface that keeps failing. Thread-safe.

    The circuit breaker is our own, as no library fits: pybreaker 1.4.1 lets one call at a time through (`call` holds
    its lock) and follows the machine's clock; circuitbreaker 2.1.3 and pyresilience 0.4.1 have no bound for trials; and
    each takes a caller who gives up for a success or a failure of WeChat's.

    :param base_url: the API's scheme, host and port.
    :param places: how many calls may be made at a time.
    :param door: lets others begin while a request waits for WeChat.
    """

    def __init__(self, base_url: str, places: int, door: Any) -> None:
        self._base_url = base_url.rstrip("/")
        # Not a Session, which keeps cookies, follows redirects and takes credentials from ~/.netrc.
        self._adapter = HTTPAdapter(pool_connections=1, pool_maxsize=CONNECTIONS)
        # Proxies and certificates of the environment, read once instead of for each call.
        self._options: Any = requests.Session().merge_environment_settings(self._base_url, {}, True, None, None)
        self._places = threading.BoundedSemaphore(places)
        self._door = door
        self._failures: Counter[str] = Counter()
        self._next_trial: dict[str, float] = {}

    @property
    def is_failing(self) -> bool:
        """Whether an interface keeps failing: the state of the circuit breaker."""
        return max(self._failures.values(), default=0) >= FAILURES

    def call(
        self,
        path: str,
        params: Query,
        body: Body = None,
        *,
        expected: Codes = (),
        idempotent: bool = True,
        media: bool = False,
    ) -> Any:
        """Call an interface, and once more if WeChat is busy or the connection is lost.

        Takes at most ANSWER_SECONDS twice. Nothing is begun when nobody waits for it, the interface keeps failing, or
        too many calls wait already.

        :param params: the query.
        :param body: posted as JSON if there is one; otherwise the call is a GET.
        :param expected: errcodes that are a result here, not a failure.
        :param idempotent: whether a call whose response was lost may be made again.
        :param media: whether the response may be an image or the like.
        :returns: a dict, whose `errcode`, where WeChat sends one, is 0 or one of `expected`; or bytes.
        :raises ApiError: what `errcodes.code_of` says, and UNAVAILABLE, UPSTREAM_TIMEOUT, UPSTREAM_INVALID. The
            exceptions of requests contain the URL, and so a secret: none of them leaves this method.
        """
        for kind in ("timeout", "unreachable", "invalid", str(BUSY)):  # start at 0, or increase() misses a first burst
            metrics.WECHAT_CALLS.labels(path, kind, "failure")
        with self._door.elsewhere(), self._place(path):
            for may_retry in (True, False):
                limit = seconds_left(ANSWER_SECONDS, reserve=RESPOND_SECONDS)
                ensure_somebody_waits()
                result, outcome = "invalid", "failure"
                try:
                    # No traceparent is sent: our traces are none of WeChat's business.
                    traced = traces.span(f"WeChat {path}", SpanKind.CLIENT, {"wechat.interface": path})
                    with gevent.Timeout(limit), metrics.WECHAT_SECONDS.labels(path).time(), traced as span:
                        errcode, answer = _parse(path, media, *self._exchange(path, params, body, limit))
                        span.set_attribute("wechat.errcode", errcode)
                        result, outcome = str(errcode), "ok"
                        if errcode != BUSY:
                            self._count(path, 0)
                        if errcode == 0 or errcode in expected:
                            return answer
                        code = code_of(path, errcode)
                        outcome = "caller" if code.number < 500 else "failure"
                        span.set_status(StatusCode.ERROR)
                    if errcode != BUSY or not may_retry:
                        raise failure(path, code, f"errcode {errcode}: {answer.get('errmsg')}", errcode)
                except (gevent.Timeout, requests.Timeout, urllib3.exceptions.ReadTimeoutError):
                    result = "timeout"
                    error = failure(path, Code.UPSTREAM_TIMEOUT, f"no response in {limit:.2f} s")
                    raise error if limit >= FAIR_SECONDS else GaveUp(error.api_code) from None
                except requests.ConnectionError as error:
                    result = "unreachable"
                    if not (may_retry and idempotent):
                        kind, number = _root_cause(error)
                        failed = failure(path, Code.UNAVAILABLE, f"the connection failed: {kind}, errno {number}")
                        raise GaveUp(failed.api_code) if number in NO_DESCRIPTOR else failed from None
                except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                    # Cut short, too long or garbled: WeChat has handled the request, so it is not sent again.
                    raise failure(path, Code.UPSTREAM_INVALID, f"broken response: {type(error).__name__}") from None
                finally:
                    metrics.WECHAT_CALLS.labels(path, result, outcome).inc()
                time.sleep(seconds_left(RETRY_PAUSE_SECONDS))
        raise AssertionError("unreachable")

    @contextmanager
    def _place(self, path: str) -> Iterator[None]:
        """Hold a place for a call, which raises Failed, or calls `_count(path, 0)` when WeChat has responded.

        :raises ApiError: UNAVAILABLE if the interface keeps failing, or if there is no place.
        """
        began = time.monotonic()
        if self._failures[path] >= FAILURES:
            if began < self._next_trial[path]:
                raise ApiError(Code.UNAVAILABLE)
            self._next_trial[path] = began + PAUSE_SECONDS
        is_free = self._places.acquire(timeout=seconds_left(PLACE_SECONDS))
        metrics.POOL_WAIT_SECONDS.labels("wechat").observe(time.monotonic() - began)
        if not is_free:
            metrics.SHED.labels("wechat").inc()
            raise ApiError(Code.UNAVAILABLE)
        try:
            with metrics.POOL_IN_USE.labels("wechat").track_inprogress():
                yield
        except Failed:
            self._count(path, self._failures[path] + 1)
            raise
        finally:
            self._places.release()

    def _count(self, path: str, failures: int) -> None:
        """Note how many calls of an interface in a row have failed."""
        was_open, is_open = self._failures[path] >= FAILURES, failures >= FAILURES
        self._failures[path], self._next_trial[path] = failures, time.monotonic() + PAUSE_SECONDS
        if is_open != was_open:
            metrics.BREAKER_OPEN.set(self.is_failing)
            level, text = (logging.ERROR, "keeps failing: calls pause") if is_open else (logging.INFO, "responds again")
            logger.log(level, "WeChat %s", text, extra={"interface": path})

    def _exchange(self, path: str, params: Query, body: Body, limit: float) -> tuple[int, str, bytes]:
        """Send a request and read the response.

        :param limit: seconds for each part of the response; where there are greenlets the caller's ends all of it.
        """
        # As raw UTF-8: with \u escapes WeChat's content check lets everything pass.
        data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        method = "GET" if body is None else "POST"
        request = requests.Request(method, self._base_url + path, headers, data=data, params=params).prepare()
        # A second to connect.
        with self._adapter.send(request, timeout=(1, limit), **self._options) as response:
            content = response.raw.read(MAXIMUM_ANSWER_BYTES + 1, decode_content=True)
            if len(content) > MAXIMUM_ANSWER_BYTES:
                raise requests.RequestException
            return response.status_code, response.headers.get("Content-Type", ""), content


def failure(path: str, code: Code, why: str, errcode: int | None = None) -> ApiError:
    """Log why a call failed, which our response does not reveal; WeChat's support asks for the `rid` in errmsg."""
    goes_away = code in (Code.UNAVAILABLE, Code.UPSTREAM_TIMEOUT)
    level = logging.INFO if code.number < 500 else logging.WARNING if goes_away else logging.ERROR
    fields = {"interface": path, "code": code.number, "reason": why, "errcode": errcode}
    logger.log(level, "WeChat call failed", extra=fields)
    kind = Failed if code.number >= 500 and errcode in (None, BUSY) else ApiError
    return kind(code, message=MESSAGES.get(errcode or 0))


def unexpected_response(path: str, why: str, answer: Mapping[str, Any]) -> ApiError:
    """Log that a response is not understood, with the names of its fields and none of their values."""
    names = sorted(name for name in answer if re.fullmatch(r"\w{1,40}", name, re.ASCII))[:20]
    return failure(path, Code.UPSTREAM_INVALID, f"{why}; fields received: {', '.join(names) or 'none'}")


def _parse(path: str, media: bool, status: int, content_type: str, content: bytes) -> tuple[int, Any]:
    """Read the body as UTF-8 JSON, whatever its content type, unless it is media.

    :returns: the errcode, where absent and 0 both mean success, and the body.
    """
    if media and status == 200 and content_type.startswith(MEDIA_TYPES) and content[:1] != b"{":
        return 0, content
    answer = lenient.read(content, path)
    if status != 200 or answer is None:
        raise failure(path, Code.UPSTREAM_INVALID, f"HTTP {status}, {len(content)} bytes, not a JSON object")
    errcode = answer.get("errcode") or 0
    if type(errcode) is not int or abs(errcode) >= 10**9:  # a span with more would fail the export of all others
        raise unexpected_response(path, "errcode is not a number of at most nine digits", answer)
    return errcode, answer


def _root_cause(error: BaseException) -> tuple[str, int | None]:
    """The name and number of the innermost exception, such as ConnectionRefusedError; its text contains the URL."""
    while error.__context__:
        error = error.__context__
    return type(error).__name__, getattr(error, "errno", None)
