"""The Redis that all instances share: one server, or the one of several that their sentinels call the primary."""

import random
import re
import threading
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

from flask import Flask, current_app
from redis import BlockingConnectionPool, Connection, DriverInfo, Redis, Sentinel, exceptions
from redis.backoff import AbstractBackoff, NoBackoff
from redis.connection import UnixDomainSocketConnection, parse_url
from redis.exceptions import BusyLoadingError, RedisError, ResponseError
from redis.retry import Retry
from werkzeug.local import LocalProxy

from concurrency import SharedReads
from telemetry import metrics

CONNECTIONS, WAIT_SECONDS, STALE_MILLISECONDS = 100, 1, 30_000
"""How many a process opens at most, and how long a request waits for one that is free; and from which replicas nobody
reads: they had lost the primary so much earlier than another one.
"""
_TIMEOUTS: dict[str, Any] = {"socket_timeout": 0.4, "socket_connect_timeout": 0.4}
"""A Redis that is away must cost a request well under a second."""
_ONCE = _TIMEOUTS | {"retry": Retry(NoBackoff(), 0)}
"""How a sentinel is asked: another one may respond."""

redis = cast(Redis, LocalProxy(lambda: current_app.extensions["redis"]))

# redis-py 8.1 looks for it when a connection is not made in time, and would raise an AttributeError.
UnixDomainSocketConnection.port = None  # type: ignore[attr-defined]


class Pool(BlockingConnectionPool):
    """Measures for how long a connection is waited for while all are in use."""

    replicas = 0
    """How many replicas must have what `execute_replicated` writes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(max_connections=CONNECTIONS, timeout=WAIT_SECONDS, **options)  # type: ignore[no-untyped-call]

    def get_connection(self, *args: Any, **options: Any) -> Any:
        with metrics.POOL_WAIT_SECONDS.labels("redis").time() if self.pool.empty() else nullcontext():
            return super().get_connection(*args, **options)  # type: ignore[no-untyped-call]

    def distrust(self) -> None:
        """Close the connections, those in use after their use: the server may be the primary no more."""
        self.update_active_connections_for_reconnect()
        self.disconnect(inuse_connections=False)

    def read(self, client: Redis, keys: list[str]) -> Any:
        """Return the values of keys, by key."""
        return dict(zip(keys, client.mget(keys), strict=True))


class Sentinels(Sentinel):
    """Several, of which one that responds is asked."""

    def filter_slaves(self, slaves: Any) -> Any:
        """Leave out replicas that lack what has happened for some time: what has ended since is valid there."""
        freshest = min((one["master-link-down-time"] for one in slaves if not one["is_sdown"]), default=0)
        fresh = [one for one in slaves if one["master-link-down-time"] <= freshest + STALE_MILLISECONDS]
        return super().filter_slaves(fresh)  # type: ignore[no-untyped-call]


class SentinelPool(Pool):
    """Connects to the server that a sentinel calls the primary.

    Not redis-py's SentinelConnectionPool, which waits for no free connection, and does not ask a sentinel before it
    sends again what was refused.

    :param url: as REDIS_URL.
    """

    most_replicas = 0
    """That were seen at once."""

    def __init__(self, url: str, **options: Any) -> None:
        parts, self._primary = urlsplit(url), None
        credentials, at, hosts = parts.netloc.rpartition("@")
        _, self._service, *database = parts.path.split("/")
        options |= parse_url(f"redis://{credentials}{at}/{''.join(database)}?{parts.query}")
        self.replicas = int(options.pop("replicas", 1))
        login = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
        addresses = re.findall(r"([^,[\]]+)]?:([0-9]+)", hosts)
        self._sentinels = cast(Any, partial(Sentinels, addresses, sentinel_kwargs=login | _ONCE))
        self._sentinel, self._once = self._sentinels(), options | {"retry": Retry(NoBackoff(), 1)}
        self._asking, asked = threading.Lock(), SharedReads(self._find)

        class Primary(Connection):
            def connect_check_health(self, *args: Any, **options: Any) -> None:
                if not self.is_connected:
                    self.host, self.port = asked.get("primary")
                super().connect_check_health(*args, **options)

        super().__init__(connection_class=Primary, **options)

    def _find(self, names: list[str]) -> dict[str, Any]:
        """Ask for the primary. When it is another one, the connections are closed."""
        with self._asking:  # of two at once redis-py might forget a sentinel, as it changes their order
            found = self._sentinel.discover_master(self._service)
        if self._primary != found:
            self._primary = found
            super().distrust()
        return dict.fromkeys(names, found)

    def distrust(self) -> None:
        """Ask another sentinel, too: this one may be cut off with an old primary."""
        super().distrust()
        with self._asking:
            random.shuffle(self._sentinel.sentinels)  # a rotation might end where it began, if several come at once

    def is_moving(self) -> bool:
        """Whether another server is being made the primary, or is it already, as far as sentinels know."""
        states: list[Any] = []
        for sentinel in [*self._sentinel.sentinels]:  # whose order changes meanwhile
            with suppress(RedisError):
                states.append(sentinel.sentinel_master(self._service))
        states.sort(key=lambda state: state["config-epoch"])  # of one that is cut off it is older
        is_electing = any("failover_in_progress" in state["flags"] for state in states)
        return is_electing or any((state["ip"], state["port"]) != self._primary for state in states[-1:])

    def read(self, client: Redis, keys: list[str]) -> Any:
        """Read from a replica while there is no primary.

        :returns: None if it does not have all of several: then each is read alone.
        """
        try:
            return super().read(client, keys)
        except (exceptions.ConnectionError, exceptions.TimeoutError):
            # By sentinels of its own, whose order redis-py may change; and not kept, as it may be the primary next.
            with self._sentinels() as sentinels, sentinels.replica_for(self._service, **self._once) as replica:
                found = replica.mget(keys)
            if None in found and len(keys) == 1:
                raise  # another replica may have it
            return None if None in found else dict(zip(keys, found, strict=True))


def init_app(app: Flask) -> None:
    class Failover(AbstractBackoff):
        """What redis-py does before it sends once more, on a new connection: close the idle ones, and not wait.

        A primary that has become a replica may keep its connections, and they would read what is out of date.
        """

        def compute(self, failures: int) -> float:
            pool.distrust()
            return 0

    pool: Pool = (SentinelPool if app.config["REDIS_URL"].startswith("redis+sentinel:") else Pool.from_url)(
        app.config["REDIS_URL"],
        driver_info=DriverInfo(),  # made once: redis-py would read its version from a file for each connection
        **_TIMEOUTS,
        # Nothing whose response was lost is tried again: a SET NX would take its own key for somebody else's. A closed
        # connection is noticed before use.
        # What Redis refused is sent again: READONLY, MASTERDOWN, NOREPLICAS … An error that it responds with means that
        # it has not run the command, script or MULTI.
        retry=Retry(Failover(), 1, (ResponseError, BusyLoadingError)),
    )
    # The quiet one is for work that belongs to no request: it makes no spans.
    client, quiet = Redis(connection_pool=pool), Redis(connection_pool=pool)
    app.extensions |= {"redis": client, "quiet_redis": quiet, "check_redis": partial(ping, quiet)}
    app.extensions["shared_reads"] = SharedReads(partial(pool.read, client))
    metrics.SAMPLED[metrics.POOL_IN_USE.labels("redis")] = lambda: pool.get_connection_count()[1][0]  # 0: idle ones


def execute_replicated(pipeline: Any) -> Any:
    """Run a pipeline that is no transaction, and wait until as many replicas as REDIS_URL asks for have what it wrote.

    :returns: the outcome of each command.
    :raises redis.exceptions.RedisError: if Redis is away; or if the replicas are, then it may have been written.
    """
    pool = pipeline.connection_pool
    if not pool.replicas:
        return pipeline.execute()
    milliseconds = int(pool.connection_kwargs["socket_timeout"] * 750)  # three quarters of the time-out
    pipeline.set("replicated", "", ex=60)  # after writes that change nothing WAIT would not wait, from Redis 7.2 on
    pipeline.wait(pool.replicas, milliseconds).wait(pool.most_replicas, 20).role()  # for all there are, not for long
    *outcomes, _, enough, acknowledged, role = pipeline.execute()
    # A replica that does not respond may be the next primary, and never get what another one has.
    if enough < pool.replicas or (acknowledged < pool.most_replicas and pool.is_moving()):
        pool.distrust()
        raise ResponseError("NOREPLICAS written, but not acknowledged by enough replicas in time")
    pool.most_replicas = max(pool.most_replicas, len(role[2]))
    return outcomes


def ping(client: Redis = redis) -> None:
    """Write a key that expires.

    :raises redis.exceptions.RedisError: if Redis does not respond, takes no writes, is older than 6.2 or a Cluster.
    """
    pipeline = client.pipeline(transaction=False)
    pipeline.set("readiness", "", ex=60, get=True)  # GET is unknown to older versions
    execute_replicated(pipeline.exists("readiness", "another-slot"))  # refused by a Cluster, as are logins
