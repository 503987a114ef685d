"""Work in other threads, bounded and with the trace id of its request: after the response, or in parallel."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import copy_context
from typing import Any, cast

from flask import Flask, current_app
from werkzeug.local import LocalProxy

from errors import ApiError, Code
from telemetry import metrics, traces

logger = logging.getLogger(__name__)

THREADS = 8
BACKLOG = 1000


class Background:
    """Runs functions in threads of this process, in the order in which they are submitted.

    At a graceful stop pending functions are finished, as long as gunicorn's `graceful_timeout` allows.

    :param threads: how many run at once.
    :param backlog: how many may be pending, running ones included.
    """

    def __init__(self, app: Flask, threads: int, backlog: int) -> None:
        self._app = app
        self._backlog = backlog
        # Its queue is finished before the interpreter exits.
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="background")
        self.pending: set[Future[None]] = set()

    def ensure_capacity(self) -> None:
        """Make sure that there is room for more work.

        Concurrent requests may exceed the backlog a little.

        :raises ApiError: UNAVAILABLE if too much is pending.
        """
        if len(self.pending) >= self._backlog:
            metrics.BACKGROUND.labels("rejected").inc()
            logger.error("background work rejected", extra={"pending": len(self.pending)})
            raise ApiError(Code.UNAVAILABLE)

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Run a function soon, in an application context of its own. A failure is logged and counted."""
        metrics.BACKGROUND_PENDING.inc()
        future = self.pool.submit(copy_context().run, self._run, function, args)
        self.pending.add(future)
        future.add_done_callback(self.pending.discard)

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        name = f"{function.__module__}.{getattr(function, '__qualname__', '?')}"
        with suppress(Exception), traces.span(f"background {name}", attributes={"code.function.name": name}):
            try:
                with self._app.app_context():
                    function(*args)
                metrics.BACKGROUND.labels("success").inc()
            except Exception:
                metrics.BACKGROUND.labels("failure").inc()
                logger.exception("background work failed", extra={"function": name})
                raise  # which fails the span
            finally:
                metrics.BACKGROUND_PENDING.dec()


class FanOut:
    """Runs functions in parallel in threads of this process, and waits for them until a deadline.

    A function that still runs from an earlier call is not started again: its result counts for both. So one that hangs
    occupies one thread, however often it is called; the end of the process waits for that thread.

    :param threads: how many run at once.
    """

    def __init__(self, app: Flask, threads: int) -> None:
        self._app = app
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="fan-out")
        self._lock = threading.Lock()
        self._futures: dict[str, Future[Any]] = {}

    def run(self, functions: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
        """Run functions in parallel, each in an application context of its own.

        :param functions: by their names, which tell one from another in all calls.
        :param seconds: the deadline, from now.
        :returns: by the same names the result of each function, or its exception, or a TimeoutError if it is not done.
        """
        with self._lock:
            for name, function in functions.items():
                if name not in self._futures or self._futures[name].done():
                    self._futures[name] = self.pool.submit(copy_context().run, self._run, function)
            futures = {name: self._futures[name] for name in functions}
        wait(futures.values(), seconds)
        return {name: self._outcome(future) for name, future in futures.items()}

    def _run(self, function: Callable[[], Any]) -> Any:
        with self._app.app_context():
            return function()

    def _outcome(self, future: Future[Any]) -> Any:
        if future.cancel() or not future.done():  # one that has not started never will
            return TimeoutError("not done in time")
        return future.exception() or future.result()


background = cast(Background, LocalProxy(lambda: current_app.extensions["background"]))
"""The background work of this process."""


fan_out = cast(FanOut, LocalProxy(lambda: current_app.extensions["fan_out"]))
"""The parallel calls of this process."""


def init_app(app: Flask) -> None:
    app.extensions["background"] = Background(app, THREADS, BACKLOG)
    app.extensions["fan_out"] = FanOut(app, THREADS)
