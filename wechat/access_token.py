"""The access token of the mini-program, shared through Redis: one refresh at a time across all processes."""

import logging
import time
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, cast

from redis import Redis
from redis.exceptions import LockError

from errors import ApiError, Code
from telemetry.metrics import TOKEN_REFRESHES
from wechat.transport import PATIENCE_SECONDS, Transport, unexpected_response

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 240
"""How long before its end a token is replaced. WeChat hands out a new one from 300 s before the end on."""
WAIT_SECONDS = 10
"""As long as two slow calls of WeChat take."""
PAUSE_SECONDS = 3
"""For how long WeChat is left alone after a refresh that was of no use."""
FORCE_INTERVAL_SECONDS = 30
FORCES_A_DAY = 20
POLL_SECONDS = 0.02
DAY_SECONDS = 86400


class TextCipher(Protocol):
    """Seals what is kept in Redis."""

    def encrypt(self, text: str, context: str) -> str: ...

    def decrypt(self, value: str, context: str) -> str: ...


class _State(NamedTuple):
    """What Redis knows."""

    token: str | None
    seconds_left: float
    pause: str | None
    """Why WeChat is not to be asked just now: the name of a Code, or "" if it answers but to no avail."""


class AccessToken:
    """WeChat's stable token (cgi-bin/stable_token).

    Redis tells how long a token still lives, so that the clocks of the instances do not matter. Without Redis there is
    no token: WeChat's quota must not be burnt by many who cannot see each other. Source:
    https://developers.weixin.qq.com/miniprogram/dev/OpenApiDoc/mp-access-token/getStableAccessToken.html

    :param cipher: the token is kept encrypted.
    """

    def __init__(self, transport: Transport, redis: Redis, cipher: TextCipher, app_id: str, app_secret: str) -> None:
        self._transport = transport
        self._redis = redis
        self._cipher = cipher
        self._app_id = app_id
        self._app_secret = app_secret
        self._key = f"wechat:{app_id}:access_token"

    def get(self, refused: str | None = None) -> str:
        """Answer a token that holds, asking WeChat for it if need be; meanwhile the others wait, or use the old one.

        Takes two calls of WeChat at the most, or WAIT_SECONDS where somebody else makes them.

        :param refused: the token that WeChat has just called invalid. It is replaced, unless somebody did so already;
            where WeChat goes on giving out the same, it is answered once more.
        :raises ApiError: what the refresh raised, here or in the process that made it within PAUSE_SECONDS;
            UNAVAILABLE if that takes too long.
        :raises redis.exceptions.RedisError: if Redis is away.
        """
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            state = self._read()
            usable = state.token if state.token != refused else None
            if usable and state.seconds_left > REFRESH_SECONDS:
                return usable
            if state.pause is None and (fresh := self._refresh_alone(refused)) is not None:
                return fresh
            if usable:
                return usable
            if state.pause:
                raise ApiError(Code[state.pause])
            if state.pause is not None and state.token:
                return state.token
            if time.monotonic() > deadline:
                raise ApiError(Code.UNAVAILABLE)
            time.sleep(POLL_SECONDS)

    def _refresh_alone(self, refused: str | None) -> str | None:
        """Refresh unless somebody else is at it; None if so."""
        # Longer than a call can take; a process that dies holds the others up for no longer than this.
        lock = self._redis.lock(f"{self._key}:lock", timeout=PATIENCE_SECONDS + 2, blocking=False)
        if not lock.acquire():
            return None
        try:
            state = self._read()
            if state.pause is not None or (
                state.token and state.token != refused and state.seconds_left > REFRESH_SECONDS
            ):
                return None  # somebody was faster: look again
            try:
                token = self._fetch()
                if token == refused and self._may_force():
                    lock.reacquire()
                    token = self._fetch(force=True)
            except ApiError as error:
                TOKEN_REFRESHES.labels("failure").inc()
                self._pause(error.api_code.name)
                if state.token and state.token != refused:
                    return state.token  # it holds for some minutes yet
                raise
            TOKEN_REFRESHES.labels("failure" if token == refused else "success").inc()
            if token == refused:
                self._pause("")
            return token
        finally:
            with suppress(LockError):  # it took so long that the lock is another's by now
                lock.release()

    def _fetch(self, force: bool = False) -> str:
        path = "/cgi-bin/stable_token"
        wanted: dict[str, Any] = {"grant_type": "client_credential", "appid": self._app_id, "secret": self._app_secret}
        if force:
            wanted["force_refresh"] = True
        answer = self._transport.call(path, {}, wanted)
        token, seconds = answer.get("access_token"), answer.get("expires_in")
        if not (isinstance(token, str) and 0 < len(token) <= 2048 and isinstance(seconds, int) and seconds > 0):
            raise unexpected_response(path, "access_token or expires_in missing or malformed", answer)
        self._redis.set(self._key, self._cipher.encrypt(token, self._key), ex=seconds)
        if seconds <= REFRESH_SECONDS:
            self._pause("")
        logger.info("access token refreshed", extra={"expiresIn": seconds, "forced": force})
        return token

    def _may_force(self) -> bool:
        """Whether WeChat's limits allow a force_refresh now; counts it if so. Only the holder of the lock asks."""
        seconds, microseconds = self._redis.time()
        key, now = f"{self._key}:forced", seconds + microseconds / 1e6
        self._redis.zremrangebyscore(key, "-inf", now - DAY_SECONDS)
        forced = cast(list[tuple[bytes, float]], self._redis.zrange(key, 0, -1, withscores=True))
        if len(forced) >= FORCES_A_DAY or (forced and forced[-1][1] > now - FORCE_INTERVAL_SECONDS):
            return False
        with self._redis.pipeline() as pipeline:
            pipeline.zadd(key, {str(now): now})
            pipeline.expire(key, DAY_SECONDS)
            pipeline.execute()
        return True

    def _pause(self, reason: str) -> None:
        self._redis.set(f"{self._key}:pause", reason, ex=PAUSE_SECONDS)

    def _read(self) -> _State:
        with self._redis.pipeline() as pipeline:
            pipeline.get(self._key)
            pipeline.pttl(self._key)
            pipeline.get(f"{self._key}:pause")
            sealed, milliseconds_left, pause = pipeline.execute()
        token = None
        if sealed is not None:
            with suppress(ValueError):  # sealed by a key that is not ours any more, or not yet
                token = self._cipher.decrypt(sealed.decode(), self._key)
        return _State(token, milliseconds_left / 1000, None if pause is None else pause.decode())
