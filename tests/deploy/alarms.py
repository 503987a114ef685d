"""Each dependency fails in turn, under load and before a real Prometheus: the right alarm fires, and no other.

Not part of `make test`, as it takes about seven minutes:

    .venv/bin/python -m pytest --database=mariadb tests/deploy/alarms.py

Each duration of rules.yml is divided by 60: an hour of the rules is a minute here. What the service itself waits for is
not. All faults use up one budget, so the tests belong together and run in this order.
"""

import logging
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from redis import Redis

from dev.redis_server import RedisServer
from telemetry.logs import CAPACITY
from tests.databases import MariaDB
from tests.deploy.test_prometheus import FOLDER
from tests.harness import APP_ID, METRICS_TOKEN, Service, Simulator, answers, free_port, suspend, wait_until

pytestmark = pytest.mark.only_on("mariadb")

HASTE = 60
REQUESTS_A_SECOND = 18
USERS = 48
"""Many, so that most of them go on while others wait for an answer."""
FIRES_SECONDS = 45
"""In which the right alarm fires. The slowest is LatencyBurn, which wants 14.4 % of an hour to have been slow."""
ENDS_SECONDS = 60
"""In which it ends after the recovery: the longest of the shorter windows is half an hour."""
HOLD_SECONDS = 6
"""For how long the fault goes on after its alarm: longer than any other alarm waits."""
SETTLE_SECONDS = 8
"""And for how long the alarms are watched after it has ended: longer than the shortest window is remembered."""
MILLISECONDS = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
STABLE_TOKEN = "/cgi-bin/stable_token"
WECHAT = ["/sns/jscode2session", "/wxa/checksession", STABLE_TOKEN]


def in_haste(rules: str) -> str:
    """The rules with every duration divided by HASTE: all ranges, `for` and `keep_firing_for`."""

    def divided(duration: re.Match[str]) -> str:
        parts = re.findall(r"(\d+)([smhd])", duration[0])
        return f"{sum(int(number) * MILLISECONDS[unit] for number, unit in parts) // HASTE}ms"

    durations = r"(?:\d+[smhd])+"
    places = rf"\[{durations}(?::{durations})?\]|for: {durations}$"
    return re.sub(places, lambda place: re.sub(durations, divided, place[0]), rules, flags=re.MULTILINE)


class Prometheus:
    """A real one, with the configuration of deploy/, that scrapes a service every second."""

    def __init__(self, service: Service, folder: Path) -> None:
        config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        del config["alerting"]
        (scraped,) = config["scrape_configs"]
        name = f"{socket.gethostname()}:{service.environ['PORT']}"
        scraped["static_configs"] = [{"targets": [service.url.removeprefix("http://")], "labels": {"instance": name}}]
        folder.mkdir()
        (folder / "metrics_token").write_text(METRICS_TOKEN)
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (folder / "rules.yml").write_text(in_haste((FOLDER / "rules.yml").read_text()))
        address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{address}"
        command = ["prometheus", f"--web.listen-address={address}", f"--storage.tsdb.path={folder / 'data'}"]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--config.file={folder / 'prometheus.yml'}"], stdout=log, stderr=log
            )

    def ask(self, query: str) -> list[dict[str, Any]]:
        answer = requests.get(f"{self.url}/api/v1/query", params={"query": query}, timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]["result"]

    def firing(self, seconds: float = 0) -> set[str]:
        """The names of the alarms that fire; or that have fired at any time of so many last seconds."""
        # QueueDelay is right while other work keeps this machine busy.
        query = 'ALERTS{alertstate="firing", alertname!="QueueDelay"}'
        if seconds:
            query = f"max_over_time({query}[{int(seconds * 1000)}ms])"
        return {sample["metric"]["alertname"] for sample in self.ask(query)}

    def annotations(self, name: str) -> dict[str, str]:
        alarms = requests.get(f"{self.url}/api/v1/alerts", timeout=10).json()["data"]["alerts"]
        return next(alarm["annotations"] for alarm in alarms if alarm["labels"]["alertname"] == name)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


class Again:
    """Does something again and again between `start` and `stop`, whatever comes of it.

    :param threads: how many do it side by side.
    :param pause: seconds between one time and the next, for each of them.
    """

    def __init__(self, do: Callable[[], object], pause: float, threads: int = 1) -> None:
        self._do = do
        self._pause = pause
        self._stopped = threading.Event()
        # One after the other, so that they do not all come at one moment.
        delays = (pause * number / threads for number in range(threads))
        self._threads = [threading.Thread(target=self._go_on, args=(delay,)) for delay in delays]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def _go_on(self, delay: float) -> None:
        self._stopped.wait(delay)
        while not self._stopped.wait(self._pause):
            with suppress(requests.RequestException, AssertionError, psutil.NoSuchProcess):
                self._do()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


class Stage:
    """The service, its users, and the Prometheus that watches; all of them go when the ExitStack closes."""

    def __init__(self, environ: dict[str, str], simulator: Simulator, folder: Path, exits: ExitStack) -> None:
        # The log goes through a pipe to a process that can be made to stop reading.
        pipe = folder / "pipe"
        subprocess.run(["mkfifo", pipe], check=True)
        self.log_reader = subprocess.Popen(["sh", "-c", 'exec cat <>"$0" >"$1"', pipe, folder / "lines"])
        exits.callback(self.log_reader.wait)
        exits.callback(self.log_reader.kill)
        # Redis without the patience of the other tests: with it, a hung one would hold every thread, the scrape's too.
        redis_url = environ["REDIS_URL"].partition("?")[0]
        self.service = Service(
            {**environ, "REDIS_URL": redis_url, "LOG_LEVEL": "INFO"}, pipe, "tests.apps.faulty_route"
        )
        exits.callback(self.service.stop)
        self.simulator = simulator
        self.prometheus = Prometheus(self.service, folder / "prometheus")
        exits.callback(self.prometheus.stop)
        wait_until(lambda: answers(f"{self.prometheus.url}/-/ready"))
        wait_until(lambda: self.prometheus.ask("up == 1"))
        people = [f"o{number:027}" for number in range(20)]
        self._tokens = cycle([self.service.log_in(simulator, openid=person) for person in people])
        self._people = cycle(people)
        habits = (self._read, self._read, self._log_in, self._log_in, self._check, self._order)
        every = USERS / REQUESTS_A_SECOND
        self._users = [Again(habit, every, USERS // len(habits)) for habit in habits]
        for users in self._users:
            users.start()
            exits.callback(users.stop)

    def _read(self) -> None:
        self.service.read_me(next(self._tokens))

    def _log_in(self) -> None:
        self.service.log_in(self.simulator, openid=next(self._people))

    def _check(self) -> None:
        self.service.call("GET", "/auth/wechat", next(self._tokens))

    def _order(self) -> None:
        item = {"sku": "tea", "name": "茶", "quantity": 1, "unit_price": 100}
        self.service.call("POST", "/orders", next(self._tokens), json={"items": [item]})

    def get(self, path: str) -> None:
        requests.get(f"{self.service.url}{path}", timeout=20)

    def kill_a_worker(self) -> None:
        """The eldest, if there is another one."""
        eldest, *others = sorted(self.service.workers(), key=lambda worker: worker.create_time())
        if others:
            eldest.kill()

    def wechat_fails(self, kind: str, paths: list[str] = WECHAT, **details: Any) -> None:
        for path in paths:
            self.simulator.fault(kind, times=1_000_000, path=path, **details)

    def wechat_recovers(self) -> None:
        for path in WECHAT:
            self.simulator.fault("slow", times=1, path=path, seconds=0)


@pytest.fixture(scope="session")
def stage(
    environ: dict[str, str], shared_simulator: Simulator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    with ExitStack() as exits:
        yield Stage(environ, shared_simulator, tmp_path_factory.mktemp("stage"), exits)


def rehearse(stage: Stage, alarm: str, begin: Callable[[], object], end: Callable[[], object]) -> None:
    """While a fault lasts this alarm fires, and from its beginning until some time after its end no other does."""
    began = time.monotonic()
    begin()
    try:
        wait_until(lambda: alarm in stage.prometheus.firing(), FIRES_SECONDS)
        fired = time.monotonic()
        time.sleep(HOLD_SECONDS)
        description = stage.prometheus.annotations(alarm)["description"]
    finally:
        end()
        recovered = time.monotonic()
    wait_until(lambda: not stage.prometheus.firing(), ENDS_SECONDS)
    ended = time.monotonic()
    time.sleep(SETTLE_SECONDS)
    assert stage.prometheus.firing(time.monotonic() - began) == {alarm}
    assert "error" not in description
    seconds = f"{fired - began:.0f} s after its beginning, ended {ended - recovered:.0f} s after its end"
    logging.getLogger(__name__).info("%s %s: %s", alarm, seconds, description)


def test_nothing_fires_while_all_is_well(stage: Stage) -> None:
    time.sleep(15)
    assert stage.prometheus.firing(15) == set()
    assert {sample["metric"]["job"] for sample in stage.prometheus.ask("job:kuaishang_http_requests:increase5m > 50")}


def test_redis_is_stopped(stage: Stage, redis_server: RedisServer) -> None:
    rehearse(stage, "RedisAway", redis_server.stop, redis_server.start)


def test_redis_hangs(stage: Stage, redis_server: RedisServer) -> None:
    server = redis_server.process
    assert server
    rehearse(stage, "RedisAway", lambda: suspend(server), lambda: server.send_signal(signal.SIGCONT))


def test_mariadb_is_killed(stage: Stage, databases: MariaDB) -> None:
    rehearse(stage, "DatabaseAway", databases.kill, databases.start)


def end_of_access_token(redis_server: RedisServer, seconds: int) -> None:
    """Let it expire after so many seconds, few enough for a new one to be requested."""
    with Redis.from_url(redis_server.url) as redis:
        redis.expire(f"wechat:{APP_ID}:access_token", seconds)


def test_every_call_of_wechat_fails(stage: Stage, redis_server: RedisServer) -> None:
    def begin() -> None:
        stage.wechat_fails("http_500")
        end_of_access_token(redis_server, 0)

    rehearse(stage, "WeChatFailing", begin, stage.wechat_recovers)


def test_wechat_refuses_nothing_but_a_new_access_token(stage: Stage, redis_server: RedisServer) -> None:
    def begin() -> None:
        stage.wechat_fails("errcode", [STABLE_TOKEN], errcode=40125)
        end_of_access_token(redis_server, 8)  # until then the old one serves; then what wants a token fails

    rehearse(stage, "TokenRefreshFailing", begin, stage.wechat_recovers)


def test_wechat_is_too_slow(stage: Stage) -> None:
    rehearse(stage, "WeChatFailing", lambda: stage.wechat_fails("slow", seconds=10), stage.wechat_recovers)


def test_the_log_is_not_read(stage: Stage) -> None:
    def begin() -> None:
        suspend(stage.log_reader)
        for _ in range(60):
            stage.get(f"/faulty/chatty/{CAPACITY // 10}")

    rehearse(stage, "LogLinesDropped", begin, lambda: stage.log_reader.send_signal(signal.SIGCONT))


def test_workers_die_again_and_again(stage: Stage) -> None:
    killing = Again(stage.kill_a_worker, pause=2)
    rehearse(stage, "CrashLoop", killing.start, killing.stop)


def test_the_instance_is_down(stage: Stage) -> None:
    rehearse(stage, "InstanceDown", stage.service.kill, stage.service.start)


def test_a_route_crashes(stage: Stage) -> None:
    asking = Again(lambda: stage.get("/faulty/crash"), pause=1, threads=10)
    rehearse(stage, "AvailabilityBurn", asking.start, asking.stop)


def test_a_route_is_slow(stage: Stage) -> None:
    asking = Again(lambda: stage.get("/faulty/slow/1.2"), pause=0.1, threads=20)
    rehearse(stage, "LatencyBurn", asking.start, asking.stop)


def test_nothing_fires_afterwards(stage: Stage) -> None:
    time.sleep(40)
    assert stage.prometheus.firing(40) == set()
