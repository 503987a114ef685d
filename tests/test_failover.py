"""Another server takes over behind the one address of the service, while the connections to the old one stay open."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from redis import Redis
from sqlalchemy import make_url

from dev.redis_server import RedisServer
from tests.databases import MariaDB
from tests.harness import Service, Simulator, bound_to_this_process, migrate, wait_until
from tests.proxy import Proxy
from tests.test_probes import readiness, ready

READY = (200, {"redis": "up", "database": "up", "wechat": "up"})
THREADS = 8


@contextmanager
def load(service: Service, simulator: Simulator, failed: list[str] | None = None) -> Iterator[Callable[[int], None]]:
    """Log in, order and read in several threads; yield a function that waits for some rounds.

    :param failed: gets the responses of requests that fail; without it none may.
    """
    rounds: list[int] = []
    stop = threading.Event()

    def run(number: int) -> None:
        while not stop.is_set():
            token = service.log_in(simulator, openid=f"o-failover-{number}")
            item = {"sku": "tea", "name": "茶", "quantity": 1, "unit_price": 100}
            ordered = service.call("POST", "/orders", token, json={"items": [item]})
            read = service.read_me(token)
            lost = [answer.text for answer in (ordered, read) if not answer.ok]
            assert failed is not None or lost == []
            if failed is not None:
                failed.extend(lost)
            rounds.append(number)

    def more(count: int) -> None:
        wanted = len(rounds) + count
        wait_until(lambda: len(rounds) >= wanted or any(run.done() for run in runs))

    with ThreadPoolExecutor(THREADS) as pool:
        runs = [pool.submit(run, number) for number in range(THREADS)]
        try:
            yield more
        finally:
            stop.set()
    for finished in runs:
        finished.result()


@pytest.fixture
def redis_pair(own_redis: RedisServer, tmp_path: Path) -> Iterator[tuple[RedisServer, RedisServer]]:
    """A primary, and its replica."""
    with closing(RedisServer(tmp_path / "replica", bound_to_this_process())) as replica:
        replica.start()
        with follow(replica, own_redis):
            yield own_redis, replica


@contextmanager
def follow(replica: RedisServer, primary: RedisServer) -> Iterator[None]:
    """Make a server the replica of another one, whose data it has then. It needs a port, and they have none."""
    with Proxy(primary.socket) as proxy, Redis.from_url(replica.url) as client:
        client.replicaof("127.0.0.1", proxy.port)
        wait_until(lambda: client.info("replication")["master_link_status"] == "up")
        yield


def promote(replica: RedisServer) -> None:
    with Redis.from_url(replica.url) as client:
        client.replicaof("NO", "ONE")


@pytest.fixture
def proxied(
    start_service: Callable[..., Service], redis_pair: tuple[RedisServer, RedisServer]
) -> Iterator[tuple[Service, Proxy]]:
    """The service, and the proxy through which it reaches the primary."""
    with Proxy(redis_pair[0].socket) as proxy:
        yield start_service(REDIS_URL=f"redis://127.0.0.1:{proxy.port}/0?socket_timeout=10"), proxy


def test_a_redis_failover_costs_at_most_one_request_for_each_connection(
    proxied: tuple[Service, Proxy], simulator: Simulator, redis_pair: tuple[RedisServer, RedisServer]
) -> None:
    service, proxy = proxied
    old, new = redis_pair
    with load(service, simulator) as more:
        more(20)
    promote(new)
    proxy.target = new.socket
    connections = proxy.accepted
    # A worker that has written nothing since reads from the old one, which may lag behind.
    failed: list[str] = []
    with follow(old, new), load(service, simulator, failed) as more:
        more(100)
        assert {ready(service) == READY for _ in range(20)} == {True}
    assert len(failed) <= connections
    assert [body for body in failed if '"code":401' not in body] == []
    assert proxy.accepted > connections


def test_readiness_is_503_while_the_address_leads_to_a_replica_and_200_after_that(
    proxied: tuple[Service, Proxy], simulator: Simulator, redis_pair: tuple[RedisServer, RedisServer]
) -> None:
    service, proxy = proxied
    old, new = redis_pair
    assert {ready(service) == READY for _ in range(10)} == {True}
    promote(new)
    with follow(old, new):
        assert {readiness(service)[0] for _ in range(10)} == {503}
        proxy.target = new.socket
        assert {ready(service) == READY for _ in range(10)} == {True}
        assert service.log_in(simulator)


@pytest.fixture
def mariadb_pair(tmp_path: Path) -> Iterator[tuple[MariaDB, MariaDB]]:
    """A primary, and its replica, which takes no writes but from an administrator."""
    with ExitStack() as stack:
        pair = [
            MariaDB(tmp_path / name, f"--server-id={number}", "--log-bin", "--log-slave-updates")
            for number, name in enumerate(("one", "other"), 1)
        ]
        for server in pair:
            stack.enter_context(closing(server))
            server.start()
        proxy = stack.enter_context(Proxy(pair[0].socket))
        pair[1].execute(
            f"CHANGE MASTER TO master_host='127.0.0.1', master_port={proxy.port}, master_user='root',"
            " master_use_gtid=slave_pos, master_connect_retry=1"
        )
        pair[1].execute("START SLAVE")
        pair[1].execute("SET GLOBAL read_only = 1")
        yield pair[0], pair[1]


def user_without_privileges(server: MariaDB, url: str, port: int) -> str:
    """Return the URL of a migrated database for an ordinary user, who cannot write where the server is read-only."""
    database = make_url(url).database
    migrate(url)
    server.execute("CREATE USER app@localhost IDENTIFIED BY 'app-password'")
    server.execute(f"GRANT ALL ON {database}.* TO app@localhost")
    return f"mysql://app:app-password@127.0.0.1:{port}/{database}"


@pytest.mark.only_on("mariadb")
def test_a_mariadb_failover_costs_no_request_once_another_one_is_the_primary(
    start_service: Callable[..., Service], simulator: Simulator, mariadb_pair: tuple[MariaDB, MariaDB]
) -> None:
    old, new = mariadb_pair
    with Proxy(old.socket) as proxy:
        url = user_without_privileges(old, old.create(), proxy.port)
        service = start_service(DATABASE_URL=url)
        with load(service, simulator) as more:
            more(20)
        old.execute("SET GLOBAL read_only = 1")
        written = old.execute("SELECT @@gtid_binlog_pos")[0]
        assert new.execute(f"SELECT master_gtid_wait('{written}', 60)") == (0,)
        new.execute("STOP SLAVE")
        new.execute("SET GLOBAL read_only = 0")
        proxy.target = new.socket
        accepted = proxy.accepted
        with load(service, simulator) as more:
            more(50)
            assert {ready(service) == READY for _ in range(20)} == {True}
        assert proxy.accepted > accepted


@pytest.mark.only_on("mariadb")
def test_readiness_is_503_while_the_database_is_read_only_and_200_after_that(
    start_service: Callable[..., Service], simulator: Simulator, own_databases: MariaDB
) -> None:
    with Proxy(own_databases.socket) as proxy:
        service = start_service(DATABASE_URL=user_without_privileges(own_databases, own_databases.create(), proxy.port))
        assert {ready(service) == READY for _ in range(10)} == {True}
        own_databases.execute("SET GLOBAL read_only = 1")
        assert {readiness(service)[0] for _ in range(10)} == {503}
        own_databases.execute("SET GLOBAL read_only = 0")
        assert {ready(service) == READY for _ in range(10)} == {True}
        assert service.log_in(simulator)
