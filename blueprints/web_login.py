"""Login on the web with WeChat's OAuth2, inside WeChat or by QR code; it ends with a cookie session."""

import hashlib
import json
import secrets
import time
from typing import cast

from flask import current_app, g, redirect, request, url_for
from itsdangerous import BadSignature, URLSafeTimedSerializer
from marshmallow import EXCLUDE, Schema, fields, validate
from sqlalchemy import select
from werkzeug import Response as BaseResponse

import wechat
from blueprints.api import TRACE_ID_HEADER, Blueprint
from blueprints.parsing import WECHAT_CODE_RULE
from blueprints.policies import current_user, set_current_user
from blueprints.wechat_profile import ProfileSchema
from errors import ApiError, Code, Message
from storage import database
from storage import sessions as stored_sessions
from storage.identities import get_or_create_user
from storage.models import Identity
from storage.redis_client import redis
from storage.sessions import COOKIE_OPTIONS, cookie_name, public_url
from telemetry.metrics import LOGINS
from wechat.crypto import constant_time_equals
from wechat.oauth import QR_CODE_SCOPE, SCOPES, Authorization, UserInfo, WebApp

STATE_SECONDS = 600
COOKIE_PREFIX, ATTEMPTS_AT_ONCE = "web_login_", 5
LOCATION = {**TRACE_ID_HEADER, "Location": {"required": True, "schema": {"type": "string"}}}
STATE_REFUSED = {
    "state": ["Unknown, used, expired after ten minutes, or from another browser: start again at authorize."]
}
DECLINED = Message("用户未同意授权", "The user did not consent")
SNAPSHOT_USER = Message("快照页用户不能登录，请进入完整网页", "A snapshot user cannot log in: open the full page")
BEGIN_AGAIN = Message(
    "code 无效、过期或已使用，请重新登录", "Code invalid, expired or used already: start again at authorize"
)

blueprint = Blueprint("web_login", __name__, description="网页登录 Log in on the web")


class AuthorizeSchema(Schema):
    class Meta:
        unknown = EXCLUDE  # browsers and WeChat add parameters of their own

    # Only a path: `//host` and `/\host` lead to other sites, and browsers skip blanks.
    return_to = fields.String(
        load_default="/",
        validate=validate.Regexp(r"^/(?![/\\])(?:(?!\\)[!-~]){0,511}(?!\n)$", error="Must be a path of this site."),
        metadata={"description": "Where to go after login: a path of this site."},
    )
    scope = fields.String(
        validate=validate.OneOf(SCOPES),
        metadata={"description": "Default: snsapi_userinfo inside WeChat, snsapi_login elsewhere."},
    )


class CallbackSchema(Schema):
    class Meta:
        unknown = EXCLUDE

    state = fields.String(required=True, validate=validate.Length(1, 128), metadata={"description": "From authorize."})
    code = fields.String(validate=WECHAT_CODE_RULE, metadata={"description": "Missing if the user declined."})


@blueprint.route("/authorize")
@blueprint.arguments(AuthorizeSchema, location="query")
@blueprint.response(302, {"type": "string"}, content_type="text/html", headers=LOCATION)
@blueprint.fails(Code.INVALID_INPUT)
def authorize(query: dict[str, str]) -> BaseResponse:
    """Redirect to WeChat's consent page"""
    inside_wechat = "MicroMessenger" in request.user_agent.string
    scope = query.get("scope") or ("snsapi_userinfo" if inside_wechat else QR_CODE_SCOPE)
    state = secrets.token_urlsafe(32)
    back = public_url() + url_for("web_login.callback")
    response = redirect(wechat.web_app(scope).authorize_url(scope, back, state))
    earlier = [name for name in request.cookies if name.startswith(cookie_name(COOKIE_PREFIX))]
    for name in earlier[: 1 - ATTEMPTS_AT_ONCE]:  # every request carries them, and a server takes only so many
        response.delete_cookie(name, **COOKIE_OPTIONS)
    # Kept by the browser: nothing is stored here for users who never come back.
    response.set_cookie(
        _cookie(state),
        _serializer().dumps({"state": state, "scope": scope, "return_to": query["return_to"]}),
        max_age=STATE_SECONDS,
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
    """Return from WeChat, logged in"""
    attempt = _consume(query["state"])
    if "code" not in query:
        raise ApiError(Code.FORBIDDEN, message=DECLINED)
    app = wechat.web_app(attempt["scope"])
    user_id = _log_in(app, query["code"], with_profile=attempt["scope"] != "snsapi_base")
    stored_sessions.log_in(user_id, web_app_id=app.app_id)
    response = redirect(public_url() + attempt["return_to"])
    response.delete_cookie(_cookie(query["state"]), **COOKIE_OPTIONS)
    return response


@blueprint.teardown_request
def _count(error: BaseException | None) -> None:
    if request.endpoint == "web_login.callback":
        LOGINS.labels("web", g.get("code", "success")).inc()


def check_authorization(user_id: int, app_id: str) -> bool:
    """Whether a user's web-app authorization is still valid.

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
        if kept.authorization == granted:  # and not one of a login in the meantime
            kept.authorization = json.dumps(renewed)

    if renewed != authorization:
        database.in_transaction(store)
    return is_valid


def _consume(state: str) -> dict[str, str]:
    """Load the login that this browser started under a state, which works once.

    :raises ApiError: INVALID_INPUT if there is none, or no longer.
    """
    try:
        attempt, made_at = _serializer().loads(request.cookies.get(_cookie(state), ""), return_timestamp=True)
    except BadSignature:
        raise ApiError(Code.INVALID_INPUT, errors=STATE_REFUSED) from None
    # Not loads(max_age=…), which rejects a state from an instance whose clock is ahead.
    if time.time() - made_at.timestamp() > STATE_SECONDS or not constant_time_equals(state, attempt["state"]):
        raise ApiError(Code.INVALID_INPUT, errors=STATE_REFUSED)
    if not redis.set(f"web_login:{hashlib.sha256(state.encode()).hexdigest()}", b"used", nx=True, ex=STATE_SECONDS):
        raise ApiError(Code.INVALID_INPUT, errors=STATE_REFUSED)
    return cast(dict[str, str], attempt)


def _log_in(app: WebApp, code: str, with_profile: bool) -> int:
    """Redeem a code.

    :returns: the id of its user.
    """
    info = UserInfo(None, None, None)
    try:
        grant = app.redeem(code)
        if grant.is_snapshot_user:
            raise ApiError(Code.FORBIDDEN, message=SNAPSHOT_USER)
        authorization = grant.authorization
        if with_profile:
            info, authorization = app.userinfo(authorization)
    except ApiError as error:
        if error.api_code in (Code.WECHAT_CODE_INVALID, Code.WECHAT_CODE_USED):
            raise ApiError(error.api_code, message=BEGIN_AGAIN) from None
        raise
    user_id = get_or_create_user(app.app_id, authorization.openid, grant.unionid or info.unionid).id
    set_current_user(user_id)
    profile = {"nickname": info.nickname, "avatar_url": info.avatar_url}
    invalid = ProfileSchema().validate(profile)

    def store() -> None:
        user = current_user()
        for name, value in profile.items():
            if name not in invalid and getattr(user, name) is None:  # a typed one stays
                setattr(user, name, value)
        identity = database.session.get_one(Identity, (app.app_id, authorization.openid))
        identity.authorization = json.dumps(authorization)

    database.in_transaction(store)
    return user_id


def _serializer() -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(current_app.config["SECRET_KEY"], salt="web_login")


def _cookie(state: str) -> str:
    """Name a cookie for each attempt, as each tab may have one."""
    return cookie_name(COOKIE_PREFIX + hashlib.sha256(state.encode()).hexdigest()[:16])
