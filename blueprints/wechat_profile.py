"""Phone number and profile of the signed-in user, as WeChat gives them: by code, or encrypted and signed."""

import time
from typing import Any, cast

from flask import g
from marshmallow import Schema, ValidationError, fields, validates_schema

import wechat
from blueprints.api import Blueprint
from blueprints.parsing import WECHAT_CODE_RULE
from blueprints.policies import current_user
from blueprints.users import MINI_PROGRAM_LOGIN_REQUIRED, TypedProfileSchema, UserSchema, check_nickname, own_openid
from errors import ApiError, Code, Message
from storage import database, wechat_session_keys
from storage.models import User
from storage.single_flight import single_flight
from wechat import client, crypto, lenient

PHONE_CODE_REQUIRED = Message(
    "code 无效、过期或已使用：需要 getPhoneNumber 按钮返回的 code，而非 wx.login 的 code",
    "Code invalid, expired or used already: send the code of a getPhoneNumber button, not that of wx.login",
)
NO_SESSION_KEY = Message("请先登录，再点按钮获取数据提交", "Log in, tap the button again, then send the data")

blueprint = Blueprint("wechat_profile", __name__, title=Message("微信资料", "Phone number and profile from WeChat"))


class EncryptedSchema(Schema):
    """Either everything that WeChat gave, the fields that are GIVEN, or one or more of the others."""

    MAXIMUM_BYTES = 64 * 1024
    GIVEN = frozenset(["encryptedData", "iv", "rawData", "signature"])

    encryptedData = fields.String(metadata={"example": "CiyLU1Aw2KjvrjMdj8YK…"})  # noqa: N815
    """Base64，微信原样返回的 | Base64, as WeChat gave it"""
    iv = fields.String(metadata={"example": "r7BXXKkLb8qrSNn05n0qiA=="})
    """Base64，微信原样返回的 | Base64, as WeChat gave it"""

    @validates_schema
    def _one_way(self, body: dict[str, Any], **kwargs: Any) -> None:
        given, others = self.fields.keys() & self.GIVEN, self.fields.keys() - self.GIVEN
        if not body or not (body.keys() <= others or body.keys() == given):
            reason = f"Send {' and/or '.join(sorted(others))}, or all of {', '.join(sorted(given))}."
            raise ValidationError({name: [reason] for name in sorted(self.fields)})


class PhoneSchema(EncryptedSchema):
    """Either `code`, or `encryptedData` and `iv`."""

    code = fields.String(validate=WECHAT_CODE_RULE, metadata={"example": "e31968a7f94cc"})
    """getPhoneNumber 按钮返回的 code | The code of a getPhoneNumber button"""


class ProfileSchema(TypedProfileSchema, EncryptedSchema):
    """Either everything that wx.getUserProfile gave, or `nickname` and `avatar_url`, one or both."""

    rawData = fields.String(metadata={"example": '{"nickName":"小明"}'})  # noqa: N815
    """JSON 文本，微信原样返回的 | JSON as text, as WeChat gave it"""
    signature = fields.String(metadata={"example": "75e81ceda165f4ffa64f4068af58c6"})
    """rawData 的签名，微信原样返回的 | The signature of rawData, as WeChat gave it"""


@blueprint.route("/me/phone", methods=["PUT"])
@blueprint.arguments(PhoneSchema)
@blueprint.response(200, UserSchema, transaction=False, if_match=False)
@blueprint.fails(WECHAT_CODE_INVALID=PHONE_CODE_REQUIRED, WECHAT_CODE_USED=PHONE_CODE_REQUIRED)
@blueprint.fails(Code.SESSION_KEY_STALE, Code.SIGNATURE_MISMATCH, *wechat.FAILS, FORBIDDEN=MINI_PROGRAM_LOGIN_REQUIRED)
def set_phone(body: dict[str, str]) -> User:
    """保存自己的手机号 | Store your phone number

    用 `getPhoneNumber` 按钮的 `code`（不是 `wx.login` 的 code），或旧版本的 `encryptedData` 和 `iv`。

    From the `code` of a `getPhoneNumber` button, which is not that of `wx.login`, or from the `encryptedData` and `iv`
    of older versions.
    """
    openid = own_openid()
    if code := body.get("code"):
        try:
            single_flight(f"phone:{g.user_id}", code, lambda: _store(phone=wechat.api.code_to_phone(code, openid)))
        except ApiError as error:
            if error.api_code in (Code.WECHAT_CODE_INVALID, Code.WECHAT_CODE_USED):
                error.message = PHONE_CODE_REQUIRED
            raise
    else:
        data, _ = _decrypt(body, openid, expected={})
        if (phone := client.phone_number(data)) is None:
            raise ApiError(Code.INVALID_INPUT, errors={"encryptedData": ["Contains no phone number."]})
        _store(phone=phone)
    return current_user()


@blueprint.route("/me/profile", methods=["PUT"])
@blueprint.arguments(ProfileSchema)
@blueprint.response(200, UserSchema, transaction=False, if_match=False)
@blueprint.fails(Code.SESSION_KEY_STALE, Code.SIGNATURE_MISMATCH, Code.CONTENT_REFUSED, *wechat.FAILS)
@blueprint.fails(FORBIDDEN=MINI_PROGRAM_LOGIN_REQUIRED)
def set_profile(body: dict[str, str | None]) -> User:
    """保存自己的昵称和头像 | Store your nickname and avatar

    用户输入的昵称和选择的头像；旧版小程序也可用 `wx.getUserProfile` 返回的全部：
    `rawData`、`signature`、`encryptedData` 和 `iv`（新版只得到默认头像与“微信用户”）。

    As the user typed and chose them; or, in an old mini-program, everything that `wx.getUserProfile` gave: `rawData`,
    `signature`, `encryptedData` and `iv` (to new ones it gives a placeholder).
    """
    if "rawData" in body:
        body = _verify_profile(cast(dict[str, str], body), own_openid())
    check_nickname(body.get("nickname"))
    _store(**body)
    return current_user()


def _store(**values: str | None) -> None:
    def change() -> None:
        for name, value in values.items():
            setattr(database.session.get_one(User, g.user_id), name, value)

    database.in_transaction(change)


def _decrypt(body: dict[str, str], openid: str, expected: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Decrypt encryptedData.

    :returns: the data, and the session_key that decrypted it.
    """
    session_keys = wechat_session_keys.candidates(g.user_id)
    checks: dict[str, Any] = {"app_id": wechat.api.app_id, "openid": openid, "now": time.time(), "expected": expected}
    for key in session_keys:
        try:
            return crypto.decrypt_user_data(body["encryptedData"], body["iv"], session_key=key, **checks), key
        except ApiError as error:
            if error.api_code is not Code.SESSION_KEY_STALE:
                raise
    raise ApiError(Code.SESSION_KEY_STALE, message=None if session_keys else NO_SESSION_KEY)


def _verify_profile(body: dict[str, str], openid: str) -> dict[str, str | None]:
    """Check that rawData, its signature and the encrypted data agree.

    :returns: nickname and avatar_url.
    :raises ApiError: INVALID_INPUT, SESSION_KEY_STALE, SIGNATURE_MISMATCH.
    """
    raw = lenient.read(body["rawData"].encode(), "rawData")
    if raw is None:
        raise ApiError(Code.INVALID_INPUT, errors={"rawData": ["Not a JSON object."]})
    # First, as it tells a session_key that was replaced from a forgery.
    data, session_key = _decrypt(body, openid, expected=raw)
    if not crypto.constant_time_equals(body["signature"], crypto.raw_data_signature(body["rawData"], session_key)):
        raise ApiError(Code.SIGNATURE_MISMATCH)
    found = {"nickname": client.read_nickname(data.get("nickName")), "avatar_url": data.get("avatarUrl")}
    profile = {name: value for name, value in found.items() if value}  # an empty one must not replace a typed one
    if errors := ProfileSchema().validate(profile):
        raise ApiError(Code.INVALID_INPUT, errors={"encryptedData": errors})
    return profile
