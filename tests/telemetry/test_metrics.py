"""What each process publishes of the resources that it uses."""

import threading
import time
from collections.abc import Callable

import psutil
import requests
from flask import Flask
from prometheus_client.parser import text_string_to_metric_families

from storage.database import engine_for
from telemetry import metrics
from tests.databases import Databases
from tests.harness import METRICS_TOKEN, WAIT_SECONDS, Service, bearer, counted, wait_until


class Scraper(requests.Session):
    """Keeps its connection, and so scrapes one worker alone.

    :param url: of the service.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = f"{url}/metrics"

    def values(self, name: str) -> dict[int, float]:
        """The samples of a metric by process id, which is 0 for one that is of all workers together."""
        scraped = self.get(self.url, headers=bearer(METRICS_TOKEN), timeout=WAIT_SECONDS).text
        samples = [sample for family in text_string_to_metric_families(scraped) for sample in family.samples]
        return {
            int(sample.labels.get("pid", 0)): sample.value for sample in samples if sample.name == f"kuaishang_{name}"
        }


def test_each_worker_alive_publishes_its_cpu_memory_and_descriptors(start_service: Callable[..., Service]) -> None:
    service = start_service(WEB_CONCURRENCY="2")
    scraper = Scraper(service.url)

    def pids() -> set[int]:
        return {worker.pid for worker in service.workers()}

    wait_until(lambda: scraper.values("process_open_fds").keys() == pids())
    time.sleep(1.5)  # until both have published after their start
    for worker in service.workers():
        shown = scraper.values("process_resident_memory_bytes")[worker.pid]
        assert 0.8 < shown / worker.memory_info().rss < 1.2
        assert abs(scraper.values("process_open_fds")[worker.pid] - worker.num_fds()) < 10
        assert scraper.values("process_max_fds")[worker.pid] == worker.rlimit(psutil.RLIMIT_NOFILE)[0]
        used = worker.cpu_times()
        assert 0 < scraper.values("process_cpu_seconds")[worker.pid] <= used.user + used.system + 1
    late = scraper.values("http_queue_seconds_count")[0]  # measured 50 times a second
    wait_until(lambda: scraper.values("http_queue_seconds_count")[0] > late)
    dead = service.workers()[0]
    dead.kill()
    wait_until(lambda: dead.pid not in pids() and len(pids()) == 2)
    scraper = Scraper(service.url)  # it may have been the one that died
    wait_until(lambda: scraper.values("process_open_fds").keys() == pids())


def in_use(pool: str) -> float:
    metrics.publish()
    return counted("pool_in_use", pool=pool)


def test_connections_in_use_are_counted(app: Flask) -> None:
    assert (in_use("database"), in_use("redis")) == (0, 0)
    redis = app.extensions["redis"].connection_pool
    with app.extensions["database"].connect(), app.extensions["database"].connect():
        connection = redis.get_connection()
        assert (in_use("database"), in_use("redis")) == (2, 1)
        redis.release(connection)
    assert (in_use("database"), in_use("redis")) == (0, 0)


def test_waits_for_a_connection_are_counted(own_databases: Databases) -> None:
    engine = engine_for(own_databases.create(), pool_size=1)
    before = counted("pool_wait_seconds_sum", pool="database")
    with engine.connect() as connection:
        assert counted("pool_wait_seconds_sum", pool="database") == before
        threading.Timer(0.3, connection.close).start()
        with engine.connect():
            assert 0.2 < counted("pool_wait_seconds_sum", pool="database") - before < WAIT_SECONDS
    engine.dispose()


def test_what_cannot_be_measured_fails_nothing(app: Flask) -> None:
    metrics.SAMPLED[metrics.BREAKER_OPEN] = lambda: 1 / 0
    try:
        metrics.publish()
    finally:
        del metrics.SAMPLED[metrics.BREAKER_OPEN]
