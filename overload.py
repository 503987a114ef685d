"""What a worker does when more is asked of it than it can do: it refuses at the door, the least important first.

The measure is how late the worker is to begin what waits for it, as in DAGOR and CoDel; how many requests are in flight
is the second one. https://doi.org/10.1145/3267809.3267823, RFC 8289
"""

import logging
import math
import random
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from errors import Code, Message
from telemetry import metrics

logger = logging.getLogger(__name__)

TARGET_SECONDS = 0.005
"""How late a worker may be. Each request waits so long more than once: to be read, begun, and continued."""
BEAT_SECONDS = 0.02
LOWER_A_SECOND, RAISE_A_SECOND = 3.0, 0.5
"""How fast the level goes down while the worker is late, and up again; in classes."""
HOLD_SECONDS = 1
"""For how long it stays where a class is refused as a whole: what was begun before still makes the worker late."""
WRITES, READS, STRANGERS = 0, 1, 2
"""The classes, the most important first: what a user writes, and reads, and requests without a known session."""
EVERYTHING = STRANGERS + 1.0
FEW_A_SECOND = 5
FEW_IN_FLIGHT = 36
"""With so few callers, each of whom waits for a response, a worker may be busy, but nobody waits for long."""
KNOWN_SESSIONS = 20_000
RETRY_SECONDS = 1, 5
"""Of Retry-After, at random, so that clients do not come back together."""
LOGIN_SECONDS = 3
"""How long a login waits to be begun. Many may come at once; they need little, but not all at the same moment."""
BUSY = Message("服务繁忙，请稍后再试", "Too many requests at the moment: retry later")

_LOGIN = re.compile(rb"POST /api/(v1/)?auth/wechat ")
_NEVER_REFUSED = (b"GET /livez ", b"GET /readyz ", b"GET /metrics ")
_TOKEN = re.compile(rb"\r\n(?:Authorization: *Bearer +|Cookie:[^\r\n]*\bsession=)([^\s;]+)", re.IGNORECASE)
_ENDS = re.compile(rb"\r\n(Connection: *close|Content-Length|Transfer-Encoding|Expect)", re.IGNORECASE)
_ENGLISH = re.compile(rb"\r\nAccept-Language: *en", re.IGNORECASE)
_RESPONSE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"Retry-After: %d\r\nX-Trace-Id: %s\r\nConnection: %s\r\n\r\n%s"
)
_BODIES = [msgspec.json.encode({"code": Code.UNAVAILABLE.number, "message": text, "data": None}) for text in BUSY]


class Door:
    """Decides which requests of this process are begun.

    Requests have places: their class, and within it one by their user and the hour, so that an overload does not strike
    all users a little, nor always the same ones. Those up to the level are begun.

    :param in_flight: how many requests may be in flight, without those that wait for WeChat.
    """

    def __init__(self, in_flight: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.in_flight = 0
        self.level = EVERYTHING
        self._limit = in_flight
        self._clock = clock
        self._users: dict[int, int] = {}
        self._last = deque([-math.inf] * FEW_A_SECOND, FEW_A_SECOND)
        self._is_late = False
        self._held_until = -math.inf
        self._logins, self._pace, self._turns = 0, 1, threading.Semaphore(0)
        self._refused = 0
        self._trace_id = ""

    def remember(self, token: str, user_id: int) -> None:
        """Keep whose session this is; only while the process lives, and not the token itself."""
        if len(self._users) >= KNOWN_SESSIONS:
            self._users.clear()
        self._users[hash(token.encode())] = user_id

    def refusal(self, head: bytes) -> bytes | None:
        """Return the response to a request that is not begun, or None if it is. A login may have to wait before that.

        It says `Connection: close` unless it is certain where the next request begins.

        :param head: what has arrived of the request.
        """
        if (self._is_late or self._logins) and _LOGIN.match(head):
            self._logins += 1
            began = self._turns.acquire(timeout=LOGIN_SECONDS)
            self._logins -= 1
            return None if began else self._response(head, "queue")
        now = self._clock()
        few = self.in_flight < FEW_IN_FLIGHT or now - self._last[0] > 1
        self._last.append(now)
        if few or head.startswith(_NEVER_REFUSED):
            return None
        place = self._place(head)
        if place > self.level:
            return self._response(head, "queue")
        if self.in_flight >= self._limit * (1 - place / 2 / EVERYTHING):
            return self._response(head, "in_flight")
        return None

    def beat(self, late: float) -> None:
        """Adapt the level, and begin logins, BEAT_SECONDS after the last time and this much later."""
        self._is_late = late > TARGET_SECONDS
        self._pace = max(1, self._pace // 2 if self._is_late else self._pace + 1)
        if self._logins:
            self._turns.release(min(self._pace, self._logins))
        before, now = self.level, self._clock()
        if not self._is_late or self.in_flight < FEW_IN_FLIGHT:
            self.level = min(before + RAISE_A_SECOND * (BEAT_SECONDS + late), EVERYTHING)
        elif now > self._held_until:
            self.level = max(before - LOWER_A_SECOND * (BEAT_SECONDS + late), math.ceil(before) - 1.0, 0.0)
            if self.level.is_integer():
                self._held_until = now + HOLD_SECONDS

    def report(self) -> None:
        """Log that requests were refused since the last report; their responses have the trace id of this line."""
        if self._refused:
            reason = f"{self._refused} refused; level {self.level:.2f} of {EVERYTHING:.0f}; {self.in_flight} in flight"
            logger.warning("requests refused", extra={"traceId": self._trace_id, "reason": reason})
        self._refused, self._trace_id = 0, secrets.token_hex(16)

    def watch(self) -> None:
        """Measure how late the worker is, for ever: the part of it for which this thread itself used the CPU."""
        for number in range(10**18):
            began, used = time.monotonic(), time.thread_time()
            time.sleep(BEAT_SECONDS)
            late = min(time.monotonic() - began - BEAT_SECONDS, time.thread_time() - used)
            metrics.QUEUE_SECONDS.observe(max(late, 0))
            self.beat(late)
            if number % round(1 / BEAT_SECONDS) == 0:
                self.report()

    def _place(self, head: bytes) -> float:
        token = _TOKEN.search(head)
        user = self._users.get(hash(token[1])) if token else None
        if user is None:
            return STRANGERS + random.random()  # noqa: S311
        kind = READS if head.startswith((b"GET ", b"HEAD ")) else WRITES
        return kind + hash((user, time.time() // 3600)) % 1000 / 1000

    def _response(self, head: bytes, reason: str) -> bytes:
        metrics.SHED.labels(reason).inc()
        self._refused += 1
        body = _BODIES[_ENGLISH.search(head) is not None]
        is_whole = head.startswith(b"GET ") and head.find(b"\r\n\r\n") == len(head) - 4 and not _ENDS.search(head)
        retry, trace_id = random.randint(*RETRY_SECONDS), self._trace_id.encode()  # noqa: S311
        return _RESPONSE % (len(body), retry, trace_id, b"keep-alive" if is_whole else b"close", body)
