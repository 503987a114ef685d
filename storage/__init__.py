"""What outlives a request: sessions in Redis, rows in a database, and the keys that encrypt what is private."""

from typing import cast

from flask import Flask, current_app
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from werkzeug.local import LocalProxy

from storage import database, key_rotation, sessions
from storage.privacy import Cipher
from telemetry import traces

redis = cast(Redis, LocalProxy(lambda: current_app.extensions["redis"]))
"""The Redis that all instances share."""

cipher = cast(Cipher, LocalProxy(lambda: current_app.extensions["cipher"]))
"""Encrypts with the first of ENCRYPTION_KEYS."""


def init_app(app: Flask) -> None:
    app.extensions["redis"] = Redis.from_url(
        app.config["REDIS_URL"],
        # A Redis that is away must cost a request well under a second. Nothing is tried again either: a SET NX whose
        # answer was lost would then take itself for somebody else. A connection that was closed is noticed before use.
        socket_connect_timeout=0.4,
        socket_timeout=0.4,
        retry=Retry(NoBackoff(), 0),
    )
    app.extensions["cipher"] = Cipher(app.config["ENCRYPTION_KEYS"])
    database.init_app(app)
    traces.instrument(app.extensions["redis"], app.extensions["database"])
    sessions.init_app(app)
    app.cli.add_command(key_rotation.keys)
