"""Work that goes on after the answer: bounded, with the trace id of the request that began it."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, cast

from flask import Flask, current_app
from werkzeug.local import LocalProxy

from errors import ApiError, Code

logger = logging.getLogger(__name__)

THREADS = 8
BACKLOG = 1000


class Background:
    """Runs functions in threads of this process, in the order in which they come.

    What is in hand is finished when the process ends in good order; gunicorn's `graceful_timeout` bounds that.

    :param threads: how many run at once.
    :param backlog: how many may be in hand, those that run included.
    """

    def __init__(self, app: Flask, threads: int, backlog: int) -> None:
        self._app = app
        self._backlog = backlog
        # Its threads are joined, and its queue is worked off, before the interpreter exits.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="background")
        self._lock = threading.Lock()
        self.pending = 0
        self.failures = 0

    def require_room(self) -> None:
        """Make sure that what is about to be promised can be done.

        Requests that ask at the same moment may overfill the backlog.

        :raises ApiError: UNAVAILABLE if there is too much in hand.
        """
        if self.pending >= self._backlog:
            logger.error("background work is refused", extra={"inHand": self.pending})
            raise ApiError(Code.UNAVAILABLE)

    def submit(self, function: Callable[..., Any], *args: Any) -> None:
        """Run a function soon, in an application context of its own. A failure is logged and counted in `failures`."""
        with self._lock:
            self.pending += 1
        self._pool.submit(copy_context().run, self._run, function, args)

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            with self._app.app_context():
                function(*args)
        except Exception:
            with self._lock:
                self.failures += 1
            name = f"{function.__module__}.{function.__qualname__}"
            logger.exception("background work failed", extra={"function": name, "failures": self.failures})
        finally:
            with self._lock:
                self.pending -= 1

    def close(self) -> None:
        """Finish what is in hand and take nothing more."""
        self._pool.shutdown()


background = cast(Background, LocalProxy(lambda: current_app.extensions["background"]))
"""The background work of this process."""


def init_app(app: Flask) -> None:
    app.extensions["background"] = Background(app, THREADS, BACKLOG)
