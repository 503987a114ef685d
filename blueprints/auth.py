"""Who is it: login with a wx.login code, logout, and the policies that groups of routes are registered with."""

import hashlib
import hmac
import re
from typing import Any

from flask import current_app, g, request, session
from marshmallow import Schema, fields

import wechat
from blueprints.api import AuthPolicy, Blueprint
from blueprints.users import CODE_LIFETIME_SECONDS, CODE_RULE, UserSchema, get_user
from blueprints.web_login import is_authorization_valid
from errors import ApiError, Code, Message
from storage import blocks, database
from storage import sessions as stored_sessions
from storage.identities import get_or_create_user, openid_of
from storage.models import User
from storage.single_flight import AlreadyDone, single_flight
from telemetry.logs import bind
from telemetry.metrics import LOGINS
from wechat.client import is_identifier
from wechat.transport import PATIENCE_SECONDS

NOT_THE_METRICS_TOKEN = Message("METRICS_TOKEN 不正确", "This is not METRICS_TOKEN")


def _let_everybody_in() -> None:
    pass


def _require_user() -> None:
    if "user_id" in session:
        g.user_id = session["user_id"]
    elif current_app.config["TRUST_WXCLOUD_HEADERS"] and "X-WX-OPENID" in request.headers:
        g.user_id = _user_of_cloud_run()
    else:
        raise ApiError(Code.UNAUTHORIZED)
    bind(user_id=g.user_id)
    blocks.require_not_blocked(get_user(g.user_id))


def _user_of_cloud_run() -> int:
    """Whom WeChat cloud run says the call comes from. Source:
    https://developers.weixin.qq.com/miniprogram/dev/wxcloudservice/wxcloudrun/src/development/call/container.html
    """
    app_id, openid, unionid = (request.headers.get(f"X-WX-{name}") for name in ("APPID", "OPENID", "UNIONID"))
    if app_id not in (None, wechat.api.app_id) or not all(is_identifier(name) for name in (openid, unionid or openid)):
        raise ApiError(Code.UNAUTHORIZED)
    return _user_of(str(openid), unionid or None).id


def _user_of(openid: str, unionid: str | None) -> User:
    """The user of the mini-program; an administrator if the settings say so."""
    user = get_or_create_user(wechat.api.app_id, openid, unionid)
    if user.role == "admin" or openid not in re.split(" *, *", current_app.config["ADMIN_OPENIDS"]):
        return user

    def promote() -> User:
        promoted = get_user(user.id, lock=True)
        promoted.role = "admin"
        return promoted

    return database.in_transaction(promote)


def _require_admin() -> None:
    _require_user()
    if get_user(g.user_id).role != "admin":
        raise ApiError(Code.FORBIDDEN)


def _require_metrics_token() -> None:
    wanted = current_app.config["METRICS_TOKEN"]
    if not wanted:
        raise ApiError(Code.NOT_FOUND)
    # Not request.authorization: it takes a token with = inside for parameters.
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), wanted.encode()):
        raise ApiError(Code.UNAUTHORIZED, message=NOT_THE_METRICS_TOKEN)


public = AuthPolicy(_let_everybody_in, security=[])
signed_in = AuthPolicy(
    _require_user,
    security=[{"bearer": []}, {"cookie": []}],
    fails=(Code.UNAUTHORIZED, Code.FORBIDDEN, Code.UNAVAILABLE),
)
administrators = signed_in._replace(check=_require_admin)
scrapers = AuthPolicy(_require_metrics_token, security=[{"metrics": []}], fails=(Code.UNAUTHORIZED, Code.UNAVAILABLE))

login = Blueprint("login", __name__, description="登录 Log in")
sessions = Blueprint("sessions", __name__, description="登录状态 The session one is logged in with")


class WechatCodeSchema(Schema):
    code = fields.String(
        required=True,
        validate=CODE_RULE,
        metadata={"description": "What wx.login gave: works once, for five minutes."},
    )


class LoginSchema(Schema):
    token = fields.String(required=True, metadata={"description": "Send it as `Authorization: Bearer …`."})
    expires_in = fields.Integer(required=True, metadata={"description": "Seconds; each use may prolong it."})
    user = fields.Nested(UserSchema, required=True)


class WechatSessionSchema(Schema):
    valid = fields.Boolean(required=True, metadata={"description": "If not, log in again before you send data."})


@login.route("/wechat", methods=["POST"])
@login.arguments(WechatCodeSchema)
@login.response(200, LoginSchema, transaction=False)
@login.fails(Code.WECHAT_CODE_INVALID, Code.WECHAT_CODE_USED, Code.WECHAT_HIGH_RISK_USER)
@login.fails(Code.FORBIDDEN, message=blocks.BLOCKED)
@login.fails(Code.UPSTREAM_INVALID, Code.WECHAT_REFUSED, Code.UNAVAILABLE, Code.UPSTREAM_TIMEOUT)
def log_in(body: dict[str, str]) -> dict[str, Any]:
    """Log in with the code of wx.login

    Two requests with the same code at the same moment get the same answer. The token comes in the body for
    `wx.request`, which keeps no cookies, and in a cookie for browsers.
    """
    code = body["code"]
    try:
        outcome = single_flight(
            f"login:{hashlib.sha256(code.encode()).hexdigest()}",
            lambda: _redeem(code),
            patience=PATIENCE_SECONDS + 2,  # for the database and Redis, after WeChat
            remember=CODE_LIFETIME_SECONDS,
        )
    except AlreadyDone:
        raise ApiError(Code.WECHAT_CODE_USED) from None
    except ApiError as error:
        if error.api_code is Code.FORBIDDEN:  # said in other words to those who waited for the same code
            raise ApiError(Code.FORBIDDEN, message=blocks.BLOCKED) from None
        raise
    bind(user_id=outcome["user_id"])
    return {
        "token": outcome["token"],
        "expires_in": min(current_app.config["SESSION_LIFETIME"], current_app.config["SESSION_ABSOLUTE_LIFETIME"]),
        "user": get_user(outcome["user_id"]),
    }


@login.teardown_request
def _count(error: BaseException | None) -> None:
    LOGINS.labels("mini_program", g.get("code", "success")).inc()


def _redeem(code: str) -> dict[str, Any]:
    asked_at = stored_sessions.clock()
    identity = wechat.api.code_to_session(code)
    answered_at = stored_sessions.clock()
    user = _user_of(identity.openid, identity.unionid)
    stored_sessions.keep_session_key(user.id, identity.session_key, asked_at, answered_at)
    return {"token": stored_sessions.log_in(user.id), "user_id": user.id}


@sessions.route("/wechat")
@sessions.response(200, WechatSessionSchema)
@sessions.fails(Code.UPSTREAM_INVALID, Code.WECHAT_REFUSED, Code.UPSTREAM_TIMEOUT)
def get_wechat_session() -> dict[str, bool]:
    """Ask WeChat whether the session_key still holds

    For somebody who logged in on the web: whether what he granted there still holds.
    """
    get_user(g.user_id)  # or 401
    web_app_id = session.get("web_app_id")
    if web_app_id is not None:
        return {"valid": is_authorization_valid(g.user_id, web_app_id)}
    openid = openid_of(g.user_id, wechat.api.app_id)
    session_keys = stored_sessions.session_keys(g.user_id) if openid else []
    return {"valid": any(wechat.api.is_session_key_valid(str(openid), session_key) for session_key in session_keys)}


@sessions.route("/session", methods=["DELETE"])
@sessions.response(200, transaction=False, if_match=False)
def log_out() -> None:
    """Log out"""
    stored_sessions.log_out()


@sessions.route("/sessions", methods=["DELETE"])
@sessions.response(200, transaction=False, if_match=False)
def log_out_everywhere() -> None:
    """Log out on every device"""
    stored_sessions.log_out_everywhere(g.user_id)
