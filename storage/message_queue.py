"""Messages whose receipt was confirmed to WeChat: in a Redis stream until they are handled, by any process.

Who takes a message has CLAIM_MILLISECONDS for it. If its process dies, another one, or the next, takes it again after
that. So each is handled at least once; again only if its process died, could not say that it had handled it, or failed
for a reason that may be over then.
"""

import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flask import Flask
from opentelemetry import propagate, trace
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError

from errors import ApiError, Code
from storage.cipher import cipher
from storage.redis_client import execute_replicated, redis
from telemetry import metrics

logger = logging.getLogger(__name__)

STREAM = "messages"
BACKLOG = 2000
"""How many may be pending. With WeChat's usual 1 KB a message they take 3 MB, and never more than 900 MB: of at most
64 KiB each, which JSON can make four times as long (`9e15` is 9000000000000000.0), and encryption longer by a third."""
KEEP_SECONDS = 7 * 86400
"""For how long after the last one Redis keeps messages that nobody handles."""
THREADS = 8
POLL_SECONDS = 2
CLAIM_MILLISECONDS = 180_000
"""Longer than a message's handlers may take, and gunicorn's `timeout`, within which a worker that hangs is killed."""
TRIES = 3
"""How often a message is taken. A process may die with it, fail, or have no key that decrypts it. While Redis or the
database is away, it does not count."""

_WORKERS = "workers"
"""The group, and the one consumer of it: what counts is how long ago a message was taken, not by whom."""
_PUT = """
if redis.call('EXPIRE', KEYS[2], ARGV[6]) == 1 then return 0 end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[2]) then return -1 end
redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
redis.call('XADD', KEYS[1], '*', 'sealed', ARGV[3], 'trace', ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5])
redis.call('SET', KEYS[2], '', 'EX', ARGV[6])
return 1"""


class MessageQueue:
    """The messages in Redis, and the threads of this process that handle them.

    :param handle: called with each message, in an application context and in the trace of the request that put it.
    """

    def __init__(self, app: Flask, handle: Callable[[Any], object]) -> None:
        self._app, self._handle = app, handle
        self._redis = app.extensions["quiet_redis"]
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="messages")

    def put(self, key: str, message: Any, remember: int) -> bool:
        """Keep a message until it is handled.

        :param key: identifies it for `remember` seconds.
        :param message: can be written as JSON; it is encrypted.
        :returns: False if it was put before.
        :raises ApiError: UNAVAILABLE if too many are pending.
        :raises redis.exceptions.RedisError: if Redis is away; it may have been put.
        """
        ids: dict[str, str] = {}
        propagate.inject(ids)
        entry = cipher.encrypt(json.dumps(message, ensure_ascii=False), STREAM), json.dumps(ids)
        values = _WORKERS, BACKLOG, *entry, KEEP_SECONDS, remember
        pipeline: Any = redis.pipeline(transaction=False).eval(_PUT, 2, STREAM, f"message:{key}", *values)
        (outcome,) = execute_replicated(pipeline)
        if outcome == -1:
            metrics.MESSAGES.labels("rejected").inc()
            raise ApiError(Code.UNAVAILABLE)
        return bool(outcome)

    def start(self) -> None:
        """Begin to handle messages, in threads of this process: after a fork."""
        self._pool.map(self._work, range(THREADS))

    def stop(self) -> None:
        """Begin nothing more, and wait for what was begun."""
        self._stopped.set()
        self._pool.shutdown()

    def handle_next(self, *, claim: bool = False) -> bool:
        """Handle one message. If that raises, it is pending, as if the process had died.

        :param claim: take one that a dead process has left, if there is any. They are handled one at a time: one that
            ends its process must not take others with it.
        :returns: whether there was one.
        :raises redis.exceptions.RedisError: if Redis is away.
        """
        for number, stored, tries in self._take(claim):
            ids = propagate.extract(json.loads(stored[b"trace"]))
            with self._app.app_context(), trace.use_span(trace.get_current_span(ids)):
                if tries < TRIES:
                    try:
                        self._handle(json.loads(cipher.decrypt(stored[b"sealed"].decode(), STREAM)))
                    except (OSError, RedisError, SQLAlchemyError):  # of a process that lives: it counts as no try
                        self._redis.xclaim(STREAM, _WORKERS, _WORKERS, 0, [number], retrycount=tries)
                        raise
                else:
                    logger.error("message dropped", extra={"reason": "Each process died, failed, or has no key."})
                    metrics.MESSAGES.labels("dropped").inc()
            self._redis.pipeline().xack(STREAM, _WORKERS, number).xdel(STREAM, number).execute()
            return True
        return False

    def _take(self, claim: bool) -> list[Any]:
        """Return at most one message: its id, what is stored, and how often it was taken before."""
        metrics.MESSAGES_PENDING.set(pending := self._redis.xlen(STREAM))
        if not pending:  # there may be no stream, either
            return []
        for left in self._redis.xpending_range(STREAM, _WORKERS, "-", "+", 1, idle=CLAIM_MILLISECONDS) if claim else ():
            if claimed := self._redis.xclaim(STREAM, _WORKERS, _WORKERS, CLAIM_MILLISECONDS, [left["message_id"]]):
                return [(*claimed[0], left["times_delivered"])]
        streams: Any = self._redis.xreadgroup(_WORKERS, _WORKERS, {STREAM: ">"}, count=1)
        return [(*entry, 0) for _, entries in streams for entry in entries]

    def _work(self, number: int) -> None:
        while not self._stopped.is_set():
            try:
                found = self.handle_next(claim=number == 0)
            except Exception as error:  # noqa: BLE001  the thread must go on
                logger.error("messages cannot be handled", extra={"reason": f"{type(error).__name__}: {error}"})
                found = False
            if not found:
                self._stopped.wait(POLL_SECONDS)
