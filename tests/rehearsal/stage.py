"""All that runs in a rehearsal, each server a process of its own in the network of its site."""

import base64
import secrets
import ssl
import subprocess
import tempfile
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import psutil
import requests

from bench import WIDE_LIMITS
from tests.deploy.dns_servers import DnsServer, Resolver
from tests.deploy.dns_servers import Site as NamedSite
from tests.deploy.galera_nodes import Galera, Writer
from tests.deploy.patch.server import Server
from tests.deploy.redis_sentinels import RedisSentinels
from tests.deploy.registry import Agent, Etcd, Heartbeat, SlottedHAProxy, peer_url
from tests.harness import (
    APP_ID,
    APP_SECRET,
    METRICS_TOKEN,
    Process,
    Simulator,
    free_port,
    suspend,
    wait_until,
)
from tests.rehearsal.keepalived import Keepalived
from tests.rehearsal.load import Address, Phone
from tests.rehearsal.network import OUTSIDE, Network
from tests.rehearsal.users import USERS_OF_A_SITE, signed_in

SITES, INSTANCES, PROXIES, NAME_SERVERS = 3, 2, 2, 2
"""The instances and the HAProxies are those of each site."""
TLS_PORT, PLAIN_PORT = 443, 80
STEP_SECONDS = 5
"""For which a site that comes back keeps each of its weights, in place of 30 s."""
STRENGTH_PAUSE = 0.25
START_SECONDS = 120


class Startable(Protocol):
    """A server of the stage."""

    def start(self) -> None: ...

    def kill(self) -> None: ...


class Instance(Server):
    """An instance of the service below deploy/patch's supervisor, on a machine of its site."""

    def __init__(self, network: Network, machine: str, folder: Path, environ: dict[str, str]) -> None:
        self._network, self._machine, self.name = network, machine, folder.name
        super().__init__(folder, environ, released=False)
        self.state.write_text(f'{{"current": "{self.release()}", "provisional": "", "previous": []}}')

    def start(self) -> None:
        """Start it, and do not wait."""
        with self._network.inside(self._machine):
            self.process = Process(["deploy.patch.supervisor", str(self.home)], self.environ, self.home / "output")

    def wait(self) -> None:
        wait_until(lambda: self.serving() or self.process.popen.poll() is not None, START_SECONDS)
        assert self.process.popen.poll() is None, f"{self.name} has ended"

    def serving(self) -> bool:
        with suppress(requests.RequestException, psutil.NoSuchProcess):
            workers = len(self.workers())
            return requests.get(f"{self.url}/livez", timeout=2).ok and workers >= int(self.environ["WEB_CONCURRENCY"])
        return False

    def family(self) -> list[psutil.Process]:
        """Return the supervisor, and all that it has started."""
        supervisor = psutil.Process(self.process.popen.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def suspend(self) -> None:
        for process in self.family():
            suspend(process)

    def resume(self) -> None:
        for process in reversed(self.family()):
            process.resume()

    def kill(self) -> None:
        self.process.kill()


class Site:
    """What a site has for itself. Its address is the one of HAProxy that its keepaliveds share."""

    def __init__(self, number: int) -> None:
        self.number, self.machine, self.second_machine = number, f"site{number}", f"proxy{number}"
        self.address = f"127.{number}.128.1"
        self.writer: Writer
        self.instances: list[Instance] = []
        self.proxies: list[SlottedHAProxy] = []
        self.keepaliveds: list[Keepalived] = []

    def served(self) -> int:
        """Return how many requests its HAProxies have given to its instances, since they started."""
        return sum(int(proxy.statistics()["kuaishang", "BACKEND"]["req_tot"]) for proxy in self.proxies)


class Stage:
    """The sites and what they share, all started.

    :param stack: ends it all.
    :param workers: of each instance.
    """

    def __init__(self, stack: ExitStack, workers: int = 2) -> None:
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kuaishang-rehearsal-")))
        self.folder.chmod(0o755)  # another user runs the database
        self._stack, self._workers = stack, workers
        self.sites = [Site(number + 1) for number in range(SITES)]
        machines = {site.machine: site.number for site in self.sites}
        machines |= {site.second_machine: site.number for site in self.sites}
        self.network = stack.enter_context(closing(Network(machines)))
        self.servers: list[Startable] = []
        """All but WeChat, in the order in which they start."""
        self.simulator_host = f"127.{OUTSIDE}.0.1"
        self.simulator = Simulator(self.folder / "simulator", self.simulator_host)
        stack.callback(self.simulator.process.kill)
        self.simulator_port = int(self.simulator.url.rpartition(":")[2])
        self._start_redis()
        self._start_database()
        self._start_registry()
        self._start_instances()
        for site in self.sites:
            self._start_ways_in(site)
        self._start_name_servers()
        self._tls = ssl.create_default_context()
        self._tls.check_hostname = False  # each HAProxy has a certificate of its own
        for proxy in self.proxies:
            self._tls.load_verify_locations(proxy.certificate)
        _, lacking = self.wait_for_full_strength()
        assert not lacking, lacking
        self.users_of_instances = [signed_in(self.simulator, instance.url) for instance in self.instances]
        addresses = [f"https://{site.address}" for site in self.sites for _ in range(USERS_OF_A_SITE)]
        self.users_of_sites = [signed_in(self.simulator, address) for address in addresses]

    def _add(self, machine: str, server: Any, ends: bool = True) -> None:
        self.network.place(machine, server)
        self.servers.append(server)
        if ends:
            self._stack.callback(server.kill)

    def _start_redis(self) -> None:
        """One server and one sentinel in each site."""
        self.redis = RedisSentinels(self.folder / "redis", [f"127.{site.number}.0.21" for site in self.sites])
        self._stack.enter_context(closing(self.redis))
        for processes in (self.redis.servers, self.redis.sentinels):
            for site, process in zip(self.sites, processes, strict=True):
                self._add(site.machine, process, ends=False)
        self.redis.start()

    def _start_database(self) -> None:
        self.galera = self._stack.enter_context(closing(Galera(self.folder / "galera")))
        for node in self.galera.nodes:
            self._add(f"site{node.site}", node, ends=False)
        self.galera.start()
        self.galera.create()
        hosts = {f"site-{site.number}": f"127.{site.number}.0.9" for site in self.sites}
        peers = {name: f"{host}:{free_port(host)}" for name, host in hosts.items()}
        for site, (name, host) in zip(self.sites, hosts.items(), strict=True):
            with self.network.inside(site.machine):
                site.writer = Writer(self.folder / f"writer-{name}", self.galera, host, name, peers)
            self._stack.callback(site.writer.close)
            self._add(site.machine, site.writer, ends=False)

    def _start_registry(self) -> None:
        hosts = {f"etcd-{site.number}": f"127.{site.number}.0.41" for site in self.sites}
        peers = {name: peer_url(host) for name, host in hosts.items()}
        self.etcds = []
        for site, (name, host) in zip(self.sites, hosts.items(), strict=True):
            with self.network.inside(site.machine):
                self.etcds.append(Etcd(self.folder / name, host, name, peers))
            self._add(site.machine, self.etcds[-1])
        for etcd in self.etcds:
            etcd.wait()

    def _start_instances(self) -> None:
        environ = {
            **WIDE_LIMITS,
            "WECHAT_APP_ID": APP_ID,
            "WECHAT_APP_SECRET": APP_SECRET,
            "WECHAT_API_BASE_URL": self.simulator.url,
            "REDIS_URL": self.redis.url,
            "SECRET_KEY": secrets.token_hex(32),
            "ENCRYPTION_KEYS": base64.b64encode(secrets.token_bytes(32)).decode(),
            "METRICS_TOKEN": METRICS_TOKEN,
            "TRUSTED_PROXIES": "127.0.0.0/8",
            "DRAIN_SECONDS": "10",
            "WEB_CONCURRENCY": str(self._workers),
            "START_SECONDS": str(START_SECONDS),
        }
        for site in self.sites:
            for number in range(INSTANCES):
                own = {"HOST": f"127.{site.number}.0.{31 + number}", "PORT": str(8000 + 10 * site.number + number)}
                own["DATABASE_URL"] = site.writer.url
                folder = self.folder / f"web-{site.number}-{number + 1}"
                instance = Instance(self.network, site.machine, folder, {**environ, **own})
                site.instances.append(instance)
                self.servers.append(instance)
        for instance in self.instances:
            instance.start()
            self._stack.callback(instance.discard)
        for instance in self.instances:
            instance.wait()
            site = self.sites[int(instance.environ["HOST"].split(".")[1]) - 1]
            address, folder = instance.url.removeprefix("http://"), self.folder / f"heartbeat-{instance.name}"
            with self.network.inside(site.machine):
                heartbeat = Heartbeat(folder, self.etcds, address, 5, "--prefix", _prefix(site))
            self._add(site.machine, heartbeat)

    def _start_ways_in(self, site: Site) -> None:
        machines = {site.machine: f"127.{site.number}.0.1", site.second_machine: f"127.{site.number}.64.2"}
        for number, (machine, host) in enumerate(machines.items()):
            shared = {
                f"bind {host}:{port}{end}": f"bind {host}:{port},{site.address}:{port}{end}"
                for port, end in ((TLS_PORT, " "), (PLAIN_PORT, "\n"))
            }
            folder = self.folder / f"haproxy-{site.number}-{number + 1}"
            with self.network.inside(machine):
                proxy = SlottedHAProxy(folder, host=host, plain_port=PLAIN_PORT, port=TLS_PORT, different=shared)
                self._stack.callback(proxy.discard)
                agent = Agent(folder / "agent", self.etcds, proxy, 5, "--prefix", _prefix(site))
                (other,) = set(machines.values()) - {host}
                keepalived = Keepalived(folder / "keepalived", host, other, site.address)
            site.proxies.append(proxy)
            site.keepaliveds.append(keepalived)
            self._add(machine, proxy, ends=False)
            self._add(machine, agent)
            self._add(machine, keepalived)

    def _start_name_servers(self) -> None:
        sites = {f"site{site.number}": NamedSite(site.address, 10) for site in self.sites}
        self.name_servers = []
        for site in self.sites[:NAME_SERVERS]:
            folder = self.folder / f"dns-{site.number}"
            with self.network.inside(site.machine):
                server = DnsServer(folder, f"127.{site.number}.0.53", sites, PLAIN_PORT, STEP_SECONDS)
            self.name_servers.append(server)
            self._stack.callback(server.discard)
            self._add(site.machine, server, ends=False)

    @property
    def instances(self) -> list[Instance]:
        return [instance for site in self.sites for instance in site.instances]

    @property
    def proxies(self) -> list[SlottedHAProxy]:
        return [proxy for site in self.sites for proxy in site.proxies]

    def database_urls(self) -> list[str]:
        """Return the database at each node that takes reads."""
        return [self.galera.url(node.address, node.port) for node in self.galera.nodes if node.is_synced()]

    def describe(self) -> str:
        """Return what runs, in words."""
        return (
            f"{SITES} sites, each with {PROXIES} HAProxies that share an address by keepalived, and {INSTANCES}"
            f" instances of the service with {self._workers} workers each; Redis with"
            f" {len(self.redis.servers) - 1} replicas and {len(self.redis.sentinels)} sentinels;"
            f" {len(self.galera.nodes)} MariaDB servers as a Galera cluster,"
            f" behind a HAProxy in each site; {len(self.etcds)} members of etcd, with heartbeats and agents;"
            f" {NAME_SERVERS} name servers (gdnsd), which look at the sites; and a simulator of WeChat"
        )

    def phone(self) -> Phone:
        """Return a client with a resolver of its own."""
        lock, resolver = Lock(), Resolver([server.address for server in self.name_servers])

        def resolve() -> Address:
            with lock:
                return resolver.address(), TLS_PORT

        return Phone(resolve, self._tls)

    def holder(self, site: Site) -> int | None:
        """Return which of a site's HAProxies has its address; None if both do, or none."""
        machines = [site.machine, site.second_machine]
        holders = [number for number, machine in enumerate(machines) if self.network.has(machine, site.address)]
        return holders[0] if len(holders) == 1 else None

    def lacking(self) -> list[str]:
        """Return what is not as it is when all is well."""
        found = [f"{instance.name} does not serve" for instance in self.instances if not instance.serving()]
        found += [] if self.redis.complete() else ["Redis is not complete"]
        nodes = self.galera.nodes
        found += [f"{node.name} is not synced" for node in nodes if not _is_member(node, len(nodes))]
        for site in self.sites:
            found += [] if self.holder(site) is not None else [f"no address of site {site.number}"]
            for proxy in site.proxies:
                found += [f"{proxy.folder.name}: {what}" for what in _lacking(proxy)]
            found += [f"{name} is {what} in site {site.number}" for name, what in _nodes(site.writer) if what != "UP"]
        found += [f"{etcd.endpoint} is not healthy" for etcd in self.etcds if not etcd.is_healthy()]
        return found + [f"{server.folder.name}: {what}" for server in self.name_servers for what in _named(server)]

    def wait_for_full_strength(self, seconds: float = START_SECONDS) -> tuple[float | None, list[str]]:
        """Return when all was back, by the monotonic clock, or None and what is lacking."""
        end = time.monotonic() + seconds
        while lacking := self.lacking():
            if time.monotonic() > end:
                return None, lacking
            time.sleep(STRENGTH_PAUSE)
        return time.monotonic(), []

    def cut_power(self) -> None:
        """Kill all processes of all sites at once."""
        spared = self.simulator.process.popen.pid
        family = [one for one in psutil.Process().children(recursive=True) if one.pid != spared]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for server in self.servers:
            server.kill()
        for site in self.sites:
            for machine in (site.machine, site.second_machine):
                self.network.drop(machine, site.address)

    def restore_power(self) -> None:
        """Start all, as each machine would."""
        for server in self.servers:
            server.start()


def _prefix(site: Site) -> str:
    return f"/kuaishang/site{site.number}/"


def _is_member(node: Any, size: int) -> bool:
    return node.process is not None and node.status("wsrep_cluster_size") == str(size) and node.is_synced()


def _nodes(writer: Writer) -> list[tuple[str, str]]:
    try:
        return list(writer.states().items())
    except OSError:
        return [("HAProxy", "away")]


def _named(server: DnsServer) -> list[str]:
    try:
        found = [f"{address} is {state}" for address, state in server.states().items() if state != "UP"]
        return found + [f"{name} has the weight {weight}" for name, weight in server.weights().items() if weight < 10]
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return [f"{type(error).__name__}: {error}"]


def _lacking(proxy: SlottedHAProxy) -> list[str]:
    if proxy.process.poll() is not None:
        return ["it does not run"]
    try:
        slots = proxy.slots()
    except OSError:
        return ["it does not answer"]
    missing = [f"{INSTANCES - len(slots)} slots are empty"] if len(slots) != INSTANCES else []
    return missing + [f"{name} is {state}" for name, state in slots.items() if state != "UP"]
