"""What to do about WeChat's pushed messages: the file to patch for a new event.

A handler is a function that takes the fields of a message, and runs beside the response to WeChat. It is called again
if it fails because of Redis, the database or WeChat, or its process dies in the middle, so doing it twice must do no
harm. It is not if it fails otherwise:

    @on("event", "subscribe_msg_popup_event")
    def remember_subscription(message): ...

A responder replies at once, in the format and mode of the account, and must be quick. It may be called again; if it
fails, WeChat gets `success`:

    @on("text", reply=True)
    def hand_over(message): return {"MsgType": "transfer_customer_service", ...}
"""

import logging
from collections.abc import Callable
from typing import Any

from sqlalchemy import delete

import wechat
from blueprints import users
from storage import database
from storage.models import IdempotencyKey, Identity, User

logger = logging.getLogger(__name__)

Fields = dict[str, Any]
Handler = Callable[[Fields], Any]
Registry = dict[tuple[str, str], list[Handler]]

COLUMNS_BY_REVOKE_INFO = {"6": ("nickname", "avatar_url"), "8": ("phone",), "19": ("nickname",), "20": ("avatar_url",)}
"""What the numbers of RevokeInfo mean for us; the others name data that we do not store."""

handlers: Registry = {}
responders: Registry = {}


def on(message_type: str, event: str = "", *, reply: bool = False) -> Callable[[Handler], Handler]:
    """Register a handler for a MsgType, or for one Event of the MsgType `event`.

    :param reply: it is a responder: it returns the fields of the reply.
    """

    def register(handler: Handler) -> Handler:
        (responders if reply else handlers).setdefault((message_type, event), []).append(handler)
        return handler

    return register


@on("event", "user_authorization_revoke")
def erase_revoked_data(message: Fields) -> None:
    """Erase the data for which the user has revoked the authorization.

    Source: https://developers.weixin.qq.com/miniprogram/dev/framework/security.authorize_change.html
    """
    names = COLUMNS_BY_REVOKE_INFO.get(str(message.get("RevokeInfo")), ())

    def erase(user: User) -> None:
        # The user's own are about orders, which must not be placed twice.
        ours = IdempotencyKey.about_user_id == user.id, IdempotencyKey.user_id != user.id
        database.session.execute(delete(IdempotencyKey).where(*ours))
        for name in names:
            setattr(user, name, None)
        database.after_commit(lambda: logger.info("personal data erased", extra={"userId": user.id, "columns": names}))

    if names and "PluginID" not in message:
        _change_user(message, erase)


@on("event", "user_authorization_cancellation")
def delete_user(message: Fields) -> None:
    """Delete somebody who has cancelled their WeChat account, as they could have done."""
    _change_user(message, users.delete_for_good)


def _change_user(message: Fields, change: Callable[[User], None]) -> None:
    """Change the user whom a message is about, locked in a transaction; nothing if there is none."""

    def find_and_change() -> None:
        if identity := database.session.get(Identity, (wechat.api.app_id, str(message.get("OpenID")))):
            change(database.session.get_one(User, identity.user_id, with_for_update=True))

    database.in_transaction(find_and_change)
