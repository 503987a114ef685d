"""The access token of the mini-program, which all processes share through Redis."""

import hashlib
import logging
import threading
from contextlib import suppress
from typing import Any

from redis import Redis
from redis.exceptions import LockError

from concurrency import GaveUp, seconds_left
from errors import ApiError, Code
from telemetry.metrics import TOKEN_REFRESHES
from wechat.transport import Transport, unexpected_response

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 240
"""How long before its end a token is replaced. WeChat hands out a new one from 300 s before the end on."""
PAUSE_SECONDS = 3
"""How long refreshing is paused after a failure, or after WeChat has returned no newer token."""
FORCE_SECONDS = 86400 // 20
"""Between two forced refreshes: WeChat allows 20 a day."""
CALL_SECONDS = 60
"""How long a refresh may take unless its request ends before; a second later its process is assumed dead."""


class AccessToken:
    """WeChat's stable token (cgi-bin/stable_token).

    One process at a time refreshes it. A token's remaining life is its TTL in Redis, so the instances' clocks do not
    matter. Without Redis there is no token: processes that cannot see each other would use up WeChat's quota. Source:
    https://developers.weixin.qq.com/miniprogram/dev/OpenApiDoc/mp-access-token/getStableAccessToken.html

    :param cipher: what storage.cipher offers.
    """

    def __init__(self, transport: Transport, redis: Redis, cipher: Any, app_id: str, app_secret: str) -> None:
        self._transport, self._redis, self._cipher = transport, redis, cipher
        self._body = {"grant_type": "client_credential", "appid": app_id, "secret": app_secret}
        self._key = f"wechat:{app_id}:access_token"
        # Of this secret alone: what WeChat refuses to those that have the one before says nothing about this one.
        self._pause = f"{self._key}:pause:{hashlib.sha256(app_secret.encode()).hexdigest()[:8]}"
        self._turn = threading.Lock()

    def get(self, refused: str | None = None) -> str:
        """Return a valid token, refreshed if necessary; meanwhile other callers wait, or use the old token while valid.

        Takes at most two calls to WeChat, and as long again if another caller makes two first.

        :param refused: a token that WeChat has just rejected. It is replaced, unless that has happened already; while
            WeChat keeps handing out the same one, that one is returned.
        :raises ApiError: what the refresh raised, here or in another process within the last seconds; UNAVAILABLE if
            another process takes too long.
        :raises redis.exceptions.RedisError: if Redis is away.
        """
        usable, is_current = self._read(refused)
        if usable and (is_current or self._turn.locked()):
            return usable
        with self._turn:  # one caller of each process waits for the others
            usable, is_current = self._read(refused)
            if usable and is_current:
                return usable
            seconds = seconds_left(CALL_SECONDS)
            wait: dict[str, Any] = {"blocking_timeout": 0 if usable else seconds, "raise_on_release_error": False}
            # Who does not get the lock uses the old token, if there is one.
            with suppress(LockError), self._redis.lock(f"{self._key}:lock", seconds + 1, **wait):
                usable, is_current = self._read(refused)  # what the process before has stored
                if not (usable and is_current):
                    usable = self._refresh(refused)
        if not usable:
            raise GaveUp(Code.UNAVAILABLE)
        return usable

    def _read(self, refused: str | None) -> tuple[str, bool]:
        """Return the token, empty if none can be used, and whether it need not be replaced now, or cannot.

        :raises ApiError: why there is none, for PAUSE_SECONDS after a refresh has failed.
        """
        pipeline: Any = self._redis.pipeline()
        (encrypted, pause), milliseconds = pipeline.mget(self._key, self._pause).pttl(self._key).execute()
        token = ""
        with suppress(ValueError):  # there is none, or it is encrypted under a key that this process lacks
            token = self._cipher.decrypt((encrypted or b"").decode(), self._key)
        if pause and token in ("", refused):
            raise ApiError(Code[pause.decode()])
        if pause is not None:
            return token, True
        return "" if token == refused else token, milliseconds > REFRESH_SECONDS * 1000

    def _refresh(self, refused: str | None) -> str:
        """Replace the token; if that fails, return the one before where it is valid for some more minutes."""
        try:
            token, seconds = self._fetch()
            if token == refused and self._redis.set(f"{self._key}:forced", "", nx=True, ex=FORCE_SECONDS):
                token, seconds = self._fetch(force_refresh=True)
        except GaveUp:
            raise
        except ApiError as error:
            TOKEN_REFRESHES.labels("failure").inc()
            self._redis.set(self._pause, error.api_code.name, ex=PAUSE_SECONDS)
            return self._read(refused)[0]
        TOKEN_REFRESHES.labels("failure" if token == refused else "success").inc()
        if token == refused or seconds <= REFRESH_SECONDS:
            self._redis.set(self._pause, "", ex=PAUSE_SECONDS)
        if token != refused:  # or another process may have stored a newer one
            self._redis.set(self._key, self._cipher.encrypt(token, self._key), ex=seconds)
        return token

    def _fetch(self, **options: bool) -> tuple[str, int]:
        path = "/cgi-bin/stable_token"
        answer = self._transport.call(path, {}, {**self._body, **options})
        token, seconds = answer.get("access_token"), answer.get("expires_in")
        if not (isinstance(token, str) and 0 < len(token) <= 2048 and isinstance(seconds, int) and seconds > 0):
            raise unexpected_response(path, "access_token or expires_in missing or malformed", answer)
        logger.info("access token refreshed", extra={"expiresIn": seconds, "forced": bool(options)})
        return token, seconds
