"""Idempotency-Key: a POST is safe to repeat, as the first response is stored for a day."""

import hashlib
import json
import re
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from flask import Response, g, request
from sqlalchemy import bindparam, delete, insert, select

from blueprints.parsing import read_body
from errors import ApiError, Code
from storage import database
from storage.models import IdempotencyKey, User, now

KEY_PATTERN = "[!-~]{1,255}"


_MINE = IdempotencyKey.user_id == bindparam("user_id")
_EXPIRED = delete(IdempotencyKey).where(_MINE, IdempotencyKey.created_at <= bindparam("until"))
_KNOWN = select(*IdempotencyKey.__table__.c).where(_MINE, IdempotencyKey.key == bindparam("key"))


def run_once(make_response: Callable[[], Response]) -> Response:
    """Run a POST in one transaction; with an Idempotency-Key, return the stored response if there is one.

    The key and what `make_response` does are committed together. Of two requests at the same moment the second waits
    for the lock of the user, until the first has committed, and then finds the response.

    Two requests are the same if their URLs and the JSON of their bodies are, in whatever order and notation; 1, 1.0 and
    true differ.

    :raises ApiError: INVALID_INPUT for a malformed key, IDEMPOTENCY_KEY_REUSED if it came with another request before.
    """
    if (key := request.headers.get("Idempotency-Key")) is None:
        return database.in_transaction(make_response)
    if not re.fullmatch(KEY_PATTERN, key):
        raise ApiError(Code.INVALID_INPUT, errors={"Idempotency-Key": ["Must be 1 to 255 characters from ! to ~."]})
    content = read_body(request)  # before the transaction
    with suppress(ValueError, RecursionError):  # the view rejects what is malformed
        content = json.dumps(json.loads(content), sort_keys=True).encode()
    fingerprint = hashlib.sha256(f"{request.full_path} ".encode() + content).hexdigest()
    return database.in_transaction(lambda: _replay_or_store(key, fingerprint, make_response), is_keyed=True)


def _replay_or_store(key: str, fingerprint: str, make_response: Callable[[], Response]) -> Response:
    connection, mine = database.session.connection(), {"user_id": g.user_id, "key": key}
    connection.execute(_EXPIRED, {**mine, "until": now() - timedelta(hours=24)})
    for known in database.rows(_KNOWN, connection, **mine):
        if known.fingerprint != fingerprint:
            raise ApiError(Code.IDEMPOTENCY_KEY_REUSED)
        return Response(known.body, known.status, json.loads(known.headers or "{}"))
    response = make_response()
    stored = {**mine, "fingerprint": fingerprint, "status": response.status_code, "body": response.get_data()}
    stored["headers"] = json.dumps(dict(response.headers))
    # The response goes when the user whom it is about is deleted.
    stored["about_user_id"] = g.row.id if isinstance(g.row, User) else getattr(g.row, "user_id", None)
    connection.execute(insert(IdempotencyKey), stored)
    return response
