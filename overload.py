"""What a worker does when more is asked of it than it can do: it refuses at the door, the least important first.

Requests wait at the door while others are served: those that were begun go first. Of those that wait the most important
is begun next, and who has waited too long is refused: "controlled delay", https://queue.acm.org/detail.cfm?id=2839461.
As in DAGOR, what counts is how long requests wait, not how long they take: https://doi.org/10.1145/3267809.3267823
"""

import logging
import math
import random
import re
import secrets
import time
from bisect import insort
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import gevent
from gevent.event import AsyncResult, Event

from errors import RETRY_SECONDS, Code, Message, envelope
from telemetry import metrics

logger = logging.getLogger(__name__)

AT_ONCE = 16
"""So many requests are in flight at once; further ones are begun one by one, whenever all those wait."""
WRITES, READS, STRANGERS, LOGINS, PROBES = 0, 1, 2, 3, 4
"""The classes, the most important first: what a user writes, and reads; requests without a known session; logins, many
of which may come at once, and have to wait for WeChat anyway; and probes beyond PROBES_A_SECOND, which nobody needs.
"""
PATIENCE_SECONDS = 0.1, 0.1, 0.1, 3, math.inf
LITTLE_PATIENCE_SECONDS = 0.1, 0.01, 0.01, 3, math.inf
"""How long a request waits, by its class; and how long if there has always been another one for 0.1 s, without logins.
What users write comes first, so it waits only while the worker does something else.
"""
BEAT_SECONDS, RAISE_A_BEAT = 0.02, 0.1
"""How often it is looked who has waited too long, and how much more is let in if nobody has; in classes."""
FEW_A_SECOND, PROBES_A_SECOND = 5, 100
KNOWN_SESSIONS = 20_000
BUSY = Message("服务繁忙，请稍后再试", "Too many requests at the moment: retry later")

_LOGIN = re.compile(rb"POST /api/(v1/)?auth/wechat ")
_PROBE = re.compile(rb"(GET|HEAD|OPTIONS) /(livez|readyz|metrics)[ ?]")
_TOKEN = re.compile(rb"\r\n(?:Authorization: *Bearer +|Cookie:[^\r\n]*\bsession=)([^\s;]+)", re.IGNORECASE)
_ENDS = re.compile(rb"^HEAD | HTTP/1\.0\r|\n(Connection: *close|Transfer-Encoding|Expect)", re.IGNORECASE)
_LENGTH = re.compile(rb"\nContent-Length(?:: *(\d{1,6})\r)?", re.IGNORECASE)
_SECONDS = re.compile(rb"\r\nX-Request-Timeout: *(\d{1,6}(?:\.\d{1,6})?)\r", re.IGNORECASE)
_ENGLISH = re.compile(rb"\r\nAccept-Language: *en", re.IGNORECASE)
_RESPONSE = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
    b"Retry-After: %d\r\nX-Trace-Id: %s\r\nConnection: %s\r\n\r\n%s"
)
_place_of_request: ContextVar[float] = ContextVar("place", default=LOGINS)
_BODIES = [envelope(Code.UNAVAILABLE, None, text) for text in BUSY]


class Door:
    """Decides which requests of this process are begun, and when.

    Requests have places: their class, and within it one by their user and the hour, so that an overload does not strike
    all users a little, nor always the same ones.

    :param in_flight: how many requests may be in flight, without those that wait for WeChat. With no more clients than
        that nobody waits at the door: each of them waits for one response, so it cannot be for long.
    :param elsewhere: how many may wait for WeChat, or at the door to do so. Beyond that logins are refused at once.
    :param seconds: how long a request may take, unless its caller asks for less.
    """

    def __init__(self, in_flight: int, elsewhere: int, seconds: float = math.inf) -> None:
        # From this level on requests are refused at once; never logins.
        self.in_flight, self.level = 0, float(LOGINS)
        self.clients: Collection[object] = ()
        """Those who are connected; none if requests do not come through this door."""
        self._most, self._most_elsewhere, self._seconds = in_flight, elsewhere, seconds
        self._users: dict[int, int] = {}
        # By their places; since when and for how long at most they wait, and whether they are begun or refused.
        self._waiting: list[tuple[float, float, float, AsyncResult]] = []
        self._elsewhere, self._somebody_waits = 0, Event()
        self._nobody_waited_at, self._patience = -math.inf, PATIENCE_SECONDS
        # Those of the second before, those of this one, and the trace id of the line about the refused.
        self._before, self._requests, self._probes, self._refused, self._trace_id = 0, 0, 0, 0, ""

    def remember(self, token: str, user_id: int) -> None:
        """Keep whose session this is; only while the process lives, and not the token itself."""
        self._users.pop(key := hash(token.encode()), None)
        if len(self._users) >= KNOWN_SESSIONS:
            del self._users[next(iter(self._users))]  # not seen for longest
        self._users[key] = user_id

    def refusal(self, head: bytes) -> bytes | None:
        """Return the response to a request that is refused, or None when it may begin.

        It says `Connection: close` unless it is certain where the next request begins, and to logins that are too many.

        :param head: what has arrived of the request.
        """
        is_login, is_probe = _LOGIN.match(head) is not None, _PROBE.match(head) is not None
        is_one_too_many = is_login and self._elsewhere >= self._most_elsewhere
        self._requests += 1
        self._probes += is_probe
        are_few = max(self._before, self._requests) <= FEW_A_SECOND or (is_probe and self._probes <= PROBES_A_SECOND)
        if not (are_few or len(self.clients) <= self._most):
            place = PROBES if is_probe else LOGINS + 0.5 * (not is_one_too_many) if is_login else self._place(head)
            _place_of_request.set(min(place, LOGINS))
            if self.level <= place < LOGINS:
                return self._response(head, "queue")
            if self.in_flight >= self._most * (1 - place / 8) and not is_probe:
                return self._response(head, "in_flight")
            self._elsewhere += is_login
            begins = self._wait(place, float(asked[1]) if (asked := _SECONDS.search(head)) else self._seconds)
            self._elsewhere -= is_login
            if not begins:
                return self._response(head, "queue")
        return self._response(head, "wechat") if is_one_too_many else None

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Let other requests begin while one waits for WeChat; then it waits for its turn again."""
        self.in_flight -= 1
        self._elsewhere += 1
        try:
            yield
            if len(self.clients) > self._most:
                self._wait(_place_of_request.get(), self._seconds)
        finally:
            self._elsewhere -= 1
            self.in_flight += 1

    def start(self, clients: Collection[object]) -> None:
        """Let requests in from now on, in the order of their importance.

        :param clients: see `clients`.
        """
        self.clients = clients
        for step, pause in ((self.begin, 0), (self.watch, 0), (self.report, 1)):
            gevent.spawn(_repeat, step, pause)

    def begin(self) -> None:
        """Begin a part of what waits, as soon as something does."""
        self._somebody_waits.wait()
        with gevent.Timeout(BEAT_SECONDS / 4, False):
            gevent.idle()  # all that can go on does so first, and whoever comes is let in
        if self.in_flight > AT_ONCE // 2:
            gevent.sleep(BEAT_SECONDS / 10)  # what begins together is read together, at half the cost
        for _ in range(min(max(AT_ONCE - self.in_flight, 1), len(self._waiting))):
            place, since, _, begins = self._waiting.pop(0)
            begins.set(time.monotonic() - since <= self._patience[int(place)])
            if place >= LOGINS:  # each of which keeps others waiting for as long as several reads
                break
        if not self._waiting:
            self._somebody_waits.clear()

    def watch(self) -> None:
        """Refuse whoever has waited too long, a beat from now, and measure how long the others have."""
        due = time.monotonic() + BEAT_SECONDS
        gevent.sleep(BEAT_SECONDS)
        late = max(time.monotonic() - due, 0)
        metrics.QUEUE_SECONDS.observe(self.refuse(late) + late)

    def refuse(self, late: float = 0) -> float:
        """Refuse whoever has waited too long; return how long the others have at most, in seconds, without logins.

        :param late: for how many seconds nobody could have begun, as the worker did something else.
        """
        now, waiting, refused = time.monotonic() - late, [], []
        is_overloaded = self.level < LOGINS or now - self._nobody_waited_at > PATIENCE_SECONDS[WRITES]
        self._patience = LITTLE_PATIENCE_SECONDS if is_overloaded else PATIENCE_SECONDS
        for one in self._waiting:
            place, since, seconds, begins = one
            if now - since > min(self._patience[int(place)], seconds):
                begins.set(False)  # who has asked for less time says nothing about the others
                refused.append(place if now - since > self._patience[int(place)] else LOGINS)
                metrics.DEADLINES_MISSED.inc(now - since > seconds)
            else:
                waiting.append(one)
        self._waiting = waiting
        self.level = min(*refused, self.level + RAISE_A_BEAT, LOGINS)
        others = [now - since for place, since, *_ in waiting if place < LOGINS]
        if not others:
            self._nobody_waited_at = now
        return max(others, default=0.0)

    def report(self) -> None:
        """End a second: log that requests were refused in it; their responses have the trace id of this line."""
        if self._refused:
            reason = f"{self._refused} refused; {self.in_flight} in flight, {len(self._waiting)} wait"
            logger.warning("requests refused", extra={"traceId": self._trace_id, "reason": reason})
        self._before, self._requests, self._probes, self._refused = self._requests, 0, 0, 0
        self._trace_id = secrets.token_hex(16)

    def _wait(self, place: float, seconds: float) -> bool:
        """Wait at the door; return whether the request begins, instead of being refused."""
        begins = AsyncResult()
        # Behind those of the same place.
        insort(self._waiting, (place, time.monotonic(), min(seconds, self._seconds), begins), key=lambda one: one[0])
        self._somebody_waits.set()
        return bool(begins.get())

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
        lengths, body_at = _LENGTH.findall(head) or [b"0"], head.find(b"\r\n\r\n") + 4
        is_whole = body_at > 3 and lengths == [b"%d" % (len(head) - body_at)] and not _ENDS.search(head)
        retry, trace_id = random.randint(*RETRY_SECONDS), self._trace_id.encode()  # noqa: S311
        # Idle connections of 1,000 logins that came at once would take 15 MB.
        connection = b"keep-alive" if is_whole and reason != "wechat" else b"close"
        return _RESPONSE % (len(body), retry, trace_id, connection, body)


def _repeat(step: Callable[[], None], pause: float) -> None:
    """Do something for ever, whatever it raises, such as a lack of memory: without it nobody would get in."""
    while True:
        try:
            step()
        except Exception:
            logger.exception("the door goes on")
            gevent.sleep(BEAT_SECONDS)
        gevent.sleep(pause)
