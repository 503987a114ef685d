"""Probes, the drain and the metrics of several workers, under gunicorn as in production."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from dev.redis_server import RedisServer
from storage.database import STATEMENT_SECONDS
from tests.databases import MariaDB
from tests.harness import METRICS_TOKEN, ROOT, Service, Simulator, answers, bearer, migrate, suspend, wait_until

StartService = Callable[..., Service]
Sample = tuple[str, ...]
LOGIN = "/api/v1/auth/wechat"
PREFIX = "kuaishang-"
STOPPING = {"errors": {"instance": ["Stopping."]}}
PLATFORM_SECONDS = 30
"""How long platforms wait between SIGTERM and SIGKILL, most of them."""


def directory_of(service: Service) -> Path:
    """That which its workers share."""
    return directory_below(psutil.Process(service.process.popen.pid))


def directory_below(master: psutil.Process) -> Path:
    """The same, as soon as a worker of this master has opened a file there."""

    def opened() -> set[Path]:
        files = (Path(file.path) for worker in master.children() for file in worker.open_files())
        return {file.parent for file in files if file.parent.name.startswith(PREFIX)}

    (directory,) = wait_until(opened)
    return directory


def scrape(service: Service) -> dict[Sample, float]:
    """Each sample by its name and its labels' values, these in the order of the labels' names."""
    answer = requests.get(f"{service.url}/metrics", headers=bearer(METRICS_TOKEN), timeout=10)
    assert answer.status_code == 200, answer.text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def readiness(service: Service) -> tuple[int, object]:
    answer = requests.get(f"{service.url}/readyz", timeout=10)
    return answer.status_code, answer.json()["data"]


def version(service: Service) -> int:
    return requests.get(f"{service.url}/version", timeout=10).status_code


VERSIONS = ("kuaishang_http_requests_total", "200", "GET", "/version", "200")  # code, method, route, status
TIMED = ("kuaishang_http_request_duration_seconds_count", "GET", "/version")
WITHIN_TEN = ("kuaishang_http_request_duration_seconds_bucket", "10.0", "GET", "/version")
IN_FLIGHT = ("kuaishang_http_requests_in_flight",)
WORKER_STARTS = ("kuaishang_worker_starts_total",)
WORKER_DEATHS = ("kuaishang_worker_deaths_total",)
START_TIME = ("kuaishang_start_time_seconds",)


def starts(service: Service) -> float | None:
    """How many workers were begun; None if the one that was asked is killed meanwhile."""
    with suppress(requests.RequestException):
        return scrape(service).get(WORKER_STARTS)
    return None


class Load:
    """Asks for the version from some threads without a pause, and counts what was begun, answered and failed."""

    def __init__(self, service: Service, threads: int) -> None:
        self._service = service
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(threads)]
        self.begun = self.answered = self.failed = 0

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                self.begun += 1
            try:
                answered = version(self._service) == 200
            except requests.RequestException:
                answered = False  # it was in the hands of a worker that was killed
            with self._lock:
                self.answered += answered
                self.failed += not answered


def test_every_scrape_is_right_while_workers_are_killed_and_their_gauges_go(
    start_service: StartService,
) -> None:
    service = start_service(WEB_CONCURRENCY="4")
    wait_until(lambda: starts(service) == 4)
    directory = directory_of(service)
    scraped: list[tuple[float, float]] = []
    with Load(service, 4) as load:
        wait_until(lambda: load.answered)
        for round_ in range(1, 5):
            for _ in range(10):
                least = load.answered
                with suppress(requests.RequestException):  # killed with the worker that it was in the hands of
                    read = scrape(service)
                    scraped.append((read[VERSIONS], read[TIMED]))
                    assert all(least <= count <= load.begun for count in scraped[-1])
            for worker in service.workers()[:2]:
                worker.kill()
            wait_until(lambda started=4 + 2 * round_: starts(service) == started)
    assert len(scraped) > 20
    for counts in zip(*scraped, strict=True):
        assert list(counts) == sorted(counts)
    last = scrape(service)
    assert load.answered <= last[VERSIONS] <= load.answered + load.failed
    assert load.failed <= 4 * 2 * 4
    assert last[TIMED] == last[WITHIN_TEN]
    assert last[IN_FLIGHT] == 1  # the scrape itself
    assert last[WORKER_STARTS] == 4 + 4 * 2
    assert last[WORKER_DEATHS] == 4 * 2
    pids = {str(worker.pid) for worker in service.workers()}
    assert {path.stem.rpartition("_")[2] for path in directory.glob("gauge_*.db")} <= pids
    assert '"stack"' not in service.log()


def test_a_reload_keeps_what_was_counted_and_stays_ready(start_service: StartService) -> None:
    service = start_service(DRAIN_SECONDS="1")
    old = service.workers()
    directory = directory_of(service)
    before = scrape(service)
    for _ in range(2):
        service.process.popen.send_signal(signal.SIGHUP)
        while set(service.workers()) & set(old) or len(service.workers()) != 2:
            assert readiness(service)[0] == 200
        old = service.workers()
    assert directory_of(service) == directory
    wait_until(lambda: scrape(service)[WORKER_STARTS] == 6)
    for _ in range(10):
        assert version(service) == 200
    after = scrape(service)
    assert after[VERSIONS] == before.get(VERSIONS, 0) + 10
    assert after[WORKER_DEATHS] == 0
    assert after[START_TIME] == before[START_TIME]
    assert abs(after[START_TIME] - psutil.Process(service.process.popen.pid).create_time()) < PLATFORM_SECONDS
    pids = {str(worker.pid) for worker in service.workers()}
    assert {path.stem.rpartition("_")[2] for path in directory.glob("gauge_*.db")} <= pids


def test_deaths_are_counted_however_workers_die_and_no_worker_that_was_dismissed(start_service: StartService) -> None:
    service = start_service(GUNICORN_CMD_ARGS="--timeout=5")

    def died(deaths: int) -> bool:
        with suppress(requests.RequestException):  # in the hands of the one that dies
            read = scrape(service)
            return (read[WORKER_STARTS], read[WORKER_DEATHS]) == (2 + deaths, deaths)
        return False

    wait_until(lambda: died(0))
    # The last one hangs until the master, which has first sent a SIGABRT, kills it.
    for deaths, number in enumerate((signal.SIGKILL, signal.SIGABRT, signal.SIGSTOP), 1):
        service.workers()[0].send_signal(number)
        wait_until(lambda deaths=deaths: died(deaths))
    for number, count in ((signal.SIGTTIN, 3), (signal.SIGTTOU, 2), (signal.SIGTTIN, 3)):
        service.process.popen.send_signal(number)
        wait_until(lambda count=count: len(service.workers()) == count)
    wait_until(lambda: scrape(service)[WORKER_STARTS] == 2 + 3 + 2)
    assert scrape(service)[WORKER_DEATHS] == 3


def test_the_directory_ends_with_the_instance_or_when_the_next_one_starts(start_service: StartService) -> None:
    service = start_service()
    other = start_service()
    directory, others = directory_of(service), directory_of(other)
    assert directory != others
    assert directory.stat().st_mode & 0o777 == 0o700
    service.stop()
    assert not directory.exists()

    service.start()
    for _ in range(5):
        version(service)
    left = directory_of(service)
    service.kill()
    service.start()
    assert not left.exists()
    read = scrape(service)
    assert VERSIONS not in read
    assert read[WORKER_STARTS] <= 2
    assert others.exists()


def test_a_new_master_has_a_directory_of_its_own_and_the_old_one_goes_without_a_drain(
    start_service: StartService,
) -> None:
    service = start_service(DRAIN_SECONDS="12")
    service.process.popen.send_signal(signal.SIGQUIT)
    service.process.popen.wait()
    # The script, as `python -m gunicorn` cannot begin itself anew.
    command = [str(Path(sys.executable).with_name("gunicorn")), "wsgi:app"]
    with service.output.open("ab") as output:
        service.process.popen = subprocess.Popen(command, cwd=ROOT, env=service.environ, stdout=output, stderr=output)
    wait_until(lambda: answers(f"{service.url}/readyz") and len(service.workers()) == 2)
    old = service.process.popen
    directory, olds = directory_of(service), service.workers()
    old.send_signal(signal.SIGUSR2)

    def second_master() -> psutil.Process | None:
        masters = [child for child in psutil.Process(old.pid).children() if len(child.children()) == 2]
        return masters[0] if masters else None

    master = wait_until(second_master)
    try:
        new = directory_below(master)
        assert new != directory
        old.terminate()
        while old.poll() is None:
            assert readiness(service)[0] == 200
        assert old.returncode == 0
        assert psutil.wait_procs(olds, timeout=1)[1] == []
        assert not directory.exists()
        assert new.exists()
        wait_until(lambda: scrape(service)[WORKER_STARTS] == 2)
        master.terminate()  # which is nobody's second one any more
        assert wait_until(lambda: readiness(service) == (503, STOPPING))
        master.terminate()
        master.wait(PLATFORM_SECONDS)
        assert not new.exists()
    finally:
        for process in (master, *master.children()) if master.is_running() else ():
            process.kill()


def test_a_worker_starts_also_where_somebody_has_removed_the_directory(start_service: StartService) -> None:
    service = start_service()
    wait_until(lambda: starts(service) == 2)
    directory = directory_of(service)
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()  # as systemd does to all that a user has in /dev/shm, when he logs out
    old = service.workers()
    for worker in old:
        worker.kill()
    assert psutil.wait_procs(old, timeout=10)[1] == []
    wait_until(lambda: starts(service) == 2)
    service.stop()
    assert service.process.popen.returncode == 0
    assert not directory.exists()


@pytest.fixture
def hang() -> Iterator[Callable[..., None]]:
    """Let processes hang until the test is over."""
    hanging: list[subprocess.Popen[Any]] = []

    def stop(process: subprocess.Popen[Any] | None) -> None:
        assert process
        hanging.append(process)
        suspend(process)

    yield stop
    for process in hanging:
        process.send_signal(signal.SIGCONT)


def assert_names_at_once(service: Service, *down: str) -> None:
    """Readiness says so at once, however often it is asked at a time, and so does a scrape.

    The checks alone take up to 0.7 s, and a busy machine delays answers: the best of three times counts.
    """
    errors = {"errors": {name: ["Does not respond."] for name in down}}

    def ask(_: int) -> tuple[float, tuple[int, object]]:
        started = time.monotonic()
        read = readiness(service)
        return time.monotonic() - started, read

    with ThreadPoolExecutor(8) as pool:
        slowest = []
        for _ in range(3):
            asked = list(pool.map(ask, range(8)))
            assert [read for _, read in asked] == [(503, errors)] * 8
            slowest.append(max(seconds for seconds, _ in asked))
    assert min(slowest) < 2
    read = scrape(service)
    for name in ("redis", "database"):
        assert read["kuaishang_dependency_up", name] == (name not in down)


def test_readiness_names_a_redis_that_hangs_in_less_than_a_second(
    start_service: StartService, own_redis: RedisServer, hang: Callable[..., None]
) -> None:
    service = start_service(REDIS_URL=own_redis.url)
    assert readiness(service)[0] == 200
    hang(own_redis.process)
    assert_names_at_once(service, "redis")
    assert own_redis.process
    own_redis.process.send_signal(signal.SIGCONT)
    wait_until(lambda: readiness(service)[0] == 200)


@pytest.mark.only_on("mariadb")
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("connected", [False, True])
def test_readiness_names_a_mariadb_that_hangs_in_less_than_a_second_and_the_end_comes_soon(
    start_service: StartService,
    own_redis: RedisServer,
    own_databases: MariaDB,
    hang: Callable[..., None],
    both: bool,
    connected: bool,
) -> None:
    database_url = own_databases.create()
    migrate(database_url)
    service = start_service(DATABASE_URL=database_url, REDIS_URL=own_redis.url)
    if connected:
        for _ in range(10):
            assert readiness(service)[0] == 200
    hang(own_databases.process)
    if both:
        hang(own_redis.process)
    assert_names_at_once(service, "database", *(["redis"] if both else []))
    started = time.monotonic()
    service.stop()
    assert service.process.popen.returncode == 0
    # A check that hangs asks an old connection first and then a new one.
    assert time.monotonic() - started < 2 * STATEMENT_SECONDS + 4


def test_a_stopping_instance_says_so_and_serves_on_until_the_drain_is_over(
    start_service: StartService, simulator: Simulator
) -> None:
    service = start_service(DRAIN_SECONDS="4")
    simulator.fault("slow", seconds=2.5)
    code = simulator.code()
    assert readiness(service)[0] == 200
    with ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        service.process.popen.terminate()
        wait_until(lambda: readiness(service) == (503, STOPPING))
        answer = requests.get(f"{service.url}/readyz", timeout=5)
        assert "Retry-After" in answer.headers
        while time.monotonic() - started < 2:
            assert readiness(service) == (503, STOPPING)
            assert version(service) == 200
        assert scrape(service)[VERSIONS] > 0
        login = pool.submit(requests.post, service.url + LOGIN, json={"code": code}, timeout=10)
        assert service.process.popen.wait(PLATFORM_SECONDS) == 0
        assert 4.5 <= time.monotonic() - started < PLATFORM_SECONDS
        assert login.result().status_code == 200
    with pytest.raises(requests.ConnectionError):
        version(service)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_second_signal_ends_the_drain(start_service: StartService, number: signal.Signals) -> None:
    service = start_service(DRAIN_SECONDS="12")
    service.process.popen.terminate()
    wait_until(lambda: readiness(service) == (503, STOPPING))
    directory = directory_of(service)
    started = time.monotonic()
    service.process.popen.send_signal(number)
    assert service.process.popen.wait(PLATFORM_SECONDS) == 0
    assert time.monotonic() - started < 9  # the drain alone takes 12
    assert not directory.exists()


def test_a_worker_that_dies_in_the_drain_is_replaced_by_one_that_knows_of_it(start_service: StartService) -> None:
    service = start_service(DRAIN_SECONDS="12")
    service.process.popen.terminate()
    wait_until(lambda: readiness(service) == (503, STOPPING))
    old = service.workers()
    for worker in old:
        worker.send_signal(signal.SIGTERM)  # as a service manager does that signals all processes at once
    assert psutil.wait_procs(old, timeout=10)[1] == []
    assert readiness(service) == (503, STOPPING)
    assert version(service) == 200
    assert scrape(service)[WORKER_DEATHS] == 0
    assert not set(service.workers()) & set(old)
