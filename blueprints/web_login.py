"""Login on the web with WeChat's OAuth2, inside WeChat or by QR code; it ends with a cookie session."""

import hashlib
import secrets
from contextlib import suppress
from urllib.parse import urlencode

from flask import Response, current_app, g, redirect, render_template, request, session, url_for
from itsdangerous import BadSignature, URLSafeSerializer
from marshmallow import EXCLUDE, Schema, fields, validate
from sqlalchemy import select
from werkzeug import Response as BaseResponse

import wechat
from blueprints.api import Blueprint
from blueprints.parsing import WECHAT_CODE_RULE
from blueprints.policies import count_request, set_current_user
from blueprints.users import TypedProfileSchema, matches
from errors import ApiError, Code, Message
from storage import database, identities, sessions
from storage.models import Identity, User
from storage.single_flight import single_flight
from wechat.oauth import QR_CODE_SCOPE, SCOPES

ATTEMPT_SECONDS = 3600
"""How long a browser keeps what it has begun."""

COOKIE_PREFIX, ATTEMPTS_AT_ONCE = "web_login_", 5
# `//host` and `/\host` lead to other sites, and browsers skip blanks.
PATH_RULE = matches(r"/(?![/\\])(?:(?!\\)[!-~]){0,511}", "Must be a path of this site.")
DECLINED = Message("用户未同意授权", "The user did not consent")
SNAPSHOT_USER = Message("快照页用户不能登录，请进入完整网页", "A snapshot user cannot log in: open the full page")
BEGIN_AGAIN = Message("登录链接无效、过期或已使用，请重新登录", "Login link invalid, expired or used: log in again")

blueprint = Blueprint("web_login", __name__, title=Message("网页登录", "Log in on the web"), template_folder=".")

PAGE = {"type": "string", "examples": ["<!doctype html>"]}


class AuthorizeSchema(Schema):
    return_to = fields.String(load_default="/", validate=PATH_RULE, metadata={"example": "/orders"})
    """登录后前往的本站路径 | Where to go after login: a path of this site"""
    scope = fields.String(validate=validate.OneOf(SCOPES), metadata={"example": "snsapi_userinfo"})
    """默认 snsapi_userinfo，微信外为 snsapi_login | snsapi_userinfo; outside WeChat snsapi_login"""


class CallbackSchema(Schema):
    state = fields.String(required=True, validate=validate.Length(1, 128), metadata={"example": "3f0c9b"})
    """authorize 给出的 | From authorize"""
    code = fields.String(validate=WECHAT_CODE_RULE, metadata={"example": "0a3Bx"})
    """用户拒绝时缺失 | Missing if the user declined"""


@blueprint.route("/authorize")
@blueprint.arguments(AuthorizeSchema(unknown=EXCLUDE), location="query")
@blueprint.response(302, PAGE, content_type="text/html")
def begin_web_login(query: dict[str, str]) -> BaseResponse:
    """开始网页登录：前往微信授权页 | Begin to log in on the web: redirect to WeChat's consent page

    在浏览器中打开，而不是由程序调用；登录以 cookie 结束。

    For a browser to open, not for a program to call; the login ends with a cookie.
    """
    inside_wechat = "MicroMessenger" in request.user_agent.string
    scope = query.get("scope") or ("snsapi_userinfo" if inside_wechat else QR_CODE_SCOPE)
    state = secrets.token_urlsafe(32)
    app = wechat.web_apps[scope]
    response = redirect(app.authorize_url(scope, sessions.public_url() + url_for(".complete_web_login"), state))
    earlier = [name for name in request.cookies if name.startswith(sessions.cookie_name(COOKIE_PREFIX))]
    for name in earlier[: 1 - ATTEMPTS_AT_ONCE]:  # every request carries them, and a server takes only so many
        response.delete_cookie(name, **sessions.COOKIE_OPTIONS)
    # Kept by the browser: nothing is stored here for users who never come back.
    attempt = _serializer(state).dumps({"scope": scope, "return_to": query["return_to"]})
    response.set_cookie(_cookie(state), attempt, max_age=ATTEMPT_SECONDS, **sessions.COOKIE_OPTIONS)
    return response


@blueprint.route("/callback")
@blueprint.arguments(CallbackSchema(unknown=EXCLUDE), location="query")  # WeChat adds parameters of its own
@blueprint.response(302, PAGE, content_type="text/html")
@blueprint.fails(*wechat.FAILS, WECHAT_CODE_INVALID=BEGIN_AGAIN, WECHAT_CODE_USED=BEGIN_AGAIN, FORBIDDEN=DECLINED)
def complete_web_login(query: dict[str, str]) -> BaseResponse:
    """完成网页登录：从微信返回 | Complete the login on the web: return from WeChat

    再次打开（例如后退）会到达同一处。出错时是一个页面，带有重新开始的链接。

    Opened again, as by the back button, it leads to the same place. Errors are pages with a link to begin again.
    """
    mark = _cookie(query["state"])
    if session.get("web_login") == mark:
        return redirect(sessions.public_url() + session["return_to"])
    if not (attempt := _load_attempt(query["state"])):
        raise ApiError(Code.INVALID_INPUT, errors={"state": ["Unknown, expired or from another browser: start again."]})
    if "code" not in query:
        raise ApiError(Code.FORBIDDEN, message=DECLINED)
    # Browsers inside WeChat may open the page twice at once.
    sessions.resume(single_flight("web_login", query["state"], lambda: _log_in(attempt, query["code"], mark)))
    session.modified = True  # a browser gets the cookie again
    response = redirect(sessions.public_url() + attempt["return_to"])
    response.delete_cookie(mark, **sessions.COOKIE_OPTIONS)
    return response


@blueprint.after_app_request
def _make_page(response: Response) -> Response:
    """Keep responses out of caches, and make a page of an error, also of a method that no route here has."""
    if not request.path.endswith(("/auth/wechat/authorize", "/auth/wechat/callback")):
        return response
    response.cache_control.no_store = True
    if response.status_code >= 400:
        response.content_security_policy.default_src = "'none'"
        error = response.get_json()
        if response.status_code == 400:  # the code's own message is for developers of the mini-program
            error["message"] = str(BEGIN_AGAIN)
        again = _load_attempt(request.args.get("state", ""))
        response.data = render_template("web_login.html", **error, again=urlencode(again))
        response.content_type = "text/html; charset=utf-8"
    return response


def check_authorization(user_id: int, app_id: str) -> bool:
    """Whether a user's web-app authorization is still valid.

    :raises ApiError: what `WebApp.is_valid` does.
    """
    identity = database.session.scalar(select(Identity).where(Identity.user_id == user_id, Identity.app_id == app_id))
    refresh_token = identity and identity.authorization
    database.session.rollback()  # no transaction waits for WeChat
    apps = {app.app_id: app for app in wechat.web_apps.values()}
    return bool(refresh_token and app_id in apps and apps[app_id].is_valid(refresh_token))


def _load_attempt(state: str) -> dict[str, str]:
    """Load the login that this browser began under a state; empty if there is none."""
    with suppress(BadSignature):
        return _serializer(state).loads(request.cookies.get(_cookie(state), ""))  # type: ignore[no-any-return]
    return {}


def _log_in(attempt: dict[str, str], code: str, mark: str) -> str:
    """Redeem a code, and start a session.

    :param mark: by which the session knows the attempt.
    :returns: its token.
    """
    count_request("app")
    app = wechat.web_apps[attempt["scope"]]
    grant = app.redeem(code)
    if grant.is_snapshot_user:
        raise ApiError(Code.FORBIDDEN, message=SNAPSHOT_USER)
    profile, unionid = ({}, None) if attempt["scope"] == "snsapi_base" else app.userinfo(grant)
    user_id = identities.get_or_create_user(app.app_id, grant.openid, grant.unionid or unionid).id
    set_current_user(user_id)
    invalid = TypedProfileSchema().validate(profile)

    def store() -> None:
        user = database.session.get_one(User, g.user_id)
        for name, value in profile.items():
            if name not in invalid and getattr(user, name) is None:  # a typed one stays
                setattr(user, name, value)
        database.session.get_one(Identity, (app.app_id, grant.openid)).authorization = grant.refresh_token

    database.in_transaction(store)
    return identities.start_session(user_id, web_app_id=app.app_id, web_login=mark, return_to=attempt["return_to"])


def _serializer(state: str) -> URLSafeSerializer:
    """Sign for one state: what is kept for another one has no valid signature."""
    keys = [*current_app.config["SECRET_KEY_FALLBACKS"], current_app.config["SECRET_KEY"]]  # the last one signs
    return URLSafeSerializer(keys, salt=f"web_login:{state}")


def _cookie(state: str) -> str:
    """Name a cookie for each attempt, as each tab may have one; the name does not reveal the state."""
    return sessions.cookie_name(COOKIE_PREFIX + hashlib.sha256(state.encode()).hexdigest())
