"""`flask users`: what an operator does about users."""

import json
from functools import partial

import click
from flask.cli import AppGroup
from sqlalchemy import and_, select

import wechat
from blueprints.users import UserSchema, audit
from storage import database
from storage.identities import set_blocked, set_role
from storage.models import Identity, User

users = AppGroup("users", help="List users, block them, and make them administrators.")
USER_ID = click.argument("user_id", type=int)


@users.command("list")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True)
def print_users(limit: int) -> None:
    """Print users as JSON, one per line, the newest first. The openid is that of the mini-program."""
    ours = and_(Identity.user_id == User.id, Identity.app_id == wechat.api.app_id)
    query = select(User, Identity.openid).outerjoin(Identity, ours).order_by(User.id.desc()).limit(limit)
    for user, openid in database.session.execute(query):
        more = {"blocked": user.blocked, "admin_by_setting": user.admin_by_setting, "openid": openid}
        click.echo(json.dumps({**UserSchema().dump(user), **more}, ensure_ascii=False))


@users.command("grant-admin")
@USER_ID
def grant_admin(user_id: int) -> None:
    """Make a user an administrator, whatever ADMIN_OPENIDS says."""
    database.in_transaction(partial(_set_role, user_id, "admin"))


@users.command("revoke-admin")
@USER_ID
def revoke_admin(user_id: int) -> None:
    """Make an administrator a user; one whom ADMIN_OPENIDS names becomes one again at the next login."""
    database.in_transaction(partial(_set_role, user_id, "user"))


@users.command("block")
@USER_ID
def block(user_id: int) -> None:
    """Reject a user's requests and logins from now on, also after the account has been deleted."""
    _set_blocked(user_id, True)


@users.command("unblock")
@USER_ID
def unblock(user_id: int) -> None:
    """Lift the block of a user, also of one who has been deleted since."""
    _set_blocked(user_id, False)


def _set_role(user_id: int, role: str) -> None:
    user = database.lock(User, user_id)
    if user is None:
        raise click.ClickException(f"There is no user {user_id}.")
    set_role(user, role, by="command")


def _set_blocked(user_id: int, blocked: bool) -> None:
    if not database.in_transaction(partial(set_blocked, user_id, blocked)):
        raise click.ClickException(f"There is no user {user_id}.")
    audit("user blocked" if blocked else "user unblocked", user_id)
