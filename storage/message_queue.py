"""Messages whose receipt was confirmed to WeChat: in a Redis stream until they are handled, by any process.

The process that takes a message renews its claim while it works. If it dies, another one, or the next, claims the
message after IDLE_SECONDS. So each is handled at least once; again only if a process died or hung in the middle.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any

from flask import Flask
from opentelemetry import propagate
from opentelemetry.context import attach
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from errors import ApiError, Code
from storage.cipher import cipher
from storage.redis_client import redis
from telemetry import logs, metrics

logger = logging.getLogger(__name__)

STREAM, DEAD = "messages", "messages:dead"
BACKLOG = 2000
"""How many may be pending; with WeChat's usual 1 KB a message they take 3 MB, and never more than 350 MB."""
DEAD_KEPT = 100
KEEP_SECONDS = 7 * 86400
"""For how long after the last one Redis keeps messages that nobody handles, and dead ones."""
THREADS = 8
POLL_SECONDS = 5
"""How often a process renews its claims, and looks for what others have left or are too busy to handle."""
IDLE_SECONDS = 60
"""Longer than gunicorn's `timeout`: the worker that holds a message may hang, and go on."""
TRIES = 3
"""How many processes may die with a message."""

_WORKERS = "workers"
"""The group, and the one consumer of it: what counts is how long ago a claim was renewed, not whose it was."""
_PUT = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM') end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[2]) then return -1 end
redis.call('XADD', KEYS[1], '*', 'sealed', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('SET', KEYS[2], '', 'EX', ARGV[5])
return 1"""
_REMOVE = "redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) redis.call('XDEL', KEYS[1], ARGV[2])"
_FOREVER = Retry(ConstantBackoff(1), -1, (RedisError,))


class MessageQueue:
    """The messages in Redis, and the threads of this process that handle them.

    :param handle: called with each message, in an application context and in the trace of the request that put it.
    """

    def __init__(self, app: Flask, handle: Callable[[Any], object]) -> None:
        self._app, self._handle = app, handle
        # Its commands make no spans: they belong to no request.
        self._redis = Redis(connection_pool=app.extensions["redis"].connection_pool)
        self._in_flight: set[Any] = set()
        self._arrived = threading.Semaphore(0)
        self._stops_at: float | None = None
        self._claims_from = 0.0
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="messages")

    def put(self, key: str, message: Any, remember: int) -> bool:
        """Keep a message until it is handled.

        :param key: identifies it for `remember` seconds.
        :param message: can be written as JSON; it is encrypted.
        :returns: False if it was put before.
        :raises ApiError: UNAVAILABLE if too many are pending.
        :raises redis.exceptions.RedisError: if Redis is away; it may have been put.
        """
        trace: dict[str, str] = {}
        propagate.inject(trace)
        sealed = cipher.encrypt(json.dumps([message, trace, logs.request_fields.get({})]), STREAM)
        arguments = _WORKERS, BACKLOG, sealed, KEEP_SECONDS, remember
        outcome = redis.eval(_PUT, 2, STREAM, f"message:{key}", *arguments)
        if outcome == -1:
            metrics.MESSAGES.labels("rejected").inc()
            raise ApiError(Code.UNAVAILABLE)
        self._arrived.release()
        return bool(outcome)

    def start(self) -> None:
        """Begin to handle messages, in threads of this process: after a fork."""
        threading.Thread(target=self._renew, daemon=True).start()
        for number in range(THREADS):
            self._pool.submit(self._work, claim=number == 0)

    def stop(self, seconds: float) -> None:
        """Handle what is pending, but begin nothing after so many seconds; wait for what was begun."""
        self._stops_at = time.monotonic() + seconds
        self._arrived.release(THREADS)
        self._pool.shutdown()

    def handle_next(self, *, claim: bool = False) -> bool:
        """Handle one message.

        :param claim: take one that a dead process has left, if there is any. They are handled one at a time: one that
            ends its process must not take others with it.
        :returns: whether there was one.
        :raises redis.exceptions.RedisError: if Redis is away.
        """
        for number, stored, times in self._take(claim):
            self._in_flight.add(number)
            try:
                copy_context().run(self._open, stored, times)
                # However long Redis is away: what stays there is handled again.
                remove = partial(self._redis.eval, _REMOVE, 1, STREAM, _WORKERS, number)
                _FOREVER.call_with_retry(remove, lambda error: None)
            finally:
                self._in_flight.discard(number)
            return True
        return False

    def _take(self, claim: bool) -> list[Any]:
        """Return at most one message: its id, what is stored, and how often it was taken before."""
        idle = int(IDLE_SECONDS * 1000)
        for left in self._redis.xpending_range(STREAM, _WORKERS, "-", "+", 1, idle=idle) if claim else ():
            if claimed := self._redis.xclaim(STREAM, _WORKERS, _WORKERS, idle, [left["message_id"]]):
                return [(*claimed[0], left["times_delivered"])]
        streams: Any = self._redis.xreadgroup(_WORKERS, _WORKERS, {STREAM: ">"}, count=1)
        return [(*entry, 0) for _, entries in streams for entry in entries]

    def _open(self, stored: dict[Any, Any], times: int) -> None:
        """Handle a message in the trace of its request, which nothing else in this thread sees."""
        with self._app.app_context():
            try:
                message, trace, fields = json.loads(cipher.decrypt(stored[b"sealed"].decode(), STREAM))
                attach(propagate.extract(trace))
                logs.request_fields.set(fields)
                if times >= TRIES:
                    raise ValueError("Each process that handled it died.")
            except (KeyError, ValueError) as error:
                logger.error("message put aside", extra={"reason": str(error)})
                metrics.MESSAGES.labels("dropped").inc()
                self._redis.xadd(DEAD, stored, maxlen=DEAD_KEPT, approximate=False)
                self._redis.expire(DEAD, KEEP_SECONDS)
                return
            self._handle(message)

    def _work(self, *, claim: bool) -> None:
        while self._stops_at is None or time.monotonic() < self._stops_at:
            try:
                if self.handle_next(claim=claim and time.monotonic() > self._claims_from):
                    continue
            except Exception as error:  # noqa: BLE001  the thread must go on
                if not str(error).startswith("NOGROUP"):  # no message has come yet
                    logger.error("messages cannot be read", extra={"reason": str(error)})
            if self._stops_at:
                return
            self._arrived.acquire(timeout=POLL_SECONDS)

    def _renew(self) -> None:
        while True:
            try:
                if in_flight := list(self._in_flight):
                    self._redis.xclaim(STREAM, _WORKERS, _WORKERS, 0, in_flight, justid=True)
                metrics.MESSAGES_PENDING.set(self._redis.xlen(STREAM))
            except RedisError:  # when it is back, all that are in flight are renewed before any is claimed
                self._claims_from = time.monotonic() + 3 * POLL_SECONDS
            time.sleep(POLL_SECONDS)
