"""Who is it: login with a wx.login code, logout, and the policies that groups of routes are registered with."""

import hashlib
from typing import Any

from flask import current_app, session
from marshmallow import Schema, fields, validate

import wechat
from blueprints.api import AuthPolicy, Blueprint
from blueprints.users import UserSchema, get_or_create_user, get_user
from errors import ApiError, Code
from storage import sessions as stored_sessions
from storage.single_flight import AlreadyDone, single_flight
from wechat.client import PATIENCE_SECONDS

CODE_LIFETIME_SECONDS = 300  # WeChat's; after that it refuses the code by itself


def _let_everybody_in() -> None:
    pass


def _require_session() -> None:
    if "user_id" not in session:
        raise ApiError(Code.UNAUTHORIZED)


public = AuthPolicy(_let_everybody_in, security=[])
signed_in = AuthPolicy(_require_session, security=[{"bearer": []}, {"cookie": []}])

login = Blueprint("login", __name__, description="登录 Log in")
sessions = Blueprint("sessions", __name__, description="登录状态 The session one is logged in with")


class WechatCodeSchema(Schema):
    code = fields.String(
        required=True,
        validate=validate.Regexp(r"^[!-~]{1,128}(?!\n)$", error="Not a code of wx.login."),
        metadata={"description": "What wx.login gave: works once, for five minutes."},
    )


class LoginSchema(Schema):
    token = fields.String(required=True, metadata={"description": "Send it as `Authorization: Bearer …`."})
    expires_in = fields.Integer(required=True, metadata={"description": "Seconds; each use may prolong it."})
    user = fields.Nested(UserSchema, required=True)


@login.route("/wechat", methods=["POST"])
@login.arguments(WechatCodeSchema)
@login.response(200, LoginSchema)
@login.fails(Code.WECHAT_CODE_INVALID, Code.WECHAT_CODE_USED, Code.WECHAT_HIGH_RISK_USER)
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
    return {
        "token": outcome["token"],
        "expires_in": min(current_app.config["SESSION_LIFETIME"], current_app.config["SESSION_ABSOLUTE_LIFETIME"]),
        "user": get_user(outcome["user_id"]),
    }


def _redeem(code: str) -> dict[str, Any]:
    identity = wechat.api.code_to_session(code)
    user = get_or_create_user(wechat.api.app_id, identity.openid, identity.unionid)
    return {"token": stored_sessions.log_in(user.id, identity.session_key), "user_id": user.id}


@sessions.route("/session", methods=["DELETE"])
@sessions.response(200)
def log_out() -> None:
    """Log out"""
    stored_sessions.log_out()


@sessions.route("/sessions", methods=["DELETE"])
@sessions.response(200)
def log_out_everywhere() -> None:
    """Log out on every device"""
    stored_sessions.log_out_everywhere(session["user_id"])
