"""The access tokens issued by stable_token."""

import secrets
from collections import Counter

from dev.wechat_simulator.wire import Refused

LIFETIME_SECONDS = 7200
RENEWAL_SECONDS = 300
CALLS_A_MINUTE = 10_000
CALLS_A_DAY = 500_000
FORCED_A_DAY = 20
FORCED_PAUSE_SECONDS = 30
MINIMUM_CHARACTERS = 100
BEIJING_SECONDS = 8 * 3600


def new_token() -> str:
    return secrets.token_urlsafe(384)  # 512 characters, the longest that WeChat documents


class TokenPool:
    """The tokens of one app. Not thread-safe; callers pass the time."""

    def __init__(self) -> None:
        self._current = ""
        self._ends: dict[str, float] = {}
        self._calls: Counter[str] = Counter()
        self._forced_at: list[float] = []
        self.forced = 0
        """How often a token was asked for by force, also in vain."""
        self.uses: dict[str, list[float]] = {}
        """When each token was used first and last, ended ones included; empty for one that was not used."""

    def record_use(self, token: str, now: float) -> None:
        if token in self.uses:
            self.uses[token] = [*self.uses[token][:1], now]

    def issue(self, force: bool, now: float) -> tuple[str, int]:
        """Issue a token, and return it with its remaining seconds.

        :param force: whether to invalidate all earlier tokens.
        :raises Refused: if there were too many calls.
        """
        self._count(now)
        if force:
            self.forced += 1
            self._count_forced(now)
            self.drop()
        if self._ends.get(self._current, 0) - now <= RENEWAL_SECONDS:
            self._current = new_token()
            self._ends[self._current] = now + LIFETIME_SECONDS
            self.uses[self._current] = []
        return self._current, int(self._ends[self._current] - now)

    def current(self, now: float) -> tuple[str, int] | None:
        """The newest token and its remaining seconds; None if it has expired."""
        end = self._ends.get(self._current, 0)
        return (self._current, int(end - now)) if end > now else None

    def drop(self) -> None:
        """Invalidate all tokens."""
        self._ends.clear()

    def check(self, token: str, now: float) -> None:
        """Check an access token.

        :raises Refused: if it is not valid.
        """
        if not token:
            raise Refused(41001)
        if len(token) < MINIMUM_CHARACTERS:
            raise Refused(40014)
        if token not in self._ends:
            raise Refused(40001)
        if self._ends[token] <= now:
            raise Refused(42001)

    def _count(self, now: float) -> None:
        minute, day = f"minute {now // 60}", f"day {_day(now)}"
        if self._calls[day] >= CALLS_A_DAY:
            raise Refused(45009)
        if self._calls[minute] >= CALLS_A_MINUTE:
            raise Refused(45011)
        self._calls.update((minute, day))

    def _count_forced(self, now: float) -> None:
        if sum(_day(earlier) == _day(now) for earlier in self._forced_at) >= FORCED_A_DAY:
            raise Refused(45009)
        if self._forced_at and now - self._forced_at[-1] < FORCED_PAUSE_SECONDS:
            raise Refused(45011)
        self._forced_at.append(now)


def _day(now: float) -> float:
    """The day of a quota, which begins at midnight in Beijing."""
    return (now + BEIJING_SECONDS) // 86400
