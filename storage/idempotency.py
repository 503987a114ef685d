"""Requests that a client may send again without fear: the first answer is kept for a day, and given again."""

import json
from collections.abc import Callable
from datetime import timedelta

from flask import Response, g
from sqlalchemy import delete

from errors import ApiError, Code
from storage import database
from storage.models import IdempotencyKey, User, now

LIFETIME = timedelta(hours=24)
KEPT_HEADERS = ("Content-Type", "ETag", "Location")


def answer_once(user_id: int, key: str, fingerprint: str, make: Callable[[], Response]) -> Response:
    """Answer a request, or give the answer that it had before. Runs within `database.in_transaction`.

    The key and what `make` does are committed together. Of two that come at once the second one waits for the first to
    commit, fails with an IntegrityError, and is begun again by `in_transaction`; then it finds the answer.

    :param fingerprint: of the request, 64 characters at most.
    :param make: answers; it sets `g.about_user_id` where the answer tells of another user.
    :raises ApiError: IDEMPOTENCY_KEY_REUSED if the key came with another request before; UNAUTHORIZED if the user is
        gone.
    """
    if database.session.get(User, user_id) is None:
        raise ApiError(Code.UNAUTHORIZED)
    known = database.session.get(IdempotencyKey, (user_id, key))
    if known is not None and known.created_at > now() - LIFETIME:
        if known.fingerprint != fingerprint:
            raise ApiError(Code.IDEMPOTENCY_KEY_REUSED)
        return Response(known.body, known.status, json.loads(known.headers or "{}"))
    old = IdempotencyKey.user_id == user_id, IdempotencyKey.created_at <= now() - LIFETIME
    database.session.execute(delete(IdempotencyKey).where(*old))
    record = IdempotencyKey(user_id=user_id, key=key, fingerprint=fingerprint)
    database.session.add(record)
    database.session.flush()
    g.about_user_id = None
    response = make()
    record.about_user_id = g.about_user_id
    record.status, record.body = response.status_code, response.get_data()
    record.headers = json.dumps({name: response.headers[name] for name in KEPT_HEADERS if name in response.headers})
    return response
