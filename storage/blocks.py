"""Blocked users, and the blocks that outlive their accounts: kept as keyed hashes of the openids and unionid."""

from collections.abc import Iterable

from sqlalchemy import select

from errors import ApiError, Code, Message
from storage import database
from storage.cipher import cipher
from storage.models import BlockedIdentity, Identity, User

BLOCKED = Message("账号已被封禁", "This account is blocked")
_CONTEXT = "blocked_identities.fingerprint"


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
    fingerprints = [fingerprint for name in names for fingerprint in cipher.blind_indexes(name, _CONTEXT)]
    found = select(BlockedIdentity.fingerprint).where(BlockedIdentity.fingerprint.in_(fingerprints)).limit(1)
    if database.session.scalar(found) is not None:
        raise ApiError(Code.FORBIDDEN, message=BLOCKED)


def keep_block(user: User) -> None:
    """Let the block of a user who is about to be deleted outlive the account. Leaves the commit to the caller."""
    identities = database.session.execute(select(Identity.app_id, Identity.openid).where(Identity.user_id == user.id))
    for name in _names(identities, user.unionid):
        fingerprint = cipher.blind_index(name, _CONTEXT)
        database.insert_unless_exists(BlockedIdentity, fingerprint=fingerprint, former_user_id=user.id)


def set_blocked(user_id: int, blocked: bool) -> bool:
    """Block a user, or lift a block, also that of a user who was deleted since. Runs within a transaction.

    :returns: whether there was such a user or block.
    """
    user = database.session.get(User, user_id, with_for_update=True)
    if user is not None:
        user.blocked = blocked
    kept = database.session.query(BlockedIdentity).where(BlockedIdentity.former_user_id == user_id)
    return (kept.count() if blocked else kept.delete()) > 0 or user is not None


def _names(identities: Iterable[tuple[str, str]], unionid: str | None) -> set[str]:
    names = {f"openid:{app_id}:{openid}" for app_id, openid in identities}
    return names | {f"unionid:{unionid}"} if unionid else names
