"""What Redis responds with after a failover that left the connections open."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from flask import Flask
from redis import Redis
from redis.connection import UnixDomainSocketConnection
from redis.exceptions import RedisError, ResponseError

from dev.redis_server import RedisServer
from storage import redis_client
from tests.harness import Service, bound_to_this_process, counted, wait_until
from tests.proxy import Proxy

NOBODY = ("REPLICAOF", "127.0.0.1", "1")
NOT_THE_PRIMARY = {
    "READONLY": [NOBODY],
    "MASTERDOWN": [NOBODY, ("CONFIG", "SET", "replica-serve-stale-data", "no")],
    "NOREPLICAS": [("CONFIG", "SET", "min-replicas-to-write", "1")],
    "OOM": [("CONFIG", "SET", "maxmemory", "1")],
}
"""By what a server responds to a write: what makes it respond so."""


def transaction(redis: Redis) -> bool:
    with redis.pipeline() as pipeline:
        pipeline.get("key")
        pipeline.incr("counted")
        return pipeline.execute() == [None, 1]


def lock(redis: Redis) -> bool:
    with redis.lock("a lock", timeout=60, blocking=False) as lock:
        return lock.reacquire()  # a script


COMMANDS: dict[str, Callable[[Redis], object]] = {
    "a command": lambda redis: redis.set("key", "value", nx=True),
    "a transaction": transaction,
    "a script": lambda redis: redis.eval("return redis.call('INCR', KEYS[1])", 1, "counted") == 1,
    "a lock": lock,
}


@pytest.fixture
def other_redis(tmp_path: Path) -> Iterator[RedisServer]:
    with closing(RedisServer(tmp_path / "other", bound_to_this_process())) as server:
        server.start()
        yield server


def test_a_unix_socket_that_is_not_connected_in_time_is_a_redis_that_is_away(make_app: Callable[..., Flask]) -> None:
    redis = make_app(REDIS_URL="unix:///nowhere").extensions["redis"]
    with patch.object(UnixDomainSocketConnection, "_connect", side_effect=TimeoutError), pytest.raises(RedisError):
        redis.ping()


def test_a_new_connection_opens_nothing_but_a_socket(make_app: Callable[..., Flask]) -> None:
    redis = make_app().extensions["redis"]
    files: list[str] = []
    with patch("io.open", side_effect=lambda file, *_, **__: files.append(str(file))):
        redis.connection_pool.make_connection()
    assert files == []


@contextmanager
def behind_a_proxy(make_app: Callable[..., Flask], server: RedisServer) -> Iterator[tuple[Proxy, Redis, Redis]]:
    """The proxy, the service's client that is connected through it, and another one of the server."""
    with Proxy(server.socket) as proxy, Redis.from_url(server.url) as old:
        app = make_app(REDIS_URL=f"redis://127.0.0.1:{proxy.port}/0?socket_timeout=10")
        with app.app_context():
            app.extensions["redis"].ping()
            yield proxy, app.extensions["redis"], old


@pytest.mark.parametrize("refusal", NOT_THE_PRIMARY)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_refusal_is_followed_by_the_same_on_a_new_connection(
    make_app: Callable[..., Flask], own_redis: RedisServer, other_redis: RedisServer, command: str, refusal: str
) -> None:
    with behind_a_proxy(make_app, own_redis) as (proxy, redis, old):
        proxy.target = other_redis.socket
        for words in NOT_THE_PRIMARY[refusal]:
            old.execute_command(*words)
        with pytest.raises(ResponseError):
            old.set("key", "value")
        assert COMMANDS[command](redis)
        assert COMMANDS["a command"](redis) or command == "a command"
        assert proxy.accepted == 2 or command == "a lock"  # whose scripts the other server must be given first


def test_a_refusal_is_raised_if_the_new_connection_has_the_same(
    make_app: Callable[..., Flask], own_redis: RedisServer
) -> None:
    with behind_a_proxy(make_app, own_redis) as (proxy, redis, old):
        old.execute_command(*NOBODY)
        with pytest.raises(ResponseError):
            redis.set("key", "value")
        assert proxy.accepted == 2
        old.execute_command("REPLICAOF", "NO", "ONE")
        assert redis.set("key", "value")
        assert proxy.accepted == 3


def test_a_refusal_replaces_the_idle_connections_too(
    make_app: Callable[..., Flask], own_redis: RedisServer, other_redis: RedisServer
) -> None:
    """They would read from a server that may no longer get what is written."""
    with behind_a_proxy(make_app, own_redis) as (proxy, redis, old), Redis.from_url(other_redis.url) as new:

        def read() -> list[bytes | None]:
            with redis.client() as one, redis.client() as other:
                return [one.get("key"), other.get("key")]

        assert read() == [None, None]
        proxy.target = other_redis.socket
        old.execute_command(*NOBODY)
        new.set("key", "newer")
        assert read() == [None, None]  # nothing has been refused yet
        redis.set("counted", 1)
        assert read() == [b"newer", b"newer"]


def test_requests_beyond_the_pool_wait_for_a_connection(
    make_app: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_client, "CONNECTIONS", 1)
    redis, before = make_app().extensions["redis"], counted("pool_wait_seconds_sum", pool="redis")
    taken = redis.connection_pool.get_connection()
    assert counted("pool_wait_seconds_sum", pool="redis") == before
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(redis.ping)
        with pytest.raises(RedisError):
            redis.ping()
        assert counted("pool_wait_seconds_sum", pool="redis") - before > 0.9  # also if there was none in time
        redis.connection_pool.release(taken)
        assert redis.ping()
        waiting.exception()
    waited = counted("pool_wait_seconds_sum", pool="redis")
    assert redis.ping()
    assert counted("pool_wait_seconds_sum", pool="redis") == waited


def test_a_worker_without_requests_leaves_a_primary_that_has_become_a_replica(
    start_service: Callable[..., Service], own_redis: RedisServer
) -> None:
    start_service(REDIS_URL=own_redis.url, WEB_CONCURRENCY="1")
    with Redis.from_url(own_redis.url) as client:

        def connections() -> set[str]:
            return {one["id"] for one in client.client_list(_type="normal")} - {str(client.client_id())}

        old = wait_until(connections)
        client.execute_command(*NOBODY)
        wait_until(lambda: not connections() & old)
