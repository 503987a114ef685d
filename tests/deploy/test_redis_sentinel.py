"""The service with Redis Sentinel, configured as in deploy/redis; `redis_failover.py` has what takes longer."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
import requests
from flask import Flask
from redis.exceptions import ResponseError

from storage.sessions import revoke_sessions
from tests.conftest import Journal
from tests.deploy.redis_sentinels import ADDRESSES, PASSWORDS, SERVICE, RedisProcess, RedisSentinels, is_bindable
from tests.harness import WAIT_SECONDS, Service, Simulator, until_available, wait_until
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


def log_in(service: Service, simulator: Simulator) -> requests.Response:
    body = {"code": simulator.code()}
    return requests.post(f"{service.url}/api/v1/auth/wechat", json=body, timeout=WAIT_SECONDS)


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
    token = service.log_in(simulator)
    assert readiness(service) == READY
    with no_election(sentinels):
        old.kill()
        wait_until(lambda: readiness(service) == (503, {"errors": {"redis": ["Refuses connections."]}}))
        assert log_in(service, simulator).status_code == 503
        assert {service.read_me(token).status_code for _ in range(50)} == {200}  # from a replica
        assert connections(service, *sentinels.sentinels) <= len(workers) * len(sentinels.sentinels)
    began = time.monotonic()
    reasons = set()
    while (answer := log_in(service, simulator)).status_code != 200:
        assert answer.status_code == 503, answer.text
        assert time.monotonic() - began < RECOVERY_SECONDS
        assert service.read_me(token).status_code == 200
        status, data = readiness(service)
        reasons |= {data["errors"]["redis"][0]} if status == 503 else set()
    assert reasons <= {"Refuses connections.", "No primary.", "Does not respond.", "Refuses writes."}
    wait_until(lambda: readiness(service) == READY, RECOVERY_SECONDS)
    assert service.read_me(answer.json()["data"]["token"]).status_code == 200
    old.start()
    wait_until(sentinels.complete)
    assert sentinels.primary() is not old
    assert {readiness(service) == READY for _ in range(10)} == {True}
    assert service.read_me(token).status_code == 200
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
    token = service.log_in(simulator)
    with sentinels.primary().client() as client:
        sessions = len(client.keys("session:*"))
        with without_replicas(sentinels):
            refused = log_in(service, simulator)
            assert (refused.status_code, refused.json()["data"]) == (503, None)
            assert "Retry-After" in refused.headers
            assert service.call("DELETE", "/auth/session", token).status_code == 503
            wait_until(lambda: readiness(service) == (503, {"errors": {"redis": ["Refuses writes."]}}))
            assert service.read_me(token).status_code in (200, 401)  # the logout may have been written
        assert until_available(lambda: log_in(service, simulator)).status_code == 200
        assert len(client.keys("session:*")) <= sessions + 2
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
    service, app = start_service(REDIS_URL=sentinels.url), make_app(REDIS_URL=sentinels.url)
    alice, bob = (service.log_in(simulator, openid=f"o-{name}") for name in ("alice", "bob"))
    user_id = service.read_me(alice).json()["data"]["id"]
    with without_replicas(sentinels):
        # The route waits for the end of the caller's own session, too; what deletes a user does not.
        for _ in range(2):  # also if there is nothing more to delete
            with app.app_context(), pytest.raises(ResponseError, match="NOREPLICAS"):
                revoke_sessions(user_id)
        assert service.call("DELETE", "/auth/sessions", bob).status_code == 503
    wait_until(lambda: readiness(service) == READY)
    more = [service.log_in(simulator, openid="o-bob") for _ in range(2)]
    assert service.call("DELETE", "/auth/sessions", more[0]).status_code == 200
    assert {service.read_me(token).status_code for token in (bob, *more)} == {401}


def test_a_sentinel_that_hangs_delays_one_connection(make_app: Callable[..., Flask], sentinels: RedisSentinels) -> None:
    app = make_app(REDIS_URL=f"{sentinels.url}&socket_timeout=10")
    sentinels.sentinels[0].suspend()
    try:
        began = time.monotonic()
        for _ in range(20):
            assert app.extensions["redis"].ping()
            app.extensions["redis"].connection_pool.disconnect()
        assert time.monotonic() - began < 20 * 0.4
    finally:
        sentinels.sentinels[0].resume()


def test_readiness_says_what_is_wrong(make_app: Callable[..., Flask], sentinels: RedisSentinels) -> None:
    def reason(old: str, new: str) -> str:
        url = sentinels.url.replace(old, new)
        assert url != sentinels.url
        answer = make_app(REDIS_URL=url).test_client().get("/readyz")
        assert answer.status_code == 503
        return answer.get_json()["data"]["errors"]["redis"][0]

    assert reason("/kuaishang/", "/another/") == "No primary."
    assert reason(PASSWORDS["SENTINELS-PASSWORD"], "wrong") == "No primary."
    assert reason(PASSWORDS["SERVICE-PASSWORD"], "wrong") == "Wrong user or password."
