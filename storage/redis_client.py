"""The Redis that all instances share."""

from typing import cast

from flask import Flask, current_app
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from werkzeug.local import LocalProxy

redis = cast(Redis, LocalProxy(lambda: current_app.extensions["redis"]))


def init_app(app: Flask) -> None:
    app.extensions["redis"] = Redis.from_url(
        app.config["REDIS_URL"],
        # A Redis that is away must cost a request well under a second. Nothing is tried again either: a SET NX whose
        # response was lost would take its own key for somebody else's. A closed connection is noticed before use.
        socket_connect_timeout=0.4,
        socket_timeout=0.4,
        retry=Retry(NoBackoff(), 0),
    )
