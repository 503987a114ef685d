"""The access token of the mini-program, shared through Redis: one refresh at a time across all processes."""

import logging
import threading
from typing import Any, Protocol

from redis import Redis
from redis.lock import Lock

from concurrency import seconds_left
from errors import ApiError, Code
from telemetry.metrics import TOKEN_REFRESHES
from wechat.transport import PATIENCE_SECONDS, Transport, unexpected_response

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 240
"""How long before its end a token is replaced. WeChat hands out a new one from 300 s before the end on."""
WAIT_SECONDS = 10
"""How long to wait for another caller."""
PAUSE_SECONDS = 3
"""How long refreshing is paused after WeChat has returned no newer token."""
FORCE_INTERVAL_SECONDS = 30
FORCES_A_DAY = 20
DAY_SECONDS = 86400
"""Of forced refreshes, from the first one on. WeChat's own day begins at midnight in Beijing."""


class SingleFlight(Protocol):
    """What storage.single_flight offers."""

    def read(self, key: str) -> tuple[str | None, float, str | None]: ...
    def run(self, key: str, look: Any, call: Any, *, patience: float) -> str: ...


class AccessToken:
    """WeChat's stable token (cgi-bin/stable_token).

    A token's remaining life is its TTL in Redis, so the instances' clocks do not matter. Without Redis there is no
    token: processes that cannot see each other would use up WeChat's quota. Source:
    https://developers.weixin.qq.com/miniprogram/dev/OpenApiDoc/mp-access-token/getStableAccessToken.html
    """

    def __init__(self, transport: Transport, redis: Redis, flights: SingleFlight, app_id: str, app_secret: str) -> None:
        self._transport = transport
        self._redis = redis
        self._flights = flights
        self._app_id = app_id
        self._app_secret = app_secret
        self._key = f"wechat:{app_id}:access_token"
        self._turn = threading.Lock()

    def get(self, refused: str | None = None) -> str:
        """Return a valid token, refreshed if necessary; meanwhile other callers wait, or use the old token while valid.

        Takes at most two calls to WeChat, or WAIT_SECONDS while another caller makes them.

        :param refused: a token that WeChat has just rejected. It is replaced, unless that has happened already; while
            WeChat keeps handing out the same one, that one is returned.
        :raises ApiError: what the refresh raised, here or in another process within the last seconds; UNAVAILABLE if
            it takes too long.
        :raises redis.exceptions.RedisError: if Redis is away.
        """
        usable: str | None = None

        def look(kept: tuple[str | None, float, str | None], waited: bool) -> str | None:
            nonlocal usable
            token, left, pause = kept
            usable = token if token != refused else None
            if usable and (waited or pause is not None or left > REFRESH_SECONDS):
                return usable
            if pause:
                raise ApiError(Code[pause])
            return None if pause is None else token

        def refresh(lock: Lock) -> tuple[str, int, int]:
            with TOKEN_REFRESHES.labels("failure").count_exceptions():
                token, seconds = self._fetch()
                if token == refused and self._may_force():
                    lock.reacquire()
                    token, seconds = self._fetch(force=True)
            TOKEN_REFRESHES.labels("failure" if token == refused else "success").inc()
            return token, seconds, PAUSE_SECONDS if token == refused or seconds <= REFRESH_SECONDS else 0

        try:
            if valid := look(self._flights.read(self._key), False):  # nearly always, in one round trip
                return valid
            # One caller of each process at a time, or a thousand of them would keep asking Redis.
            if not self._turn.acquire(timeout=0 if usable else seconds_left(WAIT_SECONDS)):
                raise ApiError(Code.UNAVAILABLE)
            try:
                valid = look(self._flights.read(self._key), False)
                return valid or self._flights.run(self._key, look, refresh, patience=2 * PATIENCE_SECONDS)
            finally:
                self._turn.release()
        except ApiError:
            if usable is None:
                raise
            return usable  # valid for some more minutes

    def _fetch(self, force: bool = False) -> tuple[str, int]:
        path = "/cgi-bin/stable_token"
        body: dict[str, Any] = {"grant_type": "client_credential", "appid": self._app_id, "secret": self._app_secret}
        answer = self._transport.call(path, {}, {**body, "force_refresh": True} if force else body)
        token, seconds = answer.get("access_token"), answer.get("expires_in")
        if not (isinstance(token, str) and 0 < len(token) <= 2048 and isinstance(seconds, int) and seconds > 0):
            raise unexpected_response(path, "access_token or expires_in missing or malformed", answer)
        logger.info("access token refreshed", extra={"expiresIn": seconds, "forced": force})
        return token, seconds

    def _may_force(self) -> bool:
        """Whether WeChat's limits allow a force_refresh now; counts it if so."""
        if not self._redis.set(f"{self._key}:forced", "", nx=True, ex=FORCE_INTERVAL_SECONDS):
            return False
        with self._redis.pipeline() as pipeline:
            pipeline.set(f"{self._key}:forced:count", 0, nx=True, ex=DAY_SECONDS)
            pipeline.incr(f"{self._key}:forced:count")
            _, count = pipeline.execute()
        return bool(count <= FORCES_A_DAY)
