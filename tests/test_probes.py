"""Probes, the drain and the metrics of several workers, under gunicorn as in production."""

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from dev.redis_server import RedisServer
from storage.database import STATEMENT_SECONDS
from tests.databases import MariaDB
from tests.harness import METRICS_TOKEN, WAIT_SECONDS, Service, Simulator, answers, bearer, migrate, suspend, wait_until
from tests.test_service import fastest

StartService = Callable[..., Service]
Sample = tuple[str, ...]
PREFIX = "kuaishang-"
STOPPING = {"errors": {"instance": ["Stopping."]}}
PLATFORM_SECONDS = 30
"""How long platforms wait between SIGTERM and SIGKILL, most of them."""


def directory_of(service: Service) -> Path:
    """The directory that its workers share, as soon as one has opened a file there."""

    def opened() -> set[Path]:
        files = (Path(file.path) for worker in service.workers() for file in worker.open_files())
        return {file.parent for file in files if file.parent.name.startswith(PREFIX)}

    (directory,) = wait_until(opened)
    return directory


def scrape(service: Service) -> dict[Sample, float]:
    """Each sample by its name and its labels' values, these in the order of the labels' names."""
    answer = requests.get(f"{service.url}/metrics", headers=bearer(METRICS_TOKEN), timeout=WAIT_SECONDS)
    assert answer.status_code == 200, answer.text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def readiness(service: Service) -> tuple[int, object]:
    answer = requests.get(f"{service.url}/readyz", timeout=WAIT_SECONDS)
    return answer.status_code, answer.json()["data"]


def ready(service: Service) -> tuple[int, object]:
    """What a probe says; after two that had too little time on a busy machine, the third one."""
    for _ in range(2):
        status, data = readiness(service)
        if "Does not respond." not in str(data):
            return status, data
    return readiness(service)


def version(service: Service) -> int:
    return requests.get(f"{service.url}/version", timeout=WAIT_SECONDS).status_code


VERSIONS = ("kuaishang_http_requests_total", "200", "GET", "/version", "200")  # code, method, route, status
TIMED = ("kuaishang_http_request_duration_seconds_count", "GET", "/version")
WITHIN_TEN = ("kuaishang_http_request_duration_seconds_bucket", "10.0", "GET", "/version")
IN_FLIGHT = ("kuaishang_http_requests_in_flight",)
WORKER_STARTS = ("kuaishang_worker_starts_total",)
WORKER_DEATHS = ("kuaishang_worker_deaths_total",)
START_TIME = ("kuaishang_start_time_seconds", "stop")
AFTER_CRASH = ("kuaishang_start_time_seconds", "crash")


def wait_for_starts(service: Service, count: int) -> None:
    """Wait until so many workers have begun. Now and then is enough: a scrape is work for both sides."""

    def begun() -> bool:
        with suppress(requests.RequestException):  # sent to a worker that is killed meanwhile
            if scrape(service).get(WORKER_STARTS) == count:
                return True
        time.sleep(0.2)
        return False

    wait_until(begun)


@contextmanager
def load(service: Service) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Ask for the version again and again; yield lists that grow with the requests begun, answered and failed."""
    begun: list[int] = []
    answered: list[int] = []
    failed: list[int] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(0.002):
            begun.append(1)
            try:
                (answered if version(service) == 200 else failed).append(1)
            except requests.RequestException:
                failed.append(1)  # it was sent to a worker that was killed

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(run)
        try:
            yield begun, answered, failed
        finally:
            stop.set()


def test_every_scrape_is_right_while_workers_are_killed_and_their_gauges_go(
    start_service: StartService, simulator: Simulator
) -> None:
    service = start_service(WEB_CONCURRENCY="3")
    token = service.log_in(simulator)
    wait_for_starts(service, 3)
    directory = directory_of(service)
    scraped: list[tuple[float, float]] = []
    with load(service) as (begun, answered, failed):
        wait_until(lambda: answered)
        for round_ in range(1, 3):
            for _ in range(15):
                least = len(answered)
                with suppress(requests.RequestException):  # sent to a worker that is killed
                    read = scrape(service)
                    scraped.append((read[VERSIONS], read[TIMED]))
                    assert all(least <= count <= len(begun) for count in scraped[-1])
            killed = service.workers()[:2]
            for worker in killed:
                worker.kill()
            psutil.wait_procs(killed)
            assert service.read_me(token).status_code == 200
            wait_for_starts(service, 3 + 2 * round_)
    assert len(scraped) > 20
    for counts in zip(*scraped, strict=True):
        assert list(counts) == sorted(counts)
    last = scrape(service)
    assert len(answered) <= last[VERSIONS] <= len(answered) + len(failed)
    assert len(failed) <= 2 * 2 * 4
    assert last[TIMED] == last[WITHIN_TEN]
    # The scrape itself; each worker publishes what it has in flight once a second.
    wait_until(lambda: scrape(service)[IN_FLIGHT] == 1)
    assert last[WORKER_STARTS] == 3 + 2 * 2
    assert last[WORKER_DEATHS] == 2 * 2
    assert gauge_pids(directory) <= {str(worker.pid) for worker in service.workers()}
    assert '"stack"' not in service.log()


def gauge_pids(directory: Path) -> set[str]:
    return {path.stem.rpartition("_")[2] for path in directory.glob("gauge_*.db")}


def test_deaths_are_counted_and_reloads_are_not_and_the_instance_stays_ready(start_service: StartService) -> None:
    service = start_service(DRAIN_SECONDS="1", GUNICORN_CMD_ARGS="--timeout=15")  # a boot may take as long
    wait_for_starts(service, 2)
    before = scrape(service)
    directory = directory_of(service)
    # The last one hangs until the master, which has first sent a SIGABRT, kills it.
    for deaths, number in enumerate((signal.SIGKILL, signal.SIGABRT, signal.SIGSTOP), 1):
        worker = service.workers()[0]
        worker.send_signal(number)
        worker.wait(PLATFORM_SECONDS)
        wait_for_starts(service, 2 + deaths)
        assert scrape(service)[WORKER_DEATHS] == deaths
    service.process.popen.send_signal(signal.SIGTTIN)
    wait_for_starts(service, 2 + 3 + 1)  # one that is retired before it has begun would not be counted
    service.process.popen.send_signal(signal.SIGTTOU)
    wait_until(lambda: len(service.workers()) == 2)
    old = service.workers()
    service.process.popen.send_signal(signal.SIGHUP)

    def is_reloaded() -> bool:
        assert ready(service)[0] == 200
        now = set(service.workers())
        return len(now) == 2 and not now & set(old)

    wait_until(is_reloaded)
    wait_for_starts(service, 2 + 3 + 1 + 2)
    for _ in range(10):
        assert version(service) == 200
    after = scrape(service)
    assert after[VERSIONS] == before.get(VERSIONS, 0) + 10
    assert after[WORKER_DEATHS] == 3
    assert after[START_TIME] == before[START_TIME]
    assert abs(after[START_TIME] - psutil.Process(service.process.popen.pid).create_time()) < PLATFORM_SECONDS
    assert directory_of(service) == directory
    # The master removes those of a worker when it learns that it has ended.
    wait_until(lambda: gauge_pids(directory) <= {str(worker.pid) for worker in service.workers()})


def test_the_directory_ends_with_the_instance_or_when_the_next_one_starts(start_service: StartService) -> None:
    service = start_service(WEB_CONCURRENCY="1")
    other = start_service(WEB_CONCURRENCY="1")
    left, others = directory_of(service), directory_of(other)
    assert left != others
    assert left.stat().st_mode & 0o777 == 0o700
    for _ in range(5):
        version(service)
    service.kill()
    service.start()
    wait_for_starts(service, 1)
    assert not left.exists()
    assert others.exists()
    assert VERSIONS not in scrape(service)
    assert (AFTER_CRASH in scrape(service), START_TIME in scrape(service)) == (True, False)
    service.stop()
    service.start()
    wait_for_starts(service, 1)
    assert (AFTER_CRASH in scrape(service), START_TIME in scrape(service)) == (False, True)

    # Workers start also if it is removed, as systemd does to what a user has in /dev/shm when that user logs out.
    directory = directory_of(service)
    shutil.rmtree(directory)
    old = service.workers()
    for worker in old:
        worker.kill()
    assert psutil.wait_procs(old, timeout=WAIT_SECONDS)[1] == []
    wait_for_starts(service, 1)
    service.stop()
    assert service.process.popen.returncode == 0
    assert not directory.exists()


def assert_names_at_once(service: Service, *down: str) -> None:
    """Readiness says so at once, however often it is asked at a time, and so does a scrape."""
    errors = {"errors": {name: ["Does not respond."] for name in down}}
    with ThreadPoolExecutor(8) as pool:
        seconds, read = fastest(lambda: list(pool.map(lambda _: readiness(service), range(8))))
    assert read == [(503, errors)] * 8
    assert seconds < 2  # the checks alone take up to 0.7 s
    expected = {name: name not in down for name in ("redis", "database")}

    def is_up() -> dict[str, float]:
        scraped = scrape(service)
        return {name: scraped["kuaishang_dependency_up", name] for name in expected}

    wait_until(lambda: is_up() == expected)


@pytest.mark.only_on("mariadb")
@pytest.mark.parametrize("connected", [False, True])
def test_readiness_names_what_hangs_in_less_than_a_second_and_the_end_comes_soon(
    start_service: StartService,
    own_redis: RedisServer,
    own_databases: MariaDB,
    connected: bool,
) -> None:
    database_url = own_databases.create()
    migrate(database_url)
    service = start_service(DATABASE_URL=database_url, REDIS_URL=own_redis.url)
    if connected:
        for _ in range(10):
            assert ready(service)[0] == 200
    suspend(own_databases.process)
    assert_names_at_once(service, "database")
    suspend(own_redis.process)
    assert_names_at_once(service, "database", "redis")
    started = time.monotonic()
    service.stop()
    assert service.process.popen.returncode == 0
    # A check that hangs asks an old connection first and then a new one.
    assert time.monotonic() - started < 2 * STATEMENT_SECONDS + 4
    own_databases.process.send_signal(signal.SIGCONT)


def test_a_stopping_instance_says_so_and_serves_on_until_the_drain_is_over(
    start_service: StartService, simulator: Simulator
) -> None:
    service = start_service(DRAIN_SECONDS="8", WEB_CONCURRENCY="1")
    assert readiness(service)[0] == 200
    started = time.monotonic()
    service.process.popen.terminate()
    wait_until(lambda: readiness(service) == (503, STOPPING))
    assert "Retry-After" in requests.get(f"{service.url}/readyz", timeout=WAIT_SECONDS).headers
    while time.monotonic() - started < 1.5:
        assert readiness(service) == (503, STOPPING)
        assert version(service) == 200
    assert scrape(service)[VERSIONS] > 0
    assert service.log_in(simulator)
    assert service.process.popen.wait(PLATFORM_SECONDS) == 0
    assert time.monotonic() - started >= 8
    with pytest.raises(requests.ConnectionError):
        version(service)


def test_a_second_signal_ends_the_drain(start_service: StartService) -> None:
    service = start_service(DRAIN_SECONDS="12", WEB_CONCURRENCY="1")
    directory = directory_of(service)
    service.process.popen.terminate()
    wait_until(lambda: readiness(service) == (503, STOPPING))
    service.process.popen.terminate()
    assert service.process.popen.wait(9) == 0
    assert not directory.exists()


def test_a_worker_that_dies_in_the_drain_is_replaced_by_one_that_knows_of_it(start_service: StartService) -> None:
    service = start_service(DRAIN_SECONDS="12", WEB_CONCURRENCY="1")
    wait_for_starts(service, 1)
    old = service.workers()
    service.process.popen.terminate()
    wait_until(lambda: readiness(service) == (503, STOPPING))
    for worker in old:
        worker.send_signal(signal.SIGTERM)  # as a service manager does that signals all processes at once
    wait_for_starts(service, 2)
    assert readiness(service) == (503, STOPPING)
    assert scrape(service)[WORKER_DEATHS] == 0


def test_a_booting_worker_obeys_a_signal(start_service: StartService) -> None:
    service = start_service(WEB_CONCURRENCY="1")
    wait_for_starts(service, 1)
    directory, (old,) = directory_of(service), service.workers()
    old.kill()
    old.wait()
    (booting,) = wait_until(service.workers)
    wait_until((directory / f"counter_{booting.pid}.db").exists)
    booting.send_signal(signal.SIGTERM)  # it must not wait until it serves
    booting.wait(WAIT_SECONDS)
    wait_until(lambda: answers(f"{service.url}/livez"))


def test_deaths_count_also_if_the_next_worker_dies_before_it_can_count_them(start_service: StartService) -> None:
    service = start_service(WEB_CONCURRENCY="1")
    wait_for_starts(service, 1)
    directory = directory_of(service)
    for _ in range(4):
        (worker,) = wait_until(service.workers)
        suspend(worker)
        if (directory / f"counter_{worker.pid}.db").exists():  # it is about to count them
            worker.resume()
            wait_until(lambda: answers(f"{service.url}/livez"))
        worker.kill()
        worker.wait(WAIT_SECONDS)
    wait_until(lambda: answers(f"{service.url}/livez"))
    assert scrape(service)[WORKER_DEATHS] == 4


def test_an_end_because_a_worker_cannot_start_is_a_crash(start_service: StartService, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    service = start_service("tests.apps.breakable", WEB_CONCURRENCY="1", BROKEN_IF=str(broken))
    broken.touch()
    for worker in service.workers():
        worker.kill()
    assert service.process.popen.wait(WAIT_SECONDS) != 0
    broken.unlink()
    service.start()
    assert AFTER_CRASH in scrape(service)
