"""Sessions in Redis through flask-session: a bearer token or a cookie, stored under its hash, as JSON."""

import hashlib
import time
from collections import UserDict
from typing import Any, cast

import msgspec
from flask import Flask, Request, Response, current_app, request, session
from flask.sessions import SessionMixin
from flask_session.redis import RedisSessionInterface
from redis.exceptions import RedisError

from errors import ApiError, Code
from storage import wechat_session_keys
from storage.redis_client import execute_replicated, redis

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
COOKIE_OPTIONS: dict[str, Any] = {"secure": True, "httponly": True, "samesite": "Lax"}


class LazySession(SessionMixin, UserDict[str, Any]):
    """A session that is fetched when it is first used: a request that never uses it costs no round trip to Redis.

    :param token: what the request brings.
    :param by_cookie: whether the session comes from the cookie of a browser and is set there; otherwise the token is a
        bearer token.
    :param refused: whether a cookie was ignored, as the request does not come from a page of ours.
    """

    accessed = modified = False
    sid: str

    def __init__(self, token: str | None, *, by_cookie: bool, refused: bool = False) -> None:
        self.by_cookie, self.refused = by_cookie, refused
        self.load(token)

    def load(self, token: str | None) -> None:
        """Become another session, from its next use on."""
        self._token, self.loaded = token, False

    @property
    def data(self) -> dict[str, Any]:  # type: ignore[override]  # what UserDict reads and writes
        # Not cached_property: before Python 3.12 its lock is shared by all sessions of a process.
        if not self.loaded:
            self.sid, self._data, self.new = _interface().fetch(self._token)
            self.loaded = True
        return self._data

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.modified = True

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.modified = True


current = cast(LazySession, session)
"""flask.session by its type here."""


class SessionInterface(RedisSessionInterface):
    """flask-session's Redis backend, with a bearer token in place of the cookie where a request has one.

    Any page may let a browser send the cookie. So a request that changes something neither uses nor sets it unless it
    comes from a page of ours: no other site acts for its visitor, or logs the visitor in as somebody else.

    Each session holds `expires_at`, when it expires in Redis unless it is used, and `ends_at`, when it expires in any
    case; both in seconds since the epoch.
    """

    def open_session(self, app: Flask, request: Request) -> LazySession:
        credentials = request.authorization
        if credentials and credentials.type == "bearer":
            return LazySession(credentials.token, by_cookie=False)
        cookie = request.cookies.get(cookie_name("session")) if "Cookie" in request.headers else None
        if request.method in SAFE_METHODS or _is_from_our_origin(request):
            return LazySession(cookie, by_cookie=True)
        return LazySession(None, by_cookie=False, refused=cookie is not None)

    def fetch(self, token: str | None) -> tuple[str, dict[str, Any], bool]:
        """Return the id of the session of a token, its data, and whether it is new."""
        stored = current_app.extensions["shared_reads"].get(self._get_store_id(token)) if token else None
        try:
            # JSON only: flask-session's own serializer falls back to pickle, which can run any code.
            return str(token), msgspec.json.decode(stored or b"", type=dict[str, Any]), False
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # unreadable data is no session
            return self._generate_sid(self.sid_length), {}, True  # never an id chosen by the caller

    def _get_store_id(self, sid: str) -> str:
        return f"{self.key_prefix}{hashlib.sha256(sid.encode()).hexdigest()}"

    def save_session(self, app: Flask, session: LazySession, response: Response) -> None:
        """Store or delete it if it has changed, or half of its lifetime is over. flask-session would do so each time,
        and delete no cookie that is Secure.
        """
        half_over = time.time() + app.config["SESSION_LIFETIME"] / 2
        is_due = session.loaded and session.data.get("expires_at", 0) < min(half_over, session.data.get("ends_at", 0))
        if not session.modified and not is_due:
            return
        name, is_modified = cookie_name("session"), session.modified
        session.modified = False  # the response to a failure of this is saved too: do not wait for Redis twice
        try:
            if session:
                self.store(session)
                if session.by_cookie:
                    response.set_cookie(name, session.sid, expires=session["expires_at"], **COOKIE_OPTIONS)
            else:
                execute_replicated(self.client.pipeline(transaction=False).delete(self._get_store_id(session.sid)))
                if session.by_cookie:
                    response.delete_cookie(name, **COOKIE_OPTIONS)
        except RedisError:
            if is_modified:  # one that cannot be prolonged now is valid for long
                raise

    def store(self, session: LazySession) -> None:
        now, store_id = int(time.time()), self._get_store_id(session.sid)
        lifetime: int = self.app.config["SESSION_ABSOLUTE_LIFETIME"]
        ends_at = session.data.setdefault("ends_at", now + lifetime)
        session.data["expires_at"] = expires_at = min(now + self.app.config["SESSION_LIFETIME"], ends_at)
        # No transaction: who does not get to its end has told nobody the token.
        pipeline: Any = self.client.pipeline(transaction=False)
        # A session that was revoked since it was read must not come back: only a new one may be created.
        pipeline.set(store_id, msgspec.json.encode(session.data), ex=max(expires_at - now, 1), xx=not session.new)
        if session.new and "user_id" in session:
            index = _index_key(session["user_id"])
            pipeline.zadd(index, {store_id: ends_at}).zremrangebyscore(index, "-inf", now).expire(index, lifetime)
        execute_replicated(pipeline)
        session.new = False


def public_url() -> str:
    """The URL at which browsers reach this service, without a slash at the end."""
    return str(current_app.config["PUBLIC_URL"] or request.host_url).rstrip("/")


def cookie_name(name: str) -> str:
    """Name a cookie so that, over HTTPS, a browser takes it from this host alone, not from a neighbouring subdomain.

    Browsers refuse the prefix over plain HTTP, as on a developer's machine.
    """
    return f"__Host-{name}" if public_url().lower().startswith("https:") else name


def _is_from_our_origin(request: Request) -> bool:
    """Whether a browser says that a page of ours makes this request: `none`, an address typed in, is no write."""
    fetched_from = request.headers.get("Sec-Fetch-Site")
    if fetched_from is not None:
        return fetched_from == "same-origin"
    ours = "/".join(public_url().lower().split("/")[:3])
    port = ":443" if ours.startswith("https:") else ":80"  # which browsers leave out
    return request.headers.get("Origin") == ours.removesuffix(port)


def _index_key(user_id: int) -> str:
    return f"user:{user_id}:sessions"


def init_app(app: Flask) -> None:
    app.session_interface = SessionInterface(app, app.extensions["redis"], sid_length=32)


def log_in(user_id: int, **facts: Any) -> str:
    """Start a session of this user under a new id; it is stored when this returns.

    :param facts: further items of the session; must be JSON.
    :returns: the token.
    :raises redis.exceptions.RedisError: if Redis is away; then there is no session.
    """
    _interface().regenerate(current)  # ends the one before, if there is one
    current.clear()
    current.update(facts, user_id=user_id)
    # Now, not at the end of the request: a concurrent request with the same code may use the token before that.
    # Nor is it tried again then: nobody knows the token of one that may have been written.
    current.new, current.modified = True, False
    _interface().store(current)
    return current.sid


def resume(token: str) -> None:
    """Continue the session that an earlier request has started, whose response may have been lost.

    :raises ApiError: WECHAT_CODE_USED if it has ended since.
    :raises redis.exceptions.RedisError: if Redis is away.
    """
    if not current.loaded or current.sid != token:
        current.load(token)
    if "user_id" not in current:
        raise ApiError(Code.WECHAT_CODE_USED)


def _interface() -> SessionInterface:
    return cast(SessionInterface, current_app.session_interface)


def revoke_sessions(user_id: int) -> None:
    """End all sessions of a user, and forget the session_keys. Works outside of a request.

    :raises redis.exceptions.RedisError: if Redis is away; calling it again ends the rest.
    """
    index = _index_key(user_id)
    store_ids = redis.zrange(index, 0, -1)
    pipeline: Any = redis.pipeline(transaction=False).delete(wechat_session_keys.redis_key(user_id), *store_ids)
    # Only the sessions that were read: a concurrent login keeps its session and its entry. ZREM wants one at least.
    execute_replicated(pipeline.zrem(index, "", *store_ids))
