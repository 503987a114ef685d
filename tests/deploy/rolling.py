"""Two instances under load, behind HAProxy and behind nginx: restarted in turn, killed, frozen; no request fails.

Run by hand, as it takes about a minute:

    .venv/bin/python -m pytest -s tests/deploy/rolling.py

It prints what became of the requests. What waits for seconds in the shipped configuration waits for a part of that
here, and so does the service; `SHIPPED=1` in the environment leaves all as it is, which takes several minutes.
"""

import os
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack

import psutil
import pytest

from bench.load import Outcome, Pool, pool
from tests.databases import MariaDB
from tests.deploy.load_balancers import HAPROXY, NGINX, HAProxy, LoadBalancer, Nginx
from tests.faults.load import Load, codes, in_background, is_right
from tests.faults.stage import Stage
from tests.harness import Service, answers, suspend, wait_until

SHIPPED = bool(os.environ.get("SHIPPED"))
REQUEST_SECONDS, DRAIN_SECONDS = (10, 10) if SHIPPED else (4, 2)
IDLE_SECONDS = 5 if SHIPPED else 1
"""As README.md advises for MariaDB."""
PATIENCE_SECONDS = 3 * REQUEST_SECONDS
"""How long a client waits: longer than until a second instance has answered what the first did not."""
SETTLE_SECONDS = 1
"""For how long the load goes on after each step."""


class Site:
    """Two instances of the service, and a load balancer in front of them."""

    def __init__(self, stack: ExitStack, kind: type[LoadBalancer]) -> None:
        self.stage = Stage(stack, mariadb=True)
        assert isinstance(self.stage.database, MariaDB)
        self.stage.database.execute(f"SET GLOBAL idle_transaction_timeout = {IDLE_SECONDS}")
        environ = {
            **self.stage.patient(),
            "WEB_CONCURRENCY": "1",
            "DRAIN_SECONDS": str(DRAIN_SECONDS),
            "REQUEST_SECONDS": str(REQUEST_SECONDS),
            "TRUSTED_PROXIES": "127.0.0.1",
        }
        self.instances: dict[str, Service] = {}
        for name in ("web-1", "web-2"):
            self.instances[name] = Service(environ, self.stage.folder / name)
            stack.callback(self.instances[name].discard)
        different = {} if SHIPPED else kind.answers_within("5s")
        if kind is HAProxy and not SHIPPED:
            different |= {"inter 5s fastinter 1s downinter 5s": "inter 500ms fastinter 200ms downinter 500ms"}
        if kind is Nginx and not SHIPPED:
            different |= {"fail_timeout=10s": "fail_timeout=3s"}
        servers = {name: one.url.removeprefix("http://") for name, one in self.instances.items()}
        self.front = kind(self.stage.folder / "front", servers, different=different)
        stack.callback(self.front.discard)

    def wait_for_both(self) -> None:
        """Wait until both instances get requests."""
        for instance in self.instances.values():
            instance.clear_log()
            wait_until(lambda instance=instance: "/api/v1/orders" in instance.log())  # type: ignore[misc]

    def wait_for(self, name: str) -> None:
        """Wait until this instance is ready, and HAProxy has noticed; nginx has not."""
        wait_until(lambda: answers(f"{self.instances[name].url}/readyz"))
        if isinstance(self.front, HAProxy):
            wait_until(lambda: self.front.is_up(name))  # type: ignore[attr-defined]


class LoadInFront(Load):
    """Load that comes by the load balancer."""

    def __init__(self, site: Site) -> None:
        super().__init__(site.stage)
        self._front = site.front

    def connections(self) -> AbstractAsyncContextManager[Pool]:
        context = ssl.create_default_context(cafile=self._front.certificate)
        return pool(self._front.port, PATIENCE_SECONDS, self._front.host, context)


def restart(site: Site) -> None:
    """One instance after the other."""
    for name, instance in site.instances.items():
        instance.stop()
        instance.start()
        site.wait_for(name)


def kill(site: Site) -> None:
    site.instances["web-1"].kill()
    time.sleep(SETTLE_SECONDS)
    site.instances["web-1"].start()
    site.wait_for("web-1")


def freeze(site: Site) -> None:
    """For as long as it takes to find out, and some more."""
    instance = site.instances["web-1"]
    processes = [psutil.Process(instance.process.popen.pid), *instance.workers()]
    for process in processes:
        suspend(process)
    if isinstance(site.front, HAProxy):
        wait_until(lambda: not site.front.is_up("web-1"))  # type: ignore[attr-defined]
    time.sleep(1.5 * REQUEST_SECONDS)
    for process in processes:
        process.resume()
    site.wait_for("web-1")


def reload(site: Site) -> None:
    for _ in range(3):
        site.front.reload()
        time.sleep(0.3)


STEPS: dict[str, Callable[[Site], None]] = {
    "each instance restarted": restart,
    "an instance killed": kill,
    "an instance frozen": freeze,
}


@pytest.fixture(
    params=[
        pytest.param(HAProxy, marks=pytest.mark.skipif(HAPROXY is None, reason="HAProxy is not installed")),
        pytest.param(Nginx, marks=pytest.mark.skipif(NGINX is None, reason="nginx is not installed")),
    ]
)
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(stack, request.param)


def test_no_read_and_no_keyed_write_fails(site: Site) -> None:
    steps = STEPS | ({"HAProxy reloaded": reload} if isinstance(site.front, HAProxy) else {})
    failed: list[tuple[str, Outcome]] = []
    running = LoadInFront(site)
    with in_background(running):
        for name, step in steps.items():
            site.wait_for_both()
            began = time.monotonic()
            step(site)
            time.sleep(SETTLE_SECONDS)
            outcomes = running.since(began)
            slowest = max(outcome.seconds for outcome in outcomes)
            wrong = [outcome for outcome in outcomes if not is_right(outcome)]
            assert step is not freeze or slowest > REQUEST_SECONDS, "nobody waited for the frozen instance"
            failed += [(name, outcome) for outcome in wrong if outcome.request.kind != "login"]
            print(f"{type(site.front).__name__}: {name}: {len(outcomes)} requests in {time.monotonic() - began:.0f} s,")
            print(f"    failed: {codes(wrong)}, of them logins: {sum(one.request.kind == 'login' for one in wrong)};")
            print(f"    the slowest took {slowest:.1f} s")
    undelivered = "".join(line for line in site.front.log.read_text().splitlines(True) if '" 503 ' in line)
    assert failed == [], undelivered
    assert running.count_orders() == (0, 0)
    assert running.missing_sessions == 0
