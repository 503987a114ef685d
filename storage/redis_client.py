"""The Redis that all instances share."""

from typing import cast

from flask import Flask, current_app
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ResponseError
from redis.retry import Retry
from werkzeug.local import LocalProxy

redis = cast(Redis, LocalProxy(lambda: current_app.extensions["redis"]))


def init_app(app: Flask) -> None:
    app.extensions["redis"] = Redis.from_url(
        app.config["REDIS_URL"],
        # A Redis that is away must cost a request well under a second. Nothing whose response was lost is tried again:
        # a SET NX would take its own key for somebody else's. A closed connection is noticed before use.
        socket_connect_timeout=0.4,
        socket_timeout=0.4,
        # An error that Redis responds with means that it has not run the command, script or MULTI. It closes the
        # connection, and the command is sent once more on a new one, which leads to the primary after a failover
        # that left the old connection open (READONLY, MASTERDOWN, NOREPLICAS …).
        retry=Retry(NoBackoff(), 1, (ResponseError, BusyLoadingError)),
    )


def ping() -> None:
    """Write a key that expires.

    :raises redis.exceptions.RedisError: if Redis does not respond, takes no writes, is older than 6.2 or a Cluster.
    """
    redis.set("readiness", "", ex=60, get=True)  # GET is unknown to older versions
    redis.exists("readiness", "another-slot")  # refused by a Cluster, as are logins
