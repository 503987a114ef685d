"""Who may call a group of routes: the policies that `blueprints/__init__.py` names for each of them."""

import hmac
import ipaddress
from functools import partial

from flask import Response, current_app, g, request

import wechat
from blueprints.api import AuthPolicy
from errors import ApiError, Code, Message
from proxies import parse_address
from storage import database, identities, sessions
from storage.models import User
from telemetry import logs, metrics
from wechat.client import is_identifier

NOT_OUR_ORIGIN = Message(
    "带 cookie 的写请求须由本站页面发出；否则请用 Authorization: Bearer 发送 token；代理终结 TLS 时请设置 PUBLIC_URL",
    "A write by cookie must come from this site; else send Authorization: Bearer. Behind a TLS proxy set PUBLIC_URL",
)
METRICS_TOKEN_WRONG = Message("METRICS_TOKEN 不正确", "Not the METRICS_TOKEN")


def current_user() -> User:
    """Return the user who is signed in: as the transaction has locked the row, or as read once outside of one.

    It is a snapshot, not to be changed.

    :raises ApiError: UNAUTHORIZED if the user has been deleted.
    """
    user: User | None = g.get("user") or database.find(User, g.user_id)
    if user is None:
        raise ApiError(Code.UNAUTHORIZED)
    g.user = user
    return user


def set_current_user(user_id: int) -> None:
    """Say who is signed in, here and in all log lines of the request."""
    g.user_id = user_id
    logs.bind(userId=user_id)


def count_request(limit: str, caller: str = "") -> None:
    """Count this request against the rate limit of this name, if there is one.

    :raises ApiError: TOO_MANY_REQUESTS if the caller exceeds it.
    """
    if rate := current_app.extensions["rate_limits"].get(limit):
        left, seconds = rate.take(caller)
        headers = {"RateLimit-Policy": f'"{limit}";q={rate.amount};w={rate.seconds}'}
        headers["RateLimit"] = f'"{limit}";r={max(left, 0)};t={seconds}'
        if left < 0:
            g.rate_limit = headers | {"Retry-After": str(seconds)}
            metrics.RATE_LIMITED.labels(limit).inc()
            raise ApiError(Code.TOO_MANY_REQUESTS)
        g.setdefault("rate_limit", headers)  # of the caller, not of all together


def report_rate_limit(response: Response) -> Response:
    """Say in a response what its caller has left, or when to come again."""
    response.headers.update(g.get("rate_limit", {}))
    return response


def get_mini_program_user(openid: str, unionid: str | None) -> User:
    """Get or create the user of an openid of the mini-program; an administrator as ADMIN_OPENIDS says.

    :raises ApiError: what `get_or_create_user` does.
    """
    return _apply_setting(identities.get_or_create_user(wechat.api.app_id, openid, unionid), openid)


def _apply_setting(user: User, openid: str | None) -> User:
    """Make the user of an openid an administrator or none, as ADMIN_OPENIDS says; one made otherwise stays one."""
    is_named = openid in current_app.config["ADMIN_OPENIDS"]

    def change() -> User:
        user = database.session.get_one(User, g.user_id)
        if user.role != "admin" or user.admin_by_setting:
            identities.set_role(user, "admin" if is_named else "user", by="setting", by_setting=is_named)
        return user

    if user.admin_by_setting == is_named:
        return user
    g.user_id = user.id
    return database.in_transaction(change)


def _count_login() -> None:
    """Count by the client's address; one of IPv6 by its network, as all of that is one client's."""
    address = parse_address(request.remote_addr or "")
    network = address and ipaddress.ip_network((address, 64 if address.version == 6 else 32), strict=False)
    count_request("address", str(network))


def _require_session() -> None:
    session, token = sessions.current.data, sessions.current.sid
    if "user_id" in session:
        count_request("session", token)
        is_other = sessions.current.by_cookie and request.method not in sessions.SAFE_METHODS and not request.is_json
        if is_other and (request.content_length or "Transfer-Encoding" in request.headers):
            raise ApiError(Code.UNSUPPORTED_MEDIA_TYPE)
        set_current_user(session["user_id"])
        current_app.extensions["door"].remember(token, session["user_id"])
    elif current_app.config["TRUST_WXCLOUD_HEADERS"] and "X-WX-OPENID" in request.headers:
        set_current_user(_cloud_run_user().id)
        count_request("session", f"user {g.user_id}")
    elif sessions.current.refused:
        raise ApiError(Code.FORBIDDEN, message=NOT_OUR_ORIGIN)
    else:
        raise ApiError(Code.UNAUTHORIZED)


def _require_role(*roles: str) -> None:
    _require_session()
    user = identities.require_not_blocked(current_user())
    if user.admin_by_setting:
        user = _apply_setting(user, identities.find_openid(g.user_id, wechat.api.app_id))
    if user.role not in roles:
        raise ApiError(Code.FORBIDDEN)
    if request.method not in sessions.SAFE_METHODS:
        g.pop("user", None)  # much may happen until the body is there


def _cloud_run_user() -> User:
    """Get the user whom WeChat cloud run names in its headers. Source:
    https://developers.weixin.qq.com/miniprogram/dev/wxcloudservice/wxcloudrun/src/development/call/container.html
    """
    app_id, openid, unionid = (request.headers.get(f"X-WX-{name}") for name in ("APPID", "OPENID", "UNIONID"))
    if app_id not in (None, wechat.api.app_id) or not all(is_identifier(name) for name in (openid, unionid or openid)):
        raise ApiError(Code.UNAUTHORIZED)
    return get_mini_program_user(str(openid), unionid or None)


def _require_metrics_token() -> None:
    if not (expected := current_app.config["METRICS_TOKEN"]):
        raise ApiError(Code.NOT_FOUND)
    # Not request.authorization, which parses a token with = in it as parameters.
    given = request.headers.get("Authorization", "").encode()
    if not any(hmac.compare_digest(given, f"Bearer {token}".encode()) for token in expected):
        raise ApiError(Code.UNAUTHORIZED, message=METRICS_TOKEN_WRONG)


public = AuthPolicy(lambda: None, security=[])
logins = AuthPolicy(_count_login, security=[], fails=(Code.TOO_MANY_REQUESTS, Code.UNAVAILABLE))
signed_in = AuthPolicy(
    partial(_require_role, "user", "admin"),
    security=[{"bearer": []}, {"cookie": []}],
    fails=(Code.UNAUTHORIZED, Code.FORBIDDEN, Code.TOO_MANY_REQUESTS, Code.UNAVAILABLE),
)
administrators = signed_in._replace(check=partial(_require_role, "admin"))
session_holders = signed_in._replace(check=_require_session)
"""Logging out needs no database, and blocked users may."""
scrapers = AuthPolicy(_require_metrics_token, security=[{"metrics": []}], fails=(Code.UNAUTHORIZED, Code.UNAVAILABLE))
