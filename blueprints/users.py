"""Users: what a user looks like from outside, and the reads and writes of the table behind it."""

from flask import session
from marshmallow import Schema, fields
from sqlalchemy import select

from blueprints.api import Blueprint
from errors import ApiError, Code
from storage import database
from storage.models import User, now
from storage.privacy import mask_phone

blueprint = Blueprint("users", __name__, description="用户 Users")


class UserSchema(Schema):
    id = fields.Integer(required=True)
    nickname = fields.String(required=True, allow_none=True)
    avatar_url = fields.String(required=True, allow_none=True)
    phone = fields.Function(
        lambda user: user.phone and mask_phone(user.phone),
        required=True,
        metadata={"type": ["string", "null"], "description": "Masked.", "examples": ["138****5678"]},
    )
    role = fields.String(required=True, metadata={"enum": ["user", "admin"]})
    created_at = fields.DateTime(required=True)
    updated_at = fields.DateTime(required=True)


@blueprint.route("/me")
@blueprint.response(200, UserSchema)
def get_me() -> User:
    """Read yourself"""
    return get_user(session["user_id"])


def get_user(user_id: int) -> User:
    """Load the user of a session.

    :raises ApiError: UNAUTHORIZED if he is gone, as the session then belongs to nobody.
    """
    user = database.session.get(User, user_id)
    if user is None:
        raise ApiError(Code.UNAUTHORIZED)
    return user


def get_or_create_user(app_id: str, openid: str, unionid: str | None) -> User:
    """Find the one user of this app and openid, creating it at the first login, however many arrive at once.

    Commits.
    """
    find = select(User).where(User.app_id == app_id, User.openid == openid)
    user = database.session.scalar(find)
    if user is None:
        # A transaction of its own: under MySQL's repeatable read the old one goes on seeing no row.
        database.session.rollback()
        moment = now()
        database.insert_unless_exists(User, app_id=app_id, openid=openid, created_at=moment, updated_at=moment)
        user = database.session.scalars(find).one()
    if unionid:
        user.unionid = unionid
    database.session.commit()
    return user
