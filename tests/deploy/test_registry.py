"""Real etcd, real HAProxy and two instances, with the programs of deploy/registry; `.ci/run` installs both servers."""

import configparser
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from deploy.registry.etcd import Away, is_address
from deploy.registry.etcd import Etcd as Client
from tests.deploy.load_balancers import HAPROXY, HAProxy, Instance
from tests.deploy.registry import ETCD, FOLDER, Agent, Etcd, Heartbeat, SlottedHAProxy, etcd_cluster
from tests.deploy.systemd import needs_systemd, verify
from tests.harness import ROOT, WAIT_SECONDS, Program, Service, free_port, suspend, wait_until

pytestmark = pytest.mark.skipif(None in (ETCD, HAPROXY), reason="etcd or haproxy is not installed")

BEAT_SECONDS, PATIENCE_SECONDS = 1, 4
"""Between the beats of an instance; and what the agent is told, so that it can be seen waiting for a lease."""
SLOW_BEAT_SECONDS = 3
"""Of an instance that leaves: the agent sees so before the lease ends, also on a busy machine."""

PREFIX = "/kuaishang/instances/"
SITES = ["127.1.0.1", "127.2.0.1", "127.3.0.1"]
WHO_RESPONDED = "http-response set-header X-Server %s"


class Stage:
    """Two instances with their heartbeats, etcd in three sites, HAProxy and its agent."""

    def __init__(self, folder: Path, start_service: Callable[..., Service], stack: ExitStack) -> None:
        self.etcd = etcd_cluster(folder / "etcd", SITES)
        for member in self.etcd:
            stack.callback(member.kill)
        self.folder, self._stack, self._start = folder, stack, start_service
        more = {" slowstart 30s": "", "    default_backend": f"    {WHO_RESPONDED}\n    default_backend"}
        self.haproxy = SlottedHAProxy(folder / "haproxy", different=more)
        stack.callback(self.haproxy.discard)
        self.agent = Agent(folder / "agent", self.etcd, self.haproxy, PATIENCE_SECONDS)
        stack.callback(self.agent.kill)

    def instance(self, seconds: int = BEAT_SECONDS) -> tuple[Service, Heartbeat]:
        service = self._start(WEB_CONCURRENCY="1")
        address = service.url.removeprefix("http://")
        heartbeat = Heartbeat(self.folder / address, self.etcd, address, seconds)
        self._stack.callback(heartbeat.kill)
        return service, heartbeat

    def responding(self) -> set[str | int]:
        """Return who responds to some requests in a row: HAProxy's servers, a status but 200, or an error."""
        return {self._respondent() for _ in range(6)}

    def _respondent(self) -> str | int:
        try:
            answer = self.haproxy.request("GET", "/version")
        except requests.RequestException as error:
            return type(error).__name__
        return answer.headers["X-Server"] if answer.ok else answer.status_code

    def until(self, **expected: str) -> None:
        """Wait until HAProxy's servers have this status; then those that are UP respond, and no other."""
        wait_until(lambda: self.haproxy.slots() == expected)
        wait_until(lambda: self.responding() == {name for name, status in expected.items() if status == "UP"})

    def count(self, state: str) -> float:
        return self.agent.metrics()[f'kuaishang_registry_instances{{state="{state}"}}']


@pytest.fixture
def stage(tmp_path: Path, start_service: Callable[..., Service]) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(tmp_path, start_service, stack)


def test_haproxy_has_the_instances_that_live(stage: Stage) -> None:
    _, heartbeat = stage.instance(SLOW_BEAT_SECONDS)
    stage.until(slot1="UP")
    other, other_heartbeat = stage.instance(SLOW_BEAT_SECONDS)
    stage.until(slot1="UP", slot2="UP")
    wait_until(lambda: stage.haproxy.slots("unready") == {"slot1": "no check", "slot2": "no check"})

    other_heartbeat.stop()
    stage.until(slot1="UP", slot2="leaving")
    other_heartbeat.start()
    stage.until(slot1="UP", slot2="UP")

    workers = [psutil.Process(other.process.popen.pid), *other.workers()]
    for worker in workers:
        suspend(worker)
    stage.until(slot1="UP", slot2="MAINT")
    assert stage.count("lost") == 1
    heartbeat.stop()  # of the last one, which lives
    wait_until(lambda: not stage.count("up") and not stage.count("leaving"))
    assert stage.count("lost") == 1  # that one has said that it leaves
    stage.until(slot1="UP", slot2="MAINT")
    for worker in workers:
        worker.resume()
    stage.until(slot1="MAINT", slot2="UP")


def test_without_etcd_nothing_changes(stage: Stage) -> None:
    service, heartbeat = stage.instance()
    stage.until(slot1="UP")
    first, *others = stage.etcd
    first.kill()  # a majority lives
    _, other_heartbeat = stage.instance()
    both = {"slot1": "UP", "slot2": "UP"}
    stage.until(**both)

    for member in others:
        member.kill()
    wait_until(lambda: not stage.agent.metrics()["kuaishang_registry_etcd_up"])
    time.sleep(3 * BEAT_SECONDS + 1)  # longer than a lease
    assert stage.haproxy.slots() == both
    stage.agent.kill()
    stage.haproxy.kill()
    stage.haproxy.start()  # alone, with the state that the agent has left
    wait_until(lambda: stage.responding() == set(both))
    said = stage.agent.log().count("etcd is away")
    stage.agent.start()
    wait_until(lambda: stage.agent.log().count("etcd is away") > said)
    assert stage.haproxy.slots() == both

    other_heartbeat.suspend()
    for member in stage.etcd:
        member.forget()
        member.start()
    address = service.url.removeprefix("http://")
    wait_until(lambda: f"{address}: registered" in heartbeat.log().partition("expired")[2])
    time.sleep(2)  # longer than the agent needs to see that one is there, and one is not
    assert stage.haproxy.slots() == both
    other_heartbeat.resume()
    wait_until(lambda: "registered" in other_heartbeat.log().partition("expired")[2])
    service.kill()
    stage.until(slot1="MAINT", slot2="UP")


def test_who_is_drained_stays_so_and_who_has_no_slot_is_counted(stage: Stage) -> None:
    service, heartbeat = stage.instance(SLOW_BEAT_SECONDS)
    stage.until(slot1="UP")
    stage.haproxy.ask("set server kuaishang/slot1 state drain")
    etcd = Client([member.endpoint for member in stage.etcd])
    lease = etcd.grant(600)
    for port in range(1, 22):  # with the instance two more than there are slots
        etcd.put(f"{PREFIX}127.0.0.2:{port}", "up", lease)
    wait_until(lambda: stage.agent.metrics()["kuaishang_registry_without_slot"] == 2)

    heartbeat.stop()
    wait_until(lambda: f"{service.url.removeprefix('http://')}: left" in stage.agent.log())
    heartbeat.start()
    wait_until(lambda: stage.count("up") == 22)
    assert stage.haproxy.slots()["slot1"] == "DRAIN"


def test_a_server_with_an_address_of_its_own_is_where_the_configuration_says(
    tmp_path: Path, instances: list[Instance]
) -> None:
    one, other = (instance.address for instance in instances)
    haproxy = HAProxy(tmp_path / "haproxy", {"web-1": one})
    etcd = Etcd(tmp_path / "etcd")
    etcd.kill()  # what is about HAProxy needs none
    agent = Agent(tmp_path / "agent", [etcd], haproxy)
    try:
        wait_until(lambda: haproxy.state.read_text() != "1\n")
        haproxy.move("web-1", other)
        haproxy.reload()
        assert haproxy.statistics()["kuaishang", "web-1"]["addr"] == other
    finally:
        agent.kill()
        haproxy.discard()


def test_an_answer_that_is_not_http_is_a_miss(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        heartbeat = Heartbeat(tmp_path, [], address, BEAT_SECONDS)
        try:
            server.settimeout(WAIT_SECONDS)
            for _ in range(2):  # it has outlived the first
                connection, _ = server.accept()
                with connection:
                    connection.recv(9999)
                    connection.sendall(b"garbage\r\n")
            heartbeat.stop()
            assert f"{address}: not renewed, /readyz: " in heartbeat.log()
        finally:
            heartbeat.kill()


@pytest.mark.skipif(not shutil.which("etcdctl"), reason="etcdctl is not installed")
def test_the_readme_makes_one_cluster_that_wants_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = "subjectAltName=IP:127.0.0.1," + ",".join(f"IP:{address}" for address in SITES)
    certify(tmp_path, "ca", "/CN=authority")
    certify(tmp_path, "member", "/CN=member", "-CA", "ca.crt", "-CAkey", "ca.key", "-addext", names)
    places = {"/etc/kuaishang/etcd-ca.": "/etc/etcd/ca.", "/etc/kuaishang/etcd.": "/etc/etcd/member."}
    places["/etc/etcd/"] = f"{tmp_path}/"
    for number, address in enumerate(SITES, 1):
        places |= {f"10.{number}.0.1:{port}": f"{address}:{free_port(address)}" for port in (2379, 2380)}

    def here(text: str) -> str:
        for shipped, other in places.items():
            text = text.replace(shipped, other)
        return text

    readme = (FOLDER / "README.md").read_text()
    [removal] = re.findall(r"^    (rm .+)$", readme, re.MULTILINE)
    [listing] = re.findall(r"^    (etcdctl .+ member list)$", readme, re.MULTILINE)
    with ExitStack() as stack:
        for number in range(1, 4):
            by_itself = Etcd(tmp_path / str(number))  # as Debian starts it
            stack.callback(by_itself.kill)
            by_itself.wait()
            by_itself.kill()
            subprocess.run(removal.replace("/var/lib/etcd/default", str(by_itself.data)).split(), check=True)
            env = {"ETCD_DATA_DIR": str(by_itself.data)}
            for name, value in re.findall(r"^    (ETCD_\w+)=(.+)$", readme, re.MULTILINE):
                own = value.replace("10.1.", f"10.{number}.").replace("etcd-1", f"etcd-{number}")
                env[name] = here(value if name == "ETCD_INITIAL_CLUSTER" else own)
            stack.callback(Program(tmp_path / f"log-{number}", [str(ETCD)], env).kill)

        def members() -> int:
            return subprocess.run(here(listing).split(), capture_output=True, text=True).stdout.count(", started, ")

        wait_until(lambda: members() == 3)
        for name, value in re.findall(r"^    (ETCDCTL_\w+)=(.+)$", readme, re.MULTILINE):
            monkeypatch.setenv(name, here(value))
        assert Client.from_environment().list(PREFIX) == {}
        monkeypatch.delenv("ETCDCTL_CERT")
        with pytest.raises(Away):
            Client.from_environment().list(PREFIX)


def certify(folder: Path, name: str, *words: str) -> None:
    """Make a key and a certificate for it, by default its own authority."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key"]
    usage = ["-addext", "keyUsage=critical,keyCertSign,digitalSignature"]  # which Python 3.13 wants
    made = ["openssl", "req", "-x509", *key, *usage, "-days", "1", "-out", f"{name}.crt", "-subj", *words]
    subprocess.run(made, cwd=folder, check=True, capture_output=True)


@needs_systemd
def test_systemd_accepts_the_units_and_stops_the_heartbeat_first(tmp_path: Path) -> None:
    units = [shutil.copy(unit, tmp_path) for unit in FOLDER.glob("*.service")]
    shutil.copy(ROOT / "deploy" / "server" / "kuaishang.service", tmp_path)
    verify(*units, ours="kuaishang")
    heartbeat = configparser.ConfigParser(strict=False)
    heartbeat.read(FOLDER / "kuaishang-heartbeat.service")
    assert heartbeat["Unit"]["PartOf"] == heartbeat["Unit"]["After"] == "kuaishang.service"  # both, or it is not first


def test_the_alarms_are_about_what_the_agent_shows(tmp_path: Path) -> None:
    shown = set(re.findall(r"kuaishang_registry_\w+", (FOLDER / "agent.py").read_text()))
    rules = (FOLDER / "rules.yml").read_text()
    assert set(re.findall(r"kuaishang_registry_\w+", rules)) == shown
    alarms = {rule["alert"] for rule in yaml.safe_load(rules)["groups"][0]["rules"]}
    for readme in FOLDER.glob("README*"):
        assert set(re.findall(r"`(\w+)` \|$", readme.read_text(), re.MULTILINE)) == alarms
    if shutil.which("promtool"):
        subprocess.run(["promtool", "test", "rules", str(FOLDER / "rules.test.yml")], check=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1:8000", True),
        ("[fd00::1]:8000", True),
        ("fd00::1:8000", False),
        ("10.0.0.1", False),
        ("10.0.0.1:08000", False),
        ("web-1:8000", False),
        ("10.0.0.1:8000;shutdown sessions server kuaishang/slot1", False),
        ("[fe80::1%a;quit]:8000", False),
    ],
)
def test_only_addresses_are_passed_to_haproxy(text: str, expected: bool) -> None:
    assert is_address(text) == expected
