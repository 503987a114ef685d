"""Rate limits that all instances share, without a round trip to Redis in any request.

Each process counts by itself, and settles with Redis beside its requests: it writes how many it has counted of a
caller, and reads how many the others have. So settling twice changes nothing, and after an outage of Redis it catches
up. It settles after each 2 % of the limit that it has counted of a caller, or two requests if that is more. By so many
each process may exceed the limit, and by what it serves during a round trip. Without Redis each keeps to it by itself.

The moving window is estimated from two fixed ones: the current one, and of the previous one the part that is left.
(The library `limits` has no storage that does this. Its one for a single process looks at all keys every 10 ms.)
"""

import hmac
import math
import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from flask import Flask
from redis.exceptions import RedisError

CALLERS = 20_000
"""How many callers a process knows of in two windows; beyond that it forgets whom it has not seen for longest."""

SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
Key = tuple[int, str]


class Count:
    """Requests of a caller in one window: in this process, those of them that are settled, and in the others."""

    own = settled = others = 0


class RateLimit:
    """At most so many requests of each caller in so many seconds.

    :param name: tells it from other limits in Redis.
    """

    def __init__(self, app: Flask, name: str, amount: int, seconds: int) -> None:
        self.amount, self.seconds = amount, seconds
        self._app, self._name = app, name
        self._counts: OrderedDict[Key, Count] = OrderedDict()
        self._due: set[Key] = set()
        self._lock = threading.Lock()
        self._settler = ThreadPoolExecutor(1, thread_name_prefix="rate-limits")

    def take(self, caller: str) -> tuple[int, int]:
        """Count a request of a caller, unless it exceeds the limit.

        :returns: how many more would be allowed now, -1 if this one is not; and in how many seconds there may be more.
        """
        now = time.time() / self.seconds
        key = window, _ = int(now), caller
        rest = window + 1 - now  # of this window, and the part of the previous one that still counts
        with self._lock:
            previous, count = self._counts.get((window - 1, caller), Count()), self._counts.setdefault(key, Count())
            self._counts.move_to_end(key)
            while len(self._counts) > CALLERS:
                self._counts.popitem(last=False)
            earlier, used = previous.own + previous.others, count.own + count.others
            left = self.amount - used - earlier * rest
            count.own += left >= 1
            if count.own - count.settled >= max(2, self.amount // 50) and key not in self._due:
                if not self._due:  # otherwise what is due is taken along
                    self._settler.submit(self._settle)
                self._due.update(((window - 1, caller), key))
        if left >= 1:
            return int(left) - 1, math.ceil(rest * self.seconds)
        # In this window, when enough of the previous one is over; otherwise in the next, when enough of this one is.
        wait = (1 - left) / earlier if 1 - left <= earlier * rest else rest + (used + 1 - self.amount) / used
        return -1, math.ceil(wait * self.seconds)

    def _settle(self) -> None:
        process, secret = f"{self._app.config['INSTANCE']}:{os.getpid()}", self._app.config["SECRET_KEY"].encode()
        with self._lock:
            due, self._due = self._due, set()
            counts = {key: self._counts.setdefault(key, Count()) for key in due}
        with suppress(RedisError), self._app.extensions["redis"].pipeline(transaction=False) as pipeline:
            for (window, caller), count in counts.items():
                name = f"rate:{self._name}:{window}:{hmac.digest(secret, caller.encode(), 'sha256').hex()}"
                pipeline.hset(name, process, count.own).expire(name, 2 * self.seconds).hgetall(name)
            for count, settled in zip(counts.values(), pipeline.execute()[2::3], strict=True):
                count.settled = int(settled.pop(process.encode()))
                count.others = sum(map(int, settled.values()))


def init_app(app: Flask) -> None:
    limits = app.extensions["rate_limits"] = {}
    for name, setting in (("address", "LOGIN_RATE"), ("app", "APP_LOGIN_RATE"), ("session", "SESSION_RATE")):
        amount, _, unit = app.config[setting].partition("/")
        if unit:  # or it is off
            limits[name] = RateLimit(app, name, int(amount), SECONDS[unit])
