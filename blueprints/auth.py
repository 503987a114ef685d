"""Log in with the code of wx.login, log out, and whether WeChat still knows the session."""

import time
from typing import Any

from flask import current_app, g, session
from marshmallow import Schema, fields

import wechat
from blueprints.api import Blueprint
from blueprints.parsing import WECHAT_CODE_RULE
from blueprints.policies import count_request, current_user, get_mini_program_user, set_current_user
from blueprints.users import UserSchema
from blueprints.web_login import check_authorization
from errors import Code, Message
from storage import identities, sessions, wechat_session_keys
from storage.single_flight import single_flight

login = Blueprint("login", __name__, title=Message("登录", "Log in"))
blueprint = Blueprint("sessions", __name__, title=Message("会话", "Sessions"))


class WechatCodeSchema(Schema):
    ANY_CONTENT_TYPE = True  # a browser's fetch sends text/plain

    code = fields.String(required=True, validate=WECHAT_CODE_RULE, metadata={"example": "0a3Bx"})
    """wx.login 返回的 code | The code of wx.login"""


class LoginSchema(Schema):
    token = fields.String(required=True, metadata={"example": "Vb2pZ0sXw8yJ4uTqLr9cNf7hEo1kGd6m"})
    """请放入 `Authorization: Bearer …` | Send it as `Authorization: Bearer …`"""
    expires_in = fields.Integer(required=True, metadata={"example": 604800})
    """单位：秒；使用会使其延长 | In seconds; each use may extend it"""
    user = fields.Nested(UserSchema, required=True)


class WechatSessionSchema(Schema):
    valid = fields.Boolean(required=True, metadata={"example": True})
    """为 false 时，先登录再提交加密数据 | If false, log in before you send encrypted data"""


@login.route("/wechat", methods=["POST"])
@login.arguments(WechatCodeSchema)
@login.response(200, LoginSchema, transaction=False)
@login.fails(Code.WECHAT_CODE_INVALID, Code.WECHAT_CODE_USED, Code.WECHAT_HIGH_RISK_USER)
@login.fails(*wechat.FAILS, FORBIDDEN=identities.BLOCKED)
def log_in(body: dict[str, str]) -> dict[str, Any]:
    """用 wx.login 的 code 登录 | Log in with the code of wx.login

    code 五分钟内有效，只能用一次。五秒内重复提交同一 code 返回同样的结果，因为首次响应可能丢失。
    `wx.request` 不保存 cookie，所以 token 在响应体中；本站页面还会得到 cookie。

    A code works once, for five minutes. Within five seconds a request with the same code gets the same response, as the
    first one may have been lost. The token comes in the body for `wx.request`, which keeps no cookies; a page of this
    site gets it in a cookie as well.
    """
    token = single_flight("login", body["code"], lambda: _redeem(body["code"]))
    sessions.resume(token)
    set_current_user(session["user_id"])
    user = identities.require_not_blocked(current_user())
    session.modified = sessions.current.by_cookie  # a browser gets the cookie again
    return {"token": token, "expires_in": current_app.config["SESSION_LIFETIME"], "user": user}


def _redeem(code: str) -> str:
    count_request("app")  # not before: what is refused or repeated costs nothing of WeChat's quota
    began, asked_at = time.monotonic(), wechat_session_keys.clock()  # in this order: the interval may only be too long
    openid, session_key, unionid = wechat.api.code_to_session(code)
    answered_at = asked_at + time.monotonic() - began
    user = get_mini_program_user(openid, unionid)
    wechat_session_keys.keep(user.id, session_key, asked_at, answered_at)
    return identities.start_session(user.id)


@blueprint.route("/wechat")
@blueprint.response(200, WechatSessionSchema)
@blueprint.fails(*wechat.FAILS)
def get_wechat_session() -> dict[str, bool]:
    """查询微信 session_key 是否仍有效 | Ask WeChat whether the session_key is still valid

    网页登录的用户：查询网页授权是否仍有效。

    For a user who logged in on the web: whether the web-app authorization is still valid.
    """
    identities.require_not_blocked(current_user())
    if (web_app_id := session.get("web_app_id")) is not None:
        return {"valid": check_authorization(g.user_id, web_app_id)}
    openid = identities.find_openid(g.user_id, wechat.api.app_id)
    session_keys = wechat_session_keys.candidates(g.user_id) if openid else []
    return {"valid": any(wechat.api.is_session_key_valid(str(openid), session_key) for session_key in session_keys)}


@blueprint.route("/session", methods=["DELETE"])
@blueprint.response(200, transaction=False, if_match=False)
def log_out() -> None:
    """退出登录 | Log out

    此 token 不再有效。

    The token is no longer valid.
    """
    session.clear()


@blueprint.route("/sessions", methods=["DELETE"])
@blueprint.response(200, transaction=False, if_match=False)
def log_out_everywhere() -> None:
    """在所有设备上退出登录 | Log out on every device

    该用户的所有 token 都不再有效。

    None of the user's tokens is valid any longer.
    """
    sessions.revoke_sessions(g.user_id)
    session.clear()
