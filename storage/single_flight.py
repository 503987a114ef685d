"""One redemption of a code of WeChat's for all requests that bring it, across processes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

from concurrency import GaveUp, seconds_left
from errors import ApiError, Code, Message
from storage.cipher import DecryptionError, cipher
from storage.redis_client import redis

_CALL_SECONDS = 60
"""How long the call may take unless its request ends before; a second later its process is assumed dead."""
_RESULT_SECONDS = 5


def single_flight(kind: str, code: str, call: Callable[[], Any]) -> Any:
    """Redeem a code of WeChat's, which works once, and share the outcome with callers that ask while that is running,
    or within five seconds afterwards: the response to the first one may have been lost.

    A call costs four round trips to Redis: the lock, what is kept, the result and the release.

    :param code: names the call among those of its kind. Redis keeps its hash.
    :param call: its result must be JSON; it is kept encrypted. If it fails by a fault of ours or of WeChat's, the next
        caller makes it again; a refusal is its outcome.
    :returns: what `call` returned, here or in another process.
    :raises ApiError: WECHAT_CODE_USED if the call had an outcome before that, up to five minutes ago; what `call`
        raises.
    :raises redis.exceptions.RedisError: if Redis is away, or another process takes too long.
    """
    key = f"{kind}:{hashlib.sha256(code.encode()).hexdigest()}"
    seconds = seconds_left(_CALL_SECONDS)
    # It is no error if the call outlasts its lock.
    with redis.lock(f"{key}:lock", seconds + 1, blocking_timeout=seconds, raise_on_release_error=False):
        kept, is_used = cast(list[bytes | None], redis.mget(key, f"{key}:used"))
        if is_used is None:
            try:
                outcome: tuple[Any, ...] = call(), None, None
            except ApiError as error:
                if isinstance(error, GaveUp) or error.api_code.status == 429 or error.api_code.status >= 500:
                    raise
                outcome = None, error.api_code.name, error.message
            pipeline: Any = redis.pipeline().set(key, cipher.encrypt(json.dumps(outcome), key), ex=_RESULT_SECONDS)
            pipeline.set(f"{key}:used", "", ex=300).execute()  # after that WeChat itself rejects a code
            return _result(*outcome)
    with suppress(DecryptionError):  # nothing is kept, or it is encrypted under a key that this process lacks
        return _result(*json.loads(cipher.decrypt((kept or b"").decode(), key)))
    raise ApiError(Code.WECHAT_CODE_USED)


def _result(result: Any, code: str | None, message: Sequence[str] | None) -> Any:
    if code:
        raise ApiError(Code[code], message=Message(*message) if message else None)
    return result
