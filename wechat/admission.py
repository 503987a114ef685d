"""Which calls of WeChat are begun: so many at a time, and one now and then of an interface that keeps failing.

The circuit breaker is our own, as no library fits: pybreaker 1.4.1 lets one call at a time through (`call` holds its
lock) and follows the machine's clock; circuitbreaker 2.1.3 and pyresilience 0.4.1 have no bound for trials; and each
takes a caller who gives up for a success or a failure of WeChat's.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from concurrency import seconds_left
from errors import ApiError, Code
from telemetry import metrics

logger = logging.getLogger(__name__)

PLACE_SECONDS = 0.1
"""How long to wait for a place."""
FAILURES = 10
"""So many in a row open the breaker."""
PAUSE_SECONDS = 5
"""From one trial, or a failure, to the next trial while it is open. A trial ends before, unless it is made twice."""


class Failed(ApiError):
    """WeChat is to blame: no response in time, none that makes sense, or it is busy."""


class Admission:
    """Admits the calls of this process. Thread-safe.

    :param places: how many may be made at a time.
    :param door: whose requests in flight are those that do not wait for WeChat.
    """

    def __init__(self, places: int, door: Any) -> None:
        self._places = threading.BoundedSemaphore(places)
        self._door = door
        self._failures: Counter[str] = Counter()
        self._next_trial: dict[str, float] = {}

    @property
    def is_open(self) -> bool:
        """Whether an interface keeps failing: the state of the circuit breaker."""
        return max(self._failures.values(), default=0) >= FAILURES

    @contextmanager
    def place(self, path: str) -> Iterator[None]:
        """Hold a place for a call, which raises Failed, or calls `count(path, 0)` when WeChat has responded.

        :raises ApiError: UNAVAILABLE if the interface keeps failing, or if there is no place.
        """
        began = time.monotonic()
        if self._failures[path] >= FAILURES:
            if began < self._next_trial[path]:
                raise ApiError(Code.UNAVAILABLE)
            self._next_trial[path] = began + PAUSE_SECONDS
        is_free = self._places.acquire(timeout=seconds_left(PLACE_SECONDS))
        metrics.POOL_WAIT_SECONDS.labels("wechat").inc(time.monotonic() - began)
        if not is_free:
            metrics.SHED.labels("wechat").inc()
            raise ApiError(Code.UNAVAILABLE)
        self._door.in_flight -= 1
        try:
            with metrics.POOL_IN_USE.labels("wechat").track_inprogress():
                yield
        except Failed:
            self.count(path, self._failures[path] + 1)
            raise
        finally:
            self._door.in_flight += 1
            self._places.release()

    def count(self, path: str, failures: int) -> None:
        """Note how many calls of an interface in a row have failed."""
        was_open, is_open = self._failures[path] >= FAILURES, failures >= FAILURES
        self._failures[path], self._next_trial[path] = failures, time.monotonic() + PAUSE_SECONDS
        if is_open != was_open:
            metrics.BREAKER_OPEN.set(self.is_open)
            level, text = (logging.ERROR, "keeps failing: calls pause") if is_open else (logging.INFO, "responds again")
            logger.log(level, "WeChat %s", text, extra={"interface": path})
