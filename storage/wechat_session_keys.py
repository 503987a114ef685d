"""WeChat's session_key of each user: encrypted in Redis, the newest one whichever device logged in."""

import json
from contextlib import suppress
from typing import Any, cast

from flask import current_app

from storage.cipher import DecryptionError, cipher
from storage.redis_client import redis

MAXIMUM_KEPT = 8
"""Logins of one user that can overlap."""


def clock() -> float:
    """Return Redis's time, in seconds since the epoch: the one clock that all instances share.

    :raises redis.exceptions.RedisError: if Redis is away.
    """
    seconds, microseconds = redis.time()
    return seconds + microseconds / 1e6


def keep(user_id: int, session_key: str, asked_at: float, answered_at: float) -> None:
    """Keep a session_key; it serves all sessions of the user.

    :param asked_at: when WeChat was asked for it, by `clock`.
    :param answered_at: when WeChat answered, on the same scale.
    :raises redis.exceptions.RedisError: if Redis is away.
    """
    name, lifetime = redis_key(user_id), current_app.config["SESSION_ABSOLUTE_LIFETIME"]
    sealed = cipher.encrypt(json.dumps([session_key, asked_at, answered_at]), name)
    pipeline: Any = redis.pipeline().zadd(name, {sealed: answered_at})
    pipeline.zremrangebyrank(name, 0, -1 - MAXIMUM_KEPT).expire(name, lifetime).execute()


def candidates(user_id: int) -> list[str]:
    """Load the newest session_key of a user; an empty list if there is none.

    Several where logins on several devices overlapped, so that only WeChat knows which one counts; likeliest first.

    :raises redis.exceptions.RedisError: if Redis is away.
    """
    name = redis_key(user_id)
    kept = []
    for sealed in cast(list[bytes], redis.zrevrange(name, 0, -1)):
        with suppress(DecryptionError):  # by a key that is no longer among ENCRYPTION_KEYS
            kept.append(json.loads(cipher.decrypt(sealed.decode(), name)))
    last_asked_at = max((asked_at for _, asked_at, _ in kept), default=0)
    return [session_key for session_key, _, answered_at in kept if answered_at >= last_asked_at]


def redis_key(user_id: int) -> str:
    return f"user:{user_id}:session_keys"
