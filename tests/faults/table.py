"""The faults: how each is caused, and how it is proved that it happened.

Each is a context manager that begins it and ends it, and yields the proof: a function that is called before the end.
"""

import socket
import sqlite3
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import psutil
import pymysql
import requests
from pymysql.constants.ER import CON_COUNT_ERROR
from redis import Redis
from redis.exceptions import BusyLoadingError, RedisError
from sqlalchemy import make_url

from tests.databases import MariaDB
from tests.faults.stage import Stage, can_mount
from tests.harness import METRICS_TOKEN, bearer, suspend, wait_until
from tests.test_full_memory import fill, shm_of, with_shm

Proof = Callable[[], object]
Cause = Callable[[Stage], AbstractContextManager[Proof]]
ALL = ("read", "login", "order")
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
HEADROOM = 64 << 20
DNS_ADDRESS, HOST_NAME = "127.0.0.153", "wechat.test"


@dataclass(frozen=True)
class Fault:
    """A fault, and what it may do to requests.

    :param affects: the kinds of requests that may fail; the others must not.
    :param seconds: how long it lasts.
    :param drops: whether requests may get no response at all.
    :param only_on: the database that it is about; else it happens on MariaDB where that is installed.
    :param start: how the service is started for it, from the stage.
    :param possible: whether this machine can have it.
    """

    name: str
    cause: Cause
    affects: tuple[str, ...] = ()
    seconds: float = 4
    drops: bool = False
    only_on: str = ""
    start: Callable[[Stage], dict[str, Any]] = field(default=lambda stage: {})
    possible: Callable[[], bool] = field(default=lambda: True)
    fast: bool = False


def get(stage: Stage, path: str, **options: Any) -> requests.Response:
    assert stage.service
    return requests.get(stage.service.url + path, timeout=60, **options)


# Nothing, as the control.


@contextmanager
def nothing(stage: Stage) -> Iterator[Proof]:
    yield lambda: True


# WeChat


def simulated(kind: str, **details: Any) -> Cause:
    """WeChat misbehaves as the simulator can."""

    @contextmanager
    def cause(stage: Stage) -> Iterator[Proof]:
        before = len(stage.simulator.calls("/sns/jscode2session"))
        stage.simulator.fault(kind, times=1_000_000, **details)
        try:
            yield lambda: len(stage.simulator.calls("/sns/jscode2session")) > before
        finally:
            stage.simulator.fault("slow", times=1, seconds=0)

    return cause


def cut(share: float) -> Cause:
    """Only this share of each response of WeChat arrives."""

    @contextmanager
    def cause(stage: Stage) -> Iterator[Proof]:
        before, stage.wechat.share = stage.wechat.cut, share
        try:
            yield lambda: stage.wechat.cut > before
        finally:
            stage.wechat.share = None

    return cause


def refuses(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) != 0


@contextmanager
def wechat_dead(stage: Stage) -> Iterator[Proof]:
    stage.wechat.refuse()
    try:
        yield lambda: refuses("127.0.0.1", stage.wechat.port)
    finally:
        stage.wechat.listen()


class NameServer:
    """A DNS server that knows one name, until it hangs."""

    def __init__(self) -> None:
        self.hangs, self.unanswered = False, 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((DNS_ADDRESS, 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                query, client = self._socket.recvfrom(512)
                if self.hangs:
                    self.unanswered += 1
                    continue
                end = query.index(b"\0", 12) + 5
                address = query[end - 4 : end - 2] == b"\0\1"  # no AAAA
                answer = b"\xc0\x0c\0\1\0\1\0\0\0\0\0\4\x7f\0\0\1" if address else b""
                counts = struct.pack(">HHHH", 1, bool(answer), 0, 0)
                self._socket.sendto(query[:2] + b"\x81\x80" + counts + query[12:end] + answer, client)

    def close(self) -> None:
        self._socket.close()


name_server: NameServer | None = None


def with_name_server(stage: Stage) -> dict[str, Any]:
    """Let the service resolve WeChat's name with a name server of ours, in a mount namespace of its own."""
    global name_server
    if name_server is None:
        name_server = NameServer()
    resolver = stage.folder / "resolv.conf"
    resolver.write_text(f"nameserver {DNS_ADDRESS}\n")
    within = ["unshare", "--mount", "sh", "-c", f'mount --bind {resolver} /etc/resolv.conf && exec "$@"', "sh"]
    return {"within": within, "WECHAT_API_BASE_URL": f"http://{HOST_NAME}:{stage.wechat.port}"}


@contextmanager
def dns_hangs(stage: Stage) -> Iterator[Proof]:
    assert name_server
    before, name_server.hangs = name_server.unanswered, True
    stage.wechat.drop()
    try:
        yield lambda: name_server.unanswered > before
    finally:
        name_server.hangs = False


# Redis


@contextmanager
def redis_killed(stage: Stage) -> Iterator[Proof]:
    assert stage.redis.process
    stage.redis.process.kill()
    stage.redis.process.wait()
    yield lambda: refuses_redis(stage)
    stage.redis.start()


def refuses_redis(stage: Stage) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(stage.redis.socket) != 0


@contextmanager
def frozen(popen: subprocess.Popen[bytes]) -> Iterator[Proof]:
    suspend(popen)
    process = psutil.Process(popen.pid)
    try:
        yield lambda: process.status() == psutil.STATUS_STOPPED
    finally:
        process.resume()


def redis_frozen(stage: Stage) -> AbstractContextManager[Proof]:
    assert stage.redis.process
    return frozen(stage.redis.process)


def redis_refuses(error: str, begin: Callable[[Redis], object], end: Callable[[Redis], object]) -> Cause:
    """Redis answers with this error, which it counts."""

    @contextmanager
    def cause(stage: Stage) -> Iterator[Proof]:
        with stage.redis_client() as redis:
            redis.config_resetstat()
            begin(redis)
            try:
                yield lambda: f"errorstat_{error}" in redis.info("errorstats")
            finally:
                end(redis)

    return cause


@contextmanager
def redis_slow(stage: Stage) -> Iterator[Proof]:
    stage.redis_proxy.delay = 0.1
    began = time.monotonic()
    with Redis(port=stage.redis_proxy.port) as redis:
        redis.ping()
    taken = time.monotonic() - began
    try:
        yield lambda: taken > 0.1
    finally:
        stage.redis_proxy.delay = 0


@contextmanager
def redis_loading(stage: Stage) -> Iterator[Proof]:
    assert stage.redis.process
    with stage.redis_client() as redis, redis.pipeline(transaction=False) as pipeline:
        for number in range(20_000):
            pipeline.set(f"filler:{number}", "")
        pipeline.execute()
    stage.redis.process.kill()
    stage.redis.process.wait()
    loading, loaded = threading.Event(), threading.Event()

    def watch() -> None:
        while not loaded.wait(0.01):
            try:
                with stage.redis_client() as redis:
                    redis.ping()
            except BusyLoadingError:
                loading.set()
            except RedisError:
                pass

    watching = threading.Thread(target=watch)
    watching.start()
    stage.redis.start(**{"key-load-delay": "200"})
    loaded.set()
    watching.join()
    yield loading.is_set
    with stage.redis_client() as redis:
        redis.delete(*(f"filler:{number}" for number in range(20_000)))


@contextmanager
def redis_without_room_for_clients(stage: Stage) -> Iterator[Proof]:
    with stage.redis_client() as redis:
        redis.ping()
        allowed = redis.config_get("maxclients")["maxclients"]
        redis.config_resetstat()
        redis.config_set("maxclients", 1)
        redis.client_kill_filter(_type="normal", skipme=True)
        try:
            yield lambda: redis.info("stats")["rejected_connections"]
        finally:
            redis.config_set("maxclients", allowed)


# The database


@contextmanager
def database_killed(stage: Stage) -> Iterator[Proof]:
    assert isinstance(stage.database, MariaDB)
    stage.database.kill()
    yield lambda: isinstance(stage.database, MariaDB) and stage.database.process is None
    stage.database.start()


def database_frozen(stage: Stage) -> AbstractContextManager[Proof]:
    assert isinstance(stage.database, MariaDB)
    assert stage.database.process
    return frozen(stage.database.process)


@contextmanager
def no_connections_left(stage: Stage) -> Iterator[Proof]:
    assert isinstance(stage.database, MariaDB)
    socket_path = stage.database.socket
    with ExitStack() as stack:
        # One connection for all, as the next one of an administrator might be refused, too.
        cursor = stack.enter_context(pymysql.connect(unix_socket=socket_path, user="root")).cursor()

        def ask(statement: str) -> list[Any]:
            cursor.execute(statement)
            return [row[-1] for row in cursor.fetchall()]

        (allowed,) = ask("SELECT @@GLOBAL.max_connections")
        stack.callback(ask, f"SET GLOBAL max_connections = {allowed}")
        ask("SET GLOBAL max_connections = 10")
        taken: set[int] = set()

        def is_refused() -> bool:
            """Take one that is left, if there is one."""
            try:
                app = pymysql.connect(unix_socket=socket_path, user="app", password="app-password")
            except pymysql.err.OperationalError as error:
                return bool(error.args[0] == CON_COUNT_ERROR)
            stack.enter_context(closing(app))
            taken.add(app.thread_id())
            return False

        def are_all_taken() -> bool:
            for number in ask("SELECT id FROM information_schema.processlist WHERE user = 'app'"):
                if number not in taken:
                    with suppress(pymysql.Error):
                        ask(f"KILL {number}")
            return is_refused() and len(taken) >= 9  # and one is the administrator's

        wait_until(are_all_taken)
        yield is_refused


@contextmanager
def locked_by_another(stage: Stage) -> Iterator[Proof]:
    assert isinstance(stage.database, MariaDB)
    name = make_url(stage.database_url).database
    connection = pymysql.connect(unix_socket=stage.database.socket, user="root", database=name)
    with closing(connection), connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("SELECT id FROM users FOR UPDATE")
        # Not information_schema.innodb_trx, which stays as it is for who asks more often than ten times a second.
        waiting = "SHOW GLOBAL STATUS LIKE 'Innodb_row_lock_current_waits'"
        seen: list[int] = []

        def waits() -> bool:
            seen.append(int(stage.database.execute(waiting)[1]))  # type: ignore[union-attr]
            return bool(seen[-1])

        wait_until(waits, 10)
        yield lambda: seen[-1]
        connection.rollback()


@contextmanager
def disk_full(stage: Stage) -> Iterator[Proof]:
    if isinstance(stage.database, MariaDB):
        stage.database.execute("CREATE DATABASE IF NOT EXISTS filler")
        stage.database.execute("CREATE TABLE IF NOT EXISTS filler.rows (content LONGBLOB)")
    full = stage.disk / "full"
    fill(stage.disk)
    failed: list[Exception] = []
    with suppress(pymysql.Error, sqlite3.Error):
        for _ in range(20):
            try:
                _write_much(stage)
            except (pymysql.Error, sqlite3.Error) as error:
                failed.append(error)
                break
    try:
        yield lambda: failed
    finally:
        full.unlink()
        if isinstance(stage.database, MariaDB) and stage.database.process and stage.database.process.poll() is not None:
            stage.database.start()  # InnoDB aborts where its log has no room, and whoever supervises it restarts it


def _write_much(stage: Stage) -> None:
    if isinstance(stage.database, MariaDB):
        stage.database.execute("SET GLOBAL max_allowed_packet = 67108864")
        stage.database.execute("INSERT INTO filler.rows VALUES (REPEAT('x', 500000))")
    else:
        path = str(make_url(stage.database_url).database)
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS filler (content BLOB)")
            connection.execute("INSERT INTO filler VALUES (zeroblob(8000000))")


@contextmanager
def sqlite_locked(stage: Stage) -> Iterator[Proof]:
    path = str(make_url(stage.database_url).database)
    with closing(sqlite3.connect(path, timeout=30, check_same_thread=False)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield lambda: connection.in_transaction
        connection.rollback()


# The workers and the machine


def first_worker(stage: Stage) -> psutil.Process:
    assert stage.service
    return min(stage.service.workers(), key=lambda worker: worker.create_time())


@contextmanager
def worker_killed(stage: Stage) -> Iterator[Proof]:
    worker = first_worker(stage)
    worker.kill()
    yield lambda: not worker.is_running()


@contextmanager
def worker_stuck(stage: Stage) -> Iterator[Proof]:
    assert stage.service
    before = set(stage.service.workers())
    address = ("127.0.0.1", int(stage.service.environ["PORT"]))
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /faulty/spin HTTP/1.1\r\nHost: x\r\n\r\n")
        yield lambda: "WORKER TIMEOUT" in stage.service.log() and before - set(stage.service.workers())  # type: ignore[union-attr]


@contextmanager
def out_of_memory(stage: Stage) -> Iterator[Proof]:
    assert stage.service
    workers = stage.service.workers()
    for worker in workers:
        worker.rlimit(psutil.RLIMIT_AS, (worker.memory_info().vms + HEADROOM, psutil.RLIM_INFINITY))
    answers = [get(stage, "/faulty/allocate") for _ in range(4)]
    yield lambda: {answer.status_code for answer in answers} <= {500, 503} and "MemoryError" in stage.service.log()  # type: ignore[union-attr]
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            worker.rlimit(psutil.RLIMIT_AS, (psutil.RLIM_INFINITY, psutil.RLIM_INFINITY))


@contextmanager
def out_of_descriptors(stage: Stage) -> Iterator[Proof]:
    assert stage.service
    workers = stage.service.workers()
    limits = {worker: worker.rlimit(psutil.RLIMIT_NOFILE) for worker in workers}
    for worker in workers:
        worker.rlimit(psutil.RLIMIT_NOFILE, (worker.num_fds() + 4, limits[worker][1]))
    address = ("127.0.0.1", int(stage.service.environ["PORT"]))
    try:
        with ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(socket.create_connection(address))
            # Seen here, as the service closes connections that stay idle.
            full = wait_until(
                lambda: any(worker.num_fds() >= worker.rlimit(psutil.RLIMIT_NOFILE)[0] - 1 for worker in workers)
            )
            yield lambda: full
    finally:
        for worker, limit in limits.items():
            with suppress(psutil.NoSuchProcess):
                worker.rlimit(psutil.RLIMIT_NOFILE, limit)


def with_clock(stage: Stage) -> dict[str, Any]:
    (stage.folder / "clock").write_text("+0\n")
    return {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(stage.folder / "clock"),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def clock_stepped(seconds: int) -> Cause:
    @contextmanager
    def cause(stage: Stage) -> Iterator[Proof]:
        assert stage.service
        (stage.folder / "clock").write_text(f"{seconds:+}\n")
        try:
            yield lambda: abs(_offset(stage) - seconds) < 60
        finally:
            (stage.folder / "clock").write_text("+0\n")

    return cause


def _offset(stage: Stage) -> float:
    return parsedate_to_datetime(get(stage, "/livez").headers["Date"]).timestamp() - time.time()


def with_full_disk_for_lines(stage: Stage) -> dict[str, Any]:
    prepare = "mkdir /dev/shm/log && mount -t tmpfs -o size=256k tmpfs /dev/shm/log"
    return {"within": with_shm(prepare, to=" >/dev/shm/log/lines 2>&1")}


@contextmanager
def disk_full_for_lines(stage: Stage) -> Iterator[Proof]:
    assert stage.service
    folder = shm_of(stage.service) / "log"
    fill(folder)
    yield lambda: any(_dropped(stage) for _ in range(10))
    (folder / "full").unlink()


def _dropped(stage: Stage) -> bool:
    text = get(stage, "/metrics", headers=bearer(METRICS_TOKEN)).text
    lines = [line for line in text.splitlines() if line.startswith("kuaishang_log_lines_dropped_total ")]
    return any(float(line.split()[1]) for line in lines)


WECHAT, REDIS, DATABASE = ("login",), ALL, ALL
FAULTS = [
    Fault("none (control)", nothing, seconds=3),
    Fault("WeChat takes 20 s", simulated("slow", seconds=20), WECHAT, 6),
    Fault("WeChat responds with 500", simulated("http_500"), WECHAT),
    Fault("WeChat responds with garbage", simulated("not_json"), WECHAT),
    Fault("WeChat sends half a response", cut(0.5), WECHAT),
    Fault("WeChat resets connections", cut(0), WECHAT),
    Fault("WeChat is dead", wechat_dead, WECHAT, 2, fast=True),
    Fault("the name server hangs", dns_hangs, WECHAT, 8, start=with_name_server, possible=can_mount),
    Fault("Redis is killed and restarted", redis_killed, REDIS, 2, fast=True),
    Fault("Redis is frozen", redis_frozen, REDIS),
    Fault(
        "Redis is full (noeviction)",
        redis_refuses("OOM", lambda r: r.config_set("maxmemory", 1), lambda r: r.config_set("maxmemory", 0)),
        REDIS,
    ),
    Fault(
        "Redis is read-only",
        redis_refuses("READONLY", lambda r: r.replicaof("127.0.0.1", 1), lambda r: r.replicaof("NO", "ONE")),
        REDIS,
    ),
    Fault("Redis takes 100 ms longer", redis_slow, ("login",)),
    Fault("Redis is loading its data", redis_loading, REDIS, 0),
    Fault("Redis has no room for clients", redis_without_room_for_clients, REDIS),
    Fault("the database is killed", database_killed, DATABASE, 2, only_on="mariadb", fast=True),
    Fault("the database is frozen", database_frozen, DATABASE, only_on="mariadb"),
    Fault("the database has no connections left", no_connections_left, DATABASE, only_on="mariadb"),
    Fault("rows are locked by another for 5 s", locked_by_another, ("login", "order"), 5, only_on="mariadb"),
    Fault("the database's disk is full", disk_full, DATABASE, only_on="mariadb", possible=can_mount),
    Fault("SQLite: another holds the lock for 5 s", sqlite_locked, ("login", "order"), 5, only_on="sqlite", fast=True),
    Fault("SQLite: the disk is full", disk_full, ("login", "order"), only_on="sqlite", possible=can_mount),
    Fault("a worker is killed", worker_killed, ALL, 3, drops=True, fast=True),
    Fault(
        "a worker is stuck in a loop",
        worker_stuck,
        ALL,
        8,
        drops=True,
        start=lambda stage: {"module": "tests.apps.faulty_route", "GUNICORN_CMD_ARGS": "--timeout 3"},
    ),
    Fault(
        "the workers are out of memory (RLIMIT_AS)",
        out_of_memory,
        ALL,
        drops=True,
        start=lambda stage: {"module": "tests.apps.faulty_route"},
    ),
    Fault("the workers are out of descriptors", out_of_descriptors, ALL, drops=True),
    Fault("the clock is an hour ahead", clock_stepped(3600), start=with_clock, possible=FAKETIME.exists),
    Fault("the clock is an hour behind", clock_stepped(-3600), start=with_clock, possible=FAKETIME.exists),
    Fault("the disk for log lines is full", disk_full_for_lines, start=with_full_disk_for_lines, possible=can_mount),
]
SEEDED = Fault(
    "a bug that loses and doubles orders", nothing, seconds=1, start=lambda stage: {"module": "tests.apps.forgetful"}
)
