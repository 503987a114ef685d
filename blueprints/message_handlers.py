"""What to do about WeChat's pushed messages: the file to patch for a new event.

A handler is a function that takes the fields of a message, and runs beside the response to WeChat. It is not called
again if it fails, but it is if its process dies in the middle, so doing it twice must do no harm:

    @on("event", "subscribe_msg_popup_event")
    def remember_subscription(message): ...

A responder replies at once, in the format and mode of the account, and must be quick. It may be called again; if it
fails, WeChat gets `success`:

    @answers("text")
    def hand_over(message): return {"MsgType": "transfer_customer_service", ...}
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import delete, update

import wechat
from storage import database, ownership, sessions
from storage.models import PROFILE_FIELDS, IdempotencyKey, Identity, User

logger = logging.getLogger(__name__)

Fields = dict[str, Any]
Handler = Callable[[Fields], object]
Responder = Callable[[Fields], Fields]

COLUMNS_BY_REVOKE_INFO = {"6": ("nickname", "avatar_url"), "8": ("phone",), "19": ("nickname",), "20": ("avatar_url",)}
"""What the numbers of RevokeInfo mean for us; the others name data that we do not store."""

handlers: dict[tuple[str, str], list[Handler]] = {}
responders: dict[tuple[str, str], Responder] = {}


def on(message_type: str, event: str = "") -> Callable[[Handler], Handler]:
    """Register a handler for a MsgType, or for one Event of the MsgType `event`."""

    def register(handler: Handler) -> Handler:
        handlers.setdefault((message_type, event), []).append(handler)
        return handler

    return register


def answers(message_type: str, event: str = "") -> Callable[[Responder], Responder]:
    """Register the responder for a MsgType, or for one Event of the MsgType `event`."""

    def register(responder: Responder) -> Responder:
        responders[message_type, event] = responder
        return responder

    return register


@on("event", "user_authorization_revoke")
def erase_revoked_data(message: Fields) -> None:
    """Erase the data for which the user has revoked the authorization.

    Source: https://developers.weixin.qq.com/miniprogram/dev/framework/security.authorize_change.html
    """
    if "PluginID" not in message:
        names = COLUMNS_BY_REVOKE_INFO.get(str(message.get("RevokeInfo")), ())
        database.in_transaction(partial(_erase, message, names))


@on("event", "user_authorization_cancellation")
def erase_all_data(message: Fields) -> None:
    """Erase all personal data of somebody who has cancelled their WeChat account, and end all sessions.

    The sessions end first, so that no request that is under way writes anything after it was erased.
    """
    identity = database.session.get(Identity, (wechat.api.app_id, str(message.get("OpenID"))))
    if identity is not None:
        sessions.revoke_sessions(identity.user_id)
        database.in_transaction(partial(_erase, message, PROFILE_FIELDS, all_data=True))
        while database.in_transaction(partial(ownership.erase_some, identity.user_id, detach=False)):
            pass


def _erase(message: Fields, names: Sequence[str], *, all_data: bool = False) -> None:
    """Erase some columns of the user whom a message is about, and the stored responses that may hold them.

    Runs within a transaction of `database.in_transaction`.
    """
    identity = database.session.get(Identity, (wechat.api.app_id, str(message.get("OpenID"))))
    if identity is None or not names:
        return
    user = database.session.get_one(User, identity.user_id, with_for_update=True)
    responses = delete(IdempotencyKey).where(IdempotencyKey.about_user_id == user.id)
    if all_data:
        granted = update(Identity).where(Identity.user_id == user.id)
        database.session.execute(granted.values(authorization_encrypted=None))
    else:  # the user's own are about orders, and must not be placed twice
        responses = responses.where(IdempotencyKey.user_id != user.id)
    database.session.execute(responses)
    for name in names:
        setattr(user, name, None)
    database.after_commit(partial(logger.info, "personal data erased", extra={"userId": user.id, "columns": names}))
