"""One call for all callers that need its result at the same moment, across processes."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from flask import current_app
from redis import Redis
from redis.exceptions import RedisError
from redis.lock import Lock

from concurrency import GaveUp, seconds_left
from errors import ApiError, Code, Message
from storage.cipher import Cipher, DecryptionError

_POLL_SECONDS = 0.02
_FOLLOW_SECONDS = 10
_CALL_SECONDS = 60
_RELEASE_SECONDS = 1
_RESULT_SECONDS = 5
_ERROR_SECONDS = 3


Kept = tuple[str | None, float, str | None]
"""What Redis holds for a key: the result, the seconds for which it is still kept, and why the call is not repeated for
now: the name of a Code if it failed, "" if it succeeded, None if it may be repeated."""

Look = Callable[[Kept, bool], str | None]
Call = Callable[[Lock], tuple[str, int, int]]


class SingleFlight:
    """Calls that one process makes at a time, under a lock in Redis, while the others wait for the result.

    :param cipher: results are kept encrypted.
    """

    def __init__(self, redis: Redis, cipher: Cipher) -> None:
        self._redis = redis
        self._cipher = cipher

    def run(self, key: str, look: Look, call: Call, *, patience: float = _CALL_SECONDS) -> str:
        """Return the kept result if `look` accepts it; otherwise one process makes the call and the others wait for it.

        A call costs four round trips to Redis: the lock, `read`, the result and the release.

        :param key: names the call; kept in Redis, so it must not reveal anything.
        :param look: returns a result, or None to have the call made, or raises what the call raised. The second
            argument is whether another process was found making the call.
        :param call: returns the result, the seconds to keep it, and the seconds for which the call is not repeated.
        :param patience: seconds that the call takes at most, unless its request ends before; after that its process is
            assumed dead.
        :raises ApiError: what `look` and `call` raise; UNAVAILABLE if another process takes too long or crashed.
        :raises redis.exceptions.RedisError: if Redis is away.
        """
        deadline = time.monotonic() + seconds_left(_FOLLOW_SECONDS)
        lock = self._redis.lock(f"{key}:lock", timeout=seconds_left(patience) + _RELEASE_SECONDS, blocking=False)
        waited = False
        while True:
            is_locked = lock.acquire()
            try:
                kept = self.read(key)
                result = look(kept, waited)
                if result is None and is_locked:
                    result = self._lead(key, call, lock, pause=kept[2])
            except RedisError:
                is_locked = False  # a Redis that hangs is not waited for twice: the lock expires
                raise
            finally:
                if is_locked:
                    with suppress(RedisError):  # the call outlasted the lock, or the lock expires by itself
                        lock.release()
            if result is not None:
                return result
            if time.monotonic() > deadline:
                raise ApiError(Code.UNAVAILABLE)
            waited = True
            time.sleep(_POLL_SECONDS)

    def read(self, key: str) -> Kept:
        """Read what is kept for a key, in one round trip."""
        with self._redis.pipeline() as pipeline:
            pipeline.mget(key, f"{key}:pause")
            pipeline.pttl(key)
            (encrypted, pause), milliseconds_left = pipeline.execute()
        result = None
        with suppress(DecryptionError):  # nothing is kept, or it is encrypted under a key that this process lacks
            result = self._cipher.decrypt((encrypted or b"").decode(), key)
        return result, milliseconds_left / 1000, None if pause is None else pause.decode()

    def _lead(self, key: str, call: Call, lock: Lock, pause: str | None) -> str:
        pause_key = f"{key}:pause"
        if pause is not None:
            self._redis.delete(pause_key)  # of an earlier call: callers that wait for this one must not read it
        try:
            result, seconds, pause_seconds = call(lock)
        except (RedisError, GaveUp):
            raise
        except Exception as error:  # a crash too: the call may have been made, so waiting callers do not repeat it
            code = error.api_code if isinstance(error, ApiError) else Code.UNAVAILABLE
            self._redis.set(pause_key, code.name, ex=_ERROR_SECONDS)
            raise
        with self._redis.pipeline() as pipeline:
            pipeline.set(key, self._cipher.encrypt(result, key), ex=seconds)
            if pause_seconds:
                pipeline.set(pause_key, "", ex=pause_seconds)
            pipeline.execute()
        return result


def single_flight(key: str, call: Callable[[], Any], *, remember: int, messages: Mapping[Code, Message]) -> Any:
    """Redeem a code of WeChat's, which works once, and share the outcome with callers that ask while it is running, or
    within five seconds after it succeeded: the response to the first one may have been lost.

    :param key: as for `SingleFlight.run`.
    :param call: its result must be JSON.
    :param remember: seconds for which a call that succeeded is not made again.
    :param messages: what these codes say here; of an error that was raised there, only the code is known.
    :returns: what `call` returned, here or in another process.
    :raises ApiError: WECHAT_CODE_USED if the call had succeeded before that; what `call` raised, here or there, after
        which it may be made again; UNAVAILABLE if it crashed there or takes too long.
    :raises redis.exceptions.RedisError: if Redis is away.
    """

    def look(kept: Kept, waited: bool) -> str | None:
        result, _, pause = kept
        if result is not None:
            return result
        if pause == "":
            raise ApiError(Code.WECHAT_CODE_USED)
        if waited and pause:
            raise ApiError(Code[pause])
        return None

    def call_once(_: Lock) -> tuple[str, int, int]:
        return json.dumps(call()), _RESULT_SECONDS, remember

    flights: SingleFlight = current_app.extensions["single_flight"]
    try:
        return json.loads(flights.run(key, look, call_once))
    except ApiError as error:
        error.message = messages.get(error.api_code, error.message)
        raise
