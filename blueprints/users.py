"""Users: list, create, read, change, block, delete; and `flask users`, what an operator does about them."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import click
from flask import current_app, g, request
from marshmallow import Schema, fields, validate
from sqlalchemy import and_, select

import wechat
from blueprints.api import TIME, VERSION, Blueprint, require_match
from blueprints.lists import ListSchema, load_page, page_schema
from blueprints.policies import current_user
from errors import ApiError, Code, Message, conflict
from storage import database, identities, ownership, sessions
from storage.masks import mask_phone
from storage.models import Identity, User

PHONE, AVATAR = "13800138000", "https://example.com/avatar.png"
"""Of examples."""
MINI_PROGRAM_LOGIN_REQUIRED = Message("请先在小程序中登录", "Log in to the mini-program first")

blueprint = Blueprint("users", __name__, title=Message("用户", "Users"))
blueprint.cli.help = "List users, block them, and make them administrators."
administration = Blueprint("administration", __name__, title=Message("用户管理（管理员）", "Users, for administrators"))
USER_ID = click.argument("user_id", type=int)


class Masked(fields.String):
    """A field that shows an attribute of a user through a mask."""

    def __init__(self, mask: Callable[[str], str], example: str) -> None:
        metadata = {"description": Message("已脱敏", "Masked"), "example": mask(example)}
        super().__init__(dump_only=True, required=True, allow_none=True, metadata=metadata)
        self.mask = mask

    def _serialize(self, value: str | None, *args: Any, **kwargs: Any) -> str | None:
        return value and self.mask(value)


class UserSchema(Schema):
    id = fields.Integer(required=True, metadata={"example": 1})
    nickname = fields.String(required=True, allow_none=True, metadata={"example": "小明"})
    avatar_url = fields.String(required=True, allow_none=True, metadata={"example": AVATAR})
    phone = Masked(mask_phone, PHONE)
    role = fields.String(required=True, metadata={"enum": ["user", "admin"], "example": "user"})
    created_at = fields.DateTime(required=True, metadata=TIME)
    updated_at = fields.DateTime(required=True, metadata=TIME)
    version = VERSION


def matches(pattern: str, error: str) -> validate.Regexp:
    """Accept a text that is like this from end to end; OpenAPI wants `$`, which lets a line feed follow."""
    return validate.Regexp(rf"^{pattern}(?!\n)$", error=error)


NICKNAME_RULE = matches(r"(?=.*\S)[^\x00-\x1f\x7f]{1,64}", "Must be 1 to 64 printable characters, not only spaces.")
# WeChat's pickers give the temporary path of a file on the phone, such as http://tmp/a.png.
_URL = r"https?://([A-Za-z0-9-]+\.)*(localhost|[A-Za-z0-9-]+\.[A-Za-z0-9-]+)(:[0-9]{1,5})?([/?#][^\x00-\x20\x7f]*)?"
URL_RULES = [matches(_URL, "Must be an http(s) URL: upload the file, then send its URL."), validate.Length(max=512)]
OPENID_RULE = matches("[A-Za-z0-9_-]{1,64}", "Must be 1 to 64 letters, digits, - or _.")
PHONE_RULE = matches(r"\+?[0-9]{5,20}", "Must be digits, with + and country code if foreign.")


class TypedProfileSchema(Schema):
    """What users may change about themselves."""

    nickname = fields.String(allow_none=True, validate=NICKNAME_RULE, metadata={"example": "小明"})
    """null 表示删除 | null removes it"""
    avatar_url = fields.String(allow_none=True, validate=URL_RULES, metadata={"example": AVATAR})


class UserChangeSchema(TypedProfileSchema):
    role = fields.String(validate=validate.OneOf(["user", "admin"]), metadata={"example": "user"})
    """仅限管理员 | For administrators"""
    # By their names, as 1 and 0 equal True and False.
    blocked = fields.Boolean(truthy={"True"}, falsy={"False"}, pre_load=repr, metadata={"example": False})
    """仅限管理员；为 true 时其请求得到 403 | For administrators; if true, their requests get a 403"""


class NewUserSchema(UserChangeSchema):
    class Meta:
        exclude = ("blocked",)

    openid = fields.String(required=True, validate=OPENID_RULE, metadata={"example": "oGZUI0egBJY1zhBYw2KhdUfwVJJE"})
    """该用户在小程序中的 openid | The user's openid in the mini-program"""


class UserSearchSchema(ListSchema):
    phone = fields.String(required=True, validate=PHONE_RULE, metadata={"example": PHONE})
    """与完整号码匹配 | Matches the whole number"""

    def on_bind_field(self, field_name: str, field_obj: Any) -> None:
        field_obj.strict = True  # in JSON a text is no number, unlike in a query


@administration.route("")
@administration.arguments(ListSchema, location="query")
@administration.response(200, page_schema(UserSchema))
def list_users(query: dict[str, Any]) -> dict[str, Any]:
    """列出所有用户（管理员） | List all users, for administrators

    `total` 最多为 10,000。

    `total` is at most 10,000.
    """
    return load_page(User, **query)


@administration.route("/search", methods=["POST"])
@administration.arguments(UserSearchSchema)
@administration.response(200, page_schema(UserSchema), transaction=False)
def search_users(body: dict[str, Any]) -> dict[str, Any]:
    """按手机号查找用户（管理员） | Find users by phone number, for administrators

    不保存任何内容的 POST：放在 URL 里的号码会留在代理的日志中。

    A POST that stores nothing: a number in a URL would stay in the logs of proxies.
    """
    return load_page(User, User.phone.equals(body.pop("phone")), **body)


@administration.route("", methods=["POST"])
@administration.arguments(NewUserSchema)
@administration.response(201, UserSchema, example={"phone": None})
def create_user(body: dict[str, Any]) -> User:
    """在首次登录前创建用户（管理员） | Create a user before the first login, for administrators

    此 openid 首次登录时即为该用户。

    Whoever logs in with this openid is then this user.
    """
    openid, app_id = body["openid"], wechat.api.app_id
    identities.require_identity_not_blocked(app_id, openid, None)
    if database.session.get(Identity, (app_id, openid)) is not None:
        raise conflict("openid", Message("已有该 openid 的用户", "A user with this openid already exists"))
    user = User(app_id=app_id, **{**body, "role": "user"})
    identities.set_role(user, body.get("role", "user"), by="administrator")
    database.session.add(user)
    database.session.flush()
    database.session.add(Identity(app_id=app_id, openid=openid, user_id=user.id))
    return user


@blueprint.route("/<user:user_id>")
@blueprint.response(200, UserSchema)
def get_user(user_id: str) -> User:
    """查看用户 | Read a user

    `me` 是自己；管理员可查看任何用户。

    `me` is yourself; administrators read any user.
    """
    return load_user(user_id)


@blueprint.route("/<user:user_id>", methods=["PUT"])
@blueprint.arguments(UserChangeSchema, example={"nickname": "小明"})
@blueprint.response(200, UserSchema, transaction=False)
@blueprint.fails(Code.CONTENT_REFUSED, Code.SESSION_KEY_STALE, *wechat.FAILS, FORBIDDEN=MINI_PROGRAM_LOGIN_REQUIRED)
def update_user(body: dict[str, Any], user_id: str) -> User:
    """修改用户 | Change a user

    未给出的字段保持不变。只有管理员能修改角色或封禁用户。

    Missing fields stay as they are. Only administrators change a role or block a user.
    """
    reserved = body.keys() - TypedProfileSchema().fields.keys()
    if reserved and current_user().role != "admin":
        raise ApiError(Code.INVALID_INPUT, errors={name: ["Only administrators can set this."] for name in reserved})
    check_nickname(body.get("nickname"))  # may wait for WeChat, so it comes before the transaction

    def change() -> User:
        user = load_user(user_id)
        if body.get("blocked") and user.id == g.user_id:
            raise ApiError(Code.INVALID_INPUT, errors={"blocked": ["You cannot block yourself."]})
        if "role" in body:
            identities.set_role(user, body["role"], by="administrator")
        for name in body.keys() - {"role"}:
            setattr(user, name, body[name])
        if "blocked" in body:
            database.after_commit(partial(audit, "user blocked" if user.blocked else "user unblocked", user.id))
        return user

    return database.in_transaction(change)


@blueprint.route("/<user:user_id>", methods=["DELETE"])
@blueprint.response(200)
def delete_user(user_id: str) -> None:
    """注销用户 | Delete a user for good

    立即清除全部个人信息并结束全部会话。订单保留，但不再含有个人和备注。

    Erases all personal data at once and ends all sessions. Orders are kept without the person and without remarks.
    """
    user = load_user(user_id)
    delete_for_good(user)
    if user.id == g.user_id:
        database.after_commit(sessions.current.clear)


def delete_for_good(user: User) -> None:
    """Delete a user, all personal data and all sessions; orders are kept without the person.

    :param user: locked by the current `database.in_transaction`.
    """
    if user.blocked:
        identities.keep_block(user)
    identities.set_role(user, "user", by="deletion")
    ownership.erase_all(user)
    database.session.delete(user)
    database.after_commit(partial(audit, "user deleted", user.id))
    database.after_commit(partial(sessions.revoke_sessions, user.id))


def load_user(user_id: str) -> User:
    """Load a user whom the caller may see; for a change as a locked object, whose version is compared with If-Match.

    :param user_id: a number, or `me`.
    :raises ApiError: NOT_FOUND also for another user, so that ids reveal nothing; UNAUTHORIZED as `current_user` does;
        as `require_match` does.
    """
    me = current_user()
    number = me.id if user_id == "me" else int(user_id)
    if number == me.id and request.method in sessions.SAFE_METHODS:
        return me
    find = database.find if request.method in sessions.SAFE_METHODS else database.lock
    user = find(User, number) if number == me.id or me.role == "admin" else None
    if user is None:
        raise ApiError(Code.NOT_FOUND)
    if request.method in ("PUT", "DELETE"):
        require_match(user)
    return user


def audit(event: str, user_id: int) -> None:
    """Log that somebody accessed or changed personal data or rights: who, whose, and never the data."""
    current_app.logger.info("audit", extra={"event": event, "aboutUserId": user_id})


def check_nickname(nickname: str | None) -> None:
    """Run a nickname through WeChat's content check, if the settings say so. Ends the transaction.

    :raises ApiError: CONTENT_REFUSED; SESSION_KEY_STALE and others as `is_risky` does; FORBIDDEN as `own_openid` does.
    """
    checks = current_app.config["WECHAT_CONTENT_CHECK"]
    if nickname and checks and wechat.api.is_risky(nickname, own_openid(), nickname=nickname):
        raise ApiError(Code.CONTENT_REFUSED)


def own_openid() -> str:
    """Find the caller's openid in the mini-program. Ends the transaction.

    :raises ApiError: FORBIDDEN if there is none.
    """
    if (openid := identities.find_openid(g.user_id, wechat.api.app_id)) is None:
        raise ApiError(Code.FORBIDDEN, message=MINI_PROGRAM_LOGIN_REQUIRED)
    return openid


@blueprint.cli.command("list")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True)
def print_users(limit: int) -> None:
    """Print users as JSON, one per line, the newest first. The openid is that of the mini-program."""
    ours = and_(Identity.user_id == User.id, Identity.app_id == wechat.api.app_id)
    query = select(User, Identity.openid).outerjoin(Identity, ours).order_by(User.id.desc()).limit(limit)
    for user, openid in database.session.execute(query):
        more = {"blocked": user.blocked, "admin_by_setting": user.admin_by_setting, "openid": openid}
        click.echo(json.dumps({**UserSchema().dump(user), **more}, ensure_ascii=False))


@blueprint.cli.command("grant-admin")
@USER_ID
def grant_admin(user_id: int) -> None:
    """Make a user an administrator, whatever ADMIN_OPENIDS says."""
    database.in_transaction(partial(_set_role, user_id, "admin"))


@blueprint.cli.command("revoke-admin")
@USER_ID
def revoke_admin(user_id: int) -> None:
    """Make an administrator a user; one whom ADMIN_OPENIDS names becomes one again at the next login."""
    database.in_transaction(partial(_set_role, user_id, "user"))


@blueprint.cli.command("block")
@USER_ID
def block(user_id: int) -> None:
    """Reject a user's requests and logins from now on, also after the account has been deleted."""
    _set_blocked(user_id, True)


@blueprint.cli.command("unblock")
@USER_ID
def unblock(user_id: int) -> None:
    """Lift the block of a user, also of one who has been deleted since."""
    _set_blocked(user_id, False)


def _set_role(user_id: int, role: str) -> None:
    if (user := database.lock(User, user_id)) is None:
        raise click.ClickException(f"There is no user {user_id}.")
    identities.set_role(user, role, by="command")


def _set_blocked(user_id: int, blocked: bool) -> None:
    if not database.in_transaction(partial(identities.set_blocked, user_id, blocked)):
        raise click.ClickException(f"There is no user {user_id}.")
    audit("user blocked" if blocked else "user unblocked", user_id)
