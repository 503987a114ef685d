"""`flask switch` beside two instances with two workers each, as in production."""

import subprocess
import sys
import time
from collections.abc import Callable

import requests
from redis import Redis

from blueprints import switches
from dev.redis_server import RedisServer
from tests.harness import METRICS_TOKEN, ROOT, WAIT_SECONDS, Service, bearer, suspend, wait_until
from tests.otlp_receiver import OtlpReceiver

StartService = Callable[..., Service]
ORDERS = "/api/v1/orders"


def switch(service: Service, *words: str) -> str:
    """Run the command in a process of its own, as an operator does; returns what it prints, but for log lines."""
    command = [sys.executable, "-m", "flask", "--app", "wsgi", "switch", *words]
    outcome = subprocess.run(
        command, cwd=ROOT, env=service.environ, capture_output=True, text=True, timeout=WAIT_SECONDS
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return "".join(line for line in outcome.stdout.splitlines(keepends=True) if not line.startswith("{"))


def statuses(*services: Service) -> set[int]:
    """What new connections get, so many of them that each worker has some."""
    return {
        requests.post(service.url + ORDERS, timeout=WAIT_SECONDS).status_code for service in services for _ in range(30)
    }


def audits(service: Service) -> dict[int, list[tuple[str, ...]]]:
    """The audit lines of each worker."""
    found: dict[int, list[tuple[str, ...]]] = {}
    for line in service.log_lines():
        if line["message"] == "audit":
            fields = tuple(line[name] for name in ("event", "route", "by", "reason"))
            found.setdefault(line["pid"], []).append(fields)
    return found


def replace_a_worker(service: Service) -> None:
    before = {worker.pid for worker in service.workers()}
    service.workers()[0].kill()
    wait_until(lambda: len({worker.pid for worker in service.workers()} - before) == 1)
    wait_until(lambda: len(service.workers()) == len(before))


def test_when_the_command_has_returned_all_workers_have_applied_it(
    start_service: StartService, own_redis: RedisServer
) -> None:
    patient = f"{own_redis.url}?socket_timeout=10&socket_connect_timeout=10"  # on a busy machine
    services = [start_service(REDIS_URL=patient, WEB_CONCURRENCY="2") for _ in range(2)]
    assert statuses(*services) == {401}
    began = time.monotonic()
    assert switch(services[0], "off", f"POST {ORDERS}", "--by", "alice", "--reason", "wrong prices") == ""
    assert time.monotonic() - began > switches.WAIT_SECONDS > 1  # they look once a second
    wait_until(lambda: statuses(*services) == {503})  # later if the machine is busy
    change = ("route off", f"POST {ORDERS}", "alice", "wrong prices")
    for service in services:
        wait_until(lambda: audits(service) == {worker.pid: [change] for worker in service.workers()})  # noqa: B023
    assert switch(services[1], "list").endswith("Z by alice: wrong prices\n")
    metrics = requests.get(f"{services[1].url}/metrics", headers=bearer(METRICS_TOKEN), timeout=WAIT_SECONDS).text
    assert f'kuaishang_switched_off{{method="POST",route="{ORDERS}"}} 1.0\n' in metrics
    assert f'kuaishang_switched_off{{method="GET",route="{ORDERS}"}} 0.0\n' in metrics
    replace_a_worker(services[0])  # a new one knows before its first request
    assert statuses(services[0]) == {503}
    wait_until(lambda: list(audits(services[0]).values()) == [[change]] * 3)
    services[1].stop()
    services[1].start()
    # Both of its workers, or the second one might start when Redis is away.
    wait_until(
        lambda: len(workers := services[1].workers()) == 2 and audits(services[1]).keys() >= {w.pid for w in workers}
    )
    assert statuses(services[1]) == {503}
    own_redis.stop()
    wait_until(lambda: requests.get(f"{services[0].url}/readyz", timeout=WAIT_SECONDS).status_code == 503)
    assert statuses(*services) == {503}
    assert requests.get(services[0].url + ORDERS, timeout=WAIT_SECONDS).status_code == 401
    own_redis.start()
    switch(services[1], "on", f"POST {ORDERS}", "--by", "bob")
    wait_until(lambda: statuses(*services) == {401})
    lifted = ("route on", f"POST {ORDERS}", "bob", "no reason given")
    for worker in services[0].workers():
        wait_until(lambda: audits(services[0])[worker.pid] == [change, lifted])  # noqa: B023


def test_a_worker_starts_and_serves_while_redis_hangs(start_service: StartService, own_redis: RedisServer) -> None:
    service = start_service(REDIS_URL=own_redis.url, WEB_CONCURRENCY="1")
    assert own_redis.process
    suspend(own_redis.process)
    replace_a_worker(service)
    wait_until(lambda: requests.get(f"{service.url}/livez", timeout=WAIT_SECONDS).ok)
    assert statuses(service) == {401}


def test_looking_once_a_second_makes_no_spans(
    start_service: StartService, own_redis: RedisServer, collector: OtlpReceiver
) -> None:
    service = start_service(
        REDIS_URL=own_redis.url,
        WEB_CONCURRENCY="1",
        WECHAT_PUSH_TOKEN="",
        WECHAT_PUSH_AES_KEY="",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
    )
    with Redis.from_url(own_redis.url) as redis:
        wait_until(lambda: redis.info("commandstats").get("cmdstat_hgetall", {}).get("calls", 0) >= 3)
    service.stop()
    names = {span.name for span in collector.spans()}
    assert "GET /livez" in names
    assert not [name for name in names if "HGETALL" in name]
