"""Three sites under one name: a HAProxy each, with an instance of the service; two name servers, and clients that read.

A site that goes is left within 30 s, with the intervals as shipped, and returns in steps. Run by hand, as it takes two
minutes:

    .venv/bin/python -m pytest --database=mariadb --capture=no tests/deploy/gslb.py
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import requests

from tests.databases import MariaDB
from tests.deploy.dns_servers import DIG, GDNSD, DnsServer, Resolver, Site
from tests.deploy.load_balancers import HAPROXY, HAProxy, free_port
from tests.deploy.test_dns import SWITCHED_SECONDS
from tests.harness import Service, Simulator, bearer, wait_until
from tests.proxy import Proxy

pytestmark = [
    pytest.mark.only_on("mariadb"),
    pytest.mark.skipif(not (GDNSD and DIG and HAPROXY), reason="gdnsd, dig or haproxy is not installed"),
]

SITES = {"beijing": Site("127.1.0.30", 40), "shanghai": Site("127.2.0.30", 40), "shenzhen": Site("127.3.0.30", 20)}
STEP_SECONDS = 3
"""30 as shipped: the one figure that is different here."""
CLIENTS = 12
PAUSE_SECONDS = 0.5
TTL_SECONDS = 10
PATIENCE_SECONDS = 6
"""For how long a client waits for a response."""
LEFT_SECONDS = 8
"""After so long without a failure nobody uses the site any more: longer than a TTL of 5 s, and a client's patience."""


class Read(NamedTuple):
    """A request that a client has sent."""

    ended: float
    address: str
    failure: str
    """Empty if it succeeded."""


class Clients:
    """Each reads again and again, with a resolver of its own, and a connection for each request."""

    def __init__(self, servers: list[tuple[str, int]], read: Callable[[str], str]) -> None:
        self._read = read
        self.reads: list[Read] = []
        self._stopped = threading.Event()
        resolvers = [
            Resolver(servers[number % len(servers) :] + servers[: number % len(servers)]) for number in range(CLIENTS)
        ]
        self._threads = [threading.Thread(target=self._go_on, args=(resolver,)) for resolver in resolvers]
        for thread in self._threads:
            thread.start()

    def _go_on(self, resolver: Resolver) -> None:
        while not self._stopped.wait(PAUSE_SECONDS):
            address = "none"
            try:
                address = resolver.address()
                failure = self._read(address)
            except (LookupError, requests.RequestException) as error:
                failure = repr(error)
            self.reads.append(Read(time.monotonic(), address, failure))

    def since(self, moment: float) -> list[Read]:
        return [read for read in self.reads if read.ended >= moment]

    def failures(self, moment: float) -> list[Read]:
        """Return the failed reads since then."""
        return [read for read in self.since(moment) if read.failure]

    def last_failure(self, moment: float) -> float:
        """Return when the last read since then failed."""
        return max((read.ended for read in self.failures(moment)), default=moment)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()


class Stage:
    def __init__(
        self, environ: dict[str, str], databases: MariaDB, simulator: Simulator, folder: Path, exits: ExitStack
    ) -> None:
        self.database = exits.enter_context(Proxy(databases.socket))
        url, _, _ = environ["DATABASE_URL"].partition("?")
        through_proxy = url.replace("localhost", f"127.0.0.1:{self.database.port}")
        different = {"shenzhen": {"DATABASE_URL": through_proxy}}
        plain_port, port = (free_port(SITES["beijing"].address) for _ in range(2))
        self.proxies: dict[str, HAProxy] = {}
        for name, site in SITES.items():
            settings = {**environ, "WEB_CONCURRENCY": "1", "TRUSTED_PROXIES": "127.0.0.1", **different.get(name, {})}
            service = Service(settings, folder / name)
            exits.callback(service.discard)
            instances = {"web-1": service.url.removeprefix("http://")}
            self.proxies[name] = HAProxy(
                folder / f"{name}-haproxy", instances, host=site.address, plain_port=plain_port, port=port
            )
            exits.callback(self.proxies[name].discard)
        self.sites = {proxy.host: proxy for proxy in self.proxies.values()}
        self.token = service.log_in(simulator)
        for proxy in self.proxies.values():
            wait_until(lambda proxy=proxy: requests.get(f"{proxy.plain_url}/readyz", timeout=PATIENCE_SECONDS).ok)
        self.servers: list[DnsServer] = []
        for address in ("127.1.0.54", "127.2.0.54"):
            self.servers.append(DnsServer(folder / address, address, SITES, plain_port, STEP_SECONDS))
            exits.callback(self.servers[-1].discard)
        self.clients = Clients([server.address for server in self.servers], self._read)
        exits.callback(self.clients.stop)

    def _read(self, address: str) -> str:
        """Read at a site, and once more if it asks for that; returns why it failed, empty if it did not."""
        for _ in range(2):
            answer = requests.get(
                f"{self.sites[address].url}/api/v1/users/me",
                headers=bearer(self.token),
                verify=str(self.sites[address].certificate),
                timeout=PATIENCE_SECONDS,
            )
            if answer.status_code != 503:
                break
            time.sleep(float(answer.headers["Retry-After"]))
        return "" if answer.ok else answer.text

    def left_after(self, name: str, fault: Callable[[], object]) -> float:
        """Return the seconds from a fault of a site until the last request failed, at this site and no other."""
        start = time.monotonic()
        fault()
        address = SITES[name].address
        wait_until(lambda: all(server.states()[address] == "DOWN" for server in self.servers))
        out = time.monotonic()
        wait_until(lambda: time.monotonic() > max(out, self.clients.last_failure(start)) + LEFT_SECONDS)
        failures = self.clients.failures(start)
        assert [read for read in failures if read.address != address] == []
        assert failures
        seconds = self.clients.last_failure(start) - start
        print(f"{name}: {len(failures)} failed, the last one after {seconds:.1f} s")
        return seconds


@pytest.fixture
def stage(environ: dict[str, str], databases: MariaDB, simulator: Simulator, tmp_path: Path) -> Iterator[Stage]:
    with ExitStack() as exits:
        yield Stage(environ, databases, simulator, tmp_path, exits)


def test_a_site_that_goes_is_left_in_time_and_returns_in_steps(stage: Stage) -> None:
    wait_until(lambda: {read.address for read in stage.clients.since(0)} >= stage.sites.keys())

    assert stage.left_after("shanghai", stage.proxies["shanghai"].kill) <= SWITCHED_SECONDS
    stage.proxies["shanghai"].start()

    # While the first one returns. What a site with a cut network has to say does not arrive, either.
    assert stage.left_after("beijing", stage.proxies["beijing"].suspend) <= SWITCHED_SECONDS
    stage.proxies["beijing"].resume()

    assert stage.left_after("shenzhen", stage.database.refuse) <= SWITCHED_SECONDS
    stage.database.listen()

    # A name server that is killed, and comes back, changes nothing: clients ask the other one.
    moment = time.monotonic()
    stage.servers[0].kill()
    wait_until(lambda: stage.servers[1].weights() == {name: site.weight for name, site in SITES.items()})
    wait_until(lambda: time.monotonic() > moment + TTL_SECONDS)
    stage.servers[0].start()
    wait_until(lambda: stage.servers[0].weights() == stage.servers[1].weights())
    assert stage.clients.failures(moment) == []

    for name, site in SITES.items():
        steps = [max(1, site.weight * percent // 100) for percent in (10, 25, 50, 100)]
        assert stage.servers[1].steps(name) == steps
    moment = time.monotonic()
    wait_until(lambda: {read.address for read in stage.clients.since(moment)} == stage.sites.keys())
