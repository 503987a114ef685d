"""How long a request may wait, how much expensive work runs at once, what runs in parallel and is read together."""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from functools import partial
from typing import Any

import gevent
from flask import Flask, current_app, has_request_context, request
from gevent import monkey
from gevent.event import AsyncResult
from gevent.lock import Semaphore

from errors import ApiError, Code, handle_error
from overload import Door
from telemetry import access_log, metrics

ROOM = 16
"""An export takes 4 for each part that it reads, a read nothing. `deploy/keys` is a process of its own, with one
connection."""
_turn, _room = Semaphore(1), Semaphore(ROOM)

CLEANUP_SECONDS, LATE_SECONDS = 0.05, 0.1
"""How long a request that is given up may wait to clean up, before that is given up, too; and how shortly before its
deadline a failure counts as a missed one, as waits leave some time to respond.
"""

_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)


class GaveUp(ApiError):
    """The caller's time is over, the caller is gone, or we are out of descriptors: no fault of whom it waited for."""


def seconds_left(at_most: float, reserve: float = 0) -> float:
    """Return how long a wait may take: so many seconds, or less if the request ends before.

    :param reserve: the seconds that must be left after the wait.
    :raises GaveUp: UNAVAILABLE if there is no time left.
    """
    left = _deadline.get() - time.monotonic() - reserve
    if left <= 0:
        raise GaveUp(Code.UNAVAILABLE)
    return min(at_most, left)


def ensure_somebody_waits() -> None:
    """Make sure that the client of this request has not closed its connection.

    :raises GaveUp: if it has. Nobody sees the code, which must not count as a failure of ours.
    """
    connection = request.environ.get("gunicorn.socket") if has_request_context() else None
    if connection is not None and connection.is_gone():
        raise GaveUp(Code.INVALID_INPUT)


def context_for(seconds: float) -> Context:
    """Return the context of this request, but with a deadline so many seconds from now."""
    context = copy_context()
    context.run(_deadline.set, time.monotonic() + seconds)
    return context


@contextmanager
def room(weight: int, seconds: float = 1) -> Iterator[None]:
    """Take a part of the ROOM that this process has for expensive work; for a `with` block, or as a decorator.

    In the order of arrival: what is heavy is not overtaken for ever. As Go's `semaphore.Weighted`.

    :param weight: at most ROOM. Hold nothing that others need while this waits.
    :param seconds: how long to wait for it, if the request does not end before.
    :raises ApiError: UNAVAILABLE if it is not free in time.
    """
    with ExitStack() as taken:
        with gevent.Timeout(seconds_left(seconds), ApiError(Code.UNAVAILABLE)), _turn:
            for _ in range(weight):
                taken.enter_context(_room)
        yield


class TimeOver(BaseException):
    """Ends whatever a request waits for. No `except Exception` may stop it."""


def _end_in_time(app: Flask, wsgi_app: Any, environ: dict[str, Any], start_response: Any) -> Any:
    """Serve a request; respond with 503 if that takes longer than it may, and give up whatever it waits for.

    Its time began with its first byte: the wait at the door counts.
    """
    seconds: float = app.config["REQUEST_SECONDS"]
    if asked := environ.get("HTTP_X_REQUEST_TIMEOUT"):
        if not re.fullmatch(r"\d{1,6}(\.\d{1,6})?", asked, re.ASCII):
            error = ApiError(Code.INVALID_INPUT, errors={"X-Request-Timeout": ["Must be seconds, such as 1.5."]})
            return _respond(app, environ, error, start_response)
        seconds = min(seconds, float(asked))
    seconds -= time.monotonic() - getattr(environ.get("gunicorn.socket"), "began", time.monotonic())
    app.extensions["door"].in_flight += 1
    token = _deadline.set(time.monotonic() + seconds)
    timer = gevent.get_hub().loop.timer(max(seconds, 0), CLEANUP_SECONDS)
    timer.start(gevent.getcurrent().throw, TimeOver)
    try:
        return wsgi_app(environ, start_response)
    except TimeOver:
        timer.stop()
        return _respond(app, environ, ApiError(Code.UNAVAILABLE), start_response)
    except Exception:  # in a teardown, after the response was made and before it is sent
        app.logger.exception("a teardown failed")
        return _respond(app, environ, ApiError(Code.INTERNAL_ERROR), start_response)
    finally:
        timer.close()
        if environ.get(access_log.CODE) in (503, 504) and _deadline.get() - time.monotonic() < LATE_SECONDS:
            metrics.DEADLINES_MISSED.inc()
        _deadline.reset(token)
        app.extensions["door"].in_flight -= 1


def _respond(app: Flask, environ: dict[str, Any], error: ApiError, start_response: Any) -> Any:
    body: Any = None
    with suppress(Exception), app.request_context(environ):  # the same teardown again
        body = handle_error(error)(environ, start_response)
    return body


def in_parallel(functions: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Run functions at the same time, each in a greenlet and an application context of its own.

    :param seconds: for how long one may wait.
    :returns: by the same names the result of each function, or its exception, or a TimeoutError if it is not done.
    """

    def run(function: Callable[[], Any]) -> Any:
        try:
            # Ended by no Exception, which a shared read would raise in all who share it.
            with current_app.app_context(), gevent.Timeout(seconds, False):
                return function()
        except Exception as error:  # noqa: BLE001  gevent would print it
            return error
        return TimeoutError("not done in time")

    context = partial(context_for, seconds)  # a caller who has less time is no reason to call a dependency down
    work = {name: gevent.spawn(context().run, run, function) for name, function in functions.items()}
    return {name: greenlet.get() for name, greenlet in work.items()}


class SharedReads:
    """Reads what requests ask for at the same moment at once, where requests are greenlets. Nothing is kept.

    :param read: returns the values of keys, by key.
    """

    def __init__(self, read: Callable[[list[Any]], Mapping[Any, Any]]) -> None:
        self._read = read
        self._next: tuple[list[Any], AsyncResult] = [], AsyncResult()

    def get(self, key: Any) -> Any:
        """Return the value of a key; None if there is none. Raises what `read` does."""
        if not monkey.is_module_patched("socket"):
            return self._read([key]).get(key)
        keys, found = self._next
        keys.append(key)
        if len(keys) == 1:  # the first one asks for all
            try:
                gevent.sleep(0)  # until all requests that are ready have named their keys
                self._next = [], AsyncResult()
                found.set(self._read(keys))
            except Exception as error:  # noqa: BLE001  raised below, in each of them
                found.set_exception(error)
            except BaseException:  # this request is given up, which concerns no other one
                self._next = [], AsyncResult()
                found.set()
                raise
        values = found.get()
        return (self._read([key]) if values is None else values).get(key)


def init_app(app: Flask) -> None:
    limits = [app.config[name] for name in ("REQUESTS_IN_FLIGHT", "WECHAT_CONCURRENCY", "REQUEST_SECONDS")]
    door = app.extensions["door"] = Door(*limits)
    metrics.SAMPLED[metrics.REQUESTS_IN_FLIGHT] = lambda: door.in_flight
    app.wsgi_app = partial(_end_in_time, app, app.wsgi_app)  # type: ignore[method-assign]
