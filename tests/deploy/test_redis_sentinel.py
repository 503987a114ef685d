"""The service with Redis Sentinel, configured as in deploy/redis; `redis_failover.py` has what takes longer."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest
import requests
from flask import Flask
from redis.exceptions import RedisError, ResponseError

from storage import redis_client
from storage.redis_client import execute_replicated
from storage.sessions import revoke_sessions
from tests.conftest import Journal
from tests.deploy.redis_sentinels import ADDRESSES, PASSWORDS, SERVICE, RedisProcess, RedisSentinels, is_bindable
from tests.harness import Service, Simulator, until_available, wait_until
from tests.test_failover import READY
from tests.test_probes import readiness

pytestmark = pytest.mark.skipif(not is_bindable(ADDRESSES[0]), reason="only Linux has all addresses of 127.0.0.0/8")

RECOVERY_SECONDS = 30
"""Until a new primary takes logins: 5 on a quiet machine."""


@pytest.fixture(scope="module")
def shared_sentinels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisSentinels]:
    with closing(RedisSentinels(tmp_path_factory.mktemp("sentinels"))) as sentinels:
        sentinels.start()
        yield sentinels


@pytest.fixture
def sentinels(shared_sentinels: RedisSentinels, journal: Journal) -> RedisSentinels:
    """One primary, two replicas and three sentinels, all well. No password of theirs may be logged."""
    wait_until(shared_sentinels.complete)
    journal.secrets |= set(PASSWORDS.values())
    return shared_sentinels


PROMISES = {
    "appendonly": "yes",  # sessions survive a restart
    "appendfsync": "everysec",  # after a power failure all but this machine's last second
    "maxmemory-policy": "noeviction",  # no session or lock disappears
    "min-replicas-to-write": "1",  # a primary that is cut off refuses writes
    "min-replicas-max-lag": "3",  # and that soon, in seconds
    "timeout": "0",  # connections that wait for a request stay
}


def test_redis_runs_with_what_the_promises_rest_on(sentinels: RedisSentinels) -> None:
    for server in sentinels.servers:
        with server.client() as client:
            assert {option: client.config_get(option)[option] for option in PROMISES} == PROMISES


def read_me(service: Service, token: str) -> requests.Response:
    return until_available(lambda: service.read_me(token))


def connections(service: Service, *servers: RedisProcess) -> int:
    """Return how many connections the workers have to these servers."""
    known = {(server.address, server.port) for server in servers}
    return sum(found.raddr in known for worker in service.workers() for found in worker.net_connections("tcp"))


@contextmanager
def no_election(sentinels: RedisSentinels) -> Iterator[None]:
    """Let the sentinels take nobody for down during the block, however slow this machine is."""
    option = "down-after-milliseconds"
    shipped = sentinels.known_by(sentinels.sentinels[0])[option]

    def down_after(milliseconds: int) -> None:
        for sentinel in sentinels.sentinels:
            with sentinel.client() as client:
                client.sentinel_set(SERVICE, option, milliseconds)

    down_after(600_000)
    try:
        yield
    finally:
        down_after(shipped)


def test_a_killed_primary_costs_no_session_and_no_restart(
    start_service: Callable[..., Service], simulator: Simulator, sentinels: RedisSentinels
) -> None:
    service, old = start_service(REDIS_URL=sentinels.url), sentinels.primary()
    workers = {worker.pid for worker in service.workers()}
    token = service.log_in_when_available(simulator)
    wait_until(lambda: readiness(service) == READY)
    with no_election(sentinels):
        old.kill()
        wait_until(lambda: readiness(service) == (503, {"errors": {"redis": ["Refuses connections."]}}))
        assert service.try_to_log_in(simulator).status_code == 503
        assert all(read_me(service, token).status_code == 200 for _ in range(50))  # from a replica
        assert connections(service, *sentinels.sentinels) <= len(workers) * len(sentinels.sentinels)
    began = time.monotonic()
    reasons = set()
    while (answer := service.try_to_log_in(simulator)).status_code != 200:
        assert answer.status_code == 503, answer.text
        assert time.monotonic() - began < RECOVERY_SECONDS
        assert read_me(service, token).status_code == 200
        status, data = readiness(service)
        reasons |= {data["errors"]["redis"][0]} if status == 503 else set()
    assert reasons <= {"Refuses connections.", "No primary.", "Does not respond.", "Refuses writes."}
    wait_until(lambda: readiness(service) == READY, RECOVERY_SECONDS)
    assert read_me(service, answer.json()["data"]["token"]).status_code == 200
    old.start()
    wait_until(sentinels.complete)
    assert sentinels.primary() is not old
    wait_until(lambda: all(readiness(service) == READY for _ in range(10)))  # of each worker
    assert read_me(service, token).status_code == 200
    assert not connections(service, old)
    assert {worker.pid for worker in service.workers()} == workers
    with old.client() as client:
        assert client.execute_command("ROLE")[0] == b"slave"


@contextmanager
def without_replicas(sentinels: RedisSentinels) -> Iterator[None]:
    """Neither replica responds. In the first seconds the primary itself refuses no write."""
    replicas = [server for server in sentinels.servers if server is not sentinels.primary()]
    for replica in replicas:
        replica.suspend()
    try:
        yield
    finally:
        for replica in replicas:
            replica.resume()


def test_a_login_is_answered_when_a_replica_has_it(
    start_service: Callable[..., Service], simulator: Simulator, sentinels: RedisSentinels
) -> None:
    service = start_service(REDIS_URL=f"{sentinels.url}&socket_timeout=0.6")  # less than a probe has
    token = service.log_in_when_available(simulator)
    with sentinels.primary().client() as client:
        sessions = len(client.keys("session:*"))
        with without_replicas(sentinels):
            refused = service.try_to_log_in(simulator)
            assert (refused.status_code, refused.json()["data"]) == (503, None)
            assert "Retry-After" in refused.headers
            assert service.call("DELETE", "/auth/session", token).status_code == 503
            wait_until(lambda: readiness(service) == (503, {"errors": {"redis": ["Refuses writes."]}}))
            assert read_me(service, token).status_code in (200, 401)  # the logout may have been written
        tries = [refused]

        def try_again() -> requests.Response:
            tries.append(service.try_to_log_in(simulator))
            return tries[-1]

        assert until_available(try_again).status_code == 200
        assert len(client.keys("session:*")) <= sessions + len(tries)  # what was refused may have been written
    wait_until(lambda: readiness(service) == READY)


def test_a_pushed_message_is_confirmed_when_a_replica_has_it(
    start_service: Callable[..., Service], simulator: Simulator, sentinels: RedisSentinels
) -> None:
    service = start_service(REDIS_URL=sentinels.url)
    event = {"MsgType": "event", "Event": "user_authorization_revoke", "OpenID": "o-alice", "RevokeInfo": "8"}
    event |= {"FromUserName": "o-wechat", "CreateTime": int(time.time())}

    def push() -> int:
        (answer,) = simulator.push(event, url=f"{service.url}/api/v1/wechat/messages", attempts=1)
        assert (answer["body"] == "success") == (answer["status"] == 200)
        return int(answer["status"])

    with without_replicas(sentinels):
        assert push() == 503
        assert push() == 503  # it was written, and is known
    wait_until(lambda: push() == 200)


def test_the_end_of_all_sessions_is_answered_when_a_replica_has_it(
    start_service: Callable[..., Service],
    make_app: Callable[..., Flask],
    simulator: Simulator,
    sentinels: RedisSentinels,
) -> None:
    url = f"{sentinels.url}&socket_timeout=4&socket_connect_timeout=4"  # a second more than WAIT then takes
    service, app = start_service(REDIS_URL=url), make_app(REDIS_URL=url)
    alice, bob = (service.log_in_when_available(simulator, openid=f"o-{name}") for name in ("alice", "bob"))
    user_id = read_me(service, alice).json()["data"]["id"]
    with without_replicas(sentinels):
        # The route waits for the end of the caller's own session, too; what deletes a user does not.
        for _ in range(2):  # also if there is nothing more to delete
            with app.app_context(), pytest.raises(ResponseError, match="NOREPLICAS"):
                revoke_sessions(user_id)
        assert service.call("DELETE", "/auth/sessions", bob).status_code == 503
    wait_until(lambda: readiness(service) == READY)
    more = [service.log_in_when_available(simulator, openid="o-bob") for _ in range(2)]
    assert until_available(lambda: service.call("DELETE", "/auth/sessions", more[0])).status_code == 200
    assert {read_me(service, token).status_code for token in (bob, *more)} == {401}


def test_what_has_ended_is_not_read_from_a_replica_that_lost_the_primary_before(
    make_app: Callable[..., Flask], sentinels: RedisSentinels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_client, "STALE_MILLISECONDS", 1000)
    app, primary = make_app(REDIS_URL=sentinels.url), sentinels.primary()
    stale = next(server for server in sentinels.servers if server is not primary)

    def write() -> Any:
        return app.extensions["redis"].pipeline(transaction=False)

    def read(key: str) -> bytes | None:
        with suppress(RedisError):  # in place of what no other replica has, as the primary is away
            return app.extensions["shared_reads"].get(key)
        return None

    def is_known_to(sentinel: RedisProcess) -> bool:
        with sentinel.client() as client:
            states = client.sentinel_slaves(SERVICE)
        return all(state["master-link-down-time"] > 2000 for state in states if state["ip"] == stale.address)

    with stale.client() as client, no_election(sentinels):
        execute_replicated(write().set("lasts", "", ex=600).set("ends", "", ex=600))
        wait_until(lambda: client.exists("lasts", "ends") == 2)
        client.config_set("masterauth", "wrong")
        client.client_kill_filter(_type="master")
        execute_replicated(write().delete("ends"))
        wait_until(lambda: all(map(is_known_to, sentinels.sentinels)))
        primary.kill()
        for _ in range(20):
            wait_until(lambda: read("lasts") == b"")
            assert read("ends") is None
        client.config_set("masterauth", PASSWORDS["REPLICA-PASSWORD"])
        primary.start()


def test_a_sentinel_that_hangs_delays_one_connection(make_app: Callable[..., Flask], sentinels: RedisSentinels) -> None:
    first, asked = sentinels.sentinels[0], 0
    with socket.create_server((first.address, 0), backlog=50) as hangs:
        url = sentinels.url.replace(f"{first.address}:{first.port}", f"{first.address}:{hangs.getsockname()[1]}")
        redis = make_app(REDIS_URL=f"{url}&socket_timeout=10&socket_connect_timeout=10").extensions["redis"]
        for _ in range(20):
            assert redis.ping()
            redis.connection_pool.disconnect()
        hangs.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                hangs.accept()[0].close()
                asked += 1
    assert 1 <= asked < 10  # more than once if the next one is slow, too


def test_readiness_says_what_is_wrong(make_app: Callable[..., Flask], sentinels: RedisSentinels) -> None:
    def expect(reason: str, old: str, new: str) -> None:
        url = sentinels.url.replace(old, new)
        assert url != sentinels.url
        client = make_app(REDIS_URL=url).test_client()
        wait_until(lambda: client.get("/readyz").get_json()["data"]["errors"]["redis"] == [reason])
        assert client.get("/readyz").status_code == 503

    expect("No primary.", "/kuaishang/", "/another/")
    expect("No primary.", PASSWORDS["SENTINELS-PASSWORD"], "wrong")
    expect("Wrong user or password.", PASSWORDS["SERVICE-PASSWORD"], "wrong")
