"""What Redis responds with after a failover that left the connections open."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock, patch

import pytest
from flask import Flask
from redis import Redis, Sentinel
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
        # The connection of the second try is not kept either.
        assert proxy.accepted == 3 or command == "a lock"  # whose scripts the other server must be given first


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


def test_a_refusal_replaces_all_connections(
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
        with redis.client() as used:
            redis.set("counted", 1)
            assert used.get("key") is None
        assert read() == [b"newer", b"newer"]


def test_connections_leave_what_sentinels_no_longer_call_the_primary(
    make_app: Callable[..., Flask], own_redis: RedisServer, other_redis: RedisServer
) -> None:
    with (
        Proxy(own_redis.socket) as old,
        Proxy(other_redis.socket) as new,
        patch.object(Sentinel, "discover_master", return_value=("127.0.0.1", old.port)) as found,
    ):
        redis = make_app(REDIS_URL="redis+sentinel://127.0.0.1:1/kuaishang/0").extensions["redis"]
        with redis.client() as used, redis.client() as idle:
            assert idle.set("key", "older")
            idle.close()
            found.return_value = ("127.0.0.1", new.port)
            with redis.client() as first:
                assert first.get("key") == b"older"  # nobody has asked yet
                assert redis.get("key") is None  # on a connection that is new
            assert used.get("key") == b"older"
        with redis.client() as one, redis.client() as other, redis.client() as third:
            assert [client.get("key") for client in (one, other, third)] == [None, None, None]


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


AGREED = {"flags": "master", "ip": "127.0.0.1", "port": 6379, "config-epoch": 7}


@pytest.mark.parametrize(
    ("waited", "known", "is_acknowledged"),
    [
        ([2, 2], [], True),
        ([0, 0], [AGREED], False),
        ([1, 1], [AGREED, AGREED], True),  # the other replica is away, and nothing else is going on
        ([1, 1], [AGREED, AGREED | {"flags": "master,o_down,failover_in_progress"}], False),
        ([1, 1], [AGREED | {"ip": "127.0.0.2", "config-epoch": 8}, AGREED], False),
        ([1, 1], [AGREED | {"ip": "127.0.0.2", "config-epoch": 6}, AGREED], True),  # one of them was cut off
        ([1, 1], [RedisError(), AGREED | {"port": 6380}], False),
    ],
)
def test_a_replica_that_is_missing_may_become_the_primary(
    make_app: Callable[..., Flask], waited: list[int], known: list[Any], is_acknowledged: bool
) -> None:
    url = "redis+sentinel://127.0.0.1:1/kuaishang/0"
    pool = make_app(REDIS_URL=url).extensions["redis"].connection_pool
    pool.most_replicas, pool._primary = 2, ("127.0.0.1", 6379)
    pool._sentinel.sentinels = [Mock(sentinel_master=Mock(side_effect=[state])) for state in known]
    pipeline = MagicMock(connection_pool=pool)
    pipeline.execute.return_value = ["done", True, *waited, ["master", 1, ["one", "other"]]]
    with nullcontext() if is_acknowledged else pytest.raises(ResponseError, match="NOREPLICAS"):
        assert redis_client.execute_replicated(pipeline) == ["done"]
    written = [call[0] for call in pipeline.mock_calls]
    assert written.index("set") < written.index("wait")  # else WAIT might not wait
