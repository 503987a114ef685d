"""One call for all who ask the same at the same moment, whichever process they ask."""

import json
import secrets
import time
from collections.abc import Callable
from typing import Any, cast

from redis.exceptions import RedisError

from errors import ApiError, Code
from storage.cipher import DecryptionError, cipher
from storage.redis_client import redis

_POLL_SECONDS = 0.02
_FOLLOW_SECONDS = 5
_OUTCOME_SECONDS = 10
_DONE = b"done"


class AlreadyDone(Exception):
    """The call was made earlier and succeeded."""


def single_flight(key: str, call: Callable[[], Any], *, patience: int, remember: int) -> Any:
    """Make a call that may succeed only once, and share its outcome with those who ask while it is under way.

    :param key: names the call; kept in Redis, so it must tell nothing.
    :param call: its result must be JSON; it is encrypted while it waits to be read.
    :param patience: seconds that the call takes at the most; after that it is taken for dead and made again.
    :param remember: seconds for which a call that succeeded is not made again.
    :returns: what `call` returned, here or in the process that made it.
    :raises AlreadyDone: if the call had succeeded before this one asked.
    :raises ApiError: what `call` raised, here or there, and the next who asks makes the call again; UNAVAILABLE where
        the call under way crashed, or gave no answer for long.
    :raises redis.exceptions.RedisError: if Redis is away.
    """
    while True:
        flight = secrets.token_hex(8)
        if redis.set(key, flight, nx=True, ex=patience):
            return _lead(key, flight, call, remember)
        under_way = cast(bytes | None, redis.get(key))
        if under_way == _DONE:
            raise AlreadyDone
        outcome = _follow(key, under_way.decode()) if under_way else None
        if outcome is not None:
            if "error" in outcome:
                raise ApiError(Code[outcome["error"]])
            return outcome["result"]


def _lead(key: str, flight: str, call: Callable[[], Any], remember: int) -> Any:
    try:
        result = call()
    except ApiError as error:
        _land(key, flight, {"error": error.api_code.name}, remember=0)
        raise
    except RedisError:
        raise  # it expires by itself; whoever waits for Redis here waits twice
    except BaseException:
        # The call may have been made: those who wait are not to make it again.
        _land(key, flight, {"error": Code.UNAVAILABLE.name}, remember=0)
        raise
    _land(key, flight, {"result": result}, remember)
    return result


def _land(key: str, flight: str, outcome: dict[str, Any], remember: int) -> None:
    """Leave the outcome for those who wait, and the mark that the call was made, in one step."""
    place = _outcome_key(key, flight)
    with redis.pipeline() as pipeline:
        pipeline.set(place, cipher.encrypt(json.dumps(outcome), place), ex=_OUTCOME_SECONDS)
        if remember:
            pipeline.set(key, _DONE, ex=remember)
        else:
            pipeline.delete(key)
        pipeline.execute()


def _follow(key: str, flight: str) -> dict[str, Any] | None:
    """Wait for the outcome of the call under way; None if whoever made it died.

    :raises ApiError: UNAVAILABLE if that takes too long.
    """
    place = _outcome_key(key, flight)
    deadline = time.monotonic() + _FOLLOW_SECONDS
    while time.monotonic() < deadline:
        sealed, under_way = cast(list[bytes | None], redis.mget(place, key))
        if sealed is not None:
            try:
                outcome: dict[str, Any] = json.loads(cipher.decrypt(sealed.decode(), place))
            except DecryptionError:  # whoever made the call has another key already, or still
                raise AlreadyDone from None
            return outcome
        if under_way != flight.encode():
            return None
        time.sleep(_POLL_SECONDS)
    raise ApiError(Code.UNAVAILABLE)


def _outcome_key(key: str, flight: str) -> str:
    return f"{key}:{flight}"
