"""One call for all who need its result at the same moment, in whichever process they are."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from flask import current_app
from redis import Redis
from redis.exceptions import LockError, RedisError
from redis.lock import Lock

from errors import ApiError, Code
from storage.cipher import Cipher, DecryptionError

_POLL_SECONDS = 0.02
_FOLLOW_SECONDS = 5
_RESULT_SECONDS = 10
_ERROR_SECONDS = 3


class AlreadyDone(Exception):
    """The call was made earlier and succeeded."""


class Kept(NamedTuple):
    """What Redis holds for a key."""

    result: str | None
    seconds_left: float
    pause: str | None
    """Why the call is not repeated for now: the name of a Code if it failed, "" if it succeeded."""


Look = Callable[[Kept, bool], str | None]
Call = Callable[[Lock], tuple[str, int, int]]


class SingleFlight:
    """Calls that one process makes at a time, under a lock in Redis, while the others wait for the result.

    :param cipher: results are kept encrypted.
    """

    def __init__(self, redis: Redis, cipher: Cipher) -> None:
        self._redis = redis
        self._cipher = cipher

    def run(self, key: str, look: Look, call: Call, *, patience: float, wait: float) -> str:
        """Return what `look` makes of the result that is kept; where it wants another, one process makes the call.

        :param key: names the call; kept in Redis, so it must not reveal anything.
        :param look: returns a result or None, or raises what the call raised. The second argument is whether another
            process was found making the call.
        :param call: returns the result, the seconds to keep it, and the seconds for which the call is not repeated.
        :param patience: seconds that the call takes at most; after that its process is presumed dead.
        :param wait: seconds to wait for another process.
        :raises ApiError: what `look` and `call` raise; UNAVAILABLE if another process takes too long or crashed.
        :raises redis.exceptions.RedisError: if Redis is away.
        """
        deadline = time.monotonic() + wait
        lock = self._redis.lock(f"{key}:lock", timeout=patience, blocking=False)
        waited = False
        while (result := look(self._read(key), waited)) is None:
            if lock.acquire():
                try:
                    result = look(self._read(key), waited)  # the call may have ended in between
                    return self._lead(key, call, lock) if result is None else result
                finally:
                    with suppress(LockError):  # the call outlasted the lock
                        lock.release()
            if time.monotonic() > deadline:
                raise ApiError(Code.UNAVAILABLE)
            waited = True
            time.sleep(_POLL_SECONDS)
        return result

    def _lead(self, key: str, call: Call, lock: Lock) -> str:
        pause_key = f"{key}:pause"
        self._redis.delete(pause_key)  # the error of an earlier call
        try:
            result, seconds, pause_seconds = call(lock)
        except RedisError:
            raise
        except BaseException as error:  # a crash too: the call may have been made, so those who wait do not repeat it
            code = error.api_code if isinstance(error, ApiError) else Code.UNAVAILABLE
            self._redis.set(pause_key, code.name, ex=_ERROR_SECONDS)
            raise
        self._redis.set(key, self._cipher.encrypt(result, key), ex=seconds)
        if pause_seconds:
            self._redis.set(pause_key, "", ex=pause_seconds)
        return result

    def _read(self, key: str) -> Kept:
        with self._redis.pipeline() as pipeline:
            pipeline.get(key)
            pipeline.pttl(key)
            pipeline.get(f"{key}:pause")
            encrypted, milliseconds_left, pause = pipeline.execute()
        result = None
        if encrypted is not None:
            with suppress(DecryptionError):  # encrypted under a key that this process lacks
                result = self._cipher.decrypt(encrypted.decode(), key)
        return Kept(result, milliseconds_left / 1000, None if pause is None else pause.decode())


def single_flight(key: str, call: Callable[[], Any], *, patience: int, remember: int) -> Any:
    """Make a call that can succeed only once, and share its outcome with those who ask while it is running.

    :param key: as for `SingleFlight.run`.
    :param call: its result must be JSON.
    :param patience: as for `SingleFlight.run`.
    :param remember: seconds for which a call that succeeded is not made again.
    :returns: what `call` returned, here or in another process.
    :raises AlreadyDone: if the call had succeeded before.
    :raises ApiError: what `call` raised, here or there, after which the call may be made again; UNAVAILABLE if it
        crashed there or takes too long.
    :raises redis.exceptions.RedisError: if Redis is away.
    """

    def look(kept: Kept, waited: bool) -> str | None:
        if waited and kept.result is not None:
            return kept.result
        if kept.pause == "":
            raise AlreadyDone
        if waited and kept.pause:
            raise ApiError(Code[kept.pause])
        return None

    def call_once(_: Lock) -> tuple[str, int, int]:
        return json.dumps(call()), _RESULT_SECONDS, remember

    flights: SingleFlight = current_app.extensions["single_flight"]
    return json.loads(flights.run(key, look, call_once, patience=patience, wait=_FOLLOW_SECONDS))
