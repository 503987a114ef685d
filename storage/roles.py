"""The one place that changes who is an administrator, so that each change is logged."""

import logging

from storage import database
from storage.models import User

logger = logging.getLogger(__name__)


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
