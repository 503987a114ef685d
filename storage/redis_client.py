"""The Redis that all instances share."""

from collections.abc import Callable
from typing import Any, cast

from flask import Flask, current_app
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ResponseError
from redis.retry import Retry
from werkzeug.local import LocalProxy

redis = cast(Redis, LocalProxy(lambda: current_app.extensions["redis"]))


class Failover(Retry):
    """Sends once more, on a new connection, what Redis refused: READONLY, MASTERDOWN, NOREPLICAS …

    An error that Redis responds with means that it has not run the command, script or MULTI. A primary that has become
    a replica may keep its connections; the idle ones are closed too, as they would read what is out of date.

    :param close_idle: closes them. A function, as redis-py copies this object for each connection, but no function.
    """

    def __init__(self, close_idle: Callable[[], None]) -> None:
        super().__init__(NoBackoff(), 1, (ResponseError, BusyLoadingError))
        self.close_idle = close_idle

    def call_with_retry(self, do: Callable[[], Any], fail: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call `do`, and again if it fails; before that `fail`, which closes its connection."""

        def fail_with_the_idle_ones(*failure: Any) -> None:
            fail(*failure)
            self.close_idle()

        return super().call_with_retry(do, fail_with_the_idle_ones, *args, **options)


def init_app(app: Flask) -> None:
    client = app.extensions["redis"] = Redis.from_url(
        app.config["REDIS_URL"],
        # A Redis that is away must cost a request well under a second. Nothing whose response was lost is tried again:
        # a SET NX would take its own key for somebody else's. A closed connection is noticed before use.
        socket_connect_timeout=0.4,
        socket_timeout=0.4,
        retry=Failover(lambda: client.connection_pool.disconnect(inuse_connections=False)),
    )


def ping() -> None:
    """Write a key that expires.

    :raises redis.exceptions.RedisError: if Redis does not respond, takes no writes, is older than 6.2 or a Cluster.
    """
    redis.set("readiness", "", ex=60, get=True)  # GET is unknown to older versions
    redis.exists("readiness", "another-slot")  # refused by a Cluster, as are logins
