"""The one user behind several openids, one for each of our apps: found, merged, blocked, and given a role.

A block outlives its account, as keyed hashes of the openids and of the unionid.
"""

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

from flask import g
from sqlalchemy import and_, bindparam, select
from sqlalchemy.orm.exc import StaleDataError

from errors import ApiError, Code, Message
from storage import database, ownership, sessions
from storage.cipher import cipher
from storage.models import PROFILE_FIELDS, BlockedIdentity, Identity, User

BLOCKED = Message("账号已被封禁", "This account is blocked")
logger = logging.getLogger(__name__)

_FINGERPRINT = "blocked_identities.fingerprint"
_IS_KNOWN = and_(Identity.app_id == bindparam("app_id"), Identity.openid == bindparam("openid"))
_KNOWN = select(User.__table__).where(User.id == Identity.user_id, _IS_KNOWN)


def get_or_create_user(app_id: str, openid: str, unionid: str | None) -> User:
    """Find the one user of this app and openid, creating it at the first login, however many arrive at once.

    The same unionid under another app is the same user. Users who turn out to be the same person are merged: the
    oldest stays, and the sessions of the others end. Commits; uncommitted changes from before may be lost.

    :returns: a user to be read, not to be changed.
    :raises ApiError: FORBIDDEN if the user is blocked, or was when deleted.
    :raises sqlalchemy.orm.exc.StaleDataError: if others merged the same user all the time.
    """
    user = next(iter(database.load(User, database.rows(_KNOWN, app_id=app_id, openid=openid))), None)
    if user is None or unionid not in (None, user.unionid):
        user = database.in_transaction(partial(_make_or_merge, app_id, openid, unionid))
    return require_not_blocked(user)


def _make_or_merge(app_id: str, openid: str, unionid: str | None) -> User:
    """Create the user and the identity unless they exist, and merge all users who are the same person."""
    if database.session.get(Identity, (app_id, openid)) is None:
        database.insert_unless_exists(User, app_id=app_id, openid=openid, unionid=unionid)
    user = _merge(app_id, openid, unionid)
    database.insert_unless_exists(Identity, app_id=app_id, openid=openid, user_id=user.id, created_at=user.created_at)
    # Last: the inserts have waited for a concurrent deletion of the same user to commit.
    require_identity_not_blocked(app_id, openid, unionid)
    return user


def _merge(app_id: str, openid: str, unionid: str | None) -> User:
    """Merge all users who are the same person, and return the one who stays."""
    linked = select(Identity.user_id).where(Identity.app_id == app_id, Identity.openid == openid)
    same_person = [and_(User.app_id == app_id, User.openid == openid), User.id.in_(linked)]
    if unionid is not None:
        same_person.append(User.unionid == unionid)
    # Each by its own index: with `or` MariaDB would scan all users, and new ones would wait for each other's locks.
    ids = {found for condition in same_person for found in database.session.scalars(select(User.id).where(condition))}
    # Locked: a concurrent change to one of them must not be lost with it.
    users = database.session.scalars(select(User).where(User.id.in_(ids)).order_by(User.id).with_for_update()).all()
    if not users or len(users) < len(ids):
        raise StaleDataError("a user was merged into another user concurrently")  # so that it is retried
    user, *others = users
    for other in others:
        for name in PROFILE_FIELDS:
            if getattr(user, name) is None:
                setattr(user, name, getattr(other, name))
        if other.role == "admin" and (user.role != "admin" or user.admin_by_setting):
            set_role(user, "admin", by="merge", by_setting=other.admin_by_setting)
        user.blocked = user.blocked or other.blocked
        ownership.move_all(other, user)
        database.session.delete(other)
        database.session.flush()
        logger.warning("users merged", extra={"userId": user.id, "mergedUserId": other.id})
        database.after_commit(partial(sessions.revoke_sessions, other.id))
    user.unionid = unionid or user.unionid
    return user


def set_role(user: User, role: str, *, by: str, by_setting: bool = False) -> None:
    """Give a user a role, and log it if that changes anything. Runs within a transaction of `database.in_transaction`.

    :param by: an administrator, whom the line names too; or the setting, a merge, a deletion or a command.
    :param by_setting: whether an administrator is one only for as long as ADMIN_OPENIDS says so.
    """
    before = user.role == "admin", bool(user.admin_by_setting)
    user.role, user.admin_by_setting = role, by_setting
    if before != (role == "admin", by_setting):
        event = "admin granted" if role == "admin" else "admin revoked"
        database.after_commit(lambda: logger.info("audit", extra={"event": event, "aboutUserId": user.id, "by": by}))


def start_session(user_id: int, **facts: Any) -> str:
    """Log a user in, unless a concurrent deletion or merge has ended the account; see `sessions.log_in`.

    :raises ApiError: UNAVAILABLE if it has; then neither a session nor a session_key is left.
    """
    token = sessions.log_in(user_id, **facts)
    # A deletion that commits after this finds the session and the session_key, and ends them.
    g.user = database.find(User, user_id)
    if g.user is None:
        sessions.current.clear()
        sessions.revoke_sessions(user_id)
        raise ApiError(Code.UNAVAILABLE)
    return token


def find_openid(user_id: int, app_id: str) -> str | None:
    """Find the openid of a user in one of our apps; None if there is none."""
    mine = Identity.user_id == user_id, Identity.app_id == app_id
    return next((openid for (openid,) in database.rows(select(Identity.openid).where(*mine))), None)


def require_not_blocked(user: User) -> User:
    """Return the user.

    :raises ApiError: FORBIDDEN if the user is blocked.
    """
    if user.blocked:
        raise ApiError(Code.FORBIDDEN, message=BLOCKED)
    return user


def require_identity_not_blocked(app_id: str, openid: str, unionid: str | None) -> None:
    """Make sure that no blocked user who was deleted had this openid or unionid.

    :raises ApiError: FORBIDDEN if one had.
    """
    names = _names([(app_id, openid)], unionid)
    fingerprints = [fingerprint for name in names for fingerprint in cipher.blind_indexes(name, _FINGERPRINT)]
    found = select(BlockedIdentity.fingerprint).where(BlockedIdentity.fingerprint.in_(fingerprints)).limit(1)
    if database.session.scalar(found) is not None:
        raise ApiError(Code.FORBIDDEN, message=BLOCKED)


def keep_block(user: User) -> None:
    """Let the block of a user who is about to be deleted outlive the account. Leaves the commit to the caller."""
    identities = database.session.execute(select(Identity.app_id, Identity.openid).where(Identity.user_id == user.id))
    for name in _names(identities, user.unionid):
        fingerprint = next(cipher.blind_indexes(name, _FINGERPRINT))
        database.insert_unless_exists(BlockedIdentity, fingerprint=fingerprint, former_user_id=user.id)


def set_blocked(user_id: int, blocked: bool) -> bool:
    """Block a user, or lift a block, also that of a user who was deleted since. Runs within a transaction.

    :returns: whether there was such a user or block.
    """
    if user := database.lock(User, user_id):
        user.blocked = blocked
    kept = database.session.query(BlockedIdentity).where(BlockedIdentity.former_user_id == user_id)
    return (kept.count() if blocked else kept.delete()) > 0 or user is not None


def _names(identities: Iterable[tuple[str, str]], unionid: str | None) -> set[str]:
    names = {f"openid:{app_id}:{openid}" for app_id, openid in identities}
    return names | {f"unionid:{unionid}"} if unionid else names
