"""The Redis that all instances share."""

from typing import Any, cast

from flask import Flask, current_app
from redis import BlockingConnectionPool, DriverInfo, Redis
from redis.backoff import AbstractBackoff
from redis.connection import UnixDomainSocketConnection
from redis.exceptions import BusyLoadingError, ResponseError
from redis.retry import Retry
from werkzeug.local import LocalProxy

from concurrency import SharedReads
from telemetry import metrics

CONNECTIONS, WAIT_SECONDS = 100, 1
"""How many a process opens at most, and how long a request waits for one that is free."""

redis = cast(Redis, LocalProxy(lambda: current_app.extensions["redis"]))

# redis-py 8.1 looks for it when a connection is not made in time, and would raise an AttributeError.
UnixDomainSocketConnection.port = None  # type: ignore[attr-defined]


class Pool(BlockingConnectionPool):
    """Measures for how long a connection is waited for while all are in use."""

    def get_connection(self, *args: Any, **options: Any) -> Any:
        if not self.pool.empty():
            return super().get_connection(*args, **options)  # type: ignore[no-untyped-call]
        with metrics.POOL_WAIT_SECONDS.labels("redis").time():
            return super().get_connection(*args, **options)  # type: ignore[no-untyped-call]


def init_app(app: Flask) -> None:
    class Failover(AbstractBackoff):
        """What redis-py does before it sends once more, on a new connection: close the idle ones, and not wait.

        A primary that has become a replica may keep its connections, and they would read what is out of date.
        """

        def compute(self, failures: int) -> float:
            pool.disconnect(inuse_connections=False)
            return 0

    pool = Pool.from_url(
        app.config["REDIS_URL"],
        max_connections=CONNECTIONS,
        timeout=WAIT_SECONDS,
        driver_info=DriverInfo(),  # made once: redis-py would read its version from a file for each connection
        # A Redis that is away must cost a request well under a second. Nothing whose response was lost is tried again:
        # a SET NX would take its own key for somebody else's. A closed connection is noticed before use.
        socket_connect_timeout=0.4,
        socket_timeout=0.4,
        # What Redis refused is sent again: READONLY, MASTERDOWN, NOREPLICAS … An error that it responds with means that
        # it has not run the command, script or MULTI.
        retry=Retry(Failover(), 1, (ResponseError, BusyLoadingError)),
    )
    client = app.extensions["redis"] = Redis(connection_pool=pool)
    app.extensions["quiet_redis"] = Redis(connection_pool=pool)  # for work that belongs to no request: makes no spans
    app.extensions["shared_reads"] = SharedReads(lambda keys: dict(zip(keys, client.mget(keys), strict=True)))
    metrics.SAMPLED[metrics.POOL_IN_USE.labels("redis")] = lambda: pool.get_connection_count()[1][0]  # 0: idle ones


def ping() -> None:
    """Write a key that expires.

    :raises redis.exceptions.RedisError: if Redis does not respond, takes no writes, is older than 6.2 or a Cluster.
    """
    redis.set("readiness", "", ex=60, get=True)  # GET is unknown to older versions
    redis.exists("readiness", "another-slot")  # refused by a Cluster, as are logins
