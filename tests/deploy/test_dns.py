"""The name servers of deploy/dns: weights, health, and how a site returns; `make rehearsal` has real sites."""

import math
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.deploy.dns_servers import DIG, FOLDER, GDNSD, PATH, DnsServer, Resolver, Site, query
from tests.deploy.systemd import needs_systemd, verify
from tests.harness import ROOT, wait_until

pytestmark = pytest.mark.skipif(not (GDNSD and DIG), reason="gdnsd or dig is not installed")

SITES = {"beijing": Site("127.1.0.20", 40), "shanghai": Site("127.2.0.20", 40), "shenzhen": Site("127.3.0.20", 20)}
SHANGHAI, SHENZHEN = SITES["shanghai"].address, SITES["shenzhen"].address
FASTER = {"interval => 5": "interval => 2", "timeout => 3": "timeout => 1"}
STEP_SECONDS = 1
QUERIES = 1000
SWITCHED_SECONDS = 30
"""In which no client that keeps to the TTL uses a site any more that has gone."""
PASSED_ON_SECONDS = 1
"""In which gdnsd's answers follow its checks."""


class Readiness(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status = self.server.status if self.path == "/readyz" else 404  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class HealthyOrNot(ThreadingHTTPServer):
    """What a site's HAProxy says about the site."""

    status = 200


class Stage:
    def __init__(self, folder: Path, exits: ExitStack) -> None:
        self.sites: dict[str, HealthyOrNot] = {}
        port = 0
        for name, site in SITES.items():
            self.sites[name] = exits.enter_context(HealthyOrNot((site.address, port), Readiness))
            port = self.sites[name].server_port
            threading.Thread(target=self.sites[name].serve_forever, daemon=True).start()
            exits.callback(self.sites[name].shutdown)
        self.servers = []
        for number, address in enumerate(("127.1.0.53", "127.2.0.53")):
            self.servers.append(DnsServer(folder / str(number), address, SITES, port, STEP_SECONDS, FASTER))
            exits.callback(self.servers[-1].discard)

    def addresses(self) -> list[Counter[str]]:
        """Return how often each address is in the answers of each server."""
        return [
            Counter(address for _, address in query(server.address, times=QUERIES, tries=5)) for server in self.servers
        ]


def uses(server: DnsServer, address: str) -> bool:
    """Whether a site is in the answers of a server."""
    return address in {answer for _, answer in query(server.address, times=100)}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with ExitStack() as exits:
        yield Stage(tmp_path_factory.mktemp("dns") / "servers", exits)


def assert_shares(answers: Counter[str], weights: dict[str, int]) -> None:
    """Check that each site is in the answers by its weight, within five standard deviations."""
    assert answers.total() == QUERIES
    for name, site in SITES.items():
        share = weights.get(name, 0) / sum(weights.values())
        deviation = math.sqrt(QUERIES * share * (1 - share))
        assert abs(answers[site.address] - QUERIES * share) <= 5 * deviation, (name, answers)


def test_each_server_answers_by_the_weights(stage: Stage) -> None:
    for answers in stage.addresses():
        assert_shares(answers, {name: site.weight for name, site in SITES.items()})


def test_a_site_that_is_not_ready_leaves_the_answers_and_returns_in_steps(stage: Stage) -> None:
    others = {"beijing": 40, "shenzhen": 20}
    stage.sites["shanghai"].status = 503
    for server in stage.servers:
        wait_until(lambda server=server: server.weights() == others | {"shanghai": 4})
        wait_until(lambda server=server: not uses(server, SHANGHAI))
    for answers in stage.addresses():
        assert_shares(answers, others)

    server = stage.servers[0]
    server.ramp.suspend()
    stage.sites["shanghai"].status = 200
    wait_until(lambda: uses(server, SHANGHAI))
    answers = Counter(address for _, address in query(server.address, times=QUERIES, tries=5))
    assert_shares(answers, others | {"shanghai": 4})
    server.ramp.resume()
    for server in stage.servers:
        wait_until(lambda server=server: server.weights()["shanghai"] == 40)
        assert server.steps("shanghai") == [4, 10, 20, 40]


def test_one_site_that_is_left_is_all_there_is_and_if_none_is_all_are(stage: Stage) -> None:
    stage.sites["beijing"].status = stage.sites["shanghai"].status = 503
    for server in stage.servers:
        wait_until(lambda server=server: server.weights()["beijing"] == server.weights()["shanghai"] == 4)
        wait_until(lambda server=server: {answer for _, answer in query(server.address, times=100)} == {SHENZHEN})
    stage.sites["shenzhen"].status = 503
    for server in stage.servers:
        wait_until(lambda server=server: set(server.weights().values()) == {4, 2})
        assert set(server.states().values()) == {"DOWN"}
    for answers in stage.addresses():
        assert answers.keys() == {site.address for site in SITES.values()}
    for site in stage.sites.values():
        site.status = 200
    for server in stage.servers:
        wait_until(lambda server=server: server.weights() == {name: site.weight for name, site in SITES.items()})


def test_a_resolver_needs_one_of_the_servers(stage: Stage) -> None:
    first, second = (server.address for server in stage.servers)
    stage.servers[0].kill()
    assert Resolver([first, second]).address() in {site.address for site in SITES.values()}
    stage.servers[1].suspend()
    with pytest.raises(LookupError):
        Resolver([first, second]).address()
    stage.servers[1].resume()
    stage.servers[0].start()
    assert query(first, tries=5)


REFUSED = {
    "shanghai => [ nowhere, 40 ]\n": "Replace command to old daemon failed",
    "shanghai = 40\n": "not a site: shanghai = 40",
}
"""By gdnsd, and by ramp.py itself; and what is said of it."""


def test_weights_that_are_refused_leave_gdnsd_as_it_is(stage: Stage) -> None:
    server = stage.servers[0]
    with server.without_ramp():
        before = server.weights_file.read_text()
        for refused, said in REFUSED.items():
            (server.folder / "refused").write_text(refused)
            command = [sys.executable, FOLDER / "ramp.py", server.folder / "refused", server.weights_file]
            options = ["--config", server.folder]
            outcome = subprocess.run([*command, *options], capture_output=True, text=True, env={"PATH": PATH})
            assert outcome.returncode == 1
            assert said in outcome.stderr
            assert server.weights_file.read_text() == before
        assert query(server.address, tries=5)


def test_an_operator_takes_a_site_out(stage: Stage) -> None:
    for server in stage.servers:
        server.admin_state.write_text(f"{SHANGHAI}/site => DOWN\n")
        wait_until(lambda server=server: server.weights()["shanghai"] == 4 and not uses(server, SHANGHAI))
        server.admin_state.unlink()
        wait_until(lambda server=server: uses(server, SHANGHAI))


def test_the_configuration_as_shipped_is_accepted_and_keeps_its_promise(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER, tmp_path / "gdnsd")
    config = (folder / "config").read_text()
    (folder / "config").write_text(config.replace("/var/lib/gdnsd/weights", str(folder / "sites")))
    outcome = subprocess.run([str(GDNSD), "-c", folder, "checkconf"], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr

    zone = (folder / "zones" / "api.example.com").read_text()
    interval, timeout, failures = (
        figure(config, rf" {name} => (\d+)") for name in ("interval", "timeout", "down_thresh")
    )
    ttl, ttl_after_a_failure = figure(zone, r"(\d+)/\d+ DYNA"), figure(zone, r"/(\d+) DYNA")
    assert (interval, ttl) == (5, 10)
    # A fault comes right after a check, and a client asks right before the answers change.
    gone = PASSED_ON_SECONDS + max((failures - 1) * interval + ttl, failures * interval + ttl_after_a_failure)
    assert timeout + gone <= SWITCHED_SECONDS

    # Where a site refuses, its HAProxy first has to find out about an instance that hangs.
    proxy = (ROOT / "deploy" / "haproxy" / "haproxy.cfg").read_text()
    check, first, next_ones = (figure(proxy, rf" {name} (\d+)s") for name in ("timeout check", "inter", "fastinter"))
    refused = first + check + (figure(proxy, r" fall (\d+)") - 1) * (next_ones + check)
    assert refused + gone <= SWITCHED_SECONDS


@needs_systemd
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = shutil.copy(FOLDER / "ramp.service", tmp_path / "gdnsd-ramp.service")
    verify(unit, ours="gdnsd-ramp")


def figure(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found, pattern
    return int(found[1])
