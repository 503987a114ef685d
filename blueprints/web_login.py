"""Login on the web with WeChat's OAuth2, inside WeChat or by QR code, which ends in a cookie session."""

import hashlib
import json
import secrets
import time
from typing import Any, cast
from urllib.parse import urlsplit

from flask import current_app, g, redirect, request, url_for
from itsdangerous import BadSignature, URLSafeTimedSerializer
from marshmallow import EXCLUDE, Schema, fields, validate
from sqlalchemy import select
from werkzeug import Response as BaseResponse

import wechat
from blueprints.api import TRACE_ID_HEADER, Blueprint
from blueprints.users import CODE_RULE, ProfileSchema, get_user
from errors import ApiError, Code, Message
from storage import database, redis
from storage import sessions as stored_sessions
from storage.identities import get_or_create_user
from storage.models import Identity
from telemetry.logs import bind
from telemetry.metrics import LOGINS
from wechat.crypto import constant_time_equals
from wechat.web_login import QR_CODE_SCOPE, SCOPES, Authorization, UserInfo, WebApp

STATE_SECONDS = 600
COOKIE_OPTIONS: dict[str, Any] = {"secure": True, "httponly": True, "samesite": "Lax"}
LOCATION = {**TRACE_ID_HEADER, "Location": {"required": True, "schema": {"type": "string"}}}
STATE_REFUSED = {"state": ["Unknown, used, older than ten minutes, or of another browser: begin again at authorize."]}
DECLINED = Message("用户未同意授权", "The user did not consent")
SNAPSHOT_USER = Message("快照页用户不能登录，请进入完整网页", "A snapshot user cannot log in: open the full page")
BEGIN_AGAIN = Message("code 无效、过期或已使用，请重新登录", "Invalid, old or used code: begin again at authorize")

blueprint = Blueprint("web_login", __name__, description="网页登录 Log in on the web")


class AuthorizeSchema(Schema):
    class Meta:
        unknown = EXCLUDE  # browsers and WeChat add what they like

    # A path and nothing else: `//host` and `/\host` lead elsewhere, and browsers skip blanks.
    return_to = fields.String(
        load_default="/",
        validate=validate.Regexp(r"^/(?![/\\])(?:(?!\\)[!-~]){0,511}(?!\n)$", error="Not a path of this site."),
        metadata={"description": "Where to go afterwards: a path of this site."},
    )
    scope = fields.String(
        validate=validate.OneOf(SCOPES),
        metadata={"description": "snsapi_userinfo inside WeChat and snsapi_login elsewhere, unless named."},
    )


class CallbackSchema(Schema):
    class Meta:
        unknown = EXCLUDE

    state = fields.String(
        required=True, validate=validate.Length(1, 128), metadata={"description": "What authorize gave to WeChat."}
    )
    code = fields.String(validate=CODE_RULE, metadata={"description": "Missing if the user declined."})


@blueprint.route("/authorize")
@blueprint.arguments(AuthorizeSchema, location="query")
@blueprint.response(302, {"type": "string"}, content_type="text/html", headers=LOCATION)
@blueprint.fails(Code.INVALID_INPUT)
def authorize(query: dict[str, str]) -> BaseResponse:
    """Go to WeChat's page that asks the user"""
    inside_wechat = "MicroMessenger" in request.user_agent.string
    scope = query.get("scope") or ("snsapi_userinfo" if inside_wechat else QR_CODE_SCOPE)
    state = secrets.token_urlsafe(32)
    response = redirect(wechat.web_app(scope).authorize_url(scope, f"{_site()}{url_for('web_login.callback')}", state))
    # The browser keeps what it began: nothing is stored here for those who never come back.
    response.set_cookie(
        _cookie(state),
        _serializer().dumps({"state": state, "scope": scope, "return_to": query["return_to"]}),
        max_age=STATE_SECONDS,
        path=_folder(),
        **COOKIE_OPTIONS,
    )
    return response


@blueprint.route("/callback")
@blueprint.arguments(CallbackSchema, location="query")
@blueprint.response(302, {"type": "string"}, content_type="text/html", headers=LOCATION)
@blueprint.fails(Code.INVALID_INPUT)
@blueprint.fails(Code.WECHAT_CODE_INVALID, Code.WECHAT_CODE_USED, message=BEGIN_AGAIN)
@blueprint.fails(Code.FORBIDDEN, message=DECLINED)
@blueprint.fails(Code.UPSTREAM_INVALID, Code.WECHAT_REFUSED, Code.UNAVAILABLE, Code.UPSTREAM_TIMEOUT)
def callback(query: dict[str, str]) -> BaseResponse:
    """Come back from WeChat, logged in"""
    attempt = _consume(query["state"])
    if "code" not in query:
        raise ApiError(Code.FORBIDDEN, message=DECLINED)
    app = wechat.web_app(attempt["scope"])
    user_id = _log_in(app, query["code"], with_profile=attempt["scope"] != "snsapi_base")
    bind(user_id=user_id)
    stored_sessions.log_in(user_id, web_app_id=app.app_id)
    response = redirect(_site() + attempt["return_to"])
    response.delete_cookie(_cookie(query["state"]), path=_folder(), **COOKIE_OPTIONS)
    return response


@blueprint.teardown_request
def _count(error: BaseException | None) -> None:
    if request.endpoint == "web_login.callback":
        LOGINS.labels("web", g.get("code", "success")).inc()


def is_authorization_valid(user_id: int, app_id: str) -> bool:
    """Whether what a user granted to one of our web apps still holds.

    :raises ApiError: what `WebApp.is_valid` does.
    """
    app = wechat.web_app_of(app_id)
    find = select(Identity).where(Identity.user_id == user_id, Identity.app_id == app_id)
    identity = database.session.scalar(find)
    granted = identity.authorization if identity else None
    if app is None or granted is None:
        return False
    database.session.rollback()  # no transaction waits for WeChat
    authorization = Authorization(*json.loads(granted))
    is_valid, renewed = app.is_valid(authorization)

    def store() -> None:
        kept = database.session.scalars(find.with_for_update()).one()
        if kept.authorization == granted:  # and not that of a login that came in between
            kept.authorization = json.dumps(renewed)

    if renewed != authorization:
        database.in_transaction(store)
    return is_valid


def _consume(state: str) -> dict[str, str]:
    """Find what this browser began under a state, which works once.

    :raises ApiError: INVALID_INPUT if there is no such thing, or not any more.
    """
    try:
        attempt, made_at = _serializer().loads(request.cookies.get(_cookie(state), ""), return_timestamp=True)
    except BadSignature:
        raise ApiError(Code.INVALID_INPUT, errors=STATE_REFUSED) from None
    # Not loads(max_age=…), which takes a state for forged that another instance made and whose clock is ahead.
    if time.time() - made_at.timestamp() > STATE_SECONDS or not constant_time_equals(state, attempt["state"]):
        raise ApiError(Code.INVALID_INPUT, errors=STATE_REFUSED)
    if not redis.set(f"web_login:{hashlib.sha256(state.encode()).hexdigest()}", b"used", nx=True, ex=STATE_SECONDS):
        raise ApiError(Code.INVALID_INPUT, errors=STATE_REFUSED)
    return cast(dict[str, str], attempt)


def _log_in(app: WebApp, code: str, with_profile: bool) -> int:
    """Redeem a code, and answer the id of the user whom it belongs to."""
    try:
        grant = app.redeem(code)
    except ApiError as error:
        if error.api_code in (Code.WECHAT_CODE_INVALID, Code.WECHAT_CODE_USED):
            raise ApiError(error.api_code, message=BEGIN_AGAIN) from None
        raise
    if grant.is_snapshot_user:
        raise ApiError(Code.FORBIDDEN, message=SNAPSHOT_USER)
    info, authorization = UserInfo(None, None, None), grant.authorization
    if with_profile:
        info, authorization = app.userinfo(authorization)
    user_id = get_or_create_user(app.app_id, authorization.openid, grant.unionid or info.unionid).id
    profile = {"nickname": info.nickname, "avatar_url": info.avatar_url}
    refused = ProfileSchema().validate(profile)

    def store() -> None:
        user = get_user(user_id)
        for name, value in profile.items():
            if name not in refused and getattr(user, name) is None:  # what the user typed in stays
                setattr(user, name, value)
        identity = database.session.get_one(Identity, (app.app_id, authorization.openid))
        identity.authorization = json.dumps(authorization)

    database.in_transaction(store)
    return user_id


def _serializer() -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(current_app.config["SECRET_KEY"], salt="web_login")


def _cookie(state: str) -> str:
    """A cookie of its own for each attempt, as there may be one in each tab."""
    return f"web_login_{hashlib.sha256(state.encode()).hexdigest()[:16]}"


def _folder() -> str:
    return urlsplit(_site()).path + request.path.rpartition("/")[0]


def _site() -> str:
    return str(current_app.config["PUBLIC_URL"] or request.host_url).rstrip("/")
