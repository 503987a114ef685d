"""Users: what a user looks like from outside, and the reads and writes of the table behind it."""

import hashlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import click
from flask import current_app, g, url_for
from marshmallow import Schema, ValidationError, fields, validate, validates_schema
from werkzeug.routing import BaseConverter

import wechat
from blueprints.api import Blueprint, ListSchema, page_schema, require_match
from errors import ApiError, Code, Message
from storage import blocks, database, ownership, pagination
from storage import sessions as stored_sessions
from storage.identities import openid_of
from storage.models import Identity, User, now
from storage.privacy import mask_phone
from storage.single_flight import AlreadyDone, single_flight
from wechat import strict_json
from wechat.client import phone_number
from wechat.crypto import constant_time_equals, decrypt_user_data, raw_data_signature
from wechat.transport import PATIENCE_SECONDS

logger = logging.getLogger(__name__)

COUNT_LIMIT = 10_000
"""How far all users are counted."""
CODE_LIFETIME_SECONDS = 300  # WeChat's; after that it refuses a code by itself
CODE_RULE = validate.Regexp(r"^[!-~]{1,128}(?!\n)$", error="Not a code of WeChat's.")
PHONE_CODE_WANTED = Message(
    "code 无效、过期或已使用：需要 getPhoneNumber 按钮返回的 code，而非 wx.login 的 code",
    "Invalid, old or used code: the code of a getPhoneNumber button is wanted, not that of wx.login",
)
MINI_PROGRAM_WANTED = Message("请先在小程序中登录", "Log in to the mini-program first")

blueprint = Blueprint("users", __name__, description="用户 Users")
administration = Blueprint("administration", __name__, description="用户管理 Users, for administrators")


def masked(name: str, mask: Callable[[str], str], **metadata: Any) -> fields.Field[Any]:
    """A field of a user that is shown through its mask."""

    def dump(user: User) -> str | None:
        value = getattr(user, name)
        return None if value is None else mask(value)

    described = {"type": ["string", "null"], "description": "Masked.", **metadata}
    return fields.Function(dump, required=True, metadata=described)


class UserSchema(Schema):
    id = fields.Integer(required=True)
    nickname = fields.String(required=True, allow_none=True)
    avatar_url = fields.String(required=True, allow_none=True)
    phone = masked("phone", mask_phone, examples=["138****5678"])
    role = fields.String(required=True, metadata={"enum": ["user", "admin"]})
    created_at = fields.DateTime(required=True)
    updated_at = fields.DateTime(required=True)


class UserIdConverter(BaseConverter):
    """The id of a user in a URL, or `me`."""

    regex = r"me|[1-9][0-9]{0,17}"


ROLES = validate.OneOf(["user", "admin"])
NICKNAME_RULE = validate.Regexp(r"^(?=.*\S)[^\x00-\x1f\x7f]{1,64}(?!\n)$", error="Not 1 to 64 printable characters.")


class UserChangeSchema(Schema):
    nickname = fields.String(
        allow_none=True, validate=NICKNAME_RULE, metadata={"description": "As typed in; null takes it away."}
    )
    avatar_url = fields.Url(allow_none=True, schemes={"http", "https"}, validate=validate.Length(max=512))
    role = fields.String(validate=ROLES, metadata={"description": "For administrators."})
    blocked = fields.Boolean(
        truthy={True},
        falsy={False},
        metadata={
            "description": "For administrators. A blocked user gets 403 from the next request on, and when logging in; "
            "deleting the account does not lift it."
        },
    )


class NewUserSchema(UserChangeSchema):
    class Meta:
        exclude = ("blocked",)

    openid = fields.String(
        required=True,
        validate=validate.Regexp(r"^[A-Za-z0-9_-]{1,64}(?!\n)$", error="Not an openid."),
        metadata={"description": "Under which the mini-program knows the user."},
    )


class UserListSchema(ListSchema):
    phone = fields.String(
        validate=validate.Length(1, 32), metadata={"description": "In full: there is no other match."}
    )


class PhoneSchema(Schema):
    """Either `code`, or `encryptedData` and `iv`."""

    code = fields.String(validate=CODE_RULE, metadata={"description": "What a getPhoneNumber button gave."})
    encryptedData = fields.String(metadata={"description": "Base64, as WeChat gave it."})  # noqa: N815
    iv = fields.String(metadata={"description": "Base64, as WeChat gave it."})

    @validates_schema
    def _one_way(self, body: dict[str, Any], **kwargs: Any) -> None:
        _require_one_of(body, {"code"}, {"encryptedData", "iv"})


class ProfileSchema(UserChangeSchema):
    """Either what wx.getUserProfile gave, all of it, or `nickname` and `avatar_url`, one or both."""

    class Meta:
        exclude = ("role", "blocked")

    rawData = fields.String(metadata={"description": "JSON as text, as WeChat gave it."})  # noqa: N815
    signature = fields.String(metadata={"description": "That of rawData, as WeChat gave it."})
    encryptedData = fields.String(metadata={"description": "Base64, as WeChat gave it."})  # noqa: N815
    iv = fields.String(metadata={"description": "Base64, as WeChat gave it."})

    @validates_schema
    def _one_way(self, body: dict[str, Any], **kwargs: Any) -> None:
        signed = {"rawData", "signature", "encryptedData", "iv"}
        typed = body.keys() & {"nickname", "avatar_url"}
        _require_one_of(body, typed or {"nickname"}, signed)


def _require_one_of(body: dict[str, Any], *ways: set[str]) -> None:
    """Let pass what has all the fields of one way and none of another."""
    given = set(body)
    if given in ways:
        return
    likeliest = max(ways, key=lambda way: len(given & way))
    errors = {name: ["Missing data for required field."] for name in likeliest - given}
    errors |= {name: ["Not together with the others."] for name in given - likeliest}
    raise ValidationError(errors)


@administration.route("")
@administration.arguments(UserListSchema, location="query")
@administration.response(200, page_schema(UserSchema))
@administration.fails(Code.INVALID_INPUT)
def list_users(query: dict[str, Any]) -> dict[str, Any]:
    """List all users, for administrators

    They are counted up to 10,000.
    """
    filters = [User.phone.equals(query.pop("phone"))] if "phone" in query else []
    return pagination.page_of(User, filters, count_limit=COUNT_LIMIT, **query)


@administration.route("", methods=["POST"])
@administration.arguments(NewUserSchema)
@administration.response(201, UserSchema)
@administration.fails(Code.CONFLICT)
def create_user(body: dict[str, Any]) -> tuple[User, dict[str, str]]:
    """Make a user before the first login, for administrators"""
    openid, app_id = body["openid"], wechat.api.app_id
    if database.session.get(Identity, (app_id, openid)) is not None:
        raise ApiError(Code.CONFLICT, errors={"openid": ["There is such a user."]})
    user = User(app_id=app_id, **body)
    database.session.add(user)
    database.session.flush()
    database.session.add(Identity(app_id=app_id, openid=openid, user_id=user.id))
    g.about_user_id = user.id
    return user, {"Location": url_for("users.read_user", user_id=str(user.id))}


@blueprint.route("/<user:user_id>")
@blueprint.response(200, UserSchema)
@blueprint.fails(Code.NOT_FOUND)
def read_user(user_id: str) -> User:
    """Read a user: yourself, or anybody for administrators"""
    return find_user(user_id)


@blueprint.route("/<user:user_id>", methods=["PUT"])
@blueprint.arguments(UserChangeSchema)
@blueprint.response(200, UserSchema, transaction=False)
@blueprint.fails(Code.NOT_FOUND, Code.CONTENT_REFUSED)
@blueprint.fails(Code.FORBIDDEN, message=MINI_PROGRAM_WANTED)
@blueprint.fails(Code.UPSTREAM_INVALID, Code.WECHAT_REFUSED, Code.UPSTREAM_TIMEOUT)
def put_user(body: dict[str, Any], user_id: str) -> User:
    """Change a user; only administrators change a role, or block somebody"""
    reserved = {"role", "blocked"} & body.keys()
    if reserved and get_user(g.user_id).role != "admin":
        raise ApiError(Code.INVALID_INPUT, errors={name: ["Unknown field."] for name in reserved})
    user = find_user(user_id)
    require_match(user)
    if body.get("blocked") and user.id == g.user_id:
        raise ApiError(Code.INVALID_INPUT, errors={"blocked": ["You cannot block yourself."]})
    _check_nickname(body.get("nickname"))  # may wait for WeChat, so it comes before the transaction

    def change() -> User:
        user = find_user(user_id)
        require_match(user)
        for name, value in body.items():
            setattr(user, name, value)
        if "blocked" in body:
            database.after_commit(partial(audit, "user blocked" if user.blocked else "user unblocked", user.id))
        return user

    return database.in_transaction(change)


@blueprint.route("/<user:user_id>", methods=["DELETE"])
@blueprint.response(200, transaction=False)
@blueprint.fails(Code.NOT_FOUND)
def delete_user(user_id: str) -> None:
    """Delete a user for good

    Erases all that is personal at once and ends all sessions. Orders stay, without the person and without remarks.
    """

    def claim() -> int:
        user = find_user(user_id)
        require_match(user)
        user.updated_at = now()  # and so another version: nobody else's If-Match fits from here on
        return user.id

    def delete() -> None:
        user = get_user(deleted, lock=True)
        if user.blocked:
            blocks.keep_block(user)
        ownership.detach_some(deleted)
        database.session.delete(user)

    deleted = database.in_transaction(claim)
    while database.in_transaction(partial(ownership.detach_some, deleted)):
        pass
    database.in_transaction(delete)
    audit("user deleted", deleted)
    if deleted == g.user_id:
        stored_sessions.log_out()
    stored_sessions.revoke_sessions(deleted)


@blueprint.cli.command("block")
@click.argument("user_id", type=int)
def block(user_id: int) -> None:
    """Refuse a user's requests from now on, and logins, also after the account has been deleted."""
    _set_blocked(user_id, True)


@blueprint.cli.command("unblock")
@click.argument("user_id", type=int)
def unblock(user_id: int) -> None:
    """Lift the block of a user, also of one who has been deleted since."""
    _set_blocked(user_id, False)


def _set_blocked(user_id: int, blocked: bool) -> None:
    if not database.in_transaction(partial(blocks.set_blocked, user_id, blocked)):
        raise click.ClickException(f"There is no user {user_id}.")
    audit("user blocked" if blocked else "user unblocked", user_id)


@blueprint.route("/me/phone", methods=["PUT"])
@blueprint.arguments(PhoneSchema)
@blueprint.response(200, UserSchema, transaction=False, if_match=False)
@blueprint.fails(Code.WECHAT_CODE_INVALID, Code.WECHAT_CODE_USED, message=PHONE_CODE_WANTED)
@blueprint.fails(Code.SESSION_KEY_STALE, Code.SIGNATURE_MISMATCH)
@blueprint.fails(Code.FORBIDDEN, message=MINI_PROGRAM_WANTED)
@blueprint.fails(Code.UPSTREAM_INVALID, Code.WECHAT_REFUSED, Code.UPSTREAM_TIMEOUT)
def put_phone(body: dict[str, str]) -> User:
    """Store your phone number

    From the `code` of a `getPhoneNumber` button, which is not that of `wx.login`, or from the `encryptedData` and `iv`
    that older versions give.
    """
    openid = _own_openid()
    if "code" in body:
        _redeem_phone_code(body["code"], openid)
        return get_user(g.user_id)
    data, _ = _decrypt(body, openid)
    phone = phone_number(data)
    if phone is None:
        raise ApiError(Code.INVALID_INPUT, errors={"encryptedData": ["Holds no phone number."]})
    return _store(phone=phone)


@blueprint.route("/me/profile", methods=["PUT"])
@blueprint.arguments(ProfileSchema)
@blueprint.response(200, UserSchema, transaction=False, if_match=False)
@blueprint.fails(Code.SESSION_KEY_STALE, Code.SIGNATURE_MISMATCH, Code.CONTENT_REFUSED)
@blueprint.fails(Code.FORBIDDEN, message=MINI_PROGRAM_WANTED)
@blueprint.fails(Code.UPSTREAM_INVALID, Code.WECHAT_REFUSED, Code.UPSTREAM_TIMEOUT)
def put_profile(body: dict[str, str | None]) -> User:
    """Store your nickname and picture

    As the user typed and chose them, or all that `wx.getUserProfile` gave: `rawData`, `signature`, `encryptedData`
    and `iv`.
    """
    if "rawData" in body:
        body = _verify_profile(cast(dict[str, str], body), _own_openid())
    _check_nickname(body.get("nickname"))
    return _store(**body)


def get_user(user_id: int, *, lock: bool = False) -> User:
    """Load the user of a session.

    :param lock: whether to keep others from changing it until the transaction ends.
    :raises ApiError: UNAUTHORIZED if he is gone, as the session then belongs to nobody.
    """
    user = database.session.get(User, user_id, with_for_update=lock or None)
    if user is None:
        raise ApiError(Code.UNAUTHORIZED)
    return user


def find_user(user_id: str) -> User:
    """Load a user whom the caller may see.

    :param user_id: a number, or `me`.
    :raises ApiError: NOT_FOUND also for somebody else, so that numbers tell nothing; UNAUTHORIZED as `get_user` does.
    """
    me = get_user(g.user_id)
    if user_id in ("me", str(me.id)):
        return me
    user = database.session.get(User, int(user_id)) if me.role == "admin" else None
    if user is None:
        raise ApiError(Code.NOT_FOUND)
    return user


def audit(event: str, user_id: int) -> None:
    """Log that somebody touched what is personal: who, whose, and never what."""
    logger.info("audit", extra={"event": event, "aboutUserId": user_id})


def _store(**values: str | None) -> User:
    def change() -> User:
        user = get_user(g.user_id, lock=True)
        for name, value in values.items():
            setattr(user, name, value)
        return user

    return database.in_transaction(change)


def _check_nickname(nickname: str | None) -> None:
    """Ask WeChat about a nickname, if the settings say so. The transaction ends.

    :raises ApiError: CONTENT_REFUSED; FORBIDDEN as `_own_openid` does.
    """
    checks = current_app.config["WECHAT_CONTENT_CHECK"]
    if nickname and checks and wechat.api.is_risky(nickname, _own_openid(), nickname=nickname):
        raise ApiError(Code.CONTENT_REFUSED)


def _own_openid() -> str:
    """Under which openid the mini-program knows the caller.

    :raises ApiError: FORBIDDEN if it does not.
    """
    openid = openid_of(g.user_id, wechat.api.app_id)
    if openid is None:
        raise ApiError(Code.FORBIDDEN, message=MINI_PROGRAM_WANTED)
    return openid


def _redeem_phone_code(code: str, openid: str) -> None:
    user_id = g.user_id
    try:
        single_flight(
            f"phone:{user_id}:{hashlib.sha256(code.encode()).hexdigest()}",
            lambda: _store(phone=wechat.api.code_to_phone(code, openid)) and None,
            patience=5 * PATIENCE_SECONDS,  # a token, the call, another token, which can take two calls, the call again
            remember=CODE_LIFETIME_SECONDS,
        )
    except AlreadyDone:
        raise ApiError(Code.WECHAT_CODE_USED, message=PHONE_CODE_WANTED) from None
    except ApiError as error:
        if error.api_code in (Code.WECHAT_CODE_INVALID, Code.WECHAT_CODE_USED):
            raise ApiError(error.api_code, message=PHONE_CODE_WANTED) from None
        raise


def _decrypt(body: dict[str, str], openid: str, expected: dict[str, Any] | None = None) -> tuple[dict[str, Any], str]:
    """Decrypt encryptedData, and answer with which session_key."""
    for session_key in stored_sessions.session_keys(g.user_id):
        try:
            data = decrypt_user_data(
                body["encryptedData"],
                body["iv"],
                session_key=session_key,
                app_id=wechat.api.app_id,
                openid=openid,
                now=time.time(),
                expected=expected,
            )
        except ApiError as error:
            if error.api_code is not Code.SESSION_KEY_STALE:
                raise
        else:
            return data, session_key
    raise ApiError(Code.SESSION_KEY_STALE)


def _verify_profile(body: dict[str, str], openid: str) -> dict[str, str | None]:
    """Check that rawData, its signature and what is encrypted agree, and answer nickname and avatar_url.

    :raises ApiError: INVALID_INPUT, SESSION_KEY_STALE, SIGNATURE_MISMATCH.
    """
    try:
        raw = strict_json.loads(body["rawData"])
    except ValueError:
        raw = None
    if not isinstance(raw, dict):
        raise ApiError(Code.INVALID_INPUT, errors={"rawData": ["Not a JSON object."]})
    # First, as it tells a session_key that was replaced from a forgery.
    data, session_key = _decrypt(body, openid, expected=raw)
    if not constant_time_equals(body["signature"], raw_data_signature(body["rawData"], session_key)):
        raise ApiError(Code.SIGNATURE_MISMATCH)
    found = {"nickname": data.get("nickName"), "avatar_url": data.get("avatarUrl")}
    profile = {name: value for name, value in found.items() if value}  # what is empty, the user may have typed in
    errors = ProfileSchema().validate(profile)
    if errors:
        raise ApiError(Code.INVALID_INPUT, errors={"encryptedData": errors})
    return profile
